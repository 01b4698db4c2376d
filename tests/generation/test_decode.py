"""The cached decode loop against the packed forward pass of training."""

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig
from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError
from scamo.generation.decode import generate_tokens
from scamo.generation.sampling import Sampling, prompt_keys
from scamo.models.prefix_lm import PrefixLM

K, TEXT, MOST = 12, 6, 14
CONFIG = ModelConfig(
    size="", layers=3, heads=2, width=16, codes=K, text_width=TEXT, max_text=9, max_motion=MOST
)
LENGTHS = [1, 9, 4, 6, 4]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, TEXT, generator=generator) for n in LENGTHS]


def keys(count=5):
    return prompt_keys([0] * count, [f"text {i}" for i in range(count)])


def packed_logits(model, text, motion):
    """What the training forward predicts after the text and after each token of `motion`."""
    return model.logits(collate([Sample(text.numpy(), np.array(motion))], K)).detach()


def test_cached_logits_are_those_of_the_packed_forward(model, texts):
    motions = np.random.default_rng(0).integers(0, K, (len(texts), MOST))
    expected = [packed_logits(model, text, motion) for text, motion in zip(texts, motions, strict=True)]
    cache, logits = model.prefill(texts, MOST)
    for step in range(MOST + 1):
        for row in range(len(texts)):
            torch.testing.assert_close(logits[row], expected[row][step], atol=1e-5, rtol=0)
        if step < MOST:
            logits = model.decode(cache, torch.from_numpy(motions[:, step]))
    assert cache.lengths.tolist() == [n + MOST for n in LENGTHS]


@pytest.mark.parametrize("alive", [[1, 3, 4], [0, 1], [4], [0, 1, 2, 3, 4], [2, 3, 4]])
def test_rows_that_leave_do_not_disturb_the_others(model, texts, alive):
    motions = np.random.default_rng(0).integers(0, K, (len(texts), 4))
    cache, _ = model.prefill(texts, 4)
    for step in range(2):
        model.decode(cache, torch.from_numpy(motions[:, step]))
    cache, order = cache.compact(alive)
    assert sorted(order) == alive
    assert cache.rows == len(alive)
    for step in range(2, 4):
        logits = model.decode(cache, torch.from_numpy(motions[order, step]))
    for row, old in enumerate(order):
        expected = packed_logits(model, texts[old], motions[old])[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


def test_the_cache_has_an_end(model, texts):
    cache, _ = model.prefill(texts, 1)
    tokens = torch.zeros(len(texts), dtype=torch.long)
    model.decode(cache, tokens)
    with pytest.raises(ScaMoError, match="cache is full: it has room for 10 positions"):
        model.decode(cache, tokens)


def test_greedy_motion_is_the_argmax_of_the_packed_forward(model, texts):
    motions = generate_tokens(model, texts, keys(), Sampling(greedy=True), max_tokens=MOST)
    for text, motion in zip(texts, motions, strict=True):
        logits = packed_logits(model, text, motion)
        logits[0, K] = -torch.inf
        best = logits.argmax(-1).tolist()
        assert best[: len(motion)] == motion.tolist()
        assert len(motion) == MOST or best[len(motion)] == K


def test_sampled_motions_end_at_eos_and_have_different_lengths(model, texts):
    many = [texts[i % 5] for i in range(200)]
    motions = generate_tokens(model, many, keys(200), Sampling(), max_tokens=MOST)
    lengths = {len(motion) for motion in motions}
    assert {1, 2, MOST} <= lengths, "short ones, and some that reach the limit"
    assert all(motion.dtype == np.int32 and (motion >= 0).all() and (motion < K).all() for motion in motions)


def test_a_motion_is_the_same_alone_and_in_any_batch(model, texts):
    many = [texts[i % 5] for i in range(40)]
    noise = keys(40)
    sampling = Sampling(0.9, top_p=0.95)
    together = generate_tokens(model, many, noise, sampling, max_tokens=MOST)
    order = np.random.default_rng(0).permutation(40)
    shuffled = generate_tokens(model, [many[i] for i in order], noise[order], sampling, max_tokens=MOST)
    for i in range(40):
        alone = generate_tokens(model, [many[i]], noise[i : i + 1], sampling, max_tokens=MOST)[0]
        assert alone.tolist() == together[i].tolist()
        assert shuffled[order.tolist().index(i)].tolist() == together[i].tolist()


def test_a_limit_cuts_the_same_motion(model, texts):
    whole = generate_tokens(model, texts, keys(), Sampling(), max_tokens=MOST)
    cut = generate_tokens(model, texts, keys(), Sampling(), max_tokens=3)
    assert [motion.tolist() for motion in cut] == [motion[:3].tolist() for motion in whole]


def certain(token):
    """A model that gives `token` nearly all the probability, whatever it has read."""
    model = PrefixLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in (*model.blocks.parameters(), model.text_projection.weight, model.embedding.weight):
            parameter.zero_()
        model.text_projection.bias.fill_(1)
        model.embedding.weight.fill_(1)
        model.head.weight.zero_()
        model.head.weight[token] = 10
    return model


def test_eos_is_not_allowed_first_and_ends_the_motion_after(texts):
    for greedy in (True, False):
        motions = generate_tokens(certain(K), texts, keys(), Sampling(greedy=greedy), max_tokens=MOST)
        assert [len(motion) for motion in motions] == [1] * len(texts)
        motions = generate_tokens(
            certain(K), texts, keys(), Sampling(greedy=greedy), max_tokens=MOST, min_tokens=5
        )
        assert [len(motion) for motion in motions] == [5] * len(texts)


def test_without_eos_the_limit_ends_the_motion(texts):
    motions = generate_tokens(certain(7), texts, keys(), Sampling(), max_tokens=6)
    assert [motion.tolist() for motion in motions] == [[7] * 6] * len(texts)


@pytest.mark.parametrize(("low", "high"), [(1, MOST + 1), (0, 3), (4, 3)])
def test_limits_outside_the_model_are_refused(model, texts, low, high):
    with pytest.raises(ScaMoError, match=f"min_tokens = {low}, max_tokens = {high}: .* <= {MOST}"):
        generate_tokens(model, texts, keys(), Sampling(), max_tokens=high, min_tokens=low)


def test_texts_that_are_empty_or_too_long_are_refused(model, texts):
    with pytest.raises(ScaMoError, match="text 1 has no states"):
        generate_tokens(model, [texts[0], texts[0][:0]], keys(2), Sampling(), max_tokens=2)
    with pytest.raises(ScaMoError, match="25 positions: the model has 24"):
        generate_tokens(model, [torch.zeros(12, TEXT)], keys(1), Sampling(), max_tokens=MOST)
