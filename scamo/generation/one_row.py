"""One row, one token, on a CPU in float32: a PrefixLM's step in NumPy.

Such a step reads every matrix once and computes next to nothing. NumPy's BLAS multiplies a matrix by a vector
about as fast as memory is read, where oneDNN's and MKL's products may take twice as long, and an op on a few
hundred numbers costs NumPy a microsecond or two and torch ten.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from scamo.models.layers import Block, RMSNorm
from scamo.models.prefix_lm import KVCache, PrefixLM

Array = NDArray[np.float32]


class _Layer(NamedTuple):
    """A block's weights, sharing its memory."""

    gain_1: Array
    qkv: Array
    out: Array
    gain_2: Array
    gate_up: Array
    down: Array


class OneRow:
    """The step of a float32 PrefixLM on the CPU; it shares the memory of the model's parameters."""

    def __init__(self, model: PrefixLM) -> None:
        config = model.config
        self.heads, self.head_dim, self.eps = config.heads, config.head_dim, np.float32(config.norm_eps)
        self.scale = np.float32(cast(Block, model.blocks[0]).scale)
        self.embedding, self.head = _array(model.embedding), _array(model.head)
        self.gain = _array(model.norm)
        self.layers = [
            _Layer(*map(_array, (b.norm_1, b.qkv, b.out, b.norm_2, b.gate_up, b.down)))
            for b in (cast(Block, block) for block in model.blocks)
        ]

    def step(self, cache: KVCache, token: int, rope: Tensor) -> Array:
        """Append a motion token to the only row of a cache that has room; logits (K + 1,) of the next.

        rope: of `rotary_table`, (positions, head dim / 2, 2).
        """
        place = int(cache.lengths[0])
        turn = rope.numpy().view(np.complex64)[place, :, 0]
        states = cache.states.numpy()[:, :, 0]
        x = self.embedding[token].copy()
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            qkv = (layer.qkv @ self._norm(x, layer.gain_1)).reshape(3, self.heads, self.head_dim)
            qkv[:2].view(np.complex64)[:] *= turn
            keys[:, place], values[:, place] = qkv[1], qkv[2]
            scores = np.matmul(keys[:, : place + 1], qkv[0, :, :, None])[..., 0] * self.scale
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            attended = np.matmul(weights[:, None], values[:, : place + 1])
            x += layer.out @ attended.reshape(-1)
            gate, up = np.split(layer.gate_up @ self._norm(x, layer.gain_2), 2)
            # silu with no exp of a large number, which would overflow.
            x += layer.down @ (up * gate * (0.5 + 0.5 * np.tanh(0.5 * gate)))
        cache.lengths += 1
        return self.head @ self._norm(x, self.gain)

    def _norm(self, x: Array, gain: Array) -> Array:
        return x * (gain / np.sqrt(x @ x / np.float32(len(x)) + self.eps))


def _array(module: nn.Module | RMSNorm) -> Array:
    return cast(Tensor, module.weight).detach().numpy()
