"""`zimage generate`: pictures from words, written as files.

Takes a command line; gives files and a line about each. What is asked for is decided in `commission`, before torch is
loaded.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zcore.cli import setting_flags
from zcore.cli.commission import Commission, commissioned, suffix_of
from zcore.cli.files import check_place, whole_file
from zcore.cli.parser import Commands
from zcore.cli.progress import ProgressLine
from zcore.cli.request_flags import add_request_flags, request_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.imaging.encode import encode_image
from zcore.imaging.from_settings import load_generator, load_pipeline
from zcore.settings import Settings

if TYPE_CHECKING:
    from zcore.imaging.pipeline import Inputs, ZImagePipeline

DESCRIPTION = """\
Paint pictures.

  zimage generate "A cat sleeping in sunlight"
  zimage generate --model-path /models/z-image --seed 42 "A sunset over mountains"
  zimage generate --size 1536x1024 --output panorama.webp "A panoramic landscape"
  zimage generate --n 4 --template art_oil "A harbour"      output-0.png to output-3.png
  zimage generate --img2img input.jpg --strength 0.6 "A watercolor painting"
  zimage generate --img2img room.png --mask window.png "A window onto the sea"
  zimage generate --passes twopass --width 2048 --height 2048 "A detailed portrait"
  zimage generate --from output.png                         the same picture again
  zimage generate --from output.png --steps 16              the same, but for the steps
  zimage generate --embeddings cat.safetensors              from what `zimage encode` made"""


@dataclass(frozen=True, slots=True)
class WrittenPicture:
    """One picture as it was written; the line that `--json` prints."""

    path: str
    index: int
    seed: int
    width: int
    height: int
    format: str
    sha256: str
    seconds: float


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "generate", usage="zimage generate [FLAGS] PROMPT", help="paint pictures", description=DESCRIPTION
    )
    add_request_flags(parser, request_fields(), prompt_required=False)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="Where the picture goes; its ending decides the format. Several are numbered. (default output.png)",
    )
    files.add_argument(
        "--from",
        dest="original",
        metavar="FILE",
        type=Path,
        help="Paint this picture again, from the parameters inside it; other flags stand over them.",
    )
    files.add_argument(
        "--embeddings", metavar="FILE", type=Path, help="What `zimage encode` made, in place of a PROMPT."
    )
    files.add_argument("--json", action="store_true", help="One line of JSON for each picture, for programs.")
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Paint and write. Raises `ZImageError`."""
    chosen = chosen_settings(said)
    commission = commissioned(said, chosen.settings)
    paths = _paths(said.output or Path(f"output{suffix_of(commission.request.format)}"), commission)
    check_place(paths[commission.indexes[0]])
    with ProgressLine(sys.stderr, len(paths)) as line:
        line.say("loading the model ...")
        painter = _Painter(commission, chosen.settings)
        line.say("")
        _note_differences(commission, painter)
        for number, (index, path) in enumerate(paths.items(), start=1):
            line.begin(number)
            written = painter.paint(index, path, line)
            line.say("")
            print(json.dumps(asdict(written)) if said.json else _in_words(written), flush=True)
    return 0


class _Painter:
    """The loaded model and what it is to paint."""

    def __init__(self, commission: Commission, settings: Settings) -> None:
        self._commission = commission
        self._pipeline = _loaded(commission, settings)
        self._inputs = _inputs(commission)
        self.made_by = self._pipeline.describe(commission.request)
        if self._inputs.embedding is not None:
            self.made_by |= {"encoder_revision": self._inputs.embedding.encoder_revision}

    def paint(self, index: int, path: Path, line: ProgressLine) -> WrittenPicture:
        """One picture, from its noise to its file."""
        began = time.monotonic()
        request = self._commission.alone(index)
        image = self._pipeline.generate(request, line.step, self._inputs).images[0].image
        sources = {name: file.sha256 for name, file in self._commission.given.items()}
        encoded = encode_image(image, self._commission.request, index, self.made_by, sources)
        with whole_file(path) as place:
            place.write_bytes(encoded.content)
        return WrittenPicture(
            path=str(path),
            index=index,
            seed=request.seed,
            width=encoded.width,
            height=encoded.height,
            format=encoded.format,
            sha256=encoded.sha256,
            seconds=round(time.monotonic() - began, 3),
        )


def _loaded(commission: Commission, settings: Settings) -> "ZImagePipeline":
    return load_generator(settings) if "embedding" in commission.given else load_pipeline(settings)


def _inputs(commission: Commission) -> "Inputs":
    from zcore.imaging.pipeline import Inputs
    from zcore.imaging.text.embedding_file import from_bytes

    given = commission.given.get("embedding")
    return Inputs(
        image=commission.picture("image"),
        mask=commission.picture("mask"),
        embedding=from_bytes(given.content) if given else None,
    )


def _note_differences(commission: Commission, painter: _Painter) -> None:
    """A picture that is painted again by something else may come out differently, and nobody shall wonder."""
    if commission.repeats is None:
        return
    before, now = commission.repeats.made_by, painter.made_by
    # A model's name is that of its folder; which one it is, its revision says.
    named = (before.keys() | now.keys()) - {"model"}
    differing = sorted(name for name in named if before.get(name) != now.get(name))
    if differing:
        told = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
        print(f"zimage: note: the picture may come out differently: {told}", file=sys.stderr)


def _paths(path: Path, commission: Commission) -> dict[int, Path]:
    """Where each picture goes; several are numbered."""
    if len(commission.indexes) == 1:
        return {commission.indexes[0]: path}
    return {index: path.with_name(f"{path.stem}-{index}{path.suffix}") for index in commission.indexes}


def _in_words(written: WrittenPicture) -> str:
    return f"{written.path}  seed {written.seed}  {written.seconds:.1f} s"
