"""Training folder: the states, logs and results of all stages.

A stage saves its state regularly and continues from it when it is started again. Files are written atomically, so an
interruption loses at most the steps since the last state.
"""

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class TrainingFolder:
    """A folder outside the source tree. `device` is the device of the training's tensors."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Save a state under this name, atomically replacing an older one."""
        unfinished = self.path(name + ".part")
        torch.save(dict(state), unfinished)
        os.replace(unfinished, self.path(name))

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the state saved under this name, or None."""
        if not self.path(name).exists():
            return None
        return torch.load(self.path(name), map_location=self.device, weights_only=True)

    def log(self, stage: str, **figures: float | str) -> None:
        """Append a row to the CSV log of a stage and print it. The first row determines the columns."""
        path = self.path(f"{stage}.csv")
        row = {"at": time.strftime("%H:%M:%S", time.gmtime())} | {
            name: f"{value:.5g}" if isinstance(value, float) else value for name, value in figures.items()
        }
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(stage, " ".join(f"{name}={value}" for name, value in row.items()), flush=True)
