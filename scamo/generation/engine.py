"""The engine: a static key-value cache of fixed slots, in which prompts follow one another.

Prompts wait in a queue. Every step gives each seated one a token; those that are done leave, and the next are
read into their slots while the others go on. What a prompt gives does not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scamo.data.batches import null_text
from scamo.errors import ScaMoError
from scamo.generation.inference import inference_twin
from scamo.generation.sampling import Sampling, sample
from scamo.models.prefix_lm import PrefixLM

# Steps between two looks at the device, where the host does not wait for each.
BURST = 4


@dataclass(frozen=True)
class Request:
    """One prompt: text states float (P, text width), its noise (an int64 of prompt_keys), its limits.

    EOS is forbidden before `min_tokens` tokens, so that no motion is empty (the released sampler returns code
    1 in that case), and the motion ends at `max_tokens`: where they are equal, it has just so many.
    start: codes that stand between the text and what is generated, read together with the text. They are not
    among the tokens that come back, nor do the limits count them.
    """

    text: Tensor
    key: int
    max_tokens: int
    min_tokens: int = 1
    start: Sequence[int] = ()


class Progress(NamedTuple):
    """What a step brought to one prompt: codes int32 (n,) after those of before, and whether it is done."""

    ticket: int
    tokens: NDArray[np.int32]
    done: bool


@dataclass
class _Seat:
    ticket: int
    most: int
    steps: int = 1  # tokens that were asked of the device
    told: int = 0  # tokens that were reported


class _Look(NamedTuple):
    """The device's state as the host learns it, later: tickets of the slots, tokens, their counts, alive."""

    tickets: list[int | None]
    tokens: Tensor
    counts: Tensor
    alive: Tensor
    copied: torch.cuda.Event | None


class Engine:
    """Generates motion tokens; `run` serves any number of prompts with the memory of `slots` of them.

    With `fixed` every step takes all slots, the free ones too, and the host looks at the device every BURST
    steps only and while the next ones run: on CUDA a step is then one CUDA graph. Without, a step takes the
    seated prompts only, and the host looks after each.

    Args:
        model: in evaluation mode, on its device.
        sampling: of all prompts.
        slots: prompts at a time.
        capacity: positions of a slot, text and motion without its last token.
        guidance: logits = null + guidance (text - null), null being what follows no text; 1 without. Above
            1 a prompt takes two rows.
        fixed: None for CUDA only.

    Raises:
        ScaMoError: bad slots or guidance, or guidance of a model that was not trained for it.
    """

    def __init__(
        self,
        model: PrefixLM,
        sampling: Sampling,
        *,
        slots: int,
        capacity: int,
        guidance: float = 1.0,
        fixed: bool | None = None,
    ) -> None:
        if slots < 1:
            raise ScaMoError(f"slots = {slots}: expected a value above 0")
        check_guidance(model, guidance)
        self.model = inference_twin(model)
        self.sampling, self.slots, self.guidance = sampling, slots, guidance
        config, device = model.config, model.embedding.weight.device
        self._eos = config.codes
        self._ways = 1 if guidance == 1 else 2
        self._null = torch.from_numpy(null_text(config.text_width))
        # Slot s has the row s, or with guidance the rows 2 s (its text) and 2 s + 1 (no text).
        self._cache = self.model.new_cache(slots * self._ways, capacity)
        self._last = torch.zeros(slots, dtype=torch.int64, device=device)
        self._counts, self._least, self._most, self._keys = torch.zeros_like(self._last).repeat(4, 1)
        self._alive = torch.zeros(slots, dtype=torch.bool, device=device)
        # A dead row writes behind its tokens, hence one column more.
        self._tokens = self._last.new_zeros(slots, config.max_motion + 1)
        self._all = torch.arange(slots, device=device)
        self._fixed = device.type == "cuda" if fixed is None else fixed
        self._graph = self._capture() if self._fixed and device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        """Forget all prompts; the next ticket is 0."""
        self._queue: deque[tuple[int, Request]] = deque()
        self._seats: list[_Seat | None] = [None] * self.slots
        self._looks: deque[_Look] = deque()
        self._next_ticket = 0
        self._alive.fill_(False)
        self._cache.lengths.zero_()

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether no prompt waits or is seated."""
        return not self._queue and not any(self._seats)

    def submit(self, request: Request) -> int:
        """Put a prompt into the queue; its ticket: 0, 1, ... in the order of the calls.

        Raises:
            ScaMoError: an empty text, limits outside 1 <= min_tokens <= max_tokens, start and max_tokens
                together above config.max_motion, a code in start that is none, or a prompt that is too long
                for the model or the slots.
        """
        ticket, low, high = self._next_ticket, request.min_tokens, request.max_tokens
        given, most = len(request.start), self.model.config.max_motion
        if not 1 <= low <= high <= most - given:
            behind = f", behind {given} tokens of start" if given else ""
            raise ScaMoError(
                f"min_tokens = {low}, max_tokens = {high}{behind}: "
                f"expected 1 <= min_tokens <= max_tokens <= {most - given}"
            )
        if given and not 0 <= min(request.start) <= max(request.start) < self._eos:
            raise ScaMoError(f"start of text {ticket}: expected codes of 0 to {self._eos - 1}")
        if request.text.shape[0] < 1:
            raise ScaMoError(f"text {ticket} has no states: expected at least one")
        # The last token is never fed back.
        positions = self.model.prefix(request.text).shape[0] + given + high - 1
        self.model.check_length(positions)
        if positions > self._cache.capacity:
            raise ScaMoError(f"text {ticket}: {positions} positions, the slots have {self._cache.capacity}")
        self._queue.append((ticket, request))
        self._next_ticket += 1
        return ticket

    @torch.no_grad()
    def step(self) -> list[Progress]:
        """Seat prompts that wait, or give the seated ones their next tokens; what is known of them then."""
        admitted = self._admit()
        if self._fixed:
            missing = [seat.most - seat.steps for seat in self._seats if seat]
            steps = min(BURST, max(missing, default=0))
        else:
            steps = 0 if admitted else 1
        for _ in range(steps if any(self._seats) else 0):
            if self._graph:
                self._graph.replay()
            else:
                self._advance(self._all if self._fixed else self._all[: self._seated()])
        for seat in self._seats:
            if seat:
                seat.steps += steps
        if any(self._seats):
            self._looks.append(self._look())
        # While steps run, the host reads what was before them.
        late = 1 if self._fixed else 0
        return self._read() if len(self._looks) > (late if steps else 0) else []

    def run(self, requests: Iterable[Request]) -> Iterator[Progress]:
        """Serve all requests, read from the iterator as slots become free; tickets in their order.

        Raises ScaMoError as `submit`.
        """
        self.reset()
        more = iter(requests)
        while True:
            while self.waiting < self.slots and (request := next(more, None)) is not None:
                self.submit(request)
            if self.idle:
                return
            yield from self.step()

    def _seated(self) -> int:
        return sum(seat is not None for seat in self._seats)

    def _admit(self) -> bool:
        """Read waiting prompts into free slots; whether there were any.

        A prompt costs as much as a step of all, few or many at once: free slots wait for company.
        """
        free = [slot for slot, seat in enumerate(self._seats) if seat is None]
        group = min(len(self._queue), max(1, self.slots // 4))
        if not self._queue or len(free) < group:
            return False
        new = [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))]
        slots = free[: len(new)]
        prefixes: list[Tensor] = []
        starts: list[Sequence[int]] = []
        rows: list[int] = []
        for slot, (ticket, request) in zip(slots, new, strict=True):
            self._seats[slot] = _Seat(ticket, request.max_tokens)
            prefixes.append(self.model.prefix(request.text))
            if self._ways == 2:
                prefixes.append(self.model.prefix(self._null))
            starts += [request.start] * self._ways
            rows += range(slot * self._ways, (slot + 1) * self._ways)
        index = torch.tensor(slots, device=self._all.device)
        columns = [[r.min_tokens, r.max_tokens, r.key] for _, r in new]
        for state, values in zip(
            (self._least, self._most, self._keys), zip(*columns, strict=True), strict=True
        ):
            state[index] = torch.tensor(values, device=index.device)
        self._counts[index] = 0
        self._alive[index] = True
        self._choose(self.model.read_prefixes(self._cache, prefixes, rows, starts), index)
        return True

    def _advance(self, slots: Tensor) -> None:
        """One step of the first len(slots) slots; on the device alone."""
        tokens = self._last[: len(slots), None].expand(-1, self._ways).reshape(-1)
        self._choose(self.model.decode(self._cache.first(len(tokens)), tokens), slots)

    def _choose(self, logits: Tensor, slots: Tensor) -> None:
        """Choose and keep the next tokens of some slots, int64 (n,), by their rows' logits (n ways, V)."""
        if self._ways == 2:
            text, null = logits.unflatten(0, (-1, 2)).unbind(1)
            logits = torch.lerp(null, text, self.guidance)
        counts, alive = self._counts[slots], self._alive[slots]
        logits[:, self._eos].masked_fill_(counts < self._least[slots], -torch.inf)
        tokens = sample(logits, self._keys[slots], counts, self.sampling)
        goes_on = alive & (tokens != self._eos)
        self._tokens[slots, counts] = tokens
        counts = counts + goes_on
        alive = goes_on & (counts < self._most[slots])
        self._last[slots], self._counts[slots], self._alive[slots] = tokens, counts, alive
        # So that a dead row's length stays within the cache.
        rows = slots if self._ways == 1 else torch.stack((2 * slots, 2 * slots + 1), 1).flatten()
        self._cache.lengths[rows] *= alive[:, None].expand(-1, self._ways).reshape(-1)

    def _look(self) -> _Look:
        """Begin to copy what the host wants to know."""
        tickets = [seat.ticket if seat else None for seat in self._seats]
        if not self._all.is_cuda:
            return _Look(tickets, self._tokens.clone(), self._counts.clone(), self._alive.clone(), None)
        tokens, counts, alive = (
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in (self._tokens, self._counts, self._alive)
        )
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._all.device))
        return _Look(tickets, tokens, counts, alive, copied)

    def _read(self) -> list[Progress]:
        """What the oldest look brings; the seats of those that are done become free."""
        look = self._looks.popleft()
        if look.copied:
            look.copied.synchronize()
        counts, alive, tokens = look.counts.tolist(), look.alive.tolist(), look.tokens.numpy()
        news = []
        for slot, ticket in enumerate(look.tickets):
            seat = self._seats[slot]
            if seat is None or seat.ticket != ticket:
                continue
            if counts[slot] > seat.told or not alive[slot]:
                part = tokens[slot, seat.told : counts[slot]].astype(np.int32)
                news.append(Progress(seat.ticket, part, not alive[slot]))
                seat.told = counts[slot]
            if not alive[slot]:
                self._seats[slot] = None
        if not self._fixed:
            self._close_ranks()
        return news

    def _close_ranks(self) -> None:
        """Move the seated prompts to the first slots."""
        seated = [slot for slot, seat in enumerate(self._seats) if seat]
        if len(seated) == 0 or seated[-1] + 1 == len(seated):
            return
        rows = [slot * self._ways + way for slot in seated for way in range(self._ways)]
        _, order = self._cache.compact(rows)
        slots = [row // self._ways for row in order[:: self._ways]]
        index = torch.tensor(slots, device=self._all.device)
        state = (self._last, self._counts, self._least, self._most, self._keys, self._alive, self._tokens)
        for tensor in state:
            tensor[: len(slots)] = tensor[index]
        self._seats = [self._seats[slot] for slot in slots] + [None] * (self.slots - len(slots))

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step of all slots as a CUDA graph; the slots are free, so that it changes nothing."""
        device = self._all.device
        self._held = self.model._rope(device)  # the graph knows its address only
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled and libraries loaded outside the graph
                    self._advance(self._all)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._advance(self._all)
        return graph


def check_guidance(model: PrefixLM, guidance: float) -> None:
    """Raises ScaMoError for guidance below 1 or not finite, or of a model that knows no empty text."""
    if not (1 <= guidance < float("inf")):
        raise ScaMoError(f"guidance = {guidance}: expected 1 (off) or more")
    if guidance != 1 and not model.config.null_text:
        raise ScaMoError(
            f"guidance = {guidance}: the model never saw a motion without text; "
            "train it with training.drop_text above 0 (0.1 say)"
        )


def collect(progress: Iterable[Progress]) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Ticket and codes int32 (n,) of each prompt as it is done, from what `Engine.run` gives."""
    parts: dict[int, list[NDArray[np.int32]]] = {}
    for ticket, tokens, done in progress:
        parts.setdefault(ticket, []).append(tokens)
        if done:
            yield ticket, np.concatenate(parts.pop(ticket))
