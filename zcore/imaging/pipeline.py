"""The public Python API: a prompt in, images out.

    pipe = ZImagePipeline.from_pretrained("/path/to/z-image", templates_dir="templates/z_image")
    pipe("A cat sleeping in sunlight", seed=42).save("output.png")

A pipeline must be used by one thread only. `engine` defines a generation; `options` defines how a checkpoint is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zcore.errors import InvalidRequest
from zcore.imaging.call_arguments import (
    Prompt,
    generators_of,
    image_of,
    latents_of,
    loras_of,
    prompts_of,
    with_argument_names,
    with_field_names,
)
from zcore.imaging.engine import Callbacks, Engine, GeneratorOf
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.lora.adapters import LoraWeights
from zcore.imaging.oom_fallback import FallbackStep, OnFallback
from zcore.imaging.option_checks import refuse_invalid_model_path
from zcore.imaging.options import LoadOptions
from zcore.imaging.output import ImageList, OutputType, PipelineOutput, check_output_type, output_of
from zcore.imaging.progress import OnStep, Progress
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.result import GeneratedImage, GenerationMetrics, GenerationResult
from zcore.imaging.sampler import Sampler
from zcore.imaging.sampling.multipass import plan
from zcore.imaging.text.embedding_cache import CacheStatistics
from zcore.imaging.text.embedding_file import PromptEmbedding
from zcore.imaging.weights.loader import DTYPES
from zcore.request import INPUT_FIELDS, PASS_PRESETS, SIZE_FIELDS, GenerationRequest, LocalInput, parse_generation
from zcore.sizes import SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX

__all__ = [
    "FallbackStep",
    "GeneratedImage",
    "GenerationMetrics",
    "GenerationResult",
    "ImageList",
    "Inputs",
    "LoadOptions",
    "PipelineOutput",
    "Progress",
    "ZImagePipeline",
]

ImageLike = Image.Image | str | Path | np.ndarray[Any, Any] | Tensor
Embeds = PromptEmbedding | Tensor | Sequence[PromptEmbedding | Tensor]
CallbackOnStepEnd = Callable[["ZImagePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
"""diffusers' form: (pipeline, step from 0, timestep from 1000 to 0, tensors) -> tensors to continue with."""

_NO_INPUTS = Inputs()


class ZImagePipeline:
    """A loaded checkpoint. `from_pretrained` creates one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, model_path: str | Path, **options: Any) -> "ZImagePipeline":
        """Load a folder in the diffusers layout, or a hub id.

        `options`, with their defaults in `zcore.imaging.options`:

        - `templates_dir`: one folder of prompt templates, or several;
        - `encoder_device`, `dit_device`, `vae_device`: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`;
        - `torch_dtype` of the transformer and, without `encoder_dtype`, of the text encoder: a torch type or its name;
        - `encoder_quantization`, `dit_quantization`: `none`, `8bit`, `fp8` or `4bit`;
        - `encoder_weights`, `dit_weights`, `vae_weights`: a single file to read instead of the folder's;
        - `cpu_offload`: keep weights in the CPU's memory; copy one `cpu_offload_unit` at a time to the device;
        - `batch_size`: images of one request that are generated in one forward;
        - `hidden_layer` and `shift`, or `defaults` (a `GenerationDefaults`): values of fields that a call omits; the
          shift is the checkpoint's unless one is given;
        - `compile`, `compile_mode`: torch.compile; the first images take a minute longer;
        - `attention_backend`, and `tile_size` and `tile_overlap` in pixels, for the VAE when it works in tiles;
        - `embedding_cache_bytes`: the memory that embeddings of earlier prompts may occupy;
        - `fused_loras`: LoRA files with scales, applied to every image at no cost.

        Raises `ConfigurationError` listing every option that is out of bounds, before anything is loaded;
        `CheckpointError` for a checkpoint that cannot be loaded this way; `InvalidLora`; and TypeError for an unknown
        option.
        """
        return cls.load(model_path, LoadOptions.of(options))

    @classmethod
    def from_pretrained_generator_only(cls, model_path: str | Path, **options: Any) -> "ZImagePipeline":
        """Load transformer and VAE only, to generate from embeddings that a `PromptEncoder` made, here or elsewhere.

        The text encoder's weights are not read and need not exist. Options are those of `from_pretrained`.
        """
        return cls.load(model_path, LoadOptions.of(options), with_encoder=False)

    @classmethod
    def load(cls, model_path: str | Path, options: LoadOptions, *, with_encoder: bool = True) -> "ZImagePipeline":
        """Load a checkpoint as `from_pretrained` does, with options that are already a `LoadOptions`."""
        refuse_invalid_model_path(model_path)
        encoder = PromptEncoder.load(model_path, options.encoder) if with_encoder else None
        return cls(Engine(model_path, options, encoder))

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        return self._engine.dtype

    @property
    def encoder_family(self) -> str:
        """Identifies the text encoder whose embeddings this pipeline takes; see `PromptEmbedding.from_tensor`."""
        return self._engine.encoder_family

    @property
    def interrupt(self) -> bool:
        """Whether the running call was asked to stop; set `_interrupt`, as in diffusers."""
        return self._interrupt

    def to(self, *targets: str | torch.device | torch.dtype) -> "ZImagePipeline":
        """Use another device for all networks, another dtype, or both, and return this pipeline.

        If that changes anything, the checkpoint is loaded again, since attention kernel, quantization and offloading
        depend on the device; results of `load_lora` must then be loaded again too. To save the time, pass the device to
        `from_pretrained`. Raises `ConfigurationError`, and `CheckpointError` for a device that is not available; the
        pipeline is then unchanged.
        """
        options = self._engine.options
        for target in targets:
            is_dtype = isinstance(target, torch.dtype) or target in DTYPES
            options = options.with_dtype(target) if is_dtype else options.with_device(target)
        if not self._engine.runs_as(options):
            moved = self.load(self._engine.model_path, options, with_encoder=self._engine.has_encoder)
            self._engine = moved._engine
        return self

    def request(self, prompt: str, **fields: Any) -> GenerationRequest:
        """Return the validated request of a prompt, for `generate`; omitted fields have the pipeline's defaults.

        Raises `InvalidRequest` listing every field that is wrong.
        """
        return self._request({"prompt": prompt, **fields})

    def generate(
        self,
        request: GenerationRequest,
        on_step: OnStep | None = None,
        inputs: Inputs | None = None,
        on_fallback: OnFallback | None = None,
    ) -> GenerationResult:
        """Generate the request's images, `batch_size` per forward; `request` makes one.

        Each image is the same as if it were generated alone: bit for bit if `batch_size` is 1, else up to rounding.

        `inputs` must have an image or a mask if, and only if, the request names one. `on_step` is called before the
        prompt is encoded, before each forward and before each decoding; an `errors.Interruption` that it raises ends
        the generation there. `on_fallback` is called with each fallback step taken when memory runs out, or when the
        VAE's values are not finite in half precision.
        Raises `InvalidRequest` for an unknown template or a size that the checkpoint does not support, `PromptTooLong`,
        `EmbeddingMismatch`, `OutOfMemory` if no fallback step is left, and `NonFiniteValues`.
        """
        if not isinstance(request, GenerationRequest):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest.field("request", "must be a GenerationRequest; pipe.request(prompt, ...) makes one")
        return self._engine.generate(request, inputs or Inputs(), _seeded(request), _callbacks(on_step, on_fallback))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Embeds | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        loras: Sequence[LoraWeights | tuple[LoraWeights, float]] = (),
        output_type: OutputType = "pil",
        return_dict: bool = True,
        on_step: OnStep | None = None,
        on_fallback: OnFallback | None = None,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        inputs: Inputs | None = None,
        **fields: Any,
    ) -> Any:
        """Generate images for a prompt or a list of prompts: `n` for each, in order.

        One image of one prompt is returned as a PIL image, several as a list; both have `.images`, so that code for
        diffusers works. `output_type` `np`, `pt` or `latent` returns a `PipelineOutput`; `return_dict=False` a tuple.

        `fields` are any fields of a `GenerationRequest`; `num_inference_steps` is another name of `steps`,
        `num_images_per_prompt` of `n`, `mask_image` of `mask`. Omitted fields have the pipeline's defaults.

        - `seed` makes image i of each prompt with the seed + i. A `generator` is used image after image and advances; a
          list has one for each image. Without either the seed is random.
        - `image` and `mask` are PIL images, paths, numpy arrays (H, W, C) or tensors (C, H, W). Without `width` and
          `height` the size is the image's, rounded down to multiples of 16.
        - `latents` (images, 16, h, w) is the initial noise.
        - `prompt_embeds` replaces the prompt: a `PromptEmbedding`, a tensor (L, hidden), or several of them.
        - `loras` are results of `load_lora`, each alone or with its scale.
        - `callback_on_step_end(pipe, step, timestep, {"latents": ...})` is called after each step of each forward, with
          latents (B, 16, h, w); latents in the dictionary that it returns replace them. `pipe._interrupt = True` ends
          the call after this step: images that have begun are decoded as they are, enlarged after an earlier pass.
        - `on_step` and `on_fallback` are called as by `generate`.

        Raises as `generate` does, before anything is generated if an argument is invalid.
        """
        if "mask_image" in fields:
            mask = with_field_names({"mask": mask, "mask_image": fields.pop("mask_image")}).get("mask")
        check_output_type(output_type)
        callback = _step_end(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        prompts, is_list = prompts_of(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, self._engine.encoder_family
        )
        scaled = loras_of(loras)
        shared = _merged(inputs, image=image_of(image, "image"), mask=image_of(mask, "mask"), loras=scaled)
        given = {**_size_of(shared.image if image is not None else None, fields), **fields}
        if seed is not None:
            given["seed"] = seed
        requests = [self._request({**given, **_fields_of(one)}, shared, scaled) for one in prompts]
        count = requests[0].n
        generators = generators_of(generator, count * len(prompts))
        if seed is not None and generators is not None:
            raise InvalidRequest.field("seed", "cannot be combined with a generator; pass one of them")
        first = plan(requests[0])[0].size
        shape = (count * len(prompts), self._engine.channels, first.height, first.width)
        noise = latents_of(latents, shape, has_image=shared.image is not None)
        callbacks = _callbacks(on_step, on_fallback, callback, lambda: self._interrupt)
        self._interrupt = False
        results: list[GenerationResult] = []
        for index, (one, request) in enumerate(zip(prompts, requests, strict=True)):
            if self._interrupt:
                break
            own = slice(index * count, (index + 1) * count)
            generator_of = _seeded(request) if generators is None else generators[own].__getitem__
            own_inputs = replace(
                shared,
                embedding=one.embedding or shared.embedding,
                latents=shared.latents if noise is None else noise[own],
            )
            decodes = output_type != "latent"
            results.append(self._engine.generate(request, own_inputs, generator_of, callbacks, decodes=decodes))
        return output_of(results, output_type, as_list=is_list, return_dict=return_dict)

    def img2img(self, prompt: str | Sequence[str], *, image: ImageLike, strength: float = 0.6, **options: Any) -> Any:
        """Generate images that start from another of any mode and size; with a `mask`, only in its white part.

        `options` are those of a call, which also says what an image may be and which size is the default.
        """
        if image is None:  # pyright: ignore[reportUnnecessaryComparison] callers without types
            raise InvalidRequest.field("image", "is required")
        return self(prompt, image=image, strength=strength, **options)

    def generate_multipass(
        self,
        prompt: str | Sequence[str],
        *,
        final_width: int,
        final_height: int,
        passes: Sequence[dict[str, Any]] = tuple(PASS_PRESETS["twopass"]),
        **options: Any,
    ) -> Any:
        """Generate in several passes, each refining the enlarged latents of the last; see `zcore.request.Pass`."""
        return self(prompt, final_width=final_width, final_height=final_height, passes=passes, **options)

    def generate_from_embeddings(self, embeddings: Embeds, **options: Any) -> Any:
        """Generate from a prompt that was encoded before, here or on another machine.

        `embeddings` are what a call takes as `prompt_embeds`. `options` are those of a call.
        """
        return self(prompt_embeds=embeddings, **options)

    def load_lora(
        self,
        file: Path | str | bytes,
        name: str | None = None,
        on_fallback: OnFallback | None = None,
        *,
        strict: bool = True,
    ) -> LoraWeights:
        """Prepare a LoRA for this checkpoint, to be passed with any number of requests.

        It occupies device memory as long as it is referenced. `name` defaults to the file's stem, or to `lora` for
        bytes. `on_fallback` is called as by `generate`. Unless `strict`, what does not fit this checkpoint is left out
        and listed in `notes`, instead of refused. Raises `InvalidLora` and `OutOfMemory`.
        """
        return self._engine.load_lora(file, name, on_fallback, strict=strict)

    def describe(self, request: GenerationRequest | None = None) -> dict[str, str]:
        """Describe what generates these images: engine, checkpoint, arithmetic and versions. Reveals no path or host.

        With a request, add what must be stated with its images: `vae_tiles` if it requests tiles, `dype_notice` if DyPE
        affects them, and `size_notice` if they are far larger than what the checkpoint was trained at.
        """
        return self._engine.describe(request)

    def cache_statistics(self) -> CacheStatistics:
        """Return the embedding cache's hits, misses and content; zeros without a text encoder."""
        return self._engine.cache_statistics()

    def _request(
        self,
        arguments: dict[str, Any],
        inputs: Inputs = _NO_INPUTS,
        loras: Sequence[tuple[LoraWeights, float]] = (),
    ) -> GenerationRequest:
        """Parse the fields of a request, given under any of their names, with those that follow from the inputs."""
        fields = with_field_names(arguments)
        if isinstance(fields.get("layer_weights"), Mapping):
            fields["layer_weights"] = {str(layer): weight for layer, weight in fields["layer_weights"].items()}
        if loras:
            fields["loras"] = [{"name": lora.name, "scale": scale} for lora, scale in loras]
        fields |= {name: str(LocalInput(name)) for name in INPUT_FIELDS if getattr(inputs, name) is not None}
        try:
            return parse_generation(fields, self._engine.defaults)
        except InvalidRequest as error:
            raise with_argument_names(error, arguments) from None


def _seeded(request: GenerationRequest) -> GeneratorOf:
    """Return generators on the CPU, whatever the device, so that a seed gives the same noise everywhere."""
    return lambda index: torch.Generator("cpu").manual_seed(request.seed_of(index))


def _callbacks(
    on_step: OnStep | None,
    on_fallback: OnFallback | None,
    on_step_end: Callable[[Sampler], None] | None = None,
    is_interrupted: Callable[[], bool] | None = None,
) -> Callbacks:
    for name, callback in {"on_step": on_step, "on_fallback": on_fallback}.items():
        if callback is not None and not callable(callback):
            raise InvalidRequest.field(name, "must be a function")
    silent = Callbacks()
    return Callbacks(
        on_step=on_step or silent.on_step,
        on_fallback=on_fallback or silent.on_fallback,
        on_step_end=on_step_end or silent.on_step_end,
        is_interrupted=is_interrupted or silent.is_interrupted,
    )


def _step_end(
    pipe: ZImagePipeline, callback: CallbackOnStepEnd | None, tensor_inputs: Sequence[str]
) -> Callable[[Sampler], None] | None:
    """Return a callback of the engine that calls one of diffusers."""
    if callback is None:
        return None
    if not callable(callback):
        raise InvalidRequest.field("callback_on_step_end", "must be a function")
    if list(tensor_inputs) != ["latents"]:
        detail = 'must be ["latents"]; the prompt is fixed before the first step'
        raise InvalidRequest.field("callback_on_step_end_tensor_inputs", detail)

    def on_step_end(sampler: Sampler) -> None:
        timestep = torch.tensor(sampler.sigma * 1000)
        returned = callback(pipe, sampler.steps_done - 1, timestep, {"latents": sampler.latents})
        if returned and "latents" in returned:
            sampler.replace_latents(returned["latents"])

    return on_step_end


def _merged(
    inputs: Inputs | None,
    *,
    image: Image.Image | None,
    mask: Image.Image | None,
    loras: Sequence[tuple[LoraWeights, float]],
) -> Inputs:
    passed = inputs or Inputs()
    if not isinstance(passed, Inputs):  # pyright: ignore[reportUnnecessaryIsInstance] callers without types
        raise InvalidRequest.field("inputs", "must be an Inputs")
    return replace(
        passed,
        image=image or passed.image,
        mask=mask or passed.mask,
        loras={**passed.loras, **{lora.name: lora for lora, _ in loras}},
    )


def _size_of(image: Image.Image | None, fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the sides of an image to start from, rounded down to multiples of 16, where the call gives none."""
    if image is None or any(name in fields for name in SIZE_FIELDS):
        return {}
    sides = {"width": image.width, "height": image.height}
    return {
        name: max(side // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX)
        for name, side in sides.items()
        if fields.get(name) is None and fields.get(f"final_{name}") is None
    }


def _fields_of(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt.text, **({} if prompt.negative is None else {"negative_prompt": prompt.negative})}
