"""`python -m tests.integration.worker.broken_gpu`: a worker process whose GPU fails on the first image."""

import sys
from types import SimpleNamespace
from typing import Any

from worker import app


class BrokenGpu:
    """A pipeline in the state that torch leaves after an illegal memory access."""

    def generate(self, _request: object, _on_step: object, _inputs: object, _on_fallback: object) -> Any:
        """Fail as every later call in that process does."""
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def load_lora(self, _content: bytes, _name: str, _on_fallback: Any, /, *, strict: bool) -> Any:
        """Not called: no job of the test names a LoRA."""
        raise AssertionError

    def describe(self) -> dict[str, str]:
        """Return no description."""
        return {}


if __name__ == "__main__":
    stand_in = SimpleNamespace(load_pipeline=lambda _settings: BrokenGpu(), read_embedding=None)
    sys.modules["worker.load_model"] = stand_in  # the real one would load torch
    app.run_worker([])
