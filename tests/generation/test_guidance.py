"""Training without text now and then, which guidance needs."""

import numpy as np
import pytest

from scamo.config import ModelConfig, TrainingConfig
from scamo.data.batches import BatchPlan, null_text
from scamo.errors import ScaMoError


def make_plan(n=500, **options):
    rng = np.random.default_rng(0)
    return BatchPlan(
        np.arange(n), rng.integers(1, 50, n), np.arange(n), np.ones(n, int), rng.integers(3, 30, n),
        seed=3, micro_batch_tokens=2000, micro_batches=2, **options,
    )  # fmt: skip


def draws(plan, steps=30):
    return [draw for step in range(steps) for micro in plan.step(step) for draw in micro]


def test_lost_texts_leave_order_captions_and_tokens_as_they_are():
    """Item by item: batches hold more samples where texts are shorter."""
    whole, dropped = draws(make_plan()), draws(make_plan(drop_text=0.25))
    count = min(len(whole), len(dropped))
    lost = 0
    for before, after in zip(whole[:count], dropped[:count], strict=True):
        assert (after.item, after.drop) == (before.item, before.drop)
        assert after.caption in (before.caption, -1)
        lost += after.caption == -1
    assert lost / count == pytest.approx(0.25, abs=0.03)
    assert draws(make_plan(drop_text=0.25)) == dropped
    epochs = [{d.item for d in dropped[e * 500 : (e + 1) * 500] if d.caption == -1} for e in range(2)]
    assert epochs[0] != epochs[1], "other texts in the next epoch"


def test_a_lost_text_takes_one_position():
    plan = make_plan(drop_text=1.0)
    motion = np.random.default_rng(0).integers(1, 50, 500)
    for step in range(5):
        draw = [d for micro in plan.step(step) for d in micro]
        assert all(d.caption == -1 for d in draw)
        assert plan.positions(step) == sum(1 + motion[d.item] - (d.drop > 0) for d in draw)
    assert null_text(7).shape == (1, 7)
    assert not null_text(7).any()


def test_a_share_that_is_none_is_named():
    with pytest.raises(ScaMoError, match=r"drop_text = 1\.5"):
        TrainingConfig(drop_text=1.5)
    with pytest.raises(ScaMoError, match=r"drop_text = -1"):
        make_plan(drop_text=-1)
    assert not ModelConfig().null_text
