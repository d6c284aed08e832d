"""Content Credentials: the signed C2PA manifest of an image, written and read without the network.

The manifest says that a model generated the image, or edited the image that it started from. It has no thumbnail, which
would add up to a megabyte, and no time stamp, which needs an authority. Signing uses c2pa-python (MIT or Apache-2.0),
which is imported when it is first needed: a library of 23 MB.
"""

import io
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from PIL import Image, UnidentifiedImageError

from zcore.errors import ConfigurationError, SigningError
from zcore.image_files.digital_source import EDITED, GENERATED
from zcore.image_files.signing_certificate import CERTIFICATE_SETTING, SigningCertificate
from zcore.request import GenerationRequest

GENERATOR = "zimage"
MANIFEST_MARK = b"c2pa"
"""A file without these bytes has no manifest."""
OFFLINE: dict[str, Any] = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who signed an image. `state` is C2PA's validation state in lower case.

    It is `invalid` if the image was changed afterwards, else `valid`, or `trusted` if the signer is on a trust list.
    """

    signed_by: str
    issuer: str
    state: str


class CredentialSigner:
    """Signs images with one certificate; several threads may use it."""

    def __init__(self, certificate: SigningCertificate) -> None:
        """Raises `ConfigurationError` if C2PA's library does not accept the certificate."""
        self._certificate = certificate
        self._library: Any = import_module("c2pa")
        self._signing = threading.Lock()  # a context serves one builder at a time
        try:
            info = self._library.C2paSignerInfo(
                certificate.algorithm.encode(), certificate.chain, certificate.key, None
            )
            settings = self._library.Settings.from_dict(OFFLINE)
            self._context = self._library.Context(settings, self._library.Signer.from_info(info))
            signed = self._signed(_blank_image(), "png", _created(""))
        except self._library.C2paError as fault:
            raise ConfigurationError(f"{CERTIFICATE_SETTING}: cannot sign an image: {fault}") from fault
        if (found := credentials_in(signed)) is None or found.state == "invalid":
            raise ConfigurationError(f"{CERTIFICATE_SETTING}: signs images, but readers do not accept the signature")

    def sign(
        self, content: bytes, request: GenerationRequest, made_by: Mapping[str, str], inputs: Mapping[str, str]
    ) -> bytes:
        """Return the file with a manifest. The arguments are those of `write_image`.

        The same file gives other bytes each time, with the same pixels. Raises `SigningError`.
        """
        self._certificate.require_valid()
        version = made_by.get("engine", "")
        manifest = _created(version) if request.image is None else _edited(version, inputs.get("image", "unknown"))
        try:
            return self._signed(content, request.format, manifest)
        except self._library.C2paError as fault:
            raise SigningError(f"the image could not be signed: {fault}") from fault

    def _signed(self, content: bytes, image_format: str, manifest: dict[str, Any]) -> bytes:
        signed = io.BytesIO()
        with self._signing, self._library.Builder(manifest, self._context) as builder:
            builder.sign(f"image/{image_format}", io.BytesIO(content), signed)
        return signed.getvalue()


def credentials_in(content: bytes) -> Credentials | None:
    """Return who signed a PNG, JPEG, WebP or AVIF file, or None if it has no readable manifest."""
    if MANIFEST_MARK not in content:
        return None
    library: Any = import_module("c2pa")
    try:
        with Image.open(io.BytesIO(content)) as image:
            media_type = f"image/{str(image.format).lower()}"
        context = library.Context(library.Settings.from_dict(OFFLINE))
        with library.Reader(media_type, io.BytesIO(content), context=context) as reader:
            store = cast(dict[str, Any], json.loads(reader.json()))
            state = str(reader.get_validation_state()).lower()
    except (UnidentifiedImageError, library.C2paError):
        return None
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signature = active.get("signature_info", {})
    return Credentials(signature.get("common_name", ""), signature.get("issuer", ""), state)


def _created(version: str) -> dict[str, Any]:
    action = {"action": "c2pa.created", "digitalSourceType": GENERATED, "softwareAgent": _software(version)}
    return _manifest(version, [action])


def _edited(version: str, digest: str) -> dict[str, Any]:
    """Describe an image that starts from another one.

    A manifest must open what it edits (C2PA Technical Specification 2.2, 18.15.4), so the input is an ingredient,
    identified by its SHA-256.
    """
    identifier = f"sha256:{digest}"
    actions = [
        {"action": "c2pa.opened", "parameters": {"ingredientIds": [identifier]}},
        {"action": "c2pa.edited", "digitalSourceType": EDITED, "softwareAgent": _software(version)},
    ]
    ingredient = {"title": "input image", "relationship": "parentOf", "instance_id": identifier}
    return {**_manifest(version, actions), "ingredients": [ingredient]}


def _manifest(version: str, actions: list[dict[str, Any]]) -> dict[str, Any]:
    assertion = {"label": "c2pa.actions.v2", "data": {"actions": actions}, "created": True}
    return {"claim_generator_info": [_software(version)], "assertions": [assertion]}


def _software(version: str) -> dict[str, str]:
    return {"name": GENERATOR, "version": version} if version else {"name": GENERATOR}


def _blank_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()
