"""Triton kernels of RMS normalisation. Imported only when they run.

Forward: one launch, a tile of whole rows per program. Backward: a fixed number of programs walk over the
rows, each with its own partial gradient of the weight; a second launch adds the partials in order, so that
the same inputs give the same bits on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import interpreted, on_device

# Elements of a tile that a thread holds; programs of the backward, four a multiprocessor of an H200.
PER_THREAD = 16
PROGRAMS = 528
# Of a tile: each row costs a thread an address.
MAX_ROWS = 64
# Small enough that short tests go round the loop.
INTERPRETER_PROGRAMS = 3
# Tile of the sum of partials.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 32, 32, 4


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    residual,
    weight,
    out,
    total,
    scale,
    rows,
    eps,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BC)[None, :]
    at = row[:, None] * C + column
    mask = (row[:, None] < rows) & (column < C)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    tl.store(scale + row, inverse, mask=row < rows)
    slope = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + at, (value * inverse[:, None] * slope).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "blocks", "programs"])
def backward_kernel(
    grad,
    grad_total,
    total,
    weight,
    scale,
    dx,
    partial,
    rows,
    blocks,
    programs,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.arange(0, BR)[:, None]
    column = tl.arange(0, BC)[None, :]
    inside = column < C
    at = row * C + column
    grad_weight = tl.zeros((BR, BC), tl.float32)
    for block in range(tl.program_id(0), blocks, programs):
        # One 64-bit address for all threads, and 32 bits of their own.
        first = tl.cast(block, tl.int64) * BR
        here = row < rows - block * BR
        mask = here & inside
        # For every block again, from the L1 cache: kept in registers it would spill.
        slope = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + first * C + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + first * C + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(scale + first + row, mask=here, other=0.0)
        unit = value * inverse
        grad_weight += g * unit
        g *= slope
        along = tl.sum(g * unit, 1)[:, None] / C
        result = (g - unit * along) * inverse
        if ADD:
            result += tl.load(grad_total + first * C + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + first * C + at, result.to(dx.dtype.element_ty), mask=mask)
    own = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BC)
    tl.store(partial + own, tl.sum(grad_weight, 0), mask=tl.arange(0, BC) < C)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, grad_weight, count, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < C
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, count, BR):
        row = start + tl.arange(0, BR)[:, None]
        at = row.to(tl.int64) * C + column[None, :]
        total += tl.load(partial + at, mask=(row < count) & inside[None, :], other=0.0)
    tl.store(grad_weight + column, tl.sum(total, 0).to(grad_weight.dtype.element_ty), mask=inside)


def shape(width: int) -> tuple[dict[str, int], int]:
    """The compile-time constants of a width, and the warps."""
    columns = triton.next_power_of_2(width)
    warps = min(16, max(4, columns // (32 * PER_THREAD)))
    rows = min(MAX_ROWS, max(1, 32 * warps * PER_THREAD // columns))
    return {"C": width, "BR": rows, "BC": columns}, warps


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, the sums (x itself without a residual) and 1 / root mean square (N,)."""
    x = x.contiguous()
    constants, warps = shape(x.shape[-1])
    rows = x.numel() // x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    total = x if residual is None else torch.empty_like(x)
    if rows:
        with on_device(x):
            forward_kernel[(triton.cdiv(rows, constants["BR"]),)](
                x,
                x if residual is None else residual.contiguous(),
                weight.contiguous(),
                out,
                total,
                scale,
                rows,
                eps,
                **constants,
                ADD=residual is not None,
                num_warps=warps,
            )
    return out, total, scale


def backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the normalised rows' input and of the weight; grad_total is added to the former."""
    grad, total = grad.contiguous(), total.contiguous()
    constants, warps = shape(total.shape[-1])
    width, rows = total.shape[-1], scale.shape[0]
    blocks = triton.cdiv(rows, constants["BR"])
    programs = min(blocks, INTERPRETER_PROGRAMS if interpreted() else PROGRAMS)
    dx = torch.empty_like(total)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if not rows:
        return dx, grad_weight.zero_()
    partial = total.new_empty((programs, width), dtype=torch.float32)
    with on_device(total):
        backward_kernel[(programs,)](
            grad,
            grad if grad_total is None else grad_total.contiguous(),
            total,
            weight.contiguous(),
            scale,
            dx,
            partial,
            rows,
            blocks,
            programs,
            **constants,
            ADD=grad_total is not None,
            num_warps=warps,
        )
        sum_kernel[(triton.cdiv(width, SUM_COLUMNS),)](
            partial, grad_weight, programs, C=width, BR=SUM_ROWS, BC=SUM_COLUMNS, num_warps=SUM_WARPS
        )
    return dx, grad_weight
