"""The baseline's quantiser: the nearest entry of a codebook (paper eq. 1), in float32. Inference only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.errors import ScaMoError

# Distances of one chunk of latents to all codes: 64 MiB in float32.
DISTANCES = 2**24


class VQ(nn.Module):
    """A codebook, float32 (K, E), that acts on the encoder's output directly: no projections.

    It is a buffer as in T2M-GPT's checkpoints, where a running average moves it and not a gradient.
    """

    codebook: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(codes, width))

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """latents (..., E), any float dtype -> codebook entries (..., E), indices int32 (...), z (..., E).

        The index is that of the smallest squared Euclidean distance, the lowest of equals. z are the latents;
        all floats are float32. No gradient reaches the latents. Raises ScaMoError when `noise` is given:
        rounding can be replaced by noise, a choice of entries cannot.
        """
        if noise is not None:
            raise ScaMoError("noise in place of the rounding is for FSQ: a codebook has no rounding")
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            rows = z.detach().reshape(-1, z.shape[-1])
            # The differences themselves: |z|^2 - 2 z e + |e|^2 would lose the near ties to cancellation.
            nearest = [
                torch.cdist(part, self.codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
                for part in rows.split(max(1, DISTANCES // self.codebook.shape[0]))
            ]
            indices = torch.cat(nearest).to(torch.int32).view(z.shape[:-1])
            return self.embed(indices), indices, z

    def embed(self, indices: Tensor) -> Tensor:
        """indices int32 or int64 (...) -> codebook entries float32 (..., E)."""
        return F.embedding(indices, self.codebook)
