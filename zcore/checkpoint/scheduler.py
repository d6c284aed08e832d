"""What the engine takes from a checkpoint's scheduler configuration."""

from pathlib import Path
from typing import cast

from zcore.checkpoint.files import read_json
from zcore.errors import CheckpointError
from zcore.request import Shift, field_errors


def default_shift(folder: Path) -> float:
    """Return the `shift` of `scheduler/scheduler_config.json`: 3.0 in the published checkpoint.

    Raises `CheckpointError` naming the file if it cannot be read or has no such number.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(path).get("shift")
    for error in field_errors(shift, Shift, "shift"):
        raise CheckpointError(f"{path}: shift {error.detail}")
    return float(cast(float, shift))
