"""The secrets of an installation: taken from the settings, or made at first start and kept in `data_dir`.

Gives `Keys`. A secret that is neither configured nor on disk is made once, by whichever process comes first, in a file
that only its owner can read. Hosts that share no `data_dir` need the three settings. Does not know what they protect.
"""

import base64
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zcore.errors import ConfigurationError
from zcore.settings import Settings

WEBHOOK_SECRET_PREFIX = "whsec_"
SHORTEST_SECRET_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Keys:
    """`admin` opens the admin pages, `link` signs links to pictures, `webhook` (`whsec_...`) signs webhooks."""

    admin: str
    link: str
    webhook: str


def load_keys(settings: Settings) -> Keys:
    """The secrets of this installation. Writes `data_dir/keys/` where a secret has to be made.

    Raises `ConfigurationError` where it cannot be kept there, and for a webhook secret that signs nothing.
    """
    folder = settings.data_path / "keys"
    try:
        keys = Keys(
            admin=settings.server.admin_key or _kept(folder / "admin", lambda: f"zadm_{secrets.token_urlsafe(24)}"),
            link=settings.storage.link_key or _kept(folder / "link", lambda: secrets.token_urlsafe(32)),
            webhook=settings.webhooks.secret or _kept(folder / "webhook", _new_webhook_secret),
        )
    except OSError as fault:
        raise ConfigurationError(f"data_dir: secrets cannot be kept in {folder}: {fault.strerror}") from fault
    _check_webhook_secret(keys.webhook)
    for name, secret in (("server.admin_key", keys.admin), ("storage.link_key", keys.link)):
        if len(secret.strip()) < SHORTEST_SECRET_CHARACTERS:
            raise ConfigurationError(f"{name}: has to be at least {SHORTEST_SECRET_CHARACTERS} characters")
    return keys


def _check_webhook_secret(secret: str) -> None:
    """Standard Webhooks 1.0.0: `whsec_` and the base64 of 24 to 64 bytes."""
    try:
        size = len(base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX), validate=True))
    except ValueError:
        size = 0
    if not secret.startswith(WEBHOOK_SECRET_PREFIX) or not 24 <= size <= 64:
        raise ConfigurationError(f"webhooks.secret: has to be {WEBHOOK_SECRET_PREFIX} and the base64 of 24 to 64 bytes")


def _new_webhook_secret() -> str:
    return WEBHOOK_SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _kept(path: Path, make: Callable[[], str]) -> str:
    """The file's content; written whole and linked into place, so that of two processes both see the first one's."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        draft.touch(mode=0o600)
        try:
            with draft.open("w", encoding="ascii") as file:
                file.write(make())
                file.flush()
                os.fsync(file.fileno())  # an empty file after a power cut would be an empty secret
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    secret = path.read_text(encoding="ascii").strip()
    if not secret:
        raise ConfigurationError(f"{path}: is empty; delete it, and a new secret is made")
    return secret
