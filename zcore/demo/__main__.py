"""`python -m zcore.demo <stage>`: the stages that make the demo model, one after the other or one by one.

Each stage goes on from its own state in the workplace and does nothing when it is done, so `all` may be stopped and
started at will.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zcore.demo import CHECKPOINT

_LOGS: Final = ("vae.csv", "text_encoder.csv", "transformer.csv", "lora.csv")


def main() -> None:
    """Run the stage that was asked for, or all."""
    arguments = _arguments()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    order = (
        [name for name in STAGES if name not in ("render", "adopt")] if arguments.stage == "all" else [arguments.stage]
    )
    for name in order:
        print(f"stage {name}", flush=True)
        STAGES[name](arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zcore.demo", description=__doc__)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES))
    parser.add_argument("--work", type=Path, default=Path("var/demo-model"), help="where states and logs are kept")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="the exported model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=0, help="of the trained stage; 0 for its usual number")
    parser.add_argument("--batch", type=int, default=0, help="of the trained stage; 0 for its usual number")
    parser.add_argument("--count", type=int, default=400, help="captions to evaluate on, or pictures to render")
    parser.add_argument("--grid", type=Path, default=Path("docs/images/demo-grid.png"), help="the grid of `evaluate`")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for all")
    return parser.parse_args()


def _render(arguments: argparse.Namespace) -> None:
    from zcore.demo.render import write_samples

    write_samples(arguments.work / "renders", arguments.count)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from zcore.demo.tokenizer import build_tokenizer

    folder = arguments.work / "tokenizer"
    if not folder.exists():  # every later stage depends on these very tokens
        build_tokenizer(folder)


def _adopt(arguments: argparse.Namespace) -> None:
    from zcore.demo.adopt import adopt
    from zcore.demo.workplace import Workplace

    adopt(Workplace(arguments.work, arguments.device), arguments.folder, arguments.folder.parent / "training")


def _trained(module: str) -> Callable[[argparse.Namespace], None]:
    def stage(arguments: argparse.Namespace) -> None:
        from zcore.demo.workplace import Workplace

        numbers = {name: value for name in ("steps", "batch") if (value := getattr(arguments, name))}
        train = getattr(importlib.import_module(f"zcore.demo.{module}"), f"train_{module}")
        train(Workplace(arguments.work, arguments.device), **numbers)

    return stage


def _export(arguments: argparse.Namespace) -> None:
    from zcore.demo.export import export
    from zcore.demo.text_encoder import load_text_encoder
    from zcore.demo.transformer import load_transformer
    from zcore.demo.vae import load_vae
    from zcore.demo.workplace import Workplace

    place = Workplace(arguments.work, arguments.device)
    export(
        arguments.folder, place.path("tokenizer"), load_text_encoder(place), load_transformer(place), load_vae(place)
    )
    for log in filter(Path.exists, map(place.path, _LOGS)):
        target = arguments.folder.parent / "training" / log.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(log.read_bytes())


def _lora(arguments: argparse.Namespace) -> None:
    from zcore.demo.lora import export_loras
    from zcore.demo.workplace import Workplace

    _trained("lora")(arguments)
    export_loras(Workplace(arguments.work, arguments.device), arguments.folder.parent / "loras")


def _evaluate(arguments: argparse.Namespace) -> None:
    from zcore.demo.evaluate import draw_curves, evaluate, evaluate_loras

    log = arguments.folder.parent / "training" / "transformer.csv"
    if log.exists():
        draw_curves(log, arguments.grid.with_name("demo-training.png"))
    print(evaluate(arguments.folder, arguments.grid, arguments.count))
    loras = arguments.folder.parent / "loras"
    if loras.exists():
        print(evaluate_loras(arguments.folder, loras, arguments.grid.with_name("demo-loras.png")))


STAGES: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "render": _render,
    "adopt": _adopt,
    "tokenizer": _tokenizer,
    "vae": _trained("vae"),
    "text-encoder": _trained("text_encoder"),
    "transformer": _trained("transformer"),
    "lora": _lora,
    "export": _export,
    "evaluate": _evaluate,
}


if __name__ == "__main__":
    main()
