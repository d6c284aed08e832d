"""Stage `adopt`: an exported model in, a workplace to train on from out.

The inverse of `export`, for whoever has the shipped folder but not the states that it was trained in: the weights
(rounded to bfloat16) and the logs become the states of an empty workplace. Optimizers begin anew.
"""

import csv
from pathlib import Path
from typing import Any, Final

from zcore.demo.stock import load
from zcore.demo.workplace import Workplace

_WEIGHTS: Final = {"vae": ("vae",), "text_encoder": ("model",), "transformer": ("model", "average")}
"""The stages that train a part of the pipeline of the same name, and under which keys their states hold its weights."""


def adopt(place: Workplace, folder: Path, logs: Path) -> None:
    """Fill an empty workplace from an exported folder and the logs of its training.

    Raises FileExistsError where the workplace holds a training already: it would be lost.
    """
    if place.path("tokenizer").exists():
        raise FileExistsError(f"{place.folder} holds a training already; name an empty folder by --work")
    pipeline: Any = load(folder)
    for stage, keys in _WEIGHTS.items():
        log = logs / f"{stage}.csv"
        place.path(log.name).write_bytes(log.read_bytes())
        last = list(csv.DictReader(log.read_text().splitlines()))[-1]
        progress = {name: float(last[name]) for name in ("seconds", "level", "samples") if name in last}
        weights = getattr(pipeline, stage).state_dict()
        numbers = {name: value if name == "seconds" else int(value) for name, value in progress.items()}
        place.save(
            f"{stage}.pt", dict.fromkeys(keys, weights) | numbers | {"step": int(last["step"]), "optimizers": None}
        )
    place.path("tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        place.path(f"tokenizer/{name}").write_bytes((folder / "tokenizer" / name).read_bytes())
