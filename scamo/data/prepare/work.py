"""Clips made by several processes and written in order, so that any stop can be gone on from.

What is made of a piece of work (a file, or a clip) must depend on nothing but the piece, its files and the
settings of the writer. It is made in one of the workers, travels to this process, and is committed by the
writer; a few pieces for each worker are under way at a time, however many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from numpy.typing import NDArray

from scamo.data.dataset import Caption, Clips, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError

# Pieces that may be done, or under way, before the one whose turn it is; for each worker.
AHEAD = 4
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Piece(Protocol):
    """repr: all that what is made of it depends on, beside its files; plain values, so that it is the same in
    every process."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Piece)


class Findings:
    """What was made of a piece, in order, for `DatasetWriter`, whose methods it has."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def add_clip(
        self,
        name: str,
        features: NDArray,
        split: str,
        captions: Sequence[Caption],
        meta: dict[str, Any] | None = None,
        notes: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._calls.append(("add_clip", (name, features, split, captions, meta, notes), {}))

    def refuse(
        self,
        name: str,
        reason: str,
        *,
        split: str = "",
        detail: str = "",
        kind: Literal["clip", "caption"] = "clip",
    ) -> None:
        self._calls.append(("refuse", (name, reason), {"split": split, "detail": detail, "kind": kind}))

    def note(self, name: str, reason: str, *, split: str = "", detail: str = "") -> None:
        self._calls.append(("note", (name, reason), {"split": split, "detail": detail}))

    def pass_on(self, writer: DatasetWriter) -> None:
        for method, values, named in self._calls:
            getattr(writer, method)(*values, **named)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_pieces(
    writer: DatasetWriter,
    pieces: Sequence[P],
    make: Callable[[P, Clips], None],
    files: Callable[[P], Iterable[Path]],
    *,
    desc: str,
    unit: str = "clip",
    workers: int = 1,
    progress: bool = True,
) -> None:
    """Make all pieces and write them in order; what an interrupted writer has of them already is kept.

    The bytes are the same for any number of workers and of interruptions. Kept is what comes before the first
    piece that is another one now, or has a file of another size or time.

    Args:
        writer: open, and made with `resume`.
        pieces: of the work.
        make: puts the clips of a piece, or why there are none, into its second argument. Like `files` it goes
            to the workers by pickle.
        files: those that are read for a piece, whether they are there or not.
        desc, unit: what the progress bar calls the work and a piece.
        workers: processes, each of one thread; 1 works in this one, 0 takes one for each core. With more than
            one, a script that calls this needs the usual `if __name__ == "__main__"` guard.
        progress: show a bar where stderr is a terminal, and say what was kept.

    Raises:
        ScaMoError: workers is negative, a worker died, or what `make` and the writer raise. All work before
            that is kept.
    """
    from tqdm import tqdm

    if workers < 0:
        raise ScaMoError(f"workers = {workers}: expected 0 or more")
    done = writer.restore(_key(piece, files) for piece in pieces)
    if progress and done:
        print(f"{writer.folder}: {done:,d} of {len(pieces):,d} {unit}s were done before", file=sys.stderr)
    results = made(pieces[done:], make, files, workers or available_cores())
    bar = tqdm(
        total=len(pieces), initial=done, desc=desc, unit=unit, disable=None if progress else True, delay=0.1
    )
    start, before = time.monotonic(), writer.frames
    with bar, contextlib.closing(results):
        for key, findings in results:
            findings.pass_on(writer)
            writer.commit(key)
            if not bar.disable:
                rate = (writer.frames - before) / (time.monotonic() - start)
                bar.set_postfix_str(f"{rate:,.0f} frames/s", refresh=False)
                bar.update()


def write_dataset(
    writer: DatasetWriter,
    pieces: Sequence[P],
    make: Callable[[P, Clips], None],
    files: Callable[[P], Iterable[Path]],
    *,
    unit: str = "clip",
    workers: int = 1,
    progress: bool = True,
    first: Callable[[DatasetWriter], None] | None = None,
) -> MotionDataset:
    """A whole dataset by `write_pieces`; its report is printed with progress.

    Args:
        writer: not yet open, made with `resume`; its provenance says the source.
        first: refuses what belongs to no piece.
        others: as for `write_pieces`, and its errors.
    """
    with writer:
        if first is not None:
            first(writer)
        write_pieces(
            writer,
            pieces,
            make,
            files,
            desc=f"prepare {writer.provenance['source']}",
            unit=unit,
            workers=workers,
            progress=progress,
        )
    dataset = MotionDataset.open(writer.folder)
    if progress:
        print(dataset.summary())
    return dataset


def made(
    pieces: Sequence[P], make: Callable[[P, Clips], None], files: Callable[[P], Iterable[Path]], workers: int
) -> Generator[tuple[str, Findings], None, None]:
    """The key and findings of every piece, in order. Arguments and errors as for `write_pieces`."""
    workers = min(workers, len(pieces))
    if workers <= 1:
        for piece in pieces:
            yield _make(piece, make, files)
        return
    team = [_Worker(make, files) for _ in range(workers)]
    try:
        _start(team)
        yield from _shared_out(pieces, team)
    finally:
        for worker in team:
            worker.stop()


def _shared_out(pieces: Sequence[P], team: list[_Worker]) -> Iterator[tuple[str, Findings]]:
    idle, busy = list(team), dict[Connection, tuple[_Worker, int]]()
    ready: dict[int, Any] = {}
    given = taken = 0
    while taken < len(pieces):
        while idle and given < min(len(pieces), taken + AHEAD * len(team)):
            worker = idle.pop()
            worker.give(pieces[given])
            busy[worker.connection] = worker, given
            given += 1
        for connection in wait(list(busy), 0 if taken in ready else None):
            worker, index = busy.pop(connection)  # type: ignore[call-overload]
            ready[index] = worker.take(pieces[index])
            if worker.alive:
                idle.append(worker)
        if taken in ready:
            result = ready.pop(taken)
            if isinstance(result, BaseException):
                raise result
            yield result
            taken += 1


def _make(
    piece: P, make: Callable[[P, Clips], None], files: Callable[[P], Iterable[Path]]
) -> tuple[str, Findings]:
    key, findings = _key(piece, files), Findings()  # the key first: a file may change while it is read
    make(piece, findings)
    return key, findings


def _key(piece: P, files: Callable[[P], Iterable[Path]]) -> str:
    """Changes with the piece, and with the size or time of one of its files."""
    stats: list[tuple[int, int] | None] = []
    for path in files(piece):
        try:
            found = path.stat()
        except OSError:
            stats.append(None)
        else:
            stats.append((found.st_size, found.st_mtime_ns))
    return hashlib.sha256(repr((piece, stats)).encode("utf-8", "backslashreplace")).hexdigest()[:32]


class _Worker:
    """A process that makes one piece at a time. It ends when this one does, however that ends."""

    def __init__(self, make: Callable[..., None], files: Callable[..., Iterable[Path]]) -> None:
        # Spawned, not forked: the caller may hold threads of torch, and the other workers' connections.
        context = multiprocessing.get_context("spawn")
        self.connection, self._other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._other, make, files), daemon=True)
        self._started = False

    def start(self) -> None:
        self._process.start()
        self._started = True
        self._other.close()  # so that its end is noticed

    def give(self, piece: Piece) -> None:
        try:
            self.connection.send(piece)
        except OSError:
            raise self._death(piece) from None

    def take(self, piece: Piece) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return self._death(piece)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        self.connection.close()
        self._other.close()
        if self._started:
            self._process.terminate()
            self._process.join()
            self._process.close()

    def _death(self, piece: Piece) -> ScaMoError:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        hint = " (is there too little memory? try fewer workers)" if code == -signal.SIGKILL else ""
        return ScaMoError(f"{piece.name}: the process that worked on it died of {how}{hint}")


def _start(team: list[_Worker]) -> None:
    """Start the workers with one thread each: libraries read that once, from the environment."""
    old = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        for worker in team:
            worker.start()
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(
    connection: Connection, make: Callable[[P, Clips], None], files: Callable[[P], Iterable[Path]]
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to all processes; the first one ends the others
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            piece = connection.recv()
            try:
                result: Any = _make(piece, make, files)
            except Exception as error:
                error.add_note(traceback.format_exc())
                result = error
            connection.send(result)
