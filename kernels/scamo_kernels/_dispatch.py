"""What the fronts share: the library that the ops are registered in, and the choice of an implementation."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

# Library.define/impl costs half of custom_op per call, and unlike triton_op it traces without a driver.
LIBRARY = torch.library.Library("scamo_kernels", "FRAGMENT")
NAME = "scamo_kernels::"

HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def define(schema: str) -> None:
    """Define an op; its kernel accepts tensors of any device (the Triton interpreter runs on CPU tensors)."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def resolve(impl: str, tensor: Tensor, choices: tuple[str, ...] = ("auto", "triton", "torch")) -> str:
    """The implementation to run: "auto" is Triton on CUDA where it is installed, else torch.

    Raises ValueError for an unknown name, and for "triton" without Triton or on a CPU without its
    interpreter.
    """
    if impl not in choices:
        raise ValueError(f"impl = {impl!r}: expected one of {', '.join(map(repr, choices))}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON and tensor.dtype != torch.float64 else "torch"
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError('impl = "triton": the triton package is not installed; use impl="torch"')
        if not tensor.is_cuda and not interpreted():
            raise ValueError(
                f'impl = "triton": needs a CUDA tensor, not one on {tensor.device} '
                '(TRITON_INTERPRET=1 runs it on the CPU, slowly); use impl="torch"'
            )
    return impl


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter: Triton reads the variable when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def sees_values(tensor: Tensor) -> bool:
    """Whether an op may look at the tensor's values: on the host always, on a device in debug mode only.

    SCAMO_KERNELS_DEBUG=1 is the debug mode: every call then waits for the device.
    """
    return not tensor.is_cuda or os.environ.get("SCAMO_KERNELS_DEBUG", "0") == "1"


def check_levels(levels: object) -> list[int]:
    """FSQ levels as a list of ints; ValueError or TypeError when they cannot be."""
    if not isinstance(levels, (list, tuple)) or not levels:
        raise TypeError(f"levels = {levels!r}: expected a non-empty list or tuple of integers")
    product = 1
    for level in levels:
        # From 1001 on, rounding the widened range (1 + 1e-3) reaches an integer outside the L codes.
        if not isinstance(level, int) or not 2 <= level <= 1000:
            raise ValueError(f"levels = {list(levels)}: expected integers from 2 to 1000, got {level!r}")
        product *= level
    if product >= 2**31:
        raise ValueError(f"levels = {list(levels)}: {product} codes do not fit an int32 index")
    return list(levels)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current, as a Triton launch needs; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
