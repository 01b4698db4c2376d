"""RMS normalisation, alone and after an addition: outputs and all gradients against float64.

As a script, `test_rms_norm.py IN OUT` runs `both` on saved arguments, so that the Triton interpreter of
another process can.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

RELATIVE = 2e-6  # of the largest entry, float32
# Rows and widths: one, odd, no power of two, the paper's models, more rows than a program's tile.
SHAPES = [(1, 5), (3, 7), (111, 100), (63, 260), (70, 64), (9, 3200), (2, 4096)]
IMPLS = ["torch", "interpreter"]
EPS = 1e-3  # large enough to matter


def name(shape) -> str:
    return f"N{shape[0]}-C{shape[1]}"


def inputs(rows: int, width: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, residual, two cotangents (N, C) and a weight (C,); representable in `dtype`, given as float64."""
    generator = torch.Generator().manual_seed(rows * 10_000 + width)
    x, residual, grad, further = torch.randn(4, rows, width, generator=generator, dtype=torch.float64)
    weight = 1 + torch.randn(width, generator=generator, dtype=torch.float64) / 2
    return [t.to(dtype).double() for t in (x * 3, residual, grad, further, weight)]


def both(x, residual, weight, grads, impl: str) -> list[torch.Tensor]:
    """add_rms_norm's outputs, and the gradients of its inputs when both outputs have one."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    if impl == "reference":
        outputs = reference.add_rms_norm(*leaves, EPS)
    else:
        outputs = scamo_kernels.add_rms_norm(*leaves, eps=EPS, impl=impl)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


def close(actual, expected, limit: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.cpu().double() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, shape):
    x, residual, grad, _, weight = inputs(*shape)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = reference.rms_norm(*leaves, EPS)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    single = [t.float() for t in (x, weight)]
    (out,), grads = run(impl, "rms_norm", *single, eps=EPS, differentiate=(0, 1), cotangent=grad.float())
    close(out, expected.detach(), RELATIVE)
    for a, e in zip(grads, expected_grads, strict=True):
        close(a, e, RELATIVE)

    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    expected, total = reference.add_rms_norm(*leaves, EPS)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    single = [t.float() for t in (x, residual, weight)]
    (out, got_total), grads = run(
        impl, "add_rms_norm", *single, eps=EPS, differentiate=(0, 1, 2), cotangent=grad.float()
    )
    assert torch.equal(got_total, single[0] + single[1])
    close(out, expected.detach(), RELATIVE)
    close(got_total, total.detach(), RELATIVE)
    for a, e in zip(grads, expected_grads, strict=True):
        close(a, e, RELATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows(monkeypatch, dtype):
    """The same bits but for the weight's gradient, whose sum has another order."""
    x, residual, grad, further, weight = (t.to(dtype) for t in inputs(111, 100))
    whole = both(x, residual, weight, (grad, further), "torch")
    monkeypatch.setattr(sys.modules["scamo_kernels.rms_norm"], "_CPU_BLOCK", 20 * 100)
    *blocks, grad_weight = both(x, residual, weight, (grad, further), "torch")
    for a, b in zip(blocks, whole[:-1], strict=True):
        assert torch.equal(a, b)
    close(grad_weight, whole[-1].double(), RELATIVE if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.fixture(scope="module")
def interpreted(environment, tmp_path_factory):
    """`both` of every shape in float32, by the Triton interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("both")
    cases = []
    for shape in SHAPES:
        x, residual, grad, further, weight = (t.float() for t in inputs(*shape))
        cases.append((x, residual, weight, (grad, further)))
    torch.save(cases, folder / "in.pt")
    command = [sys.executable, __file__, folder / "in.pt", folder / "out.pt"]
    changes = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=changes, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(SHAPES, torch.load(folder / "out.pt", weights_only=True), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_both_outputs_have_gradients(request, impl, shape):
    x, residual, grad, further, weight = inputs(*shape)
    expected = both(x, residual, weight, (grad, further), "reference")
    if impl == "interpreter":
        actual = request.getfixturevalue("interpreted")[shape]
    else:
        single = [t.float() for t in (x, residual, weight)]
        actual = both(*single, (grad.float(), further.float()), impl)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, RELATIVE)
    assert torch.equal(actual[2], actual[3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide_weight", [False, True])
def test_half_precision_is_computed_in_float32(run, impl, dtype, wide_weight):
    if impl == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates bfloat16")
    x, residual, grad, _, weight = inputs(111, 100, dtype)
    weight_dtype = torch.float32 if wide_weight else dtype
    arguments = [x.to(dtype), residual.to(dtype), weight.to(weight_dtype)]
    (out, total), grads = run(
        impl, "add_rms_norm", *arguments, eps=EPS, differentiate=(0, 1, 2), cotangent=grad.to(dtype)
    )
    assert out.dtype == total.dtype == grads[0].dtype == dtype
    assert grads[2].dtype == weight_dtype
    assert torch.equal(total, arguments[0] + arguments[1])
    # From the rounded sum on, one rounding of each result.
    leaves = [total.double().requires_grad_(), weight.clone().requires_grad_()]
    expected = reference.rms_norm(*leaves, EPS)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    half = torch.finfo(dtype).eps / 2 + RELATIVE
    close(out, expected.detach(), half)
    close(grads[0], expected_grads[0], half)
    close(grads[2], expected_grads[1], RELATIVE if wide_weight else half)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_strides(run, impl):
    x, residual, _, _, weight = (t.float() for t in inputs(24, 20))
    (whole, total), _ = run(impl, "add_rms_norm", x, residual, weight)
    for shape in ((2, 3, 4, 20), (24, 1, 20)):
        (out, again), _ = run(impl, "add_rms_norm", x.reshape(shape), residual.reshape(shape), weight)
        assert torch.equal(out, whole.reshape(shape))
        assert torch.equal(again, total.reshape(shape))
    (out,), _ = run(impl, "rms_norm", total[5], weight)
    assert torch.equal(out, whole[5])
    # Rows apart, columns apart, and a cotangent that is one number everywhere.
    apart = torch.cat((x, x), 1)[:, :20]
    across = residual.T.contiguous().T
    ones = torch.ones(1, 1).expand(24, 20)
    results = [
        run(impl, "add_rms_norm", a, b, weight, differentiate=(0, 1, 2), cotangent=c)
        for a, b, c in ((x, residual, torch.ones(24, 20)), (apart, across, ones))
    ]
    for a, b in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    (out, total), grads = run(
        impl, "add_rms_norm", x[:0], x[:0], weight, differentiate=(0, 1, 2), cotangent=x[:0]
    )
    assert out.shape == total.shape == grads[0].shape == (0, 20)
    assert torch.equal(grads[2], torch.zeros(20))


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    x, _, grad, _, weight = (t.float() for t in inputs(111, 100))
    first, second = (run(impl, "rms_norm", x, weight, differentiate=(0, 1), cotangent=grad) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_by_hand():
    """(3, 4) has the root mean square sqrt(12.5); a row of zeros stays one."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    out = scamo_kernels.rms_norm(x, torch.tensor([1.0, 2.0]), eps=0.0)[0]
    assert torch.allclose(out, torch.tensor([3.0, 8.0]) / 12.5**0.5)
    assert torch.equal(scamo_kernels.rms_norm(x, torch.ones(2), eps=1e-5)[1], torch.zeros(2))


def test_agrees_with_torch():
    x, _, _, _, weight = inputs(40, 100)
    expected = torch.nn.functional.rms_norm(x, (100,), weight, EPS)
    assert torch.allclose(scamo_kernels.rms_norm(x, weight, eps=EPS), expected, rtol=1e-12)


def test_the_sum_alone_has_a_gradient():
    x, residual, grad, _, weight = inputs(5, 8)
    x.requires_grad_()
    _, total = scamo_kernels.add_rms_norm(x, residual, weight)
    assert torch.equal(torch.autograd.grad(total, x, grad)[0], grad)


def test_gradcheck():
    x, residual, _, _, weight = (t.requires_grad_() for t in inputs(5, 8))
    assert torch.autograd.gradcheck(
        lambda *t: scamo_kernels.add_rms_norm(*t, eps=EPS), (x, residual, weight), fast_mode=True
    )


def step(x, residual, weight):
    out, total = scamo_kernels.add_rms_norm(x * 2, residual, weight)
    return (scamo_kernels.rms_norm(out + total, weight) * total).square().sum()


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (5, 9, 2):
        results = []
        for function in (step, compiled):
            leaves = [inputs(rows, 8)[i].float().to(device).requires_grad_() for i in (0, 1, 4)]
            loss = function(*leaves)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "x: expected a floating-point tensor"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected shape \(\.\.\., width\), got \(\)"),
        ({"x": torch.zeros(3, 0)}, ValueError, "x: expected shape"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight: expected shape \(4,\), got \(5,\)"),
        ({"weight": torch.zeros(1, 4)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(4).half()}, TypeError, "weight: expected x's dtype torch.float32 or float32"),
        ({"weight": torch.zeros(4, device="meta")}, ValueError, "weight: expected x's device cpu, got meta"),
        ({"residual": torch.zeros(2, 4)}, ValueError, r"residual: expected x's shape \(3, 4\)"),
        ({"residual": torch.zeros(3, 4).half()}, TypeError, "residual: expected x's dtype"),
        ({"residual": torch.zeros(3, 4, device="meta")}, ValueError, "residual: expected x's device cpu"),
        ({"eps": -1.0}, ValueError, "eps = -1.0: expected 0 or more"),
        ({"eps": float("nan")}, ValueError, "eps = nan"),
        ({"impl": "cuda"}, ValueError, "impl = 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, kind, message):
    arguments = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": torch.zeros(4)} | changes
    with pytest.raises(kind, match=message):
        scamo_kernels.add_rms_norm(**arguments)
    if "residual" not in changes:
        del arguments["residual"]
        with pytest.raises(kind, match=message):
            scamo_kernels.rms_norm(**arguments)


def test_what_triton_does_not_take_is_named(run):
    with pytest.raises(RuntimeError, match='TypeError: x: impl = "triton" does not take float64'):
        run("interpreter", "rms_norm", torch.zeros(2, 4).double(), torch.zeros(4).double())
    with pytest.raises(RuntimeError, match='ValueError: x: impl = "triton" takes widths to 8192, got 8193'):
        run("interpreter", "rms_norm", torch.zeros(1, 8193), torch.zeros(8193))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 1024), (3000, 3200), (7, 8192)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_float64_on_a_gpu(impl, shape, dtype):
    x, residual, grad, further, weight = inputs(*shape, dtype)
    single = [t.to("cuda", dtype) for t in (x, residual, weight)]
    actual = both(*single, (grad.to("cuda", dtype), further.to("cuda", dtype)), impl)
    again = both(*single, (grad.to("cuda", dtype), further.to("cuda", dtype)), impl)
    total = actual[1].cpu().double()
    rounded = both(total, torch.zeros_like(total), weight, (grad, further), "reference")
    limit = RELATIVE if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + RELATIVE
    for a, b, e in zip(actual, again, rounded, strict=True):
        close(a, e, limit)
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_wide_rows_on_a_gpu_are_left_to_torch():
    x, weight = torch.randn(3, 10_000, device="cuda"), torch.ones(10_000, device="cuda")
    expected = reference.rms_norm(x.double(), weight.double())
    close(scamo_kernels.rms_norm(x, weight), expected.cpu(), RELATIVE)


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")


def main(source: str, destination: str) -> None:
    # Uninitialised tensors are filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.save([both(*case, "triton") for case in torch.load(source, weights_only=True)], destination)


if __name__ == "__main__":
    main(*sys.argv[1:])
