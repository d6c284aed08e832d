"""`zimage generate`: generate images and write them to files.

Prints one line for each file. `zcore.cli.invocation` decides what to generate, before torch is imported.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zcore.cli import setting_flags
from zcore.cli.files import atomic_write, check_output_path
from zcore.cli.invocation import Invocation, read_invocation, suffix_of
from zcore.cli.model_files import check_gpu, check_model_files
from zcore.cli.parser import Commands
from zcore.cli.progress import ProgressLine
from zcore.cli.recorded_loras import RecordedLoras, with_fused
from zcore.cli.request_flags import add_request_flags, request_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.foreign_text import printable
from zcore.image_files.configured_marks import configured_marks
from zcore.image_files.writing import write_image
from zcore.imaging.generation_inputs import Inputs
from zcore.settings import Settings

if TYPE_CHECKING:
    from zcore.imaging.pipeline import ZImagePipeline

DESCRIPTION = """\
Generate images.

  zimage generate "A cat sleeping in sunlight"
  zimage generate --model-path /models/z-image --seed 42 "A sunset over mountains"
  zimage generate --size 1536x1024 --output panorama.webp "A panoramic landscape"
  zimage generate --n 4 --template art_oil "A harbour"      writes output-0.png to output-3.png
  zimage generate --img2img input.jpg --strength 0.6 "A watercolor painting"
  zimage generate --img2img room.png --mask window.png "A window onto the sea"
  zimage generate --passes twopass --width 2048 --height 2048 "A detailed portrait"
  zimage generate --from output.png                         make the same image again
  zimage generate --from output.png --steps 16              the same with more steps
  zimage generate --embeddings cat.safetensors              use a prompt from `zimage encode`"""


@dataclass(frozen=True, slots=True)
class WrittenImage:
    """One image file; also the object that `--json` prints."""

    path: str
    index: int
    seed: int
    width: int
    height: int
    format: str
    sha256: str
    seconds: float


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "generate", usage="zimage generate [FLAGS] PROMPT", help="generate images", description=DESCRIPTION
    )
    add_request_flags(parser, request_fields(), prompt_required=False)
    files = parser.add_argument_group("files")
    files.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        help="File to write; its suffix selects the format. Several images are numbered. (default output.png)",
    )
    files.add_argument(
        "--from",
        dest="original",
        metavar="FILE",
        type=Path,
        help="Repeat this image from the parameters stored in it; other flags override them.",
    )
    files.add_argument(
        "--embeddings", metavar="FILE", type=Path, help="Embedding file from `zimage encode`, instead of a PROMPT."
    )
    files.add_argument("--json", action="store_true", help="Print one line of JSON for each image.")
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate the images and write their files. Raises `ZImageError`."""
    chosen = chosen_settings(arguments)
    invocation = read_invocation(arguments, chosen.settings)
    paths = _paths(arguments.output or Path(f"output{suffix_of(invocation.request.format)}"), invocation)
    check_output_path(paths[invocation.indexes[0]])
    encoder = () if "embedding" in invocation.files else ("text_encoder",)
    components = (*encoder, "transformer", "vae")
    check_gpu(chosen.settings, components)
    check_model_files(arguments, chosen.settings, components)
    with ProgressLine(sys.stderr, len(paths)) as line:
        line.show("loading the model ...")
        settings = chosen.settings if invocation.loras is None else with_fused(chosen.settings, invocation.loras)
        generator = _Generator(invocation, settings)
        line.clear()
        if notice := generator.made_by.get("size_notice"):
            print(f"zimage: note: {notice}", file=sys.stderr)
        for number, (index, path) in enumerate(paths.items(), start=1):
            line.begin_image(number)
            written = generator.generate(index, path, line)
            line.clear()
            if number == 1:
                _print_notes(invocation, generator.made_by)
            print(json.dumps(asdict(written)) if arguments.json else _as_text(written), flush=True)
    return 0


class _Generator:
    """A loaded model and the invocation that it serves."""

    def __init__(self, invocation: Invocation, settings: Settings) -> None:
        self._invocation = invocation
        self._marks = configured_marks(settings.image_files)
        self._pipeline = _load(invocation, settings)
        self._inputs = _inputs(invocation, self._pipeline)
        self.made_by = self._pipeline.describe(invocation.request)
        """What generates the images; after the first, what generated the latest."""

    def generate(self, index: int, path: Path, line: ProgressLine) -> WrittenImage:
        """Generate image `index` and write it to `path`."""
        started = time.monotonic()
        request = self._invocation.single(index)
        result = self._pipeline.generate(request, line.step, self._inputs)
        embedding = self._inputs.embedding
        encoder = {"encoder_revision": embedding.encoder_revision} if embedding else {}
        self.made_by |= {**result.made_by, **encoder}
        sources = {name: file.sha256 for name, file in self._invocation.files.items()}
        encoded = write_image(
            result.images[0].image, self._invocation.request, index, self.made_by, sources, self._marks
        )
        with atomic_write(path) as temporary:
            temporary.write_bytes(encoded.content)
        return WrittenImage(
            path=str(path),
            index=index,
            seed=request.seed,
            width=encoded.width,
            height=encoded.height,
            format=encoded.format,
            sha256=encoded.sha256,
            seconds=round(time.monotonic() - started, 3),
        )


def _load(invocation: Invocation, settings: Settings) -> "ZImagePipeline":
    from zcore.imaging.from_settings import load_generator, load_pipeline

    return load_generator(settings) if "embedding" in invocation.files else load_pipeline(settings)


def _inputs(invocation: Invocation, pipeline: "ZImagePipeline") -> Inputs:
    from zcore.imaging.text.embedding_file import from_bytes

    embedding = invocation.files.get("embedding")
    loras = invocation.loras or RecordedLoras()
    return Inputs(
        image=invocation.image("image"),
        mask=invocation.image("mask"),
        embedding=from_bytes(embedding.content) if embedding else None,
        loras={
            name: pipeline.load_lora(path, name, strict=name not in loras.not_strict)
            for name, path in loras.of_request.items()
        },
    )


def _print_notes(invocation: Invocation, made_by: dict[str, str]) -> None:
    """Print what is left out of LoRAs, and how this image may differ from the one that it repeats, if it does."""
    for name, notice in made_by.items():
        if name.startswith("lora_notice:"):
            print(f"zimage: note: LoRA {printable(name.partition(':')[2])}: {notice}", file=sys.stderr)
    if invocation.repeats is not None:
        _print_differences(invocation.repeats.made_by, made_by)


def _print_differences(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn if the model, the formatted prompt, the arithmetic or the version differs."""
    # `model` is only the name of a folder; the revisions identify the weights. Fused LoRAs were found by their content.
    names = {name for name in before.keys() | now.keys() if name != "model" and not name.startswith("lora_")}
    differing = sorted(name for name in names if before.get(name) != now.get(name))
    if differing:
        changes = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
        print(f"zimage: note: the image may differ from the original: {printable(changes)}", file=sys.stderr)


def _paths(path: Path, invocation: Invocation) -> dict[int, Path]:
    """Return the path of each image by its index; several images get numbered paths."""
    if len(invocation.indexes) == 1:
        return {invocation.indexes[0]: path}
    return {index: path.with_name(f"{path.stem}-{index}{path.suffix}") for index in invocation.indexes}


def _as_text(written: WrittenImage) -> str:
    return f"{written.path}  seed {written.seed}  {written.seconds:.1f} s"
