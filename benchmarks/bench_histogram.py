"""Code counts against torch.bincount and the one-hot matrix that the field's code builds."""

from __future__ import annotations

import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference


@pytest.mark.parametrize(("tokens", "codebook_size"), [(4096, 64000), (65536, 64000), (65536, 240)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("impl", ["torch", "triton", "bincount", "one-hot"])
def test_code_histogram(measure, impl, device, tokens, codebook_size):
    if device == "cpu" and impl == "triton":
        pytest.skip("on a CPU: the torch implementation and the peers")
    if impl == "one-hot" and tokens * codebook_size > 1 << 27:
        pytest.skip(f"the one-hot matrix would take {tokens * codebook_size * 8 / 1e9:.0f} GB")
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, codebook_size, (tokens,), generator=generator).int().to(device)
    expected = (reference.code_histogram(indices, codebook_size),)

    def function():
        if impl == "one-hot":
            return (F.one_hot(indices.long(), codebook_size).sum(0),)
        if impl == "bincount":
            return (torch.bincount(indices, minlength=codebook_size),)
        return (scamo_kernels.code_histogram(indices, codebook_size, impl=impl),)

    group = f"code_histogram-N{tokens}-K{codebook_size}-{device}"
    moved = tokens * 4 + codebook_size * 8
    measure(group, impl, function, expected, torch.float32, moved)
