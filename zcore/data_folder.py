"""The data folder is its owner's alone: it holds prompts, images, webhook URLs, logs and secrets.

Processes create files for their owner only (`UMASK`), and take the rights of others away from a folder that an earlier
version or another program created. Creates nothing.
"""

import os
import stat
from pathlib import Path

from zcore.settings import Settings
from zcore.telemetry import log

UMASK = 0o077
OF_OTHERS = 0o077
ENTRIES = ("keys", "storage", "log", "broker", "zimage.db", "zimage.db-wal", "zimage.db-shm")
"""What this service stores in the folder. Without any of them, the folder may be another program's as well."""


def make_private(settings: Settings) -> None:
    """Take the rights of other users away from the data folder and what this service stored in it; log what changed.

    Never changes what another user owns, nor a folder that all users share, such as /tmp: logs a warning instead.
    """
    folder = settings.data_path
    entries = [path for path in (folder / name for name in ENTRIES) if path.exists()]
    for path in [folder, *entries] if entries else []:
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        if not mode & OF_OTHERS or stat.S_ISLNK(status.st_mode):
            continue
        if status.st_uid != os.geteuid() or mode & stat.S_ISVTX:
            log.warning("data_dir.readable_by_others", path=str(path), mode=f"{mode:04o}")
            continue
        _tighten(path, mode)


def _tighten(path: Path, mode: int) -> None:
    try:
        path.chmod(mode & ~OF_OTHERS)
    except OSError as fault:
        log.warning("data_dir.readable_by_others", path=str(path), mode=f"{mode:04o}", error=fault.strerror)
    else:
        log.info("data_dir.made_private", path=str(path), mode=f"{mode:04o}")
