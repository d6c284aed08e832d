"""The diffusion transformer as a function: latents, noise level and prompt in, velocity out.

Takes the module that the loader gave; hides its conventions: lists for batches, a frame axis, the model's own clock,
its sign and its arithmetic. Does not know the schedule.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from zcore.imaging.geometry import LatentSize


class _ZImageTransformer(Protocol):
    """The call of diffusers' `ZImageTransformer2DModel` (Apache-2.0), as far as it is used."""

    config: Any

    def __call__(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], *, return_dict: Literal[False]
    ) -> tuple[list[Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One prompt's way through one schedule."""

    prompt_embeds: Tensor
    levels: list[float]


class VelocityModel:
    """Where latents at a noise level want to go, for one prompt at a time."""

    def __init__(self, transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._transformer = cast(_ZImageTransformer, transformer)
        self._device = device
        self._dtype = dtype
        self.channels = int(self._transformer.config.in_channels)
        """Channels of a latent: 16."""
        self.prompt_width = int(self._transformer.config.cap_feat_dim)
        """Numbers a token of an embedding: 2560."""

    def plan(self, prompt_embeds: Tensor, size: LatentSize, sigmas: list[float]) -> Plan:
        """What every step of a generation shares."""
        return Plan(prompt_embeds, sigmas)

    def velocity(self, plan: Plan, latents: Tensor, step: int) -> Tensor:
        """d latents / d sigma, float32, of the latents' shape (16, h, w).

        The model counts time upwards, t = 1 - sigma, and puts out picture minus noise, the negated velocity.
        """
        t = torch.full((1,), 1.0 - plan.levels[step], dtype=torch.float32, device=self._device)
        frame = latents.to(self._dtype).unsqueeze(1)  # (16, 1, h, w)
        (pictures,) = self._transformer([frame], t, [plan.prompt_embeds], return_dict=False)
        return -pictures[0].squeeze(1).float()
