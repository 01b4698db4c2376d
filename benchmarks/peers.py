"""What else one would call, on the same inputs: each peer gives its outputs and gradients to be checked.

    problem = Problem(Case("even", lengths, prefixes, heads, head_dim), torch.bfloat16, "cuda")
    peer = attention_peer("flex-packed", problem)      # raises Unavailable with the reason
    function = peer.function("forward+backward")       # () -> [output, gradients of q, k and v]
    rows = peer.unpack(function())                     # the same in packed rows, to compare

A peer gets what suits it: padded tensors, masks and block masks are made in advance and not timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import scamo_kernels
import torch
import torch.nn.functional as F
from floors import BACKWARD, BOTH, FORWARD
from scamo_kernels import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WAYS = (FORWARD, BACKWARD, BOTH)
FLEX_BLOCK = 128
_CUDA_ONLY = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """Packed samples under the prefix-causal mask; lengths from 1, prefixes from 0 to the length."""

    name: str
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for length, prefix in zip(self.lengths, self.prefixes, strict=True):
            # A padded batch has no key for the rows of an empty sample.
            if length < 1 or not 0 <= prefix <= length:
                raise ValueError(f"{self.name}: a sample of {length} rows with a prefix of {prefix}")

    def __str__(self) -> str:
        return f"{self.name}-B{len(self.lengths)}-T{max(self.lengths)}-H{self.heads}-D{self.head_dim}"


class Problem:
    """The tensors of a case: inputs q, k, v and the cotangent, each (tokens, heads, head_dim), packed."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (4, sum(case.lengths), case.heads, case.head_dim)
        data = torch.randn(shape, generator=generator).to(device, dtype)
        self.case, self.device, self.dtype = case, device, dtype
        self.inputs = [x.clone().requires_grad_() for x in data[:3]]
        self.cotangent = data[3].clone()
        cu = [0, *itertools.accumulate(case.lengths)]
        self.cu_seqlens = torch.tensor(cu, dtype=torch.int32, device=device)
        self.prefixes = torch.tensor(case.prefixes, dtype=torch.int32, device=device)
        self.longest = max(case.lengths)

    @functools.cached_property
    @torch.enable_grad()
    def _expected(self) -> list[Tensor]:
        q, k, v = single = [x.detach().float().requires_grad_() for x in self.inputs]
        out = reference.prefix_causal_attention(q, k, v, self.cu_seqlens, self.prefixes)
        return [out.detach(), *torch.autograd.grad(out, single, self.cotangent.float())]

    def expected(self, way: str) -> list[Tensor]:
        """The float32 reference's output and gradients, as far as `way` computes them."""
        return {FORWARD: self._expected[:1], BACKWARD: self._expected[1:], BOTH: self._expected}[way]

    def minimum_bytes(self, way: str) -> int:
        tensors = {FORWARD: 4, BACKWARD: 8, BOTH: 12}[way]
        return tensors * self.cotangent.numel() * self.dtype.itemsize

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, heads, head_dim) -> (samples, heads, longest, head_dim), zeros at the end."""
        padded = torch.nn.utils.rnn.pad_sequence(list(x.detach().split(self.case.lengths)), batch_first=True)
        return padded.transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return torch.cat([sample[:n] for sample, n in zip(rows, self.case.lengths, strict=True)])

    def sample_mask(self, length: int, prefix: int) -> Tensor:
        """(length, length), True where row i sees key j: j < prefix or j <= i."""
        row = torch.arange(length, device=self.device)
        return (row < prefix) | (row <= row[:, None])

    @functools.cached_property
    def padded_mask(self) -> Tensor:
        """(samples, 1, longest, longest). A padding row sees the sample; its cotangent is zero."""
        masks = torch.stack([self.sample_mask(self.longest, p) for p in self.case.prefixes])
        lengths = torch.tensor(self.case.lengths, device=self.device)
        real = torch.arange(self.longest, device=self.device) < lengths[:, None]
        return (masks & real[:, None])[:, None]


def directed(
    way: str, op: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Callable[[], list[Tensor]]:
    """What is timed of an op: () -> its outputs, the gradients of `inputs`, or both, as `way` says.

    op(*inputs) gives a tensor or several, the first len(grads) of them differentiable; `grads` are their
    gradients, None of a scalar. Raises ValueError for an unknown way.
    """

    def outputs() -> list[Tensor]:
        made = op(*inputs)
        return list(made) if isinstance(made, list | tuple) else [made]

    def gradients(made: list[Tensor], **options: bool) -> list[Tensor]:
        return list(torch.autograd.grad(made[: len(grads)], inputs, grads, **options))

    kept: list[list[Tensor]] = []

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return outputs()

    def backward() -> list[Tensor]:
        # Here, not earlier: the first call decides the stream of the backward.
        if not kept:
            kept.append(outputs())
        return gradients(kept[0], retain_graph=True)

    def both() -> list[Tensor]:
        made = outputs()
        return [*(x.detach() for x in made), *gradients(made)]

    functions = {FORWARD: forward, BACKWARD: backward, BOTH: both}
    if way not in functions:
        raise ValueError(f"way = {way!r}: expected one of {', '.join(map(repr, WAYS))}")
    return functions[way]


def moved_bytes(way: str, forward: int, backward: int) -> int:
    """The least bytes of a way, of those of its parts."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[way]


@dataclass
class Peer:
    """forward() gives the output for `inputs`; `context` must be entered around every call."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    cotangent: Tensor
    to_rows: Callable[[Tensor], Tensor] = lambda x: x
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def function(self, way: str) -> Callable[[], list[Tensor]]:
        """What is timed: () -> [output] | gradients | [output, *gradients], in the peer's layout."""
        return directed(way, lambda *_: self.forward(), self.inputs, [self.cotangent])

    def unpack(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [self.to_rows(x) for x in results]


def attention_peer(name: str, problem: Problem, way: str = BOTH) -> Peer:
    """The peer `name` of ATTENTION_PEERS, tried once in `way`. Raises Unavailable with the reason."""
    if name not in ATTENTION_PEERS:
        raise ValueError(f"peer = {name!r}: expected one of {', '.join(ATTENTION_PEERS)}")
    peer = ATTENTION_PEERS[name](problem)
    if name in OURS:
        return peer
    with warnings.catch_warnings(record=True) as caught, peer.context():
        warnings.simplefilter("always")
        try:
            peer.function(FORWARD if way == FORWARD else BOTH)()
        except Exception as error:
            # SDPA says in warnings why a backend refuses, and in the error only that none is left.
            said = [str(error), *(str(w.message) for w in caught)] if isinstance(error, RuntimeError) else []
            lines = [text.strip().splitlines()[0] for text in said or [str(error)] if text.strip()]
            raise Unavailable("; ".join(dict.fromkeys(lines)) or type(error).__name__) from error
    return peer


def _ours(impl: str) -> Callable[[Problem], Peer]:
    def build(problem: Problem) -> Peer:
        if impl == "triton" and problem.device == "cpu":
            raise Unavailable("Triton kernels need a CUDA device")
        if impl == "flash" and problem.device == "cpu":
            raise Unavailable("flash-attn and torch's varlen kernels need a CUDA device")

        def forward() -> Tensor:
            q, k, v = problem.inputs
            return scamo_kernels.prefix_causal_attention(
                q, k, v, problem.cu_seqlens, problem.prefixes, max_seqlen=problem.longest, impl=impl
            )

        return Peer(forward, problem.inputs, problem.cotangent)

    return build


def _padded(problem: Problem, call: Callable[[Tensor, Tensor, Tensor], Tensor], **keywords: Any) -> Peer:
    """A peer on (samples, heads, longest, head_dim)."""
    q, k, v = inputs = [problem.pad(x).requires_grad_() for x in problem.inputs]
    return Peer(lambda: call(q, k, v), inputs, problem.pad(problem.cotangent), problem.unpad, **keywords)


def _sdpa(backend: SDPBackend | None) -> Callable[[Problem], Peer]:
    def build(problem: Problem) -> Peer:
        if problem.device == "cpu" and backend in _CUDA_ONLY:
            raise Unavailable("this backend of SDPA needs a CUDA device")
        mask = problem.padded_mask

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        if backend is None:
            return _padded(problem, call)
        return _padded(problem, call, context=lambda: sdpa_kernel([backend]))

    return build


def _per_sample(problem: Problem) -> Peer:
    lengths = list(problem.case.lengths)
    masks = [problem.sample_mask(n, p) for n, p in zip(lengths, problem.case.prefixes, strict=True)]

    def forward() -> Tensor:
        # split, not slices: each slice's backward makes a zero gradient of the full size.
        parts = (x.transpose(0, 1)[None].split(lengths, 2) for x in problem.inputs)
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
            for q, k, v, mask in zip(*parts, masks, strict=True)
        ]
        return torch.cat(outputs)

    return Peer(forward, problem.inputs, problem.cotangent)


def _compiled(function: Callable, problem: Problem) -> Callable:
    """torch.compile for exactly these shapes."""
    import torch._functorch.config

    if problem.device == "cpu":
        raise Unavailable("torch.compile is timed on CUDA only: a CPU compiles longer than it runs")
    torch._dynamo.reset()
    # The backward alone is run many times on one graph.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ v


def _compiled_plain(problem: Problem) -> Peer:
    mask, compiled = problem.padded_mask, _compiled(_plain, problem)
    return _padded(problem, lambda q, k, v: compiled(q, k, v, mask))


def flex_block_mask(problem: Problem, packed: bool) -> Any:
    """The BlockMask of the prefix-causal mask, from lengths and prefixes: packed samples or padded ones.

    Row i sees the keys of its sample that are before the prefix's end or not after i. Made from the block
    level up: `create_block_mask` would evaluate tokens x tokens entries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    lengths = torch.tensor(problem.case.lengths)
    prefixes = torch.tensor(problem.case.prefixes)
    if packed:
        start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)[None]
        prefix_end = start + prefixes.repeat_interleave(lengths)[None]
    else:
        start = torch.zeros(len(lengths), problem.longest, dtype=torch.long)
        prefix_end = prefixes[:, None].expand_as(start)
    rows = start.shape[1]
    end = torch.maximum(prefix_end, torch.arange(rows) + 1)

    blocks = -(-rows // FLEX_BLOCK)
    row_blocks = [x.split(FLEX_BLOCK, 1) for x in (start, end)]
    first_start, last_start, first_end, last_end = (
        torch.stack([pick(part, 1).values for part in row_blocks[which]], 1)[..., None]
        for which, pick in ((0, torch.min), (0, torch.max), (1, torch.min), (1, torch.max))
    )
    low = torch.arange(blocks) * FLEX_BLOCK
    high = low + FLEX_BLOCK
    seen = (low < last_end) & (high > first_start)
    # A block beyond the last row or key is a partial one: its edge needs the mask.
    whole = (torch.arange(blocks) + 1) * FLEX_BLOCK <= rows
    full = (low >= last_start) & (high <= first_end) & whole[:, None] & whole

    def listed(block_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks per row block, and their indices first."""
        order = torch.argsort(block_mask.to(torch.int8), dim=-1, descending=True, stable=True)
        counts = block_mask.sum(-1)
        return tuple(x[:, None].int().to(problem.device).contiguous() for x in (counts, order))

    device_start, device_prefix_end = start.to(problem.device), prefix_end.to(problem.device)
    if packed:
        # Captured tensors of one dimension: the kernel indexes them by row.
        row_start, row_prefix_end = device_start[0].contiguous(), device_prefix_end[0].contiguous()

        def allowed(b, h, row, column):
            return (column >= row_start[row]) & ((column < row_prefix_end[row]) | (column <= row))
    else:
        sample_prefix = prefixes.to(problem.device)

        def allowed(b, h, row, column):
            return (column < sample_prefix[b]) | (column <= row)

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full),
        *listed(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=allowed,
        seq_lengths=(rows, rows),
    )


def _flex(packed: bool) -> Callable[[Problem], Peer]:
    def build(problem: Problem) -> Peer:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = _compiled(flex_attention, problem)
        mask = flex_block_mask(problem, packed)
        if not packed:
            return _padded(problem, lambda q, k, v: compiled(q, k, v, block_mask=mask))

        def forward() -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in problem.inputs)
            return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return Peer(forward, problem.inputs, problem.cotangent)

    return build


def _reference(problem: Problem) -> Peer:
    def forward() -> Tensor:
        return reference.prefix_causal_attention(*problem.inputs, problem.cu_seqlens, problem.prefixes)

    return Peer(forward, problem.inputs, problem.cotangent)


OURS = ("triton", "torch")
ATTENTION_PEERS: dict[str, Callable[[Problem], Peer]] = {
    "triton": _ours("triton"),
    "torch": _ours("torch"),
    "flash-two-calls": _ours("flash"),
    "flex-packed": _flex(packed=True),
    "flex-padded": _flex(packed=False),
    "sdpa-padded": _sdpa(None),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": _sdpa(SDPBackend.MATH),
    "sdpa-per-sample": _per_sample,
    "compiled-padded": _compiled_plain,
    "reference": _reference,
}


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed: {error}") from error


@contextlib.contextmanager
def _needs_cuda(what: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        raise Unavailable(f"{what} needs a CUDA device")
    yield


def _liger(name: str) -> Any:
    """Its functional interface, or its ops. Raises Unavailable."""
    module = _module(f"liger_kernel.{name}", "liger-kernel")
    with _needs_cuda("liger-kernel"):
        return module


def liger_rms_norm(epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, weight) -> normed x; Liger-Kernel. Raises Unavailable."""
    functional = _liger("transformers.functional")
    # in_place=True would overwrite the gradient that the next call needs.
    return lambda x, weight: functional.liger_rms_norm(x, weight, epsilon, in_place=False)


def liger_add_rms_norm(epsilon: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, residual, weight) -> normed sum, sum; Liger-Kernel. Raises Unavailable."""
    functional = _liger("transformers.functional")
    return lambda *tensors: functional.liger_fused_add_rms_norm(*tensors, epsilon, in_place=False)


def liger_swiglu() -> Callable[[Tensor], Tensor]:
    """gate | up -> silu(gate) * up; Liger-Kernel. Raises Unavailable."""
    ops = _liger("ops")
    if hasattr(ops, "LigerFusedGateUpSiLUMulFunction"):
        return ops.LigerFusedGateUpSiLUMulFunction.apply
    # Older releases copy both halves first.
    return lambda gate_up: ops.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


def liger_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(hidden, weight, targets) -> the sum of the losses; Liger-Kernel. Raises Unavailable."""
    functional = _liger("transformers.functional")
    return lambda *tensors: functional.liger_fused_linear_cross_entropy(*tensors, reduction="sum")


def vq_package() -> Any:
    """vector-quantize-pytorch. Raises Unavailable."""
    return _module("vector_quantize_pytorch", "vector-quantize-pytorch")


def vq_fsq(levels: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """z (..., d) -> codes (..., d), indices (...); vector-quantize-pytorch. Raises Unavailable."""
    module = vq_package().FSQ(levels=list(levels))

    def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
        module.to(z.device)
        codes = module.quantize(z)
        return codes, module.codes_to_indices(codes)

    return quantize
