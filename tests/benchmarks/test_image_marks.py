"""What do the marks of an image file cost: digital source type, parameters as text, and a signed C2PA manifest?

Method: an image of 1024x1024 with the noise of a photograph, in each format; written in four ways in turn, 6 rounds
after a warm-up, in CPU time of the thread. The cost of a way is the difference to the file without marks in the same
round. Signing is also timed alone, because a PNG or AVIF takes far longer to encode than to sign. Bytes are exact.
Goal: under 15 ms for marks and signature together.
"""

import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import get_args

import pytest
from msgspec.structs import replace
from PIL import Image, ImageFilter

from tests.benchmarks.report import report, spread
from zcore.image_files.content_credentials import CredentialSigner
from zcore.image_files.signing_certificate import make_trial_certificate, read_certificate
from zcore.image_files.writing import Marks, write_image
from zcore.request import GenerationRequest, OutputFormat

pytestmark = pytest.mark.benchmarks

ROUNDS = 6
PROMPT = "a lighthouse on a cliff in a storm, oil painting, dramatic light, highly detailed " * 4
MADE_BY = {"engine": "0.1.0", "model": "Tongyi-MAI/Z-Image-Turbo"}


def photograph() -> Image.Image:
    generator = random.Random(1)
    small = Image.frombytes("RGB", (64, 64), generator.randbytes(64 * 64 * 3))
    smooth = small.resize((1024, 1024), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    return Image.blend(smooth, Image.effect_noise((1024, 1024), 20).convert("RGB"), 0.1)


@pytest.mark.parametrize("image_format", get_args(OutputFormat))
def test_cost_of_marks(image_format: OutputFormat) -> None:
    image = photograph()
    certificate, key, _root = make_trial_certificate(Path(tempfile.mkdtemp()) / "c2pa", "Benchmark")
    signer = CredentialSigner(read_certificate(certificate, key))
    ways = {
        "none": Marks(digital_source_type=False, parameters_text=False),
        "source type": Marks(parameters_text=False),
        "source type, text": Marks(),
        "source type, text, signature": Marks(signer=signer),
    }
    request = replace(GenerationRequest(prompt=PROMPT), format=image_format, width=1024, height=1024, seed=1)
    cpu_ms: dict[str, list[float]] = {name: [] for name in ways}
    signing: dict[str, list[float]] = {"wall_ms": [], "cpu_ms": []}
    sizes: dict[str, int] = {}
    for _ in range(ROUNDS + 1):
        for name, marks in ways.items():
            started = time.thread_time()
            content = write_image(image, request, 0, MADE_BY, {}, marks).content
            cpu_ms[name].append((time.thread_time() - started) * 1000)
            sizes[name] = len(content)
        plain = write_image(image, request, 0, MADE_BY).content
        wall, cpu = time.perf_counter(), time.thread_time()
        signer.sign(plain, request, MADE_BY, {})
        signing["wall_ms"].append((time.perf_counter() - wall) * 1000)
        signing["cpu_ms"].append((time.thread_time() - cpu) * 1000)
    base = cpu_ms["none"][1:]
    report(
        f"what do the marks of a {image_format} cost?",
        file_bytes=sizes["none"],
        added_bytes={name: sizes[name] - sizes["none"] for name in ways if name != "none"},
        file_ms=round(median(base), 1),
        added_ms={
            name: spread([with_marks - without for with_marks, without in zip(taken[1:], base, strict=True)])
            for name, taken in cpu_ms.items()
            if name != "none"
        },
        signing_ms={name: spread(taken[1:]) for name, taken in signing.items()},
    )
