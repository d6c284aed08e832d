"""Names of tensors in LoRA files: which layers and which part of a change they mean. Needs no torch.

A key consists of a prefix (of diffusers, PEFT, kohya and musubi, ai-toolkit, ComfyUI, LyCORIS, or none), a layer's name
(with dots or underscores, of diffusers or of the original checkpoint, where queries, keys, and values are one layer
`qkv`), and the tensor's role.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

LONGEST_KEY = 500
"""Longer keys are not parsed."""

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
BUNDLED_EMBEDDING = "bundle_emb."
"""Prefix of embeddings of single words, for the text encoders of other models, that some trainers add."""

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
_KEY = re.compile(
    rf"(?P<layer>.+?)\.(?P<part>{'|'.join(sorted(map(re.escape, ROLES), key=len, reverse=True))})"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.weight)?"  # PEFT puts the adapter's name here
)
_ADDED = re.compile(r".+\.(diff|diff_b|w_norm|b_norm|bias)")
"""Tensors that are added as they are, so that zeros have no effect."""

Shapes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of every layer that may be changed, by the layer's name."""

Target = tuple[str, ...]
"""The layers of the network that one layer of a file means: one, or three for `qkv`."""


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """The layer as the file names it, and the role of the tensor in the change of that layer."""

    layer: str
    role: str


def parse_key(key: str) -> ParsedKey | None:
    """Return what a key means; None if it has no known role."""
    found = _KEY.fullmatch(key) if len(key) <= LONGEST_KEY else None
    return ParsedKey(found["layer"], ROLES[found["part"]]) if found else None


def is_added(key: str) -> bool:
    """Return whether the key's tensor is added to a weight or bias as it is."""
    return len(key) <= LONGEST_KEY and _ADDED.fullmatch(key) is not None


def targets_of(shapes: Shapes) -> dict[str, Target]:
    """Return the layers meant by each name that a file may use, with underscores instead of dots."""
    found: dict[str, Target] = {}
    for layer in shapes:
        found[flat(layer)] = (layer,)
        original = layer.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        found[flat(original)] = (layer,)
        if original.endswith("attention.to_out.0"):
            found[flat(original.removesuffix(".0"))] = (layer,)
            found[flat(original.removesuffix("to_out.0") + "out")] = (layer,)
        if original.endswith("attention.to_q"):
            attention = original.removesuffix("to_q")
            found[flat(f"{attention}qkv")] = tuple(f"{attention}to_{letter}" for letter in "qkv")
    return found


def find_target(layer: str, targets: Mapping[str, Target]) -> Target | None:
    """Return the layers that a file's name for a layer means; None if there are none."""
    name = flat(layer)
    while name not in targets:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return targets[name]


def flat(layer: str) -> str:
    """Return a layer's name as all layouts can write it: with underscores instead of dots."""
    return layer.replace(".", "_")
