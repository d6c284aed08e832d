"""A LoRA file with any tensor that is not understood is refused, and the message lists it."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.errors import InvalidLora
from zcore.imaging.lora.changes import Kronecker, LowRank
from zcore.imaging.lora.lora_file import parse_lora, read_file

SHAPES = {
    "layers.0.attention.to_q": (12, 12),
    "layers.0.attention.to_k": (12, 12),
    "layers.0.attention.to_v": (12, 12),
    "layers.0.feed_forward.w1": (20, 12),
}
Q = "layers.0.attention.to_q"
K = "layers.0.attention.to_k"
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
    assert f"has unsupported keys: {key}" in refusal({**GOOD, key: torch.ones(2, 12)})


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


def test_a_long_list_of_keys_is_counted_after_the_first_ten() -> None:
    unknown = {f"blocks.{index:02}.weight": torch.ones(1) for index in range(25)}
    message = refusal({**GOOD, **unknown})
    assert "blocks.09.weight, and 15 more" in message
    assert "blocks.10" not in message


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (pair(Q, out=20), f"changes {Q} (12 by 12) by a matrix of 20 by 12"),
        (pair(Q, into=8), "by a matrix of 12 by 8"),
        (pair("layers.0.attention.qkv", out=24), "(36 by 12) by a matrix of 24 by 12"),
        ({**pair(Q), f"{Q}.lora_B.weight": torch.ones(12, 3)}, f"do not match: {Q}.lora_A.weight [2, 12]"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(2, 12, 1, 1)}, "do not match"),
        ({**pair(Q), f"{Q}.alpha": torch.ones(2)}, "do not match"),
        ({**pair(Q), f"{Q}.dora_scale": torch.ones(1, 12)}, "magnitude without exactly one number per output"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 12)}, "an incomplete change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3)}, "an incomplete change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2_a": torch.ones(4, 2)}, "an incomplete change of a layer"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(4, 3)}, "by a matrix of 12 by 9"),
        ({**pair(Q), f"{Q}.lokr_w1": torch.ones(3, 3)}, "an incomplete change of a layer"),
        ({**pair(Q), f"{Q}.alpha": torch.tensor(float("nan"))}, f"an alpha that is not a finite number: {Q}.alpha"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.full((2, 12), torch.inf)}, "not finite numbers"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(0, 12), f"{Q}.lora_B.weight": torch.ones(12, 0)}, "empty"),
        ({**pair(Q), f"{Q}.lora_A.weight": torch.ones(2, 12, dtype=torch.int8)}, "not finite numbers"),
        ({**pair(Q), **pair(f"transformer.{Q}", rank=3)}, f"changes {Q} twice, with different numbers"),
        ({**pair(Q), **pair("layers.0.attention.qkv", out=36, rank=3)}, f"changes {Q} twice, with different numbers"),
        (
            {**pair(Q), f"{Q}.lora_A.ema.weight": torch.zeros(2, 12)},
            f"twice, with different numbers: {Q}.lora_A.ema.weight, {Q}.lora_A.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors: dict[str, Tensor], named: str) -> None:
    assert named in refusal(tensors)


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
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
        with pytest.raises(
            InvalidLora, match=f"{path.name} is not a complete safetensors file; other formats are not supported"
        ):
            parse_lora(read_file(path), SHAPES, path.name)
    with pytest.raises(InvalidLora, match=r"none\.safetensors cannot be read"):
        read_file(tmp_path / "none.safetensors")


def test_each_kind_is_stored_in_its_compact_form() -> None:
    lora = parse_lora(save(GOOD), SHAPES, "style")
    change = lora.layers[Q].change
    assert isinstance(change, LowRank)
    assert (change.down.shape, change.up.shape, change.factor) == ((2, 12), (12, 2), 1.0)

    product = parse_lora(save({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(4, 4)}), SHAPES, "style")
    assert isinstance(product.layers[Q].change, Kronecker)
    with pytest.raises(TypeError):
        product.layers["other"] = product.layers[Q]  # pyright: ignore[reportIndexIssue]


def test_what_a_file_states_twice_with_equal_numbers_is_applied_once_and_noted() -> None:
    split = {f"layers.0.attention.to_{one}": torch.randn(12, 2) for one in "qkv"}
    tensors: dict[str, Tensor] = {}
    for layer, up in split.items():
        tensors |= {f"{layer}.lora_down.weight": torch.randn(2, 12), f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(1.0)
    downs = [tensors[f"{layer}.lora_down.weight"] for layer in split]
    tensors |= {
        "layers.0.attention.qkv.lora_down.weight": torch.cat(downs),
        "layers.0.attention.qkv.lora_up.weight": torch.block_diag(*split.values()),
        "layers.0.attention.qkv.alpha": torch.tensor(3.0),
        f"{Q}.lora_down.copy.weight": downs[0].clone(),
    }
    lora = parse_lora(save(tensors), SHAPES, "style")
    assert lora.layers.keys() == split.keys()
    assert [lora.layers[layer].change.tensors[0].shape for layer in split] == [(2, 12)] * 3, "not the fused one"
    (note,) = lora.notes
    assert note.startswith(f"left out (stated twice by the file): {Q}.lora_down.weight, layers.0.attention.qkv.alpha")

    tensors["layers.0.attention.qkv.lora_up.weight"][0, 0] += 0.01
    assert f"changes {Q} twice, with different numbers; the second time by layers.0.attention.qkv" in refusal(tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        {"bundle_emb.word.qwen": torch.full((2, 5), torch.inf)},
        {
            "lora_te_model_layers_0_mlp_up_proj.lora_down.weight": torch.randn(2, 7),
            "lora_te_model_layers_0_mlp_up_proj.lora_up.weight": torch.zeros(9, 2),
            "lora_te_model_layers_0_mlp_up_proj.alpha": torch.tensor(1.0),
        },
        {"diffusion_model.layers.0.attention_norm1.diff": torch.zeros(12)},
        {"lora_unet_layers_0_attention_norm1.w_norm": torch.zeros(12)},
        {f"transformer.{Q}.lora_B.bias": torch.zeros(12)},
    ],
)
def test_parts_without_effect_are_left_out_and_noted(tensors: dict[str, Tensor]) -> None:
    lora = parse_lora(save({**GOOD, **tensors}), SHAPES, "style")
    assert lora.layers.keys() == {Q}
    assert lora.notes == (f"left out (no effect on this model): {', '.join(sorted(tensors))}",)


def test_a_bias_or_norm_that_is_changed_is_refused() -> None:
    for key in ("diffusion_model.layers.0.attention_norm1.diff", f"transformer.{Q}.lora_B.bias"):
        assert f"has unsupported keys: {key}" in refusal({**GOOD, key: torch.ones(12)})


def test_an_alpha_that_has_no_effect_may_be_any_number() -> None:
    whole = {f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(4, 4)}
    lora = parse_lora(save({**whole, f"{Q}.alpha": torch.tensor(1e10).half()}), SHAPES, "style")
    assert isinstance(lora.layers[Q].change, Kronecker)
    assert lora.layers[Q].change.factor == 1.0


def test_without_strictness_what_fits_is_applied_and_the_rest_is_noted() -> None:
    tensors = {
        **GOOD,
        **pair(K, out=20),
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 12),
        "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 12),
    }
    lora = parse_lora(save(tensors), SHAPES, "style", strict=False)
    assert lora.layers.keys() == {Q}
    assert lora.notes == (
        "left out (of the text encoder, which is not supported): text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "left out (unsupported): double_blocks.0.img_attn.qkv.lora_A.weight",
        f"left out (does not fit its layer): {K}.lora_A.weight, {K}.lora_B.weight",
    )
    with pytest.raises(InvalidLora, match="changes no layer of this model"):
        parse_lora(save(pair("layers.7.attention.to_q")), SHAPES, "style", strict=False)


def edited_header(content: bytes, edit: str) -> bytes:
    """Replace the end of the header, a closing brace, by other JSON."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()[:-1] + edit.encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.parametrize(
    "content",
    [
        save(GOOD, {"lora_adapter_metadata": "[" * 100_000}),
        save(GOOD, {"lora_adapter_metadata": '{"lora_alpha": ' + "9" * 5000 + "}"}),
        save(GOOD, {"lora_adapter_metadata": '{"lora_alpha": Infinity}'}),
        save(GOOD, {"lora_adapter_metadata": '{"alpha_pattern": {"to_q": NaN}}'}),
        save({**GOOD, f"{Q}.lora_mid": torch.ones([1] * 64)}).replace(b'"shape":[1,', b'"shape":[1,1,1,1,1,'),
        edited_header(save(GOOD), ',"__metadata__":null}'),
        edited_header(save(GOOD), "[" * 100_000),
        b"",
    ],
)
def test_no_content_raises_anything_but_the_error_of_a_lora(content: bytes) -> None:
    with pytest.raises(InvalidLora) as refused:
        parse_lora(content, SHAPES, "style")
    assert len(refused.value.message) < 1000


def test_names_from_a_file_are_escaped_and_shortened_in_messages() -> None:
    message = refusal(
        {**GOOD, "\0\x1b]0;owned\x07" + "k" * 2_000_000: torch.ones(1), "transformer_" * 100_000: torch.ones(1)}
    )
    assert message.startswith(r"loras: style has unsupported keys: \u0000\u001b]0;owned\u0007kkk")
    assert len(message) < 1000
    assert message.isprintable()


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("lokr_w1", {"lokr_w1_a": (10**6, 1), "lokr_w1_b": (1, 10**6), "lokr_w2": (1, 1)}),
        ("hada", {"hada_w1_a": (10**6, 9), "hada_w1_b": (9, 12), "hada_w2_a": (10**6, 9), "hada_w2_b": (9, 12)}),
    ],
)
def test_a_product_that_does_not_fit_is_refused_before_it_is_computed(kind: str, factors: dict[str, Any]) -> None:
    """The first product would have 4 TB."""
    message = refusal({f"{Q}.{role}": torch.ones(shape) for role, shape in factors.items()})
    assert f"changes {Q} (12 by 12) by a matrix of 1000000 by" in message


def test_products_take_no_more_memory_than_the_model() -> None:
    shapes = {f"layers.{index}.attention.to_q": (400, 400) for index in range(3)}
    sides = {"lokr_w1_a": (400, 1), "lokr_w1_b": (1, 400), "lokr_w2": (1, 1)}
    tensors = {f"{layer}.{role}": torch.ones(shape) for layer in shapes for role, shape in sides.items()}
    with pytest.raises(InvalidLora, match=r"needs more than 960000 bytes once its products are computed"):
        parse_lora(save(tensors), shapes, "style")


def test_a_loha_of_a_high_rank_is_stored_as_the_matrix_that_it_is() -> None:
    a1, b1, a2, b2 = torch.randn(12, 9), torch.randn(9, 12), torch.randn(12, 9), torch.randn(9, 12)
    tensors = {f"{Q}.hada_w1_a": a1, f"{Q}.hada_w1_b": b1, f"{Q}.hada_w2_a": a2, f"{Q}.hada_w2_b": b2}
    change = parse_lora(save(tensors), SHAPES, "style").layers[Q].change
    assert sum(tensor.numel() for tensor in change.tensors) == 145
    assert_close_relative(change.dense(), (a1 @ b1) * (a2 @ b2), roundings=ONE_KERNEL)
