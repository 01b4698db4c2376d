"""PrefixLM: sizes, mask, packing, and loss and gradients against a slow padded implementation in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.config import MODEL_SIZES, ModelConfig, from_dict, to_dict
from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling.flops import attended_pairs

K, TEXT = 11, 6
CONFIG = ModelConfig(
    size="", layers=3, heads=2, width=16, codes=K, text_width=TEXT, max_text=12, max_motion=10
)


def make_model(config=CONFIG, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = PrefixLM(config)
    with torch.no_grad():  # norms and bias leave their ones and zeros, so that a wrong use shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
    return model.to(dtype)


def make_samples(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.standard_normal((p, TEXT)).astype(np.float32), rng.integers(0, K, m)) for p, m in shapes
    ]


SHAPES = [(3, 4), (1, 1), (12, 10), (5, 2)]


def naive_logits(params, config, samples):
    """Per sample (m + 1, K + 1), from a padded batch, one pair of channels and one head at a time."""
    both_ways = config.prefix == "bidirectional"
    lengths = [(len(s.text), len(s.motion)) for s in samples]
    longest = max(p + m for p, m in lengths)
    x = torch.zeros(len(samples), longest, config.width, dtype=torch.float64)
    allowed = torch.zeros(len(samples), longest, longest, dtype=torch.bool)
    for b, (sample, (p, m)) in enumerate(zip(samples, lengths, strict=True)):
        text = torch.from_numpy(sample.text).double()
        x[b, :p] = text @ params["text_projection.weight"].T + params["text_projection.bias"]
        x[b, p : p + m] = params["embedding.weight"][torch.from_numpy(sample.motion)]
        for i in range(longest):
            for j in range(longest):
                allowed[b, i, j] = j < (p if both_ways and i < p else i + 1) and j < p + m

    def norm(y, weight):
        return y / (y.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turned(y):
        out = torch.empty_like(y)
        for j in range(config.head_dim // 2):
            angle = torch.arange(longest, dtype=torch.float64) * config.rope_base ** (
                -2 * j / config.head_dim
            )
            c, s = angle.cos(), angle.sin()
            out[..., 2 * j] = y[..., 2 * j] * c - y[..., 2 * j + 1] * s
            out[..., 2 * j + 1] = y[..., 2 * j] * s + y[..., 2 * j + 1] * c
        return out

    for layer in range(config.layers):
        w = {name: params[f"blocks.{layer}.{name}.weight"] for name in
             ("norm_1", "qkv", "out", "norm_2", "gate_up", "down")}  # fmt: skip
        q, k, v = (norm(x, w["norm_1"]) @ w["qkv"].T).split(config.width, -1)
        heads = []
        for h in range(config.heads):
            part = slice(h * config.head_dim, (h + 1) * config.head_dim)
            scores = turned(q[..., part]) @ turned(k[..., part]).transpose(1, 2) / math.sqrt(config.head_dim)
            heads.append(scores.masked_fill(~allowed, -1e30).softmax(-1) @ v[..., part])
        x = x + torch.cat(heads, -1) @ w["out"].T
        gate, up = (norm(x, w["norm_2"]) @ w["gate_up"].T).split(config.hidden, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["down"].T
    logits = norm(x, params["norm.weight"]) @ params["head.weight"].T
    return [logits[b, p - 1 : p + m] for b, (p, m) in enumerate(lengths)]


@pytest.mark.parametrize("prefix", ["bidirectional", "causal"])
def test_loss_and_every_gradient_equal_the_padded_implementation(prefix):
    config = replace(CONFIG, prefix=prefix)
    model = make_model(config)
    samples = make_samples(SHAPES)
    batch = collate(samples, K)
    output = model(batch)
    output.loss_sum.backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = torch.cat(naive_logits(params, config, samples))
    targets = torch.cat([torch.tensor([*s.motion, K]) for s in samples])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()

    assert output.n_scored == sum(m + 1 for _, m in SHAPES)
    torch.testing.assert_close(model.logits(batch), logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.losses.double(), losses.detach(), atol=2e-6, rtol=0)
    torch.testing.assert_close(output.loss_sum.double(), losses.sum(), atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        scale = params[name].grad.abs().max().clamp(min=1e-3)
        error = (parameter.grad - params[name].grad).abs().max() / scale
        assert error < 1e-5, name
        assert params[name].grad.abs().max() > 0, f"{name} has no gradient: the comparison is empty"


def test_heads_stored_wider_than_they_are_change_nothing(monkeypatch):
    """As on a GPU, where a head of 100 stands in 104 columns: the loss and every gradient stay."""
    config = replace(CONFIG, width=24)  # heads of 12
    batch = collate(make_samples(SHAPES), K)
    results = []
    for storage in (12, 16):
        monkeypatch.setattr("scamo.models.prefix_lm.storage_dim", lambda *_, storage=storage: storage)
        model = make_model(config)
        output = model(batch)
        output.loss_sum.backward()
        results.append((output.losses, {name: p.grad for name, p in model.named_parameters()}))
        assert model.blocks[0].qkv.weight.shape == (72, 24)
    (losses, grads), (wide_losses, wide_grads) = results
    torch.testing.assert_close(wide_losses, losses, atol=1e-12, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(wide_grads[name], grad, atol=1e-12, rtol=0)


def test_generation_with_heads_stored_wider(monkeypatch):
    config = replace(CONFIG, width=24)
    model = make_model(config, dtype=torch.float32)
    texts = [torch.from_numpy(sample.text) for sample in make_samples(SHAPES)]
    results = []
    for storage in (12, 16):
        monkeypatch.setattr("scamo.models.prefix_lm.storage_dim", lambda *_, storage=storage: storage)
        cache, first = model.prefill(texts, 1)
        assert cache.states.shape[-1] == storage
        results.append((first, model.decode(cache, torch.arange(len(texts)))))
    for plain, wide in zip(*results, strict=True):
        torch.testing.assert_close(wide, plain, atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_bit():
    batch = collate(make_samples(SHAPES), K)
    results = []
    for checkpointed in (False, True):
        model = make_model(dtype=torch.float32)
        model.checkpoint_activations = checkpointed
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model(batch)
        output.loss_sum.backward()
        results.append((saved, output.losses, [p.grad for p in model.parameters()]))
    (much, losses, grads), (little, same_losses, same_grads) = results
    assert little < much / 2
    assert torch.equal(losses, same_losses)
    assert all(map(torch.equal, grads, same_grads))


def test_a_sentence_is_the_mean_of_its_words_and_attention_is_causal():
    model = make_model(replace(CONFIG, text="sentence"), dtype=torch.float32)
    texts = [torch.from_numpy(sample.text) for sample in make_samples(SHAPES)]
    cache, logits = model.prefill(texts, 1)
    assert cache.lengths.tolist() == [1] * len(texts)
    for row, text in enumerate(texts):
        sample = Sample(text.mean(0, keepdim=True).numpy(), np.array([0]))
        expected = model.logits(collate([sample], K))[0]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


def test_a_sentence_is_the_same_function_with_either_prefix():
    """One position sees itself only: no bit of loss, gradients and generation differs, nor the counts."""
    samples = [replace(s, text=s.text.mean(0, keepdims=True)) for s in make_samples(SHAPES)]
    results = []
    for prefix in ("bidirectional", "causal"):
        model = make_model(replace(CONFIG, text="sentence", prefix=prefix), dtype=torch.float32)
        batch = collate(samples, K)
        output = model(batch)
        output.loss_sum.backward()
        cache, first = model.prefill([torch.from_numpy(s.text) for s in make_samples(SHAPES)], 1)
        following = model.decode(cache, torch.arange(len(SHAPES)))
        results.append([output.losses, *(p.grad for p in model.parameters()), cache.states, first, following])
        pairs = attended_pairs(batch.cu_seqlens.diff(), model.config.both_ways(batch.prefix_lengths))
        assert pairs == sum((m + 1) * (m + 2) // 2 for _, m in SHAPES)
    assert all(map(torch.equal, *results))


def test_a_causal_prefix_is_read_causally_by_training_generation_and_counts():
    config = replace(CONFIG, prefix="causal")
    model = make_model(config)
    samples = make_samples(SHAPES)
    batch = collate(samples, K)
    pairs = attended_pairs(batch.cu_seqlens.diff(), config.both_ways(batch.prefix_lengths))
    assert pairs == sum((p + m) * (p + m + 1) // 2 for p, m in SHAPES)
    expected = [logits.detach() for logits in naive_logits(dict(model.named_parameters()), config, samples)]
    both = naive_logits(dict(model.named_parameters()), CONFIG, samples)
    assert (both[0] - expected[0]).abs().max() > 1e-3, "the mask matters here"
    model = model.float()
    prefixes = [torch.from_numpy(sample.text) for sample in samples]
    rows = list(range(len(samples)))
    # All motion at once behind the text, and token by token.
    starts = [sample.motion.tolist() for sample in samples]
    last = model.read_prefixes(model.new_cache(len(rows), 30), prefixes, rows, starts).double()
    torch.testing.assert_close(last, torch.stack([logits[-1] for logits in expected]), atol=1e-5, rtol=0)
    for sample, logits in zip(samples, expected, strict=True):
        cache, first = model.prefill([torch.from_numpy(sample.text)], len(sample.motion))
        made = [first, *(model.decode(cache, torch.tensor([token])) for token in sample.motion)]
        torch.testing.assert_close(torch.cat(made).double(), logits, atol=1e-5, rtol=0)


def test_a_model_that_says_nothing_of_its_prefix_reads_it_in_both_directions():
    described = to_dict(CONFIG)
    del described["prefix"]
    assert from_dict(ModelConfig, described) == CONFIG
    assert CONFIG.prefix == "bidirectional"
    with pytest.raises(ScaMoError, match="prefix = 'both': expected bidirectional or causal"):
        replace(CONFIG, prefix="both")


def test_later_motion_never_reaches_earlier_logits():
    model = make_model()
    (sample,) = make_samples([(5, 8)])
    before = model.logits(collate([sample], K))
    for t in range(8):
        motion = sample.motion.copy()
        motion[t] = (motion[t] + 1) % K
        after = model.logits(collate([replace(sample, motion=motion)], K))
        # Row t + 1 is the first whose input is motion token t.
        assert torch.equal(before[: t + 1], after[: t + 1])
        assert ((before - after).abs().amax(-1)[t + 1 :] > 1e-6).all()


def test_every_text_row_reaches_every_logit_in_both_directions():
    model = make_model()
    (sample,) = make_samples([(5, 4)])
    before = model.logits(collate([sample], K))
    for row in range(5):
        text = sample.text.copy()
        text[row] += 1
        after = model.logits(collate([replace(sample, text=text)], K))
        assert ((before - after).abs().amax(-1) > 1e-6).all()
    # The last text row must see what the first learnt from it: reversing the order of the text matters too.
    after = model.logits(collate([replace(sample, text=sample.text[::-1].copy())], K))
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_a_sample_in_a_pack_is_the_sample_alone():
    model = make_model()
    samples = make_samples(SHAPES)
    packed = model.logits(collate(samples, K)).split([m + 1 for _, m in SHAPES])
    for sample, logits in zip(samples, packed, strict=True):
        torch.testing.assert_close(model.logits(collate([sample], K)), logits, atol=1e-12, rtol=0)


def test_float32_and_bfloat16_stay_near_float64():
    samples = make_samples(SHAPES)
    batch = collate(samples, K)
    exact = make_model().logits(batch)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = make_model().to(dtype)
        output = model(batch)
        output.loss_sum.backward()
        assert output.loss_sum.dtype == torch.float32
        assert model.logits(batch).dtype == torch.float32
        assert (model.logits(batch).double() - exact).abs().max() < bound * exact.abs().max()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_rotary_positions_survive_a_cast_of_the_model():
    config = replace(CONFIG, max_text=150, max_motion=50)
    model = make_model(config).to(torch.bfloat16)
    assert not list(model.buffers()), "nothing that a cast could ruin"
    table = model._rope(torch.device("cpu"))
    assert table.dtype == torch.float32
    cos, sin = table[200, 1].tolist()
    exact = 200 * 10000.0 ** (-2 / config.head_dim)
    assert math.remainder(math.atan2(sin, cos) - exact, 2 * math.pi) == pytest.approx(0, abs=1e-6)


def test_same_seed_same_weights_and_stated_spread():
    config = replace(CONFIG, width=256, layers=2, codes=1000)
    torch.manual_seed(3)
    first = PrefixLM(config)
    torch.manual_seed(3)
    second = PrefixLM(config)
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    std = math.sqrt(2 / (5 * 256))
    for name, expected in (
        ("embedding.weight", 0.02),
        ("blocks.0.qkv.weight", std),
        ("blocks.1.gate_up.weight", std),
        ("blocks.1.out.weight", std / 2),
        ("blocks.0.down.weight", std / 2),
        ("head.weight", std),
    ):
        assert state[name].std().item() == pytest.approx(expected, rel=0.02), name
    loss = first(collate(make_samples([(4, 6)] * 8), 1000))
    assert loss.loss_sum.item() / loss.n_scored == pytest.approx(math.log(1001), rel=0.1)


# Tab. 1, to the digits printed there.
TABLE = {
    "44M": ("27.27M", "93.9M"),
    "111M": ("84.95M", "184.8M"),
    "343M": ("308.3M", "441.5M"),
    "775M": ("731.5M", "897.9M"),
    "1.4B": ("1.359B", "1.559B"),
    "3B": ("2.989B", "3.405B"),
}


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_parameter_counts_of_the_paper(size):
    with torch.device("meta"):
        model = PrefixLM(ModelConfig(size=size, codes=64000, text_width=2048))
    total = sum(p.numel() for p in model.parameters())
    for count, printed in zip((model.block_parameters(), total), TABLE[size], strict=True):
        unit = {"M": 1e6, "B": 1e9}[printed[-1]]
        digits = len(printed[:-1].split(".")[1])
        assert f"{count / unit:.{digits}f}{printed[-1]}" == printed
    assert model.config.head_dim == (100 if size == "3B" else 64)
    assert model.embedding.weight.shape[0] == 64002
    assert model.head.weight.shape[0] == 64001


def test_too_long_a_sample_is_refused():
    model = make_model()
    with pytest.raises(ScaMoError, match=r"24 positions: the model has 23 \(max_text 12 \+ max_motion 10"):
        model(collate(make_samples([(14, 10)]), K))


@pytest.mark.parametrize("name", ["codes", "text_width"])
def test_sizes_from_the_dataset_must_be_filled_in(name):
    with pytest.raises(ScaMoError, match=f"model.{name} = 0"):
        PrefixLM(replace(CONFIG, **{name: 0}))
