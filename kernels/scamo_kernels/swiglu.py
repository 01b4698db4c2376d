"""SwiGLU's gate: silu(gate) * up from one tensor, the gradient into one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from scamo_kernels._direct import call, is_direct, row_blocks
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve

# Elements of a block of rows.
_CPU_BLOCK = 1 << 19
_silu_out = torch.ops.aten.silu.out


def swiglu(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020, without biases).

    gate_up: (..., 2 hidden), gate | up, float32, float16 or bfloat16 (float64 with impl="torch").
    Returns (..., hidden) in its dtype, computed in float32 and rounded once; "torch" rounds silu too. The
    backward keeps only gate_up and repeats silu. impl: "auto" | "triton" | "torch". Raises TypeError or
    ValueError that names the argument.
    """
    if gate_up.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"gate_up: expected a floating-point tensor, got {gate_up.dtype}")
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected shape (..., 2 hidden), got {tuple(gate_up.shape)}")
    chosen = resolve(impl, gate_up)
    if chosen == "triton" and gate_up.dtype == torch.float64:
        raise TypeError('gate_up: impl = "triton" does not take float64; use impl="torch"')
    if is_direct(chosen, gate_up):
        return call(_forward, _setup, _autograd, gate_up, chosen)
    return torch.ops.scamo_kernels.swiglu(gate_up, chosen)


def _forward(gate_up: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from scamo_kernels import _swiglu_triton

        return _swiglu_triton.forward(gate_up)
    hidden = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * hidden)
    out = rows.new_empty((rows.shape[0], hidden))
    for part, value in row_blocks(_CPU_BLOCK, rows, out):
        gate, up = part.chunk(2, -1)
        _silu_out(gate, out=value).mul_(up)
    return out.view(*gate_up.shape[:-1], hidden)


def _backward(grad: Tensor, gate_up: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from scamo_kernels import _swiglu_triton

        return _swiglu_triton.backward(grad, gate_up)
    hidden = gate_up.shape[-1] // 2
    rows, grads = gate_up.reshape(-1, 2 * hidden), grad.reshape(-1, hidden)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, g, result in row_blocks(_CPU_BLOCK, rows, grads, out):
        (gate, up), (d_gate, d_up) = part.chunk(2, -1), result.chunk(2, -1)
        _silu_out(gate, out=d_up).mul_(g)
        torch.mul(g, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return out.view(gate_up.shape)


def _fake_forward(gate_up: Tensor, impl: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _setup(ctx, inputs, output) -> None:
    gate_up, ctx.impl = inputs
    ctx.save_for_backward(gate_up)


def _autograd(ctx, grad: Tensor):
    (gate_up,) = ctx.saved_tensors
    return torch.ops.scamo_kernels.swiglu_backward(grad, gate_up, ctx.impl), None


define("swiglu(Tensor gate_up, str impl) -> Tensor")
define("swiglu_backward(Tensor grad, Tensor gate_up, str impl) -> Tensor")
LIBRARY.impl("swiglu", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("swiglu_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "swiglu", _fake_forward, lib=LIBRARY)
torch.library.register_fake(
    NAME + "swiglu_backward", lambda grad, gate_up, impl: gate_up.new_empty(gate_up.shape), lib=LIBRARY
)
torch.library.register_autograd(NAME + "swiglu", _autograd, setup_context=_setup, lib=LIBRARY)
