"""What `zimage doctor` found, as values, as words and as JSON.

Takes what was found; gives lines for a person, or an object for programs. Asks nothing and computes nothing. Needs no
torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcore.cli.machine import Machine
    from zcore.imaging.model.memory import DeviceMemory, Estimate, Painting, PhaseMemory

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Checked:
    """One thing that has to be there; `fault` says what is wrong with it."""

    name: str
    found: str
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class ProfileFit:
    """What a profile needs of the card, and why it does not fit, if so."""

    name: str
    peak_bytes: int
    fault: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that is told. `why` is one line about the verdict."""

    machine: "Machine"
    checked: tuple[Checked, ...]
    painting: "Painting"
    estimate: "Estimate"
    why: str
    largest_square_px: int | None
    profiles: tuple[ProfileFit, ...]


def why(found: "Estimate") -> str:
    """The verdict's reason in one line. Of the device that lacks the most, or else of the card."""
    known = [device for device in found.devices if device.memory_bytes is not None]
    short = max(known, key=lambda device: (device.missing_bytes, device.device != "cpu", device.peak_bytes))
    need = f"{short.device} needs {gib(short.peak_bytes)} of {gib(short.memory_bytes or 0)} to {short.widest.phase}"
    return f"{need}, {gib(short.missing_bytes)} too much" if short.missing_bytes else need


def in_words(found: Diagnosis) -> list[str]:
    """The report, line by line."""
    size = f"{found.painting.width_px}x{found.painting.height_px}"
    more = f", {found.painting.batch_size} at once" if found.painting.batch_size > 1 else ""
    verdict = "fits" if found.estimate.fits else "does not fit"
    side = found.largest_square_px
    return [
        *_of_machine(found.machine),
        "",
        *(_of_checked(one) for one in found.checked),
        "",
        *_of_weights(found.estimate),
        *(line for device in found.estimate.devices for line in ("", *_of_device(device, found.estimate.in_tiles))),
        "",
        f"{size}{more}: {verdict}: {found.why}",
        f"largest square picture: {f'{side}x{side}' if side else 'none fits'}",
        *(_of_profiles(found.profiles)),
    ]


def as_json(found: Diagnosis) -> dict[str, Any]:
    """All of it, with what follows from it: bytes, pixels, `fits`."""
    told = asdict(found)
    devices = [
        {
            **asdict(device),
            "widest_phase": device.widest.phase,
            "peak_bytes": device.peak_bytes,
            "missing_bytes": device.missing_bytes,
        }
        for device in found.estimate.devices
    ]
    return {**told, "estimate": {**told["estimate"], "devices": devices}, "fits": found.estimate.fits}


def gib(size_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{size_bytes / GIB:.2f} GiB"


def _of_machine(machine: "Machine") -> list[str]:
    devices = [
        f"{one.name:8}{gib(one.total_bytes):>11}"
        + (f"  {one.description}" if one.pretended else f"{gib(one.free_bytes):>11} free  {one.description}")
        for one in machine.devices
    ]
    usable = [name for name, fault in machine.attention.items() if fault is None]
    others = [f"  not {name}: it {fault}" for name, fault in machine.attention.items() if fault is not None]
    cuda = f"CUDA {machine.cuda_version}" if machine.cuda_version else "without CUDA"
    return [*devices, f"torch {machine.torch_version}, {cuda}", f"attention: {', '.join(usable)}", *others]


def _of_checked(one: Checked) -> str:
    return f"{one.name}: {one.found}" if one.fault is None else f"{one.name}: {one.found}: NOT WHOLE: {one.fault}"


def _of_weights(found: "Estimate") -> list[str]:
    rows = [f"{'weights':14}{'computes on':13}{'rests on':10}{'kind':18}{'bytes':>11}"]
    return rows + [
        f"{one.component:14}{one.device:13}{one.rests_on:10}{one.kind:18}{gib(one.size_bytes):>11}"
        for one in found.weights
    ]


def _of_device(device: "DeviceMemory", in_tiles: bool) -> list[str]:
    from zcore.imaging.model.memory import RUNTIME_BYTES

    def phase_line(phase: "PhaseMemory") -> str:
        note = ", in tiles" if phase.phase == "decode" and in_tiles and phase.working_bytes else ""
        parts = f"{gib(phase.weights_bytes):>11}{gib(phase.working_bytes):>11}{gib(phase.total_bytes):>11}"
        return f"{phase.phase:10}{parts}{note}"

    return [
        f"{device.device:10}{'weights':>11}{'working':>11}{'together':>11}",
        *map(phase_line, device.phases),
        f"runtime   {gib(RUNTIME_BYTES):>33}, an allowance for what is not tensors; not measured",
        f"peak      {gib(device.peak_bytes):>33} of {gib(device.memory_bytes or 0)}",
    ]


def _of_profiles(profiles: Sequence[ProfileFit]) -> list[str]:
    if not profiles:
        return []
    rows = [f"{one.name:12}{gib(one.peak_bytes):>11}  {'fits' if one.fault is None else one.fault}" for one in profiles]
    return ["", "profiles on this card:", *rows]
