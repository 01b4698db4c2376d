"""Sampling against known probabilities."""

import math

import numpy as np
import pytest
import torch

from scamo.errors import ScaMoError
from scamo.generation.sampling import Sampling, probabilities, sample, uniforms

P = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1], dtype=torch.float64)
LOGITS = P.log()[None] + 3.7
DRAWS = 200_000


def frequencies(sampling, logits=LOGITS):
    noise = torch.from_numpy(uniforms(0, "frequencies", DRAWS))
    tokens = sample(logits.expand(DRAWS, -1), noise, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1])


def assert_drawn_from(counts, expected):
    """Chi-square below its 99.9% quantile, and nothing of probability 0."""
    assert (counts[expected == 0] == 0).all()
    hit = expected > 0
    chi = ((counts[hit] - DRAWS * expected[hit]) ** 2 / (DRAWS * expected[hit])).sum()
    quantile = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[int(hit.sum()) - 1]
    assert chi < quantile


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(temperature):
    expected = P ** (1 / temperature)
    assert_drawn_from(frequencies(Sampling(temperature)), expected / expected.sum())


@pytest.mark.parametrize("k", [2, 3])
def test_top_k_keeps_the_k_likeliest_renormalised(k):
    kept = P.topk(k).indices
    expected = torch.zeros_like(P).scatter(0, kept, P[kept] / P[kept].sum())
    torch.testing.assert_close(probabilities(LOGITS, Sampling(top_k=k))[0], expected)
    assert_drawn_from(frequencies(Sampling(top_k=k)), expected)


# Sorted: .4 .3 .15 .1 .05. The token that crosses top_p is kept.
@pytest.mark.parametrize(("top_p", "kept"), [(0.39, [0]), (0.41, [0, 2]), (0.71, [0, 2, 3]), (1e-9, [0])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    p = probabilities(LOGITS, Sampling(top_p=top_p))[0]
    assert p.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(p[kept], P[kept] / P[kept].sum())


def test_top_p_counts_what_top_k_and_temperature_left():
    # The two likeliest have .4 and .3 of .7: the first alone has .571 of what is left.
    assert probabilities(LOGITS, Sampling(top_k=2, top_p=0.55))[0].nonzero().flatten().tolist() == [0]
    assert probabilities(LOGITS, Sampling(top_p=0.45))[0].nonzero().flatten().tolist() == [0, 2]
    assert probabilities(LOGITS, Sampling(0.5, top_p=0.45))[0].nonzero().flatten().tolist() == [0]


def test_exactly_k_of_equal_tokens_stay():
    assert (probabilities(torch.zeros(1, 6), Sampling(top_k=4)) > 0).sum() == 4
    assert (probabilities(torch.zeros(1, 6), Sampling(top_k=60)) > 0).sum() == 6


def test_extreme_noise_never_picks_a_forbidden_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for u, token in ((0.0, 1), (np.nextafter(1, 0), 3)):
        assert sample(logits, torch.tensor([u], dtype=torch.float64), Sampling()).tolist() == [token]


def test_noise_is_cut_at_the_cumulative_probabilities():
    edges = P.cumsum(0)[:-1]
    for index, edge in enumerate(edges.tolist()):
        noise = torch.tensor([edge - 1e-9, edge + 1e-9], dtype=torch.float64)
        assert sample(LOGITS.expand(2, -1), noise, Sampling()).tolist() == [index, index + 1]


def test_greedy_is_the_likeliest_and_ignores_noise():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 5.0]])
    for u in (0.0, 0.999):
        assert sample(logits, torch.full((2,), u), Sampling(greedy=True)).tolist() == [1, 0]


def test_rows_are_independent():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.from_numpy(uniforms(1, "rows", 6))
    together = sample(logits, noise, Sampling(0.8, 20, 0.9))
    alone = [sample(logits[i : i + 1], noise[i : i + 1], Sampling(0.8, 20, 0.9)).item() for i in range(6)]
    assert together.tolist() == alone


def test_uniforms_depend_on_seed_and_text_alone_and_only_grow():
    first = uniforms(0, "a person walks", 50)
    assert np.array_equal(first, uniforms(0, "a person walks", 80)[:50])
    assert not np.isin(first, uniforms(1, "a person walks", 50)).any()
    assert not np.isin(first, uniforms(0, "a person runs", 50)).any()
    assert first.dtype == np.float64
    assert ((first >= 0) & (first < 1)).all()
    assert np.array_equal(uniforms(-1, "x", 3), uniforms(2**64 - 1, "x", 3)), "any integer is a seed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ScaMoError, match=message):
        Sampling(**options)
