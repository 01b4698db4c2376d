"""Layers shared by the transformers: RMSNorm, rotary positions, SwiGLU, the block and the scoring head.

Shape letters: N packed positions, C width, H heads, D head dim, S scored rows, V classes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scamo_kernels import add_rms_norm, linear_cross_entropy, rms_norm, rotary_prefix_attention, swiglu
from torch import Tensor, nn

from scamo.errors import ScaMoError


def storage_dim(head_dim: int, device: torch.device) -> int:
    """Columns in which a head is stored: 16-byte loads of bfloat16 need a multiple of 8 (100 -> 104)."""
    return -(-head_dim // 8) * 8 if device.type == "cuda" else head_dim


@functools.lru_cache(maxsize=16)
def rotary_table(length: int, head_dim: int, storage: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of position * base^(-2j / head_dim): float32 (length, storage / 2, 2).

    Pairs beyond the head dim, of columns that are only stored, are not turned. A function and not a buffer on
    purpose: nothing that casts a module (`.to(bfloat16)`, DeepSpeed, zero.Init) can reach it. A bfloat16
    table is wrong by up to half a radian at 201 positions.
    """
    frequency = np.zeros(storage // 2)
    frequency[: head_dim // 2] = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.outer(np.arange(length), frequency)
    table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    with torch.inference_mode(False):  # the cached table also serves training
        return torch.from_numpy(table).to(device)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the adjacent pairs (x[2j], x[2j+1]) of x (N, ..., D) by rows of the table, (N, D / 2, 2).

    In float32; returns a new tensor of x's dtype. The released checkpoints pair neighbours, not halves.
    """
    pairs = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2)))
    turn = torch.view_as_complex(rope).view(x.shape[0], *[1] * (x.ndim - 2), -1)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of x (N, C); statistics in float32."""

    def __init__(self, width: int, eps: float, impl: str = "auto") -> None:
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual stream x (N, C), and a branch to be added to it first -> (normalised, the stream)."""
        if branch is None:
            return rms_norm(x, self.weight, eps=self.eps, impl=self.impl), x
        return add_rms_norm(branch, x, self.weight, eps=self.eps, impl=self.impl)


def row_padding(x: Tensor) -> int:
    """Rows of zeros that make x (N, C) quick to multiply: up to a multiple of 64 on a CPU in bfloat16.

    oneDNN builds a new kernel for every number of rows it meets, and every packed batch has its own: a third
    of the CPU time of a step of 2048 positions (4 layers of width 256, one core: 0.48 s, with padding 0.32).
    """
    return 0 if x.is_cuda or x.dtype != torch.bfloat16 else -x.shape[0] % 64


class Linear(nn.Linear):
    """nn.Linear on (N, C), with `row_padding`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        if padding := row_padding(x):
            return super().forward(F.pad(x, (0, 0, 0, padding)))[: x.shape[0]]
        return super().forward(x)


class _StoredLinear(torch.autograd.Function):
    """x @ weight^T with every head's part of one axis of the weight lengthened by zeros.

    The lengthened weight is made again in the backward: kept, it would be a second copy of it that ZeRO-3
    cannot partition.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, axis: int, head_dim: int, storage: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = axis, head_dim, storage
        return F.linear(x, _lengthen(weight, *ctx.shape))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        axis, head_dim, storage = ctx.shape
        grad_weight = (grad.t() @ x).unflatten(axis, (-1, storage)).narrow(axis + 1, 0, head_dim)
        return grad @ _lengthen(weight, *ctx.shape), grad_weight.flatten(axis, axis + 1), None, None, None


def _lengthen(weight: Tensor, axis: int, head_dim: int, storage: int) -> Tensor:
    heads = weight.unflatten(axis, (-1, head_dim))
    after = (0, 0) * (1 - axis)
    return F.pad(heads, (*after, 0, storage - head_dim)).flatten(axis, axis + 1)


class ToHeads(Linear):
    """The packed projection; where heads are stored wider than they are, the columns between them are 0.

    The weight keeps its published shape, (parts * width, width).
    """

    def __init__(self, width: int, parts: int, heads: int) -> None:
        super().__init__(width, parts * width, bias=False)
        self.parts, self.heads = parts, heads

    def forward(self, x: Tensor, storage: int) -> Tensor:  # type: ignore[override]
        """(N, C) -> (N, parts, heads, storage)."""
        head_dim = self.in_features // self.heads
        if storage == head_dim:
            out = super().forward(x)
        else:
            out = _StoredLinear.apply(x, self.weight, 0, head_dim, storage)
        return out.unflatten(-1, (self.parts, self.heads, storage))


class FromHeads(Linear):
    """The projection of all heads' outputs; passes over the columns that `ToHeads` added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, bias=False)
        self.heads = heads

    def forward(self, attended: Tensor) -> Tensor:
        """(N, heads, storage) -> (N, C)."""
        storage, head_dim = attended.shape[2], self.in_features // self.heads
        if storage == head_dim:
            return super().forward(attended.flatten(1))
        return _StoredLinear.apply(attended.flatten(1), self.weight, 1, head_dim, storage)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU without biases, on packed positions.

    A block takes and leaves the residual stream x and the last branch apart, so that their sum and its
    normalisation are one pass. `project` and `finish` are the parts before and after the attention, so that
    generation can put its own (cached) attention between them.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.scale = (width // heads) ** -0.5
        self.norm_1 = RMSNorm(width, eps, impl)
        self.qkv = ToHeads(width, 3, heads)
        self.out = FromHeads(width, heads)
        self.norm_2 = RMSNorm(width, eps, impl)
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def project(self, x: Tensor, branch: Tensor | None, storage: int) -> tuple[Tensor, Tensor]:
        """x and branch (N, C) -> q | k | v (N, 3, H, storage), not rotated, and x + branch."""
        normed, x = self.norm_1(x, branch)
        return self.qkv(normed, storage), x

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream x (N, C) and attention output (N, H, storage) -> stream and branch, each (N, C)."""
        normed, x = self.norm_2(x, self.out(attended))
        return x, self.down(swiglu(self.gate_up(normed), impl=self.impl))

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        rope: Tensor,
        cu_seqlens: Tensor,
        prefix_lengths: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Stream and branch (N, C) -> stream and branch (N, C), or only their `rows` int64 (S,) -> (S, C).

        rope: float32 (max_seqlen or more, storage / 2, 2), see `rotary_table`. The last block needs no more
        than the scored rows: keys and values come from all, the rest does not.
        """
        qkv, x = self.project(x, branch, 2 * rope.shape[1])
        attended = rotary_prefix_attention(
            qkv,
            rope,
            cu_seqlens,
            prefix_lengths,
            max_seqlen=max_seqlen,
            scale=self.scale,
            impl=self.impl,
        )
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        return self.finish(x, attended)


class Head(nn.Module):
    """The untied output layer, (V, C) without bias: codes 0..K-1 and EOS, no PAD.

    The loss is computed here, in the module's own forward: ZeRO-3 gathers the weight for exactly that long.
    """

    def __init__(self, width: int, classes: int, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(classes, width))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """hidden (S, C) -> float32 logits (S, V); with targets int64 (S,) -> cross-entropy in nats.

        The cross-entropy is (sum float32 (), per row float32 (S,)); only the sum is differentiable. The
        logits of all rows are never in memory at once.
        """
        if targets is None:
            return _wide(F.linear(hidden, self.weight))
        return linear_cross_entropy(hidden, self.weight, targets, impl=self.impl)


def small_init(width: int) -> float:
    """Standard deviation of a linear layer's weights: sqrt(2 / (5 width)) (Nguyen & Salazar 2019)."""
    return math.sqrt(2 / (5 * width))


def check_bf16(device: torch.device) -> None:
    """Raises ScaMoError, naming the GPU, when `device` has no bfloat16. CPUs always have it (some slowly)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            name = torch.cuda.get_device_name(device)
            raise ScaMoError(f"{device} ({name}) has no bfloat16: use float32")
