"""The seal around a checkpoint; what DeepSpeed writes into it is tested in integration/test_train.py."""

import errno
import os

import pytest

from scamo.errors import ScaMoError
from scamo.training import checkpoint as ckpt


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


def save(folder, step):
    def write(target):
        (target / "state").mkdir()
        for rank in range(2):
            (target / "state" / f"shard_{rank}.pt").write_bytes(bytes([step, rank]) * 5000)
        (target / "latest").write_text("state")

    return ckpt.save_checkpoint(folder, step, write, facts={"ranks": 2}, group=ckpt.Alone())


def test_a_saved_checkpoint_verifies_and_lists_every_file(folder):
    manifest = ckpt.verify_checkpoint(folder / "step-0000020")
    assert manifest["step"] == 20
    assert manifest["ranks"] == 2
    assert set(manifest["files"]) == {"latest", "state/shard_0.pt", "state/shard_1.pt"}
    assert manifest["files"]["state/shard_1.pt"]["bytes"] == 10_000
    assert [ckpt.step_of(p) for p in ckpt.list_checkpoints(folder)] == [10, 20, 30]


def flip(path):
    data = bytearray(path.read_bytes())
    data[777] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: flip(c / "state/shard_1.pt"), ["shard_1.pt", "corrupt"]),
        (lambda c: (c / "state/shard_0.pt").unlink(), ["shard_0.pt", "missing"]),
        (
            lambda c: (c / "state/shard_0.pt").write_bytes(b"x"),
            ["shard_0.pt", "1 bytes, expected 10000"],
        ),
        (lambda c: os.truncate(c / "latest", 0), ["latest", "0 bytes, expected 5"]),
        (lambda c: os.truncate(c / "COMPLETE", 0), ["manifest.json", "SHA-256 differs from COMPLETE"]),
        (lambda c: os.truncate(c / "manifest.json", 0), ["manifest.json", "corrupt"]),
        (lambda c: (c / "COMPLETE").unlink(), ["COMPLETE", "missing"]),
        (lambda c: (c / "manifest.json").unlink(), ["manifest.json", "missing"]),
        (lambda c: (c / "manifest.json").write_text("{}"), ["manifest.json", "corrupt"]),
    ],
    ids=[
        *("flipped", "missing", "short", "emptied", "empty seal", "empty manifest"),
        *("unsealed", "no manifest", "manifest"),
    ],
)
def test_damage_is_named_and_the_previous_one_is_taken(folder, damage, words):
    newest = folder / "step-0000030"
    damage(newest)
    with pytest.raises(ScaMoError) as error:
        ckpt.verify_checkpoint(newest)
    assert all(word in str(error.value) for word in ["step-0000030", *words]), str(error.value)

    warnings = []
    found, manifest = ckpt.newest_checkpoint(folder, warn=warnings.append)
    assert found.name == "step-0000020"
    assert manifest["step"] == 20
    assert len(warnings) == 1
    assert words[0] in warnings[0]


def test_no_whole_checkpoint_is_an_error(folder, tmp_path):
    for checkpoint in ckpt.list_checkpoints(folder):
        (checkpoint / "COMPLETE").unlink()
    with pytest.raises(ScaMoError, match="none of its 3 checkpoints is whole"):
        ckpt.newest_checkpoint(folder, warn=lambda text: None)
    with pytest.raises(ScaMoError, match="no checkpoint to resume from"):
        ckpt.newest_checkpoint(tmp_path / "elsewhere")


def test_keep_counts_whole_ones_only(folder):
    save(folder, 40)
    (folder / "step-0000040" / "COMPLETE").unlink()
    ckpt.prune_checkpoints(folder, 2)
    assert [p.name for p in ckpt.list_checkpoints(folder)] == ["step-0000020", "step-0000030"]


def test_every_nth_step_is_kept(folder):
    for step in (40, 50):
        save(folder, step)
    ckpt.prune_checkpoints(folder, 1, every=20)
    kept = [p.name for p in ckpt.list_checkpoints(folder)]
    assert kept == ["step-0000020", "step-0000040", "step-0000050"]


def test_a_failing_write_leaves_no_checkpoint(folder):
    def write(target):
        (target / "half").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ckpt.save_checkpoint(folder, 40, write, facts={}, group=ckpt.Alone())
    assert ckpt.newest_checkpoint(folder)[0].name == "step-0000030"
    ckpt.remove_partial(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["step-0000010", "step-0000020", "step-0000030"]


def test_every_name_and_byte_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """A loss of power after any of these calls leaves a checkpoint that is whole, or none."""
    done = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recorded_replace(source, target):
        done.append(f"rename to {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    run = tmp_path / "run"
    run.mkdir()
    save(run / "checkpoints", 10)
    partial = f"{run}/checkpoints/step-0000010.partial"
    files = {f"{partial}/{name}" for name in ("latest", "state/shard_0.pt", "state/shard_1.pt")}
    assert set(done[:3]) == files
    assert done[3:] == [
        f"{partial}/manifest.json",
        f"{partial}/state",
        partial,
        f"{partial}/COMPLETE",
        partial,
        f"rename to {run}/checkpoints/step-0000010",
        f"{run}/checkpoints",
        str(run),
    ]


@pytest.mark.parametrize("moment", range(12))
def test_a_disk_that_fails_at_any_moment_leaves_the_checkpoints_before(folder, monkeypatch, moment):
    """The n-th of 11 syncs and renames does not happen; with all of them the checkpoint is there."""
    calls = 0

    def failing(call):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "replace", failing(os.replace))
        if moment < 11:
            with pytest.raises(OSError, match="No space left"):
                save(folder, 40)
        else:
            save(folder, 40)
    ckpt.remove_partial(folder)
    # The last two syncs come after the rename.
    newest, _ = ckpt.newest_checkpoint(folder, warn=pytest.fail)
    assert newest.name == ("step-0000040" if moment >= 9 else "step-0000030")


def test_what_is_newer_than_the_step_resumed_from_no_longer_counts(folder):
    flip(folder / "step-0000030/state/shard_0.pt")
    ckpt.unseal_after(folder, 20)
    save(folder, 25)
    ckpt.prune_checkpoints(folder, 2)
    assert [p.name for p in ckpt.list_checkpoints(folder)] == ["step-0000020", "step-0000025"]


def test_saving_a_step_again_replaces_it(folder):
    flip(folder / "step-0000030/state/shard_0.pt")
    save(folder, 30)
    ckpt.verify_checkpoint(folder / "step-0000030")


def test_missing_space(tmp_path):
    assert ckpt.missing_space(tmp_path / "not" / "yet", 1) == 0
    assert ckpt.missing_space(tmp_path, 2**62) > 2**61


def test_steps_beyond_seven_digits_sort_by_number(tmp_path):
    for step in (10_000_000, 9_999_999):
        save(tmp_path, 1).rename(tmp_path / ckpt.checkpoint_name(step))
    assert [ckpt.step_of(p) for p in ckpt.list_checkpoints(tmp_path)] == [9_999_999, 10_000_000]
