"""Triton kernels of finite scalar quantisation. Imported only when they run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from scamo_kernels._dispatch import interpreted, on_device
from scamo_kernels.reference import fsq_constants, fsq_scale

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


@triton.jit
def quantise_channels(
    x,
    channel,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """(codes, digits from -(L // 2) on, tanh) of x; `channel` broadcasts to x; padding has D or more."""
    t = _tanh(x * SCALE + _per_channel(channel, SHIFT, D), NATIVE)
    bound = t * _per_channel(channel, HALF, D) - _per_channel(channel, OFFSET, D)
    q = (bound + _ROUND) - _ROUND
    width = tl.where(channel < D, _per_channel(channel, WIDTH, D), 1.0)
    # Divide as IEEE says: a code must equal the dequantised one to the bit.
    return tl.div_rn(q, width + tl.zeros_like(q)), q, t


@triton.jit
def index_of(q, channel, D: tl.constexpr, WIDTH: tl.constexpr, BASIS: tl.constexpr):
    """The int32 index (rows,) of digits q (rows, channels); whole numbers only, so exact to 2^31 - 1."""
    basis = tl.zeros_like(channel)
    for i in tl.static_range(D):
        basis = tl.where(channel == i, BASIS[i], basis)
    digit = (q + _per_channel(channel, WIDTH, D)).to(tl.int32)
    return tl.sum(tl.where(channel < D, digit * basis, 0), 1)


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
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    at = row[:, None] * D + channel
    mask = (row[:, None] < rows) & (channel < D)
    rest = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros_like(rest)
    unit = tl.full((1, BD), 1.0, tl.float32)
    for stage in tl.static_range(STAGES):
        code, q, _ = quantise_channels(rest * unit, channel, D, HALF, OFFSET, SHIFT, WIDTH, SCALE, NATIVE)
        tl.store(indices + row * STAGES + stage, index_of(q, channel, D, WIDTH, BASIS), mask=row < rows)
        if STAGES == 1:
            total = code
        else:
            # Divisions leave nothing to contract: sums here and in dequantize_kernel have the same bits.
            part = tl.div_rn(code, unit + tl.zeros_like(code))
            total += part
            rest -= part
            unit *= tl.where(channel < D, _per_channel(channel, STEP, D), 1.0)
    tl.store(codes + at, total.to(codes.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def quantize_backward_kernel(
    grad,
    z,
    grad_z,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPE: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Elementwise, so the rows need no tile: consecutive elements, whole vectors.
    at = tl.program_id(0).to(tl.int64) * (BLOCK * BD) + tl.arange(0, BLOCK * BD)
    mask = at < rows.to(tl.int64) * D
    channel = (at % D).to(tl.int32)
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if STAGES == 1:
        t = _tanh(x * SCALE + _per_channel(channel, SHIFT, D), NATIVE)
        slope = 1.0 - t * t
    else:
        slope = tl.zeros_like(x)
        unit = tl.full((BLOCK * BD,), 1.0, tl.float32)
        for _ in tl.static_range(STAGES):
            code, _q, t = quantise_channels(x * unit, channel, D, HALF, OFFSET, SHIFT, WIDTH, SCALE, NATIVE)
            slope += 1.0 - t * t
            x -= tl.div_rn(code, unit)
            unit *= _per_channel(channel, STEP, D)
    slope *= _per_channel(channel, SLOPE, D)
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
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BD)[None, :]
    total = tl.zeros((BLOCK, BD), tl.float32)
    for stage in tl.static_range(STAGES):
        index = tl.load(indices + row * STAGES + stage, mask=row < rows, other=0).to(tl.int32)[:, None]
        code = tl.zeros((BLOCK, BD), tl.float32)
        for i in tl.static_range(D):
            # Constant divisors become multiplications.
            digit = (index // BASIS[i]) % LEVELS[i] - LEVELS[i] // 2
            value = tl.div_rn(digit.to(tl.float32), tl.full((BLOCK, 1), LEVELS[i] // 2, tl.float32))
            if stage > 0:
                value = tl.div_rn(value, tl.full((BLOCK, 1), (LEVELS[i] - 1) ** stage, tl.float32))
            code = tl.where(channel == i, value, code)
        total += code
    mask = (row[:, None] < rows) & (channel < D)
    tl.store(codes + row[:, None] * D + channel, total.to(codes.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _constants(levels: tuple[int, ...], bound: str) -> dict[str, tuple]:
    half, offset, shift = zip(*(fsq_constants(level, bound) for level in levels), strict=True)
    basis = [1]
    for level in levels[:-1]:
        basis.append(basis[-1] * level)
    return {
        "HALF": half,
        "OFFSET": offset,
        "SHIFT": shift,
        "WIDTH": tuple(float(level // 2) for level in levels),
        "SLOPE": tuple(fsq_scale(bound) * h / (level // 2) for h, level in zip(half, levels, strict=True)),
        "BASIS": tuple(basis),
        "STEP": tuple(float(level - 1) for level in levels),
        "LEVELS": tuple(levels),
    }


def constants(levels: Sequence[int], bound: str = "tanh") -> dict[str, tuple]:
    """The compile-time constants of every kernel, one entry per channel."""
    return dict(_constants(tuple(levels), bound))


def shape(levels: Sequence[int], stages: int = 1) -> dict[str, int]:
    """The channels, those with padding, and the rows of a program: fewer where a row needs more registers."""
    width = triton.next_power_of_2(len(levels))
    rows = min(BLOCK, 8 * BLOCK // width) // (1 if stages == 1 else 4)
    return {"D": len(levels), "BD": width, "BLOCK": rows}


def pick(levels: Sequence[int], bound: str, *names: str) -> dict[str, tuple]:
    """Some of `constants`."""
    table = _constants(tuple(levels), bound)
    return {name: table[name] for name in names}


def quantize(z: Tensor, levels: list[int], bound: str, stages: int) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    codes = torch.empty_like(z)
    indices = z.new_empty(z.shape[:-1] if stages == 1 else (*z.shape[:-1], stages), dtype=torch.int32)
    rows = z.numel() // len(levels)
    if rows:
        values = pick(levels, bound, "HALF", "OFFSET", "SHIFT", "WIDTH", "BASIS", "STEP")
        flags = {"SCALE": fsq_scale(bound), "STAGES": stages, "NATIVE": not interpreted()}
        tile = shape(levels, stages)
        with on_device(z):
            quantize_kernel[(triton.cdiv(rows, tile["BLOCK"]),)](
                z, codes, indices, rows, num_warps=WARPS, **flags, **values, **tile
            )
    return codes, indices


def quantize_backward(grad: Tensor, z: Tensor, levels: list[int], bound: str, stages: int) -> Tensor:
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    rows = z.numel() // len(levels)
    if rows:
        tile = shape(levels, stages)
        grid = (triton.cdiv(z.numel(), tile["BLOCK"] * tile["BD"]),)
        values = pick(levels, bound, "HALF", "OFFSET", "SHIFT", "WIDTH", "SLOPE", "STEP")
        flags = {"SCALE": fsq_scale(bound), "STAGES": stages, "NATIVE": not interpreted()}
        with on_device(z):
            quantize_backward_kernel[grid](grad, z, grad_z, rows, num_warps=WARPS, **flags, **values, **tile)
    return grad_z


def dequantize(indices: Tensor, levels: list[int], dtype: torch.dtype, stages: int) -> Tensor:
    indices = indices.contiguous()
    leading = indices.shape if stages == 1 else indices.shape[:-1]
    codes = indices.new_empty((*leading, len(levels)), dtype=dtype)
    rows = indices.numel() // stages
    if rows:
        tile = shape(levels, stages)
        values = pick(levels, "tanh", "LEVELS", "BASIS")
        with on_device(indices):
            dequantize_kernel[(triton.cdiv(rows, tile["BLOCK"]),)](
                indices, codes, rows, num_warps=WARPS, STAGES=stages, **values, **tile
            )
    return codes
