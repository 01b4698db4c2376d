"""Code counts against torch.bincount and the one-hot matrix that the field's code builds."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from scamo_kernels import reference
from torch import Tensor

PLACES = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cuda", False, marks=pytest.mark.gpu, id="cuda"),
    pytest.param("cuda", True, marks=pytest.mark.gpu, id="cuda-graph"),
]


def counter(impl: str, codebook_size: int) -> Callable[[Tensor], Tensor]:
    """indices (N,) -> counts (codebook_size,)."""
    if impl == "one-hot":
        return lambda indices: F.one_hot(indices.long(), codebook_size).sum(0)
    if impl == "bincount":
        return lambda indices: torch.bincount(indices, minlength=codebook_size)
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(lambda indices: reference.code_histogram(indices, codebook_size))
    return lambda indices: scamo_kernels.code_histogram(indices, codebook_size, impl=impl)


@pytest.mark.parametrize(("tokens", "codebook_size"), [(4096, 64000), (65536, 64000), (65536, 240)])
@pytest.mark.parametrize(("device", "graph"), PLACES)
@pytest.mark.parametrize("impl", ["torch", "triton", "bincount", "compiled", "one-hot"])
def test_code_histogram(measure, card, impl, device, graph, tokens, codebook_size):
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation and the peers")
    if impl == "one-hot" and tokens * codebook_size > 1 << 27:
        pytest.skip(f"the one-hot matrix would take {tokens * codebook_size * 8 / 1e9:.0f} GB")
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, codebook_size, (tokens,), generator=generator).int().to(device)
    expected = (reference.code_histogram(indices, codebook_size),)
    count = counter(impl, codebook_size)
    floor = None
    if card is not None and device == "cuda":
        floor = floors.histogram(tokens, codebook_size, card)
    group = f"code_histogram-N{tokens}-K{codebook_size}-{device}"
    name = f"{impl}, graph" if graph else impl
    moved = tokens * 4 + codebook_size * 8
    measure(group, name, lambda: (count(indices),), expected, torch.float32, moved, floor=floor, graph=graph)
