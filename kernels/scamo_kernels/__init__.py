"""Kernels for motion generation: tensors in, tensors out, with or without a GPU."""

from scamo_kernels.attention import bounded_attention, prefix_causal_attention, rotary_prefix_attention
from scamo_kernels.bsq import bsq_dequantize, bsq_quantize
from scamo_kernels.decode import decode_attention
from scamo_kernels.fsq import (
    fsq_dequantize,
    fsq_dequantize_grouped,
    fsq_dequantize_residual,
    fsq_quantize,
    fsq_quantize_grouped,
    fsq_quantize_residual,
)
from scamo_kernels.fsq_project import fsq_project
from scamo_kernels.histogram import code_histogram
from scamo_kernels.linear_cross_entropy import linear_cross_entropy
from scamo_kernels.rms_norm import add_rms_norm, rms_norm
from scamo_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "bounded_attention",
    "bsq_dequantize",
    "bsq_quantize",
    "code_histogram",
    "decode_attention",
    "fsq_dequantize",
    "fsq_dequantize_grouped",
    "fsq_dequantize_residual",
    "fsq_project",
    "fsq_quantize",
    "fsq_quantize_grouped",
    "fsq_quantize_residual",
    "linear_cross_entropy",
    "prefix_causal_attention",
    "rms_norm",
    "rotary_prefix_attention",
    "swiglu",
]
