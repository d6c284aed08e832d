"""A loaded model, and one generation from request to images: `Engine._generate`, top to bottom.

Takes a `GenerationRequest` and its inputs; returns images with their timings. Does not depend on jobs, HTTP, or files
other than the checkpoint's. An engine must be used by one thread only. A generation leaves no state behind,
whether it completes, is stopped or fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zcore.checkpoint import geometry
from zcore.checkpoint.files import IMAGE_COMPONENTS, encoder_family, locate, revision
from zcore.checkpoint.layer_counts import check_layers
from zcore.checkpoint.scheduler import default_shift
from zcore.checkpoint.trained_size import size_notice, trained_side
from zcore.errors import InvalidRequest, OutOfMemory
from zcore.image_files.input_images import fit_image, fit_mask
from zcore.imaging.call_arguments import latents_of
from zcore.imaging.finite_values import require_finite
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.kernels.attention import choose_attention, load_attention
from zcore.imaging.lora.adapters import LoraWeights, ScaledLora, fuse
from zcore.imaging.lora.lora_file import read_file
from zcore.imaging.network.dype import NOTICE, stretches
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.oom_fallback import OnFallback, OomFallback
from zcore.imaging.options import LoadOptions
from zcore.imaging.precision_fallback import PrecisionFallback
from zcore.imaging.progress import OnStep, Progress, ProgressCounter
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.result import GeneratedImage, GenerationResult, PhaseTimer
from zcore.imaging.sampler import Conditioning, InitialLatents, Sampler, StartImage
from zcore.imaging.sampling.euler import draw_initial_noise
from zcore.imaging.sampling.multipass import PlannedPass, enlarged, plan
from zcore.imaging.text.embedding_cache import CacheStatistics
from zcore.imaging.text.embedding_file import PromptEmbedding, check_fits
from zcore.imaging.weights import loader
from zcore.imaging.weights.quantization import is_packed
from zcore.request import INPUT_FIELDS, GenerationRequest

GeneratorOf = Callable[[int], torch.Generator]
"""The source of randomness for image `index` of a request."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a generation reports while it runs, and what it asks.

    An `errors.Interruption` raised by `on_step` ends it there. `on_step_end` is called after each step and may replace
    the latents. Once `is_interrupted` returns true, images that have begun are decoded as they are, and no more are
    begun.
    """

    on_step: OnStep = lambda _progress: None
    on_fallback: OnFallback = lambda _step: None
    on_step_end: Callable[[Sampler], None] = lambda _sampler: None
    is_interrupted: Callable[[], bool] = lambda: False


class Engine:
    """Transformer and VAE of a checkpoint on their devices, with or without its text encoder."""

    def __init__(self, model_path: str | Path, options: LoadOptions, encoder: PromptEncoder | None) -> None:
        """Load transformer and VAE. Raises `CheckpointError`, and `InvalidLora` for a file in `fused_loras`."""
        files = options.weight_files
        folder = locate(str(model_path), [name for name in IMAGE_COMPONENTS if name not in files])
        self._folder = folder
        self._placement = options.transformer_placement()
        self._vae_placement = options.vae_placement(folder)
        backend = choose_attention(options.attention_backend, self._placement)
        compile_mode = options.compile_mode_for(self._placement)
        self.defaults = options.generation_defaults(default_shift(folder))
        """Values of the fields that a call omits."""
        self.model_path = model_path
        self.options = options
        self._encoder = encoder
        self.encoder_family = encoder_family(folder)
        """Identifies the text encoder whose embeddings condition this model."""
        self._trained_px = trained_side(folder)
        self._limits = geometry.PlacementLimits.of_checkpoint(folder)
        network = loader.load_transformer(folder, self._placement, files.get("transformer"))
        self._model = VelocityModel(
            network,
            self._placement.device,
            self._placement.dtype,
            load_attention(backend),
            compile_mode,
            self._placement.offload,
        )
        fused = [ScaledLora(self.load_lora(path), scale) for path, scale in options.fused_loras]
        # In one order for all names and places of the files: sums in another order differ in their last bits.
        fused.sort(key=lambda one: (one.weights.sha256, one.scale))
        # Packed weights cannot be modified, so LoRAs on them are applied in every forward.
        self._unfused = tuple(fused) if is_packed(network) else ()
        if not self._unfused:
            fuse(network, fused)
        self._vae = VaeCodec(
            loader.load_vae(folder, self._vae_placement, files.get("vae")),
            self._vae_placement.device,
            self._vae_placement.dtype,
        )
        self._description = {
            "engine": _version("zimage"),
            "model": folder.resolve().name if Path(model_path).is_dir() else str(model_path),
            "model_revision": revision(folder, IMAGE_COMPONENTS, files),
            "device": _hardware(self._placement.device),
            "transformer_dtype": loader.dtype_name(self._placement.dtype),
            "transformer_quantization": self._placement.quantization,
            "vae_dtype": loader.dtype_name(self._vae_placement.dtype),
            "attention_backend": backend,
            "compiled": compile_mode or "no",
            "torch": str(torch.__version__),
            "diffusers": _version("diffusers"),
            "transformers": _version("transformers"),
            **_fused_record(fused),
            **_notices([one.weights for one in fused]),
            **(encoder.describe() if encoder else {}),
        }

    @property
    def has_encoder(self) -> bool:
        """Whether prompts can be encoded."""
        return self._encoder is not None

    def runs_as(self, options: LoadOptions) -> bool:
        """Return whether these options would load the networks exactly as they are loaded."""
        return (
            options.transformer_placement() == self._placement
            and options.vae_placement(self._folder) == self._vae_placement
            and (self._encoder is None or options.encoder.placement() == self._encoder.placement)
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """In what the transformer computes."""
        return self._placement.dtype

    @property
    def channels(self) -> int:
        """Channels of the latents: 16."""
        return self._model.channels

    def generate(
        self,
        request: GenerationRequest,
        inputs: Inputs,
        generator_of: GeneratorOf,
        callbacks: Callbacks,
        *,
        decodes: bool = True,
    ) -> GenerationResult:
        """Generate the request's images, or with `decodes` false their latents only. See `ZImagePipeline.generate`."""
        fallback = OomFallback(
            f"{request.width}x{request.height}",
            callbacks.on_fallback,
            encoder=self._encoder,
            batch_size=self.options.batch_size,
            tiling=self.options.tiling,
            start_tiled=request.tiled_vae,
        )
        work = partial(self._generate, request, inputs, generator_of, callbacks, fallback, decodes)
        try:
            with torch.inference_mode():
                return fallback.run(work, self._placement.device)
        except OutOfMemory as error:
            message = error.message
        raise OutOfMemory(message)  # a new one, without the frames that hold this generation's tensors

    def _generate(
        self,
        request: GenerationRequest,
        inputs: Inputs,
        generator_of: GeneratorOf,
        callbacks: Callbacks,
        fallback: OomFallback,
        decodes: bool,
    ) -> GenerationResult:
        geometry.check_sides(request.width, request.height, self._limits)
        check_layers(request, self._model.layer_count)
        passes = plan(request)
        shape = (request.n, self.channels, passes[0].size.height, passes[0].size.width)
        given_noise = latents_of(inputs.latents, shape, has_image=request.image is not None)
        device = self._placement.device
        adapted = fallback.load(partial(self._model.adapted, [*self._unfused, *_scaled(request, inputs)]), device)
        timer = PhaseTimer(self._devices)
        vae = PrecisionFallback(self._vae, callbacks.on_fallback)
        counter = ProgressCounter(callbacks.on_step, request.n, sum(one.forwards for one in passes))
        callbacks.on_step(Progress("encode", 0, counter.steps))
        with timer.phase("encode"):
            embedding = self._embedding(request, inputs.embedding, fallback)
            start = _start_image(request, inputs, passes[0])
            posterior = None if start.image is None else self._encode_latents(start.image, vae, fallback)
        noises = [None] * request.n if given_noise is None else list(given_noise)
        initial = [
            self._initial_latents(generator_of(index), passes, posterior, noise) for index, noise in enumerate(noises)
        ]
        with timer.phase("denoise"):
            conditioning = Conditioning(fallback.load(adapted.on_device, device), passes, embedding, start)
        images: list[GeneratedImage] = []
        finished: list[Tensor] = []
        while (remaining := initial[len(finished) :]) and not (finished and callbacks.is_interrupted()):
            with timer.phase("denoise"):
                batch = fallback.generate(
                    partial(self._denoise, conditioning, remaining, counter, callbacks), len(remaining), device
                )
            finished += batch.cpu()
            for latents in batch if decodes else ():  # (16, h, w)
                counter.report("decode")
                with timer.phase("decode"):
                    image = start.restore_unmasked(self._decode_latents(latents, vae, fallback), request.keep_unmasked)
                images.append(GeneratedImage(image, request.seed_of(len(images)), len(images)))
        metrics = timer.metrics(embedding.prompt_tokens, embedding.embeds.shape[0])
        made_by = self.describe(request)
        if fallback.used_tiling:
            made_by["vae_tiles"] = str(fallback.used_tiling)
        if vae.taken:
            made_by["vae_fallback"] = vae.taken.description
        loras = [inputs.loras[use.name] for use in request.loras]
        made_by["prompt_sha256"] = embedding.prompt_sha256
        made_by |= {f"lora:{use.name}": lora.sha256 for use, lora in zip(request.loras, loras, strict=True)}
        return GenerationResult(images, metrics, {**made_by, **_strictness(loras), **_notices(loras)}, finished)

    def load_lora(
        self,
        file: Path | str | bytes,
        name: str | None = None,
        on_fallback: OnFallback | None = None,
        *,
        strict: bool = True,
    ) -> LoraWeights:
        """Prepare a LoRA for this checkpoint. See `ZImagePipeline.load_lora`."""
        content, stem = (file, "lora") if isinstance(file, bytes) else (read_file(Path(file)), Path(file).stem)
        report = on_fallback or Callbacks().on_fallback
        fallback = OomFallback(f"the LoRA {name or stem}", report, encoder=self._encoder)
        return fallback.load(partial(self._model.lora, content, name or stem, strict=strict), self._placement.device)

    def describe(self, request: GenerationRequest | None = None) -> dict[str, str]:
        """Describe what generates these images. See `ZImagePipeline.describe`."""
        described = dict(self._description)
        if request is None:
            return described
        if request.tiled_vae and self.options.tiling.divides(request.width, request.height):
            described["vae_tiles"] = str(self.options.tiling)
        if any(one.dype and one.dype.dynamic and stretches(one.dype, one.width, one.height) for one in plan(request)):
            described["dype_notice"] = NOTICE
        if notice := size_notice(request, self._trained_px):
            described["size_notice"] = notice
        return described

    def cache_statistics(self) -> CacheStatistics:
        """Return the embedding cache's hits, misses and content; zeros without a text encoder."""
        return self._encoder.cache_statistics() if self._encoder else CacheStatistics(0, 0, 0, 0)

    def _initial_latents(
        self,
        generator: torch.Generator,
        passes: Sequence[PlannedPass],
        posterior: Tensor | None,
        noise: Tensor | None,
    ) -> InitialLatents:
        """Draw everything random about one image; its first pass has the given `noise`, if any."""
        start = None if posterior is None else self._vae.sample_latents(posterior, generator).cpu()
        given = [] if noise is None else [noise]
        sampled = [draw_initial_noise(generator, self.channels, one.size).cpu() for one in passes[len(given) :]]
        return InitialLatents(start, [*given, *sampled])

    def _denoise(
        self,
        conditioning: Conditioning,
        remaining: Sequence[InitialLatents],
        counter: ProgressCounter,
        callbacks: Callbacks,
        count: int,
    ) -> Tensor:
        """Run the first `count` of the remaining images through all passes: (count, 16, h, w) of the last one.

        Latents of a pass in which the call was interrupted are enlarged to the size of the last one.
        """
        counter.reset_to(len(remaining))
        sampler = Sampler(conditioning, remaining[:count], self._placement.device)
        while not sampler.is_done:
            counter.count_step(sampler.count)
            sampler.advance()
            callbacks.on_step_end(sampler)
            if callbacks.is_interrupted():
                break
        sampler.require_finite()
        return enlarged(sampler.latents, conditioning.passes[-1].size)

    def _encode_latents(self, image: Image.Image, vae: PrecisionFallback, fallback: OomFallback) -> Tensor:
        def encode(tiling: Tiling | None) -> Tensor:
            return vae.run(lambda codec: codec.encode_latents(image, tiling))

        return fallback.run_vae(encode, image.size, self._vae.fits(*image.size), self._vae_placement.device)

    def _decode_latents(self, latents: Tensor, vae: PrecisionFallback, fallback: OomFallback) -> Image.Image:
        def decode(tiling: Tiling | None) -> Image.Image:
            return vae.run(lambda codec: codec.decode_latents(latents, tiling))

        _channels, height, width = latents.shape
        size_px = (width * geometry.LATENT_PX, height * geometry.LATENT_PX)
        return fallback.run_vae(decode, size_px, self._vae.fits(*size_px), self._vae_placement.device)

    def _embedding(
        self, request: GenerationRequest, given: PromptEmbedding | None, fallback: OomFallback
    ) -> PromptEmbedding:
        """Return the given embedding, or encode the prompt; on the transformer's device and in its dtype.

        Raises `NonFiniteValues`, which a conversion to float16 may cause as well.
        """
        embedding = self._encode_prompt(request, fallback) if given is None else self._checked(given, request)

        def moved(states: Tensor, subject: str) -> Tensor:
            there = states.to(self._placement.device, self._placement.dtype)
            require_finite(there, subject)
            return there

        negative = embedding.negative
        return replace(
            embedding,
            embeds=moved(embedding.embeds, "the values of the prompt's embedding"),
            negative=None if negative is None else moved(negative, "the values of the negative prompt's embedding"),
        )

    def _encode_prompt(self, request: GenerationRequest, fallback: OomFallback) -> PromptEmbedding:
        if self._encoder is None:
            raise InvalidRequest.field("embeddings", "must be passed: this pipeline was loaded without a text encoder")
        return fallback.run(partial(self._encoder.encode, request), self._encoder.device)

    def _checked(self, given: PromptEmbedding, request: GenerationRequest) -> PromptEmbedding:
        check_fits(
            given,
            hidden_size=self._model.prompt_width,
            caption_tokens_limit=self._limits.caption_tokens,
            encoder_family=self.encoder_family,
        )
        if request.is_guided and given.negative is None:
            detail = "needs the embedding of a negative prompt; encode the prompt with a guidance_scale above 0"
            raise InvalidRequest.field("guidance_scale", detail)
        return given

    @property
    def _devices(self) -> set[torch.device]:
        encoder = {self._encoder.device} if self._encoder else set[torch.device]()
        return encoder | {self._placement.device, self._vae_placement.device}


def _start_image(request: GenerationRequest, inputs: Inputs, first: PlannedPass) -> StartImage:
    """Return the request's inputs at the size of the first pass.

    Raises `InvalidRequest` if an image is passed that the request does not name, or the other way round.
    """
    for name in INPUT_FIELDS:
        if (getattr(request, name) is None) != (getattr(inputs, name) is None):
            raise InvalidRequest.field(name, "must be passed as an image if, and only if, the request names one")
    return StartImage(
        image=None if inputs.image is None else fit_image(inputs.image, first.width, first.height, request.fit),
        mask=None if inputs.mask is None else fit_mask(inputs.mask, first.width, first.height, request.fit),
    )


def _scaled(request: GenerationRequest, inputs: Inputs) -> list[ScaledLora]:
    """Return the request's LoRAs. Raises `InvalidRequest` for one that is not among the inputs."""
    missing = [use.name for use in request.loras if use.name not in inputs.loras]
    if missing:
        raise InvalidRequest.field("loras", f"must be passed in the inputs: {', '.join(missing)}")
    return [ScaledLora(inputs.loras[use.name], use.scale) for use in request.loras]


def _fused_record(fused: Sequence[ScaledLora]) -> dict[str, str]:
    """Return what is fused, under names that are numbered from the second file of one name on."""
    found: dict[str, str] = {}
    for one in fused:
        key = f"lora_fused:{one.weights.name}"
        same = sum(name == key or name.startswith(f"{key} ") for name in found)
        found[f"{key} {same + 1}" if same else key] = f"{one.weights.sha256} at {one.scale}"
    return found


def _strictness(loras: Sequence[LoraWeights]) -> dict[str, str]:
    """Name each LoRA that was loaded as not strict, so that it is loaded so when its image is repeated."""
    return {f"lora_strict:{lora.name}": "false" for lora in loras if not lora.strict}


def _notices(loras: Sequence[LoraWeights]) -> dict[str, str]:
    """Return what is left out of each LoRA, and why."""
    return {f"lora_notice:{lora.name}": "; ".join(lora.notes) for lora in loras if lora.notes}


def _hardware(device: torch.device) -> str:
    """Name the hardware, with the CPU's number of threads, because that changes the last bits of sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
