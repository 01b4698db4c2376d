"""A PrefixLM as generation runs it: the same tensors, multiplied in the way that is quick for a few rows."""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.generation.one_row import OneRow
from scamo.models.layers import Block, FromHeads, Head, Linear, RMSNorm, ToHeads
from scamo.models.prefix_lm import KVCache, PrefixLM

# oneDNN's packed product of 1 row takes as long as that of 4, or longer.
_LEAST_ROWS = 4

# The tensors that a twin was made of, and the twin.
_twins: weakref.WeakKeyDictionary[PrefixLM, tuple[list[Any], PrefixLM]] = weakref.WeakKeyDictionary()


def inference_twin(model: PrefixLM) -> PrefixLM:
    """A PrefixLM that shares the model's tensors and serves prefill and decode only; kept for the next call.

    On a CPU its matrices are packed for oneDNN, a second copy of them: torch hands products of few rows to a
    library that reads a weight of 64,001 x 512 two to four times as slowly. A step of one row in float32 is
    NumPy's there (`one_row`). On a GPU with heads that are stored wider than they are, it widens what is
    multiplied and not, for every token, the weights.
    """
    parameters = dict(model.named_parameters())
    state = [
        part
        for name, p in parameters.items()
        for part in (name, id(p), p.data_ptr(), p.shape, p.dtype, 0 if p.is_inference() else p._version)
    ]
    held = _twins.get(model)
    if held is None or held[0] != state:
        _twins[model] = state, _make_twin(model)
    return _twins[model][1]


def _make_twin(model: PrefixLM) -> PrefixLM:
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if model.dtype == torch.float32 and not model.embedding.weight.is_cuda:
        twin.__class__ = _OnCPU
        cast(_OnCPU, twin).one_row = OneRow(model)
    for index, block in enumerate(cast(Block, block) for block in twin.blocks):
        block.qkv = cast(ToHeads, _ToHeads(block.qkv))
        block.out = cast(FromHeads, _FromHeads(block.out))
        block.gate_up = cast(Linear, _Product(block.gate_up))
        down = _Product(block.down)
        block.down = cast(Linear, down)
        if not down.weight.is_cuda:
            block.norm_1, block.norm_2 = (cast(RMSNorm, _Norm(n)) for n in (block.norm_1, block.norm_2))
        if down.packed is not None and down.weight.dtype == torch.float32:
            twin.blocks[index] = _Block(block)
    twin.head = cast(Head, _Logits(twin.head))
    return twin


class _OnCPU(PrefixLM):
    """A float32 model on a CPU."""

    one_row: OneRow

    @torch.no_grad()
    def decode(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """As PrefixLM's."""
        if len(tokens) != 1:
            return super().decode(cache, tokens)
        cache.extend()
        return torch.from_numpy(self.one_row.step(cache, int(tokens), self._rope(tokens.device)))[None]


def _can_pack(weight: Tensor) -> bool:
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class _Product(nn.Module):
    """x (N, in) -> x weight^T (N, out), without a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, layer.weight)
        self.packed: Tensor | None = None
        if _can_pack(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 4 * _LEAST_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(_pad(x), self.packed, None, "none", [], "")[: x.shape[0]]

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """stream + x weight^T in one product, packed, of rows that `_pad` gave."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, stream, self.packed, None, "add")


def _pad(x: Tensor) -> Tensor:
    """x (N, C) with rows of zeros up to _LEAST_ROWS."""
    missing = _LEAST_ROWS - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


class _Norm(nn.Module):
    """RMSNorm without the checks that let its kernel serve anyone: a third of the time for one row."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual stream x (N, C), and a branch to be added to it first -> (normalised, the stream)."""
        x = x if branch is None else x + branch
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps), x


class _ToHeads(_Product):
    def __init__(self, layer: ToHeads) -> None:
        super().__init__(layer)
        self.shape = layer.parts, layer.heads, layer.in_features // layer.heads

    def forward(self, x: Tensor, storage: int) -> Tensor:  # type: ignore[override]
        """(N, C) -> (N, parts, heads, storage)."""
        heads = super().forward(x).unflatten(-1, self.shape)
        return heads if storage == self.shape[-1] else F.pad(heads, (0, storage - self.shape[-1]))


class _FromHeads(_Product):
    def __init__(self, layer: FromHeads) -> None:
        super().__init__(layer)
        self.head_dim = layer.in_features // layer.heads

    def forward(self, attended: Tensor) -> Tensor:
        """(N, heads, storage) -> (N, C)."""
        return super().forward(attended[..., : self.head_dim].flatten(1))


class _Block(nn.Module):
    """A Block of packed float32 products; they add its branches to the stream, and rows are padded once."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.scale, self.norm_1, self.norm_2 = block.scale, block.norm_1, block.norm_2
        self.qkv, self.out, self.gate_up, self.down = (
            cast(Any, layer) for layer in (block.qkv, block.out, block.gate_up, block.down)
        )

    def project(self, x: Tensor, branch: None, storage: int) -> tuple[Tensor, Tensor]:
        """x (N, C) -> q | k | v (N, 3, H, storage), not rotated, and x."""
        return self.qkv(self.norm_1(x)[0], storage), x

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, None]:
        """Stream x (N, C) and attention output (N, H, storage) -> the stream (N, C), and no branch."""
        heads = attended[..., : self.out.head_dim].flatten(1)
        stream = self.out.add_to(_pad(x), _pad(heads))
        gate, up = self.gate_up(self.norm_2(stream)[0]).chunk(2, 1)
        return self.down.add_to(stream, F.silu(gate).mul_(up))[: x.shape[0]], None


class _Logits(_Product):
    def forward(self, hidden: Tensor) -> Tensor:
        """(N, C) -> float32 (N, V)."""
        return super().forward(hidden).float()
