"""Arguments of a pipeline call that are not fields of a request: prompts, generators, latents, embeddings, images.

Takes what callers of diffusers pass as well; returns values of one type each. Raises `InvalidRequest`, naming the
argument, before anything is generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zcore.errors import FieldError, InvalidRequest
from zcore.image_files.input_images import open_image
from zcore.imaging.lora.adapters import LoraWeights
from zcore.imaging.text.embedding_file import PromptEmbedding
from zcore.request import RequestLimits

ALIASES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "n",
    "mask_image": "mask",
    "final_width": "width",
    "final_height": "height",
}
"""Arguments that have another name as a field of a request."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of a call's prompts: its text, or its embedding instead; `negative` is None where the call gives none."""

    text: str
    negative: str | None
    embedding: PromptEmbedding | None


def with_field_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given arguments under the names of the request's fields; None counts as not given.

    Raises `InvalidRequest` for one that is given under both names.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise InvalidRequest.field(alias, f"is another name of {name}; give only one of them")
    return {ALIASES.get(name, name): value for name, value in given.items()}


def with_argument_names(error: InvalidRequest, arguments: Mapping[str, Any]) -> InvalidRequest:
    """Return the error with its fields under the names that the caller used."""
    used = {f"/{ALIASES[name]}": f"/{name}" for name in arguments if name in ALIASES}
    return type(error)([FieldError(used.get(one.pointer, one.pointer), one.detail) for one in error.errors])


def prompts_of(
    prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_prompt_embeds: Any, encoder_family: str
) -> tuple[list[Prompt], bool]:
    """Return the prompts of a call, and whether they were given as a list.

    `prompt_embeds` is a `PromptEmbedding` or a tensor (L, hidden) for one prompt; a list of them, or a tensor (B, L,
    hidden), for several. Negative embeddings have the same form.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise InvalidRequest.field("prompt", "must be given, or prompt_embeds instead of it, but not both")
    if prompt_embeds is None:
        if negative_prompt_embeds is not None:
            raise InvalidRequest.field("negative_prompt_embeds", "cannot be combined with prompt; give prompt_embeds")
        is_list = isinstance(prompt, list | tuple)
        texts = list(cast(Sequence[Any], prompt)) if is_list else [prompt]
        if not texts:
            raise InvalidRequest.field("prompt", "must be text or a list of at least one text")
        negatives = _for_each(negative_prompt, len(texts), "negative_prompt")
        return [Prompt(text, negative, None) for text, negative in zip(texts, negatives, strict=True)], is_list
    if negative_prompt is not None:
        raise InvalidRequest.field("negative_prompt", "cannot be combined with prompt_embeds; give its embedding")
    embeds, is_list = _unbatched(prompt_embeds, "prompt_embeds")
    negatives: list[Any] = [None] * len(embeds)
    if negative_prompt_embeds is not None:
        negatives, _ = _unbatched(negative_prompt_embeds, "negative_prompt_embeds")
    if len(negatives) != len(embeds):
        detail = f"must have one embedding for each of the {len(embeds)} in prompt_embeds, not {len(negatives)}"
        raise InvalidRequest.field("negative_prompt_embeds", detail)
    made = [_embedding(one, negative, encoder_family) for one, negative in zip(embeds, negatives, strict=True)]
    return [Prompt(f"embedding {one.prompt_sha256[:16]}", None, one) for one in made], is_list


def generators_of(generator: Any, count: int) -> list[torch.Generator] | None:
    """Return a generator for each of `count` images; a single one serves them all, in order. None stays None."""
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if not isinstance(generator, list | tuple):
        hint = f"; for the seed {generator} pass seed={generator}" if isinstance(generator, int) else ""
        raise InvalidRequest.field("generator", f"must be a torch.Generator, or a list with one for each image{hint}")
    given = cast(Sequence[Any], generator)
    if not all(isinstance(one, torch.Generator) for one in given):
        raise InvalidRequest.field("generator", "must contain only values of torch.Generator")
    if len(given) != count:
        detail = f"must have one generator for each of the {count} images, not {len(given)}"
        raise InvalidRequest.field("generator", detail)
    return list(given)


def latents_of(latents: Any, shape: tuple[int, int, int, int], *, has_image: bool) -> Tensor | None:
    """Return the initial noise of all images in float32, on the CPU. `shape` is (images, channels, h, w).

    `has_image` states whether the call starts from an image, which excludes given noise.
    """
    if latents is None:
        return None
    if has_image:
        raise InvalidRequest.field("latents", "cannot be combined with an image, whose latents take their place")
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise InvalidRequest.field("latents", "must be a torch tensor of floating-point numbers")
    if latents.shape != shape:
        size_px = f"{shape[3] * 8}x{shape[2] * 8} px"
        detail = f"must have the shape {shape}, for {shape[0]} of {size_px}, not {tuple(latents.shape)}"
        raise InvalidRequest.field("latents", detail)
    if not bool(latents.isfinite().all()):
        raise InvalidRequest.field("latents", "must be finite")
    return latents.detach().to("cpu", torch.float32)


def image_of(value: Any, field: str) -> Image.Image | None:
    """Return an image: a PIL image, the path of a file, an array (H, W) or (H, W, C), or a tensor (C, H, W).

    Arrays and tensors have 1, 3 or 4 channels (C), of whole numbers (uint8) from 0 to 255 or of floating-point numbers
    from 0 to 1, and may have a batch axis of one image.
    """
    match value:
        case None | Image.Image():
            return value
        case str() | Path():
            try:
                return open_image(Path(value).read_bytes(), field, RequestLimits().max_input_pixels)
            except OSError as error:
                raise InvalidRequest.field(field, f"{value} cannot be read: {error.strerror}") from error
        case Tensor():
            pixels = value.detach().cpu()
            channels_last = _without_batch(pixels, field).movedim(0, -1) if pixels.dim() > 2 else pixels
            return _from_pixels((channels_last.float() if pixels.is_floating_point() else channels_last).numpy(), field)
        case np.ndarray():
            return _from_pixels(_without_batch(cast(Any, value), field), field)
        case _:
            detail = "must be a PIL image, the path of an image file, a numpy array or a torch tensor"
            raise InvalidRequest.field(field, detail)


def loras_of(loras: Any) -> list[tuple[LoraWeights, float]]:
    """Return LoRAs with their scales; one without a scale has 1."""
    if not isinstance(loras, list | tuple):
        raise InvalidRequest.field("loras", "must be a list of results of load_lora, each alone or with its scale")
    scaled: list[tuple[LoraWeights, float]] = []
    for index, one in enumerate(cast(Sequence[Any], loras)):
        match one:
            case LoraWeights():
                scaled.append((one, 1.0))
            case (LoraWeights() as weights, scale):
                scaled.append((weights, scale))
            case _:
                detail = "must be a result of load_lora, alone or in a pair with its scale"
                raise InvalidRequest.field(f"loras/{index}", detail)
    return scaled


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    """Return a value for each prompt, from one for all or from a list."""
    if not isinstance(value, list | tuple):
        return [value] * count
    values = list(cast(Sequence[Any], value))
    if len(values) != count:
        raise InvalidRequest.field(name, f"must be one text, or one for each of the {count} prompts, not {len(values)}")
    return values


def _unbatched(embeds: Any, name: str) -> tuple[list[Any], bool]:
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return list(embeds), True
    if isinstance(embeds, list | tuple):
        values = list(cast(Sequence[Any], embeds))
        if not values:
            raise InvalidRequest.field(name, "must not be an empty list")
        return values, True
    return [embeds], False


def _embedding(embeds: Any, negative: Any, encoder_family: str) -> PromptEmbedding:
    if not isinstance(embeds, PromptEmbedding):
        return PromptEmbedding.from_tensor(embeds, negative, encoder_family=encoder_family)
    if negative is not None:
        detail = "cannot be combined with a PromptEmbedding, which holds that of its own negative prompt"
        raise InvalidRequest.field("negative_prompt_embeds", detail)
    return embeds


def _without_batch(pixels: Any, field: str) -> Any:
    """Return an array or tensor without its batch axis, if it has one."""
    if len(pixels.shape) == 4:
        if pixels.shape[0] != 1:
            raise InvalidRequest.field(field, f"must be one image, not a batch of {pixels.shape[0]}")
        return pixels[0]
    return pixels


def _from_pixels(pixels: np.ndarray[Any, Any], field: str) -> Image.Image:
    """Return the image of an array (H, W) or (H, W, C)."""
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        detail = "must have 1, 3 or 4 channels: (H, W) or (H, W, C) as an array, (C, H, W) as a tensor"
        raise InvalidRequest.field(field, f"{detail}; with the channels last it is {pixels.shape}")
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating) or not (pixels.min() >= 0 and pixels.max() <= 1):
            detail = "must hold whole numbers from 0 to 255 as uint8, or floating-point numbers from 0 to 1"
            raise InvalidRequest.field(field, detail)
        pixels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
