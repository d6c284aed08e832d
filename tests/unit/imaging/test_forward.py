"""Our forward gives, bit for bit, what diffusers' gives on the same weights."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zcore.imaging.geometry import LatentSize
from zcore.imaging.model.transformer import Sample, VelocityModel
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
