"""Run the stages that make the demo model: `python -m zcore.demo [STAGE]`, one stage or all in order.

Each stage continues from its state in the training folder and does nothing if it is complete, so `all` can be stopped
and restarted at any time.
"""

import argparse
from pathlib import Path
from typing import Final

from zcore.demo import CHECKPOINT

STAGES: Final = ("tokenizer", "vae", "text-encoder", "transformer", "lora", "export", "evaluate")
"""Stages of `all`, in order."""

OTHER_STAGES: Final = ("render", "adopt")


def main() -> None:
    """Run the given stage, or all of them."""
    arguments = _arguments()
    from zcore.demo import training_stages  # loads torch, which `--help` need not wait for

    if arguments.threads:
        training_stages.use_threads(arguments.threads)
    for name in STAGES if arguments.stage == "all" else [arguments.stage]:
        print(f"stage {name}", flush=True)
        training_stages.STAGES[name](arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zcore.demo", description=__doc__)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES, *OTHER_STAGES))
    parser.add_argument("--work", type=Path, default=Path("var/demo-model"), help="training folder")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="folder of the exported model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=0, help="number for a training stage; 0 for its default")
    parser.add_argument("--batch", type=int, default=0, help="number for a training stage; 0 for its default")
    parser.add_argument("--count", type=int, default=400, help="number of captions to evaluate, or of images to render")
    parser.add_argument("--grid", type=Path, default=Path("docs/images/demo-grid.png"), help="grid of `evaluate`")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
