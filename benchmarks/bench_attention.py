"""Prefix-causal attention on packed samples against what else one would call: forward, and forward +
backward.

The peers get what suits them: padded SDPA gets tensors padded in advance, SDPA per sample and FlexAttention
get their masks built in advance. "stored-at-104" is ours on heads of 100 with four zero columns more.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.name}-B{len(self.lengths)}-T{max(self.lengths)}-H{self.heads}-D{self.head_dim}"


def _small(heads: int, head_dim: int) -> Case:
    """A micro-batch of the quickstart: about 4096 rows in samples of 20 to 80."""
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < 4096:
        lengths.append(draw.randint(20, 80))
    prefixes = tuple(draw.randint(5, min(30, length)) for length in lengths)
    return Case("quickstart", tuple(lengths), prefixes, heads, head_dim)


def _even(length: int, prefix: int, heads: int, head_dim: int) -> Case:
    return Case("even", (length,) * 128, (prefix,) * 128, heads, head_dim)


def _ragged(heads: int, head_dim: int) -> Case:
    """128 samples as HumanML3D has them: 10-60 word pieces, 10-51 motion tokens."""
    draw = random.Random(1)
    prefixes = tuple(draw.randint(10, 60) for _ in range(128))
    return Case("ragged", tuple(p + draw.randint(10, 51) for p in prefixes), prefixes, heads, head_dim)


CPU_CASES = [_small(4, 32), _small(8, 64)]
GPU_CASES = [
    _even(126, 77, 16, 64),
    _even(178, 128, 16, 64),
    _even(328, 128, 16, 64),
    _even(178, 128, 32, 100),
    _ragged(16, 64),
    _ragged(32, 100),
]


STORED = "stored-at-104"


def _unchanged(x: Tensor) -> Tensor:
    return x


def _stored(x: Tensor) -> Tensor:
    return F.pad(x.detach(), (0, 4))


def _with_stored(impls: list[str], cases: list[Case]) -> list[tuple[str, Case]]:
    """Every implementation of every case; heads of 100 also as they are better stored."""
    pairs = list(itertools.product(impls, cases))
    return pairs + [(STORED, case) for case in cases if case.head_dim == 100]


class Problem:
    """The tensors of a case, and every implementation of it: name -> forward() -> packed output."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = sum(case.lengths)
        shape = (4, tokens, case.heads, case.head_dim)
        data = torch.randn(shape, generator=generator).to(device, dtype)
        self.inputs = [x.clone().requires_grad_() for x in data[:3]]
        self.cotangent = data[3].clone()
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32).to(device)
        self.prefixes = torch.tensor(case.prefixes, dtype=torch.int32, device=device)
        self.lengths, self.longest, self.device = case.lengths, max(case.lengths), device
        self.scale = case.head_dim**-0.5

    def ours(self, impl: str) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            q, k, v = self.inputs
            return scamo_kernels.prefix_causal_attention(
                q, k, v, self.cu_seqlens, self.prefixes, max_seqlen=self.longest, impl=impl
            )

        return forward

    def stored(self) -> tuple[Callable[[], Tensor], list[Tensor], Tensor, Callable[[Tensor], Tensor]]:
        """Ours on wider heads: forward, its inputs, its cotangent, and the way back."""
        q, k, v = inputs = [_stored(x).requires_grad_() for x in self.inputs]
        rest = self.cu_seqlens, self.prefixes

        def forward() -> Tensor:
            return scamo_kernels.prefix_causal_attention(
                q, k, v, *rest, max_seqlen=self.longest, scale=self.scale
            )

        return forward, inputs, _stored(self.cotangent), lambda x: x[..., :100]

    def _mask(self, length: int, prefix: int) -> Tensor:
        row = torch.arange(length, device=self.device)
        return row < torch.where(row < prefix, prefix, row + 1)[:, None]

    def per_sample(self) -> Callable[[], Tensor]:
        masks = [self._mask(n, p) for n, p in zip(self.lengths, self.prefixes.tolist(), strict=True)]

        def forward() -> Tensor:
            split = (x.split(self.lengths) for x in self.inputs)
            outputs = []
            for q, k, v, mask in zip(*split, masks, strict=True):
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                outputs.append(out[0].transpose(0, 1))
            return torch.cat(outputs)

        return forward

    def _pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) -> (samples, longest, ...), zeros at the end."""
        return torch.nn.utils.rnn.pad_sequence(list(x.split(self.lengths)), batch_first=True)

    def _unpad(self, x: Tensor) -> Tensor:
        return torch.cat([rows[:n] for rows, n in zip(x, self.lengths, strict=True)])

    def padded(self) -> tuple[Callable[[], Tensor], list[Tensor], Tensor, Callable[[Tensor], Tensor]]:
        """SDPA on padded tensors: forward, its inputs, its cotangent, and the way back to packed rows."""
        q, k, v = inputs = [
            self._pad(x.detach()).transpose(1, 2).contiguous().requires_grad_() for x in self.inputs
        ]
        cotangent = self._pad(self.cotangent).transpose(1, 2).contiguous()
        # Padding rows attend to the prefix; their cotangent is zero.
        mask = torch.stack([self._mask(self.longest, p) for p in self.prefixes.tolist()])[:, None]
        key = torch.arange(self.longest, device=self.device)
        real = key < torch.tensor(self.lengths, device=self.device)[:, None]
        mask = mask & real[:, None, None, :]

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return forward, inputs, cotangent, lambda x: self._unpad(x.transpose(1, 2))

    def flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        tokens = self.inputs[0].shape[0]
        lengths = torch.tensor(self.lengths, device=self.device)
        start = self.cu_seqlens[:-1].repeat_interleave(lengths)
        end = start + reference.prefix_bounds(self.cu_seqlens, self.prefixes)

        def allowed(b, h, row, column):
            return (column >= start[row]) & (column < end[row])

        mask = create_block_mask(allowed, None, None, tokens, tokens, device=self.device)
        compiled = torch.compile(flex_attention, dynamic=False)

        def forward() -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in self.inputs)
            return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return forward


def _measure(measure, case: Case, dtype: torch.dtype, device: str, impl: str, backward: bool) -> None:
    problem = Problem(case, dtype, device)
    q, k, v = single = [x.detach().float().requires_grad_() for x in problem.inputs]
    out = reference.prefix_causal_attention(q, k, v, problem.cu_seqlens, problem.prefixes)
    expected = [out.detach()]
    if backward:
        expected += torch.autograd.grad(out, single, problem.cotangent.float())
    inputs, cotangent, to_rows = problem.inputs, problem.cotangent, _unchanged
    if impl == "sdpa-padded":
        forward, inputs, cotangent, to_rows = problem.padded()
    elif impl == STORED:
        forward, inputs, cotangent, to_rows = problem.stored()
    elif impl == "sdpa-per-sample":
        forward = problem.per_sample()
    elif impl == "flex":
        forward = problem.flex()
    else:
        forward = problem.ours(impl)

    def function() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [forward()]
        result = forward()
        return [result.detach(), *torch.autograd.grad(result, inputs, cotangent)]

    def unpack(results: Sequence[Tensor]) -> list[Tensor]:
        return [to_rows(x) for x in results]

    moved = problem.cotangent.numel() * dtype.itemsize * (4 if not backward else 4 + 8)
    way = "forward+backward" if backward else "forward"
    measure(f"{case} {str(dtype)[6:]} {way}", impl, function, expected, dtype, moved, unpack=unpack)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "sdpa-per-sample", "sdpa-padded"])
def test_attention_on_the_cpu(measure, impl, case, dtype, backward):
    _measure(measure, case, dtype, "cpu", impl, backward)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("impl", "case"),
    _with_stored(["triton", "torch", "flash", "sdpa-per-sample", "sdpa-padded", "flex"], GPU_CASES),
    ids=str,
)
def test_attention_on_a_gpu(measure, impl, case, backward):
    _measure(measure, case, torch.bfloat16, "cuda", impl, backward)


class RotaryProblem:
    """A packed projection and a rotary table: name -> forward() -> packed output."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        packed = Problem(case, dtype, device)
        self.rest = packed.cu_seqlens, packed.prefixes
        self.longest, self.cotangent = packed.longest, packed.cotangent
        self.qkv = torch.stack([x.detach() for x in packed.inputs], 1).requires_grad_()
        frequency = 1e4 ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
        angle = torch.arange(self.longest)[:, None] * frequency
        self.rope = torch.stack((angle.cos(), angle.sin()), -1).to(device)
        position = torch.cat([torch.arange(n) for n in case.lengths]).to(device)
        self.turn = torch.view_as_complex(self.rope)[position, None, None]
        self.scale = packed.scale

    def fused(self) -> Tensor:
        return scamo_kernels.rotary_prefix_attention(self.qkv, self.rope, *self.rest, max_seqlen=self.longest)

    def stored(self) -> tuple[Callable[[], Tensor], list[Tensor], Tensor, Callable[[Tensor], Tensor]]:
        """`fused` on wider heads: forward, its inputs, its cotangent, and the way back."""
        qkv = _stored(self.qkv).requires_grad_()
        one = torch.tensor([1.0, 0.0], device=qkv.device)
        rope = torch.cat((self.rope, one.expand(self.longest, 2, 2)), 1)

        def forward() -> Tensor:
            return scamo_kernels.rotary_prefix_attention(
                qkv, rope, *self.rest, max_seqlen=self.longest, scale=self.scale
            )

        return forward, [qkv], _stored(self.cotangent), lambda x: x[..., :100]

    def apart(self) -> Tensor:
        """Complex products in float32, then the attention; the angles of all rows are made in advance."""
        pairs = torch.view_as_complex(self.qkv[:, :2].float().unflatten(-1, (-1, 2)))
        q, k = torch.view_as_real(pairs * self.turn).flatten(-2).to(self.qkv.dtype).unbind(1)
        return scamo_kernels.prefix_causal_attention(
            q, k, self.qkv[:, 2], *self.rest, max_seqlen=self.longest
        )


def _measure_rotary(measure, case: Case, dtype: torch.dtype, device: str, way: str, backward: bool) -> None:
    problem = RotaryProblem(case, dtype, device)
    single = problem.qkv.detach().float().requires_grad_()
    out = reference.rotary_prefix_attention(single, problem.rope, *problem.rest)
    expected = [out.detach()]
    if backward:
        expected += torch.autograd.grad(out, single, problem.cotangent.float())
    forward = problem.fused if way == "fused" else problem.apart
    inputs, cotangent, to_rows = [problem.qkv], problem.cotangent, _unchanged
    if way == STORED:
        forward, inputs, cotangent, to_rows = problem.stored()

    def function() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [forward()]
        result = forward()
        return [result.detach(), *torch.autograd.grad(result, inputs, cotangent)]

    def unpack(results: Sequence[Tensor]) -> list[Tensor]:
        return [to_rows(x) for x in results]

    moved = problem.cotangent.numel() * dtype.itemsize * (4 if not backward else 4 + 8)
    phase = "forward+backward" if backward else "forward"
    measure(f"rotary {case} {str(dtype)[6:]} {phase}", way, function, expected, dtype, moved, unpack=unpack)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
@pytest.mark.parametrize("way", ["fused", "apart"])
def test_rotary_attention_on_the_cpu(measure, way, case, dtype, backward):
    _measure_rotary(measure, case, dtype, "cpu", way, backward)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("way", "case"), _with_stored(["fused", "apart"], GPU_CASES), ids=str)
def test_rotary_attention_on_a_gpu(measure, way, case, backward):
    _measure_rotary(measure, case, torch.bfloat16, "cuda", way, backward)
