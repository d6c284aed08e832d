"""Weights that rest in the CPU's memory and come to a device to compute.

Takes a network and a device; gives another network whose weights are copies there, all at once or a block at a time.
What came leaves when nobody holds it any more: the weights that rest are only read, so that leaving copies nothing
back, and a job leaves nothing behind. No layer is patched or hooked. Packed weights come as they are.
Does not know what the networks compute, prompts and requests.

On a CUDA device a block is copied on a stream of its own while the one before it computes, out of memory that the
system may not move (page-locked). Elsewhere the same is done one after the other.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from zcore.errors import CheckpointError
from zcore.imaging.model.loader import Offload

Change = Callable[[Tensor], Tensor]

BLOCKS = "layers"
"""What both the transformer and the text encoder call their main blocks."""

PIECE_BYTES = 1024**3
"""torch rounds page-locked memory up to a power of two: alone, many a weight would take twice its size."""
ALIGNED_BYTES = 256

OWN = ("_parameters", "_buffers")
"""Where a module of torch's keeps tensors that it has beside its children's."""


def ready_to_leave(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself, whose weights rest in the CPU's memory from now on, where `device` copies from fastest.

    Raises `CheckpointError` for weights of a kind that cannot be copied.
    """
    keep = _keeping(device)
    for module in network.modules():
        _change_own(module, keep)
    return network


def brought(network: nn.Module, device: torch.device, unit: Offload, but: Collection[str] = ()) -> nn.Module:
    """The network with copies of its weights on the device; with the unit `block`, its main blocks as they are asked
    for, without `but` these of their children.
    """
    if unit != "block":
        return moved(network, device)
    copied = moved(network, device, [BLOCKS])
    blocks = cast(Sequence[nn.Module], getattr(network, BLOCKS))
    others = {name: child for name, child in _children(copied).items() if name != BLOCKS}
    copied.__dict__["_modules"] = others
    copied.__dict__[BLOCKS] = StreamedBlocks(blocks, device, but)
    return copied


def moved(network: nn.Module, device: torch.device, but: Collection[str] = ()) -> nn.Module:
    """A network with copies of the weights on the device; `but` these of its children, which are shared."""
    return _changed(network, partial(_copied, device), but)


class StreamedBlocks(Sequence[nn.Module]):
    """Blocks that come to the device one at a time, each when it is asked for; at most two are there at once.

    With a block, the copying of the one behind it begins, and after the last of the first. Any other may be asked for,
    and is waited for. Nobody should hold a block when he asks for another.
    """

    def __init__(self, resting: Sequence[nn.Module], device: torch.device, but: Collection[str] = ()) -> None:
        """`but` are children of the blocks that nobody asks for, and that stay where they are."""
        self._resting = resting
        self._device = device
        self._but = but
        self._given: _Arrival | None = None
        self._next: _Arrival | None = None

    def __len__(self) -> int:
        return len(self._resting)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> "StreamedBlocks": ...
    def __getitem__(self, index: int | slice) -> "nn.Module | StreamedBlocks":
        """The block, on the device; of a slice, blocks that are yet to come."""
        if isinstance(index, slice):
            return StreamedBlocks(self._resting[index], self._device, self._but)
        if self._given is None or self._given.index != index:
            self._given = self._arrived(index)
            self._next = self._arrival((index + 1) % len(self))
        return self._given.block

    def _arrived(self, index: int) -> "_Arrival":
        """The block that is on its way, or another; what was there before has left when it comes."""
        found, self._given, self._next = self._next, None, None
        if found is None or found.index != index:
            del found
            found = self._arrival(index)
        if found.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(found.copied)
        return found

    def _arrival(self, index: int) -> "_Arrival":
        """A block whose copying has begun."""
        if self._device.type != "cuda":
            return _Arrival(index, moved(self._resting[index], self._device, self._but), None)
        copying = _copying_stream(self._device)
        # It writes to memory that blocks before left, which have to have computed.
        copying.wait_stream(torch.cuda.current_stream(self._device))
        copied = torch.cuda.Event()
        with torch.cuda.stream(copying):
            block = moved(self._resting[index], self._device, self._but)
            copied.record(copying)
        return _Arrival(index, block, copied)


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    """A block, and the event of its having been copied where a stream of its own does that."""

    index: int
    block: nn.Module
    copied: torch.cuda.Event | None


class OffloadedNetwork:
    """A network that comes to its device when it is needed, and leaves when it is told to."""

    def __init__(self, network: nn.Module, device: torch.device, unit: Offload) -> None:
        """With the unit `none` it is there from the start, and comes as a whole after it was told to leave."""
        self._device = device
        self._unit: Offload = unit
        self._resting = None if unit == "none" else ready_to_leave(network, device)
        self._present = network if unit == "none" else None

    def present(self) -> nn.Module:
        """The network as it computes on its device. To be asked for each time."""
        if self._present is None:
            assert self._resting is not None, "a network rests or is present"
            self._present = brought(self._resting, self._device, self._unit)
        return self._present

    def rest(self) -> bool:
        """Leave the device, and say whether memory of it became free: not on a CPU, and not if it rests already.

        What was loaded onto the device is copied to the CPU's memory the first time, and kept there too from then on.
        """
        if self._present is None or (self._unit == "none" and self._device.type == "cpu"):
            return False
        if self._resting is None:
            self._resting = _changed(self._present, _keeping(self._device))
        self._present = None
        return self._device.type != "cpu"


class _PageLocked:
    """The CPU's memory as a device copies from it fastest, and beside other work."""

    def __init__(self, piece_bytes: int = PIECE_BYTES, locked: bool = True) -> None:
        self._piece_bytes = piece_bytes
        self._locked = locked
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The tensor, copied there."""
        size = tensor.nbytes
        if len(self._free) < size:
            self._free = self._piece(max(self._piece_bytes, size))
        taken, self._free = self._free[:size], self._free[ceil(size / ALIGNED_BYTES) * ALIGNED_BYTES :]
        return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _piece(self, size_bytes: int) -> Tensor:
        """Ordinary memory where the system locks no more: slower to copy from, and no reason to fail."""
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._locked)
        except RuntimeError:  # of CUDA's allocator for the host, whose class says nothing of memory
            if not self._locked:
                raise
            self._locked = False
            return torch.empty(size_bytes, dtype=torch.uint8)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all networks: memory that a stream leaves free is reused by the same stream."""
    return torch.cuda.Stream(device)


def _keeping(device: torch.device) -> Change:
    """How weights get to where they rest."""
    return _PageLocked().copy_of if device.type == "cuda" else _on_the_cpu


def _on_the_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")


def _copied(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device, even where it is there; the CPU does not wait for it."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _changed(module: nn.Module, change: Change, but: Collection[str] = ()) -> nn.Module:
    """A module with changed weights, and its children too `but` these. The given one stays as it is."""
    children = {name: child if name in but else _changed(child, change) for name, child in _children(module).items()}
    copied = _with_children(module, children)
    for kind in OWN:
        copied.__dict__[kind] = dict(copied.__dict__[kind])
    _change_own(copied, change)
    return copied


def _change_own(module: nn.Module, change: Change) -> None:
    """Put changed weights in the place of those that a module has beside its children's."""
    for kind in OWN:
        own = cast(dict[str, Tensor | None], module.__dict__[kind])
        own.update({name: _weight(tensor, change) for name, tensor in own.items() if tensor is not None})


def _children(module: nn.Module) -> dict[str, nn.Module]:
    children = module._modules  # pyright: ignore[reportPrivateUsage]
    return {name: child for name, child in children.items() if child is not None}


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    copied = copy.copy(module)
    copied.__dict__["_modules"] = children
    return copied


def _weight(tensor: Tensor, change: Change) -> Tensor:
    """A weight of any kind, every tensor in it changed. Raises `CheckpointError` for a kind that is not known."""
    kind: Any = type(tensor)
    packed = cast(Any, tensor)
    if kind is Tensor:
        return change(tensor)
    if kind is nn.Parameter:
        return nn.Parameter(change(tensor.detach()), requires_grad=False)
    if hasattr(kind, "__tensor_flatten__"):  # torchao's
        names, context = packed.__tensor_flatten__()
        inner = {str(name): _weight(getattr(packed, name), change) for name in names}
        whole = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        return nn.Parameter(whole, requires_grad=False)
    if hasattr(tensor, "as_tensor"):  # diffusers' `GGUFParameter`
        return kind(change(packed.as_tensor()), quant_type=packed.quant_type)
    raise CheckpointError(f"cpu_offload: weights of the kind {kind.__name__} cannot be copied to a device")
