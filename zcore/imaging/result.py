"""What a generation returns: its images, where its time went, and what generated them."""

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """Cost of one call of `generate`, all its images together.

    `peak_vram_mb` is 0 without a CUDA device. `prompt_tokens` counts the formatted prompt, `used_tokens` what was
    passed to the transformer.
    """

    encode_ms: float
    denoise_ms: float
    decode_ms: float
    peak_vram_mb: int
    prompt_tokens: int
    used_tokens: int


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """Image `index` (from 0) of a request, generated from `seed`."""

    image: Image.Image
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """All images of a request.

    `made_by` is `ZImagePipeline.describe` of the request, the SHA-256 of the formatted prompt (`prompt_sha256`) and of
    each LoRA's file (`lora:NAME`), `lora_strict:NAME` (`false`) if it was loaded as not strict, what of it is left out
    (`lora_notice:NAME`), `vae_tiles` if the VAE worked in tiles, requested or not, and `vae_fallback` if it had to work
    in float32. `latents` are what each image was decoded from,
    float32 (16, h, w) on the CPU; `images` is empty if only latents were requested.
    """

    images: list[GeneratedImage]
    metrics: GenerationMetrics
    made_by: dict[str, str]
    latents: list[Tensor]


class PhaseTimer:
    """Wall time of one generation by phase, and the peak of its devices' memory.

    A GPU works asynchronously, so a phase ends when its devices have finished.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._cuda = [device for device in devices if device.type == "cuda"]
        self._spent_ms: defaultdict[str, float] = defaultdict(float)
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the time of this block to a phase, the device's work included."""
        started_at = time.perf_counter()
        yield
        for device in self._cuda:
            torch.cuda.synchronize(device)
        self._spent_ms[name] += (time.perf_counter() - started_at) * 1000

    def metrics(self, prompt_tokens: int, used_tokens: int) -> GenerationMetrics:
        """Return the time spent in each phase so far, the peak memory, and the given token counts."""
        return GenerationMetrics(
            encode_ms=self._spent_ms["encode"],
            denoise_ms=self._spent_ms["denoise"],
            decode_ms=self._spent_ms["decode"],
            peak_vram_mb=sum(torch.cuda.max_memory_allocated(device) for device in self._cuda) // 2**20,
            prompt_tokens=prompt_tokens,
            used_tokens=used_tokens,
        )
