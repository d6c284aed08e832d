"""A prompt in, its embedding out: the half of the way that needs no GPU.

Takes a request (or a bare prompt); gives a `PromptEmbedding`, which paints here or, as a file, on another machine.
Loads the tokenizer and the text encoder and nothing else of a checkpoint. Does not know latents or pictures. Belongs to
one thread.

    encoder = PromptEncoder.from_pretrained("/path/to/z-image", device="cpu")
    encoder.encode("A cat sleeping in sunlight").save("cat.safetensors")
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zcore.errors import CheckpointError, InvalidRequest
from zcore.imaging.geometry import PlacementLimits
from zcore.imaging.model import loader
from zcore.imaging.model.checkpoint import ENCODING, encoder_family, locate, revision
from zcore.imaging.model.quantization import Quantization
from zcore.imaging.text import long_prompt
from zcore.imaging.text.embedding_cache import CacheUse, EmbeddingCache, key_of
from zcore.imaging.text.embedding_file import PromptEmbedding
from zcore.imaging.text.encoder import LayerBlend, TextEncoder
from zcore.imaging.text.formatter import FormattedPrompt, format_negative, format_request
from zcore.imaging.text.templates import TemplateLibrary
from zcore.imaging.text.token_count import TokenCounter
from zcore.request import GenerationRequest, LongPromptMode, parse_generation


class PromptEncoder:
    """A loaded text encoder. `from_pretrained` makes one."""

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        placement: loader.Placement,
        templates: TemplateLibrary,
        cache_bytes: int,
        file: Path | None = None,
    ) -> None:
        self._templates = templates
        self._placement = placement
        self._tokens = TokenCounter.load(folder)
        self._limit = PlacementLimits.of_checkpoint(folder).caption_tokens
        self._family = encoder_family(folder)
        self._revision = revision(folder, ENCODING, {"text_encoder": file} if file else {})
        self._model = TextEncoder(model, placement.device, placement.offload)
        self._cache = EmbeddingCache(cache_bytes)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        *,
        templates: TemplateLibrary | None = None,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        device: str = "auto",
        quantization: Quantization = "none",
        offload: loader.Offload = "none",
        weights: str | Path | None = None,
        hidden_layer: int = -2,
        embedding_cache_bytes: int = 0,
    ) -> "PromptEncoder":
        """Load a folder in the diffusers layout, or a hub id. Raises `CheckpointError` for what is not as it has to be.

        `quantization` is the weights' number of bits; with `offload` they rest in the CPU's memory. `weights` is a
        single file to read instead of the folder's. `hidden_layer` is the one that requests will mostly ask for: a
        checkpoint without it is refused here.
        """
        file = None if weights is None else Path(weights)
        folder = locate(str(model_path), [name for name in ENCODING if not (file and name == "text_encoder")])
        placement = loader.text_encoder_placement(
            loader.device_of(device), loader.dtype_of(torch_dtype), quantization, offload
        )
        model = loader.load_text_encoder(folder, placement, file)
        encoder = cls(folder, model, placement, templates or TemplateLibrary.empty(), embedding_cache_bytes, file)
        try:
            encoder._model.depth(hidden_layer)
        except InvalidRequest as fault:
            raise CheckpointError(fault.message) from fault
        return encoder

    @property
    def device(self) -> torch.device:
        """Where the text encoder runs."""
        return self._placement.device

    def encode(self, request: GenerationRequest | str) -> PromptEmbedding:
        """The embedding of a request's prompt and, where guidance wants it, of its negative prompt.

        Raises `InvalidRequest` for an unknown template or layer, `PromptTooLong` as `long_prompt_mode` decides.
        """
        request = _as_request(request)
        prompt = format_request(request, self._templates)
        with self._at_work():
            return self._embedding(
                request, prompt, self._embed(prompt, LayerBlend.of(request), request.long_prompt_mode)
            )

    def encode_batch(self, requests: Sequence[GenerationRequest | str]) -> list[PromptEmbedding]:
        """As `encode` for each, up to rounding; one pass through the text encoder for those that share their layers."""
        asked = [_as_request(request) for request in requests]
        groups: dict[LayerBlend, list[int]] = {}
        for index, request in enumerate(asked):
            groups.setdefault(LayerBlend.of(request), []).append(index)
        embeddings: dict[int, PromptEmbedding] = {}
        with self._at_work():
            for blend, members in groups.items():
                prompts = [format_request(asked[index], self._templates) for index in members]
                tokens = [
                    self._tokens.tokens(p, asked[i].long_prompt_mode) for p, i in zip(prompts, members, strict=True)
                ]
                states = self._model.encode_batch([one.ids for one in tokens], blend)
                for index, prompt, one, embeds in zip(members, prompts, tokens, states, strict=True):
                    fitted = self._fitted(embeds, one.tail, asked[index].long_prompt_mode)
                    embeddings[index] = self._embedding(asked[index], prompt, fitted)
        return [embeddings[index] for index in range(len(asked))]

    def rest(self) -> bool:
        """The text encoder leaves its device now, and comes back by itself when it encodes next.

        Whether that made memory of the device free: not on a CPU, and not if it rests already. It stays in the CPU's
        memory.
        """
        return self._model.rest()

    def describe(self) -> dict[str, str]:
        """What makes these embeddings. Names no path and no host."""
        return {
            "encoder_revision": self._revision,
            "encoder_dtype": loader.spelled(self._placement.dtype),
            "encoder_quantization": self._placement.quantization,
            "encoder_device": self._placement.device.type,
        }

    def cache_use(self) -> CacheUse:
        """How the embedding cache has served."""
        return self._cache.use()

    @contextmanager
    def _at_work(self) -> Generator[None]:
        """Where weights rest in the CPU's memory, they leave the device at the end, whatever ends it."""
        try:
            with torch.inference_mode():
                yield
        finally:
            if self._placement.offload != "none":
                self._model.rest()

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
        """(L, hidden), L at most what the transformer can place; computed or remembered. `field` is the request's."""
        tokens = self._tokens.tokens(prompt, mode, field)
        key = self._key(tokens.ids, blend, mode)
        embeds = self._cache.get(key)
        if embeds is None:
            embeds = self._fitted(self._model.encode(tokens.ids, blend), tokens.tail, mode)
            self._cache.put(key, embeds)
        return embeds

    def _fitted(self, embeds: Tensor, tail: int, mode: LongPromptMode) -> Tensor:
        if mode in ("truncate", "refuse"):
            return embeds
        return long_prompt.compress(embeds, tail, self._limit, mode)

    def _key(self, ids: Sequence[int], blend: LayerBlend, mode: LongPromptMode) -> str:
        return key_of(ids, self._revision, str(blend), str(self._placement), mode)


def _as_request(request: GenerationRequest | str) -> GenerationRequest:
    return parse_generation({"prompt": request}) if isinstance(request, str) else request
