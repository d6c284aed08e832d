"""How much CPU time does a process need before and besides its work, by that of `import torch` alone?

Method: both programs run in new processes, alternating, with one thread and Python's bytecode cache filled
by a run that is not counted. The ratio of a pair is independent of the machine and, since CPU time is compared,
nearly of its load.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.report import report, spread

pytestmark = pytest.mark.benchmarks

TREE = Path(__file__).resolve().parents[2]
RUNS = 7
LIMIT = 2.5

TORCH = ("-c", "import torch")
IMAGE = ("-m", "zcore.cli", "generate", "a red circle", "--profile", "demo", "--seed", "1", "--output", "a.png")
LOAD_WORKER = """
import os
import worker.app
from worker.load_model import load_pipeline
from zcore.settings import load_settings
load_pipeline(load_settings(os.environ, {"profile": "demo"}))
"""
WORKER = ("-c", LOAD_WORKER)


@pytest.mark.parametrize("program", [IMAGE, WORKER], ids=["one image of the command line", "worker with its model"])
def test_start(tmp_path: Path, program: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def cpu_s(arguments: tuple[str, ...]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu_s(program)
    cpu_s(TORCH)
    pairs = [(cpu_s(TORCH), cpu_s(program)) for _ in range(RUNS)]
    ratios = [whole / alone for alone, whole in pairs]
    report(
        "start by import torch",
        ratio=spread(ratios),
        torch_cpu_s=spread([alone for alone, _ in pairs]),
        program_cpu_s=spread([whole for _, whole in pairs]),
        limit=LIMIT,
    )
