"""The diffusion transformer as a function: latents and a step in, velocity out.

Takes the module from the loader. Computes a plan of what stays the same while an image is generated, and runs one
forward per step of a plan. Hides the network's conventions: patches, padding, masks, its direction of time, sign, and
dtype. Retains nothing between calls. Does not depend on the schedule's formula or the sampler.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from zcore.checkpoint.geometry import PATCH_LATENTS, SIDE_MULTIPLE_PX, LatentSize, padded
from zcore.choices import Offload
from zcore.imaging.kernels.attention import Attend, sdpa
from zcore.imaging.lora.adapters import LoraWeights, ScaledLora, adapted, bind, changeable
from zcore.imaging.lora.lora_file import parse_lora
from zcore.imaging.network.compilation import compiled, compiled_skipping
from zcore.imaging.network.dype import AxisRotation, axis_rotations, stretches
from zcore.imaging.network.forward import (
    Conditions,
    Modulation,
    Transformer,
    forward,
    forward_skipping,
    modulate,
    modulators,
    refine_caption,
)
from zcore.imaging.network.rope import Rotary, caption_positions, frequencies, image_positions, rotary
from zcore.imaging.weights.offload import copy_to_device, load_to_device, prepare_offload
from zcore.request import Dype


@dataclass(frozen=True, slots=True)
class Sample:
    """An image to generate: its prompt's embedding (L, hidden), size, and noise levels from the first to 0.

    `dype` holds the settings that stretch its positions, if any.
    """

    prompt_embeds: Tensor
    size: LatentSize
    sigmas: Sequence[float]
    dype: Dype | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays the same while a sample is generated. Every tensor is a batch of one."""

    size: LatentSize
    caption: Tensor  # (1, P, D), refined
    is_padding: Tensor  # (1, N, 1), boolean
    rotary: Sequence[Callable[[], Rotary]]  # for (1, N + P) tokens: one for all steps, or one per step
    modulations: Sequence[Modulation]  # one per step

    @property
    def image_length(self) -> int:
        """N, the number of the image's tokens with their padding."""
        return self.is_padding.shape[1]

    @property
    def caption_length(self) -> int:
        """P, the number of the caption's tokens with their padding."""
        return self.caption.shape[1]

    def rotary_at(self, step: int) -> Rotary:
        """Return the table that rotates queries and keys in this step."""
        return self.rotary[step if len(self.rotary) > 1 else 0]()


class VelocityModel:
    """The transformer as a velocity field: d latents / d sigma at a noise level."""

    def __init__(
        self,
        transformer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        attend: Attend = sdpa,
        compile_mode: str | None = None,
        offload: Offload = "none",
    ) -> None:
        """With an `offload` the weights stay in the CPU's memory, and only the result of `on_device` can compute.

        With a `compile_mode` of torch the forward is one graph without a break for every size, prompt length, and
        number of steps. Batches, and batches with masks, are compiled on first use.
        """
        self._weights = cast(Transformer, transformer if offload == "none" else prepare_offload(transformer, device))
        self._modulators = modulators(self._weights)
        self._offload: Offload = offload
        self._device = device
        self._dtype = dtype
        self._attend = attend
        self._run = forward if compile_mode is None else compiled(compile_mode)
        self._run_skipping = forward_skipping if compile_mode is None else compiled_skipping(compile_mode)
        self._frequencies = frequencies(self._weights.config.rope_theta, self._weights.config.axes_dims)
        self.channels = int(self._weights.config.in_channels)
        """Channels of a latent: 16."""
        self.layer_count = len(self._weights.layers)
        """Main blocks: 30."""
        self.prompt_width = int(self._weights.config.cap_feat_dim)
        """Width of a prompt's embedding: 2560."""

    def lora(self, content: bytes, name: str, *, strict: bool = True) -> LoraWeights:
        """Prepare a LoRA file for this model. Raises `InvalidLora`, which names it."""
        lora = parse_lora(content, changeable(self._module), name, strict=strict)
        return bind(lora, name, self._module, self._device)

    def adapted(self, loras: Sequence[ScaledLora]) -> "VelocityModel":
        """Return this model with LoRAs applied; plans must be made by the model that runs them.

        It shares the weights of this model, which does not change. Without LoRAs, or with scales of 0, it is this
        model itself.
        """
        network = adapted(self._module, loras, self._dtype)
        if network is self._module:
            return self
        other = copy(self)
        other._weights = cast(Transformer, network)
        other._modulators = modulators(other._weights)
        return other

    def on_device(self) -> "VelocityModel":
        """Return this model with its weights on its device, or itself if they are not offloaded.

        The copies are freed with the returned model. If the weights are offloaded by block, the blocks' modulating
        layers, which plans need, are copied at once, and the rest of a block when it is used.
        """
        if self._offload == "none":
            return self
        other = copy(self)
        other._offload = "none"
        other._weights = cast(
            Transformer, load_to_device(self._module, self._device, self._offload, leave_out=["adaLN_modulation"])
        )
        if self._offload == "network":
            other._modulators = modulators(other._weights)
        else:
            other._modulators = [copy_to_device(cast(nn.Module, layer), self._device) for layer in self._modulators]
        return other

    def plan(self, prompt_embeds: Tensor, size: LatentSize, sigmas: Sequence[float], dype: Dype | None = None) -> Plan:
        """Compute everything about an image that is known before its first step; `prompt_embeds` is (L, hidden).

        The last of `sigmas` is the level at which the image is finished, and has no step.
        """
        (plan,) = self.plans([Sample(prompt_embeds, size, sigmas, dype)])
        return plan

    def plans(self, samples: Sequence[Sample]) -> list[Plan]:
        """Compute the plans of several samples together.

        Each can be used alone, and equals the result of `plan` up to the last bits of float32.
        """
        captions = self._refined_captions([sample.prompt_embeds for sample in samples])
        steps = zip_longest(*([1.0 - sigma for sigma in sample.sigmas[:-1]] for sample in samples), fillvalue=0.0)
        times = torch.tensor(list(steps), dtype=torch.float32).to(self._device)  # (steps, B)
        modulations = [modulate(self._weights, self._modulators, t, self._dtype) for t in times]
        return [
            Plan(
                size=sample.size,
                caption=caption,
                is_padding=self._is_padding(sample.size),
                rotary=self._rotary(sample, caption.shape[1]),
                modulations=[
                    Modulation(modulation.blocks[:, :, row : row + 1], modulation.final[row : row + 1])
                    for modulation in modulations[: len(sample.sigmas) - 1]
                ],
            )
            for row, (sample, caption) in enumerate(zip(samples, captions, strict=True))
        ]

    def velocity(self, plan: Plan, latents: Tensor, step: int) -> Tensor:
        """Return d latents / d sigma at a step of the plan, in the shape of the latents: float32 (16, h, w)."""
        (velocity,) = self.velocities([plan], [latents], [step])
        return velocity

    def velocities(self, plans: Sequence[Plan], latents: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
        """Return the velocities of several samples from one forward: of any sizes and prompts, each at its own step."""
        velocity_tokens = self._run(
            self._weights, self._tokens(plans, latents), conditions_of(plans, steps), self._attend
        )
        return self._images(velocity_tokens, plans)

    def velocities_skipping(
        self, plans: Sequence[Plan], latents: Sequence[Tensor], steps: Sequence[int], layers: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the result of `velocities`, and its result without the main blocks `layers`.

        `layers` are some of `range(layer_count)`. The blocks before the first of them run once for both, so this costs
        less than twice as much.
        """
        tokens, conditions = self._tokens(plans, latents), conditions_of(plans, steps)
        whole, without = self._run_skipping(self._weights, tokens, conditions, self._attend, tuple(sorted(layers)))
        return self._images(whole, plans), self._images(without, plans)

    def _tokens(self, plans: Sequence[Plan], latents: Sequence[Tensor]) -> Tensor:
        """Return the latents as tokens (B, N, 64), shorter images padded with zeros."""
        length = max(plan.image_length for plan in plans)
        channels = self.channels * PATCH_LATENTS**2
        tokens = torch.zeros(len(plans), length, channels, dtype=self._dtype, device=self._device)
        for row, plan, sample in zip(tokens, plans, latents, strict=True):
            _patches(row, plan.size).copy_(sample.view(_patches(row, plan.size).shape))
        return tokens

    def _images(self, tokens: Tensor, plans: Sequence[Plan]) -> list[Tensor]:
        """Return each sample's tokens as (16, h, w)."""
        return [
            _patches(row, plan.size).reshape(self.channels, plan.size.height, plan.size.width)
            for row, plan in zip(tokens, plans, strict=True)
        ]

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self._weights)

    def _refined_captions(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Return each caption as (1, P, D)."""
        lengths = [padded(len(prompt)) for prompt in prompts]
        longest = max(lengths)
        position = torch.arange(longest, device=self._device)
        table = rotary(caption_positions(longest), self._frequencies, self._device)
        captions = refine_caption(
            self._weights,
            functional.pad(pad_sequence(list(prompts), batch_first=True), (0, 0, 0, longest - max(map(len, prompts)))),
            torch.stack([position >= len(prompt) for prompt in prompts]).unsqueeze(-1),
            table,
            _mask(lengths, self._device),
            self._attend,
        )
        return [caption[None, :length] for caption, length in zip(captions, lengths, strict=True)]

    def _is_padding(self, size: LatentSize) -> Tensor:
        count = _tokens(size)
        return (torch.arange(padded(count), device=self._device) >= count)[None, :, None]

    def _rotary(self, sample: Sample, caption_length: int) -> Sequence[Callable[[], Rotary]]:
        """Return the tables of all steps. Stretched ones are computed when used: at 4096 px one takes 67 MB."""
        rows, columns = sample.size.height // PATCH_LATENTS, sample.size.width // PATCH_LATENTS
        image = image_positions(caption_length + 1, rows, columns, padded(rows * columns))
        positions = torch.cat((image, caption_positions(caption_length)))
        if sample.dype is None or not stretches(sample.dype, columns * SIDE_MULTIPLE_PX, rows * SIDE_MULTIPLE_PX):
            table = _batched(rotary(positions, self._frequencies, self._device))
            return [lambda: table]
        config = self._weights.config
        rotations = [
            axis_rotations(sample.dype, config.rope_theta, config.axes_dims, (rows, columns), sigma)
            for sigma in sample.sigmas[:-1]
        ]
        return [partial(self._stretched, positions, axes) for axes in rotations]

    def _stretched(self, positions: Tensor, axes: Sequence[AxisRotation]) -> Rotary:
        frequencies, amplitudes = [axis.frequencies for axis in axes], [axis.amplitude for axis in axes]
        return _batched(rotary(positions, frequencies, self._device, amplitudes))


def _batched(table: Rotary) -> Rotary:
    return Rotary(table.first[None], table.second[None])


def conditions_of(plans: Sequence[Plan], steps: Sequence[int]) -> Conditions:
    """Join the conditions of these plans, each at its step. A single plan is not copied."""
    images = [plan.image_length for plan in plans]
    lengths = [plan.image_length + plan.caption_length for plan in plans]
    tables = [plan.rotary_at(step) for plan, step in zip(plans, steps, strict=True)]
    modulations = [plan.modulations[step] for plan, step in zip(plans, steps, strict=True)]
    device = plans[0].caption.device
    return Conditions(
        caption=_joined([plan.caption for plan in plans]),
        rotary=Rotary(_joined([table.first for table in tables]), _joined([table.second for table in tables])),
        is_padding=_joined([plan.is_padding for plan in plans]),
        modulation=Modulation(
            modulations[0].blocks if len(plans) == 1 else torch.cat([each.blocks for each in modulations], 2),
            _joined([each.final for each in modulations]),
        ),
        image_mask=_mask(images, device),
        mask=_mask(lengths, device),
        order=_order(plans, device),
    )


def _joined(samples: Sequence[Tensor]) -> Tensor:
    """Join batches of one (1, L, ...) to a batch, shorter ones padded with zeros. A single one is not copied."""
    if len(samples) == 1:
        return samples[0]
    return pad_sequence([sample[0] for sample in samples], batch_first=True)


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return which tokens exist, (B, longest), or None if all do."""
    if min(lengths) == max(lengths):
        return None
    position = torch.arange(max(lengths), device=device)
    return torch.stack([position < length for length in lengths])


def _order(plans: Sequence[Plan], device: torch.device) -> Tensor | None:
    """Return indices (B, S, 1) that close the gap between each sample's image and caption.

    They index the padded images (B, N) followed by the padded captions (B, P). None if all images have the same length,
    so that there is no gap.
    """
    images = [plan.image_length for plan in plans]
    longest = max(images)
    if min(images) == longest:
        return None
    position = torch.arange(max(plan.image_length + plan.caption_length for plan in plans), device=device)
    last = longest + max(plan.caption_length for plan in plans) - 1
    found = [torch.where(position < length, position, position + (longest - length)) for length in images]
    return torch.stack(found).clamp(max=last).unsqueeze(-1)


def _patches(tokens: Tensor, size: LatentSize) -> Tensor:
    """View the tokens of one image (N, 64), without padding, as its latents: (16, h / 2, 2, w / 2, 2)."""
    rows, columns = size.height // PATCH_LATENTS, size.width // PATCH_LATENTS
    patches = tokens[: rows * columns].view(rows, columns, PATCH_LATENTS, PATCH_LATENTS, -1)
    return patches.permute(4, 0, 2, 1, 3)


def _tokens(size: LatentSize) -> int:
    return (size.height // PATCH_LATENTS) * (size.width // PATCH_LATENTS)
