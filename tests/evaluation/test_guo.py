"""Guo et al.'s evaluator against the published networks written out in float64 NumPy, one item at a time."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from scamo.errors import ScaMoError
from scamo.evaluation import word_vectors
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.guo import FORMAT, GuoEvaluator
from scamo.evaluation.word_vectors import WordVectors
from scamo.importers.t2m_evaluator import import_t2m_evaluator

SMALL = {"movement_hidden": 12, "movement": 10, "motion_hidden": 16, "text_hidden": 8, "word": 6, "width": 14}
PUBLISHED = {
    "movement_hidden": 512,
    "movement": 512,
    "motion_hidden": 1024,
    "text_hidden": 512,
    "word": 300,
    "width": 512,
}
VOCABULARY = ["unk", "sos", "eos", "a", "man", "walk", "forward", "slowly", "and", "the", "hand", "chair"]
CAPTIONS = [
    "a/DET man/NOUN walk/VERB forward/ADV",
    "man/NOUN",
    "zebra/NOUN walk/NOUN slowly/ADV and/CCONJ a/DET hand/NOUN",
    " ".join(["the/DET chair/NOUN walk/VERB"] * 12),
    " ".join(["a/DET man/NOUN"] * 10),
]


def shapes(
    inputs: int,
    *,
    movement_hidden: int,
    movement: int,
    motion_hidden: int,
    text_hidden: int,
    word: int,
    width,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the published checkpoint."""

    def recurrent(size: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return {
            "hidden": (2, 1, hidden),
            "input_emb.weight": (hidden, size),
            "input_emb.bias": (hidden,),
            **{
                f"gru.{kind}_l0{way}": (3 * hidden, hidden) if "weight" in kind else (3 * hidden,)
                for way in ("", "_reverse")
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            },
            "output_net.0.weight": (hidden, 2 * hidden),
            "output_net.0.bias": (hidden,),
            "output_net.1.weight": (hidden,),
            "output_net.1.bias": (hidden,),
            "output_net.3.weight": (width, hidden),
            "output_net.3.bias": (width,),
        }

    return {
        "movement_encoder": {
            "main.0.weight": (movement_hidden, inputs, 4),
            "main.0.bias": (movement_hidden,),
            "main.3.weight": (movement, movement_hidden, 4),
            "main.3.bias": (movement,),
            "out_net.weight": (movement, movement),
            "out_net.bias": (movement,),
        },
        "text_encoder": {
            "pos_emb.weight": (word, 15),
            "pos_emb.bias": (word,),
            **recurrent(word, text_hidden),
        },
        "motion_encoder": recurrent(movement, motion_hidden),
    }


Checkpoint = dict[str, dict[str, torch.Tensor]]


def random_checkpoint(inputs: int, sizes: dict[str, int], seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return torch.randn(shape, generator=generator) / fan**0.5

    return {
        network: {name: values(shape) for name, shape in weights.items()}
        for network, weights in shapes(inputs, **sizes).items()
    }


def flat(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {f"{net}.{name}": w for net, weights in checkpoint.items() for name, w in weights.items()}


class Reference:
    """The published networks in float64, as their paper describes them."""

    def __init__(self, checkpoint, mean, std) -> None:
        self.nets = {
            net: {name: w.double().numpy() for name, w in weights.items()}
            for net, weights in checkpoint.items()
        }
        self.mean, self.std = mean.astype(np.float64), std.astype(np.float64)

    @staticmethod
    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    @staticmethod
    def conv(x, weight, bias):
        """Kernel 4, stride 2, one zero on both sides: (T, in) -> (T // 2, out)."""
        padded = np.concatenate([np.zeros((1, x.shape[1])), x, np.zeros((1, x.shape[1]))])
        windows = sliding_window_view(padded, 4, axis=0)[::2]
        return windows.reshape(len(windows), -1) @ weight.reshape(len(weight), -1).T + bias

    @staticmethod
    def gru(w, way, x, state):
        def sigmoid(v):
            return 1 / (1 + np.exp(-v))

        inputs = x @ w[f"gru.weight_ih_l0{way}"].T + w[f"gru.bias_ih_l0{way}"]
        for step in inputs if not way else inputs[::-1]:
            reset, update, new = np.split(step, 3)
            r, u, n = np.split(w[f"gru.weight_hh_l0{way}"] @ state + w[f"gru.bias_hh_l0{way}"], 3)
            gate = sigmoid(update + u)
            state = (1 - gate) * np.tanh(new + sigmoid(reset + r) * n) + gate * state
        return state

    def point(self, w, x):
        x = x @ w["input_emb.weight"].T + w["input_emb.bias"]
        ends = [self.gru(w, way, x, w["hidden"][i, 0]) for i, way in enumerate(("", "_reverse"))]
        y = w["output_net.0.weight"] @ np.concatenate(ends) + w["output_net.0.bias"]
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * w["output_net.1.weight"] + w["output_net.1.bias"]
        return w["output_net.3.weight"] @ self.leaky(y) + w["output_net.3.bias"]

    def motion(self, raw, padded_to: int = 196):
        w = self.nets["movement_encoder"]
        x = np.zeros((padded_to, len(self.mean)))
        x[: len(raw)] = (raw - self.mean) / self.std
        x = self.leaky(self.conv(x[:, :-4], w["main.0.weight"], w["main.0.bias"]))
        x = self.leaky(self.conv(x, w["main.3.weight"], w["main.3.bias"]))
        x = x @ w["out_net.weight"].T + w["out_net.bias"]
        return self.point(self.nets["motion_encoder"], x[: len(raw) // 4])

    def text(self, vectors, classes, length):
        w = self.nets["text_encoder"]
        x = vectors + classes @ w["pos_emb.weight"].T + w["pos_emb.bias"]
        return self.point(w, x[:length].astype(np.float64))


def assert_same_points(found, expected) -> None:
    """Points are off by less than a millionth of their length."""
    off = np.linalg.norm(np.asarray(found) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert off.max() < 1e-6


def statistics(features: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """float64, as published, with root and contact deviations far below the others'."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=features), rng.uniform(0.1, 0.4, features)
    std[:4] /= 25
    mean[-4:], std[-4:] = 0.8, 0.4 / 25
    return mean, std


def random_motions(lengths, mean, std, seed: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(mean + std * rng.normal(size=(n, len(mean)))).astype(np.float32) for n in lengths]


def random_words(width: int, seed: int = 3) -> WordVectors:
    vectors = np.random.default_rng(seed).normal(size=(len(VOCABULARY), width))
    return WordVectors(vectors, VOCABULARY)


def make(features: int = 263, seed: int = 0, **options) -> tuple[GuoEvaluator, Reference]:
    """A small evaluator of random weights and its reference."""
    checkpoint = random_checkpoint(features - 4, SMALL, seed)
    mean, std = statistics(features)
    evaluator = GuoEvaluator.from_parts(flat(checkpoint), mean, std, random_words(SMALL["word"]), **options)
    return evaluator, Reference(checkpoint, mean, std)


@pytest.fixture(scope="module")
def small() -> tuple[GuoEvaluator, Reference]:
    return make()


def test_published_sizes_from_file_to_points(tmp_path):
    """finest.tar of full size, imported, loaded, and every length's points against the reference."""
    checkpoint = random_checkpoint(259, PUBLISHED)
    mean, std = statistics(263)
    words = random_words(300)
    source = tmp_path / "t2m"
    for name in ("text_mot_match/model", "Comp_v6_KLD005/meta", "glove"):
        (source / name).mkdir(parents=True)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(
        checkpoint | {"opt_text_encoder": optimizer, "epoch": 55, "iter": 9},
        source / "text_mot_match/model/finest.tar",
    )
    np.save(source / "Comp_v6_KLD005/meta/mean.npy", mean)
    np.save(source / "Comp_v6_KLD005/meta/std.npy", std)
    np.save(source / "glove/our_vab_data.npy", words.vectors)
    for name, value in (("words", VOCABULARY), ("idx", {word: i for i, word in enumerate(VOCABULARY)})):
        with open(source / f"glove/our_vab_{name}.pkl", "wb") as file:
            pickle.dump(value, file)

    evaluator = load_evaluator(import_t2m_evaluator(source, tmp_path / "out"))
    assert isinstance(evaluator, GuoEvaluator)
    assert (evaluator.feature_dim, evaluator.fps, evaluator.width) == (263, 20.0, 512)
    assert (evaluator.min_frames, evaluator.max_frames) == (4, 196)
    assert evaluator.provenance["epoch"] == 55
    reference = Reference(checkpoint, mean, std)

    motions = random_motions([100, 4, 196, 43, 8, 192], mean, std)
    points = evaluator.embed_motions(motions)
    assert points.shape == (6, 512)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, [reference.motion(motion) for motion in motions], atol=1e-5)

    points = evaluator.embed_texts(["-"] * len(CAPTIONS), CAPTIONS)
    expected = [reference.text(*words.encode(tagged)) for tagged in CAPTIONS]
    np.testing.assert_allclose(points, expected, atol=1e-5)


@pytest.mark.parametrize("features", [263, 251])
def test_motions_of_every_length(features):
    evaluator, reference = make(features)
    assert evaluator.fps == {263: 20.0, 251: 12.5}[features]
    lengths = [*range(4, 24), *range(24, 188, 9), *range(188, 197)]
    lengths = np.random.default_rng(0).permutation(lengths)
    motions = random_motions(lengths, reference.mean, reference.std)
    expected = np.stack([reference.motion(motion) for motion in motions])
    np.testing.assert_allclose(evaluator.embed_motions(motions), expected, atol=1e-5)
    assert expected.std(axis=0).min() > 0.01  # motions differ, so the comparison means something


def test_padding_is_part_of_the_network(small):
    """Without the zeros up to 196 frames the last step would see the convolution's own padding instead."""
    evaluator, reference = small
    motions = random_motions([40, 100, 196], reference.mean, reference.std)
    points = evaluator.embed_motions(motions)
    unpadded = np.stack([reference.motion(m, padded_to=len(m)) for m in motions])
    assert (np.abs(points - unpadded).max(axis=1) > 1e-3).tolist() == [True, True, False]


def test_frames_beyond_a_multiple_of_four(small):
    """They add no step, but the last one sees them; beyond 196 nothing is seen."""
    evaluator, reference = small
    (motion,) = random_motions([260], reference.mean, reference.std)
    for whole in (4, 40, 192):
        cut = [motion[: whole + rest] for rest in range(4)]
        points = evaluator.embed_motions(cut)
        assert (np.abs(points[1:] - points[0]).max(axis=1) > 1e-3).all()
    points = evaluator.embed_motions([motion[:196], motion[:197], motion])
    assert_same_points(points[1:], points[[0, 0]])


def test_neighbours_and_order_do_not_matter(small):
    evaluator, reference = small
    rng = np.random.default_rng(4)
    motions = random_motions(rng.integers(4, 197, 70), reference.mean, reference.std)
    together = evaluator.embed_motions(motions)
    np.testing.assert_array_equal(evaluator.embed_motions(motions), together)
    assert_same_points([evaluator.embed_motions([motion])[0] for motion in motions], together)
    order = rng.permutation(70)
    assert_same_points(evaluator.embed_motions([motions[i] for i in order]), together[order])
    tags = [" ".join(rng.choice(["a/DET", "man/NOUN", "x/X"], n)) for n in rng.integers(1, 30, 70)]
    together = evaluator.embed_texts(["-"] * 70, tags)
    alone = [evaluator.embed_texts(["-"], [tagged])[0] for tagged in tags]
    assert_same_points(alone, together)
    assert_same_points(evaluator.embed_texts(["-"] * 70, [tags[i] for i in order]), together[order])


def test_contacts_are_not_seen(small):
    evaluator, reference = small
    (motion,) = random_motions([60], reference.mean, reference.std)
    points = evaluator.embed_motions([motion])
    for column in [0, 3, *range(4, 255, 25), *range(257, 263)]:
        changed = motion.copy()
        changed[30, column] += 5 * reference.std[column]
        same = np.array_equal(evaluator.embed_motions([changed]), points)
        assert same == (column >= 259), column


def test_large_means_keep_their_precision():
    """KIT-ML's features are millimetres; in float32 a mean of hundreds is off by up to 3e-5."""
    checkpoint = random_checkpoint(247, SMALL)
    mean, std = statistics(251)
    mean[:100] = np.random.default_rng(0).uniform(512, 1024, 100)
    std[:100] = 0.05
    evaluator = GuoEvaluator.from_parts(flat(checkpoint), mean, std, random_words(6))
    motions = random_motions([40, 120], mean, std)
    expected = [Reference(checkpoint, mean, std).motion(motion) for motion in motions]
    np.testing.assert_allclose(evaluator.embed_motions(motions), expected, atol=1e-5)


def test_texts(small):
    evaluator, reference = small
    expected = [reference.text(*evaluator.words.encode(tagged)) for tagged in CAPTIONS]
    points = evaluator.embed_texts(["-"] * len(CAPTIONS), CAPTIONS)
    np.testing.assert_allclose(points, expected, atol=1e-5)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert distance[~np.eye(len(points), dtype=bool)].min() > 0.1
    # Of the fourth only 20 words are seen, and the fifth, of exactly 20, is seen whole.
    cut = [" ".join(CAPTIONS[3].split()[:20]), " ".join(CAPTIONS[4].split()[:19])]
    shorter = evaluator.embed_texts(["-"] * 2, cut)
    assert_same_points(shorter[:1], points[3:4])
    assert np.linalg.norm(shorter[1] - points[4]) > 0.01


def test_text_errors(small):
    evaluator, _ = small
    with pytest.raises(ScaMoError, match=r"text 1 \('he runs'\): token 0 is 'he', expected word/POS"):
        evaluator.embed_texts(["a man", "he runs"], ["a/DET man/NOUN", "he runs/VERB"])
    with pytest.raises(ScaMoError, match=r"text 0 \('a man'\): no tagged words"):
        evaluator.embed_texts(["a man"], [" "])
    assert evaluator.embed_texts([], []).shape == (0, 14)


@pytest.mark.parametrize("tags", [None, [None, "man/NOUN"], ["", "man/NOUN"]])
def test_untagged_texts_need_spacy(small, monkeypatch, tags):
    word_vectors._spacy_pipeline.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ScaMoError, match=r"text 0 \('a man'\): .*pip install 'scamo\[spacy\]'"):
        small[0].embed_texts(["a man", "man"], tags)


def test_motion_errors(small):
    evaluator, reference = small
    motions = random_motions([20, 3], reference.mean, reference.std)
    with pytest.raises(ScaMoError, match="motion 1: 3 frames, evaluator guo needs 4"):
        evaluator.embed_motions(motions)
    with pytest.raises(ScaMoError, match=r"motion 0: features of shape \(20, 259\)"):
        evaluator.embed_motions([motions[0][:, :-4]])
    assert evaluator.embed_motions([]).shape == (0, 14)


def test_a_folder_and_back(tmp_path, small):
    evaluator, reference = small
    motions = random_motions([40, 61, 196], reference.mean, reference.std)
    folder = tmp_path / "guo-t2m"
    evaluator.save(folder)
    state = torch.random.get_rng_state()
    loaded = load_evaluator(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(loaded, GuoEvaluator)
    assert (loaded.name, loaded.fps, loaded.width, loaded.feature_dim) == ("guo-t2m", 20.0, 14, 263)
    assert len(loaded.sha256) == 64
    np.testing.assert_array_equal(loaded.mean, reference.mean.astype(np.float32))
    np.testing.assert_array_equal(loaded.std, reference.std.astype(np.float32))
    np.testing.assert_array_equal(loaded.embed_motions(motions), evaluator.embed_motions(motions))
    texts = ["-"] * len(CAPTIONS)
    np.testing.assert_array_equal(loaded.embed_texts(texts, CAPTIONS), evaluator.embed_texts(texts, CAPTIONS))
    with pytest.raises(ScaMoError, match="guo-t2m exists"):
        loaded.save(folder)
    loaded.save(folder, overwrite=True)
    assert load_evaluator(folder).sha256 == loaded.sha256
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "words.json"}


def test_damaged_folders(tmp_path, small):
    folder = tmp_path / "e"

    def expect(message: str) -> None:
        with pytest.raises(ScaMoError, match=message):
            load_evaluator(folder)

    def edit(**changes) -> None:
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in (config | changes).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))

    small[0].save(folder)
    (folder / "words.json").unlink()
    expect("words.json: missing")
    small[0].save(folder, overwrite=True)
    edit(width=15)
    expect("config.json: ")  # the manifest has its hash
    (folder / "manifest.json").unlink()
    expect("config.json: width 15, the weights have 14")
    edit(width=14, feature_dim=251)
    expect("config.json: feature_dim 251, the weights have 263")
    edit(feature_dim=263, fps=None)
    expect("config.json: missing key fps")
    edit(fps=20, format=FORMAT + "-x")
    expect("format 'scamo-evaluator-guo-x', expected")
    edit(format=FORMAT)
    (folder / "words.json").write_text(json.dumps(VOCABULARY[:-1]))
    expect("words.json: 12 vectors for 11 words")


def test_parts_that_do_not_fit():
    state = flat(random_checkpoint(259, SMALL))
    mean, std = statistics(263)
    words = random_words(6)

    def expect(message: str, *, mean=mean, std=std, words=words, drop: str = "", **changed) -> None:
        parts = {k: v for k, v in (state | changed.pop("weights", {})).items() if k != drop}
        with pytest.raises(ScaMoError, match=message):
            GuoEvaluator.from_parts(parts, mean, std, words, where="x.tar", **changed)

    expect(r"x.tar: mean: shape \(251,\), expected \(263,\)", mean=mean[:251])
    expect(r"x.tar: std: shape \(263, 1\), expected \(263,\)", std=std[:, None])
    for values, found in ((0.0, "0.0"), (-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf")):
        bad = np.where(np.arange(263) == 7, values, std)
        expect(f"x.tar: std: value 7 is {found}, expected a finite value above 0", std=bad)
    expect("x.tar: mean: value 7 is nan", mean=np.where(np.arange(263) == 7, np.nan, mean))
    expect("x.tar: the text encoder takes word vectors of 6, found 5", words=random_words(5))
    for name in state:
        expect(f"x.tar: .*missing {name}", drop=name)
    expect("x.tar: .*unknown motion_encoder.extra", weights={"motion_encoder.extra": torch.zeros(1)})
    for name in ("movement_encoder.main.3.weight", "text_encoder.pos_emb.weight", "motion_encoder.hidden"):
        other = torch.zeros(*state[name].shape[:-1], state[name].shape[-1] + 1)
        expect(rf"x.tar: .*shape: .*{name} is \(.*\), expected \(", weights={name: other})
    expect(
        r"main.0.weight is \(12, 259\), expected 3 dimensions",
        weights={"movement_encoder.main.0.weight": state["movement_encoder.main.0.weight"][:, :, 0]},
    )
    expect(
        "x.tar: text_encoder.hidden holds values that are not finite",
        weights={"text_encoder.hidden": torch.full((2, 1, 8), torch.nan)},
    )


def test_another_skeleton_needs_its_frame_rate():
    with pytest.raises(ScaMoError, match=r"100 features: give fps \(known: 20 for 263 and 12.5 for 251\)"):
        make(100)
    assert make(100, fps=30.0)[0].fps == 30.0
