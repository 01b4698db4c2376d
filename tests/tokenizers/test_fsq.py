"""Grouped and residual FSQ between their projections against the plain quantiser."""

import pytest
import torch
from scamo_kernels import fsq_quantize

from scamo.errors import ScaMoError
from scamo.tokenizers.fsq import FSQ

LEVELS = (7, 5)


def make(seed=0, **options):
    torch.manual_seed(seed)
    quantizer = FSQ(LEVELS, 12, **options)
    with torch.no_grad():
        quantizer.project_in.weight.mul_(3)
    return quantizer


def test_a_group_is_a_quantiser_of_its_own_channels():
    quantizer, latents = make(groups=3), torch.randn(4, 9, 12)
    quantised, indices, z = quantizer(latents)
    assert (z.shape, indices.shape) == ((4, 9, 6), (4, 9, 3))
    codes = []
    for group in range(3):
        own, index = fsq_quantize(z[..., 2 * group : 2 * group + 2], LEVELS)
        assert torch.equal(indices[..., group], index)
        codes.append(own)
    assert torch.equal(quantised, quantizer.project_out(torch.cat(codes, -1)))
    assert torch.equal(quantizer.embed(indices), quantised)
    assert len(indices.unique()) > 15


def test_noise_of_every_group():
    quantizer, latents = make(groups=2), torch.randn(4, 9, 12)
    codes, indices, _ = quantizer(latents, torch.zeros(4, 9, 4))
    assert torch.equal(indices, quantizer(latents)[1])
    one = make()
    one.load_state_dict(
        {
            "project_in.weight": quantizer.project_in.weight[2:],
            "project_in.bias": quantizer.project_in.bias[2:],
            "project_out.weight": quantizer.project_out.weight[:, 2:],
            "project_out.bias": torch.zeros(12),
        }
    )
    first = codes - one(latents, torch.zeros(4, 9, 2))[0]
    quantizer.project_out.weight.data[:, 2:] = 0
    torch.testing.assert_close(first, quantizer(latents, torch.zeros(4, 9, 4))[0])


def test_stages_come_nearer():
    quantizer, latents = make(residual=3), 0.1 * torch.randn(4, 9, 12)
    quantised, indices, z = quantizer(latents)
    assert (z.shape, indices.shape) == ((4, 9, 2), (4, 9, 3))
    assert torch.equal(quantizer.embed(indices), quantised)
    whole = quantizer.project_out(z)
    errors = []
    for stages in (1, 2, 3):
        part, few, _ = quantizer(latents, stages=stages)
        assert torch.equal(few, indices[..., :stages])
        assert torch.equal(part, quantizer.embed(few))
        errors.append((part - whole).norm().item())
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_one_of_either_is_the_plain_quantiser():
    latents = torch.randn(4, 9, 12)
    plain = make()(latents)
    for same in (make(groups=1)(latents), make(residual=1)(latents)):
        for a, b in zip(plain, same, strict=True):
            assert torch.equal(a, b)
    codes, indices, _ = make(residual=2)(latents, stages=1)
    assert torch.equal(codes, plain[0])
    assert torch.equal(indices.squeeze(-1), plain[1])


def test_no_noise_with_stages():
    with pytest.raises(ScaMoError, match="noise in place of the rounding is for FSQ without residual stages"):
        make(residual=2)(torch.zeros(1, 12), torch.zeros(1, 2))
