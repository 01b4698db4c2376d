"""Counts of codebook entries: what utilisation and entropy are computed from, without a one-hot matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from scamo_kernels._direct import is_direct
from scamo_kernels._dispatch import LIBRARY, NAME, define, resolve, sees_values


def code_histogram(indices: Tensor, codebook_size: int, *, impl: str = "auto") -> Tensor:
    """How often each code occurs: indices (...) int32 or int64 -> counts int64 (codebook_size,).

    Indices outside 0 .. codebook_size - 1 raise ValueError on the CPU; on CUDA, where looking would wait for
    the device, they do so with SCAMO_KERNELS_DEBUG=1 only, and else are not counted. impl: "auto" | "triton"
    | "torch".
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size = {codebook_size}: expected at least 1")
    chosen = resolve(impl, indices)
    if is_direct(chosen, indices):
        return _histogram(indices, codebook_size, chosen)
    return torch.ops.scamo_kernels.code_histogram(indices, codebook_size, chosen)


def _histogram(indices: Tensor, codebook_size: int, impl: str) -> Tensor:
    flat = indices.reshape(-1)
    if flat.numel() and sees_values(flat):
        low, high = (x.item() for x in torch.aminmax(flat))
        if low < 0 or high >= codebook_size:
            raise ValueError(f"indices: expected 0 to {codebook_size - 1}, found {low} to {high}")
    if impl == "triton":
        from scamo_kernels import _histogram_triton

        return _histogram_triton.histogram(flat, codebook_size)
    if not flat.is_cuda:
        return torch.bincount(flat, minlength=codebook_size)
    # bincount would wait for the device; integer additions commute, so this stays deterministic.
    inside = (flat >= 0) & (flat < codebook_size)
    slots = torch.where(inside, flat, codebook_size).long()
    counts = torch.zeros(codebook_size + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[:codebook_size].clone()


def _fake_histogram(indices: Tensor, codebook_size: int, impl: str) -> Tensor:
    return indices.new_empty((codebook_size,), dtype=torch.int64)


define("code_histogram(Tensor indices, SymInt codebook_size, str impl) -> Tensor")
LIBRARY.impl("code_histogram", _histogram, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "code_histogram", _fake_histogram, lib=LIBRARY)
