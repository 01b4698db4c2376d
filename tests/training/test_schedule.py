import itertools
import math

import pytest

from scamo.config import TrainingConfig
from scamo.training.schedule import learning_rate


def test_closed_form_at_the_corners():
    config = TrainingConfig(steps=110, learning_rate=2e-3, min_learning_rate=1e-4, warmup_ratio=10 / 110)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([2e-4 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx((2e-3 + 1e-4) / 2)  # half of the cosine
    assert rates[35] == pytest.approx(
        1e-4 + 1.9e-3 * math.cos(math.pi / 8) ** 2
    )  # (1 + cos x) / 2 = cos^2(x / 2)
    assert rates[110] == 1e-4
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_no_warmup_starts_at_the_base_rate_and_the_end_is_the_minimum():
    config = TrainingConfig(steps=3, learning_rate=1.0, warmup_ratio=0.0)
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([1.0, 0.75, 0.25, 0.0, 0.0])


def test_a_run_that_is_all_warmup_never_divides_by_zero():
    config = TrainingConfig(steps=4, learning_rate=1.0, warmup_ratio=1.0)
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.0])
