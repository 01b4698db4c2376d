"""Packed batches: samples laid end to end, no padding, in an order that is a pure function of (seed, step).

Sample layout (paper section 3.2): [text states][motion tokens]; the last text row predicts the first motion
token and the last motion row predicts EOS, so a sample of P text rows and m tokens has P + m positions and
m + 1 scored rows. EOS is a target only and never an input.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.config import ModelConfig, TrainingConfig
from scamo.data.dataset import MotionDataset, TextStore, TokenStore
from scamo.errors import ScaMoError

# Draws of an epoch that stay in memory: a step may reach into the next one, and validation asks for none.
KEPT_EPOCHS = 2


@dataclass(frozen=True)
class Sample:
    """One text and one motion: text (P, width) float, motion (m,) integer tokens, P >= 1 and m >= 1."""

    text: NDArray
    motion: NDArray
    item: int = -1
    caption: int = -1


@dataclass(frozen=True)
class PackedBatch:
    """B samples on one axis of N positions, `cu_seqlens[b]:cu_seqlens[b + 1]` each.

    text_states (text tokens, text width) float32 and motion_tokens (motion inputs,) int64 fill the rows
    text_rows and motion_rows (int64) of the packed sequence; together these are all N rows.
    cu_seqlens int32 (B + 1), prefix_lengths int32 (B,): text rows per sample.
    scored_rows, targets int64 (S,), S = motion inputs + B: targets[i] in [0, K] is what row scored_rows[i]
    predicts, K being EOS. max_seqlen: longest sample. item_ids, caption_ids int64 (B,).
    """

    text_states: torch.Tensor
    motion_tokens: torch.Tensor
    text_rows: torch.Tensor
    motion_rows: torch.Tensor
    cu_seqlens: torch.Tensor
    prefix_lengths: torch.Tensor
    scored_rows: torch.Tensor
    targets: torch.Tensor
    max_seqlen: int
    item_ids: torch.Tensor
    caption_ids: torch.Tensor

    @property
    def n_samples(self) -> int:
        return self.prefix_lengths.shape[0]

    @property
    def n_positions(self) -> int:
        """Text + motion positions that the transformer computes: N."""
        return self.text_rows.shape[0] + self.motion_rows.shape[0]

    @property
    def n_scored(self) -> int:
        """Scored tokens with EOS: S, the D of the scaling laws."""
        return self.targets.shape[0]

    def _map(self, function) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: function(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for `.to("cuda", non_blocking=True)`."""
        return self._map(lambda t: t.pin_memory())


def collate(samples: Sequence[Sample], eos: int) -> PackedBatch:
    """Pack samples in the given order; `eos` is K, the index after the last motion code.

    Raises:
        ScaMoError: no sample, a sample without text or motion, states of different widths, or a token outside
            [0, eos); the message names the sample's position and item.
    """
    if not samples:
        raise ScaMoError("cannot pack a batch of no samples")
    width = samples[0].text.shape[-1]
    for index, sample in enumerate(samples):
        where = f"sample {index} (item {sample.item}, caption {sample.caption})"
        if sample.text.ndim != 2 or sample.text.shape[0] < 1 or sample.text.shape[1] != width:
            raise ScaMoError(f"{where}: text states of shape {sample.text.shape}, expected (P >= 1, {width})")
        if sample.motion.ndim != 1 or sample.motion.shape[0] < 1:
            raise ScaMoError(f"{where}: motion tokens of shape {sample.motion.shape}, expected (m >= 1,)")
        low, high = int(sample.motion.min()), int(sample.motion.max())
        if low < 0 or high >= eos:
            raise ScaMoError(f"{where}: motion token {low if low < 0 else high} is outside [0, {eos})")

    prefix = np.array([s.text.shape[0] for s in samples], dtype=np.int64)
    motion = np.array([s.motion.shape[0] for s in samples], dtype=np.int64)
    length = prefix + motion
    cu_seqlens = np.concatenate([[0], np.cumsum(length)])
    starts = cu_seqlens[:-1]

    text_rows = np.repeat(starts, prefix) + _ranges(prefix)
    motion_rows = np.repeat(starts + prefix, motion) + _ranges(motion)
    scored_rows = np.repeat(starts + prefix - 1, motion + 1) + _ranges(motion + 1)
    tokens = np.concatenate([s.motion for s in samples]).astype(np.int64)
    targets = np.insert(tokens, np.cumsum(motion), eos)

    return PackedBatch(
        text_states=torch.from_numpy(np.concatenate([s.text for s in samples]).astype(np.float32)),
        motion_tokens=torch.from_numpy(tokens),
        text_rows=torch.from_numpy(text_rows),
        motion_rows=torch.from_numpy(motion_rows),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        prefix_lengths=torch.from_numpy(prefix.astype(np.int32)),
        scored_rows=torch.from_numpy(scored_rows),
        targets=torch.from_numpy(targets),
        max_seqlen=int(length.max()),
        item_ids=torch.tensor([s.item for s in samples], dtype=torch.int64),
        caption_ids=torch.tensor([s.caption for s in samples], dtype=torch.int64),
    )


def null_text(width: int) -> NDArray[np.float32]:
    """The text of a sample that lost it, (1, width): one state of zeros, which no encoder gives."""
    return np.zeros((1, width), dtype=np.float32)


class Draw(NamedTuple):
    """One sample: its item, its caption (-1: it lost its text), and the motion token it loses: 0 none, 1 the
    first, 2 the last."""

    item: int
    caption: int
    drop: int


class _Epoch(NamedTuple):
    """The draws of an epoch in their order, (items,) each."""

    items: NDArray[np.int64]
    captions: NDArray[np.int64]
    drops: NDArray[np.int64]
    positions: NDArray[np.int64]
    scored: NDArray[np.int64]


class BatchPlan:
    """What every micro-batch of every step holds: a pure function of (seed, step).

    An epoch is a permutation of the items; each draw takes one of the item's captions and, with probability
    drop_token, loses its first or last motion token (released code: 1/3; a lone token stays); with
    probability drop_text, `null_text` stands where its text was. The epochs
    follow one another in one stream, cut greedily into micro-batches of at most micro_batch_tokens positions;
    step s is micro-batches [s micro_batches, (s + 1) micro_batches). Nothing depends on the number of ranks.

    Items without tokens, or with more than max_motion, are left out and counted in `excluded`.

    Args:
        items: item ids (n,).
        motion_lengths: tokens of each (n,).
        first_captions: id of each item's first caption (n,).
        caption_counts: captions of each item (n,); their ids follow one another.
        text_lengths: states of every caption, by caption id; more than max_text are cut off.
        seed: of the order and the draws.
        micro_batch_tokens: text and motion positions of a micro-batch at most.
        micro_batches: of a step, over all ranks.
        drop_token, drop_text: probabilities.
        max_text: text positions at most.
        max_motion: motion tokens at most.
        sentence: a caption's states are averaged to one position.
        name_of: item id -> name, for messages.

    Raises:
        ScaMoError: no item is left, or one does not fit into a micro-batch (the message names it).
    """

    def __init__(
        self,
        items: NDArray[np.int64],
        motion_lengths: NDArray[np.int64],
        first_captions: NDArray[np.int64],
        caption_counts: NDArray[np.int64],
        text_lengths: NDArray[np.int64],
        *,
        seed: int,
        micro_batch_tokens: int,
        micro_batches: int,
        drop_token: float = 1 / 3,
        drop_text: float = 0.0,
        max_text: int = 150,
        max_motion: int = 50,
        sentence: bool = False,
        name_of: Callable[[int], str] = str,
    ) -> None:
        if seed < 0 or micro_batches < 1 or not 0 <= drop_token <= 1 or not 0 <= drop_text <= 1:
            raise ScaMoError(
                f"seed = {seed}, micro_batches = {micro_batches}, drop_token = {drop_token}, "
                f"drop_text = {drop_text}: expected 0 or more, 1 or more, and two probabilities"
            )
        self.seed, self.drop_token, self.drop_text = seed, drop_token, drop_text
        self.micro_batch_tokens, self.micro_batches = micro_batch_tokens, micro_batches
        self.max_text, self.max_motion, self.sentence = max_text, max_motion, sentence
        self.tokens: TokenStore | None = None
        self.text: TextStore | None = None

        motion_lengths = np.asarray(motion_lengths, dtype=np.int64)
        empty, long = motion_lengths < 1, motion_lengths > max_motion
        self.excluded: dict[str, int] = {
            "without tokens": int(empty.sum()),
            f"more than {max_motion} tokens": int(long.sum()),
        }
        kept = ~(empty | long)
        self.items: NDArray[np.int64] = np.asarray(items, dtype=np.int64)[kept]
        self._motion = motion_lengths[kept]
        self._first = np.asarray(first_captions, dtype=np.int64)[kept]
        self._counts = np.asarray(caption_counts, dtype=np.int64)[kept]
        self._text = np.minimum(np.asarray(text_lengths, dtype=np.int64), 1 if sentence else max_text)
        if not len(self.items):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.excluded.items())
            raise ScaMoError(f"no item to train on: of {len(kept)}, {reasons}")
        longest = self._motion + np.array(
            [self._text[a : a + n].max() for a, n in zip(self._first, self._counts, strict=True)]
        )
        if longest.max() > micro_batch_tokens:
            worst = int(longest.argmax())
            raise ScaMoError(
                f"micro_batch_tokens = {micro_batch_tokens}: item {self.items[worst]} "
                f"({name_of(int(self.items[worst]))}) alone takes {longest[worst]} positions"
            )

        # The first micro-batch of each: where it starts in the stream, its scored tokens, its positions.
        self._starts = array("q", [0])
        self._scored = array("q")
        self._positions = array("q")
        self._planned_epochs = 0
        self._open_positions = self._open_scored = 0
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.RLock()  # the trainer asks while a thread packs ahead

    @classmethod
    def of(
        cls,
        dataset: MotionDataset,
        split: str,
        tokens: TokenStore,
        text: TextStore,
        model: ModelConfig,
        training: TrainingConfig,
    ) -> BatchPlan:
        """The plan of a split of a dataset; it remembers `tokens` and `text` for the loader."""
        items = dataset.items(split)
        if not len(items):
            raise ScaMoError(f"{dataset.folder}: split {split} has no items")
        spans = [dataset.captions_of(item) for item in items]
        plan = cls(
            items,
            tokens.lengths[items],
            np.array([span[0] for span in spans]),
            np.array([len(span) for span in spans]),
            text.lengths,
            seed=training.seed,
            micro_batch_tokens=training.micro_batch_tokens,
            micro_batches=training.micro_batches,
            drop_token=training.drop_token,
            drop_text=training.drop_text,
            max_text=model.max_text,
            max_motion=model.max_motion,
            sentence=model.text == "sentence",
            name_of=dataset.item_name,
        )
        plan.tokens, plan.text = tokens, text
        return plan

    def step(self, step: int) -> list[list[Draw]]:
        """The draws of every micro-batch of `step`, over all ranks."""
        first = self._plan(step)
        return [
            self._draws(self._starts[k], self._starts[k + 1])
            for k in range(first, first + self.micro_batches)
        ]

    def scored(self, step: int) -> int:
        """Scored tokens (with EOS) of the whole step, over all ranks."""
        first = self._plan(step)
        return sum(self._scored[first : first + self.micro_batches])

    def positions(self, step: int) -> int:
        """Text and motion positions of the whole step, over all ranks."""
        first = self._plan(step)
        return sum(self._positions[first : first + self.micro_batches])

    def text_rows(self, states: NDArray) -> NDArray:
        """What of a caption's states (P, width) stands before the motion."""
        states = states[: self.max_text]
        return states.astype(np.float32).mean(0, keepdims=True) if self.sentence else states

    def epochs(self, step: int) -> float:
        """Passes over the items that are done before `step`."""
        return self._starts[self._plan(step)] / len(self.items)

    def _plan(self, step: int) -> int:
        """Plan up to the end of `step`; returns its first micro-batch."""
        if step < 0:
            raise ScaMoError(f"step = {step}: expected 0 or more")
        first = step * self.micro_batches
        with self._lock:
            while len(self._scored) < first + self.micro_batches:
                self._plan_epoch()
        return first

    def _plan_epoch(self) -> None:
        epoch = self._epoch(self._planned_epochs)
        base = self._planned_epochs * len(self.items)
        positions = np.concatenate([[0], np.cumsum(epoch.positions)])
        scored = np.concatenate([[0], np.cumsum(epoch.scored)])
        start = 0
        while True:
            room = self.micro_batch_tokens - self._open_positions
            # The last sample that still fits into the open micro-batch.
            end = int(np.searchsorted(positions, positions[start] + room, side="right")) - 1
            self._open_positions += int(positions[end] - positions[start])
            self._open_scored += int(scored[end] - scored[start])
            if end == len(self.items):
                break
            self._starts.append(base + end)
            self._scored.append(self._open_scored)
            self._positions.append(self._open_positions)
            self._open_positions = self._open_scored = 0
            start = end
        self._planned_epochs += 1

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch in self._epochs:
                self._epochs.move_to_end(epoch)
                return self._epochs[epoch]
            count = len(self.items)
            # Raw bits: numpy promises their stream for ever, but not that of its distributions.
            draws = 4 if self.drop_text else 3
            bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(draws * count)
            order = np.argsort(bits[:count], kind="stable")
            uniform = (bits[count:] >> np.uint64(11)) * 2.0**-53
            choice = np.minimum(
                (uniform[:count] * self._counts[order]).astype(np.int64), self._counts[order] - 1
            )
            captions = self._first[order] + choice
            motion, tokens = self._motion[order], uniform[count : 2 * count]
            drops = np.select(
                [motion < 2, tokens < self.drop_token / 2, tokens < self.drop_token],
                [0, 1, 2],
                0,
            )
            motion = motion - (drops > 0)
            text = self._text[captions]
            if self.drop_text:
                lost = uniform[2 * count :] < self.drop_text
                captions, text = np.where(lost, -1, captions), np.where(lost, 1, text)
            planned = _Epoch(self.items[order], captions, drops, text + motion, motion + 1)
            self._epochs[epoch] = planned
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
            return planned

    def _draws(self, start: int, end: int) -> list[Draw]:
        count = len(self.items)
        draws: list[Draw] = []
        while start < end:
            number, offset = divmod(start, count)
            stop = min(offset + end - start, count)
            epoch = self._epoch(number)
            columns = (epoch.items, epoch.captions, epoch.drops)
            draws += map(Draw, *(column[offset:stop].tolist() for column in columns))
            start += stop - offset
        return draws


class PackedLoader:
    """Reads and packs what a plan says; rank r of w gets micro-batches r, r + w, ... of every step.

    Args:
        dataset: the dataset.
        split: the split that the plan was made of.
        plan: the plan.
        rank: of this process.
        world: number of processes; it divides plan.micro_batches.
        tokens: the plan's by default.
        text: the plan's by default.

    Raises:
        ScaMoError: micro_batches does not divide by world, the plan is of another split, or tokens or text
            states are missing.
    """

    def __init__(
        self,
        dataset: MotionDataset,
        split: str,
        plan: BatchPlan,
        *,
        rank: int = 0,
        world: int = 1,
        tokens: TokenStore | None = None,
        text: TextStore | None = None,
    ) -> None:
        if not 0 <= rank < world or plan.micro_batches % world:
            raise ScaMoError(f"micro_batches = {plan.micro_batches} does not divide by the {world} ranks")
        if not np.isin(plan.items, dataset.items(split)).all():
            raise ScaMoError(f"the batch plan holds items that are not in split {split} of {dataset.folder}")
        self.plan, self.rank, self.world = plan, rank, world
        self._tokens, self._text = _stores(plan, tokens, text)

    def step(self, step: int) -> list[PackedBatch]:
        """This rank's micro-batches of a step."""
        return [self._pack(draws) for draws in self.plan.step(step)[self.rank :: self.world]]

    def steps(
        self, start: int = 0, stop: int | None = None, *, ahead: int = 2, pin: bool = False
    ) -> Iterator[list[PackedBatch]]:
        """This rank's micro-batches of steps start, start + 1, ... (stop excluded), packed ahead in a thread.

        At most `ahead` steps wait; pin: in page-locked memory. An error there is raised here, in its turn.
        """
        ready: queue.Queue[Any] = queue.Queue(ahead)
        closed = threading.Event()

        def put(value: Any) -> None:
            while not closed.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(value, timeout=0.1)
                    return

        def work() -> None:
            try:
                step = start
                while not closed.is_set() and (stop is None or step < stop):
                    batches = self.step(step)
                    put([batch.pin_memory() for batch in batches] if pin else batches)
                    step += 1
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="pack batches", daemon=True)
        thread.start()
        try:
            while (value := ready.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            closed.set()
            thread.join()

    def __iter__(self) -> Iterator[tuple[PackedBatch, int]]:
        """Every micro-batch of this rank from step 0 on, without end, and the scored tokens of its step."""
        for step, batches in enumerate(self.steps()):
            for batch in batches:
                yield batch, self.plan.scored(step)

    def _pack(self, draws: Sequence[Draw]) -> PackedBatch:
        samples = []
        for item, caption, drop in draws:
            motion = self._tokens[item]
            motion = motion[1:] if drop == 1 else motion[:-1] if drop == 2 else motion
            text = null_text(self._text.width) if caption < 0 else self.plan.text_rows(self._text[caption])
            samples.append(Sample(text, motion, item, caption))
        return collate(samples, self._tokens.codes)


def validation_batches(
    dataset: MotionDataset,
    split: str,
    plan: BatchPlan,
    *,
    rank: int = 0,
    world: int = 1,
    tokens: TokenStore | None = None,
    text: TextStore | None = None,
) -> Iterator[PackedBatch]:
    """Every item of a split once, in order, whole and with its first caption: this rank's micro-batches.

    The plan gives the limits (micro_batch_tokens, max_text, max_motion) and the stores. The micro-batches are
    the same for any number of ranks; rank r of w gets r, r + w, ..., so that some ranks may get one less.
    Items that a plan excludes are left out here too. Raises ScaMoError for an item that alone exceeds a
    micro-batch.
    """
    tokens, text = _stores(plan, tokens, text)
    samples: list[Sample] = []
    used = index = 0
    for item in dataset.items(split).tolist():
        motion = tokens[item]
        if not 1 <= len(motion) <= plan.max_motion:
            continue
        caption = int(dataset.captions_of(item)[0])
        sample = Sample(plan.text_rows(text[caption]), motion, item, caption)
        length = len(sample.text) + len(motion)
        if length > plan.micro_batch_tokens:
            raise ScaMoError(
                f"micro_batch_tokens = {plan.micro_batch_tokens}: item {item} "
                f"({dataset.item_name(item)}) alone takes {length} positions"
            )
        if used + length > plan.micro_batch_tokens:
            if index % world == rank:
                yield collate(samples, tokens.codes)
            index += 1
            samples, used = [], 0
        samples.append(sample)
        used += length
    if samples and index % world == rank:
        yield collate(samples, tokens.codes)


def _stores(
    plan: BatchPlan, tokens: TokenStore | None, text: TextStore | None
) -> tuple[TokenStore, TextStore]:
    tokens = plan.tokens if tokens is None else tokens
    text = plan.text if text is None else text
    if tokens is None or text is None:
        raise ScaMoError("the batch plan has no tokens and text states, and none were given")
    return tokens, text


def _ranges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
