"""LoRA files of all common layouts, read as changes of layers under diffusers' names.

Takes the bytes of a safetensors file and the shapes of the existing layers; returns an immutable `Lora` on the CPU.
`lora_keys` says which names are understood, `changes` what a change is. If any tensor of the file is not recognized or
does not fit its layer, `InvalidLora` lists those tensors: a LoRA that is silently applied in part is worse than none.
With `strict=False` such tensors are left out instead, and listed in the LoRA's notes.

Left out of every file, with a note: what has no effect on this model (bundled embeddings, changes that are zero), and
what the file states twice with equal numbers (`qkv` next to `to_q`, `to_k`, `to_v`).

A file may come from anyone. No content of it raises anything but `InvalidLora`, shapes are compared before anything is
computed from them, and what is computed takes no more memory than the network's own weights in bfloat16.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from zcore.errors import InvalidLora
from zcore.foreign_text import excerpt, listed
from zcore.imaging.lora.changes import Kronecker, Lora, LoraLayer, LowRank
from zcore.imaging.lora.lora_keys import (
    BUNDLED_EMBEDDING,
    TEXT_ENCODER,
    Shapes,
    Target,
    find_target,
    flat,
    is_added,
    parse_key,
    targets_of,
)
from zcore.safetensors_header import InvalidSafetensors, read_safetensors_header

FIELD = "loras"

ADAPTER_METADATA = "lora_adapter_metadata"
"""The metadata key under which diffusers stores PEFT's configuration, which has the alphas."""

EQUAL_WITHIN = 1e-5
"""Largest difference of two equal changes, relative to the largest number: two ways to sum a product in float32."""

_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_FLOAT32_BYTES, _BFLOAT16_BYTES = 4, 2


def read_file(path: Path) -> bytes:
    """Return a file's bytes. Raises `InvalidLora`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path.name, f"cannot be read: {error.strerror}") from error


def parse_lora(content: bytes, shapes: Shapes, name: str, *, strict: bool = True) -> Lora:
    """Parse a file's bytes; error messages use `name`. Raises `InvalidLora`, whatever the bytes are.

    Running out of memory is not the file's fault, for what it may take is bounded, and passes.
    """
    try:
        return _parsed(content, shapes, strict=strict)
    except _Unfit as error:
        raise _refused(name, str(error)) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refused(name, f"cannot be read ({type(error).__name__})") from error


class _Unfit(Exception):
    """The file, or a part of it, cannot be used. The message starts with a verb."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a file, under its own key."""

    key: str
    tensor: Tensor


_Parts = Mapping[str, _Part]
"""The tensors that the file has for one layer, by role."""


@dataclass(frozen=True, slots=True)
class _Module:
    """A layer as the file names it, the network's layers that it means (None if there are none), and its tensors."""

    layer: str
    target: Target | None
    parts: _Parts

    @property
    def keys(self) -> list[str]:
        return [part.key for part in self.parts.values()]


@dataclass(slots=True)
class _Sorted:
    """A file's modules, and the keys of what is not applied, by reason."""

    modules: list[_Module] = field(default_factory=list[_Module])
    without_effect: list[str] = field(default_factory=list[str])
    repeated: list[str] = field(default_factory=list[str])
    of_text_encoder: list[str] = field(default_factory=list[str])
    unsupported: list[str] = field(default_factory=list[str])
    unfit: list[str] = field(default_factory=list[str])


class _PeftConfig(msgspec.Struct, frozen=True):
    """The part of PEFT's configuration that affects the meaning of a file."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False


@dataclass(frozen=True, slots=True)
class _Alphas:
    """The alphas of PEFT's configuration in a file's header; None and empty without one."""

    default: float | None
    by_layer: Mapping[str, float]

    def of(self, file_layer: str) -> float | None:
        """Return the alpha for a layer of the file. As in PEFT, an entry names a layer by the end of its name."""
        named = (alpha for layer, alpha in self.by_layer.items() if f".{file_layer}".endswith(f".{layer}"))
        return next(named, self.default)


class _Memory:
    """The memory that products computed from a file may take: that of the network's own layers in bfloat16."""

    def __init__(self, shapes: Shapes) -> None:
        self._limit_bytes = _BFLOAT16_BYTES * sum(out * into for out, into in shapes.values())
        self._used_bytes = 0

    def reserve(self, numbers: int) -> None:
        """Count a product before it is computed. Raises `_Unfit` if there is no memory left for it."""
        self._used_bytes += _FLOAT32_BYTES * numbers
        if self._used_bytes > self._limit_bytes:
            raise _Unfit(
                f"needs more than {self._limit_bytes} bytes once its products are computed, "
                "which is the size of this model in bfloat16"
            )


def _parsed(content: bytes, shapes: Shapes, *, strict: bool) -> Lora:
    tensors, metadata = _loaded(content)
    alphas = _alphas(metadata.get(ADAPTER_METADATA))
    found = _sorted(tensors, targets_of(shapes))
    if strict:
        _refuse_unsupported(found)
    memory = _Memory(shapes)
    layers: dict[str, LoraLayer] = {}
    for module in found.modules:
        try:
            pieces = _pieces(module, alphas, shapes, memory)
        except _Unfit:
            if strict:
                raise
            found.unfit += module.keys
            continue
        repetitions = [_is_repetition(layers, layer, piece, module) for layer, piece in pieces]  # compares every piece
        if any(repetitions):
            found.repeated += module.keys
        layers |= {layer: piece for layer, piece in pieces if layer not in layers}
    if not layers:
        raise _Unfit("changes no layer of this model")
    return Lora(hashlib.sha256(content).hexdigest(), MappingProxyType(layers), _notes(found), strict)


def _refuse_unsupported(found: _Sorted) -> None:
    if found.of_text_encoder:
        raise _Unfit(f"changes the text encoder, which is not supported: {listed(found.of_text_encoder)}")
    if found.unsupported:
        raise _Unfit(f"has unsupported keys: {listed(found.unsupported)}")


def _notes(found: _Sorted) -> tuple[str, ...]:
    left_out = {
        "of the text encoder, which is not supported": found.of_text_encoder,
        "unsupported": found.unsupported,
        "does not fit its layer": found.unfit,
        "no effect on this model": found.without_effect,
        "stated twice by the file": found.repeated,
    }
    return tuple(f"left out ({reason}): {listed(keys)}" for reason, keys in left_out.items() if keys)


def _loaded(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        header = read_safetensors_header(content)
        return load(content), header.metadata
    except (SafetensorError, InvalidSafetensors) as error:
        raise _Unfit("is not a complete safetensors file; other formats are not supported") from error


def _alphas(text: str | None) -> _Alphas:
    """Parse PEFT's configuration, whose keys have the prefix `transformer.`."""
    if text is None:
        return _Alphas(None, {})
    try:
        entries: dict[str, Any] = json.loads(text)
        config = msgspec.convert({key.rpartition(".")[2]: value for key, value in entries.items()}, _PeftConfig)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _Unfit(f"has an invalid {ADAPTER_METADATA} in its header") from error
    if config.use_rslora or any(re.search(r"[^\w.-]", layer) for layer in config.alpha_pattern):
        raise _Unfit("uses use_rslora, or regular expressions in alpha_pattern, which are not supported")
    if not all(math.isfinite(alpha) for alpha in (config.lora_alpha or 0.0, *config.alpha_pattern.values())):
        raise _Unfit(f"has an alpha that is not a finite number in {ADAPTER_METADATA}")
    return _Alphas(config.lora_alpha, config.alpha_pattern)


def _sorted(tensors: Mapping[str, Tensor], targets: Mapping[str, Target]) -> _Sorted:
    """Group the tensors by the file's layers, layers that mean one of the network's before those that mean three."""
    found = _Sorted()
    named: dict[str, str] = {}
    layers: dict[str, dict[str, _Part]] = {}
    for key in sorted(tensors):
        parsed = parse_key(key)
        if parsed is None:
            _sort_unparsed(key, tensors[key], found)
            continue
        parts = layers.setdefault(named.setdefault(flat(parsed.layer), parsed.layer), {})
        if parsed.role not in parts:
            parts[parsed.role] = _Part(key, tensors[key])
        elif torch.equal(parts[parsed.role].tensor, tensors[key]):
            found.repeated.append(key)
        else:
            raise _Unfit(f"changes a layer twice, with different numbers: {listed([parts[parsed.role].key, key])}")
    for layer, parts in layers.items():
        module = _Module(layer, find_target(layer, targets), parts)
        if module.target is not None:
            found.modules.append(module)
        elif _is_zero(parts):
            found.without_effect += module.keys
        elif TEXT_ENCODER.match(layer):
            found.of_text_encoder += module.keys
        else:
            found.unsupported += module.keys
    found.modules.sort(key=lambda module: len(module.target or ()))
    return found


def _sort_unparsed(key: str, tensor: Tensor, found: _Sorted) -> None:
    if key.startswith(BUNDLED_EMBEDDING) or (is_added(key) and not tensor.float().any()):
        found.without_effect.append(key)
    elif TEXT_ENCODER.match(key):
        found.of_text_encoder.append(key)
    else:
        found.unsupported.append(key)


def _is_zero(parts: _Parts) -> bool:
    """Return whether a change is zero: if one factor of a product is, the product is too."""
    factors = [part.tensor for role, part in parts.items() if role != "alpha"]
    return "magnitude" not in parts and any(not tensor.float().any() for tensor in factors)


def _pieces(module: _Module, alphas: _Alphas, shapes: Shapes, memory: _Memory) -> list[tuple[str, LoraLayer]]:
    """Return the change of each of the network's layers that a module means. Raises `_Unfit`."""
    assert module.target is not None, "only modules with a target are applied"
    wanted = (sum(shapes[layer][0] for layer in module.target), shapes[module.target[0]][1])
    change = _change(module, alphas, wanted, memory)
    magnitude = _magnitude(module.parts, wanted[0])
    pieces: list[tuple[str, LoraLayer]] = []
    first = 0
    for layer in module.target:
        count = shapes[layer][0]
        own_magnitude = None if magnitude is None else magnitude[first : first + count]
        pieces.append((layer, LoraLayer(change.rows(first, count), own_magnitude)))
        first += count
    return pieces


def _is_repetition(layers: Mapping[str, LoraLayer], layer: str, piece: LoraLayer, module: _Module) -> bool:
    """Return whether another module of the file changes the layer equally. Raises `_Unfit` if it does so otherwise."""
    if layer not in layers:
        return False
    if not _are_equal(layers[layer], piece):
        raise _Unfit(f"changes {layer} twice, with different numbers; the second time by {listed(module.keys)}")
    return True


def _are_equal(one: LoraLayer, other: LoraLayer) -> bool:
    if (one.magnitude is None) != (other.magnitude is None):
        return False
    pairs = [(one.change.dense(), other.change.dense())]
    if one.magnitude is not None and other.magnitude is not None:
        pairs.append((one.magnitude, other.magnitude))
    return all(bool((a - b).abs().max() <= EQUAL_WITHIN * a.abs().max()) for a, b in pairs)


def _change(module: _Module, alphas: _Alphas, wanted: tuple[int, int], memory: _Memory) -> LowRank | Kronecker:
    """Build the change of one layer of the file, fused or not. Raises `_Unfit` for parts that do not match."""
    parts = module.parts
    roles = parts.keys() - {"alpha", "magnitude"}
    if roles == {"down", "up"}:
        product = _Product.of(parts, "up", "down")
        _check_shape(module, product.shape, wanted)
        return LowRank(product.b, product.a, _factor(parts, product.rank, alphas.of(module.layer)))
    if roles == _LOHA:
        return _hadamard(module, wanted, memory)
    sides = [_side(parts, side) for side in ("lokr_w1", "lokr_w2")]
    if None in sides or len(roles) != sum(2 if isinstance(side, _Product) else 1 for side in sides):
        raise _Unfit(f"has an incomplete change of a layer: {listed(module.keys)}")
    return _kronecker(module, [side for side in sides if side is not None], wanted, memory)


@dataclass(frozen=True, slots=True)
class _Product:
    """The matrix a @ b: (rows, rank) by (rank, columns), not computed yet."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, parts: _Parts, a: str, b: str) -> "_Product":
        """Return the product of two matrices. Raises `_Unfit` if their ranks differ."""
        found = cls(_matrix(parts, a), _matrix(parts, b))
        if found.a.shape[1] != found.b.shape[0]:
            raise _mismatched(parts)
        return found

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    def dense(self) -> Tensor:
        return self.a.float() @ self.b.float()


def _hadamard(module: _Module, wanted: tuple[int, int], memory: _Memory) -> LowRank | Kronecker:
    """Return a low rank with the product of both ranks, or the matrix itself if that is smaller."""
    one, other = (_Product.of(module.parts, f"hada_w{side}_a", f"hada_w{side}_b") for side in "12")
    for product in (one, other):
        _check_shape(module, product.shape, wanted)
    factor, (out, into) = _factor(module.parts, one.rank), wanted
    rank = one.rank * other.rank
    if rank * (out + into) >= out * into:
        memory.reserve(out * into)
        return Kronecker(torch.ones(1, 1), one.dense() * other.dense(), factor, 0, out)
    memory.reserve(rank * (out + into))
    up = (one.a.float()[:, :, None] * other.a.float()[:, None, :]).flatten(1)
    down = (one.b.float()[:, None, :] * other.b.float()[None, :, :]).flatten(0, 1)
    return LowRank(down, up, factor)


def _kronecker(module: _Module, sides: list[Tensor | _Product], wanted: tuple[int, int], memory: _Memory) -> Kronecker:
    """If neither side is a product, there is no rank, and the factor is 1 regardless of alpha, as in LyCORIS."""
    (a, b), (c, d) = (side.shape for side in sides)
    _check_shape(module, (a * c, b * d), wanted)
    products = [side for side in sides if isinstance(side, _Product)]
    for product in products:
        memory.reserve(product.shape[0] * product.shape[1])
    left, right = (side.dense() if isinstance(side, _Product) else side for side in sides)
    factor = _factor(module.parts, products[-1].rank) if products else 1.0
    return Kronecker(left, right, factor, 0, a * c)


def _side(parts: _Parts, side: str) -> Tensor | _Product | None:
    """Return one side of a Kronecker product: a matrix, or a product itself; None if it is incomplete."""
    if side in parts:
        return _matrix(parts, side)
    factors = (f"{side}_a", f"{side}_b")
    return _Product.of(parts, *factors) if all(factor in parts for factor in factors) else None


def _matrix(parts: _Parts, role: str) -> Tensor:
    tensor = _usable(parts[role])
    if tensor.dim() != 2:
        raise _mismatched(parts)
    return tensor


def _usable(part: _Part) -> Tensor:
    """Return a part's tensor. Raises `_Unfit` if it is empty or has values that are not finite numbers."""
    tensor = part.tensor
    if not tensor.is_floating_point() or tensor.numel() == 0 or not tensor.float().isfinite().all():
        raise _Unfit(f"has empty tensors, or values that are not finite numbers: {excerpt(part.key)}")
    return tensor


def _magnitude(parts: _Parts, out: int) -> Tensor | None:
    if "magnitude" not in parts:
        return None
    magnitude = _usable(parts["magnitude"])
    if magnitude.shape not in ((out,), (out, 1)):
        raise _Unfit(f"has a magnitude without exactly one number per output: {listed(_shaped(parts))}")
    return magnitude.float().flatten()


def _factor(parts: _Parts, rank: int, default_alpha: float | None = None) -> float:
    """Return alpha / rank, or 1 without an alpha."""
    alpha = default_alpha
    if "alpha" in parts:
        if parts["alpha"].tensor.numel() != 1:
            raise _mismatched(parts)
        alpha = float(parts["alpha"].tensor.float())
        if not math.isfinite(alpha):
            raise _Unfit(f"has an alpha that is not a finite number: {excerpt(parts['alpha'].key)}")
    return 1.0 if alpha is None else alpha / rank


def _check_shape(module: _Module, shape: tuple[int, int], wanted: tuple[int, int]) -> None:
    if shape != wanted:
        raise _Unfit(
            f"changes {' and '.join(module.target or ())} ({wanted[0]} by {wanted[1]}) by a matrix of "
            f"{shape[0]} by {shape[1]}: {listed(_shaped(module.parts))}"
        )


def _mismatched(parts: _Parts) -> _Unfit:
    return _Unfit(f"has tensors whose shapes do not match: {listed(_shaped(parts))}")


def _shaped(parts: _Parts) -> list[str]:
    return [f"{excerpt(part.key)} {list(part.tensor.shape)}" for part in parts.values()]


def _refused(name: str, complaint: str) -> InvalidLora:
    return InvalidLora.field(FIELD, f"{excerpt(name)} {complaint}")
