"""Secrets of an installation: taken from the settings, or generated at first start and stored in `data_dir`.

A secret that is neither configured nor on disk is generated once, by the first process that needs it, in a file that
only its owner can read. Hosts that do not share a `data_dir` must set all of them.
"""

import base64
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zcore.errors import ConfigurationError
from zcore.settings import Settings

WEBHOOK_SECRET_PREFIX = "whsec_"
SHORTEST_SECRET_CHARACTERS = 16
LOCAL_OWNER = "local"
"""Owner of the generated API key, and caller of a keyless service: jobs stay visible if one becomes the other."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Secrets of an installation.

    `admin` opens the admin pages, `api` holds the API keys by owner (none if the service is keyless), `link` signs
    links to images, `webhook` (`whsec_...`) signs webhooks.
    """

    admin: str
    api: Mapping[str, str]
    link: str
    webhook: str


def load_keys(settings: Settings) -> Keys:
    """Load the secrets of this installation; missing ones are generated in `data_dir/keys/`.

    Raises `ConfigurationError` if a secret cannot be stored there, is too short, or is not a valid webhook secret.
    """
    folder = settings.data_path / "keys"
    try:
        keys = Keys(
            api=_api_keys(settings),
            admin=settings.server.admin_key or _stored(folder / "admin", lambda: f"zadm_{secrets.token_urlsafe(24)}"),
            link=settings.storage.link_key or _stored(folder / "link", lambda: secrets.token_urlsafe(32)),
            webhook=settings.webhooks.secret or _stored(folder / "webhook", _new_webhook_secret),
        )
    except OSError as fault:
        raise ConfigurationError(f"data_dir: secrets cannot be stored in {folder}: {fault.strerror}") from fault
    _check_webhook_secret(keys.webhook)
    api_keys = {f"server.api_keys.{owner}": key for owner, key in keys.api.items()}
    for name, secret in {"server.admin_key": keys.admin, "storage.link_key": keys.link, **api_keys}.items():
        if len(secret.strip()) < SHORTEST_SECRET_CHARACTERS:
            raise ConfigurationError(
                f"{name}: must have at least {SHORTEST_SECRET_CHARACTERS} characters; generate one by: "
                "python3 -c 'import secrets; print(secrets.token_urlsafe(24))'"
            )
    return keys


def api_key_file(settings: Settings) -> Path | None:
    """Return the file of the generated API key, or None if the service is keyless or its API keys are configured."""
    return None if settings.server.keyless or settings.server.api_keys else settings.data_path / "keys" / "api"


def _api_keys(settings: Settings) -> Mapping[str, str]:
    """Return the API keys by owner. Raises `ConfigurationError` if a keyless service has some, or is not local."""
    server, file = settings.server, api_key_file(settings)
    if server.keyless and server.api_keys:
        raise ConfigurationError("server.keyless: cannot be combined with server.api_keys; remove one of them")
    if server.keyless and not server.is_local:
        raise ConfigurationError(
            f"server.keyless: server.host must be a loopback address such as 127.0.0.1, not {server.host}; "
            "without server.keyless an API key is generated"
        )
    return (
        server.api_keys if file is None else {LOCAL_OWNER: _stored(file, lambda: f"zapi_{secrets.token_urlsafe(24)}")}
    )


def _check_webhook_secret(secret: str) -> None:
    """Raise `ConfigurationError` unless the secret is valid under Standard Webhooks 1.0.0."""
    try:
        size = len(base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX), validate=True))
    except ValueError:
        size = 0
    if not secret.startswith(WEBHOOK_SECRET_PREFIX) or not 24 <= size <= 64:
        raise ConfigurationError(
            f"webhooks.secret: must be {WEBHOOK_SECRET_PREFIX} followed by the base64 of 24 to 64 bytes"
        )


def _new_webhook_secret() -> str:
    return WEBHOOK_SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _stored(path: Path, generate: Callable[[], str]) -> str:
    """Return the secret in the file, generating it if the file is missing.

    The new file is linked into place only when complete, so that concurrent processes all use the same secret.
    """
    if not path.exists():
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        draft.touch(mode=0o600)
        try:
            with draft.open("w", encoding="ascii") as file:
                file.write(generate())
                file.flush()
                os.fsync(file.fileno())  # an empty file after a power cut would be an empty secret
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    try:
        secret = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as fault:
        raise ConfigurationError(f"{path}: is not text in UTF-8; save it in that encoding") from fault
    if not secret:
        raise ConfigurationError(f"{path}: is empty; delete the file to generate a new secret")
    return secret
