"""Kernels for motion generation: tensors in, tensors out, with or without a GPU."""

from scamo_kernels.attention import bounded_attention, prefix_causal_attention
from scamo_kernels.fsq import fsq_dequantize, fsq_quantize
from scamo_kernels.histogram import code_histogram

__all__ = [
    "bounded_attention",
    "code_histogram",
    "fsq_dequantize",
    "fsq_quantize",
    "prefix_causal_attention",
]
