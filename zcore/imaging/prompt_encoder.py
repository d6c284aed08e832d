"""A prompt in, its embedding out: the half of a generation that needs no GPU.

    encoder = PromptEncoder.from_pretrained("/path/to/z-image", device="cpu")
    encoder.encode("A cat sleeping in sunlight").save("cat.safetensors")

Takes a request, or a bare prompt; returns a `PromptEmbedding`, from which images are generated here or, through a file,
on another machine. Loads only the tokenizer and the text encoder of a checkpoint. Must be used by one thread only.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zcore.checkpoint.files import PROMPT_COMPONENTS, encoder_family, locate, revision
from zcore.checkpoint.geometry import PlacementLimits
from zcore.errors import CheckpointError, InvalidRequest
from zcore.imaging.finite_values import require_finite
from zcore.imaging.option_checks import refuse_invalid_model_path
from zcore.imaging.options import EncoderOptions
from zcore.imaging.text import long_prompt
from zcore.imaging.text.embedding_cache import CacheStatistics, EmbeddingCache, key_of
from zcore.imaging.text.embedding_file import PromptEmbedding
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights import loader
from zcore.prompt.formatter import FormattedPrompt, format_negative, format_request
from zcore.prompt.templates import TemplateLibrary
from zcore.prompt.token_count import TokenCounter
from zcore.request import GenerationRequest, LongPromptMode, parse_generation


class PromptEncoder:
    """A loaded text encoder. `from_pretrained` creates one."""

    def __init__(self, folder: Path, model: torch.nn.Module, options: EncoderOptions) -> None:
        """Take over a text encoder that was loaded from the checkpoint in `folder` with these options."""
        self._templates = TemplateLibrary.load(*options.templates_dir)
        self.placement = options.placement()
        """Where and in what the text encoder computes."""
        self._tokens = TokenCounter.load(folder)
        self._limit = PlacementLimits.of_checkpoint(folder).caption_tokens
        self._family = encoder_family(folder)
        self._revision = revision(folder, PROMPT_COMPONENTS, _weight_files(options))
        self._model = TextEncoder(model, self.placement.device, self.placement.offload)
        self._cache = EmbeddingCache(options.embedding_cache_bytes)

    @classmethod
    def from_pretrained(cls, model_path: str | Path, **options: Any) -> "PromptEncoder":
        """Load a folder in the diffusers layout, or a hub id.

        `options` are the fields of `zcore.imaging.options.EncoderOptions`: `device`, `torch_dtype`, `quantization`,
        `offload`, `weights`, `hidden_layer`, `templates_dir`, `embedding_cache_bytes`.
        Raises `ConfigurationError` listing every option that is out of bounds, before anything is loaded;
        `CheckpointError` for a checkpoint that cannot be loaded this way; TypeError for an unknown option.
        """
        return cls.load(model_path, EncoderOptions.of(options))

    @classmethod
    def load(cls, model_path: str | Path, options: EncoderOptions) -> "PromptEncoder":
        """Load a checkpoint as `from_pretrained` does, with options that are already an `EncoderOptions`."""
        refuse_invalid_model_path(model_path)
        files = _weight_files(options)
        folder = locate(str(model_path), [name for name in PROMPT_COMPONENTS if name not in files])
        model = loader.load_text_encoder(folder, options.placement(), options.weights)
        encoder = cls(folder, model, options)
        try:
            encoder._model.block_count(options.hidden_layer)
        except InvalidRequest as error:
            raise CheckpointError(error.message) from error
        return encoder

    @property
    def device(self) -> torch.device:
        """Where the text encoder runs."""
        return self.placement.device

    def encode(self, request: GenerationRequest | str) -> PromptEmbedding:
        """Return the embedding of a request's prompt and, if guidance needs it, of its negative prompt.

        Raises `InvalidRequest` for an unknown template or layer, `PromptTooLong` depending on `long_prompt_mode`, and
        `NonFiniteValues`.
        """
        request = _as_request(request)
        prompt = format_request(request, self._templates)
        with self._loaded():
            return self._embedding(
                request, prompt, self._embed(prompt, LayerBlend.of(request), request.long_prompt_mode)
            )

    def encode_batch(self, requests: Sequence[GenerationRequest | str]) -> list[PromptEmbedding]:
        """Encode several prompts, in one pass for those that read the same layers; equals `encode` up to rounding."""
        asked = [_as_request(request) for request in requests]
        groups: dict[LayerBlend, list[int]] = {}
        for index, request in enumerate(asked):
            groups.setdefault(LayerBlend.of(request), []).append(index)
        embeddings: dict[int, PromptEmbedding] = {}
        with self._loaded():
            for blend, members in groups.items():
                prompts = [format_request(asked[index], self._templates) for index in members]
                tokens = [
                    self._tokens.tokens(p, asked[i].long_prompt_mode) for p, i in zip(prompts, members, strict=True)
                ]
                states = self._model.encode_batch([one.ids for one in tokens], blend)
                for index, prompt, one, embeds in zip(members, prompts, tokens, states, strict=True):
                    compressed = self._compressed(embeds, one.tail, asked[index].long_prompt_mode)
                    embeddings[index] = self._embedding(asked[index], prompt, compressed)
        return [embeddings[index] for index in range(len(asked))]

    def unload(self) -> bool:
        """Move the text encoder to the CPU's memory until it encodes next.

        Returns whether that freed device memory: false on a CPU, and if it was already unloaded.
        """
        return self._model.unload()

    def describe(self) -> dict[str, str]:
        """Describe what computes these embeddings. Reveals no path or host."""
        return {
            "encoder_revision": self._revision,
            "encoder_dtype": loader.dtype_name(self.placement.dtype),
            "encoder_quantization": self.placement.quantization,
            "encoder_device": self.placement.device.type,
        }

    def cache_statistics(self) -> CacheStatistics:
        """Return the embedding cache's hits, misses and content."""
        return self._cache.statistics()

    @contextmanager
    def _loaded(self) -> Generator[None]:
        """Unload an offloaded text encoder at the end of the block, even if the block raises."""
        try:
            with torch.inference_mode():
                yield
        finally:
            if self.placement.offload != "none":
                self._model.unload()

    def _embedding(self, request: GenerationRequest, prompt: FormattedPrompt, embeds: Tensor) -> PromptEmbedding:
        negative = None
        if request.is_guided:
            negative = self._embed(
                format_negative(request), LayerBlend.of(request), request.long_prompt_mode, "negative_prompt"
            )
        return PromptEmbedding(
            embeds=embeds,
            negative=negative,
            prompt_tokens=self._tokens.count(prompt),
            layers=str(LayerBlend.of(request)),
            encoder_family=self._family,
            encoder_revision=self._revision,
            long_prompt_mode=request.long_prompt_mode,
            prompt_sha256=hashlib.sha256(str(prompt).encode()).hexdigest(),
        )

    def _embed(self, prompt: FormattedPrompt, blend: LayerBlend, mode: LongPromptMode, field: str = "prompt") -> Tensor:
        """Return (L, hidden), computed or cached; L is at most the number of tokens that the transformer supports."""
        tokens = self._tokens.tokens(prompt, mode, field)
        key = self._key(tokens.ids, blend, mode)
        embeds = self._cache.get(key)
        if embeds is None:
            embeds = self._compressed(self._model.encode(tokens.ids, blend), tokens.tail, mode)
            self._cache.put(key, embeds)
        return embeds

    def _compressed(self, embeds: Tensor, tail: int, mode: LongPromptMode) -> Tensor:
        require_finite(embeds, "the values of the prompt's embedding")
        if mode in ("truncate", "refuse"):
            return embeds
        return long_prompt.compress(embeds, tail, self._limit, mode)

    def _key(self, ids: Sequence[int], blend: LayerBlend, mode: LongPromptMode) -> str:
        return key_of(ids, self._revision, str(blend), str(self.placement), mode)


def _weight_files(options: EncoderOptions) -> dict[str, Path]:
    return {} if options.weights is None else {"text_encoder": options.weights}


def _as_request(request: GenerationRequest | str) -> GenerationRequest:
    return request if isinstance(request, GenerationRequest) else parse_generation({"prompt": request})
