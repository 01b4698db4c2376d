"""Triton kernel of the linear cross-entropy: logits into losses and their gradient, in place.

Imported only when it runs. One program per row and two passes over it, the second backwards: what the
first read last is still in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import interpreted, on_device

# Columns of a step, as lanes of 8: a lane keeps a running maximum of its own, one reduction ends the pass.
WIDE, WIDE_WARPS = 8192, 16
NARROW, NARROW_WARPS = 1024, 4
# Small enough that short tests go round the loop.
INTERPRETER = 128, 4

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _update(peak, total, value):
    """Online softmax in base 2: value (lanes, 8) joins the lanes' maximum and sum."""
    above = tl.maximum(peak, tl.max(value, 1))
    total = total * tl.exp2(peak - above) + tl.sum(tl.exp2(value - above[:, None]), 1)
    return above, total


# A chunk's targets and losses may begin anywhere, and are read and written one by one.
@triton.jit(do_not_specialize_on_alignment=["targets", "losses"])
def softmax_loss_kernel(
    logits,
    targets,
    losses,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * STRIDE
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(own + target, mask=inside, other=0.0).to(tl.float32)
    lanes: tl.constexpr = BLOCK // 8
    column = tl.arange(0, lanes)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Only the last step needs a mask; with a mask on an odd V the others could not load whole vectors.
    full: tl.constexpr = V // BLOCK * BLOCK
    # Finite, so that a lane without a value subtracts no infinities.
    peak = tl.full((lanes,), -1e30, tl.float32)
    total = tl.zeros((lanes,), tl.float32)
    for first in range(0, full, BLOCK):
        peak, total = _update(peak, total, tl.load(own + first + column).to(tl.float32) * _LOG2_E)
    if full < V:
        mask = full + column < V
        value = tl.load(own + full + column, mask=mask, other=-float("inf")).to(tl.float32)
        peak, total = _update(peak, total, value * _LOG2_E)
    most = tl.max(peak, 0)
    log_sum = most + tl.log2(tl.sum(total * tl.exp2(peak - most), 0))
    # Of a class that does not exist nothing is read; all that comes of it is NaN.
    log_sum = tl.where(inside, log_sum, float("nan"))
    tl.store(losses + row, (log_sum - at_target * _LOG2_E) * _LN_2)
    if TRAIN:
        # No thread may overwrite the target's logit before all have read it.
        tl.debug_barrier()
        if full < V:
            mask = full + column < V
            value = tl.load(own + full + column, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp2(value * _LOG2_E - log_sum) - (full + column == target).to(tl.float32)
            tl.store(own + full + column, p.to(logits.dtype.element_ty), mask=mask)
        for back in range(0, full, BLOCK):
            at = full - BLOCK - back + column
            value = tl.load(own + at).to(tl.float32)
            p = tl.exp2(value * _LOG2_E - log_sum) - (at == target).to(tl.float32)
            tl.store(own + at, p.to(logits.dtype.element_ty))


def block(classes: int) -> tuple[int, int]:
    """Columns of a step, and warps."""
    if interpreted():
        return INTERPRETER
    return (WIDE, WIDE_WARPS) if classes >= WIDE else (NARROW, NARROW_WARPS)


def softmax_loss_(logits: Tensor, targets: Tensor, losses: Tensor, train: bool) -> None:
    """Write each row's loss; with `train` turn logits (n, V) into the losses' gradient, in place."""
    rows, classes = logits.shape
    columns, warps = block(classes)
    if rows:
        with on_device(logits):
            softmax_loss_kernel[(rows,)](
                logits,
                targets.contiguous(),
                losses,
                V=classes,
                STRIDE=logits.stride(0),
                BLOCK=columns,
                TRAIN=train,
                num_warps=warps,
            )
