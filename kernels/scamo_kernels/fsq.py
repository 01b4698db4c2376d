"""Finite scalar quantisation: codes and index in one pass, straight-through gradient in another.

The arithmetic is float32 whatever the input: bf16 tanh and rounding flip about 1% of the codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, check_levels, define, resolve
from scamo_kernels.reference import compute_dtype, fsq_constants

_INDEX_TYPES = (torch.int32, torch.int64)
_CODE_TYPES = (*FLOATS, torch.float64)


def fsq_quantize(z: Tensor, levels: Sequence[int], *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise each channel of z to one of its levels (paper eqs. 3-4, Mentzer et al. 2023).

    z: (..., d) float32, float16 or bfloat16 (float64 with impl="torch"); levels: d integers from 2 to 1000.
    Returns codes (..., d) in z's dtype, multiples of 1 / (L // 2) in [-1, 1], and indices int32 (...) with
    the first channel least significant. Straight-through: d codes / dz is the gradient of
    (tanh(z + shift) half_l - offset) / (L // 2). A NaN gives a NaN code and an unspecified index.
    impl: "auto" | "triton" | "torch". Raises TypeError or ValueError that names the argument.
    """
    levels = check_levels(levels)
    if z.dtype not in _CODE_TYPES:
        raise TypeError(f"z: expected a floating-point tensor, got {z.dtype}")
    if z.dim() == 0 or z.shape[-1] != len(levels):
        raise ValueError(f"z: expected shape (..., {len(levels)}) for levels {levels}, got {tuple(z.shape)}")
    chosen = resolve(impl, z)
    if chosen == "triton" and z.dtype == torch.float64:
        raise TypeError('z: impl = "triton" does not take float64; use impl="torch"')
    return torch.ops.scamo_kernels.fsq_quantize(z, levels, chosen)


def fsq_dequantize(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> Tensor:
    """The codes (..., d) in `dtype` of `indices` (...), int32 or int64: the inverse of `fsq_quantize`.

    Indices outside 0 .. prod(levels) - 1 raise ValueError on the CPU; on CUDA, where looking would wait for
    the device, they give codes of no meaning. No gradient. impl: "auto" | "triton" | "torch".
    """
    levels = check_levels(levels)
    if indices.dtype not in _INDEX_TYPES:
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
    if dtype not in _CODE_TYPES:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    chosen = resolve(impl, indices)
    if dtype == torch.float64:
        if impl == "triton":
            raise TypeError('dtype: impl = "triton" does not give float64; use impl="torch"')
        chosen = "torch"
    return torch.ops.scamo_kernels.fsq_dequantize(indices, levels, dtype, chosen)


@functools.lru_cache(maxsize=64)
def _constants(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """half_l, offset, shift (dtype), L // 2, basis and L (int64), each (d,)."""
    bounds = torch.tensor([fsq_constants(level) for level in levels], dtype=torch.float64)
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    whole = torch.tensor([[level // 2 for level in levels], basis, levels], dtype=torch.int64)
    return *bounds.to(device, dtype).unbind(1), *whole.to(device).unbind(0)


def _quantize(z: Tensor, levels: list[int], impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.quantize(z, levels)
    dtype = compute_dtype(z.dtype)
    half_l, offset, shift, half_width, basis, _ = _constants(tuple(levels), dtype, z.device)
    quantised = (z.contiguous() + shift).tanh_().mul_(half_l).sub_(offset).round_()
    # float64 holds every index exactly, in any order of summation; float32 would from 2**24 on not.
    digits = quantised.double().view(-1, len(levels))
    indices = digits.mv(basis.double()).add_((half_width * basis).sum()).to(torch.int32)
    return quantised.div_(half_width).to(z.dtype), indices.view(z.shape[:-1])


def _quantize_backward(grad: Tensor, z: Tensor, levels: list[int], impl: str) -> Tensor:
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.quantize_backward(grad, z, levels)
    dtype = compute_dtype(z.dtype)
    half_l, _, shift, half_width, _, _ = _constants(tuple(levels), dtype, z.device)
    slope = (z.contiguous() + shift).tanh_().square_().neg_().add_(1).mul_(half_l / half_width)
    return slope.mul_(grad).to(z.dtype)


def _dequantize(indices: Tensor, levels: list[int], dtype: torch.dtype, impl: str) -> Tensor:
    codes = math.prod(levels)
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= codes:
            raise ValueError(f"indices: expected 0 to {codes - 1} for levels {levels}, found {low} to {high}")
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.dequantize(indices, levels, dtype)
    *_, half_width, basis, size = _constants(tuple(levels), compute_dtype(dtype), indices.device)
    digits = torch.div(indices.contiguous().unsqueeze(-1), basis, rounding_mode="floor").remainder_(size)
    return digits.sub_(half_width).to(compute_dtype(dtype)).div_(half_width).to(dtype)


def _fake_quantize(z: Tensor, levels: list[int], impl: str) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)


def _fake_dequantize(indices: Tensor, levels: list[int], dtype: torch.dtype, impl: str) -> Tensor:
    return indices.new_empty((*indices.shape, len(levels)), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    z, ctx.levels, ctx.impl = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_codes: Tensor | None, _grad_indices: None):
    if grad_codes is None:
        return None, None, None
    (z,) = ctx.saved_tensors
    return torch.ops.scamo_kernels.fsq_quantize_backward(grad_codes, z, ctx.levels, ctx.impl), None, None


define("fsq_quantize(Tensor z, int[] levels, str impl) -> (Tensor, Tensor)")
define("fsq_quantize_backward(Tensor grad, Tensor z, int[] levels, str impl) -> Tensor")
define("fsq_dequantize(Tensor indices, int[] levels, ScalarType dtype, str impl) -> Tensor")
LIBRARY.impl("fsq_quantize", _quantize, "CompositeExplicitAutograd")
LIBRARY.impl("fsq_quantize_backward", _quantize_backward, "CompositeExplicitAutograd")
LIBRARY.impl("fsq_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "fsq_quantize", _fake_quantize, lib=LIBRARY)
torch.library.register_fake(
    NAME + "fsq_quantize_backward", lambda grad, z, levels, impl: z.new_empty(z.shape), lib=LIBRARY
)
torch.library.register_fake(NAME + "fsq_dequantize", _fake_dequantize, lib=LIBRARY)
torch.library.register_autograd(NAME + "fsq_quantize", _autograd, setup_context=_setup, lib=LIBRARY)
