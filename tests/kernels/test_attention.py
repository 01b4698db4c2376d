"""Packed attention: every implementation against the float64 reference, the mask against its definition."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import scamo_kernels
import torch
from scamo_kernels import attention, reference
from scamo_kernels._dispatch import sees_values
from torch._subclasses.fake_tensor import FakeTensorMode

RELATIVE = 1e-5  # of the largest entry, float32
# Half precision rounds the inputs of each of the chained products once: a few units in the last place.
LOOSE = {torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int
    head_dim: int

    def __str__(self) -> str:
        longest = max(self.lengths, default=0)
        return f"B{len(self.lengths)}-T{longest}-H{self.heads}-D{self.head_dim}"

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.head_dim)
        tokens = sum(self.lengths)
        shape = (4, tokens, self.heads, self.head_dim)
        q, k, v, cotangent = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).unbind()
        )
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        return {
            "qkv": (q.contiguous(), k.contiguous(), v.contiguous()),
            "cotangent": cotangent.contiguous(),
            "cu_seqlens": cu_seqlens,
            "prefix_lengths": torch.tensor(self.prefixes, dtype=torch.int32, device=device),
        }

    def bounds(self, kind: str, device: str = "cpu") -> torch.Tensor:
        """Block-causal, blocks of 1, 2, 4, ...; or random: the first rows see nothing, none the last."""
        generator = torch.Generator().manual_seed(7)
        parts = []
        for length in self.lengths:
            if kind == "blocks":
                row = torch.arange(1, length + 1, dtype=torch.float64)
                end = (2 ** torch.ceil(torch.log2(row + 1)) - 1).clamp(max=length)
            else:
                end = torch.randint(0, max(1, length - 1), (length,), generator=generator).sort().values
                end[: length // 3] = 0
            parts.append(end.to(torch.int32))
        return torch.cat(parts).to(device)


CASES = [
    Case((63, 0, 17, 1), (20, 0, 17, 0), 2, 64),
    Case((47, 111, 1), (0, 50, 1), 2, 100),
    Case((64, 128, 32), (64, 31, 0), 1, 64),
    Case((33,), (33,), 3, 4),
    Case((5, 70), (2, 65), 2, 36),
    Case((96, 40), (33, 7), 1, 128),
    Case((1, 1, 0, 2), (0, 1, 0, 1), 5, 20),
    # One program per sample, in two halves.
    Case((201, 129, 256, 60, 128, 0, 1), (150, 0, 256, 60, 40, 0, 0), 1, 64),
    Case((178, 140, 255), (128, 140, 3), 1, 104),
    # Two roles: narrow loads.
    Case((178, 140), (128, 0), 1, 100),
]
# As if there were a sample that takes two halves, so that all have an empty second one.
HALVES = 200
# As if there were longer samples: the backward of two roles instead of one program per sample.
MANY = 1000
LONG = [Case((600,), (128,), 1, 64), Case((530, 3), (0, 1), 1, 100)]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected entry (NaN counts as infinite)."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
    return math.inf if math.isnan(difference) else difference / max(expected.abs().max().item(), 1e-30)


def expected_results(case: Case, mask: torch.Tensor, kind: str, dtype: torch.dtype, scale: float | None):
    """Output and gradients in float64 on the CPU, from inputs rounded to dtype."""
    tensors = case.tensors()
    inputs = [x.to(dtype).double().requires_grad_() for x in tensors["qkv"]]
    function = reference.prefix_causal_attention if kind == "prefix" else reference.bounded_attention
    out = function(*inputs, tensors["cu_seqlens"], mask.cpu(), scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors["cotangent"].to(dtype).double())]


def check(
    run, impl: str, case: Case, kind: str, dtype: torch.dtype, device: str = "cpu", scale=None, longest=0
) -> list:
    tensors = case.tensors(dtype, device)
    mask = tensors["prefix_lengths"] if kind == "prefix" else case.bounds(kind, device)
    op = "prefix_causal_attention" if kind == "prefix" else "bounded_attention"
    keywords = {"scale": scale, "max_seqlen": max(longest, *case.lengths)}
    outputs, grads = run(
        impl,
        op,
        *tensors["qkv"],
        tensors["cu_seqlens"],
        mask,
        differentiate=(0, 1, 2),
        cotangent=tensors["cotangent"],
        **keywords,
    )
    actual = [*outputs, *grads]
    expected = expected_results(case, mask, kind, dtype, scale)
    limit = LOOSE.get(dtype, RELATIVE)
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= limit, dict(zip(("out", "grad_q", "grad_k", "grad_v"), errors, strict=True))
    assert all(a.dtype == dtype for a in actual)
    return actual


@pytest.mark.parametrize("kind", ["prefix", "blocks", "random"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_matches_float64(run, impl, case, kind):
    check(run, impl, case, kind, torch.float32)


@pytest.mark.parametrize("longest", [HALVES, MANY])
@pytest.mark.parametrize("kind", ["prefix", "random"])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_short_samples_among_long_ones(run, case, kind, longest):
    check(run, "interpreter", case, kind, torch.float32, longest=longest)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
@pytest.mark.parametrize(("case", "kind"), [(LONG[0], "prefix"), (LONG[1], "random")], ids=str)
def test_matches_float64_beyond_512(run, impl, case, kind):
    check(run, impl, case, kind, torch.float32)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_half_precision(run, impl):
    check(run, impl, CASES[1], "prefix", torch.float16)


def test_bfloat16_and_float64_on_the_cpu(run):
    check(run, "torch", CASES[0], "prefix", torch.bfloat16)
    check(run, "torch", CASES[0], "random", torch.float64)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_scale(run, impl):
    check(run, impl, CASES[4], "prefix", torch.float32, scale=0.31)


@pytest.mark.parametrize(
    "tiles",
    [((64, 32, 4, 1), (64, 32, 64, 32, 4, 1)), ((32, 64, 4, 1), (32, 64, 32, 128, 4, 1))],
    ids=["wide-queries", "wide-keys"],
)
@pytest.mark.parametrize("kind", ["prefix", "random"])
def test_other_tiles(run, interpreter, tiles, kind):
    own = ((64, 64, 4, 1), (64, 64, 64, 64, 4, 1))
    interpreter("set_tiles", *tiles)
    try:
        check(run, "interpreter", Case((150, 37), (70, 37), 1, 64), kind, torch.float32)
    finally:
        interpreter("set_tiles", *own)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_same_bits_every_time(run, impl):
    for case in (CASES[1], CASES[7]):
        first = check(run, impl, case, "prefix", torch.float32)
        second = check(run, impl, case, "prefix", torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_rows_that_see_no_key_give_zero_and_get_no_gradient(run, impl):
    case = CASES[1]
    bounds = case.bounds("random")
    out, *grads = check(run, impl, case, "random", torch.float32)
    blind = bounds == 0
    assert blind.sum() > 40
    assert out[blind].eq(0).all()
    assert grads[0][blind].eq(0).all()
    # Keys beyond every bound of their sample get none either.
    most = int(bounds[: case.lengths[0]].max())
    assert most < case.lengths[0]
    assert grads[1][most : case.lengths[0]].eq(0).all()
    assert grads[2][most : case.lengths[0]].eq(0).all()


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens(run, impl, lengths):
    tensors = Case(lengths, (0,) * len(lengths), 2, 64).tensors(torch.float32)
    outputs, grads = run(
        impl,
        "prefix_causal_attention",
        *tensors["qkv"],
        tensors["cu_seqlens"],
        tensors["prefix_lengths"],
        differentiate=(0, 1, 2),
        cotangent=tensors["cotangent"],
    )
    assert all(x.shape == (0, 2, 64) for x in (*outputs, *grads))


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_takes_slices_of_a_fused_projection(run, impl):
    case = CASES[4]
    tensors = case.tensors(torch.float32)
    fused = torch.stack(tensors["qkv"], 1)
    rest = (tensors["cu_seqlens"], tensors["prefix_lengths"])
    keywords = {"differentiate": (0, 1, 2), "cotangent": tensors["cotangent"]}
    whole = run(impl, "prefix_causal_attention", *tensors["qkv"], *rest, **keywords)
    sliced = run(impl, "prefix_causal_attention", *fused.unbind(1), *rest, **keywords)
    # Expanded cotangents, as sum() gives them, are not contiguous.
    keywords["cotangent"] = torch.ones(1).expand(tensors["qkv"][0].shape)
    ones = run(impl, "prefix_causal_attention", *tensors["qkv"], *rest, **keywords)[1]
    total = sum(x.sum().item() for x in ones[2:])
    assert math.isclose(total, tensors["qkv"][0].numel(), rel_tol=1e-5)
    for a, b in zip([*whole[0], *whole[1]], [*sliced[0], *sliced[1]], strict=True):
        assert torch.equal(a, b)


def test_prefix_mask_by_definition():
    """Uniform weights make row i the mean of the values it may see; identity values read the mask off."""
    length, prefix = 12, 5
    zeros = torch.zeros(length, 1, length)
    values = torch.eye(length)[:, None]
    cu = torch.tensor([0, length], dtype=torch.int32)
    out = scamo_kernels.prefix_causal_attention(
        zeros, zeros, values, cu, torch.tensor([prefix], dtype=torch.int32)
    )[:, 0]
    for i in range(length):
        for j in range(length):
            allowed = j < (prefix if i < prefix else i + 1)
            count = prefix if i < prefix else i + 1
            assert out[i, j] == pytest.approx(allowed / count)


def test_prefix_is_bounded_by_its_bounds():
    case = CASES[1]
    tensors = case.tensors(torch.float32)
    bounds = reference.prefix_bounds(tensors["cu_seqlens"], tensors["prefix_lengths"])
    a = scamo_kernels.prefix_causal_attention(
        *tensors["qkv"], tensors["cu_seqlens"], tensors["prefix_lengths"]
    )
    b = scamo_kernels.bounded_attention(*tensors["qkv"], tensors["cu_seqlens"], bounds)
    assert torch.equal(a, b)


# Bins of a scale in time, its groups of joints, and the frames / 4 of a bin: ScaleMoGen's eleven scales.
SCALES = [(1, 1, 49), (2, 1, 24), (2, 2, 24), (3, 2, 16), (7, 2, 7), (7, 3, 7), (12, 3, 4), (24, 3, 2)]
SCALES += [(24, 5, 2), (49, 5, 1), (49, 7, 1)]


def scale_tokens(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all 864 tokens: the scale of each, and whether its bin holds one of the frames."""
    scales, valid = [], []
    for scale, (bins, groups, step) in enumerate(SCALES):
        scales += [scale] * bins * groups
        valid += [i < math.ceil(frames / (4 * step)) for i in range(bins) for _ in range(groups)]
    return torch.tensor(scales), torch.tensor(valid)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_scales_are_bounded_by_their_end(run, impl):
    """Full attention over own and coarser scales with padded bins masked, against the packed valid tokens."""
    generator = torch.Generator().manual_seed(0)
    frames, head_dim = (196, 61, 1), 32
    packed, expected, lengths, bounds = [], [], [], []
    for count in frames:
        scale, valid = scale_tokens(count)
        assert len(scale) == 864
        data = torch.randn(4, 864, 1, head_dim, generator=generator, dtype=torch.float64)
        data[3, ~valid] = 0
        q, k, v = leaves = [x.clone().requires_grad_() for x in data[:3]]
        seen = (scale <= scale[:, None]) & valid
        scores = torch.einsum("ihd,jhd->hij", q, k) * head_dim**-0.5
        out = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
        grads = torch.autograd.grad(out, leaves, data[3])
        assert all((x[~valid] == 0).all() for x in grads)
        expected.append(torch.stack([out.detach(), *grads])[:, valid])
        packed.append(data[:, valid].float())
        lengths.append(int(valid.sum()))
        ends = valid.long().cumsum(0)[torch.searchsorted(scale, scale, right=True) - 1]
        bounds.append(ends[valid].int())
    assert lengths[0] == 864
    *qkv, cotangent = torch.cat(packed, 1)
    outputs, grads = run(
        impl,
        "bounded_attention",
        *qkv,
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.cat(bounds),
        differentiate=(0, 1, 2),
        cotangent=cotangent,
        max_seqlen=864,
    )
    for actual, wanted in zip([*outputs, *grads], torch.cat(expected, 1), strict=True):
        assert error(actual, wanted) <= RELATIVE


def test_samples_do_not_see_each_other(run):
    case = CASES[0]
    tensors = case.tensors(torch.float32)
    spoiled = [x.clone() for x in tensors["qkv"]]
    for x in spoiled:
        x[: case.lengths[0]] = math.nan
    rest = (tensors["cu_seqlens"], tensors["prefix_lengths"])
    for impl in ("torch", "interpreter"):
        clean = run(impl, "prefix_causal_attention", *tensors["qkv"], *rest)[0][0]
        dirty = run(impl, "prefix_causal_attention", *spoiled, *rest)[0][0]
        assert torch.equal(clean[case.lengths[0] :], dirty[case.lengths[0] :])
        assert dirty[: case.lengths[0]].isnan().all()


def test_lengths_changed_in_place_are_seen():
    """What is planned per batch must follow the values, not the tensor."""
    q = torch.randn(10, 1, 4)
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    prefix = torch.zeros(2, dtype=torch.int32)
    for edge, length in ((4, 0), (7, 3), (10, 0)):
        cu[1], prefix[0] = edge, length
        expected = reference.prefix_causal_attention(q, q, q, cu, prefix)
        assert error(scamo_kernels.prefix_causal_attention(q, q, q, cu, prefix), expected) <= RELATIVE


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """What flash-attn's variable-length attention computes, plainly; causal aligns bottom-right."""
    outputs = []
    for b in range(len(cu_q) - 1):
        query, (key, value) = q[cu_q[b] : cu_q[b + 1]], (x[cu_k[b] : cu_k[b + 1]] for x in (k, v))
        assert len(query) <= max_q
        assert len(key) <= max_k
        if len(key) == 0:
            outputs.append(torch.zeros_like(query))
            continue
        scores = torch.einsum("ihd,jhd->hij", query, key) * scale
        if causal:
            row, column = torch.arange(len(query))[:, None], torch.arange(len(key))
            scores = scores.masked_fill(column > row + len(key) - len(query), -math.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_varlen_calls_compose_the_prefix_mask(case):
    tensors = case.tensors()
    inputs = [x.requires_grad_() for x in tensors["qkv"]]
    scale = case.head_dim**-0.5
    out = attention.compose_varlen(
        _varlen, *inputs, tensors["cu_seqlens"], tensors["prefix_lengths"], max(case.lengths), scale
    )
    grads = torch.autograd.grad(out, inputs, tensors["cotangent"])
    expected = expected_results(case, tensors["prefix_lengths"], "prefix", torch.float64, None)
    assert max(error(a, e) for a, e in zip((out, *grads), expected, strict=True)) < 1e-12


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _arguments() -> dict:
    q = torch.zeros(6, 2, 8)
    return {
        "q": q,
        "k": q,
        "v": q,
        "cu_seqlens": int32(0, 2, 6),
        "prefix_lengths": int32(1, 4),
    }


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": torch.zeros(6, 16)}, ValueError, r"q: expected shape \(tokens, heads, head_dim\)"),
        ({"q": torch.zeros(6, 2, 8, dtype=torch.int32)}, TypeError, "q: expected float32"),
        ({"k": torch.zeros(5, 2, 8)}, ValueError, "k: expected q's shape"),
        ({"v": torch.zeros(6, 2, 8, dtype=torch.float16)}, TypeError, "v: expected q's dtype"),
        ({n: torch.zeros(6, 2, 6) for n in "qkv"}, ValueError, "head_dim must be a multiple of 4 .* got 6"),
        ({n: torch.zeros(6, 2, 132) for n in "qkv"}, ValueError, "from 4 to 128, got 132"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, TypeError, "cu_seqlens: expected int32"),
        ({"cu_seqlens": int32()}, ValueError, "cu_seqlens: expected shape"),
        ({"cu_seqlens": int32(0, 2, 5)}, ValueError, "cu_seqlens: .* from 0 to 6 tokens"),
        ({"cu_seqlens": int32(0, 7, 6)}, ValueError, "cu_seqlens: expected non-decreasing"),
        ({"prefix_lengths": int32(1)}, ValueError, r"prefix_lengths: expected shape \(samples,\) = \(2,\)"),
        ({"prefix_lengths": torch.tensor([1, 2])}, TypeError, "prefix_lengths: expected int32"),
        ({"prefix_lengths": int32(3, 0)}, ValueError, r"prefix_lengths\[0\] = 3: expected 0 to 2"),
        ({"prefix_lengths": int32(0, -1)}, ValueError, r"prefix_lengths\[1\] = -1"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen = 3: the longest sample has 4"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen = -1"),
        ({"impl": "cuda"}, ValueError, "impl = 'cuda': expected one of 'auto', 'triton', 'torch', 'flash'"),
        ({"impl": "flash"}, ValueError, 'impl = "flash": needs CUDA tensors'),
        ({"q": torch.zeros(6, 2, 8, device="meta")}, ValueError, "k: expected q's device meta"),
    ],
)
def test_bad_arguments_are_named(changes, kind, message):
    with pytest.raises(kind, match=message) as raised:
        scamo_kernels.prefix_causal_attention(**(_arguments() | changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 2, 1, 2, 3, 5], r"bounds\[5\] = 5: expected 0 to 4"),
        ([2, 1, 1, 2, 3, 4], r"bounds\[1\] = 1 after 2: expected non-decreasing"),
        ([-1, 1, 1, 2, 3, 4], r"bounds\[0\] = -1"),
        ([1, 2, 3], r"bounds: expected shape \(tokens,\)"),
    ],
)
def test_bad_bounds_are_named(bounds, message):
    arguments = _arguments()
    del arguments["prefix_lengths"]
    with pytest.raises(ValueError, match=message):
        scamo_kernels.bounded_attention(**arguments, bounds=int32(*bounds))


def test_flash_cannot_bound():
    arguments = _arguments()
    del arguments["prefix_lengths"]
    bounds = torch.ones(6, dtype=torch.int32)
    with pytest.raises(ValueError, match="only prefix_causal_attention"):
        scamo_kernels.bounded_attention(**arguments, bounds=bounds, impl="flash")


def rotary_table(length: int, head_dim: int) -> torch.Tensor:
    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.stack((angle.cos(), angle.sin()), -1)


def fused(case: Case, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """(tokens, 3, heads, head_dim)."""
    return torch.stack(case.tensors(dtype, device)["qkv"], 1)


# float32: of the largest entry of the output and of each of the three gradients.
ROTARY = 2e-6


def check_rotary(
    run, impl: str, case: Case, dtype: torch.dtype, device: str = "cpu", scale=None, longest=0
) -> list:
    tensors, longest = case.tensors(dtype, device), max(longest, *case.lengths)
    rope = rotary_table(longest + 2, case.head_dim)
    rest = tensors["cu_seqlens"], tensors["prefix_lengths"]
    (out,), (grad,) = run(
        impl,
        "rotary_prefix_attention",
        fused(case, dtype, device),
        rope.to(device),
        *rest,
        differentiate=(0,),
        cotangent=tensors["cotangent"],
        scale=scale,
        max_seqlen=longest,
    )
    assert out.dtype == grad.dtype == dtype
    assert grad.is_contiguous()
    qkv = fused(case, dtype).double().requires_grad_()
    expected = reference.rotary_prefix_attention(qkv, rope, *(x.cpu() for x in rest), scale)
    (expected_grad,) = torch.autograd.grad(expected, qkv, tensors["cotangent"].cpu().double())
    pairs = (out, expected.detach()), *zip(grad.unbind(1), expected_grad.unbind(1), strict=True)
    errors = [error(a, e) for a, e in pairs]
    assert max(errors) <= LOOSE.get(dtype, ROTARY), dict(zip("oqkv", errors, strict=True))
    return [out, grad]


@pytest.mark.parametrize("case", [*CASES, Case((150, 20), (70, 0), 1, 100)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_rotary_matches_float64(run, impl, case):
    check_rotary(run, impl, case, torch.float32)


@pytest.mark.parametrize("longest", [HALVES, MANY])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_rotary_short_samples_among_long_ones(run, case, longest):
    check_rotary(run, "interpreter", case, torch.float32, longest=longest)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_rotary_in_other_dtypes_and_scales(run, impl):
    check_rotary(run, impl, CASES[1], torch.float16)
    check_rotary(run, impl, CASES[4], torch.float32, scale=0.31)
    if impl == "torch":
        check_rotary(run, impl, CASES[0], torch.bfloat16)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_rotary_same_bits_every_time(run, impl):
    for case, longest in ((CASES[1], 0), (CASES[1], MANY), (CASES[7], 0)):
        first = check_rotary(run, impl, case, torch.float32, longest=longest)
        second = check_rotary(run, impl, case, torch.float32, longest=longest)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
@pytest.mark.parametrize("longest", [111, HALVES, MANY])
def test_rotary_without_gradient_and_from_any_layout(run, impl, longest):
    case = CASES[1]
    tensors, rope = case.tensors(torch.float32), rotary_table(longest, case.head_dim)
    qkv = fused(case, torch.float32)
    rest = rope, tensors["cu_seqlens"], tensors["prefix_lengths"]
    keywords = {"differentiate": (0,), "cotangent": tensors["cotangent"], "max_seqlen": longest}
    (out,), (grad,) = run(impl, "rotary_prefix_attention", qkv, *rest, **keywords)
    (plain,), _ = run(impl, "rotary_prefix_attention", qkv, *rest, max_seqlen=longest)
    assert torch.equal(plain, out)
    # Rows with more behind them (an odd number, too), heads before the three, a table that is a slice.
    wide = torch.cat((qkv.flatten(1), torch.zeros(len(qkv), 5)), 1)[:, :-5].unflatten(1, qkv.shape[1:])
    heads_first = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    columns = torch.cat((rope, rope), -1)[..., :2]
    for x, table in ((wide, rope), (heads_first, rope), (qkv, columns)):
        (again,), (grad_again,) = run(impl, "rotary_prefix_attention", x, table, *rest[1:], **keywords)
        assert torch.equal(again, out)
        assert torch.equal(grad_again, grad)


@pytest.mark.parametrize("impl", ["torch", "interpreter"])
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_rotary_without_tokens(run, impl, lengths):
    tensors = Case(lengths, (0,) * len(lengths), 2, 64).tensors(torch.float32)
    for longest in (0, MANY):
        (out,), (grad,) = run(
            impl,
            "rotary_prefix_attention",
            torch.zeros(0, 3, 2, 64),
            rotary_table(longest, 64),
            tensors["cu_seqlens"],
            tensors["prefix_lengths"],
            differentiate=(0,),
            cotangent=tensors["cotangent"],
            max_seqlen=longest,
        )
        assert out.shape == (0, 2, 64)
        assert grad.shape == (0, 3, 2, 64)


def check_stored_wider(run, impl: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Heads with four zero columns more give what they give without them, and zero in these columns."""
    tensors, longest, dim = case.tensors(dtype, device), max(case.lengths), case.head_dim
    rope = rotary_table(longest, dim)
    one = torch.tensor([1.0, 0.0]).expand(longest, 2, 2)
    results = []
    for wider, table in ((0, rope), (4, torch.cat((rope, one), 1))):
        outputs, grads = run(
            impl,
            "rotary_prefix_attention",
            torch.nn.functional.pad(fused(case, dtype, device), (0, wider)),
            table.to(device),
            tensors["cu_seqlens"],
            tensors["prefix_lengths"],
            differentiate=(0,),
            cotangent=torch.nn.functional.pad(tensors["cotangent"], (0, wider)),
            max_seqlen=longest,
            scale=dim**-0.5,
        )
        results.append([*outputs, *grads[0].unbind(1)])
    for exact, wide in zip(*results, strict=True):
        assert wide.shape[-1] == dim + 4
        assert wide[..., dim:].eq(0).all()
        assert error(wide[..., :dim], exact) <= LOOSE.get(dtype, ROTARY)


@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_rotary_of_heads_stored_wider(run, impl, case):
    assert case.head_dim == 100
    check_stored_wider(run, impl, case, torch.float32)


def test_rotary_turns_adjacent_pairs_as_complex_numbers():
    x, rope = torch.randn(5, 2, 8, dtype=torch.float64), rotary_table(5, 8).double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(rope)[:, None]
    assert torch.allclose(reference.rotate_pairs(x, rope), torch.view_as_real(turned).flatten(-2))


def test_rotary_sees_distances_only():
    """Later positions for all rows of a sample change nothing."""
    case = CASES[1]
    tensors, rope = case.tensors(), rotary_table(200, case.head_dim)
    rest = tensors["cu_seqlens"], tensors["prefix_lengths"]
    qkv = fused(case, torch.float64)
    near, far = (
        scamo_kernels.rotary_prefix_attention(qkv, x, *rest, max_seqlen=111, impl="torch")
        for x in (rope, rope[40:])
    )
    other = scamo_kernels.prefix_causal_attention(*qkv.unbind(1), *rest, impl="torch")
    assert error(far, near) < 1e-5
    assert error(other, near) > 1e-2


def test_rotary_gradcheck_and_one_graph():
    case = Case((5, 4), (2, 0), 2, 8)
    tensors, rope = case.tensors(), rotary_table(9, 8)
    rest = rope, tensors["cu_seqlens"], tensors["prefix_lengths"]

    def function(x, longest=5):
        return scamo_kernels.rotary_prefix_attention(x * 2, *rest, max_seqlen=longest).sin()

    qkv = fused(case, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (qkv,), fast_mode=True)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for longest in (5, 6, 9):
        results = []
        for call in (function, compiled):
            x = qkv.detach().float().requires_grad_()
            out = call(x, longest)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), x)])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


# What sm_80 runs and sm_90 does not: a program that turns q and k and steps over the rows of its sample.
STEPPING = """
import evaluate
from scamo_kernels import _attention_triton as kernels
kernels.BACKWARD[90, "half", 64] = 4 * (kernels.SampleConfig(128, 32, 8, True),)
evaluate.main()
"""


def test_stepping_programs_that_turn(environment):
    pytest.importorskip("triton")
    here = Path(__file__).parent
    settings = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    settings["PYTHONPATH"] += os.pathsep + str(here)

    def run(impl, op, *arguments, differentiate, cotangent, **keywords):
        request = "evaluate", (op, arguments, {**keywords, "impl": impl}, differentiate, cotangent)
        done = subprocess.run(
            [sys.executable, "-c", STEPPING], input=pickle.dumps(request), capture_output=True, env=settings
        )
        good, answer = pickle.loads(done.stdout)
        assert good, answer
        return answer

    check_rotary(run, "triton", Case((63, 0, 17, 128, 1), (20, 0, 17, 40, 0), 2, 64), torch.float32)


def _rotary_arguments() -> dict:
    return {
        "qkv": torch.zeros(6, 3, 2, 8),
        "rope": torch.zeros(5, 4, 2),
        "cu_seqlens": int32(0, 2, 6),
        "prefix_lengths": int32(1, 4),
        "max_seqlen": 4,
    }


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"qkv": torch.zeros(6, 2, 2, 8)}, ValueError, r"qkv: expected shape \(tokens, 3, heads, head_dim\)"),
        ({"qkv": torch.zeros(6, 48)}, ValueError, r"qkv: expected shape .* got \(6, 48\)"),
        ({"qkv": torch.zeros(6, 3, 2, 8).int()}, TypeError, "qkv: expected float32"),
        ({"qkv": torch.zeros(6, 3, 2, 6)}, ValueError, "qkv: head_dim must be a multiple of 4 .* got 6"),
        ({"rope": torch.zeros(5, 4, 2).double()}, TypeError, "rope: expected float32, got torch.float64"),
        ({"rope": torch.zeros(5, 8)}, ValueError, r"rope: expected shape .* \(length, 4, 2\), got \(5, 8\)"),
        ({"rope": torch.zeros(3, 4, 2)}, ValueError, "rope: 3 positions, fewer than max_seqlen = 4"),
        ({"rope": torch.zeros(5, 4, 2, device="meta")}, ValueError, "rope: expected qkv's device cpu"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, TypeError, "cu_seqlens: expected int32"),
        ({"cu_seqlens": int32(0, 2, 5)}, ValueError, "cu_seqlens: .* from 0 to 6 tokens"),
        ({"prefix_lengths": int32(1)}, ValueError, r"prefix_lengths: expected shape \(samples,\) = \(2,\)"),
        ({"prefix_lengths": int32(3, 0)}, ValueError, r"prefix_lengths\[0\] = 3: expected 0 to 2"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen = 3: the longest sample has 4"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen = -1"),
        ({"impl": "flash"}, ValueError, "impl = 'flash': expected one of 'auto', 'triton', 'torch'"),
    ],
)
def test_rotary_names_bad_arguments(changes, kind, message):
    with pytest.raises(kind, match=message) as raised:
        scamo_kernels.rotary_prefix_attention(**(_rotary_arguments() | changes))
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_rotary_of_heads_stored_wider_on_a_gpu(run, case):
    check_stored_wider(run, "triton", case, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [0, MANY], ids=["as-short", "as-long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LONG, Case((2048, 1), (150, 1), 2, 64)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rotary_on_a_gpu(run, impl, case, dtype, longest):
    check_rotary(run, impl, case, dtype, "cuda", longest=longest)


@pytest.mark.gpu
def test_rotary_same_bits_on_a_gpu(run):
    for case in (
        Case((201, 178, 90) * 20, (150, 128, 40) * 20, 8, 64),
        Case((126, 60) * 20, (77, 9) * 20, 8, 100),
        Case((201, 178, 90) * 20, (150, 128, 40) * 20, 8, 104),
    ):
        first = check_rotary(run, "triton", case, torch.bfloat16, "cuda")
        for _ in range(5):
            again = check_rotary(run, "triton", case, torch.bfloat16, "cuda")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["prefix", "blocks", "random"])
@pytest.mark.parametrize("case", [*CASES, *LONG, Case((2048, 1), (150, 1), 2, 64)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(run, impl, case, kind, dtype):
    if impl == "torch" and dtype == torch.float32:
        # TF32 products would not be float32 ones.
        assert not torch.backends.cuda.matmul.allow_tf32
    check(run, impl, case, kind, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim % 8 == 0], ids=str)
def test_flash_on_a_gpu(run, case, dtype):
    check(run, "flash", case, "prefix", dtype, "cuda")


@pytest.mark.gpu
def test_same_bits_on_a_gpu(run):
    case = Case((201, 178, 90) * 20, (150, 128, 40) * 20, 8, 64)
    first = check(run, "triton", case, "prefix", torch.bfloat16, "cuda")
    for _ in range(5):
        again = check(run, "triton", case, "prefix", torch.bfloat16, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_max_seqlen_is_required_on_a_gpu():
    arguments = {name: x.cuda() for name, x in _arguments().items()}
    with pytest.raises(ValueError, match="max_seqlen: required on CUDA"):
        scamo_kernels.prefix_causal_attention(**arguments)


def test_values_on_a_device_are_seen_in_debug_mode_only(monkeypatch):
    monkeypatch.delenv("SCAMO_KERNELS_DEBUG", raising=False)
    with FakeTensorMode():
        on_device = torch.empty(1, device="cuda")
    assert sees_values(torch.empty(1))
    assert not sees_values(on_device)
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")
    assert sees_values(on_device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_lengths": int32(3, 0)}, r"prefix_lengths\[0\] = 3: expected 0 to 2"),
        ({"cu_seqlens": int32(0, 7, 6)}, "cu_seqlens: expected non-decreasing"),
        ({"max_seqlen": 3}, "max_seqlen = 3: the longest sample has 4"),
    ],
)
def test_debug_mode_checks_values_on_a_gpu(monkeypatch, changes, message):
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")

    def on_gpu(arguments: dict) -> dict:
        return {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}

    plain = _arguments() | {"max_seqlen": 4}
    with pytest.raises(ValueError, match=message):
        scamo_kernels.prefix_causal_attention(**on_gpu(plain | changes))
    with pytest.raises(ValueError, match=message):
        scamo_kernels.rotary_prefix_attention(**on_gpu(_rotary_arguments() | changes))
    del plain["prefix_lengths"]
    with pytest.raises(ValueError, match=r"bounds\[5\] = 5: expected 0 to 4"):
        scamo_kernels.bounded_attention(**on_gpu(plain | {"bounds": int32(1, 2, 1, 2, 3, 5)}))
