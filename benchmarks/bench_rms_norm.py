"""RMS normalisation, alone and after an addition, against eager PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference
from torch import Tensor

EPS = 1e-5
CPU_IMPLS = ["torch", "reference", "F.rms_norm"]
GPU_IMPLS = [*CPU_IMPLS, "triton", "compiled", "liger"]


def normaliser(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, weight) -> normalised."""
    if impl == "reference":
        return lambda x, weight: reference.rms_norm(x, weight, EPS)
    if impl == "F.rms_norm":
        return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(normaliser("F.rms_norm"))
    if impl == "liger":
        functional = pytest.importorskip("liger_kernel.transformers.functional")
        # In place it would overwrite the gradient that the next call needs.
        return lambda x, weight: functional.liger_rms_norm(x, weight, EPS, in_place=False)
    return lambda x, weight: scamo_kernels.rms_norm(x, weight, eps=EPS, impl=impl)


def adder(impl: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, residual, weight) -> normalised, x + residual."""
    if impl in ("torch", "triton"):
        return lambda x, residual, weight: scamo_kernels.add_rms_norm(x, residual, weight, eps=EPS, impl=impl)
    if impl == "liger":
        functional = pytest.importorskip("liger_kernel.transformers.functional")
        return lambda *tensors: functional.liger_fused_add_rms_norm(*tensors, EPS, in_place=False)
    norm = normaliser("F.rms_norm" if impl == "compiled" else impl)

    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(add)
    return add


def run(
    measure, impl: str, device: str, shape: tuple[int, int], add: bool, dtype: torch.dtype, card, **keywords
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, grad, further = torch.randn(4, *shape, generator=generator).to(device, dtype)
    weight = (1 + torch.randn(shape[1], generator=generator) / 4).to(device, dtype)
    inputs = [t.clone().requires_grad_() for t in ((x, residual, weight) if add else (x, weight))]
    grads = (grad, further) if add else (grad,)
    op = adder(impl) if add else normaliser(impl)

    def results(op: Callable, inputs: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = op(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, grads)]

    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = results(
        reference.add_rms_norm if add else reference.rms_norm, exact, tuple(t.double() for t in grads)
    )
    # Added: two in, two out; the sum and two gradients in, one out. Alone: one in, one out; two in, one out.
    moved = (8 if add else 5) * x.numel() * dtype.itemsize
    if card is not None:
        keywords["floor"] = floors.rms_norm(*shape, card, way=floors.BOTH, residual=add)
    name = "add_rms_norm" if add else "rms_norm"
    kind = str(dtype).removeprefix("torch.")
    group = f"{name}-N{shape[0]}-C{shape[1]}-{kind}-{device} {floors.BOTH}"
    label = f"{impl}, graph" if keywords.get("graph") else impl
    measure(group, label, lambda: results(op, inputs, grads), expected, dtype, moved, **keywords)


@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rms_norm_on_a_cpu(measure, impl, add, dtype):
    run(measure, impl, "cpu", (2048, 256), add, dtype, None)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(16384, 1024), (16384, 3200)], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_rms_norm_on_a_gpu(measure, card, impl, add, shape, graph):
    run(measure, impl, "cuda", shape, add, torch.bfloat16, card, graph=graph)
