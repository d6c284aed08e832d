"""Offloading: weights stay in the CPU's memory and are copied to a device to compute.

Takes a network and a device; returns another network whose weights are copies on the device, all at once or one block
at a time. The copies are freed when nothing refers to them any more. The originals are only read, so nothing is copied
back, and a job leaves nothing behind. No layer is patched or hooked. Quantized weights are copied as they are.

On a CUDA device a block is copied on a separate stream while the previous block computes, from page-locked memory. On
other devices copying and computing alternate.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from zcore.choices import Offload
from zcore.errors import CheckpointError
from zcore.imaging.weights.quantization import is_gguf

Transfer = Callable[[Tensor], Tensor]
"""Copies a tensor to another place and returns the copy."""

BLOCKS = "layers"
"""The name of the main blocks, in both the transformer and the text encoder."""

PIECE_BYTES = 1024**3
"""torch rounds page-locked memory up to a power of two: allocated one by one, many weights would take twice their size.
"""
ALIGNED_BYTES = 256

OWN_TENSORS = ("_parameters", "_buffers")
"""The attributes in which a torch module holds its own tensors, without its children's."""


def prepare_offload(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network's weights to the CPU memory that `device` copies from fastest, and return the network.

    Raises `CheckpointError` for a type of weight that cannot be copied.
    """
    to_cpu = _transfer_to_cpu(device)
    for module in network.modules():
        _transfer_own(module, to_cpu)
    return network


def load_to_device(
    network: nn.Module, device: torch.device, unit: Offload, leave_out: Collection[str] = ()
) -> nn.Module:
    """Return the network with copies of its weights on the device.

    With the unit `block`, its main blocks are copied when they are accessed, without their children `leave_out`.
    """
    if unit != "block":
        return copy_to_device(network, device)
    copied = copy_to_device(network, device, [BLOCKS])
    blocks = cast(Sequence[nn.Module], getattr(network, BLOCKS))
    others = {name: child for name, child in _children(copied).items() if name != BLOCKS}
    copied.__dict__["_modules"] = others
    copied.__dict__[BLOCKS] = StreamedBlocks(blocks, device, leave_out)
    return copied


def copy_to_device(network: nn.Module, device: torch.device, leave_out: Collection[str] = ()) -> nn.Module:
    """Return the network with copies of its weights on the device. The children `leave_out` are shared, not copied."""
    return _transferred(network, partial(_copied, device), leave_out)


class StreamedBlocks(Sequence[nn.Module]):
    """Blocks that are copied to the device when they are accessed; at most two are there at once.

    Accessing a block starts copying the next one; after the last block that is the first. Accessing any other block
    waits for its copy. A caller must drop its reference to a block before it accesses another.
    """

    def __init__(self, stored: Sequence[nn.Module], device: torch.device, leave_out: Collection[str] = ()) -> None:
        """`leave_out` names children of the blocks that are not used and therefore not copied."""
        self._stored = stored
        self._device = device
        self._leave_out = leave_out
        self._current: _BlockCopy | None = None
        self._next: _BlockCopy | None = None

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> "StreamedBlocks": ...
    def __getitem__(self, index: int | slice) -> "nn.Module | StreamedBlocks":
        """Return the block on the device, or for a slice, blocks that are not copied yet."""
        if isinstance(index, slice):
            return StreamedBlocks(self._stored[index], self._device, self._leave_out)
        if self._current is None or self._current.index != index:
            self._current = self._finished_copy(index)
            self._next = self._started_copy((index + 1) % len(self))
        return self._current.block

    def _finished_copy(self, index: int) -> "_BlockCopy":
        """Return the block, from the copy in progress if it is this block's. Frees the previous block first."""
        found, self._current, self._next = self._next, None, None
        if found is None or found.index != index:
            del found
            found = self._started_copy(index)
        if found.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(found.copied)
        return found

    def _started_copy(self, index: int) -> "_BlockCopy":
        if self._device.type != "cuda":
            return _BlockCopy(index, copy_to_device(self._stored[index], self._device, self._leave_out), None)
        copying = _copying_stream(self._device)
        # The copy reuses the memory of earlier blocks, whose computation must have finished.
        copying.wait_stream(torch.cuda.current_stream(self._device))
        copied = torch.cuda.Event()
        with torch.cuda.stream(copying):
            block = copy_to_device(self._stored[index], self._device, self._leave_out)
            copied.record(copying)
        return _BlockCopy(index, block, copied)


@dataclass(frozen=True, slots=True, eq=False)
class _BlockCopy:
    """A block on the device, and the event that marks the end of its copying if that uses a separate stream."""

    index: int
    block: nn.Module
    copied: torch.cuda.Event | None


class OffloadedNetwork:
    """A network that is copied to its device when it is needed, and can be unloaded from it."""

    def __init__(self, network: nn.Module, device: torch.device, unit: Offload) -> None:
        """With the unit `none` the network is on its device from the start; if unloaded, it returns as a whole."""
        self._device = device
        self._unit: Offload = unit
        self._stored = None if unit == "none" else prepare_offload(network, device)
        self._present = network if unit == "none" else None

    def on_device(self) -> nn.Module:
        """Return the network ready to compute on its device. Must be called again for each use."""
        if self._present is None:
            assert self._stored is not None, "a network is stored or present"
            self._present = load_to_device(self._stored, self._device, self._unit)
        return self._present

    def unload(self) -> bool:
        """Remove the network from its device; return whether that freed device memory.

        It frees none on a CPU, or if the network is unloaded already. A network that was loaded directly onto the
        device is copied to the CPU's memory the first time, and that copy is retained.
        """
        if self._present is None or (self._unit == "none" and self._device.type == "cpu"):
            return False
        if self._stored is None:
            self._stored = _transferred(self._present, _transfer_to_cpu(self._device))
        self._present = None
        return self._device.type != "cpu"


class _PageLockedMemory:
    """CPU memory from which a device copies fastest, even while it computes."""

    def __init__(self, piece_bytes: int = PIECE_BYTES, locked: bool = True) -> None:
        self._piece_bytes = piece_bytes
        self._locked = locked
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy_of(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if len(self._free) < size:
            self._free = self._piece(max(self._piece_bytes, size))
        taken, self._free = self._free[:size], self._free[ceil(size / ALIGNED_BYTES) * ALIGNED_BYTES :]
        return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _piece(self, size_bytes: int) -> Tensor:
        """Allocate page-locked memory, or ordinary memory if the system locks no more: slower, but not a failure."""
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._locked)
        except RuntimeError:  # raised by CUDA's host allocator, which has no narrower class
            if not self._locked:
                raise
            self._locked = False
            return torch.empty(size_bytes, dtype=torch.uint8)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that copies all networks: memory freed on a stream is reused on the same stream."""
    return torch.cuda.Stream(device)


def _transfer_to_cpu(device: torch.device) -> Transfer:
    return _PageLockedMemory().copy_of if device.type == "cuda" else _on_the_cpu


def _on_the_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")


def _copied(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy to the device, even if the tensor is already there. The CPU does not wait for the copy."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _transferred(module: nn.Module, transfer: Transfer, leave_out: Collection[str] = ()) -> nn.Module:
    """Return a copy of a module with transferred weights; the children `leave_out` are shared with the original."""
    children = {
        name: child if name in leave_out else _transferred(child, transfer) for name, child in _children(module).items()
    }
    copied = copy.copy(module)
    copied.__dict__["_modules"] = children
    for kind in OWN_TENSORS:
        copied.__dict__[kind] = dict(copied.__dict__[kind])
    _transfer_own(copied, transfer)
    return copied


def _transfer_own(module: nn.Module, transfer: Transfer) -> None:
    """Replace a module's own tensors, without its children's, by transferred ones."""
    for kind in OWN_TENSORS:
        own = cast(dict[str, Tensor | None], module.__dict__[kind])
        own.update({name: _transferred_weight(tensor, transfer) for name, tensor in own.items() if tensor is not None})


def _children(module: nn.Module) -> dict[str, nn.Module]:
    children = module._modules  # pyright: ignore[reportPrivateUsage]
    return {name: child for name, child in children.items() if child is not None}


def _transferred_weight(tensor: Tensor, transfer: Transfer) -> Tensor:
    """Transfer a weight of any type, with every tensor inside it. Raises `CheckpointError` for an unknown type."""
    if type(tensor) is Tensor:
        return transfer(tensor)
    if type(tensor) is nn.Parameter:
        return nn.Parameter(transfer(tensor.detach()), requires_grad=False)
    return _transferred_packed(tensor, type(tensor), transfer)


def _transferred_packed(tensor: Any, kind: Any, transfer: Transfer) -> Tensor:
    if hasattr(kind, "__tensor_flatten__"):  # torchao's
        names, context = tensor.__tensor_flatten__()
        inner = {str(name): _transferred_weight(getattr(tensor, name), transfer) for name in names}
        whole = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        return nn.Parameter(whole, requires_grad=False)
    if is_gguf(tensor):
        return kind(transfer(tensor.as_tensor()), quant_type=tensor.quant_type)
    raise CheckpointError(f"cpu_offload: weights of type {kind.__name__} cannot be copied to a device")
