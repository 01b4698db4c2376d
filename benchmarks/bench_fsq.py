"""FSQ against eager PyTorch (the reference), torch.compile and vector-quantize-pytorch."""

from __future__ import annotations

import functools

import floors
import peers
import pytest
import scamo_kernels
import torch
from peers import WAYS, directed, moved_bytes
from scamo_kernels import reference

LEVELS = [8, 8, 8, 5, 5, 5]
# (device, dtype, replayed as a CUDA graph)
FLOAT32_PLACES = [
    pytest.param("cpu", torch.float32, False, id="cpu"),
    *(
        pytest.param("cuda", torch.float32, graph, marks=pytest.mark.gpu, id=f"cuda{'-graph' * graph}")
        for graph in (False, True)
    ),
]
PLACES = [
    *FLOAT32_PLACES,
    *(
        pytest.param(
            "cuda", torch.bfloat16, graph, marks=pytest.mark.gpu, id=f"cuda-bfloat16{'-graph' * graph}"
        )
        for graph in (False, True)
    ),
]


def settled(z: torch.Tensor, levels: list[int], stages: int) -> torch.Tensor:
    """Which rows round the same way in any arithmetic at every residual stage."""
    rest, steps = z.double(), torch.tensor(levels).double() - 1
    clear = torch.ones(len(z), dtype=torch.bool)
    for stage in range(stages):
        bounded = reference.fsq_bound(rest * steps**stage, levels)
        clear &= ((bounded - bounded.floor() - 0.5).abs() > 1e-5 * max(levels) ** stage).all(1)
        rest = rest - reference.fsq_quantize(rest * steps**stage, levels)[0] / steps**stage
    return clear


def quantizer(impl: str):
    """z -> (codes, indices)."""
    if impl == "eager":
        return lambda z: reference.fsq_quantize(z, LEVELS)
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(lambda z: reference.fsq_quantize(z, LEVELS))
    if impl == "vector-quantize-pytorch":
        return peers.vq_fsq(LEVELS)
    return lambda z: scamo_kernels.fsq_quantize(z, LEVELS, impl=impl)


def named(impl: str, graph: bool) -> str:
    return f"{impl}, graph" if graph else impl


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [4096, 65536])
@pytest.mark.parametrize(("device", "dtype", "graph"), PLACES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager", "compiled", "vector-quantize-pytorch"])
def test_fsq_quantize(measure, card, impl, device, dtype, graph, tokens, way):
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation, eager PyTorch and the peer")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, len(LEVELS), generator=generator).to(dtype)
    # Values that round either way in the last bit would compare luck.
    bounded = reference.fsq_bound(z.float(), LEVELS)
    z = torch.where((bounded - bounded.floor() - 0.5).abs() > 1e-4, z, 0.0).to(device).requires_grad_()
    cotangent = torch.randn(z.shape, generator=generator).to(device, dtype)
    function = directed(way, quantizer(impl), [z], [cotangent])
    expected = directed(way, lambda z: reference.fsq_quantize(z, LEVELS), [z], [cotangent])()
    # Forward reads z and writes codes and indices; backward reads z and a gradient and writes one.
    channel = len(LEVELS) * dtype.itemsize
    moved = tokens * moved_bytes(way, 2 * channel + 4, 3 * channel)
    floor = None
    if card is not None and device == "cuda":
        floor = floors.fsq(tokens, len(LEVELS), card, way=way, itemsize=dtype.itemsize)
    group = f"fsq_quantize-N{tokens}-{str(dtype).removeprefix('torch.')}-{device} {way}"
    measure(group, named(impl, graph), function, expected, dtype, moved, floor=floor, graph=graph)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["grouped", "residual"])
@pytest.mark.parametrize(("device", "dtype", "graph"), FLOAT32_PLACES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager", "compiled"])
def test_fsq_forms(measure, impl, device, dtype, graph, form, way):
    """Three groups, and three residual stages, of one list of levels."""
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation and eager PyTorch")
    tokens, count, levels = 8192, 3, [8, 6, 5]
    width = len(levels) * (count if form == "grouped" else 1)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, width, generator=generator)
    if form == "grouped":
        bounded = reference.fsq_bound(z, levels * count)
        z = torch.where((bounded - bounded.floor() - 0.5).abs() > 1e-4, z, 0.0)
    else:
        z = z[settled(z / 3, levels, count)] / 3
    z = z.to(device).requires_grad_()
    cotangent = torch.randn(z.shape, generator=generator).to(device)
    specification = getattr(reference, f"fsq_quantize_{form}")
    if impl == "eager":
        quantize = specification
    elif impl == "compiled":
        torch._dynamo.reset()
        quantize = torch.compile(specification)
    else:
        quantize = functools.partial(getattr(scamo_kernels, f"fsq_quantize_{form}"), impl=impl)

    def call(function):
        return directed(way, lambda z: function(z, levels, count), [z], [cotangent])

    moved = len(z) * moved_bytes(way, 2 * width * 4 + 4 * count, 3 * width * 4)
    group = f"fsq_quantize_{form}-N{tokens}-x{count}-{device} {way}"
    # The slope of a last stage sees the rounding of its residual (L - 1)^2 times.
    limit = 1e-5 if form == "grouped" else 1e-3
    expected = call(specification)()
    measure(group, named(impl, graph), call(quantize), expected, z.dtype, moved, limit=limit, graph=graph)


@pytest.mark.parametrize(("device", "dtype", "graph"), FLOAT32_PLACES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager", "compiled"])
def test_fsq_dequantize(measure, impl, device, dtype, graph):
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation and eager PyTorch")
    indices = torch.randint(0, 64000, (65536,), generator=torch.Generator().manual_seed(0)).int().to(device)
    dequantize = functools.partial(reference.fsq_dequantize, levels=LEVELS)
    expected = (dequantize(indices),)
    if impl == "compiled":
        torch._dynamo.reset()
        dequantize = torch.compile(dequantize)
    elif impl != "eager":
        dequantize = functools.partial(scamo_kernels.fsq_dequantize, levels=LEVELS, impl=impl)
    moved = indices.numel() * 4 * (1 + len(LEVELS))
    group = f"fsq_dequantize-N65536-{device}"
    measure(group, named(impl, graph), lambda: (dequantize(indices),), expected, dtype, moved, graph=graph)
