"""Work that several processes share, and that goes on after any end to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from scamo.data.dataset import JOURNAL, Caption, DatasetWriter, MotionDataset
from scamo.data.prepare.work import AHEAD, available_cores, write_pieces
from scamo.errors import ScaMoError

PIECES = 60
WIDTH = 5
ROOT = Path(__file__).resolve().parents[2]
# `python program.py OUT INPUTS WORKERS [WHAT]`: a piece reads INPUTS/NAME and takes a moment.
PROGRAM = textwrap.dedent(
    f"""
    import os, signal, sys, time
    from functools import partial
    from pathlib import Path
    from typing import NamedTuple

    import numpy as np

    from scamo.data.dataset import Caption, DatasetWriter
    from scamo.data.prepare.work import write_pieces
    from scamo.errors import ScaMoError

    class Piece(NamedTuple):
        name: str

    def files(inputs, piece):
        yield inputs / piece.name

    def make(inputs, what, piece, clips):
        number = int(piece.name)
        (inputs / "started" / piece.name).touch()
        if what == "killed" and number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fails" and number == 7:
            raise RuntimeError("seven")
        if what == "ahead" and number == 0:
            seen = -1
            while seen < (seen := len(list((inputs / "started").iterdir()))):
                time.sleep(0.5)
            clips.note("ahead", str(seen), split="train")
        rng = np.random.default_rng(int((inputs / piece.name).read_text()))
        for part in range(number % 3):
            features = rng.normal(size=(20 + number, {WIDTH})).astype(np.float32)
            captions = [Caption(f"é {{number}}"), Caption("", meta={{"n": part}}), Caption("part", 0.5, 0.9)]
            meta, notes = {{"part": (part,)}}, [("odd", "x")]
            clips.add_clip(f"{{number}}-{{part}}", features, "train", captions, meta, notes)
        if number % 3 == 0:
            clips.refuse(piece.name, "nothing in it", detail=piece.name)
        time.sleep(0.01)

    if __name__ == "__main__":
        out, inputs, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        what = sys.argv[4] if len(sys.argv) > 4 else ""
        pieces = [Piece(str(number)) for number in range({PIECES})]
        try:
            with DatasetWriter(out, feature_dim={WIDTH}, min_frames=25, resume={{}}) as writer:
                print("open", flush=True)
                making, reading = partial(make, inputs, what), partial(files, inputs)
                write_pieces(writer, pieces, making, reading, desc="x", workers=workers)
        except ScaMoError as error:
            sys.exit(f"refused: {{error}}")
    """
)


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    (folder / "started").mkdir(parents=True)
    for number in range(PIECES):
        (folder / str(number)).write_text(str(number))
    (tmp_path / "program.py").write_text(PROGRAM)
    return folder


def start(out, inputs, workers, what=""):
    return subprocess.Popen(
        [sys.executable, str(inputs.parent / "program.py"), str(out), str(inputs), str(workers), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def run(out, inputs, workers, what=""):
    """Exit status and what it said."""
    process = start(out, inputs, workers, what)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unfinished(out):
    return out.parent / f".{out.name}.unfinished"


def records(out):
    try:
        return max(0, (unfinished(out) / JOURNAL).read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return -1


def members(group):
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def whole(tmp_path, inputs):
    """What comes out if nothing goes wrong."""
    code, said = run(tmp_path / "whole", inputs, 1)
    assert (code, said) == (0, "")
    data = MotionDataset.open(tmp_path / "whole")
    # In order, however long each takes; 1-0 is too short to be kept, and so on.
    assert data.clip_names == [f"{n}-{p}" for n in range(5, PIECES) for p in range(n % 3)]
    assert data.clip_meta(0) == {"part": [0]}
    assert len(data.manifest["notes"]) == data.n_clips
    assert {entry["reason"] for entry in data.refused} == {
        "empty caption",
        "nothing in it",
        "part too short",
        "too short",
    }
    return files_of(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_end_at_any_moment_is_gone_on_from_to_the_same_bytes(tmp_path, inputs, whole, workers, sent):
    out = tmp_path / "set"
    for least in (0, 1, 20, 55):
        process = start(out, inputs, workers)
        wait_until(lambda least=least: records(out) >= least)
        if sent == signal.SIGKILL:
            process.kill()  # of this process alone: the workers have to notice
        else:
            os.killpg(process.pid, sent)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        wait_until(lambda process=process: not members(process.pid))
        assert not out.exists()
        if least:
            assert records(out) >= least
    done = records(out)
    code, said = run(out, inputs, 3 - workers)
    assert code == 0
    assert f"{done} of {PIECES} clips were done before" in said
    assert files_of(out) == whole
    assert not unfinished(out).exists()


def test_a_worker_that_dies_is_an_error_with_the_name_of_its_piece(tmp_path, inputs, whole):
    out = tmp_path / "set"
    code, said = run(out, inputs, 2, "killed")
    assert code == 1
    assert "refused: 7: the process that worked on it died of signal 9 (is there too little memory?" in said
    assert records(out) == 7
    code, said = run(out, inputs, 2, "fails")
    assert code == 1
    assert 'raise RuntimeError("seven")' in said
    assert records(out) == 7
    assert run(out, inputs, 2)[0] == 0
    assert files_of(out) == whole


def test_no_more_than_a_few_pieces_are_under_way(tmp_path, inputs):
    assert run(tmp_path / "set", inputs, 2, "ahead")[0] == 0
    notes = MotionDataset.open(tmp_path / "set").manifest["notes"]
    assert [note["reason"] for note in notes if note["name"] == "ahead"] == [str(2 * AHEAD)]


def test_what_has_changed_is_made_again(tmp_path, inputs, whole):
    out = tmp_path / "set"
    run(out, inputs, 1, "fails")
    (inputs / "5").write_text("55")
    code, said = run(out, inputs, 1)
    assert code == 0
    assert f"5 of {PIECES} clips were done before" in said
    run(tmp_path / "fresh", inputs, 1)
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert files_of(out) != whole


def test_two_processes_do_not_write_one_dataset(tmp_path, inputs, whole):
    out = tmp_path / "set"
    process = start(out, inputs, 1)
    assert process.stdout.readline() == "open\n"
    code, said = run(out, inputs, 1)
    assert code == 1
    assert "another process is writing it" in said
    process.communicate(timeout=60)
    assert files_of(out) == whole


@dataclass(frozen=True)
class Piece:
    name: str
    bad: bool = False


def make(stop, piece, clips):
    number = int(piece.name)
    if number == stop:
        raise KeyboardInterrupt
    features = np.random.default_rng(number).normal(size=(9, WIDTH))
    clips.add_clip(piece.name, features.astype(np.float32), "train", [Caption("x")])
    if piece.bad:
        clips.refuse(piece.name, "bad")


def no_files(piece):
    return ()


def write(out, stop=None, pieces=None, **options):
    pieces = [Piece(str(number)) for number in range(6)] if pieces is None else pieces
    options = {"feature_dim": WIDTH, "resume": {"a": 1}} | options
    with DatasetWriter(out, **options) as writer:
        write_pieces(writer, pieces, partial(make, stop), no_files, desc="x", progress=False)


def test_a_journal_cut_anywhere_and_lost_rows_give_the_same_bytes(tmp_path):
    """Whatever the disk has kept: of the journal up to any byte, of the features fewer rows or other ones."""
    write(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=5)
    left = files_of(unfinished(out))
    journal, features = left[JOURNAL], left["features.npy"]
    header = journal.index(b"\n") + 1
    changed = bytearray(features)
    changed[300] ^= 1
    cases = [(end, features) for end in [0, 1, header - 1, header, *range(header, len(journal), 31)]]
    cases += [(len(journal), features[:end]) for end in range(0, len(features), 97)]
    cases += [(len(journal), features + bytes(1000)), (len(journal), bytes(changed))]
    for end, rows in cases:
        unfinished(out).mkdir(exist_ok=True)
        for name, data in {
            **left,
            JOURNAL: journal[:end],
            "features.npy": rows,
            "manifest.json": b"x",
        }.items():
            (unfinished(out) / name).write_bytes(data)
        write(out)
        assert files_of(out) == whole, (end, len(rows))
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_other_settings_are_refused_or_begin_anew(tmp_path):
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=3)
    with pytest.raises(
        ScaMoError, match=r"left unfinished with other settings \(fps 20.0, now 30.0; a 1, now 2\)"
    ):
        write(out, fps=30, resume={"a": 2})
    assert records(out) == 3
    (unfinished(out) / "tokens").mkdir()
    write(out, fps=30, overwrite=True)
    write(tmp_path / "whole", fps=30)
    assert files_of(out) == files_of(tmp_path / "whole")
    with pytest.raises(ScaMoError, match="exists"):
        write(out)
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=4, overwrite=True)
    assert MotionDataset.open(out).fps == 30  # the old one, until the new one is whole
    assert records(out) == 4
    write(out, overwrite=True)
    assert MotionDataset.open(out).fps == 20


def test_strict_stops_at_a_refusal_made_before_too(tmp_path):
    out = tmp_path / "set"
    pieces = [Piece(str(number), bad=number == 1) for number in range(6)]
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=4, pieces=pieces)
    with pytest.raises(ScaMoError, match="1: bad"):
        write(out, pieces=pieces, strict=True)
    write(out, pieces=pieces)
    assert [entry["name"] for entry in MotionDataset.open(out).refused] == ["1"]


def test_what_cannot_become_a_dataset_leaves_nothing(tmp_path):
    with pytest.raises(ScaMoError, match="no clip was kept"):
        write(tmp_path / "set", pieces=[])
    with pytest.raises(ScaMoError, match="no clip was kept"):
        write(tmp_path / "set", min_frames=10)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", stop=0)
    with (
        pytest.raises(ScaMoError, match="workers = -1: expected 0 or more"),
        DatasetWriter(tmp_path / "set", resume={}) as writer,
    ):
        write_pieces(writer, [], partial(make, 0), no_files, desc="x", workers=-1)
    assert list(tmp_path.iterdir()) == []


def test_cores_are_those_of_this_process():
    program = "from scamo.data.prepare.work import available_cores; print(available_cores())"
    one = min(os.sched_getaffinity(0))
    counted = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}}); {program}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert json.loads(counted.stdout) == 1
    assert available_cores() == len(os.sched_getaffinity(0))
