"""The optimizer of all three trainers: Muon for the matrices inside, AdamW for everything else.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) turns the momentum of a weight matrix into the
nearest orthogonal one by a few Newton-Schulz steps, so that every direction learns at the same speed. On this
miniature it reached a shape accuracy in two minutes that AdamW alone did not reach in ten.
"""
# torch leaves parts of its own signatures without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration moves all singular values towards 1, from the same source."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; takes parameters of two or more dimensions, and reads more than two as (first, all
    the rest).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov's look ahead
                update = _orthogonal(direction) * max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])


def _orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()  # exact singular values are not needed, and this is several times faster
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Optimizers:
    """Muon and AdamW side by side on one schedule: a short rise, a plateau, a linear fall to a twentieth."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        steps: int,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
        fall_from: float = 0.5,
        warm_up: int = 60,
    ) -> None:
        self.steps, self.fall_from, self.warm_up, self.others = steps, fall_from, warm_up, others
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=muon_lr, weight_decay=weight_decay), muon_lr),
            (torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0), adam_lr),
        ]

    def step(self, step: int) -> None:
        """Apply the gradients at the rate of this step and clear them; AdamW's part is clipped to a norm of 1."""
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer, lr in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * self.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warm_up)
        done = step / max(1, self.steps)
        fall = min(1.0, max(0.0, (1 - done) / (1 - self.fall_from)))
        return rise * max(0.05, fall)

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer, _ in self._all]

    def load_state_dict(self, state: list[Any] | None) -> None:
        """Go on from a kept state; None begins anew at whatever step comes next."""
        for (optimizer, _), saved in zip(self._all, state or (), strict=state is not None):
            optimizer.load_state_dict(saved)
