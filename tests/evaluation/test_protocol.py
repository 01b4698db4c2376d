"""`scamo evaluate`: both protocols against a plain recomputation, ranks, the ledger, and what is refused."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from scamo import ScaMo, cli
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.guo import GuoEvaluator, GuoNetworks, Sizes
from scamo.evaluation.items import draw_humanml3d, draw_strict, source_clips
from scamo.evaluation.protocol import Settings, evaluate_run
from scamo.evaluation.report import summary
from scamo.evaluation.word_vectors import WordVectors
from scamo.generation.export import identify
from scamo.motion import measures
from scamo.motion.features import features_to_joints

QUICK = Settings(
    repeats=2, temperature=0.9, pairs=40, cosine_pool=50, mm_texts=3, mm_generations=4, mm_pairs=2
)
STRICT = replace(QUICK, protocol="strict")


def measure(run, evaluator, settings=QUICK, **options):
    return evaluate_run(run, evaluator, settings=settings, device="cpu", progress=False, **options)


def rows_of(report):
    return {row["name"]: {key: one["value"] for key, one in row["metrics"].items()} for row in report["rows"]}


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def humanml3d(run, evaluator, tmp_path_factory):
    return measure(run, evaluator, out=tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def strict(run, evaluator, tmp_path_factory):
    return measure(run, evaluator, STRICT, out=tmp_path_factory.mktemp("report") / "first")


def naive_fid(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T))
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)


def naive_r_precision(texts, points, pool, distance):
    hits = np.zeros(3)
    for start in range(0, len(texts) - pool + 1, pool):
        for i in range(start, start + pool):
            own = distance(texts[i], points[i])
            others = [distance(texts[i], points[j]) - own for j in range(start, start + pool) if j != i]
            closer, tied = sum(d < -1e-7 for d in others), sum(abs(d) <= 1e-7 for d in others)
            hits += [np.mean([place < k for place in range(closer, closer + tied + 1)]) for k in (1, 2, 3)]
    return hits / (len(texts) // pool * pool)


def euclidean(a, b):
    return np.linalg.norm(a.astype(np.float64) - b)


def cosine(a, b):
    return -float(a.astype(np.float64) @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def seeds(settings, repeat, generation, captions):
    """The seed of every motion, as a formula of its own."""
    base = ((settings.seed * 100_003 + repeat) * 1_009 + generation) << 32
    return [base + int(caption) for caption in captions]


def test_every_row_of_the_humanml3d_protocol_is_recomputed(humanml3d, run, evaluator, corpus):
    dataset, judge, model = (
        MotionDataset.open(corpus),
        load_evaluator(evaluator),
        ScaMo.load(run, device="cpu"),
    )
    items = np.array([i for i in dataset.items("test") if 40 <= len(dataset.item_features(i)) < 200])
    expected = {name: [] for name in ("real", "reconstruction", "generated")}
    for repeat in range(2):
        draw = draw_humanml3d(dataset, items, (0, repeat, 0))
        assert len(draw.items) == 64
        real = draw.features(dataset)
        rebuilt = [
            model.tokenizer.decode(model.tokenizer.encode(torch.from_numpy(motion[None].copy())))[0]
            .detach()
            .numpy()
            for motion in real
        ]
        made = [
            model.generate(text, seed=seed, temperature=0.9).features
            for text, seed in zip(draw.texts(dataset), seeds(QUICK, repeat, 0, draw.captions), strict=True)
        ]
        texts = judge.embed_captions(dataset, draw.captions.tolist())
        points = {
            "real": judge.embed_motions(real),
            "reconstruction": judge.embed_motions(rebuilt),
            "generated": judge.embed_motions(made),
        }
        other = judge.embed_motions(draw_humanml3d(dataset, items, (0, repeat, 1)).features(dataset))
        for name, found in points.items():
            reference = other if name == "real" else points["real"]
            shares = naive_r_precision(texts, found, 32, euclidean)
            by_cosine = naive_r_precision(texts, found, 50, cosine)
            expected[name].append(
                {
                    "fid": naive_fid(reference, found),
                    "matching": np.mean([euclidean(a, b) for a, b in zip(texts, found, strict=True)]),
                    "cosine": -np.mean([cosine(a, b) for a, b in zip(texts, found, strict=True)]),
                    **{f"r_precision_{k}": shares[k - 1] for k in (1, 2, 3)},
                    **{f"cosine_r_precision_{k}": by_cosine[k - 1] for k in (1, 2, 3)},
                }
            )
    for name, repeats in expected.items():
        metrics = next(row for row in humanml3d["rows"] if row["name"] == name)["metrics"]
        for key in repeats[0]:
            values = [one[key] for one in repeats]
            half = 1.96 * np.std(values) / 2**0.5
            assert metrics[key]["value"] == pytest.approx(np.mean(values), abs=2e-4), (name, key)
            assert metrics[key]["high"] - metrics[key]["low"] == pytest.approx(2 * half, abs=2e-4), (
                name,
                key,
            )


def test_every_row_of_the_strict_protocol_is_recomputed(strict, run, evaluator, corpus):
    """R-precision by drawing pools: within four standard errors of the exact expectation."""
    dataset, judge, model = (
        MotionDataset.open(corpus),
        load_evaluator(evaluator),
        ScaMo.load(run, device="cpu"),
    )
    items = dataset.items("test")
    rng = np.random.default_rng(0)
    hits, fids, distances = [], [], []
    for turn in range(3):
        draw = draw_strict(dataset, items, turn)
        texts = judge.embed_captions(dataset, draw.captions.tolist())
        motions = model.generate(
            draw.texts(dataset), seed=seeds(STRICT, 0, 0, draw.captions), temperature=0.9
        )
        points = judge.embed_motions([motion.features for motion in motions])
        real = judge.embed_motions(draw.features(dataset))
        fids.append(naive_fid(real, points))
        distances.append([euclidean(a, b) for a, b in zip(texts, points, strict=True)])
        for _ in range(60):
            for i in range(len(items)):
                rivals = rng.choice(np.delete(np.arange(len(items)), i), 31, replace=False)
                closer = sum(euclidean(texts[i], points[j]) < euclidean(texts[i], points[i]) for j in rivals)
                hits.append([closer < k for k in (1, 2, 3)])
    found = rows_of(strict)["generated"]
    error = np.std(hits, axis=0) / len(hits) ** 0.5
    for k in (1, 2, 3):
        assert abs(found[f"r_precision_{k}"] - np.mean(hits, axis=0)[k - 1]) < 4 * error[k - 1]
    assert found["fid"] == pytest.approx(np.mean(fids), abs=2e-4)
    assert found["matching"] == pytest.approx(np.mean(distances), abs=1e-4)
    assert strict["rows"][2]["metrics"]["fid"]["low"] is None


def test_the_first_rows_are_real_data_and_reconstruction(humanml3d, strict):
    for report in (humanml3d, strict):
        assert [row["name"] for row in report["rows"]] == ["real", "reconstruction", "generated"]
    assert rows_of(strict)["real"]["fid"] == pytest.approx(0, abs=1e-9)
    assert rows_of(humanml3d)["real"]["fid"] > 0  # two draws of one split


def test_physics_and_reconstruction_errors(strict, run, corpus):
    dataset, model = MotionDataset.open(corpus), ScaMo.load(run, device="cpu")
    draw = draw_strict(dataset, dataset.items("test"), 0)
    errors, skates = [], []
    for motion in draw.features(dataset):
        tokens = model.tokenizer.encode(torch.from_numpy(motion[None].copy()))
        made = features_to_joints(model.tokenizer.decode(tokens)[0].detach().numpy())
        errors.append(measures.mpjpe(made, features_to_joints(motion)))
        skates.append(measures.foot_skate(features_to_joints(motion), 20.0))
    rows = rows_of(strict)
    assert rows["reconstruction"]["mpjpe_mm"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert rows["real"]["foot_skate"] == pytest.approx(np.mean(skates), rel=1e-6)
    assert "mpjpe_mm" not in rows["real"]
    assert "mpjpe_mm" not in rows["generated"]


def test_the_report_says_which_model_it_measured(strict, humanml3d, run, evaluator, make_run, corpus):
    for report in (strict, humanml3d):
        assert report["model_sha256"] == identify(run)["sha256"]
    assert strict["model_sha256"]["transformer"][:12] in summary(strict)
    other = make_run(seed=9)
    settings = replace(STRICT, mm_texts=0, split="val")
    hashes = measure(other, evaluator, settings)["model_sha256"]
    assert hashes["transformer"] != strict["model_sha256"]["transformer"]
    assert hashes["tokenizer"] == strict["model_sha256"]["tokenizer"]
    real = measure(None, evaluator, settings, dataset=corpus)
    assert real["model_sha256"] is None
    assert "SHA-256 of the model" not in summary(real)


def test_counts_and_settings_are_reported(humanml3d, strict):
    assert humanml3d["generated"]["motions"] == 2 * (64 + 3 * 4)
    assert strict["generated"]["motions"] == 3 * 80 + 3 * 4
    assert humanml3d["dataset"]["items_used"] == 64
    assert (humanml3d["dataset"]["items"], humanml3d["dataset"]["items_filtered"]) == (74, 6)
    assert strict["dataset"]["items_filtered"] == 0
    assert strict["dataset"]["items_used"] == 80
    assert humanml3d["chance"] == {f"r_precision_{k}": k / 32 for k in (1, 2, 3)}
    assert humanml3d["settings"]["temperature"] == 0.9
    assert 0 < humanml3d["generated"]["at_the_length_limit"] < humanml3d["generated"]["motions"]


def test_multimodality_of_greedy_motions_is_zero(run, evaluator, tmp_path):
    greedy = replace(QUICK, repeats=1, greedy=True, split="val")
    rows = rows_of(measure(run, evaluator, greedy, out=tmp_path / "greedy"))
    assert rows["generated"]["multimodality"] == pytest.approx(0, abs=1e-5)


def test_equal_sentences_of_two_items_give_two_motions(text_encoder, evaluator, make_run, corpus, tmp_path):
    source = MotionDataset.open(corpus)
    with DatasetWriter(tmp_path / "same", statistics=(source.mean, source.std)) as writer:
        for clip in range(40):
            writer.add_clip(str(clip), source.clip_features(clip), "val", [Caption("a person walks")])
    settings = replace(QUICK, repeats=1, split="val", mm_texts=0, pairs=20)
    report = measure(make_run(3), evaluator, settings, dataset=tmp_path / "same", out=tmp_path / "report")
    assert rows_of(report)["generated"]["diversity"] > 0.01


@pytest.mark.parametrize("settings", [QUICK, STRICT], ids=["humanml3d", "strict"])
def test_batch_size_does_not_matter(settings, humanml3d, strict, make_run, evaluator, tmp_path):
    other = measure(make_run(), evaluator, replace(settings, batch_size=5), out=tmp_path / "other")
    expected = rows_of(humanml3d if settings is QUICK else strict)
    for name, metrics in rows_of(other).items():
        assert metrics == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_the_number_of_ranks_does_not_matter(humanml3d, make_run, evaluator, tmp_path):
    """Two gloo ranks under torchrun, through the command line's own function."""
    code = (
        "import sys\n"
        "from scamo.evaluation.protocol import Settings, evaluate_run\n"
        f"settings = {QUICK!r}\n"
        "report = evaluate_run(*sys.argv[1:3], settings=settings, out=sys.argv[3], device='cpu')\n"
        "import os\n"
        "assert bool(report) == (os.environ['RANK'] == '0')\n"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29883",
    ]
    command += [str(script), str(make_run()), str(evaluator), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| real |") == 2  # once in each table: rank 1 prints nothing
    report = json.loads((tmp_path / "two.json").read_text())
    assert report["generated"] == humanml3d["generated"]
    for name, metrics in rows_of(report).items():
        assert metrics == pytest.approx(rows_of(humanml3d)[name], rel=1e-4, abs=1e-5), name


def test_files_are_written_beside_the_run(make_run, evaluator, corpus):
    run = make_run(2)
    report = measure(run, evaluator, replace(QUICK, split="val"))
    stored = json.loads((run / "evaluation/humanml3d-val-corpus.json").read_text())
    assert stored["rows"] == report["rows"]
    markdown = (run / "evaluation/humanml3d-val-corpus.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("| generated |")]
    fid = next(row for row in report["rows"] if row["name"] == "generated")["metrics"]["fid"]
    assert f"| {fid['value']:.3f} ±{fid['value'] - fid['low']:.3f} |" in lines[0]
    assert not (run / "evaluation/test_split.jsonl").exists()


def test_the_test_split_is_met_once(make_run, evaluator, tmp_path):
    run = make_run(2)
    quick = replace(QUICK, repeats=1, mm_texts=0)
    assert measure(run, evaluator, quick)["test_split_met"] == 1
    with pytest.raises(
        ScaMoError, match=r"test_split\.jsonl: the humanml3d protocol met the test split of corpus"
    ):
        measure(run, evaluator, replace(quick, temperature=0.5), out=tmp_path / "other")
    assert not (tmp_path / "other.json").exists()
    assert measure(run, evaluator, replace(quick, protocol="strict"))["test_split_met"] == 2
    again = measure(run, evaluator, replace(quick, temperature=0.5), again=True)
    assert again["test_split_met"] == 3
    assert "met this test split 3 times" in (run / "evaluation/humanml3d-test-corpus.md").read_text()
    measure(run, evaluator, replace(quick, split="val"))  # as often as one likes
    measure(run, evaluator, replace(quick, split="val"))


def test_an_evaluator_alone_has_the_real_row(evaluator, corpus, strict, tmp_path):
    report = measure(None, evaluator, STRICT, dataset=corpus, out=tmp_path / "alone")
    assert [row["name"] for row in report["rows"]] == ["real"]
    assert report["rows"][0] == strict["rows"][0]


def test_a_sample_of_the_split_is_measured_and_named(evaluator, corpus, strict, tmp_path):
    settings = replace(STRICT, items=STRICT.pool)
    reports = [measure(None, evaluator, settings, dataset=corpus, out=tmp_path / name) for name in "ab"]
    assert reports[0]["dataset"]["items"] == STRICT.pool < strict["dataset"]["items"]
    assert reports[0]["rows"] == reports[1]["rows"] != strict["rows"][:1]
    assert "items, mind: a fixed sample of 32 of" in (tmp_path / "a.md").read_text()
    with pytest.raises(ScaMoError, match="items = 5: expected 0 for all, or at least a pool of"):
        replace(STRICT, items=5)


def test_what_needs_more_motions_is_left_out_with_the_reason(make_run, evaluator, tmp_path):
    settings = replace(
        QUICK, repeats=1, pairs=300, cosine_pool=100, mm_texts=50, mm_generations=3, split="val"
    )
    report = measure(make_run(2), evaluator, settings, out=tmp_path / "few")
    assert report["left_out"]["diversity"] == "300 pairs need more motions than 32"
    assert report["left_out"]["cosine_r_precision"] == "a pool of 100 needs as many motions, there are 32"
    assert report["caveats"]["multimodality"] == "over 32 texts, as there are no 50"
    for metrics in rows_of(report).values():
        assert not any(key.startswith(("diversity", "cosine_r")) for key in metrics)
    assert "diversity, left out: 300 pairs" in (tmp_path / "few.md").read_text()


def test_bad_input_prints_no_number(make_run, evaluator, corpus, text_encoder, tmp_path, capsys):
    run = make_run(2)
    source = MotionDataset.open(corpus)

    long = [i for i in range(source.n_clips) if len(source.clip_features(i)) >= 40]

    def write(name, change=lambda raw: raw, test_clips=40, cut=(), **options):
        with DatasetWriter(tmp_path / name, **options) as writer:
            for number, clip in enumerate(long[: 40 + test_clips]):
                features = change(source.clip_features(clip))[: 3 if number in cut else None]
                split = "train" if number < 40 else "test"
                writer.add_clip(str(number), features, split, [Caption("walks")])
        return tmp_path / name

    def fails(match, **options):
        with pytest.raises(ScaMoError, match=match):
            measure(options.pop("run", run), options.pop("evaluator", evaluator), **options)

    fails("nowhere: no such run", run=tmp_path / "nowhere")
    fails(r"nothing/config\.json: no such file", evaluator=tmp_path / "nothing")
    fails("31 items in the test split, a pool needs 32", dataset=write("few", test_clips=31))
    short = write("short", test_clips=33, cut=(45, 50))
    fails("31 items in the test split .2 more are too short or too long for the protocol", dataset=short)
    message = "item 45 has 3 frames, evaluator evaluator needs 4; 1 more of the test split have too few"
    fails(message, dataset=short, settings=STRICT)
    fails("other statistics", dataset=write("normalised", lambda raw: (raw - source.mean) / source.std))
    fails("trained on 263 features", dataset=write("kit", lambda raw: raw[:, :251], feature_dim=251))
    fails("trained at 20 fps", dataset=write("slow", fps=12.5))
    export = tmp_path / "export"
    shutil.copytree(run / "export", export)
    fails("does not say which dataset", run=export)
    with pytest.raises(ScaMoError, match="protocol 'strictest'"):
        Settings(protocol="strictest")
    with pytest.raises(ScaMoError, match="split 'dev'"):
        Settings(split="dev")
    with pytest.raises(ScaMoError, match="mm_generations = 10"):
        Settings(mm_generations=10)
    assert cli.main(["evaluate", str(run)]) == 2
    assert "needs an evaluator" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--protocol", "text-following", "--again"]) == 2
    assert "leave out --again" in capsys.readouterr().err
    assert not (run / "evaluation").exists()


def test_a_tokenizer_of_other_statistics_is_refused(make_run, evaluator, corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    run = make_run(2)
    folder = run / "export"
    for manifest in (folder / "manifest.json", folder / "tokenizer/manifest.json"):
        manifest.unlink()
    weights = load_file(folder / "tokenizer/model.safetensors")
    weights["std"] *= 100
    save_file(weights, folder / "tokenizer/model.safetensors")
    with pytest.raises(ScaMoError, match="its tokenizer has other statistics than dataset"):
        measure(run, evaluator)


def test_the_published_networks_measure_by_the_captions_tags(make_run, corpus, tmp_path):
    """Guo et al.'s evaluator through both protocols; its sentences are the tags, not the texts."""
    source = MotionDataset.open(corpus)
    sizes = Sizes(263, 12, 10, 16, 8, 6, 14)
    torch.manual_seed(4)
    words = WordVectors(
        np.random.default_rng(0).normal(size=(6, 6)), ["unk", "man", "walk", "slow", "a", "b"]
    )
    state = {name: value / 2 for name, value in GuoNetworks(sizes).state_dict().items()}
    GuoEvaluator.from_parts(state, source.mean, source.std, words).save(tmp_path / "guo")
    tags = ["a/DET man/NOUN walk/VERB", "b/DET man/NOUN", "slow/ADJ a/DET"]
    with DatasetWriter(tmp_path / "tagged", statistics=(source.mean, source.std)) as writer:
        for clip in range(60):
            captions = [Caption("some text", meta={"tokens": tags[clip % 3]})]
            writer.add_clip(str(clip), source.clip_features(clip), "val", captions)
    judge, dataset = load_evaluator(tmp_path / "guo"), MotionDataset.open(tmp_path / "tagged")
    for settings in (
        replace(QUICK, repeats=1, split="val", mm_texts=0),
        replace(STRICT, split="val", mm_texts=0),
    ):
        report = measure(make_run(5), tmp_path / "guo", settings, dataset=dataset.folder, out=tmp_path / "r")
        assert report["evaluator"]["kind"] == "GuoEvaluator"
        if settings.protocol == "strict":
            draw = draw_strict(dataset, dataset.items("val"), 0)
        else:
            items = np.array([i for i in dataset.items("val") if 40 <= dataset.item_lengths[i] < 200])
            draw = draw_humanml3d(dataset, items, (0, 0, 0))
        texts = judge.embed_texts(["-"] * len(draw.items), [tags[int(item) % 3] for item in draw.items])
        points = judge.embed_motions(draw.features(dataset))
        expected = np.mean([euclidean(a, b) for a, b in zip(texts, points, strict=True)])
        assert rows_of(report)["real"]["matching"] == pytest.approx(expected, rel=1e-5)


def test_source_clips_of_the_corpus_are_all_different(corpus):
    dataset = MotionDataset.open(corpus)
    clips = source_clips(dataset, dataset.items("test"))
    assert not any(a == b for a, b in itertools.combinations(clips.tolist(), 2))
