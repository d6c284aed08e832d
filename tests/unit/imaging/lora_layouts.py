"""One LoRA in every common layout, with the changes that each of them means.

Takes the shapes of a network's layers; returns files' tensors, and the changes of weights computed independently.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

RANK = 4
ALPHA = 3.0
LAYERS = (
    "layers.0.attention.to_q",
    "layers.3.attention.to_out.0",
    "layers.1.feed_forward.w2",
    "layers.2.adaLN_modulation.0",
    "noise_refiner.1.feed_forward.w1",
    "context_refiner.0.attention.to_v",
    "cap_embedder.1",
    "t_embedder.mlp.2",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
)
"""One of each kind of linear layer."""

Shapes = Mapping[str, tuple[int, int]]


@dataclass
class Written:
    """A file's tensors and metadata, and the change of each layer's weight before any DoRA."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    changes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    magnitudes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def content(self) -> bytes:
        """The file."""
        return save({key: tensor.contiguous() for key, tensor in self.tensors.items()}, self.metadata or None)


Layout = Callable[[Shapes], Written]


def layers_of(shapes: Shapes) -> list[str]:
    """Return those of `LAYERS` that a network has; a test's network may have fewer."""
    return [layer for layer in LAYERS if layer in shapes]


def random(*shape: int) -> Tensor:
    """Return a matrix that is small compared with the weights, as a trained one is."""
    return 0.5 * torch.randn(*shape) / shape[-1] ** 0.5


def low_rank(prefix: str, down: str, up: str, alpha: float | None = None, flat: bool = False) -> Layout:
    """A pair of matrices per layer, and `alpha` if it is given."""

    def write(shapes: Shapes) -> Written:
        written = Written()
        for layer in layers_of(shapes):
            out, into = shapes[layer]
            a, b = random(RANK, into), random(out, RANK)
            key = f"{prefix}{layer.replace('.', '_') if flat else layer}"
            written.tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
            if alpha is not None:
                written.tensors[f"{key}.alpha"] = torch.tensor(alpha)
            written.changes[layer] = (1.0 if alpha is None else alpha / RANK) * b @ a
        return written

    return write


def original_names(shapes: Shapes) -> Written:
    """ComfyUI's layout, with the original checkpoint's names `out`, `x_embedder`, and `final_layer`."""
    written = low_rank("diffusion_model.", "lora_down.weight", "lora_up.weight", ALPHA)(shapes)
    for ours, theirs in (
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        ("to_out.0", "out"),
    ):
        written.tensors = {key.replace(ours, theirs): tensor for key, tensor in written.tensors.items()}
    return written


def fused_qkv(key: str, down: str, up: str, alpha: float | None) -> Layout:
    """Queries, keys, and values as one layer."""

    def write(shapes: Shapes) -> Written:
        written = Written()
        for layer in ("layers.0", "context_refiner.1"):
            into = shapes[f"{layer}.attention.to_q"][1]
            a, b = random(RANK, into), random(3 * into, RANK)
            name = key.format(layer if "." in key else layer.replace(".", "_"))
            written.tensors |= {f"{name}.{down}": a, f"{name}.{up}": b}
            if alpha is not None:
                written.tensors[f"{name}.alpha"] = torch.tensor(alpha)
            change = (1.0 if alpha is None else alpha / RANK) * b @ a
            written.changes |= {
                f"{layer}.attention.to_{one}": part for one, part in zip("qkv", change.chunk(3), strict=True)
            }
        return written

    return write


def loha(prefix: str, flat: bool) -> Layout:
    """Products of two low ranks, element by element."""

    def write(shapes: Shapes) -> Written:
        written = Written()
        for layer in layers_of(shapes):
            out, into = shapes[layer]
            key = f"{prefix}{layer.replace('.', '_') if flat else layer}"
            a1, b1, a2, b2 = random(out, RANK), random(RANK, into), random(out, RANK), random(RANK, into)
            written.tensors |= {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1}
            written.tensors |= {f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2, f"{key}.alpha": torch.tensor(ALPHA)}
            written.changes[layer] = ALPHA / RANK * (a1 @ b1) * (a2 @ b2)
        return written

    return write


def lokr(prefix: str, flat: bool, left_rank: int | None, right_rank: int | None) -> Layout:
    """Kronecker products, each side whole or a product. With two whole sides there is no rank, and alpha is ignored."""

    def write(shapes: Shapes) -> Written:
        written = Written()
        for layer in layers_of(shapes):
            out, into = shapes[layer]
            key = f"{prefix}{layer.replace('.', '_') if flat else layer}"
            sides: list[Tensor] = []
            for name, rows, columns, rank in (
                ("lokr_w1", 4, 2, left_rank),
                ("lokr_w2", out // 4, into // 2, right_rank),
            ):
                a, b = random(rows, rank or columns), random(rank or columns, columns)
                sides.append(a @ b)
                written.tensors |= {f"{key}.{name}_a": a, f"{key}.{name}_b": b} if rank else {f"{key}.{name}": a @ b}
            written.tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
            rank = right_rank or left_rank
            written.changes[layer] = (ALPHA / rank if rank else 1.0) * torch.kron(*sides)
        return written

    return write


def lokr_of_fused_qkv(shapes: Shapes) -> Written:
    """A layout whose left side's rows do not align with queries, keys, and values: 4 rows for 3 parts."""
    into = shapes["layers.0.attention.to_q"][1]
    left, right = random(4, 2), random(3 * into // 4, into // 2)
    key = "diffusion_model.layers.0.attention.qkv"
    parts = zip("qkv", torch.kron(left, right).chunk(3), strict=True)
    return Written(
        {f"{key}.lokr_w1": left, f"{key}.lokr_w2": right},
        {f"layers.0.attention.to_{one}": part for one, part in parts},
    )


def dora(layout: Layout, key: str) -> Layout:
    """The same layout with a norm for each row of the changed weights."""

    def write(shapes: Shapes) -> Written:
        written = layout(shapes)
        for layer in layers_of(shapes):
            magnitude = torch.rand(shapes[layer][0]) + 0.5
            written.magnitudes[layer] = magnitude
            shaped = magnitude[:, None] if "dora_scale" in key else magnitude
            written.tensors[key.format(layer if "." in key[:12] else layer.replace(".", "_"))] = shaped
        return written

    return write


def with_alpha_in_the_header(shapes: Shapes) -> Written:
    """diffusers' own layout: PEFT's configuration as metadata, with a different alpha for one layer."""
    written = low_rank("transformer.", "lora_A.weight", "lora_B.weight")(shapes)
    config = {"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"mlp.2": 2}}
    written.metadata = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    for layer in written.changes:
        written.changes[layer] *= (2 if layer == "t_embedder.mlp.2" else 8) / RANK
    return written


LAYOUTS: dict[str, Layout] = {
    "diffusers": low_rank("transformer.", "lora_A.weight", "lora_B.weight"),
    "diffusers with an alpha": low_rank("transformer.", "lora_A.weight", "lora_B.weight", ALPHA),
    "diffusers with metadata": with_alpha_in_the_header,
    "PEFT": low_rank("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "PEFT with an adapter's name": low_rank("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "bare names": low_rank("", "lora_A.weight", "lora_B.weight"),
    "no weight at the end": low_rank("transformer.", "lora_A.default", "lora_B.default"),
    "kohya": low_rank("lora_unet_", "lora_down.weight", "lora_up.weight", ALPHA, flat=True),
    "ai-toolkit": low_rank("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit with an alpha": low_rank("diffusion_model.", "lora_A.weight", "lora_B.weight", ALPHA),
    "ComfyUI": original_names,
    "ComfyUI's whole model": low_rank("model.diffusion_model.", "lora.down.weight", "lora.up.weight", ALPHA),
    "fused qkv, ComfyUI": fused_qkv("diffusion_model.{}.attention.qkv", "lora_down.weight", "lora_up.weight", ALPHA),
    "fused qkv, lora_A": fused_qkv("diffusion_model.{}.attention.qkv", "lora_A.weight", "lora_B.weight", None),
    "fused qkv, musubi": fused_qkv("lora_unet_{}_attention_qkv", "lora_down.weight", "lora_up.weight", ALPHA),
    "LoHa": loha("diffusion_model.", flat=False),
    "LoHa, LyCORIS": loha("lycoris_", flat=True),
    "LoKr": lokr("diffusion_model.", False, None, None),
    "LoKr, LyCORIS, right side in two": lokr("lycoris_", True, None, RANK),
    "LoKr, kohya, both sides in two": lokr("lora_unet_", True, 2, 2),
    "LoKr, left side in two": lokr("transformer.", False, 2, None),
    "LoKr, fused qkv": lokr_of_fused_qkv,
    "DoRA, PEFT": dora(
        low_rank("transformer.", "lora_A.weight", "lora_B.weight"), "transformer.{}.lora_magnitude_vector.weight"
    ),
    "DoRA, kohya": dora(
        low_rank("lora_unet_", "lora_down.weight", "lora_up.weight", ALPHA, flat=True), "lora_unet_{}.dora_scale"
    ),
    "DoRA of LoKr": dora(lokr("lycoris_", True, None, RANK), "lycoris_{}.dora_scale"),
}
