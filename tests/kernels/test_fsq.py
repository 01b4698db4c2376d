"""Finite scalar quantisation: against float64, against closed forms and against the field's own package."""

from __future__ import annotations

import math

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

RELATIVE = 1e-5  # of the largest entry, float32
TIE = 1e-5  # a bounded value this near to a half may round either way
LEVELS = [
    (8, 6, 5),
    (8, 8, 8),
    (8, 5, 5, 5),
    (8, 8, 6, 5),
    (7, 5, 5, 5, 5),
    (8, 8, 8, 6, 5),
    (8, 8, 8, 5, 5, 5),
    (2,),
    (3, 1000),
]
IMPLS = ["torch", "interpreter"]


def name(levels) -> str:
    return "x".join(map(str, levels))


def latents(levels, rows: int = 700) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(levels))
    return torch.randn(rows, len(levels), generator=generator, dtype=torch.float64) * 1.5


def clear_of_ties(z: torch.Tensor, levels) -> torch.Tensor:
    """Which entries of z round the same way in any arithmetic."""
    bounded = reference.fsq_bound(z.double(), levels)
    return ((bounded - bounded.floor()) - 0.5).abs() > TIE


@pytest.mark.parametrize("levels", LEVELS, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, levels):
    z = latents(levels)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = z.clone().requires_grad_()
    codes, indices = reference.fsq_quantize(exact, levels)
    (grad,) = torch.autograd.grad(codes, exact, cotangent)
    (got_codes, got_indices), (got_grad,) = run(
        impl, "fsq_quantize", z.float(), levels, differentiate=(0,), cotangent=cotangent.float()
    )
    clear = clear_of_ties(z, levels)
    assert clear.double().mean() > 0.99
    assert torch.allclose(got_codes.double()[clear], codes.detach()[clear], rtol=1e-7, atol=0)
    rows = clear.all(1)
    assert torch.equal(got_indices[rows], indices[rows])
    assert got_indices.dtype == torch.int32
    assert (got_grad - grad).abs().max() <= RELATIVE * grad.abs().max()


@pytest.mark.parametrize("levels", LEVELS, ids=name)
def test_gradient_is_that_of_the_bound(levels):
    """Straight-through, by automatic differentiation of the formula as the paper's code has it."""
    z = latents(levels, 50).requires_grad_()
    columns = []
    for i, level in enumerate(levels):
        half = (level - 1) * 1.001 / 2
        offset = 0.0 if level % 2 else 0.5
        bound = torch.tanh(z[:, i] + math.atanh(offset / half)) * half - offset
        columns.append(bound / (level // 2))
    (expected,) = torch.autograd.grad(torch.stack(columns, 1).sum(), z)
    (actual,) = torch.autograd.grad(scamo_kernels.fsq_quantize(z, levels)[0].sum(), z)
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("levels", LEVELS, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_code_is_reached_and_comes_back(run, impl, levels):
    """All indices -> codes are distinct; the latent that each code is the middle of quantises to it."""
    indices = torch.arange(math.prod(levels), dtype=torch.int32)
    indices = indices[:: max(1, len(indices) // 5000)]
    (codes,), _ = run(impl, "fsq_dequantize", indices, levels)
    assert len(torch.unique(codes, dim=0)) == len(indices)
    columns = []
    for i, level in enumerate(levels):
        half, offset, shift = reference.fsq_constants(level)
        q = codes[:, i].double() * (level // 2)
        assert torch.allclose(q, q.round(), atol=1e-4)
        assert q.min().round() >= -(level // 2)
        assert q.max().round() <= (level - 1) - level // 2
        columns.append(torch.atanh((q.round() + offset) / half) - shift)
    (again, found), _ = run(impl, "fsq_quantize", torch.stack(columns, 1).float(), levels)
    assert torch.equal(found, indices)
    assert torch.equal(again, codes)


def test_index_by_hand():
    """Levels (8, 5): zeros sit at 4 + 2 * 8; saturation gives the corners; even levels reach -1 and 0.75."""
    z = torch.tensor([[0.0, 0.0], [-50.0, -50.0], [50.0, 50.0], [50.0, -50.0]])
    codes, indices = scamo_kernels.fsq_quantize(z, (8, 5))
    assert indices.tolist() == [20, 0, 39, 7]
    assert codes.tolist() == [[0.0, 0.0], [-1.0, -1.0], [0.75, 1.0], [0.75, -1.0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(run, impl, dtype):
    if impl == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates bfloat16")
    levels = (8, 8, 8, 5, 5, 5)
    z = latents(levels).to(dtype)
    (codes, indices), _ = run(impl, "fsq_quantize", z, levels)
    (expected, expected_indices), _ = run(impl, "fsq_quantize", z.float(), levels)
    assert codes.dtype == dtype
    assert torch.equal(indices, expected_indices)
    assert torch.equal(codes, expected.to(dtype))
    (back,), _ = run(impl, "fsq_dequantize", indices, levels, dtype=dtype)
    assert torch.equal(back, codes)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes(run, impl):
    levels = (8, 6, 5)
    whole = latents(levels, 24).float()
    (codes, indices), _ = run(impl, "fsq_quantize", whole, levels)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        (a, b), _ = run(impl, "fsq_quantize", whole.reshape(*shape, 3), levels)
        assert torch.equal(a, codes.reshape(*shape, 3))
        assert torch.equal(b, indices.reshape(shape))
    (a, b), _ = run(impl, "fsq_quantize", whole[5], levels)
    assert b.shape == ()
    assert b == indices[5]
    (a, b), _ = run(impl, "fsq_quantize", whole.T.contiguous().T, levels)
    assert torch.equal(a, codes)
    (a, b), _ = run(impl, "fsq_quantize", whole[:0], levels)
    assert a.shape == (0, 3)
    assert b.shape == (0,)
    (a,), _ = run(impl, "fsq_dequantize", indices.long().reshape(4, 6), levels)
    assert torch.equal(a, codes.reshape(4, 6, 3))


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    levels = (8, 8, 8, 6, 5)
    z = latents(levels).float()
    first, second = (
        run(impl, "fsq_quantize", z, levels, differentiate=(0,), cotangent=z.cos()) for _ in range(2)
    )
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("levels", LEVELS[:7], ids=name)
def test_agrees_with_vector_quantize_pytorch(levels):
    package = pytest.importorskip("vector_quantize_pytorch")
    z = latents(levels).float()
    theirs = package.FSQ(levels=list(levels))
    clear = clear_of_ties(z, levels).all(1)
    expected = theirs.quantize(z)
    codes, indices = scamo_kernels.fsq_quantize(z, levels)
    assert torch.allclose(codes[clear], expected[clear], atol=1e-6)
    assert torch.equal(indices[clear], theirs.codes_to_indices(expected)[clear].to(torch.int32))
    assert torch.allclose(theirs.indices_to_codes(indices), scamo_kernels.fsq_dequantize(indices, levels))


@pytest.mark.parametrize(
    ("z", "levels", "kind", "message"),
    [
        (torch.zeros(4, 3), [8, 5], ValueError, r"z: expected shape \(\.\.\., 2\) for levels \[8, 5\]"),
        (torch.zeros(()), [8], ValueError, "z: expected shape"),
        (torch.zeros(4, 2, dtype=torch.int64), [8, 5], TypeError, "z: expected a floating-point tensor"),
        (torch.zeros(4, 1), [1], ValueError, r"levels = \[1\]: expected integers from 2 to 1000, got 1"),
        (torch.zeros(4, 1), [1001], ValueError, "got 1001"),
        (torch.zeros(4, 1), [2.5], ValueError, "got 2.5"),
        (torch.zeros(4, 0), [], TypeError, "levels = "),
        (torch.zeros(4, 4), [1000] * 4, ValueError, "do not fit an int32 index"),
    ],
)
def test_bad_arguments_are_named(z, levels, kind, message):
    with pytest.raises(kind, match=message):
        scamo_kernels.fsq_quantize(z, levels)


def test_bad_indices_are_named():
    with pytest.raises(ValueError, match=r"indices: expected 0 to 39 for levels \[8, 5\], found 3 to 40"):
        scamo_kernels.fsq_dequantize(torch.tensor([3, 40]), (8, 5))
    with pytest.raises(TypeError, match="indices: expected int32 or int64"):
        scamo_kernels.fsq_dequantize(torch.tensor([3.0]), (8, 5))
    with pytest.raises(TypeError, match="dtype: expected a floating-point type"):
        scamo_kernels.fsq_dequantize(torch.tensor([3]), (8, 5), dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("levels", LEVELS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(run, impl, levels, dtype):
    z = latents(levels, 20_000).to(dtype)
    exact = z.double().requires_grad_()
    codes, indices = reference.fsq_quantize(exact, levels)
    (grad,) = torch.autograd.grad(codes, exact, exact.detach().cos().to(dtype).double())
    (got_codes, got_indices), (got_grad,) = run(
        impl,
        "fsq_quantize",
        z.cuda(),
        levels,
        differentiate=(0,),
        cotangent=exact.detach().cos().to(dtype).cuda(),
    )
    rows = clear_of_ties(z, levels).all(1)
    assert torch.equal(got_indices.cpu()[rows], indices[rows])
    assert torch.equal(got_codes.cpu()[rows], codes.detach().float().to(dtype)[rows])
    # One rounding to the output's type.
    limit = max(RELATIVE, torch.finfo(dtype).eps)
    assert (got_grad.cpu().double() - grad).abs().max() <= limit * grad.abs().max()
    (back,), _ = run(impl, "fsq_dequantize", got_indices, levels, dtype=dtype)
    assert torch.equal(back, got_codes)
