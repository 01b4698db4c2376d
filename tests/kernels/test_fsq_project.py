"""FSQ between its projections: against float64, against the ops it fuses, and what ptxas makes of it."""

from __future__ import annotations

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference
from torch import Tensor

RELATIVE = 1e-5  # of the largest entry, float32: 1 - tanh^2 cancels where tanh is near 1
TIE = 1e-5  # a bounded value this near to a half may round either way
SHIPPED = (8, 8, 8, 5, 5, 5)
# (rows, width, levels): rows below, at and above a tile and the tiles of two programs; widths that no tile
# divides; 1 to 8 channels.
SHAPES = [
    ((111,), 100, SHIPPED),
    ((64,), 64, (8, 6, 5)),
    ((2, 33), 512, SHIPPED),
    ((1,), 1, (2,)),
    ((37,), 65, (7, 5, 5, 5, 5, 3, 3, 2)),
    ((5, 1, 7), 1024, (3, 1000)),
]
IMPLS = ["torch", "interpreter"]
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OUTPUTS = ("out", "hidden", "w_in", "b_in", "w_out", "b_out")


def shape_name(shape) -> str:
    rows, width, levels = shape
    return f"B{'x'.join(map(str, rows))}-W{width}-L{'x'.join(map(str, levels))}"


def make(rows, width: int, levels, bound: str = "tanh", dtype=torch.float32, weights=None) -> list[Tensor]:
    """hidden and a cotangent in `dtype`, the weights in `weights`; no row of hidden is near a rounding tie.

    One code that rounds the other way would show in every sum over rows. Order: hidden, w_in, b_in, w_out,
    b_out, cotangent.
    """
    generator = torch.Generator().manual_seed(width + len(levels))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels, count = len(levels), torch.Size(rows).numel()
    parts = [normal(channels, width) * 1.5 * width**-0.5, normal(channels) * 0.3]
    parts = [x.to(weights or dtype) for x in (*parts, normal(width, channels), normal(width))]
    hidden = normal(2 * count + 32, width).to(dtype)
    bounded = reference.fsq_bound(hidden.double() @ parts[0].double().T + parts[1].double(), levels, bound)
    # The float32 error of z grows with the slope of the widest channel.
    limit = TIE * max(1, max(levels) / 10)
    hidden = hidden[((bounded - bounded.floor() - 0.5).abs() > limit).all(1)][:count]
    return [hidden.reshape(*rows, width), *parts, normal(*rows, width).to(dtype)]


def expect(inputs, levels, bound: str = "tanh") -> tuple[Tensor, list[Tensor]]:
    """indices, and out with the five gradients in float64."""
    exact = [x.double().requires_grad_() for x in inputs[:5]]
    out, indices = reference.fsq_project(*exact, levels, bound)
    return indices, [out.detach(), *torch.autograd.grad(out, exact, inputs[5].double())]


def check(run, impl, inputs, levels, bound: str = "tanh", device: str = "cpu") -> None:
    *arguments, cotangent = (x.to(device) for x in inputs)
    (out, indices), grads = run(
        impl, "fsq_project", *arguments, levels, bound=bound, differentiate=range(5), cotangent=cotangent
    )
    expected_indices, expected = expect(inputs, levels, bound)
    assert torch.equal(indices.cpu(), expected_indices)
    for name, x, y, like in zip(OUTPUTS, [out, *grads], expected, [inputs[0], *inputs[:5]], strict=True):
        assert x.dtype == like.dtype, name
        assert x.shape == y.shape, name
        # One rounding to the output's type on top of float32 sums.
        limit = RELATIVE if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
        assert (x.cpu().double() - y).abs().max() <= limit * y.abs().max(), name


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, shape):
    check(run, impl, make(*shape), shape[2])


@pytest.mark.parametrize("bound", ["sigmoid", "mentzer"])
@pytest.mark.parametrize("impl", IMPLS)
def test_other_bounds(run, impl, bound):
    check(run, impl, make((70,), 48, SHIPPED, bound), SHIPPED, bound)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes(run, impl, dtype, weights):
    if impl == "interpreter" and torch.bfloat16 in (dtype, weights):
        pytest.skip("the Triton interpreter truncates bfloat16")
    check(run, impl, make((45,), 72, SHIPPED, dtype=dtype, weights=weights), SHIPPED)


def test_gradcheck_of_the_straight_through_formula():
    """With rounding left out, the gradients are those of the bound; float64, by automatic differentiation."""
    levels = (8, 5)
    inputs = make((9,), 6, levels, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in inputs[:5]]
    z = exact[0] @ exact[1].T + exact[2]
    bounded = reference.fsq_bound(z, levels)
    codes = (bounded + (bounded.round() - bounded).detach()) / torch.tensor([4.0, 2.0])
    expected = torch.autograd.grad(codes @ exact[3].T + exact[4], exact, inputs[5])
    actual = [x.clone().requires_grad_() for x in inputs[:5]]
    out, _ = scamo_kernels.fsq_project(*actual, levels)
    for x, y in zip(torch.autograd.grad(out, actual, inputs[5]), expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_three_ops_it_fuses(run, impl):
    inputs = make((50,), 40, SHIPPED)
    hidden, w_in, b_in, w_out, b_out, _ = inputs
    (out, indices), _ = run(impl, "fsq_project", *inputs[:5], SHIPPED)
    codes, expected = scamo_kernels.fsq_quantize(torch.nn.functional.linear(hidden, w_in, b_in), SHIPPED)
    assert torch.equal(indices, expected)
    expected_out = torch.nn.functional.linear(codes, w_out, b_out)
    assert (out - expected_out).abs().max() <= RELATIVE * expected_out.abs().max()
    assert torch.equal(scamo_kernels.fsq_dequantize(indices, SHIPPED), codes)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    *arguments, cotangent = make((150,), 80, SHIPPED)
    first, second = (
        run(impl, "fsq_project", *arguments, SHIPPED, differentiate=range(5), cotangent=cotangent)
        for _ in range(2)
    )
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(run, impl):
    """Transposed inputs and cotangents: to the bit, but for the order in which a BLAS adds."""
    inputs = make((40,), 24, (8, 6, 5))
    results = []
    for xs in (inputs, [x.mT.contiguous().mT if x.dim() > 1 else x for x in inputs]):
        (out, indices), grads = run(
            impl, "fsq_project", *xs[:5], (8, 6, 5), differentiate=range(5), cotangent=xs[5]
        )
        results.append([out, indices, *grads])
    limit = 0 if impl == "interpreter" else RELATIVE
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= limit * a.abs().max()
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_one_row(run, impl):
    inputs = make((3,), 20, (8, 6, 5))
    empty = inputs[0][:0], *inputs[1:5], inputs[5][:0]
    (out, indices), grads = run(
        impl, "fsq_project", *empty[:5], (8, 6, 5), differentiate=range(5), cotangent=empty[5]
    )
    assert out.shape == (0, 20)
    assert indices.shape == (0,)
    assert indices.dtype == torch.int32
    assert all(not x.any() for x in grads)
    (whole, found), _ = run(impl, "fsq_project", *inputs[:5], (8, 6, 5))
    (out, indices), _ = run(impl, "fsq_project", inputs[0][1], *inputs[1:5], (8, 6, 5))
    assert indices.shape == ()
    assert indices == found[1]
    assert (out - whole[1]).abs().max() <= RELATIVE * whole[1].abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_row(run, impl):
    inputs = make((40,), 24, (8, 6, 5))
    (clean, _), _ = run(impl, "fsq_project", *inputs[:5], (8, 6, 5))
    inputs[0][7, 3] = torch.nan
    (out, _), _ = run(impl, "fsq_project", *inputs[:5], (8, 6, 5))
    assert out[7].isnan().all()
    others = torch.arange(40) != 7
    assert torch.equal(out[others], clean[others])


def test_autocast_changes_nothing():
    *arguments, cotangent = make((30,), 64, SHIPPED)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in arguments]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, indices = scamo_kernels.fsq_project(*leaves, SHIPPED)
            results.append([out.detach(), indices, *torch.autograd.grad(out, leaves, cotangent)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def block(*arguments):
    out, indices = scamo_kernels.fsq_project(*(x * 2 for x in arguments), list(SHIPPED))
    return out.square().sum(), indices


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for rows in (5, 9, 40):
        results = []
        for function in (block, compiled):
            inputs = [x.to(device).requires_grad_() for x in make((rows,), 32, SHIPPED)[:5]]
            loss, indices = function(*inputs)
            results.append([loss.detach(), indices, *torch.autograd.grad(loss, inputs)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "hidden: expected a floating-point"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden: expected shape \(\.\.\., W\)"),
        ({"hidden": torch.zeros(4, 1025)}, ValueError, "W from 1 to 1024"),
        ({"hidden": torch.zeros(4, 0)}, ValueError, "W from 1 to 1024"),
        ({"w_in": torch.zeros(6, 2)}, ValueError, r"w_in: expected shape \(2, 6\), got \(6, 2\)"),
        ({"b_in": torch.zeros(3)}, ValueError, r"b_in: expected shape \(2,\)"),
        ({"w_out": torch.zeros(2, 6)}, ValueError, r"w_out: expected shape \(6, 2\)"),
        ({"b_out": torch.zeros(2)}, ValueError, r"b_out: expected shape \(6,\)"),
        (
            {"b_out": torch.zeros(6, device="meta")},
            ValueError,
            "b_out: expected hidden's device cpu, got meta",
        ),
        ({"w_out": torch.zeros(6, 2).half()}, TypeError, "w_out: expected one floating-point dtype"),
        ({"b_in": torch.zeros(2).int()}, TypeError, "b_in: expected one floating-point dtype"),
        ({"w_in": torch.zeros(2, 6).double()}, TypeError, "w_in: float64 goes with float64 only"),
        ({"levels": [3] * 9}, ValueError, r"levels = .*expected at most 8 channels"),
        ({"levels": [1, 5]}, ValueError, "expected integers from 2 to 1000"),
        ({"bound": "relu"}, ValueError, "bound = 'relu': expected one of 'tanh', 'sigmoid', 'mentzer'"),
        ({"impl": "flash"}, ValueError, "impl = 'flash'"),
    ],
)
def test_bad_arguments_are_named(changes, kind, message):
    arguments = {
        "hidden": torch.zeros(4, 6),
        "w_in": torch.zeros(2, 6),
        "b_in": torch.zeros(2),
        "w_out": torch.zeros(6, 2),
        "b_out": torch.zeros(6),
        "levels": [8, 5],
    }
    with pytest.raises(kind, match=message):
        scamo_kernels.fsq_project(**(arguments | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, ((20_001,), 512, SHIPPED)], ids=shape_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(run, impl, shape, dtype):
    check(run, impl, make(*shape, dtype=dtype), shape[2], device="cuda")
    check(run, impl, make(*shape, dtype=dtype, weights=torch.float32), shape[2], device="cuda")
