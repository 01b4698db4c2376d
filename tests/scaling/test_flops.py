"""Counts against the model itself, the mask itself, and the numbers that the paper plots."""

import math

import pytest
import torch
from scamo_kernels import reference

from scamo.config import MODEL_SIZES, ModelConfig
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling import flops
from scamo.scaling.paper import POINTS


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_parameters_are_those_of_the_model(size):
    config = ModelConfig(size=size, codes=64000, text_width=2048)
    with torch.device("meta"):
        model = PrefixLM(config)
    assert flops.parameters(config) == sum(p.numel() for p in model.parameters())
    assert flops.block_parameters(config) == model.block_parameters()


def test_attended_pairs_are_the_true_entries_of_the_mask():
    lengths, prefixes = [7, 1, 0, 12], [3, 1, 0, 0]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = reference.prefix_bounds(cu, torch.tensor(prefixes).int())
    assert flops.attended_pairs(lengths, prefixes) == int(bounds.sum())


def test_training_flops_are_those_of_forward_and_backward_counted_by_torch():
    """FlopCounterMode on the model, plain products only; its attention is counted from the mask."""
    from torch.utils.flop_counter import FlopCounterMode

    from scamo.data.batches import Sample, collate

    config = ModelConfig(
        size="", layers=3, heads=2, width=32, codes=40, text_width=8, max_text=9, max_motion=9
    )
    rng = torch.Generator().manual_seed(0)
    samples = [
        Sample(torch.randn(p, 8, generator=rng).numpy(), torch.randint(40, (m,), generator=rng).numpy())
        for p, m in ((4, 6), (9, 3))
    ]
    batch = collate(samples, 40)
    model = PrefixLM(config)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model.logits(batch), batch.targets.long()).backward()
    counted = counter.get_total_flops()
    norms = (2 * config.layers + 1) * config.width
    ours = flops.training_flops(config, positions=batch.n_positions, scored=batch.n_scored, pairs=0)
    ours -= 6 * norms * batch.n_positions  # products only
    text = 4 * 8 * config.width * 13  # no gradient goes to the text states
    # The last block computes its outputs on the scored rows only, which the convention does not take off.
    saved = 6 * (config.width**2 + 3 * config.width * config.hidden) * (batch.n_positions - batch.n_scored)
    assert counted == ours + text - saved


@pytest.mark.parametrize(("size", "log_c", "codes", "tokens"), POINTS)
def test_the_paper_s_convention_gives_its_plotted_flops(size, log_c, codes, tokens):
    config = ModelConfig(size=size, codes=codes, text_width=2048)
    assert math.log10(flops.paper_flops(config, tokens)) == pytest.approx(log_c, abs=2e-3)


def test_peaks_are_found_by_name():
    assert flops.stated_peak("NVIDIA H100 PCIe") == 756e12
    assert flops.stated_peak("NVIDIA H200 (cuda:0)") == 989e12
    assert flops.stated_peak("this CPU (AMD EPYC)") == 0
