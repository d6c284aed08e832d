"""From the operator's settings to the marks of image files."""

from zcore.errors import ConfigurationError
from zcore.image_files.content_credentials import CredentialSigner
from zcore.image_files.signing_certificate import CERTIFICATE_SETTING, KEY_SETTING, read_certificate
from zcore.image_files.writing import Marks
from zcore.settings import TREE, ImageFilesSettings


def configured_marks(settings: ImageFilesSettings) -> Marks:
    """Return the marks, with a signer if a certificate is configured.

    Raises `ConfigurationError` for a certificate without a key, and for a pair that cannot sign.
    """
    signer = None
    if settings.c2pa_certificate or settings.c2pa_key:
        if not (settings.c2pa_certificate and settings.c2pa_key):
            given, missing = (CERTIFICATE_SETTING, KEY_SETTING)[:: 1 if settings.c2pa_certificate else -1]
            raise ConfigurationError(f"{missing}: must be set if {given} is")
        pair = read_certificate(TREE / settings.c2pa_certificate, TREE / settings.c2pa_key)
        signer = CredentialSigner(pair)
    return Marks(settings.digital_source_type, settings.parameters_text, signer)
