"""Layers shared by the transformers: RMSNorm, rotary positions, SwiGLU, the block and the scoring head.

Shape letters: N packed positions, C width, H heads, D head dim, S scored rows, V classes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scamo_kernels import prefix_causal_attention
from torch import Tensor, nn

from scamo.errors import ScaMoError

# Elements of the float32 logits of one chunk of the head: 1 GiB on a GPU, 64 MiB on a CPU.
LOGIT_BUDGET = {"cuda": 2**28, "cpu": 2**24}


@functools.lru_cache(maxsize=16)
def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """exp(i position base^(-2j / head_dim)) of all positions and pairs: complex64 (length, head_dim / 2).

    A function and not a buffer on purpose: nothing that casts a module (`.to(bfloat16)`, DeepSpeed,
    zero.Init) can reach it. A bfloat16 table is wrong by up to half a radian at 201 positions.
    """
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    table = np.exp(1j * np.outer(np.arange(length), frequency)).astype(np.complex64)
    with torch.inference_mode(False):  # the cached table also serves training
        return torch.from_numpy(table).to(device)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the adjacent pairs (x[2j], x[2j+1]) of x (N, ..., D) by `turn` complex64 (N, D / 2), in float32.

    Returns a new tensor of x's dtype. The released checkpoints pair neighbours, not halves.
    """
    pairs = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2)))
    turn = turn.view(turn.shape[0], *[1] * (x.ndim - 2), turn.shape[1])
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class _RotateQueriesKeys(torch.autograd.Function):
    """(N, 3, H, D) -> rotated q, rotated k, v; the backward fills one gradient, not three padded ones."""

    @staticmethod
    def forward(ctx, qkv: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turn)
        q, k = rotate(qkv[:, :2], turn).unbind(1)
        return q, k, qkv[:, 2]

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        back = turn.conj()
        grad = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
        grad[:, 0] = rotate(dq, back)
        grad[:, 1] = rotate(dk, back)
        grad[:, 2] = dv
        return grad, None


class _RMSNormCPU(torch.autograd.Function):
    """float32 inside, in blocks of rows whose float32 copies stay in the cache.

    Forward and backward take 0.45 of the time of autograd through F.rms_norm (one core, bf16, 4096 x 256).
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, out = torch.empty_like(x), torch.empty_like(x)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        for start in range(0, x.shape[0], _RMSNormCPU.ROWS):
            part = slice(start, start + _RMSNormCPU.ROWS)
            rows = _wide(x[part])
            norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            scale[part] = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            unit[part] = rows * scale[part]
            torch.mul(unit[part], weight, out=out[part])
        ctx.save_for_backward(unit, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, weight, scale = ctx.saved_tensors
        wide_weight = _wide(weight)
        grad_weight = torch.zeros_like(wide_weight)
        dx = torch.empty_like(unit)
        for start in range(0, unit.shape[0], _RMSNormCPU.ROWS):
            part = slice(start, start + _RMSNormCPU.ROWS)
            rows = _wide(unit[part])
            grad_weight += (grad[part] * rows).sum(0)
            slope = grad[part] * wide_weight
            along = (slope * rows).sum(-1, keepdim=True).div_(rows.shape[-1])
            dx[part] = slope.addcmul_(rows, along, value=-1).mul_(scale[part])
        return dx, grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of x (N, C); statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one fused kernel there
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNormCPU.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its input: silu is cheaper to repeat than to store."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, 2 hidden), gate | up -> (N, hidden): silu(gate) * up."""
    return _SwiGLU.apply(gate_up)


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


class Block(nn.Module):
    """Pre-norm attention and SwiGLU without biases, on packed positions.

    `project` and `finish` are the parts before and after the attention, so that generation can put its own
    (cached) attention between them.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = RMSNorm(width, eps)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.norm_2 = RMSNorm(width, eps)
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C), turn complex64 (N, D / 2) -> q, k (rotated) and v, each (N, H, D)."""
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        return _RotateQueriesKeys.apply(qkv, turn)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x (N, C) and attention output (N, H, D) -> (N, C)."""
        x = x + self.out(attended.flatten(-2))
        return x + self.down(swiglu(self.gate_up(self.norm_2(x))))

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        cu_seqlens: Tensor,
        prefix_lengths: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x (N, C) -> (N, C), or only its `rows` int64 (S,) -> (S, C).

        The last block needs no more than the scored rows: keys and values come from all, the rest does not.
        """
        q, k, v = self.project(x, turn)
        attended = prefix_causal_attention(q, k, v, cu_seqlens, prefix_lengths, max_seqlen=max_seqlen)
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        return self.finish(x, attended)


class _HeadLoss(torch.autograd.Function):
    """Linear + cross-entropy in chunks of rows; the gradients are made beside the loss, so logits never stay.

    Only the sum carries a gradient; the losses of the rows are for looking at. The rows from `count` on are
    padding: they have no loss and no gradient.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, count: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        scored, several = hidden.shape[0], hidden.shape[0] > chunk
        losses = torch.empty(scored, dtype=torch.float32, device=hidden.device)
        train = any(ctx.needs_input_grad[:2])
        # Several chunks are added up in float32: a bfloat16 sum would lose the later ones.
        sum_dtype = torch.promote_types(weight.dtype, torch.float32) if several else weight.dtype
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if train and (several or not scored) else None
        grad_hidden = torch.empty_like(hidden) if train else None
        for start in range(0, scored, chunk):
            part = slice(start, start + chunk)
            rows, target = hidden[part], targets[part, None]
            log_p = torch.log_softmax(_wide(F.linear(rows, weight)), -1)
            losses[part] = -log_p.gather(1, target).squeeze(1)
            padded = slice(max(0, count - start), None)
            losses[part][padded] = 0
            if grad_hidden is None:
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1).expand_as(target))
            grad[padded] = 0
            grad = grad.to(rows.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is None:
                grad_weight = grad.t() @ rows
            else:
                grad_weight += grad.t() @ rows
        ctx.mark_non_differentiable(losses)
        if train:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad: Tensor, _losses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            (grad_weight * grad).to(grad_hidden.dtype),
            None,
            None,
            None,
        )


class Head(nn.Module):
    """The untied output layer, (V, C) without bias: codes 0..K-1 and EOS, no PAD.

    The loss is computed here, in the module's own forward: ZeRO-3 gathers the weight for exactly that long.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """hidden (S, C) -> float32 logits (S, V); with targets int64 (S,) -> cross-entropy in nats.

        The cross-entropy is (sum float32 (), per row float32 (S,)); only the sum is differentiable. Memory is
        bounded by LOGIT_BUDGET, whatever S is.
        """
        if targets is None:
            return _wide(F.linear(hidden, self.weight))
        budget = LOGIT_BUDGET.get(hidden.device.type, LOGIT_BUDGET["cpu"])
        count = hidden.shape[0]
        if padding := row_padding(hidden):
            hidden, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
        chunk = max(1, budget // self.weight.shape[0])
        loss_sum, losses = _HeadLoss.apply(hidden, self.weight, targets, count, chunk)
        return loss_sum, losses[:count]


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
