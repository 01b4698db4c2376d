"""The network against the released sizes, names and an independent forward pass; its folder."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scamo_kernels import reference

from scamo.config import FSQ_LEVELS, TokenizerConfig
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import Decoder, Encoder, FSQAutoencoder
from scamo.tokenizers.fsq import FSQ

NARROW = TokenizerConfig(codebook_size=1024, width=24, latent_width=20, feature_dim=263)


def narrow(seed=0, config=NARROW, **statistics):
    torch.manual_seed(seed)
    return FSQAutoencoder(config, **statistics).eval()


def spread(model):
    """Scale the latents so that the random network uses many codes."""
    with torch.no_grad():
        model.quantizer.project_in.weight.mul_(30)
    return model


def test_parameters_at_full_width():
    with torch.device("meta"):
        config = TokenizerConfig(feature_dim=263)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (Encoder(config), Decoder(config))]
    assert sizes == [9_587_200, 9_849_607]  # 9.59M + 9.85M


@pytest.mark.parametrize(("size", "levels"), FSQ_LEVELS.items())
def test_parameters_at_every_codebook_size(size, levels):
    with torch.device("meta"):
        quantizer = FSQ(TokenizerConfig(codebook_size=size).fsq_levels, 512)
    count = sum(p.numel() for p in quantizer.parameters())
    channels = len(levels)
    assert count == 512 * channels + channels + channels * 512 + 512
    assert round((9_587_200 + 9_849_607 + count) / 1e6, 2) == 19.44


def test_names_and_shapes_are_the_released_ones():
    """facts of the released checkpoint: every layer, less the leading "vqvae."."""
    with torch.device("meta"):
        config = TokenizerConfig(feature_dim=263)
        encoder, decoder = Encoder(config), Decoder(config)
        quantizer = FSQ(FSQ_LEVELS[65536], 512)
    shapes = {}
    for prefix, part in (("encoder", encoder), ("quantizer", quantizer), ("decoder", decoder)):
        shapes |= {f"{prefix}.{name}": tuple(t.shape) for name, t in part.state_dict().items()}
    w, expected = 512, {}

    def layer(name, *shape):
        expected[f"{name}.weight"], expected[f"{name}.bias"] = shape, shape[:1]

    layer("encoder.model.0", w, 263, 3)
    layer("encoder.model.4", w, w, 3)
    layer("decoder.model.0", w, w, 3)
    layer("decoder.model.4", w, w, 3)
    layer("decoder.model.6", 263, w, 3)
    layer("quantizer.project_in", 6, w)
    layer("quantizer.project_out", w, 6)
    for stage in (2, 3):
        layer(f"encoder.model.{stage}.0", w, w, 4)
        layer(f"decoder.model.{stage}.2", w, w, 3)
        for block in range(3):
            for stack in (f"encoder.model.{stage}.1", f"decoder.model.{stage}.0"):
                layer(f"{stack}.model.{block}.conv1", w, w, 3)
                layer(f"{stack}.model.{block}.conv2", w, w, 1)
    assert shapes == expected


def plain_latents(state, x, dilations):
    """The encoder and projection written out with conv1d on (B, C, T), from the released description."""

    def conv(x, name, **options):
        return F.conv1d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = F.relu(conv(x.transpose(1, 2), "encoder.model.0", padding=1))
    for stage in (2, 3):
        x = conv(x, f"encoder.model.{stage}.0", stride=2, padding=1)
        for block, dilation in enumerate(dilations):
            name = f"encoder.model.{stage}.1.model.{block}"
            y = conv(F.relu(x), f"{name}.conv1", padding=dilation, dilation=dilation)
            x = x + conv(F.relu(y), f"{name}.conv2")
    x = conv(x, "encoder.model.4", padding=1).transpose(1, 2)
    return F.linear(x, state["quantizer.project_in.weight"], state["quantizer.project_in.bias"])


def plain_decode(state, indices, levels, dilations):
    def conv(x, name, **options):
        return F.conv1d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    codes = reference.fsq_dequantize(indices, levels).to(state["quantizer.project_out.weight"].dtype)
    x = F.linear(codes, state["quantizer.project_out.weight"], state["quantizer.project_out.bias"])
    x = F.relu(conv(x.transpose(1, 2), "decoder.model.0", padding=1))
    for stage in (2, 3):
        for block, dilation in enumerate(dilations):
            name = f"decoder.model.{stage}.0.model.{block}"
            y = conv(F.relu(x), f"{name}.conv1", padding=dilation, dilation=dilation)
            x = x + conv(F.relu(y), f"{name}.conv2")
        x = conv(x.repeat_interleave(2, dim=2), f"decoder.model.{stage}.2", padding=1)
    x = F.relu(conv(x, "decoder.model.4", padding=1))
    return conv(x, "decoder.model.6", padding=1).transpose(1, 2)


def edge_distance(z, levels):
    """How far the bounded latents are from where rounding changes: (..., d) -> (...)."""
    bounded = reference.fsq_bound(z, levels)
    return ((bounded - bounded.floor()) - 0.5).abs().amin(-1)


def test_equals_the_plain_network():
    model = spread(narrow())
    state = {name: t.double() for name, t in model.state_dict().items()}
    x = torch.randn(3, 40, 263, generator=torch.Generator().manual_seed(1))
    z = plain_latents(state, x.double(), (9, 3, 1))
    indices = model.encode(x)
    clear = edge_distance(z, NARROW.fsq_levels) > 1e-4
    assert clear.double().mean() > 0.9
    expected = reference.fsq_quantize(z, NARROW.fsq_levels)[1]
    assert torch.equal(indices[clear], expected[clear])
    assert indices.unique().numel() > 5

    made = model.decode(indices)
    expected = plain_decode(state, indices, NARROW.fsq_levels, (9, 3, 1))
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_other_dilation_order_gives_other_tokens():
    model = spread(narrow())
    state = model.state_dict()
    x = torch.randn(3, 40, 263, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other = reference.fsq_quantize(plain_latents(state, x, (1, 3, 9)), NARROW.fsq_levels)[1]
    assert (other != model.encode(x)).float().mean() > 0.3


@pytest.mark.parametrize("frames", [4, 5, 7, 8, 63, 64, 199])
def test_lengths_are_floored_to_whole_tokens(frames):
    model = narrow()
    x = torch.randn(2, frames, 263)
    indices = model.encode(x)
    assert indices.shape == (2, frames // 4)
    assert indices.dtype == torch.int32
    made = model.decode(indices)
    assert made.shape == (2, frames // 4 * 4, 263)
    assert made.dtype == torch.float32
    assert torch.equal(indices, model.encode(x[:, : frames // 4 * 4]))
    out = model(x)
    assert out.features.shape == made.shape


def test_stages_set_the_downsampling():
    model = narrow(config=TokenizerConfig(codebook_size=256, width=8, latent_width=8, downsample_stages=3))
    assert model.encode(torch.randn(1, 35, 263)).shape == (1, 4)
    assert model.decode(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 32, 263)


def test_takes_and_returns_raw_features():
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(263, generator=generator)
    std = torch.rand(263, generator=generator) + 0.5
    plain = spread(narrow())
    scaled = spread(narrow(mean=mean.double().numpy(), std=std))
    assert scaled.mean.dtype == scaled.std.dtype == torch.float32
    x = torch.randn(1, 24, 263, generator=generator)
    indices = plain.encode(x)
    # The round trip through the statistics moves a latent by rounding only.
    assert (scaled.encode(x * std + mean) == indices).float().mean() > 0.8
    torch.testing.assert_close(scaled.decode(indices), plain.decode(indices) * std + mean)


def test_gradients_pass_the_rounding():
    model = spread(narrow())  # with every code zero, as at the start, project_out's weight has no gradient
    x = torch.randn(2, 32, 263)
    F.smooth_l1_loss(model(x).features, x).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_quantiser_stays_in_float32_under_autocast():
    quantizer = FSQ((8, 5, 5, 5), 16)
    latents = torch.randn(64, 16)
    expected, indices, _ = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        codes, same, z = quantizer(latents)
        embedded = quantizer.embed(same)
    assert codes.dtype == embedded.dtype == z.dtype == torch.float32
    assert torch.equal(codes, expected)
    assert torch.equal(same, indices)
    torch.testing.assert_close(embedded, expected)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": np.zeros(262)}, r"mean: shape \(262,\), expected \(263,\)"),
        ({"std": np.zeros(263)}, "std: expected finite positive values"),
        ({"mean": np.full(263, np.nan)}, "mean: expected finite values"),
    ],
)
def test_bad_statistics(statistics, message):
    with pytest.raises(ScaMoError, match=message):
        narrow(**statistics)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 8, 262)), r"shape \(1, 8, 262\), expected \(batch, frames, 263\)"),
        (lambda m: m.encode(torch.zeros(8, 263)), r"shape \(8, 263\)"),
        (lambda m: m.encode(torch.zeros(1, 3, 263)), "3 frames are less than one token"),
        (lambda m: m.decode(torch.zeros(1, 0, dtype=torch.int64)), r"shape \(1, 0\)"),
        (lambda m: m.decode(torch.tensor([[0, 1000]])), "tokens from 0 to 1000: .* codes 0 to 999"),
        (lambda m: m.decode(torch.tensor([[-1, 3]])), "tokens from -1 to 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ScaMoError, match=message):
        call(narrow())


def test_save_and_load_are_bitwise(tmp_path):
    model = narrow(mean=np.arange(263.0), std=np.full(263, 0.5))
    model.save(tmp_path / "tok", provenance={"seed": 0})
    again = load_tokenizer(tmp_path / "tok")
    assert not again.training
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    description = json.loads((tmp_path / "tok/config.json").read_text())
    assert description["schema_version"] == 1
    assert description["provenance"] == {"seed": 0}
    assert description["tokenizer"]["width"] == 24
    with pytest.raises(ScaMoError, match="exists"):
        model.save(tmp_path / "tok")
    model.save(tmp_path / "tok", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["tok"]


def rewrite(folder, change):
    """Change config.json as a user might, without the manifest that would notice."""
    (folder / "manifest.json").unlink()
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["tokenizer"].update(width=32),
            r"model.safetensors: the weights do not fit the config: .*shape: encoder.model.0.weight is "
            r"\(24, 263, 3\), expected \(32, 263, 3\)",
        ),
        (
            lambda d: d["tokenizer"].update(depth=4),
            r"missing decoder.model.2.0.model.3.conv1.bias, .* and 13 more",
        ),
        (lambda d: d["tokenizer"].update(depth=2), r"unknown decoder.model.2.0.model.2.conv1.bias"),
        (lambda d: d["tokenizer"].update(codebook_size=512), r"quantizer.project_in.weight is \(4, 20\)"),
        (lambda d: d["tokenizer"].update(widht=3), "unknown key widht; did you mean width"),
        (lambda d: d.update(format="else"), "format 'else', expected 'scamo-fsq-tokenizer'"),
        (lambda d: d.update(schema_version=9), "schema_version 9"),
        (lambda d: d.pop("tokenizer"), "missing key tokenizer"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path, change, message):
    narrow().save(tmp_path / "tok")
    rewrite(tmp_path / "tok", change)
    with pytest.raises(ScaMoError, match=message) as caught:
        load_tokenizer(tmp_path / "tok")
    assert "\n" not in str(caught.value)


def test_a_damaged_folder(tmp_path):
    with pytest.raises(ScaMoError, match=r"none/config.json: no such file; .* is not a tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    narrow().save(tmp_path / "tok")
    weights = tmp_path / "tok/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(ScaMoError, match=r"model.safetensors: truncated"):
        load_tokenizer(tmp_path / "tok")
    (tmp_path / "tok/manifest.json").unlink()
    with pytest.raises(ScaMoError, match=r"model.safetensors: not a readable safetensors file"):
        load_tokenizer(tmp_path / "tok")
    weights.unlink()
    with pytest.raises(ScaMoError, match=r"model.safetensors: no such file"):
        load_tokenizer(tmp_path / "tok")
    (tmp_path / "tok/config.json").write_text("{")
    with pytest.raises(ScaMoError, match=r"config.json: not valid JSON"):
        load_tokenizer(tmp_path / "tok")


def test_weights_that_are_not_finite(tmp_path):
    model = narrow()
    with torch.no_grad():
        model.decoder.model[0].bias[3] = float("nan")
    model.save(tmp_path / "tok")
    with pytest.raises(ScaMoError, match=r"decoder.model.0.bias holds values that are not finite"):
        load_tokenizer(tmp_path / "tok")
