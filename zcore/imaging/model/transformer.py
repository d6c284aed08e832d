"""The diffusion transformer as a function: latents, noise level and prompt in, velocity out.

Takes the module that the loader gave; hides its conventions: lists for batches, a frame axis, the model's own clock,
its sign and its arithmetic. Does not know the schedule.
"""

from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn


class _ZImageTransformer(Protocol):
    """The call of diffusers' `ZImageTransformer2DModel` (Apache-2.0), as far as it is used."""

    config: Any

    def __call__(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], *, return_dict: Literal[False]
    ) -> tuple[list[Tensor]]: ...


class VelocityModel:
    """Where latents at a noise level want to go, for one prompt at a time."""

    def __init__(self, transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._transformer = cast(_ZImageTransformer, transformer)
        self._device = device
        self._dtype = dtype
        self.channels = int(self._transformer.config.in_channels)
        """Channels of a latent: 16."""

    def velocity(self, latents: Tensor, sigma: float, prompt_embeds: Tensor) -> Tensor:
        """d latents / d sigma, float32, of the latents' shape.

        `latents` is float32 (16, h, w); `sigma` is the noise level in (0, 1]; `prompt_embeds` is (L, hidden) in the
        model's dtype. The model counts time upwards, t = 1 - sigma, and puts out picture minus noise, the negated
        velocity.
        """
        t = torch.full((1,), 1.0 - sigma, dtype=torch.float32, device=self._device)
        frame = latents.to(self._dtype).unsqueeze(1)  # (16, 1, h, w)
        (pictures,) = self._transformer([frame], t, [prompt_embeds], return_dict=False)
        return -pictures[0].squeeze(1).float()
