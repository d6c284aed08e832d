"""What do tiles save and cost: peak memory and time of a decoding, and the difference of its pixels from one piece?

Method: the demo VAE in float32 on one thread. Memory: the latents of an image of WxW pixels are decoded in a new
process, in one piece and in tiles of 512 px with 64 px overlap; the growth of its resident peak is reported. Pixels:
true renders are encoded in one piece, decoded in one piece and in tiles, and compared by PSNR with each other and with
the render.
"""

import random
import subprocess
import sys
from math import log10

import numpy as np
import pytest
import torch
from PIL import Image

from tests.benchmarks.report import report
from tests.conftest import TREE
from zcore.demo import CHECKPOINT
from zcore.demo.render import Pixels, render
from zcore.demo.vocabulary import random_composition
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.weights.loader import Placement, load_vae

pytestmark = pytest.mark.benchmarks

CPU = torch.device("cpu")
DECODING = """
import resource, sys, time, torch
from zcore.demo import CHECKPOINT
from zcore.imaging.network import vae
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.weights.loader import Placement, load_vae

torch.set_num_threads(1)
side, tiled = int(sys.argv[1]), sys.argv[2] == "tiles"
coder = vae.VaeCodec(load_vae(CHECKPOINT, Placement(torch.device("cpu"), torch.float32)), torch.device("cpu"),
                         torch.float32)
latents = torch.randn(16, side // 8, side // 8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, began = peak(), time.monotonic()
with torch.inference_mode():
    coder.decode_latents(latents, Tiling() if tiled else None)
print(peak() - before, round(time.monotonic() - began, 1))
"""


@pytest.mark.timeout(3600)  # the one attention of the VAE takes a CPU minutes at 4096 px
@pytest.mark.parametrize("way", ["tiles", "one piece"])
@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_memory(side: int, way: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DECODING, str(side), way], cwd=TREE, capture_output=True, text=True, check=True
    )
    peak_mb, seconds = ended.stdout.split()
    report(f"decoding {side}x{side} in {way}", peak_mb=int(peak_mb), seconds=float(seconds))


@pytest.mark.parametrize("tiling", [Tiling(128, 32), Tiling(256, 64)])
def test_pixels(tiling: Tiling) -> None:
    torch.set_num_threads(1)
    vae = load_vae(CHECKPOINT, Placement(CPU, torch.float32))
    coder = VaeCodec(vae, CPU, torch.float32)
    rng = random.Random(7)
    for kind in ("object", "scene"):
        found: dict[str, list[float]] = {"tiles to one piece": [], "tiles to render": [], "one piece to render": []}
        for index in range(10):
            truth = render(random_composition(rng, kind), 512, 512, random.Random(index))
            with torch.inference_mode():
                distribution = coder.encode_latents(Image.fromarray(truth))
                latents = coder.sample_latents(distribution, torch.Generator().manual_seed(index))
                whole, tiled = (np.asarray(coder.decode_latents(latents, way)) for way in (None, tiling))
            found["tiles to one piece"].append(_psnr(tiled, whole))
            found["tiles to render"].append(_psnr(tiled, truth))
            found["one piece to render"].append(_psnr(whole, truth))
        middle = {name: round(float(np.median(values)), 1) for name, values in found.items()}
        report(f"PSNR in dB, median of 10 renders ({kind}) of 512 px, {tiling.size_px} px tiles", **middle)


def _psnr(one: Pixels, other: Pixels) -> float:
    return 10 * log10(255**2 / float(np.square(one.astype(float) - other.astype(float)).mean()))
