"""`compare` on small random models: the page, the numbers against the saved motions, the statistics."""

import base64
import itertools
import json
import shutil
import subprocess
from html.parser import HTMLParser
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom

from scamo.data.storage import check_files, read_manifest
from scamo.errors import ScaMoError
from scamo.evaluation.compare import compare, holm, sign_flip_p, spread
from scamo.evaluation.evaluator import held, load_evaluator
from scamo.evaluation.metrics import bootstrap_interval
from scamo.evaluation.prompt_files import Prompt
from scamo.motion.motion import Motion
from scamo.motion.skeleton import PARENTS

NASTY = 'a <b>person</b> & "walks" __DATA__ </script><script>alert(1)</script>'
READ = ("h1", "h3", "td", "th", "figcaption", "summary", "button", "p")


@pytest.fixture(scope="module")
def prompts(clips):
    texts = list(dict.fromkeys(text for clip in clips for text in clip.texts))[:35]
    return [Prompt(text, ("one", "t & w<o>", "three")[i % 3]) for i, text in enumerate([*texts, NASTY])]


@pytest.fixture(scope="module")
def runs(make_run):
    return [make_run(seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def compared(runs, prompts, evaluator, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    names = ["first <1>", "second"]
    report = compare(runs, prompts, out, evaluator=evaluator, names=names, pictures=5, device="cpu")
    return out, report


def saved(out, report, run):
    folder = out / report["runs"][run]["motions"]
    return [Motion.load(path) for path in sorted(folder.iterdir())]


def column(report, run, key):
    name = report["runs"][run]["name"]
    return np.array([row["runs"][name][key] for row in report["per_prompt"]])


def skate(joints):
    """Frame by frame: of the steps in which a ball of a foot stays low, the share that is fast."""
    floor = np.percentile(joints[:, [10, 11], 1], 5)
    steps = [
        np.hypot(*(after - before)[[0, 2]]) * 20 > 0.5
        for foot in (10, 11)
        for before, after in itertools.pairwise(joints[:, foot])
        if max(before[1], after[1]) - floor < 0.025
    ]
    return np.mean(steps) if steps else 0.0


def test_the_numbers_are_those_of_the_saved_motions(compared, prompts, evaluator):
    out, report = compared
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert [row["text"] for row in report["per_prompt"]] == [prompt.text for prompt in prompts]
    judge = load_evaluator(evaluator)
    text = judge.embed_texts([prompt.text for prompt in prompts]).astype(np.float64)
    for run in range(2):
        motions = saved(out, report, run)
        assert [motion.text for motion in motions] == [prompt.text for prompt in prompts]
        assert {motion.meta["seed"] for motion in motions} == {0}
        np.testing.assert_allclose(column(report, run, "duration"), [len(m) / 20 for m in motions])
        limited = [len(m.tokens) == 8 for m in motions]
        assert column(report, run, "at_limit").tolist() == limited
        assert len(set(limited)) == 2
        for motion, row in zip(motions, report["per_prompt"], strict=True):
            found = row["runs"][report["runs"][run]["name"]]
            joints = motion.joints.astype(np.float64)
            depth = np.maximum(0, -joints[:, [7, 8, 10, 11], 1].min(axis=1)).mean()
            assert found["foot_penetration_mm"] == pytest.approx(1000 * depth, rel=1e-9)
            third = joints[3:] - 3 * joints[2:-1] + 3 * joints[1:-2] - joints[:-3]
            assert found["jerk"] == pytest.approx(8000 * np.linalg.norm(third, axis=-1).mean(), rel=1e-9)
            bones = np.stack(
                [np.linalg.norm(joints[:, j] - joints[:, PARENTS[j]], axis=-1) for j in range(1, 22)]
            )
            usual = np.median(bones, axis=1, keepdims=True)
            assert found["bone_drift"] == pytest.approx((np.abs(bones - usual) / usual).mean(), rel=1e-6)
            assert found["foot_skate"] == pytest.approx(skate(joints))
        points = judge.embed_motions([motion.features for motion in motions]).astype(np.float64)
        distances = np.linalg.norm(text[:, None] - points[None], axis=-1)
        np.testing.assert_allclose(column(report, run, "matching"), np.diagonal(distances), rtol=1e-9)
        # The evaluator's points have length 1: |a - b|^2 = 2 - 2 cos.
        cosine = 1 - np.diagonal(distances) ** 2 / 2
        np.testing.assert_allclose(column(report, run, "cosine"), cosine, atol=1e-6)
        closer = (distances < np.diagonal(distances)[:, None]).sum(axis=1)
        for k in (1, 2, 3):
            hits = hypergeom(len(prompts) - 1, closer, 31).cdf(k - 1)
            np.testing.assert_allclose(column(report, run, f"r_precision_{k}"), hits, atol=1e-9)


def test_results_and_differences_are_over_the_prompts_and_in_each_group(compared, prompts):
    _, report = compared
    first, second = (run["name"] for run in report["runs"])
    assert report["differences"]["first"] == first
    assert report["left_out"] == {}
    where = np.array([prompt.group for prompt in prompts])
    scopes = {"": np.ones(len(prompts), dtype=bool)} | {group: where == group for group in set(where)}
    for scope, chosen in scopes.items():
        results, differences = (
            report[part]["groups"][scope] if scope else report[part]["all"]
            for part in ("results", "differences")
        )
        tests = differences[second]
        assert list(differences) == [second]
        assert list(results) == [first, second]
        assert len(tests) == 11
        for key, one in tests.items():
            values = [column(report, run, key)[chosen] for run in (0, 1)]
            paired = values[1] - values[0]
            assert one["n"] == chosen.sum()
            assert one["mean"] == pytest.approx(paired.mean(), rel=1e-12)
            np.testing.assert_allclose((one["low"], one["high"]), bootstrap_interval(paired), rtol=1e-12)
            assert one["p"] == sign_flip_p(paired)
            assert 0 < one["p"] <= one["p_holm"] <= 1
            for name, part in zip((first, second), values, strict=True):
                assert results[name][key]["mean"] == pytest.approx(part.mean(), rel=1e-12)
                low, high = results[name][key]["low"], results[name][key]["high"]
                np.testing.assert_allclose((low, high), bootstrap_interval(part), rtol=1e-12)


class Page(HTMLParser):
    """Text by element, scripts, addresses; every element must be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.scripts, self.addresses, self.canvases = [], [], [], [], 0
        self.inside = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.canvases += tag == "canvas"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag in READ:
            self.texts.append([tag, ""])
            self.inside.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in READ:
            self.inside.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.inside:
            self.inside[-1][1] += data

    def of(self, tag):
        return [text.strip() for one, text in self.texts if one == tag]


def test_the_page_is_whole_and_has_each_prompt_once(compared, prompts):
    out, report = compared
    source = (out / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.addresses == []
    assert not any(word in source for word in ("http:", "https:", "@import", "url("))
    assert page.of("h1") == ["Comparison of first <1> and second"]
    rows = [*page.of("h3"), *page.of("td")]
    for prompt in prompts:
        assert rows.count(prompt.text) == 1
    assert len(page.of("h3")) == 5
    assert page.canvases == 10
    captions = page.of("figcaption")
    assert len(captions) == 10
    assert sum(caption.startswith("first <1> ") for caption in captions) == 5
    assert page.of("summary") == [f"{group} (12 prompts)" for group in ("one", "t & w<o>", "three")]
    assert page.of("button")[4:] == ["all", "one", "t & w<o>", "three"]
    assert page.of("th")[:4] == ["", "first <1>", "second", "second − first <1>"]
    assert len(page.scripts) == 2, "a prompt must not open a script of its own"
    assert page.scripts[1].count("function drawFigure") == 1
    # The motions of a row stand side by side, in the order of the runs.
    data = json.loads(page.scripts[0])
    shown = [next(i for i, prompt in enumerate(prompts) if prompt.text == text) for text in page.of("h3")]
    motions = [saved(out, report, run) for run in range(2)]
    for place, (index, run) in enumerate(itertools.product(shown, range(2))):
        stored = data["motions"][place]
        steps = np.frombuffer(base64.b64decode(stored["joints"]), dtype="<u2").astype(np.float64)
        joints = steps.reshape(-1, 22, 3) * stored["scale"] + stored["low"]
        np.testing.assert_allclose(joints, motions[run][index].joints, rtol=0, atol=stored["scale"])


def test_the_script_of_the_page_is_valid(compared, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = tmp_path / "script.js"
    script.write_text(Page((compared[0] / "index.html").read_text(encoding="utf-8")).scripts[1])
    subprocess.run([node, "--check", str(script)], check=True)


def test_the_tables_say_what_the_report_says(compared):
    out, report = compared
    table = (out / "table.md").read_text(encoding="utf-8")
    headings = [line[3:] for line in table.splitlines() if line.startswith("## ")]
    assert headings == ["All prompts", *(f"{g} (12 prompts)" for g in ("one", "t & w\\<o\\>", "three"))]
    rows = [line for line in table.splitlines() if line.startswith("| Duration (s) |")]
    assert len(rows) == 4
    cells = [cell.strip().replace("−", "-") for cell in rows[0].strip("|").split("|")]
    results = report["results"]["all"]
    for cell, name in zip(cells[1:3], results, strict=True):
        one = results[name]["duration"]
        assert cell == f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
    one = report["differences"]["all"]["second"]["duration"]
    assert cells[3].strip("*").startswith(f"{one['mean']:+.2f}")
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"{results['second']['duration']['mean']:.2f} <small>[" in page


def test_the_folder_is_complete_and_can_be_replaced(compared, runs, tmp_path):
    out, _ = compared
    manifest = read_manifest(out, format="scamo-comparison", schema_version=1)
    check_files(out, manifest, hashes=True)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names - {"manifest.json"} == set(manifest["files"])
    assert names > {"index.html", "report.json", "table.md"}
    assert names > {"motions/first-1/000.npz", "motions/second/035.npz"}

    target, options = tmp_path / "out", {"device": "cpu", "pictures": 0}
    one = [Prompt("a person walks")]
    report = compare(runs[:1], one, target, **options)
    (single,) = report["results"]["all"].values()
    assert single["duration"]["low"] is None
    page = Page((target / "index.html").read_text(encoding="utf-8"))
    assert page.canvases == 0
    assert page.of("td").count("a person walks") == 1
    with pytest.raises(ScaMoError, match="out exists"):
        compare(runs[:1], one, target, **options)
    compare(runs[:1], [Prompt("someone runs")], target, **options, overwrite=True)
    assert "someone runs" in (target / "index.html").read_text(encoding="utf-8")
    (target / "manifest.json").unlink()
    with pytest.raises(ScaMoError, match="it was not written here"):
        compare(runs[:1], one, target, **options, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_against_itself_differs_by_exactly_nothing(runs, prompts, evaluator, tmp_path):
    twice = [runs[0], runs[0] / "export"]
    report = compare(twice, prompts[:6], tmp_path / "o", evaluator=evaluator, samples=2, seed=5, device="cpu")
    assert [run["name"] for run in report["runs"]] == ["run", "run-2"]
    for scope in (report["differences"]["all"], *report["differences"]["groups"].values()):
        assert len(scope["run-2"]) == 8
        for one in scope["run-2"].values():
            assert (one["mean"], one["low"], one["high"], one["p"], one["p_holm"]) == (0, 0, 0, 1, 1)
    # Two generations for each prompt, averaged.
    folder = tmp_path / "o" / "motions" / "run"
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"{i:03}-{k}.npz" for i in range(6) for k in (0, 1)
    ]
    for index, row in enumerate(report["per_prompt"]):
        two = [Motion.load(folder / f"{index:03}-{k}.npz") for k in (0, 1)]
        assert [motion.meta["seed"] for motion in two] == [5, 6]
        assert row["runs"]["run"]["duration"] == pytest.approx((len(two[0]) + len(two[1])) / 40)
    assert report["sampling"]["samples"] == 2
    # Six prompts fill no pool: no number, and the reason in its place.
    for key in ("r_precision_1", "r_precision_2", "r_precision_3"):
        assert report["left_out"][key] == "a pool holds 32 prompts, there are 6"
        assert key not in report["measures"]
        assert all(key not in part for part in report["results"]["all"].values())
        assert all(key not in part for row in report["per_prompt"] for part in row["runs"].values())
    page = (tmp_path / "o" / "index.html").read_text(encoding="utf-8")
    assert "R-precision, top 3: a pool holds 32 prompts, there are 6." in page
    assert "the first of 2 motions" in page


def test_a_motion_that_is_too_short_is_held_for_the_evaluator():
    features = np.arange(6.0).reshape(3, 2)
    assert held(features, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert held(features, 3) is features


def test_sampling_options_reach_the_model(runs, tmp_path):
    from scamo.generation.api import ScaMo

    words = ["a person walks", "a person jumps"]
    options = {"temperature": 1.5, "top_k": 7, "top_p": 0.8}
    prompts = [Prompt(text) for text in words]
    report = compare(runs, prompts, tmp_path / "o", seed=3, device="cpu", **options)
    assert report["sampling"] == options | {"greedy": False, "seed": 3, "samples": 1}
    assert set(report["left_out"].values()) == {"no evaluator was given"}
    for run, path in enumerate(runs):
        expected = ScaMo.load(path, device="cpu").generate(words, seed=3, **options)
        for made, wanted in zip(saved(tmp_path / "o", report, run), expected, strict=True):
            assert made.tokens.tolist() == wanted.tokens.tolist()
    text = (tmp_path / "o" / "index.html").read_text(encoding="utf-8")
    assert "temperature 1.5, top-k 7, top-p 0.8" in text


def at_other_rate(run, folder, fps):
    """A copy of a run whose motions have another frame rate."""
    shutil.copytree(run, folder)
    config = folder / "export" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fps": fps}), encoding="utf-8")
    (folder / "export" / "manifest.json").unlink()
    return folder


def test_what_cannot_be_compared_is_refused(runs, prompts, evaluator, tmp_path):
    fast = at_other_rate(runs[0], tmp_path / "fast", 30.0)
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    twice = [prompts[0], prompts[1], prompts[0]]
    out = tmp_path / "results" / "out"
    for arguments, options, message in [
        (([runs[0], fast], prompts), {}, r"fast: 263 features at 30 fps, but .*run has 263 at 20"),
        (
            ([fast], prompts),
            {"evaluator": evaluator},
            "263 features at 20 fps, but .*fast makes 263 at 30",
        ),
        (([], prompts), {}, "runs: expected at least one"),
        ((runs, []), {}, "prompts: expected at least one"),
        ((runs, twice), {}, "stands there 2 times"),
        ((runs, [Prompt(" ")]), {}, "prompt 0 is empty"),
        ((runs, tmp_path / "none.txt"), {}, r"none\.txt: cannot be read"),
        ((runs, prompts), {"names": ["one"]}, "names: expected 2, one for each run, got 1"),
        ((runs, prompts), {"names": ["one", " one "]}, r"names: expected different ones .*\['one', 'one'\]"),
        ((runs, prompts), {"names": ["one", ""]}, "names: expected different ones"),
        ((runs, prompts), {"samples": 0}, "samples = 0: expected at least 1"),
        ((runs, prompts), {"pictures": -1}, "pictures = -1: expected at least 0"),
        ((runs, prompts), {"temperature": -1.0}, "temperature"),
        (([runs[0], tmp_path / "nothing"], prompts), {}, "nothing is neither a run nor an exported model"),
        (
            ([runs[0], unfinished], prompts),
            {},
            "export: no such folder; the run has not finished",
        ),
        ((runs, prompts), {"evaluator": runs[0]}, r"config\.json: format None"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            compare(*arguments, out, device="cpu", **options)
        assert not out.exists()
        assert not out.parent.exists() or not any(out.parent.iterdir())


def test_sign_flips_against_every_choice_of_signs():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        values = rng.normal(0.7, 1, n)
        means = [np.dot(signs, values) / n for signs in itertools.product((1, -1), repeat=n)]
        expected = np.mean(np.abs(means) >= abs(values.mean()) - 1e-12)
        assert sign_flip_p(values) == expected
        assert sign_flip_p(-values[::-1]) == expected
        assert sign_flip_p(np.concatenate((values, np.zeros(40)))) == expected
    assert sign_flip_p([1.0] * 10) == 2 / 2**10
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1, "a sum of 0 but for rounding"
    assert sign_flip_p(np.zeros(30)) == 1


def test_sign_flips_of_many_differences_against_the_binomial_distribution():
    # 14 of 20 differences are 1, the others -1: signs give as large a sum with 14 or more, or 6 or fewer.
    expected = 2 * sum(comb(20, k) for k in range(14, 21)) / 2**20
    found = sign_flip_p([1.0] * 14 + [-1.0] * 6)
    assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 10_000)
    assert sign_flip_p([1.0] * 60) == 1 / 10_001


def test_holm_against_its_steps():
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


def test_pictures_are_spread_over_the_groups():
    groups = ["a"] * 10 + ["b"] * 10 + ["c"]
    chosen = spread(groups, 7)
    assert [groups[i] for i in chosen] == ["a"] * 3 + ["b"] * 3 + ["c"]
    assert chosen == [0, 4, 9, 10, 14, 19, 20]
    assert spread(groups, 99) == list(range(21))
    assert spread(groups, 0) == []
    assert spread(["a", "b"] * 4, 4) == [0, 1, 6, 7]
