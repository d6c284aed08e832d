"""The real architecture, built only from its configurations, has exactly the tensors of the published weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from zcore.imaging.weights.loader import Networks, build_meta


@pytest.fixture(scope="module")
def networks(layout_dir: Path) -> Networks:
    """Names and shapes, no weights."""
    return build_meta(layout_dir)


def test_the_transformers_tensors_are_those_of_its_index(networks: Networks, layout_dir: Path) -> None:
    index = _index(layout_dir / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
    assert set(networks.transformer.state_dict()) == set(index["weight_map"])
    assert len(index["weight_map"]) == 521
    # Stored in float32.
    assert _parameters(networks.transformer) * 4 == index["metadata"]["total_size"] == 6_154_908_736 * 4


def test_the_text_encoders_tensors_are_those_of_its_index(networks: Networks, layout_dir: Path) -> None:
    index = _index(layout_dir / "text_encoder" / "model.safetensors.index.json")
    assert {f"model.{name}" for name in networks.text_encoder.state_dict()} == set(index["weight_map"])
    assert len(index["weight_map"]) == 398
    # Stored in bfloat16.
    assert _parameters(networks.text_encoder) * 2 == index["metadata"]["total_size"] == 4_022_468_096 * 2


def test_the_vae_has_the_published_size(networks: Networks) -> None:
    assert len(networks.vae.state_dict()) == 244
    assert _parameters(networks.vae) == 83_819_683


def test_no_weight_is_in_memory(networks: Networks) -> None:
    for network in (networks.transformer, networks.text_encoder, networks.vae):
        assert {weight.device for weight in network.parameters()} == {torch.device("meta")}


def _index(path: Path) -> dict[str, dict[str, int]]:
    return json.loads(path.read_text())


def _parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())
