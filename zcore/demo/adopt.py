"""Stage `adopt`: fill an empty training folder from an exported model, to train on from it.

The inverse of `export`, for use when only the shipped model exists and not the states of its training: the weights
(rounded to bfloat16) and the logs become the states. Optimizers start fresh.
"""

import csv
from pathlib import Path
from typing import Any, Final

from zcore.demo.stock import load
from zcore.demo.training_folder import TrainingFolder

_WEIGHTS: Final = {"vae": ("vae",), "text_encoder": ("model",), "transformer": ("model", "average")}
"""Stages named like the part of the pipeline that they train, and the keys of its weights in their states."""


def adopt(training: TrainingFolder, folder: Path, logs: Path) -> None:
    """Fill an empty training folder from an exported model and the logs of its training.

    Raises `FileExistsError` if the folder already contains a training, which would be lost.
    """
    if training.path("tokenizer").exists():
        raise FileExistsError(f"{training.folder} already contains a training; give an empty folder with --work")
    pipeline: Any = load(folder)
    for stage, keys in _WEIGHTS.items():
        log = logs / f"{stage}.csv"
        training.path(log.name).write_bytes(log.read_bytes())
        last = list(csv.DictReader(log.read_text().splitlines()))[-1]
        progress = {name: float(last[name]) for name in ("seconds", "level", "samples") if name in last}
        weights = getattr(pipeline, stage).state_dict()
        numbers = {name: value if name == "seconds" else int(value) for name, value in progress.items()}
        training.save(
            f"{stage}.pt", dict.fromkeys(keys, weights) | numbers | {"step": int(last["step"]), "optimizers": None}
        )
    training.path("tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        training.path(f"tokenizer/{name}").write_bytes((folder / "tokenizer" / name).read_bytes())
