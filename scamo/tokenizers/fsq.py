"""The quantiser of the tokenizer: two projections around `scamo_kernels.fsq_quantize`, all in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scamo_kernels import fsq_dequantize, fsq_quantize
from scamo_kernels.reference import fsq_bound
from torch import Tensor, nn


class FSQ(nn.Module):
    """Finite scalar quantisation between two linear maps (paper eqs. 3-4; facts of the released code).

    There is no codebook to learn: with K channels, each of `levels[i]` values, the code of a latent is one of
    prod(levels). Gradients pass straight through the rounding to `project_in`.
    """

    def __init__(self, levels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.project_in = nn.Linear(width, len(self.levels))
        self.project_out = nn.Linear(len(self.levels), width)

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """latents (..., width), any float dtype -> quantised (..., width), indices int32 (...), z (..., K).

        quantised and z, what is bounded and rounded, are float32. With `noise`, float32 (..., K) uniform in
        [-1/2, 1/2), quantised is made of the bounded values plus the noise in place of the rounded ones: the
        same error on average, with a gradient that is exact.
        """
        # A bf16 tanh and rounding would flip about one code in a hundred.
        with torch.autocast(latents.device.type, enabled=False):
            z = self.project_in(latents.float())
            codes, indices = fsq_quantize(z, self.levels)
            if noise is not None:
                codes = (fsq_bound(z, self.levels) + noise) / z.new_tensor([n // 2 for n in self.levels])
            return self.project_out(codes), indices, z

    def embed(self, indices: Tensor) -> Tensor:
        """indices int32 or int64 (...) -> quantised float32 (..., width)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.project_out(fsq_dequantize(indices, self.levels, dtype=self.project_out.weight.dtype))
