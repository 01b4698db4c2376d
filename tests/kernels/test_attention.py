"""Packed attention: every implementation against the float64 reference, the mask against its definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import scamo_kernels
import torch
from scamo_kernels import attention, reference

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
]
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


def check(run, impl: str, case: Case, kind: str, dtype: torch.dtype, device: str = "cpu", scale=None) -> list:
    tensors = case.tensors(dtype, device)
    mask = tensors["prefix_lengths"] if kind == "prefix" else case.bounds(kind, device)
    op = "prefix_causal_attention" if kind == "prefix" else "bounded_attention"
    keywords = {"scale": scale, "max_seqlen": max(case.lengths)}
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
    first = check(run, impl, CASES[1], "prefix", torch.float32)
    second = check(run, impl, CASES[1], "prefix", torch.float32)
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
