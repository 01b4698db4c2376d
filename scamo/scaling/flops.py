"""Counts of a transformer: parameters, attended pairs, and the FLOPs of training on them.

Two conventions side by side. Ours counts what is computed: 6 N_blocks per position (text and motion), 6 V C
per scored token, attention at the real lengths. The paper's (Tab. 3, Kaplan et al. 2020, Tab. 1) charges
every token the forward FLOPs of a full context of 201 positions and a feed-forward of four widths.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from scamo.config import ModelConfig

# Dense bfloat16 FLOP/s that the makers state, by a part of the device's name; the first match counts.
STATED_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
PAPER_CONTEXT = 201


def stated_peak(device_name: str) -> float:
    """Dense bfloat16 FLOP/s of a device, 0 for one that is not in STATED_PEAKS."""
    return next((peak for part, peak in STATED_PEAKS.items() if part in device_name), 0.0)


def block_parameters(model: ModelConfig) -> int:
    """N_blocks: blocks with their norms and the last norm; no embedding, head or text projection."""
    block = 4 * model.width**2 + 3 * model.width * model.hidden + 2 * model.width
    return model.layers * block + model.width


def parameters(model: ModelConfig) -> int:
    """All trained parameters; codes and text_width must be filled in."""
    around = (2 * model.codes + 3) * model.width + (model.text_width + 1) * model.width
    return block_parameters(model) + around


def attended_pairs(lengths: ArrayLike, prefixes: ArrayLike) -> int:
    """(query, key) pairs that the prefix-causal mask allows, over all samples.

    prefixes: what is read in both directions, see `ModelConfig.both_ways`.
    """
    length, prefix = np.asarray(lengths, dtype=np.int64), np.asarray(prefixes, dtype=np.int64)
    return int((prefix**2 + (length - prefix) * (length + prefix + 1) // 2).sum())


def training_flops(model: ModelConfig, *, positions: float, scored: float, pairs: float) -> float:
    """FLOPs of forward and backward, recomputation not counted.

    Args:
        model: with codes filled in.
        positions: text and motion positions.
        scored: tokens with a loss (motion and EOS), the D of our laws.
        pairs: see `attended_pairs`.
    """
    attention = 12 * model.layers * model.width * pairs
    return 6 * block_parameters(model) * positions + 6 * (model.codes + 1) * model.width * scored + attention


def forward_flops(layers: int, width: int) -> float:
    """The paper's plotted N_nv: forward FLOPs of a token in the blocks, at a context of 201 positions."""
    return float(24 * layers * width**2 + 2 * layers * PAPER_CONTEXT * width)


def paper_flops(model: ModelConfig, tokens: float) -> float:
    """C = 3 (N_nv + N_v) D of the paper's plots, D = `tokens`; N_v = 2 V d."""
    return 3 * (forward_flops(model.layers, model.width) + 2 * model.codes * model.width) * tokens
