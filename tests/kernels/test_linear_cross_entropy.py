"""The chunked linear cross-entropy: losses and both gradients against float64, and what it may cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference

RELATIVE = 5e-6  # of the largest entry, float32
# Rows, width, classes: one of each, odd, below, at and above the interpreter's step of 128 columns.
SHAPES = [(1, 1, 1), (5, 7, 2), (9, 20, 127), (10, 20, 128), (21, 36, 129), (41, 24, 517)]
IMPLS = ["torch", "interpreter"]


def name(shape) -> str:
    return "S{}-C{}-V{}".format(*shape)


def inputs(rows: int, width: int, classes: int, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """hidden, weight (representable in `dtype`, given as float64) and targets int64."""
    generator = torch.Generator().manual_seed(rows + 1000 * classes)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return hidden.to(dtype).double(), weight.to(dtype).double(), targets


SCALE = torch.tensor(0.375)


def plain(hidden, weight, targets, dtype=torch.float64) -> list[torch.Tensor]:
    """sum, losses, d hidden, d weight for the cotangent SCALE, from torch's own functions in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    logits = F.linear(*leaves)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    losses = F.cross_entropy(logits, targets.long(), reduction="none")
    grads = torch.autograd.grad(losses.sum(), leaves, SCALE.to(losses))
    return [losses.sum().detach(), losses.detach(), *grads]


def close(actual, expected, limit: float) -> None:
    assert actual.shape == expected.shape
    floor = 1e-12  # one class: every loss is 0
    difference = (actual.cpu().double() - expected.cpu().double()).abs().max()
    assert difference <= limit * expected.abs().max() + floor


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(run, impl, shape):
    hidden, weight, targets = inputs(*shape)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    total, losses = reference.linear_cross_entropy(*leaves, targets)
    expected = [total.detach(), losses, *torch.autograd.grad(total, leaves, SCALE.double())]
    for a, e in zip(plain(hidden, weight, targets), expected, strict=True):
        close(a, e, 1e-12)
    for chunk in (None, 7, 64) if impl == "interpreter" else (None, 1, 7, 64, 1000):
        outputs, grads = run(
            impl,
            "linear_cross_entropy",
            hidden.float(),
            weight.float(),
            targets if chunk else targets.int(),
            chunk=chunk,
            differentiate=(0, 1),
            cotangent=SCALE,
        )
        assert outputs[0].dtype == outputs[1].dtype == torch.float32
        for a, e in zip([*outputs, *grads], expected, strict=True):
            close(a, e, RELATIVE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 16])
def test_half_precision_errs_less_than_twice_torch_s(run, impl, dtype, chunk):
    if impl == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates bfloat16")
    hidden, weight, targets = inputs(41, 24, 517, dtype)
    exact = plain(hidden, weight, targets)
    theirs = plain(hidden, weight, targets, dtype)
    outputs, grads = run(
        impl,
        "linear_cross_entropy",
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        chunk=chunk,
        differentiate=(0, 1),
        cotangent=SCALE,
    )
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    for ours, other, e in zip([*outputs, *grads], theirs, exact, strict=True):
        assert ours.dtype == other.dtype
        allowed = 2 * (other.double() - e).abs().max() + RELATIVE * e.abs().max()
        assert (ours.double() - e).abs().max() <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(run, impl):
    """A softmax without its maximum taken off would overflow."""
    hidden, weight, targets = inputs(9, 8, 300)
    expected = plain(hidden * 300, weight, targets)
    outputs, grads = run(
        impl,
        "linear_cross_entropy",
        (hidden * 300).float(),
        weight.float(),
        targets,
        differentiate=(0, 1),
        cotangent=SCALE,
    )
    for a, e in zip([*outputs, *grads], expected, strict=True):
        # Logits near 3000 are off by 2e-4 in float32, and so are probabilities.
        close(a, e, 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("differentiate", [(), (0,), (1,)], ids=str)
def test_gradients_that_nobody_wants_are_not_made(run, impl, differentiate):
    hidden, weight, targets = (t.float() if t.is_floating_point() else t for t in inputs(15, 20, 127))
    full, grads = run(
        impl, "linear_cross_entropy", hidden, weight, targets, differentiate=(0, 1), cotangent=SCALE
    )
    some, (*one,) = run(
        impl,
        "linear_cross_entropy",
        hidden,
        weight,
        targets,
        differentiate=differentiate,
        cotangent=SCALE,
    )
    assert torch.equal(full[0], some[0])
    assert torch.equal(full[1], some[1])
    assert len(one) == len(differentiate)
    for i, grad in zip(differentiate, one, strict=True):
        assert torch.equal(grad, grads[i])


def test_only_the_sum_is_differentiable_and_twice():
    hidden, weight, targets = inputs(20, 8, 30)
    hidden.requires_grad_()
    total, losses = scamo_kernels.linear_cross_entropy(hidden, weight, targets)
    assert not losses.requires_grad
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])
    with torch.no_grad():
        assert not scamo_kernels.linear_cross_entropy(hidden, weight, targets)[0].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(run, impl):
    outputs, grads = run(
        impl,
        "linear_cross_entropy",
        torch.zeros(0, 4),
        torch.ones(9, 4),
        torch.zeros(0, dtype=torch.int64),
        differentiate=(0, 1),
        cotangent=SCALE,
    )
    assert outputs[0].tolist() == 0
    assert outputs[1].shape == (0,)
    assert grads[0].shape == (0, 4)
    assert torch.equal(grads[1], torch.zeros(9, 4))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(run, impl):
    hidden, weight, targets = (t.float() if t.is_floating_point() else t for t in inputs(15, 20, 127))
    results = [
        run(impl, "linear_cross_entropy", *arguments, differentiate=(0, 1), cotangent=SCALE)
        for arguments in (
            (hidden, weight, targets),
            (
                torch.cat((hidden, hidden), 1)[:, :20],
                weight.T.contiguous().T,
                torch.stack((targets, targets), 1)[:, 0],
            ),
        )
    ]
    for a, b in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]], strict=True):
        close(a, b, RELATIVE)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(run, impl):
    hidden, weight, targets = (t.float() if t.is_floating_point() else t for t in inputs(20, 20, 300))
    first, second = (
        run(
            impl,
            "linear_cross_entropy",
            hidden,
            weight,
            targets,
            chunk=8,
            differentiate=(0, 1),
            cotangent=SCALE,
        )
        for _ in range(2)
    )
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


# Rows 1 and 2 have no such class; only they may come out as NaN.
MISSING = """
import torch
from {module} import {function} as softmax_loss_
torch.manual_seed(0)
logits, losses = torch.randn(4, 300), torch.empty(4)
expected = torch.nn.functional.cross_entropy(logits[[0, 3]], torch.tensor([299, 0]), reduction="none")
p = torch.softmax(logits[0], -1)
p[299] -= 1
softmax_loss_(logits, torch.tensor([299, 300, -1, 0]), losses, True)
assert losses[[1, 2]].isnan().all() and logits[[1, 2]].isnan().all()
assert torch.allclose(losses[[0, 3]], expected, rtol=1e-5)
assert torch.allclose(logits[0], p, atol=1e-6) and not logits[3].isnan().any()
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("scamo_kernels.linear_cross_entropy", "_softmax_loss_"),
        ("scamo_kernels._linear_cross_entropy_triton", "softmax_loss_"),
    ],
)
def test_a_class_that_does_not_exist_is_nan_where_nothing_looks(environment, module, function):
    pytest.importorskip("triton")
    program = MISSING.format(module=module, function=function)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("device", "limit"), [("cuda", 1 << 30), ("cpu", 1 << 26)])
@pytest.mark.parametrize("classes", [240, 65537, 1 << 28])
def test_a_chunk_keeps_to_its_budget(device, limit, classes):
    from scamo_kernels.linear_cross_entropy import chunk_rows

    rows = chunk_rows(torch.device(device), classes * 2)
    assert rows == 1 or rows * classes * 2 <= limit
    assert rows < 64 or rows % 64 == 0
    assert rows == 1 or (rows + 64) * classes * 2 > limit


def test_gradcheck():
    hidden, weight, targets = inputs(5, 4, 9)
    assert torch.autograd.gradcheck(
        lambda h, w: scamo_kernels.linear_cross_entropy(h, w, targets, chunk=2)[0],
        (hidden.requires_grad_(), weight.requires_grad_()),
        fast_mode=True,
    )


def step(hidden, weight, targets):
    total, losses = scamo_kernels.linear_cross_entropy(hidden * 2, weight, targets)
    return total / targets.shape[0], losses


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (5, 9, 2):
        results = []
        for function in (step, compiled):
            hidden, weight, targets = inputs(rows, 8, 33)
            leaves = [t.float().to(device).requires_grad_() for t in (hidden, weight)]
            loss, losses = function(*leaves, targets.to(device))
            results.append([loss.detach(), losses, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden: expected shape \(S, C\), got \(3,\)"),
        ({"hidden": torch.zeros(3, 4).int()}, TypeError, "hidden: expected a floating-point tensor"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight: expected shape \(V, 4\), got \(9, 5\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: expected shape \(V, 4\), got \(0, 4\)"),
        ({"weight": torch.zeros(9, 4).half()}, TypeError, "weight: expected hidden's dtype torch.float32"),
        ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "weight: expected hidden's device cpu"),
        ({"targets": torch.zeros(3)}, TypeError, "targets: expected int32 or int64, got torch.float32"),
        ({"targets": torch.zeros(2).long()}, ValueError, r"targets: expected shape \(3,\), got \(2,\)"),
        ({"targets": torch.zeros(3, device="meta").long()}, ValueError, "targets: expected hidden's device"),
        ({"targets": torch.tensor([0, 9, 1])}, ValueError, "targets: expected 0 to 8, row 1 holds 9"),
        ({"targets": torch.tensor([0, 8, -1])}, ValueError, "targets: expected 0 to 8, row 2 holds -1"),
        ({"chunk": 0}, ValueError, "chunk = 0: expected at least 1 row"),
        ({"impl": "cuda"}, ValueError, "impl = 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, kind, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.zeros(3).long()}
    with pytest.raises(kind, match=message):
        scamo_kernels.linear_cross_entropy(**(arguments | changes))


def test_what_triton_does_not_take_is_named(run):
    with pytest.raises(RuntimeError, match='TypeError: hidden: impl = "triton" does not take float64'):
        run("interpreter", "linear_cross_entropy", *inputs(5, 4, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (200, 64, 8192), (300, 128, 65537)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("chunk", [None, 50])
def test_errs_less_than_twice_torch_s_on_a_gpu(run, impl, shape, dtype, chunk):
    hidden, weight, targets = (t.cuda() for t in inputs(*shape, dtype))
    exact = plain(hidden, weight, targets)
    theirs = plain(hidden, weight, targets, dtype)
    arguments = hidden.to(dtype), weight.to(dtype), targets
    results = []
    for _ in range(2):
        outputs, grads = run(
            impl,
            "linear_cross_entropy",
            *arguments,
            chunk=chunk,
            differentiate=(0, 1),
            cotangent=SCALE.cuda(),
        )
        results.append([*outputs, *grads])
    for ours, again, other, e in zip(*results, theirs, exact, strict=True):
        assert torch.equal(ours, again)
        allowed = 2 * (other.double() - e).abs().max() + RELATIVE * e.abs().max() + 1e-12
        assert (ours.double() - e).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_waits_for_the_gpu_and_missing_classes_are_nan(impl):
    hidden, weight, targets = (t.cuda() for t in inputs(70, 36, 129))
    leaves = [t.float().requires_grad_() for t in (hidden, weight)]
    targets[3] = 129
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, losses = scamo_kernels.linear_cross_entropy(*leaves, targets, chunk=20, impl=impl)
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.isnan()
    assert losses.isnan().nonzero().tolist() == [[3]]
    assert leaves[0].grad[3].isnan().all()
    assert not leaves[0].grad[4].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_memory_on_a_gpu(impl):
    """16,384 scored rows over 65,537 classes: several chunks, at most 2 GiB beside inputs and gradients."""
    hidden = torch.randn(16_384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(65_537, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 65_537, (16_384,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scamo_kernels.linear_cross_entropy(hidden, weight, targets, impl=impl)[0].backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2 << 30


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")
