"""A folder of motions from a file of prompts: what is read, what is written, and that no stop changes it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from scamo import cli
from scamo.config import ModelConfig, TokenizerConfig
from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.generation.api import ScaMo
from scamo.generation.export import export_model
from scamo.generation.jobs import check_formats, generate_folder, prompts_of, read_prompts
from scamo.generation.long import Timeline
from scamo.motion.motion import Motion
from scamo.tokenizers.autoencoder import FSQAutoencoder

CONFIG = ModelConfig(
    size="", layers=1, heads=2, width=16, codes=25, text_width=12, max_text=16, max_motion=10
)
TEXTS = [f"a person {verb}{' a' * n}" for n in range(10) for verb in ("walks", "runs", "jumps")]
SMALL = {"device": "cpu", "batch_size": 1, "progress": False}


@pytest.fixture(scope="module")
def exported(make_model, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shutil.copytree(encoder, folder / "encoder")
    config = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
    FSQAutoencoder(config, torch.zeros(263), torch.full((263,), 0.5)).save(folder / "tokenizer")
    state = make_model(CONFIG).state_dict()
    return export_model(folder / "export", state, CONFIG, folder / "tokenizer", str(folder / "encoder"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "motions.jsonl").read_text("utf-8").splitlines()]


def test_prompts_of_every_kind_of_file(tmp_path, monkeypatch):
    sentences = "\ufeff# a comment\n\n  walks 🚶 \r\n一个人在走路\na b\nwalks 🚶\n".encode()
    (tmp_path / "a.txt").write_bytes(sentences)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sentences)))
    expected = ["walks 🚶", "一个人在走路", "a b", "walks 🚶"]
    for source in (tmp_path / "a.txt", "-"):
        assert [prompt.text for prompt in read_prompts(source)] == expected
    (tmp_path / "a.jsonl").write_text(
        '{"text": "runs", "seed": 3, "seconds": 2, "name": "läuft", "group": 1}\n\n{"prompt": "jumps"}\n',
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text(
        'text,seed,seconds,name,group\n"runs,\nthen jumps",3,2.5,läuft,x\njumps,,,,\n', encoding="utf-8"
    )
    for name, text, seconds, group in (("a.jsonl", "runs", 2, 1), ("a.csv", "runs,\nthen jumps", 2.5, "x")):
        first, second = read_prompts(tmp_path / name)
        assert (first.text, first.seed, first.seconds, first.name) == (text, 3, seconds, "läuft")
        assert first.extra == {"group": group}
        assert (second.text, second.seed, second.seconds, second.name) == ("jumps", None, None, "")


def test_prompts_of_several_parts_and_of_a_start(tmp_path):
    entries = [
        {"parts": [["walks", 2], "jumps ", ["sits", None]], "seed": 3},
        {"text": "runs", "start": "deep/a.npz", "seconds": 1.5},
        {"parts": ["runs"], "start": "/b.npz"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "a.csv").write_text("text,parts,start\nwalks,two,x.npz\n")
    line, start, both = read_prompts(tmp_path / "a.jsonl")
    assert line.parts == line.timeline == (("walks", 2), ("jumps", None), ("sits", None))
    assert (line.text, line.seed, line.start) == ("walks, then jumps, then sits", 3, "")
    assert (start.start, start.parts) == (str(tmp_path / "deep" / "a.npz"), ())
    assert start.timeline == (("runs", 1.5),)
    assert (both.start, both.timeline) == ("/b.npz", (("runs", None),))
    (row,) = read_prompts(tmp_path / "a.csv")  # a column like any other
    assert (row.timeline, row.extra) == ((), {"parts": "two", "start": "x.npz"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no prompts"),
        ("a.txt", b"# only\n \n", "a.txt: holds no prompts"),
        ("a.txt", b"walks\nruns \xff\n", r"a.txt:2: not UTF-8 \(byte 0xff\)"),
        ("a.doc", b"walks", "a.doc: expected prompts as .txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n', "a.jsonl:2: an empty sentence"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl:3: not valid JSON"),
        ("a.jsonl", b'["walks"]', "a.jsonl:1: expected an object, got list"),
        ("a.jsonl", b'{"txt": "a"}', r"a.jsonl:1: no sentence: expected \"text\", found \['txt'\]"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text is 3"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: not valid Unicode"),
        ("a.jsonl", b'{"text": "a", "seed": 1.5}', "a.jsonl:1: seed is 1.5"),
        ("a.jsonl", b'{"text": "a", "seconds": NaN}', "a.jsonl:1: seconds is nan"),
        ("a.jsonl", b'{"text": "a", "more": NaN}', "a.jsonl:1: holds NaN"),
        ("a.jsonl", b'{"text": "a", "name": "../b"}', "a.jsonl:1: name is '../b'"),
        ("a.jsonl", b'{"text": "a", "parts": ["b"]}', 'a.jsonl:1: has "text" and "parts"'),
        ("a.jsonl", b'{"parts": []}', r"a.jsonl:1: parts is \[\]"),
        ("a.jsonl", b'{"parts": "a"}', "a.jsonl:1: parts is 'a'"),
        ("a.jsonl", b'{"parts": ["a", ["b", 1, 2]]}', "a.jsonl:1: part 1 is"),
        ("a.jsonl", b'{"parts": ["a", ["b", -1]]}', "a.jsonl:1: part 1: seconds is -1"),
        ("a.jsonl", b'{"parts": [" "]}', "a.jsonl:1: part 0: an empty sentence"),
        ("a.jsonl", b'{"parts": [3]}', "a.jsonl:1: part 0 is 3"),
        ("a.jsonl", b'{"parts": ["a"], "seconds": 2}', "a.jsonl:1: seconds: give them in parts"),
        ("a.jsonl", b'{"text": "a", "start": 3}', "a.jsonl:1: start is 3"),
        ("a.csv", b"text,seed\na,1\nb,1,2\n", "a.csv:3: expected 2 columns"),
        ("a.csv", b"text,seed\na,one\n", "a.csv:2: seed is 'one'"),
        ("a.csv", b"text,seed\n,1\n", "a.csv:2: no sentence"),
        ("a.csv", b'text\n"a\n', "not valid CSV"),
    ],
)
def test_a_bad_file_of_prompts_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScaMoError, match=message):
        read_prompts(tmp_path / name)


def test_formats():
    assert check_formats("npz, BVH") == (".npz", ".bvh")
    for bad in ("npz,docx", "", "npz,npz", "npz,"):
        with pytest.raises(ScaMoError):
            check_formats(bad)


def test_the_folder_holds_what_the_model_generates_and_says_how(exported, tmp_path):
    entries = [
        {"text": "a person walks", "seed": 5, "group": "x"},
        {"text": "a person runs", "seconds": 1.0, "name": "run"},
        {"text": "a person walks", "seed": 5},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    prompts = read_prompts(tmp_path / "p.jsonl")
    out = tmp_path / "deep" / "out"
    generate_folder(
        exported, prompts, out, formats="npz,csv", seed=2, samples=2, max_tokens=4, temperature=0.9, **SMALL
    )
    lines = lines_of(out)
    assert [(line["index"], line["sample"]) for line in lines] == [(i, n) for i in range(3) for n in range(2)]
    assert [line["seed"] for line in lines[::2]] == [5, 2, 5]
    assert lines[0]["extra"] == {"group": "x"}
    assert lines[2]["files"].keys() == {"run-0.npz", "run-0.csv"}
    assert lines[4]["files"].keys() == {"000002-0.npz", "000002-0.csv"}
    model = ScaMo.load(exported, device="cpu")
    settings = {"samples": 2, "temperature": 0.9}
    walk = model.generate("a person walks", seed=5, max_tokens=4, **settings)
    run = model.generate("a person runs", seed=2, seconds=1.0, **settings)
    for line, motion in zip(lines, [*walk, *run, *walk], strict=True):
        for name, record in line["files"].items():
            assert sha256_of(out / name) == record["sha256"]
        stored = Motion.load(out / next(iter(line["files"])))
        assert stored.tokens.tolist() == motion.tokens.tolist()
        assert (stored.text, line["text"], line["frames"]) == (motion.text, motion.text, len(motion))
    # The same sentence and seed: the same motion, to the byte.
    assert (out / "000000-1.npz").read_bytes() == (out / "000002-1.npz").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["sha256"]["transformer"] == sha256_of(exported / "model.safetensors")
    assert manifest["files"]["motions.jsonl"]["sha256"] == sha256_of(out / "motions.jsonl")
    assert {"temperature": 0.9, "samples": 2, "batch_size": 1}.items() <= manifest["settings"].items()
    written = {name for line in lines for name in line["files"]}
    assert contents(out).keys() == written | {"manifest.json", "motions.jsonl"}


def test_the_command_passes_its_options_on(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a person walks\na person runs\n")))
    options = ["--min-tokens", "3", "--max-tokens", "6", "--temperature", "0.9", "--min-p", "0.01"]
    run = ["--run", str(exported)]
    command = ["generate", "--prompts", "-", "--format", "npz,bvh", "-o", str(tmp_path / "out"), *run]
    assert cli.main([*command, "--seed", "4", "--samples", "2", *options]) == 0
    texts = ["a person walks", "a person runs"]
    single = ["generate", *texts, "-o", str(tmp_path / "one.npz"), *run]
    assert cli.main([*single, "--seeds", "4", "4", "--samples", "2", "--batch-size", "3", *options]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "out"), *(str(tmp_path / f"one-{i}.npz") for i in range(4))]
    groups = ScaMo.load(exported, device="cpu").generate(
        texts, seed=4, samples=2, min_tokens=3, max_tokens=6, temperature=0.9, min_p=0.01
    )
    expected = [motion.tokens.tolist() for group in groups for motion in group]
    assert all(3 <= len(tokens) <= 6 for tokens in expected)
    for index in range(4):
        inside = tmp_path / "out" / f"{index // 2:06d}-{index % 2}.npz"
        for path in (inside, tmp_path / f"one-{index}.npz"):
            assert Motion.load(path).tokens.tolist() == expected[index]
        assert inside.with_suffix(".bvh").is_file()


def some_prompts(folder, model):
    """Sentences, timelines and what goes on from a motion; three chunks of the jobs below."""
    model.generate("a person walks", seed=3, seconds=1.0).save(folder / "start.npz")
    entries = [
        {"parts": [["a person walks", 0.6], "a person runs", ["a person jumps", 4.0]], "name": "line"},
        {"text": "a person runs"},
        {"text": "a person jumps", "start": "start.npz", "seed": 4},
        {"text": "a person walks", "seconds": 0.6},
        {"parts": ["a person runs", ["a person walks", 1.0]], "start": "start.npz", "group": 1},
        {"text": "a person jumps"},
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return read_prompts(folder / "p.jsonl")


def test_timelines_and_continuations_stand_among_sentences(exported, tmp_path):
    model = ScaMo.load(exported, device="cpu")
    prompts = some_prompts(tmp_path, model)
    options = {"seed": 2, "samples": 2, "temperature": 0.9, "max_tokens": 3}
    generate_folder(exported, prompts, tmp_path / "out", **options, **SMALL)
    shared = {"samples": 2, "temperature": 0.9}
    start = tmp_path / "start.npz"
    first, second = prompts[0].parts, prompts[4].parts
    expected = [
        model.timeline(first, seed=2, **shared),
        model.generate("a person runs", seed=2, max_tokens=3, **shared),
        model.continue_motion(start, "a person jumps", seed=4, **shared),
        model.generate("a person walks", seed=2, seconds=0.6, **shared),
        model.timeline(second, start=start, seed=2, **shared),
        model.generate("a person jumps", seed=2, max_tokens=3, **shared),
    ]
    lines = lines_of(tmp_path / "out")
    for line, motion in zip(lines, [motion for group in expected for motion in group], strict=True):
        stored = Motion.load(tmp_path / "out" / next(iter(line["files"])))
        assert stored.tokens.tolist() == motion.tokens.tolist()
        assert stored.meta.get("parts") == line.get("parts") == motion.meta.get("parts")
        assert line["sample"] == motion.meta["sample"]
    assert lines[0]["files"].keys() == {"line-0.npz"}
    assert [part["frames"] for part in lines[0]["parts"]][::2] == [12, 80]
    assert lines[4]["start"] == {"name": "start.npz", "sha256": sha256_of(start)}
    assert (lines[8]["extra"], lines[8]["parts"][0]["first_frame"]) == ({"group": 1}, 20)


def test_a_stopped_job_of_timelines_goes_on_and_knows_its_starts(exported, tmp_path, monkeypatch):
    prompts = some_prompts(tmp_path, ScaMo.load(exported, device="cpu"))
    options = {"temperature": 0.9, **SMALL, "samples": 2}  # two prompts a chunk
    generate_folder(exported, prompts, tmp_path / "whole", **options)
    before = contents(tmp_path / "whole")

    made = []

    def save(motion, path, *rest, really=Motion.save):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(path.name)
        return really(motion, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Motion, "save", save)
        with pytest.raises(KeyboardInterrupt):
            generate_folder(exported, prompts, tmp_path / "cut", **options)
    assert len(lines_of(tmp_path / "cut")) == 4
    # Another place of the same start is no other job; another start is.
    (tmp_path / "start.npz").rename(tmp_path / "moved.npz")
    text = (tmp_path / "p.jsonl").read_text().replace("start.npz", "moved.npz")
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ScaMoError, match=r"p.jsonl:3: start .*start.npz: No such file"):
        generate_folder(exported, prompts, tmp_path / "cut", **options)
    content = (tmp_path / "moved.npz").read_bytes()
    Motion.load(tmp_path / "moved.npz").cleaned(smooth=5.0).save(tmp_path / "moved.npz")
    with pytest.raises(ScaMoError, match="prompts.sha256 was"):
        generate_folder(exported, read_prompts(tmp_path / "p.jsonl"), tmp_path / "cut", **options)
    (tmp_path / "start.npz").write_bytes(content)
    generate_folder(exported, prompts, tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == before


def test_every_motion_is_told_when_it_has_its_tokens(exported):
    """What moves the bar: not a chunk at its end, but rows as they end."""
    model = ScaMo.load(exported, device="cpu")
    told = []
    lengths = [2.0, 0.4, 1.0]
    motions = model.generate(
        TEXTS[:3], seconds=lengths, samples=2, batch_size=6, finished=lambda index: told.append(index)
    )
    assert [len(group) for group in motions] == [2, 2, 2]
    assert told == [1, 1, 2, 2, 0, 0]
    told.clear()
    lines = [Timeline([(text, seconds)]) for text, seconds in zip(TEXTS, lengths, strict=False)]
    model.timelines(lines, batch_size=3, finished=lambda index: told.append(index))
    assert told == [1, 2, 0]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_a_killed_job_goes_on_to_the_same_bytes(exported, tmp_path):
    prompts, cut, whole = tmp_path / "p.txt", tmp_path / "cut", tmp_path / "whole"
    prompts.write_text("\n".join(TEXTS))
    code = (
        "import sys; from scamo.cli import main; outs, *command = sys.argv[1:]\n"
        "sys.exit(max(main([*command, '-o', out]) for out in outs.split(',')))"
    )

    def start(*folders):
        options = ["--run", exported, "--prompts", prompts, "--format", "npz,bvh", "--batch-size", "1"]
        command = [sys.executable, "-c", code, ",".join(map(str, folders)), "generate", *options]
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def lines_done():
        path = cut / "motions.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    for moment in (lambda: (cut / "manifest.json").is_file(), lambda: lines_done() >= 8):
        process = start(cut)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert "files" not in json.loads((cut / "manifest.json").read_text())
    done = lines_done()
    assert 8 <= done < len(TEXTS)
    with (cut / "motions.jsonl").open("a") as file:
        file.write('{"index": ')  # as a stop in the middle of a write leaves it

    process = start(cut, whole)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{cut}: {done} of {len(TEXTS)} prompts are done" in errors
    assert contents(cut) == contents(whole)
    assert len(lines_of(cut)) == len(TEXTS)


@pytest.fixture(scope="module")
def finished(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return generate_folder(exported, prompts_of(TEXTS[:10]), folder, temperature=0.8, **SMALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.7}, "settings.temperature was 0.8 and is 0.7"),
        ({"seed": 1}, "settings.seed was 0 and is 1"),
        ({"top_k": 3}, "settings.top_k was null and is 3"),
        ({"formats": "csv"}, 'settings.formats was \\["npz"\\] and is \\["csv"\\]'),
        ({"batch_size": 2}, "settings.batch_size was 1 and is 2"),
        ({"prompts": prompts_of(TEXTS[:9])}, "prompts.count was 10 and is 9"),
        ({"prompts": prompts_of(TEXTS[1:11])}, "prompts.sha256 was"),
    ],
)
def test_another_job_does_not_go_on_in_the_folder(exported, finished, changed, message):
    before = contents(finished)
    options = {"prompts": prompts_of(TEXTS[:10]), "out": finished, "temperature": 0.8, **SMALL} | changed
    with pytest.raises(ScaMoError, match=message):
        generate_folder(exported, **options)
    assert contents(finished) == before


def test_another_model_does_not_go_on_in_the_folder(exported, finished, tmp_path):
    state = load_file(exported / "model.safetensors")
    encoder = json.loads((exported / "config.json").read_text())["text_encoder"]
    other = export_model(
        tmp_path / "m", {name: t * 1.01 for name, t in state.items()}, CONFIG, exported / "tokenizer", encoder
    )
    with pytest.raises(ScaMoError, match="model.sha256.transformer was"):
        generate_folder(other, prompts_of(TEXTS[:10]), finished, temperature=0.8, **SMALL)


def test_damage_is_mended_and_overwriting_begins_again(exported, finished):
    before = contents(finished)
    prompts = prompts_of(TEXTS[:10])
    (finished / "000009.npz").write_bytes(b"changed")
    generate_folder(exported, prompts, finished, temperature=0.8, **SMALL)
    assert contents(finished) == before
    (finished / "000005.npz").unlink()
    generate_folder(exported, prompts, finished, temperature=0.8, **SMALL)
    assert contents(finished) == before
    generate_folder(exported, prompts, finished, temperature=0.8, **SMALL)  # nothing is left to do
    assert contents(finished) == before
    assert all(path.is_file() for path in finished.iterdir())
    generate_folder(exported, prompts, finished, temperature=0.7, overwrite=True, **SMALL)
    assert contents(finished).keys() == before.keys()
    assert contents(finished) != before
    generate_folder(exported, prompts, finished, temperature=0.8, overwrite=True, **SMALL)
    assert contents(finished) == before


def test_a_folder_of_something_else_is_kept(exported, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    before = contents(tmp_path)
    for out in (tmp_path / "file", tmp_path / "folder"):
        for overwrite in (False, True):
            with pytest.raises(ScaMoError, match=str(out)):
                generate_folder(exported, prompts_of(TEXTS[:1]), out, overwrite=overwrite, **SMALL)
    assert contents(tmp_path) == before


def test_one_writer_at_a_time(exported, finished):
    fcntl = pytest.importorskip("fcntl")
    descriptor = os.open(finished, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ScaMoError, match="another process is writing there"):
            generate_folder(exported, prompts_of(TEXTS[:10]), finished, temperature=0.8, **SMALL)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([{"text": "a", "seconds": 99}], {}, "p.jsonl:1: seconds = 99: expected 0.2"),
        ([{"text": "a"}, {"parts": ["a", ["b", 0.01]]}], {}, "p.jsonl:2: part 1: seconds = 0.01"),
        ([{"text": "a", "start": "none.npz"}], {}, "p.jsonl:1: start .*none.npz: No such file"),
        ([{"text": "a", "start": "p.jsonl"}], {}, "p.jsonl:1: .*p.jsonl: cannot read suffix"),
        ([{"text": "a", "name": "x"}, {"text": "b", "name": "X"}], {}, "p.jsonl:2: the name 'X' is taken"),
        ([{"text": "a", "name": "000001"}, {"text": "b"}], {}, "p.jsonl:2: the name '000001' is taken"),
        ([{"text": "a"}], {"formats": "docx"}, "format 'docx'"),
        ([{"text": "a"}], {"temperature": -1.0}, "temperature = -1.0"),
        ([{"text": "a"}], {"max_tokens": 11}, "max_tokens = 11"),
        ([{"text": "a"}], {"seconds": 1.0, "max_tokens": 5}, "seconds is the whole length"),
        ([{"text": "a"}], {"best_of": 2}, "best_of and evaluator"),
        ([{"text": "a"}], {"batch_size": 0}, "batch_size = 0"),
        ([{"text": "a"}], {"dtype": "float16"}, "dtype = 'float16'"),
        ([{"text": "a"}], {"ema": True}, "kept no average"),
        ([{"text": "a"}], {"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    exported, tmp_path, entries, options, message
):
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    before = contents(tmp_path)
    with pytest.raises(ScaMoError, match=message):
        generate_folder(exported, read_prompts(tmp_path / "p.jsonl"), tmp_path / "out", **(SMALL | options))
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()
