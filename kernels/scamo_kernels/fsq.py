"""Finite scalar quantisation: codes and index in one pass, straight-through gradient in another.

The arithmetic is float32 whatever the input: bf16 tanh and rounding flip about 1% of the codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scamo_kernels._direct import call, is_direct
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, check_levels, define, resolve, sees_values
from scamo_kernels.reference import FSQ_BOUNDS, compute_dtype, fsq_constants, fsq_scale

_INDEX_TYPES = (torch.int32, torch.int64)
_CODE_TYPES = (*FLOATS, torch.float64)
tanh_backward = torch.ops.aten.tanh_backward.default


def fsq_quantize(
    z: Tensor, levels: Sequence[int], *, bound: str = "tanh", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise each channel of z to one of its levels (paper eqs. 3-4, Mentzer et al. 2023).

    z: (..., d) float32, float16 or bfloat16 (float64 with impl="torch"); levels: d integers from 2 to 1000,
    at most 2^31 - 1 codes. Returns codes (..., d) in z's dtype, multiples of 1 / (L // 2) in [-1, 1], and
    indices int32 (...) with the first channel least significant. A NaN gives a NaN code and an unspecified
    index.

    What is rounded half to even to one of the L integers -(L // 2) .. (L - 1) // 2:
    bound="tanh": tanh(z + shift) half_l - offset, half_l = (L - 1)(1 + 1e-3) / 2, offset 1/2 for even L else
    0, shift = atanh(offset / half_l): the released code. "mentzer": the same with half_l = (L - 1)(1 - 1e-3)
    / 2 and shift = tan(offset / half_l): the notebook of Mentzer et al. "sigmoid": (L - 1) sigmoid(z) -
    L // 2: the paper's f, where z = 0 is a rounding tie for even L. Straight-through: d codes / dz is the
    gradient of that over L // 2.

    impl: "auto" | "triton" | "torch". Raises TypeError or ValueError that names the argument.
    """
    levels = check_levels(levels)
    chosen = check_latents(z, len(levels), f"{len(levels)}", levels, bound, impl)
    return _run(z, levels, chosen, bound)


def fsq_quantize_grouped(
    z: Tensor, levels: Sequence[int], groups: int, *, bound: str = "tanh", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise `groups` runs of d channels each by itself, all with the same levels; one launch.

    z: (..., groups d). Returns codes like z and indices int32 (..., groups). All else as `fsq_quantize`.
    """
    levels = check_levels(levels)
    _check_count("groups", groups)
    width = groups * len(levels)
    chosen = check_latents(z, width, f"{groups} * {len(levels)}", levels, bound, impl)
    split = z.unflatten(-1, (groups, len(levels)))
    codes, indices = _run(split, levels, chosen, bound)
    return codes.flatten(-2), indices


def fsq_quantize_residual(
    z: Tensor, levels: Sequence[int], quantizers: int, *, bound: str = "tanh", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise z in stages, each one what the stages before it left, in units of (L - 1)^-i; one launch.

    The residual FSQ of lucidrains' vector-quantize-pytorch with the scales of its first releases, without its
    clamp of the input: stage i adds code(rest (L - 1)^i) (L - 1)^-i, and the rest of z goes on. z: (..., d).
    Returns the sum of the codes like z and indices int32 (..., quantizers). The gradient is the sum of the
    stages' straight-through gradients, where what is taken away counts as a constant. levels: from 3 on where
    there are two stages or more (two levels would not get finer), (L - 1)^(quantizers - 1) at most 2^24 (a
    float32 has no more). All else as `fsq_quantize`.
    """
    levels = check_levels(levels)
    _check_stages(levels, quantizers)
    chosen = check_latents(z, len(levels), f"{len(levels)}", levels, bound, impl)
    codes, indices = _run(z, levels, chosen, bound, quantizers)
    return codes, indices.unsqueeze(-1) if quantizers == 1 else indices


def fsq_dequantize(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> Tensor:
    """The codes (..., d) in `dtype` of `indices` (...), int32 or int64: the inverse of `fsq_quantize`.

    Indices outside 0 .. prod(levels) - 1 raise ValueError on the CPU; on CUDA, where looking would wait for
    the device, they do so with SCAMO_KERNELS_DEBUG=1 only, and else give codes of no meaning. No gradient.
    impl: "auto" | "triton" | "torch".
    """
    levels = check_levels(levels)
    chosen = _check_indices(indices, dtype, impl)
    return torch.ops.scamo_kernels.fsq_dequantize(indices, levels, dtype, chosen)


def fsq_dequantize_grouped(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> Tensor:
    """indices (..., groups) -> codes (..., groups d): the inverse of `fsq_quantize_grouped`.

    All else as `fsq_dequantize`.
    """
    if indices.dim() == 0:
        raise ValueError("indices: expected shape (..., groups), got ()")
    return fsq_dequantize(indices, levels, dtype=dtype, impl=impl).flatten(-2)


def fsq_dequantize_residual(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> Tensor:
    """indices (..., quantizers) -> codes (..., d): the inverse of `fsq_quantize_residual`, to the bit.

    The first columns alone give the coarser code. All else as `fsq_dequantize`.
    """
    levels = check_levels(levels)
    if indices.dim() == 0:
        raise ValueError("indices: expected shape (..., quantizers), got ()")
    stages = indices.shape[-1]
    _check_stages(levels, stages, "indices.shape[-1]")
    chosen = _check_indices(indices, dtype, impl)
    flat = indices.squeeze(-1) if stages == 1 else indices
    return torch.ops.scamo_kernels.fsq_dequantize(flat, levels, dtype, chosen, stages)


def _run(z: Tensor, levels: list[int], impl: str, bound: str, stages: int = 1) -> tuple[Tensor, Tensor]:
    if is_direct(impl, z):
        return call(quantize, _setup, _autograd, z, levels, impl, bound, stages)
    return torch.ops.scamo_kernels.fsq_quantize(z, levels, impl, bound, stages)


def check_bound(bound: str) -> None:
    """ValueError for a bound that does not exist."""
    if bound not in FSQ_BOUNDS:
        raise ValueError(f"bound = {bound!r}: expected one of {', '.join(map(repr, FSQ_BOUNDS))}")


def check_latents(z: Tensor, width: int, meaning: str, levels: list[int], bound: str, impl: str) -> str:
    """Check z (..., width) and bound; returns the implementation to run."""
    if z.dtype not in _CODE_TYPES:
        raise TypeError(f"z: expected a floating-point tensor, got {z.dtype}")
    if z.dim() == 0 or z.shape[-1] != width:
        raise ValueError(f"z: expected shape (..., {meaning}) for levels {levels}, got {tuple(z.shape)}")
    check_bound(bound)
    chosen = resolve(impl, z)
    if chosen == "triton" and z.dtype == torch.float64:
        raise TypeError('z: impl = "triton" does not take float64; use impl="torch"')
    return chosen


def _check_indices(indices: Tensor, dtype: torch.dtype, impl: str) -> str:
    if indices.dtype not in _INDEX_TYPES:
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
    if dtype not in _CODE_TYPES:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    chosen = resolve(impl, indices)
    if dtype == torch.float64:
        if impl == "triton":
            raise TypeError('dtype: impl = "triton" does not give float64; use impl="torch"')
        return "torch"
    return chosen


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected an integer from 1 on")


def _check_stages(levels: list[int], quantizers: int, name: str = "quantizers") -> None:
    _check_count(name, quantizers)
    if quantizers > 1 and min(levels) == 2:
        raise ValueError(f"levels = {levels}: residual stages need 3 levels or more per channel")
    if (max(levels) - 1) ** (quantizers - 1) > 2**24:
        raise ValueError(f"{name} = {quantizers}: ({max(levels)} - 1)^{quantizers - 1} exceeds 2^24")


# Rows whose channels stand side by side in one: a CPU's loop over the few channels of one row is several
# times as slow.
_TILE = 64


class Constants(NamedTuple):
    """Of tanh(scale z + shift) half_l - offset, codes and index, for `tiled` rows: each (_TILE d,)."""

    half_l: Tensor
    offset: Tensor
    shift: Tensor
    width: Tensor  # L // 2
    slope: Tensor  # scale half_l / (L // 2)
    basis: Tensor  # int32
    units: Tensor  # (stages, _TILE d), (L - 1)^i of every stage, exact in float32


def constants(
    levels: list[int], bound: str, dtype: torch.dtype, device: torch.device, stages: int = 1
) -> Constants:
    return _constants(tuple(levels), bound, dtype, device, stages)


@functools.lru_cache(maxsize=64)
def _constants(
    levels: tuple[int, ...], bound: str, dtype: torch.dtype, device: torch.device, stages: int
) -> Constants:
    def row(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat(_TILE).to(device, dtype)

    half_l, offset, shift = zip(*(fsq_constants(level, bound) for level in levels), strict=True)
    slope = [fsq_scale(bound) * half / (level // 2) for half, level in zip(half_l, levels, strict=True)]
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    return Constants(
        row(half_l),
        row(offset),
        row(shift),
        row([level // 2 for level in levels]),
        row(slope),
        torch.tensor(basis, dtype=torch.int32).repeat(_TILE).to(device),
        torch.stack([row([(level - 1) ** i for level in levels]) for i in range(stages)]),
    )


def tiled(x: Tensor, channels: int) -> Tensor:
    """A copy of x (..., d) in the dtype to compute in, _TILE rows to one, with rows of zeros at its end."""
    rows = -(-x.numel() // (_TILE * channels))
    out = torch.empty((rows, _TILE * channels), dtype=compute_dtype(x.dtype), device=x.device)
    flat = out.view(-1)
    flat[: x.numel()].view(x.shape).copy_(x)
    if out.numel() > x.numel():
        flat[x.numel() :].zero_()
    return out


def untiled(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The first of the rows as (..., d)."""
    return x.view(-1)[: math.prod(shape)].view(shape)


def tanh_(x: Tensor, c: Constants, bound: str) -> Tensor:
    """tanh(scale x + shift) of tiled rows, in place."""
    return torch.add(c.shift, x, alpha=fsq_scale(bound), out=x).tanh_()


def digits_(x: Tensor, c: Constants) -> Tensor:
    """The codes times L // 2, from what `tanh_` gives, in place."""
    return x.mul_(c.half_l).sub_(c.offset).round_()


def _index(digits: Tensor, levels: list[int], c: Constants) -> Tensor:
    """int32 (rows,), exact: float32 would not be from 2^24 on."""
    middle = sum(level // 2 * math.prod(levels[:i]) for i, level in enumerate(levels))
    weighted = digits.to(torch.int32).mul_(c.basis).view(-1, len(levels))
    return weighted.sum(1, dtype=torch.int32).add_(middle)


def quantize(
    z: Tensor, levels: list[int], impl: str, bound: str = "tanh", stages: int = 1
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.quantize(z, levels, bound, stages)
    rest = tiled(z, len(levels))
    c = constants(levels, bound, rest.dtype, rest.device, stages)
    if stages == 1:
        codes = digits_(tanh_(rest, c, bound), c)
        indices = _index(codes, levels, c)
        return untiled(codes.div_(c.width), z.shape).to(z.dtype), untiled(indices, z.shape[:-1])
    codes, found = torch.zeros_like(rest), []
    for unit in c.units:
        code = digits_(tanh_(rest * unit, c, bound), c)
        found.append(_index(code, levels, c))
        codes += code.div_(c.width).div_(unit)
        rest -= code
    indices = untiled(torch.stack(found, 1), (*z.shape[:-1], stages))
    return untiled(codes, z.shape).to(z.dtype), indices


def _quantize_backward(
    grad: Tensor, z: Tensor, levels: list[int], impl: str, bound: str = "tanh", stages: int = 1
) -> Tensor:
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.quantize_backward(grad, z, levels, bound, stages)
    rest = tiled(z, len(levels))
    c = constants(levels, bound, rest.dtype, rest.device, stages)
    grad = tiled(grad, len(levels)).mul_(c.slope)
    if stages == 1:
        return untiled(tanh_backward(grad, tanh_(rest, c, bound)), z.shape).to(z.dtype)
    total = torch.zeros_like(rest)
    for unit in c.units:
        t = tanh_(rest * unit, c, bound)
        total += tanh_backward(grad, t)
        rest -= digits_(t, c).div_(c.width).div_(unit)
    return untiled(total, z.shape).to(z.dtype)


def _dequantize(indices: Tensor, levels: list[int], dtype: torch.dtype, impl: str, stages: int = 1) -> Tensor:
    codes, channels = math.prod(levels), len(levels)
    if indices.numel() and sees_values(indices):
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= codes:
            raise ValueError(f"indices: expected 0 to {codes - 1} for levels {levels}, found {low} to {high}")
    if impl == "triton":
        from scamo_kernels import _fsq_triton

        return _fsq_triton.dequantize(indices, levels, dtype, stages)
    work = compute_dtype(dtype)
    c = constants(levels, "tanh", work, indices.device, stages)
    basis, width, size = c.basis[:channels], c.width[:channels], indices.new_tensor(levels)
    digits = torch.div(indices.contiguous().unsqueeze(-1), basis, rounding_mode="floor").remainder_(size)
    found = digits.to(work).sub_(width).div_(width)
    if stages == 1:
        return found.to(dtype)
    total = found.select(-2, 0).clone()
    for i, unit in enumerate(c.units[1:, :channels], 1):
        total += found.select(-2, i).div_(unit)
    return total.to(dtype)


def _fake_quantize(
    z: Tensor, levels: list[int], impl: str, bound: str = "tanh", stages: int = 1
) -> tuple[Tensor, Tensor]:
    shape = z.shape[:-1] if stages == 1 else (*z.shape[:-1], stages)
    return z.new_empty(z.shape), z.new_empty(shape, dtype=torch.int32)


def _fake_backward(
    grad: Tensor, z: Tensor, levels: list[int], impl: str, bound: str = "tanh", stages: int = 1
) -> Tensor:
    return z.new_empty(z.shape)


def _fake_dequantize(
    indices: Tensor, levels: list[int], dtype: torch.dtype, impl: str, stages: int = 1
) -> Tensor:
    shape = indices.shape if stages == 1 else indices.shape[:-1]
    return indices.new_empty((*shape, len(levels)), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    z, *ctx.rest = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_codes: Tensor | None, _grad_indices: None):
    nothing = (None,) * len(ctx.rest)
    if grad_codes is None:
        return None, *nothing
    (z,) = ctx.saved_tensors
    return torch.ops.scamo_kernels.fsq_quantize_backward(grad_codes, z, *ctx.rest), *nothing


# Stages > 1: residual quantisation; indices then have a last dimension of stages.
_REST = 'int[] levels, str impl, str bound="tanh", int stages=1'
define(f"fsq_quantize(Tensor z, {_REST}) -> (Tensor, Tensor)")
define(f"fsq_quantize_backward(Tensor grad, Tensor z, {_REST}) -> Tensor")
define("fsq_dequantize(Tensor indices, int[] levels, ScalarType dtype, str impl, int stages=1) -> Tensor")
LIBRARY.impl("fsq_quantize", quantize, "CompositeExplicitAutograd")
LIBRARY.impl("fsq_quantize_backward", _quantize_backward, "CompositeExplicitAutograd")
LIBRARY.impl("fsq_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "fsq_quantize", _fake_quantize, lib=LIBRARY)
torch.library.register_fake(NAME + "fsq_quantize_backward", _fake_backward, lib=LIBRARY)
torch.library.register_fake(NAME + "fsq_dequantize", _fake_dequantize, lib=LIBRARY)
torch.library.register_autograd(NAME + "fsq_quantize", _autograd, setup_context=_setup, lib=LIBRARY)
