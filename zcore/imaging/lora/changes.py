"""What a LoRA does to the layers of a network, in the compact form of each kind.

The change of a layer W is one of

    low rank  factor * up @ down               Hu et al. 2021, https://arxiv.org/abs/2106.09685
    LoHa      factor * (a1 @ b1) ∘ (a2 @ b2)   Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098
    LoKr      factor * left ⊗ right            Yeh et al. 2023, https://arxiv.org/abs/2309.14859

and DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) also sets the norm of each row of the changed layer. LoHa
is stored as a low rank with the product of both ranks (row i of `up` is a1[i] ⊗ a2[i]), or as a matrix if that is
smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`factor * up @ down`: (out, rank) by (rank, in)."""

    down: Tensor
    up: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold it."""
        return self.down, self.up

    def rows(self, first: int, count: int) -> "LowRank":
        """Return the change of some of the outputs."""
        return LowRank(self.down, self.up[first : first + count], self.factor)

    def to(self, device: torch.device) -> "LowRank":
        """Return the same change on a device."""
        return LowRank(self.down.to(device), self.up.to(device), self.factor)

    def dense(self) -> Tensor:
        """Return the change as a matrix, float32 (out, in)."""
        return self.factor * (self.up.float() @ self.down.float())


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """`count` rows from `first` of `factor * left ⊗ right`: (a, b) and (c, d) give (a c, b d)."""

    left: Tensor
    right: Tensor
    factor: float
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.count, self.left.shape[1] * self.right.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold it."""
        return self.left, self.right

    def rows(self, first: int, count: int) -> "Kronecker":
        """Return the change of some of the outputs; rows of `left` that none of them needs are dropped."""
        height = self.right.shape[0]
        first += self.first
        needed = self.left[first // height : -(-(first + count) // height)]
        return Kronecker(needed, self.right, self.factor, first % height, count)

    def to(self, device: torch.device) -> "Kronecker":
        """Return the same change on a device."""
        return Kronecker(self.left.to(device), self.right.to(device), self.factor, self.first, self.count)

    def dense(self) -> Tensor:
        """Return the change as a matrix, float32 (out, in)."""
        product = torch.kron(self.left.float().contiguous(), self.right.float().contiguous())
        return self.factor * product[self.first : self.first + self.count]


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """The change of one layer. With a `magnitude` (out,), each row of the changed layer gets that norm (DoRA)."""

    change: LowRank | Kronecker
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA file. `sha256` covers its whole content, in hexadecimal; `notes` state what of it is left out, and why.

    If it was read as not `strict`, that includes what does not fit the model.
    """

    sha256: str
    layers: Mapping[str, LoraLayer]
    notes: tuple[str, ...] = ()
    strict: bool = True
