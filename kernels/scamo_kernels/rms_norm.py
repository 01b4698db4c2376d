"""Root-mean-square normalisation, alone and fused with the addition to the residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor

from scamo_kernels._direct import call, is_direct, row_blocks
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve
from scamo_kernels.reference import compute_dtype

# Wider rows do not fit the registers of one program; impl="auto" computes them with torch.
MAX_TRITON_WIDTH = 8192
# Elements of a block of rows.
_CPU_BLOCK = 1 << 19


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019).

    x: (..., width) float32, float16 or bfloat16 (float64 with impl="torch"); weight: (width,) in x's dtype or
    float32. Returns x's shape and dtype, computed in float32 and rounded once. The backward sums the weight's
    gradient in a fixed order. impl: "auto" | "triton" (widths to 8192) | "torch". Raises TypeError or
    ValueError that names the argument.
    """
    chosen = _check(x, weight, eps, impl)
    if is_direct(chosen, x, weight):
        return call(_forward, _setup, _autograd, x, weight, float(eps), chosen)[0]
    return torch.ops.scamo_kernels.rms_norm(x, weight, float(eps), chosen)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)`, and the sum itself, in one pass.

    x and residual: one shape (..., width) and dtype; all else as `rms_norm`. Returns (normalised, x +
    residual); the sum is rounded to x's dtype before it is normalised, as the two steps apart would. Both
    outputs are differentiable; x and residual have one and the same gradient.
    """
    chosen = _check(x, weight, eps, impl)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected x's device {x.device}, got {residual.device}")
    if is_direct(chosen, x, residual, weight):
        arguments = x, residual, weight, float(eps), chosen
        out, total, _ = call(_add_forward, _add_setup, _add_autograd, *arguments)
    else:
        out, total, _ = torch.ops.scamo_kernels.add_rms_norm(x, residual, weight, float(eps), chosen)
    return out, total


def _check(x: Tensor, weight: Tensor, eps: float, impl: str) -> str:
    """Check what both fronts take; returns the implementation to run."""
    if x.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., width), got {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight: expected x's dtype {x.dtype} or float32, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected x's device {x.device}, got {weight.device}")
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: expected 0 or more")
    chosen = resolve(impl, x)
    if chosen == "triton":
        if x.dtype == torch.float64:
            raise TypeError('x: impl = "triton" does not take float64; use impl="torch"')
        if x.shape[-1] > MAX_TRITON_WIDTH:
            if impl == "triton":
                raise ValueError(f'x: impl = "triton" takes widths to {MAX_TRITON_WIDTH}, got {x.shape[-1]}')
            return "torch"
    return chosen


def _forward(x: Tensor, weight: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _rms_norm_triton

        out, _, scale = _rms_norm_triton.forward(x, None, weight, eps)
        return out, scale
    out, _, scale = _torch_forward(x, None, weight, eps)
    return out, scale


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _rms_norm_triton

        return _rms_norm_triton.forward(x, residual, weight, eps)
    return _torch_forward(x, residual, weight, eps)


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, the sums (x itself without a residual) and 1 / root mean square (N,)."""
    dtype = compute_dtype(x.dtype)
    total = (x if residual is None else x + residual).reshape(-1, x.shape[-1])
    out = torch.empty_like(total, memory_format=torch.contiguous_format)
    scale = total.new_empty(total.shape[0], dtype=dtype)
    wide_weight = weight.to(dtype)
    for part, result, factor in row_blocks(_CPU_BLOCK, total, out, scale.unsqueeze(1)):
        rows = part.to(dtype)
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=factor)
        factor.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        if result.dtype == dtype:
            torch.mul(rows, factor, out=result).mul_(wide_weight)
        else:
            result.copy_((rows * factor).mul_(wide_weight))
    return out.view(x.shape), total.contiguous().view(x.shape), scale


def _backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """The gradients of the normalised rows' input and of the weight; grad_total is added to the former."""
    if impl == "triton":
        from scamo_kernels import _rms_norm_triton

        return _rms_norm_triton.backward(grad, grad_total, total, weight, scale)
    width, dtype = total.shape[-1], compute_dtype(total.dtype)
    x, grad_out = total.reshape(-1, width), grad.reshape(-1, width)
    further = None if grad_total is None else grad_total.reshape(-1, width)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide_weight = weight.to(dtype)
    grad_weight = torch.zeros_like(wide_weight)
    tensors = x, grad_out, dx, scale.unsqueeze(1), *(() if further is None else (further,))
    for part, g, result, factor, *more in row_blocks(_CPU_BLOCK, *tensors):
        unit, g = part.to(dtype) * factor, g.to(dtype)
        product = g * unit
        grad_weight += product.sum(0)
        along = product.mv(wide_weight).div_(width)
        slope = torch.mul(g, wide_weight, out=result if result.dtype == dtype else product)
        slope.addcmul_(unit, along.unsqueeze(1), value=-1).mul_(factor)
        for addend in more:
            slope.add_(addend)
        if slope is not result:
            result.copy_(slope)
    return dx.view(total.shape), grad_weight.to(weight.dtype)


def _fake_forward(x: Tensor, weight: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_scale(x)


def _fake_scale(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=compute_dtype(x.dtype))


def _fake_add_forward(x, residual, weight, eps, impl):
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_scale(x)


def _fake_backward(grad, grad_total, total, weight, scale, impl):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, ctx.impl = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, _grad_scale: None):
    if grad is None:
        return None, None, None, None
    x, weight, scale = ctx.saved_tensors
    grads = torch.ops.scamo_kernels.rms_norm_backward(grad, None, x, weight, scale, ctx.impl)
    return *grads, None, None


def _add_setup(ctx, inputs, output) -> None:
    _, _, weight, _, ctx.impl = inputs
    _, total, scale = output
    ctx.save_for_backward(total, weight, scale)
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _add_autograd(ctx, grad: Tensor | None, grad_total: Tensor | None, _grad_scale: None):
    if grad is None:
        return grad_total, grad_total, None, None, None
    total, weight, scale = ctx.saved_tensors
    dx, grad_weight = torch.ops.scamo_kernels.rms_norm_backward(
        grad, grad_total, total, weight, scale, ctx.impl
    )
    return dx, dx, grad_weight, None, None


define("rms_norm(Tensor x, Tensor weight, float eps, str impl) -> (Tensor, Tensor)")
define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str impl) -> (Tensor, Tensor, Tensor)"
)
define(
    "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor scale, str impl) "
    "-> (Tensor, Tensor)"
)
LIBRARY.impl("rms_norm", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("add_rms_norm", _add_forward, "CompositeExplicitAutograd")
LIBRARY.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "rms_norm", _fake_forward, lib=LIBRARY)
torch.library.register_fake(NAME + "add_rms_norm", _fake_add_forward, lib=LIBRARY)
torch.library.register_fake(NAME + "rms_norm_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(NAME + "rms_norm", _autograd, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd(NAME + "add_rms_norm", _add_autograd, setup_context=_add_setup, lib=LIBRARY)
