"""Where a generation's time went.

Takes the devices that work is given to; gives milliseconds a phase and the peak of the accelerator's memory. A GPU
works behind the caller's back, so a phase ends when its device has caught up.
"""

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """What one call of `generate` took, all its pictures together.

    `peak_vram_mb` is 0 without a CUDA device; `prompt_tokens` counts the prompt in its layout, `kept_tokens` what was
    left for the transformer.
    """

    encode_ms: float
    denoise_ms: float
    decode_ms: float
    peak_vram_mb: int
    prompt_tokens: int
    kept_tokens: int


class PhaseClock:
    """Adds up wall time by phase for one generation."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cuda = [device for device in devices if device.type == "cuda"]
        self._spent_ms: defaultdict[str, float] = defaultdict(float)
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time of this block, the device's work included."""
        started_at = time.perf_counter()
        yield
        for device in self._cuda:
            torch.cuda.synchronize(device)
        self._spent_ms[name] += (time.perf_counter() - started_at) * 1000

    def metrics(self, prompt_tokens: int, kept_tokens: int) -> GenerationMetrics:
        """The phases so far, with what else was counted."""
        return GenerationMetrics(
            encode_ms=self._spent_ms["encode"],
            denoise_ms=self._spent_ms["denoise"],
            decode_ms=self._spent_ms["decode"],
            peak_vram_mb=sum(torch.cuda.max_memory_allocated(device) for device in self._cuda) // 2**20,
            prompt_tokens=prompt_tokens,
            kept_tokens=kept_tokens,
        )
