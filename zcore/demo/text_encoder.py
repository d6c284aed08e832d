"""Stage `text-encoder`: the part that reads the caption.

Trains a Qwen3Model, alone and before the transformer, to say on its last five tokens (the chat layout's end, which
has seen the whole prompt) what is on the picture: each attribute value has a code, the codes are orthogonal, and the
target is their sum. Read where the pipeline reads, at `hidden_states[-2]`, after the RMS norm that the transformer
begins with. It stays frozen afterwards, so the transformer never has to learn reading and painting at once.
"""
# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from zcore.demo.architecture import TEXT_WIDTH, make_text_encoder
from zcore.demo.captions import caption, chatter
from zcore.demo.muon import Optimizers
from zcore.demo.tokenizer import PAD
from zcore.demo.vocabulary import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, Kind, Picture, draw_picture
from zcore.demo.workplace import Workplace

STATE: Final = "text_encoder.pt"
READ_TOKENS: Final = 5
"""`<|im_end|>`, line end, `<|im_start|>`, `assistant`, line end: where the meaning is put."""
_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "layout": LAYOUTS,
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "second shape": SHAPES,
    "second colour": tuple(COLOURS),
}
_KINDS: Final[tuple[Kind, ...]] = ("object", "object", "count", "pair", "pair", "scene")
_SPREAD: Final = 1.7
"""Wanted deviation of the outputs: far from what bfloat16 rounds away."""


@dataclass(frozen=True)
class Prompts:
    """A batch of tokenized prompts: ids (B, L), padded on the right, and their lengths (B,)."""

    ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]  # (B, L)


class PromptReader:
    """The tokenizer with the chat layout around a prompt, as the pipeline puts it."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._pad, self._device = self._tokenizer.token_to_id(PAD), device

    def read(self, prompts: list[str], multiple: int = 1) -> Prompts:
        """Tokenize these prompts, chat layout included; the padded length is a multiple of `multiple`."""
        return self.read_layouts([chat(prompt) for prompt in prompts], multiple)

    def length(self, prompt: str) -> int:
        """Tokens of this prompt, chat layout included."""
        return len(self._tokenizer.encode(chat(prompt)).ids)

    def read_layouts(self, texts: list[str], multiple: int = 1) -> Prompts:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        longest = -(-max(map(len, rows)) // multiple) * multiple
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=self._device)
        return Prompts(ids, torch.tensor([len(row) for row in rows], device=self._device))


def chat(prompt: str, system: str = "", thought: str | None = None) -> str:
    """The prompt as one turn of a Qwen chat, ready for the answer."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    after = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{after}"


def train_text_encoder(place: Workplace, steps: int = 400, batch: int = 64) -> Any:
    """Train from the kept state, or anew; gives the text encoder, frozen."""
    torch.manual_seed(0)
    model = make_text_encoder().to(place.device)
    reader = PromptReader(place.path("tokenizer"), place.device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers = Optimizers(matrices, others, steps, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.05)
    state, first, spent = place.load(STATE), 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first, spent = state["step"], state["seconds"]
    codes, rng, started = attribute_codes(place.device), random.Random(first), time.time()
    for step in range(first, steps):
        pictures = [_draw(rng) for _ in range(batch)]
        prompts = reader.read_layouts([_layout(picture, rng, long=step % 5 == 0) for picture in pictures], 8)
        wanted = torch.stack([meaning(picture, codes) for picture in pictures])  # (B, 128)
        with torch.autocast(place.device, torch.bfloat16):
            hidden = hidden_states(model, prompts)
        ends = _ends(hidden.float(), prompts.lengths)  # (B, 5, 128)
        loss = (_normed(ends) - _normed(wanted)[:, None]).square().mean()
        spread = ends.square().mean(-1).sqrt().log() - torch.tensor(_SPREAD).log()
        (loss + 0.01 * spread.square().mean()).backward()
        optimizers.step(step)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            figures = {"step": step + 1, "seconds": seconds, "loss": loss.item()}
            place.log("text_encoder", **figures, **accuracy(model, reader, codes))
            place.save(
                STATE,
                {
                    "model": model.state_dict(),
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                },
            )
    return load_text_encoder(place)


def load_text_encoder(place: Workplace) -> Any:
    """The trained text encoder, ready to use."""
    state = place.load(STATE)
    if state is None:
        raise FileNotFoundError(f"no trained text encoder in {place.folder}: run the stage `text-encoder` first")
    model = make_text_encoder().to(place.device)
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False)


def hidden_states(model: Any, prompts: Prompts) -> Tensor:
    """What the pipeline reads of these prompts: the un-normed output of the last layer but one, (B, L, 128)."""
    output = model(
        input_ids=prompts.ids, attention_mask=prompts.mask.long(), output_hidden_states=True, use_cache=False
    )
    return output.hidden_states[-2]


def attribute_codes(device: str) -> dict[tuple[str, str], Tensor]:
    """One vector of norm 1 for each attribute value, all at right angles; ('', '') is the empty caption."""
    names = [("", ""), *((attribute, value) for attribute, values in _ATTRIBUTES.items() for value in values)]
    generator = torch.Generator().manual_seed(7)
    rows = torch.linalg.qr(torch.randn(TEXT_WIDTH, TEXT_WIDTH, generator=generator))[0].to(device)
    return {name: rows[index] for index, name in enumerate(names)}


def meaning(picture: Picture | None, codes: dict[tuple[str, str], Tensor]) -> Tensor:
    """The sum of the codes of what is on the picture; None is the empty caption."""
    return torch.stack([codes[said] for said in _said(picture)]).sum(0)


def accuracy(
    model: Any, reader: PromptReader, codes: dict[tuple[str, str], Tensor], count: int = 200
) -> dict[str, float]:
    """The share of captions whose every attribute is read back: seen, held-out and long wordings."""
    return {
        "all_right_seen": _all_right(model, reader, codes, count, held_out=False, long=False),
        "all_right_held_out": _all_right(model, reader, codes, count, held_out=True, long=False),
        "all_right_long": _all_right(model, reader, codes, count, held_out=False, long=True),
    }


@torch.no_grad()
def _all_right(
    model: Any, reader: PromptReader, codes: dict[tuple[str, str], Tensor], count: int, held_out: bool, long: bool
) -> float:
    rng = random.Random(99)
    kinds: tuple[Kind, ...] = ("object", "count", "pair", "scene")
    pictures = [draw_picture(rng, kinds[i % 4], held_out) for i in range(count)]
    prompts = reader.read([caption(picture, rng, held_out, long) for picture in pictures])
    ends = _ends(hidden_states(model, prompts), prompts.lengths).mean(1)  # (B, 128)
    return sum(read_back(end, codes, picture) for end, picture in zip(ends, pictures, strict=True)) / count


def read_back(end: Tensor, codes: dict[tuple[str, str], Tensor], picture: Picture) -> bool:
    """Whether the strongest value of each attribute that this picture has is the right one."""
    for attribute, value in _said(picture):
        strengths = {name: float(end @ code) for name, code in codes.items() if name[0] == attribute}
        if max(strengths, key=lambda name: strengths[name]) != (attribute, value):
            return False
    return True


def _said(picture: Picture | None) -> list[tuple[str, str]]:
    if picture is None:
        return [("", "")]
    said = [("layout", picture.layout)]
    if picture.kind != "scene":
        said.append(("background", picture.background))
    if picture.kind == "object":
        said.append(("size", picture.size))
    for thing, order in zip(picture.things, ("", "second "), strict=False):
        said += [(f"{order}shape", thing.shape), (f"{order}colour", thing.colour)]
    return said


def _draw(rng: random.Random) -> Picture | None:
    return None if rng.random() < 0.02 else draw_picture(rng, rng.choice(_KINDS))


def _layout(picture: Picture | None, rng: random.Random, long: bool) -> str:
    words = caption(picture, rng, long=long and rng.random() < 0.6) if picture else ""
    if words and rng.random() < 0.15:
        words = _disturbed(words, rng)
    form = rng.random()
    if form < 0.8:
        return chat(words)
    system = chatter(rng) if form < 0.92 else ""
    return chat(words, system, None if form < 0.87 else "" if form < 0.96 else chatter(rng))


def _disturbed(words: str, rng: random.Random) -> str:
    said = words.split(" ")
    stray = "".join(rng.choice("abcdefghiklmnoprstuw") for _ in range(rng.randint(2, 9)))
    said.insert(rng.randint(0, len(said)), stray)
    return " ".join(said)


def _ends(hidden: Tensor, lengths: Tensor) -> Tensor:
    places = lengths[:, None] + torch.arange(-READ_TOKENS, 0, device=lengths.device)  # (B, 5)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
