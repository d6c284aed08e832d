"""Optimizers of the trainers: Muon for weight matrices, AdamW for all other parameters.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by the
nearest orthogonal matrix, computed by a few Newton-Schulz iterations, so that all directions learn at the same speed.
On this model it reached a shape accuracy in two minutes that AdamW alone did not reach in ten.
"""
# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
from torch import nn


class Optimizers:
    """Muon and AdamW with one schedule: a short warm-up, a plateau, then a linear decay to a twentieth.

    `matrices` are parameters of two dimensions; `decay_from` is the fraction of `steps` at which the decay starts.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        steps: int,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
        decay_from: float = 0.5,
        warm_up: int = 60,
    ) -> None:
        self.steps, self.decay_from, self.warm_up, self.others = steps, decay_from, warm_up, others
        self._all: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            self._all.append((torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay), muon_lr))
        if others:
            self._all.append((torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0), adam_lr))

    def step(self, step: int) -> None:
        """Apply the gradients at the learning rate of this step and clear them.

        The gradients of AdamW's parameters are clipped to a norm of 1.
        """
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer, lr in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * self.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at this step, from 0 to 1."""
        warm_up = min(1.0, (step + 1) / self.warm_up)
        done = step / max(1, self.steps)
        decay = min(1.0, max(0.0, (1 - done) / (1 - self.decay_from)))
        return warm_up * max(0.05, decay)

    def state_dict(self) -> list[Any]:
        """Return the states of the optimizers."""
        return [optimizer.state_dict() for optimizer, _ in self._all]

    def load_state_dict(self, state: list[Any] | None) -> None:
        """Restore saved states. `None` keeps the fresh optimizers."""
        for (optimizer, _), saved in zip(self._all, state or (), strict=state is not None):
            optimizer.load_state_dict(saved)
