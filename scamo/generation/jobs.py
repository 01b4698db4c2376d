"""Many sentences to a folder of motions: `scamo generate --prompts FILE -o OUT`. Any stop can be resumed.

OUT/manifest.json   format, schema_version, model (hashes, text encoder), settings, prompts, versions; when
                    all is done also files: the size and SHA-256 of motions.jsonl
OUT/motions.jsonl   a line for each motion in order: index, text, seed, sample, frames, files, SHA-256, ...
OUT/NAME.npz, ...   each motion in each format

Motions are made in chunks of CHUNK batches, and an unfinished chunk is made again from its start: what a
motion shares a batch with, and so the last bit of its rounding, does not depend on when the work was stopped.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import scamo
from scamo.data.storage import (
    DISK_ERRORS,
    decode_utf8,
    file_record,
    json_lines,
    read_manifest,
    sha256_of,
    write_manifest,
)
from scamo.errors import ScaMoError
from scamo.motion.motion import SUFFIXES, Motion

if TYPE_CHECKING:
    from scamo.generation.api import ScaMo

FORMAT = "scamo-motions"
SCHEMA_VERSION = 1
CHUNK = 4
PROMPT_SUFFIXES = (".txt", ".jsonl", ".csv")
# Of prompts without seconds of their own.
LENGTHS = ("min_tokens", "min_seconds", "max_tokens", "max_seconds")

_MOTIONS = "motions.jsonl"
_SCRATCH = ".writing"
_NAME_BYTES = 150
_BAD_NAME = re.compile(r'[\x00-\x1f/\\:*?"<>|]|^[.\s]|[.\s]$')


@dataclass(frozen=True)
class Prompt:
    """A sentence of a job, or a timeline of several.

    seed, seconds: None takes the job's; name: of its files, "" for its number. parts: of a timeline, `text`
    is then their sentences; start: the file of a motion to go on from; see `ScaMo.timeline`. extra: further
    columns, which the manifest repeats; where: file and line, for messages.
    """

    text: str
    seed: int | None = None
    seconds: float | None = None
    name: str = ""
    parts: tuple[tuple[str, float | None], ...] = ()
    start: str = ""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    where: str = ""

    @property
    def timeline(self) -> tuple[tuple[str, float | None], ...]:
        """Sentences and seconds of what `ScaMo.timeline` makes; none of what `ScaMo.generate` makes."""
        return self.parts or (((self.text, self.seconds),) if self.start else ())


def read_prompts(source: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order; the same sentence may come again.

    Args:
        source: .txt with a sentence a line (blank lines and those that start with # are skipped), .jsonl with
            an object a line, .csv with a header; "-" reads sentences from stdin. Objects and columns: "text"
            (or "prompt"), and where wanted "seed", "seconds" and "name"; others go into the manifest. Objects
            may also have "start", the file of a motion to go on from (where it is not absolute, beside
            `source`), and in place of a sentence "parts", a list of sentences or of [sentence, seconds].

    Raises:
        ScaMoError: naming the file and the line: no such file, another suffix, not UTF-8, not JSON or CSV, an
            empty sentence, a bad value, no prompts.
    """
    label, suffix = ("stdin", ".txt") if str(source) == "-" else (str(source), Path(source).suffix.lower())
    if suffix not in PROMPT_SUFFIXES:
        raise ScaMoError(f"{label}: expected prompts as {', '.join(PROMPT_SUFFIXES)}, or - for stdin")
    try:
        data = sys.stdin.buffer.read() if label == "stdin" else Path(source).read_bytes()
    except OSError as error:
        raise ScaMoError(f"{label}: cannot be read: {error.strerror}") from None
    text = decode_utf8(data, label)
    read: Callable[[str, str], Iterable[Prompt]]
    read = {".txt": _from_text, ".jsonl": _from_objects, ".csv": _from_table}[suffix]
    prompts = list(read(label, text))
    if not prompts:
        raise ScaMoError(f"{label}: holds no prompts")
    return prompts


def _from_text(label: str, text: str) -> Iterator[Prompt]:
    # Not splitlines: a sentence may hold U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _prompt(f"{label}:{number}", {"text": line})


def _from_objects(label: str, text: str) -> Iterator[Prompt]:
    for where, entry in json_lines(text, label):
        if isinstance(entry.get("start"), str):
            entry["start"] = str(Path(label).parent / entry["start"])
        yield _prompt(where, entry, timelines=True)


def _from_table(label: str, text: str) -> Iterator[Prompt]:
    rows = csv.DictReader((f"{line}\n" for line in text.split("\n")), strict=True, skipinitialspace=True)
    try:
        for row in rows:
            where = f"{label}:{rows.line_num}"
            if None in row or None in row.values():
                raise ScaMoError(f"{where}: expected {len(rows.fieldnames or ())} columns, as in the header")
            entry: dict[str, Any] = {key.strip(): value for key, value in row.items() if value.strip()}
            for key, kind in (("seed", int), ("seconds", float)):
                if key in entry:
                    try:
                        entry[key] = kind(entry[key])
                    except ValueError:
                        raise ScaMoError(f"{where}: {key} is {entry[key]!r}, expected a number") from None
            yield _prompt(where, entry)
    except csv.Error as error:
        raise ScaMoError(f"{label}:{rows.line_num}: not valid CSV: {error}") from None


def _prompt(where: str, entry: dict[str, Any], timelines: bool = False) -> Prompt:
    """The prompt of an object or a row; timelines: whether it may have parts and start. Raises ScaMoError."""
    extra = dict(entry)
    sentences = [key for key in ("text", "prompt", "parts")[: 3 if timelines else 2] if key in entry]
    if len(sentences) > 1:
        raise ScaMoError(f'{where}: has "{sentences[0]}" and "{sentences[1]}": give one of them')
    if not sentences:
        raise ScaMoError(f'{where}: no sentence: expected "text", found {sorted(entry)}')
    text, seed, seconds = extra.pop(sentences[0]), extra.pop("seed", None), extra.pop("seconds", None)
    name, start = extra.pop("name", ""), extra.pop("start", "") if timelines else ""
    parts: tuple[tuple[str, float | None], ...] = ()
    if sentences[0] == "parts":
        if seconds is not None:
            raise ScaMoError(f"{where}: seconds: give them in parts, to each")
        if not isinstance(text, list) or not text:
            raise ScaMoError(f"{where}: parts is {text!r}, expected a list of [sentence, seconds]")
        parts = tuple(_part(f"{where}: part {index}", part) for index, part in enumerate(text))
        text = ", then ".join(sentence for sentence, _ in parts)
    text = _sentence(where, sentences[0], text)
    if seed is not None and type(seed) is not int:
        raise ScaMoError(f"{where}: seed is {seed!r}, expected a whole number")
    _check_seconds(where, seconds)
    if not isinstance(start, str):
        raise ScaMoError(f"{where}: start is {start!r}, expected the file of a motion")
    if not isinstance(name, str) or (name and not _is_name(name)):
        raise ScaMoError(f"{where}: name is {name!r}, expected a plain file name without a suffix")
    try:
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ScaMoError(f"{where}: not valid Unicode: {text.strip()!a}") from None
    except ValueError:
        raise ScaMoError(f"{where}: holds NaN or infinity, which the manifest cannot repeat") from None
    return Prompt(text, seed, seconds, name, parts, start, extra, where)


def _part(where: str, part: Any) -> tuple[str, float | None]:
    """A sentence, or one with its seconds, of a timeline."""
    pair = [part, None] if isinstance(part, str) else part
    if not isinstance(pair, list) or len(pair) != 2:
        raise ScaMoError(f"{where} is {part!r}, expected a sentence or [sentence, seconds]")
    _check_seconds(where, pair[1])
    return _sentence(where, "its text", pair[0]), pair[1]


def _sentence(where: str, key: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ScaMoError(f"{where}: {key} is {text!r}, expected a sentence")
    if not text.strip():
        raise ScaMoError(f"{where}: an empty sentence")
    return text.strip()


def _check_seconds(where: str, seconds: Any) -> None:
    if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds < float("inf")):
        raise ScaMoError(f"{where}: seconds is {seconds!r}, expected a number above 0")


def _is_name(name: str) -> bool:
    return not _BAD_NAME.search(name) and len(name.encode(errors="replace")) <= _NAME_BYTES


def prompts_of(texts: Sequence[str], seeds: Sequence[int] = ()) -> list[Prompt]:
    """Prompts of plain sentences; seeds: none, or one for each. Raises ScaMoError naming the sentence."""
    if seeds and len(seeds) != len(texts):
        raise ScaMoError(f"{len(seeds)} seeds for {len(texts)} prompts: expected one for each")
    prompts = [_prompt(f"prompt {index}", {"text": text}) for index, text in enumerate(texts)]
    return [replace(p, seed=s) for p, s in zip(prompts, seeds, strict=True)] if seeds else prompts


def check_formats(formats: str | Sequence[str]) -> tuple[str, ...]:
    """ "npz,bvh" or a list -> (".npz", ".bvh"). Raises ScaMoError for none, an unknown one, or one twice."""
    names = formats.split(",") if isinstance(formats, str) else list(formats)
    suffixes = tuple(f".{name.strip().lower().removeprefix('.')}" for name in names)
    for suffix in suffixes:
        if suffix not in SUFFIXES:
            expected = ", ".join(known[1:] for known in SUFFIXES)
            raise ScaMoError(f"format {suffix[1:]!r}: expected some of {expected}, with commas between")
    if not suffixes or len(set(suffixes)) < len(suffixes):
        raise ScaMoError(f"formats {formats!r}: expected each once")
    return suffixes


def generate_folder(
    run: str | Path,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    formats: str | Sequence[str] = "npz",
    seed: int = 0,
    samples: int | None = None,
    best_of: int | None = None,
    evaluator: str | Path | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "float32",
    text_encoder: str | None = None,
    ema: bool | None = None,
    foot_lock: bool = False,
    smooth: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Generate a motion for each prompt into a folder, or go on where an earlier call was stopped.

    The folder is the same to the byte, however often the work was stopped, `kill -9` included (on one
    machine: others may round differently). Two prompts of the same text and seed get the same motion. The
    memory is that of the prompts and of one chunk of motions.

    Args:
        run: a training run or an exported model.
        prompts: from `read_prompts` or `prompts_of`.
        out: the folder; a new one, or one that the same call began.
        formats: suffixes of the files of each motion.
        seed: of prompts without their own.
        samples, best_of, evaluator, batch_size, settings: as `ScaMo.generate` has them. A prompt's own
            seconds, and its parts, go before settings; best_of is of sentences without parts and start only.
            A prompt with parts or start knows no limits but its seconds.
        device, dtype, text_encoder, ema: as `ScaMo.load` has them.
        foot_lock, smooth: see `Motion.cleaned`.
        overwrite: begin again in a folder of motions.
        progress: show a bar where stderr is a terminal, and notes.

    Returns:
        `out`.

    Raises:
        ScaMoError: before anything is written: a bad option, prompt, name or model; `out` is something else
            or was begun with other settings, prompts or weights (which are named); another process writes
            there. Later: the disk is full.
    """
    from scamo.device import resolve_device
    from scamo.evaluation.evaluator import load_evaluator
    from scamo.generation.api import ScaMo
    from scamo.generation.export import identify

    out = Path(out)
    suffixes = check_formats(formats)
    if not prompts:
        raise ScaMoError("no prompts to generate from")
    target = resolve_device(device)
    judge = None if evaluator is None else load_evaluator(evaluator, target)
    whole = settings.get("seconds")
    prompts = [
        replace(
            p,
            seed=seed if p.seed is None else p.seed,
            seconds=whole if p.seconds is None and not p.parts else p.seconds,
        )
        for p in prompts
    ]
    stems = _stems(prompts, samples)
    starts = _hashes(prompts)
    model = identify(run, ema)
    if text_encoder is not None:
        model["text_encoder"] = text_encoder
    header = _header(
        {"folder": str(run)} | model,
        [{**asdict(p), "where": "", "start": starts.get(p.start, "")} for p in prompts],
        {
            "formats": [suffix[1:] for suffix in suffixes],
            "seed": seed,
            "samples": samples,
            "best_of": best_of,
            "evaluator": judge and {"name": judge.name, "sha256": judge.sha256},
            "batch_size": batch_size,
            "device": target.type,
            "dtype": dtype,
            "foot_lock": foot_lock,
            "smooth": smooth,
        }
        | settings,
    )
    options = {"samples": samples, "best_of": best_of, "evaluator": judge, "batch_size": batch_size}

    def finish(motion: Motion) -> Motion:
        clean = foot_lock or smooth is not None
        return motion.cleaned(foot_lock=foot_lock, smooth=smooth) if clean else motion

    begun = _is_begun(out, header, overwrite)
    notes = _Notes(progress)
    count = samples or best_of or 1
    chunk = max(1, CHUNK * max(1, batch_size) // count)
    with contextlib.ExitStack() as stack:
        # A motion counts when it has its tokens. tqdm writes to terminals only, where `disable` is None.
        bar = stack.enter_context(
            tqdm(total=len(prompts) * count, desc=out.name, unit="motion", dynamic_ncols=True, mininterval=1,
                 disable=None if progress else True)
        )  # fmt: skip
        done = size = 0
        if (out / "manifest.json").is_file():
            stack.enter_context(_locked(out))
        if begun:
            done, size = _finished(out, [len(g) for g in stems], chunk, notes)
            bar.update(done * count)
        if done < len(prompts):
            loaded = ScaMo.load(run, target, dtype=dtype, text_encoder=text_encoder, ema=ema)
            _check(loaded, prompts, options, settings)
            notes.about(prompts)
            with _disk_errors(out):
                if not begun:
                    _begin(out, header)
                    stack.enter_context(_locked(out))
                (out / _SCRATCH).mkdir(exist_ok=True)
                with open(out / _MOTIONS, "r+b" if begun and size else "wb") as file:
                    file.truncate(size)
                    file.seek(size)
                    for start in range(done, len(prompts), chunk):
                        part = range(start, min(start + chunk, len(prompts)))
                        made = _generate(loaded, [prompts[i] for i in part], options, settings, bar.update)
                        lines = []
                        for index, motions in zip(part, made, strict=True):
                            for stem, motion in zip(stems[index], motions, strict=True):
                                final = finish(motion)
                                files = _save(final, out, [f"{stem}{suffix}" for suffix in suffixes])
                                lines.append(_line(index, prompts[index], starts, final, files))
                        file.write("".join(lines).encode())
                        file.flush()
                        os.fsync(file.fileno())
        with _disk_errors(out):
            if done == len(prompts):
                os.truncate(out / _MOTIONS, size)
            _write_header(out, header | {"files": {_MOTIONS: file_record(out / _MOTIONS)}})
    return out


class _Notes:
    """What the user should know, on stderr, above the bar."""

    def __init__(self, show: bool) -> None:
        self.show = show

    def say(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def about(self, prompts: Sequence[Prompt]) -> None:
        key = attrgetter("text", "seed", "seconds", "parts", "start")
        twice = sum(n - 1 for n in Counter(map(key, prompts)).values())
        if twice:
            self.say(f"note: {twice} prompts occur again with the same seed: they get the same motion")
        extra = sorted({key for p in prompts for key in p.extra})
        if extra:
            self.say(f"note: {', '.join(extra)}: only repeated in {_MOTIONS}")


def _stems(prompts: Sequence[Prompt], samples: int | None) -> list[list[str]]:
    """For each prompt the names, without suffix, of its motions."""
    taken: dict[str, str] = {}
    stems = []
    for index, prompt in enumerate(prompts):
        name = prompt.name or f"{index:06d}"
        # As file systems compare names that know no case.
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in taken:
            raise ScaMoError(f"{prompt.where}: the name {name!r} is taken by {taken[plain]}")
        taken[plain] = prompt.where
        width = len(str((samples or 1) - 1))
        stems.append([name] if samples is None else [f"{name}-{n:0{width}d}" for n in range(samples)])
    return stems


def _hashes(prompts: Sequence[Prompt]) -> dict[str, str]:
    """SHA-256 of each file that a prompt starts from. Raises ScaMoError naming the prompt."""
    found: dict[str, str] = {}
    for prompt in prompts:
        if prompt.start and prompt.start not in found:
            try:
                found[prompt.start] = sha256_of(Path(prompt.start))
            except OSError as error:
                raise ScaMoError(f"{prompt.where}: start {prompt.start}: {error.strerror}") from None
    return found


def _header(
    model: dict[str, Any], prompts: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    import numpy
    import torch
    import transformers

    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt, sort_keys=True).encode() + b"\n")
    header = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "settings": settings,
        "prompts": {"count": len(prompts), "sha256": digest.hexdigest()},
        "versions": {
            "scamo": scamo.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "transformers": transformers.__version__,
        },
    }
    return json.loads(json.dumps(header))  # as it will be read


def _is_begun(out: Path, header: dict[str, Any], overwrite: bool) -> bool:
    """Whether there is a job to go on with. Raises ScaMoError when there is anything else in the way."""
    if not os.path.lexists(out):
        return False
    if not out.is_dir():
        raise ScaMoError(f"{out}: is not a folder")
    if not (out / "manifest.json").is_file():
        if any(path.name != _SCRATCH for path in out.iterdir()):
            raise ScaMoError(f"{out} exists and holds no motions of this command: choose another folder")
        return False
    stored = read_manifest(out, format=FORMAT, schema_version=SCHEMA_VERSION)
    if overwrite:
        return False
    before, now = _flat(stored), _flat(header)
    other = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and key != "model.folder" and not key.startswith("files.")
    ]
    if other:
        raise ScaMoError(
            f"{out}: was begun otherwise: {'; '.join(other[:4])}"
            f"{f'; and {len(other) - 4} more' if len(other) > 4 else ''}: "
            "choose another folder, or ask for it to be overwritten"
        )
    return True


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, one in value.items():
        flat |= _flat(one, f"{prefix}{key}.") if isinstance(one, dict) else {f"{prefix}{key}": one}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[1:13]}…" if re.fullmatch(r'"[0-9a-f]{64}"', text) else text


def _finished(out: Path, counts: Sequence[int], chunk: int, notes: _Notes) -> tuple[int, int]:
    """Prompts of the leading chunks whose files are as motions.jsonl says, and the bytes of their lines."""
    done = size = 0
    with contextlib.suppress(FileNotFoundError), open(out / _MOTIONS, "rb") as file:
        while done < len(counts):
            part = counts[done : done + chunk]
            lines = [file.readline() for _ in range(sum(part))]
            if not lines[-1].endswith(b"\n"):
                break
            wrong = next((name for line in lines for name in _wrong_files(out, line)), None)
            if wrong is not None:
                notes.say(f"{out / wrong}: missing or changed since; what comes from there on is made again")
                break
            done, size = done + len(part), size + sum(map(len, lines))
    notes.say(f"{out}: {done} of {len(counts)} prompts are done")
    return done, size


def _wrong_files(out: Path, line: bytes) -> Iterator[str]:
    try:
        files = {name: record["sha256"] for name, record in json.loads(line)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield _MOTIONS
        return
    for name, digest in files.items():
        path = out / name
        if not path.is_file() or sha256_of(path) != digest:
            yield name


def _check(
    model: ScaMo, prompts: Sequence[Prompt], options: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """All that `generate` would refuse, before hours of work."""
    model.generate([], **options, **settings)
    sampling = _sampling(settings)
    single = {(p.timeline, p.start) if p.timeline else p.seconds: p for p in prompts}
    for prompt in single.values():
        try:
            if prompt.timeline and options["best_of"]:
                raise ScaMoError("best_of: not of a prompt with parts or start")
            if prompt.timeline:
                model.check_timeline(prompt.timeline, prompt.start or None)
            elif prompt.seconds is not None:
                model.stream("any", seconds=prompt.seconds, **sampling)
        except ScaMoError as error:
            raise ScaMoError(f"{prompt.where}: {error}") from None


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in (*LENGTHS, "seconds")}


def _begin(out: Path, header: dict[str, Any]) -> None:
    if (out / "manifest.json").is_file():  # to be overwritten
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_header(out, header)


def _write_header(out: Path, header: dict[str, Any]) -> None:
    scratch = out / _SCRATCH
    scratch.mkdir(exist_ok=True)
    write_manifest(scratch, header)
    os.replace(scratch / "manifest.json", out / "manifest.json")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One writer at a time, where the system can tell; what it left unfinished goes with it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl

            descriptor = os.open(out, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScaMoError(f"{out}: another process is writing there") from None
        stack.callback(shutil.rmtree, out / _SCRATCH, ignore_errors=True)
        yield


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise ScaMoError(
                f"{out}: cannot be written: {error.strerror}; the same call goes on from here"
            ) from error
        raise


def _generate(
    model: ScaMo,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    finished: Callable[[], object],
) -> list[list[Motion]]:
    """The motions of each prompt. Those with a length of their own go together, and so do timelines."""
    from scamo.generation.long import Timeline

    made: list[list[Motion]] = [[] for _ in prompts]
    kinds = ["line" if p.timeline else "plain" if p.seconds is None else "timed" for p in prompts]
    for kind in sorted(set(kinds)):
        part = [index for index, one in enumerate(kinds) if one == kind]
        own = dict(settings) if kind == "plain" else _sampling(settings)
        seeds = [prompts[i].seed or 0 for i in part]
        found: Sequence[Motion | list[Motion]]
        if kind == "line":
            lines = [
                Timeline(prompts[i].timeline, prompts[i].start or None, seed)
                for i, seed in zip(part, seeds, strict=True)
            ]
            shared = {key: options[key] for key in ("samples", "batch_size")}
            found = model.timelines(lines, finished=lambda _: finished(), **shared, **own)
        else:
            own["seconds"] = [prompts[i].seconds for i in part] if kind == "timed" else None
            found = model.generate(
                [prompts[i].text for i in part], seed=seeds, finished=lambda _: finished(), **options, **own
            )
        for i, motions in zip(part, found, strict=True):
            made[i] = motions if isinstance(motions, list) else [motions]
    return made


def _save(motion: Motion, out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write the files of a motion, each whole or not at all; their sizes and hashes by name."""
    files = {}
    for name in names:
        written = out / _SCRATCH / name
        motion.save(written)
        files[name] = file_record(written)
        os.replace(written, out / name)
    return files


def _line(
    index: int, prompt: Prompt, starts: Mapping[str, str], motion: Motion, files: Mapping[str, Any]
) -> str:
    line: dict[str, Any] = {"index": index, "text": prompt.text, "seed": prompt.seed, "sample": 0}
    if prompt.name:
        line["name"] = prompt.name
    if prompt.seconds is not None:
        line["seconds"] = prompt.seconds
    if prompt.start:
        line["start"] = {"name": Path(prompt.start).name, "sha256": starts[prompt.start]}
    line |= motion.meta | {"frames": len(motion), "files": dict(files)}
    if prompt.extra:
        line["extra"] = prompt.extra
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
