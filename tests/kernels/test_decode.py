"""Decode attention against float64, against full attention over a whole decode, and what it must not touch.

As a script this file answers pickled requests under the Triton interpreter, with the caches it wrote: they
are results here, unlike the arguments of the other ops.
"""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from scamo_kernels import decode as decode_module
from scamo_kernels import reference
from scamo_kernels.decode import decode_attention
from torch import Tensor

RELATIVE = 2e-6  # of the largest entry, float32
GPU_RELATIVE = 1e-5  # exp2 is approximate there
IMPLS = ["torch", "interpreter"]
GPU_IMPLS = ["torch", "triton"]
# lengths, heads, head dim, capacity. The interpreter's tiles are 8 keys, its splits 32.
CASES = [
    ((0,), 1, 4, 1),
    ((5, 0, 17), 2, 64, 18),
    ((31, 32, 33, 3), 2, 100, 34),
    ((110, 1, 63), 2, 100, 111),
    ((7, 8, 9, 70), 3, 36, 97),
    ((12, 12), 1, 128, 32),
    ((40, 40, 40), 2, 20, 41),
]
GPU_CASES = [
    ((200, 0, 77, 150), 16, 64, 201),
    ((200, 3, 77), 32, 100, 201),
    ((1500, 255, 256, 257, 0, 4099), 4, 64, 4100),
    ((300, 513), 4, 100, 600),
]


def case_name(case) -> str:
    lengths, heads, head_dim, capacity = case
    return f"B{len(lengths)}-T{capacity}-H{heads}-D{head_dim}"


def rope_table(positions: int, head_dim: int) -> Tensor:
    """float64 (positions, D): cosine and sine of each pair."""
    angle = torch.outer(torch.arange(positions).double(), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angle.cos(), angle.sin()), -1).flatten(1)


def problem(case, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """qkv, cache_k, cache_v, lengths, rope. What the caches hold beyond the lengths is NaN."""
    lengths, heads, head_dim, capacity = case
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(len(lengths), 3 * heads * head_dim, generator=generator).to(dtype)
    caches = torch.randn(2, len(lengths), heads, capacity, head_dim, generator=generator).to(dtype)
    held = torch.tensor(lengths, dtype=torch.int32)
    beyond = torch.arange(capacity) >= held[:, None]
    caches.masked_fill_(beyond[:, None, :, None], torch.nan)
    return [qkv, *caches, held, rope_table(capacity + 3, head_dim).float()]


def evaluate(inputs: list[Tensor], keywords: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both caches, copied first; uninitialised memory is NaN, so that what is not written
    shows. Autograd must learn of the change: a cache that it saved is not what it was.
    """
    qkv, lengths, rope = inputs[0], inputs[3], inputs[4]
    caches = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs[1:3]]
    for cache, old in zip(caches, inputs[1:3], strict=True):
        cache.copy_(old)
    versions = [cache._version for cache in caches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            out = decode_attention(qkv, *caches, lengths, rope, **keywords)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(cache._version > version for cache, version in zip(caches, versions, strict=True))
    return out, *caches


def answer_requests() -> None:
    torch.set_num_threads(1)
    # Whatever else prints must not get between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            inputs, keywords = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, evaluate(inputs, keywords)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


@pytest.fixture(scope="module")
def child(environment):
    pytest.importorskip("triton")
    process = subprocess.Popen(
        [sys.executable, Path(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def decode(request):
    """decode(impl, inputs, **keywords) -> (out, cache_k, cache_v); the inputs stay as they are."""

    def call(impl: str, inputs: list[Tensor], **keywords) -> tuple[Tensor, Tensor, Tensor]:
        if impl != "interpreter":
            return evaluate(inputs, {**keywords, "impl": impl})
        process = request.getfixturevalue("child")
        pickle.dump((inputs, {**keywords, "impl": "triton"}), process.stdin)
        process.stdin.flush()
        good, answer = pickle.load(process.stdout)
        if not good:
            raise ValueError(answer)
        return answer

    return call


def exact(inputs: list[Tensor], scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The specification in float64."""
    qkv, cache_k, cache_v, lengths, rope = (
        x.detach().cpu().double() if x.is_floating_point() else x.cpu() for x in inputs
    )
    cache_k, cache_v = cache_k.clone(), cache_v.clone()
    return reference.decode_attention(qkv, cache_k, cache_v, lengths, rope, scale), cache_k, cache_v


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (x.detach().cpu().contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def close(a: Tensor, b: Tensor, limit: float) -> None:
    assert a.shape == b.shape
    difference = (a.double().cpu() - b).abs().max().item()
    assert difference <= limit * b.abs().max().item(), f"off by {difference:.2e}"


def check(got: tuple[Tensor, Tensor, Tensor], inputs: list[Tensor], scale: float | None = None) -> None:
    """out and the new entries within one rounding of float64; every other entry of the caches untouched."""
    expected = exact(inputs, scale)
    assert got[0].dtype == inputs[0].dtype
    single = GPU_RELATIVE if got[0].is_cuda else RELATIVE
    # One rounding to the output's type and one of the new key and value to the caches'.
    eps = max(torch.finfo(got[0].dtype).eps, torch.finfo(got[1].dtype).eps)
    close(got[0], expected[0], max(single, eps))
    row, place = torch.arange(len(inputs[3])), inputs[3].cpu().long()
    for new, old, wanted in zip(got[1:], inputs[1:3], expected[1:], strict=True):
        new, old = new.cpu(), old.cpu()
        close(new[row, :, place], wanted[row, :, place], max(single, torch.finfo(new.dtype).eps))
        rest = new.clone()
        rest[row, :, place] = old[row, :, place]
        assert same_bits(rest, old)


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_float64(decode, impl, case):
    inputs = problem(case)
    check(decode(impl, inputs), inputs)
    check(decode(impl, inputs, scale=0.3), inputs, 0.3)


@pytest.mark.parametrize("qkv_type", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cache_type", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_types_of_queries_and_caches(decode, impl, qkv_type, cache_type):
    if impl == "interpreter" and torch.bfloat16 in (qkv_type, cache_type):
        pytest.skip("the Triton interpreter truncates bfloat16")
    inputs = problem(CASES[2], cache_type)
    inputs[0] = inputs[0].to(qkv_type)
    check(decode(impl, inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_worse_than_low_precision_attention(decode, dtype):
    """At most twice the error of the same steps in the low precision: rotate, round, SDPA with a mask."""
    inputs = problem(((60, 17, 33, 50), 4, 64, 64), dtype)
    qkv, cache_k, cache_v, lengths, rope = inputs
    expected = exact(inputs)[0]
    row, place = torch.arange(4), lengths.long()
    turn = torch.view_as_complex(rope.unflatten(1, (-1, 2)))[place]
    pairs = torch.view_as_complex(qkv.view(4, 3, 4, 32, 2)[:, :2].float()) * turn[:, None, None]
    q, k = torch.view_as_real(pairs).flatten(3).to(dtype).unbind(1)
    keys, values = (cache.nan_to_num(0.0) for cache in (cache_k, cache_v))
    keys[row, :, place], values[row, :, place] = k, qkv.view(4, 3, 4, 64)[:, 2]
    seen = torch.arange(64) <= place[:, None]
    low = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=seen[:, None, None]
    )[:, :, 0]
    error = (low.double() - expected).abs().max()
    assert (decode("torch", inputs)[0].double() - expected).abs().max() <= 2 * error


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_and_integer_types(decode, impl):
    case = ((31, 32, 5), 2, 36, 40)
    inputs = problem(case)
    qkv, cache_k, cache_v, lengths, rope = inputs
    expected = decode(impl, inputs)
    wide = torch.full((3, qkv.shape[1] + 3), torch.nan)
    wide[:, 1:-2] = qkv
    heads_last = torch.empty(3, 2, 3, 36).copy_(qkv.view(3, 3, 2, 36).transpose(1, 2)).transpose(1, 2)
    stepped = torch.stack((qkv, qkv), -1)[..., 0]
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache_k, cache_v)]
    roomy = torch.full((3, 2, 40, 43), torch.nan)
    roomy[..., :36] = cache_v
    spread = torch.empty(len(rope), 72)
    spread[:, ::2] = rope
    variants = [
        [qkv.view(3, 3, 2, 36), cache_k, cache_v, lengths.long(), rope.view(-1, 18, 2)],
        [wide[:, 1:-2], cache_k, cache_v, torch.stack((lengths, lengths), 1)[:, 0], rope[:40]],
        [heads_last, *by_position, lengths, rope],
        [stepped, cache_k, roomy[..., :36], lengths, spread[:, ::2]],
    ]
    for variant in variants:
        for got, wanted in zip(decode(impl, variant), expected, strict=True):
            assert same_bits(got, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(decode, impl):
    inputs = problem(CASES[3])
    for a, b in zip(decode(impl, inputs), decode(impl, inputs), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("impl", ["interpreter"])
def test_splits_do_not_change_a_short_row(decode, impl):
    """A row that ends in the first split has the same bits in a cache of one split and of many."""
    inputs = problem(((20, 31), 2, 36, 32))
    longer = problem(((20, 31), 2, 36, 200))
    longer[0] = inputs[0]
    for i in (1, 2):
        longer[i][:, :, :32] = inputs[i]
    assert same_bits(decode(impl, inputs)[0], decode(impl, longer)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(decode, impl):
    inputs = problem(((4,), 2, 8, 9))
    empty = [x[:0] for x in inputs[:4]] + inputs[4:]
    assert decode(impl, empty)[0].shape == (0, 2, 8)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_torch_path_of_a_gpu(monkeypatch, case):
    """There no length is looked at; here it is made to do without."""
    monkeypatch.setattr(decode_module, "_held", lambda *_: None)
    inputs = problem(case)
    check(evaluate(inputs, {"impl": "torch"}), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES[1:4], CASES[6]], ids=case_name)
def test_large_caches_on_a_cpu(monkeypatch, case, dtype):
    """Two products in place of SDPA, some rows at a time where keys are widened; here small is large."""
    inputs = problem(case, dtype)
    monkeypatch.setattr(decode_module, "_SMALL", 1)
    check(evaluate(inputs, {"impl": "torch"}), inputs)
    _, heads, head_dim, capacity = case
    monkeypatch.setattr(decode_module, "_WIDENED", 2 * heads * head_dim * capacity)
    check(evaluate(inputs, {"impl": "torch"}), inputs)


class TinyLM:
    """Two layers of attention on a residual stream, and a head; all weights float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.heads, self.head_dim, self.codes, width = 2, 12, 50, 24

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

        self.embedding = draw(self.codes, width) * width**0.5
        self.layers = [(draw(3 * width, width), draw(width, width)) for _ in range(2)]
        self.head = draw(self.codes, width)
        self.rope = rope_table(64, self.head_dim)

    def rotate(self, x: Tensor) -> Tensor:
        """x (T, H, D), position by row."""
        turn = torch.view_as_complex(self.rope.view(64, -1, 2))[: len(x), None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * turn).flatten(2)

    def full(self, tokens: Tensor, prefix: int) -> tuple[Tensor, list[Tensor]]:
        """Logits of the last position, and each layer's (2, H, T, D) keys and values, all at once."""
        x, states = self.embedding[tokens], []
        cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
        for qkv, out in self.layers:
            q, k, v = (x @ qkv.T).view(len(x), 3, self.heads, self.head_dim).unbind(1)
            q, k = self.rotate(q), self.rotate(k)
            states.append(torch.stack((k, v)).transpose(1, 2))
            attended = reference.prefix_causal_attention(q, k, v, cu, cu.new_tensor([prefix]))
            x = x + attended.flatten(1) @ out.T
        return self.head @ x[-1], states


@pytest.mark.parametrize("impl", IMPLS)
def test_a_whole_greedy_decode(decode, impl):
    """20 steps of three prompts, logits and tokens, against everything again for every token in float64."""
    model, steps, prompts = TinyLM(), 20, (9, 1, 17)
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randint(model.codes, (n,), generator=generator) for n in prompts]
    caches = torch.full((2, 2, 3, model.heads, 40, model.head_dim), torch.nan)
    tokens = torch.empty(3, dtype=torch.int64)
    for b, sequence in enumerate(sequences):
        logits, states = model.full(sequence, len(sequence))
        tokens[b] = logits.argmax()
        for layer, state in enumerate(states):
            caches[layer, :, b, :, : len(sequence)] = state
    lengths = torch.tensor(prompts)
    for _ in range(steps):
        sequences = [torch.cat((s, tokens[b : b + 1])) for b, s in enumerate(sequences)]
        expected = torch.stack([model.full(s, n)[0] for s, n in zip(sequences, prompts, strict=True)])
        x = model.embedding[tokens].float()
        for layer, (qkv, out) in enumerate(model.layers):
            attended, *written = decode(
                impl, [x @ qkv.float().T, *caches[layer], lengths, model.rope.float()]
            )
            caches[layer] = torch.stack(written)
            x = x + attended.flatten(1) @ out.float().T
        lengths = lengths + 1
        logits = x @ model.head.float().T
        close(logits, expected, 1e-5)
        tokens = logits.argmax(1)
        assert tokens.tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("lengths", "row"), [((3, 9), 1), ((-1, 2), 0), ((2, 2**40), 1)], ids=str)
def test_a_row_without_room_is_named(decode, impl, lengths, row):
    inputs = problem(((3, 3), 1, 8, 9))
    inputs[3] = torch.tensor(lengths)
    message = f"lengths: row {row} holds {lengths[row]} positions, expected 0 to 8"
    with pytest.raises(ValueError, match=message):
        decode(impl, inputs)


def bad(index: int, change) -> list[Tensor]:
    inputs = problem(((3, 5), 2, 8, 9))
    inputs[index] = change(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (bad(0, lambda x: x[:, 1:]), ValueError, r"qkv: expected shape \(2, 48\) or \(2, 3, 2, 8\)"),
        (bad(0, lambda x: x[:1]), ValueError, "qkv: expected shape"),
        (bad(0, torch.Tensor.double), TypeError, "qkv: expected float32, float16 or bfloat16"),
        (bad(0, torch.Tensor.requires_grad_), ValueError, "qkv: requires a gradient"),
        (bad(1, lambda x: x[0]), ValueError, "cache_k: expected shape"),
        (bad(1, lambda x: x[..., :6]), ValueError, "cache_k: D must be a multiple of 4 from 4 to 128, got 6"),
        (bad(1, lambda x: x.new_zeros(2, 2, 9, 132)), ValueError, "cache_k: D must be .* got 132"),
        (bad(1, lambda x: x[:, :, :0]), ValueError, "cache_k: expected a capacity of 1"),
        (bad(1, torch.Tensor.int), TypeError, "cache_k: expected float32, float16 or bfloat16"),
        (bad(1, lambda x: x.repeat(1, 1, 1, 2)[..., ::2]), ValueError, "cache_k: expected a stride of 1"),
        (bad(1, lambda x: x[:1].expand(2, -1, -1, -1)), ValueError, "cache_k: an expanded tensor"),
        (bad(2, lambda x: x[:, :, :5]), ValueError, "cache_v: expected cache_k's shape"),
        (bad(2, torch.Tensor.half), TypeError, "cache_v: expected cache_k's dtype"),
        (bad(3, torch.Tensor.float), TypeError, "lengths: expected int32 or int64"),
        (bad(3, lambda x: x[:1]), ValueError, r"lengths: expected shape \(rows,\) = \(2,\)"),
        (bad(3, lambda x: x.to("meta")), ValueError, "lengths: expected qkv's device cpu, got meta"),
        (bad(4, torch.Tensor.double), TypeError, "rope: expected float32"),
        (bad(4, lambda x: x[:, :4]), ValueError, r"rope: expected shape \(positions, 8\) or"),
        (bad(4, lambda x: x[:8]), ValueError, "rope: expected at least 9 positions, the capacity, got 8"),
    ],
)
def test_bad_arguments_are_named(inputs, kind, message):
    with pytest.raises(kind, match=message):
        decode_attention(*inputs)
    with pytest.raises(ValueError, match="impl = 'flash'"):
        decode_attention(*problem(CASES[0]), impl="flash")


def two_steps(weight, x, cache_k, cache_v, lengths, rope):
    """Two decode steps of a layer, reading the caches in between and after; one graph."""
    out = decode_attention(x @ weight, cache_k, cache_v, lengths, rope)
    middle = cache_k[:, :, 3].sum() + cache_v[:, :, 3].sum()
    again = decode_attention(out.flatten(1) @ weight, cache_k, cache_v, lengths + 1, rope)
    return again, middle, cache_k.sum(), cache_v * 2


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend=backend)
    for lengths in ((3, 3), (3, 6), (0, 1)):
        _, cache_k, cache_v, held, rope = problem((lengths, 2, 8, 9))
        generator = torch.Generator().manual_seed(1)
        weight, x = torch.randn(16, 48, generator=generator), torch.randn(2, 16, generator=generator)
        results = []
        for function in (two_steps, compiled):
            inputs = [weight, x, cache_k.nan_to_num(), cache_v.nan_to_num(), held, rope]
            inputs = [tensor.to(device) for tensor in inputs]
            results.append([*function(*inputs), *inputs[2:4]])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_torch_compile_keeps_the_mutation():
    check_compiled("aot_eager", "cpu")


def test_launches_depend_on_shapes_alone(monkeypatch):
    """The grid comes from rows, heads and capacity; batches and capacities share their compiled kernels."""
    pytest.importorskip("triton")
    from scamo_kernels import _decode_triton as kernels

    launches: list[tuple] = []

    def record(name: str):
        class Launcher:
            def __getitem__(self, grid):
                return lambda *_, **constants: launches.append((name, grid, tuple(sorted(constants.items()))))

        return Launcher()

    for kernel in (kernels.decode_kernel, kernels.combine_kernel):
        loose = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}
        assert loose <= {"qkv", "cache_k", "cache_v", "lengths", "rope", "out", "partial", "state"}
    for name in ("decode_kernel", "combine_kernel"):
        monkeypatch.setattr(kernels, name, record(name))
    compiled: dict[bool, set] = {True: set(), False: set()}
    for rows, capacity, last in itertools.product((1, 7), (11, 255, 256, 257, 1000), (False, True)):
        launches.clear()
        inputs = problem(((capacity - 1 if last else 0,) * rows, 2, 100, capacity), torch.bfloat16)
        kernels.decode(inputs[0].view(rows, 3, 2, 100), *inputs[1:], 0.1)
        splits = -(-capacity // 256)
        assert [grid for _, grid, _ in launches] == [(rows * 2 * splits,)] + [(rows * 2,)] * (splits > 1)
        compiled[splits == 1] |= {(name, constants) for name, _, constants in launches}
    assert len(compiled[True]) == 1
    assert len(compiled[False]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=case_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_matches_float64_on_a_gpu(decode, impl, case, dtype):
    inputs = [x.cuda() for x in problem(case, dtype)]
    first, second = decode(impl, inputs), decode(impl, inputs)
    check(first, inputs)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [40, 600])
def test_a_full_row_writes_nothing_on_a_gpu(capacity):
    """Lengths beyond the cache, or below 0: the neighbours and the row itself stay as they were."""
    case = ((5, 5, 5, 5), 2, 64, capacity)
    qkv, cache_k, cache_v, lengths, rope = (x.cuda() for x in problem(case))
    lengths[1:] = lengths.new_tensor([capacity, 2**31 - 1, -7])
    before = cache_k.clone(), cache_v.clone()
    decode_attention(qkv, cache_k, cache_v, lengths, rope[:capacity])
    for new, old in zip((cache_k, cache_v), before, strict=True):
        assert same_bits(new[1:], old[1:])
        assert same_bits(new[0, :, 6:], old[0, :, 6:])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_debug_mode_looks_at_the_lengths_on_a_gpu(monkeypatch, impl):
    inputs = [x.cuda() for x in problem(((3, 9), 1, 8, 9))]
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="lengths: row 1 holds 9 positions, expected 0 to 8"):
        decode_attention(*inputs, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [40, 600])
def test_a_cuda_graph_follows_the_lengths(capacity):
    case = ((5, 0, 17), 4, 64, capacity)
    inputs = [x.cuda() for x in problem(case, torch.bfloat16)]
    expected, caches = [], [x.clone() for x in inputs[1:3]]
    lengths = inputs[3].clone()
    for _ in range(20):
        expected.append(decode_attention(inputs[0], *caches, lengths, inputs[4], impl="triton"))
        lengths += 1
    qkv, cache_k, cache_v, lengths, rope = inputs
    before = cache_k.clone(), cache_v.clone(), lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(qkv, cache_k, cache_v, lengths, rope, impl="triton")
        lengths += 1
    for tensor, old in zip((cache_k, cache_v, lengths), before, strict=True):
        tensor.copy_(old)
    for wanted in expected:
        graph.replay()
        assert same_bits(out, wanted)
    for tensor, wanted in zip((cache_k, cache_v), caches, strict=True):
        assert same_bits(tensor, wanted)


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")


if __name__ == "__main__":
    answer_requests()
