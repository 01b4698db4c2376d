"""BSQ of 24 bits against eager PyTorch (the reference) and torch.compile.

vector-quantize-pytorch's LFQ(spherical=True) keeps all 2^24 codes, 1.6 GB, and is compared in tests only.
"""

from __future__ import annotations

import functools

import pytest
import scamo_kernels
import torch
from peers import WAYS, directed, moved_bytes
from scamo_kernels import reference

CHANNELS = 24
# (device, dtype, replayed as a CUDA graph)
PLACES = [
    pytest.param("cpu", torch.float32, False, id="cpu"),
    *(
        pytest.param("cuda", dtype, graph, marks=pytest.mark.gpu, id=f"cuda-{dtype}{'-graph' * graph}")
        for dtype in (torch.float32, torch.bfloat16)
        for graph in (False, True)
    ),
]
IMPLS = ["torch", "triton", "eager", "compiled"]


def implementation(impl: str, op: str, **arguments):
    """z -> (codes, bits), or bits -> codes."""
    if impl in ("torch", "triton"):
        return functools.partial(getattr(scamo_kernels, op), impl=impl, **arguments)
    function = functools.partial(getattr(reference, op), **arguments)
    if impl == "eager":
        return function
    torch._dynamo.reset()
    return torch.compile(function)


def skip_on_a_cpu(impl: str, device: str) -> None:
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation and eager PyTorch")


def named(impl: str, graph: bool) -> str:
    return f"{impl}, graph" if graph else impl


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [4096, 65536])
@pytest.mark.parametrize(("device", "dtype", "graph"), PLACES)
@pytest.mark.parametrize("impl", IMPLS)
def test_bsq_quantize(measure, impl, device, dtype, graph, tokens, way):
    skip_on_a_cpu(impl, device)
    generator = torch.Generator().manual_seed(0)
    z, cotangent = torch.randn(2, tokens, CHANNELS, generator=generator).to(device, dtype)
    z = z.clone().requires_grad_()
    function = directed(way, implementation(impl, "bsq_quantize"), [z], [cotangent])
    expected = directed(way, reference.bsq_quantize, [z], [cotangent])()
    # Forward reads z and writes codes and bits; backward reads z and a gradient and writes one.
    row = CHANNELS * dtype.itemsize
    moved = tokens * moved_bytes(way, 2 * row + 4, 3 * row)
    group = f"bsq_quantize-N{tokens}-{str(dtype).removeprefix('torch.')}-{device} {way}"
    measure(group, named(impl, graph), function, expected, dtype, moved, graph=graph)


@pytest.mark.parametrize(("device", "dtype", "graph"), PLACES)
@pytest.mark.parametrize("impl", IMPLS)
def test_bsq_dequantize(measure, impl, device, dtype, graph):
    skip_on_a_cpu(impl, device)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**CHANNELS, (65536,), generator=generator).int().to(device)
    dequantize = implementation(impl, "bsq_dequantize", d=CHANNELS, dtype=dtype)
    expected = (reference.bsq_dequantize(bits, CHANNELS, dtype),)
    moved = bits.numel() * (4 + CHANNELS * dtype.itemsize)
    group = f"bsq_dequantize-N65536-{str(dtype).removeprefix('torch.')}-{device}"
    measure(group, named(impl, graph), lambda: (dequantize(bits),), expected, dtype, moved, graph=graph)
