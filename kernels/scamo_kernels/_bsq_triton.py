"""Triton kernels of bitwise spherical quantisation. Imported only when they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import on_device

# Of a tile, padding included: 16 a thread, as loads of 16 bytes where the rows' alignment allows.
ELEMENTS = 2048
MAX_ROWS = 256
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(z, codes, bits, rows, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    size: tl.constexpr = D**-0.5
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    at = row[:, None] * D + channel
    mask = (row[:, None] < rows) & (channel < D)
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    # The norm changes no sign. The second `where` keeps a NaN.
    code = tl.where(x > 0, size, tl.where(x == x, -size, x))
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=mask)
    # Each power of two once: the sum never carries, and bit 31 is the sign.
    one = tl.full((1, BD), 1, tl.int32) << channel
    tl.store(bits + row, tl.sum(tl.where(x > 0, one, 0), 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def quantize_backward_kernel(grad, z, grad_z, rows, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    at = row[:, None] * D + channel
    mask = (row[:, None] < rows) & (channel < D)
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    # In units of the largest entry no square leaves float32's range.
    unit = tl.max(tl.abs(x), 1)[:, None]
    unit = tl.where(unit == 0, 1.0, unit)
    x = x / unit
    square = tl.sum(x * x, 1)[:, None]
    # A row of zeros: no direction, no gradient.
    square = tl.where(square == 0, float("inf"), square)
    along = tl.sum(x * g, 1)[:, None] / square
    result = (g - x * along) / tl.sqrt(square) / unit
    tl.store(grad_z + at, result.to(grad_z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(bits, codes, rows, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    size: tl.constexpr = D**-0.5
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    word = tl.load(bits + row, mask=row < rows, other=0)[:, None]
    code = tl.where((word >> channel) & 1 == 1, size, -size).to(tl.float32)
    mask = (row[:, None] < rows) & (channel < D)
    tl.store(codes + row[:, None] * D + channel, code.to(codes.dtype.element_ty), mask=mask)


def shape(channels: int) -> dict[str, int]:
    """The channels, those with padding, and the rows of a program."""
    width = triton.next_power_of_2(channels)
    return {"D": channels, "BD": width, "BLOCK": min(MAX_ROWS, ELEMENTS // width)}


def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    codes, bits = torch.empty_like(z), z.new_empty(z.shape[:-1], dtype=torch.int32)
    if rows := bits.numel():
        tile = shape(z.shape[-1])
        with on_device(z):
            quantize_kernel[(triton.cdiv(rows, tile["BLOCK"]),)](
                z, codes, bits, rows, num_warps=WARPS, **tile
            )
    return codes, bits


def quantize_backward(grad: Tensor, z: Tensor) -> Tensor:
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    if rows := z.numel() // z.shape[-1]:
        tile = shape(z.shape[-1])
        with on_device(z):
            quantize_backward_kernel[(triton.cdiv(rows, tile["BLOCK"]),)](
                grad, z, grad_z, rows, num_warps=WARPS, **tile
            )
    return grad_z


def dequantize(bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    bits = bits.contiguous()
    codes = torch.empty((*bits.shape, channels), dtype=dtype, device=bits.device)
    if rows := bits.numel():
        tile = shape(channels)
        with on_device(bits):
            dequantize_kernel[(triton.cdiv(rows, tile["BLOCK"]),)](bits, codes, rows, num_warps=WARPS, **tile)
    return codes
