"""Generation scale by scale: against a pass without a cache, alone and in a batch, previews and lengths."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.data.batches import null_text
from scamo.data.scales import ScaleBatch, pack_layout
from scamo.errors import ScaMoError
from scamo.generation.sampling import gumbel_noise, prompt_keys
from scamo.generation.scales import (
    ScaleMoGen,
    ScaleSampling,
    export_predictor,
    generate_bits,
)
from scamo.models.next_scale import NextScale, NextScaleConfig
from scamo.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer

TEXT, BITS = 6, 5
SCALES = ((1, 1), (2, 2), (4, 3), (8, 7))
CONFIG = NextScaleConfig(
    depth=2, width=32, heads=2, hidden=48, text_width=TEXT, scales=SCALES, bits=BITS, drop_text=0.1
)
TOKENIZER = MultiscaleConfig(
    width=8, blocks=1, dropout=0.0, bits=BITS, max_frames=32, scales=SCALES, feature_dim=263
)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = NextScale(CONFIG)
    with torch.no_grad():  # logits of all sizes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer = MultiscaleTokenizer(TOKENIZER).eval()
    texts = [torch.randn(p, TEXT) for p in (3, 7, 1, 4)]
    return model.double().eval().requires_grad_(False), tokenizer, texts


KEYS = prompt_keys([0, 1, 2, 3], ["a", "b", "c", "d"])


def last(*arguments, **options):
    *_, step = generate_bits(*arguments, **options)
    return step


def whole_pass(model, quantizer, text, bits, n):
    """Logits (L, d) of all tokens of one motion of n latents, without a cache; zeros where none is."""
    latents = torch.tensor([n])
    valid = quantizer.valid(latents)
    layout = pack_layout(valid, quantizer.slices)
    batch = ScaleBatch(
        text_states=text,
        cu_text=torch.tensor([0, len(text)], dtype=torch.int32),
        inputs=quantizer.inputs(bits[None], latents)[valid],
        targets=bits[layout.tokens],
        **layout._asdict(),
        latents=latents,
        item_ids=latents,
        caption_ids=latents,
        longest_text=len(text),
        seed=0,
    )
    out = torch.zeros(CONFIG.tokens, BITS, dtype=torch.float64)
    out[layout.tokens] = model.logits(batch).double()
    return out


@pytest.mark.parametrize("guidance", [(0.0, 0.0), (0.0, 7.0)], ids=["plain", "guided"])
def test_every_bit_is_what_recomputing_everything_gives(parts, guidance):
    model, tokenizer, texts = parts
    sampling = ScaleSampling(temperature=1.3, guidance=guidance)
    n = [8, 3, 1, 5]
    made = last(model, tokenizer.quantizer, texts, KEYS, sampling, latents=n).bits
    null = torch.from_numpy(null_text(TEXT))
    valid = tokenizer.quantizer.valid(torch.tensor(n))
    for row, text in enumerate(texts):
        given, none = (whole_pass(model, tokenizer.quantizer, t, made[row], n[row]) for t in (text, null))
        for number, span in enumerate(tokenizer.quantizer.slices):
            w = guidance[0] + (guidance[1] - guidance[0]) * number / (len(SCALES) - 1)
            for token in range(span.start, span.stop):
                if not valid[row, token]:
                    assert made[row, token] == 0
                    continue
                logits = ((1 + w) * given[token] - w * none[token]) / 1.3
                noise = gumbel_noise(KEYS[row : row + 1], token, 2 * BITS)[0]
                score = logits + noise[:BITS] - noise[BITS:]
                assert score.abs().min() > 1e-5  # or rounding could decide
                assert int(made[row, token]) == sum(int(s > 0) << i for i, s in enumerate(score))


def test_bits_are_one_as_often_as_their_probability(parts):
    """The difference of two Gumbel draws is logistic."""
    keys = torch.arange(20_000)
    one, zero = gumbel_noise(keys, 5, 2).chunk(2, -1)
    for logit in (-1.0, 0.5):
        share = float((logit + one - zero > 0).double().mean())
        assert share == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.02)


def test_a_motion_is_the_same_alone_and_in_a_batch(parts):
    model, tokenizer, texts = parts
    sampling = ScaleSampling()
    together = last(model, tokenizer.quantizer, texts, KEYS, sampling)
    for row, text in enumerate(texts):
        alone = last(model, tokenizer.quantizer, [text], KEYS[row : row + 1], sampling)
        assert int(alone.latents[0]) == int(together.latents[row])
        assert torch.equal(alone.bits[0], together.bits[row])
    assert len({tuple(row) for row in together.bits.tolist()}) == len(texts)


def test_seeds_and_settings_matter(parts):
    model, tokenizer, texts = parts
    n = [8] * len(texts)

    def bits(keys=KEYS, **settings):
        return last(model, tokenizer.quantizer, texts, keys, ScaleSampling(**settings), latents=n).bits

    assert torch.equal(bits(), bits())
    assert not torch.equal(bits(), bits(KEYS + 1))
    assert not torch.equal(bits(), bits(guidance=(0.0, 0.0)))
    assert torch.equal(bits(greedy=True), bits(KEYS + 1, greedy=True))
    # A cold draw is the greedy one.
    assert torch.equal(bits(temperature=1e-6), bits(greedy=True))


def test_previews_are_the_first_scales_of_the_whole(parts):
    model, tokenizer, texts = parts
    steps = list(generate_bits(model, tokenizer.quantizer, texts, KEYS, ScaleSampling()))
    assert [step.scales for step in steps] == [1, 2, 3, 4]
    for step, span in zip(steps, tokenizer.quantizer.slices, strict=True):
        assert torch.equal(step.bits[:, : span.stop], steps[-1].bits[:, : span.stop])
        assert not step.bits[:, span.stop :].any()
    few = last(model, tokenizer.quantizer, texts, KEYS, ScaleSampling(), scales=2)
    assert torch.equal(few.bits, steps[1].bits)


def test_bad_input_is_named(parts):
    model, tokenizer, texts = parts
    quantizer = tokenizer.quantizer

    def call(sampling=None, **options):
        return last(model, quantizer, texts, KEYS, sampling or ScaleSampling(), **options)

    with pytest.raises(ScaMoError, match="latents = "):
        call(latents=[1, 2])
    with pytest.raises(ScaMoError, match="of 1 to 8"):
        call(latents=[1, 2, 3, 9])
    with pytest.raises(ScaMoError, match="scales = 5"):
        call(scales=5)
    with pytest.raises(ScaMoError, match="keys: shape"):
        last(model, quantizer, texts, KEYS[:2], ScaleSampling())
    with pytest.raises(ScaMoError, match="one or more"):
        last(model, quantizer, [], KEYS[:0], ScaleSampling())
    with pytest.raises(ScaMoError, match="temperature = 0"):
        ScaleSampling(temperature=0)
    with pytest.raises(ScaMoError, match="guidance = "):
        ScaleSampling(guidance=(0.0, -1.0))
    blind = NextScale(replace(CONFIG, drop_text=0.0))
    with pytest.raises(ScaMoError, match="drop_text = 0"):
        last(blind, quantizer, texts, KEYS, ScaleSampling())
    other = NextScale(replace(CONFIG, bits=4))
    with pytest.raises(ScaMoError, match="other scales or bits"):
        last(other, quantizer, texts, KEYS, ScaleSampling())


def test_motions_of_texts(parts, encoder, tmp_path):
    tokenizer, config = parts[1], replace(CONFIG, text_width=12, max_text=16)
    tokenizer.save(tmp_path / "tok")
    model = NextScale(config)
    folder = tmp_path / "predictor"
    export_predictor(folder, model.state_dict(), config, tmp_path / "tok", str(encoder), fps=25.0)
    made = ScaleMoGen.load(folder, "cpu")
    texts = ["a person walks", "jumps slowly in a circle"]
    whole = made.generate(texts, frames=[30, 17], seeds=[4, 5])
    assert [len(motion) for motion in whole] == [30, 17]
    assert [(motion.text, motion.fps) for motion in whole] == [(text, 25.0) for text in texts]
    previews = list(made.previews(texts, frames=[30, 17], seeds=[4, 5], every=2))
    assert len(previews) == 2
    np.testing.assert_array_equal(previews[-1][1].features, whole[1].features)
    assert not np.array_equal(previews[0][1].features, whole[1].features)
    (alone,) = made.generate([texts[1]], frames=17, seeds=5)
    np.testing.assert_allclose(alone.features, whole[1].features, rtol=1e-4, atol=1e-4)
    assert all(len(motion) % 4 == 0 and 4 <= len(motion) <= 32 for motion in made.generate(texts))
    with pytest.raises(ScaMoError, match=r"frames = \[33, 33\]"):
        made.generate(texts, frames=33)
    with pytest.raises(ScaMoError, match="seeds: 1 of them for 2"):
        made.generate(texts, seeds=[1])
    with pytest.raises(ScaMoError, match="exists"):
        export_predictor(folder, model.state_dict(), config, tmp_path / "tok", str(encoder), fps=25.0)
    wide = NextScale(replace(config, hidden=64)).state_dict()
    with pytest.raises(ScaMoError, match="weights do not fit"):
        export_predictor(folder, wide, config, tmp_path / "tok", str(encoder), fps=25.0, overwrite=True)
