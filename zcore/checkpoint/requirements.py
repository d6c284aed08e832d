"""What these settings need and this machine lacks: the model's files and the GPU, all at once. Needs no torch.

For the person who starts the service or a command, before anything heavy is imported. The loader checks again.
"""

import shutil
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

from zcore.checkpoint.files import is_hub_id, locate_local
from zcore.settings import Settings

PUBLISHED_HUB_ID = "Tongyi-MAI/Z-Image-Turbo"
DOWNLOAD_GB = 33
DRIVER_PATHS = ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
"""Present with a driver of NVIDIA, of Windows' subsystem for Linux, of AMD; torch calls all of them cuda."""


def missing(settings: Settings) -> list[str]:
    """Return a sentence for each thing that is missing, beginning with its settings; empty if nothing is."""
    found = [] if locate_local(settings.model_location) is not None else [_missing_model(settings.model_path)]
    gpu = missing_gpu(settings, ("text_encoder", "transformer", "vae"))
    return [*found, gpu] if gpu else found


def missing_gpu(settings: Settings, components: Collection[str]) -> str | None:
    """Return why these components cannot run where the settings place them; None if nothing speaks against it."""
    devices = {
        "encoder.device": ("text_encoder", settings.encoder.device),
        "pipeline.device": ("transformer", settings.pipeline.device),
        "pipeline.vae_device": ("vae", settings.pipeline.vae_device),
    }
    on_cuda = [name for name, (part, device) in devices.items() if part in components and device.startswith("cuda")]
    reason = _why_no_cuda() if on_cuda else None
    return f"{', '.join(on_cuda)}: cuda is configured, but {reason}" if reason else None


def ways_out(profile: str) -> list[str]:
    """Return what to do instead, as commands with an explanation."""
    return [
        f"`.venv/bin/zimage doctor --profile {profile}` shows what this machine has and what fits it",
        "the profile `demo` needs neither a GPU nor a download",
    ]


def _missing_model(model_path: str) -> str:
    if is_hub_id(model_path):
        size = f" ({DOWNLOAD_GB} GB)" if model_path == PUBLISHED_HUB_ID else ""
        return (
            f"model_path: {model_path} is not on this machine; download it: `.venv/bin/hf download {model_path}`{size}"
        )
    return (
        f"model_path: {model_path} is not a folder; download the model ({DOWNLOAD_GB} GB): "
        f"`.venv/bin/hf download {PUBLISHED_HUB_ID} --local-dir {model_path}`"
    )


def _why_no_cuda() -> str | None:
    """Return why torch cannot use a CUDA device here; None if nothing speaks against it."""
    if not (shutil.which("nvidia-smi") or any(Path(path).exists() for path in DRIVER_PATHS)):
        return "this machine has no GPU driver"
    torch_version = metadata.version("torch")
    return f"torch {torch_version} is built for CPUs only" if torch_version.endswith("+cpu") else None
