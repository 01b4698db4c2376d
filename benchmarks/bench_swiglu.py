"""SwiGLU's gate against eager PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Callable

import floors
import peers
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from peers import WAYS, directed, moved_bytes
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
        return peers.liger_swiglu()
    return lambda gate_up: scamo_kernels.swiglu(gate_up, impl=impl)


def run(
    measure, impl: str, device: str, shape: tuple[int, int], dtype: torch.dtype, way: str, card, **keywords
) -> None:
    rows, hidden = shape
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(rows, 2 * hidden, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(rows, hidden, generator=generator).to(device, dtype)
    exact = gate_up.detach().double().requires_grad_()
    # In units of (N, H): forward reads two and writes one; backward reads three and writes two.
    moved = moved_bytes(way, 3, 5) * rows * hidden * dtype.itemsize
    if card is not None:
        keywords["floor"] = floors.swiglu(rows, hidden, card, way=way)
    group = f"swiglu-N{rows}-H{hidden}-{str(dtype).removeprefix('torch.')}-{device} {way}"
    label = f"{impl}, graph" if keywords.get("graph") else impl
    function = directed(way, gated(impl), [gate_up], [grad])
    expected = directed(way, reference.swiglu, [exact], [grad.double()])()
    measure(group, label, function, expected, dtype, moved, **keywords)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_swiglu_on_a_cpu(measure, impl, dtype, way):
    run(measure, impl, "cpu", (2048, 704), dtype, way, None)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(16384, 2816), (16384, 8704)], ids=str)
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_swiglu_on_a_gpu(measure, card, impl, shape, way, graph):
    run(measure, impl, "cuda", shape, torch.bfloat16, way, card, graph=graph)
