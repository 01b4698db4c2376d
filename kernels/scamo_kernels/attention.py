"""Attention on packed sequences under one mask: row i of a sample sees the sample's keys j < bound(i).

Prefix-causal attention (ScaMo) has bound = P for the first P rows and i + 1 after them; block-causal
attention (next-scale models) has bound = the end of the row's block. One kernel serves both.
`rotary_prefix_attention` takes a transformer's packed projection as it is and turns q and k on the way.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve, sees_values

MAX_HEAD_DIM = 128
_CHOICES = ("auto", "triton", "torch", "flash")


def prefix_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention inside each sample, bidirectional over its first prefix_lengths[b] rows (the text).

    q, k, v: (tokens, heads, head_dim), packed, one dtype (float32, float16, bfloat16; float64 with
    impl="torch"); head_dim a multiple of 4 up to 128. cu_seqlens: int32 (samples + 1), from 0 to tokens.
    prefix_lengths: int32 (samples,), from 0 to the sample's length. max_seqlen: the longest sample's length
    or more (what a longer sample gives is undefined); required on CUDA with Triton or flash (finding it would
    wait for the device). scale: head_dim ** -0.5. Returns (tokens, heads, head_dim) like q. Same inputs give
    the same bits with "triton" and "torch".

    impl: "auto" (Triton on CUDA, else torch) | "triton" | "torch" | "flash" (flash-attn, else torch's own
    varlen kernel, on CUDA: one bidirectional and one causal call). Raises TypeError or ValueError that names
    the argument. Values (cu_seqlens, prefix_lengths, and max_seqlen against them) are checked on the CPU; on
    CUDA, where that waits for the device, with "torch" or SCAMO_KERNELS_DEBUG=1 only.
    """
    samples = _check(q, k, v, cu_seqlens, max_seqlen)
    _check_int32(prefix_lengths, "prefix_lengths", (samples,), "(samples,)", q.device)
    return _attention(q, k, v, cu_seqlens, prefix_lengths, True, max_seqlen, scale, impl)


def bounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention inside each sample where row i sees the sample's keys [0, bounds[i]).

    bounds: int32 (tokens,), from 0 to the sample's length and non-decreasing inside a sample. A row that sees
    no key gives 0 and gets no gradient. All else as `prefix_causal_attention`; impl "flash" does not exist
    here.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    _check_int32(bounds, "bounds", (q.shape[0],), "(tokens,)", q.device)
    if impl == "flash":
        raise ValueError('impl = "flash": only prefix_causal_attention can be composed of flash calls')
    return _attention(q, k, v, cu_seqlens, bounds, False, max_seqlen, scale, impl)


def rotary_prefix_attention(
    qkv: Tensor,
    rope: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    *,
    max_seqlen: int,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`prefix_causal_attention` of a packed projection whose q and k are turned by rotary positions first.

    qkv: (tokens, 3, heads, head_dim), a view of the projection's output; read by strides and not copied where
    the heads of a token stand side by side. rope: float32 (length, head_dim / 2, 2), the cosine and sine of
    each position and adjacent pair (x[2j], x[2j + 1]), length >= max_seqlen; a row's position is its index in
    its sample. q and k are turned in float32. Only qkv gets a gradient: one contiguous (tokens, 3, heads,
    head_dim). Returns (tokens, heads, head_dim).

    A head_dim that is no multiple of 8 is slower: it cannot be read 16 bytes at a time. Heads of 100 stored
    at 104, with zeros in the last columns of qkv, scale = 100 ** -0.5 and rope padded with (1, 0), give the
    same results, and zeros in these columns of the output and of the gradient.

    cu_seqlens, prefix_lengths, max_seqlen, scale, dtypes and errors: as `prefix_causal_attention`. impl:
    "auto" | "triton" | "torch". Rotary positions: Su et al. 2021, eq. 34, pairs as in the released code.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape (tokens, 3, heads, head_dim), got {tuple(qkv.shape)}")
    _check_dtype(qkv, "qkv")
    samples = _check_samples(qkv, "qkv", cu_seqlens, max_seqlen)
    _check_int32(prefix_lengths, "prefix_lengths", (samples,), "(samples,)", qkv.device, "qkv")
    if rope.dtype != torch.float32:
        raise TypeError(f"rope: expected float32, got {rope.dtype}")
    if rope.dim() != 3 or tuple(rope.shape[1:]) != (qkv.shape[3] // 2, 2):
        expected = f"(length, head_dim / 2, 2) = (length, {qkv.shape[3] // 2}, 2)"
        raise ValueError(f"rope: expected shape {expected}, got {tuple(rope.shape)}")
    if rope.device != qkv.device:
        raise ValueError(f"rope: expected qkv's device {qkv.device}, got {rope.device}")
    if rope.shape[0] < max_seqlen:
        raise ValueError(f"rope: {rope.shape[0]} positions, fewer than max_seqlen = {max_seqlen}")
    chosen = resolve(impl, qkv)
    if chosen != "torch" and qkv.dtype == torch.float64:
        raise TypeError(f'qkv: impl = "{chosen}" does not take float64; use impl="torch"')
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    train = torch.is_grad_enabled() and qkv.requires_grad
    out, _, _ = torch.ops.scamo_kernels.rotary_attention(
        qkv, rope, cu_seqlens, prefix_lengths, max_seqlen, scale, train, chosen
    )
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    """Check what both fronts take, without looking at values; returns the number of samples."""
    if q.dim() != 3:
        raise ValueError(f"q: expected shape (tokens, heads, head_dim), got {tuple(q.shape)}")
    _check_dtype(q, "q")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name}: expected q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {tensor.device}")
    return _check_samples(q, "q", cu_seqlens, max_seqlen)


def _check_dtype(x: Tensor, name: str) -> None:
    if x.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}")


def _check_samples(x: Tensor, name: str, cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    """Check x's head_dim, cu_seqlens and max_seqlen; returns the number of samples."""
    head_dim = x.shape[-1]
    if head_dim % 4 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim must be a multiple of 4 from 4 to {MAX_HEAD_DIM}, got {head_dim}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (samples + 1,), got {tuple(cu_seqlens.shape)}")
    _check_int32(cu_seqlens, "cu_seqlens", tuple(cu_seqlens.shape), "(samples + 1,)", x.device, name)
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen = {max_seqlen}: expected 0 or more")
    return cu_seqlens.shape[0] - 1


def _check_int32(
    tensor: Tensor, name: str, shape: tuple, meaning: str, device: torch.device, owner: str = "q"
) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {meaning} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected {owner}'s device {device}, got {tensor.device}")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    max_seqlen: int | None,
    scale: float | None,
    impl: str,
) -> Tensor:
    chosen = resolve(impl, q, _CHOICES)
    if chosen != "torch" and q.dtype == torch.float64:
        raise TypeError(f'q: impl = "{chosen}" does not take float64; use impl="torch"')
    if chosen != "torch" and q.is_cuda and max_seqlen is None:
        raise ValueError("max_seqlen: required on CUDA (finding it there would wait for the device)")
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    longest = -1 if max_seqlen is None else max_seqlen
    if chosen == "flash":
        return _flash(q, k, v, cu_seqlens, bounds, longest, scale)
    out, _ = torch.ops.scamo_kernels.attention(q, k, v, cu_seqlens, bounds, prefix, longest, scale, chosen)
    return out


def flash_segments(cu_seqlens: Tensor, prefix_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boundaries that compose the prefix-causal mask of two variable-length calls, without gathering a row.

    Each sample becomes three segments: (prefix rows, motion rows, nothing) as queries. Call 1, bidirectional,
    gives them the keys (prefix, nothing, motion); call 2, causal and aligned at the bottom right, gives them
    (nothing, the whole sample, nothing). A segment without keys yields 0, so the calls add up.
    Returns the query boundaries, the keys of call 1 and of call 2, each int32 (3 samples + 1).
    """
    start, end = cu_seqlens[:-1], cu_seqlens[1:]
    middle = start + prefix_lengths
    last = cu_seqlens[-1:]
    queries, first, second = (
        torch.cat((torch.stack(edges, 1).reshape(-1), last))
        for edges in ((start, middle, end), (start, middle, middle), (start, start, end))
    )
    return queries, first, second


@functools.lru_cache(maxsize=1)
def _varlen():
    """varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) of flash-attn, else of torch, else None."""
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        def with_flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
            return flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, deterministic=True
            )

        return with_flash_attn
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def with_torch(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window)

    return with_torch


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    if not q.is_cuda:
        raise ValueError(f'impl = "flash": needs CUDA tensors, got {q.device}; use impl="torch"')
    if q.dtype == torch.float32:
        raise TypeError('q: impl = "flash" takes float16 or bfloat16, not float32; use impl="triton"')
    varlen = _varlen()
    if varlen is None:
        raise ValueError('impl = "flash": neither flash-attn nor torch.nn.attention.varlen is installed')
    if sees_values(q):
        from scamo_kernels import _attention_torch

        _attention_torch.check_values(cu_seqlens, prefix_lengths, True, q.shape[0], max_seqlen)
    return compose_varlen(varlen, q, k, v, cu_seqlens, prefix_lengths, max_seqlen, scale)


def compose_varlen(varlen, q, k, v, cu_seqlens, prefix_lengths, max_seqlen, scale) -> Tensor:
    """Prefix-causal attention from two calls of a variable-length attention (see `flash_segments`)."""
    queries, first, second = flash_segments(cu_seqlens, prefix_lengths)
    prefix = varlen(q, k, v, queries, first, max_seqlen, max_seqlen, False, scale)
    motion = varlen(q, k, v, queries, second, max_seqlen, max_seqlen, True, scale)
    return prefix + motion


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    max_seqlen: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "torch" or sees_values(q):
        from scamo_kernels import _attention_torch

        longest = _attention_torch.check_values(cu_seqlens, bounds, prefix, q.shape[0], max_seqlen)
        if impl == "torch":
            out = _attention_torch.forward(q, k, v, cu_seqlens, bounds, prefix, scale)
            return out, q.new_empty((0,), dtype=torch.float32)
        max_seqlen = longest if max_seqlen < 0 else max_seqlen
    from scamo_kernels import _attention_triton

    return _attention_triton.forward(q, k, v, cu_seqlens, bounds, prefix, max_seqlen, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    max_seqlen: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "torch":
        from scamo_kernels import _attention_torch

        return _attention_torch.backward(grad, q, k, v, cu_seqlens, bounds, prefix, scale)
    from scamo_kernels import _attention_triton

    if max_seqlen < 0:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _attention_triton.backward(grad, q, k, v, out, lse, cu_seqlens, bounds, prefix, max_seqlen, scale, grads)
    return grads


def _fake_forward(q, k, v, cu_seqlens, bounds, prefix, max_seqlen, scale, impl):
    # The torch path recomputes its softmax in the backward and keeps no log-sum-exp.
    lse_shape = (0,) if impl == "torch" else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(grad, q, k, v, out, lse, cu_seqlens, bounds, prefix, max_seqlen, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, bounds, ctx.prefix, ctx.max_seqlen, ctx.scale, ctx.impl = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, bounds)
    ctx.mark_non_differentiable(lse)
    # Else every backward would fill a zero gradient for lse.
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, _grad_lse: None):
    if grad is None:
        return (None,) * 9
    q, k, v, out, lse, cu_seqlens, bounds = ctx.saved_tensors
    grads = torch.ops.scamo_kernels.attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, bounds, ctx.prefix, ctx.max_seqlen, ctx.scale, ctx.impl
    )
    return (*grads, None, None, None, None, None, None)


def _keeps_turned(qkv: Tensor, max_seqlen: int, train: bool, impl: str) -> bool:
    """Whether the rotary forward returns the turned q and k for its backward."""
    if impl == "torch" or not train:
        return train
    from scamo_kernels import _attention_triton

    return _attention_triton.keeps_turned(qkv, max_seqlen)


def _rotary_forward(
    qkv: Tensor,
    rope: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    max_seqlen: int,
    scale: float,
    train: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    keep = _keeps_turned(qkv, max_seqlen, train, impl)
    if impl == "torch" or sees_values(qkv):
        from scamo_kernels import _attention_torch

        _attention_torch.check_values(cu_seqlens, prefix_lengths, True, qkv.shape[0], max_seqlen)
        if impl == "torch":
            out, turned = _attention_torch.rotary_forward(qkv, rope, cu_seqlens, prefix_lengths, scale)
            turned = turned if keep else qkv.new_empty((0,))
            return out, qkv.new_empty((0,), dtype=torch.float32), turned
    from scamo_kernels import _attention_triton

    return _attention_triton.rotary_forward(qkv, rope, cu_seqlens, prefix_lengths, max_seqlen, scale, keep)


def _rotary_backward(
    grad: Tensor,
    qkv: Tensor,
    rope: Tensor,
    out: Tensor,
    lse: Tensor,
    turned: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    max_seqlen: int,
    scale: float,
    impl: str,
) -> Tensor:
    if impl == "torch":
        from scamo_kernels import _attention_torch

        return _attention_torch.rotary_backward(grad, qkv, rope, turned, cu_seqlens, prefix_lengths, scale)
    from scamo_kernels import _attention_triton

    return _attention_triton.rotary_backward(
        grad, qkv, rope, out, lse, turned, cu_seqlens, prefix_lengths, max_seqlen, scale
    )


def _fake_rotary_forward(qkv, rope, cu_seqlens, prefix_lengths, max_seqlen, scale, train, impl):
    tokens, _, heads, head_dim = qkv.shape
    turned: tuple[int, ...] = (0,)
    if _keeps_turned(qkv, max_seqlen, train, impl):
        turned = 2, tokens, heads, head_dim
        if impl == "triton":
            from scamo_kernels import _attention_triton

            turned = _attention_triton.turned_shape(qkv)
    return (
        qkv.new_empty((tokens, heads, head_dim)),
        qkv.new_empty((0,) if impl == "torch" else (heads, tokens), dtype=torch.float32),
        qkv.new_empty(turned),
    )


def _fake_rotary_backward(grad, qkv, rope, *_):
    return qkv.new_empty(qkv.shape)


def _setup_rotary(ctx, inputs, output) -> None:
    qkv, rope, cu_seqlens, prefix_lengths, ctx.max_seqlen, ctx.scale, _, ctx.impl = inputs
    out, lse, turned = output
    ctx.save_for_backward(qkv, rope, out, lse, turned, cu_seqlens, prefix_lengths)
    ctx.mark_non_differentiable(lse, turned)
    ctx.set_materialize_grads(False)


def _rotary_autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 8
    grad_qkv = torch.ops.scamo_kernels.rotary_attention_backward(
        grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale, ctx.impl
    )
    return grad_qkv, *(None,) * 7


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor bounds, bool prefix, "
    "SymInt max_seqlen, float scale, str impl) -> (Tensor, Tensor)"
)
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, Tensor bounds, bool prefix, SymInt max_seqlen, float scale, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake(NAME + "attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(NAME + "attention", _autograd, setup_context=_setup, lib=LIBRARY)
define(
    "rotary_attention(Tensor qkv, Tensor rope, Tensor cu_seqlens, Tensor prefix_lengths, "
    "SymInt max_seqlen, float scale, bool train, str impl) -> (Tensor, Tensor, Tensor)"
)
define(
    "rotary_attention_backward(Tensor grad, Tensor qkv, Tensor rope, Tensor out, Tensor lse, Tensor turned, "
    "Tensor cu_seqlens, Tensor prefix_lengths, SymInt max_seqlen, float scale, str impl) -> Tensor"
)
LIBRARY.impl("rotary_attention", _rotary_forward, "CompositeExplicitAutograd")
LIBRARY.impl("rotary_attention_backward", _rotary_backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "rotary_attention", _fake_rotary_forward, lib=LIBRARY)
torch.library.register_fake(NAME + "rotary_attention_backward", _fake_rotary_backward, lib=LIBRARY)
torch.library.register_autograd(
    NAME + "rotary_attention", _rotary_autograd, setup_context=_setup_rotary, lib=LIBRARY
)
