"""RMS normalisation, alone and after an addition, against eager PyTorch, torch.compile and Liger."""

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
        return peers.liger_rms_norm(EPS)
    return lambda x, weight: scamo_kernels.rms_norm(x, weight, eps=EPS, impl=impl)


def adder(impl: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, residual, weight) -> normalised, x + residual."""
    if impl in ("torch", "triton"):
        return lambda x, residual, weight: scamo_kernels.add_rms_norm(x, residual, weight, eps=EPS, impl=impl)
    if impl == "liger":
        return peers.liger_add_rms_norm(EPS)
    norm = normaliser("F.rms_norm" if impl == "compiled" else impl)

    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(add)
    return add


def run(
    measure,
    impl: str,
    device: str,
    shape: tuple[int, int],
    add: bool,
    dtype: torch.dtype,
    way: str,
    card,
    **keywords,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, grad, further = torch.randn(4, *shape, generator=generator).to(device, dtype)
    weight = (1 + torch.randn(shape[1], generator=generator) / 4).to(device, dtype)
    inputs = [t.clone().requires_grad_() for t in ((x, residual, weight) if add else (x, weight))]
    grads = [grad, further] if add else [grad]
    op = adder(impl) if add else normaliser(impl)
    exact = reference.add_rms_norm if add else reference.rms_norm
    doubles = [t.detach().double().requires_grad_() for t in inputs], [t.double() for t in grads]
    # Added: two in, two out; the sum and two gradients in, one out. Alone: one in, one out; two in, one out.
    forward, backward = (4, 4) if add else (2, 3)
    moved = moved_bytes(way, forward, backward) * x.numel() * dtype.itemsize
    if card is not None:
        keywords["floor"] = floors.rms_norm(*shape, card, way=way, residual=add)
    name = "add_rms_norm" if add else "rms_norm"
    kind = str(dtype).removeprefix("torch.")
    group = f"{name}-N{shape[0]}-C{shape[1]}-{kind}-{device} {way}"
    label = f"{impl}, graph" if keywords.get("graph") else impl
    function, expected = directed(way, op, inputs, grads), directed(way, exact, *doubles)()
    measure(group, label, function, expected, dtype, moved, **keywords)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rms_norm_on_a_cpu(measure, impl, add, dtype, way):
    run(measure, impl, "cpu", (2048, 256), add, dtype, way, None)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(16384, 1024), (16384, 3200)], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_rms_norm_on_a_gpu(measure, card, impl, add, shape, way, graph):
    run(measure, impl, "cuda", shape, add, torch.bfloat16, way, card, graph=graph)
