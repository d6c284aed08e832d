"""The text encoder: token ids to the embedding that conditions the transformer.

Takes the checkpoint's language model, prompts' ids, and the hidden layers to read; returns one hidden state per token.
Pads prompts only within a batch, and runs only the blocks up to the deepest layer to read: the blocks above it, the
final norm, and the head of a language model would compute unused values.

Hidden layers count as in transformers' tuple of hidden states, which for N blocks has N + 1 entries: the token
embeddings, then each block's output, the last one after the final norm. So -2, on which Z-Image was trained, is the
output of block N - 1 without the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from zcore.checkpoint.layer_counts import missing_layer
from zcore.choices import Offload
from zcore.errors import InvalidRequest
from zcore.imaging.architecture.text_network import TextNetwork, causal_mask, rotary_tables
from zcore.imaging.weights.offload import OffloadedNetwork
from zcore.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class LayerBlend:
    """The hidden layers to read, each with its weight; the weights sum to 1."""

    weights: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, request: GenerationRequest) -> "LayerBlend":
        """Return the request's `layer_weights` if it has any, else its one `hidden_layer`."""
        if not request.layer_weights:
            return cls(((request.hidden_layer, 1.0),))
        total = sum(request.layer_weights.values())
        return cls(tuple(sorted((int(name), weight / total) for name, weight in request.layer_weights.items())))

    def __str__(self) -> str:
        """Format as `-2`, or as `-5:0.3,-2:0.7`."""
        if len(self.weights) == 1:
            return str(self.weights[0][0])
        return ",".join(f"{layer}:{weight:.6g}" for layer, weight in self.weights)


class TextEncoder:
    """The checkpoint's language model, read at any of its hidden layers."""

    def __init__(self, model: nn.Module, device: torch.device, offload: Offload = "none") -> None:
        """With an `offload` the model stays in the CPU's memory until it encodes, then on its device until `unload`."""
        self._network = OffloadedNetwork(model, device, offload)
        self._device = device
        self._blocks = len(cast(TextNetwork, model).layers)
        self.width = int(cast(TextNetwork, model).config.hidden_size)
        """Width of an embedding: 2560."""

    def unload(self) -> bool:
        """Remove the model from its device until the next prompt; return whether that freed device memory."""
        return self._network.unload()

    def block_count(self, layer: int) -> int:
        """Return how many blocks run to compute a hidden layer. Raises `InvalidRequest` for one that does not exist."""
        blocks = self._blocks
        if not -blocks <= layer <= -1:
            raise InvalidRequest.field("hidden_layer", missing_layer(layer, blocks))
        return blocks + 1 + layer

    def encode(self, token_ids: Sequence[int], blend: LayerBlend) -> Tensor:
        """Return (L, hidden) in the model's dtype, on its device. Raises `InvalidRequest` as `block_count` does."""
        return self.encode_batch([token_ids], blend)[0]

    def encode_batch(self, prompts: Sequence[Sequence[int]], blend: LayerBlend) -> list[Tensor]:
        """Return (L_i, hidden) for each prompt, equal to `encode` up to rounding; padded internally to the longest."""
        weights = {self.block_count(layer): weight for layer, weight in blend.weights}
        lengths = [len(ids) for ids in prompts]
        padded = torch.zeros(len(prompts), max(lengths), dtype=torch.long)  # (B, L)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(self._device)  # (B, L)
        states = self._states(padded.to(self._device), mask, set(weights))
        if len(weights) == 1:
            mixed = next(iter(states.values()))
        else:
            total = sum(weight * states[count].float() for count, weight in weights.items())
            mixed = cast(Tensor, total).to(next(iter(states.values())).dtype)
        return [row[:length] for row, length in zip(mixed, lengths, strict=True)]

    def _states(self, ids: Tensor, mask: Tensor | None, block_counts: set[int]) -> dict[int, Tensor]:
        """Return the hidden states (B, L, hidden) after these numbers of blocks; 0 is the token embeddings."""
        model = cast(TextNetwork, self._network.on_device())
        hidden: Tensor = model.embed_tokens(ids)
        rotary = rotary_tables(model.config, ids.shape[1], hidden)
        attended = causal_mask(mask)
        states = {0: hidden} if 0 in block_counts else {}
        for count in range(1, max(block_counts) + 1):
            # The block is not bound to a name: streamed blocks must be freed before the next one is accessed.
            hidden = model.layers[count - 1](hidden, rotary, attended)
            if count in block_counts:
                states[count] = model.norm(hidden) if count == self._blocks else hidden
        return states
