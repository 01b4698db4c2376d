"""The normalised loss L_u of the paper (Eq. 8): how much better than the unigram frequencies the model is."""

from __future__ import annotations

import torch
from torch import Tensor

from scamo.errors import ScaMoError


def unigram_cross_entropy(counts: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target under the token frequencies of the training set.

    counts: integer (K + 1,), occurrences of each code and, last, of EOS (one per item). targets: int64 (S,)
    in [0, K]. Returns float64 (S,): log(total) - log(count). A target that training never had is taken as
    seen once (the paper does not say); that bounds its share of L_u and changes nothing for the other
    targets.

    Raises:
        ScaMoError: counts that are negative or all zero, or a target outside them.
    """
    if counts.ndim != 1 or counts.numel() == 0 or int(counts.min()) < 0 or int(counts.sum()) == 0:
        raise ScaMoError("unigram counts: expected (K + 1,) counts, none negative and not all zero")
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= counts.numel()):
        raise ScaMoError(
            f"targets span [{int(targets.min())}, {int(targets.max())}], "
            f"but there are unigram counts for [0, {counts.numel() - 1}]"
        )
    counts = counts.to(targets.device, torch.float64)
    return torch.log(counts.sum()) - torch.log(counts[targets].clamp(min=1))


def normalised_loss(losses: Tensor, counts: Tensor, targets: Tensor) -> float:
    """L_u = CE_model - CE_unigram in nats per scored token (Eq. 8); lower is better, 0 is the unigram model.

    losses: float (S,), the model's cross-entropy of each target; counts, targets: see unigram_cross_entropy.
    """
    if losses.shape != targets.shape or not losses.numel():
        raise ScaMoError(f"{losses.numel()} losses for {targets.numel()} targets: expected one each")
    return float((losses.double() - unigram_cross_entropy(counts, targets)).mean())
