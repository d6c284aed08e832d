"""Token ids to the embedding that conditions the transformer.

Takes the checkpoint's language model, prompts' ids and the hidden layers wanted; gives one hidden state a token. Runs
prompts without needless padding and only the blocks up to the deepest layer wanted: everything above it, the final norm
and the head of a language model would compute what nobody reads. Does not know the prompts' text.

A hidden layer counts as in transformers' tuple of hidden states, which for N blocks has N + 1 entries: the token
embeddings, then each block's output, where the last one has also passed the final norm. -2, which Z-Image was trained
on, is therefore the output of block N - 1, un-normed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from zcore.errors import InvalidRequest
from zcore.imaging.model.loader import Offload
from zcore.imaging.model.offload import OffloadedNetwork
from zcore.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class LayerBlend:
    """Which hidden layers are read and how much each counts; the weights sum to 1."""

    weights: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, request: GenerationRequest) -> "LayerBlend":
        """`layer_weights` where the request has them, else its one `hidden_layer`."""
        if not request.layer_weights:
            return cls(((request.hidden_layer, 1.0),))
        total = sum(request.layer_weights.values())
        return cls(tuple(sorted((int(name), weight / total) for name, weight in request.layer_weights.items())))

    def __str__(self) -> str:
        """As `-2`, or `-5:0.3,-2:0.7`."""
        if len(self.weights) == 1:
            return str(self.weights[0][0])
        return ",".join(f"{layer}:{weight:.6g}" for layer, weight in self.weights)


class _LanguageModel(Protocol):
    """The parts of transformers' `Qwen3Model` (Apache-2.0) that are used."""

    config: Any
    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: Sequence[nn.Module]
    norm: nn.Module


class TextEncoder:
    """The checkpoint's language model, read at any of its hidden layers."""

    def __init__(self, model: nn.Module, device: torch.device, offload: Offload = "none") -> None:
        """With an `offload` the model rests in the CPU's memory, comes to its device to encode, and stays until it is
        told to `rest`.
        """
        self._network = OffloadedNetwork(model, device, offload)
        self._device = device
        self._blocks = len(cast(_LanguageModel, model).layers)
        self.width = int(cast(_LanguageModel, model).config.hidden_size)
        """Numbers a token: 2560."""

    def rest(self) -> bool:
        """Leave the device until the next prompt; whether that made memory of it free."""
        return self._network.rest()

    def depth(self, layer: int) -> int:
        """How many blocks have run where this hidden layer is read. Raises `InvalidRequest` where it is not there."""
        blocks = self._blocks
        if not -blocks <= layer <= -1:
            raise InvalidRequest.field("hidden_layer", f"{layer}; this text encoder has the layers -{blocks} to -1")
        return blocks + 1 + layer

    def encode(self, token_ids: Sequence[int], blend: LayerBlend) -> Tensor:
        """(L, hidden) in the model's dtype, on its device. Raises `InvalidRequest` as `depth` does."""
        return self.encode_batch([token_ids], blend)[0]

    def encode_batch(self, prompts: Sequence[Sequence[int]], blend: LayerBlend) -> list[Tensor]:
        """(L_i, hidden) for each prompt, as each would give alone up to rounding; padded to the longest inside."""
        depths = {self.depth(layer): weight for layer, weight in blend.weights}
        lengths = [len(ids) for ids in prompts]
        padded = torch.zeros(len(prompts), max(lengths), dtype=torch.long)  # (B, L)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(self._device)  # (B, L)
        states = self._states(padded.to(self._device), mask, set(depths))
        if len(depths) == 1:
            mixed = next(iter(states.values()))
        else:
            total = sum(weight * states[depth].float() for depth, weight in depths.items())
            mixed = cast(Tensor, total).to(next(iter(states.values())).dtype)
        return [row[:length] for row, length in zip(mixed, lengths, strict=True)]

    def _states(self, ids: Tensor, mask: Tensor | None, depths: set[int]) -> dict[int, Tensor]:
        """Hidden states (B, L, hidden) at these depths, 0 being the token embeddings."""
        from transformers import masking_utils

        model = cast(_LanguageModel, self._network.present())
        hidden: Tensor = model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = model.rotary_emb(hidden, positions)
        seen = cast(Any, masking_utils).create_causal_mask(
            config=model.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        states = {0: hidden} if 0 in depths else {}
        for depth in range(1, max(depths) + 1):
            # Not held by a name: blocks may come one at a time, and leave.
            hidden = model.layers[depth - 1](
                hidden, attention_mask=seen, position_embeddings=rotary, position_ids=positions
            )
            if depth in depths:
                states[depth] = model.norm(hidden) if depth == self._blocks else hidden
        return states
