"""The quantiser of the tokenizer: two projections around `scamo_kernels.fsq_quantize`, all in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scamo_kernels import (
    fsq_dequantize,
    fsq_dequantize_grouped,
    fsq_dequantize_residual,
    fsq_quantize,
    fsq_quantize_grouped,
    fsq_quantize_residual,
)
from scamo_kernels.reference import fsq_bound
from torch import Tensor, nn

from scamo.errors import ScaMoError


class FSQ(nn.Module):
    """Finite scalar quantisation between two linear maps (paper eqs. 3-4; facts of the released code).

    There is no codebook to learn: with K channels, each of `levels[i]` values, the code of a latent is one of
    prod(levels). Gradients pass straight through the rounding to `project_in`.

    groups: so many times the channels, each group an index of its own. residual: stages that quantise what
    the ones before left, each (L - 1) times as fine. At most one of the two is above 1.
    """

    def __init__(self, levels: Sequence[int], width: int, *, groups: int = 1, residual: int = 1) -> None:
        super().__init__()
        self.levels, self.groups, self.residual = tuple(levels), groups, residual
        channels = groups * len(self.levels)
        self.project_in = nn.Linear(width, channels)
        self.project_out = nn.Linear(channels, width)

    def forward(
        self, latents: Tensor, noise: Tensor | None = None, stages: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """latents (..., width), any float dtype -> quantised (..., width), indices int32 (...), z (..., K).

        quantised and z, what is bounded and rounded, are float32. With groups or residual stages the indices
        are (..., Q), and K counts the channels of all groups; `stages`: only the first so many residual
        stages. With `noise`, float32 (..., K) uniform in [-1/2, 1/2), quantised is made of the bounded values
        plus the noise in place of the rounded ones: the same error on average, with a gradient that is exact.
        Raises ScaMoError for noise with residual stages.
        """
        if noise is not None and self.residual > 1:
            raise ScaMoError("noise in place of the rounding is for FSQ without residual stages")
        # A bf16 tanh and rounding would flip about one code in a hundred.
        with torch.autocast(latents.device.type, enabled=False):
            z = self.project_in(latents.float())
            if self.residual > 1:
                codes, indices = fsq_quantize_residual(z, self.levels, stages or self.residual)
            elif self.groups > 1:
                codes, indices = fsq_quantize_grouped(z, self.levels, self.groups)
            else:
                codes, indices = fsq_quantize(z, self.levels)
            if noise is not None:
                levels = self.levels * self.groups
                codes = (fsq_bound(z, levels) + noise) / z.new_tensor([n // 2 for n in levels])
            return self.project_out(codes), indices, z

    def embed(self, indices: Tensor) -> Tensor:
        """indices int32 or int64 (...), or (..., Q) -> quantised float32 (..., width)."""
        if self.residual > 1:
            dequantize = fsq_dequantize_residual
        else:
            dequantize = fsq_dequantize_grouped if self.groups > 1 else fsq_dequantize
        with torch.autocast(indices.device.type, enabled=False):
            return self.project_out(dequantize(indices, self.levels, dtype=self.project_out.weight.dtype))
