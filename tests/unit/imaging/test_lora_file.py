"""A LoRA file that is not understood to its last tensor is refused, and the complaint lists what."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from zcore.errors import InvalidLora
from zcore.imaging.model.lora_file import Kronecker, LowRank, parse_lora, read_file

SHAPES = {
    "layers.0.attention.to_q": (12, 12),
    "layers.0.attention.to_k": (12, 12),
    "layers.0.attention.to_v": (12, 12),
    "layers.0.feed_forward.w1": (20, 12),
}
Q = "layers.0.attention.to_q"
GOOD = {f"transformer.{Q}.lora_A.weight": torch.ones(2, 12), f"transformer.{Q}.lora_B.weight": torch.ones(12, 2)}


def refusal(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(InvalidLora) as refused:
        parse_lora(save(tensors, metadata), SHAPES, "style")
    assert refused.value.errors[0].pointer == "/loras"
    assert "style " in refused.value.message
    return refused.value.message


def pair(key: str, out: int = 12, into: int = 12, rank: int = 2) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": torch.ones(rank, into), f"{key}.lora_B.weight": torch.ones(out, rank)}


def test_a_file_that_changes_nothing_is_refused() -> None:
    assert "changes no layer" in refusal({})


@pytest.mark.parametrize(
    "key",
    [
        "transformer.layers.9.attention.to_q.lora_A.weight",
        "transformer.layers.0.attention.to_q.lora_A.bias",
        "transformer.layers.0.attention.to_q.lora_mid.weight",
        "transformer.layers.0.attention.to_q.diff",
        "transformer.layers.0.attention.to_q.hada_t1",
        "transformer.layers.0.attention.norm_q.lora_A.weight",
        "double_blocks.0.img_attn.qkv.lora_A.weight",
        "lora_unet_layers_0_attention_to_w.alpha",
        "alpha",
    ],
)
def test_one_key_that_is_not_understood_refuses_the_whole_file(key: str) -> None:
    assert f"holds what is not understood: {key}" in refusal({**GOOD, key: torch.ones(2, 12)})


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te_model_layers_0_mlp_up_proj.lora_down.weight",
        "lora_te1_text_model.lora_down.weight",
    ],
)
def test_a_change_of_the_text_encoder_is_refused_as_such(key: str) -> None:
    assert f"changes the text encoder, which is not supported: {key}" in refusal({**GOOD, key: torch.ones(2, 12)})


def test_a_long_list_of_keys_is_counted_behind_the_first_twenty() -> None:
    unknown = {f"blocks.{index:02}.weight": torch.ones(1) for index in range(25)}
    message = refusal({**GOOD, **unknown})
    assert "blocks.19.weight, and 5 more" in message
    assert "blocks.20" not in message


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (pair(Q, out=20), f"changes {Q}, of 12 by 12, by a matrix of 20 by 12"),
        (pair(Q, into=8), "by a matrix of 12 by 8"),
        (pair("layers.0.attention.qkv", out=24), "of 36 by 12, by a matrix of 24 by 12"),
        ({**pair(Q), f"{Q}.lora_B.weight": torch.ones(12, 3)}, f"do not go together: {Q}.lora_A.weight [2, 12]"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(2, 12, 1, 1)}, "do not go together"),
        ({**pair(Q), f"{Q}.alpha": torch.ones(2)}, "do not go together"),
        ({**pair(Q), f"{Q}.dora_scale": torch.ones(1, 12)}, "magnitude that is not one number an output"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 12)}, "not a whole change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3)}, "not a whole change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2_a": torch.ones(4, 2)}, "not a whole change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(4, 3)}, "by a matrix of 12 by 9"),
        ({**pair(Q), f"{Q}.lokr_w1": torch.ones(3, 3)}, "not a whole change of a layer"),
        ({**pair(Q), f"{Q}.alpha": torch.tensor(float("nan"))}, f"no finite numbers: {Q}.alpha"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.full((2, 12), torch.inf)}, "no finite numbers"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(0, 12), f"{Q}.lora_B.weight": torch.ones(12, 0)}, "empty"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(2, 12, dtype=torch.int8)}, "no finite numbers"),
        ({**pair(Q), **pair(f"transformer.{Q}")}, "says twice what it does"),
        ({**pair(Q), **pair("layers.0.attention.qkv", out=36)}, f"changes {Q} twice"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(tensors: dict[str, Tensor], named: str) -> None:
    assert named in refusal(tensors)


@pytest.mark.parametrize(
    "metadata",
    [
        "no json",
        "[]",
        '{"transformer.lora_alpha": "much"}',
        '{"transformer.use_rslora": true}',
        '{"transformer.alpha_pattern": {".*to_q": 4}}',
    ],
)
def test_an_alpha_in_the_header_that_is_not_understood_refuses_the_file(metadata: str) -> None:
    assert refusal(GOOD, {"lora_adapter_metadata": metadata})


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    pickled = tmp_path / "style.pt"
    torch.save(GOOD, pickled)
    for path in (pickled, tmp_path / "style.ckpt", tmp_path / "cut.safetensors"):
        if path.suffix == ".ckpt":
            path.write_bytes(pickle.dumps({"state": 1}))
        if path.stem == "cut":
            path.write_bytes(save(GOOD)[:-4])
        with pytest.raises(InvalidLora, match=f"{path.name} is no whole safetensors file, and no other kind is read"):
            parse_lora(read_file(path), SHAPES, path.name)
    with pytest.raises(InvalidLora, match=r"none\.safetensors cannot be read"):
        read_file(tmp_path / "none.safetensors")


def test_each_kind_is_kept_as_small_as_it_is() -> None:
    lora = parse_lora(save(GOOD), SHAPES, "style")
    change = lora.layers[Q].change
    assert isinstance(change, LowRank)
    assert (change.down.shape, change.up.shape, change.factor) == ((2, 12), (12, 2), 1.0)

    kept = parse_lora(save({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(4, 4)}), SHAPES, "style")
    assert isinstance(kept.layers[Q].change, Kronecker)
    with pytest.raises(TypeError):
        kept.layers["other"] = kept.layers[Q]  # pyright: ignore[reportIndexIssue]
