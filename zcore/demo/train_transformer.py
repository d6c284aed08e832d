"""Stage `transformer`: train the model that generates the latents.

Trains a `ZImageTransformer2DModel` by flow matching in Z-Image's convention: from x = (1 - sigma) * image + sigma *
noise at t = 1 - sigma it predicts image - noise. The VAE and the text encoder are trained before and frozen. The
curriculum starts with single objects and landscapes; groups follow when single objects are right, pairs when groups
are. `predict` is a dense batched forward on the weights of the stock module; a test compares it with the stock forward.
"""
# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.demo.architecture import AXES_DIMS, LATENT_CHANNELS, PIXELS_PER_LATENT, ROPE_THETA, SHIFT, make_transformer
from zcore.demo.captions import caption
from zcore.demo.check import Verdict, judge
from zcore.demo.optimizers import Optimizers
from zcore.demo.render import Pixels, Style, render
from zcore.demo.train_text_encoder import PromptReader, hidden_states, load_text_encoder
from zcore.demo.train_vae import decode, encode, load_vae
from zcore.demo.training_folder import TrainingFolder
from zcore.demo.vocabulary import BACKGROUNDS, Composition, Kind, random_composition

STATE: Final = "transformer.pt"
SHORT: Final = 32
LONG: Final = 64
"""Padded caption lengths used in training. The positions of the image tokens depend on them."""
_SQUARE: Final = (128, 128)
_POOLS: Final[dict[tuple[int, int], int]] = {_SQUARE: 12000, (96, 160): 3000, (160, 96): 3000, (256, 256): 3000}
_ORDER: Final[tuple[Kind, ...]] = (
    *("object", "pair", "object", "pair", "count", "object", "pair", "object", "pair", "scene"),
)
"""Kinds of the rendered compositions, repeated: objects and pairs are most, since they have the most combinations."""
_MIXTURES: Final[tuple[dict[Kind, float], ...]] = (
    {"object": 0.85, "scene": 0.15},
    {"object": 0.6, "scene": 0.12, "count": 0.28},
    {"object": 0.27, "scene": 0.1, "count": 0.18, "pair": 0.45},
)
"""Shares of the kinds at each level of the curriculum."""
_GATES: Final[tuple[tuple[Kind, float], ...]] = (("object", 0.85), ("count", 0.75))
"""Kind and share of right images that are required for the next level."""
_LONG_SHARE: Final = 0.12
_EMPTY_SHARE: Final = 0.05
_EARLY, _LATE, _REFINE_FROM = 0.4, 0.1, 0.75
"""Share of extra samples near pure noise before and after this fraction of the training: layout first, then edges."""
_LARGE: Final = (256, 256)
_OTHER_SIZES: Final = (((96, 160), 0.15), ((160, 96), 0.15), (_LARGE, 0.35))
"""Sizes and their shares of the batches. The largest learns slowest: with a tenth, its shapes stayed broken."""


@dataclass(frozen=True)
class Frame:
    """What depends only on the sizes of a batch: rotary factors, and which image tokens are padding."""

    image: Tensor  # (N, 16), complex rotary factors
    words: Tensor  # (L, 16), complex
    is_padding: Tensor  # (N,)


class FrozenParts:
    """VAE, text encoder and tokenizer, for training and checking the transformer."""

    def __init__(self, training: TrainingFolder) -> None:
        self.device = training.device
        self.vae = load_vae(training)
        self.text_encoder = load_text_encoder(training)
        self.reader = PromptReader(training.path("tokenizer"), training.device)

    def words(
        self, compositions: Sequence[Composition | None], rng: random.Random, length: int
    ) -> tuple[Tensor, Tensor]:
        """Write captions of exactly this padded length.

        Returns their features (B, length, 128) and which of the tokens are words (B, length).
        """
        return self.features([self.caption(composition, rng, length) for composition in compositions], length)

    def features(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        prompts = self.reader.read(texts, length)
        with torch.no_grad():
            return hidden_states(self.text_encoder, prompts), prompts.mask

    def caption(self, composition: Composition | None, rng: random.Random, length: int) -> str:
        """Return a random caption of this padded length, or of any length if none is found."""
        if composition is None:
            return ""
        for _ in range(50):
            text = caption(composition, rng, long=length > SHORT)
            if -(-self.reader.length(text) // SHORT) * SHORT == length:
                return text
        return caption(composition, rng)


def train_transformer(training: TrainingFolder, steps: int = 7800, batch: int = 32, check_every: int = 300) -> Any:
    """Train, from the saved state if there is one, and return the transformer with averaged weights."""
    torch.manual_seed(0)
    frozen, model = FrozenParts(training), fresh_transformer().to(training.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and _is_inside(n)]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = Optimizers(matrices, others, steps, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.05)
    state, first, spent, level, samples = training.load(STATE), 0, 0.0, 0, 0
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizers.load_state_dict(state["optimizers"])
        first, spent, level, samples = state["step"], state["seconds"], state["level"], state["samples"]
    pools: dict[tuple[int, int], Pool] = {}
    rng, started, smooth = random.Random(first), time.time(), 0.0
    for step in range(first, steps):
        size, length, rows = _choose_shape(rng, batch, level)
        if size not in pools:
            pools[size] = Pool(training, frozen.vae, size, _POOLS[size])
        patches, weights, compositions = pools[size].draw(rng, rows, _MIXTURES[level])
        captioned = [None if rng.random() < _EMPTY_SHARE else composition for composition in compositions]
        words, real = frozen.words(captioned, rng, length)
        sigma = sample_sigmas(rows, _EARLY if step < _REFINE_FROM * steps else _LATE).to(patches.device)[:, None, None]
        noise = torch.randn_like(patches)
        frame = frame_of(size[0], size[1], words.shape[1], patches.device)
        with torch.autocast(patches.device.type, torch.bfloat16):
            output = predict(model, (1 - sigma) * patches + sigma * noise, 1 - sigma.flatten(), words, real, frame)
        error = (output.float() - (patches - noise)).square().mean(-1)  # (B, N)
        loss = (error * weights).mean()
        loss.backward()
        optimizers.step(step)
        _update_average(average, model, step)
        samples += rows
        smooth = 0.98 * smooth + 0.02 * loss.item() if smooth else loss.item()
        if (step + 1) % check_every == 0 or step + 1 == steps:
            figures = check(frozen, average, 32, level)
            seconds = spent + time.time() - started
            training.log(
                "transformer", step=step + 1, samples=samples, seconds=seconds, loss=smooth, level=level, **figures
            )
            if level < len(_GATES) and figures[_GATES[level][0]] >= _GATES[level][1]:
                level += 1
            states = {"model": model, "average": average, "optimizers": optimizers}
            tensors = {name: part.state_dict() for name, part in states.items()}
            training.save(STATE, {**tensors, "step": step + 1, "seconds": seconds, "level": level, "samples": samples})
    return average


def load_transformer(training: TrainingFolder) -> Any:
    """Return the trained transformer with averaged weights, frozen."""
    state = training.load(STATE)
    if state is None:
        raise FileNotFoundError(f"no trained transformer in {training.folder}: run the stage `transformer` first")
    model = make_transformer().to(training.device)
    model.load_state_dict(state["average"])
    return model.eval().requires_grad_(False)


def predict(model: Any, patches: Tensor, t: Tensor, words: Tensor, real: Tensor, frame: Frame) -> Tensor:
    """Return image - noise, (B, N, 64): the stock forward for a batch of one size.

    Takes patches (B, N, 64), t (B,), and words (B, L, 128), of which `real` (B, L) are not padding; L is a multiple
    of 32.
    """
    count = patches.shape[1]
    patches = functional.pad(patches, (0, 0, 0, frame.is_padding.shape[0] - count))
    moment = model.t_embedder(t * model.t_scale)  # (B, 192)
    image = model.all_x_embedder["2-1"](patches)
    image = torch.where(frame.is_padding[None, :, None], model.x_pad_token.to(image.dtype), image)
    for block in model.noise_refiner:
        image = _block(block, image, frame.image, moment)
    context = model.cap_embedder(words)
    context = torch.where(real[..., None], context, model.cap_pad_token.to(context.dtype))
    for block in model.context_refiner:
        context = _block(block, context, frame.words, None)
    joint = torch.cat((image, context), 1)
    rotary = torch.cat((frame.image, frame.words))
    for block in model.layers:
        joint = _block(block, joint, rotary, moment)
    return model.all_final_layer["2-1"](joint[:, :count], moment)


def frame_of(width: int, height: int, length: int, device: torch.device | str) -> Frame:
    """Return the positions of all tokens: captions count on the first axis, images follow them on the other two."""
    side = 2 * PIXELS_PER_LATENT
    rows, columns = height // side, width // side
    padding = -(rows * columns) % 32
    grid = [(length + 1, y, x) for y in range(rows) for x in range(columns)] + [(0, 0, 0)] * padding
    is_padding = torch.arange(len(grid), device=device) >= rows * columns
    return Frame(_rotary(grid, device), _rotary([(1 + i, 0, 0) for i in range(length)], device), is_padding)


def to_patches(latents: Tensor) -> Tensor:
    """Convert latents (B, 16, H, W) to tokens (B, H / 2 * W / 2, 64) in the stock order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def to_latents(patches: Tensor, height: int, width: int) -> Tensor:
    """Convert tokens back to latents; height and width are in latents."""
    b, c = patches.shape[0], LATENT_CHANNELS
    return patches.view(b, height // 2, width // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


@torch.no_grad()
def sample(
    frozen: FrozenParts, model: Any, texts: list[str], width: int, height: int, seed: int, steps: int = 8
) -> list[Pixels]:
    """Generate images for these captions with guidance 0. All must have the same padded length."""
    words, real = frozen.features(texts, SHORT)
    frame = frame_of(width, height, words.shape[1], words.device)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    noise = torch.randn(len(texts), LATENT_CHANNELS, rows, columns, generator=torch.Generator().manual_seed(seed))
    x = to_patches(noise.to(words.device))
    sigmas = [*(shifted(1 - i / steps) for i in range(steps)), 0.0]
    for sigma, following in pairwise(sigmas):
        x = x + (sigma - following) * predict(
            model, x, torch.full((len(x),), 1 - sigma, device=x.device), words, real, frame
        )
    return decode(frozen.vae, to_latents(x, rows, columns))


def shifted(u: float) -> float:
    """Apply the shift of the schedule to a time from 0 to 1: 3u / (1 + 2u)."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def check(frozen: FrozenParts, model: Any, count: int, level: int, seed: int = 1) -> dict[str, float]:
    """Return the share of right images of each kind; kinds above this level count as 0."""
    figures: dict[str, float] = {}
    for held_out in (False, True):
        verdicts = _verdicts(frozen, model, "object", count, held_out, seed)
        suffix = "_held_out" if held_out else ""
        for name in ("background", "colour", "shape", "position", "size"):
            figures[name + suffix] = sum(bool(getattr(v, name)) for v in verdicts) / count
        figures["object" + suffix] = sum(v.all_right for v in verdicts) / count
    later: tuple[tuple[Kind, int, tuple[tuple[int, int], ...]], ...] = (
        ("scene", 0, (_SQUARE,)),
        ("count", 1, (_SQUARE,)),
        ("pair", 2, (_SQUARE, (96, 160), _LARGE)),
    )
    for kind, least, sizes in later:
        for size in sizes:
            name = kind if size == _SQUARE else f"{kind}_{size[0]}x{size[1]}"
            right = (
                [v.all_right for v in _verdicts(frozen, model, kind, count // 2, False, seed, size)]
                if level >= least
                else [False]
            )
            figures[name] = sum(right) / len(right)
    return figures


def _verdicts(
    frozen: FrozenParts,
    model: Any,
    kind: Kind,
    count: int,
    held_out: bool,
    seed: int,
    size: tuple[int, int] = _SQUARE,
) -> list[Verdict]:
    rng = random.Random(seed)
    compositions = [random_composition(rng, kind, held_out) for _ in range(count)]
    images = sample(frozen, model, [frozen.caption(p, rng, SHORT) for p in compositions], *size, seed)
    return [judge(composition, pixels) for composition, pixels in zip(compositions, images, strict=True)]


class Pool:
    """Latents of many rendered compositions of one size, encoded once and cached in the training folder."""

    def __init__(
        self, training: TrainingFolder, vae: Any, size: tuple[int, int], count: int, style: Style = "plain"
    ) -> None:
        self.size = size
        self._compositions = [
            random_composition(random.Random(f"{size} {i}"), _ORDER[i % len(_ORDER)]) for i in range(count)
        ]
        digest = hashlib.sha256(repr(self._compositions).encode()).hexdigest()[:8]
        name = f"latents-{style}-{size[0]}x{size[1]}-{digest}.pt"
        tensors = training.load(name)
        if tensors is None:
            tensors = self._render(vae, style)
            training.save(name, tensors)
        self._patches: Tensor = tensors["patches"]
        self._weights: Tensor = tensors["weights"]

    def draw(
        self, rng: random.Random, rows: int, mixture: dict[Kind, float]
    ) -> tuple[Tensor, Tensor, list[Composition]]:
        """Return random patches (B, N, 64), their weights in the loss (B, N), and their compositions."""
        kinds = rng.choices(list(mixture), list(mixture.values()), k=rows)
        chosen = [self._index(rng, kind) for kind in kinds]
        return self._patches[chosen].float(), self._weights[chosen].float(), [self._compositions[i] for i in chosen]

    def _index(self, rng: random.Random, kind: Kind) -> int:
        offsets = [i for i, other in enumerate(_ORDER) if other == kind]
        return rng.randrange(len(self._compositions) // len(_ORDER)) * len(_ORDER) + rng.choice(offsets)

    def _render(self, vae: Any, style: Style) -> dict[str, Tensor]:
        patches: list[Tensor] = []
        weights: list[Tensor] = []
        for start in range(0, len(self._compositions), 20):
            rng = random.Random(f"{self.size} {style} {start}")
            part = self._compositions[start : start + 20]
            images = [render(composition, *self.size, rng, style) for composition in part]
            with torch.autocast(vae.device.type, torch.bfloat16):
                latents = encode(vae, images)
            patches.append(to_patches(latents.float()).half())
            weights.append(torch.stack([_weights(p, pixels) for p, pixels in zip(part, images, strict=True)]).half())
        return {"patches": torch.cat(patches), "weights": torch.cat(weights).to(patches[0].device)}


def fresh_transformer() -> Any:
    """Return an untrained transformer that starts close to a solution: it returns its input with the opposite sign."""
    model = make_transformer()
    with torch.no_grad():
        width = LATENT_CHANNELS * 4
        embedder, final = model.all_x_embedder["2-1"], model.all_final_layer["2-1"].linear
        embedder.weight.zero_()[:width].fill_diagonal_(1.0)
        embedder.bias.zero_()
        final.weight.zero_()[:, :width].fill_diagonal_(-0.6)
        final.bias.zero_()
        nn.init.orthogonal_(model.cap_embedder[1].weight, gain=1.0)
        nn.init.normal_(model.x_pad_token, std=0.5)
        nn.init.normal_(model.cap_pad_token, std=0.5)
        model.all_final_layer["2-1"].adaLN_modulation[1].weight.normal_(std=0.01)
        for block in (*model.noise_refiner, *model.layers):
            modulation = block.adaLN_modulation[0]
            modulation.weight.normal_(std=0.01)
            modulation.bias.zero_()
            gates = modulation.bias.view(4, -1)
            gates[1].fill_(0.15)
            gates[3].fill_(0.15)
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            block.attention.norm_q.weight.fill_(1.4)
            block.attention.norm_k.weight.fill_(1.4)
    return model


def _block(block: Any, x: Tensor, rotary: Tensor, moment: Tensor | None) -> Tensor:
    attention, feed = block.attention, block.feed_forward
    if moment is None:
        x = x + block.attention_norm2(_attend(attention, block.attention_norm1(x), rotary))
        return x + block.ffn_norm2(feed(block.ffn_norm1(x)))
    scale1, gate1, scale2, gate2 = block.adaLN_modulation(moment)[:, None].chunk(4, dim=2)
    attended = _attend(attention, block.attention_norm1(x) * (1 + scale1), rotary)
    x = x + gate1.tanh() * block.attention_norm2(attended)
    return x + gate2.tanh() * block.ffn_norm2(feed(block.ffn_norm1(x) * (1 + scale2)))


def _attend(attention: Any, x: Tensor, rotary: Tensor) -> Tensor:
    heads = attention.heads
    query = _apply_rotary(attention.norm_q(attention.to_q(x).unflatten(-1, (heads, -1))), rotary)  # (B, heads, S, 32)
    key = _apply_rotary(attention.norm_k(attention.to_k(x).unflatten(-1, (heads, -1))), rotary)
    value = attention.to_v(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    # Written out: the fused kernel's backward in bfloat16 is several times slower on a CPU.
    strength = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # (B, heads, S, S)
    seen = strength.softmax(-1) @ value
    return attention.to_out[0](seen.transpose(1, 2).flatten(2))


def _apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary[:, None]  # (B, S, heads, 16)
    return torch.view_as_real(pairs).flatten(3).transpose(1, 2)


def _rotary(positions: list[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    angles = [
        torch.outer(
            torch.tensor([position[axis] for position in positions], dtype=torch.float64),
            ROPE_THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size),
        )
        for axis, size in enumerate(AXES_DIMS)
    ]
    joined = torch.cat(angles, 1).float()
    return torch.polar(torch.ones_like(joined), joined).to(device)


def _is_inside(name: str) -> bool:
    return any(part in name for part in ("layers.", "refiner.")) and "adaLN" not in name


def _choose_shape(rng: random.Random, batch: int, level: int) -> tuple[tuple[int, int], int, int]:
    """Return image size, padded caption length and rows of the next batch; the first level has one size and length."""
    if level == 0:
        return _SQUARE, SHORT, batch
    draw = rng.random()
    for size, share in _OTHER_SIZES:
        draw -= share
        if draw < 0:
            return size, SHORT, batch if size != _LARGE else batch // 2
    return _SQUARE, LONG if draw < _LONG_SHARE else SHORT, batch


def sample_sigmas(rows: int, noisy: float = 0.4) -> Tensor:
    """Return noise levels (rows,), stratified over the schedule.

    The share `noisy` of them is replaced by levels from 0.8 to 1, where layout and shape are decided.
    """
    even = (torch.randperm(rows) + torch.rand(rows)) / rows
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    return torch.where(torch.rand(rows) < noisy, 0.8 + 0.2 * torch.rand(rows), sigma)


def _weights(composition: Composition, pixels: Pixels) -> Tensor:
    """Return the weight of each token in the loss, mean 1: edges of objects most, plain background least."""
    image = torch.from_numpy(pixels).float()
    height, width = image.shape[:2]
    if composition.kind == "scene":
        return torch.ones(height * width // 256)
    away = (image - torch.tensor(BACKGROUNDS[composition.background])).norm(dim=-1) > 48
    share = away.float().view(height // 16, 16, width // 16, 16).mean((1, 3)).flatten()  # of each token
    weights = 0.7 + 0.7 * share + 1.2 * ((share > 0.03) & (share < 0.97)).float()
    return weights / weights.mean()


@torch.no_grad()
def _update_average(average: Any, model: Any, step: int) -> None:
    keep = min(0.998, (1 + step) / (10 + step))
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)
