"""Stage `lora`: two small styles for the demo model.

Trains low-rank branches (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) beside the frozen transformer on the
same pictures drawn in another style: as outlines, or in the colours of the night. The captions say nothing of it, so
the effect needs no trigger word. One file is written in diffusers' key layout, the other in kohya's with an alpha,
since both are met in the wild.
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

from zcore.demo.muon import Optimizers
from zcore.demo.render import Style
from zcore.demo.transformer import SHORT, Painter, Pool, draw_sigmas, frame_of, load_transformer, paint
from zcore.demo.vocabulary import Kind
from zcore.demo.workplace import Workplace

STYLES: Final[tuple[Style, ...]] = ("outline", "night")
RANK: Final = 8
ALPHA: Final = 4.0
"""Of the kohya file: its branches count alpha / rank times what they hold."""
_TARGETS: Final = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
_SIZE: Final = (128, 128)


class Branched(nn.Module):
    """A frozen linear layer with a trained branch of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.T) @ self.up.T


def train_lora(place: Workplace, steps: int = 300, batch: int = 32) -> None:
    """Train both styles from their kept states, or anew; `export_loras` writes them."""
    for style in STYLES:
        _train(place, style, steps, batch)


def export_loras(place: Workplace, folder: Path) -> None:
    """Write `demo-outline.safetensors` in diffusers' layout and `demo-night.safetensors` in kohya's; bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, layout in zip(STYLES, (diffusers_layout, kohya_layout), strict=True):
        state = place.load(f"lora-{style}.pt")
        if state is None:
            raise FileNotFoundError(f"no trained LoRA '{style}' in {place.folder}: run the stage `lora` first")
        path = folder / f"demo-{style}.safetensors"
        branches = {
            name: (state["branches"][f"{name}.down"], state["branches"][f"{name}.up"]) for name in state["names"]
        }
        save_file(layout(branches), str(path), metadata={"format": "pt"})
        path.chmod(0o644)


def diffusers_layout(branches: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """`transformer.<module>.lora_A.weight` and `lora_B.weight`; the scale is 1."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in branches.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16().contiguous()
    return tensors


def kohya_layout(branches: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """`lora_unet_<module_with_underscores>.lora_down.weight`, `.lora_up.weight`, and `.alpha` for the scale."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in branches.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.bfloat16().contiguous()
        tensors[f"{key}.lora_up.weight"] = (up * (RANK / ALPHA)).bfloat16().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def merge(model: Any, path: Path) -> None:
    """Add one of our two files to a model's weights, whichever of the layouts it has."""
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
    """Put a branch beside every attention and feed-forward matrix of the blocks; by the modules' names."""
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


def _train(place: Workplace, style: Style, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    painter, model = Painter(place), load_transformer(place)
    branches = nn.ModuleDict({name.replace(".", "/"): branch for name, branch in add_branches(model).items()})
    branches.to(place.device)
    trained = [p for p in branches.parameters() if p.requires_grad]
    optimizers = Optimizers(trained, [nn.Parameter(torch.zeros(1))], steps, muon_lr=0.01, adam_lr=0.0, warm_up=20)
    name, first, spent = f"lora-{style}.pt", 0, 0.0
    state = place.load(name)
    if state:
        branches.load_state_dict(
            {key: state["branches"][key.replace("/", ".")] for key in _keys(branches)}, strict=False
        )
        optimizers.load_state_dict(state["optimizers"])
        first, spent = state["step"], state["seconds"]
    if first >= steps:
        return
    pool = Pool(place, painter.vae, _SIZE, 1200, style)
    mixture: dict[Kind, float] = {"object": 0.55, "count": 0.15, "pair": 0.15, "scene": 0.15}
    frame, rng, started = frame_of(*_SIZE, SHORT, place.device), random.Random(first), time.time()
    for step in range(first, steps):
        patches, weights, pictures = pool.draw(rng, batch, mixture)
        words, real = painter.words(pictures, rng, SHORT)
        sigma = draw_sigmas(batch).to(patches.device)[:, None, None]
        noise = torch.randn_like(patches)
        with torch.autocast(place.device, torch.bfloat16):
            output = paint(model, (1 - sigma) * patches + sigma * noise, 1 - sigma.flatten(), words, real, frame)
        loss = ((output.float() - (patches - noise)).square().mean(-1) * weights).mean()
        loss.backward()
        optimizers.step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = spent + time.time() - started
            place.log("lora", style=style, step=step + 1, seconds=seconds, loss=loss.item())
            kept = {
                key.replace("/", "."): value.detach() for key, value in branches.named_parameters() if "base" not in key
            }
            names = [key.replace("/", ".") for key in branches]
            place.save(
                name,
                {
                    "branches": kept,
                    "names": names,
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                },
            )


def _keys(branches: nn.ModuleDict) -> list[str]:
    return [key for key, _ in branches.named_parameters() if "base" not in key]
