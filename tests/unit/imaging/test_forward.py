"""Our forward gives, bit for bit, what diffusers' gives on the same weights."""

import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zcore.imaging.geometry import LatentSize
from zcore.imaging.model.attention import sdpa
from zcore.imaging.model.forward import begin, finish, forward, run_layers
from zcore.imaging.model.transformer import Sample, VelocityModel, conditions_of
from zcore.imaging.sampling.schedule import sigmas

CPU = torch.device("cpu")
LEVELS = sigmas(8, 3.0)
# Multiples of 32 tokens and others, square, tall and wide.
SIZES = [LatentSize(16, 16), LatentSize(10, 14), LatentSize(32, 12), LatentSize(12, 40)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each test runs in both arithmetics."""
    return request.param


@pytest.fixture(scope="module", params=["tiny_folder", "demo_folder"])
def reference(request: pytest.FixtureRequest, dtype: torch.dtype) -> ZImageTransformer2DModel:
    """diffusers' network, on random weights and on the demo checkpoint."""
    folder: Path = request.getfixturevalue(request.param) / "transformer"
    return ZImageTransformer2DModel.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(reference: ZImageTransformer2DModel, dtype: torch.dtype) -> VelocityModel:
    """Our forward on the same weights."""
    return VelocityModel(reference, CPU, dtype)


@pytest.mark.parametrize(("size", "words"), [*product(SIZES, [1, 32, 41]), (LatentSize(32, 32), 300)])
def test_every_step_of_one_picture(
    reference: ZImageTransformer2DModel, ours: VelocityModel, size: LatentSize, words: int
) -> None:
    prompt, latents = prompt_of(reference, words), noise_of(size)
    plan = ours.plan(prompt, size, LEVELS)
    for step in range(8):
        (expected,) = by_diffusers(reference, [latents], [LEVELS[step]], [prompt])
        assert expected.std() > 0.1
        assert torch.equal(ours.velocity(plan, latents, step), expected)


@pytest.mark.parametrize(
    "batch",
    [
        [(SIZES[0], 20, 0), (SIZES[0], 20, 0)],
        [(SIZES[0], 20, 0), (SIZES[0], 9, 5), (SIZES[0], 31, 7)],
        [(SIZES[0], 20, 3), (SIZES[0], 90, 1)],
        [(SIZES[1], 20, 0), (SIZES[2], 50, 7), (SIZES[3], 7, 3), (SIZES[0], 33, 3)],
        # The longer picture has the shorter caption, so that both are 96 tokens.
        [(LatentSize(16, 16), 20, 2), (LatentSize(8, 16), 40, 6)],
        [(LatentSize(32, 32), 20, 2), (LatentSize(32, 24), 280, 6)],
    ],
    ids=["equal", "of one length", "prompts", "everything", "one length by chance", "long"],
)
def test_several_pictures_at_once(
    reference: ZImageTransformer2DModel, ours: VelocityModel, batch: list[tuple[LatentSize, int, int]]
) -> None:
    samples = [Sample(prompt_of(reference, words, seed), size, LEVELS) for seed, (size, words, _) in enumerate(batch)]
    latents = [noise_of(size, seed) for seed, (size, _, _) in enumerate(batch)]
    steps = [step for _, _, step in batch]

    velocities = ours.velocities(ours.plans(samples), latents, steps)

    prompts = [sample.prompt_embeds for sample in samples]
    expected = by_diffusers(reference, latents, [LEVELS[step] for step in steps], prompts)
    assert [v.shape for v in velocities] == [v.shape for v in latents]
    assert all(torch.equal(one, other) for one, other in zip(velocities, expected, strict=True))


def test_a_plan_made_among_others_is_the_one_made_alone(
    reference: ZImageTransformer2DModel, ours: VelocityModel, dtype: torch.dtype
) -> None:
    samples = [Sample(prompt_of(reference, words), SIZES[0], LEVELS) for words in (20, 90)]
    latents = noise_of(SIZES[0])
    for sample, among_others in zip(samples, ours.plans(samples), strict=True):
        alone = ours.plan(sample.prompt_embeds, sample.size, sample.sigmas)
        velocities = [ours.velocity(plan, latents, 3) for plan in (alone, among_others)]
        # With fewer than four rows a product's last bits depend on their number, in float32.
        assert torch.allclose(*velocities, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)


def test_samples_of_one_batch_may_have_different_numbers_of_steps(
    reference: ZImageTransformer2DModel, ours: VelocityModel
) -> None:
    prompt = prompt_of(reference, 20)
    short, long = ours.plans([Sample(prompt, SIZES[0], sigmas(2, 3.0)), Sample(prompt, SIZES[0], LEVELS)])
    assert (len(short.modulations), len(long.modulations)) == (2, 8)
    (last, other) = ours.velocities([short, long], [noise_of(SIZES[0])] * 2, [1, 6])
    levels = [sigmas(2, 3.0)[1], LEVELS[6]]
    expected = by_diffusers(reference, [noise_of(SIZES[0])] * 2, levels, [prompt] * 2)
    assert torch.equal(last, expected[0])
    assert torch.equal(other, expected[1])


def test_layers_left_out_are_as_if_the_network_had_none(
    reference: ZImageTransformer2DModel, ours: VelocityModel, dtype: torch.dtype
) -> None:
    prompt, tokens = prompt_of(reference, 20), noise_of(LatentSize(64, 4)).view(1, 64, 64).to(dtype)
    conditions = conditions_of([ours.plan(prompt, LatentSize(16, 16), LEVELS)], [3])
    shorter = copy.deepcopy(reference)
    del shorter.layers[2]
    plan_of_shorter = VelocityModel(shorter, CPU, dtype).plan(prompt, LatentSize(16, 16), LEVELS)
    expected = forward(shorter, tokens, conditions_of([plan_of_shorter], [3]), sdpa)

    shared = run_layers(reference, begin(reference, tokens, conditions, sdpa), range(2), conditions, sdpa)
    skipped = run_layers(reference, shared, range(3, len(reference.layers)), conditions, sdpa)
    whole = run_layers(reference, shared, range(2, len(reference.layers)), conditions, sdpa)

    assert torch.equal(finish(reference, skipped, 64, conditions), expected)
    assert torch.equal(finish(reference, whole, 64, conditions), forward(reference, tokens, conditions, sdpa))
    assert not torch.equal(skipped, whole)


def test_a_step_waits_for_no_number_and_computes_with_none_that_is_complex(
    reference: ZImageTransformer2DModel, ours: VelocityModel
) -> None:
    samples = [Sample(prompt_of(reference, words), size, LEVELS) for words, size in ((20, SIZES[0]), (90, SIZES[1]))]
    plans = ours.plans(samples)
    with _Operators() as operators:
        ours.velocity(plans[0], noise_of(SIZES[0]), 0)
        ours.velocities(plans, [noise_of(SIZES[0]), noise_of(SIZES[1])], [3, 5])
    assert "aten.addmm.default" in operators.names
    assert not operators.names & {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
    assert not any(dtype.is_complex for dtype in operators.dtypes)


def test_a_plan_serves_again(reference: ZImageTransformer2DModel, ours: VelocityModel) -> None:
    plan, latents = ours.plan(prompt_of(reference, 20), SIZES[1], LEVELS), noise_of(SIZES[1])
    first = ours.velocity(plan, latents, 3)
    ours.velocity(plan, noise_of(SIZES[1], seed=1), 5)
    assert torch.equal(latents, noise_of(SIZES[1]))
    assert torch.equal(ours.velocity(plan, latents, 3), first)


class _Operators(TorchDispatchMode):
    """Which operators ran, and on which types."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        self.dtypes |= {given.dtype for given in (*args, result) if isinstance(given, Tensor)}
        return result


def prompt_of(reference: ZImageTransformer2DModel, words: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(words, reference.config.cap_feat_dim, generator=generator).to(reference.dtype)


def noise_of(size: LatentSize, seed: int = 0) -> Tensor:
    return torch.randn(16, size.height, size.width, generator=torch.Generator().manual_seed(seed))


def by_diffusers(
    reference: ZImageTransformer2DModel, latents: Sequence[Tensor], levels: Sequence[float], prompts: Sequence[Tensor]
) -> list[Tensor]:
    """Velocities: the negative of what diffusers' forward gives."""
    t = torch.tensor([1.0 - level for level in levels])
    frames = [one.to(reference.dtype).unsqueeze(1) for one in latents]
    return [-one.squeeze(1).float() for one in reference(frames, t, list(prompts), return_dict=False)[0]]
