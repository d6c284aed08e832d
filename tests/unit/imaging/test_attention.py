"""Every attention backend has the same signature and tensor layout; a mask uses torch's own attention."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.errors import CheckpointError
from zcore.imaging.kernels.attention import KERNELS, load_attention, sdpa

pytestmark = pytest.mark.numeric
QUERIES, KEYS, VALUES = torch.randn(3, 2, 40, 3, 32, generator=torch.Generator().manual_seed(0)).unbind()


class Kernel:
    """A stand-in for a package's kernel on a CPU: takes (B, S, heads, head_dim), and no mask."""

    def __init__(self, returns_tuple: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self._returns_tuple = returns_tuple

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        self.calls.append(options)
        weights = torch.einsum("bshd,bthd->bhst", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        attended = torch.einsum("bhst,bthd->bshd", weights, v)
        return (attended, weights.logsumexp(-1)) if self._returns_tuple else attended


@pytest.mark.parametrize("backend", sorted(KERNELS))
@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_backend_computes_what_torchs_own_attention_computes(
    monkeypatch: pytest.MonkeyPatch, backend: str, returns_tuple: bool
) -> None:
    kernel = install(monkeypatch, backend, Kernel(returns_tuple))
    attended = load_attention(backend)(QUERIES, KEYS, VALUES, None)
    assert_close_relative(attended, sdpa(QUERIES, KEYS, VALUES, None), roundings=ONE_KERNEL)
    assert kernel.calls == [{"tensor_layout": "NHD"} if backend == "sage" else {}]


@pytest.mark.parametrize("backend", sorted(KERNELS))
def test_a_mask_uses_torchs_own_attention(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    kernel = install(monkeypatch, backend, Kernel())
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    attended = load_attention(backend)(QUERIES, KEYS, VALUES, mask)
    assert torch.equal(attended, sdpa(QUERIES, KEYS, VALUES, mask))
    assert kernel.calls == []
    shorter = sdpa(QUERIES[1:, :25], KEYS[1:, :25], VALUES[1:, :25], None)
    assert_close_relative(attended[1:, :25], shorter, roundings=ONE_KERNEL)


def test_a_package_that_cannot_be_imported_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(CheckpointError, match=r"attention_backend: flash_attn_2: import of flash_attn halted"):
        load_attention("flash_attn_2")
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace())
    with pytest.raises(CheckpointError, match=r"attention_backend: sage: .*sageattn"):
        load_attention("sage")


def test_no_package_is_imported_before_its_backend_is_chosen() -> None:
    assert load_attention("sdpa") is sdpa
    assert not {kernel.package for kernel in KERNELS.values()} & sys.modules.keys()


def test_a_backend_is_one_operator_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_3", Kernel(returns_tuple=True))
    attend = load_attention("flash_attn_3")
    compiled = torch.compile(lambda q: attend(q * 2, KEYS, VALUES, None) + 1, fullgraph=True, backend="aot_eager")
    assert_close_relative(compiled(QUERIES), sdpa(QUERIES * 2, KEYS, VALUES, None) + 1, roundings=ONE_KERNEL)


def install(monkeypatch: pytest.MonkeyPatch, backend: str, kernel: Kernel) -> Kernel:
    """Pretend that the backend's package is installed."""
    module = ModuleType(KERNELS[backend].module)
    setattr(module, KERNELS[backend].function, kernel)
    monkeypatch.setitem(sys.modules, KERNELS[backend].package, ModuleType(KERNELS[backend].package))
    monkeypatch.setitem(sys.modules, KERNELS[backend].module, module)
    return kernel
