"""Where training keeps its things: one folder with the state, the log and the result of every stage.

A stage writes its state now and then and goes on from it when started again. Files appear whole or not at all, so a
stop at any moment loses at most the steps since the last state.
"""

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Workplace:
    """A folder outside the source tree; `device` is where the tensors of the training live."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep this state under this name; it replaces the older one at once."""
        unfinished = self.path(name + ".part")
        torch.save(dict(state), unfinished)
        os.replace(unfinished, self.path(name))

    def load(self, name: str) -> dict[str, Any] | None:
        """The state kept under this name, or None."""
        if not self.path(name).exists():
            return None
        return torch.load(self.path(name), map_location=self.device, weights_only=True)

    def log(self, stage: str, **figures: float | str) -> None:
        """Add a row to the stage's CSV and print it; a stage's columns are those of its first row."""
        path = self.path(f"{stage}.csv")
        row = {"at": time.strftime("%H:%M:%S", time.gmtime())} | {
            name: f"{value:.5g}" if isinstance(value, float) else value for name, value in figures.items()
        }
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(stage, " ".join(f"{name}={value}" for name, value in row.items()), flush=True)
