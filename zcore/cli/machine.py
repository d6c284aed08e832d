"""What this machine has to compute with: devices with their memory, torch, and attention kernels.

Takes nothing, or the sizes that a person pretends; gives frozen values. Loads torch. Does not know settings.
"""

import os
from dataclasses import dataclass

import torch

from zcore.errors import CheckpointError
from zcore.imaging.model.attention import attention_faults
from zcore.imaging.model.loader import Placement, device_of

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """A device by the name that settings give it, and its memory. `pretended` is one that need not be there."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    pretended: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it. `attention` is why each kernel cannot be used here, or None where it can."""

    devices: tuple[Device, ...]
    torch_version: str
    cuda_version: str | None
    attention: dict[str, str | None]

    @property
    def memory_bytes(self) -> dict[str, int]:
        """What each device has in all."""
        return {device.name: device.total_bytes for device in self.devices}

    @property
    def pretends(self) -> bool:
        """Whether it has a card that is not asked for its memory."""
        return any(device.pretended and device.name == "cuda" for device in self.devices)

    def device_of(self, name: str) -> torch.device:
        """The device that a setting means; a pretended card is there. Raises `CheckpointError` for one that is not."""
        if not self.pretends or name in ("cpu", "mps"):
            return device_of(name)
        if name not in ("auto", "cuda", "cuda:0"):
            raise CheckpointError(f"device: {name} was asked for, and one card is pretended")
        return torch.device("cuda")


def this_machine(vram_gib: float | None = None, ram_gib: float | None = None) -> Machine:
    """What there is; with `vram_gib` one card of that size in place of all, with `ram_gib` so much for the CPU."""
    cpu = _cpu() if ram_gib is None else _pretended("cpu", ram_gib)
    cards = _cards() if vram_gib is None else [_pretended("cuda", vram_gib)]
    # Kernels are those of this machine, whatever is pretended.
    placement = Placement(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    return Machine((cpu, *cards), str(torch.__version__), torch.version.cuda, attention_faults(placement))


def _pretended(name: str, gib: float) -> Device:
    return Device(name, "pretended", round(gib * GIB), round(gib * GIB), pretended=True)


def _cpu() -> Device:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return Device("cpu", f"{os.cpu_count()} cores", total, _available_bytes() or total)


def _available_bytes() -> int | None:
    """What programs may still take: Linux tells, caches left out; others do not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _cards() -> list[Device]:
    if torch.backends.mps.is_available():
        most = torch.mps.recommended_max_memory()
        return [Device("mps", "Apple GPU, in the CPU's memory", most, most)]
    found: list[Device] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index}" if index else "cuda"
        found.append(Device(name, torch.cuda.get_device_name(index), total, free))
    return found
