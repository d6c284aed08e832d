"""The diffusion transformer as a function: latents and a step in, velocity out.

Takes the module that the loader gave; makes a plan of everything that stays the same while a picture is painted, and
runs one forward a step by it. Hides the network's conventions: patches, padding, masks, its own clock, sign and
arithmetic. Keeps nothing between calls. Does not know the schedule's formula and the sampler.
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

from zcore.imaging.geometry import PATCH_LATENTS, SIDE_MULTIPLE_PX, LatentSize, padded
from zcore.imaging.model.attention import Attend, sdpa
from zcore.imaging.model.compilation import compiled, compiled_skipping
from zcore.imaging.model.dype import AxisTurn, axis_turns, stretches
from zcore.imaging.model.forward import (
    Conditions,
    Modulation,
    Transformer,
    forward,
    forward_skipping,
    modulate,
    modulators,
    refine_caption,
)
from zcore.imaging.model.loader import Offload
from zcore.imaging.model.lora import LoraWeights, ScaledLora, adapted, bind, changeable
from zcore.imaging.model.lora_file import parse_lora
from zcore.imaging.model.offload import brought, moved, ready_to_leave
from zcore.imaging.model.rope import Rotary, caption_places, frequencies, picture_places, rotary
from zcore.request import Dype


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to be painted: embeddings of its prompt (L, hidden), its size, noise levels from first to 0, and how
    its positions are stretched, if they are.
    """

    prompt_embeds: Tensor
    size: LatentSize
    sigmas: Sequence[float]
    dype: Dype | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays the same while a sample is painted. Every tensor is a batch of one."""

    size: LatentSize
    caption: Tensor  # (1, P, D), refined
    is_padding: Tensor  # (1, N, 1), boolean
    rotary: Sequence[Callable[[], Rotary]]  # of (1, N + P) tokens: one for all steps, or one a step
    modulations: Sequence[Modulation]  # one a step

    @property
    def picture_length(self) -> int:
        """N, the picture's tokens with their padding."""
        return self.is_padding.shape[1]

    @property
    def caption_length(self) -> int:
        """P, the caption's tokens with their padding."""
        return self.caption.shape[1]

    def rotary_at(self, step: int) -> Rotary:
        """The table that turns queries and keys in this step."""
        return self.rotary[step if len(self.rotary) > 1 else 0]()


class VelocityModel:
    """Where latents at a noise level want to go."""

    def __init__(
        self,
        transformer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        attend: Attend = sdpa,
        compile_mode: str | None = None,
        offload: Offload = "none",
    ) -> None:
        """With an `offload` the weights rest in the CPU's memory, and the model has to be `brought` to compute.

        With a `compile_mode` of torch's the forward is one graph without a break, which serves every size, prompt
        length and number of steps. Batches, and batches with masks, are compiled when they first come.
        """
        self._weights = cast(Transformer, transformer if offload == "none" else ready_to_leave(transformer, device))
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
        """Numbers a token of an embedding: 2560."""

    def lora(self, content: bytes, name: str) -> LoraWeights:
        """A LoRA file made ready for this model. Raises `InvalidLora`, which calls it by its name."""
        lora = parse_lora(content, changeable(self._module), name)
        return bind(lora, name, self._module, self._device)

    def adapted(self, loras: Sequence[ScaledLora]) -> "VelocityModel":
        """This model with LoRAs beside its layers; plans are to be made by the model that runs them.

        It shares the weights of this one, which stays as it is. Without LoRAs, or with scales of 0, it is this one.
        """
        network = adapted(self._module, loras, self._dtype)
        if network is self._module:
            return self
        other = copy(self)
        other._weights = cast(Transformer, network)
        other._modulators = modulators(other._weights)
        return other

    def brought(self) -> "VelocityModel":
        """This model with its weights on its device; this one itself where they rest there.

        They leave when nobody holds it any more. What every step's plan needs of all blocks comes with it; the blocks
        come one at a time where they are the unit.
        """
        if self._offload == "none":
            return self
        other = copy(self)
        other._offload = "none"
        other._weights = cast(Transformer, brought(self._module, self._device, self._offload, but=["adaLN_modulation"]))
        if self._offload == "network":
            other._modulators = modulators(other._weights)
        else:
            other._modulators = [moved(cast(nn.Module, one), self._device) for one in self._modulators]
        return other

    def plan(self, prompt_embeds: Tensor, size: LatentSize, sigmas: Sequence[float], dype: Dype | None = None) -> Plan:
        """Everything about a picture that is known before its first step; `prompt_embeds` is (L, hidden).

        The last of `sigmas` is where the picture ends, and has no step.
        """
        (plan,) = self.plans([Sample(prompt_embeds, size, sigmas, dype)])
        return plan

    def plans(self, samples: Sequence[Sample]) -> list[Plan]:
        """The plans of samples that will be painted together, computed together.

        Each is a plan of its own, and equals the one that `plan` gives up to the last bits of float32.
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
        """d latents / d sigma at a step of the plan, of the latents' shape: float32 (16, h, w)."""
        (velocity,) = self.velocities([plan], [latents], [step])
        return velocity

    def velocities(self, plans: Sequence[Plan], latents: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
        """The velocities of several samples in one forward: of any sizes and prompts, each at its own step."""
        moved = self._run(self._weights, self._tokens(plans, latents), conditions_of(plans, steps), self._attend)
        return self._pictures(moved, plans)

    def velocities_skipping(
        self, plans: Sequence[Plan], latents: Sequence[Tensor], steps: Sequence[int], layers: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What `velocities` gives, and what it would give without these of the main blocks.

        `layers` are some of `range(layer_count)`. The blocks before the first of them run once for both, so it costs
        less than twice as much.
        """
        tokens, conditions = self._tokens(plans, latents), conditions_of(plans, steps)
        whole, without = self._run_skipping(self._weights, tokens, conditions, self._attend, tuple(sorted(layers)))
        return self._pictures(whole, plans), self._pictures(without, plans)

    def _tokens(self, plans: Sequence[Plan], latents: Sequence[Tensor]) -> Tensor:
        """(B, N, 64), zeros where a picture has fewer."""
        length = max(plan.picture_length for plan in plans)
        channels = self.channels * PATCH_LATENTS**2
        tokens = torch.zeros(len(plans), length, channels, dtype=self._dtype, device=self._device)
        for row, plan, sample in zip(tokens, plans, latents, strict=True):
            _patches(row, plan.size).copy_(sample.view(_patches(row, plan.size).shape))
        return tokens

    def _pictures(self, tokens: Tensor, plans: Sequence[Plan]) -> list[Tensor]:
        """Each (16, h, w)."""
        return [
            _patches(row, plan.size).reshape(self.channels, plan.size.height, plan.size.width)
            for row, plan in zip(tokens, plans, strict=True)
        ]

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self._weights)

    def _refined_captions(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Each (1, P, D)."""
        lengths = [padded(len(prompt)) for prompt in prompts]
        longest = max(lengths)
        position = torch.arange(longest, device=self._device)
        table = rotary(caption_places(longest), self._frequencies, self._device)
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
        """Where positions are stretched, the table of a step is made when it is used: at 4096 px it takes 67 MB."""
        rows, columns = sample.size.height // PATCH_LATENTS, sample.size.width // PATCH_LATENTS
        picture = picture_places(caption_length + 1, rows, columns, padded(rows * columns))
        places = torch.cat((picture, caption_places(caption_length)))
        if sample.dype is None or not stretches(sample.dype, columns * SIDE_MULTIPLE_PX, rows * SIDE_MULTIPLE_PX):
            table = _batched(rotary(places, self._frequencies, self._device))
            return [lambda: table]
        config = self._weights.config
        turns = [
            axis_turns(sample.dype, config.rope_theta, config.axes_dims, (rows, columns), sigma)
            for sigma in sample.sigmas[:-1]
        ]
        return [partial(self._turned, places, one) for one in turns]

    def _turned(self, places: Tensor, turns: Sequence[AxisTurn]) -> Rotary:
        frequencies, amplitudes = [one.frequencies for one in turns], [one.amplitude for one in turns]
        return _batched(rotary(places, frequencies, self._device, amplitudes))


def _batched(table: Rotary) -> Rotary:
    return Rotary(table.first[None], table.second[None])


def conditions_of(plans: Sequence[Plan], steps: Sequence[int]) -> Conditions:
    """What a forward is told of these plans, each at its step. One plan alone is not copied."""
    pictures = [plan.picture_length for plan in plans]
    lengths = [plan.picture_length + plan.caption_length for plan in plans]
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
        picture_mask=_mask(pictures, device),
        mask=_mask(lengths, device),
        order=_order(plans, device),
    )


def _joined(samples: Sequence[Tensor]) -> Tensor:
    """A batch of batches of one (1, L, ...); the shorter are filled with zeros. One alone is not copied."""
    if len(samples) == 1:
        return samples[0]
    return pad_sequence([sample[0] for sample in samples], batch_first=True)


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Which tokens there are, (B, longest), or None where there are all."""
    if min(lengths) == max(lengths):
        return None
    position = torch.arange(max(lengths), device=device)
    return torch.stack([position < length for length in lengths])


def _order(plans: Sequence[Plan], device: torch.device) -> Tensor | None:
    """Where among all pictures (B, N) and captions (B, P) behind them a sample's own tokens are, without a gap between:
    (B, S, 1). None where the pictures are of one length, and there is no gap.
    """
    pictures = [plan.picture_length for plan in plans]
    longest = max(pictures)
    if min(pictures) == longest:
        return None
    position = torch.arange(max(plan.picture_length + plan.caption_length for plan in plans), device=device)
    last = longest + max(plan.caption_length for plan in plans) - 1
    found = [torch.where(position < length, position, position + (longest - length)) for length in pictures]
    return torch.stack(found).clamp(max=last).unsqueeze(-1)


def _patches(tokens: Tensor, size: LatentSize) -> Tensor:
    """The tokens of one picture (N, 64) seen as its latents: (16, h / 2, 2, w / 2, 2). Padding is not seen."""
    rows, columns = size.height // PATCH_LATENTS, size.width // PATCH_LATENTS
    patches = tokens[: rows * columns].view(rows, columns, PATCH_LATENTS, PATCH_LATENTS, -1)
    return patches.permute(4, 0, 2, 1, 3)


def _tokens(size: LatentSize) -> int:
    return (size.height // PATCH_LATENTS) * (size.width // PATCH_LATENTS)
