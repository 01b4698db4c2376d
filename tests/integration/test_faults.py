"""Kills, signals, damage, full disks: whatever happens, `--resume` goes on along the same curve.

One run on two ranks goes through every fault in turn. Each test starts it with --resume wherever the one
before it left it, so each also runs alone; what was logged must be the curve of a run that nothing happened
to. Faults come from outside, except that `FAULTY` stops a rank at a moment of its save by SIGSTOP.
"""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import (
    TIMEOUT,
    assert_same_weights,
    checkpoints,
    command,
    curve,
    last_step,
    start,
    train,
    wait_until,
)

from scamo.training.logging import read_log

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
if not Path("/proc/self/stat").exists():
    pytest.skip("the processes of a run are found in /proc", allow_module_level=True)

STEPS = 60
SETTINGS = [
    f"training.steps={STEPS}",
    "training.save_every=5",
    "training.keep_every=20",
    "training.validate_every=30",
]
SETTINGS = [word for setting in SETTINGS for word in ("--set", setting)]
# Within which nothing of a run may be left; the orphan guard looks once a second.
GONE = 60

FAULTY = """
'''train.py with a fault on rank FAULT_RANK.

FAULT="stop EVENT PATTERN": SIGSTOP at the first audit event EVENT whose path matches PATTERN.
FAULT="inf N": the gradient of its N-th micro-batch overflows, its loss does not.
FAULT="error N": the N-th motion cannot be read.
'''
import fnmatch, itertools, os, signal, sys

rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
fault, *arguments = os.environ["FAULT"].split() if rank == os.environ["FAULT_RANK"] else [""]
if fault == "stop":
    wanted = list(arguments)

    def stop(event, found):
        if wanted and event == wanted[0] and fnmatch.fnmatch(str(found[0]), wanted[1]):
            wanted.clear()
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(stop)
elif fault == "inf":
    import torch
    from scamo.models.prefix_lm import PrefixLM

    forward, calls = PrefixLM.hidden_states, itertools.count(1)

    def overflow(self, batch):
        hidden = forward(self, batch)
        if torch.is_grad_enabled() and next(calls) == int(arguments[0]):
            hidden.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        return hidden

    PrefixLM.hidden_states = overflow
elif fault == "error":
    from scamo.data.dataset import TokenStore

    read, calls = TokenStore.__getitem__, itertools.count(1)

    def fail(self, item):
        if next(calls) == int(arguments[0]):
            raise OSError(5, "Input/output error", "tokens.npy")
        return read(self, item)

    TokenStore.__getitem__ = fail

from scamo.training.launch import main

sys.exit(main())
"""

# Moments of a save, in the order in which rank 0 comes to them: the audit event and its path.
BEFORE_SHARDS = "stop os.mkdir *.partial/global_step*"
BEFORE_MANIFEST = "stop open *.partial/manifest.json"
BEFORE_RENAME = "stop os.rename */step-*.partial"
AFTER_RENAME = "stop open */checkpoints"

SLURM = """
'''What Slurm's daemon of this name does for `srun --ntasks=2`.'''
import os, subprocess, sys

step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
step["SLURM_STEP_NODELIST"] = "localhost"
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | step | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)})
    for k in range(2)
]
sys.exit(max([task.wait() for task in tasks]))
"""


@pytest.fixture(scope="module")
def reference(folder):
    """A run that nothing happens to. On one rank: two compute the same bits (test_train.py)."""
    train(folder, "undisturbed", 1, *SETTINGS, "--resume")
    return folder / "undisturbed"


class Run:
    """A run, and the processes that work on it."""

    def __init__(self, folder, name, ranks, reference):
        self.folder, self.name, self.ranks, self.reference = folder, name, ranks, reference
        self.path, self.output = folder / name, folder / f"{name}.out"
        (folder / "faulty.py").write_text(FAULTY)
        (folder / "slurmstepd.py").write_text(SLURM)
        self.process = None

    def start(self, fault="none", rank=0, *, slurm=False, resume="--resume"):
        """Start or go on, with a fault. slurm: by the stand-in for Slurm, which starts in half the time."""
        words = command(
            self.folder,
            self.name,
            1 if slurm else self.ranks,
            *SETTINGS,
            *resume.split(),
            script=self.folder / "faulty.py",
        )
        if slurm:
            words = [sys.executable, str(self.folder / "slurmstepd.py"), *words]
        self.begun = len(self.records("start"))
        self.text = len(self.printed())
        self.process = start(words, self.output, FAULT=fault, FAULT_RANK=str(rank))

    def records(self, kind):
        path = self.path / "log.jsonl"
        return read_log(path, kind) if path.exists() else []

    def printed(self):
        return self.output.read_text() if self.output.exists() else ""

    def news(self):
        """What was printed since the last start."""
        return self.printed()[self.text :]

    def processes(self):
        """Name -> process id of all that live: runner, launch, slurmstepd, and the ranks 0 and 1."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes()
                values = dict(
                    v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v
                )
            except OSError:
                continue
            if str(self.path).encode() + b"\0" not in words.replace(b"training.run=", b""):
                continue
            starters = (
                ("runner", b"deepspeed.launcher.runner"),
                ("launch", b"deepspeed.launcher.launch"),
                ("slurmstepd", b"slurmstepd.py"),
            )
            name = next((name for name, word in starters if word in words), "")
            number = values.get(b"RANK", values.get(b"SLURM_PROCID", b"0"))
            found[name or int(number)] = int(entry.name)
        return found

    def send(self, signum, *names):
        """Send a signal to processes by their names, to the whole group without one."""
        if not names:
            os.killpg(self.process.pid, signum)
        here = self.processes()
        for name in names:
            os.kill(here[name], signum)

    def wait_for_step(self, more):
        """Until this start has logged `more` steps."""
        wait_until(lambda: len(self.records("start")) > self.begun, self.process, self.output)
        first = self.records("start")[-1]["step"]
        wait_until(lambda: last_step(self.path) >= first + more, self.process, self.output)

    def wait_for_stop(self, rank=0):
        """Until that rank stands still at the moment that the fault names. Returns the half-made folder."""

        def stopped():
            process = self.processes().get(rank)
            try:
                state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return False
            return state == "T"

        wait_until(stopped, self.process, self.output)
        return next((self.path / "checkpoints").glob("*.partial"), None)

    def wait_for_end(self):
        """Until nothing of the run lives; what it logged must lie on the curve. Returns the exit status."""
        status = self.process.wait(TIMEOUT)
        until = time.monotonic() + GONE
        while left := self.processes():
            assert time.monotonic() < until, (left, self.printed()[-4000:])
            time.sleep(0.1)
        if self.records("start"):
            expected = curve(self.reference)
            assert all(expected[step] == values for step, values in curve(self.path).items())
        return status

    def stopped_by(self, signum):
        """The last record says so, and the checkpoint of that step is there."""
        end = self.records("end")[-1]
        assert end["status"] == 128 + signum, self.news()
        assert checkpoints(self.path)[-1] == f"step-{end['step']:07d}"
        return end["step"]

    def finish(self):
        """To the end; all is as if nothing had happened."""
        self.start(slurm=self.ranks > 1)
        assert self.wait_for_end() == 0, self.news()
        assert curve(self.path) == curve(self.reference)
        assert_same_weights(self.path, self.reference)
        assert checkpoints(self.path) == checkpoints(self.reference)


@pytest.fixture(scope="module")
def run(folder, reference):
    return Run(folder, "survivor", 2, reference)


def names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_newest_checkpoints_and_every_nth_are_kept(reference):
    assert checkpoints(reference) == [f"step-{step:07d}" for step in (20, 40, 55, 60)]


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_with_it(run):
    run.start(resume="--resume auto")
    run.wait_for_step(1)
    time.sleep(random.Random(5).random() / 4)
    run.send(signal.SIGKILL, 1)
    assert run.wait_for_end() != 0
    # Either the survivor notices first, or the launcher ends it first.
    assert run.news().count("train.py: error:") <= 1
    assert "Traceback" not in run.news()


@pytest.mark.slow
def test_everything_is_killed_before_the_shards(run):
    run.start(BEFORE_SHARDS, slurm=True)
    partial = run.wait_for_stop()
    run.send(signal.SIGKILL)
    run.wait_for_end()
    assert not any("pp_rank_0_" in name for name in names(partial))


@pytest.mark.slow
def test_the_rank_that_writes_the_manifest_is_killed(run):
    """The other rank must find out by itself: nothing here ends the tasks of a step together."""
    run.start(BEFORE_MANIFEST, slurm=True)
    partial = run.wait_for_stop()
    run.send(signal.SIGKILL, 0)
    assert run.wait_for_end() != 0
    assert run.news().count("train.py: error: rank 1: rank 0 is gone") == 1, run.news()
    assert "Traceback" not in run.news()
    left = names(partial) if partial.exists() else set()
    assert "manifest.json" not in left
    assert partial.name.removesuffix(".partial") not in checkpoints(run.path)


@pytest.mark.slow
def test_everything_is_killed_before_the_rename(run):
    run.start(BEFORE_RENAME, slurm=True)
    partial = run.wait_for_stop()
    run.send(signal.SIGKILL)
    run.wait_for_end()
    assert {"manifest.json", "COMPLETE"} < names(partial)
    assert sum(name.endswith("optim_states.pt") for name in names(partial)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["runner", "launch", "slurmstepd"])
def test_ranks_whose_launcher_is_killed_during_a_save_save_and_stop(run, victim):
    run.start(BEFORE_MANIFEST, slurm=victim == "slurmstepd")
    partial = run.wait_for_stop()
    run.send(signal.SIGKILL, victim)
    time.sleep(3)  # the guard of the other rank looks once a second
    run.send(signal.SIGCONT, 0)
    run.wait_for_end()
    step = run.stopped_by(signal.SIGTERM)
    assert step == int(partial.name[5:12]) + 1, "one more step carries the flag to all ranks"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launch", 1])
def test_sigterm_to_the_launcher_or_to_one_rank_stops_all(run, target):
    run.start()
    run.wait_for_step(1)
    run.send(signal.SIGTERM, target)
    assert run.wait_for_end() != 0
    run.stopped_by(signal.SIGTERM)


@pytest.mark.slow
def test_slurms_warning_saves_and_further_signals_do_not_break_the_save(run):
    """Slurm signals every task of a step, and with SIGTERM when it loses its patience."""
    run.start(BEFORE_MANIFEST, slurm=True)
    run.wait_for_stop()
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        run.send(signum, 0, 1)
        time.sleep(0.2)
    run.send(signal.SIGCONT, 0)
    assert run.wait_for_end() == 128 + signal.SIGUSR1
    run.stopped_by(signal.SIGUSR1)
    assert "stopped by SIGUSR1" in run.news()


@pytest.mark.slow
def test_an_overflow_in_the_gradients_of_one_rank_stops_all_before_the_step(run, folder):
    run.start("inf 2", 1, slurm=True)
    assert run.wait_for_end() == 13, run.news()
    (record,) = run.records("nan")
    assert record["what"] == "gradient"
    assert record["micro_batches"] == [0, 1]
    assert record["items"]
    assert record["step"] == last_step(run.path) + 1
    assert run.news().count("gradient is not finite; nothing was updated") == 1


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all_and_is_told_once(run):
    run.start("error 120", 1, slurm=True)
    assert run.wait_for_end() == 1
    assert run.records("start")[run.begun :], "the error came before the training"
    assert run.news().count("Input/output error: 'tokens.npy'") == 1, run.news()
    assert run.news().count("Traceback") == 1, run.news()
    assert "train.py: error: rank 1: " in run.news()


@pytest.mark.slow
def test_after_all_that_the_run_ends_as_if_nothing_had_happened(run):
    run.finish()


@pytest.mark.slow
def test_one_rank_without_a_launcher(folder, reference):
    run = Run(folder, "alone", 1, reference)
    run.start(BEFORE_RENAME)
    run.wait_for_stop()
    run.send(signal.SIGKILL)
    run.wait_for_end()
    assert checkpoints(run.path) == ["step-0000005.partial"]

    run.start(AFTER_RENAME)
    run.wait_for_stop()
    run.send(signal.SIGKILL)
    run.wait_for_end()
    assert "nothing to resume from" in run.news()
    assert checkpoints(run.path) == ["step-0000005"]

    run.start()
    run.wait_for_step(1)
    run.send(signal.SIGINT)
    assert run.wait_for_end() == 128 + signal.SIGINT
    assert "step-0000005 after 5 steps" in run.news()
    run.stopped_by(signal.SIGINT)
    run.finish()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.slow
def test_damaged_checkpoints_are_named_one_by_one(folder, reference):
    run = Run(folder, "damaged-thrice", 1, reference)
    shutil.copytree(reference, run.path)
    shutil.rmtree(run.path / "export")
    _, *damaged = [run.path / "checkpoints" / name for name in checkpoints(run.path)]
    shards = [next(checkpoint.rglob("*optim_states.pt")) for checkpoint in damaged]
    for damage, shard in zip((empty, Path.unlink, truncate), shards, strict=True):
        damage(shard)
    run.finish()
    for shard, word in zip(shards, ("0 bytes, expected", "missing", "bytes, expected"), strict=True):
        assert f"{shard}: {word}" in run.news().replace(f"{shard.stat().st_size - 1} bytes", "bytes")
    assert "step-0000020 after 20 steps" in run.news()


@pytest.mark.slow
def test_no_whole_checkpoint_is_an_error_and_nothing_is_lost(folder, reference):
    run = folder / "beyond-repair"
    shutil.copytree(reference, run)
    folders = [run / "checkpoints" / name for name in checkpoints(run)]
    damage = {
        folders[0] / "COMPLETE": Path.unlink,
        folders[1] / "manifest.json": Path.unlink,
        folders[2] / "manifest.json": empty,
        next(folders[3].rglob("*model_states.pt")): flip,
    }
    for path, change in damage.items():
        change(path)
    before = names(run)
    output = train(folder, "beyond-repair", 1, *SETTINGS, "--resume", status=2)
    for checkpoint, word in zip(
        folders, ("COMPLETE", "manifest.json", "manifest.json", "corrupt"), strict=True
    ):
        (line,) = [line for line in output.splitlines() if f"not resuming from {checkpoint.name}:" in line]
        assert word in line
    assert output.count("none of its 4 checkpoints is whole") == 1
    assert "Traceback" not in output
    assert names(run) == before


@pytest.fixture
def small_disk(folder):
    """A tmpfs of 12 MiB, folder/disk: room for the four checkpoints that stay and one more."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk, leave):
    """Write until only `leave` bytes are free."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - leave))


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_that_is_there(folder, small_disk, reference):
    run = Run(folder, "disk/run", 1, reference)
    run.output = folder / "disk.out"

    # Full after the first checkpoint: the run goes on, warns at every save, and ends with an error.
    run.start(BEFORE_RENAME)
    run.wait_for_stop()
    fill(small_disk, 2**18)
    run.send(signal.SIGCONT)
    assert run.wait_for_end() == 2
    assert "warning: step 10: not saved, the disk lacks" in run.news()
    assert f"error: {run.path}: step {STEPS}: not saved, the disk lacks" in run.news()
    assert last_step(run.path) == STEPS
    assert checkpoints(run.path) == ["step-0000005"]

    # Full before the start: it says so and does nothing.
    run.start()
    assert run.wait_for_end() == 2
    assert "more than the disk has free" in run.news()

    # Full while the shards are written, after the space was checked.
    (small_disk / "filler").unlink()
    run.start("stop os.mkdir *.partial/global_step10")
    run.wait_for_stop()
    fill(small_disk, 2**16)
    run.send(signal.SIGCONT)
    assert run.wait_for_end() == 2
    assert run.news().count("train.py: error:") == 1
    assert "step-0000010: not saved (0.0 MB free): " in run.news()
    assert "Traceback" not in run.news()
    assert checkpoints(run.path) == ["step-0000005"]

    (small_disk / "filler").unlink()
    run.start()
    assert run.wait_for_end() == 0
    assert "step-0000005 after 5 steps" in run.news()
    assert curve(run.path) == curve(reference)
    assert_same_weights(run.path, reference)
