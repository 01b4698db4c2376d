"""Prefix-causal attention against every peer on the same packed samples: forward, backward and both.

On CUDA each runs with eager dispatch and as a CUDA graph. A peer that cannot run, or that does not match the
float32 reference, is not timed, and the reason is printed.
"""

from __future__ import annotations

import functools
import random

import floors
import peers
import pytest
import torch
from peers import ATTENTION_PEERS, WAYS, Case


def _even(length: int, prefix: int, heads: int, head_dim: int, samples: int = 128) -> Case:
    return Case(f"even-P{prefix}", (length,) * samples, (prefix,) * samples, heads, head_dim)


def _ragged(samples: int, heads: int, head_dim: int) -> Case:
    """Samples as HumanML3D has them: 10-60 word pieces, 10-51 motion tokens."""
    draw = random.Random(1)
    prefixes = tuple(draw.randint(10, 60) for _ in range(samples))
    return Case("ragged", tuple(p + draw.randint(10, 51) for p in prefixes), prefixes, heads, head_dim)


HOST_LENGTHS = ("torch", "reference")
CPU_CASES = [_ragged(32, 4, 64), _ragged(16, 4, 100)]
GPU_CASES = [
    _even(126, 77, 16, 64),
    _even(178, 128, 16, 64),
    _even(201, 150, 16, 64),
    _even(328, 128, 16, 64),
    _even(178, 128, 32, 100),
    _even(201, 150, 32, 100),
    _even(328, 128, 32, 100),
    _ragged(128, 16, 64),
    _ragged(128, 32, 100),
    _even(1024, 128, 16, 64, samples=16),
    _even(2048, 128, 16, 64, samples=8),
]


@functools.lru_cache(maxsize=1)
def _problem(case: Case, dtype: torch.dtype, device: str) -> peers.Problem:
    return peers.Problem(case, dtype, device)


@functools.lru_cache(maxsize=1)
def _peer(name: str, case: Case, dtype: torch.dtype, device: str, backward: bool) -> peers.Peer | str:
    """The peer, or why it cannot run; kept for the tests that follow, since some compile."""
    try:
        way = floors.BOTH if backward else floors.FORWARD
        return peers.attention_peer(name, _problem(case, dtype, device), way)
    except peers.Unavailable as error:
        return str(error)


def _measure(measure, card, name, case, dtype, device, way, graph) -> None:
    if graph and name in HOST_LENGTHS:
        pytest.skip(f"{name} reads lengths on the host: it cannot be captured in a CUDA graph")
    problem = _problem(case, dtype, device)
    peer = _peer(name, case, dtype, device, way != floors.FORWARD)
    if isinstance(peer, str):
        pytest.skip(f"{name}: {peer}")
    floor = None
    if card is not None and device == "cuda":
        floor = floors.attention(
            case.lengths, case.prefixes, case.heads, case.head_dim, card, way=way, tile=(64, 64)
        )
    dispatch = " graph" if graph else ""
    measure(
        f"attention_peers {case} {str(dtype)[6:]} {way}{dispatch}",
        name,
        peer.function(way),
        problem.expected(way),
        dtype,
        problem.minimum_bytes(way),
        floor=floor,
        unpack=peer.unpack,
        graph=graph,
        context=peer.context,
    )


# The way varies fastest and the case slowest, so that one peer serves several tests and one case's peers run
# close together.
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTENTION_PEERS)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_peers_on_the_cpu(measure, card, case, name, way):
    _measure(measure, card, name, case, torch.float32, "cpu", way, False)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTENTION_PEERS)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_peers_on_a_gpu(measure, card, case, name, way, graph):
    _measure(measure, card, name, case, torch.bfloat16, "cuda", way, graph)
