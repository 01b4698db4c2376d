"""Decode attention, one new token per row, against what generation would call otherwise.

The peers rotate q and k, write k and v into the cache by index and call SDPA with a mask over the longest
row; the mask, the rows' indices and their turns are made in advance, since a model makes them once for all
its layers. `compiled` is torch.compile of that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import floors
import pytest
import scamo_kernels.decode
import torch
import torch.nn.functional as F
from scamo_kernels import reference
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """lengths: positions held before the step; the capacity is the longest plus one."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.name}-B{len(self.lengths)}-T{max(self.lengths) + 1}-H{self.heads}-D{self.head_dim}"


def _generation(rows: int, heads: int, head_dim: int, motion: int = 40) -> Case:
    """Texts of 6 to 60 word pieces, each `motion` tokens later."""
    draw = random.Random(0)
    return Case("generation", tuple(draw.randint(6, 60) + motion for _ in range(rows)), heads, head_dim)


CPU_CASES = [
    _generation(1, 4, 64),
    _generation(16, 4, 64),
    _generation(64, 4, 64),
    _generation(16, 16, 64),
    _generation(8, 32, 100),
]
GPU_CASES = [
    *(Case("even", (177,) * rows, 16, 64) for rows in (1, 64, 256)),
    *(Case("even", (177,) * rows, 32, 100) for rows in (1, 64, 256)),
    _generation(128, 16, 64),
    _generation(128, 32, 100),
    Case("long", (4095,), 16, 64),
    Case("long", (4095,) * 16, 16, 64),
]


class Problem:
    """The tensors of a case; `ours` and `masked` are the ways to compute its step."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        rows, capacity = len(case.lengths), max(case.lengths) + 1
        generator = torch.Generator().manual_seed(0)
        width = case.heads * case.head_dim
        self.qkv = torch.randn(rows, 3 * width, generator=generator).to(device, dtype)
        shape = (2, rows, case.heads, capacity, case.head_dim)
        self.cache_k, self.cache_v = torch.randn(shape, generator=generator).to(device, dtype)
        self.lengths = torch.tensor(case.lengths, device=device)
        frequency = 1e4 ** (-torch.arange(0, case.head_dim, 2, dtype=torch.float64) / case.head_dim)
        angle = torch.outer(torch.arange(capacity, dtype=torch.float64), frequency)
        self.table = torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64)
        self.row = torch.arange(rows, device=device)
        self.shape = (rows, 3, case.heads, case.head_dim)

    def expected(self) -> list[Tensor]:
        """The output, the new keys and the new values, from float32 copies."""
        caches = [cache.float() for cache in (self.cache_k, self.cache_v)]
        if self.cache_k.dtype == torch.float32:
            caches = [cache.clone() for cache in caches]
        rope = torch.view_as_real(self.table)
        out = reference.decode_attention(self.qkv.float(), *caches, self.lengths, rope)
        return [out, *(cache[self.row, :, self.lengths] for cache in caches)]

    def with_new_entries(self, results: list[Tensor]) -> list[Tensor]:
        return [*results, *(cache[self.row, :, self.lengths] for cache in (self.cache_k, self.cache_v))]

    def ours(self, impl: str) -> Callable[[], list[Tensor]]:
        rope = torch.view_as_real(self.table)

        def function() -> list[Tensor]:
            return [
                scamo_kernels.decode.decode_attention(
                    self.qkv, self.cache_k, self.cache_v, self.lengths, rope, impl=impl
                )
            ]

        return function

    def reference(self) -> list[Tensor]:
        rope = torch.view_as_real(self.table)
        return [reference.decode_attention(self.qkv, self.cache_k, self.cache_v, self.lengths, rope)]

    def masked(self, compiled: bool) -> Callable[[], list[Tensor]]:
        place = self.lengths
        turn = torch.view_as_real(self.table[place])[:, None, None]
        seen = torch.arange(self.cache_k.shape[2], device=place.device) <= place[:, None]
        mask = seen[:, None, None]

        def step(qkv: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
            qkv = qkv.view(self.shape)
            a, b = qkv[:, :2].float().unflatten(3, (-1, 2)).unbind(-1)
            cos, sin = turn.unbind(-1)
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(3).to(qkv.dtype)
            cache_k[self.row, :, place] = turned[:, 1]
            cache_v[self.row, :, place] = qkv[:, 2]
            return F.scaled_dot_product_attention(turned[:, 0, :, None], cache_k, cache_v, attn_mask=mask)

        if compiled:
            step = torch.compile(step, dynamic=False)
        return lambda: [step(self.qkv, self.cache_k, self.cache_v)[:, :, 0]]


def _measure(measure, case: Case, dtype: torch.dtype, device: str, impl: str, card, **keywords) -> None:
    problem = Problem(case, dtype, device)
    if impl == "reference":
        function = problem.reference
    elif impl in ("masked-sdpa", "compiled"):
        function = problem.masked(impl == "compiled")
    else:
        function = problem.ours(impl)
    # Each cached position is read, each row's q, k, v comes in, and k, v and the output go out.
    entry = 2 * case.heads * case.head_dim * dtype.itemsize
    moved = entry * (sum(case.lengths) + 3 * len(case.lengths))
    if card is not None:
        lengths = [length + 1 for length in case.lengths]
        keywords["floor"] = floors.decode_attention(
            lengths, case.heads, case.head_dim, card, itemsize=dtype.itemsize
        )
    group = f"decode_attention-{case}-{str(dtype).removeprefix('torch.')}-{device}"
    name = f"{impl}, graph" if keywords.get("graph") else impl
    with torch.no_grad():
        expected = problem.expected()
        measure(group, name, function, expected, dtype, moved, unpack=problem.with_new_entries, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "masked-sdpa", "reference"])
def test_decode_attention_on_a_cpu(measure, impl, case, dtype):
    _measure(measure, case, dtype, "cpu", impl, None)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch", "masked-sdpa", "compiled", "reference"])
def test_decode_attention_on_a_gpu(measure, card, impl, case, graph):
    _measure(measure, case, torch.bfloat16, "cuda", impl, card, graph=graph)
