"""ScaMo's transformer (paper section 3.2): text states as a prefix, bidirectional or causal, then motion.

Sizes are those of Tab. 1. Positions are packed (scamo.data.batches): no layer computes on padding.

Parameters, and their names in the released checkpoints (under `ckpt["trans"]`):

    embedding.weight         (K + 2, C)         transformer.wte.weight
    text_projection.weight   (C, text width)    llama_proj.weight
    text_projection.bias     (C,)               llama_proj.bias
    blocks.{i}.norm_1.weight (C,)               transformer.h.{i}.rms_1.scale
    blocks.{i}.qkv.weight    (3 C, C) q | k | v transformer.h.{i}.attn.c_attn.weight
    blocks.{i}.out.weight    (C, C)             transformer.h.{i}.attn.c_proj.weight
    blocks.{i}.norm_2.weight (C,)               transformer.h.{i}.rms_2.scale
    blocks.{i}.gate_up.weight (2 hidden, C)     transformer.h.{i}.mlp.c_fc1.weight | .c_fc2.weight, gate first
    blocks.{i}.down.weight   (C, hidden)        transformer.h.{i}.mlp.c_proj.weight
    norm.weight              (C,)               transformer.ln_f.scale
    head.weight              (K + 1, C)         lm_head.weight
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from scamo_kernels import decode_attention, rotary_prefix_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scamo.config import ModelConfig
from scamo.data.batches import PackedBatch
from scamo.errors import ScaMoError
from scamo.models.layers import Block, Head, Linear, RMSNorm, rotary_table, rotate, small_init, storage_dim


class LMOutput(NamedTuple):
    """loss_sum: float32 (), sum over the scored rows of the cross-entropy in nats, differentiable.

    losses: float32 (S,), the same per row, without gradient. n_scored: S.
    """

    loss_sum: Tensor
    losses: Tensor
    n_scored: int


@dataclass
class KVCache:
    """Keys and values of every layer, written in place.

    states (layers, 2, rows, H, capacity, columns of a head): keys (rotated) and values; lengths int64
    (rows,): positions that are filled. longest: the longest row there ever was, known without asking the
    device; None where the caller watches the capacity himself.
    """

    states: Tensor
    lengths: Tensor
    longest: int | None = None

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.states.shape[-2]

    def extend(self) -> None:
        """Announce one more position of every row; ScaMoError where it is known that there is no room."""
        if self.longest is not None:
            if self.longest >= self.capacity:
                raise ScaMoError(f"the cache is full: it has room for {self.capacity} positions")
            self.longest += 1

    def first(self, rows: int) -> KVCache:
        """The first rows only, in the same memory."""
        return KVCache(self.states[:, :, :rows], self.lengths[:rows], self.longest)

    def compact(self, alive: list[int]) -> tuple[KVCache, list[int]]:
        """A cache of the rows `alive` (increasing) only; it shares the memory and spoils this cache.

        Also returns the order: entry i is the old row that is now row i. Only as many rows move as died.
        """
        n = len(alive)
        living = set(alive)
        movers = iter([row for row in alive if row >= n])
        order = [row if row in living else next(movers) for row in range(n)]
        for new, old in enumerate(order):
            if new != old:
                self.states[:, :, new] = self.states[:, :, old]
                self.lengths[new] = self.lengths[old]
        return self.first(n), order


class _Interleave(torch.autograd.Function):
    """Text (T, C) and motion (M, C) at their rows of one (T + M, C); keeps the rows' numbers only."""

    @staticmethod
    def forward(ctx, text: Tensor, motion: Tensor, text_rows: Tensor, motion_rows: Tensor) -> Tensor:
        ctx.save_for_backward(text_rows, motion_rows)
        x = text.new_empty(text.shape[0] + motion.shape[0], text.shape[1])
        return x.index_copy_(0, text_rows, text).index_copy_(0, motion_rows, motion)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        text_rows, motion_rows = ctx.saved_tensors
        return grad.index_select(0, text_rows), grad.index_select(0, motion_rows), None, None


class PrefixLM(nn.Module):
    """Text-prefix transformer for K motion codes; EOS is K (a target only), PAD is K + 1 (never used).

    Initialisation: linear layers and the head normal with std sqrt(2 / (5 C)) (GPT-NeoX's small init),
    divided by sqrt(2 layers) where a branch enters the residual stream (out, down); embedding and text
    projection normal with std 0.02 and 1 / sqrt(text width), bias 0, norms 1.
    """

    def __init__(
        self, config: ModelConfig, *, impl: str = "auto", checkpoint_activations: bool = False
    ) -> None:
        """impl: of all kernels, as the ops of scamo_kernels take it.

        checkpoint_activations: keep only the blocks' inputs, and compute the blocks again in the backward.

        Raises ScaMoError when config.codes or config.text_width is 0 (to be filled from a dataset).
        """
        super().__init__()
        for name in ("codes", "text_width"):
            if getattr(config, name) < 1:
                raise ScaMoError(f"model.{name} = {getattr(config, name)}: expected a value above 0")
        self.config, self.impl = config, impl
        self.checkpoint_activations = checkpoint_activations
        width = config.width
        self.embedding = nn.Embedding(config.codes + 2, width)
        self.text_projection = Linear(config.text_width, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.hidden, config.norm_eps, impl) for _ in range(config.layers)
        )
        self.norm = RMSNorm(width, config.norm_eps, impl)
        self.head = Head(width, config.codes + 1, impl)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        std = small_init(self.config.width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name == "embedding.weight":
                nn.init.normal_(parameter, std=0.02)
            elif name == "text_projection.weight":
                nn.init.normal_(parameter, std=1 / math.sqrt(self.config.text_width))
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.layers))
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def block_parameters(self) -> int:
        """Parameters of the blocks and the last norm: N without embeddings, head and text projection."""
        return sum(p.numel() for m in (self.blocks, self.norm) for p in m.parameters())

    def forward(self, batch: PackedBatch) -> LMOutput:
        """Cross-entropy of the scored rows (motion tokens and EOS; paper Eq. 5). See LMOutput.

        Raises:
            ScaMoError: a sample is longer than config.max_positions.
        """
        hidden = self.hidden_states(batch)
        loss_sum, losses = self.head(hidden, batch.targets)
        return LMOutput(loss_sum, losses, batch.n_scored)

    def logits(self, batch: PackedBatch) -> Tensor:
        """float32 (S, K + 1): what the scored rows predict, all in memory at once (for small batches)."""
        return self.head(self.hidden_states(batch))

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """(S, C): the normalised last hidden states of the scored rows."""
        self.check_length(batch.max_seqlen)
        text = self.text_projection(batch.text_states.to(self.dtype))
        x = _Interleave.apply(text, self.embedding(batch.motion_tokens), batch.text_rows, batch.motion_rows)
        rope, branch = self._rope(x.device), None
        prefix_lengths = self.config.both_ways(batch.prefix_lengths)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            rows = batch.scored_rows if index == last else None
            inputs = x, branch, rope, batch.cu_seqlens, prefix_lengths, batch.max_seqlen, rows
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, branch = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch = block(*inputs)
        return self.norm(x, branch)[0]

    def prefix(self, text: Tensor) -> Tensor:
        """What of text states, float (P, text width), stands before the motion: all, or their mean."""
        return text.float().mean(0, keepdim=True) if self.config.text == "sentence" else text

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for `rows` sequences of at most `capacity` positions."""
        device, heads = self.embedding.weight.device, self.config.heads
        shape = len(self.blocks), 2, rows, heads, capacity, storage_dim(self.config.head_dim, device)
        states = torch.zeros(shape, dtype=self.dtype, device=device)
        return KVCache(states, torch.zeros(rows, dtype=torch.int64, device=device))

    @torch.no_grad()
    def prefill(self, texts: list[Tensor], new_tokens: int) -> tuple[KVCache, Tensor]:
        """Read the text prefixes; float (P_i, text width) each, at least one row.

        Returns the cache, with room for `new_tokens` more positions, and the float32 logits (B, K + 1) of the
        first motion token.

        Raises:
            ScaMoError: an empty text, or a text that leaves no room within config.max_positions.
        """
        lengths = [text.shape[0] for text in texts]
        if min(lengths) < 1:
            raise ScaMoError(f"text {lengths.index(0)} has no states: expected at least one")
        prefixes = [self.prefix(text) for text in texts]
        longest = max(prefix.shape[0] for prefix in prefixes)
        self.check_length(longest + new_tokens)
        cache = self.new_cache(len(texts), longest + new_tokens)
        logits = self.read_prefixes(cache, prefixes, list(range(len(texts))))
        cache.longest = longest
        return cache, logits

    @torch.no_grad()
    def read_prefixes(
        self, cache: KVCache, prefixes: list[Tensor], rows: list[int], starts: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Begin new sequences in some rows of a cache, whatever they hold, with `prefix` of a text each.

        starts: of each, the motion codes that follow it there already. Returns the float32 logits (B, K + 1)
        of the tokens that come next.
        """
        device = self.embedding.weight.device
        text = torch.tensor([len(prefix) for prefix in prefixes])
        lengths = text + torch.tensor([len(start) for start in starts or [()] * len(prefixes)])
        ends = lengths.cumsum(0)
        sample = torch.repeat_interleave(torch.arange(len(prefixes)), lengths)
        position = torch.arange(len(sample)) - (ends - lengths)[sample]
        is_text = position < text[sample]
        row, position = torch.tensor(rows)[sample].to(device), position.to(device)
        cu_seqlens = torch.cat((ends.new_zeros(1), ends)).to(device, torch.int32)
        prefix_lengths = self.config.both_ways(text.to(device, torch.int32))

        x = self.text_projection(torch.cat(prefixes).to(device, self.dtype))
        codes = [code for start in starts for code in start]
        if codes:
            motion = self.embedding(torch.tensor(codes, device=device))
            x = _Interleave.apply(x, motion, *(m.nonzero()[:, 0].to(device) for m in (is_text, ~is_text)))
        rope, branch = self._rope(device), None
        for block, layer in zip(self._blocks(), cache.states, strict=True):
            qkv, x = block.project(x, branch, 2 * rope.shape[1])
            layer[0][row, :, position] = rotate(qkv[:, 1], rope[position])
            layer[1][row, :, position] = qkv[:, 2]
            attended = rotary_prefix_attention(
                qkv,
                rope,
                cu_seqlens,
                prefix_lengths,
                max_seqlen=int(lengths.max()),
                scale=block.scale,
                impl=self.impl,
            )
            x, branch = block.finish(x, attended)
        normed, _ = self.norm(x, branch)
        cache.lengths[torch.tensor(rows, device=device)] = lengths.to(device)
        return self.head(normed[cu_seqlens[1:].long() - 1])

    @torch.no_grad()
    def decode(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """Append one motion token per row, int64 (rows,); float32 logits (rows, K + 1) of the next.

        Raises:
            ScaMoError: the cache is full.
        """
        cache.extend()
        x, branch = self.embedding(tokens), None
        rope = self._rope(x.device)
        for block, layer in zip(self._blocks(), cache.states, strict=True):
            qkv, x = block.project(x, branch, 2 * rope.shape[1])
            attended = decode_attention(
                qkv, layer[0], layer[1], cache.lengths, rope, scale=block.scale, impl=self.impl
            )
            x, branch = block.finish(x, attended)
        cache.lengths += 1
        return self.head(self.norm(x, branch)[0])

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    def _rope(self, device: torch.device) -> Tensor:
        config = self.config
        storage = storage_dim(config.head_dim, device)
        return rotary_table(config.max_positions, config.head_dim, storage, config.rope_base, device)

    def check_length(self, length: int) -> None:
        """Raises ScaMoError for a sample of more than config.max_positions."""
        if length > self.config.max_positions:
            raise ScaMoError(
                f"a sample of {length} positions: the model has {self.config.max_positions} "
                f"(max_text {self.config.max_text} + max_motion {self.config.max_motion} + 1)"
            )
