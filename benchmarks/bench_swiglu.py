"""SwiGLU's gate against eager PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference
from torch import Tensor

CPU_IMPLS = ["torch", "reference", "F.silu"]
GPU_IMPLS = [*CPU_IMPLS, "triton", "compiled", "liger"]


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gated(impl: str) -> Callable[[Tensor], Tensor]:
    """gate_up (N, 2 H) -> (N, H)."""
    if impl == "F.silu":
        return eager
    if impl == "reference":
        return reference.swiglu
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(eager)
    if impl == "liger":
        ops = pytest.importorskip("liger_kernel.ops")
        if hasattr(ops, "LigerFusedGateUpSiLUMulFunction"):
            return ops.LigerFusedGateUpSiLUMulFunction.apply
        # Older releases copy both halves first.
        return lambda gate_up: ops.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))
    return lambda gate_up: scamo_kernels.swiglu(gate_up, impl=impl)


def run(
    measure, impl: str, device: str, shape: tuple[int, int], dtype: torch.dtype, card, **keywords
) -> None:
    rows, hidden = shape
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(rows, 2 * hidden, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(rows, hidden, generator=generator).to(device, dtype)
    gate = gated(impl)

    def function() -> list[Tensor]:
        out = gate(gate_up)
        return [out.detach(), *torch.autograd.grad(out, gate_up, grad)]

    exact = gate_up.detach().double().requires_grad_()
    out = reference.swiglu(exact)
    expected = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
    # In units of (N, H): forward reads two and writes one; backward reads three and writes two.
    moved = 8 * rows * hidden * dtype.itemsize
    if card is not None:
        keywords["floor"] = floors.swiglu(rows, hidden, card, way=floors.BOTH)
    group = f"swiglu-N{rows}-H{hidden}-{str(dtype).removeprefix('torch.')}-{device} {floors.BOTH}"
    label = f"{impl}, graph" if keywords.get("graph") else impl
    measure(group, label, function, expected, dtype, moved, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_swiglu_on_a_cpu(measure, impl, dtype):
    run(measure, impl, "cpu", (2048, 704), dtype, None)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(16384, 2816), (16384, 8704)], ids=str)
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_swiglu_on_a_gpu(measure, card, impl, shape, graph):
    run(measure, impl, "cuda", shape, torch.bfloat16, card, graph=graph)
