"""What other programs read in an image file: its digital source type, its parameters as text, its signed manifest."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec.structs import replace
from PIL import Image
from sd_parsers import ParserManager

from zcore.errors import ConfigurationError, SigningError
from zcore.image_files.configured_marks import configured_marks
from zcore.image_files.content_credentials import Credentials, CredentialSigner, credentials_in
from zcore.image_files.signing_certificate import (
    CERTIFICATE_FILE,
    KEY_FILE,
    ROOT_FILE,
    make_trial_certificate,
    read_certificate,
)
from zcore.image_files.writing import Marks, read_parameters, write_image
from zcore.request import PROMPT_LIMIT_CHARACTERS, GenerationRequest, LoraUse, OutputFormat
from zcore.settings import ImageFilesSettings

FORMATS = get_args(OutputFormat)
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE_BY = {"engine": "1.2.3", "model": "Tongyi-MAI/Z-Image-Turbo", "lora:night": "0123456789abcdef" * 4}
INPUTS = {"image": "a" * 64}
IMAGE = Image.frombytes("RGB", (64, 80), bytes(index % 251 for index in range(64 * 80 * 3)))
REQUEST = GenerationRequest(
    prompt='a fox, Steps: 99, Sampler: "none"\nSteps: 3, CFG scale: 1, Seed: 2\nüñ 🦊',
    negative_prompt="blur,\n'grain'",
    guidance_scale=2.5,
    seed=41,
    width=64,
    height=80,
    n=2,
    loras=(LoraUse(name="night", scale=0.8),),
)
EDITED = replace(REQUEST, image="input:1", strength=0.4, loras=())


@dataclass(frozen=True)
class Pair:
    """A certificate chain with its key, and the root that readers trust."""

    folder: Path
    signer: CredentialSigner

    @property
    def root(self) -> str:
        return (self.folder / ROOT_FILE).read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("keys") / "c2pa"
    certificate, key, _root = make_trial_certificate(folder, "Example Ltd")
    return Pair(folder, CredentialSigner(read_certificate(certificate, key)))


def written(request: GenerationRequest, format: str, marks: Marks | None = None) -> bytes:
    return write_image(IMAGE, replace(request, format=format), 1, MADE_BY, INPUTS, marks or Marks()).content


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


# Digital source type


def source_types(content: bytes) -> list[str]:
    with opened(content) as image:
        packet: bytes | None = image.info.get("xmp")
    if packet is None:
        return []
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    return [str(one.text) for one in ElementTree.fromstring(packet.decode().strip("\0")).iter(name)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_file_says_in_xmp_that_a_model_made_or_changed_it(format: str) -> None:
    assert source_types(written(REQUEST, format)) == [f"{TERMS}trainedAlgorithmicMedia"]
    assert source_types(written(EDITED, format)) == [f"{TERMS}compositeWithTrainedAlgorithmicMedia"]
    longest = replace(REQUEST, prompt="x" * PROMPT_LIMIT_CHARACTERS, system_prompt="🦊" * PROMPT_LIMIT_CHARACTERS)
    content = written(longest, format)
    assert source_types(content) == [f"{TERMS}trainedAlgorithmicMedia"], "in the first of several segments"
    parameters = read_parameters(content)
    assert parameters is not None
    assert parameters.request.system_prompt == longest.system_prompt


@pytest.mark.parametrize("format", FORMATS)
def test_each_mark_can_be_left_out(format: str) -> None:
    content = written(REQUEST, format, Marks(digital_source_type=False, parameters_text=False))
    assert source_types(content) == []
    assert "parameters" not in opened(content).info
    assert not opened(content).getexif()
    assert credentials_in(content) is None
    assert credentials_in(content + b"c2pa") is None
    assert credentials_in(b"c2pa, but no image") is None
    parameters = read_parameters(content)
    assert parameters is not None
    assert parameters.request.seed == 42


# Parameters as text


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_reader_of_the_web_uis_files_finds_every_parameter(format: str) -> None:
    with opened(written(REQUEST, format)) as image:
        found = ParserManager().parse(image)
    assert found is not None
    assert found.full_prompt == f"{REQUEST.prompt} <lora:night:0.8>"
    assert found.full_negative_prompt == REQUEST.negative_prompt
    (sampler,) = found.samplers
    assert sampler.name == "Euler"
    assert sampler.parameters == {"steps": "8", "scheduler": "Simple", "cfg_scale": "3.5", "seed": "42"}
    assert [model.name for model in found.models] == ["Tongyi-MAI/Z-Image-Turbo"]
    assert found.metadata["Size"] == "64x80"
    assert found.metadata["Version"] == "zimage 1.2.3"
    text = str(found.raw_parameters["parameters"])
    assert 'Lora hashes: "night: 0123456789"' in text.splitlines()[-1]


def test_an_avif_has_the_same_text_as_a_jpeg() -> None:
    texts = [opened(written(REQUEST, name)).getexif().get_ifd(0x8769)[0x9286] for name in ("jpeg", "avif")]
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"UNICODE\0\0a\0 \0f\0o\0x")


def test_a_prompt_that_contains_the_marker_of_the_negative_prompt_does_not_end_there() -> None:
    request = replace(REQUEST, prompt="Negative prompt: none", loras=())
    found = ParserManager().parse(opened(written(request, "png")))
    assert found is not None
    assert found.full_prompt == "Negative prompt : none"
    assert found.full_negative_prompt == REQUEST.negative_prompt


# Signed manifests


def reader(content: bytes, format: str, root: str) -> c2pa.Reader:
    settings = {"version": 1, "trust": {"trust_anchors": root}, "verify": {"verify_trust": True}}
    context = c2pa.Context(c2pa.Settings.from_dict(settings))
    return c2pa.Reader(f"image/{format}", io.BytesIO(content), context=context)


def actions(read: c2pa.Reader) -> list[dict[str, Any]]:
    manifest = read.get_active_manifest()
    assert manifest is not None
    (found,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_file_is_valid_and_keeps_its_pixels_and_parameters(pair: Pair, format: str) -> None:
    file = write_image(IMAGE, replace(REQUEST, format=format), 1, MADE_BY, {}, Marks(signer=pair.signer))
    read = reader(file.content, format, pair.root)
    assert read.get_validation_state() == "Trusted"
    assert [(one["action"], one["digitalSourceType"]) for one in actions(read)] == [
        ("c2pa.created", f"{TERMS}trainedAlgorithmicMedia")
    ]
    manifest = read.get_active_manifest()
    assert manifest is not None
    assert (manifest["claim_generator_info"][0]["name"], manifest["claim_generator_info"][0]["version"]) == (
        "zimage",
        "1.2.3",
    )
    assert "thumbnail" not in json.dumps(manifest)
    plain = written(REQUEST, format)
    assert opened(file.content).convert("RGB").tobytes() == opened(plain).convert("RGB").tobytes()
    assert len(file.content) - len(plain) < 8_000
    assert file.sha256 == hashlib.sha256(file.content).hexdigest()
    parameters = read_parameters(file.content)
    assert parameters is not None
    assert parameters.request.prompt == REQUEST.prompt
    assert source_types(file.content) == [f"{TERMS}trainedAlgorithmicMedia"]
    assert credentials_in(file.content) == Credentials("Example Ltd trial signer", "Example Ltd", "valid")


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_starts_from_another_is_opened_and_edited(pair: Pair, format: str) -> None:
    read = reader(written(EDITED, format, Marks(signer=pair.signer)), format, pair.root)
    assert read.get_validation_state() == "Trusted"
    first, second = actions(read)
    assert first["action"] == "c2pa.opened"
    assert (second["action"], second["digitalSourceType"]) == (
        "c2pa.edited",
        f"{TERMS}compositeWithTrainedAlgorithmicMedia",
    )
    manifest = read.get_active_manifest()
    assert manifest is not None
    (ingredient,) = manifest["ingredients"]
    assert (ingredient["relationship"], ingredient["instance_id"]) == ("parentOf", f"sha256:{INPUTS['image']}")


@pytest.mark.parametrize("format", ["png", "webp", "avif"])
def test_transparency_survives_signing(pair: Pair, format: str) -> None:
    image = IMAGE.convert("RGBA")
    image.putalpha(120)
    file = write_image(image, replace(REQUEST, format=format), 0, MADE_BY, {}, Marks(signer=pair.signer))
    assert reader(file.content, format, pair.root).get_validation_state() == "Trusted"
    assert opened(file.content).convert("RGBA").getchannel("A").getextrema() == (120, 120)


def test_a_changed_file_is_reported_as_changed(pair: Pair) -> None:
    content = bytearray(written(REQUEST, "png", Marks(signer=pair.signer)))
    content[content.index(b"IDAT") + 20] ^= 1
    found = credentials_in(bytes(content))
    assert found is not None
    assert found.state == "invalid"


# Certificates


def leaf_of(pair: Pair, change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]) -> bytes:
    """Return a chain with the pair's key in a certificate of another kind, issued by an authority of its own."""
    key = load_pem_private_key((pair.folder / KEY_FILE).read_bytes(), None)
    authority = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("leaf", "root"))
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=9))
    return change(builder).sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)


def usage(**allowed: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
    return x509.KeyUsage(
        **{**dict.fromkeys(names.split(), False), "crl_sign": False, "encipher_only": False, "decipher_only": False}
        | allowed
    )


def another_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def faults(pair: Pair) -> dict[str, tuple[bytes, bytes, str]]:
    chain, key = ((pair.folder / name).read_bytes() for name in (CERTIFICATE_FILE, KEY_FILE))
    root = pair.root.encode()
    tls = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    signing = usage(digital_signature=True)
    return {
        "not PEM": (b"x", key, "image_files.c2pa_certificate: .* must hold a certificate chain in PEM"),
        "no key": (chain, b"x", "image_files.c2pa_key: .* must hold a private key in PEM without a passphrase"),
        "another key": (chain, another_key(), "image_files.c2pa_key: .* is not the key of the first certificate"),
        "an authority": (root, key, "must begin with a certificate that another one issued; a self-signed one"),
        "wrong order": (root + chain, key, "self-signed"),
        "foreign chain": (leaf_of(pair, lambda leaf: leaf) + root, key, "CN=leaf is not issued by the certificate aft"),
        "no usage": (leaf_of(pair, lambda leaf: leaf), key, "its key usage must include digitalSignature"),
        "for TLS": (
            leaf_of(pair, lambda leaf: leaf.add_extension(signing, True).add_extension(tls, False)),
            key,
            "its extended key usage must be emailProtection or documentSigning",
        ),
    }


@pytest.mark.parametrize(
    "fault",
    ["not PEM", "no key", "another key", "an authority", "wrong order", "foreign chain", "no usage", "for TLS"],
)
def test_a_pair_that_cannot_sign_is_a_configuration_error_that_says_why(pair: Pair, tmp_path: Path, fault: str) -> None:
    chain, key, message = faults(pair)[fault]
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(key)
    with pytest.raises(ConfigurationError, match=message):
        read_certificate(tmp_path / "chain.pem", tmp_path / "key.pem")


def test_an_expired_certificate_is_refused_at_start_and_signs_nothing_later(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "datetime":
            return datetime.now(tz) + timedelta(days=400)

    monkeypatch.setattr("zcore.image_files.signing_certificate.datetime", Later)
    with pytest.raises(ConfigurationError, match=r"image_files\.c2pa_certificate: .* expired at \d{4}-.* renew it"):
        read_certificate(pair.folder / CERTIFICATE_FILE, pair.folder / KEY_FILE)
    with pytest.raises(SigningError, match="expired at") as failure:
        written(REQUEST, "png", Marks(signer=pair.signer))
    assert (failure.value.code, failure.value.retryable) == ("signing_failed", True)


def test_the_settings_name_both_files_or_none(pair: Pair, tmp_path: Path) -> None:
    assert configured_marks(ImageFilesSettings()) == Marks()
    assert configured_marks(ImageFilesSettings(parameters_text=False)) == Marks(parameters_text=False)
    certificate, key = (str(pair.folder / name) for name in (CERTIFICATE_FILE, KEY_FILE))
    assert configured_marks(ImageFilesSettings(c2pa_certificate=certificate, c2pa_key=key)).signer is not None
    with pytest.raises(ConfigurationError, match=r"^image_files\.c2pa_key: must be set if .*c2pa_certificate is$"):
        configured_marks(ImageFilesSettings(c2pa_certificate=certificate))
    with pytest.raises(ConfigurationError, match=r"^image_files\.c2pa_certificate: must be set if .*c2pa_key is$"):
        configured_marks(ImageFilesSettings(c2pa_key=key))
    with pytest.raises(ConfigurationError, match=r"c2pa_key: .*missing\.pem: cannot be read: No such file"):
        configured_marks(ImageFilesSettings(c2pa_certificate=certificate, c2pa_key=str(tmp_path / "missing.pem")))
