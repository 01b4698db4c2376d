"""VQ against paper eqs. 1-2 written out; the VQ tokenizer's folder and what is refused."""

import json

import numpy as np
import pytest
import torch

from scamo.config import TokenizerConfig, from_dict, to_dict
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer, vq
from scamo.tokenizers.autoencoder import FSQAutoencoder, VQAutoencoder
from scamo.tokenizers.vq import VQ, nearest

CONFIG = TokenizerConfig(quantizer="vq", codebook_size=37, width=8, latent_width=6, depth=1)


def make(codes, width, seed=0, stages=1):
    torch.manual_seed(seed)
    return VQ(codes, width, stages).eval()


def brute_force(rows, codebook):
    """The lowest of the nearest, in float64."""
    differences = rows.double()[:, None] - codebook.double()
    return differences.square().sum(-1).argmin(1)


@pytest.mark.parametrize("codes", [1, 37, 512])
def test_the_nearest_code_of_every_latent(codes):
    quantizer = make(codes, 24)
    z = torch.randn(3, 11, 24)
    quantised, indices, same = quantizer(z)
    assert (indices.dtype, indices.shape) == (torch.int32, (3, 11))
    codebook = quantizer.codebook.double().numpy()
    for place in np.ndindex(3, 11):
        distance = ((z[place].double().numpy() - codebook) ** 2).sum(1)
        assert int(indices[place]) == int(distance.argmin())
    assert torch.equal(quantised, quantizer.codebook[indices.long()])
    assert torch.equal(quantizer.embed(indices.long()), quantised)
    assert torch.equal(same, z)


def test_the_lowest_of_equal_codes():
    quantizer = make(5, 3)
    quantizer.codebook[[1, 3, 4]] = torch.tensor([0.1, -0.2, 0.3])
    z = torch.tensor([[0.1, -0.2, 0.3], [0.1, -0.19, 0.3]])
    assert quantizer(z)[1].tolist() == [1, 1]
    # Halfway between two codes, exactly.
    quantizer.codebook[:] = torch.tensor([[9.0] * 3, [2, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 2]])
    assert quantizer(torch.ones(1, 3))[1].tolist() == [1]
    assert quantizer(torch.tensor([[0.0, 1, 1]]))[1].tolist() == [2]


def test_near_codes_far_from_the_origin_are_told_apart():
    """|z|^2 - 2 z e + |e|^2 would be rounded to 1/16 in float32 here, and the distances are about 1e-4."""
    quantizer = make(2, 1)
    quantizer.codebook[:] = torch.tensor([[1000.02], [1000.01]])
    assert quantizer(torch.tensor([[1000.0], [1000.03]]))[1].tolist() == [1, 0]


def test_chunks_give_the_same(monkeypatch):
    quantizer, z = make(37, 5), torch.randn(2, 50, 5)
    whole = quantizer(z)[1]
    monkeypatch.setattr(vq, "DISTANCES", 37 * 7)
    assert torch.equal(quantizer(z)[1], whole)
    assert quantizer(z[:, :0])[1].shape == (2, 0)


def test_float32_under_autocast():
    quantizer, z = make(64, 16), torch.randn(100, 16)
    expected, indices, _ = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        quantised, same, latents = quantizer(z)
    assert quantised.dtype == latents.dtype == torch.float32
    assert torch.equal(quantised, expected)
    assert torch.equal(same, indices)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_near_ties_are_decided_exactly(precision):
    """Many pairs of codes that a product cannot tell apart, some of them equal, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(50, 24, generator=generator).repeat(4, 1) + 100
    codebook[100:150] += 1e-4 * torch.randn(50, 24, generator=generator)
    codebook[150:] += 1e-5 * torch.randn(50, 24, generator=generator)
    rows = codebook[torch.randint(200, (400,), generator=generator)]
    rows = rows + 0.3 * torch.randn(400, 24, generator=generator)
    expected = brute_force(rows, codebook)
    assert len(expected.unique()) > 100
    torch.set_float32_matmul_precision(precision)
    try:
        found = nearest(rows, codebook, exact=True)
        rough = nearest(rows, codebook, exact=False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)
    assert (rough != expected).any()  # or the case would show nothing
    own, best = ((rows.double() - codebook[x].double()).norm(dim=1) for x in (rough, expected))
    torch.testing.assert_close(own, best, rtol=1e-5 if precision == "highest" else 0.1, atol=0)


def test_a_row_that_is_not_finite_gets_some_index():
    rows = torch.tensor([[float("nan"), 0], [1, 1], [float("inf"), 0]])
    for exact in (True, False):
        found = nearest(rows, torch.tensor([[0.0, 0], [1, 1]]), exact=exact)
        assert found[1] == 1
        assert 0 <= found.min() <= found.max() < 2


def test_gradients_are_those_of_the_identity():
    quantizer, z = make(16, 6).train(), torch.randn(2, 9, 6, requires_grad=True)
    quantised, indices, _ = quantizer(z)
    assert torch.equal(quantised, quantizer.codebook[indices.long()])
    upstream = torch.randn(2, 9, 6)
    quantised.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert quantizer.codebook.grad is None


def test_commitment_is_the_paper_s():
    quantizer, z = make(16, 6).train(), torch.randn(2, 9, 6, requires_grad=True)
    _, indices, same = quantizer(z)
    loss = quantizer.commitment(same, indices)
    difference = z.detach() - quantizer.codebook[indices.long()]
    torch.testing.assert_close(loss.detach(), difference.square().sum() / difference.numel())
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * difference / difference.numel())


@pytest.mark.parametrize("training", [False, True])
def test_stages_quantise_what_is_left(training):
    quantizer = make(37, 6, stages=3).train(training)
    quantizer.codebook *= torch.tensor([1, 0.5, 0.25])[:, None, None]
    z = torch.randn(2, 11, 6, requires_grad=True)
    quantised, indices, _ = quantizer(z)
    assert (indices.shape, indices.dtype) == ((2, 11, 3), torch.int32)
    rest, total, squares = z.detach(), 0, []
    for stage, book in enumerate(quantizer.codebook):
        chosen = brute_force(rest.flatten(0, 1), book).view(2, 11)
        assert torch.equal(indices[..., stage].long(), chosen)
        total, rest = total + book[chosen], rest - book[chosen]
        squares.append(rest.square().mean())
        part, few, _ = quantizer(z, stages=stage + 1)
        assert torch.equal(few, indices[..., : stage + 1])
        assert torch.equal(part, total)
        assert torch.equal(quantizer.embed(few), total)
    assert torch.equal(quantised, total)
    assert len(indices.unique()) > 20
    torch.testing.assert_close(quantizer.commitment(z.detach(), indices), sum(squares) / 3)
    quantizer.commitment(z, indices[..., :1]).backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - quantizer.embed(indices[..., :1])) / z.numel())


def test_one_stage_is_the_plain_quantiser():
    plain, first, z = make(37, 6), make(37, 6, stages=2), torch.randn(50, 6)
    first.codebook[0] = plain.codebook
    quantised, indices, _ = plain(z)
    part, few, _ = first(z, stages=1)
    assert torch.equal(part, quantised)
    assert torch.equal(few.squeeze(-1), indices)


def test_no_noise():
    with pytest.raises(ScaMoError, match="noise in place of the rounding is for FSQ"):
        make(4, 3)(torch.zeros(1, 3), torch.zeros(1, 3))


def test_the_tokenizer_encodes_and_decodes():
    torch.manual_seed(0)
    model = VQAutoencoder(CONFIG, torch.randn(263), torch.full((263,), 2.0)).eval()
    x = 2 * torch.randn(2, 23, 263) + model.mean
    indices = model.encode(x)
    assert (indices.shape, model.codes, model.downsampling) == ((2, 5), 37, 4)
    z = model.encoder(model.normalize(x[:, :20]))
    assert torch.equal(indices, torch.cdist(z, model.quantizer.codebook).argmin(-1).int())
    made = model.decode(indices)
    expected = model.decoder(model.quantizer.codebook[indices.long()]) * 2 + model.mean
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(model(model.normalize(x)).features * 2 + model.mean, made)
    with pytest.raises(ScaMoError, match="tokens from 37 to 37: this tokenizer has codes 0 to 36"):
        model.decode(torch.tensor([[37]]))


def test_save_and_load_are_bitwise(tmp_path):
    model = VQAutoencoder(CONFIG)
    model.save(tmp_path / "tok", provenance={"seed": 0})
    for again in (load_tokenizer(tmp_path / "tok"), VQAutoencoder.load(tmp_path / "tok")):
        assert type(again) is VQAutoencoder
        assert (again.config, again.training) == (model.config, False)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    description = json.loads((tmp_path / "tok/config.json").read_text())
    assert description["format"] == "scamo-vq-tokenizer"
    assert description["provenance"] == {"seed": 0}


def test_one_kind_is_not_opened_as_the_other(tmp_path):
    VQAutoencoder(CONFIG).save(tmp_path / "vq")
    with pytest.raises(ScaMoError, match="format 'scamo-vq-tokenizer', expected 'scamo-fsq-tokenizer'"):
        FSQAutoencoder.load(tmp_path / "vq")
    (tmp_path / "vq/manifest.json").unlink()
    path = tmp_path / "vq/config.json"
    path.write_text(path.read_text().replace("scamo-vq-tokenizer", "scamo-fsq-tokenizer"))
    with pytest.raises(ScaMoError, match=r"config.json: tokenizer: quantizer 'vq', expected 'fsq'"):
        load_tokenizer(tmp_path / "vq")
    with pytest.raises(ScaMoError, match="FSQAutoencoder: quantizer 'vq', expected 'fsq'"):
        FSQAutoencoder(CONFIG)
    with pytest.raises(ScaMoError, match="VQAutoencoder: quantizer 'fsq', expected 'vq'"):
        VQAutoencoder(TokenizerConfig())


def test_a_tokenizer_saved_before_there_was_a_choice_opens(tmp_path):
    model = FSQAutoencoder(TokenizerConfig(codebook_size=256, width=8, latent_width=6, depth=1))
    model.save(tmp_path / "tok")
    (tmp_path / "tok/manifest.json").unlink()
    path = tmp_path / "tok/config.json"
    description = json.loads(path.read_text())
    del description["tokenizer"]["quantizer"]
    path.write_text(json.dumps(description))
    assert load_tokenizer(tmp_path / "tok").config == model.config


def test_config():
    assert CONFIG.codes == 37
    assert from_dict(TokenizerConfig, to_dict(CONFIG)) == CONFIG
    assert from_dict(TokenizerConfig, {"codebook_size": 512}).quantizer == "fsq"
    for values, message in (
        ({"quantizer": "rvq"}, "quantizer = 'rvq': expected fsq or vq"),
        ({"quantizer": "vq", "codebook_size": 0}, "codebook_size = 0: expected a value above 0"),
        ({"quantizer": "vq", "levels": [8, 5]}, "levels: quantizer = 'vq' has none"),
        ({"quantizer": "vq", "groups": 2}, "groups = 2: quantizer = 'vq' has none, only 'fsq' has"),
        ({"groups": 2, "residual": 3}, "groups = 2 and residual = 3: one of the two"),
        ({"residual": 0}, "residual = 0: expected a value above 0"),
        ({"levels": [5, 2], "residual": 2}, r"residual = 2 with levels \[5, 2\]: expected 3 levels or more"),
        ({"levels": [9, 9], "residual": 10}, r"residual = 10 .* at most 2\^24"),
    ):
        with pytest.raises(ScaMoError, match=message):
            from_dict(TokenizerConfig, values)
    with pytest.raises(ScaMoError, match="quantizer = 'vq' has no FSQ levels"):
        _ = CONFIG.fsq_levels
