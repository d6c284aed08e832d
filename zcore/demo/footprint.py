"""What one picture costs: seconds and memory of a process that does nothing else.

`python -m zcore.demo.footprint FOLDER WIDTH HEIGHT THREADS` loads the stock pipeline, paints, and prints one JSON
object; `footprint` runs that and reads it. A process of its own, because the peak of a process's memory never falls.
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
    """Seconds to load and for a picture (median of 7 after one to warm up), MiB before loading and at the peak."""
    command = [sys.executable, "-m", "zcore.demo.footprint", str(folder), str(width), str(height), str(threads)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def _measure(folder: Path, width: int, height: int, threads: int) -> dict[str, float]:
    import torch

    from zcore.demo.stock import load

    torch.set_num_threads(threads)
    importlib.import_module("diffusers.pipelines.z_image.pipeline_z_image")  # importing is not loading
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
    return {"load_s": load_s, "picture_s": median(took[1:]), "before_mib": before_mib, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Linux's own word: what `getrusage` says of a process includes the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    _folder, _width, _height, _threads = sys.argv[1:]
    print(json.dumps(_measure(Path(_folder), int(_width), int(_height), int(_threads))))
