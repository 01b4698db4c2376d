"""ScaMo.load and generate on a small random model with the real tokenizer and text encoder classes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import scamo
from scamo.config import EvaluatorConfig, ModelConfig, TokenizerConfig
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.evaluation.contrastive import ContrastiveEvaluator, ContrastiveNetwork
from scamo.evaluation.evaluator import held, load_evaluator
from scamo.generation.api import ScaMo
from scamo.generation.export import export_model
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.features import features_to_joints
from scamo.motion.motion import Motion
from scamo.tokenizers.autoencoder import FSQAutoencoder, VQAutoencoder

TEXTS = ["a person walks", "a person jumps slowly", "runs", "a person walks in a circle"]
TOKENIZER = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
CONFIG = ModelConfig(
    size="", layers=2, heads=2, width=16, codes=25, text_width=12, max_text=16, max_motion=10
)


def make_state():
    torch.manual_seed(1)
    state = PrefixLM(CONFIG).state_dict()
    state["head.weight"] *= 3
    return state


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    FSQAutoencoder(TOKENIZER, torch.zeros(263), torch.full((263,), 0.5)).save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(encoder, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "export"
    return export_model(folder, make_state(), CONFIG, tokenizer, str(encoder))


@pytest.fixture(scope="module")
def model(exported):
    return ScaMo.load(exported, device="cpu")


@pytest.fixture
def copy(exported, tmp_path):
    """An exported model to damage; without the manifest that would notice first."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "manifest.json").unlink()
    return folder


def test_one_sentence_gives_a_motion_whose_parts_fit(model):
    motion = model.generate("a person walks", seed=3)
    assert isinstance(motion, Motion)
    assert (motion.text, motion.fps, motion.meta["seed"]) == ("a person walks", 20, 3)
    assert 1 <= len(motion.tokens) <= 10
    assert motion.joints.shape == (4 * len(motion.tokens), 22, 3)
    features = model.tokenizer.decode(torch.from_numpy(motion.tokens)[None])[0].detach().numpy()
    np.testing.assert_allclose(motion.features, features, atol=1e-6)
    np.testing.assert_allclose(motion.joints, features_to_joints(motion.features), atol=1e-6)


def test_a_list_gives_a_list_in_order_even_of_one(model):
    motions = model.generate(TEXTS)
    assert [motion.text for motion in motions] == TEXTS
    assert isinstance(model.generate(TEXTS[:1]), list)
    assert model.generate([]) == []


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 5, "temperature": 1.3}, {"top_p": 0.7}])
def test_alone_in_a_batch_and_again_are_the_same_motion(model, options):
    together = model.generate(TEXTS, seed=5, **options)
    for batch_size in (1, 3):
        for first, second in zip(
            together, model.generate(TEXTS, seed=5, batch_size=batch_size, **options), strict=True
        ):
            assert first.tokens.tolist() == second.tokens.tolist()
            np.testing.assert_allclose(first.joints, second.joints, atol=1e-5)
    for text, motion in zip(TEXTS, together, strict=True):
        assert model.generate(text, seed=5, **options).tokens.tolist() == motion.tokens.tolist()
    twice = model.generate([TEXTS[0], TEXTS[1], TEXTS[0]], seed=5, **options)
    assert twice[0].tokens.tolist() == twice[2].tokens.tolist()


def test_seeds_and_texts_change_the_motion(model):
    motions = model.generate([TEXTS[0]] * 8, seed=range(8))
    assert len({tuple(motion.tokens) for motion in motions}) > 4
    assert motions[3].tokens.tolist() == model.generate(TEXTS[0], seed=3).tokens.tolist()
    assert len({tuple(motion.tokens) for motion in model.generate(TEXTS)}) == len(TEXTS)


def test_length_limits(model):
    free = model.generate(TEXTS, seed=7)
    for options, most in (
        ({"max_tokens": 3}, 3),
        ({"max_seconds": 0.6}, 3),  # 0.2 s a token
        ({"max_seconds": 0.59}, 2),
        ({"max_tokens": 4, "max_seconds": 0.2}, 1),
    ):
        for cut, whole in zip(model.generate(TEXTS, seed=7, **options), free, strict=True):
            assert cut.tokens.tolist() == whole.tokens[:most].tolist()
    assert any(len(motion.tokens) > 4 for motion in free)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("runs", {"min_tokens": 0}, "min_tokens = 0: expected 1 to 10"),
        (
            "runs",
            {"min_tokens": 5, "max_seconds": 0.8},
            "the shortest length, 5 tokens, is above the longest, 4",
        ),
        (
            "runs",
            {"seconds": 2.2},
            r"seconds = 2.2: expected 0.2 \(one token\) to 2, the model's limit; timeline makes longer",
        ),
        ("runs", {"seconds": 0.05}, "seconds = 0.05"),
        ("runs", {"seconds": 1.0, "max_tokens": 5}, "seconds is the whole length"),
        (["runs", "walks"], {"seconds": [1.0]}, "1 seconds for 2 prompts"),
        ("runs", {"samples": 0}, "samples = 0"),
        ("runs", {"samples": 2, "best_of": 2}, "samples and best_of: give one"),
        ("runs", {"best_of": 2}, "best_of and evaluator: each needs the other"),
        ("runs", {"guidance": 2.0}, r"guidance = 2.0: .*training\.drop_text"),
        ("runs", {"min_p": 2.0}, "min_p = 2.0"),
        ("", {}, "prompt 0 is empty"),
        (["a person walks", " \n"], {}, "prompt 1 is empty"),
        (["a person walks", None], {}, "prompt 1 is not a text: None"),
        ("runs", {"max_tokens": 11}, "max_tokens = 11: expected 1 to 10"),
        ("runs", {"max_tokens": 0}, "max_tokens = 0"),
        ("runs", {"max_seconds": 2.3}, r"max_seconds = 2.3: expected 0.2 \(one token\) to 2,"),
        ("runs", {"max_seconds": 0.1}, "max_seconds = 0.1"),
        ("runs", {"max_seconds": float("nan")}, "max_seconds = nan"),
        ("runs", {"temperature": -1.0}, "temperature = -1.0"),
        ("runs", {"batch_size": 0}, "batch_size = 0"),
        (["runs", "walks"], {"seed": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_bad_prompts_and_options_are_named(model, text, options, message):
    with pytest.raises(ScaMoError, match=message):
        model.generate(text, **options)


def test_lengths_that_are_asked_for(model):
    for options, length in (
        ({"seconds": 1.0}, 5),
        ({"seconds": 0.69}, 3),
        ({"seconds": 0.7}, 4),  # 3.5 tokens: up
        ({"min_seconds": 1.9}, 10),
        ({"min_tokens": 7, "max_tokens": 7}, 7),
    ):
        for motion in model.generate(TEXTS, seed=1, **options):
            assert len(motion.tokens) == length
    lengths = [len(motion.tokens) for motion in model.generate(TEXTS, seconds=[0.2, 2.0, 1.0, 0.4])]
    assert lengths == [1, 10, 5, 2]
    assert any(len(motion.tokens) < 10 for motion in model.generate(TEXTS, seed=7))


def test_samples_are_other_motions_of_which_the_first_is_the_single_one(model):
    several = model.generate(TEXTS[:2], seed=4, samples=5, batch_size=3)
    for text, group in zip(TEXTS, several, strict=False):
        assert group[0].tokens.tolist() == model.generate(text, seed=4).tokens.tolist()
        assert [motion.meta["sample"] for motion in group] == list(range(5))
    assert len({tuple(motion.tokens) for motion in several[0]}) == 5
    alone = model.generate(TEXTS[1], seed=4, samples=2)
    assert [m.tokens.tolist() for m in alone] == [m.tokens.tolist() for m in several[1][:2]]


@pytest.fixture(scope="module")
def evaluator(encoder, tmp_path_factory):
    torch.manual_seed(4)
    config = EvaluatorConfig(feature_dim=263, text_width=12, width=8, embedding=8, layers=1, max_frames=196)
    network = ContrastiveNetwork(config, np.zeros(263), np.full(263, 0.5))
    state = TextEncoder.load(str(encoder), device="cpu").encode(["runs"])[0].astype(np.float32).mean(0)
    folder = tmp_path_factory.mktemp("evaluator") / "evaluator"
    ContrastiveEvaluator(
        network, name="random", fps=20, text_encoder=str(encoder), probe=("runs", state.tolist())
    ).save(folder)
    return folder


def test_best_of_keeps_the_sample_nearest_to_the_text(model, evaluator):
    judge = load_evaluator(evaluator)
    best = model.generate(TEXTS, seed=2, best_of=4, evaluator=evaluator)
    points = judge.embed_texts(TEXTS)
    numbers = set()
    for motion, group, point in zip(best, model.generate(TEXTS, seed=2, samples=4), points, strict=True):
        made = judge.embed_motions([held(one.features, judge.min_frames) for one in group])
        distances = np.linalg.norm(made - point, axis=1)
        assert motion.tokens.tolist() == group[distances.argmin()].tokens.tolist()
        assert motion.meta["matching_score"] == pytest.approx(distances.min(), abs=1e-5)
        numbers.add(motion.meta["sample"])
    assert len(numbers) > 1, "not always the same one"
    again = model.generate(TEXTS[0], seed=2, best_of=4, evaluator=judge)
    assert again.tokens.tolist() == best[0].tokens.tolist()


@pytest.mark.parametrize("options", [{}, {"chunk": 1, "seconds": 2.0}, {"greedy": True, "max_tokens": 4}])
def test_a_stream_is_the_motion_in_pieces(model, options):
    settings = {name: value for name, value in options.items() if name != "chunk"}
    for text in TEXTS:
        whole = model.generate(text, seed=6, **settings)
        pieces = list(model.stream(text, seed=6, **options))
        assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole.tokens.tolist()
        for name in ("joints", "features"):
            got = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_allclose(got, getattr(whole, name), atol=1e-5)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]
        assert [piece.meta["first_frame"] for piece in pieces] == starts.tolist()


def test_a_stream_comes_in_pieces_and_may_be_left(model):
    assert model.stream_latency == 4  # of this tokenizer
    stream = model.stream(TEXTS[0], chunk=1, seconds=2.0)
    other = model.stream(TEXTS[1], chunk=1, seconds=2.0)
    assert [len(next(stream)) for _ in range(5)] == [4] * 5
    assert len(next(other)) == 4
    assert [len(piece) for piece in stream] == [20], "the tokens that nothing more can follow"
    with pytest.raises(ScaMoError, match="prompt 0 is empty"):
        model.stream(" ")
    with pytest.raises(ScaMoError, match="chunk = 0"):
        model.stream("runs", chunk=0)


def test_guidance_with_a_model_that_was_trained_for_it(encoder, tokenizer, tmp_path):
    config = replace(CONFIG, null_text=True)
    folder = export_model(tmp_path / "export", make_state(), config, tokenizer, str(encoder))
    model = ScaMo.load(folder, device="cpu")
    free, guided = (model.generate(TEXTS, seed=5, guidance=g) for g in (1.0, 4.0))
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(free, guided, strict=True))
    for text, motion in zip(TEXTS, guided, strict=True):
        assert model.generate(text, seed=5, guidance=4.0).tokens.tolist() == motion.tokens.tolist()


def test_long_sentences_are_cut_to_the_model(model):
    long = " ".join(["a person walks slowly"] * 20)
    cut = " ".join(long.split()[:16])
    assert len(model.generate(long, greedy=True, max_tokens=5).tokens) >= 1
    states = model.text_encoder.encode([long, cut], 1)
    assert np.array_equal(states[0], states[1])


def test_a_run_folder_is_its_export(exported, model, tmp_path):
    loaded = scamo.ScaMo.load(exported.parent, device="cpu")
    assert loaded.generate(TEXTS[0]).tokens.tolist() == model.generate(TEXTS[0]).tokens.tolist()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ScaMoError, match=r"export: no such folder; the run has not finished"):
        ScaMo.load(tmp_path)


def test_bfloat16_on_a_cpu_and_a_bad_dtype(exported):
    model = ScaMo.load(exported, device="cpu", dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16
    assert np.isfinite(model.generate(TEXTS[0]).joints).all()
    with pytest.raises(ScaMoError, match="dtype = 'float16': expected float32 or bfloat16"):
        ScaMo.load(exported, dtype="float16")


@pytest.mark.parametrize("device", ["gpu", "meta", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_named(exported, device):
    with pytest.raises(ScaMoError, match=f"device = '{device}'"):
        ScaMo.load(exported, device=device)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer/config.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ScaMoError, match=f"{name}: (no such file|missing)"):
        ScaMo.load(copy, device="cpu")


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_other_formats_versions_and_keys_are_named(copy):
    path = copy / "config.json"
    for changes, message in (
        ({"schema_version": 7}, "schema_version 7, this version reads 1"),
        ({"format": "gpt"}, "format 'gpt', expected 'scamo-prefix-lm'"),
    ):
        before = path.read_text()
        edit(path, **changes)
        with pytest.raises(ScaMoError, match=message):
            ScaMo.load(copy, device="cpu")
        path.write_text(before)
    edit(path, model={**json.loads(path.read_text())["model"], "widht": 3})
    with pytest.raises(ScaMoError, match="unknown key widht; did you mean width"):
        ScaMo.load(copy, device="cpu")
    path.write_text("{")
    with pytest.raises(ScaMoError, match=r"config\.json: not valid JSON"):
        ScaMo.load(copy, device="cpu")


def test_a_checkpoint_of_another_shape_names_tensor_and_shapes(copy):
    config = replace(CONFIG, max_motion=10)
    description = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", model={**description["model"], "width": 32})
    with pytest.raises(ScaMoError, match=r"embedding\.weight is \(27, 16\), expected \(27, 32\)"):
        ScaMo.load(copy, device="cpu")
    edit(copy / "config.json", model={**description["model"], "layers": config.layers + 1})
    with pytest.raises(ScaMoError, match=r"missing blocks\.2\.down\.weight"):
        ScaMo.load(copy, device="cpu")


@pytest.mark.parametrize("damage", ["nan", "extra", "truncated"])
def test_damaged_weights_are_named(copy, damage):
    path = copy / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        message = "not a readable safetensors file"
    else:
        state = load_file(path)
        if damage == "nan":
            state["norm.weight"][3] = torch.nan
            message = r"norm\.weight holds values that are not finite"
        else:
            state["lm_head.weight"] = torch.zeros(2)
            message = r"unknown lm_head\.weight"
        save_file(state, path)
    with pytest.raises(ScaMoError, match=message):
        ScaMo.load(copy, device="cpu")


def test_a_changed_byte_is_found_by_the_manifest(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ScaMoError, match=r"model\.safetensors: corrupt"):
        ScaMo.load(folder, device="cpu")


def test_another_tokenizer_or_text_encoder_does_not_fit(copy, encoder, exported, tmp_path):
    other = tmp_path / "other"
    FSQAutoencoder(replace(TOKENIZER, levels=(5, 5, 5))).save(other)
    message = "the tokenizer has 125 codes, but the transformer was made for 25"
    with pytest.raises(ScaMoError, match=message):
        export_model(tmp_path / "out", make_state(), CONFIG, other, str(encoder))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(other, copy / "tokenizer")
    with pytest.raises(ScaMoError, match=message):
        ScaMo.load(copy, device="cpu")

    wide = tmp_path / "wide"
    shutil.copytree(encoder, wide)
    bert = transformers.BertConfig.from_pretrained(encoder)
    bert.hidden_size = 20
    transformers.BertModel(bert).save_pretrained(wide)
    with pytest.raises(ScaMoError, match=r"wide: states of width 20, but .* for 12"):
        ScaMo.load(exported, device="cpu", text_encoder=str(wide))


def test_a_vq_tokenizer_serves_as_well(encoder, tmp_path):
    torch.manual_seed(3)
    config = TokenizerConfig(quantizer="vq", codebook_size=25, width=16, latent_width=8, depth=1)
    VQAutoencoder(config, torch.zeros(263), torch.full((263,), 0.5)).save(tmp_path / "vq")
    folder = export_model(tmp_path / "out", make_state(), CONFIG, tmp_path / "vq", str(encoder))
    model = ScaMo.load(folder, device="cpu")
    assert type(model.tokenizer) is VQAutoencoder
    motion = model.generate(TEXTS[0])
    features = model.tokenizer.decode(torch.from_numpy(motion.tokens)[None])[0].detach().numpy()
    np.testing.assert_allclose(motion.features, features, atol=1e-6)


def test_export_replaces_an_export_and_nothing_else(encoder, tokenizer, tmp_path):
    folder = tmp_path / "export"
    for seed in (0, 1):
        state = make_state()
        state["norm.weight"] += seed
        export_model(folder, state, CONFIG, tokenizer, str(encoder))
        assert torch.equal(load_file(folder / "model.safetensors")["norm.weight"], state["norm.weight"])
    bad = make_state()
    bad["norm.weight"] = torch.zeros(3)
    with pytest.raises(ScaMoError, match=r"norm\.weight is \(3,\), expected \(16,\)"):
        export_model(folder, bad, CONFIG, tokenizer, str(encoder))
    assert torch.equal(load_file(folder / "model.safetensors")["norm.weight"], state["norm.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"], "nothing half-written is left"

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ScaMoError, match="was not written here"):
        export_model(tmp_path / "precious", make_state(), CONFIG, tokenizer, str(encoder))
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_exported_files_are_readable_by_others(exported):
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "manifest.json", "model.safetensors", "tokenizer",
    }  # fmt: skip
    assert (exported / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_the_moving_average_generates_where_there_is_one(encoder, tokenizer, exported, tmp_path):
    state = make_state()
    ema = {name: tensor * 0.5 for name, tensor in state.items()}
    folder = export_model(tmp_path / "export", state, CONFIG, tokenizer, str(encoder), ema=ema)
    for choice, expected in ((None, ema), (True, ema), (False, state)):
        loaded = ScaMo.load(folder, device="cpu", ema=choice).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert torch.equal(ScaMo.load(exported, ema=False).model.head.weight, state["head.weight"])
    with pytest.raises(ScaMoError, match=r"ema\.safetensors: no such file; the training kept no average"):
        ScaMo.load(exported, ema=True)

    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.raises(ScaMoError, match=r"ema\.safetensors"):
        ScaMo.load(folder, ema=False)


def test_a_moving_average_of_another_model_is_not_exported(encoder, tokenizer, tmp_path):
    state = make_state()
    ema = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    with pytest.raises(ScaMoError, match=r"ema\.safetensors: .*missing head\.weight"):
        export_model(tmp_path / "export", state, CONFIG, tokenizer, str(encoder), ema=ema)
    assert list(tmp_path.iterdir()) == []
