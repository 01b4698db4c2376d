"""Packing against a slow reference, and the order of the data."""

import concurrent.futures
import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig, TrainingConfig
from scamo.data.batches import BatchPlan, PackedLoader, Sample, collate, validation_batches
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset, write_text_states, write_tokens
from scamo.errors import ScaMoError

EOS = 97


def make_sample(rng, text, motion, width=6, item=0, caption=0):
    return Sample(
        rng.standard_normal((text, width)).astype(np.float16),
        rng.integers(0, EOS, motion).astype(np.int32),
        item,
        caption,
    )


def slow_reference(samples):
    """Position by position: what each row holds, and what it predicts."""
    rows, scored = [], []
    for sample in samples:
        text, motion = len(sample.text), len(sample.motion)
        for position in range(text + motion):
            content = sample.text[position] if position < text else int(sample.motion[position - text])
            rows.append((position, content))
            following = position - (text - 1)
            if following >= 0:
                target = int(sample.motion[following]) if following < motion else EOS
                scored.append((len(rows) - 1, target))
    return rows, scored


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(5, 3)], [(1, 7), (4, 1), (9, 2)], [(2, 2)] * 5],
    ids=lambda s: "-".join(map(str, s)),
)
def test_collate_equals_the_slow_reference(shapes):
    rng = np.random.default_rng(len(shapes))
    samples = [make_sample(rng, p, m, item=i, caption=10 + i) for i, (p, m) in enumerate(shapes)]
    batch = collate(samples, EOS)
    rows, scored = slow_reference(samples)

    assert batch.n_positions == len(rows)
    assert list(zip(batch.scored_rows.tolist(), batch.targets.tolist(), strict=True)) == scored
    assert batch.n_scored == len(scored) == sum(m for _, m in shapes) + len(shapes)
    assert sorted(batch.text_rows.tolist() + batch.motion_rows.tolist()) == list(range(len(rows)))
    for row, state in zip(batch.text_rows.tolist(), batch.text_states, strict=True):
        np.testing.assert_array_equal(state.numpy(), rows[row][1].astype(np.float32))
    for row, token in zip(batch.motion_rows.tolist(), batch.motion_tokens.tolist(), strict=True):
        assert token == rows[row][1]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([p + m for p, m in shapes])]
    assert batch.prefix_lengths.tolist() == [p for p, _ in shapes]
    assert batch.max_seqlen == max(p + m for p, m in shapes)
    assert batch.item_ids.tolist() == list(range(len(shapes)))
    assert batch.caption_ids.tolist() == [10 + i for i in range(len(shapes))]


def test_collate_dtypes_and_device():
    batch = collate([make_sample(np.random.default_rng(0), 3, 4)], EOS)
    for name in ("cu_seqlens", "prefix_lengths"):
        assert getattr(batch, name).dtype == torch.int32, name
    for name in ("motion_tokens", "text_rows", "motion_rows", "scored_rows", "targets", "item_ids"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.text_states.dtype == torch.float32
    moved = batch.to("meta")
    assert moved.targets.device.type == "meta"
    assert moved.max_seqlen == batch.max_seqlen
    assert batch.targets.device.type == "cpu"


def test_collate_refuses_what_cannot_be_packed():
    rng = np.random.default_rng(0)
    good = make_sample(rng, 2, 2)
    with pytest.raises(ScaMoError, match="no samples"):
        collate([], EOS)
    with pytest.raises(ScaMoError, match=r"sample 1 \(item 4, caption 9\): text states of shape \(0, 6\)"):
        collate([good, make_sample(rng, 0, 2, item=4, caption=9)], EOS)
    with pytest.raises(ScaMoError, match=r"sample 1 .*expected \(P >= 1, 6\)"):
        collate([good, make_sample(rng, 2, 2, width=5)], EOS)
    with pytest.raises(ScaMoError, match=r"sample 0 .*motion tokens of shape \(0,\)"):
        collate([make_sample(rng, 2, 0)], EOS)
    with pytest.raises(ScaMoError, match=rf"motion token {EOS} is outside \[0, {EOS}\)"):
        collate([Sample(good.text, np.array([0, EOS]))], EOS)
    with pytest.raises(ScaMoError, match=r"motion token -1 is outside"):
        collate([Sample(good.text, np.array([-1, 3]))], EOS)


# -- the plan ------------------------------------------------------------------------------------------------


def make_plan(*, n=57, seed=0, budget=120, micro_batches=3, data_seed=0, **options):
    rng = np.random.default_rng(data_seed)
    counts = rng.integers(1, 4, n)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    text = rng.integers(3, 30, counts.sum())
    motion = rng.integers(1, 50, n)
    plan = BatchPlan(
        np.arange(100, 100 + n), motion, first, counts, text, seed=seed, micro_batch_tokens=budget,
        micro_batches=micro_batches, **options,
    )  # fmt: skip
    return plan, motion, first, counts, text


def stream(plan, steps):
    return [draw for step in range(steps) for micro in plan.step(step) for draw in micro]


def test_plan_is_a_pure_function_of_seed_and_step():
    forwards, backwards, other = make_plan()[0], make_plan()[0], make_plan(seed=1)[0]
    steps = range(40)
    ahead = {step: forwards.step(step) for step in steps}
    assert {step: backwards.step(step) for step in reversed(steps)} == ahead
    assert make_plan()[0].step(23) == ahead[23]  # a resumed run starts anywhere
    assert other.step(0) != ahead[0]


def test_plan_order_is_pinned():
    """Fixed by the first version: another order would silently change what a resumed run sees."""
    plan = make_plan(n=9, budget=160, micro_batches=2)[0]
    assert [[tuple(d) for d in micro] for micro in plan.step(0)] == [
        [(100, 0, 1), (108, 12, 1)],
        [(103, 7, 2), (107, 11, 1), (105, 9, 0), (101, 3, 0)],
    ]


def test_every_epoch_covers_every_item_once():
    plan = make_plan()[0]
    items = [draw.item for draw in stream(plan, 60)]
    n = len(plan.items)
    epochs = len(items) // n
    assert epochs >= 5
    orders = [items[e * n : (e + 1) * n] for e in range(epochs)]
    assert all(sorted(order) == list(range(100, 100 + n)) for order in orders)
    assert len(set(map(tuple, orders))) == epochs
    # epochs() counts what came before the step.
    seen = 0
    for step in range(60):
        assert plan.epochs(step) == pytest.approx(seen / n)
        seen += sum(map(len, plan.step(step)))


def test_micro_batches_are_full_but_never_over_the_budget():
    plan, motion, _, _, text = make_plan()
    flat = [micro for step in range(50) for micro in plan.step(step)]
    lengths = [[text[d.caption] + motion[d.item - 100] - (d.drop > 0) for d in micro] for micro in flat]
    assert all(len(micro) >= 1 and sum(micro) <= 120 for micro in lengths)
    for micro, following in itertools.pairwise(lengths):
        assert sum(micro) + following[0] > 120  # greedy: the next sample did not fit any more


def test_scored_and_positions_are_known_without_reading_tokens():
    plan, motion, _, _, text = make_plan()
    for step in (0, 7, 33):
        draws = [d for micro in plan.step(step) for d in micro]
        tokens = [motion[d.item - 100] - (d.drop > 0) for d in draws]
        assert plan.scored(step) == sum(tokens) + len(draws)
        assert plan.positions(step) == sum(tokens) + sum(text[d.caption] for d in draws)
        fresh = make_plan()[0]
        assert fresh.scored(step) == plan.scored(step)


def test_captions_and_drops_are_drawn_at_random():
    plan, motion, first, counts, _ = make_plan(n=40, micro_batches=10)
    draws = stream(plan, 300)
    items = np.array([d.item - 100 for d in draws])
    captions = np.array([d.caption for d in draws])
    drops = np.array([d.drop for d in draws])
    assert ((captions >= first[items]) & (captions < first[items] + counts[items])).all()
    for item in range(40):
        choices = captions[items == item] - first[item]
        shares = np.bincount(choices, minlength=counts[item]) / len(choices)
        np.testing.assert_allclose(shares, 1 / counts[item], atol=0.12)
    # A third of the samples loses a token, at either end alike; a lone token stays.
    long = motion[items] > 1
    assert (~long).sum() > 100
    assert (drops[~long] == 0).all()
    shares = np.bincount(drops[long], minlength=3) / long.sum()
    np.testing.assert_allclose(shares, [2 / 3, 1 / 6, 1 / 6], atol=0.02)
    always = [d.drop for d in stream(make_plan(drop_token=1.0)[0], 5)]
    never = [d.drop for d in stream(make_plan(drop_token=0.0)[0], 5)]
    assert set(never) == {0}
    assert {1, 2} <= set(always)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 6])
def test_the_stream_does_not_depend_on_the_micro_batches_of_a_step(micro_batches):
    reference = stream(make_plan(micro_batches=6)[0], 10)
    assert stream(make_plan(micro_batches=micro_batches)[0], 60 // micro_batches) == reference


def test_a_budget_beyond_an_epoch_runs_over_several():
    plan, *_ = make_plan(n=4, budget=1000)
    draws = stream(plan, 3)
    assert sorted(d.item for d in draws[:4]) == sorted(d.item for d in draws[4:8]) == [100, 101, 102, 103]
    assert all(len(micro) > 8 for micro in plan.step(0))


def test_text_is_counted_as_truncated():
    plan, motion, _, _, text = make_plan(max_text=10)
    for micro in plan.step(4):
        assert sum(min(text[d.caption], 10) + motion[d.item - 100] - (d.drop > 0) for d in micro) <= 120
    assert plan.positions(4) == sum(
        min(text[d.caption], 10) + motion[d.item - 100] - (d.drop > 0)
        for micro in plan.step(4)
        for d in micro
    )


def plan_of(motion, text, **options):
    n = len(motion)
    arguments = {"seed": 0, "micro_batch_tokens": 100, "micro_batches": 1} | options
    return BatchPlan(
        np.arange(n), np.array(motion), np.arange(n), np.ones(n, int), np.array(text), **arguments
    )


def test_a_sentence_takes_one_position():
    plan, motion, *_ = make_plan(sentence=True, drop_token=0.0)
    longest = {100 + item: 1 + int(m) for item, m in enumerate(motion)}
    draws = stream(plan, 10)
    assert sum(plan.positions(step) for step in range(10)) == sum(longest[draw.item] for draw in draws)
    states = np.arange(12, dtype=np.float16).reshape(4, 3)
    assert plan.text_rows(states).tolist() == [[4.5, 5.5, 6.5]]
    assert make_plan(max_text=3)[0].text_rows(states).tolist() == states[:3].tolist()


def test_items_that_do_not_fit_are_excluded_and_counted_or_named():
    plan = plan_of([0, 5, 51, 50], [4, 4, 4, 4])
    assert plan.items.tolist() == [1, 3]
    assert plan.excluded == {"without tokens": 1, "more than 50 tokens": 1}
    with pytest.raises(
        ScaMoError, match=r"micro_batch_tokens = 40: item 1 \(clip-1\) alone takes 41 positions"
    ):
        plan_of([5, 33], [8, 8], micro_batch_tokens=40, name_of=lambda item: f"clip-{item}")
    with pytest.raises(
        ScaMoError, match="no item to train on: of 2, 1 without tokens, 1 more than 50 tokens"
    ):
        plan_of([0, 99], [4, 4])
    with pytest.raises(ScaMoError, match="seed = -1"):
        plan_of([5], [4], seed=-1)
    with pytest.raises(ScaMoError, match="step = -1: expected 0 or more"):
        plan.step(-1)


def test_threads_that_ask_at_once_get_the_same_plan():
    expected, shared_plan = make_plan()[0], make_plan()[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        steps = [s * 7 % 50 for s in range(50)]
        for step, draws in zip(steps, pool.map(shared_plan.step, steps), strict=True):
            assert draws == expected.step(step)


# -- the loader ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, feature_dim=3) as writer:
        for i in range(60):
            captions = [Caption(f"{i} {k}") for k in range(1 + i % 3)]
            features = rng.normal(size=(8 + 3 * i % 190, 3)).astype(np.float32)
            writer.add_clip(f"c{i}", features, "val" if i % 5 == 4 else "train", captions)
    data = MotionDataset.open(folder)
    tokens = [rng.integers(0, EOS, n // 4) for n in data.item_lengths]
    tokens[2] = tokens[2][:0]
    tokens[9] = tokens[9][:0]
    write_tokens(folder, "t", tokens, codes=EOS, downsampling=4)
    states = [rng.normal(size=(rng.integers(3, 25), 6)).astype(np.float16) for _ in range(data.n_captions)]
    write_text_states(folder, "e", states, encoder="e")
    return data


def of(dataset, **training):
    settings = {"micro_batch_tokens": 200, "micro_batches": 4, "seed": 5} | training
    return BatchPlan.of(
        dataset, "train", dataset.tokens(), dataset.text_states(), ModelConfig(max_text=20),
        TrainingConfig(**settings),
    )  # fmt: skip


def as_lists(batch):
    return {
        field.name: value.tolist() if isinstance(value := getattr(batch, field.name), torch.Tensor) else value
        for field in dataclasses.fields(batch)
    }


def test_loader_packs_what_the_plan_says(dataset):
    plan = of(dataset)
    assert plan.excluded == {"without tokens": 1, "more than 50 tokens": 0}
    loader = PackedLoader(dataset, "train", plan)
    tokens, text = dataset.tokens(), dataset.text_states()
    for step in (0, 3):
        batches = loader.step(step)
        for draws, batch in zip(plan.step(step), batches, strict=True):
            samples = []
            for item, caption, drop in draws:
                motion = tokens[item].tolist()
                motion = {0: motion, 1: motion[1:], 2: motion[:-1]}[drop]
                samples.append(Sample(text[caption][:20], np.array(motion), item, caption))
            assert as_lists(batch) == as_lists(collate(samples, EOS))
            assert batch.n_positions <= 200
            assert [dataset.caption_item(c) for c in batch.caption_ids.tolist()] == batch.item_ids.tolist()
        assert sum(b.n_scored for b in batches) == plan.scored(step)
        assert sum(b.n_positions for b in batches) == plan.positions(step)
    items = {i for step in range(6) for b in loader.step(step) for i in b.item_ids.tolist()}
    assert items == set(dataset.items("train").tolist()) - {2}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_micro_batches(dataset, world):
    whole = PackedLoader(dataset, "train", of(dataset))
    loaders = [PackedLoader(dataset, "train", of(dataset), rank=r, world=world) for r in range(world)]
    for step in range(4):
        parts = [loader.step(step) for loader in loaders]
        woven = [parts[j % world][j // world] for j in range(4)]
        assert [as_lists(b) for b in woven] == [as_lists(b) for b in whole.step(step)]


def test_prefetching_keeps_the_order_and_resumes_anywhere(dataset):
    loader = PackedLoader(dataset, "train", of(dataset))
    expected = [[as_lists(b) for b in loader.step(step)] for step in range(9)]
    fresh = PackedLoader(dataset, "train", of(dataset))
    assert [[as_lists(b) for b in batches] for batches in fresh.steps(0, 9)] == expected
    assert [[as_lists(b) for b in batches] for batches in fresh.steps(4, 9, ahead=1)] == expected[4:]
    flat = list(itertools.islice(fresh, 10))
    assert [as_lists(b) for b, _ in flat] == [b for batches in expected for b in batches][:10]
    assert [scored for _, scored in flat] == [fresh.plan.scored(j // 4) for j in range(10)]


def test_prefetching_ends_its_thread_and_passes_errors_on(dataset, monkeypatch):
    loader = PackedLoader(dataset, "train", of(dataset))
    before = threading.active_count()
    steps = loader.steps()
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before

    packed = loader.step

    def broken(step):
        if step == 2:
            raise ScaMoError("the disk is gone")
        return packed(step)

    monkeypatch.setattr(loader, "step", broken)
    steps = loader.steps()
    next(steps), next(steps)
    with pytest.raises(ScaMoError, match="the disk is gone"):
        next(steps)
    assert threading.active_count() == before


def test_loader_refuses_what_does_not_fit(dataset):
    with pytest.raises(ScaMoError, match="micro_batches = 4 does not divide by the 3 ranks"):
        PackedLoader(dataset, "train", of(dataset), world=3)
    with pytest.raises(ScaMoError, match="items that are not in split val"):
        PackedLoader(dataset, "val", of(dataset))
    bare = plan_of([5], [4])
    with pytest.raises(ScaMoError, match="has no tokens and text states"):
        PackedLoader(dataset, "train", bare)
    with pytest.raises(ScaMoError, match="split test has no items"):
        BatchPlan.of(
            dataset, "test", dataset.tokens(), dataset.text_states(), ModelConfig(), TrainingConfig()
        )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_takes_every_item_once_whole_with_its_first_caption(dataset, world):
    plan = of(dataset, micro_batch_tokens=100)
    parts = [list(validation_batches(dataset, "val", plan, rank=r, world=world)) for r in range(world)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    count = sum(map(len, parts))
    woven = [parts[j % world][j // world] for j in range(count)]
    whole = list(validation_batches(dataset, "val", plan))
    assert len(whole) > 3
    assert [as_lists(b) for b in woven] == [as_lists(b) for b in whole]
    items = [i for b in whole for i in b.item_ids.tolist()]
    assert items == [i for i in dataset.items("val").tolist() if i != 9]
    assert [c for b in whole for c in b.caption_ids.tolist()] == [dataset.captions_of(i)[0] for i in items]
    assert all(b.n_positions <= 100 for b in whole)
    scored = sum(b.n_scored for b in whole)
    assert scored == sum(dataset.tokens().lengths[i] + 1 for i in items)
    assert scored == dataset.tokens().unigram("val").sum()


def test_validation_names_an_item_that_does_not_fit(dataset):
    plan = of(dataset)
    plan.micro_batch_tokens = 20
    with pytest.raises(
        ScaMoError, match=r"micro_batch_tokens = 20: item \d+ \(c\d+\) alone takes \d+ positions"
    ):
        list(validation_batches(dataset, "val", plan))
    assert list(validation_batches(dataset, "test", plan)) == []
