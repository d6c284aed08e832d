"""`python -m tests.integration.worker.broken_gpu`: a whole worker process whose GPU fails at the first picture."""

from typing import Any

from worker import app


class BrokenGpu:
    """A pipeline as torch leaves it after an illegal access."""

    def generate(self, _request: object, _on_step: object, _inputs: object, _on_relief: object) -> Any:
        """Fails as every later call in such a process does."""
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def load_lora(self, _content: bytes, _name: str, _on_relief: Any) -> Any:
        """No job of the test names one."""
        raise AssertionError

    def describe(self) -> dict[str, str]:
        """What it is."""
        return {}


if __name__ == "__main__":
    app.load_pipeline = lambda _settings: BrokenGpu()  # type: ignore[assignment, return-value]
    app.run_worker([])
