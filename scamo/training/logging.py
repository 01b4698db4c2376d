"""The run's log (JSON lines) and its progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class RunLog:
    """log.jsonl: one record a line, flushed at once; `kind` is start, train, val, checkpoint, nan or end."""

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        """Open for appending. `resume_step`: forget what an interrupted process logged beyond that step."""
        if resume_step is not None and path.exists():
            kept = [record for record in read_log(path) if record.get("step", 0) <= resume_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(partial, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a log.jsonl in order, all or of one kind. A last line cut short by a crash is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if index == len(lines) - 1:
                break
            raise
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


class Progress:
    """tqdm over the steps with the loss and the tokens per second; silent on ranks other than 0."""

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="training",
            unit="step",
            disable=not show,
            dynamic_ncols=True,
            # In a file, a line every 15 s is enough.
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        self.show = show

    def update(self, loss: float, positions_per_s: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}, {positions_per_s:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self.show:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
