"""A small model that generation's tests share."""

import pytest
import torch

from scamo.models.prefix_lm import PrefixLM


@pytest.fixture(scope="session")
def make_model():
    """make_model(config): weights drawn from seed 0, moved a little so that no norm is all ones."""

    def make(config):
        torch.manual_seed(0)
        model = PrefixLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make
