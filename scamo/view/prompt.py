"""The page of `scamo demo --model`: sentence in, variants of the motion side by side."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import viser

from scamo.errors import ScaMoError
from scamo.generation.api import ScaMo
from scamo.motion.motion import Motion
from scamo.view.stage import Stage, complain

MAX_VARIANTS = 8
MAX_CHARACTERS = 10_000
_LAST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """What a client asks for; ScaMoError for what no page should take (a client can send anything)."""

    text: str
    variants: int
    seed: int
    temperature: float
    top_p: float
    seconds: float

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ScaMoError("the prompt is empty: say what the person does")
        if len(self.text) > MAX_CHARACTERS:
            raise ScaMoError(f"the prompt has {len(self.text)} characters, expected {MAX_CHARACTERS} at most")
        if not 1 <= self.variants <= MAX_VARIANTS:
            raise ScaMoError(f"variants = {self.variants}: expected 1 to {MAX_VARIANTS}")
        if not 0 <= self.seed <= _LAST_SEED:
            raise ScaMoError(f"seed = {self.seed}: expected 0 to {_LAST_SEED}")


class Generator:
    """The one model of all clients: one generation at a time, first come, first served."""

    def __init__(self, model: ScaMo) -> None:
        self.model = model
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generator")
        self._jobs: list[Future[None]] = []
        self._lock = threading.Lock()

    @property
    def longest(self) -> float:
        """Seconds of the longest motion."""
        return self.model.config.max_motion * self.model.seconds_per_token

    def submit(self, job: Callable[[], None]) -> tuple[Future[None], int]:
        """Put a job behind the others; returns it and how many are before it."""
        with self._lock:
            self._jobs = [other for other in self._jobs if not other.done()]
            before = len(self._jobs)
            self._jobs.append(self._worker.submit(job))
            self._jobs[-1].add_done_callback(_print_error)
            return self._jobs[-1], before

    def generate(self, request: Request) -> list[Motion]:
        """The variants: one sentence, seeds that count up. Raises ScaMoError as of ScaMo.generate."""
        return self.model.generate(
            [request.text] * request.variants,
            seed=range(request.seed, request.seed + request.variants),
            temperature=request.temperature,
            top_p=request.top_p,
            max_seconds=request.seconds,
        )

    def cut(self, text: str) -> bool:
        """Whether the text encoder does not read the whole of it."""
        encoder = self.model.text_encoder
        return int(encoder.piece_counts([text])[0]) >= encoder.max_tokens

    def close(self) -> None:
        """Drop the waiting jobs; the running one ends by itself."""
        self._worker.shutdown(wait=False, cancel_futures=True)


def _print_error(job: Future[None]) -> None:
    """A job tells its client what went wrong; a fault in that would pass in silence."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        traceback.print_exception(error)


class PromptPage:
    """One client's page. It has at most one job in the queue; the result goes to its own stage."""

    def __init__(self, client: viser.ClientHandle, generator: Generator) -> None:
        self._client, self._generator = client, generator
        self._job: Future[None] | None = None  # waiting or running
        self._closed = False
        self._lock = threading.Lock()  # of the two fields above
        gui, longest, unit = client.gui, generator.longest, generator.model.seconds_per_token
        with gui.add_folder("Prompt"):
            self._text = gui.add_text("Text", "a person walks in a circle", multiline=True)
            self._variants = gui.add_slider("Variants", 1, MAX_VARIANTS, 1, 3)
            self._seed = gui.add_number("Seed", 0, min=0, max=_LAST_SEED, step=1)
            self._temperature = gui.add_slider("Temperature", 0.1, 2.0, 0.05, 1.0)
            self._top_p = gui.add_slider("Top-p", 0.05, 1.0, 0.05, 1.0)
            self._seconds = gui.add_slider("Seconds at most", unit, longest, unit, longest)
            self._button = gui.add_button("Generate")
        self._stage = Stage(client)
        self._button.on_click(self._clicked)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._job is not None:
                self._job.cancel()
        self._stage.close()

    def _clicked(self, event: viser.GuiEvent) -> None:
        try:
            request = Request(
                self._text.value,
                self._variants.value,
                self._seed.value,
                self._temperature.value,
                self._top_p.value,
                self._seconds.value,
            )
        except ScaMoError as error:
            complain(self._client, "Not generated", error)
            return
        with self._lock:
            if self._closed or self._job is not None:
                return  # the button is off; this was a second click on its way
            self._button.disabled = True
            notice = self._client.add_notification("Generating", "", loading=True, with_close_button=False)
            self._job, before = self._generator.submit(lambda: self._generate(request, notice))
            if before:
                notice.title, notice.body = "Waiting", f"{before} before you"

    def _generate(self, request: Request, notice: viser.NotificationHandle) -> None:
        with self._lock:  # also: not before the notice of waiting is out
            if self._closed:
                return
            notice.title, notice.body = "Generating", f"{request.variants} × “{request.text[:80]}”"
        motions, error, cut = [], None, False
        try:
            motions = self._generator.generate(request)
            cut = self._generator.cut(request.text)
        except Exception as caught:
            error = caught
        with self._lock:
            self._job = None
            if self._closed:  # the client left meanwhile: nobody is there to read it
                return
            notice.remove()
            self._button.disabled = False
        if error is not None:
            complain(self._client, "Not generated", error)
            return
        self._stage.show(motions, [f"seed {motion.meta['seed']}" for motion in motions])
        if cut:
            pieces = self._generator.model.text_encoder.max_tokens
            self._client.add_notification(
                "Long prompt",
                f"the model reads the first {pieces} word pieces; the rest was cut",
                color="yellow",
            )
