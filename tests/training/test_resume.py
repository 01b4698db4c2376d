"""Two ranks' checkpoints on one and four ranks; whole runs: integration/test_world_size.py."""

import pytest
import torch

from scamo.errors import ScaMoError
from scamo.training import checkpoint as ckpt
from scamo.training.resume import conversion_bytes, find_source

SAVED, STEPS = 2, 4  # of shards.py


def read(folder, step):
    return torch.load(folder / f"state-{step}.pt", weights_only=True)


@pytest.mark.parametrize("ranks", ["one", pytest.param("four", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "variant", ["1-bf16", "2-fp32", "3-bf16", "3-offload-fp32", "1-bf16-to-2-offload-fp32"]
)
def test_the_state_is_the_same_at_once_and_the_next_steps_go_on(variant, ranks, saved, request):
    folder = request.getfixturevalue(f"continued_by_{ranks}") / variant
    before, after = read(saved / variant, SAVED), read(folder, SAVED)
    assert before["tensors"].keys() == after["tensors"].keys()
    assert len(before["tensors"]) == 4 * 6
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name
    # The loader of DeepSpeed would give all groups the first one's decay, and count a step per partition.
    assert after["decays"] == before["decays"] == [0.1, 0.0]
    for step in (SAVED, STEPS):
        assert read(folder, step)["counts"] == [step]

    # bfloat16 and float32 have other gradients; else only the last bits of AdamW differ.
    tolerance = 3e-3 if "-to-" in variant else 1e-6
    expected, found = (read(f, STEPS)["tensors"] for f in (saved / variant, folder))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < tolerance, name


def test_nothing_is_left_of_a_conversion(saved, continued_by_one):
    for variant in saved.iterdir():
        assert [p.name for p in variant.iterdir() if p.is_dir()].count("step-0000002.universal.partial") == 0
        ckpt.verify_checkpoint(variant / "step-0000002")


def save(folder, **facts):
    def write(target):
        (target / "global_step3").mkdir()
        (target / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x" * 1000)

    facts = {"ranks": 2, "zero_stage": 3, "precision": "bf16", "tag": "global_step3"} | facts
    return ckpt.save_checkpoint(folder, 3, write, facts=facts, group=ckpt.Alone())


NOW = {"ranks": 1, "zero_stage": 3, "precision": "bf16"}


def test_without_a_checkpoint_there_is_no_source(tmp_path):
    assert find_source(tmp_path / "checkpoints", NOW, ckpt.Alone(), print) is None


def test_the_same_ranks_stage_and_precision_are_read_as_they_are(tmp_path):
    folder = save(tmp_path, ranks=1)
    source = find_source(tmp_path, NOW, ckpt.Alone(), print)
    assert (source.folder, source.step, source.converted) == (folder, 3, None)


@pytest.mark.parametrize(("before", "now"), [(3, 1), (3, 2), (1, 3), (2, 3)])
def test_deepspeed_does_not_convert_between_stage_3_and_the_others(tmp_path, before, now):
    save(tmp_path, zero_stage=before)
    with pytest.raises(ScaMoError, match=f"saved with ZeRO stage {before}, this run has {now}"):
        find_source(tmp_path, NOW | {"zero_stage": now}, ckpt.Alone(), print)


def test_the_space_of_a_conversion():
    """Seen with 50 million parameters: 36 bytes each from the 12 of one ZeRO-3 rank, 24 from ZeRO-2's 14."""
    manifest = {"ranks": 1, "zero_stage": 3, "tag": "global_step3"}
    manifest["files"] = {"global_step3/a.pt": {"bytes": 12_000}, "ema/00000.safetensors": {"bytes": 4000}}
    assert 36_000 <= conversion_bytes(manifest) < 40_000
    assert 24_000 <= conversion_bytes(manifest | {"zero_stage": 2}) < 30_000


def test_a_conversion_needs_room(tmp_path, monkeypatch):
    checkpoint = save(tmp_path)
    monkeypatch.setattr("scamo.training.resume.MARGIN", 1e15)
    lines = []
    with pytest.raises(ScaMoError, match="GB more than the disk has free"):
        find_source(tmp_path, NOW, ckpt.Alone(), lines.append)
    assert lines == [
        f"{checkpoint}: saved with 2 ranks, ZeRO stage 3, bf16; converting it for 1 rank, ZeRO stage 3, bf16"
    ]
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]


def test_a_conversion_that_fails_says_why_and_leaves_nothing(tmp_path):
    pytest.importorskip("deepspeed")
    checkpoint = save(tmp_path)
    (tmp_path / "step-0000001.partial").mkdir()
    with pytest.raises(ScaMoError, match="DeepSpeed could not convert it: "):
        find_source(tmp_path, NOW, ckpt.Alone(), print)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]
    ckpt.verify_checkpoint(checkpoint)
