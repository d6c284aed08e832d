"""Classifier-free guidance and skip layer guidance: two predictions in, one out.

Takes what the transformer says for the prompt, for the negative prompt and without some of its layers; gives the guided
velocity. Plain functions of tensors; does not know the model. The first is written after the official Z-Image code and
diffusers (Apache-2.0): a scale g adds g times the difference, so the usual weight is 1 + g (Ho and Salimans 2022,
https://arxiv.org/abs/2207.12598). The second is that of Stable Diffusion 3.5 (Stability AI 2024), with the same habit.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from zcore.request import SkipLayerGuidance


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strongly, how far and until when. `normalization` 0 is off; `truncation` 1 is to the end."""

    scale: float
    normalization: float = 0.0
    truncation: float = 1.0

    def is_active(self, sigma: float) -> bool:
        """Whether a step from this noise level is guided: it costs a second forward then."""
        return self.scale > 0 and 1 - sigma <= self.truncation


def guided(positive: Tensor, negative: Tensor, guidance: Guidance) -> Tensor:
    """positive + g (positive - negative), float32, of the inputs' shape (16, h, w).

    With a normalization c > 0 its norm over the whole picture is at most c times that of `positive`.
    """
    prediction = positive + guidance.scale * (positive - negative)
    if guidance.normalization > 0:
        most = _norm(positive) * guidance.normalization
        norm = _norm(prediction)
        prediction = torch.where(norm > most, prediction * (most / norm), prediction)
    return prediction


def skips_layers(slg: SkipLayerGuidance, step: int, steps: int) -> bool:
    """Whether skip layer guidance acts in this step of so many: start <= step / steps < stop."""
    return slg.scale > 0 and slg.start <= step / steps < slg.stop


def away_from_skipped(velocity: Tensor, positive: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """velocity + scale (positive - skipped): guided or not before, led away from what skipped layers leave."""
    return velocity + scale * (positive - skipped)


def _norm(picture: Tensor) -> Tensor:
    return cast(Any, torch.linalg).vector_norm(picture)
