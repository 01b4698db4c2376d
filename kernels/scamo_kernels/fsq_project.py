"""FSQ between its two projections in one op: hidden states in, hidden states and indices out.

The latents and codes, a few numbers a row, never go through memory on their own: only z is kept, for the
backward. The arithmetic is float32 whatever the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scamo_kernels._direct import call, is_direct
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, check_levels, define, resolve
from scamo_kernels.fsq import check_bound, constants, digits_, quantize, tanh_, tanh_backward, tiled, untiled
from scamo_kernels.reference import compute_dtype

MAX_WIDTH = 1024
MAX_CHANNELS = 8


def fsq_project(
    hidden: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "tanh",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """z = hidden w_in^T + b_in, codes = FSQ(z), out = codes w_out^T + b_out (paper eqs. 3-4, as released).

    hidden: (..., W) float32, float16 or bfloat16, W from 1 to 1024. w_in (d, W), b_in (d,), w_out (W, d),
    b_out (W,): as nn.Linear keeps them, one dtype of these for all four, which need not be hidden's. levels:
    d integers, d up to 8. float64 for all tensors with impl="torch". Returns out (..., W) in hidden's dtype
    and indices int32 (...), the first channel least significant. `bound`, rounding and straight-through
    gradient as `fsq_quantize`. Gradients for all five tensors, the same bits every time.

    impl: "auto" | "triton" (one launch forward, two backward) | "torch". Raises TypeError or ValueError that
    names the argument.
    """
    levels = check_levels(levels)
    check_bound(bound)
    if len(levels) > MAX_CHANNELS:
        raise ValueError(f"levels = {levels}: expected at most {MAX_CHANNELS} channels")
    if hidden.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"hidden: expected a floating-point tensor, got {hidden.dtype}")
    if hidden.dim() == 0 or not 1 <= hidden.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"hidden: expected shape (..., W) with W from 1 to {MAX_WIDTH}, got {tuple(hidden.shape)}"
        )
    width, channels = hidden.shape[-1], len(levels)
    for name, tensor, shape in (
        ("w_in", w_in, (channels, width)),
        ("b_in", b_in, (channels,)),
        ("w_out", w_out, (width, channels)),
        ("b_out", b_out, (width,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {tensor.device}")
        if (tensor.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(f"{name}: float64 goes with float64 only, got {tensor.dtype} and {hidden.dtype}")
        if tensor.dtype not in (*FLOATS, torch.float64) or tensor.dtype != w_in.dtype:
            raise TypeError(f"{name}: expected one floating-point dtype for all weights, got {tensor.dtype}")
    chosen = resolve(impl, hidden)
    if chosen == "triton" and hidden.dtype == torch.float64:
        raise TypeError('hidden: impl = "triton" does not take float64; use impl="torch"')
    arguments = hidden, w_in, b_in, w_out, b_out, levels, bound, chosen
    if is_direct(chosen, *arguments[:5]):
        out, indices, _ = call(_forward, _setup, _autograd, *arguments)
    else:
        out, indices, _ = torch.ops.scamo_kernels.fsq_project(*arguments)
    return out, indices


def _forward(
    hidden: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    levels: list[int],
    bound: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _fsq_project_triton

        return _fsq_project_triton.forward(hidden, w_in, b_in, w_out, b_out, levels, bound)
    dtype = compute_dtype(hidden.dtype)
    # Autocast reaches into the op, and would take the products to half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        z = torch.addmm(b_in.to(dtype), rows, w_in.to(dtype).t())
        codes, indices = quantize(z, levels, "torch", bound)
        out = torch.addmm(b_out.to(dtype), codes, w_out.to(dtype).t()).to(hidden.dtype)
    leading = hidden.shape[:-1]
    return out.view(hidden.shape), indices.view(leading), z.view(*leading, len(levels))


def _backward(
    grad: Tensor,
    hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    z: Tensor,
    levels: list[int],
    bound: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _fsq_project_triton

        return _fsq_project_triton.backward(grad, hidden, w_in, w_out, z, levels, bound)
    dtype, weights = compute_dtype(hidden.dtype), w_in.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        grad = grad.reshape(-1, w_in.shape[1]).to(dtype)
        rows, z = hidden.reshape(grad.shape).to(dtype), z.reshape(-1, len(levels))
        c = constants(levels, bound, dtype, z.device)
        t = tanh_(tiled(z, len(levels)), c, bound)
        # Few rows times many columns: the other way round a CPU's products take several times as long.
        grad_codes = (w_out.to(dtype).t() @ grad.t()).t()
        grad_codes = tiled(grad_codes, len(levels)).mul_(c.slope)
        grad_z = untiled(tanh_backward(grad_codes, t), z.shape)
        codes = untiled(digits_(t, c).div_(c.width), z.shape)
        grad_w_in, grad_b_in = grad_z.t() @ rows, grad_z.sum(0)
        grad_w_out, grad_b_out = (codes.t() @ grad).t().contiguous(), grad.sum(0)
        grad_hidden = (grad_z @ w_in.to(dtype)).to(hidden.dtype).view(hidden.shape)
    return (
        grad_hidden,
        grad_w_in.to(weights),
        grad_b_in.to(weights),
        grad_w_out.to(weights),
        grad_b_out.to(weights),
    )


def _fake_forward(hidden, w_in, b_in, w_out, b_out, levels, bound, impl):
    leading = hidden.shape[:-1]
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(leading, dtype=torch.int32),
        hidden.new_empty((*leading, len(levels)), dtype=compute_dtype(hidden.dtype)),
    )


def _fake_backward(grad, hidden, w_in, w_out, z, levels, bound, impl):
    return (
        hidden.new_empty(hidden.shape),
        w_in.new_empty(w_in.shape),
        w_in.new_empty(w_in.shape[:1]),
        w_out.new_empty(w_out.shape),
        w_out.new_empty(w_out.shape[:1]),
    )


def _setup(ctx, inputs, output) -> None:
    hidden, w_in, _, w_out, _, *ctx.rest = inputs
    _, indices, z = output
    ctx.save_for_backward(hidden, w_in, w_out, z)
    ctx.mark_non_differentiable(indices, z)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, _grad_indices: None, _grad_z: None):
    if grad is None:
        return (None,) * 8
    grads = torch.ops.scamo_kernels.fsq_project_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, None, None, None)


define(
    "fsq_project(Tensor hidden, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, int[] levels, "
    "str bound, str impl) -> (Tensor, Tensor, Tensor)"
)
define(
    "fsq_project_backward(Tensor grad, Tensor hidden, Tensor w_in, Tensor w_out, Tensor z, int[] levels, "
    "str bound, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("fsq_project", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("fsq_project_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "fsq_project", _fake_forward, lib=LIBRARY)
torch.library.register_fake(NAME + "fsq_project_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(NAME + "fsq_project", _autograd, setup_context=_setup, lib=LIBRARY)
