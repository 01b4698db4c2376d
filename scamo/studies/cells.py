"""What all studies share: named cells, whose results are written whole and are not made again.

OUT/study.json         the settings that all cells share
OUT/cells/NAME.json    the result of a finished cell, with its settings
OUT/work/NAME/         what a cell works in, kept for resuming it
OUT/results.jsonl      the finished cells, in the plan's order
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scamo.config import RunConfig, to_dict
from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.training.launch import ROOT
from scamo.training.logging import read_log

# Lines of a failed cell's output that are shown.
TAIL = 12


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    name: also of its files. settings: what tells it from the other cells, values of JSON. run: makes it in
    the folder that it is given (OUT/work/NAME, with what a run that was stopped has left) and returns the
    result, values of JSON under other keys than the settings'; what it raises fails this cell only.
    """

    name: str
    settings: dict[str, Any]
    run: Callable[[Path], dict[str, Any]]


class Study:
    """Cells that are run one after another into a folder; the same call goes on where it was stopped."""

    def __init__(self, out: str | Path, config: dict[str, Any], cells: Sequence[Cell]) -> None:
        """config: what all cells share. Cells may be added to a folder later, their number is free.

        Raises ScaMoError: OUT holds a study with another config, or a finished cell of other settings; two
        cells of one name, or a name that is none of a file.
        """
        self.out, self.cells = Path(out), list(cells)
        names = [cell.name for cell in self.cells]
        for name in names:
            if not name or name.startswith(".") or Path(name).name != name:
                raise ScaMoError(f"cell {name!r}: expected a file name")
            if names.count(name) > 1:
                raise ScaMoError(f"cell {name!r}: there are {names.count(name)} of this name")
        for cell in self.cells:
            done = self._read(cell)
            if done is not None:
                check_same(self._path(cell), {key: done.get(key) for key in cell.settings}, cell.settings)
        keep_settings(self.out / "study.json", config)

    def run(self, progress: bool = True) -> list[str]:
        """Run the cells that are not finished. Returns the names of those that failed, after saying why.

        progress: also print each cell as it is finished.
        """
        failed: dict[str, str] = {}
        for number, cell in enumerate(self.cells, 1):
            if self._read(cell) is not None:
                continue
            began = time.perf_counter()
            work = self.out / "work" / cell.name
            work.mkdir(parents=True, exist_ok=True)
            try:
                result = cell.run(work)
                if clash := cell.settings.keys() & result.keys():
                    raise ValueError(f"the result has keys of the settings: {', '.join(sorted(clash))}")
                write_json(self._path(cell), {"cell": cell.name, **cell.settings, **result})
            except ScaMoError as error:
                failed[cell.name] = str(error)
            except Exception:
                # A fault of one cell must not cost the others, which may take hours each.
                failed[cell.name] = traceback.format_exc()
            if progress:
                how = "failed after " if cell.name in failed else ""
                seconds = time.perf_counter() - began
                print(f"{number}/{len(self.cells)} {cell.name}: {how}{seconds:.0f} s", flush=True)
            self._write_results()
        self._write_results()
        for name, output in failed.items():
            print(f"{name} failed:\n{tail(output)}", file=sys.stderr, flush=True)
        return list(failed)

    def results(self) -> list[dict[str, Any]]:
        """Of every finished cell, in the plan's order: {"cell": name, **settings, **result}."""
        found = (self._read(cell) for cell in self.cells)
        return [result for result in found if result is not None]

    def _path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        path = self._path(cell)
        return read_json(path) if path.exists() else None

    def _write_results(self) -> None:
        with replacing(self.out / "results.jsonl") as partial:
            lines = [json.dumps(result) + "\n" for result in self.results()]
            partial.write_text("".join(lines), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ScaMoError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ScaMoError(f"{path}: expected an object")
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole, and the folder that it is in if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def keep_settings(path: Path, settings: dict[str, Any], *, free: Sequence[str] = ()) -> None:
    """Write the settings of a study or grid, once it is known that the folder holds no other.

    free: keys whose values may change, because more of them may come. Raises ScaMoError for another change.
    """
    if path.exists():
        before = read_json(path)
        kept = [key for key in {**before, **settings} if key not in free]
        check_same(path, {key: before.get(key) for key in kept}, {key: settings.get(key) for key in kept})
    write_json(path, settings)


def check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ScaMoError that names the settings in which `now` differs from what is in the file `path`."""
    now = json.loads(json.dumps(now))
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        raise ScaMoError(
            f"{path.parent} holds a {path.stem} with other {', '.join(changed)}: name another out"
        )


def tail(output: str) -> str:
    """The last lines of what a process said, indented."""
    return "\n".join(f"    {line}" for line in output.splitlines()[-TAIL:])


# -- training in a process of its own ------------------------------------------------------------------------


def trained(run: str | Path) -> bool:
    """A run folder came to its end."""
    try:
        ends = read_log(Path(run) / "log.jsonl", "end")
    except (OSError, ValueError, KeyError):
        return False
    return bool(ends) and ends[-1].get("status") == 0


def train(config: RunConfig, *, ds_config: str | Path, ranks: int = 1) -> tuple[int, str]:
    """train.py in a process of its own, resumed from what is there: (exit status, output).

    Args:
        config: the run; its TOML is written beside the run folder.
        ds_config: of DeepSpeed; looked for here, then in the repository.
        ranks: processes, started by deepspeed if more than one.
    """
    folder = Path(config.training.run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    toml = folder.parent / f"{folder.name}.toml"
    with replacing(toml) as partial:
        partial.write_text("".join(_toml(config)), encoding="utf-8")
    start = [sys.executable]
    if ranks > 1:
        deepspeed = Path(sys.executable).parent / "deepspeed"
        start = [str(deepspeed), "-q", "--num_gpus", str(ranks)]
    ds_config = Path(ds_config)
    command = [*start, str(ROOT / "train.py"), "--config", str(toml), "--resume", "auto"]
    command += ["--ds_config", str(ds_config if ds_config.exists() else ROOT / ds_config)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=os.environ
    )
    return done.returncode, done.stdout


def _toml(config: RunConfig) -> Iterator[str]:
    """TOML of a run; JSON's scalars and lists are TOML's."""
    for section, values in to_dict(config).items():
        yield f"[{section}]\n"
        for key, value in values.items():
            yield f"{key} = {json.dumps(value)}\n"
