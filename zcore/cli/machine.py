"""The hardware of this machine: devices with their memory, the torch version and the usable attention kernels.

Memory sizes can be overridden, to answer questions about hardware that is not present. Imports torch. Independent of
the settings.
"""

import os
from dataclasses import dataclass

import torch

from zcore.errors import CheckpointError
from zcore.imaging.kernels.attention import attention_problems
from zcore.imaging.weights.loader import Placement, device_of

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """A device, named as in the settings, and its memory. `assumed` means that the size was given, not measured."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices and software. `attention` maps each kernel to the reason why it cannot be used, or None if it can."""

    devices: tuple[Device, ...]
    torch_version: str
    cuda_version: str | None
    attention: dict[str, str | None]

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Total memory by device name."""
        return {device.name: device.total_bytes for device in self.devices}

    @property
    def assumes_gpu(self) -> bool:
        """Whether the GPU is an assumed one."""
        return any(device.assumed and device.name == "cuda" for device in self.devices)

    def device_of(self, name: str) -> torch.device:
        """Return the device that a setting names; an assumed GPU counts as present.

        Raises `CheckpointError` if there is no such device.
        """
        if not self.assumes_gpu or name in ("cpu", "mps"):
            return device_of(name)
        if name not in ("auto", "cuda", "cuda:0"):
            raise CheckpointError(f"device: {name} does not exist: --vram assumes a single GPU, `cuda`")
        return torch.device("cuda")


def inspect_machine(vram_gib: float | None = None, ram_gib: float | None = None) -> Machine:
    """Return what this machine has.

    `vram_gib` replaces all GPUs by a single one of that size; `ram_gib` replaces the size of the main memory.
    """
    cpu = _cpu() if ram_gib is None else _assumed("cpu", ram_gib)
    gpus = _gpus() if vram_gib is None else [_assumed("cuda", vram_gib)]
    # The attention kernels are always those of this machine, even if its devices are overridden.
    placement = Placement(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    return Machine((cpu, *gpus), str(torch.__version__), torch.version.cuda, attention_problems(placement))


def _assumed(name: str, gib: float) -> Device:
    return Device(name, "assumed", round(gib * GIB), round(gib * GIB), assumed=True)


def _cpu() -> Device:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return Device("cpu", f"{os.cpu_count()} cores", total, _available_bytes() or total)


def _available_bytes() -> int | None:
    """Return the memory that programs can still allocate, including reclaimable caches; None except on Linux."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _gpus() -> list[Device]:
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        return [Device("mps", "Apple GPU, shares the CPU's memory", size, size)]
    found: list[Device] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index}" if index else "cuda"
        found.append(Device(name, torch.cuda.get_device_name(index), total, free))
    return found
