"""What a pipeline call accepts besides the fields of a request, and how it refuses everything else by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zcore import Inputs, PromptEmbedding, ZImagePipeline
from zcore.errors import ConfigurationError, EmbeddingMismatch, InvalidRequest, NonFiniteValues
from zcore.imaging.call_arguments import image_of
from zcore.imaging.engine import Engine

QUICK: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
GENERATOR = torch.Generator()
EMBEDS = torch.zeros(3, 8)
PHOTO = Image.linear_gradient("L").resize((80, 64)).convert("RGB")

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt: must be given, or prompt_embeds instead of it"),
    ({"prompt": 5}, "prompt: must be text of 1 to 16384 characters"),
    ({"prompt": []}, "prompt: must be text or a list of at least one text"),
    ({"prompt": ["a", 5]}, "prompt: must be text"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt: must be one text, or one for each of the 2"),
    ({"generator": 42}, "generator: must be a torch.Generator.*; for the seed 42 pass seed=42"),
    ({"generator": [1]}, "generator: must contain only values of torch.Generator"),
    ({"generator": [GENERATOR] * 3, "n": 2}, "generator: must have one generator for each of the 2 images, not 3"),
    ({"generator": GENERATOR, "seed": 1}, "seed: cannot be combined with a generator"),
    ({"seed": -1}, "seed: must be a whole number from 0"),
    ({"num_images_per_prompt": 9}, "num_images_per_prompt: must be a whole number from 1 to 8; the nearest is 8"),
    ({"num_images_per_prompt": 2, "n": 3}, "num_images_per_prompt: is another name of n"),
    ({"steps": None, "num_inference_steps": 0}, "num_inference_steps: must be a whole number from 1 to 50"),
    ({"output_type": "pill"}, r"output_type: must be one of pil, np, pt, latent; did you mean `pil`\?"),
    ({"latents": [0.0]}, "latents: must be a torch tensor of floating-point numbers"),
    (
        {"latents": torch.zeros(1, 16, 16, 8)},
        r"latents: must have the shape \(1, 16, 8, 8\), for 1 of 64x64 px, not \(1, 16, 16, 8\)",
    ),
    ({"latents": torch.full((1, 16, 8, 8), torch.nan)}, "latents: must be finite"),
    ({"latents": torch.zeros(1, 16, 8, 8), "image": PHOTO}, "latents: cannot be combined with an image"),
    ({"prompt_embeds": EMBEDS}, "prompt: must be given, or prompt_embeds instead of it, but not both"),
    ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"embeds of shape \[8\]; it must be tokens by hidden size"),
    ({"prompt": None, "prompt_embeds": [[0.0]]}, "embeds that is no torch tensor"),
    ({"negative_prompt_embeds": EMBEDS}, "negative_prompt_embeds: cannot be combined with prompt"),
    ({"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt": "a"}, "negative_prompt: cannot be combined with"),
    (
        {"prompt": None, "prompt_embeds": [EMBEDS, EMBEDS], "negative_prompt_embeds": [EMBEDS]},
        "negative_prompt_embeds: must have one embedding for each of the 2 in prompt_embeds, not 1",
    ),
    ({"image": "/no/such/file.png"}, "image: /no/such/file.png cannot be read: No such file"),
    ({"image": 5}, "image: must be a PIL image, the path of an image file, a numpy array or a torch tensor"),
    ({"image": torch.zeros(2, 3, 64, 64)}, "image: must be one image, not a batch of 2"),
    ({"image": torch.zeros(64, 64, 3)}, r"image: must have 1, 3 or 4 channels: .* \(C, H, W\) as a tensor"),
    ({"image": np.full((64, 64, 3), 2.0)}, "image: must hold whole numbers from 0 to 255 as uint8, or floating-point"),
    ({"image": PHOTO, "mask": np.zeros((64, 64), np.int32)}, "mask: must hold whole numbers from 0 to 255 as uint8"),
    ({"mask": PHOTO}, "mask: requires an image"),
    ({"loras": 5}, "loras: must be a list of results of load_lora"),
    ({"loras": ["night"]}, "loras/0: must be a result of load_lora"),
    ({"on_step": 5}, "on_step: must be a function"),
    ({"callback_on_step_end": 5}, "callback_on_step_end: must be a function"),
    (
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        r'callback_on_step_end_tensor_inputs: must be \["latents"\]',
    ),
    ({"inputs": 5}, "inputs: must be an Inputs"),
    ({"heigth": 5}, r"heigth: is not a known field; did you mean `height`\?"),
    ({"layer_weights": {-40: 1.0}}, 'layer_weights/-40: must be a layer from "-36" to "-1"'),
]


@pytest.fixture
def idle_pipeline(tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[ZImagePipeline]:
    """A pipeline that fails the test if it begins to generate."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("the argument was not refused before generating")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "generate", refuse)
        yield tiny_pipeline


@pytest.mark.parametrize(("arguments", "complaint"), INVALID, ids=[complaint[:40] for _, complaint in INVALID])
def test_an_invalid_argument_is_refused_by_name_before_generating(
    idle_pipeline: ZImagePipeline, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        idle_pipeline(**{"prompt": "a red circle", **QUICK, **arguments})


def test_the_other_calls_refuse_by_name_too(idle_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest, match="image: is required"):
        idle_pipeline.img2img("a", image=None)
    with pytest.raises(InvalidRequest, match="final_width: must be a whole number from 64 to 8192"):
        idle_pipeline.generate_multipass("a", final_width=65, final_height=64)
    with pytest.raises(InvalidRequest, match="passes: must be a list of at most 4 objects"):
        idle_pipeline.generate_multipass("a", final_width=64, final_height=64, passes=5)
    with pytest.raises(InvalidRequest, match="embeds that is no torch tensor"):
        idle_pipeline.generate_from_embeddings("a")
    with pytest.raises(InvalidRequest, match=r"request: must be a GenerationRequest; pipe\.request"):
        idle_pipeline.generate("a red circle")


def test_an_image_is_a_path_an_array_or_a_tensor(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    levels = np.asarray(PHOTO)
    channels_first = torch.tensor(levels).permute(2, 0, 1)
    for form in (
        PHOTO,
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        levels,
        levels[None],
        (levels / 255).astype(np.float32),
        channels_first,
        channels_first[None] / 255,
        (channels_first / 255).double(),
    ):
        image = image_of(form, "image")
        assert image is not None
        assert np.array_equal(np.asarray(image.convert("RGB")), levels)
    grey = image_of(levels[..., 0], "mask")
    assert grey is not None
    assert grey.mode == "L"


def test_all_images_of_a_call_are_returned(tiny_pipeline: ZImagePipeline) -> None:
    three = tiny_pipeline(["a", "b"], seed=1, num_images_per_prompt=3, **QUICK)
    assert len(three) == len(three.images) == 6
    alone = tiny_pipeline("b", seed=3, **QUICK)
    assert np.array_equal(np.asarray(three[5]), np.asarray(alone))
    assert alone.images == [alone]
    (images,) = tiny_pipeline("b", seed=3, return_dict=False, **QUICK)
    assert np.array_equal(np.asarray(images[0]), np.asarray(alone))


@pytest.mark.parametrize(
    ("latents", "complaint"),
    [
        (torch.zeros(1, 16, 8, 8), r"must have the shape \(2, 16, 8, 8\), for 2 of 64x64 px, not \(1, 16, 8, 8\)"),
        (torch.zeros(3, 16, 8, 8), r"must have the shape \(2, 16, 8, 8\)"),
        (torch.zeros(2, 16, 4, 4), r"must have the shape \(2, 16, 8, 8\)"),
        (torch.full((2, 16, 8, 8), torch.inf), "must be finite"),
    ],
)
def test_noise_among_the_inputs_is_one_for_each_image(
    tiny_pipeline: ZImagePipeline, latents: torch.Tensor, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"latents: {complaint}"):
        tiny_pipeline.generate(tiny_pipeline.request("a", n=2, **QUICK), inputs=Inputs(latents=latents))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_interrupted_in_an_earlier_pass_have_the_size_of_the_others(
    tiny_pipeline: ZImagePipeline, output_type: str
) -> None:
    calls = 0

    def interrupt(pipe: ZImagePipeline, *_arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        pipe._interrupt = calls == 3  # the first step of the second prompt
        return {}

    passes = [{"scale": 0.5, "steps": 1}, {"scale": 1.0, "steps": 1, "strength": 1.0}]
    images = tiny_pipeline.generate_multipass(
        ["a", "b"],
        final_width=128,
        final_height=128,
        passes=passes,
        output_type=output_type,
        callback_on_step_end=interrupt,
    ).images
    assert calls == 3
    assert len(images) == 2
    assert np.asarray(images[0]).shape == np.asarray(images[1]).shape
    assert np.asarray(images[1]).std() > 0


def test_a_callback_that_returns_no_tensor_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest, match="latents: must be a torch tensor"):
        tiny_pipeline("a", callback_on_step_end=lambda *_: {"latents": [0.0]}, **QUICK)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_latents_of_a_callback_must_be_finite_after_the_last_step_too(
    output_type: str, tiny_pipeline: ZImagePipeline
) -> None:
    def spoil(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"] * torch.nan}

    with pytest.raises(NonFiniteValues, match="latents are NaN or infinite after step 1 of 1"):
        tiny_pipeline("a", callback_on_step_end=spoil, output_type=output_type, **QUICK)


def test_a_request_is_made_without_a_parser(tiny_pipeline: ZImagePipeline) -> None:
    request = tiny_pipeline.request("a", num_inference_steps=1, width=64, height=64, seed=3)
    result = tiny_pipeline.generate(request)
    assert np.array_equal(np.asarray(result.images[0].image), np.asarray(tiny_pipeline("a", seed=3, **QUICK)))


def test_an_embedding_of_another_encoder_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    stranger = PromptEmbedding.from_tensor(EMBEDS, encoder_family="0" * 64)
    with pytest.raises(EmbeddingMismatch, match="has 8 numbers per token; this model needs"):
        tiny_pipeline(prompt_embeds=stranger, **QUICK)


def test_layers_may_be_numbers(tiny_pipeline: ZImagePipeline) -> None:
    assert tiny_pipeline.request("a", layer_weights={-2: 0.7}).layer_weights == {"-2": 0.7}


def test_a_pipeline_moves_by_loading_again_only_if_that_changes_anything(tiny_folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(tiny_folder, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")
    engine = pipe._engine
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to("cpu") is pipe
    assert pipe._engine is engine
    with pytest.raises(ConfigurationError, match="device: must be auto, cpu, mps, cuda or cuda:N"):
        pipe.to("gpu")
    assert pipe.to(torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
    assert pipe._engine is not engine
    assert pipe("a", **QUICK).size == (64, 64)
