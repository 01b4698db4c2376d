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
BOUNDS = ["tanh", "sigmoid", "mentzer"]
# Close to 2^31 - 1 codes, with few and with many channels; small levels, large ones, both parities.
HUGE = [
    (1000, 1000, 1000, 2),
    (3, 999, 716, 1000),
    (2,) * 30,
    (3,) * 19,
    (8,) * 10,
    (7,) * 11,
    (5,) * 13,
    (128, 128, 128, 128, 7),
]


def name(levels) -> str:
    return "x".join(map(str, levels))


def latents(levels, rows: int = 700) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(levels))
    return torch.randn(rows, len(levels), generator=generator, dtype=torch.float64) * 1.5


def clear_of_ties(z: torch.Tensor, levels, bound: str = "tanh", tie: float = TIE) -> torch.Tensor:
    """Which entries of z round the same way in any arithmetic."""
    bounded = reference.fsq_bound(z.double(), levels, bound)
    return ((bounded - bounded.floor()) - 0.5).abs() > tie


def python_indices(z: torch.Tensor, levels, bound: str) -> list[int]:
    """Indices by Python's own integers and floats, from the formulas alone."""

    def digit(x: float, level: int) -> int:
        if bound == "sigmoid":
            return round((level - 1) / (1 + math.exp(-x)))
        half = (level - 1) * (1.001 if bound == "tanh" else 0.999) / 2
        offset = 0.0 if level % 2 else 0.5
        shift = math.atanh(offset / half) if bound == "tanh" else math.tan(offset / half)
        return round(math.tanh(x + shift) * half - offset) + level // 2

    indices = []
    for row in z.double().tolist():
        index, basis = 0, 1
        for x, level in zip(row, levels, strict=True):
            index += digit(x, level) * basis
            basis *= level
        indices.append(index)
    return indices


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


@pytest.mark.parametrize("bound", ["sigmoid", "mentzer"])
@pytest.mark.parametrize("levels", LEVELS, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_other_bounds_match_float64(run, impl, levels, bound):
    z = latents(levels, 300)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = z.clone().requires_grad_()
    codes, indices = reference.fsq_quantize(exact, levels, bound)
    (grad,) = torch.autograd.grad(codes, exact, cotangent)
    (got_codes, got_indices), (got_grad,) = run(
        impl,
        "fsq_quantize",
        z.float(),
        levels,
        bound=bound,
        differentiate=(0,),
        cotangent=cotangent.float(),
    )
    clear = clear_of_ties(z, levels, bound, TIE * max(1, max(levels) / 100))
    assert clear.double().mean() > 0.99
    assert torch.allclose(got_codes.double()[clear], codes.detach()[clear], rtol=1e-7, atol=0)
    assert torch.equal(got_indices[clear.all(1)], indices[clear.all(1)])
    assert (got_grad - grad).abs().max() <= RELATIVE * grad.abs().max()


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_bound_is_its_formula(bound):
    """Values and gradients by automatic differentiation of the formulas as they are published."""
    levels = (2, 3, 5, 8, 999, 1000)
    z = latents(levels, 50).requires_grad_()
    columns = []
    for i, level in enumerate(levels):
        if bound == "sigmoid":
            columns.append((level - 1) * torch.sigmoid(z[:, i]) - level // 2)
            continue
        half = (level - 1) * (1.001 if bound == "tanh" else 0.999) / 2
        offset = 0.0 if level % 2 else 0.5
        shift = math.atanh(offset / half) if bound == "tanh" else math.tan(offset / half)
        columns.append(torch.tanh(z[:, i] + shift) * half - offset)
    expected = torch.stack(columns, 1)
    assert torch.allclose(reference.fsq_bound(z, levels, bound), expected, rtol=1e-10, atol=1e-10)
    scaled = expected / torch.tensor([level // 2 for level in levels])
    (grad,) = torch.autograd.grad(scaled.sum(), z)
    (actual,) = torch.autograd.grad(scamo_kernels.fsq_quantize(z, levels, bound=bound)[0].sum(), z)
    assert torch.allclose(actual, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_channel_takes_exactly_its_levels(run, impl, bound):
    """A sweep from one saturated end to the other meets each of the L integers, in order, and no other."""
    levels = (2, 3, 5, 6, 8, 99, 100)
    sweep = torch.cat([torch.tensor([-1e4]), torch.linspace(-8, 8, 4001), torch.tensor([1e4])])
    (codes, _), _ = run(impl, "fsq_quantize", sweep[:, None].expand(-1, len(levels)), levels, bound=bound)
    for i, level in enumerate(levels):
        digits = (codes[:, i].double() * (level // 2)).round().long() + level // 2
        assert (digits.diff() >= 0).all()
        assert torch.equal(digits.unique(), torch.arange(level))
    ends = torch.tensor([[-1e4, -1e4], [1e4, 1e4]])
    (_, indices), _ = run(impl, "fsq_quantize", ends, (999, 1000), bound=bound)
    assert indices.tolist() == [0, 999 * 1000 - 1]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("levels", HUGE, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_indices_are_exact_up_to_the_int32_limit(run, impl, levels, bound):
    """Against Python's integers; saturated rows give the first and the last code."""
    z = latents(levels, 100)
    z = z[clear_of_ties(z, levels, bound, TIE * max(1, max(levels) / 50)).all(1)].float()
    assert len(z) > 50
    z = torch.cat([z, torch.full((1, len(levels)), -99.0), torch.full((1, len(levels)), 99.0)])
    (codes, indices), _ = run(impl, "fsq_quantize", z, levels, bound=bound)
    assert indices.tolist() == python_indices(z, levels, bound)
    assert indices[-2:].tolist() == [0, math.prod(levels) - 1]
    (back,), _ = run(impl, "fsq_dequantize", indices, levels)
    assert torch.equal(back, codes)


def test_sigmoid_is_half_the_argument_of_a_tanh():
    """By hand: levels (8, 5), digits round(7 sigmoid(z)) and round(4 sigmoid(z))."""
    z = torch.tensor([[0.1, 0.0], [-0.1, -2.0], [50.0, -50.0]])
    codes, indices = scamo_kernels.fsq_quantize(z, (8, 5), bound="sigmoid")
    assert indices.tolist() == [4 + 2 * 8, 3 + 0 * 8, 7 + 0 * 8]
    assert codes.tolist() == [[0.0, 0.0], [-0.25, -1.0], [0.75, -1.0]]


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


@pytest.mark.parametrize("levels", [(8, 6, 5), (8, 8, 8, 5, 5, 5)], ids=name)
def test_mentzer_agrees_with_vector_quantize_pytorch_at_its_constants(levels):
    """The package's bound, given the notebook's eps and shift, is this bound."""
    package = pytest.importorskip("vector_quantize_pytorch")
    z = latents(levels).float()
    theirs = package.FSQ(levels=list(levels))
    sizes = torch.tensor(levels)
    half = (sizes - 1) * 0.999 / 2
    offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
    # Their shift out, the notebook's in; then their bound with eps = -1e-3.
    moved = z + torch.tan(offset / half) - torch.atanh(offset / half)
    expected = theirs.bound(moved, eps=-1e-3)
    codes, indices = scamo_kernels.fsq_quantize(z, levels, bound="mentzer")
    clear = clear_of_ties(z, levels, "mentzer").all(1)
    assert torch.allclose(codes[clear], expected[clear], atol=1e-6)
    assert torch.equal(indices[clear], theirs.codes_to_indices(expected)[clear].to(torch.int32))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_groups(run, impl, groups, bound):
    levels = (8, 6, 5)
    z = latents(levels * groups, 111).float().reshape(3, 37, -1)
    (codes, indices), (grad,) = run(
        impl,
        "fsq_quantize_grouped",
        z,
        levels,
        groups,
        bound=bound,
        differentiate=(0,),
        cotangent=z.cos(),
    )
    assert indices.shape == (3, 37, groups)
    exact = z.double().requires_grad_()
    expected, expected_indices = reference.fsq_quantize_grouped(exact, levels, groups, bound)
    (expected_grad,) = torch.autograd.grad(expected, exact, z.cos().double())
    clear = clear_of_ties(z, levels * groups, bound)
    assert torch.allclose(codes.double()[clear], expected.detach()[clear], rtol=1e-7, atol=0)
    clear = clear.unflatten(-1, (groups, -1)).all(-1)
    assert torch.equal(indices[clear], expected_indices[clear])
    assert (grad - expected_grad).abs().max() <= RELATIVE * expected_grad.abs().max()
    (back,), _ = run(impl, "fsq_dequantize_grouped", indices, levels)
    assert torch.equal(back, codes)
    (codes, indices), _ = run(impl, "fsq_quantize_grouped", z[:0], levels, groups)
    assert codes.shape == (0, 37, 3 * groups)
    assert indices.shape == (0, 37, groups)


def clear_in_every_stage(z: torch.Tensor, levels, quantizers: int, bound: str) -> torch.Tensor:
    """Rows none of whose residuals is near a tie; the float32 error of a residual grows with its unit."""
    rest, clear = z.double(), torch.ones(len(z), dtype=torch.bool)
    steps = torch.tensor([level - 1.0 for level in levels], dtype=torch.float64)
    for stage in range(quantizers):
        tie = TIE * max(levels) ** stage
        clear &= clear_of_ties(rest * steps**stage, levels, bound, tie).all(1)
        rest = rest - reference.fsq_quantize(rest * steps**stage, levels, bound)[0] / steps**stage
    return clear


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("levels", "quantizers"), [((8, 6, 5), 3), ((5, 5, 5, 5), 4), ((8, 5), 1), ((3,), 2)]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_residual_stages(run, impl, levels, quantizers, bound):
    z = latents(levels, 130) / 3
    z = z[clear_in_every_stage(z.float(), levels, quantizers, bound)].float()
    assert len(z) > 60
    exact = z.double().requires_grad_()
    expected, expected_indices = reference.fsq_quantize_residual(exact, levels, quantizers, bound)
    (expected_grad,) = torch.autograd.grad(expected, exact, z.cos().double())
    (codes, indices), (grad,) = run(
        impl,
        "fsq_quantize_residual",
        z,
        levels,
        quantizers,
        bound=bound,
        differentiate=(0,),
        cotangent=z.cos(),
    )
    assert indices.shape == (len(z), quantizers)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, expected_indices)
    assert torch.allclose(codes.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    # A slope of stage i sees the float32 error of its residual times (L - 1)^i.
    limit = RELATIVE * max(levels) ** (quantizers - 1)
    assert (grad - expected_grad).abs().max() <= limit * expected_grad.abs().max()
    (back,), _ = run(impl, "fsq_dequantize_residual", indices, levels)
    assert torch.equal(back, codes)
    assert torch.allclose(reference.fsq_dequantize_residual(indices, levels), codes, rtol=1e-6, atol=1e-7)
    (again, same), _ = run(impl, "fsq_quantize_residual", z, levels, quantizers, bound=bound)
    assert torch.equal(again, codes)
    assert torch.equal(same, indices)
    (codes, indices), _ = run(impl, "fsq_quantize_residual", z[:0], levels, quantizers)
    assert codes.shape == (0, len(levels))
    assert indices.shape == (0, quantizers)
    (back,), _ = run(impl, "fsq_dequantize_residual", indices, levels)
    assert back.shape == (0, len(levels))


def test_residual_stages_get_finer():
    """Each stage narrows the error of a small latent."""
    levels = (5, 5)
    z = latents(levels, 500) / 8
    errors = []
    for quantizers in (1, 2, 3):
        codes, indices = scamo_kernels.fsq_quantize_residual(z, levels, quantizers)
        errors.append((codes - z).abs().mean())
        coarse = scamo_kernels.fsq_dequantize_residual(indices[:, :1], levels)
        assert torch.equal(coarse.double(), scamo_kernels.fsq_quantize(z, levels)[0])
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize("levels", [(8, 6, 5), (5, 5, 5, 5)], ids=name)
def test_residual_agrees_with_vector_quantize_pytorch(levels):
    """Its ResidualFSQ with its first releases' scales, this quantiser's bound and no clamp of the input.

    The installed release scales by L^-i, preserves symmetry and clamps; those three are set back.
    """
    package = pytest.importorskip("vector_quantize_pytorch")
    quantizers = 3
    theirs = package.ResidualFSQ(levels=list(levels), num_quantizers=quantizers, bound_hard_clamp=False)
    sizes = torch.tensor(levels).float()
    theirs.scales = torch.stack([(sizes - 1) ** -i for i in range(quantizers)])
    for layer in theirs.layers:
        layer.preserve_symmetry = False
    z = latents(levels, 300).float() / 3
    z = z[clear_in_every_stage(z, levels, quantizers, "tanh")]
    leaf = z.clone().requires_grad_()
    expected, expected_indices = theirs(leaf[None])
    (expected_grad,) = torch.autograd.grad(expected, leaf, z.cos()[None])
    mine = z.clone().requires_grad_()
    codes, indices = scamo_kernels.fsq_quantize_residual(mine, levels, quantizers)
    (grad,) = torch.autograd.grad(codes, mine, z.cos())
    assert torch.equal(indices, expected_indices[0].to(torch.int32))
    assert torch.allclose(codes, expected[0], atol=1e-6)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_residual_keeps_the_dtype(dtype):
    z = latents((8, 5), 50).to(dtype).requires_grad_()
    codes, indices = scamo_kernels.fsq_quantize_residual(z, (8, 5), 3)
    (grad,) = torch.autograd.grad(codes.sum(), z)
    assert codes.dtype == grad.dtype == dtype
    wide = z.detach() if dtype == torch.float64 else z.detach().float()
    expected, same = scamo_kernels.fsq_quantize_residual(wide, (8, 5), 3)
    assert torch.equal(codes, expected.to(dtype))
    assert torch.equal(indices, same)
    back = scamo_kernels.fsq_dequantize_residual(indices, (8, 5), dtype=dtype)
    assert torch.equal(back, codes)


def test_torch_compile_traces_grouped_and_residual():
    def block(z):
        grouped, a = scamo_kernels.fsq_quantize_grouped(z * 2, [8, 5], 2, bound="sigmoid")
        residual, b = scamo_kernels.fsq_quantize_residual(grouped + z, [8, 5, 5, 6], 3)
        return residual.square().sum(), scamo_kernels.fsq_dequantize_residual(b, [8, 5, 5, 6]), a

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        results = []
        for function in (block, compiled):
            z = latents((8, 5, 5, 6), rows).float().requires_grad_()
            loss, codes, indices = function(z)
            results.append([loss.detach(), codes, indices, *torch.autograd.grad(loss, z)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda k: k.fsq_quantize(torch.zeros(4, 2), [8, 5], bound="relu"), ValueError, "bound = 'relu'"),
        (lambda k: k.fsq_quantize_grouped(torch.zeros(4, 5), [8, 5], 2), ValueError, r"\(\.\.\., 2 \* 2\)"),
        (lambda k: k.fsq_quantize_grouped(torch.zeros(4, 4), [8, 5], 0), ValueError, "groups = 0"),
        (lambda k: k.fsq_quantize_grouped(torch.zeros(4, 4), [8, 5], 2.0), ValueError, "groups = 2.0"),
        (lambda k: k.fsq_quantize_residual(torch.zeros(4, 2), [8, 5], 0), ValueError, "quantizers = 0"),
        (
            lambda k: k.fsq_quantize_residual(torch.zeros(4, 2), [2, 5], 2),
            ValueError,
            "need 3 levels or more",
        ),
        (lambda k: k.fsq_quantize_residual(torch.zeros(4, 2), [8, 5], 10), ValueError, r"exceeds 2\^24"),
        (lambda k: k.fsq_dequantize_grouped(torch.tensor(3), [8, 5]), ValueError, "indices: expected shape"),
        (lambda k: k.fsq_dequantize_residual(torch.tensor(3), [8, 5]), ValueError, "indices: expected shape"),
        (
            lambda k: k.fsq_dequantize_residual(torch.zeros(3, 0).int(), [8, 5]),
            ValueError,
            r"shape\[-1\] = 0",
        ),
        (lambda k: k.fsq_dequantize_residual(torch.tensor([[0, 40]]), [8, 5]), ValueError, "found 0 to 40"),
    ],
)
def test_bad_bounds_groups_and_stages_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(scamo_kernels)


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
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_debug_mode_looks_at_the_indices_on_a_gpu(monkeypatch, impl):
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"indices: expected 0 to 39 for levels \[8, 5\], found 3 to 40"):
        scamo_kernels.fsq_dequantize(torch.tensor([3, 40], device="cuda"), (8, 5), impl=impl)


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
