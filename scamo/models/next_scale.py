"""ScaleMoGen's predictor: all tokens of a scale at once, from the coarser scales and a text.

Sizes are those of the released code. Tokens are packed (scamo.data.scales): none is padding. A token sees its
own scale and the coarser ones, so a sample is one pass in training and S in generation, which keeps the keys
and values of the scales that are done.

Shape letters: B motions, N packed tokens, C width, H heads, D head dim, S scales, d bits, E text width, P
packed text states, L tokens of the longest motion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from scamo_kernels import bounded_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scamo.data.scales import ScaleBatch
from scamo.errors import ScaMoError
from scamo.models.layers import Linear, rotate, small_init
from scamo.tokenizers.multiscale import SCALES

Scales = tuple[tuple[int, int], ...]
MODULATIONS = 6  # scale, shift and gate of the attention and of the MLP
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class NextScaleConfig:
    """The next-scale transformer (ScaleMoGen; released code).

    text_width, scales and bits are taken from the text states and the tokenizer; text_width 0 is unset.
    pool_heads: of the text's pooling; 0 for 16, or as many as leave 16 channels to each.
    drop_path: probability that a sample skips a branch of the last block; it grows from 0 in the first.
    drop_text: probability that a training sample loses its text; 0 makes a model that cannot be guided.
    level_weights: of a scale's tokens in the loss; () for sqrt(tokens of the finest / tokens of the scale).
    length_weight: of the length's cross-entropy, in tokens of the finest scale.
    """

    depth: int = 12
    width: int = 768
    heads: int = 8
    hidden: int = 3072
    pool_heads: int = 0
    text_width: int = 0
    max_text: int = 150
    scales: tuple[tuple[int, ...], ...] = SCALES
    bits: int = 24
    drop_path: float = 0.1
    drop_text: float = 0.1
    level_weights: tuple[float, ...] = ()
    length_weight: float = 10.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "hidden", "max_text", "bits", "rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected a value above 0")
        for name in ("pool_heads", "text_width", "length_weight"):
            if getattr(self, name) < 0:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected 0 or more")
        for name in ("drop_path", "drop_text"):
            if not 0 <= getattr(self, name) < 1:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected a probability in [0, 1)")
        if self.bits > 31:
            raise ScaMoError(f"bits = {self.bits}: expected 1 to 31")
        for name in ("heads", "pool_heads"):
            if self.width % (getattr(self, name) or 1):
                raise ScaMoError(f"width = {self.width} does not divide by {name} = {getattr(self, name)}")
        if self.head_dim % 4 or self.head_dim > 128:
            raise ScaMoError(
                f"width / heads = {self.head_dim}: the attention kernels need a multiple of 4 up to 128"
            )
        if not self.scales or any(len(s) != 2 or min(s) < 1 for s in self.scales):
            raise ScaMoError(f"scales = {list(map(list, self.scales))}: expected bins and regions of each")
        last = self.scales[-1]
        if any(bins > last[0] or regions > last[1] for bins, regions in self.scales):
            raise ScaMoError(f"scales: the last is {list(last)}, and one before it is finer")
        weights = self.level_weights
        if weights and (len(weights) != len(self.scales) or min(weights) < 0 or max(weights) <= 0):
            raise ScaMoError(
                f"level_weights = {list(weights)}: expected {len(self.scales)}, none below 0 and one above"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def latents(self) -> int:
        """Bins of the finest scale: the classes of the length."""
        return self.scales[-1][0]

    @property
    def tokens(self) -> int:
        """Tokens L of the longest motion."""
        return sum(bins * regions for bins, regions in self.scales)

    @property
    def text_heads(self) -> int:
        """Heads of the pooling, pool_heads or what stands for 0."""
        fitting = (h for h in (16, 8, 4, 2, 1) if self.width % h == 0 and self.width // h >= 16)
        return self.pool_heads or next(fitting, 1)

    def token_weights(self) -> tuple[float, ...]:
        """Of a token of each scale in the loss, (S,)."""
        finest = self.scales[-1][0] * self.scales[-1][1]
        return self.level_weights or tuple(math.sqrt(finest / (t * r)) for t, r in self.scales)

    def grid(self) -> Scales:
        """The scales as a key of tables."""
        return tuple((bins, regions) for bins, regions in self.scales)


@functools.lru_cache(maxsize=16)
def token_levels(scales: Scales, device: torch.device) -> Tensor:
    """The scale of each of the L tokens, int64 (L,)."""
    with torch.inference_mode(False):  # the cached tables also serve training
        counts = torch.tensor([bins * regions for bins, regions in scales])
        return torch.repeat_interleave(torch.arange(len(scales)), counts).to(device)


@functools.lru_cache(maxsize=16)
def rotary_grid(scales: Scales, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine for each of the L tokens and pair of channels: float32 (L, head_dim / 2, 2).

    The first half of the pairs turns by the time, the other by the region, each at its place on the finest
    grid, rounded. Not a buffer, for the reason of `rotary_table`.
    """
    most = scales[-1]
    pairs = head_dim // 4
    frequency = base ** (-np.arange(pairs) / pairs)
    angles = []
    for bins, regions in scales:
        time = np.round(np.arange(bins) * most[0] / bins)
        region = np.round(np.arange(regions) * most[1] / regions)
        places = np.stack(np.broadcast_arrays(time[:, None], region), -1).reshape(-1, 2, 1)
        angles.append((places * frequency).reshape(bins * regions, -1))
    angle = np.concatenate(angles)
    table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    with torch.inference_mode(False):
        return torch.from_numpy(table).to(device)


class Modulation(NamedTuple):
    """How a sample's text scales, shifts and gates two branches: each (N, C), a row for each token."""

    scale_1: Tensor
    shift_1: Tensor
    gate_1: Tensor
    scale_2: Tensor
    shift_2: Tensor
    gate_2: Tensor


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of x (N, C), times 1 + scale, plus shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def split_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """Every row of a sample sees all its keys: q (N, H, D), k and v (P, H, D) packed -> (N, H, D).

    One call per sample: fast on a CPU, where it computes nothing that is thrown away.
    """
    rows, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (a, b, c))).transpose(0, 1)
        for a, b, c in zip(q.split(rows), k.split(keys), v.split(keys), strict=True)
    ]
    return torch.cat(parts)


class Joined(NamedTuple):
    """Texts and motions on one axis, each motion behind its text, for `joined_attention`.

    order int64 (P + N,): where each row is in (text, motion); motion int64 (N,): the motions' rows.
    bounds int32 (P + N,): the text's states.
    """

    order: Tensor
    motion: Tensor
    cu_seqlens: Tensor
    bounds: Tensor
    longest: int

    @staticmethod
    def of(batch: ScaleBatch) -> Joined:
        texts = batch.text_states.shape[0]
        cu_q, cu_k = batch.cu_seqlens, batch.cu_text
        device, samples = cu_q.device, torch.arange(batch.n_samples, device=cu_q.device)
        of_text = torch.repeat_interleave(samples, cu_k.diff().long(), output_size=texts)
        of_all = torch.cat((of_text, batch.sample))
        # Stable: within a sample the text comes first, and all keep their order.
        order = of_all.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        bounds = cu_k.diff()[of_all[order]]
        return Joined(order, place[texts:], cu_q + cu_k, bounds, batch.longest + batch.longest_text)


def joined_attention(q: Tensor, k: Tensor, v: Tensor, joined: Joined, impl: str) -> Tensor:
    """`split_attention` by one call of `bounded_attention`, whose kernel skips the keys behind a bound."""
    before, behind = q.new_zeros(k.shape), q.new_zeros(q.shape)
    a, b, c = (
        torch.cat(pair).index_select(0, joined.order) for pair in ((before, q), (k, behind), (v, behind))
    )
    out = bounded_attention(a, b, c, joined.cu_seqlens, joined.bounds, max_seqlen=joined.longest, impl=impl)
    return out.index_select(0, joined.motion)


class _Rows(NamedTuple):
    """What all blocks of a forward share."""

    batch: ScaleBatch
    rope: Tensor
    joined: Joined | None


class NextScaleBlock(nn.Module):
    """Self-attention over scales, cross-attention to the text and an MLP, on packed tokens.

    `project`, `attended` and `finish` are the parts between the attentions, so that generation can put its
    own (cached) ones there. The queries and keys of the self-attention have length 1 and a learnt scale for
    each head.
    """

    def __init__(self, config: NextScaleConfig, impl: str = "auto") -> None:
        super().__init__()
        width = config.width
        self.heads, self.eps, self.impl = config.heads, config.norm_eps, impl
        # Flat, as what weight decay spares.
        self.modulation = nn.Parameter(torch.zeros(MODULATIONS * width))
        self.log_scale = nn.Parameter(torch.zeros(config.heads))
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)
        self.text_norm = nn.LayerNorm(width, config.norm_eps)
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.text_out = Linear(width, width)
        self.up = Linear(width, config.hidden)
        self.down = Linear(config.hidden, width)

    def modulations(self, condition: Tensor, sample: Tensor, keep: Tensor | None = None) -> Modulation:
        """Of the shared condition (B, 6, C), for the rows of samples (N,). keep: (2, B), of the gates."""
        own = condition + self.modulation.view(MODULATIONS, -1)
        if keep is not None:
            factor = torch.ones_like(own[..., :1])
            factor[:, 2], factor[:, 5] = keep[:, :, None].to(own.dtype)
            own = own * factor
        return Modulation(*(own[:, i].index_select(0, sample) for i in range(MODULATIONS)))

    def project(self, x: Tensor, m: Modulation, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C) -> q, k, v (N, H, D) of the self-attention, whose scale is 1."""
        normed = modulate(x, m.scale_1, m.shift_1, self.eps)
        q, k, v = self._heads(self.qkv(normed), 3)
        scale = self.log_scale.float().clamp_max(math.log(MAX_LOGIT_SCALE)).exp()
        q, k = (rotate(F.normalize(part.float(), dim=-1), rope) for part in (q, k))
        return (q * scale[:, None]).to(v.dtype), k.to(v.dtype), v

    def attended(self, x: Tensor, m: Modulation, attended: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C) and the self-attention's output (N, H, D) -> x, and queries (N, H, D) to the text."""
        x = torch.addcmul(x, m.gate_1, self.out(attended.flatten(1)))
        return x, self._heads(self.query(self.text_norm(x)), 1)[0]

    def text(self, text: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (P, H, D) of text (P, C)."""
        return self._heads(self.key_value(text), 2)

    def finish(self, x: Tensor, m: Modulation, attended: Tensor) -> Tensor:
        """x (N, C) and the cross-attention's output (N, H, D) -> x."""
        x = x + self.text_out(attended.flatten(1))
        hidden = F.gelu(self.up(modulate(x, m.scale_2, m.shift_2, self.eps)))
        return torch.addcmul(x, m.gate_2, self.down(hidden))

    def forward(self, x: Tensor, condition: Tensor, keep: Tensor | None, text: Tensor, rows: _Rows) -> Tensor:
        """x (N, C), the condition (B, 6, C) and text (P, C) -> x (N, C)."""
        batch = rows.batch
        m = self.modulations(condition, batch.sample, keep)
        q, k, v = self.project(x, m, rows.rope)
        over_scales = bounded_attention(
            q, k, v, batch.cu_seqlens, batch.bounds, max_seqlen=batch.longest, scale=1.0, impl=self.impl
        )
        x, q = self.attended(x, m, over_scales)
        k, v = self.text(text)
        if rows.joined is None:
            return self.finish(x, m, split_attention(q, k, v, batch.cu_seqlens, batch.cu_text))
        return self.finish(x, m, joined_attention(q, k, v, rows.joined, self.impl))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).unbind(1)


class TextReader(nn.Module):
    """Text states (P, E) packed -> what the cross-attention sees (P, C) and their pooled sum (B, C).

    The pooling is an attention of learnt queries, one for each head.
    """

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.text_heads
        self.norm = nn.RMSNorm(config.text_width, config.norm_eps)
        self.in_proj = Linear(config.text_width, width)
        self.out_proj = Linear(width, width)
        self.pool_query = nn.Parameter(torch.empty(self.heads, width // self.heads))
        self.pool_kv = Linear(config.text_width, 2 * width)
        self.pool_out = Linear(width, width)

    def forward(self, states: Tensor, cu_text: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        normed = self.norm(states)
        kv, there = pad_rows(self.pool_kv(normed), cu_text, longest)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.pool_query[None, :, None].expand(k.shape[0], -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        return self.out_proj(F.gelu(self.in_proj(normed))), self.pool_out(pooled.flatten(1))


def pad_rows(x: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed rows (N, ...) -> (B, longest, ...), zeros behind each sample's end, and bool (B, longest)."""
    start, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    place = torch.arange(longest, device=x.device)
    there = place < lengths[:, None]
    index = (start[:, None] + place).clamp_max(x.shape[0] - 1)
    shape = (*there.shape, *[1] * (x.dim() - 1))
    return x[index].masked_fill(~there.view(shape), 0), there


class NextScaleOutput(NamedTuple):
    """What a forward pass gives.

    loss_sum: float32 (), differentiable: the sum over tokens of weight times cross-entropy, a bit's mean in
    nats, and the weighted one of the lengths. weight: float (), the tokens' weights: loss_sum / weight is the
    loss. losses, errors: float32 (N,), without gradient, each token's mean cross-entropy, and its share of
    bits that the likelier value gets wrong. length_losses: float32 (B,).
    """

    loss_sum: Tensor
    weight: Tensor
    losses: Tensor
    errors: Tensor
    length_losses: Tensor


@dataclass
class ScaleCache:
    """What generation keeps of B rows: of every layer the keys and values of the tokens so far.

    states (layers, 2, B, H, capacity, D); filled: tokens of each row. text (layers, 2, B, H, P, D) and there,
    bool (B, 1, 1, P) or None where all texts have P states. pooled (B, C); condition (B, 6, C).
    """

    states: Tensor
    filled: list[int]
    text: Tensor
    there: Tensor | None
    pooled: Tensor
    condition: Tensor


class NextScale(nn.Module):
    """The next-scale transformer: text and the sum of coarser scales -> d binary logits a token.

    A bit's two-way softmax has one logit, the difference of the two. Initialisation: linear layers normal
    with std sqrt(2 / (5 C)), divided by sqrt(3 depth) where a branch enters the residual stream; what
    modulates near 0, gates 1; layers from the text or the bits normal with std 1 / sqrt(their inputs).
    """

    def __init__(
        self, config: NextScaleConfig, *, impl: str = "auto", checkpoint_activations: bool = False
    ) -> None:
        """impl: of all kernels. checkpoint_activations: keep only the blocks' inputs in training.

        Raises ScaMoError when config.text_width is 0 (to be filled from the text states).
        """
        super().__init__()
        if config.text_width < 1:
            raise ScaMoError(f"text_width = {config.text_width}: expected a value above 0")
        self.config, self.impl = config, impl
        self.checkpoint_activations = checkpoint_activations
        width = config.width
        self.text = TextReader(config)
        self.words = Linear(config.bits, width)
        self.levels = nn.Embedding(len(config.scales), width)
        self.condition = nn.Linear(width, MODULATIONS * width)
        self.blocks = nn.ModuleList(NextScaleBlock(config, impl) for _ in range(config.depth))
        self.head_condition = nn.Linear(width, 2 * width)
        self.head = Linear(width, config.bits)
        self.length_head = nn.Linear(width, config.latents)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        std = small_init(self.config.width)
        near_zero = ("condition.weight", "head.weight", "length_head.weight", "levels.weight")
        from_inputs = ("words.weight", "text.in_proj.weight", "text.pool_kv.weight", "text.pool_query")
        for name, parameter in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.zeros_(parameter)
                with torch.no_grad():
                    parameter.view(MODULATIONS, -1)[[2, 5]] = 1.0
            elif name.endswith("log_scale"):
                nn.init.constant_(parameter, math.log(4.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith(near_zero):
                nn.init.normal_(parameter, std=0.02)
            elif name in from_inputs:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
            elif name.startswith("blocks") and name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(3 * self.config.depth))
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def dtype(self) -> torch.dtype:
        return self.words.weight.dtype

    def forward(self, batch: ScaleBatch) -> NextScaleOutput:
        """The loss of a batch: see NextScaleOutput. Raises ScaMoError for a text above max_text states."""
        logits, lengths = self._run(batch)
        bits = unpack_bits(batch.targets, self.config.bits)
        losses = F.binary_cross_entropy_with_logits(logits, bits, reduction="none").mean(-1)
        weights = torch.tensor(self.config.token_weights(), device=logits.device)[
            self.levels_of(batch.tokens)
        ]
        length_losses = F.cross_entropy(lengths, batch.latents - 1, reduction="none")
        loss_sum = (losses * weights).sum() + self.config.length_weight * length_losses.sum()
        errors = ((logits > 0) != (bits > 0)).float().mean(-1)
        return NextScaleOutput(loss_sum, weights.sum(), losses.detach(), errors, length_losses.detach())

    def logits(self, batch: ScaleBatch) -> Tensor:
        """float32 (N, d): above 0 where a bit is likelier 1."""
        return self._run(batch)[0]

    def _run(self, batch: ScaleBatch) -> tuple[Tensor, Tensor]:
        self._check_text(batch.longest_text)
        text, pooled = self.text(batch.text_states.to(self.dtype), batch.cu_text, batch.longest_text)
        x = self._embed(batch.inputs, batch.tokens, batch.sample, pooled)
        condition = self._condition(pooled)
        rows = _Rows(batch, self._rope(batch.tokens), Joined.of(batch) if x.is_cuda else None)
        keep = self._keep(batch)
        for index, block in enumerate(self.blocks):
            inputs = x, condition, None if keep is None else keep[index], text, rows
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self._bits(x, pooled, batch.sample), self.length_head(pooled).float()

    def _keep(self, batch: ScaleBatch) -> Tensor | None:
        """Factors (depth, 2, B) of the branches: 0 or 1 / (1 - p). Drawn from the batch's seed, so that they
        do not depend on the rank that computes it, nor on what was drawn before."""
        if not self.training or not self.config.drop_path:
            return None
        depth = self.config.depth
        p = torch.linspace(0, self.config.drop_path, depth)[:, None, None]
        generator = torch.Generator().manual_seed(batch.seed)
        kept = torch.rand((depth, 2, batch.n_samples), generator=generator) >= p
        return (kept / (1 - p)).to(batch.tokens.device)

    # -- generation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read_texts(self, texts: Sequence[Tensor], capacity: int) -> ScaleCache:
        """A cache for motions of at most `capacity` tokens; texts: float (P_i, E), P_i >= 1.

        Raises ScaMoError for no text, one without states, above max_text of them, or of another width.
        """
        lengths = [len(text) for text in texts]
        if not lengths or min(lengths) < 1:
            raise ScaMoError("texts: expected one or more, each of at least one state")
        if any(text.shape[1:] != (self.config.text_width,) for text in texts):
            raise ScaMoError(f"texts: expected states of width {self.config.text_width}")
        longest = max(lengths)
        self._check_text(longest)
        device = self.words.weight.device
        states = torch.cat(list(texts)).to(device, self.dtype)
        cu_text = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
        text, pooled = self.text(states, cu_text, longest)
        cached = []
        for block in self._blocks():
            parts = [pad_rows(part, cu_text, longest) for part in block.text(text)]
            cached.append(torch.stack([part.transpose(1, 2) for part, _ in parts]))
            there = parts[0][1][:, None, None]
        rows, config = len(lengths), self.config
        shape = config.depth, 2, rows, config.heads, capacity, config.head_dim
        return ScaleCache(
            states=torch.zeros(shape, dtype=self.dtype, device=device),
            filled=[0] * rows,
            text=torch.stack(cached),
            there=None if min(lengths) == longest else there,
            pooled=pooled,
            condition=self._condition(pooled),
        )

    def length_logits(self, cache: ScaleCache) -> Tensor:
        """float32 (B, latents): of each text's motion, class i for i + 1 latents of 4 frames."""
        return self.length_head(cache.pooled).float()

    @torch.no_grad()
    def extend(self, cache: ScaleCache, inputs: Tensor, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Read the tokens of the next scale of every row; float32 logits (M, d) of their bits.

        inputs: float (M, d), as in ScaleBatch, rows end to end; tokens int64 (M,); counts: of each row, (B,).
        Raises ScaMoError: other counts than rows or tokens, or no room in the cache.
        """
        if len(counts) != len(cache.filled) or sum(counts) != len(tokens):
            raise ScaMoError(f"{len(counts)} counts of {len(tokens)} tokens for {len(cache.filled)} rows")
        ends = [filled + count for filled, count in zip(cache.filled, counts, strict=True)]
        if max(ends) > cache.states.shape[4]:
            raise ScaMoError(f"the cache is full: it has room for {cache.states.shape[4]} tokens")
        device, most, end = tokens.device, max(counts), max(ends)
        row_counts = torch.tensor(counts, device=device)
        sample = torch.repeat_interleave(torch.arange(len(counts), device=device), row_counts)
        starts = row_counts.cumsum(0) - row_counts
        place = torch.arange(len(tokens), device=device) - starts[sample]
        position = place + torch.tensor(cache.filled, device=device)[sample]
        there = None
        if min(ends) < end:
            limits = torch.tensor(ends, device=device)
            there = (torch.arange(end, device=device) < limits[:, None])[:, None, None]
        x = self._embed(inputs, tokens, sample, cache.pooled)
        rope = self._rope(tokens)

        def spread(q: Tensor) -> Tensor:
            if min(counts) == most:
                return q.view(len(counts), most, *q.shape[1:]).transpose(1, 2)
            padded = q.new_zeros(len(counts), most, *q.shape[1:])
            padded[sample, place] = q
            return padded.transpose(1, 2)

        def gather(out: Tensor) -> Tensor:
            return out.transpose(1, 2)[sample, place]

        for block, states, text in zip(self._blocks(), cache.states, cache.text, strict=True):
            m = block.modulations(cache.condition, sample)
            q, k, v = block.project(x, m, rope)
            states[0][sample, :, position] = k
            states[1][sample, :, position] = v
            out = F.scaled_dot_product_attention(
                spread(q), states[0][:, :, :end], states[1][:, :, :end], attn_mask=there, scale=1.0
            )
            x, q = block.attended(x, m, gather(out))
            out = F.scaled_dot_product_attention(spread(q), text[0], text[1], attn_mask=cache.there)
            x = block.finish(x, m, gather(out))
        cache.filled = ends
        return self._bits(x, cache.pooled, sample)

    # -- parts -----------------------------------------------------------------------------------------------

    def _embed(self, inputs: Tensor, tokens: Tensor, sample: Tensor, pooled: Tensor) -> Tensor:
        """(N, C): the text for the first scale, the sum of coarser ones for the others; and the level."""
        level = self.levels_of(tokens)
        start = pooled.index_select(0, sample)
        x = torch.where((level == 0)[:, None], start, self.words(inputs.to(self.dtype)))
        return x + self.levels(level)

    def _condition(self, pooled: Tensor) -> Tensor:
        return self.condition(F.silu(pooled)).unflatten(-1, (MODULATIONS, -1))

    def _bits(self, x: Tensor, pooled: Tensor, sample: Tensor) -> Tensor:
        scale, shift = self.head_condition(F.silu(pooled)).index_select(0, sample).chunk(2, -1)
        return self.head(modulate(x, scale, shift, self.config.norm_eps)).float()

    def levels_of(self, tokens: Tensor) -> Tensor:
        """The scale of each token, int64 (N,)."""
        return token_levels(self.config.grid(), tokens.device)[tokens]

    def _rope(self, tokens: Tensor) -> Tensor:
        config = self.config
        return rotary_grid(config.grid(), config.head_dim, config.rope_base, tokens.device)[tokens]

    def _blocks(self) -> Iterator[NextScaleBlock]:
        return (cast(NextScaleBlock, block) for block in self.blocks)

    def _check_text(self, longest: int) -> None:
        if longest > self.config.max_text:
            raise ScaMoError(f"a text of {longest} states: the model takes up to {self.config.max_text}")


def unpack_bits(bits: Tensor, d: int) -> Tensor:
    """int32 (...) -> float32 (..., d) of 0 and 1, channel 0 the least significant."""
    return (bits.unsqueeze(-1) >> torch.arange(d, dtype=torch.int32, device=bits.device) & 1).float()


def pack_bits(positive: Tensor) -> Tensor:
    """bool (..., d) -> int32 (...): the inverse of `unpack_bits`."""
    powers = 1 << torch.arange(positive.shape[-1], dtype=torch.int32, device=positive.device)
    return (positive * powers).sum(-1, dtype=torch.int32)
