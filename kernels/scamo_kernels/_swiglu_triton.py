"""Triton kernels of SwiGLU's gate. Imported only when they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import on_device

# Elements of a program: 8 a thread, one 16-byte load of half precision from each input.
BLOCK = 1024
WARPS = 4


@triton.jit
def _tile(rows, H: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The program's rows (int64) and columns, and which of its elements exist."""
    # Two coordinates and no division by H: an int64 division per element would cost more than the memory.
    columns: tl.constexpr = (H + BC - 1) // BC
    row = (tl.program_id(0) // columns).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    column = tl.program_id(0) % columns * BC + tl.arange(0, BC)[None, :]
    return row, column, (row < rows) & (column < H)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(gate_up, out, rows, H: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    row, column, mask = _tile(rows, H, BR, BC)
    source = gate_up + row * (2 * H) + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + H, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * H + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(grad, gate_up, grad_in, rows, H: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    row, column, mask = _tile(rows, H, BR, BC)
    at = row * (2 * H) + column
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + H, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * H + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_in + at, d_gate.to(grad_in.dtype.element_ty), mask=mask)
    tl.store(grad_in + at + H, (g * gate * sigmoid).to(grad_in.dtype.element_ty), mask=mask)


def shape(hidden: int) -> dict[str, int]:
    """The compile-time constants for a width."""
    columns = min(BLOCK, triton.next_power_of_2(hidden))
    return {"H": hidden, "BR": BLOCK // columns, "BC": columns}


def _launch(kernel, tensors: tuple[Tensor, ...], rows: int, hidden: int) -> None:
    constants = shape(hidden)
    if rows:
        grid = (triton.cdiv(rows, constants["BR"]) * triton.cdiv(hidden, constants["BC"]),)
        with on_device(tensors[0]):
            kernel[grid](*tensors, rows, **constants, num_warps=WARPS)


def forward(gate_up: Tensor) -> Tensor:
    hidden = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], hidden))
    _launch(forward_kernel, (gate_up.contiguous(), out), out.numel() // hidden, hidden)
    return out


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    hidden = gate_up.shape[-1] // 2
    grad_in = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    tensors = grad.contiguous(), gate_up.contiguous(), grad_in
    _launch(backward_kernel, tensors, grad.numel() // hidden, hidden)
    return grad_in
