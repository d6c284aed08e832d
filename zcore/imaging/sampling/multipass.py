"""Multi-pass generation: the plan of each pass, and latents enlarged from one pass to the next.

A request without passes is planned as one. Latents are enlarged directly, without decoding to pixels. Does not depend
on the model.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from zcore.checkpoint.geometry import LatentSize, latent_size
from zcore.imaging.sampling.guidance import Guidance
from zcore.imaging.sampling.schedule import sigmas
from zcore.request import Dype, GenerationRequest, Pass, SkipLayerGuidance
from zcore.sizes import SIDE_MULTIPLE_PX

REFINING_STRENGTH = 0.5
"""Strength of every pass but the first, if the request does not give one."""


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass: its size in pixels, its noise levels (the last is 0), its guidance, its position extrapolation."""

    width: int
    height: int
    sigmas: tuple[float, ...]
    guidance: Guidance
    slg: SkipLayerGuidance | None
    dype: Dype | None

    @property
    def forwards(self) -> int:
        """Number of steps of this pass."""
        return len(self.sigmas) - 1

    @property
    def size(self) -> LatentSize:
        """Size of its latents."""
        return latent_size(self.width, self.height)


def plan(request: GenerationRequest) -> list[PlannedPass]:
    """Return all passes in order; the last has the request's own size."""
    passes = request.passes or (Pass(scale=1.0, strength=request.strength if request.image else None),)
    return [_planned(request, one, index) for index, one in enumerate(passes)]


def enlarged(latents: Tensor, size: LatentSize) -> Tensor:
    """Return latents (B, 16, h, w) resized to `size`, bicubic, in their own dtype; unchanged if the size is equal."""
    if latents.shape[2:] == (size.height, size.width):
        return latents
    grown = functional.interpolate(latents.float(), size=(size.height, size.width), mode="bicubic", align_corners=False)
    return grown.to(latents.dtype)


def _planned(request: GenerationRequest, one: Pass, index: int) -> PlannedPass:
    if index == 0:
        strength = (one.strength or request.strength) if request.image else 1.0
    else:
        strength = one.strength or REFINING_STRENGTH
    levels = sigmas(one.steps or request.steps, one.shift or request.shift, strength, request.strength_rule)
    scale = request.guidance_scale if one.guidance_scale is None else one.guidance_scale
    return PlannedPass(
        width=_scaled(request.width, one.scale),
        height=_scaled(request.height, one.scale),
        sigmas=tuple(levels),
        guidance=Guidance(scale, request.cfg_normalization, request.cfg_truncation),
        slg=one.slg or request.slg,
        dype=one.dype or request.dype,
    )


def _scaled(side_px: int, scale: float) -> int:
    whole = round(side_px * scale, 6)  # in floating point 1440 * 0.7 is slightly less than 1008
    return int(whole) // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX
