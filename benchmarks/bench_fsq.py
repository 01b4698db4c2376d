"""FSQ against eager PyTorch (the reference), torch.compile and vector-quantize-pytorch."""

from __future__ import annotations

import functools

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

LEVELS = [8, 8, 8, 5, 5, 5]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
        package = pytest.importorskip("vector_quantize_pytorch")
        module = package.FSQ(levels=LEVELS)

        def quantize(z):
            module.to(z.device)
            codes = module.quantize(z)
            return codes, module.codes_to_indices(codes)

        return quantize
    return lambda z: scamo_kernels.fsq_quantize(z, LEVELS, impl=impl)


@pytest.mark.parametrize("tokens", [4096, 65536])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager", "compiled", "vector-quantize-pytorch"])
def test_fsq_quantize(measure, impl, device, tokens):
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation, eager PyTorch and the peer")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, len(LEVELS), generator=generator)
    # Values that round either way in the last bit would compare luck.
    bounded = reference.fsq_bound(z, LEVELS)
    z = torch.where((bounded - bounded.floor() - 0.5).abs() > 1e-4, z, 0.0).to(device)
    cotangent = torch.randn(z.shape, generator=generator).to(device)
    z.requires_grad_()
    quantize = quantizer(impl)

    def function():
        codes, indices = quantize(z)
        return codes.detach(), indices, *torch.autograd.grad(codes, z, cotangent)

    codes, indices = reference.fsq_quantize(z, LEVELS)
    expected = codes.detach(), indices, *torch.autograd.grad(codes, z, cotangent)
    # Forward reads z and writes codes and indices; backward reads z and a gradient and writes one.
    moved = tokens * (5 * len(LEVELS) * 4 + 4)
    measure(f"fsq_quantize-N{tokens}-{device} forward+backward", impl, function, expected, z.dtype, moved)


@pytest.mark.parametrize("form", ["grouped", "residual"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager", "compiled"])
def test_fsq_forms(measure, impl, device, form):
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
        codes, indices = function(z, levels, count)
        return codes.detach(), indices, *torch.autograd.grad(codes, z, cotangent)

    moved = len(z) * (5 * width * 4 + 4 * count)
    group = f"fsq_quantize_{form}-N{tokens}-x{count}-{device} forward+backward"
    # The slope of a last stage sees the rounding of its residual (L - 1)^2 times.
    limit = 1e-5 if form == "grouped" else 1e-3
    measure(group, impl, lambda: call(quantize), call(specification), z.dtype, moved, limit=limit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["torch", "triton", "eager"])
def test_fsq_dequantize(measure, impl, device):
    if device == "cpu" and impl == "triton":
        pytest.skip("on a CPU: the torch implementation and eager PyTorch")
    indices = torch.randint(0, 64000, (65536,), generator=torch.Generator().manual_seed(0)).int().to(device)
    expected = (reference.fsq_dequantize(indices, LEVELS),)

    def function():
        if impl == "eager":
            return (reference.fsq_dequantize(indices, LEVELS),)
        return (scamo_kernels.fsq_dequantize(indices, LEVELS, impl=impl),)

    moved = indices.numel() * 4 * (1 + len(LEVELS))
    measure(f"fsq_dequantize-N65536-{device}", impl, function, expected, torch.float32, moved)
