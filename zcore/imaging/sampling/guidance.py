"""Classifier-free guidance and skip layer guidance: combine two predictions into one velocity.

Plain functions of tensors, without the model. Classifier-free guidance follows the official Z-Image code and diffusers
(Apache-2.0): a scale g adds g times the difference, so the weight in Ho and Salimans 2022
(https://arxiv.org/abs/2207.12598) is 1 + g. Skip layer guidance is that of Stable Diffusion 3.5 (Stability AI 2024),
with the same convention.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from zcore.request import SkipLayerGuidance


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance of one pass.

    A `scale` of 0 is off. `normalization` limits the norm, as a multiple of that of the prompt's prediction; 0 is off.
    Guidance ends where 1 - sigma exceeds `truncation`; 1 keeps it to the end.
    """

    scale: float
    normalization: float = 0.0
    truncation: float = 1.0

    def is_active(self, sigma: float) -> bool:
        """Return whether a step from this noise level is guided, which costs a second forward."""
        return self.scale > 0 and 1 - sigma <= self.truncation


def guided(positive: Tensor, negative: Tensor, guidance: Guidance) -> Tensor:
    """Return positive + g (positive - negative), float32, in the shape of the inputs (16, h, w).

    With a normalization c > 0 the norm over the whole image is at most c times that of `positive`.
    """
    prediction = positive + guidance.scale * (positive - negative)
    if guidance.normalization > 0:
        most = _norm(positive) * guidance.normalization
        norm = _norm(prediction)
        prediction = torch.where(norm > most, prediction * (most / norm), prediction)
    return prediction


def is_skipping(slg: SkipLayerGuidance, step: int, steps: int) -> bool:
    """Return whether skip layer guidance is active in a step: start <= step / steps < stop."""
    return slg.scale > 0 and slg.start <= step / steps < slg.stop


def away_from_skipped(velocity: Tensor, positive: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """Return velocity + scale (positive - skipped): moved away from the prediction without the skipped layers."""
    return velocity + scale * (positive - skipped)


def _norm(prediction: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(prediction))  # pyright: ignore[reportUnknownMemberType]
