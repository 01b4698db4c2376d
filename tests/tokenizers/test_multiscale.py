"""The multi-scale quantiser against plain loops, exact masking, previews, self-correction, and the folder."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scamo_kernels import bsq_dequantize, bsq_quantize

from scamo.config import from_dict, to_dict
from scamo.errors import ScaMoError
from scamo.tokenizers.multiscale import (
    FLIP_RATES,
    MultiscaleConfig,
    MultiscaleQuantizer,
    MultiscaleTokenizer,
    bitwise_loss,
    time_tables,
)
from scamo.tokenizers.skeletal import NODE_JOINTS, PART_NODES, REGIONS

SMALL = MultiscaleConfig(width=8, blocks=1)
T = (49, 24, 24, 16, 7, 7, 4, 2, 2, 1, 1)  # of the released code: latents of a bin
SNAPMOGEN = replace(SMALL, feature_dim=296, max_frames=48, scales=((1, 1), (5, 3), (12, 7)))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = MultiscaleTokenizer(SMALL, torch.randn(263), torch.rand(263) + 0.5).eval()
    with torch.no_grad():  # of a length at which the first scales do not decide all others
        model.project_in.weight.mul_(10)
    return model


@pytest.fixture
def quantizer():
    return MultiscaleQuantizer(SMALL.scales, 24, REGIONS)


def random_latents(n, seed=0):
    """(B, 49, 7, 24), with what must not be read past each motion's end."""
    generator = torch.Generator().manual_seed(seed)
    return 0.6 * torch.randn(len(n), 49, 7, 24, generator=generator)


def plain_quantise(z, scales):
    """One motion's latents (n, 7, d) on the grid of 49, by loops; -> bits of each scale (bins, regions)."""
    n, d = len(z), z.shape[-1]
    residual, total, bits = z.clone(), torch.zeros_like(z), []
    for bins, count in scales:
        bounds = [(b * 49 // bins, min(-(-(b + 1) * 49 // bins), n)) for b in range(bins)]
        bounds = [(first, last) for first, last in bounds if first < n]
        codes = torch.empty(len(bounds), 7, d)
        own = torch.empty(len(bounds), count, dtype=torch.int32)
        for b, (first, last) in enumerate(bounds):
            for r, parts in enumerate(REGIONS[count]):
                mean = residual[first:last, list(parts)].mean((0, 1))
                codes[b, list(parts)] = torch.where(mean > 0, 1.0, -1.0) / math.sqrt(d)
                own[b, r] = sum(1 << i for i in range(d) if mean[i] > 0)
        for latent in range(n):
            place = min(max((latent + 0.5) * bins / 49 - 0.5, 0), len(bounds) - 1)
            left = int(place)
            right, share = min(left + 1, len(bounds) - 1), place - left
            up = (1 - share) * codes[left] + share * codes[right]
            residual[latent] -= up
            total[latent] += up
        bits.append(own)
    return bits, total


def test_released_schedule():
    config = MultiscaleConfig()
    assert config.tokens == 864
    assert [scale[0] for scale in config.scales] == [49 // t for t in T]
    assert [scale[1] for scale in config.scales] == [1, 1, 2, 2, 2, 3, 3, 3, 5, 5, 7]


def test_valid_bins_of_the_released_code(quantizer):
    lengths = torch.arange(1, 197)
    valid = quantizer.valid((lengths + 3) // 4)
    for t, (bins, count), span in zip(T, SMALL.scales, quantizer.slices, strict=True):
        expected = torch.arange(bins) < torch.ceil(lengths / (4 * t))[:, None]
        assert torch.equal(valid[:, span], expected.repeat_interleave(count, 1))
    assert valid[-1].all()


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 12, 24, 49])
def test_time_tables_of_the_longest_motion(bins):
    down, up = time_tables(bins, 49)
    x = torch.randn(5, 49)
    torch.testing.assert_close(x @ down[49].T, F.interpolate(x[:, None], size=bins, mode="area")[:, 0])
    y = torch.randn(5, bins)
    torch.testing.assert_close(y @ up[49].T, F.interpolate(y[:, None], size=49, mode="linear")[:, 0])


def test_time_tables_of_shorter_motions():
    for bins in (1, 3, 12, 24):
        down, up = time_tables(bins, 49)
        for n in range(50):
            there = down[n].sum(1)
            assert set(there.round(decimals=5).tolist()) <= {0.0, 1.0}
            assert (down[n, :, n:] == 0).all()
            torch.testing.assert_close(up[n].sum(1), (torch.arange(49) < n).float())
            assert (up[n][:, there == 0] == 0).all()


@pytest.mark.parametrize("n", [49, 26, 25, 13, 1])
def test_bits_and_sum_are_those_of_plain_loops(quantizer, n):
    z = random_latents([n])
    expected, total = plain_quantise(z[0, :n], SMALL.scales)
    count = torch.tensor([n])
    quantised = quantizer(z, count)
    for own, span in zip(expected, quantizer.slices, strict=True):
        found = quantised.bits[0, span].view(-1, own.shape[1])
        assert torch.equal(found[: len(own)], own)
        assert (found[len(own) :] == 0).all()
    torch.testing.assert_close(quantised.sum[0, :n], total, rtol=1e-5, atol=1e-5)
    assert (quantised.sum[0, n:] == 0).all()
    assert torch.equal(quantizer.encode(z, count), quantised.bits)
    torch.testing.assert_close(quantizer.embed(quantised.bits, count), quantised.sum, rtol=0, atol=1e-6)


def test_a_scale_that_is_left_out_takes_nothing_away(quantizer):
    z, n = random_latents([49, 30]), torch.tensor([49, 30])
    skip = [number in (2, 7) for number in range(11)]
    quantised = quantizer(z, n, skip)
    kept = MultiscaleQuantizer([s for s, out in zip(SMALL.scales, skip, strict=True) if not out], 24, REGIONS)
    alone = kept(z, n)
    torch.testing.assert_close(quantised.sum, alone.sum)
    torch.testing.assert_close(quantised.loss, alone.loss)
    spans = zip(quantizer.slices, skip, strict=True)
    assert torch.equal(torch.cat([quantised.bits[:, s] for s, out in spans if not out], 1), alone.bits)
    assert (quantised.bits[:, quantizer.slices[7]] == 0).all()


def test_loss_against_its_formula():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    there = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    codes = bsq_quantize(z)[0]
    u = z[there] / z[there].norm(dim=-1, keepdim=True)
    commitment = (u - codes[there]).square().sum(-1).mean()
    p = torch.sigmoid(-4 * u / math.sqrt(24) * 100)

    def entropy(p):
        return (-p * p.clamp_min(1e-30).log() - (1 - p) * (1 - p).clamp_min(1e-30).log()).sum(-1)

    expected = 0.25 * commitment + 0.001 * (entropy(p).mean() - entropy(p.mean(0)))
    torch.testing.assert_close(bitwise_loss(z, codes, there), expected, rtol=1e-4, atol=1e-6)


def test_loss_has_finite_slopes_where_all_bits_are_sure():
    z = torch.ones(1, 4, 24).requires_grad_()
    bitwise_loss(z, bsq_quantize(z)[0], torch.ones(1, 4, dtype=torch.bool)).backward()
    assert z.grad.isfinite().all()
    z = torch.zeros(1, 4, 24).requires_grad_()  # as a scale's tokens that are not there
    there = torch.tensor([[False, True, True, True]])
    bitwise_loss(z, bsq_quantize(z)[0], there).backward()
    assert z.grad.isfinite().all()


def test_padding_changes_nothing(tokenizer):
    """Latents, bits, loss and what is decoded are those of the motion alone."""
    torch.manual_seed(1)
    lengths = torch.tensor([196, 100, 41, 7, 1])
    x = torch.randn(5, 196, 263)
    for row, length in zip(x, lengths.tolist(), strict=True):
        row[length:] = torch.nan
    with torch.no_grad():
        z, bits, valid = tokenizer.latents(x, lengths), tokenizer.encode(x, lengths), tokenizer.valid(lengths)
        made = tokenizer.decode(bits, lengths)
        assert (bits.shape, bits.dtype, made.shape) == ((5, 864), torch.int32, (5, 196, 263))
        assert valid.sum(1).tolist() == [864, 456, 205, 46, 34]
        assert (bits[~valid] == 0).all()
        for motion, length in enumerate(lengths.tolist()):
            alone, one = x[motion : motion + 1, :length], lengths[motion : motion + 1]
            torch.testing.assert_close(tokenizer.latents(alone, one), z[[motion]], rtol=1e-5, atol=1e-6)
            assert torch.equal(tokenizer.encode(alone), bits[[motion]])
            again = tokenizer.decode(bits[[motion]], one)
            torch.testing.assert_close(again, made[[motion], :length], rtol=0, atol=1e-5)
            assert (made[motion, length:] == 0).all()
            quantised = tokenizer.quantizer(z[[motion]], (one + 3) // 4)
            padded = torch.cat([z[[motion]], z[[motion]]])
            padded[:, (length + 3) // 4 :] = 5
            torch.testing.assert_close(
                tokenizer.quantizer(padded, (one + 3).repeat(2) // 4).loss, quantised.loss
            )


def test_previews_read_no_finer_scale(tokenizer):
    torch.manual_seed(2)
    lengths = torch.tensor([90, 61])
    with torch.no_grad():
        bits = tokenizer.encode(torch.randn(2, 90, 263), lengths)
        full = tokenizer.decode(bits, lengths)
        made = []
        for scales in range(1, 12):
            tokens = tokenizer.quantizer.slices[scales - 1].stop
            garbage = bits.clone()
            garbage[:, tokens:] = 12345
            made.append(tokenizer.decode(garbage, lengths, scales=scales))
            assert torch.equal(tokenizer.decode(bits[:, :tokens], lengths, scales=scales), made[-1])
    assert torch.equal(made[-1], full)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(made))


def test_inputs_are_the_sum_of_coarser_scales(quantizer):
    n = torch.tensor([49, 20])
    bits = quantizer.encode(random_latents(n), n)
    inputs, valid = quantizer.inputs(bits, n), quantizer.valid(n)
    assert inputs.shape == (2, 864, 24)
    assert (inputs[:, 0] == 0).all()
    assert (inputs[~valid] == 0).all()
    before = quantizer.embed(bits, n, scales=7)  # scale 7: 24 bins, 3 regions
    bin5 = before[:, 10:13]  # 5 * 49 / 24 = 10.2 to 12.25
    for region, parts in enumerate(REGIONS[3]):
        expected = bin5[:, :, list(parts)].mean((1, 2))
        torch.testing.assert_close(inputs[:, quantizer.slices[7]][:, 5 * 3 + region], expected)


def test_no_flips_give_the_tokenizers_bits(quantizer):
    """The released code's fault: its predictor's targets differ from the tokenizer's bits near the end."""
    n = torch.tensor([49, 25, 24, 13, 1])
    z = random_latents(n)
    bits = quantizer.encode(z, n)
    for rates in (None, [0.0] * 11):
        corrupted = quantizer.corrupt(z, n, rates, torch.Generator().manual_seed(0))
        assert torch.equal(corrupted.targets, bits)
        assert torch.equal(corrupted.bits, bits)
        torch.testing.assert_close(corrupted.inputs, quantizer.inputs(bits, n))


def test_targets_correct_the_flips_of_coarser_scales(quantizer):
    n = torch.tensor([49, 25])
    z, valid = random_latents(n), quantizer.valid(n)
    rates = [0.3, 0.0, 0.2, 0.1, 0.3, 0.05, 0.3, 0.2, 0.0, 0.3, 0.3]
    corrupted = quantizer.corrupt(z, n, rates, torch.Generator().manual_seed(0))
    flips = corrupted.targets ^ corrupted.bits
    assert (flips[~valid] == 0).all()
    shifts = torch.arange(24, dtype=torch.int32)
    for number, (span, rate) in enumerate(zip(quantizer.slices, rates, strict=True)):
        flipped = (flips[:, span][valid[:, span]][:, None] >> shifts & 1).float()
        assert abs(flipped.mean() - rate) <= 4 * math.sqrt(rate / flipped.numel())
        residual = z - quantizer.embed(corrupted.bits, n, scales=number)
        bins, count = quantizer.scales[number]
        alone = MultiscaleQuantizer([(bins, count)], 24, REGIONS) if bins == 49 else None
        if alone is not None:
            assert torch.equal(alone.encode(residual, n), corrupted.targets[:, span])
        pooled = quantizer._down(number, residual, n)
        assert torch.equal(bsq_quantize(pooled)[1] * valid[:, span], corrupted.targets[:, span])
    torch.testing.assert_close(corrupted.inputs, quantizer.inputs(corrupted.bits, n))
    assert not torch.equal(corrupted.targets, quantizer.encode(z, n))


def test_flips_are_a_function_of_the_generator(quantizer):
    n = torch.tensor([30])
    z = random_latents(n)

    def seeded(seed):
        generator = torch.Generator().manual_seed(seed)
        rates = quantizer.draw_rates(generator)
        assert len(rates) == 11
        assert set(rates) <= set(FLIP_RATES)
        return quantizer.corrupt(z, n, rates, generator).bits

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    assert (FLIP_RATES[0], FLIP_RATES[-1], len(FLIP_RATES)) == (0, 0.3, 31)


def test_bits_are_codes():
    """What is packed is what is added: channel 0 is the least significant bit."""
    quantizer = MultiscaleQuantizer(((1, 7),), 24, REGIONS)
    z = random_latents([1])[:, :1]
    bits = quantizer.encode(z, torch.tensor([1]))
    torch.testing.assert_close(quantizer.embed(bits, torch.tensor([1]))[0, 0], bsq_dequantize(bits[0], 24))
    assert torch.equal((bits[0, 3] >> torch.arange(24)) & 1, (z[0, 0, 3] > 0).int())


@pytest.mark.parametrize("pooling", ["topology", "plain"])
def test_every_parameter_learns(pooling):
    torch.manual_seed(0)
    model = MultiscaleTokenizer(replace(SMALL, pooling=pooling, dropout=0.0))
    made = model(torch.randn(3, 60, 263), torch.tensor([60, 33, 50]))
    (made.features.square().mean() + made.loss).backward()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in learned.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    pools = [name for name in dict(model.named_parameters()) if "pools" in name]
    assert len(pools) == 4
    assert all((name in learned) == (pooling == "topology") for name in pools)


def test_full_width():
    model = MultiscaleTokenizer(MultiscaleConfig(feature_dim=263))
    width, joints = 384, np.array([7] + [12] * 21)
    joints[[7, 8, 10, 11]] = 13
    mlps = sum(2 * width * w + width + w + 2 * (width**2 + width) for w in joints)
    conv = 2 * (width**2 + width) + 3 * width**2 + width
    pools = sum(len(group) for groups in (NODE_JOINTS[22], PART_NODES) for group in groups)
    unpools = 12 * 7 + 22 * 12
    linears = 2 * 24 * width + width + 24
    padding = sum(2 * width * (13 - w) + (13 - w) for w in joints)
    parameters = mlps + 16 * conv + pools + unpools + linears
    assert parameters == 18_549_816
    assert parameters + padding == sum(p.numel() for p in model.parameters())


def test_save_and_load_are_bitwise(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok", provenance={"seed": 0})
    again = MultiscaleTokenizer.load(tmp_path / "tok")
    assert (again.config, again.training) == (tokenizer.config, False)
    assert again.config.scales == SMALL.scales
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    x = torch.randn(2, 50, 263)
    with torch.no_grad():
        assert torch.equal(again.encode(x), tokenizer.encode(x))
    description = json.loads((tmp_path / "tok/config.json").read_text())
    assert description["format"] == "scamo-multiscale-tokenizer"
    with pytest.raises(ScaMoError, match="exists"):
        tokenizer.save(tmp_path / "tok")
    (tmp_path / "tok/manifest.json").unlink()
    description["tokenizer"]["blokcs"] = 2
    (tmp_path / "tok/config.json").write_text(json.dumps(description))
    with pytest.raises(ScaMoError, match="config.json: tokenizer: unknown key blokcs; did you mean blocks"):
        MultiscaleTokenizer.load(tmp_path / "tok")


def test_snapmogen():
    torch.manual_seed(0)
    model = MultiscaleTokenizer(SNAPMOGEN).eval()
    with torch.no_grad():
        bits = model.encode(torch.randn(2, 37, 296), torch.tensor([37, 20]))
        assert bits.shape == (2, 1 + 15 + 84)
        assert model.decode(bits, torch.tensor([37, 20])).shape == (2, 37, 296)


def test_quantiser_stays_in_float32_under_autocast(tokenizer):
    x, lengths = torch.randn(2, 24, 263), torch.tensor([24, 13])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = tokenizer(x, lengths)
    assert made.features.dtype == made.loss.dtype == torch.float32
    with torch.no_grad():
        exact = tokenizer(x, lengths)
        z, n = tokenizer.latents(x, lengths), (lengths + 3) // 4
        quantised = tokenizer.quantizer(z, n)
        with torch.autocast("cpu", torch.bfloat16):
            again, bits = tokenizer.quantizer(z, n), tokenizer.quantizer.encode(z, n)
        assert torch.equal(again.sum, quantised.sum)
        assert torch.equal(again.loss, quantised.loss)
        assert torch.equal(bits, quantised.bits)
    same = made.bits ^ exact.bits
    shifts = torch.arange(24, dtype=torch.int32)
    assert (same[..., None] >> shifts & 1).float().mean() < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_frames": 198}, "max_frames = 198: expected a multiple of 4"),
        ({"max_frames": 100}, r"scales: \[49, 5\]: expected 1 to 25 bins, for 100 frames"),
        ({"max_frames": 200}, r"scales: the last is \[49, 7\], expected \[50, 7\] for 200 frames"),
        ({"scales": [[1, 4], [49, 7]]}, r"scales: \[1, 4\]: .* and 1, 2, 3, 5, 7 regions"),
        ({"scales": [[49, 5]]}, r"scales: the last is \[49, 5\], expected \[49, 7\]"),
        ({"scales": []}, "scales: the last is none"),
        ({"bits": 32}, "bits = 32: expected 1 to 31"),
        ({"pooling": "mean"}, "pooling = 'mean': expected topology or plain"),
        ({"width": 0}, "width = 0: expected a value above 0"),
        ({"widht": 8}, "unknown key widht; did you mean width"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(ScaMoError, match=message):
        from_dict(MultiscaleConfig, values)
    assert from_dict(MultiscaleConfig, to_dict(SNAPMOGEN)) == SNAPMOGEN


def test_bad_input(tokenizer):
    x, lengths = torch.zeros(2, 20, 263), torch.tensor([20, 8])
    bits = torch.zeros(2, 864, dtype=torch.int32)
    for call, message in (
        (lambda: tokenizer.encode(x[..., :260]), r"shape \(2, 20, 260\), expected \(batch, frames, 263\)"),
        (lambda: tokenizer.encode(torch.zeros(1, 197, 263)), "197 frames, this tokenizer takes up to 196"),
        (lambda: tokenizer.encode(x, torch.tensor([21, 3])), "lengths from 3 to 21 frames: expected 1 to 20"),
        (lambda: tokenizer.encode(x, torch.tensor([0, 3])), "lengths from 0 to 3 frames: expected 1 to 20"),
        (lambda: tokenizer.encode(x, lengths[:1]), r"shape \(1,\), expected 2 integers"),
        (lambda: tokenizer.encode(x, lengths / 1), r"torch.float32 .* expected 2 integers"),
        (lambda: tokenizer.decode(bits[:, :5], lengths), r"bits: shape \(2, 5\), expected \(batch, 864\)"),
        (lambda: tokenizer.decode(bits, lengths, scales=12), "scales = 12: expected 1 to 11"),
        (lambda: tokenizer.decode(bits, lengths, scales=0), "scales = 0: expected 1 to 11"),
        (lambda: tokenizer.decode(bits - 1, lengths), "bits from -1 to -1: this tokenizer has 0 to 16777215"),
        (lambda: tokenizer.decode(bits, torch.tensor([200, 3])), "lengths from 3 to 200 frames"),
        (
            lambda: MultiscaleTokenizer(SMALL, torch.zeros(263), torch.zeros(263)),
            "std: expected finite positive",
        ),
        (lambda: MultiscaleTokenizer(SMALL, torch.zeros(251)), "joints: 21 of them have no pooling groups"),
        (lambda: MultiscaleTokenizer(replace(SMALL, feature_dim=263), torch.zeros(3)), r"mean: shape \(3,\)"),
    ):
        with pytest.raises(ScaMoError, match=message):
            call()
