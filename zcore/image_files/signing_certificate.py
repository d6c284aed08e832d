"""The certificate chain and private key that sign images: read, checked, and made for a trial.

C2PA's certificate profile (C2PA Technical Specification 2.2, 14.5): a leaf that is not self-signed and may make digital
signatures for e-mail protection or document signing, with the certificates that issued it after it.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zcore.errors import ConfigurationError, SigningError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, CertificateBuilder

PURPOSES = ("1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36")
"""Extended key usages that the profile accepts without further configuration: emailProtection, documentSigning."""
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
SHORTEST_RSA_BITS = 2048
TRIAL_DAYS = 365
TRIAL_ROOT, TRIAL_SIGNER = " trial root", " trial signer"
"""What follows the organization in the common names of a trial chain."""
LONGEST_ORGANIZATION_BYTES = 64 - len(TRIAL_SIGNER)
"""In UTF-8. A common name has at most 64 (RFC 5280, appendix A.1)."""
CERTIFICATE_FILE, KEY_FILE, ROOT_FILE = "certificate.pem", "key.pem", "root.pem"
CERTIFICATE_SETTING, KEY_SETTING = "image_files.c2pa_certificate", "image_files.c2pa_key"


@dataclass(frozen=True, slots=True)
class SigningCertificate:
    """A chain and the key of its first certificate, both PEM, that fit each other; `algorithm` is C2PA's name."""

    chain: bytes
    key: bytes
    algorithm: str
    expires_at: datetime

    def require_valid(self) -> None:
        """Raise `SigningError` if the certificate has expired since it was read."""
        if datetime.now(UTC) >= self.expires_at:
            raise SigningError(f"{CERTIFICATE_SETTING}: expired at {self.expires_at:%Y-%m-%d %H:%M} UTC; renew it")


def read_certificate(certificate: Path, key: Path) -> SigningCertificate:
    """Read and check a chain and its key. Raises `ConfigurationError` that names the setting and what is wrong."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    chain_pem, key_pem = _content(certificate, CERTIFICATE_SETTING), _content(key, KEY_SETTING)
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
    except ValueError as fault:
        raise _fault(
            CERTIFICATE_SETTING, certificate, "must hold a certificate chain in PEM, the leaf first"
        ) from fault
    try:
        private_key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:
        raise _fault(KEY_SETTING, key, "must hold a private key in PEM without a passphrase") from fault
    if wrong := _mismatch(chain):
        raise _fault(CERTIFICATE_SETTING, certificate, wrong)
    if private_key.public_key() != chain[0].public_key():
        raise _fault(KEY_SETTING, key, "is not the key of the first certificate in " + CERTIFICATE_SETTING)
    return SigningCertificate(chain_pem, key_pem, _algorithm(private_key, key), chain[0].not_valid_after_utc)


def make_trial_certificate(folder: Path, organization: str) -> tuple[Path, Path, Path]:
    """Make a chain of a root and a leaf that is valid for a year, and its key, in files of `folder`.

    `organization` has at most `LONGEST_ORGANIZATION_BYTES`. Returns the paths of the chain, the key and the root alone,
    which readers need to trust the chain. The key of the root is discarded. Raises `ConfigurationError` if one of the
    files exists or cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509 import ObjectIdentifier

    root_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, leaf_name = (_name(organization, organization + role) for role in (TRIAL_ROOT, TRIAL_SIGNER))
    root = (
        _builder(root_name, root_name, root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        _builder(leaf_name, root_name, leaf_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ObjectIdentifier(PURPOSES[0])]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    root_pem = root.public_bytes(Encoding.PEM)
    contents = {
        folder / CERTIFICATE_FILE: leaf.public_bytes(Encoding.PEM) + root_pem,
        folder / KEY_FILE: leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        folder / ROOT_FILE: root_pem,
    }
    existing = [path for path in contents if path.exists()]
    if existing:
        raise ConfigurationError(f"{existing[0]} exists already; move it away to make another certificate")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path, content in contents.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as fault:
        raise ConfigurationError(f"{folder}: the certificate cannot be stored: {fault.strerror}") from fault
    certificate, key, root_path = contents
    return certificate, key, root_path


def _mismatch(chain: "list[Certificate]") -> str | None:
    """Return what keeps this chain from signing now, or None."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    leaf, now = chain[0], datetime.now(UTC)
    if now >= leaf.not_valid_after_utc:
        return f"expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it"
    if now < leaf.not_valid_before_utc:
        return f"is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if leaf.issuer == leaf.subject:
        return "must begin with a certificate that another one issued; a self-signed one cannot sign"
    for issued, issuer in pairwise(chain):
        try:
            issued.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return f"{issued.subject.rfc4514_string()} is not issued by the certificate after it; the leaf comes first"
    extensions: dict[Any, Any] = {type(one.value): one.value for one in leaf.extensions}
    constraints, usage = extensions.get(x509.BasicConstraints), extensions.get(x509.KeyUsage)
    if isinstance(constraints, x509.BasicConstraints) and constraints.ca:
        return "must begin with the signer's own certificate, not with that of an authority"
    if not (isinstance(usage, x509.KeyUsage) and usage.digital_signature):
        return "is of the wrong kind: its key usage must include digitalSignature"
    purposes = extensions.get(x509.ExtendedKeyUsage)
    named = [one.dotted_string for one in purposes] if isinstance(purposes, x509.ExtendedKeyUsage) else []
    if not set(named) & set(PURPOSES):
        return "is of the wrong kind: its extended key usage must be emailProtection or documentSigning"
    return None


def _algorithm(key: Any, path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= SHORTEST_RSA_BITS:
        return "ps256"
    allowed = f"P-256, P-384, P-521, Ed25519 or RSA of at least {SHORTEST_RSA_BITS} bits"
    raise _fault(KEY_SETTING, path, f"is of the wrong kind: must be a key of {allowed}")


def _content(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise _fault(setting, path, f"cannot be read: {fault.strerror}") from fault


def _fault(setting: str, path: Path, detail: str) -> ConfigurationError:
    return ConfigurationError(f"{setting}: {path}: {detail}")


def _name(organization: str, common_name: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    attributes = {NameOID.ORGANIZATION_NAME: organization, NameOID.COMMON_NAME: common_name}
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes.items()])


def _builder(subject: Any, issuer: Any, public_key: Any) -> "CertificateBuilder":
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=TRIAL_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*allowed: str) -> Any:
    from cryptography import x509

    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    others = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: name in allowed for name in (*names, *others)})
