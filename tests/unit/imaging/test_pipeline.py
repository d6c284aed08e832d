"""One generation: what it tells, what it gives, how it ends early, and that the next one does not notice."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from tests.unit.imaging.conftest import TREE
from zcore.errors import GenerationCanceled, InvalidRequest, OutOfMemory, PromptTooLong
from zcore.imaging.encode import encode_image, read_parameters
from zcore.imaging.pipeline import Progress, ZImagePipeline
from zcore.request import GenerationRequest, LongPromptMode

REQUEST = GenerationRequest(prompt="a red circle", width=64, height=80, steps=4, seed=11)


def pixels(pipeline: ZImagePipeline, request: GenerationRequest = REQUEST) -> list[bytes]:
    return [picture.image.tobytes() for picture in pipeline.generate(request).images]


def several(n: int, seed: int = 11) -> GenerationRequest:
    return GenerationRequest(prompt="a red circle", width=64, height=80, steps=4, seed=seed, n=n)


def test_a_picture_has_the_size_asked_for_its_seed_and_its_timings(tiny_pipeline: ZImagePipeline) -> None:
    result = tiny_pipeline.generate(REQUEST)
    (picture,) = result.images
    assert (picture.image.size, picture.image.mode) == ((64, 80), "RGB")
    assert (picture.seed, picture.index) == (11, 0)
    assert len(set(picture.image.tobytes())) > 50
    assert min(result.metrics.encode_ms, result.metrics.denoise_ms, result.metrics.decode_ms) > 0
    assert result.metrics.peak_vram_mb == 0


def test_progress_is_told_before_every_piece_of_work_and_counts_all_pictures(tiny_pipeline: ZImagePipeline) -> None:
    told: list[Progress] = []
    tiny_pipeline.generate(several(2), told.append)
    assert told == [
        Progress("encode", 0, 8),
        *(Progress("denoise", step, 8) for step in range(4)),
        Progress("decode", 4, 8),
        *(Progress("denoise", step, 8) for step in range(4, 8)),
        Progress("decode", 8, 8),
    ]


def test_each_of_several_pictures_is_what_it_would_be_alone(tiny_pipeline: ZImagePipeline) -> None:
    together = tiny_pipeline.generate(several(3, seed=2**63 - 2)).images
    seeds = [2**63 - 2, 2**63 - 1, 0]
    assert [(picture.seed, picture.index) for picture in together] == list(zip(seeds, range(3), strict=True))
    assert [picture.image.tobytes() for picture in together] == [
        pixels(tiny_pipeline, several(1, seed))[0] for seed in seeds
    ]


def test_the_same_request_paints_the_same_file_in_another_pipeline(
    tiny_pipeline: ZImagePipeline, tiny_folder: Path
) -> None:
    another = ZImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32, dit_device="cpu")
    files = [
        encode_image(pipeline.generate(REQUEST).images[0].image, REQUEST, 0, pipeline.describe()).content
        for pipeline in (tiny_pipeline, another)
    ]
    assert files[0] == files[1]


def test_another_seed_another_picture(tiny_pipeline: ZImagePipeline) -> None:
    assert pixels(tiny_pipeline, several(1, seed=12)) != pixels(tiny_pipeline)


def test_a_picture_of_several_can_be_painted_again_from_what_it_says(tiny_pipeline: ZImagePipeline) -> None:
    request = several(2)
    second = tiny_pipeline.generate(request).images[1]
    parameters = read_parameters(encode_image(second.image, request, 1, tiny_pipeline.describe()).content)
    assert parameters is not None
    assert pixels(tiny_pipeline, parameters.request) == [second.image.tobytes()]


@pytest.mark.parametrize(
    "stop", [Progress("encode", 0, 8), Progress("denoise", 2, 8), Progress("decode", 4, 8), Progress("denoise", 5, 8)]
)
def test_a_generation_stopped_anywhere_leaves_the_next_one_bit_equal(
    tiny_pipeline: ZImagePipeline, stop: Progress
) -> None:
    before = pixels(tiny_pipeline)
    told: list[Progress] = []

    def cancel(progress: Progress) -> None:
        told.append(progress)
        if progress == stop:
            raise GenerationCanceled("the caller left")

    with pytest.raises(GenerationCanceled, match="the caller left"):
        tiny_pipeline.generate(several(2, seed=99), cancel)
    assert told[-1] == stop
    assert pixels(tiny_pipeline) == before


def test_memory_that_does_not_suffice_is_said_and_the_next_generation_is_bit_equal(
    tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pixels(tiny_pipeline)

    def too_large(*_arguments: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nGPU 0 has ...")

    with monkeypatch.context() as patched:
        patched.setattr("zcore.imaging.model.transformer.VelocityModel.velocities", too_large)
        with pytest.raises(OutOfMemory, match=r"^64x80 does not fit the memory of cpu: .*3\.00 GiB\.$") as failure:
            tiny_pipeline.generate(REQUEST)
    # What failed must not keep its tensors alive through the error.
    assert failure.value.__context__ is None
    assert pixels(tiny_pipeline) == before


def longer_than(tokens: int, mode: LongPromptMode, steps: int = 1) -> GenerationRequest:
    """A prompt of one token more, its layout included."""
    overhead = len("user\n") + len("\n") + len("assistant\n") + 3
    return GenerationRequest(
        prompt="a" * (tokens + 1 - overhead), width=64, height=64, steps=steps, seed=1, long_prompt_mode=mode
    )


def test_the_longest_prompt_is_painted_whole(tiny_pipeline: ZImagePipeline) -> None:
    metrics = tiny_pipeline.generate(longer_than(1503, "refuse")).metrics
    assert (metrics.prompt_tokens, metrics.kept_tokens) == (1504, 1504)


def test_a_longer_prompt_is_refused_where_the_request_says_so(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(PromptTooLong, match=r"is 1505 tokens .* at most 1504"):
        tiny_pipeline.generate(longer_than(1504, "refuse"))


def test_a_longer_negative_prompt_is_refused_as_that(tiny_pipeline: ZImagePipeline) -> None:
    guided = replace(REQUEST, negative_prompt="a" * 2000, guidance_scale=1.0, long_prompt_mode="refuse")
    with pytest.raises(PromptTooLong) as refusal:
        tiny_pipeline.generate(guided)
    assert [error.pointer for error in refusal.value.errors] == ["/negative_prompt"]


def test_a_longer_prompt_is_made_to_fit_by_its_mode(tiny_pipeline: ZImagePipeline) -> None:
    modes: tuple[LongPromptMode, ...] = ("truncate", "interpolate", "pool", "attention_pool")
    results = [tiny_pipeline.generate(longer_than(2000, mode)) for mode in modes]
    assert {(one.metrics.prompt_tokens, one.metrics.kept_tokens) for one in results} == {(2001, 1504)}
    assert len({one.images[0].image.tobytes() for one in results}) == 4


def test_truncation_takes_the_prompts_end_and_not_the_layouts(tiny_pipeline: ZImagePipeline) -> None:
    """Whatever stands behind the limit does not count, and the rest is as if it had never been written."""
    cut = replace(longer_than(2000, "truncate"), prompt="a" * 2000 + "z" * 500)
    fitting = replace(longer_than(1503, "refuse"), seed=cut.seed)
    assert pixels(tiny_pipeline, cut) == pixels(tiny_pipeline, fitting)


def test_a_template_changes_the_picture_and_an_unknown_one_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    plain = GenerationRequest(prompt="a sunset", width=64, height=64, steps=2)
    dressed = GenerationRequest(prompt="a sunset", template="photography", width=64, height=64, steps=2)
    assert pixels(tiny_pipeline, plain) != pixels(tiny_pipeline, dressed)
    with pytest.raises(InvalidRequest, match="template: "):
        tiny_pipeline.generate(GenerationRequest(prompt="a sunset", template="nowhere", width=64, height=64))


def test_remembered_prompts_are_painted_as_computed_ones(tiny_folder: Path, tiny_pipeline: ZImagePipeline) -> None:
    remembering = ZImagePipeline.from_pretrained(
        tiny_folder, torch_dtype="float32", dit_device="cpu", embedding_cache_bytes=2**20
    )
    assert pixels(remembering) == pixels(remembering) == pixels(tiny_pipeline)
    assert (remembering.cache_use().hits, remembering.cache_use().misses) == (1, 1)
    assert tiny_pipeline.cache_use().hits == 0


def test_steps_and_shift_change_the_picture(tiny_pipeline: ZImagePipeline) -> None:
    pictures = {
        pixels(tiny_pipeline, GenerationRequest(prompt="a", width=64, height=64, steps=steps, shift=shift))[0]
        for steps, shift in [(2, 3.0), (3, 3.0), (2, 1.0)]
    }
    assert len(pictures) == 3


def test_calling_the_pipeline_gives_one_picture(tiny_pipeline: ZImagePipeline) -> None:
    called = tiny_pipeline("a red circle", width=64, height=80, num_inference_steps=4, seed=11)
    assert called.tobytes() == pixels(tiny_pipeline)[0]


def test_a_generator_is_its_seed_and_moves_on(tiny_pipeline: ZImagePipeline) -> None:
    generator = torch.Generator().manual_seed(11)
    first, second = (
        tiny_pipeline("a red circle", width=64, height=80, num_inference_steps=4, generator=generator) for _ in range(2)
    )
    assert first.tobytes() == pixels(tiny_pipeline)[0]
    assert second.tobytes() != first.tobytes()
    with pytest.raises(InvalidRequest, match="seed"):
        tiny_pipeline("a", seed=1, generator=generator)


def test_without_a_seed_every_call_is_another_picture(tiny_pipeline: ZImagePipeline) -> None:
    pictures = {tiny_pipeline("a", width=64, height=64, num_inference_steps=1).tobytes() for _ in range(2)}
    assert len(pictures) == 2


def test_a_call_outside_the_bounds_names_every_field(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        tiny_pipeline(" ", width=65, num_inference_steps=0)
    assert {error.pointer for error in refusal.value.errors} == {"/prompt", "/width", "/steps"}


def test_the_description_names_what_decides_the_pixels_and_no_path(
    tiny_pipeline: ZImagePipeline, tiny_folder: Path
) -> None:
    described = tiny_pipeline.describe()
    assert described["transformer_dtype"] == described["vae_dtype"] == "float32"
    assert described["torch"] == torch.__version__
    assert described["attention_backend"] == "sdpa"
    assert described["model"] == "checkpoint"
    assert "vae_tiles" not in described
    assert tiny_pipeline.describe(replace(REQUEST, tiled_vae=True))["vae_tiles"] == "512 px, overlapping by 64 px"
    assert not any(str(tiny_folder.parent) in value for value in described.values())


def test_bfloat16_paints_nearly_the_same_picture(tiny_folder: Path, tiny_pipeline: ZImagePipeline) -> None:
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
