"""Stage `text-encoder`: train the model that reads the caption.

Trains a `Qwen3Model`, alone and before the transformer, to represent the composition on its last five tokens (the end
of the chat format, which attends to the whole prompt). Each attribute value has a code, the codes are orthogonal, and
the target is their sum. The loss is taken where the pipeline reads, at `hidden_states[-2]`, after the RMS norm that the
transformer starts with. The text encoder is frozen afterwards, so that the transformer never has to learn reading and
drawing at the same time.
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
from zcore.demo.optimizers import Optimizers
from zcore.demo.train_tokenizer import PAD
from zcore.demo.training_folder import TrainingFolder
from zcore.demo.vocabulary import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, Composition, Kind, random_composition

STATE: Final = "text_encoder.pt"
READ_TOKENS: Final = 5
"""Last tokens of a prompt, which carry the meaning: `<|im_end|>`, line end, `<|im_start|>`, `assistant`, line end."""
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
"""Target standard deviation of the outputs, large enough for the precision of bfloat16."""


@dataclass(frozen=True)
class Prompts:
    """A batch of tokenized prompts: ids (B, L), padded on the right, and their lengths (B,)."""

    ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]  # (B, L)


class PromptReader:
    """The tokenizer with the chat format that the pipeline puts around a prompt."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._pad, self._device = self._tokenizer.token_to_id(PAD), device

    def read(self, prompts: list[str], multiple: int = 1) -> Prompts:
        """Tokenize prompts in the chat format, padded to a multiple of `multiple` tokens."""
        return self.read_formatted([chat(prompt) for prompt in prompts], multiple)

    def length(self, prompt: str) -> int:
        """Return the number of tokens of a prompt in the chat format."""
        return len(self._tokenizer.encode(chat(prompt)).ids)

    def read_formatted(self, texts: list[str], multiple: int = 1) -> Prompts:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        longest = -(-max(map(len, rows)) // multiple) * multiple
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=self._device)
        return Prompts(ids, torch.tensor([len(row) for row in rows], device=self._device))


def chat(prompt: str, system: str = "", thought: str | None = None) -> str:
    """Format a prompt as a message of a Qwen chat, up to the beginning of the answer."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    after = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{after}"


def train_text_encoder(training: TrainingFolder, steps: int = 400, batch: int = 64) -> Any:
    """Train, from the saved state if there is one, and return the text encoder, frozen."""
    torch.manual_seed(0)
    model = make_text_encoder().to(training.device)
    reader = PromptReader(training.path("tokenizer"), training.device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers = Optimizers(matrices, others, steps, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.05)
    state, first, spent = training.load(STATE), 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first, spent = state["step"], state["seconds"]
    codes, rng, started = attribute_codes(training.device), random.Random(first), time.time()
    for step in range(first, steps):
        compositions = [_random_composition(rng) for _ in range(batch)]
        prompts = reader.read_formatted(
            [_prompt_for(composition, rng, long=step % 5 == 0) for composition in compositions], 8
        )
        target = torch.stack([meaning(composition, codes) for composition in compositions])  # (B, 128)
        with torch.autocast(training.device, torch.bfloat16):
            hidden = hidden_states(model, prompts)
        ends = _ends(hidden.float(), prompts.lengths)  # (B, 5, 128)
        loss = (_normed(ends) - _normed(target)[:, None]).square().mean()
        spread = ends.square().mean(-1).sqrt().log() - torch.tensor(_SPREAD).log()
        (loss + 0.01 * spread.square().mean()).backward()
        optimizers.step(step)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            figures = {"step": step + 1, "seconds": seconds, "loss": loss.item()}
            training.log("text_encoder", **figures, **accuracy(model, reader, codes))
            training.save(
                STATE,
                {
                    "model": model.state_dict(),
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                },
            )
    return load_text_encoder(training)


def load_text_encoder(training: TrainingFolder) -> Any:
    """Return the trained text encoder, frozen."""
    state = training.load(STATE)
    if state is None:
        raise FileNotFoundError(f"no trained text encoder in {training.folder}: run the stage `text-encoder` first")
    model = make_text_encoder().to(training.device)
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False)


def hidden_states(model: Any, prompts: Prompts) -> Tensor:
    """Return what the pipeline reads: the output of the last but one layer before its norm, (B, L, 128)."""
    output = model(
        input_ids=prompts.ids, attention_mask=prompts.mask.long(), output_hidden_states=True, use_cache=False
    )
    return output.hidden_states[-2]


def attribute_codes(device: str) -> dict[tuple[str, str], Tensor]:
    """Return orthonormal vectors (128,), one for each attribute value; ('', '') is the empty caption."""
    names = [("", ""), *((attribute, value) for attribute, values in _ATTRIBUTES.items() for value in values)]
    generator = torch.Generator().manual_seed(7)
    rows = torch.linalg.qr(torch.randn(TEXT_WIDTH, TEXT_WIDTH, generator=generator))[0].to(device)
    return {name: rows[index] for index, name in enumerate(names)}


def meaning(composition: Composition | None, codes: dict[tuple[str, str], Tensor]) -> Tensor:
    """Return the sum (128,) of the codes of a composition; None is the empty caption."""
    return torch.stack([codes[attribute] for attribute in _attributes(composition)]).sum(0)


def accuracy(
    model: Any, reader: PromptReader, codes: dict[tuple[str, str], Tensor], count: int = 200
) -> dict[str, float]:
    """Return the share of captions of which every attribute is read back, for seen, held-out and long wordings."""
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
    compositions = [random_composition(rng, kinds[i % 4], held_out) for i in range(count)]
    prompts = reader.read([caption(composition, rng, held_out, long) for composition in compositions])
    ends = _ends(hidden_states(model, prompts), prompts.lengths).mean(1)  # (B, 128)
    return sum(read_back(end, codes, composition) for end, composition in zip(ends, compositions, strict=True)) / count


def read_back(end: Tensor, codes: dict[tuple[str, str], Tensor], composition: Composition) -> bool:
    """Return whether the strongest value of each attribute of this composition is the right one."""
    for attribute, value in _attributes(composition):
        strengths = {name: float(end @ code) for name, code in codes.items() if name[0] == attribute}
        if max(strengths, key=lambda name: strengths[name]) != (attribute, value):
            return False
    return True


def _attributes(composition: Composition | None) -> list[tuple[str, str]]:
    if composition is None:
        return [("", "")]
    attributes = [("layout", composition.layout)]
    if composition.kind != "scene":
        attributes.append(("background", composition.background))
    if composition.kind == "object":
        attributes.append(("size", composition.size))
    for thing, order in zip(composition.things, ("", "second "), strict=False):
        attributes += [(f"{order}shape", thing.shape), (f"{order}colour", thing.colour)]
    return attributes


def _random_composition(rng: random.Random) -> Composition | None:
    return None if rng.random() < 0.02 else random_composition(rng, rng.choice(_KINDS))


def _prompt_for(composition: Composition | None, rng: random.Random, long: bool) -> str:
    words = caption(composition, rng, long=long and rng.random() < 0.6) if composition else ""
    if words and rng.random() < 0.15:
        words = _with_stray_word(words, rng)
    form = rng.random()
    if form < 0.8:
        return chat(words)
    system = chatter(rng) if form < 0.92 else ""
    return chat(words, system, None if form < 0.87 else "" if form < 0.96 else chatter(rng))


def _with_stray_word(words: str, rng: random.Random) -> str:
    tokens = words.split(" ")
    stray = "".join(rng.choice("abcdefghiklmnoprstuw") for _ in range(rng.randint(2, 9)))
    tokens.insert(rng.randint(0, len(tokens)), stray)
    return " ".join(tokens)


def _ends(hidden: Tensor, lengths: Tensor) -> Tensor:
    positions = lengths[:, None] + torch.arange(-READ_TOKENS, 0, device=lengths.device)  # (B, 5)
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
