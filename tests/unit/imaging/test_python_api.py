"""The Python examples of the model's documentation run, with our import, at a small size."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from tests.numerics import ONE_FORWARD, assert_close_relative
from tests.unit.imaging.conftest import TREE
from zcore import PromptEmbedding, PromptEncoder, ZImagePipeline
from zcore.errors import EmbeddingMismatch, InvalidRequest

SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe(demo_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(
        str(demo_folder),
        templates_dir=str(TREE / "templates" / "z_image"),
        torch_dtype=torch.float32,
        encoder_device="cpu",
        dit_device="cpu",
        vae_device="cpu",
    )


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


def test_basic_generation(pipe: ZImagePipeline, tmp_path: Path) -> None:
    image = pipe("A cat sleeping in sunlight", height=64, width=96, num_inference_steps=9)
    image.save(tmp_path / "output.png")
    with Image.open(tmp_path / "output.png") as saved:
        assert saved.size == (96, 64)


def test_a_generator_acts_as_a_seed(pipe: ZImagePipeline) -> None:
    image = pipe("A sunset", generator=torch.Generator().manual_seed(42), **SMALL)
    assert not differ(image, pipe("A sunset", seed=42, **SMALL))
    assert differ(image, pipe("A sunset", seed=43, **SMALL))


def test_image_to_image_starts_from_the_image(pipe: ZImagePipeline) -> None:
    input_img = Image.linear_gradient("L").resize((100, 70))
    image = pipe.img2img("A watercolor painting", image=input_img, strength=0.6, seed=1)
    assert image.size == (96, 64)
    fainter = pipe.img2img("A watercolor painting", image=input_img, strength=0.2, seed=1)
    assert differ(image, fainter)


def test_inpainting_preserves_the_unmasked_region(pipe: ZImagePipeline) -> None:
    before = pipe("a red circle", seed=3, **SMALL)
    mask = Image.new("L", before.size, 0)
    mask.paste(255, (32, 0, 64, 64))
    after = pipe.img2img("a green star", image=before, mask=mask, strength=1.0, seed=4)
    preserved, masked = (0, 0, 32, 64), (32, 0, 64, 64)
    assert not differ(before.crop(preserved), after.crop(preserved))
    assert differ(before.crop(masked), after.crop(masked))
    loose = pipe.img2img("a green star", image=before, mask=mask, strength=1.0, seed=4, keep_unmasked=False)
    assert differ(before.crop(preserved), loose.crop(preserved))


def test_a_thin_mask_is_not_overlooked(pipe: ZImagePipeline) -> None:
    before = pipe("a red circle", seed=3, **SMALL)
    mask = Image.new("L", before.size, 0)
    for x in range(3, 64, 8):
        mask.paste(255, (x, 0, x + 2, 64))
    after = pipe.img2img("a green star", image=before, mask=mask, strength=1.0, seed=4)
    assert differ(before, after)
    assert not differ(before.crop((0, 0, 3, 64)), after.crop((0, 0, 3, 64)))


def test_multi_pass_refines_to_the_final_size(pipe: ZImagePipeline) -> None:
    image = pipe.generate_multipass(
        "A detailed portrait",
        final_width=128,
        final_height=128,
        passes=[
            {"scale": 0.5, "steps": 9},
            {"scale": 1.0, "steps": 9, "strength": 0.5},
        ],
        seed=5,
    )
    assert image.size == (128, 128)
    assert differ(image, pipe("A detailed portrait", width=128, height=128, seed=5))


def test_encoded_here_and_generated_there(pipe: ZImagePipeline, demo_folder: Path, tmp_path: Path) -> None:
    """`save` replaces the torch.save of the documentation: an embedding is never a pickle."""
    encoder = PromptEncoder.from_pretrained(demo_folder, device="cpu", torch_dtype="float32")
    embeddings = encoder.encode("a red circle")
    embeddings.save(tmp_path / "embeddings.safetensors")

    there = ZImagePipeline.from_pretrained_generator_only(str(demo_folder), torch_dtype=torch.float32, dit_device="cpu")
    embeddings = PromptEmbedding.load(tmp_path / "embeddings.safetensors")
    image = there.generate_from_embeddings(embeddings, seed=6, **SMALL)
    assert not differ(image, pipe("a red circle", seed=6, **SMALL))


def test_an_embedding_from_another_model_is_refused(pipe: ZImagePipeline, tiny_folder: Path) -> None:
    stranger = PromptEncoder.from_pretrained(tiny_folder, device="cpu").encode("a red circle")
    with pytest.raises(EmbeddingMismatch, match="embeddings: comes from a different text encoder"):
        pipe.generate_from_embeddings(stranger, **SMALL)


def test_guidance_needs_an_embedding_with_a_negative_prompt(pipe: ZImagePipeline, demo_folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(demo_folder, device="cpu", torch_dtype="float32")
    with pytest.raises(InvalidRequest, match="guidance_scale: needs the embedding of a negative prompt"):
        pipe.generate_from_embeddings(encoder.encode("a red circle"), guidance_scale=2.0, **SMALL)


def test_a_list_of_prompts_returns_an_image_for_each(pipe: ZImagePipeline) -> None:
    prompts = ["a red circle", "a blue star", "the sea", "two green hearts"]
    together = pipe(prompts, seed=8, **SMALL)
    assert len(together) == 4
    for prompt, image in zip(prompts, together, strict=True):
        assert not differ(image, pipe(prompt, seed=8, **SMALL))


@pytest.mark.numeric
def test_four_prompts_encoded_together_equal_four_alone(demo_folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(demo_folder, device="cpu", torch_dtype="float32")
    prompts = ["a red circle", "a blue star above a green cross on a gray background", "the sea", "a"]
    for together, alone in zip(encoder.encode_batch(prompts), map(encoder.encode, prompts), strict=True):
        assert together.embeds.shape == alone.embeds.shape
        assert_close_relative(together.embeds, alone.embeds, roundings=ONE_FORWARD)
        assert together.prompt_tokens == alone.prompt_tokens
        assert together.prompt_sha256 == alone.prompt_sha256


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_layer": -3},
        {"layer_weights": {"-2": 0.5, "-3": 0.5}},
        {"template": "photography"},
        {"system_prompt": "Paint with mud."},
        {"thinking_content": "A circle is round."},
        {"assistant_content": "Here it is."},
        {"force_think_block": True},
        {"guidance_scale": 2.0},
        {"steps": 3},
        {"shift": 1.0},
        {"seed": 2},
    ],
    ids=lambda field: next(iter(field)),
)
def test_every_field_about_the_image_changes_it(pipe: ZImagePipeline, field: dict[str, object]) -> None:
    options: dict[str, object] = {"seed": 1, **SMALL}
    steps = {"num_inference_steps": field["steps"]} if "steps" in field else field
    assert differ(pipe('a "red" circle', **options), pipe('a "red" circle', **{**options, **steps}))


def test_quotes_and_white_space_go_where_they_are_to(pipe: ZImagePipeline) -> None:
    plain = pipe("a red circle", seed=1, **SMALL)
    assert differ(pipe('a "red"   circle', seed=1, **SMALL), plain)
    assert not differ(pipe('a "red"   circle', seed=1, strip_quotes=True, clean_whitespace=True, **SMALL), plain)
