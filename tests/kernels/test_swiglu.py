"""SwiGLU's gate: output and gradient against float64."""

from __future__ import annotations

import sys

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

RELATIVE = 2e-6  # of the largest entry, float32
# Rows and hidden widths: one, odd, no power of two, wider than a program's tile, the paper's.
SHAPES = [(1, 1), (3, 7), (111, 100), (63, 260), (9, 1028), (5, 2736)]
IMPLS = ["torch", "interpreter"]


def name(shape) -> str:
    return f"N{shape[0]}-H{shape[1]}"


def inputs(rows: int, hidden: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up (N, 2 H) and a cotangent (N, H), representable in `dtype`, given as float64."""
    generator = torch.Generator().manual_seed(rows * 10_000 + hidden)
    gate_up = torch.randn(rows, 2 * hidden, generator=generator, dtype=torch.float64) * 3
    grad = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    return gate_up.to(dtype).double(), grad.to(dtype).double()


def exact(gate_up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = gate_up.clone().requires_grad_()
    out = reference.swiglu(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def close(actual, expected, limit: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.cpu().double() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, shape):
    gate_up, grad = inputs(*shape)
    (out,), (d_gate_up,) = run(impl, "swiglu", gate_up.float(), differentiate=(0,), cotangent=grad.float())
    for a, e in zip((out, d_gate_up), exact(gate_up, grad), strict=True):
        close(a, e, RELATIVE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(run, impl, dtype):
    if impl == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates bfloat16")
    gate_up, grad = inputs(111, 100, dtype)
    (out,), (d_gate_up,) = run(
        impl, "swiglu", gate_up.to(dtype), differentiate=(0,), cotangent=grad.to(dtype)
    )
    assert out.dtype == d_gate_up.dtype == dtype
    for a, e in zip((out, d_gate_up), exact(gate_up, grad), strict=True):
        # One rounding of the result; PyTorch's own ops round what stands between them too.
        roundings = 2 if impl == "torch" else 1
        close(a, e, roundings * torch.finfo(dtype).eps / 2 + RELATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_change_no_bit(run, monkeypatch, dtype):
    gate_up, grad = (x.to(dtype) for x in inputs(111, 100))
    whole = run("torch", "swiglu", gate_up, differentiate=(0,), cotangent=grad)
    monkeypatch.setattr(sys.modules["scamo_kernels.swiglu"], "_CPU_BLOCK", 20 * 200)
    (out,), (d_gate_up,) = run("torch", "swiglu", gate_up, differentiate=(0,), cotangent=grad)
    assert torch.equal(out, whole[0][0])
    assert torch.equal(d_gate_up, whole[1][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_gates(run, impl):
    """Far from zero silu is the gate itself or nothing, and its gradient 1 or 0; no overflow shows."""
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]])
    (out,), (grad,) = run(impl, "swiglu", gate_up, differentiate=(0,), cotangent=torch.ones(1, 5))
    assert out.tolist() == [[0, 0, 0, 800, 50_000]]
    assert grad.tolist() == [[0, 0, 1.5, 4, 5, 0, 0, 0, 200, 10_000]]


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_strides(run, impl):
    gate_up = inputs(24, 10)[0].float()
    (whole,), _ = run(impl, "swiglu", gate_up)
    for shape in ((2, 3, 4), (24, 1)):
        (out,), _ = run(impl, "swiglu", gate_up.reshape(*shape, 20))
        assert torch.equal(out, whole.reshape(*shape, 10))
    (out,), _ = run(impl, "swiglu", gate_up[5])
    assert torch.allclose(out, whole[5], rtol=1e-6)
    plain = run(impl, "swiglu", gate_up, differentiate=(0,), cotangent=torch.ones(24, 10))
    for strided in (torch.cat((gate_up, gate_up), 1)[:, :20], gate_up.T.contiguous().T):
        spread = torch.ones(1, 1).expand(24, 10)
        (out,), (grad,) = run(impl, "swiglu", strided, differentiate=(0,), cotangent=spread)
        assert torch.allclose(out, plain[0][0], rtol=1e-6)
        assert torch.allclose(grad, plain[1][0], rtol=1e-6, atol=1e-6)
    (out,), (grad,) = run(impl, "swiglu", gate_up[:0], differentiate=(0,), cotangent=torch.ones(0, 10))
    assert out.shape == (0, 10)
    assert grad.shape == (0, 20)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    gate_up, grad = (t.float() for t in inputs(63, 260))
    first, second = (run(impl, "swiglu", gate_up, differentiate=(0,), cotangent=grad) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


def test_gradcheck():
    gate_up = inputs(5, 6)[0].requires_grad_()
    assert torch.autograd.gradcheck(scamo_kernels.swiglu, (gate_up,), fast_mode=True)


def step(gate_up):
    return scamo_kernels.swiglu(gate_up * 2).square().sum()


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (5, 9, 2):
        results = []
        for function in (step, compiled):
            leaf = inputs(rows, 8)[0].float().to(device).requires_grad_()
            loss = function(leaf)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.parametrize(
    ("gate_up", "impl", "kind", "message"),
    [
        (
            torch.zeros(3, 4, dtype=torch.int32),
            "auto",
            TypeError,
            "gate_up: expected a floating-point tensor",
        ),
        (torch.zeros(()), "auto", ValueError, r"gate_up: expected shape \(\.\.\., 2 hidden\), got \(\)"),
        (torch.zeros(3, 5), "auto", ValueError, r"got \(3, 5\)"),
        (torch.zeros(3, 0), "auto", ValueError, r"got \(3, 0\)"),
        (torch.zeros(3, 4), "cuda", ValueError, "impl = 'cuda'"),
    ],
)
def test_bad_arguments_are_named(gate_up, impl, kind, message):
    with pytest.raises(kind, match=message):
        scamo_kernels.swiglu(gate_up, impl=impl)


def test_what_triton_does_not_take_is_named(run):
    with pytest.raises(RuntimeError, match='TypeError: gate_up: impl = "triton" does not take float64'):
        run("interpreter", "swiglu", torch.zeros(2, 4).double())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 2736), (3000, 8536)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(run, impl, shape, dtype):
    gate_up, grad = inputs(*shape, dtype)
    (out,), (d_gate_up,) = run(
        impl, "swiglu", gate_up.to("cuda", dtype), differentiate=(0,), cotangent=grad.to("cuda", dtype)
    )
    limit = RELATIVE if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + RELATIVE
    for a, e in zip((out, d_gate_up), exact(gate_up, grad), strict=True):
        close(a, e, limit)


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")
