"""Time and memory of one image, measured in a separate process.

`python -m zcore.demo.footprint FOLDER WIDTH HEIGHT THREADS` loads the unmodified pipeline, generates images, and prints
one JSON object; `footprint` runs this command. It needs its own process because peak memory never decreases.
"""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

RUNS = 7


def footprint(folder: Path, width: int, height: int, threads: int = 2) -> dict[str, float]:
    """Return seconds to load (`load_s`) and per image (`image_s`, median of 7 after a warm-up), and memory in MiB.

    `before_mib` is the peak before loading, `peak_mib` the peak of the process.
    """
    command = [sys.executable, "-m", "zcore.demo.footprint", str(folder), str(width), str(height), str(threads)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def _measure(folder: Path, width: int, height: int, threads: int) -> dict[str, float]:
    import torch

    from zcore.demo.stock import load

    torch.set_num_threads(threads)
    importlib.import_module("diffusers.pipelines.z_image.pipeline_z_image")  # exclude imports from the loading time
    before_mib = _peak_mib()
    started = time.perf_counter()
    pipeline = load(folder)
    load_s = time.perf_counter() - started
    took: list[float] = []
    for run in range(RUNS + 1):
        started = time.perf_counter()
        pipeline(
            "a red circle",
            width=width,
            height=height,
            num_inference_steps=8,
            guidance_scale=0.0,
            max_sequence_length=128,
            generator=torch.Generator().manual_seed(run),
        )
        took.append(time.perf_counter() - started)
    return {"load_s": load_s, "image_s": median(took[1:]), "before_mib": before_mib, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Read the peak from /proc, since the value of `getrusage` includes the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    _folder, _width, _height, _threads = sys.argv[1:]
    print(json.dumps(_measure(Path(_folder), int(_width), int(_height), int(_threads))))
