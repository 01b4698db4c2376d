"""PyTorch's own implementations without the dispatcher, which costs as much as a small op on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_direct(impl: str, *tensors: Tensor) -> bool:
    """Whether a front may call its functions itself: impl "torch", plain tensors, and nothing that traces."""
    if impl != "torch" or torch.compiler.is_compiling():
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def call(forward: Callable, setup: Callable, backward: Callable, *inputs: Any) -> Any:
    """forward(*inputs), differentiable by what `register_autograd` is given: setup and backward."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Call.apply(forward, setup, backward, *inputs)
    return forward(*inputs)


def row_blocks(elements: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (N, ...) in blocks of rows, `elements` of the first one each; on a GPU all at once.

    What one step writes is then still in a CPU's cache when the next reads it.
    """
    rows, width = tensors[0].shape
    step = max(1, elements // width)
    if tensors[0].is_cuda or rows <= step:
        return iter([tensors])
    return zip(*(x.split(step) for x in tensors), strict=True)


class _Call(torch.autograd.Function):
    # A setup_context of its own would cost 100 us: apply() then looks at forward's signature every time.
    @staticmethod
    def forward(ctx, forward, setup, backward, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        ctx.differentiate = backward
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.differentiate(ctx, *grads)
