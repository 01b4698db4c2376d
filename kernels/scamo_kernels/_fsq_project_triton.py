"""Triton kernels of FSQ between two linear maps. Imported only when they run.

Forward, one launch: a program takes a tile of rows through in-projection, rounding and out-projection.
Backward, two launches: programs walk over row tiles and leave partial sums of the weights' gradients, which
the second launch adds up in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import interpreted, on_device
from scamo_kernels._fsq_triton import index_of, pick, quantise_channels
from scamo_kernels.reference import fsq_scale


class Config(NamedTuple):
    """A tile of rows x columns of hidden states, and the launch.

    `registers`: the most that a thread may take, where ptxas would take more than it needs.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


# One table serves sm_80 and sm_90. Chosen by what ptxas reports: no spills, room for several blocks on a
# multiprocessor, whole 128-bit loads; tests/kernels/test_fsq_project.py holds them to it. In the backward
# 32 rows spill with four warps in half precision, and take over 240 registers with eight in float32.
FORWARD = Config(32, 64, 4, 2)
BACKWARD = {"half": Config(32, 64, 8, 2), "single": Config(16, 64, 4, 2, 240)}
# Tensor cores take no fewer channels.
CHANNELS = 16
# Partial sums are bounded by this many programs whatever the number of rows: 13 MiB at W 512, d 6.
MAX_PROGRAMS = 512
# Few enough that short tests have programs with several tiles.
INTERPRETER_PROGRAMS = 2
SUM = Config(64, 32, 4, 2)

# float32 on tensor cores as three tf32 products each; half precision ignores it.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _dot(a, b, total):
    """total + a @ b in float32; products of two tensors of one half type are exact as they are."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=_PRECISION)


@triton.jit
def _rows_tile(base, row, rows, column, W: tl.constexpr):
    mask = (row[:, None] < rows) & (column[None, :] < W)
    return tl.load(base + row[:, None] * W + column[None, :], mask=mask, other=0.0)


@triton.jit
def _w_in_tile(w_in, channel, column, D: tl.constexpr, W: tl.constexpr):
    """(channels, columns) of w_in."""
    mask = (channel[:, None] < D) & (column[None, :] < W)
    return tl.load(w_in + channel[:, None] * W + column[None, :], mask=mask, other=0.0)


@triton.jit
def _w_out_tile(w_out, column, channel, D: tl.constexpr, W: tl.constexpr):
    """(columns, channels) of w_out."""
    mask = (column[:, None] < W) & (channel[None, :] < D)
    return tl.load(w_out + column[:, None] * D + channel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    hidden,
    w_in,
    b_in,
    w_out,
    b_out,
    out,
    indices,
    z_out,
    rows,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BASIS: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BD)
    z = tl.zeros((ROWS, BD), tl.float32)
    for start in range(0, W, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _rows_tile(hidden, row, rows, column, W)
        z = _dot(x, tl.trans(_w_in_tile(w_in, channel, column, D, W)), z)
    z += tl.load(b_in + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    small = (row[:, None] < rows) & (channel[None, :] < D)
    tl.store(z_out + row[:, None] * D + channel[None, :], z, mask=small)
    code, q, _ = quantise_channels(z, channel[None, :], D, HALF, OFFSET, SHIFT, WIDTH, SCALE, NATIVE)
    tl.store(indices + row, index_of(q, channel[None, :], D, WIDTH, BASIS), mask=row < rows)
    for start in range(0, W, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        bias = tl.load(b_out + column, mask=column < W, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = _dot(code, tl.trans(_w_out_tile(w_out, column, channel, D, W)), total) + bias[None, :]
        mask = (row[:, None] < rows) & (column[None, :] < W)
        tl.store(out + row[:, None] * W + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad,
    hidden,
    w_in,
    w_out,
    z,
    grad_hidden,
    partial,
    rows,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A program's partial sums: grad_w_in (D, W), grad_w_out^T (D, W), grad_b_out (W,), grad_b_in (D,)."""
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    channel = tl.arange(0, BD)
    mine = partial + program.to(tl.int64) * ((2 * D + 1) * W + D)
    grad_b_in = tl.zeros((BD,), tl.float32)
    slope = tl.zeros((1, BD), tl.float32)
    for i in tl.static_range(D):
        slope = tl.where(channel[None, :] == i, SLOPE[i], slope)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        small = (row[:, None] < rows) & (channel[None, :] < D)
        x = tl.load(z + row[:, None] * D + channel[None, :], mask=small, other=0.0)
        code, _q, t = quantise_channels(x, channel[None, :], D, HALF, OFFSET, SHIFT, WIDTH, SCALE, NATIVE)
        grad_z = tl.zeros((ROWS, BD), tl.float32)
        for start in range(0, W, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            g = _rows_tile(grad, row, rows, column, W)
            grad_z = _dot(g, _w_out_tile(w_out, column, channel, D, W), grad_z)
        grad_z *= (1.0 - t * t) * slope
        grad_b_in += tl.sum(grad_z, 0)
        # A later tile adds to what an earlier one left; the barrier below puts it in order.
        later = tile >= tl.num_programs(0)
        for start in range(0, W, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < W
            g = _rows_tile(grad, row, rows, column, W)
            h = _rows_tile(hidden, row, rows, column, W)
            both = (channel[:, None] < D) & inside[None, :]
            at = mine + channel[:, None] * W + column[None, :]
            total = tl.load(at, mask=both & later, other=0.0)
            tl.store(at, _dot(tl.trans(grad_z), h, total), mask=both)
            total = tl.load(at + D * W, mask=both & later, other=0.0)
            tl.store(at + D * W, _dot(tl.trans(code), g, total), mask=both)
            bias = tl.load(mine + 2 * D * W + column, mask=inside & later, other=0.0)
            tl.store(mine + 2 * D * W + column, bias + tl.sum(g.to(tl.float32), 0), mask=inside)
            back = tl.zeros((ROWS, COLUMNS), tl.float32)
            back = _dot(grad_z, _w_in_tile(w_in, channel, column, D, W), back)
            mask = (row[:, None] < rows) & inside[None, :]
            at = grad_hidden + row[:, None] * W + column[None, :]
            tl.store(at, back.to(grad_hidden.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    tl.store(mine + (2 * D + 1) * W + channel, grad_b_in, mask=channel < D)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial,
    grad_w_in,
    grad_b_in,
    grad_w_out,
    grad_b_out,
    programs,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    size: tl.constexpr = (2 * D + 1) * W + D
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row[:, None] < programs) & (at[None, :] < size)
        total += tl.load(partial + row[:, None].to(tl.int64) * size + at[None, :], mask=mask, other=0.0)
    value = tl.sum(total, 0).to(grad_w_in.dtype.element_ty)
    tl.store(grad_w_in + at, value, mask=at < D * W)
    i = at - D * W
    tl.store(grad_w_out + (i % W) * D + i // W, value, mask=(i >= 0) & (i < D * W))
    i = at - 2 * D * W
    tl.store(grad_b_out + i, value, mask=(i >= 0) & (i < W))
    i -= W
    tl.store(grad_b_in + i, value, mask=(i >= 0) & (i < D))


def backward_config(data: torch.dtype, weights: torch.dtype) -> Config:
    """float32 of either kind takes more registers."""
    return BACKWARD["single" if torch.float32 in (data, weights) else "half"]


def forward(
    hidden: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    levels: list[int],
    bound: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, w_in, b_in, w_out, b_out = (x.contiguous() for x in (hidden, w_in, b_in, w_out, b_out))
    width = hidden.shape[-1]
    out = torch.empty_like(hidden)
    indices = hidden.new_empty(hidden.shape[:-1], dtype=torch.int32)
    z = hidden.new_empty((*hidden.shape[:-1], len(levels)), dtype=torch.float32)
    rows = indices.numel()
    if rows:
        config = FORWARD
        values = pick(levels, bound, "HALF", "OFFSET", "SHIFT", "WIDTH", "BASIS")
        with on_device(hidden):
            forward_kernel[(triton.cdiv(rows, config.rows),)](
                hidden,
                w_in,
                b_in,
                w_out,
                b_out,
                out,
                indices,
                z,
                rows,
                W=width,
                D=len(levels),
                BD=CHANNELS,
                SCALE=fsq_scale(bound),
                ROWS=config.rows,
                COLUMNS=config.columns,
                NATIVE=not interpreted(),
                num_warps=config.warps,
                num_stages=config.stages,
                **values,
            )
    return out, indices, z


def backward(
    grad: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, z: Tensor, levels: list[int], bound: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, hidden, w_in, w_out, z = (x.contiguous() for x in (grad, hidden, w_in, w_out, z))
    channels, width = w_in.shape
    rows = z.numel() // channels
    grad_hidden, grad_w_in, grad_w_out = (torch.empty_like(x) for x in (hidden, w_in, w_out))
    grad_b_in, grad_b_out = w_in.new_empty((channels,)), w_in.new_empty((width,))
    config = backward_config(hidden.dtype, w_in.dtype)
    # A function of the rows alone, so that the sums' order is too.
    programs = min(triton.cdiv(rows, config.rows), INTERPRETER_PROGRAMS if interpreted() else MAX_PROGRAMS)
    size = (2 * channels + 1) * width + channels
    partial = hidden.new_empty((programs, size), dtype=torch.float32)
    with on_device(hidden):
        if rows:
            backward_kernel[(programs,)](
                grad,
                hidden,
                w_in,
                w_out,
                z,
                grad_hidden,
                partial,
                rows,
                W=width,
                D=channels,
                BD=CHANNELS,
                SCALE=fsq_scale(bound),
                ROWS=config.rows,
                COLUMNS=config.columns,
                NATIVE=not interpreted(),
                num_warps=config.warps,
                num_stages=config.stages,
                maxnreg=config.registers,
                **pick(levels, bound, "HALF", "OFFSET", "SHIFT", "WIDTH", "SLOPE"),
            )
        # Without a row it writes the zeros.
        sum_kernel[(triton.cdiv(size, SUM.columns),)](
            partial,
            grad_w_in,
            grad_b_in,
            grad_w_out,
            grad_b_out,
            programs,
            W=width,
            D=channels,
            ROWS=SUM.rows,
            COLUMNS=SUM.columns,
            num_warps=SUM.warps,
            num_stages=SUM.stages,
        )
    return grad_hidden, grad_w_in, grad_b_in, grad_w_out, grad_b_out
