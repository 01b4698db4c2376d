"""Triton kernels of finite scalar quantisation. Imported only when they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from scamo_kernels._dispatch import interpreted, on_device
from scamo_kernels.reference import fsq_constants

BLOCK = 256
WARPS = 4
# Adding and subtracting 1.5 * 2**23 rounds a float32 half to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _tanh(x, NATIVE: tl.constexpr):
    if NATIVE:
        return libdevice.tanh(x)
    # The interpreter has no libdevice. Differs in the last bits: one code in four million.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _per_channel(channel, VALUES: tl.constexpr, D: tl.constexpr):
    """The channel's constant, as float32."""
    result = tl.zeros_like(channel).to(tl.float32)
    for i in tl.static_range(D):
        result = tl.where(channel == i, VALUES[i], result)
    return result


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    z,
    codes,
    indices,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BASIS: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    at = row[:, None] * D + channel
    mask = (row[:, None] < rows) & (channel < D)
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    half = _per_channel(channel, HALF, D)
    shift = _per_channel(channel, SHIFT, D)
    bound = _tanh(x + shift, NATIVE) * half - _per_channel(channel, OFFSET, D)
    q = (bound + _ROUND) - _ROUND
    width = _per_channel(channel, WIDTH, D)
    # Divide as IEEE says: a code must equal the dequantised one to the bit.
    code = tl.div_rn(q, tl.where(channel < D, width, 1.0) + tl.zeros_like(q))
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=mask)
    basis = tl.zeros_like(channel)
    for i in tl.static_range(D):
        basis = tl.where(channel == i, BASIS[i], basis)
    digit = tl.where(channel < D, (q + width).to(tl.int32) * basis, 0)
    tl.store(indices + row, tl.sum(digit, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def quantize_backward_kernel(
    grad,
    z,
    grad_z,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    SLOPE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Elementwise, so the rows need no tile: consecutive elements, whole vectors.
    at = tl.program_id(0).to(tl.int64) * (BLOCK * BD) + tl.arange(0, BLOCK * BD)
    mask = at < rows.to(tl.int64) * D
    channel = (at % D).to(tl.int32)
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    t = _tanh(x + _per_channel(channel, SHIFT, D), NATIVE)
    slope = (1.0 - t * t) * _per_channel(channel, SLOPE, D)
    tl.store(grad_z + at, (g * slope).to(grad_z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(
    indices,
    codes,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    LEVELS: tl.constexpr,
    BASIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    index = tl.load(indices + row, mask=row < rows, other=0).to(tl.int32)[:, None]
    code = tl.zeros((BLOCK, BD), tl.float32)
    for i in tl.static_range(D):
        # Constant divisors become multiplications.
        digit = (index // BASIS[i]) % LEVELS[i] - LEVELS[i] // 2
        value = tl.div_rn(digit.to(tl.float32), tl.full((BLOCK, 1), LEVELS[i] // 2, tl.float32))
        code = tl.where(channel == i, value, code)
    mask = (row[:, None] < rows) & (channel < D)
    tl.store(codes + row[:, None] * D + channel, code.to(codes.dtype.element_ty), mask=mask)


def constants(levels: list[int]) -> dict[str, tuple]:
    """The compile-time constants of every kernel, one entry per channel."""
    half, offset, shift = zip(*(fsq_constants(level) for level in levels), strict=True)
    basis = [1]
    for level in levels[:-1]:
        basis.append(basis[-1] * level)
    return {
        "HALF": half,
        "OFFSET": offset,
        "SHIFT": shift,
        "WIDTH": tuple(float(level // 2) for level in levels),
        "SLOPE": tuple(h / (level // 2) for h, level in zip(half, levels, strict=True)),
        "BASIS": tuple(basis),
        "LEVELS": tuple(levels),
    }


def _shape(levels: list[int]) -> dict[str, int]:
    return {"D": len(levels), "BD": triton.next_power_of_2(len(levels)), "BLOCK": BLOCK, "num_warps": WARPS}


def _pick(levels: list[int], *names: str) -> dict[str, tuple]:
    table = constants(levels)
    return {name: table[name] for name in names}


def quantize(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    codes = torch.empty_like(z)
    indices = z.new_empty(z.shape[:-1], dtype=torch.int32)
    rows = indices.numel()
    if rows:
        values = _pick(levels, "HALF", "OFFSET", "SHIFT", "WIDTH", "BASIS")
        with on_device(z):
            quantize_kernel[(triton.cdiv(rows, BLOCK),)](
                z, codes, indices, rows, NATIVE=not interpreted(), **values, **_shape(levels)
            )
    return codes, indices


def quantize_backward(grad: Tensor, z: Tensor, levels: list[int]) -> Tensor:
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    rows = z.numel() // len(levels)
    if rows:
        shape = _shape(levels)
        grid = (triton.cdiv(z.numel(), BLOCK * shape["BD"]),)
        with on_device(z):
            quantize_backward_kernel[grid](
                grad, z, grad_z, rows, NATIVE=not interpreted(), **_pick(levels, "SLOPE", "SHIFT"), **shape
            )
    return grad_z


def dequantize(indices: Tensor, levels: list[int], dtype: torch.dtype) -> Tensor:
    indices = indices.contiguous()
    codes = indices.new_empty((*indices.shape, len(levels)), dtype=dtype)
    rows = indices.numel()
    if rows:
        with on_device(indices):
            dequantize_kernel[(triton.cdiv(rows, BLOCK),)](
                indices, codes, rows, **_pick(levels, "LEVELS", "BASIS"), **_shape(levels)
            )
    return codes
