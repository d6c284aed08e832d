"""Stage `vae`: train the autoencoder between pixels and latents.

Trains an `AutoencoderKL` on rendered images, first on crops, then on whole images of several sizes. A little noise on
the latents makes the decoder tolerate small errors of the transformer. `scaling_factor` and `shift_factor` are measured
afterwards, so that latents have mean 0 and standard deviation 1, as Z-Image's convention requires. Gate: the checker
must read at least 95 % of the reconstructions like the originals.
"""
# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import random
import time
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from zcore.demo.architecture import make_vae
from zcore.demo.optimizers import Optimizers
from zcore.demo.render import Pixels, render
from zcore.demo.training_folder import TrainingFolder
from zcore.demo.vocabulary import Kind, random_composition

STATE: Final = "vae.pt"
_KINDS: Final[tuple[Kind, ...]] = ("object", "object", "object", "count", "pair", "scene")
_SIZES: Final = ((128, 128), (128, 128), (96, 160), (160, 96), (256, 256))


def train_vae(training: TrainingFolder, steps: int = 1300, pool: int = 4000, batch: int = 16) -> Any:
    """Train on `pool` images, from the saved state if there is one, and return the VAE with its scaling measured."""
    torch.manual_seed(0)
    vae = make_vae().to(training.device, memory_format=torch.channels_last)
    matrices = [p for p in vae.parameters() if p.ndim == 2]
    others = [p for p in vae.parameters() if p.ndim != 2]
    optimizers = Optimizers(matrices, others, steps, muon_lr=0.01, adam_lr=2e-3, decay_from=0.5)
    state, first, spent = training.load(STATE), 0, 0.0
    if state:
        vae.load_state_dict(state["vae"])
        optimizers.load_state_dict(state["optimizers"])
        first, spent = state["step"], state["seconds"]
    images = _pool(pool, seed=1) if first < steps else {}
    rng, started = random.Random(first), time.time()
    for step in range(first, steps):
        crop = 64 if step < 0.6 * steps else 0
        pixels = _batch(images, rng, batch, crop).to(
            training.device, memory_format=torch.channels_last
        )  # (B, 3, H, W) of -1..1
        with torch.autocast(pixels.device.type, torch.bfloat16):
            loss, error = _loss(vae, pixels)
        loss.backward()
        optimizers.step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            training.log(
                "vae", step=step + 1, seconds=seconds, loss=loss.item(), psnr_db=-10 * float(np.log10(error / 4))
            )
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            training.save(
                STATE,
                {"vae": vae.state_dict(), "optimizers": optimizers.state_dict(), "step": step + 1, "seconds": seconds},
            )
    return load_vae(training)


def load_vae(training: TrainingFolder) -> Any:
    """Return the trained VAE, frozen, with shift and scale measured on fresh images."""
    state = training.load(STATE)
    if state is None:
        raise FileNotFoundError(f"no trained VAE in {training.folder}: run the stage `vae` first")
    vae = make_vae().to(training.device)
    vae.load_state_dict(state["vae"])
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(
            to_signal(_random_images(256, 128, 128, random.Random(2))).to(training.device)
        ).latent_dist.mode()
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    return vae


def to_signal(images: list[Pixels]) -> Tensor:
    """Convert images of one size to a tensor (B, 3, H, W) of -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(signal: Tensor) -> list[Pixels]:
    """Convert a tensor (B, 3, H, W) back to images; values outside -1..1 are clipped."""
    bytes_ = ((signal.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(bytes_.permute(0, 2, 3, 1).cpu().numpy())


def encode(vae: Any, images: list[Pixels]) -> Tensor:
    """Encode images of one size to latents (B, 16, H / 8, W / 8) of mean 0 and standard deviation 1."""
    with torch.no_grad():
        latents = vae.encode(to_signal(images).to(vae.device)).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> list[Pixels]:
    """Decode latents (B, 16, H / 8, W / 8) of mean 0 and standard deviation 1 to images."""
    with torch.no_grad():
        return to_images(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)


def _loss(vae: Any, pixels: Tensor) -> tuple[Tensor, float]:
    latents = vae.encode(pixels).latent_dist
    sample = latents.sample()
    strength = 0.15 * torch.rand(len(sample), 1, 1, 1, device=sample.device) * sample.detach().std()
    difference = vae.decode(sample + strength * torch.randn_like(sample)).sample - pixels
    error = difference.square().mean()
    divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    return 0.5 * difference.abs().mean() + 4 * error + 2e-4 * divergence, error.item()


def _pool(count: int, seed: int) -> dict[tuple[int, int], list[Pixels]]:
    rng = random.Random(seed)
    shares = {(128, 128): 0.7, (96, 160): 0.1, (160, 96): 0.1, (256, 256): 0.1}
    return {size: _random_images(int(count * share), *size, rng) for size, share in shares.items()}


def _random_images(count: int, width: int, height: int, rng: random.Random) -> list[Pixels]:
    return [render(random_composition(rng, rng.choice(_KINDS)), width, height, rng) for _ in range(count)]


def _batch(pool: dict[tuple[int, int], list[Pixels]], rng: random.Random, batch: int, crop: int) -> Tensor:
    size = rng.choice(_SIZES)
    if crop:
        return to_signal([_crop(rng.choice(pool[size]), crop, rng) for _ in range(batch)])
    return to_signal(rng.sample(pool[size], max(1, batch // 4 * 128 * 128 // (size[0] * size[1]))))


def _crop(pixels: Pixels, side: int, rng: random.Random) -> Pixels:
    top, left = rng.randrange(0, pixels.shape[0] - side + 1), rng.randrange(0, pixels.shape[1] - side + 1)
    return pixels[top : top + side, left : left + side]
