"""Every peer computes the same attention: outputs and gradients against the float32 reference."""

from __future__ import annotations

import peers
import pytest
import torch
from peers import ATTENTION_PEERS, WAYS, Case

# One sample is all text, one has none, one is a single row; lengths around FlexAttention's blocks.
ODD = Case("odd", (17, 1, 33, 20), (17, 0, 5, 9), 2, 100)
BLOCKS = Case("blocks", (130, 64, 1, 300, 17, 200), (77, 0, 1, 300, 5, 128), 2, 32)
ON_A_CPU = ["torch", "sdpa-padded", "sdpa-flash", "sdpa-math", "sdpa-per-sample", "reference"]


def check(peer, problem, way, limit):
    results = peer.unpack(peer.function(way)())
    expected = problem.expected(way)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        assert (result.float() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("case", [ODD, BLOCKS], ids=str)
def test_peers_match_the_reference(case, name, way):
    problem = peers.Problem(case, torch.float32, "cpu")
    peer = peers.attention_peer(name, problem, way)
    with peer.context():
        check(peer, problem, way, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTION_PEERS)
@pytest.mark.parametrize("case", [ODD, BLOCKS], ids=str)
def test_peers_match_the_reference_on_a_gpu(case, name):
    problem = peers.Problem(case, torch.bfloat16, "cuda")
    try:
        peer = peers.attention_peer(name, problem)
    except peers.Unavailable as error:
        pytest.skip(f"{name}: {error}")
    for way in WAYS:
        with peer.context():
            check(peer, problem, way, 4 * 2**-7)


@pytest.mark.parametrize("name", sorted(set(ATTENTION_PEERS) - set(ON_A_CPU)))
def test_a_peer_that_cannot_run_says_why(name):
    problem = peers.Problem(ODD, torch.float32, "cpu")
    with pytest.raises(peers.Unavailable, match="CUDA"):
        peers.attention_peer(name, problem)


def test_a_peer_that_refuses_the_input_says_why(monkeypatch):
    def refuse(problem):
        def forward():
            raise RuntimeError("head_dim must be a multiple of 8\nmore")

        return peers.Peer(forward, problem.inputs, problem.cotangent)

    monkeypatch.setitem(ATTENTION_PEERS, "sdpa-math", refuse)
    with pytest.raises(peers.Unavailable, match=r"^head_dim must be a multiple of 8$"):
        peers.attention_peer("sdpa-math", peers.Problem(ODD, torch.float32, "cpu"))


def test_wrong_arguments_are_named():
    problem = peers.Problem(ODD, torch.float32, "cpu")
    with pytest.raises(ValueError, match="peer = 'abacus'"):
        peers.attention_peer("abacus", problem)
    with pytest.raises(ValueError, match="way = 'sideways'"):
        peers.attention_peer("reference", problem).function("sideways")
    with pytest.raises(ValueError, match="a sample of 3 rows with a prefix of 4"):
        Case("wrong", (3,), (4,), 1, 64)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_flex_block_mask(packed):
    """Equal to what create_block_mask finds by evaluating every entry, and the mask is the reference's."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem = peers.Problem(BLOCKS, torch.float32, "cpu")
    mask = peers.flex_block_mask(problem, packed)
    rows = sum(BLOCKS.lengths) if packed else problem.longest
    wanted = create_block_mask(
        mask.mask_mod, None if packed else len(BLOCKS.lengths), None, rows, rows, device="cpu"
    )
    assert mask.shape == wanted.shape
    for side in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(getattr(mask, f"{side}_{part}"), getattr(wanted, f"{side}_{part}")), side
    assert mask.full_kv_num_blocks.sum() > 0
    if packed:
        q, k, v = (x.detach().transpose(0, 1)[None] for x in problem.inputs)
        out = flex_attention(q, k, v, block_mask=mask)[0].transpose(0, 1)
    else:
        q, k, v = (problem.pad(x) for x in problem.inputs)
        out = problem.unpad(flex_attention(q, k, v, block_mask=mask))
    assert (out - problem.expected("forward")[0]).abs().max() < 1e-5


def test_minimum_bytes():
    problem = peers.Problem(ODD, torch.bfloat16, "cpu")
    tensor = 71 * 2 * 100 * 2
    assert [problem.minimum_bytes(way) for way in WAYS] == [4 * tensor, 8 * tensor, 12 * tensor]


def test_vector_quantize_pytorch_matches_the_reference():
    pytest.importorskip("vector_quantize_pytorch")
    from scamo_kernels import reference

    levels = [8, 8, 8, 5, 5, 5]
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    bounded = reference.fsq_bound(z, levels)
    z = torch.where((bounded - bounded.floor() - 0.5).abs() > 1e-4, z, 0.0)
    codes, indices = peers.vq_fsq(levels)(z)
    expected, wanted = reference.fsq_quantize(z, levels)
    assert torch.allclose(codes, expected, atol=1e-6)
    assert torch.equal(indices.int(), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Liger runs here")
@pytest.mark.parametrize(
    ("peer", "arguments"),
    [
        (peers.liger_rms_norm, [1e-5]),
        (peers.liger_add_rms_norm, [1e-5]),
        (peers.liger_swiglu, []),
        (peers.liger_linear_cross_entropy, []),
    ],
)
def test_liger_says_why_it_cannot_run(peer, arguments):
    with pytest.raises(peers.Unavailable, match="liger-kernel (is not installed|needs a CUDA device)"):
        peer(*arguments)


def test_the_ways_of_an_op_that_has_more_than_one_output():
    x = torch.arange(3.0).requires_grad_()
    grads = [torch.ones(3)]

    def op(x):
        return x * x, torch.tensor([7])

    forward, backward, both = (peers.directed(way, op, [x], grads) for way in WAYS)
    square, slope = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 2.0, 4.0])
    for function, expected in (
        (forward, [square, torch.tensor([7])]),
        (backward, [slope]),
        (backward, [slope]),
        (both, [square, torch.tensor([7]), slope]),
    ):
        results = function()
        assert len(results) == len(expected)
        assert all(map(torch.equal, results, expected))
        assert not any(result.requires_grad for result in results)
    assert [peers.moved_bytes(way, 3, 5) for way in WAYS] == [3, 5, 8]
