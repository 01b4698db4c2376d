"""The baseline's quantiser: the nearest entry of a codebook (paper eqs. 1-2), in float32.

Shapes: N latents, E their width, K codes, R residual stages.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.errors import ScaMoError

# Distances of one chunk of latents to all codes: 64 MiB in float32.
DISTANCES = 2**24


class VQ(nn.Module):
    """A codebook, float32 (K, E), that acts on the encoder's output directly: no projections.

    It is a buffer as in T2M-GPT's checkpoints, where a moving average (`CodebookAverage`) moves it and not a
    gradient. With `stages` > 1 it is (R, K, E): stage r has the codebook r, for what the stages before left.
    """

    codebook: Tensor

    def __init__(self, codes: int, width: int, stages: int = 1) -> None:
        super().__init__()
        self.stages = stages
        self.register_buffer("codebook", torch.randn(*((stages,) if stages > 1 else ()), codes, width))

    @property
    def books(self) -> tuple[Tensor, ...]:
        """The codebook of each stage, (K, E): views."""
        return self.codebook.unbind() if self.stages > 1 else (self.codebook,)

    def forward(
        self, latents: Tensor, noise: Tensor | None = None, stages: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """latents (..., E), any float dtype -> quantised (..., E), indices int32 (...), z (..., E).

        The index is that of the smallest squared Euclidean distance, the lowest of equals; in training mode
        by a product that may miss it where two distances agree to about six digits. quantised are the
        entries, or their sum over stages, with the gradient of the identity (straight-through); z are the
        latents; all floats are float32. With residual stages the indices are (..., R), or (..., stages) of
        the first stages alone. Raises ScaMoError when `noise` is given: rounding can be replaced by noise, a
        choice of entries cannot.
        """
        if noise is not None:
            raise ScaMoError("noise in place of the rounding is for FSQ: a codebook has no rounding")
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            rest, found = z.detach().reshape(-1, z.shape[-1]), []
            for book in self.books[:stages]:
                found.append(nearest(rest, book, exact=not self.training))
                rest = rest - book[found[-1]]
            indices = torch.stack(found, -1).to(torch.int32).view(*z.shape[:-1], len(found))
            if self.stages == 1:
                indices = indices.squeeze(-1)
            # Adds zero, so that the values are the entries to the bit.
            return self.embed(indices) + (z - z.detach()), indices, z

    def embed(self, indices: Tensor) -> Tensor:
        """indices int32 or int64 (...), with stages (..., R) -> the sum of their entries float32 (..., E).

        The first columns alone give what the first stages give.
        """
        first, *others = self.entries(indices)
        for entry in others:
            first = first + entry
        return first

    def entries(self, indices: Tensor) -> list[Tensor]:
        """The entry of each stage that `indices` has a column for, (..., E) each."""
        columns = indices.unbind(-1) if self.stages > 1 else (indices,)
        return [F.embedding(column, book) for column, book in zip(columns, self.books, strict=False)]

    def commitment(self, z: Tensor, indices: Tensor) -> Tensor:
        """The latents' mean squared distance from their entries (paper eq. 2 without alpha): a number.

        With stages that of what was left for each, averaged over them. The gradient reaches z (..., E) alone.
        """
        total, rest, entries = z.new_zeros(()), z, self.entries(indices)
        for entry in entries:
            rest = rest - entry
            total = total + rest.square().mean()
        return total / len(entries)


def nearest(rows: Tensor, codebook: Tensor, *, exact: bool) -> Tensor:
    """Index int64 (N,) of the entry of codebook (K, E) nearest to each of rows (N, E), the lowest of equals.

    |e|^2 / 2 - z e about the codebook's mean picks it; where two are as near as its rounding, `exact` decides
    by the differences themselves, in float64. A row that is not finite gives an index without meaning.
    """
    centre = codebook.mean(0)
    entries = codebook - centre
    # TF32 and bfloat16 products have no place in a choice that float32 rounding is bounded for.
    if exact and torch.get_float32_matmul_precision() != "highest":
        entries = entries.double()
    squares = entries.square().sum(1) / 2
    found = []
    for part in rows.split(max(1, DISTANCES // len(codebook))):
        moved = (part - centre).to(entries.dtype)
        scores = torch.addmm(squares, moved, entries.t(), alpha=-1)
        if exact:
            # Twice the error of two scores, of E + 8 roundings at most in terms of this size.
            size = moved.norm(dim=1) + (2 * squares.max()).sqrt()
            slack = (len(centre) + 8) * 2.0**-22 * size.square()
            found.append(_decide(part, codebook, scores <= (scores.amin(1) + slack)[:, None]))
        else:
            found.append(scores.argmin(1))
    return torch.cat(found) if found else rows.new_zeros(0, dtype=torch.int64)


def _decide(rows: Tensor, codebook: Tensor, candidates: Tensor) -> Tensor:
    """The nearest of the entries that candidates, bool (N, K), allow; 0 where there is none."""
    row, code = candidates.nonzero(as_tuple=True)
    distances = [
        (rows[r].double() - codebook[c].double()).square().sum(1)
        for r, c in zip(*(x.split(max(1, DISTANCES // rows.shape[1])) for x in (row, code)), strict=True)
    ]
    distance = torch.cat(distances)
    lowest = distance.new_zeros(len(rows)).scatter_reduce(0, row, distance, "amin", include_self=False)
    kept = distance == lowest[row]
    return code.new_zeros(len(rows)).scatter_reduce(0, row[kept], code[kept], "amin", include_self=False)
