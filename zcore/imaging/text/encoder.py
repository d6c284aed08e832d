"""Token ids to the embedding that conditions the transformer.

Takes the checkpoint's language model and a prompt's ids; gives one hidden state a token. Runs the prompt without
padding and only the blocks below the chosen layer: everything above it, the final norm and the head of a language
model would compute what nobody reads. Does not know the prompt's text.

`hidden_layer` counts as in transformers' tuple of hidden states, which for N blocks has N + 1 entries: the token
embeddings, then each block's output, where the last one has also passed the final norm. -2, which Z-Image was trained
on, is therefore the output of block N - 1, un-normed.
"""

from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from zcore.errors import CheckpointError


class _LanguageModel(Protocol):
    """The part of transformers' `Qwen3Model` (Apache-2.0) that is used."""

    config: Any
    layers: nn.ModuleList
    norm: nn.Module

    def __call__(self, *, input_ids: Tensor, use_cache: Literal[False]) -> Any: ...


class TextEncoder:
    """The lower blocks of the checkpoint's language model. Takes the module over and cuts off what it does not need."""

    def __init__(self, model: nn.Module, device: torch.device, hidden_layer: int) -> None:
        self._model = cast(_LanguageModel, model)
        self._device = device
        blocks = len(self._model.layers)
        if not -blocks <= hidden_layer <= -1:
            raise CheckpointError(f"hidden_layer: {hidden_layer}; this text encoder has the layers -{blocks} to -1")
        kept = blocks + 1 + hidden_layer
        if kept < blocks:
            self._model.layers = self._model.layers[:kept]
            self._model.config.num_hidden_layers = kept
            self._model.norm = nn.Identity()

    def encode(self, token_ids: list[int]) -> Tensor:
        """(L, hidden) in the model's dtype, on its device."""
        input_ids = torch.tensor([token_ids], device=self._device)  # (1, L)
        states: Tensor = self._model(input_ids=input_ids, use_cache=False).last_hidden_state  # (1, L, hidden)
        return states[0]
