"""The passes of a generation: one after the other, each larger than the last.

Takes a request; gives what each pass has to do, which is one pass where the request names none. `enlarged` carries
latents from a pass to the next without a trip through pixels. Does not know the model.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from zcore.imaging.geometry import LatentSize, latent_size
from zcore.imaging.sampling.guidance import Guidance
from zcore.imaging.sampling.schedule import sigmas
from zcore.request import Dype, GenerationRequest, Pass, SkipLayerGuidance
from zcore.sizes import SIDE_MULTIPLE_PX

REFINING_STRENGTH = 0.5
"""How much a pass paints anew of the one before it, where the request does not say."""


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass: its size, its noise levels (the last is 0), its guidance of both kinds, its positions."""

    width: int
    height: int
    levels: tuple[float, ...]
    guidance: Guidance
    slg: SkipLayerGuidance | None
    dype: Dype | None

    @property
    def forwards(self) -> int:
        """Steps of this pass."""
        return len(self.levels) - 1

    @property
    def size(self) -> LatentSize:
        """Of its latents."""
        return latent_size(self.width, self.height)


def plan(request: GenerationRequest) -> list[PlannedPass]:
    """All passes in order; the last has the request's own size."""
    passes = request.passes or (Pass(scale=1.0, strength=request.strength if request.image else None),)
    return [_planned(request, one, index) for index, one in enumerate(passes)]


def enlarged(latents: Tensor, size: LatentSize) -> Tensor:
    """Latents (B, 16, h, w) of any dtype at another size, bicubic; the same where the size is the same."""
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
        levels=tuple(levels),
        guidance=Guidance(scale, request.cfg_normalization, request.cfg_truncation),
        slg=one.slg or request.slg,
        dype=one.dype or request.dype,
    )


def _scaled(side_px: int, scale: float) -> int:
    whole = round(side_px * scale, 6)  # 1440 * 0.7 is just below 1008
    return int(whole) // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX
