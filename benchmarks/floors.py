"""The least time an op can take on a GPU: the largest of memory, matmul, exp and L2 time.

    python benchmarks/floors.py [h200 | h100]        # the tables of README.md

Every function returns a `Floor` for one call on a `Device`. Memory counts each input read once and each
output written once at the rate that a large copy reaches; matmul counts FLOPs at the rate that a large
product reaches; exp counts exponentials at 16 a clock and multiprocessor; L2 counts what an algorithm
re-reads and is 0 where nothing must be re-read. Rates of a result file replace the built-in ones. Sources:
NVIDIA's data sheets; large copies and products on these cards.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Device:
    """Rates per second. `copy` counts bytes read and bytes written; `matmul` is dense bf16."""

    name: str
    bandwidth: float  # stated, bytes
    copy: float  # reached by a large copy, bytes
    matmul: float  # reached by a large product, FLOPs
    exp: float  # exponentials: multiprocessors * clock * 16
    l2: float  # bytes; an assumption, see README.md
    l2_size: int  # bytes


# 132 multiprocessors at 1.755 GHz; products reach 72% of the stated 989 TFLOP/s on both cards.
_HOPPER = {"matmul": 0.72 * 989e12, "exp": 132 * 1.755e9 * 16, "l2": 5.5e12}
DEVICES = {
    "h200": Device("h200", bandwidth=4.8e12, copy=4.3e12, l2_size=60 << 20, **_HOPPER),
    "h100": Device("h100", bandwidth=3.35e12, copy=3.0e12, l2_size=50 << 20, **_HOPPER),
}


def device(name: str, rates: Path | None = None) -> Device:
    """The description of a GPU, with the measured rates of `rates` where that file exists.

    name: "h200", "h100", or what the driver calls such a card. rates: default results/<gpu>/rates.json, as
    gpu.py writes it. Raises ValueError for an unknown card, and for a file whose fields are no rates.
    """
    found = [known for known in DEVICES if known in name.lower()]
    if not found:
        raise ValueError(f"device = {name!r}: no description; expected one of {', '.join(DEVICES)}")
    described = DEVICES[found[0]]
    path = rates or RESULTS / found[0] / "rates.json"
    if rates is None and not path.exists():
        return described
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    measured: dict[str, Any] = {}
    for field, ours in (("copy_bytes_per_second", "copy"), ("matmul_flops_per_second", "matmul")):
        value = fields.get(field) if isinstance(fields, dict) else None
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{path}: {field}: expected a positive number, got {value!r}")
        measured[ours] = float(value)
    return dataclasses.replace(described, **measured)


@dataclass(frozen=True)
class Floor:
    """Seconds that each resource needs at least; `moved` is the least number of bytes."""

    moved: int
    memory: float
    matmul: float = 0.0
    exp: float = 0.0
    l2: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.memory, self.matmul, self.exp, self.l2)

    @property
    def bound(self) -> str:
        """The resource that sets the floor."""
        return max(("memory", "matmul", "exp", "l2"), key=lambda resource: getattr(self, resource))

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            *(getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self))
        )


def _floor(on: Device, moved: float, flops: float = 0, exps: float = 0, reread: float = 0) -> Floor:
    return Floor(int(moved), moved / on.copy, flops / on.matmul, exps / on.exp, reread / on.l2)


def _ways(way: str, forward: Callable[[], Floor], backward: Callable[[], Floor]) -> Floor:
    if way not in (FORWARD, BACKWARD, BOTH):
        raise ValueError(f"way = {way!r}: expected {FORWARD!r}, {BACKWARD!r} or {BOTH!r}")
    if way == BOTH:
        return forward() + backward()
    return forward() if way == FORWARD else backward()


def score_elements(
    lengths: Sequence[int], prefixes: Sequence[int], tile: tuple[int, int] | None = None
) -> int:
    """Scores of one head under the prefix-causal mask; with tile = (rows, keys) all of every visited tile."""
    if len(lengths) != len(prefixes):
        raise ValueError(f"prefixes: expected {len(lengths)}, one per length, got {len(prefixes)}")
    total = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        if not 0 <= prefix <= length:
            raise ValueError(f"prefixes: expected 0 to the length {length}, got {prefix}")
        if tile is None:
            total += prefix * prefix + (length * (length + 1) - prefix * (prefix + 1)) // 2
        else:
            rows, keys = tile
            # The last row of a row tile sees most.
            seen = (_bound(min(first + rows, length), prefix) for first in range(0, length, rows))
            total += sum(-(-bound // keys) for bound in seen) * rows * keys
    return total


def _bound(end: int, prefix: int) -> int:
    """How many keys row `end` - 1 sees."""
    return max(end, prefix)


def _lanes(head_dim: int) -> int:
    """The head dimension as a tensor-core product sees it: a power of two from 16."""
    return 1 << max(4, (head_dim - 1).bit_length())


def attention(
    lengths: Sequence[int],
    prefixes: Sequence[int],
    heads: int,
    head_dim: int,
    on: Device,
    *,
    way: str = FORWARD,
    itemsize: int = 2,
    tile: tuple[int, int] | None = None,
    roles: int = 1,
    l2_tile: tuple[int, int] | None = None,
) -> Floor:
    """Prefix-causal attention on packed samples.

    Forward reads q, k, v and writes the output; backward reads q, k, v, output and its gradient and writes
    three gradients (the log-sum-exp, 4 bytes a row and head, is left out). tile: count whole tiles and a
    head_dim rounded up to a power of two, as the hardware computes, instead of the mask's exact scores.
    roles: 1 or 2; the backward with separate programs for dQ and for dK, dV takes scores and dP twice.
    l2_tile = (own, step): also count what such a two-role backward re-reads through L2 when a program owns
    `own` rows (or keys) and delta is computed inside.
    """
    if roles not in (1, 2):
        raise ValueError(f"roles = {roles}: expected 1 or 2")
    scores = score_elements(lengths, prefixes, tile) * heads
    width = head_dim if tile is None else _lanes(head_dim)
    tensor = sum(lengths) * heads * head_dim * itemsize

    def forward() -> Floor:
        return _floor(on, 4 * tensor, 4 * width * scores, scores)

    def backward() -> Floor:
        reread = 0
        if l2_tile is not None:
            reread = two_role_rows(lengths, prefixes, l2_tile) * heads * head_dim * itemsize
        products = 5 if roles == 1 else 7
        return _floor(on, 8 * tensor, 2 * products * width * scores, roles * scores, reread)

    return _ways(way, forward, backward)


def two_role_rows(lengths: Sequence[int], prefixes: Sequence[int], tile: tuple[int, int]) -> int:
    """Rows of head_dim numbers, per head, that a two-role backward moves through L2.

    A dQ program reads q, output and gradient of its rows once, k and v of every key that a row of it sees,
    and writes dQ; a dK, dV program reads its k and v once, q, output and gradient of every row tile that
    sees a key of it, and writes both.
    """
    own, step = tile
    rows = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        rows += 8 * length
        for first in range(0, length, own):
            # Keys come in steps too, but the last step ends with the sample.
            seen = _bound(min(first + own, length), prefix)
            rows += 2 * min(-(-seen // step) * step, length)
            # The first row that sees a key of the tile, down to a step.
            start = 0 if first < prefix else first // step * step
            rows += 3 * (length - start)
    return rows


def fsq(
    tokens: int,
    channels: int,
    on: Device,
    *,
    way: str = FORWARD,
    itemsize: int = 2,
    hidden: int | None = None,
) -> Floor:
    """FSQ with a tanh bound: z -> codes and int32 indices; hidden: with the projections hidden -> channels ->
    hidden fused (codes stay inside), weights and their gradients included."""
    if hidden is None:
        return _ways(
            way,
            lambda: _floor(on, tokens * (2 * channels * itemsize + 4), exps=tokens * channels),
            lambda: _floor(on, tokens * 3 * channels * itemsize, exps=tokens * channels),
        )
    weights = 2 * hidden * channels * itemsize
    product = 2 * tokens * hidden * channels
    return _ways(
        way,
        lambda: _floor(
            on, tokens * (2 * hidden * itemsize + 4) + weights, 2 * product, exps=tokens * channels
        ),
        # z again, then two products for each projection's backward.
        lambda: _floor(on, tokens * 3 * hidden * itemsize + 2 * weights, 5 * product, exps=tokens * channels),
    )


def histogram(tokens: int, codebook_size: int, on: Device) -> Floor:
    """int32 indices in, int64 counts out."""
    return _floor(on, 4 * tokens + 8 * codebook_size)


def decode_attention(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    on: Device,
    *,
    itemsize: int = 2,
    append: bool = True,
) -> Floor:
    """One query per sample against `lengths` cached keys (the new one included).

    append: the new k and v come in with q and are written to the cache instead of being read from it.
    """
    row = heads * head_dim * itemsize
    cached = sum(lengths) - (len(lengths) if append else 0)
    moved = 2 * cached * row + len(lengths) * row * (2 + (4 if append else 0))
    return _floor(on, moved, 4 * head_dim * heads * sum(lengths), heads * sum(lengths))


def linear_cross_entropy(
    rows: int, hidden: int, classes: int, on: Device, *, way: str = FORWARD, itemsize: int = 2
) -> Floor:
    """Mean cross-entropy of hidden @ weight.T on `rows` scored rows, logits never in memory.

    backward takes the logits again (three products); forward+backward takes them once, since the gradients
    can be made with the loss.
    """
    product = 2 * rows * hidden * classes
    read = (rows * hidden + classes * hidden) * itemsize + 8 * rows
    if way == FORWARD:
        return _floor(on, read, product, rows * classes)
    if way not in (BACKWARD, BOTH):
        return _ways(way, lambda: Floor(0, 0), lambda: Floor(0, 0))
    written = (rows * hidden + classes * hidden) * itemsize
    return _floor(on, read + written, 3 * product, rows * classes)


def rms_norm(
    tokens: int, width: int, on: Device, *, way: str = FORWARD, itemsize: int = 2, residual: bool = True
) -> Floor:
    """RMSNorm; residual: x + branch is formed, written for the next block and normed in the same pass."""
    tensor, weight = tokens * width * itemsize, width * itemsize
    return _ways(
        way,
        lambda: _floor(on, (4 if residual else 2) * tensor + weight),
        lambda: _floor(on, (4 if residual else 3) * tensor + 2 * weight),
    )


def swiglu(tokens: int, width: int, on: Device, *, way: str = FORWARD, itemsize: int = 2) -> Floor:
    """silu(gate) * up, each (tokens, width)."""
    tensor, exps = tokens * width * itemsize, tokens * width
    return _ways(way, lambda: _floor(on, 3 * tensor, exps=exps), lambda: _floor(on, 5 * tensor, exps=exps))


def copy_rate(where: str) -> float:
    """Bytes per second, read and written, of a large copy on torch device `where`; needs torch."""
    import torch

    numbers = (1 << 28) if where != "cpu" else (1 << 24)
    source = torch.ones(numbers, device=where)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), where)


def matmul_rate(where: str, size: int = 8192) -> float:
    """FLOPs per second of a bf16 product of random size x size matrices; needs torch."""
    import torch

    a, b = (torch.randn(size, size, device=where).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, where)


def _fastest(function: Callable[[], object], where: str) -> float:
    """The median seconds of one call over several rounds, after a warm-up."""
    import statistics
    import time

    import torch

    cuda = where != "cpu"
    calls, rounds, seconds = (5, 11, []) if cuda else (1, 5, [])
    for _ in range(rounds + 2):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds[2:])


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


ATTENTION_SHAPES = [
    (64, 16, 126, 77),
    (64, 16, 178, 128),
    (64, 16, 201, 150),
    (64, 16, 328, 128),
    (100, 32, 126, 77),
    (100, 32, 178, 128),
    (100, 32, 201, 150),
    (100, 32, 328, 128),
]


def attention_table(on: Device) -> str:
    lines = [
        "| head dim, heads | L, P | forward: memory / matmul / exp | backward: memory / matmul / exp "
        "| L2, two roles 64x64 | 64x128 | floor forward | floor backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for head_dim, heads, length, prefix in ATTENTION_SHAPES:
        arguments = ([length] * 128, [prefix] * 128, heads, head_dim, on)
        forward = attention(*arguments, tile=(64, 64))
        backward = attention(*arguments, way=BACKWARD, tile=(64, 64))
        small, large = (attention(*arguments, way=BACKWARD, l2_tile=tile) for tile in ((64, 64), (128, 64)))
        parts = [" / ".join(map(_us, (f.memory, f.matmul, f.exp))) for f in (forward, backward)]
        lines.append(
            f"| {head_dim}, {heads} | {length}, {prefix} | {parts[0]} | {parts[1]} | {_us(small.l2)} "
            f"| {_us(large.l2)} | {_us(forward.seconds)} ({forward.bound}) "
            f"| {_us(backward.seconds)} ({backward.bound}) |"
        )
    return "\n".join(lines)


def op_table(on: Device) -> str:
    rows: list[tuple[str, str, Callable[[str], Floor] | Floor]] = [
        ("FSQ", "65,536 tokens, 6 channels", lambda way: fsq(65536, 6, on, way=way)),
        (
            "FSQ with projections",
            "65,536 tokens, 512 → 6 → 512",
            lambda way: fsq(65536, 6, on, way=way, hidden=512),
        ),
        ("histogram", "65,536 codes of 64,000", histogram(65536, 64000, on)),
        (
            "decode attention",
            "64 samples, 178 keys, 16 heads of 64",
            decode_attention([178] * 64, 16, 64, on),
        ),
        (
            "decode attention",
            "64 samples, 178 keys, 32 heads of 100",
            decode_attention([178] * 64, 32, 100, on),
        ),
        (
            "linear cross-entropy",
            "8,192 rows, 1024 → 65,537",
            lambda way: linear_cross_entropy(8192, 1024, 65537, on, way=way),
        ),
        (
            "linear cross-entropy",
            "8,192 rows, 3200 → 65,537",
            lambda way: linear_cross_entropy(8192, 3200, 65537, on, way=way),
        ),
        ("residual + RMSNorm", "16,384 x 1024", lambda way: rms_norm(16384, 1024, on, way=way)),
        ("residual + RMSNorm", "16,384 x 3200", lambda way: rms_norm(16384, 3200, on, way=way)),
        ("SwiGLU", "16,384 x 2816", lambda way: swiglu(16384, 2816, on, way=way)),
        ("SwiGLU", "16,384 x 8704", lambda way: swiglu(16384, 8704, on, way=way)),
    ]
    lines = ["| op | shape | floor forward | floor backward | MB forward |", "|---|---|---|---|---|"]
    for op, shape, floor in rows:
        forward = floor if isinstance(floor, Floor) else floor(FORWARD)
        backward = None if isinstance(floor, Floor) else floor(BACKWARD)
        back = "–" if backward is None else f"{_us(backward.seconds)} ({backward.bound})"
        lines.append(
            f"| {op} | {shape} | {_us(forward.seconds)} ({forward.bound}) | {back} "
            f"| {forward.moved / 1e6:.3g} |"
        )
    return "\n".join(lines)


def main(names: Sequence[str]) -> int:
    try:
        devices = [device(name) for name in names or DEVICES]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for on in devices:
        rates = f"copy {on.copy / 1e12:.2f} TB/s, products {on.matmul / 1e12:.0f} TFLOP/s"
        print(f"### {on.name.upper()}: {rates}; microseconds, bf16\n")
        print(f"Attention, 128 samples:\n\n{attention_table(on)}\n\nOther ops:\n\n{op_table(on)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
