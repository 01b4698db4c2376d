"""Other lengths compile nothing: so says Triton's own cache, on a driver that claims a GPU and has none.

As a script (the interpreter must be off and the compiler replaced in the process) it calls every Triton
implementation with many lengths, and writes which kernels each call would have compiled.
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import scamo_kernels
import torch

OPS = torch.ops.scamo_kernels
LEVELS = [8, 8, 8, 5, 5, 5]
# One row, multiples of 16 and their neighbours; more than one program's rows, more than the most programs.
ROWS = (24, 1, 2, 15, 16, 17, 48, 255, 256, 508, 512, 1000, 9001)
# (heads, head_dim); of the last a token's bytes are no multiple of 16.
SHAPES = ((16, 64), (32, 100), (3, 4))
DTYPES = (torch.bfloat16, torch.float32)

# What to call, and with what in turn: the first call may compile, the others may not.
Case = tuple[Callable[..., object], list[tuple]]


def differentiate(function: Callable, *inputs: torch.Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs], allow_unused=True)


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention_cases() -> Iterator[tuple[str, Case]]:
    from scamo_kernels import _attention_triton as kernels

    def attention(dtype, shape, prefix, lengths):
        first = [n // 2 for n in lengths] if prefix else [i + 1 for n in lengths for i in range(n)]
        rest = starts(lengths), torch.tensor(first, dtype=torch.int32), prefix, max(lengths), 0.3, "triton"
        q, k, v = empty(dtype, 3, sum(lengths), *shape)
        differentiate(lambda *qkv: OPS.attention(*qkv, *rest), q.clone(), k.clone(), v.clone())

    def rotary(dtype, shape, lengths):
        qkv, rope = empty(dtype, sum(lengths), 3, *shape), torch.empty(max(lengths), shape[1] // 2, 2)
        prefix = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
        rest = rope, starts(lengths), prefix, max(lengths), 0.3
        OPS.rotary_attention(qkv, *rest, False, "triton")
        differentiate(lambda qkv: OPS.rotary_attention(qkv, *rest, True, "triton"), qkv)

    ends = [0, *kernels.LENGTHS[:-1], kernels.LENGTHS[-2] + 301]
    for low, high in itertools.pairwise(ends):
        longest = high - 7, low + 1, low + 16, high - 1, high
        batches = [(n, *rest) for n in longest for rest in ((n, 3), (), (1,), (16, 0, n), (15, 1) * 8)]
        for dtype, shape in [(torch.float32, SHAPES[0]), *((torch.bfloat16, shape) for shape in SHAPES)]:
            name = f"H{shape[0]}-D{shape[1]}-{dtype}-L{low + 1}to{high}"
            yield f"prefix-{name}", (attention, [(dtype, shape, True, x) for x in batches])
            yield f"bounds-{name}", (attention, [(dtype, shape, False, x) for x in batches])
            yield f"rotary-{name}", (rotary, [(dtype, shape, x) for x in batches])


def decode_cases() -> Iterator[tuple[str, Case]]:
    def decode(dtype, shape, rows, capacity):
        qkv = empty(dtype, rows, 3, *shape)
        caches = [empty(dtype, rows, shape[0], capacity, shape[1]) for _ in "kv"]
        # Of a tensor with more in it: aligned or not, as the rows have it.
        lengths = torch.zeros(2, rows, dtype=torch.int32)[1]
        OPS.decode_attention(qkv, *caches, lengths, torch.empty(capacity, shape[1]), 0.3, "triton")

    # One split of the cache, or several.
    for capacities in ((24, 1, 16, 127, 200, 256), (257, 272, 500, 512, 513)):
        lengths = list(itertools.product((3, 1, 2, 16, 17), capacities))
        for dtype, shape in itertools.product(DTYPES, SHAPES):
            name = f"decode-H{shape[0]}-D{shape[1]}-{dtype}-C{capacities[-1]}"
            yield name, (decode, [(dtype, shape, *x) for x in lengths])


def other_cases() -> Iterator[tuple[str, Case]]:
    def fsq(dtype, stages, rows):
        indices = torch.zeros((rows,) if stages == 1 else (rows, stages), dtype=torch.int32)
        z = empty(dtype, rows, len(LEVELS))
        differentiate(lambda z: OPS.fsq_quantize(z, LEVELS, "triton", "tanh", stages)[0], z)
        OPS.fsq_dequantize(indices, LEVELS, dtype, "triton", stages)

    def bsq(dtype, rows):
        differentiate(lambda z: OPS.bsq_quantize(z, "triton")[0], empty(dtype, rows, 24))
        OPS.bsq_dequantize(torch.zeros(rows, dtype=torch.int32), 24, dtype, "triton")

    def fsq_project(dtype, rows):
        channels, width = len(LEVELS), 512
        shapes = (rows, width), (channels, width), (channels,), (width, channels), (width,)
        tensors = [empty(dtype, *shape) for shape in shapes]
        differentiate(lambda *x: OPS.fsq_project(*x, LEVELS, "tanh", "triton")[0], *tensors)

    def histogram(dtype, rows):
        OPS.code_histogram(torch.zeros(rows, dtype=dtype), rows, "triton")

    def rms_norm(dtype, rows):
        x, weight = empty(dtype, rows, 1024), empty(dtype, 1024)
        differentiate(lambda x, w: OPS.rms_norm(x, w, 1e-5, "triton")[0], x, weight)
        differentiate(lambda x, w: OPS.add_rms_norm(x, x, w, 1e-5, "triton")[:2], x, weight)

    def swiglu(dtype, rows):
        differentiate(lambda x: OPS.swiglu(x, "triton"), empty(dtype, rows, 2 * 96))

    def loss(dtype, chunk, train, rows):
        tensors = torch.zeros(rows, 8, dtype=dtype), torch.zeros(999, 8, dtype=dtype)
        targets = torch.zeros(rows, dtype=torch.int64)
        OPS.linear_cross_entropy(*tensors, targets, chunk, train, train, "triton")

    for dtype in DTYPES:
        for op in (bsq, fsq_project, rms_norm, swiglu):
            yield f"{op.__name__}-{dtype}", (op, [(dtype, rows) for rows in ROWS])
        for stages in (1, 3):
            yield f"fsq-{dtype}-{stages}", (fsq, [(dtype, stages, rows) for rows in ROWS])
        # Chunks of 7 rows begin at other alignments than whole ones.
        for chunk, train in itertools.product((0, 64, 7), (False, True)):
            calls = [(dtype, chunk, train, rows) for rows in ROWS[:-1]]
            yield f"linear_cross_entropy-{dtype}-{chunk}-{train}", (loss, calls)
    for dtype in (torch.int32, torch.int64):
        yield f"histogram-{dtype}", (histogram, [(dtype, rows) for rows in ROWS])


def width_cases() -> Iterator[tuple[str, Case]]:
    """What does compile again, so that the counter is seen to count."""

    def swiglu(width):
        OPS.swiglu(empty(torch.bfloat16, 5, 2 * width), "triton")

    yield "widths", (swiglu, [(96,), (96,), (100,)])


def main(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    names = [m.name for m in pkgutil.iter_modules(scamo_kernels.__path__) if m.name.endswith("_triton")]
    kernels = {
        f"{name}.{key}": value
        for name in names
        for key, value in vars(importlib.import_module(f"scamo_kernels.{name}")).items()
        if isinstance(value, JITFunction) and key.endswith("_kernel")
    }
    compiled: list[str] = []
    binary = SimpleNamespace(
        function=None, packed_metadata=None, run=lambda *_: None, launch_metadata=lambda *_: None
    )

    def compile(source, **_):
        compiled.extend(name for name, kernel in kernels.items() if kernel is source.fn)
        return binary

    triton.compiler.compile = compile
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    torch.cuda.get_device_capability = lambda *_: divmod(arch, 10)
    results: dict[str, list[list[str]]] = {}
    for name, (function, calls) in itertools.chain(
        attention_cases(), decode_cases(), other_cases(), width_cases()
    ):
        for kernel in kernels.values():
            kernel.device_caches.clear()
        results[name] = []
        for arguments in calls:
            function(*arguments)
            results[name].append(compiled.copy())
            compiled.clear()
    json.dump({"kernels": list(kernels), "compiled": results}, sys.stdout)


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def counted(request, environment) -> dict:
    pytest.importorskip("triton")
    command = [sys.executable, __file__, str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_other_lengths_compile_nothing(counted):
    widths = counted["compiled"].pop("widths")
    assert widths == [["_swiglu_triton.forward_kernel"], [], ["_swiglu_triton.forward_kernel"]]
    again = {}
    for name, calls in counted["compiled"].items():
        assert calls[0], name
        if any(calls[1:]):
            again[name] = [(i, names) for i, names in enumerate(calls) if i and names]
    assert not again, "\n".join(f"{name}: {calls}" for name, calls in again.items())
    first = {kernel for calls in counted["compiled"].values() for kernel in calls[0]}
    assert first == set(counted["kernels"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
