"""Precision fallback: a VAE in half precision works in float32 once its result is not finite.

The published VAE overflows in float16 for some images. A `PrecisionFallback` belongs to one generation, so the next
generation starts in half precision again.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from zcore.errors import NonFiniteValues
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.oom_fallback import FallbackStep, OnFallback

T = TypeVar("T")


class PrecisionFallback:
    """The precision in which the VAE works in one generation."""

    def __init__(self, vae: VaeCodec, on_fallback: OnFallback) -> None:
        self._vae = vae
        self._on_fallback = on_fallback
        self.taken: FallbackStep | None = None
        """The step that was taken, if the VAE works in float32 now."""

    def run(self, work: Callable[[VaeCodec], T]) -> T:
        """Run `work` with the VAE, in float32 if half precision has failed in this generation.

        Raises `NonFiniteValues` if the result is not finite in float32 either.
        """
        if self.taken is None:
            try:
                return work(self._vae)
            except NonFiniteValues:
                if self._vae.dtype == torch.float32:
                    raise
            # Repeated outside `except`, where the failed frames hold no tensors any more.
            narrow = str(self._vae.dtype).removeprefix("torch.")
            description = f"the VAE works in float32, because its values in {narrow} were NaN or infinite"
            self.taken = FallbackStep("vae_float32", description, event="precision_fallback")
            self._on_fallback(self.taken)
        with self._vae.in_float32() as wide:
            return work(wide)
