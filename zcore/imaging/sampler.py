"""Sampler: one or several images of a request on their way from noise to latents, advanced one step at a time.

All state is in the object, so a caller may report progress between steps, interleave samplers, or drop one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zcore.errors import InvalidRequest, NonFiniteValues
from zcore.imaging.finite_values import CAUSES, finite_rows
from zcore.imaging.network.velocity_model import Plan, VelocityModel
from zcore.imaging.sampling.euler import PreservedRegion, add_noise, euler_step
from zcore.imaging.sampling.guidance import away_from_skipped, guided, is_skipping
from zcore.imaging.sampling.multipass import PlannedPass, enlarged
from zcore.imaging.text.embedding_file import PromptEmbedding

Velocity = Callable[[Tensor, int], Tensor]
"""(latents (B, 16, h, w), step) -> d latents / d sigma at that step's noise level, same shape, float32."""


@dataclass(frozen=True, slots=True)
class StartImage:
    """What the first pass starts from, at its size: an RGB image and an 8-bit mask, or neither."""

    image: Image.Image | None = None
    mask: Image.Image | None = None

    def latent_mask(self, one: PlannedPass, device: torch.device) -> Tensor:
        """Return (1, h, w) of 0 and 1: a latent is generated if any of its pixels is.

        diffusers looks at one pixel of each latent, and so misses thin lines.
        """
        assert self.mask is not None, "called only with a mask"
        white = torch.tensor(np.asarray(self.mask))[None] >= 128  # (1, H, W)
        size = (one.size.height, one.size.width)
        return torch.nn.functional.adaptive_max_pool2d(white.float(), size).to(device)

    def restore_unmasked(self, generated: Image.Image, keep_unmasked: bool) -> Image.Image:
        """Return the generated image, with the input's own pixels outside the mask if `keep_unmasked`."""
        if self.image is None or self.mask is None or not keep_unmasked:
            return generated
        return Image.composite(generated, self.image, self.mask)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What all images of a generation share."""

    model: VelocityModel
    passes: Sequence[PlannedPass]
    embedding: PromptEmbedding
    start: StartImage


@dataclass(frozen=True, slots=True)
class InitialLatents:
    """Everything random about one image, on the CPU: the latents it starts from (16, h, w), if any, and the noise of
    each pass.

    Sampled before anything is generated, so that an image that is restarted starts from the same values.
    """

    start: Tensor | None
    noises: Sequence[Tensor]


class Sampler:
    """Images of one request that are generated together; `advance` runs one step of all of them."""

    def __init__(self, conditioning: Conditioning, initial: Sequence[InitialLatents], device: torch.device) -> None:
        self._conditioning = conditioning
        self._initial = initial
        self._device = device
        starts = [one.start for one in initial if one.start is not None]
        self._latents: Tensor | None = torch.stack(starts).to(device) if starts else None
        self._pass_index: int = 0
        self._step = 0
        self._finite: list[Tensor] = []  # (B,) after each step, on the device
        self.sigma = 1.0
        """Noise level before the last step."""
        self.steps_done = 0
        """Steps that have run, over all passes."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._initial)

    @property
    def is_done(self) -> bool:
        """Whether all steps of all passes have run."""
        return self._pass_index == len(self._conditioning.passes)

    @property
    def latents(self) -> Tensor:
        """Latents (B, 16, h, w) after the last step."""
        assert self._latents is not None, "at least one step has run"
        return self._latents

    def replace_latents(self, latents: Tensor) -> None:
        """Continue from other latents (B, 16, h, w). Raises `InvalidRequest` for another shape, or no tensor."""
        if not isinstance(latents, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] callers without types
            raise InvalidRequest.field("latents", "must be a torch tensor")
        if latents.shape != self.latents.shape:
            detail = f"must keep the shape {tuple(self.latents.shape)}, not {tuple(latents.shape)}"
            raise InvalidRequest.field("latents", detail)
        self._latents = latents.to(self._device, torch.float32)
        self._finite[-1] = finite_rows(self._latents)

    def require_finite(self) -> None:
        """Raise `NonFiniteValues` with the first step whose latents are not finite. Waits for the device."""
        steps = sum(one.forwards for one in self._conditioning.passes)
        finite = torch.stack(self._finite).all(dim=1).cpu()  # (steps,)
        for step, is_finite in enumerate(finite, start=1):
            if not is_finite:
                raise NonFiniteValues(f"the latents are NaN or infinite after step {step} of {steps}; {CAUSES}")

    def advance(self) -> None:
        """Run the next step; if it is the first of a pass, prepare the pass."""
        if self._step == 0:
            self._begin_pass()
        one = self._conditioning.passes[self._pass_index]
        sigma, next_sigma = one.sigmas[self._step], one.sigmas[self._step + 1]
        latents = euler_step(self.latents, self._velocity(self.latents, self._step), sigma, next_sigma)
        self._latents = latents if self._preserved is None else self._preserved.restore(latents, next_sigma)
        self.sigma = sigma
        self.steps_done += 1
        self._finite.append(finite_rows(self._latents))
        self._step += 1
        if self._step == one.forwards:
            self._pass_index += 1
            self._step = 0

    def _begin_pass(self) -> None:
        one = self._conditioning.passes[self._pass_index]
        noise = torch.stack([each.noises[self._pass_index] for each in self._initial]).to(self._device)
        original = noise if self._latents is None else enlarged(self._latents, one.size)
        start = self._conditioning.start
        self._preserved = PreservedRegion(original, noise, start.latent_mask(one, self._device)) if start.mask else None
        self._velocity = guided_velocity(self._conditioning.model, self._conditioning.embedding, one)
        self._latents = add_noise(original, noise, one.sigmas[0])


def guided_velocity(model: VelocityModel, embedding: PromptEmbedding, one: PlannedPass) -> Velocity:
    """Return the velocity of latents in this pass, with the guidance of the pass."""
    levels = list(one.sigmas)
    positive = model.plan(embedding.embeds, one.size, levels, one.dype)
    negative = None
    if one.guidance.scale > 0:
        assert embedding.negative is not None, "a guided request has its negative prompt encoded"
        negative = model.plan(embedding.negative, one.size, levels, one.dype)

    def velocity(latents: Tensor, step: int) -> Tensor:
        wanted, skipped = _positive(model, positive, latents, step, one)
        result = wanted
        if negative is not None and one.guidance.is_active(levels[step]):
            pairs = zip(wanted, _velocities(model, negative, latents, step), strict=True)
            result = torch.stack([guided(*pair, one.guidance) for pair in pairs])
        if one.slg is not None and skipped is not None:
            result = away_from_skipped(result, wanted, skipped, one.slg.scale)
        return result

    return velocity


def _positive(
    model: VelocityModel, prompt: Plan, latents: Tensor, step: int, one: PlannedPass
) -> tuple[Tensor, Tensor | None]:
    """Return the prediction for the prompt, and in a step that needs it the one without the skipped layers."""
    if one.slg is None or not is_skipping(one.slg, step, one.forwards):
        return _velocities(model, prompt, latents, step), None
    count = len(latents)
    whole, without = model.velocities_skipping([prompt] * count, list(latents), [step] * count, one.slg.layers)
    return torch.stack(whole), torch.stack(without)


def _velocities(model: VelocityModel, prompt: Plan, latents: Tensor, step: int) -> Tensor:
    """Return the velocities of images (B, 16, h, w) that share a prompt, from one forward."""
    count = len(latents)
    return torch.stack(model.velocities([prompt] * count, list(latents), [step] * count))
