"""Bitwise spherical quantisation: a bit a channel, packed into int32, with a straight-through gradient.

The codes and bits need one pass over z, the gradient another over z and what came back.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from scamo_kernels._direct import call, is_direct, row_blocks
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve, sees_values
from scamo_kernels.reference import compute_dtype

MAX_BITS = 32
_CODE_TYPES = (*FLOATS, torch.float64)
# Elements of a block of rows.
_CPU_BLOCK = 1 << 17


def bsq_quantize(z: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Project each row of z on the unit sphere, u = z / |z|, and round it to a corner of the cube in it.

    z: (..., d) float32, float16 or bfloat16 (float64 with impl="torch"), d from 1 to 32. Returns codes (...,
    d) in z's dtype, 1 / sqrt(d) where z > 0 and else -1 / sqrt(d), and bits int32 (...), bit i set where
    channel i is positive: channel 0 is the least significant; with d = 32 channel 31 is the sign bit.

    Straight-through on u: d codes / dz is the gradient of z / |z|, (g - u (u · g)) / |z|, computed in float32
    and rounded once. There is no epsilon: any row that is not zero has the length 1 after it; a row of zeros
    has u = 0, no bits and the gradient 0. A NaN gives a NaN code and no bit; an infinity counts by its sign;
    both make their row's gradient NaN. impl: "auto" | "triton" | "torch". Raises TypeError or ValueError that
    names the argument.
    """
    if z.dtype not in _CODE_TYPES:
        raise TypeError(f"z: expected a floating-point tensor, got {z.dtype}")
    if z.dim() == 0 or not 1 <= z.shape[-1] <= MAX_BITS:
        raise ValueError(f"z: expected shape (..., d) with d from 1 to {MAX_BITS}, got {tuple(z.shape)}")
    chosen = resolve(impl, z)
    if chosen == "triton" and z.dtype == torch.float64:
        raise TypeError('z: impl = "triton" does not take float64; use impl="torch"')
    if is_direct(chosen, z):
        return call(_quantize, _setup, _autograd, z, chosen)
    return torch.ops.scamo_kernels.bsq_quantize(z, chosen)


def bsq_dequantize(bits: Tensor, d: int, *, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
    """The codes (..., d) in `dtype` of bits int32 (...): the inverse of `bsq_quantize`. No gradient.

    d: from 1 to 32; with less than 32, bits outside 0 .. 2^d - 1 raise ValueError on the CPU; on CUDA, where
    looking would wait for the device, they do so with SCAMO_KERNELS_DEBUG=1 only, and else what is above the
    d bits is ignored. impl: "auto" | "triton" | "torch".
    """
    if bits.dtype != torch.int32:
        raise TypeError(f"bits: expected int32, got {bits.dtype}")
    if not isinstance(d, int) or isinstance(d, bool) or not 1 <= d <= MAX_BITS:
        raise ValueError(f"d = {d!r}: expected an integer from 1 to {MAX_BITS}")
    if dtype not in _CODE_TYPES:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    chosen = resolve(impl, bits)
    if dtype == torch.float64:
        if impl == "triton":
            raise TypeError('dtype: impl = "triton" does not give float64; use impl="torch"')
        chosen = "torch"
    if is_direct(chosen, bits):
        return _dequantize(bits, d, dtype, chosen)
    return torch.ops.scamo_kernels.bsq_dequantize(bits, d, dtype, chosen)


@functools.lru_cache(maxsize=64)
def _channels(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of each channel and its power of two, int32 (d,); of channel 31 that is -2^31."""
    number = torch.arange(d, dtype=torch.int32, device=device)
    return number, torch.ones_like(number) << number


def _quantize(z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _bsq_triton

        return _bsq_triton.quantize(z)
    d, dtype = z.shape[-1], compute_dtype(z.dtype)
    rows = z.contiguous().view(-1, d)
    codes = torch.empty_like(rows)
    bits = torch.empty(rows.shape[0], dtype=torch.int32, device=z.device)
    _, power = _channels(d, z.device)
    for part, code, word in row_blocks(_CPU_BLOCK, rows, codes, bits):
        part = part.to(dtype)
        # The norm changes no sign. 1 where positive, else 0, and a NaN stays one; torch.where takes 10 times
        # as long on a CPU.
        code.copy_(_scaled(part.clamp(0, 1).ceil_(), d))
        positive = torch.empty_like(part, dtype=torch.int32)
        # Each power of two once: the sum never carries.
        torch.sum(torch.gt(part, 0, out=positive).mul_(power), 1, dtype=torch.int32, out=word)
    return codes.view(z.shape), bits.view(z.shape[:-1])


def _scaled(positive: Tensor, d: int) -> Tensor:
    """1 -> 1 / sqrt(d), 0 -> -1 / sqrt(d), in place; doubling is exact, so both have the same bits."""
    return positive.mul_(2 * d**-0.5).sub_(d**-0.5)


def _quantize_backward(grad: Tensor, z: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from scamo_kernels import _bsq_triton

        return _bsq_triton.quantize_backward(grad, z)
    d, dtype = z.shape[-1], compute_dtype(z.dtype)
    # Contiguous, so that the order of a sum does not depend on the caller's strides.
    rows, grads = z.contiguous().view(-1, d), grad.contiguous().view(-1, d)
    grad_z = torch.empty_like(rows)
    for part, g, result in row_blocks(_CPU_BLOCK, rows, grads, grad_z):
        # float64, where the square of no float32 overflows or vanishes.
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64).to(dtype)
        # A row of zeros: no direction, no gradient.
        norm.masked_fill_(norm == 0, math.inf)
        u, g = part.to(dtype) / norm, g.to(dtype)
        slope = result if result.dtype == dtype else torch.empty_like(u)
        along = torch.mul(u, g, out=slope).sum(1, keepdim=True)
        torch.addcmul(g, u, along, value=-1, out=slope).div_(norm)
        if slope is not result:
            result.copy_(slope)
    return grad_z.view(z.shape)


def _dequantize(bits: Tensor, d: int, dtype: torch.dtype, impl: str) -> Tensor:
    if d < MAX_BITS and bits.numel() and sees_values(bits):
        low, high = (int(x) for x in torch.aminmax(bits))
        if low < 0 or high >= 2**d:
            raise ValueError(f"bits: expected 0 to {2**d - 1} for d = {d}, found {low} to {high}")
    if impl == "triton":
        from scamo_kernels import _bsq_triton

        return _bsq_triton.dequantize(bits, d, dtype)
    number, _ = _channels(d, bits.device)
    positive = (bits.contiguous().unsqueeze(-1) >> number).bitwise_and_(1)
    return _scaled(positive.to(compute_dtype(dtype)), d).to(dtype)


def _fake_quantize(z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)


def _fake_backward(grad: Tensor, z: Tensor, impl: str) -> Tensor:
    return z.new_empty(z.shape)


def _fake_dequantize(bits: Tensor, d: int, dtype: torch.dtype, impl: str) -> Tensor:
    return bits.new_empty((*bits.shape, d), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    z, ctx.impl = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_codes: Tensor | None, _grad_bits: None):
    if grad_codes is None:
        return None, None
    (z,) = ctx.saved_tensors
    return torch.ops.scamo_kernels.bsq_quantize_backward(grad_codes, z, ctx.impl), None


define("bsq_quantize(Tensor z, str impl) -> (Tensor, Tensor)")
define("bsq_quantize_backward(Tensor grad, Tensor z, str impl) -> Tensor")
define("bsq_dequantize(Tensor bits, int d, ScalarType dtype, str impl) -> Tensor")
LIBRARY.impl("bsq_quantize", _quantize, "CompositeExplicitAutograd")
LIBRARY.impl("bsq_quantize_backward", _quantize_backward, "CompositeExplicitAutograd")
LIBRARY.impl("bsq_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "bsq_quantize", _fake_quantize, lib=LIBRARY)
torch.library.register_fake(NAME + "bsq_quantize_backward", _fake_backward, lib=LIBRARY)
torch.library.register_fake(NAME + "bsq_dequantize", _fake_dequantize, lib=LIBRARY)
torch.library.register_autograd(NAME + "bsq_quantize", _autograd, setup_context=_setup, lib=LIBRARY)
