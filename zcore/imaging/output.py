"""What a pipeline call returns: images in the form that the caller asked for.

Every result has `.images`, as in diffusers. A PIL result is also the image itself, or a list of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zcore.errors import InvalidRequest, did_you_mean
from zcore.imaging.result import GenerationResult

OutputType = Literal["pil", "np", "pt", "latent"]


class SingleImage(Image.Image):
    """The only image of a call; its `images` is a list of itself, so that code for diffusers works unchanged."""

    @classmethod
    def of(cls, image: Image.Image) -> "SingleImage":
        """Return the image with its pixels shared, not copied."""
        single = cls()
        single.__dict__.update(image.__dict__)
        return single

    @property
    def images(self) -> list[Image.Image]:
        """This image in a list."""
        return [self]


class ImageList(list[Image.Image]):
    """The images of a call, prompt by prompt."""

    @property
    def images(self) -> list[Image.Image]:
        """This list."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class PipelineOutput:
    """The images of a call in one array or tensor.

    `np`: float32 (B, H, W, 3) from 0 to 1; `pt`: the same as (B, 3, H, W); `latent`: float32 (B, 16, h, w), which the
    images would be decoded from. Pixels have 256 levels. Tensors are on the CPU.
    """

    images: np.ndarray[Any, Any] | Tensor


def check_output_type(output_type: Any) -> None:
    """Raise `InvalidRequest` for an unknown output type."""
    known = get_args(OutputType)
    if output_type not in known:
        hint = did_you_mean(str(output_type), known)
        raise InvalidRequest.field("output_type", f"must be one of {', '.join(known)}{hint}")


def output_of(results: Sequence[GenerationResult], output_type: OutputType, *, as_list: bool, return_dict: bool) -> Any:
    """Return the images of all results, in order; with `return_dict` false in a tuple of one element."""
    images = _images(results, output_type)
    if not return_dict:
        return (images,)
    if output_type != "pil":
        return PipelineOutput(images)
    return ImageList(images) if as_list or len(images) > 1 else SingleImage.of(images[0])


def _images(results: Sequence[GenerationResult], output_type: OutputType) -> Any:
    if output_type == "latent":
        return torch.stack([latents for result in results for latents in result.latents])
    images = [one.image for result in results for one in result.images]
    if output_type == "pil":
        return images
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    return pixels if output_type == "np" else torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
