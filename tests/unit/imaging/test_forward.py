"""Our network and its forward equal those of diffusers on the same weights, bit for bit."""

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

from tests.numerics import ONE_FORWARD, ONE_KERNEL, assert_close_relative
from zcore.checkpoint.geometry import LatentSize
from zcore.imaging.kernels.attention import sdpa
from zcore.imaging.network.forward import begin, finish, forward, run_layers
from zcore.imaging.network.velocity_model import Sample, VelocityModel, conditions_of
from zcore.imaging.sampling.schedule import sigmas
from zcore.imaging.weights.loader import Placement, load_transformer

CPU = torch.device("cpu")
LEVELS = sigmas(8, 3.0)
# Multiples of 32 tokens and others, square, tall and wide.
SIZES = [LatentSize(16, 16), LatentSize(10, 14), LatentSize(32, 12), LatentSize(12, 40)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Run each test in both dtypes."""
    return request.param


@pytest.fixture(scope="module", params=["tiny_folder", "demo_folder"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Run each test on random weights and on the demo checkpoint."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, dtype: torch.dtype) -> ZImageTransformer2DModel:
    """diffusers' network."""
    network = ZImageTransformer2DModel.from_pretrained(checkpoint / "transformer", dtype=dtype)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(checkpoint: Path, dtype: torch.dtype) -> VelocityModel:
    """Our network on the same weights."""
    return VelocityModel(load_transformer(checkpoint, Placement(CPU, dtype)), CPU, dtype)


@pytest.mark.parametrize(("size", "words"), [*product(SIZES, [1, 32, 41]), (LatentSize(32, 32), 300)])
def test_every_step_of_one_image(
    reference: ZImageTransformer2DModel, ours: VelocityModel, size: LatentSize, words: int
) -> None:
    prompt, latents = prompt_of(reference, words), noise_of(size)
    plan = ours.plan(prompt, size, LEVELS)
    # bfloat16 takes several times as long; its steps differ as those of float32 do.
    for step in range(8) if reference.dtype == torch.float32 else (0, 3, 7):
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
        # The longer image has the shorter caption, so that both have 96 tokens.
        [(LatentSize(16, 16), 20, 2), (LatentSize(8, 16), 40, 6)],
        [(LatentSize(32, 32), 20, 2), (LatentSize(32, 24), 280, 6)],
    ],
    ids=["equal", "of one length", "prompts", "everything", "one length by chance", "long"],
)
def test_several_images_at_once(
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


@pytest.mark.numeric
def test_a_plan_made_with_others_equals_one_made_alone(
    reference: ZImageTransformer2DModel, ours: VelocityModel, dtype: torch.dtype
) -> None:
    samples = [Sample(prompt_of(reference, words), SIZES[0], LEVELS) for words in (20, 90)]
    latents = noise_of(SIZES[0])
    for sample, with_others in zip(samples, ours.plans(samples), strict=True):
        alone = ours.plan(sample.prompt_embeds, sample.size, sample.sigmas)
        velocities = [ours.velocity(plan, latents, 3) for plan in (alone, with_others)]
        # With fewer than four rows a product's last bits depend on their number; in bfloat16 the
        # difference grows to a few per cent, so the sharp comparison is the one in float32.
        alike = [velocity.to(dtype) for velocity in velocities]
        assert_close_relative(*alike, roundings=ONE_FORWARD if dtype == torch.float32 else ONE_KERNEL)


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


def test_skipping_layers_equals_a_network_without_them(
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


def test_a_step_never_waits_for_the_device_and_uses_no_complex_numbers(
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


def test_a_plan_can_be_used_again(reference: ZImageTransformer2DModel, ours: VelocityModel) -> None:
    plan, latents = ours.plan(prompt_of(reference, 20), SIZES[1], LEVELS), noise_of(SIZES[1])
    first = ours.velocity(plan, latents, 3)
    ours.velocity(plan, noise_of(SIZES[1], seed=1), 5)
    assert torch.equal(latents, noise_of(SIZES[1]))
    assert torch.equal(ours.velocity(plan, latents, 3), first)


class _Operators(TorchDispatchMode):
    """Records which operators ran, and on which dtypes."""

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
    """Return velocities: the negative of the output of diffusers' forward."""
    t = torch.tensor([1.0 - level for level in levels])
    frames = [one.to(reference.dtype).unsqueeze(1) for one in latents]
    return [-one.squeeze(1).float() for one in reference(frames, t, list(prompts), return_dict=False)[0]]
