"""The chunked linear cross-entropy against F.linear + F.cross_entropy, torch's own fusion and Liger's.

Forward without gradients, and both together: ours and Liger's make the gradients beside the loss, so that a
backward alone would time a multiplication.
"""

from __future__ import annotations

from collections.abc import Callable

import floors
import peers
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from floors import BOTH, FORWARD
from peers import directed, moved_bytes
from torch import Tensor

CPU_IMPLS = ["torch", "plain", "F.linear_cross_entropy", "F.linear_cross_entropy chunked"]
GPU_IMPLS = [*CPU_IMPLS, "triton", "compiled", "liger"]
# Scored rows, width, classes: 65,536 codes and the end of sequence.
GPU_SHAPES = [(6144, 512, 65537), (6144, 1024, 65537), (16384, 1024, 65537), (6144, 3200, 65537)]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


def loss(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(hidden, weight, targets) -> the sum of the losses."""
    if impl == "plain":
        return plain
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(plain)
    if impl == "liger":
        return peers.liger_linear_cross_entropy()
    if impl.startswith("F.linear_cross_entropy"):
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip("torch has no F.linear_cross_entropy")
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if impl.endswith("chunked") else {}
        return lambda *tensors: F.linear_cross_entropy(*tensors, reduction="sum", **options)
    return lambda *tensors: scamo_kernels.linear_cross_entropy(*tensors, impl=impl)[0]


def exactly(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The sum and both gradients in float32, 1024 rows at a time: all logits could take 4 GB."""
    leaves = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    total = torch.zeros((), device=hidden.device)
    grad_hidden, grad_weight = (torch.zeros_like(leaf) for leaf in leaves)
    for start in range(0, hidden.shape[0], 1024):
        part = slice(start, start + 1024)
        partial = plain(leaves[0][part], leaves[1], targets[part])
        grads = torch.autograd.grad(partial, leaves)
        total += partial.detach()
        grad_hidden += grads[0]
        grad_weight += grads[1]
    return [total, grad_hidden, grad_weight]


def run(measure, impl: str, device: str, shape: tuple[int, int, int], way: str, card, **keywords) -> None:
    rows, width, classes = shape
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).to(device, dtype)
    weight.requires_grad_()
    targets = torch.randint(0, classes, (rows,), generator=generator).to(device)
    compute = loss(impl)
    function = directed(way, lambda h, w: compute(h, w, targets), [hidden, weight], [None])
    expected = exactly(hidden, weight, targets)[: 1 if way == FORWARD else None]
    # Inputs and gradients once; what bounds the time are the products, 2 or 6 S C V operations.
    read = (hidden.numel() + weight.numel()) * dtype.itemsize + 8 * rows
    moved = moved_bytes(way, read, read - 8 * rows)
    if card is not None:
        keywords["floor"] = floors.linear_cross_entropy(*shape, card, way=way)
    group = f"linear_cross_entropy-S{rows}-C{width}-V{classes}-{device} {way}"
    label = f"{impl}, graph" if keywords.get("graph") else impl
    measure(group, label, function, expected, dtype, moved, **keywords)


@pytest.mark.parametrize("way", [FORWARD, BOTH])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_linear_cross_entropy_on_a_cpu(measure, impl, way):
    run(measure, impl, "cpu", (256, 64, 8193), way, None)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [FORWARD, BOTH])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_linear_cross_entropy_on_a_gpu(measure, card, impl, shape, way, graph):
    run(measure, impl, "cuda", shape, way, card, graph=graph)
