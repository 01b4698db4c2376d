"""NextScale: sizes, the mask, packing and the loss, and the cached pass against the whole one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scamo.config import from_dict, to_dict
from scamo.data.scales import ScaleSample, collate_scales
from scamo.errors import ScaMoError
from scamo.models.next_scale import (
    Joined,
    NextScale,
    NextScaleConfig,
    joined_attention,
    pack_bits,
    rotary_grid,
    split_attention,
    unpack_bits,
)
from scamo.tokenizers.multiscale import MultiscaleQuantizer
from scamo.tokenizers.skeletal import PARTS, REGIONS

TEXT, BITS = 6, 5
SCALES = ((1, 1), (2, 2), (4, 3), (8, 5), (8, 7))
CONFIG = NextScaleConfig(
    depth=3, width=32, heads=2, hidden=48, text_width=TEXT, scales=SCALES, bits=BITS, drop_path=0.0
)
QUANTIZER = MultiscaleQuantizer(SCALES, BITS, REGIONS)
LATENTS = (8, 3, 1, 6)


@pytest.fixture(autouse=True)
def one_thread():
    """Several would wait for each other longer than these products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(config=CONFIG, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = NextScale(config)
    with (
        torch.no_grad()
    ):  # biases, norms and modulations leave their zeros and ones, so that a wrong use shows
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def make_samples(latents=LATENTS, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ScaleSample(
            rng.standard_normal((2 + 3 * i, TEXT)).astype(np.float32),
            rng.standard_normal((n, PARTS, BITS)).astype(np.float32),
            item=i,
        )
        for i, n in enumerate(latents)
    ]


def level_spans(batch, sample):
    """(first, end) packed rows of each scale of a sample."""
    start, end = batch.cu_seqlens[sample : sample + 2].tolist()
    ends = [start + bound for bound in sorted(set(batch.bounds[start:end].tolist()))]
    return list(zip([start, *ends], ends, strict=False))


def test_the_full_size_is_within_a_hundredth_of_the_released_one():
    with torch.device("meta"):
        model = NextScale(NextScaleConfig(text_width=2048))
    count = sum(p.numel() for p in model.parameters())
    assert count == 124_125_609
    assert abs(count / 125.2e6 - 1) < 0.01


def test_the_grid_turns_time_and_region_apart():
    scales = ((3, 2), (49, 7))
    angle = lambda row: torch.atan2(table[row, :, 1], table[row, :, 0])  # noqa: E731
    table = rotary_grid(scales, 8, 100.0, torch.device("cpu"))
    assert table.shape == (3 * 2 + 49 * 7, 4, 2)
    # Bin 1 of 3 is at 16 of 49, region 1 of 2 at 4 of 7 (3.5 rounds to even).
    expected = torch.tensor([16.0, 1.6, 4.0, 0.4])
    expected = torch.atan2(expected.sin(), expected.cos())
    torch.testing.assert_close(angle(1 * 2 + 1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(table[6 + 16 * 7 + 4], table[1 * 2 + 1])


def test_packed_is_what_each_gives_alone():
    model, samples = make_model(), make_samples()
    together = model.logits(collate_scales(samples, QUANTIZER))
    apart = [model.logits(collate_scales([sample], QUANTIZER)) for sample in samples]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_against_dense_attention_written_out():
    """One sample through plain masked softmaxes."""
    config = replace(CONFIG, depth=2)
    model = make_model(config)
    batch = collate_scales(make_samples()[:1], QUANTIZER)
    text, pooled = model.text(batch.text_states.double(), batch.cu_text, batch.longest_text)
    count, heads = batch.n_positions, config.heads
    allowed = torch.arange(count) < batch.bounds[:, None]
    level = torch.repeat_interleave(torch.arange(len(SCALES)), torch.tensor([t * r for t, r in SCALES]))
    x = torch.where((level == 0)[:, None], pooled, model.words(batch.inputs.double())) + model.levels(level)
    rope = rotary_grid(SCALES, config.head_dim, config.rope_base, x.device).double()
    condition = (F.silu(pooled) @ model.condition.weight.T + model.condition.bias).view(6, -1)

    def norm(y):
        y = y - y.mean(-1, keepdim=True)
        return y / (y.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()

    def turn(y):  # (N, H, D)
        a, b = y[..., 0::2], y[..., 1::2]
        c, s = rope[:, None, :, 0], rope[:, None, :, 1]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)

    for block in model.blocks:
        s1, b1, g1, s2, b2, g2 = condition + block.modulation.view(6, -1)
        h = norm(x) * (1 + s1) + b1
        q, k, v = (block.qkv(h)).view(count, 3, heads, -1).unbind(1)
        q, k = turn(q / q.norm(dim=-1, keepdim=True)), turn(k / k.norm(dim=-1, keepdim=True))
        scores = torch.einsum("ihd,jhd->hij", q, k) * block.log_scale.exp()[:, None, None]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + g1 * block.out(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        h = norm(x) * block.text_norm.weight + block.text_norm.bias
        q = block.query(h).view(count, heads, -1)
        k, v = block.key_value(text).view(len(text), 2, heads, -1).unbind(1)
        weights = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(config.head_dim)).softmax(-1)
        x = x + block.text_out(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        x = x + g2 * block.down(F.gelu(block.up(norm(x) * (1 + s2) + b2)))
    scale, shift = (F.silu(pooled) @ model.head_condition.weight.T + model.head_condition.bias).chunk(2, -1)
    expected = model.head(norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(model.logits(batch).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_sees_itself_and_the_coarser_ones_only():
    model, batch = make_model(), collate_scales(make_samples(), QUANTIZER)
    before = model.logits(batch)
    spans = level_spans(batch, 1)
    for first, end in spans[1:]:  # the first scale's input is the text
        inputs = batch.inputs.clone()
        inputs[end - 1] += 1
        changed = (model.logits(replace(batch, inputs=inputs)) != before).any(-1)
        stop = int(batch.cu_seqlens[2])
        assert changed[first:stop].all()
        assert not changed[:first].any()
        assert not changed[stop:].any()


def test_a_text_reaches_its_own_motion_only():
    model, batch = make_model(), collate_scales(make_samples(), QUANTIZER)
    states = batch.text_states.clone()
    states[int(batch.cu_text[2])] += 1
    changed = (model.logits(replace(batch, text_states=states)) != model.logits(batch)).any(-1)
    first, end = batch.cu_seqlens[2:4].tolist()
    assert changed[first:end].all()
    assert changed.sum() == end - first


def test_both_cross_attentions_agree():
    torch.manual_seed(0)
    batch = collate_scales(make_samples(), QUANTIZER)
    q, k, v = (torch.randn(rows, 2, 8, requires_grad=True) for rows in (batch.n_positions, 26, 26))
    found = [
        split_attention(q, k, v, batch.cu_seqlens, batch.cu_text),
        joined_attention(q, k, v, Joined.of(batch), "torch"),
    ]
    torch.testing.assert_close(*found)
    weights = torch.randn_like(q)
    grads = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in found]
    torch.testing.assert_close(*grads)


def test_the_loss_is_the_weighted_cross_entropy_of_the_bits():
    model, batch = make_model(), collate_scales(make_samples(), QUANTIZER)
    with torch.no_grad():
        logits, out = model.logits(batch).double(), model(batch)
    losses, weights = [], []
    for sample in range(len(LATENTS)):
        for (first, end), (bins, regions) in zip(level_spans(batch, sample), SCALES, strict=True):
            for row in range(first, end):
                bits = [int(batch.targets[row]) >> i & 1 for i in range(BITS)]
                p = [1 / (1 + math.exp(-float(x))) for x in logits[row]]
                losses.append(-sum(math.log(a if b else 1 - a) for a, b in zip(p, bits, strict=True)) / BITS)
                weights.append(math.sqrt(8 * 7 / (bins * regions)))
    np.testing.assert_allclose(out.losses.numpy(), losses, rtol=1e-5)
    assert float(out.weight) == pytest.approx(sum(weights))
    lengths = model.length_head(model.text(batch.text_states.double(), batch.cu_text, 11)[1])
    of_lengths = -lengths.detach().log_softmax(-1)[range(len(LATENTS)), torch.tensor(LATENTS) - 1]
    expected = np.dot(losses, weights) + CONFIG.length_weight * float(of_lengths.sum())
    assert float(out.loss_sum) == pytest.approx(expected, rel=1e-5)
    wrong = ((logits > 0) != (unpack_bits(batch.targets, BITS) > 0)).double().mean(-1)
    np.testing.assert_allclose(out.errors.numpy(), wrong, rtol=1e-5)


def test_level_weights_may_be_given():
    config = replace(CONFIG, level_weights=(1.0, 0.0, 2.0, 0.0, 0.0), length_weight=0.0)
    model, batch = make_model(config), collate_scales(make_samples(), QUANTIZER)
    out = model(batch)
    level = [i for s in range(4) for i, (a, b) in enumerate(level_spans(batch, s)) for _ in range(b - a)]
    weights = torch.tensor(config.level_weights)[level]
    assert out.loss_sum.item() == pytest.approx(float((out.losses * weights).sum()), rel=1e-5)


def test_a_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = NextScale(replace(CONFIG, drop_path=0.1)).train()
    model(collate_scales(make_samples(), QUANTIZER, seed=3, correct=True)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_drop_path_is_a_function_of_the_batch_and_off_in_evaluation():
    model = make_model(replace(CONFIG, drop_path=0.9))
    batch = collate_scales(make_samples(), QUANTIZER, seed=1)
    first = model.train().logits(batch)
    torch.rand(3)
    torch.testing.assert_close(model.logits(batch), first, rtol=0, atol=0)
    assert not torch.equal(model.logits(replace(batch, seed=2)), first)
    plain = make_model().eval().logits(batch)
    torch.testing.assert_close(model.eval().logits(batch), plain, rtol=0, atol=0)


def test_checkpointed_activations_change_no_gradient():
    batch = collate_scales(make_samples(), QUANTIZER, seed=1)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = NextScale(replace(CONFIG, drop_path=0.5), checkpoint_activations=checkpointed).train()
        model(batch).loss_sum.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("latents", [(8, 8), LATENTS], ids=["equal", "ragged"])
def test_the_cached_pass_gives_what_the_whole_one_does(latents):
    model, samples = make_model(), make_samples(latents)
    batch = collate_scales(samples, QUANTIZER)
    cache = model.read_texts([torch.from_numpy(s.text) for s in samples], CONFIG.tokens)
    spans = [level_spans(batch, sample) for sample in range(len(samples))]
    whole = model.logits(batch).detach()
    for level in range(len(SCALES)):
        rows = torch.cat([torch.arange(*span[level]) for span in spans])
        counts = [span[level][1] - span[level][0] for span in spans]
        found = model.extend(cache, batch.inputs[rows], batch.tokens[rows], counts)
        torch.testing.assert_close(found, whole[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_does():
    """Another cross-attention runs there."""
    batch, found = collate_scales(make_samples(), QUANTIZER), []
    for device in ("cpu", "cuda"):
        model = make_model(dtype=torch.float32).to(device)
        out = model(batch.to(device))
        out.loss_sum.backward()
        found.append([out.losses.cpu(), *(p.grad.cpu() for p in model.parameters())])
    for on_cpu, on_cuda in zip(*found, strict=True):
        scale = float(on_cpu.abs().max())
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-2, atol=1e-3 * scale)


def test_bits_go_into_integers_and_back():
    bits = torch.tensor([0, 1, 6, 31], dtype=torch.int32)
    np.testing.assert_array_equal(unpack_bits(bits, BITS)[2], [0, 1, 1, 0, 0])
    assert torch.equal(pack_bits(unpack_bits(bits, BITS) > 0), bits)


def test_a_tiny_run_learns_its_bits():
    torch.manual_seed(0)
    model = NextScale(replace(CONFIG, length_weight=1.0))
    batch = collate_scales(make_samples((4, 3)), QUANTIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(90):
        out = model(batch)
        errors.append(float(out.errors.mean()))
        optimizer.zero_grad()
        (out.loss_sum / out.weight).backward()
        optimizer.step()
    assert errors[0] > 0.3
    assert errors[-1] < 0.05
    assert float(out.length_losses.max()) < 0.2


def test_a_config_survives_json():
    config = replace(CONFIG, level_weights=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert from_dict(NextScaleConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth = 0"),
        ({"heads": 5}, "does not divide by heads = 5"),
        ({"heads": 16}, "width / heads = 2"),
        ({"pool_heads": 5}, "pool_heads = 5"),
        ({"drop_text": 1.0}, "drop_text = 1.0"),
        ({"bits": 32}, "bits = 32"),
        ({"scales": ()}, "scales = "),
        ({"scales": ((4, 3), (2, 7))}, "the last is [2, 7]"),
        ({"level_weights": (1.0,)}, "expected 5"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ScaMoError, match=message.replace("[", r"\[")):
        replace(CONFIG, **change)


def test_bad_calls_are_named():
    with pytest.raises(ScaMoError, match="text_width = 0"):
        NextScale(replace(CONFIG, text_width=0))
    model = make_model(replace(CONFIG, max_text=4))
    with pytest.raises(ScaMoError, match="a text of 11 states"):
        model(collate_scales(make_samples(), QUANTIZER))
    with pytest.raises(ScaMoError, match="states of width 6"):
        model.read_texts([torch.zeros(2, 5)], 4)
    with pytest.raises(ScaMoError, match="at least one state"):
        model.read_texts([torch.zeros(0, TEXT)], 4)
    cache = model.read_texts([torch.zeros(2, TEXT)], 1)
    with pytest.raises(ScaMoError, match="room for 1 tokens"):
        model.extend(cache, torch.zeros(2, BITS), torch.arange(2), [2])
    with pytest.raises(ScaMoError, match="2 counts of 2 tokens for 1 rows"):
        model.extend(cache, torch.zeros(2, BITS), torch.arange(2), [1, 1])
