"""Bitwise spherical quantisation: against float64, by hand, and against the field's own package."""

from __future__ import annotations

import math

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

RELATIVE = 1e-5  # of the largest entry, float32
CHANNELS = [1, 2, 3, 7, 16, 24, 31, 32]
IMPLS = ["torch", "interpreter"]


def latents(channels: int, rows: int = 700) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64) * 1.5


def python_bits(z: torch.Tensor) -> list[int]:
    """By Python's integers, and as the int32 of the same bits."""
    words = [sum(2**i for i, x in enumerate(row) if x > 0) for row in z.tolist()]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def python_gradient(z: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The rows' Jacobian (I - u u^T) / |z| times the gradient of u, in float64."""
    rows = []
    for x, g in zip(z.double(), grad.double(), strict=True):
        length = math.sqrt(sum(value**2 for value in x.tolist()))
        if length == 0:
            rows.append(torch.zeros_like(x))
            continue
        u = x / length
        rows.append((torch.eye(len(x), dtype=torch.float64) - torch.outer(u, u)) @ g / length)
    return torch.stack(rows)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, channels):
    """Codes and bits exactly, the gradient to float32's rounding; rows of zeros and of small ones too."""
    z = latents(channels)
    z[5], z[6], z[7] = 0.0, z[7].abs() + 1, -z[8].abs() - 1
    z[9] *= 1e-6
    z = z.float()
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    # So that the short row is one of many, not the scale that errors are measured by.
    cotangent[9] *= 1e-6
    exact = z.double().requires_grad_()
    codes, bits = reference.bsq_quantize(exact)
    (grad,) = torch.autograd.grad(codes, exact, cotangent.double())
    (got_codes, got_bits), (got_grad,) = run(impl, "bsq_quantize", z, differentiate=(0,), cotangent=cotangent)
    assert got_bits.dtype == torch.int32
    assert torch.equal(got_bits, bits)
    assert torch.equal(got_codes, codes.detach().float())
    if channels == 1:
        # A point on a line has nowhere to go.
        assert (got_grad == 0).all()
    assert (got_grad - grad).abs().max() <= RELATIVE * max(grad.abs().max().item(), 1e-3)
    assert (got_grad[5] == 0).all()


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_reference_is_its_definition(channels):
    z = latents(channels, 60)
    z[3] = 0
    leaf = z.clone().requires_grad_()
    codes, bits = reference.bsq_quantize(leaf)
    (grad,) = torch.autograd.grad(codes, leaf, z.cos())
    assert torch.allclose(codes.abs(), torch.full_like(z, 1 / math.sqrt(channels)), rtol=1e-15)
    assert torch.equal(codes > 0, z > 0)
    assert bits.tolist() == python_bits(z)
    assert torch.allclose(grad, python_gradient(z, z.cos()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_bits_by_hand(run, impl):
    """Three channels: channel 0 counts 1, channel 2 counts 4, and 0 and -0 count nothing."""
    z = torch.tensor([[0.1, -1.0, 5.0], [0.0, 2.0, -0.0], [0.0, 0.0, 0.0], [1e-40, -1e-40, 3e38]])
    (codes, bits), _ = run(impl, "bsq_quantize", z)
    size = 3**-0.5
    assert bits.tolist() == [5, 2, 0, 5]
    signs = torch.tensor([[1, -1, 1], [-1, 1, -1], [-1, -1, -1], [1, -1, 1]])
    assert torch.equal(codes, signs * torch.tensor(size))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_word_comes_back(run, impl, channels):
    """Bits -> codes -> bits; the first and the last word among them (with 32 channels -2^31 and -1)."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-(2**31), 2**31) if channels == 32 else (0, 2**channels)
    words = torch.randint(low, high, (500,), generator=generator, dtype=torch.int64)
    words[:4] = torch.tensor([low, high - 1, 0, 1])
    words = words.to(torch.int32)
    (codes,), _ = run(impl, "bsq_dequantize", words, channels)
    assert torch.equal(codes, reference.bsq_dequantize(words, channels))
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(words)))
    assert python_bits(codes) == words.tolist()
    (again, found), _ = run(impl, "bsq_quantize", codes * 7)
    assert torch.equal(found, words)
    assert torch.equal(again, codes)


def test_a_code_has_the_same_bits_everywhere():
    """1 / sqrt(d) is rounded the same way by the op, its inverse and the reference, for every d and dtype."""
    for channels in range(1, 33):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            z = latents(channels, 20).to(dtype)
            codes, bits = scamo_kernels.bsq_quantize(z)
            expected, same = reference.bsq_quantize(z)
            assert torch.equal(codes, expected)
            assert torch.equal(bits, same)
            assert torch.equal(scamo_kernels.bsq_dequantize(bits, channels, dtype=dtype), codes)
            assert torch.equal(reference.bsq_dequantize(bits, channels, dtype), codes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(run, impl, dtype):
    if impl == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates bfloat16")
    z = latents(24).to(dtype)
    cotangent = z.cos()
    (codes, bits), (grad,) = run(impl, "bsq_quantize", z, differentiate=(0,), cotangent=cotangent)
    (expected, expected_bits), (expected_grad,) = run(
        impl, "bsq_quantize", z.float(), differentiate=(0,), cotangent=cotangent.float()
    )
    assert codes.dtype == grad.dtype == dtype
    assert torch.equal(bits, expected_bits)
    assert torch.equal(codes, expected.to(dtype))
    assert torch.equal(grad, expected_grad.to(dtype))
    (back,), _ = run(impl, "bsq_dequantize", bits, 24, dtype=dtype)
    assert torch.equal(back, codes)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_square_leaves_the_range_of_float32(run, impl):
    """Rows as long as float32 allows, and as short, have the gradient of a row of length 1 over theirs."""
    unit = latents(24, 10).float()
    cotangent = torch.randn(unit.shape, generator=torch.Generator().manual_seed(1))
    _, (expected,) = run(impl, "bsq_quantize", unit, differentiate=(0,), cotangent=cotangent)
    for exponent in (-100, -60, 60, 100):
        z = unit * 2.0**exponent
        # The gradient stays in range where the cotangent is as long as z.
        (_, bits), (grad,) = run(
            impl, "bsq_quantize", z, differentiate=(0,), cotangent=cotangent * 2.0**exponent
        )
        assert bits.tolist() == python_bits(unit)
        assert (grad - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite(run, impl):
    """A NaN: a NaN code and no bit. An infinity: its sign. Both: a NaN gradient, in their row only."""
    z = torch.tensor([[1.0, math.nan, 2.0], [math.inf, -1.0, 2.0], [-1.0, 2.0, -math.inf], [1.0, 2.0, -3.0]])
    (codes, bits), (grad,) = run(
        impl, "bsq_quantize", z, differentiate=(0,), cotangent=torch.full_like(z, 0.5)
    )
    assert bits.tolist() == [5, 5, 2, 3]
    assert torch.equal(codes.isnan(), z.isnan())
    assert torch.equal(codes > 0, z > 0)
    assert grad[:3].isnan().all()
    assert grad[3].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes(run, impl):
    """Any leading shape and stride, one row, no rows; gradients of views too."""
    whole = latents(24, 24).float()
    cotangent = whole.cos()
    (codes, bits), (grad,) = run(impl, "bsq_quantize", whole, differentiate=(0,), cotangent=cotangent)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        (a, b), (c,) = run(
            impl,
            "bsq_quantize",
            whole.reshape(*shape, 24),
            differentiate=(0,),
            cotangent=cotangent.reshape(*shape, 24),
        )
        assert torch.equal(a, codes.reshape(*shape, 24))
        assert torch.equal(b, bits.reshape(shape))
        assert torch.equal(c, grad.reshape(*shape, 24))
        (a,), _ = run(impl, "bsq_dequantize", b, 24)
        assert torch.equal(a, codes.reshape(*shape, 24))
    (a, b), _ = run(impl, "bsq_quantize", whole[5])
    assert b.shape == ()
    assert b == bits[5]
    (a,), _ = run(impl, "bsq_dequantize", bits[5], 24)
    assert torch.equal(a, codes[5])
    turned = whole.T.contiguous().T, cotangent.T.contiguous().T
    spread = torch.stack([whole, whole + 1], 1)[:, 0], torch.stack([cotangent, cotangent + 1], 1)[:, 0]
    for z, g in (turned, spread):
        (a, b), (c,) = run(impl, "bsq_quantize", z, differentiate=(0,), cotangent=g)
        assert a.is_contiguous()
        assert torch.equal(a, codes)
        assert torch.equal(b, bits)
        assert torch.equal(c, grad)
    (a,), _ = run(impl, "bsq_dequantize", torch.stack([bits, bits + 1], 1)[:, 0], 24)
    assert torch.equal(a, codes)
    (a, b), (c,) = run(impl, "bsq_quantize", whole[:0], differentiate=(0,), cotangent=cotangent[:0])
    assert a.shape == c.shape == (0, 24)
    assert b.shape == (0,)
    (a,), _ = run(impl, "bsq_dequantize", bits[:0].reshape(0, 3), 24)
    assert a.shape == (0, 3, 24)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_every_row_of_a_tile_is_its_own(run, rows):
    """More rows than a program's and fewer; a row's results do not depend on the others."""
    z = latents(24, 200).float()
    (codes, bits), (grad,) = run(
        "interpreter", "bsq_quantize", z[:rows], differentiate=(0,), cotangent=z[:rows].cos()
    )
    expected, same = reference.bsq_quantize(z)
    assert torch.equal(codes, expected[:rows])
    assert torch.equal(bits, same[:rows])
    assert torch.allclose(grad, python_gradient(z[:rows], z[:rows].cos()).float(), rtol=1e-4, atol=1e-6)


def test_large_inputs_go_in_blocks_on_a_cpu():
    z = latents(24, 12_000).float().requires_grad_()
    codes, bits = scamo_kernels.bsq_quantize(z)
    (grad,) = torch.autograd.grad(codes, z, z.detach().cos())
    expected, same = reference.bsq_quantize(z.detach())
    assert torch.equal(codes.detach(), expected)
    assert torch.equal(bits, same)
    (last,) = torch.autograd.grad(scamo_kernels.bsq_quantize(z[-3:])[0], z, z.detach()[-3:].cos())
    assert torch.equal(grad[-3:], last[-3:])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    z = latents(24).float()
    first, second = (run(impl, "bsq_quantize", z, differentiate=(0,), cotangent=z.cos()) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    """The gradient is that of z / |z| where its derivative is taken numerically."""
    z = latents(5, 4)

    def surrogate(z):
        return z / z.norm(dim=1, keepdim=True)

    expected = torch.autograd.functional.jacobian(surrogate, z)
    leaf = z.clone().requires_grad_()
    codes, _ = scamo_kernels.bsq_quantize(leaf)
    rows = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in codes.flatten()]
    assert torch.allclose(torch.stack(rows).view(expected.shape), expected, rtol=1e-10, atol=1e-12)


def test_bits_have_no_gradient_and_unused_codes_none():
    z = latents(24, 5).float().requires_grad_()
    codes, bits = scamo_kernels.bsq_quantize(z)
    assert codes.requires_grad
    assert not bits.requires_grad
    assert torch.autograd.grad(z.sum() + codes.detach().sum(), z)[0].eq(1).all()


@pytest.mark.parametrize("channels", [3, 8])
def test_agrees_with_vector_quantize_pytorch(channels):
    """Its LFQ(spherical=True), whose first channel is the most significant bit; the gradient is u's."""
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.LFQ(codebook_size=2**channels, dim=channels, spherical=True)
    z = latents(channels).float()[None]
    leaf = z.clone().requires_grad_()
    expected, indices, _ = theirs(leaf)
    (expected_grad,) = torch.autograd.grad(expected, leaf, z.cos())
    mine = z.flip(-1).requires_grad_()
    codes, bits = scamo_kernels.bsq_quantize(mine)
    (grad,) = torch.autograd.grad(codes, mine, z.cos().flip(-1))
    assert torch.equal(bits, indices.to(torch.int32))
    assert torch.allclose(codes.flip(-1), expected, atol=1e-6)
    assert torch.allclose(grad.flip(-1), expected_grad, rtol=1e-4, atol=1e-6)
    codes = scamo_kernels.bsq_dequantize(bits, channels)
    assert torch.allclose(codes.flip(-1), theirs.indices_to_codes(indices), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype):
    z = latents(32, 100).float().requires_grad_()
    expected = [*scamo_kernels.bsq_quantize(z), scamo_kernels.bsq_dequantize(torch.arange(9).int(), 32)]
    (expected_grad,) = torch.autograd.grad(expected[0].square().sum() + expected[0].sum(), z)
    with torch.autocast("cpu", dtype):
        found = [*scamo_kernels.bsq_quantize(z), scamo_kernels.bsq_dequantize(torch.arange(9).int(), 32)]
        (grad,) = torch.autograd.grad(found[0].square().sum() + found[0].sum(), z)
    for a, b in zip([*found, grad], [*expected, expected_grad], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda k: k.bsq_quantize(torch.zeros(())), ValueError, r"z: expected shape \(\.\.\., d\)"),
        (lambda k: k.bsq_quantize(torch.zeros(4, 0)), ValueError, r"d from 1 to 32, got \(4, 0\)"),
        (lambda k: k.bsq_quantize(torch.zeros(4, 33)), ValueError, r"d from 1 to 32, got \(4, 33\)"),
        (lambda k: k.bsq_quantize(torch.zeros(4, 2).int()), TypeError, "z: expected a floating-point tensor"),
        (lambda k: k.bsq_quantize(torch.zeros(4, 2), impl="cuda"), ValueError, "impl = 'cuda'"),
        (lambda k: k.bsq_dequantize(torch.zeros(4).long(), 24), TypeError, "bits: expected int32"),
        (lambda k: k.bsq_dequantize(torch.zeros(4), 24), TypeError, "bits: expected int32"),
        (
            lambda k: k.bsq_dequantize(torch.zeros(4).int(), 0),
            ValueError,
            "d = 0: expected an integer from 1",
        ),
        (lambda k: k.bsq_dequantize(torch.zeros(4).int(), 33), ValueError, "d = 33: "),
        (lambda k: k.bsq_dequantize(torch.zeros(4).int(), 24.0), ValueError, "d = 24.0: "),
        (
            lambda k: k.bsq_dequantize(torch.zeros(4).int(), 24, dtype=torch.int32),
            TypeError,
            "dtype: expected a floating-point type",
        ),
        (
            lambda k: k.bsq_dequantize(torch.tensor([3, 2**24]).int(), 24),
            ValueError,
            "bits: expected 0 to 16777215 for d = 24, found 3 to 16777216",
        ),
        (lambda k: k.bsq_dequantize(torch.tensor([-1]).int(), 31), ValueError, "found -1 to -1"),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(scamo_kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_debug_mode_looks_at_the_bits_on_a_gpu(monkeypatch, impl):
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="bits: expected 0 to 7 for d = 3, found 3 to 8"):
        scamo_kernels.bsq_dequantize(torch.tensor([3, 8], device="cuda").int(), 3, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_is_not_finite_on_a_gpu(run, impl):
    z = torch.tensor([[1.0, math.nan, 2.0], [math.inf, -1.0, 2.0], [1e-40, 2e-40, -3e-40], [0.0, 0.0, 0.0]])
    (codes, bits), (grad,) = run(
        impl, "bsq_quantize", z.cuda(), differentiate=(0,), cotangent=torch.full_like(z, 1e-40).cuda()
    )
    assert bits.tolist() == [5, 5, 3, 0]
    assert torch.equal(codes.isnan().cpu(), z.isnan())
    assert grad[:2].isnan().all()
    assert grad[2].isfinite().all()
    assert (grad[3] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(run, impl, channels, dtype):
    z = latents(channels, 20_000).to(dtype)
    z[5] = 0
    exact = z.double().requires_grad_()
    cotangent = exact.detach().cos().to(dtype)
    codes, bits = reference.bsq_quantize(exact)
    (grad,) = torch.autograd.grad(codes, exact, cotangent.double())
    (got_codes, got_bits), (got_grad,) = run(
        impl, "bsq_quantize", z.cuda(), differentiate=(0,), cotangent=cotangent.cuda()
    )
    assert torch.equal(got_bits.cpu(), bits)
    assert torch.equal(got_codes.cpu(), codes.detach().float().to(dtype))
    # One rounding to the output's type.
    limit = max(RELATIVE, torch.finfo(dtype).eps)
    assert (got_grad.cpu().double() - grad).abs().max() <= limit * max(grad.abs().max().item(), 1e-3)
    (back,), _ = run(impl, "bsq_dequantize", got_bits, channels, dtype=dtype)
    assert torch.equal(back, got_codes)
    (again, same), (again_grad,) = run(
        impl, "bsq_quantize", z.cuda(), differentiate=(0,), cotangent=cotangent.cuda()
    )
    assert torch.equal(again, got_codes)
    assert torch.equal(same, got_bits)
    assert torch.equal(again_grad, got_grad)
