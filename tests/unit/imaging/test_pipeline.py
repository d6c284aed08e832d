"""One generation: what it reports, what it returns, how it ends early, and that it leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from tests.unit.imaging.conftest import TREE
from zcore.errors import GenerationCanceled, InvalidRequest, OutOfMemory, PromptTooLong
from zcore.image_files.writing import read_parameters, write_image
from zcore.imaging.pipeline import Progress, ZImagePipeline
from zcore.request import GenerationRequest, LongPromptMode

REQUEST = GenerationRequest(prompt="a red circle", width=64, height=80, steps=4, seed=11)


def pixels(pipeline: ZImagePipeline, request: GenerationRequest = REQUEST) -> list[bytes]:
    return [image.image.tobytes() for image in pipeline.generate(request).images]


def several(n: int, seed: int = 11) -> GenerationRequest:
    return GenerationRequest(prompt="a red circle", width=64, height=80, steps=4, seed=seed, n=n)


def test_an_image_has_the_requested_size_its_seed_and_timings(tiny_pipeline: ZImagePipeline) -> None:
    result = tiny_pipeline.generate(REQUEST)
    (image,) = result.images
    assert (image.image.size, image.image.mode) == ((64, 80), "RGB")
    assert (image.seed, image.index) == (11, 0)
    assert len(set(image.image.tobytes())) > 50
    assert min(result.metrics.encode_ms, result.metrics.denoise_ms, result.metrics.decode_ms) > 0
    assert result.metrics.peak_vram_mb == 0


def test_progress_is_reported_before_each_step_and_counts_all_images(tiny_pipeline: ZImagePipeline) -> None:
    reported: list[Progress] = []
    tiny_pipeline.generate(several(2), reported.append)
    assert reported == [
        Progress("encode", 0, 8),
        *(Progress("denoise", step, 8) for step in range(4)),
        Progress("decode", 4, 8),
        *(Progress("denoise", step, 8) for step in range(4, 8)),
        Progress("decode", 8, 8),
    ]


def test_each_of_several_images_is_what_it_would_be_alone(tiny_pipeline: ZImagePipeline) -> None:
    together = tiny_pipeline.generate(several(3, seed=2**63 - 2)).images
    seeds = [2**63 - 2, 2**63 - 1, 0]
    assert [(image.seed, image.index) for image in together] == list(zip(seeds, range(3), strict=True))
    assert [image.image.tobytes() for image in together] == [
        pixels(tiny_pipeline, several(1, seed))[0] for seed in seeds
    ]


def test_the_same_request_gives_the_same_file_in_another_pipeline(
    tiny_pipeline: ZImagePipeline, tiny_folder: Path
) -> None:
    another = ZImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32, dit_device="cpu")
    files = [
        write_image(pipeline.generate(REQUEST).images[0].image, REQUEST, 0, pipeline.describe()).content
        for pipeline in (tiny_pipeline, another)
    ]
    assert files[0] == files[1]


def test_another_seed_another_image(tiny_pipeline: ZImagePipeline) -> None:
    assert pixels(tiny_pipeline, several(1, seed=12)) != pixels(tiny_pipeline)


def test_one_of_several_images_can_be_generated_again_from_its_file(tiny_pipeline: ZImagePipeline) -> None:
    request = several(2)
    second = tiny_pipeline.generate(request).images[1]
    parameters = read_parameters(write_image(second.image, request, 1, tiny_pipeline.describe()).content)
    assert parameters is not None
    assert pixels(tiny_pipeline, parameters.request) == [second.image.tobytes()]


@pytest.mark.parametrize(
    "stop", [Progress("encode", 0, 8), Progress("denoise", 2, 8), Progress("decode", 4, 8), Progress("denoise", 5, 8)]
)
def test_a_generation_stopped_anywhere_leaves_the_next_one_bit_equal(
    tiny_pipeline: ZImagePipeline, stop: Progress
) -> None:
    before = pixels(tiny_pipeline)
    reported: list[Progress] = []

    def cancel(progress: Progress) -> None:
        reported.append(progress)
        if progress == stop:
            raise GenerationCanceled("the caller left")

    with pytest.raises(GenerationCanceled, match="the caller left"):
        tiny_pipeline.generate(several(2, seed=99), cancel)
    assert reported[-1] == stop
    assert pixels(tiny_pipeline) == before


def test_running_out_of_memory_is_reported_and_the_next_generation_is_bit_equal(
    tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pixels(tiny_pipeline)

    def too_large(*_arguments: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nGPU 0 has ...")

    with monkeypatch.context() as patched:
        patched.setattr("zcore.imaging.network.velocity_model.VelocityModel.velocities", too_large)
        with pytest.raises(OutOfMemory, match=r"^64x80 does not fit in the memory of cpu: .*3\.00 GiB\.$") as failure:
            tiny_pipeline.generate(REQUEST)
    # The error must not keep the tensors of the failed generation alive.
    assert failure.value.__context__ is None
    assert pixels(tiny_pipeline) == before


def longer_than(tokens: int, mode: LongPromptMode, steps: int = 1) -> GenerationRequest:
    """A request whose formatted prompt is one token longer."""
    overhead = len("user\n") + len("\n") + len("assistant\n") + 3
    return GenerationRequest(
        prompt="a" * (tokens + 1 - overhead), width=64, height=64, steps=steps, seed=1, long_prompt_mode=mode
    )


def test_the_longest_prompt_is_used_whole(tiny_pipeline: ZImagePipeline) -> None:
    metrics = tiny_pipeline.generate(longer_than(1503, "refuse")).metrics
    assert (metrics.prompt_tokens, metrics.used_tokens) == (1504, 1504)


def test_a_longer_prompt_is_refused_in_mode_refuse(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(PromptTooLong, match=r"is 1505 tokens .* at most 1504"):
        tiny_pipeline.generate(longer_than(1504, "refuse"))


def test_a_longer_negative_prompt_is_refused_on_its_own_field(tiny_pipeline: ZImagePipeline) -> None:
    guided = replace(REQUEST, negative_prompt="a" * 2000, guidance_scale=1.0, long_prompt_mode="refuse")
    with pytest.raises(PromptTooLong) as refusal:
        tiny_pipeline.generate(guided)
    assert [error.pointer for error in refusal.value.errors] == ["/negative_prompt"]


def test_a_longer_prompt_is_compressed_by_its_mode(tiny_pipeline: ZImagePipeline) -> None:
    modes: tuple[LongPromptMode, ...] = ("truncate", "interpolate", "pool", "attention_pool")
    results = [tiny_pipeline.generate(longer_than(2000, mode)) for mode in modes]
    assert {(one.metrics.prompt_tokens, one.metrics.used_tokens) for one in results} == {(2001, 1504)}
    assert len({one.images[0].image.tobytes() for one in results}) == 4


def test_truncation_cuts_the_prompt_and_not_the_chat_format(tiny_pipeline: ZImagePipeline) -> None:
    cut = replace(longer_than(2000, "truncate"), prompt="a" * 2000 + "z" * 500)
    fitting = replace(longer_than(1503, "refuse"), seed=cut.seed)
    assert pixels(tiny_pipeline, cut) == pixels(tiny_pipeline, fitting)


def test_a_template_changes_the_image_and_an_unknown_one_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    plain = GenerationRequest(prompt="a sunset", width=64, height=64, steps=2)
    dressed = GenerationRequest(prompt="a sunset", template="photography", width=64, height=64, steps=2)
    assert pixels(tiny_pipeline, plain) != pixels(tiny_pipeline, dressed)
    with pytest.raises(InvalidRequest, match="template: "):
        tiny_pipeline.generate(GenerationRequest(prompt="a sunset", template="nowhere", width=64, height=64))


def test_cached_embeddings_give_the_same_image_as_computed_ones(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline
) -> None:
    caching = ZImagePipeline.from_pretrained(
        tiny_folder, torch_dtype="float32", dit_device="cpu", embedding_cache_bytes=2**20
    )
    assert pixels(caching) == pixels(caching) == pixels(tiny_pipeline)
    assert (caching.cache_statistics().hits, caching.cache_statistics().misses) == (1, 1)
    assert tiny_pipeline.cache_statistics().hits == 0


def test_steps_and_shift_change_the_image(tiny_pipeline: ZImagePipeline) -> None:
    images = {
        pixels(tiny_pipeline, GenerationRequest(prompt="a", width=64, height=64, steps=steps, shift=shift))[0]
        for steps, shift in [(2, 3.0), (3, 3.0), (2, 1.0)]
    }
    assert len(images) == 3


def test_calling_the_pipeline_returns_one_image(tiny_pipeline: ZImagePipeline) -> None:
    called = tiny_pipeline("a red circle", width=64, height=80, num_inference_steps=4, seed=11)
    assert called.tobytes() == pixels(tiny_pipeline)[0]


def test_a_generator_acts_as_its_seed_and_advances(tiny_pipeline: ZImagePipeline) -> None:
    generator = torch.Generator().manual_seed(11)
    first, second = (
        tiny_pipeline("a red circle", width=64, height=80, num_inference_steps=4, generator=generator) for _ in range(2)
    )
    assert first.tobytes() == pixels(tiny_pipeline)[0]
    assert second.tobytes() != first.tobytes()
    with pytest.raises(InvalidRequest, match="seed"):
        tiny_pipeline("a", seed=1, generator=generator)


def test_without_a_seed_every_call_gives_another_image(tiny_pipeline: ZImagePipeline) -> None:
    images = {tiny_pipeline("a", width=64, height=64, num_inference_steps=1).tobytes() for _ in range(2)}
    assert len(images) == 2


def test_a_call_outside_the_bounds_names_every_field(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        tiny_pipeline(" ", width=65, num_inference_steps=0)
    assert {error.pointer for error in refusal.value.errors} == {"/prompt", "/width", "/num_inference_steps"}


def test_the_description_names_what_decides_the_pixels_and_no_path(
    tiny_pipeline: ZImagePipeline, tiny_folder: Path
) -> None:
    described = tiny_pipeline.describe()
    assert described["transformer_dtype"] == described["vae_dtype"] == "float32"
    assert described["torch"] == torch.__version__
    assert described["attention_backend"] == "sdpa"
    assert described["model"] == "checkpoint"
    assert "vae_tiles" not in described
    tiled = replace(REQUEST, tiled_vae=True)
    assert tiny_pipeline.describe(replace(tiled, width=528))["vae_tiles"] == "512 px, overlapping by 64 px"
    assert "vae_tiles" not in tiny_pipeline.describe(tiled), "an image of one tile is processed in one piece"
    assert not any(str(tiny_folder.parent) in value for value in described.values())


def test_bfloat16_gives_nearly_the_same_image(tiny_folder: Path, tiny_pipeline: ZImagePipeline) -> None:
    half = ZImagePipeline.from_pretrained(tiny_folder, dit_device="cpu", encoder_device="cpu", vae_device="cpu")
    assert half.describe()["transformer_dtype"] == half.describe()["encoder_dtype"] == "bfloat16"
    assert half.describe()["vae_dtype"] == "float32"
    difference = [abs(a - b) for a, b in zip(pixels(half)[0], pixels(tiny_pipeline)[0], strict=True)]
    assert 0 < sum(difference) / len(difference) < 16


def test_the_readme_snippet_runs(tiny_folder: Path, tmp_path: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(
        str(tiny_folder),
        templates_dir=str(TREE / "templates" / "z_image"),
        torch_dtype=torch.bfloat16,
        encoder_device="cpu",
        dit_device="cpu",
        vae_device="cpu",
    )
    image = pipe("A cat sleeping in sunlight", height=64, width=64, num_inference_steps=9)
    image.save(tmp_path / "output.png")
    assert (tmp_path / "output.png").stat().st_size > 0
