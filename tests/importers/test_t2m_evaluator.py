"""Importing Guo et al.'s evaluator: where its files are found, and what is refused.

The networks are compared with the published ones in tests/evaluation/test_guo.py.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.guo import GuoEvaluator, GuoNetworks, Sizes
from scamo.evaluation.word_vectors import GLOVE_FILES, WordVectors
from scamo.importers.t2m_evaluator import NETWORKS, import_t2m_evaluator

WORDS = ["unk", "sos", "eos", "a", "man"]
VECTORS = np.random.default_rng(0).normal(size=(5, 6))


def weights(features: int = 263) -> dict[str, torch.Tensor]:
    sizes = Sizes(features, 12, 10, 16, 8, 6, 14)
    generator = torch.Generator().manual_seed(0)
    state = GuoNetworks(sizes).state_dict()
    return {name: torch.randn(value.shape, generator=generator) / 4 for name, value in state.items()}


def nested(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    content: dict[str, dict[str, torch.Tensor]] = {network: {} for network in NETWORKS}
    for name, value in state.items():
        network, _, rest = name.partition(".")
        content[network][rest] = value
    return content


def statistics(features: int = 263, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=features), rng.uniform(0.1, 0.4, features)
    mean[-4:], std[:4] = 0.8, std[:4] / 25
    std[-4:] = 0.4 / 25  # of values that are 1 in 0.8 of the frames, else 0
    return mean, std


def write_meta(folder: Path, mean: np.ndarray, std: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "mean.npy", mean)
    np.save(folder / "std.npy", std)


def write_glove(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / GLOVE_FILES[0], VECTORS)
    (folder / GLOVE_FILES[1]).write_bytes(pickle.dumps(WORDS))
    (folder / GLOVE_FILES[2]).write_bytes(pickle.dumps({word: i for i, word in enumerate(WORDS)}))


def write_checkpoint(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


@pytest.fixture
def t2m(tmp_path) -> Path:
    """The folder as published, with other models of the authors beside the evaluator."""
    folder = tmp_path / "t2m"
    write_checkpoint(folder / "text_mot_match/model/finest.tar", nested(weights()) | {"epoch": 55})
    write_checkpoint(folder / "Comp_v6_KLD005/model/finest.tar", {"text_enc": {}})
    write_meta(folder / "Comp_v6_KLD005/meta", *statistics())
    write_meta(folder / "Decomp_SP001_SM001_H512/meta", *statistics(seed=5))
    write_glove(folder / "glove")
    return folder


def same(folder: Path, features: int = 263) -> None:
    """The evaluator in `folder` is the one made of the parts."""
    mean, std = statistics(features)
    expected = GuoEvaluator.from_parts(weights(features), mean, std, WordVectors(VECTORS, WORDS))
    found = load_evaluator(folder)
    rng = np.random.default_rng(2)
    motions = [(mean + std * rng.normal(size=(n, features))).astype(np.float32) for n in (40, 81, 196)]
    np.testing.assert_array_equal(found.embed_motions(motions), expected.embed_motions(motions))
    tagged = ["a/DET man/NOUN", "man/NOUN x/X"]
    np.testing.assert_array_equal(
        found.embed_texts(["-", "-"], tagged), expected.embed_texts(["-", "-"], tagged)
    )
    assert found.fps == expected.fps


def test_the_published_layout(t2m, tmp_path):
    assert import_t2m_evaluator(t2m, tmp_path / "out") == tmp_path / "out"
    same(tmp_path / "out")
    loaded = load_evaluator(tmp_path / "out")
    assert isinstance(loaded, GuoEvaluator)
    assert loaded.provenance["epoch"] == 55
    files = {entry["name"]: entry["sha256"] for entry in loaded.provenance["files"]}
    assert set(files) == {"finest.tar", "mean.npy", "std.npy", *GLOVE_FILES}
    assert files["finest.tar"] == sha256_of(t2m / "text_mot_match/model/finest.tar")


def test_kit(tmp_path):
    folder = tmp_path / "kit"
    write_checkpoint(folder / "text_mot_match/model/finest.tar", nested(weights(251)))
    write_meta(folder / "Comp_v6_KLD005/meta", *statistics(251))
    write_glove(folder / "glove")
    same(import_t2m_evaluator(folder, tmp_path / "out"), 251)
    assert load_evaluator(tmp_path / "out").fps == 12.5


def test_old_checkpoints_and_wrapped_names(t2m, tmp_path):
    """The format before torch 1.6, and names that a data-parallel wrapper has changed."""
    path = t2m / "text_mot_match/model/finest.tar"
    content = nested(weights())
    content["motion_encoder"] = {f"module.{name}": w for name, w in content["motion_encoder"].items()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    same(import_t2m_evaluator(t2m, tmp_path / "out"))


def test_a_file_and_its_companions(t2m, tmp_path):
    checkpoint = t2m / "text_mot_match/model/finest.tar"
    meta, glove = t2m / "Comp_v6_KLD005/meta", t2m / "glove"
    given = {"mean": meta / "mean.npy", "std": meta / "std.npy"}
    same(import_t2m_evaluator(checkpoint, tmp_path / "out", **given, glove=glove))
    with pytest.raises(ScaMoError, match="finest.tar is a file: give mean and std"):
        import_t2m_evaluator(checkpoint, tmp_path / "x", glove=glove)
    with pytest.raises(ScaMoError, match="finest.tar is a file: give the folder with the word vectors"):
        import_t2m_evaluator(checkpoint, tmp_path / "x", **given)
    with pytest.raises(ScaMoError, match="give both or neither"):
        import_t2m_evaluator(t2m, tmp_path / "x", mean=given["mean"])
    with pytest.raises(ScaMoError, match="none: no such file or folder"):
        import_t2m_evaluator(t2m / "none", tmp_path / "x")


def test_given_files_go_first(t2m, tmp_path):
    aside = tmp_path / "aside"
    shutil.move(t2m / "glove", aside / "glove")
    shutil.move(t2m / "Comp_v6_KLD005/meta", aside / "meta")
    write_glove(t2m / "one")
    write_glove(t2m / "two")
    with pytest.raises(ScaMoError, match=r"2 times our_vab_data.npy .*one, .*two; give the folder"):
        import_t2m_evaluator(t2m, tmp_path / "x")
    given = {"mean": aside / "meta/mean.npy", "std": aside / "meta/std.npy"}
    same(import_t2m_evaluator(t2m, tmp_path / "out", **given, glove=aside / "glove"))


def test_missing_files(t2m, tmp_path):
    def expect(message: str) -> None:
        with pytest.raises(ScaMoError, match=message):
            import_t2m_evaluator(t2m, tmp_path / "x")

    (t2m / "glove" / GLOVE_FILES[1]).unlink()
    expect("our_vab_words.pkl: no such file")
    shutil.rmtree(t2m / "glove")
    expect(r"t2m: no our_vab_data.npy \(the word vectors\) below it: give the folder")
    for meta in t2m.glob("*/meta/std.npy"):
        meta.unlink()
    expect("t2m: no mean.npy with a std.npy beside it below it: give mean and std")
    for path in t2m.glob("*/model/finest.tar"):
        path.unlink()
    expect(r"t2m: no finest.tar \(the weights\) below it: give the file itself")
    assert not (tmp_path / "x").exists()


def test_several_candidates(t2m, tmp_path):
    """Copies of the same statistics are no question, others are; so is the evaluator of another dataset."""
    write_meta(t2m / "Comp_v6_KLD01/meta", *statistics())
    same(import_t2m_evaluator(t2m, tmp_path / "out"))
    mean, std = statistics()
    write_meta(t2m / "Comp_v6_KLD01/meta", mean + 1, std)
    with pytest.raises(ScaMoError, match=r"2 times mean.npy .*KLD005/meta, .*KLD01/meta; give mean and std"):
        import_t2m_evaluator(t2m, tmp_path / "x")
    kit = t2m.parent / "kit/text_mot_match/model/finest.tar"
    write_checkpoint(kit, nested(weights(251)))
    with pytest.raises(ScaMoError, match=r"2 times finest.tar .*kit/.*, .*t2m/.*; give the file itself"):
        import_t2m_evaluator(t2m.parent, tmp_path / "x")


def test_other_statistics_serve_where_there_are_no_better(t2m, tmp_path):
    shutil.rmtree(t2m / "Comp_v6_KLD005")
    shutil.rmtree(t2m / "Decomp_SP001_SM001_H512")
    write_meta(t2m / "VQVAEV3_CB1024_CMT_H1024_NRES3/meta", *statistics())
    same(import_t2m_evaluator(t2m, tmp_path / "out"))


def test_an_existing_folder(t2m, tmp_path):
    out = import_t2m_evaluator(t2m, tmp_path / "out")
    with pytest.raises(ScaMoError, match="out exists"):
        import_t2m_evaluator(t2m, out)
    same(import_t2m_evaluator(t2m, out, overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(ScaMoError, match="mine exists and has no manifest.json"):
        import_t2m_evaluator(t2m, tmp_path / "mine", overwrite=True)


def test_checkpoints_that_do_not_fit(t2m, tmp_path):
    path, content = t2m / "text_mot_match/model/finest.tar", nested(weights())

    def expect(message: str, value: object) -> None:
        torch.save(value, path)
        with pytest.raises(ScaMoError, match=message):
            import_t2m_evaluator(t2m, tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def changed(network: str, name: str, value: torch.Tensor | None) -> dict:
        part = {k: v for k, v in (content[network] | {name: value}).items() if v is not None}
        return content | {network: part}

    expect("finest.tar: no key 'text_encoder'", {k: v for k, v in content.items() if k != "text_encoder"})
    expect("finest.tar: 'text_encoder' is a int", content | {"text_encoder": 3})
    expect("finest.tar: holds a list", [1])
    expect(
        "finest.tar: .*missing motion_encoder.gru.bias_hh_l0_reverse",
        changed("motion_encoder", "gru.bias_hh_l0_reverse", None),
    )
    expect("finest.tar: .*unknown text_encoder.more", changed("text_encoder", "more", torch.zeros(1)))
    expect(
        r"finest.tar: .*text_encoder.pos_emb.weight is \(6, 16\), expected \(6, 15\)",
        changed("text_encoder", "pos_emb.weight", torch.zeros(6, 16)),
    )
    expect(
        "text_encoder.hidden holds values that are not finite",
        changed("text_encoder", "hidden", torch.full((2, 1, 8), torch.inf)),
    )
    expect(r"mean.npy: shape \(263,\), expected \(251,\)", nested(weights(251)))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ScaMoError, match="finest.tar: not a torch checkpoint"):
        import_t2m_evaluator(t2m, tmp_path / "x")


def test_statistics_that_do_not_fit(t2m, tmp_path):
    folder = t2m / "Comp_v6_KLD005/meta"
    mean, std = statistics()

    def expect(message: str, mean: np.ndarray = mean, std: np.ndarray = std) -> None:
        write_meta(folder, mean, std)
        with pytest.raises(ScaMoError, match=message):
            import_t2m_evaluator(t2m, tmp_path / "x")

    at = np.arange(263) == 5
    expect("meta/mean.npy: value 5 is inf", mean=np.where(at, np.inf, mean))
    expect("meta/std.npy: value 5 is 0.0, expected a finite value above 0", std=np.where(at, 0, std))
    expect("meta/std.npy: value 5 is -1.0", std=np.where(at, -1, std))
    expect("meta/std.npy: value 5 is nan", std=np.where(at, np.nan, std))
    expect(r"meta/std.npy: shape \(251,\), expected \(263,\)", std=std[:251])
    expect("meta/mean.npy: int64, expected floats", mean=np.ones(263, dtype=np.int64))
    write_meta(folder, mean, std)
    (folder / "std.npy").write_bytes(b"nothing")
    with pytest.raises(ScaMoError, match="meta/std.npy: not a readable .npy array"):
        import_t2m_evaluator(t2m, tmp_path / "x")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.85])
@pytest.mark.parametrize("bias", [1, 4, 6, 25])
def test_a_datasets_own_deviations_are_noticed(t2m, tmp_path, share, bias):
    """Made of contacts: the deviation of 0 and 1 follows from their mean."""
    contacts = (np.random.default_rng(0).random((20_000, 4)) < share).astype(np.float64)
    mean, std = statistics()
    mean[-4:], std[-4:] = contacts.mean(axis=0), contacts.std(axis=0).mean() / bias
    write_meta(t2m / "Comp_v6_KLD005/meta", mean, std)
    if bias > 5:
        assert import_t2m_evaluator(t2m, tmp_path / "out").is_dir()
        return
    with pytest.raises(ScaMoError, match=f"std.npy: a dataset's own deviations: .* divided by {bias}"):
        import_t2m_evaluator(t2m, tmp_path / "out")


@pytest.mark.parametrize(
    ("features", "own", "evaluators", "tolerance"),
    [
        (263, ("Mean", "Std"), ("t2m_mean", "t2m_std"), 0.01),
        (251, ("kit_ml_Mean", "kit_ml_Std"), ("kit_mean", "kit_std"), 1e-9),
    ],
    ids=["t2m", "kit"],
)
def test_the_published_statistics(shared, tmp_path, features, own, evaluators, tolerance):
    """The evaluator's are the dataset's, 25 times smaller where the bias is; a dataset's own are refused.

    HumanML3D was measured anew between the two, so that they agree to a hundredth only.
    """
    stats = shared / "reference" / "stats"
    paths = [stats / f"{name}.npy" for name in (*own, *evaluators)]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"no statistics in {stats}")
    ratio = np.load(paths[1]) / np.load(paths[3])
    biased = np.r_[0:4, features - 4 : features]
    assert np.abs(ratio[biased] / 25 - 1).max() < 1.1 * tolerance
    assert np.abs(np.delete(ratio, biased) - 1).max() < tolerance

    checkpoint = tmp_path / "finest.tar"
    write_checkpoint(checkpoint, nested(weights(features)))
    write_glove(tmp_path / "glove")
    options = {"glove": tmp_path / "glove"}
    out = import_t2m_evaluator(checkpoint, tmp_path / "out", mean=paths[2], std=paths[3], **options)
    np.testing.assert_array_equal(load_evaluator(out).std, np.load(paths[3]).astype(np.float32))
    for mean in (paths[0], paths[2]):
        with pytest.raises(ScaMoError, match=r"Std.npy: a dataset's own deviations: .* divided by (1|0.99),"):
            import_t2m_evaluator(checkpoint, tmp_path / "x", mean=mean, std=paths[1], **options)
