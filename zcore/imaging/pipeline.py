"""The public Python API: a prompt in, pictures out.

Takes a `GenerationRequest` and the pictures it starts from; gives images with their timings. `ZImagePipeline._paint` is
the whole way. Does not know jobs, HTTP or files other than the checkpoint's. A pipeline is used by one thread; one
generation leaves nothing behind for the next, whether it ended, was stopped or failed.

    pipe = ZImagePipeline.from_pretrained("/path/to/z-image", templates_dir="templates/z_image")
    pipe("A cat sleeping in sunlight", seed=42).save("output.png")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zcore.errors import CheckpointError, InvalidRequest, OutOfMemory
from zcore.imaging import geometry
from zcore.imaging.input_picture import fitted, mask_fitted
from zcore.imaging.inputs import Inputs
from zcore.imaging.model import loader
from zcore.imaging.model.attention import choose_attention, load_attention
from zcore.imaging.model.checkpoint import PAINTING, check_layers, encoder_family, locate, read_json, revision
from zcore.imaging.model.dype import NOTICE, stretches
from zcore.imaging.model.lora import LoraWeights, ScaledLora, fuse
from zcore.imaging.model.lora_file import read_file
from zcore.imaging.model.quantization import Quantization, is_packed
from zcore.imaging.model.tiling import Tiling
from zcore.imaging.model.transformer import Plan, VelocityModel
from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.profiler import GenerationMetrics, PhaseClock
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.relief import Ladder, OnRelief
from zcore.imaging.sampling.denoise import Kept, Velocity, denoise, draw_noise, noised
from zcore.imaging.sampling.guidance import away_from_skipped, guided, skips_layers
from zcore.imaging.sampling.multipass import PlannedPass, enlarged, plan
from zcore.imaging.text.embedding_cache import CacheUse
from zcore.imaging.text.embedding_file import PromptEmbedding, check_fits
from zcore.imaging.text.templates import TemplateLibrary
from zcore.request import GIVEN, INPUT_FIELDS, GenerationDefaults, GenerationRequest, parse_generation


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a generation is: `step` of `steps` done, over all its pictures and passes; `phase` is what comes next.

    A forward of several pictures at once is a step of each, so the count grows by their number. Where memory ran out
    and pictures are begun again, it falls back to where they began.
    """

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
    made_by: dict[str, str]
    """What `ZImagePipeline.describe` says, the SHA-256 of each LoRA's file, as `lora:NAME`, and `vae_tiles` wherever
    tiles were used, asked for or not.
    """


class ZImagePipeline:
    """A loaded checkpoint. `from_pretrained` makes one."""

    def __init__(self, folder: Path, setup: "_Setup", encoder: PromptEncoder | None) -> None:
        self._setup = setup
        self._encoder = encoder
        self._family = encoder_family(folder)
        self._limits = geometry.PlacementLimits.of_checkpoint(folder)
        network = loader.load_transformer(folder, setup.transformer, setup.files.get("transformer"))
        self._model = VelocityModel(
            network,
            setup.transformer.device,
            setup.transformer.dtype,
            load_attention(setup.attention_backend),
            setup.compile_mode,
            setup.transformer.offload,
        )
        fused = [ScaledLora(self.load_lora(path), scale) for path, scale in setup.fused_loras]
        self._beside = tuple(fused) if is_packed(network) else ()  # nothing can be added to packed weights
        if not self._beside:
            fuse(network, fused)
        self._coder = PictureCoder(
            loader.load_vae(folder, setup.vae, setup.files.get("vae")), setup.vae.device, setup.vae.dtype
        )
        self._description = {
            **_described(setup, revision(folder, PAINTING, setup.files)),
            **{f"lora_fused:{one.weights.name}": f"{one.weights.sha256} at {one.scale}" for one in fused},
            **(encoder.describe() if encoder else {}),
        }

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        *,
        templates_dir: str | Path | Sequence[str | Path] | None = None,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        encoder_dtype: torch.dtype | str | None = None,
        encoder_device: str = "auto",
        encoder_quantization: Quantization = "none",
        encoder_weights: str | Path | None = None,
        dit_device: str = "auto",
        vae_device: str = "auto",
        dit_quantization: Quantization = "none",
        dit_weights: str | Path | None = None,
        vae_weights: str | Path | None = None,
        cpu_offload: bool = False,
        cpu_offload_unit: Literal["network", "block"] = "block",
        batch_size: int = 1,
        hidden_layer: int = -2,
        shift: float | None = None,
        compile: bool = False,  # noqa: A002
        compile_mode: str = "default",
        attention_backend: str = "auto",
        tile_size: int = 512,
        tile_overlap: int = 64,
        embedding_cache_bytes: int = 0,
        fused_loras: Sequence[tuple[str | Path, float]] = (),
    ) -> "ZImagePipeline":
        """Load a folder in the diffusers layout, or a hub id. Raises `CheckpointError` for what is not as it has to be.

        Devices are `auto`, `cpu`, `mps`, `cuda` or `cuda:N`. `torch_dtype` is the transformer's, and the text
        encoder's unless `encoder_dtype` says otherwise; the VAE works in float32 where the checkpoint or a CPU
        demands it. A quantization packs a network's weights into fewer bits; a `..._weights` is a single file to read
        instead of the folder's. With `cpu_offload` weights rest in the CPU's memory and come to their device by
        `cpu_offload_unit`. `batch_size` pictures of a request are painted at once.

        `hidden_layer` and `shift` are for calls that do not say; the latter comes from the checkpoint when
        None. With `compile` the first pictures take a minute longer. `tile_size` and `tile_overlap`, in pixels, are for
        the VAE where it works in tiles. `fused_loras` are files and scales that act on every picture, at no cost, until
        the pipeline is loaded anew. Raises `InvalidLora` too.
        """
        encoder = PromptEncoder.from_pretrained(
            model_path,
            templates=_templates(templates_dir),
            torch_dtype=encoder_dtype or torch_dtype,
            device=encoder_device,
            quantization=encoder_quantization,
            offload=cpu_offload_unit if cpu_offload else "none",
            weights=encoder_weights,
            hidden_layer=hidden_layer,
            embedding_cache_bytes=embedding_cache_bytes,
        )
        return cls.from_pretrained_generator_only(
            model_path,
            torch_dtype=torch_dtype,
            dit_device=dit_device,
            vae_device=vae_device,
            dit_quantization=dit_quantization,
            dit_weights=dit_weights,
            vae_weights=vae_weights,
            cpu_offload=cpu_offload,
            cpu_offload_unit=cpu_offload_unit,
            batch_size=batch_size,
            shift=shift,
            compile=compile,
            compile_mode=compile_mode,
            attention_backend=attention_backend,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            encoder=encoder,
            hidden_layer=hidden_layer,
            fused_loras=fused_loras,
        )

    @classmethod
    def from_pretrained_generator_only(
        cls,
        model_path: str | Path,
        *,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        dit_device: str = "auto",
        vae_device: str = "auto",
        dit_quantization: Quantization = "none",
        dit_weights: str | Path | None = None,
        vae_weights: str | Path | None = None,
        cpu_offload: bool = False,
        cpu_offload_unit: Literal["network", "block"] = "block",
        batch_size: int = 1,
        shift: float | None = None,
        compile: bool = False,  # noqa: A002
        compile_mode: str = "default",
        attention_backend: str = "auto",
        tile_size: int = 512,
        tile_overlap: int = 64,
        encoder: PromptEncoder | None = None,
        hidden_layer: int = -2,
        fused_loras: Sequence[tuple[str | Path, float]] = (),
    ) -> "ZImagePipeline":
        """Load transformer and VAE alone, to paint from embeddings that a `PromptEncoder` made, here or elsewhere.

        The text encoder's weights are neither read nor need to be there. Parameters are those of `from_pretrained`.
        """
        given = {"transformer": dit_weights, "vae": vae_weights}
        files = {name: Path(file) for name, file in given.items() if file is not None}
        folder = locate(str(model_path), [name for name in PAINTING if name not in files])
        dtype = loader.dtype_of(torch_dtype)
        transformer = loader.transformer_placement(
            loader.device_of(dit_device), dtype, dit_quantization, cpu_offload_unit if cpu_offload else "none"
        )
        if compile and transformer.offload == "block":
            raise CheckpointError(
                "compile: the compiled forward is one graph, into which no block can come: offload by `network`, "
                "or do not compile"
            )
        configured = float(read_json(folder / "scheduler" / "scheduler_config.json")["shift"])
        setup = _Setup(
            name=folder.resolve().name if Path(model_path).is_dir() else str(model_path),
            transformer=transformer,
            vae=loader.vae_placement(folder, loader.device_of(vae_device), dtype),
            defaults=GenerationDefaults(shift=configured if shift is None else shift, hidden_layer=hidden_layer),
            attention_backend=choose_attention(attention_backend, transformer),
            compile_mode=compile_mode if compile else None,
            fused_loras=tuple((Path(path), scale) for path, scale in fused_loras),
            tiling=Tiling(tile_size, tile_overlap),
            files=files,
            batch_size=batch_size,
        )
        return cls(folder, setup, encoder)

    def generate(
        self,
        request: GenerationRequest,
        on_step: OnStep | None = None,
        inputs: Inputs | None = None,
        on_relief: OnRelief | None = None,
    ) -> GenerationResult:
        """Paint the request's pictures, `batch_size` at once; each is what it would be alone: bit for bit where that is
        1, else up to rounding.

        `inputs` holds what the request names: it has to have an image and a mask exactly where the request does.
        `on_step` is told before the prompt is encoded, before each forward and before each decoding; an
        `errors.Interruption` that it raises ends the generation there. `on_relief` is told what is given up where
        memory runs out. Raises `InvalidRequest` for an unknown template or a size the checkpoint cannot place,
        `PromptTooLong`, `EmbeddingMismatch`, and `OutOfMemory` where nothing is left to give up.
        """
        generator_of = partial(_generator_of, request)
        return self._generate(request, on_step or _unheard, inputs or Inputs(), generator_of, on_relief or _unheard)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 8,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        loras: Sequence[LoraWeights | tuple[LoraWeights, float]] = (),
        inputs: Inputs | None = None,
        **fields: Any,
    ) -> Any:
        """One picture for a prompt, a list of pictures for a list of prompts, as PIL images.

        `fields` are any others of a `GenerationRequest`, from `template` to `cfg_truncation`. Without seed and
        generator a random seed; a generator is drawn from and so moves on. `loras` are what `load_lora` gave, each
        alone or with its scale. Of `n` pictures only the first is given:
        ask `generate` for all. Raises as `generate` does.
        """
        if not isinstance(prompt, str):
            return [
                self(
                    one,
                    height=height,
                    width=width,
                    num_inference_steps=num_inference_steps,
                    seed=seed,
                    generator=generator,
                    loras=loras,
                    inputs=inputs,
                    **fields,
                )
                for one in prompt
            ]
        if seed is not None and generator is not None:
            raise InvalidRequest.field("seed", "give a seed or a generator, not both")
        scaled = [one if isinstance(one, tuple) else (one, 1.0) for one in loras]
        given = inputs or Inputs()
        inputs = replace(given, loras={**given.loras, **{lora.name: lora for lora, _ in scaled}})
        said: dict[str, Any] = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "steps": num_inference_steps,
            "loras": [{"name": lora.name, "scale": scale} for lora, scale in scaled],
            **fields,
        }
        said |= {name: f"{GIVEN}{name}" for name in INPUT_FIELDS if getattr(inputs, name) is not None}
        if seed is not None:
            said["seed"] = seed
        request = parse_generation(said, self._setup.defaults)
        if generator is None:
            return self.generate(request, inputs=inputs).images[0].image
        return self._generate(request, _unheard, inputs, lambda _index: generator, _unheard).images[0].image

    def img2img(
        self,
        prompt: str,
        *,
        image: Image.Image,
        strength: float = 0.6,
        mask: Image.Image | None = None,
        width: int | None = None,
        height: int | None = None,
        **options: Any,
    ) -> Image.Image:
        """A picture that starts from another of any mode and size; with a mask only its white part is painted anew.

        Without width and height the size is the image's own, rounded down to multiples of 16. `options` are those of
        a call.
        """
        multiple = geometry.SIDE_MULTIPLE_PX
        return self(
            prompt,
            width=width or image.width // multiple * multiple,
            height=height or image.height // multiple * multiple,
            strength=strength,
            inputs=Inputs(image=image, mask=mask),
            **options,
        )

    def generate_multipass(
        self,
        prompt: str,
        *,
        final_width: int,
        final_height: int,
        passes: Sequence[dict[str, Any]] = ({"scale": 0.5}, {"scale": 1.0, "strength": 0.5}),
        **options: Any,
    ) -> Image.Image:
        """A picture in several passes, each refining the enlarged latents of the last; see `zcore.request.Pass`."""
        return self(prompt, width=final_width, height=final_height, passes=list(passes), **options)

    def generate_from_embeddings(self, embeddings: PromptEmbedding, **options: Any) -> Image.Image:
        """A picture of a prompt that was encoded before, here or on another machine. `options` are those of a call."""
        return self(f"embedding {embeddings.prompt_sha256[:16]}", inputs=Inputs(embedding=embeddings), **options)

    def load_lora(
        self, file: Path | str | bytes, name: str | None = None, on_relief: OnRelief | None = None
    ) -> LoraWeights:
        """A LoRA made ready for this checkpoint, to be passed with any number of requests; it stays on the device as
        long as it is kept. `name` is the file's stem where it is not given. `on_relief` is told as by `generate`.
        Raises `InvalidLora` and `OutOfMemory`.
        """
        content, stem = (file, "lora") if isinstance(file, bytes) else (read_file(Path(file)), Path(file).stem)
        ladder = Ladder(f"the LoRA {name or stem}", on_relief or _unheard, encoder=self._encoder)
        return ladder.load(partial(self._model.lora, content, name or stem), self._setup.transformer.device)

    def describe(self, request: GenerationRequest | None = None) -> dict[str, str]:
        """What paints these pictures: engine, checkpoint, arithmetic and versions. Names no path and no host.

        For a request also what has to be said with its pictures: `vae_tiles`, where it asks for them, and
        `dype_notice`, where that had a part in them.
        """
        described = dict(self._description)
        if request is None:
            return described
        if request.tiled_vae:
            described["vae_tiles"] = str(self._setup.tiling)
        if any(one.dype and one.dype.dynamic and stretches(one.dype, one.width, one.height) for one in plan(request)):
            described["dype_notice"] = NOTICE
        return described

    def cache_use(self) -> CacheUse:
        """How the embedding cache has served; nothing where there is no text encoder."""
        return self._encoder.cache_use() if self._encoder else CacheUse(0, 0, 0, 0)

    def _generate(
        self,
        request: GenerationRequest,
        on_step: OnStep,
        inputs: Inputs,
        generator_of: Callable[[int], torch.Generator],
        on_relief: OnRelief,
    ) -> GenerationResult:
        ladder = Ladder(
            f"{request.width}x{request.height}",
            on_relief,
            encoder=self._encoder,
            batch_size=self._setup.batch_size,
            tiling=self._setup.tiling,
            in_tiles=request.tiled_vae,
        )
        way = partial(self._paint, request, on_step, inputs, generator_of, ladder)
        try:
            with torch.inference_mode():
                return ladder.attempt(way, self._setup.transformer.device)
        except OutOfMemory as fault:
            refusal = fault.message
        raise OutOfMemory(refusal)  # a new one, without the frames that hold the tensors of this generation

    def _paint(
        self,
        request: GenerationRequest,
        on_step: OnStep,
        inputs: Inputs,
        generator_of: Callable[[int], torch.Generator],
        ladder: Ladder,
    ) -> GenerationResult:
        """The whole way."""
        geometry.check_sides(request.width, request.height, self._limits)
        check_layers(request, self._model.layer_count)
        passes = plan(request)
        device = self._setup.transformer.device
        adapted = ladder.load(partial(self._model.adapted, [*self._beside, *_scaled(request, inputs)]), device)
        clock = PhaseClock(self._devices)
        walk = _Walk(on_step, request.n, sum(one.forwards for one in passes))
        on_step(Progress("encode", 0, walk.steps))
        with clock.phase("encode"):
            embedding = self._embedding(request, inputs.embedding, ladder)
            start = _fit(request, inputs, passes[0])
            possible = None if start.image is None else self._encoded(start.image, ladder)
        draws = [self._drawn(generator_of(index), passes, possible) for index in range(request.n)]
        with clock.phase("denoise"):
            common = _Common(ladder.load(adapted.brought, device), passes, embedding, start)
        images: list[GeneratedImage] = []
        while waiting := draws[len(images) :]:
            with clock.phase("denoise"):
                batch = ladder.paint(partial(self._latents, common, waiting, walk), len(waiting), device)
            for latents in batch:  # (16, h, w)
                walk.tell("decode")
                with clock.phase("decode"):
                    image = start.pasted(self._decoded(latents, ladder), request.keep_unmasked)
                images.append(GeneratedImage(image, request.seed_of(len(images)), len(images)))
        metrics = clock.metrics(embedding.prompt_tokens, embedding.embeds.shape[0])
        tiles = {"vae_tiles": str(ladder.tiles)} if ladder.tiles else {}
        return GenerationResult(images, metrics, {**self.describe(request), **tiles, **_hashes(request, inputs)})

    def _drawn(self, generator: torch.Generator, passes: Sequence[PlannedPass], possible: Tensor | None) -> "_Drawn":
        start = None if possible is None else self._coder.draw(possible, generator).cpu()
        return _Drawn(start, [draw_noise(generator, self._model.channels, one.size).cpu() for one in passes])

    def _latents(self, common: "_Common", waiting: Sequence["_Drawn"], walk: "_Walk", at_once: int) -> Tensor:
        """The first of the waiting pictures through all passes: (at_once, 16, h, w) of the last one's size."""
        device = self._setup.transformer.device
        walk.go_back(len(waiting))
        drawn = waiting[:at_once]
        starts = [one.start for one in drawn if one.start is not None]
        latents = torch.stack(starts).to(device) if starts else None
        for one, noises in zip(common.passes, zip(*(each.noises for each in drawn), strict=True), strict=True):
            noise = torch.stack(noises).to(device)
            latents = noise if latents is None else enlarged(latents, one.size)
            kept = Kept(latents, noise, common.start.latent_mask(one, device)) if common.start.mask else None
            latents = denoise(
                self._velocity(common.model, common.embedding, one),
                noised(latents, noise, one.levels[0]),
                list(one.levels),
                partial(walk.step, at_once),
                kept,
            )
        assert latents is not None, "there is at least one pass"
        return latents

    @staticmethod
    def _velocity(model: VelocityModel, embedding: PromptEmbedding, one: PlannedPass) -> Velocity:
        """Where latents want to go in this pass, guided where they are to be."""
        levels = list(one.levels)
        positive = model.plan(embedding.embeds, one.size, levels, one.dype)
        negative = None
        if one.guidance.scale > 0:
            assert embedding.negative is not None, "a guided request has its negative prompt encoded"
            negative = model.plan(embedding.negative, one.size, levels, one.dype)

        def velocity(latents: Tensor, step: int) -> Tensor:
            wanted, skipped = _positive(model, positive, latents, step, one)
            towards = wanted
            if negative is not None and one.guidance.is_active(levels[step]):
                pairs = zip(wanted, _velocities(model, negative, latents, step), strict=True)
                towards = torch.stack([guided(*pair, one.guidance) for pair in pairs])
            if one.slg is not None and skipped is not None:
                towards = away_from_skipped(towards, wanted, skipped, one.slg.scale)
            return towards

        return velocity

    def _encoded(self, image: Image.Image, ladder: Ladder) -> Tensor:
        fits = self._coder.fits(*image.size)
        return ladder.code(partial(self._coder.encode, image), image.size, fits, self._setup.vae.device)

    def _decoded(self, latents: Tensor, ladder: Ladder) -> Image.Image:
        _channels, height, width = latents.shape
        size_px = (width * geometry.LATENT_PX, height * geometry.LATENT_PX)
        fits = self._coder.fits(*size_px)
        return ladder.code(partial(self._coder.decode, latents), size_px, fits, self._setup.vae.device)

    def _embedding(self, request: GenerationRequest, given: PromptEmbedding | None, ladder: Ladder) -> PromptEmbedding:
        """On the transformer's device and in its dtype."""
        if given is not None:
            check_fits(
                given,
                hidden_size=self._model.prompt_width,
                caption_tokens_limit=self._limits.caption_tokens,
                encoder_family=self._family,
            )
            if request.is_guided and given.negative is None:
                raise InvalidRequest.field(
                    "guidance_scale", "needs the embedding of a negative prompt; encode it with one"
                )
        elif self._encoder is None:
            raise InvalidRequest.field("embeddings", "are needed: this pipeline was loaded without a text encoder")
        embedding = given or self._encoded_prompt(request, ladder)
        move = partial(torch.Tensor.to, device=self._setup.transformer.device, dtype=self._setup.transformer.dtype)
        negative = None if embedding.negative is None else move(embedding.negative)
        return replace(embedding, embeds=move(embedding.embeds), negative=negative)

    def _encoded_prompt(self, request: GenerationRequest, ladder: Ladder) -> PromptEmbedding:
        encoder = cast(PromptEncoder, self._encoder)
        return ladder.attempt(partial(encoder.encode, request), encoder.device)

    @property
    def _devices(self) -> set[torch.device]:
        encoder = {self._encoder.device} if self._encoder else set[torch.device]()
        return encoder | {self._setup.transformer.device, self._setup.vae.device}


def _positive(
    model: VelocityModel, prompt: Plan, latents: Tensor, step: int, one: PlannedPass
) -> tuple[Tensor, Tensor | None]:
    """What the transformer says for the prompt; and what without the skipped layers, in a step that asks for it."""
    if one.slg is None or not skips_layers(one.slg, step, one.forwards):
        return _velocities(model, prompt, latents, step), None
    count = len(latents)
    whole, without = model.velocities_skipping([prompt] * count, list(latents), [step] * count, one.slg.layers)
    return torch.stack(whole), torch.stack(without)


def _velocities(model: VelocityModel, prompt: Plan, latents: Tensor, step: int) -> Tensor:
    """Of pictures (B, 16, h, w) that share their prompt, in one forward."""
    count = len(latents)
    return torch.stack(model.velocities([prompt] * count, list(latents), [step] * count))


@dataclass(frozen=True, slots=True)
class _Setup:
    """How a checkpoint is run."""

    name: str
    transformer: loader.Placement
    vae: loader.Placement
    defaults: GenerationDefaults
    attention_backend: str
    compile_mode: str | None
    fused_loras: tuple[tuple[Path, float], ...]
    tiling: Tiling
    files: dict[str, Path]
    """The single files in place of components' weights."""
    batch_size: int


@dataclass(slots=True)
class _Walk:
    """The count of steps of one generation, told step by step."""

    on_step: OnStep
    pictures: int
    forwards: int
    """Of each picture."""
    done: int = 0

    @property
    def steps(self) -> int:
        """Of all pictures together."""
        return self.pictures * self.forwards

    def go_back(self, waiting: int) -> None:
        """To where so many pictures have not begun."""
        self.done = (self.pictures - waiting) * self.forwards

    def step(self, pictures: int, _step: int) -> None:
        """Another step of so many pictures begins."""
        self.tell("denoise")
        self.done += pictures

    def tell(self, phase: Literal["denoise", "decode"]) -> None:
        """What comes next."""
        self.on_step(Progress(phase, self.done, self.steps))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What chance gives one picture: where it starts if from another, (16, h, w), and each pass's noise; on the CPU.

    Drawn before anything is painted, so that a picture which is begun again begins with the same.
    """

    start: Tensor | None
    noises: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class _Common:
    """What all pictures of a generation are painted with."""

    model: VelocityModel
    passes: Sequence[PlannedPass]
    embedding: PromptEmbedding
    start: "_Start"


@dataclass(frozen=True, slots=True)
class _Start:
    """What the first pass starts from, at its size: RGB picture and 8-bit mask, or neither."""

    image: Image.Image | None = None
    mask: Image.Image | None = None

    def latent_mask(self, one: PlannedPass, device: torch.device) -> Tensor:
        """(1, h, w) of 0 and 1: a latent is painted anew where any pixel of it is.

        diffusers looks at one pixel of each latent, and so overlooks thin lines.
        """
        assert self.mask is not None, "asked for only with a mask"
        painted = torch.tensor(np.asarray(self.mask))[None] >= 128  # (1, H, W)
        size = (one.size.height, one.size.width)
        return torch.nn.functional.adaptive_max_pool2d(painted.float(), size).to(device)

    def pasted(self, painted: Image.Image, keep_unmasked: bool) -> Image.Image:
        """The painted picture, with the input's own pixels outside the mask where they shall be kept."""
        if self.image is None or self.mask is None or not keep_unmasked:
            return painted
        return Image.composite(painted, self.image, self.mask)


def _fit(request: GenerationRequest, inputs: Inputs, first: PlannedPass) -> _Start:
    """The request's inputs at the first pass's size. Raises `InvalidRequest` where they are not what it names."""
    for name in INPUT_FIELDS:
        if (getattr(request, name) is None) != (getattr(inputs, name) is None):
            raise InvalidRequest.field(name, "has to be passed as a picture exactly where the request names one")
    return _Start(
        image=None if inputs.image is None else fitted(inputs.image, first.width, first.height, request.fit),
        mask=None if inputs.mask is None else mask_fitted(inputs.mask, first.width, first.height, request.fit),
    )


def _scaled(request: GenerationRequest, inputs: Inputs) -> list[ScaledLora]:
    """The request's LoRAs. Raises `InvalidRequest` for one that is not among the inputs."""
    missing = [use.name for use in request.loras if use.name not in inputs.loras]
    if missing:
        raise InvalidRequest.field("loras", f"there is no LoRA {', '.join(missing)} here")
    return [ScaledLora(inputs.loras[use.name], use.scale) for use in request.loras]


def _hashes(request: GenerationRequest, inputs: Inputs) -> dict[str, str]:
    return {f"lora:{use.name}": inputs.loras[use.name].sha256 for use in request.loras}


def _templates(folders: str | Path | Sequence[str | Path] | None) -> TemplateLibrary:
    if folders is None:
        return TemplateLibrary.empty()
    several = [folders] if isinstance(folders, str | Path) else folders
    return TemplateLibrary.load(*map(Path, several))


def _unheard(_told: object) -> None:
    pass


def _generator_of(request: GenerationRequest, index: int) -> torch.Generator:
    """On the CPU, whatever the device, so that a seed means the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(request.seed_of(index))


def _described(setup: _Setup, model_revision: str) -> dict[str, str]:
    return {
        "engine": _version("zimage"),
        "model": setup.name,
        "model_revision": model_revision,
        "device": _hardware(setup.transformer.device),
        "transformer_dtype": loader.spelled(setup.transformer.dtype),
        "transformer_quantization": setup.transformer.quantization,
        "vae_dtype": loader.spelled(setup.vae.dtype),
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


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
