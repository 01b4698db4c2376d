"""Triton kernel of the code histogram. Imported only when it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import on_device

BLOCK = 1024
WARPS = 4


@triton.jit(do_not_specialize=["count", "codebook_size"])
def histogram_kernel(indices, counts, count, codebook_size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < count, other=-1)
    inside = (index >= 0) & (index < codebook_size)
    # Integer additions commute: the counts do not depend on the order of the programs.
    tl.atomic_add(counts + index, tl.full((BLOCK,), 1, tl.int64), mask=inside, sem="relaxed")


def histogram(indices: Tensor, codebook_size: int) -> Tensor:
    """indices (n,), integers -> counts int64 (codebook_size,); indices outside are not counted."""
    indices = indices.contiguous()
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=indices.device)
    if indices.numel():
        with on_device(indices):
            histogram_kernel[(triton.cdiv(indices.numel(), BLOCK),)](
                indices, counts, indices.numel(), codebook_size, BLOCK=BLOCK, num_warps=WARPS
            )
    return counts
