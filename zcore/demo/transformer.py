"""Stage `transformer`: the part that paints.

Trains a ZImageTransformer2DModel by flow matching in Z-Image's convention: from x = (1 - sigma) * picture + sigma *
noise at t = 1 - sigma it puts out picture - noise. The VAE and the text encoder are ready and frozen. It begins with
one object and landscapes; groups come when single objects hold, pairs when groups hold. A dense batched forward on
the stock module's own weights (`paint`) does the work; a test compares it with the stock forward.
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
from zcore.demo.muon import Optimizers
from zcore.demo.render import Pixels, Style, render
from zcore.demo.text_encoder import PromptReader, hidden_states, load_text_encoder
from zcore.demo.vae import decode, encode, load_vae
from zcore.demo.vocabulary import BACKGROUNDS, Kind, Picture, draw_picture
from zcore.demo.workplace import Workplace

STATE: Final = "transformer.pt"
SHORT: Final = 32
LONG: Final = 64
"""Padded caption lengths that training shows; the place of the picture's tokens follows from it."""
_SQUARE: Final = (128, 128)
_POOLS: Final[dict[tuple[int, int], int]] = {_SQUARE: 12000, (96, 160): 3000, (160, 96): 3000, (256, 256): 3000}
_ORDER: Final[tuple[Kind, ...]] = (
    *("object", "pair", "object", "pair", "count", "object", "pair", "object", "pair", "scene"),
)
"""Kinds of the rendered pictures, again and again: pairs can be combined in most ways, so they are most."""
_MIXTURES: Final[tuple[dict[Kind, float], ...]] = (
    {"object": 0.85, "scene": 0.15},
    {"object": 0.6, "scene": 0.12, "count": 0.28},
    {"object": 0.27, "scene": 0.1, "count": 0.18, "pair": 0.45},
)
"""What is shown at each level of the curriculum."""
_GATES: Final[tuple[tuple[Kind, float], ...]] = (("object", 0.85), ("count", 0.75))
"""What has to be all right, and how often, before the next level begins."""
_LONG_SHARE: Final = 0.12
_EMPTY_SHARE: Final = 0.05
_EARLY, _LATE, _REFINE_FROM = 0.4, 0.1, 0.75
"""Share of extra samples near pure noise, before and after this part of the training: layout first, then edges."""
_LARGE: Final = (256, 256)
_OTHER_SIZES: Final = (((96, 160), 0.15), ((160, 96), 0.15), (_LARGE, 0.35))
"""Share of the batches; the large size learns slowest: with a tenth of the batches its shapes stayed broken."""


@dataclass(frozen=True)
class Frame:
    """Everything about a batch that only depends on its sizes: rotary turns, and which image tokens are padding."""

    image: Tensor  # (N, 16), complex: the rotary turns
    words: Tensor  # (L, 16), complex
    is_padding: Tensor  # (N,)


class Painter:
    """The three trained parts, as training and checking use them."""

    def __init__(self, place: Workplace) -> None:
        self.device = place.device
        self.vae = load_vae(place)
        self.text_encoder = load_text_encoder(place)
        self.reader = PromptReader(place.path("tokenizer"), place.device)

    def words(self, pictures: Sequence[Picture | None], rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
        """Fresh captions whose padded length is exactly `length`: features (B, length, 128) and which are words (B,
        length).
        """
        return self.features([self.caption(picture, rng, length) for picture in pictures], length)

    def features(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        prompts = self.reader.read(texts, length)
        with torch.no_grad():
            return hidden_states(self.text_encoder, prompts), prompts.mask

    def caption(self, picture: Picture | None, rng: random.Random, length: int) -> str:
        """Words for this picture that fill this padded length, where the draw finds such."""
        if picture is None:
            return ""
        for _ in range(50):
            text = caption(picture, rng, long=length > SHORT)
            if -(-self.reader.length(text) // SHORT) * SHORT == length:
                return text
        return caption(picture, rng)


def train_transformer(place: Workplace, steps: int = 7800, batch: int = 32, check_every: int = 300) -> Any:
    """Train from the kept state, or anew; gives the transformer with averaged weights."""
    torch.manual_seed(0)
    painter, model = Painter(place), fresh_transformer().to(place.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and _is_inside(n)]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = Optimizers(matrices, others, steps, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.05)
    state, first, spent, level, samples = place.load(STATE), 0, 0.0, 0, 0
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizers.load_state_dict(state["optimizers"])
        first, spent, level, samples = state["step"], state["seconds"], state["level"], state["samples"]
    pools: dict[tuple[int, int], Pool] = {}
    rng, started, smooth = random.Random(first), time.time(), 0.0
    for step in range(first, steps):
        size, length, rows = _draw_shape(rng, batch, level)
        if size not in pools:
            pools[size] = Pool(place, painter.vae, size, _POOLS[size])
        patches, weights, pictures = pools[size].draw(rng, rows, _MIXTURES[level])
        said = [None if rng.random() < _EMPTY_SHARE else picture for picture in pictures]
        words, real = painter.words(said, rng, length)
        sigma = draw_sigmas(rows, _EARLY if step < _REFINE_FROM * steps else _LATE).to(patches.device)[:, None, None]
        noise = torch.randn_like(patches)
        frame = frame_of(size[0], size[1], words.shape[1], patches.device)
        with torch.autocast(patches.device.type, torch.bfloat16):
            output = paint(model, (1 - sigma) * patches + sigma * noise, 1 - sigma.flatten(), words, real, frame)
        error = (output.float() - (patches - noise)).square().mean(-1)  # (B, N)
        loss = (error * weights).mean()
        loss.backward()
        optimizers.step(step)
        _follow(average, model, step)
        samples += rows
        smooth = 0.98 * smooth + 0.02 * loss.item() if smooth else loss.item()
        if (step + 1) % check_every == 0 or step + 1 == steps:
            figures = check(painter, average, 32, level)
            seconds = spent + time.time() - started
            place.log(
                "transformer", step=step + 1, samples=samples, seconds=seconds, loss=smooth, level=level, **figures
            )
            if level < len(_GATES) and figures[_GATES[level][0]] >= _GATES[level][1]:
                level += 1
            kept = {"model": model.state_dict(), "average": average.state_dict(), "optimizers": optimizers.state_dict()}
            place.save(STATE, {**kept, "step": step + 1, "seconds": seconds, "level": level, "samples": samples})
    return average


def load_transformer(place: Workplace) -> Any:
    """The trained transformer with averaged weights."""
    state = place.load(STATE)
    if state is None:
        raise FileNotFoundError(f"no trained transformer in {place.folder}: run the stage `transformer` first")
    model = make_transformer().to(place.device)
    model.load_state_dict(state["average"])
    return model.eval().requires_grad_(False)


def paint(model: Any, patches: Tensor, t: Tensor, words: Tensor, real: Tensor, frame: Frame) -> Tensor:
    """The stock forward for a batch of one size: patches (B, N, 64), t (B,), words (B, L, 128), L a multiple of 32;
    gives (B, N, 64).
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
    turns = torch.cat((frame.image, frame.words))
    for block in model.layers:
        joint = _block(block, joint, turns, moment)
    return model.all_final_layer["2-1"](joint[:, :count], moment)


def frame_of(width: int, height: int, length: int, device: torch.device | str) -> Frame:
    """Places of all tokens: captions count on the first axis, the picture stands behind them on the other two."""
    side = 2 * PIXELS_PER_LATENT
    rows, columns = height // side, width // side
    padding = -(rows * columns) % 32
    grid = [(length + 1, y, x) for y in range(rows) for x in range(columns)] + [(0, 0, 0)] * padding
    is_padding = torch.arange(len(grid), device=device) >= rows * columns
    return Frame(_turns(grid, device), _turns([(1 + i, 0, 0) for i in range(length)], device), is_padding)


def to_patches(latents: Tensor) -> Tensor:
    """Latents (B, 16, H, W) as tokens (B, H / 2 * W / 2, 64), in the stock order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def to_latents(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_patches`; height and width in latents."""
    b, c = patches.shape[0], LATENT_CHANNELS
    return patches.view(b, height // 2, width // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


@torch.no_grad()
def sample(
    painter: Painter, model: Any, texts: list[str], width: int, height: int, seed: int, steps: int = 8
) -> list[Pixels]:
    """Paint these captions, guidance 0; all must have the same padded length."""
    words, real = painter.features(texts, SHORT)
    frame = frame_of(width, height, words.shape[1], words.device)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    noise = torch.randn(len(texts), LATENT_CHANNELS, rows, columns, generator=torch.Generator().manual_seed(seed))
    x = to_patches(noise.to(words.device))
    sigmas = [*(shifted(1 - i / steps) for i in range(steps)), 0.0]
    for sigma, following in pairwise(sigmas):
        x = x + (sigma - following) * paint(
            model, x, torch.full((len(x),), 1 - sigma, device=x.device), words, real, frame
        )
    return decode(painter.vae, to_latents(x, rows, columns))


def shifted(u: float) -> float:
    """A share of the way, moved towards the noise by the schedule's shift: 3u / (1 + 2u)."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def check(painter: Painter, model: Any, count: int, level: int, seed: int = 1) -> dict[str, float]:
    """The share of captions of each kind whose picture is right; kinds above this level are not asked for."""
    figures: dict[str, float] = {}
    for held_out in (False, True):
        verdicts = _verdicts(painter, model, "object", count, held_out, seed)
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
                [v.all_right for v in _verdicts(painter, model, kind, count // 2, False, seed, size)]
                if level >= least
                else [False]
            )
            figures[name] = sum(right) / len(right)
    return figures


def _verdicts(
    painter: Painter,
    model: Any,
    kind: Kind,
    count: int,
    held_out: bool,
    seed: int,
    size: tuple[int, int] = _SQUARE,
) -> list[Verdict]:
    rng = random.Random(seed)
    pictures = [draw_picture(rng, kind, held_out) for _ in range(count)]
    painted = sample(painter, model, [painter.caption(p, rng, SHORT) for p in pictures], *size, seed)
    return [judge(picture, pixels) for picture, pixels in zip(pictures, painted, strict=True)]


class Pool:
    """Latents of many rendered pictures of one size, encoded once and kept in the workplace."""

    def __init__(self, place: Workplace, vae: Any, size: tuple[int, int], count: int, style: Style = "plain") -> None:
        self.size = size
        self._pictures = [draw_picture(random.Random(f"{size} {i}"), _ORDER[i % len(_ORDER)]) for i in range(count)]
        digest = hashlib.sha256(repr(self._pictures).encode()).hexdigest()[:8]
        name = f"latents-{style}-{size[0]}x{size[1]}-{digest}.pt"
        kept = place.load(name)
        if kept is None:
            kept = self._render(vae, style)
            place.save(name, kept)
        self._patches: Tensor = kept["patches"]
        self._weights: Tensor = kept["weights"]

    def draw(self, rng: random.Random, rows: int, mixture: dict[Kind, float]) -> tuple[Tensor, Tensor, list[Picture]]:
        """Patches (B, N, 64), their weights in the loss (B, N), and what is on them."""
        kinds = rng.choices(list(mixture), list(mixture.values()), k=rows)
        chosen = [self._index(rng, kind) for kind in kinds]
        return self._patches[chosen].float(), self._weights[chosen].float(), [self._pictures[i] for i in chosen]

    def _index(self, rng: random.Random, kind: Kind) -> int:
        places = [i for i, other in enumerate(_ORDER) if other == kind]
        return rng.randrange(len(self._pictures) // len(_ORDER)) * len(_ORDER) + rng.choice(places)

    def _render(self, vae: Any, style: Style) -> dict[str, Tensor]:
        patches: list[Tensor] = []
        weights: list[Tensor] = []
        for start in range(0, len(self._pictures), 20):
            rng = random.Random(f"{self.size} {style} {start}")
            part = self._pictures[start : start + 20]
            drawn = [render(picture, *self.size, rng, style) for picture in part]
            with torch.autocast(vae.device.type, torch.bfloat16):
                latents = encode(vae, drawn)
            patches.append(to_patches(latents.float()).half())
            weights.append(torch.stack([_weights(p, pixels) for p, pixels in zip(part, drawn, strict=True)]).half())
        return {"patches": torch.cat(patches), "weights": torch.cat(weights).to(patches[0].device)}


def fresh_transformer() -> Any:
    """An untrained transformer that begins near the right picture: it gives what it gets, with the other sign."""
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


def _block(block: Any, x: Tensor, turns: Tensor, moment: Tensor | None) -> Tensor:
    attention, feed = block.attention, block.feed_forward
    if moment is None:
        x = x + block.attention_norm2(_attend(attention, block.attention_norm1(x), turns))
        return x + block.ffn_norm2(feed(block.ffn_norm1(x)))
    scale1, gate1, scale2, gate2 = block.adaLN_modulation(moment)[:, None].chunk(4, dim=2)
    attended = _attend(attention, block.attention_norm1(x) * (1 + scale1), turns)
    x = x + gate1.tanh() * block.attention_norm2(attended)
    return x + gate2.tanh() * block.ffn_norm2(feed(block.ffn_norm1(x) * (1 + scale2)))


def _attend(attention: Any, x: Tensor, turns: Tensor) -> Tensor:
    heads = attention.heads
    query = _turned(attention.norm_q(attention.to_q(x).unflatten(-1, (heads, -1))), turns)  # (B, heads, S, 32)
    key = _turned(attention.norm_k(attention.to_k(x).unflatten(-1, (heads, -1))), turns)
    value = attention.to_v(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    # Written out: the fused kernel's backward in bfloat16 is several times slower on a CPU.
    strength = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # (B, heads, S, S)
    seen = strength.softmax(-1) @ value
    return attention.to_out[0](seen.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns[:, None]  # (B, S, heads, 16)
    return torch.view_as_real(pairs).flatten(3).transpose(1, 2)


def _turns(places: list[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    angles = [
        torch.outer(
            torch.tensor([place[axis] for place in places], dtype=torch.float64),
            ROPE_THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size),
        )
        for axis, size in enumerate(AXES_DIMS)
    ]
    joined = torch.cat(angles, 1).float()
    return torch.polar(torch.ones_like(joined), joined).to(device)


def _is_inside(name: str) -> bool:
    return any(part in name for part in ("layers.", "refiner.")) and "adaLN" not in name


def _draw_shape(rng: random.Random, batch: int, level: int) -> tuple[tuple[int, int], int, int]:
    """Picture size, padded caption length and rows of the next batch; the first level has one size and length."""
    if level == 0:
        return _SQUARE, SHORT, batch
    draw = rng.random()
    for size, share in _OTHER_SIZES:
        draw -= share
        if draw < 0:
            return size, SHORT, batch if size != _LARGE else batch // 2
    return _SQUARE, LONG if draw < _LONG_SHARE else SHORT, batch


def draw_sigmas(rows: int, noisy: float = 0.4) -> Tensor:
    """Stratified over the schedule, this share drawn again from .8 to 1, where layout and shape are decided."""
    even = (torch.randperm(rows) + torch.rand(rows)) / rows
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    return torch.where(torch.rand(rows) < noisy, 0.8 + 0.2 * torch.rand(rows), sigma)


def _weights(picture: Picture, pixels: Pixels) -> Tensor:
    """How much each token counts, mean 1: edges of objects most, plain ground least."""
    image = torch.from_numpy(pixels).float()
    height, width = image.shape[:2]
    if picture.kind == "scene":
        return torch.ones(height * width // 256)
    away = (image - torch.tensor(BACKGROUNDS[picture.background])).norm(dim=-1) > 48
    share = away.float().view(height // 16, 16, width // 16, 16).mean((1, 3)).flatten()  # of each token
    weights = 0.7 + 0.7 * share + 1.2 * ((share > 0.03) & (share < 0.97)).float()
    return weights / weights.mean()


@torch.no_grad()
def _follow(average: Any, model: Any, step: int) -> None:
    keep = min(0.998, (1 + step) / (10 + step))
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)
