"""A LoRA file in any of the layouts that are met, as what it changes, layer by layer, under diffusers' names.

Takes the bytes of a safetensors file and the shapes of the layers there are; gives a frozen `Lora`, on the CPU. Every
tensor of the file is used and fits its layer, or the file is refused as `InvalidLora` with the list: a LoRA that
silently does part of its work is worse than none. Does not know scales, devices and how a layer is computed.

A key is a prefix (of diffusers, PEFT, kohya and musubi, ai-toolkit, ComfyUI, LyCORIS, or none), a layer's name (with
dots or underscores, of diffusers or of the original checkpoint, where queries, keys and values are one layer `qkv`),
and what the tensor is. What changes a layer W is one of

    low rank  alpha / rank * up @ down         Hu et al. 2021, https://arxiv.org/abs/2106.09685
    LoHa      alpha / rank * (a1 @ b1) ∘ (a2 @ b2)   Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098
    LoKr      alpha / rank * left ⊗ right      Yeh et al. 2023, https://arxiv.org/abs/2309.14859

and DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) besides sets the norm of each row of the changed layer.
LoHa is kept as the low rank that it is, with the product of both ranks: row i of `up` is a1[i] ⊗ a2[i].
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from zcore.errors import InvalidLora

FIELD = "loras"
NAMED_AT_MOST = 20
"""Keys in one complaint; the number of the others is said."""

PREFIXES = (
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
    "transformer_",
    "unet_",
)
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?|lora_te|lycoris_te|te\d?|clip|cond_stage_model)[._\d]"
)
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration, and in it the alphas."""

ROLES = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f"lokr_w{side}{factor}": f"lokr_w{side}{factor}" for side in "12" for factor in ("", "_a", "_b")},
}
KEY = re.compile(
    rf"(?P<layer>.+?)\.(?P<part>{'|'.join(sorted(map(re.escape, ROLES), key=len, reverse=True))})"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.weight)?"  # PEFT names its adapter there
)

Shapes = Mapping[str, tuple[int, int]]
"""Of every layer that may be changed: outputs and inputs, by the layer's name."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`factor * up @ down`: (out, rank) by (rank, in)."""

    down: Tensor
    up: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What has to be kept of it."""
        return self.down, self.up

    def rows(self, first: int, count: int) -> "LowRank":
        """The change of some of the outputs."""
        return LowRank(self.down, self.up[first : first + count], self.factor)

    def moved(self, device: torch.device) -> "LowRank":
        """The same on a device."""
        return LowRank(self.down.to(device), self.up.to(device), self.factor)

    def dense(self) -> Tensor:
        """The change as a matrix, float32 (out, in)."""
        return self.factor * (self.up.float() @ self.down.float())


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """`count` rows from `first` of `factor * left ⊗ right`: (a, b) and (c, d) give (a c, b d)."""

    left: Tensor
    right: Tensor
    factor: float
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.count, self.left.shape[1] * self.right.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What has to be kept of it."""
        return self.left, self.right

    def rows(self, first: int, count: int) -> "Kronecker":
        """The change of some of the outputs; rows of `left` that none of them needs are left out."""
        height = self.right.shape[0]
        first += self.first
        needed = self.left[first // height : -(-(first + count) // height)]
        return Kronecker(needed, self.right, self.factor, first % height, count)

    def moved(self, device: torch.device) -> "Kronecker":
        """The same on a device."""
        return Kronecker(self.left.to(device), self.right.to(device), self.factor, self.first, self.count)

    def dense(self) -> Tensor:
        """The change as a matrix, float32 (out, in)."""
        product = torch.kron(self.left.float().contiguous(), self.right.float().contiguous())
        return self.factor * product[self.first : self.first + self.count]


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """What becomes of one layer. With a `magnitude` (out,) each row of the changed layer gets that norm (DoRA)."""

    change: LowRank | Kronecker
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA file. `sha256` is of its whole content, in hexadecimal."""

    sha256: str
    layers: Mapping[str, LoraLayer]


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises `InvalidLora`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path.name, f"cannot be read: {error.strerror}") from error


def parse_lora(content: bytes, shapes: Shapes, name: str) -> Lora:
    """What a file's bytes hold; `name` is what complaints call it. Raises `InvalidLora`."""
    tensors, alphas = _loaded(content, name)
    parts = _by_layer(tensors, _targets(shapes), name)
    layers: dict[str, LoraLayer] = {}
    for target, found in parts.items():
        whole = _layer(found, alphas, name)
        for layer, one in _split(whole, target, found, shapes, name):
            if layer in layers:
                raise _refused(name, f"changes {layer} twice, alone and as a part of qkv")
            layers[layer] = one
    if not layers:
        raise _refused(name, "changes no layer")
    return Lora(hashlib.sha256(content).hexdigest(), MappingProxyType(layers))


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a file, under its own key."""

    key: str
    tensor: Tensor


_Parts = Mapping[str, _Part]
_Target = tuple[str, ...]


class _PeftConfig(msgspec.Struct, frozen=True):
    """As far as it changes what a file means."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False


@dataclass(frozen=True, slots=True)
class _Alphas:
    """What PEFT's configuration in a file's header says of alphas; `None` and empty where there is none."""

    default: float | None
    by_layer: Mapping[str, float]

    def of(self, key: str) -> float | None:
        """Of the layer that a key is about; a layer is named by the end of its name, as PEFT has it."""
        parsed = KEY.fullmatch(key)
        assert parsed is not None, "only keys that were understood get here"
        named = [alpha for layer, alpha in self.by_layer.items() if f".{parsed['layer']}".endswith(f".{layer}")]
        return named[0] if named else self.default


def _loaded(content: bytes, name: str) -> tuple[dict[str, Tensor], _Alphas]:
    length = int.from_bytes(content[:8], "little")
    try:
        tensors = load(content)
        header = cast(dict[str, Any], json.loads(content[8 : 8 + length]))
    except (SafetensorError, ValueError) as error:
        raise _refused(name, "is no whole safetensors file, and no other kind is read") from error
    unusual = [key for key, tensor in tensors.items() if not tensor.is_floating_point() and not key.endswith("alpha")]
    unusual += [key for key, tensor in tensors.items() if tensor.numel() == 0 or not _is_finite(tensor)]
    if unusual:
        raise _refused(name, f"has empty tensors, or values that are no finite numbers: {_listed(unusual)}")
    return tensors, _alphas(header.get("__metadata__", {}).get(ADAPTER_METADATA), name)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def _alphas(text: str | None, name: str) -> _Alphas:
    """Keys there have the prefix `transformer.`."""
    if text is None:
        return _Alphas(None, {})
    try:
        said = msgspec.convert({key.rpartition(".")[2]: one for key, one in json.loads(text).items()}, _PeftConfig)
    except (ValueError, AttributeError) as error:
        raise _refused(name, f"has a {ADAPTER_METADATA} in its header that is not as it has to be") from error
    if said.use_rslora or any(re.search(r"[^\w.-]", layer) for layer in said.alpha_pattern):
        raise _refused(name, "was trained with use_rslora or with a pattern of alphas, which are not supported")
    return _Alphas(said.lora_alpha, said.alpha_pattern)


def _targets(shapes: Shapes) -> dict[str, _Target]:
    """What a layer may be called, all with underscores for dots: the layers meant."""
    found: dict[str, _Target] = {}
    for layer in shapes:
        found[_flat(layer)] = (layer,)
        original = layer.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        found[_flat(original)] = (layer,)
        if original.endswith("attention.to_out.0"):
            found[_flat(original.removesuffix(".0"))] = (layer,)
            found[_flat(original.removesuffix("to_out.0") + "out")] = (layer,)
        if original.endswith("attention.to_q"):
            attention = original.removesuffix("to_q")
            found[_flat(f"{attention}qkv")] = tuple(f"{attention}to_{one}" for one in "qkv")
    return found


def _flat(layer: str) -> str:
    return layer.replace(".", "_")


def _by_layer(tensors: Mapping[str, Tensor], targets: Mapping[str, _Target], name: str) -> dict[_Target, _Parts]:
    """The tensors by the layers they change and what they are. Raises `InvalidLora` for any that is not understood."""
    found: dict[_Target, dict[str, _Part]] = {}
    unknown: list[str] = []
    for key in sorted(tensors):
        parsed = KEY.fullmatch(key)
        target = _target(parsed["layer"], targets) if parsed else None
        if parsed is None or target is None:
            unknown.append(key)
            continue
        role, parts = ROLES[parsed["part"]], found.setdefault(target, {})
        if role in parts:
            raise _refused(name, f"says twice what it does to {target[0]}: {_listed([parts[role].key, key])}")
        parts[role] = _Part(key, tensors[key])
    text = [key for key in unknown if TEXT_ENCODER.match(key)]
    if text:
        raise _refused(name, f"changes the text encoder, which is not supported: {_listed(text)}")
    if unknown:
        raise _refused(name, f"holds what is not understood: {_listed(unknown)}")
    return dict(found)


def _target(layer: str, targets: Mapping[str, _Target]) -> _Target | None:
    flat = _flat(layer)
    while flat not in targets:
        prefix = next((one for one in PREFIXES if flat.startswith(one)), None)
        if prefix is None:
            return None
        flat = flat.removeprefix(prefix)
    return targets[flat]


def _layer(parts: _Parts, alphas: _Alphas, name: str) -> LoraLayer:
    """One layer as it stands in the file, fused or not. Raises `InvalidLora` for parts that do not go together."""
    roles = parts.keys() - {"alpha", "magnitude"}
    try:
        if roles == {"down", "up"}:
            change = _low_rank(parts, alphas)
        elif roles == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
            change = _hadamard(parts)
        elif _has_factor("lokr_w1", roles) and _has_factor("lokr_w2", roles) and len(roles) == _factors(roles):
            change = _kronecker(parts)
        else:
            raise _refused(name, f"has tensors that are not a whole change of a layer: {_listed(_keys(parts))}")
    except (RuntimeError, IndexError, ValueError) as error:
        raise _refused(name, f"has tensors whose shapes do not go together: {_listed(_shaped(parts))}") from error
    magnitude = parts["magnitude"].tensor if "magnitude" in parts else None
    if magnitude is not None and magnitude.shape not in ((change.shape[0],), (change.shape[0], 1)):
        raise _refused(
            name, f"has a magnitude that is not one number an output, as it has to be: {_listed(_shaped(parts))}"
        )
    return LoraLayer(change, None if magnitude is None else magnitude.float().flatten())


def _low_rank(parts: _Parts, alphas: _Alphas) -> LowRank:
    down, up = _matrix(parts, "down"), _matrix(parts, "up")
    return LowRank(down, up, _factor(parts, _rank(up, down), alphas.of(parts["down"].key)))


def _hadamard(parts: _Parts) -> LowRank:
    up1, down1 = _matrix(parts, "hada_w1_a").float(), _matrix(parts, "hada_w1_b").float()
    up2, down2 = _matrix(parts, "hada_w2_a").float(), _matrix(parts, "hada_w2_b").float()
    rank = _rank(up1, down1)
    _rank(up2, down2)
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return LowRank(down, up, _factor(parts, rank))


def _kronecker(parts: _Parts) -> Kronecker:
    """Without a rank, where neither side is a product, the factor is 1 whatever alpha says, as LyCORIS has it."""
    left, _ = _side(parts, "lokr_w1")
    right, rank = _side(parts, "lokr_w2")
    rank = rank or _side(parts, "lokr_w1")[1]
    factor = _factor(parts, rank) if rank else 1.0
    return Kronecker(left, right, factor, 0, left.shape[0] * right.shape[0])


def _side(parts: _Parts, side: str) -> tuple[Tensor, int | None]:
    """One side of a Kronecker product, and its rank where it is a product itself."""
    if side in parts:
        return _matrix(parts, side), None
    a, b = _matrix(parts, f"{side}_a").float(), _matrix(parts, f"{side}_b").float()
    return a @ b, _rank(a, b)


def _has_factor(side: str, roles: Iterable[str]) -> bool:
    return (side in roles) != ({f"{side}_a", f"{side}_b"} <= set(roles))


def _factors(roles: Iterable[str]) -> int:
    """How many tensors two sides are, each a matrix or a product of two."""
    return sum(1 if side in set(roles) else 2 for side in ("lokr_w1", "lokr_w2"))


def _matrix(parts: _Parts, role: str) -> Tensor:
    tensor = parts[role].tensor
    if tensor.dim() != 2:
        raise ValueError(f"{role} is no matrix")
    return tensor


def _rank(up: Tensor, down: Tensor) -> int:
    if up.shape[1] != down.shape[0]:
        raise ValueError("the ranks differ")
    return down.shape[0]


def _factor(parts: _Parts, rank: int, otherwise: float | None = None) -> float:
    """alpha / rank; 1 where nothing says an alpha."""
    alpha = float(parts["alpha"].tensor.float()) if "alpha" in parts else otherwise
    return 1.0 if alpha is None else alpha / rank


def _split(
    whole: LoraLayer, target: _Target, parts: _Parts, shapes: Shapes, name: str
) -> Iterable[tuple[str, LoraLayer]]:
    """A layer of the file as layers of the network. Raises `InvalidLora` where its shape is not theirs."""
    wanted = (sum(shapes[layer][0] for layer in target), shapes[target[0]][1])
    if whole.change.shape != wanted:
        shape = "{} by {}".format(*whole.change.shape)
        raise _refused(
            name,
            f"changes {' and '.join(target)}, of {wanted[0]} by {wanted[1]}, by a matrix of {shape}: "
            f"{_listed(_shaped(parts))}",
        )
    first = 0
    for layer in target:
        count = shapes[layer][0]
        magnitude = None if whole.magnitude is None else whole.magnitude[first : first + count]
        yield layer, LoraLayer(whole.change.rows(first, count), magnitude)
        first += count


def _keys(parts: _Parts) -> list[str]:
    return [part.key for part in parts.values()]


def _shaped(parts: _Parts) -> list[str]:
    return [f"{part.key} {list(part.tensor.shape)}" for part in parts.values()]


def _listed(keys: list[str]) -> str:
    more = len(keys) - NAMED_AT_MOST
    return ", ".join(keys[:NAMED_AT_MOST]) + (f", and {more} more" if more > 0 else "")


def _refused(name: str, complaint: str) -> InvalidLora:
    return InvalidLora.field(FIELD, f"{name} {complaint}")
