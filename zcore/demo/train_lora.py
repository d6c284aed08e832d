"""Stage `lora`: train two small styles for the demo model.

Trains low-rank branches (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) next to the frozen transformer, on the
same compositions rendered in another style: as outlines, or in night colours. The captions do not mention the style, so
the LoRAs need no trigger word. One file uses the key layout of diffusers, the other that of kohya with an alpha, since
both are common.
"""

# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import random
import time
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zcore.demo.optimizers import Optimizers
from zcore.demo.render import Style
from zcore.demo.train_transformer import SHORT, FrozenParts, Pool, frame_of, load_transformer, predict, sample_sigmas
from zcore.demo.training_folder import TrainingFolder
from zcore.demo.vocabulary import Kind

STYLES: Final[tuple[Style, ...]] = ("outline", "night")
RANK: Final = 8
ALPHA: Final = 4.0
"""Alpha of the kohya file: its branches are scaled by alpha / rank."""
_TARGETS: Final = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
_SIZE: Final = (128, 128)


class Branched(nn.Module):
    """A frozen linear layer plus a trained low-rank branch."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.T) @ self.up.T


def train_lora(training: TrainingFolder, steps: int = 300, batch: int = 32, pool: int = 1200) -> None:
    """Train both styles on `pool` images each, from their saved states if there are any."""
    for style in STYLES:
        _train(training, style, steps, batch, pool)


def export_loras(training: TrainingFolder, folder: Path) -> None:
    """Write `demo-outline.safetensors` in diffusers' layout and `demo-night.safetensors` in kohya's, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, layout in zip(STYLES, (diffusers_layout, kohya_layout), strict=True):
        state = training.load(f"lora-{style}.pt")
        if state is None:
            raise FileNotFoundError(f"no trained LoRA '{style}' in {training.folder}: run the stage `lora` first")
        path = folder / f"demo-{style}.safetensors"
        branches = {
            name: (state["branches"][f"{name}.down"], state["branches"][f"{name}.up"]) for name in state["names"]
        }
        save_file(layout(branches), str(path), metadata={"format": "pt"})
        path.chmod(0o644)


def diffusers_layout(branches: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return `transformer.<module>.lora_A.weight` and `lora_B.weight`, with scale 1."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in branches.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16().contiguous()
    return tensors


def kohya_layout(branches: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return `lora_unet_<module_with_underscores>.lora_down.weight`, `.lora_up.weight`, and `.alpha` for the scale."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in branches.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.bfloat16().contiguous()
        tensors[f"{key}.lora_up.weight"] = (up * (RANK / ALPHA)).bfloat16().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def merge(model: Any, path: Path) -> None:
    """Add a LoRA file in either of the two layouts to the weights of a model."""
    tensors = load_file(str(path))
    for name, module in model.named_modules():
        plain, kohya = f"transformer.{name}.lora_", f"lora_unet_{name.replace('.', '_')}."
        if f"{plain}A.weight" in tensors:
            change = tensors[f"{plain}B.weight"].float() @ tensors[f"{plain}A.weight"].float()
        elif f"{kohya}alpha" in tensors:
            down = tensors[f"{kohya}lora_down.weight"].float()
            scale = float(tensors[f"{kohya}alpha"]) / down.shape[0]
            change = scale * tensors[f"{kohya}lora_up.weight"].float() @ down
        else:
            continue
        module.weight.data += change.to(module.weight.dtype)


def add_branches(model: Any) -> dict[str, Branched]:
    """Add a branch to every attention and feed-forward matrix of the blocks; return the branches by module name."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_TARGETS) and name.startswith(("layers.", "noise_refiner."))
    ]
    branches: dict[str, Branched] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        branches[name] = Branched(cast(nn.Linear, model.get_submodule(name)))
        setattr(model.get_submodule(parent), leaf, branches[name])
    return branches


def _train(training: TrainingFolder, style: Style, steps: int, batch: int, pool: int) -> None:
    torch.manual_seed(0)
    frozen, model = FrozenParts(training), load_transformer(training)
    branches = nn.ModuleDict({name.replace(".", "/"): branch for name, branch in add_branches(model).items()})
    branches.to(training.device)
    trained = [p for p in branches.parameters() if p.requires_grad]
    optimizers = Optimizers(trained, [], steps, muon_lr=0.01, adam_lr=0.0, warm_up=20)
    name, first, spent = f"lora-{style}.pt", 0, 0.0
    state = training.load(name)
    if state:
        branches.load_state_dict(
            {key: state["branches"][key.replace("/", ".")] for key in _keys(branches)}, strict=False
        )
        optimizers.load_state_dict(state["optimizers"])
        first, spent = state["step"], state["seconds"]
    if first >= steps:
        return
    images = Pool(training, frozen.vae, _SIZE, pool, style)
    mixture: dict[Kind, float] = {"object": 0.55, "count": 0.15, "pair": 0.15, "scene": 0.15}
    frame, rng, started = frame_of(*_SIZE, SHORT, training.device), random.Random(first), time.time()
    for step in range(first, steps):
        patches, weights, compositions = images.draw(rng, batch, mixture)
        words, real = frozen.words(compositions, rng, SHORT)
        sigma = sample_sigmas(batch).to(patches.device)[:, None, None]
        noise = torch.randn_like(patches)
        with torch.autocast(training.device, torch.bfloat16):
            output = predict(model, (1 - sigma) * patches + sigma * noise, 1 - sigma.flatten(), words, real, frame)
        loss = ((output.float() - (patches - noise)).square().mean(-1) * weights).mean()
        loss.backward()
        optimizers.step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            training.log("lora", style=style, step=step + 1, seconds=seconds, loss=loss.item())
            tensors = {
                key.replace("/", "."): value.detach() for key, value in branches.named_parameters() if "base" not in key
            }
            names = [key.replace("/", ".") for key in branches]
            training.save(
                name,
                {
                    "branches": tensors,
                    "names": names,
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                },
            )


def _keys(branches: nn.ModuleDict) -> list[str]:
    return [key for key, _ in branches.named_parameters() if "base" not in key]
