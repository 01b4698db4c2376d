"""The normalised loss against hand-made numbers."""

import math

import pytest
import torch

from scamo.errors import ScaMoError
from scamo.models.losses import normalised_loss, unigram_cross_entropy

COUNTS = torch.tensor([6, 0, 1, 3])  # three codes and EOS, ten tokens


def test_unigram_cross_entropy_is_the_log_of_the_frequency():
    expected = [math.log(10 / 6), math.log(10), math.log(10 / 3)]
    assert unigram_cross_entropy(COUNTS, torch.tensor([0, 2, 3])).tolist() == pytest.approx(expected)


def test_a_target_that_training_never_had_counts_as_seen_once():
    assert unigram_cross_entropy(COUNTS, torch.tensor([1])).item() == pytest.approx(math.log(10))


def test_mean_over_the_training_tokens_is_the_entropy_and_gives_zero_for_the_unigram_model():
    targets = torch.repeat_interleave(torch.arange(4), COUNTS)
    p = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    unigram = unigram_cross_entropy(COUNTS, targets)
    assert unigram.mean().item() == pytest.approx(-(p * p.log()).sum().item())
    assert normalised_loss(unigram, COUNTS, targets) == 0
    assert normalised_loss(torch.zeros(10), COUNTS, targets) == pytest.approx(-unigram.mean().item())


@pytest.mark.parametrize(
    ("counts", "targets", "message"),
    [
        ([0, 0], [0], "not all zero"),
        ([1, -1], [0], "none negative"),
        ([1, 2], [2], r"targets span \[2, 2\].*\[0, 1\]"),
        ([1, 2], [-1, 0], r"targets span \[-1, 0\]"),
    ],
)
def test_bad_counts_and_targets_are_named(counts, targets, message):
    with pytest.raises(ScaMoError, match=message):
        unigram_cross_entropy(torch.tensor(counts), torch.tensor(targets))


def test_losses_and_targets_must_pair():
    with pytest.raises(ScaMoError, match="2 losses for 3 targets"):
        normalised_loss(torch.zeros(2), COUNTS, torch.zeros(3, dtype=torch.long))
