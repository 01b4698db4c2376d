"""The moving average that is a VQ's codebook while it is trained: T2M-GPT's, with its reset of entries."""

from __future__ import annotations

import numpy as np
import torch
from scamo_kernels import code_histogram
from torch import Tensor

from scamo.tokenizers.vq import VQ, nearest


class CodebookAverage:
    """Moves the codebooks of a VQ to the moving averages of the latents that choose their entries.

    counts (R, K) and sums (R, K, E), float32, are averages over steps of how many latents chose an entry and
    of their sum; an entry is sums / counts. None of it is needed to use the codebook, so it is not saved.
    Every operation has one order of its additions: same inputs, same bits, on a GPU too.

    Args:
        quantizer: the VQ, on its device.
        decay: of the averages.
        reset_below: entries whose count is below it are replaced by latents of the batch.
        reset_averages: their averages become that latent too, with the count `reset_below`. Else, as in
            T2M-GPT, they go on: until its count has risen, an entry is another latent in every step.
    """

    def __init__(
        self, quantizer: VQ, *, decay: float, reset_below: float, reset_averages: bool = False
    ) -> None:
        self.quantizer, self.decay = quantizer, decay
        self.reset_below, self.reset_averages = reset_below, reset_averages
        self.sums = torch.stack(quantizer.books)
        self.counts = self.sums.new_ones(self.sums.shape[:2])

    @torch.no_grad()
    def start(self, latents: Tensor, rng: np.random.Generator) -> None:
        """Codebooks of random latents (N, E), each one once until there are more entries than latents.

        A later stage's are what the earlier ones leave of the latents.
        """
        rest = latents
        for stage, book in enumerate(self.quantizer.books):
            book.copy_(rest[_order(rng, len(rest), len(book)).to(rest.device)])
            self.sums[stage], self.counts[stage] = book, 1
            if stage + 1 < self.quantizer.stages:
                rest = rest - book[nearest(rest, book, exact=False)]

    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor, rng: np.random.Generator) -> None:
        """One step: latents z (..., E) and the indices that the VQ gave for them, of all or its first stages.

        rng: which latents replace entries.
        """
        rest = z.reshape(-1, z.shape[-1])
        chosen = indices.reshape(len(rest), -1).long()
        for stage, book in enumerate(self.quantizer.books[: chosen.shape[1]]):
            index = chosen[:, stage]
            left = rest - book[index]
            self._move(stage, book, rest, index, rng)
            rest = left

    def _move(self, stage: int, book: Tensor, rows: Tensor, index: Tensor, rng: np.random.Generator) -> None:
        codes = len(book)
        new = code_histogram(index, codes)
        # Sorted, each entry's latents stand together: no atomics, whose order changes the bits.
        ordered = rows[index.argsort(stable=True)]
        total = torch.segment_reduce(ordered, "sum", lengths=new, unsafe=True)
        counts = self.counts[stage].lerp_(new.float(), 1 - self.decay)
        sums = self.sums[stage].lerp_(total, 1 - self.decay)
        # The others' quotients stay as they are, but for rounding.
        moved = (new > 0)[:, None]
        book.copy_(torch.where(moved, sums / counts[:, None], book))
        reset = counts < self.reset_below
        order = _order(rng, len(rows), codes).to(rows.device)
        drawn = rows[order[(reset.cumsum(0) - 1).clamp_min(0)]]
        book.copy_(torch.where(reset[:, None], drawn, book))
        if self.reset_averages:
            counts.clamp_min_(self.reset_below)
            sums.copy_(torch.where(reset[:, None], self.reset_below * drawn, sums))


def _order(rng: np.random.Generator, rows: int, entries: int) -> Tensor:
    """int64 (entries,): rows in random order, again from the first when there are too few."""
    return torch.from_numpy(np.resize(rng.permutation(rows), entries))
