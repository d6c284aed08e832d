"""What the numeric tests state holds on CPUs that lack the instructions of this one."""

import os
import subprocess
import sys

import pytest

from tests.unit.imaging.conftest import TREE

PLAINEST = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
"""Kernels of torch and of MKL for any CPU. oneDNN has no such setting; the program below switches it off."""
PROGRAM = """
import sys
import pytest
import torch
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
torch.backends.mkldnn.set_flags(False)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.timeout(900)
def test_the_numeric_tests_pass_with_the_plainest_kernels() -> None:
    arguments = ["-q", "-m", "numeric", "-p", "no:cacheprovider", "tests/unit/imaging"]
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=TREE,
        env={**os.environ, **PLAINEST, "PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert " passed" in outcome.stdout
