"""The public Python API: a prompt in, pictures out.

Takes a `GenerationRequest`; gives images with their timings. `ZImagePipeline.generate` is the whole way on one
screen. Does not know jobs, HTTP or files other than the checkpoint's. A pipeline is used by one thread; one
generation leaves nothing behind for the next, whether it ended, was stopped or failed.

    pipe = ZImagePipeline.from_pretrained("/path/to/z-image", templates_dir="templates/z_image")
    pipe("A cat sleeping in sunlight", seed=42).save("output.png")
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from zcore.errors import InvalidRequest, OutOfMemory
from zcore.imaging import geometry
from zcore.imaging.model import loader
from zcore.imaging.model.attention import choose_attention, load_attention
from zcore.imaging.model.checkpoint import locate, read_json
from zcore.imaging.model.transformer import VelocityModel
from zcore.imaging.model.vae import PictureDecoder
from zcore.imaging.profiler import GenerationMetrics, PhaseClock
from zcore.imaging.sampling.denoise import denoise, start_latents
from zcore.imaging.sampling.schedule import sigmas
from zcore.imaging.text.embedding_cache import CacheUse, EmbeddingCache, key_of
from zcore.imaging.text.encoder import TextEncoder
from zcore.imaging.text.formatter import FormattedPrompt, format_request
from zcore.imaging.text.templates import TemplateLibrary
from zcore.imaging.text.token_count import TokenCounter
from zcore.request import GenerationRequest, parse_generation


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a generation is: `step` of `steps` forwards done, over all its pictures; `phase` is what comes next."""

    phase: Literal["encode", "denoise", "decode"]
    step: int
    steps: int


OnStep = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """Picture `index` of a request, painted from `seed`."""

    image: Image.Image
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """All pictures of a request."""

    images: list[GeneratedImage]
    metrics: GenerationMetrics


class ZImagePipeline:
    """A loaded checkpoint. `from_pretrained` makes one."""

    def __init__(self, networks: loader.Networks, setup: "_Setup", templates: TemplateLibrary) -> None:
        self._setup = setup
        self._templates = templates
        self._revision = networks.revision
        self._tokens = TokenCounter.load(networks.folder)
        self._limits = geometry.PlacementLimits.of_checkpoint(networks.folder)
        self._shift = setup.shift or float(read_json(networks.folder / "scheduler" / "scheduler_config.json")["shift"])
        self._encoder = TextEncoder(networks.text_encoder, setup.encoder.device, setup.hidden_layer)
        self._cache = EmbeddingCache(setup.embedding_cache_bytes)
        self._model = VelocityModel(
            networks.transformer,
            setup.transformer.device,
            setup.transformer.dtype,
            load_attention(setup.attention_backend),
            setup.compile_mode,
        )
        self._decoder = PictureDecoder(networks.vae, setup.vae.device, setup.vae.dtype)
        self._description = _described(setup, networks.revision)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        *,
        templates_dir: str | Path | None = None,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        encoder_dtype: torch.dtype | str | None = None,
        encoder_device: str = "auto",
        dit_device: str = "auto",
        vae_device: str = "auto",
        hidden_layer: int = -2,
        shift: float | None = None,
        compile: bool = False,  # noqa: A002
        compile_mode: str = "default",
        attention_backend: str = "auto",
        embedding_cache_bytes: int = 0,
    ) -> "ZImagePipeline":
        """Load a folder in the diffusers layout, or a hub id. Raises `CheckpointError` for what is not as it has to be.

        Devices are `auto`, `cpu`, `mps`, `cuda` or `cuda:N`. `torch_dtype` is the transformer's, and the text
        encoder's unless `encoder_dtype` says otherwise; the VAE decodes in float32 where the checkpoint or a CPU
        demands it. `shift` is for `__call__` and comes from the checkpoint when None. With `compile` the first
        pictures take a minute longer.
        """
        folder = locate(str(model_path))
        dtype = loader.dtype_of(torch_dtype)
        transformer = loader.transformer_placement(loader.device_of(dit_device), dtype)
        setup = _Setup(
            name=folder.resolve().name if Path(model_path).is_dir() else str(model_path),
            encoder=loader.Placement(loader.device_of(encoder_device), loader.dtype_of(encoder_dtype or dtype)),
            transformer=transformer,
            vae=loader.vae_placement(folder, loader.device_of(vae_device), dtype),
            hidden_layer=hidden_layer,
            shift=shift,
            attention_backend=choose_attention(attention_backend, transformer),
            compile_mode=compile_mode if compile else None,
            embedding_cache_bytes=embedding_cache_bytes,
        )
        templates = TemplateLibrary.load(Path(templates_dir)) if templates_dir is not None else TemplateLibrary.empty()
        networks = loader.load(folder, encoder=setup.encoder, transformer=setup.transformer, vae=setup.vae)
        return cls(networks, setup, templates)

    def generate(self, request: GenerationRequest, on_step: OnStep | None = None) -> GenerationResult:
        """Paint the request's pictures one after the other; each is what it would be alone.

        `on_step` is told before the prompt is encoded, before each forward and before each decoding; an
        `errors.Interruption` that it raises ends the generation there. Raises `InvalidRequest` for an unknown
        template or a size the checkpoint cannot place, `PromptTooLong`, and `OutOfMemory`.
        """
        return self._generate(request, on_step or _unheard, lambda index: _generator(request.seed_of(index)))

    def __call__(
        self,
        prompt: str,
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 8,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        template: str | None = None,
        shift: float | None = None,
    ) -> Image.Image:
        """One picture. Without seed and generator a random one; a generator is drawn from and so moves on."""
        if seed is not None and generator is not None:
            raise InvalidRequest.field("seed", "give a seed or a generator, not both")
        fields = {
            "prompt": prompt,
            "template": template,
            "height": height,
            "width": width,
            "steps": num_inference_steps,
            "shift": self._shift if shift is None else shift,
        }
        request = parse_generation(fields if seed is None else {**fields, "seed": seed})
        if generator is None:
            return self.generate(request).images[0].image
        return self._generate(request, _unheard, lambda _index: generator).images[0].image

    def describe(self) -> dict[str, str]:
        """What paints these pictures: engine, checkpoint, arithmetic and versions. Names no path and no host."""
        return dict(self._description)

    def cache_use(self) -> CacheUse:
        """How the embedding cache has served."""
        return self._cache.use()

    def _generate(
        self, request: GenerationRequest, on_step: OnStep, generator_of: Callable[[int], torch.Generator]
    ) -> GenerationResult:
        try:
            with torch.inference_mode():
                return self._paint(request, on_step, generator_of)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        # Only here are the failed frames gone, and the tensors with them.
        torch.cuda.empty_cache()
        where = self._setup.transformer.device
        raise OutOfMemory(f"{request.width}x{request.height} does not fit the memory of {where}: {reason}")

    def _paint(
        self, request: GenerationRequest, on_step: OnStep, generator_of: Callable[[int], torch.Generator]
    ) -> GenerationResult:
        """The whole way."""
        geometry.check_sides(request.width, request.height, self._limits)
        clock = PhaseClock(self._setup.devices)
        forwards = request.steps * request.n
        on_step(Progress("encode", 0, forwards))
        with clock.phase("encode"):
            prompt_embeds = self._embed(format_request(request, self._templates))  # (L, hidden)
        size = geometry.latent_size(request.width, request.height)
        levels = sigmas(request.steps, request.shift)
        with clock.phase("denoise"):
            plan = self._model.plan(prompt_embeds, size, levels)
        images: list[GeneratedImage] = []
        for index in range(request.n):
            done = index * request.steps
            with clock.phase("denoise"):
                noise = start_latents(generator_of(index), self._model.channels, size)  # (16, h, w)
                latents = denoise(
                    partial(self._model.velocity, plan),
                    noise.to(self._setup.transformer.device),
                    levels,
                    partial(_tell, on_step, done, forwards),
                )
            on_step(Progress("decode", done + request.steps, forwards))
            with clock.phase("decode"):
                image = self._decoder.decode(latents)
            images.append(GeneratedImage(image, request.seed_of(index), index))
        return GenerationResult(images, clock.metrics())

    def _embed(self, prompt: FormattedPrompt) -> Tensor:
        """(L, hidden) on the transformer's device and in its dtype, computed or remembered."""
        setup = self._setup
        ids = self._tokens.token_ids(prompt)
        key = key_of(ids, self._revision, str(setup.hidden_layer), str(setup.encoder))
        embedding = self._cache.get(key)
        if embedding is None:
            embedding = self._encoder.encode(ids)
            self._cache.put(key, embedding)
        return embedding.to(setup.transformer.device, setup.transformer.dtype)


@dataclass(frozen=True, slots=True)
class _Setup:
    """How a checkpoint is run."""

    name: str
    encoder: loader.Placement
    transformer: loader.Placement
    vae: loader.Placement
    hidden_layer: int
    shift: float | None
    attention_backend: str
    compile_mode: str | None
    embedding_cache_bytes: int

    @property
    def devices(self) -> set[torch.device]:
        return {self.encoder.device, self.transformer.device, self.vae.device}


def _tell(on_step: OnStep, before: int, forwards: int, done: int) -> None:
    on_step(Progress("denoise", before + done, forwards))


def _unheard(_progress: Progress) -> None:
    pass


def _generator(seed: int) -> torch.Generator:
    """On the CPU, whatever the device, so that a seed means the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def _described(setup: _Setup, revision: str) -> dict[str, str]:
    return {
        "engine": _version("zimage"),
        "model": setup.name,
        "model_revision": revision,
        "device": _hardware(setup.transformer.device),
        "transformer_dtype": _spelled(setup.transformer.dtype),
        "encoder_dtype": _spelled(setup.encoder.dtype),
        "vae_dtype": _spelled(setup.vae.dtype),
        "hidden_layer": str(setup.hidden_layer),
        "attention_backend": setup.attention_backend,
        "compiled": setup.compile_mode or "no",
        "torch": str(torch.__version__),
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
    }


def _hardware(device: torch.device) -> str:
    """What computes. The number of threads is part of it: sums over other partitions differ in their last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
