"""What the optimizer is given."""

import torch

from scamo.config import ModelConfig
from scamo.models.prefix_lm import PrefixLM
from scamo.training.engine import parameter_groups

CONFIG = ModelConfig(size="", layers=2, heads=2, width=16, codes=9, text_width=6)


def test_norms_biases_and_the_embedding_do_not_decay():
    model = PrefixLM(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    expected = {"embedding.weight", "text_projection.bias", "norm.weight"}
    expected |= {f"blocks.{i}.norm_{k}.weight" for i in range(2) for k in (1, 2)}
    assert {names[id(p)] for p in free["params"]} == expected
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - expected


def test_an_empty_group_is_left_out():
    (group,) = parameter_groups(torch.nn.Linear(3, 3, bias=False), 0.1)
    assert len(group["params"]) == 1
