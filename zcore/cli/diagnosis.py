"""The findings of `zimage doctor`, and their formatting as text and as JSON.

Only formats what it is given: queries no device and computes no estimate. Does not need torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcore.cli.machine import Machine
    from zcore.imaging.memory_estimate import DeviceMemory, Estimate, GenerationShape, PhaseMemory

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Check:
    """Result of checking one thing that generation needs. `problem` is None if it passed."""

    name: str
    found: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ProfileFit:
    """GPU memory that a profile needs. `problem` is the reason why it does not fit, or None if it does."""

    name: str
    peak_bytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that the report contains. `reason` explains the verdict in one line."""

    machine: "Machine"
    checks: tuple[Check, ...]
    generation: "GenerationShape"
    estimate: "Estimate"
    reason: str
    largest_square_px: int | None
    profiles: tuple[ProfileFit, ...]


def reason_of(estimate: "Estimate") -> str:
    """Explain the verdict in one line, for the device that lacks the most memory, or for the GPU if all is well."""
    known = [device for device in estimate.devices if device.memory_bytes is not None]
    tightest = max(known, key=lambda device: (device.missing_bytes, device.device != "cpu", device.peak_bytes))
    available = gib(tightest.memory_bytes or 0)
    need = f"{tightest.device} needs {gib(tightest.peak_bytes)} of {available} to {tightest.widest.phase}"
    return f"{need}, {gib(tightest.missing_bytes)} too much" if tightest.missing_bytes else need


def as_text(diagnosis: Diagnosis) -> list[str]:
    """Return the lines of the report for people."""
    estimate, generation = diagnosis.estimate, diagnosis.generation
    size = f"{generation.width_px}x{generation.height_px}"
    batch = f", {generation.batch_size} at once" if generation.batch_size > 1 else ""
    verdict = "fits" if estimate.fits else "does not fit"
    side = diagnosis.largest_square_px
    return [
        *machine_lines(diagnosis.machine),
        "",
        *(_check_line(check) for check in diagnosis.checks),
        "",
        *_weight_lines(estimate),
        *(line for device in estimate.devices for line in ("", *_device_lines(device, estimate.in_tiles))),
        "",
        f"{size}{batch}: {verdict}: {diagnosis.reason}",
        f"largest square image: {f'{side}x{side}' if side else 'none fits'}",
        *(_profile_lines(diagnosis.profiles)),
    ]


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the report for programs, with derived values. Sizes are in bytes (`_bytes`) and pixels (`_px`)."""
    report = asdict(diagnosis)
    devices = [
        {
            **asdict(device),
            "widest_phase": device.widest.phase,
            "peak_bytes": device.peak_bytes,
            "missing_bytes": device.missing_bytes,
        }
        for device in diagnosis.estimate.devices
    ]
    return {**report, "estimate": {**report["estimate"], "devices": devices}, "fits": diagnosis.estimate.fits}


def gib(size_bytes: int) -> str:
    """Format a number of bytes in GiB."""
    return f"{size_bytes / GIB:.2f} GiB"


def machine_lines(machine: "Machine") -> list[str]:
    """Return the lines about devices, torch, and the attention backends with the reason for each absence."""
    devices = [
        f"{device.name:8}{gib(device.total_bytes):>11}"
        + (f"  {device.description}" if device.assumed else f"{gib(device.free_bytes):>11} free  {device.description}")
        for device in machine.devices
    ]
    attention = [
        f"  {name}: {'available' if problem is None else f'not available: {problem}'}"
        for name, problem in machine.attention.items()
    ]
    cuda = f"CUDA {machine.cuda_version}" if machine.cuda_version else "without CUDA"
    return [*devices, f"torch {machine.torch_version}, {cuda}", "attention:", *attention]


def _check_line(check: Check) -> str:
    return f"{check.name}: {check.found}" + (f": PROBLEM: {check.problem}" if check.problem else "")


def _weight_lines(estimate: "Estimate") -> list[str]:
    rows = [f"{'weights':14}{'computes on':13}{'stored on':10}{'kind':18}{'size':>11}"]
    return rows + [
        f"{weights.component:14}{weights.device:13}{weights.storage_device:10}{weights.kind:18}{gib(weights.size_bytes):>11}"
        for weights in estimate.weights
    ]


def _device_lines(device: "DeviceMemory", in_tiles: bool) -> list[str]:
    def phase_line(phase: "PhaseMemory") -> str:
        note = ", in tiles" if phase.phase == "decode" and in_tiles and phase.working_bytes else ""
        parts = f"{gib(phase.weights_bytes):>11}{gib(phase.working_bytes):>11}{gib(phase.total_bytes):>11}"
        return f"{phase.phase:10}{parts}{note}"

    return [
        f"{device.device:10}{'weights':>11}{'working':>11}{'total':>11}",
        *map(phase_line, device.phases),
        f"runtime   {gib(device.runtime_bytes):>33}, allowance for memory outside tensors; not measured",
        f"peak      {gib(device.peak_bytes):>33} of {gib(device.memory_bytes or 0)}",
    ]


def _profile_lines(profiles: Sequence[ProfileFit]) -> list[str]:
    if not profiles:
        return []
    rows = [f"{fit.name:12}{gib(fit.peak_bytes):>11}  {fit.problem or 'fits'}" for fit in profiles]
    return ["", "profiles on this GPU:", *rows]
