"""The stages that make the demo model, by name. Importing this module loads torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from zcore.demo.adopt import adopt
from zcore.demo.evaluate import draw_curves, evaluate, evaluate_loras
from zcore.demo.export import export
from zcore.demo.render import write_samples
from zcore.demo.train_lora import export_loras, train_lora
from zcore.demo.train_text_encoder import load_text_encoder, train_text_encoder
from zcore.demo.train_tokenizer import build_tokenizer
from zcore.demo.train_transformer import load_transformer, train_transformer
from zcore.demo.train_vae import load_vae, train_vae
from zcore.demo.training_folder import TrainingFolder

Stage = Callable[[argparse.Namespace], None]
_LOGS: Final = ("vae.csv", "text_encoder.csv", "transformer.csv", "lora.csv")


def use_threads(count: int) -> None:
    """Limit torch to this many CPU threads."""
    torch.set_num_threads(count)


def _render(arguments: argparse.Namespace) -> None:
    write_samples(arguments.work / "renders", arguments.count)


def _tokenizer(arguments: argparse.Namespace) -> None:
    folder = arguments.work / "tokenizer"
    if not folder.exists():  # the later stages depend on exactly these tokens
        build_tokenizer(folder)


def _adopt(arguments: argparse.Namespace) -> None:
    adopt(TrainingFolder(arguments.work, arguments.device), arguments.folder, arguments.folder.parent / "training")


def _training_stage(train: Callable[..., Any]) -> Stage:
    def stage(arguments: argparse.Namespace) -> None:
        options = {option: value for option in ("steps", "batch") if (value := getattr(arguments, option))}
        train(TrainingFolder(arguments.work, arguments.device), **options)

    return stage


def _export(arguments: argparse.Namespace) -> None:
    training = TrainingFolder(arguments.work, arguments.device)
    export(
        arguments.folder,
        training.path("tokenizer"),
        load_text_encoder(training),
        load_transformer(training),
        load_vae(training),
    )
    for log in filter(Path.exists, map(training.path, _LOGS)):
        target = arguments.folder.parent / "training" / log.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(log.read_bytes())


def _lora(arguments: argparse.Namespace) -> None:
    _training_stage(train_lora)(arguments)
    export_loras(TrainingFolder(arguments.work, arguments.device), arguments.folder.parent / "loras")


def _evaluate(arguments: argparse.Namespace) -> None:
    log = arguments.folder.parent / "training" / "transformer.csv"
    if log.exists():
        draw_curves(log, arguments.grid.with_name("demo-training.png"))
    print(evaluate(arguments.folder, arguments.grid, arguments.count))
    loras = arguments.folder.parent / "loras"
    if loras.exists():
        print(evaluate_loras(arguments.folder, loras, arguments.grid.with_name("demo-loras.png")))


STAGES: Final[dict[str, Stage]] = {
    "render": _render,
    "adopt": _adopt,
    "tokenizer": _tokenizer,
    "vae": _training_stage(train_vae),
    "text-encoder": _training_stage(train_text_encoder),
    "transformer": _training_stage(train_transformer),
    "lora": _lora,
    "export": _export,
    "evaluate": _evaluate,
}
