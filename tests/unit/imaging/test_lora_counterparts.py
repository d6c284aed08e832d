"""LoRA files that diffusers and PEFT write mean here what they mean there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline as DiffusersPipeline
from diffusers import ZImageTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.numerics import ONE_FORWARD, ONE_KERNEL, assert_close_relative
from tests.unit.imaging.test_forward import LEVELS, by_diffusers, noise_of
from tests.unit.imaging.test_lora import LORAS, SIZE, velocity
from zcore.imaging.lora.adapters import ScaledLora, changeable
from zcore.imaging.lora.lora_file import parse_lora
from zcore.imaging.network.velocity_model import VelocityModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def transformer(folder: Path) -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    return network.eval().requires_grad_(False)


def trained(network: ZImageTransformer2DModel, **config: Any) -> ZImageTransformer2DModel:
    """Return the network with an adapter of PEFT, whose weights are random instead of trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(init_lora_weights=False, **config), network)
    network.peft_config = {"default": LoraConfig(**config)}
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
        {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "w1", "w2", "w3"], "alpha_pattern": {"to_k": 2}},
        {"r": 3, "lora_alpha": 3, "target_modules": ATTENTION, "use_dora": True},
    ],
    ids=["attention", "alpha for some layers", "DoRA"],
)
def test_a_file_that_diffusers_saves_has_the_effect_of_pefts_own_layers(
    tiny_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    network = trained(transformer(tiny_folder), **config)
    DiffusersPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(network),
        **_collate_lora_metadata({"transformer": network}),
    )
    model = VelocityModel(transformer(tiny_folder), torch.device("cpu"), torch.float32)
    lora = model.lora((tmp_path / "pytorch_lora_weights.safetensors").read_bytes(), "saved")
    assert lora.notes == ()
    with torch.inference_mode():
        prompt = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
        expected = by_diffusers(network, [noise_of(SIZE)], [LEVELS[3]], [prompt])[0]
    assert_close_relative(velocity(model.adapted([ScaledLora(lora, 1.0)])), expected, roundings=ONE_FORWARD)


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA that also states each attention as one fused layer, and its output under the original's name."""
    found = dict(tensors)
    for key, tensor in tensors.items():
        if "_attention_to_out_0." in key:
            found[key.replace("to_out_0", "out")] = tensor.clone()
    for name in {key.partition("_to_q.")[0] for key in tensors if "_attention_to_q." in key}:
        downs, ups = ([tensors[f"{name}_to_{one}.lora_{role}.weight"] for one in "qkv"] for role in ("down", "up"))
        found[f"{name}_qkv.lora_down.weight"] = torch.cat(downs)
        found[f"{name}_qkv.lora_up.weight"] = torch.block_diag(*ups)
        found[f"{name}_qkv.alpha"] = 3 * tensors[f"{name}_to_q.alpha"]
    return found


def test_a_file_that_states_changes_twice_means_what_diffusers_makes_of_it(demo_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.safetensors"
    save_file(doubled(load_file(LORAS / "demo-night.safetensors")), path)
    shapes = changeable(transformer(demo_folder))
    lora = parse_lora(path.read_bytes(), shapes, "twice")
    assert [note.partition(":")[0] for note in lora.notes] == ["left out (stated twice by the file)"]
    theirs = DiffusersPipeline.lora_state_dict(path)
    assert {f"transformer.{layer}.lora_{side}.weight" for layer in lora.layers for side in "AB"} == theirs.keys()
    for layer, one in lora.layers.items():
        expected = theirs[f"transformer.{layer}.lora_B.weight"] @ theirs[f"transformer.{layer}.lora_A.weight"]
        assert_close_relative(one.change.dense(), expected, roundings=ONE_KERNEL)
