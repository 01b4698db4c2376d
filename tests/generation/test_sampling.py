"""Sampling against known probabilities."""

import math

import pytest
import torch

from scamo.errors import ScaMoError
from scamo.generation.sampling import (
    Sampling,
    gumbel_noise,
    probabilities,
    prompt_keys,
    sample,
    sample_masked,
)

P = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1], dtype=torch.float64)
LOGITS = P.log()[None] + 3.7
DRAWS = 200_000


def frequencies(sampling, logits=LOGITS):
    keys = prompt_keys(range(DRAWS), ["a person walks"] * DRAWS)
    tokens = sample(logits.expand(DRAWS, -1), keys, 3, sampling)
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


# Of the likeliest, .4: the share of the others is .125, .75, .375, .25.
@pytest.mark.parametrize(("min_p", "kept"), [(0.3, [0, 2, 3]), (0.5, [0, 2]), (1.0, [0])])
def test_min_p_keeps_what_has_this_share_of_the_likeliest(min_p, kept):
    expected = torch.zeros_like(P)
    expected[kept] = P[kept] / P[kept].sum()
    torch.testing.assert_close(probabilities(LOGITS, Sampling(min_p=min_p))[0], expected)
    if len(kept) > 1:
        assert_drawn_from(frequencies(Sampling(min_p=min_p)), expected)


@pytest.mark.parametrize("scale", [0.3, 5.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7, top_p=0.3),
        Sampling(top_p=0.95),
        Sampling(top_p=1e-9),
        Sampling(top_k=7),
        Sampling(1.4, 40, 0.8, min_p=0.2),
        Sampling(min_p=0.1),
    ],
    ids=str,
)
def test_the_quick_way_draws_what_the_definition_says(sampling, scale):
    """In blocks of rows, and each row at a step of its own."""
    logits = scale * torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -torch.inf
    keys = prompt_keys(range(300), ["rows"] * 300)
    steps = torch.arange(300) % 50
    drawn = sample(logits, keys, steps, sampling)
    assert torch.equal(drawn, sample_masked(logits, keys, steps, sampling))
    assert drawn[7:8].tolist() == sample(logits[7:8], keys[7:8], 7, sampling).tolist()


def test_exactly_k_of_equal_tokens_stay():
    assert (probabilities(torch.zeros(1, 6), Sampling(top_k=4)) > 0).sum() == 4
    assert (probabilities(torch.zeros(1, 6), Sampling(top_k=60)) > 0).sum() == 6


def test_a_forbidden_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    assert_drawn_from(frequencies(Sampling(), logits), torch.softmax(logits[0].double(), -1))


def test_steps_of_one_prompt_are_independent_draws():
    keys = prompt_keys([0], ["a person walks"])
    tokens = torch.cat([sample(LOGITS, keys, step, Sampling()) for step in range(4000)])
    expected = P[:, None] * P[None, :] * 3999
    pairs = torch.zeros_like(expected).index_put_(
        (tokens[:-1], tokens[1:]), torch.ones(3999, dtype=torch.float64), accumulate=True
    )
    assert ((pairs - expected) ** 2 / expected).sum() < 52.62  # 99.9% of chi-square, 24 degrees


def test_noise_is_gumbel_distributed_and_splitmix64():
    noise = gumbel_noise(prompt_keys([0, 1], ["x", "x"]), 5, 100_000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    # The published first outputs of SplitMix64 from state 1234567.
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    uniform = [((z >> 11) + 0.5) / 2**53 for z in reference]
    expected = [-math.log(-math.log(u)) for u in uniform]
    assert gumbel_noise(torch.tensor([1234567]), 0, 3)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_greedy_is_the_likeliest_and_ignores_noise():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 5.0]])
    for seed in range(5):
        keys = prompt_keys([seed, seed], ["a", "b"])
        assert sample(logits, keys, 0, Sampling(greedy=True)).tolist() == [1, 0]


def test_rows_are_independent():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    keys = prompt_keys(range(6), ["rows"] * 6)
    together = sample(logits, keys, 2, Sampling(0.8, 20, 0.9))
    alone = [sample(logits[i : i + 1], keys[i : i + 1], 2, Sampling(0.8, 20, 0.9)).item() for i in range(6)]
    assert together.tolist() == alone


def test_rounding_of_the_logits_hardly_ever_moves_a_draw():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5000, generator=generator).expand(1000, -1)
    keys = prompt_keys(range(1000), ["rounding"] * 1000)
    nudged = logits + 1e-6 * torch.randn(1000, 5000, generator=generator)
    for sampling in (Sampling(), Sampling(top_p=0.9)):
        assert (sample(logits, keys, 0, sampling) != sample(nudged, keys, 0, sampling)).sum() <= 1


def test_keys_depend_on_seed_and_text_alone():
    keys = prompt_keys([0, 1, 0, 0, -1, 2**70], ["walk", "walk", "run", "walk", "walk", "walk"]).tolist()
    assert keys[0] == keys[3]
    assert len(set(keys)) == 5
    assert prompt_keys([0], ["walk"]).tolist() == keys[:1]
    numbered = prompt_keys([0] * 3, ["walk"] * 3, [0, 1, 2]).tolist()
    assert numbered[0] == keys[0]
    assert len({*numbered, *keys}) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": math.nan}, "min_p = nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ScaMoError, match=message):
        Sampling(**options)
