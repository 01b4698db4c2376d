"""Imported ScaMo checkpoints, of random weights, against the released behaviour in plain torch (conftest)."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from scamo.config import FSQ_LEVELS, MODEL_SIZES
from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError
from scamo.generation.api import ScaMo
from scamo.generation.decode import generate_tokens
from scamo.generation.export import load_transformer, read_export
from scamo.generation.sampling import Sampling, prompt_keys
from scamo.importers.autoencoder import infer_config
from scamo.importers.scamo_official import convert_transformer, import_scamo_official, infer_transformer
from scamo.importers.t2m_gpt import import_t2m_gpt_tokenizer
from scamo.models.prefix_lm import PrefixLM
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import FSQAutoencoder, VQAutoencoder

CODES = {256: 240, 512: 512, 1024: 1000, 2048: 1920, 4096: 4375, 16384: 15360, 65536: 64000}
LEVELS = {
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    2048: (8, 8, 6, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}
TEXT, HEADS = 12, 4
WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "walks", "runs", "jumps", "in", "circle", "slowly"]


def tokenizer_state(released, size=256, seed=0):
    return released.draw(
        released.tokenizer_shapes(width=16, latent=12, channels=len(LEVELS[size])), seed=seed
    )


def transformer_state(released, *, codes=240, width=32, tied=False, seed=1):
    shapes = released.transformer_shapes(layers=2, width=width, codes=codes, text_width=TEXT, tied=tied)
    return released.draw(shapes, seed=seed)


def saved(path, **content):
    torch.save(content, path)
    return path


@pytest.fixture
def files(released, tmp_path):
    """Two small checkpoints as they are released: one file each."""
    return {
        "net": saved(tmp_path / "net.pth", net=tokenizer_state(released)),
        "trans": saved(tmp_path / "trans.pth", trans=transformer_state(released)),
    }


def do_import(files, out, statistics, **options):
    defaults = {"text_encoder": "t5", "heads": HEADS}
    return import_scamo_official(list(files.values()), out, **defaults | statistics | options)


def open_transformer(folder):
    return load_transformer(
        folder / "model.safetensors", read_export(folder)[1], torch.device("cpu"), torch.float32
    )


@pytest.fixture
def imported(files, statistics, tmp_path):
    return do_import(files, tmp_path / "model", statistics)


def texts(*lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, TEXT, generator=generator) for length in lengths]


def wide(state):
    return {name: tensor.double() for name, tensor in state.items()}


# Shapes


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_every_size_and_codebook_is_told_by_its_shapes(released, name):
    layers, heads, width = MODEL_SIZES[name]
    for size, codes in CODES.items():
        shapes = released.transformer_shapes(layers=layers, width=width, codes=codes, text_width=2048)
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        config = infer_transformer(tensors, "file")
        assert (config.size, config.layers, config.heads, config.width) == (name, layers, heads, width)
        assert (config.codes, config.text_width, config.max_positions) == (codes, 2048, 201)
        converted = convert_transformer(tensors, config)
        if size in (256, 65536):
            with torch.device("meta"):
                expected = PrefixLM(config).state_dict()
            assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}

        shapes = released.tokenizer_shapes(channels=len(LEVELS[size]))
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        tokenizer = infer_config(tensors, "file", "fsq", codes=config.codes)
        assert (tokenizer.codebook_size, tokenizer.fsq_levels) == (size, LEVELS[size])
        assert (tokenizer.codes, tokenizer.downsampling) == (codes, 4)
        assert (tokenizer.width, tokenizer.latent_width, tokenizer.depth) == (512, 512, 3)


def test_the_3b_head(released):
    shapes = released.transformer_shapes(layers=24, width=3200, codes=64000, text_width=2048)
    assert shapes["lm_head.weight"] == (64001, 3200)
    assert shapes["transformer.h.0.mlp.c_fc1.weight"] == (8704, 3200)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert infer_transformer(tensors, "file").head_dim == 100


@pytest.mark.parametrize("channels", [3, 4, 5])
def test_levels_of_a_tokenizer_alone_are_asked_for(released, statistics, tmp_path, channels):
    sizes = [size for size, levels in LEVELS.items() if len(levels) == channels]
    path = saved(tmp_path / "net.pth", net=tokenizer_state(released, sizes[0]))
    choices = " or ".join(rf"{size} \({CODES[size]} codes\)" for size in sizes)
    with pytest.raises(ScaMoError, match=f"net.pth: {channels} FSQ channels are codebook_size {choices}"):
        import_scamo_official([path], tmp_path / "out", **statistics)
    for size in sizes:
        out = import_scamo_official([path], tmp_path / str(size), **statistics, codebook_size=size)
        assert load_tokenizer(out).config.fsq_levels == LEVELS[size]
    with pytest.raises(ScaMoError, match=r"not codebook_size = 65536"):
        import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=65536)
    with pytest.raises(ScaMoError, match=r"codebook_size = 300: expected one of 256, 512"):
        import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=300)
    assert not (tmp_path / "out").exists()


# The tokenizer


def random_motion(statistics, batch=3, frames=64, seed=5):
    """Normalised and raw features."""
    x = torch.randn(batch, frames, 263, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.from_numpy(np.load(statistics[name])) for name in ("mean", "std"))
    return x, (x.double() * std + mean).float(), mean.double(), std.double()


@pytest.mark.parametrize("size", FSQ_LEVELS)
def test_tokens_and_motion_are_the_released_ones(released, statistics, tmp_path, size):
    state = tokenizer_state(released, size)
    path = saved(tmp_path / "net.pth", net={f"module.{name}": t for name, t in state.items()})
    tokenizer = load_tokenizer(
        import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=size)
    )
    assert type(tokenizer) is FSQAutoencoder
    assert tokenizer.codes == CODES[size]
    _, raw, mean, std = random_motion(statistics, frames=67)
    exact = wide(state)
    expected, margin = released.fsq(exact, released.latents(exact, (raw.double() - mean) / std), LEVELS[size])
    indices = tokenizer.encode(raw)
    assert indices.shape == (3, 16)
    other = indices != expected
    assert not (other & (margin > 1e-5)).any(), "only a tie of the rounding may fall the other way"
    assert other.float().mean() < 0.05
    assert indices.unique().numel() > 20

    made = tokenizer.decode(indices)
    quantised = released.fsq_vectors(exact, indices, LEVELS[size])
    expected = released.reconstruct(exact, quantised) * std + mean
    assert made.shape == (3, 64, 263)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-4)


def test_another_order_of_dilations_loads_and_changes_most_tokens(released, statistics, tmp_path):
    state = tokenizer_state(released, 65536)
    out = import_scamo_official([saved(tmp_path / "net.pth", net=state)], tmp_path / "out", **statistics)
    tokenizer = load_tokenizer(out)
    x, raw, *_ = random_motion(statistics)
    right = tokenizer.encode(raw)
    for name, module in tokenizer.encoder.named_modules():
        if name.endswith("conv1"):
            block = int(name.split(".")[-2])
            assert module.dilation == ((9, 3, 1)[block],)
            module.dilation = module.padding = ((1, 3, 9)[block],)
    tokenizer.load_state_dict(tokenizer.state_dict(), strict=True)
    wrong = tokenizer.encode(raw)
    assert (wrong != right).float().mean() > 0.8
    reversed_order = released.fsq(state, released.latents(state, x, (1, 3, 9)), LEVELS[65536])[0]
    assert (wrong == reversed_order).float().mean() > 0.95


# The transformer


@pytest.mark.parametrize(("width", "heads"), [(32, 4), (100, 1), (48, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_released_ones(released, statistics, tmp_path, width, heads, tied):
    state = transformer_state(released, width=width, tied=tied)
    if tied:
        state["transformer.wte.weight"] /= width**0.5
        state["lm_head.weight"] = state["transformer.wte.weight"]  # one tensor under two names
    files = {"both": saved(tmp_path / "both.pth", net=tokenizer_state(released), trans=state)}
    folder = do_import(files, tmp_path / "out", statistics, heads=heads)
    model = open_transformer(folder)
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (7, 20), (40, 50), (3, 6)]
    samples = [
        Sample(text.numpy(), rng.integers(0, 240, m))
        for text, (_, m) in zip(texts(*(p for p, _ in lengths)), lengths, strict=True)
    ]
    with torch.no_grad():
        ours = model.logits(collate(samples, 240)).split([m + 1 for _, m in lengths])
    for found, sample in zip(ours, samples, strict=True):
        text = torch.from_numpy(sample.text).double()
        expected = released.logits(wide(state), text, sample.motion.tolist(), heads)
        assert expected.shape[1] == (242 if tied else 241)
        assert found.shape == (len(sample.motion) + 1, 241), "no row for PAD"
        error = (found - expected[:, :241]).abs().max() / expected.abs().max()
        assert error < 1e-5
        assert expected.std() > 0.5


def greedy(folder, states):
    keys = prompt_keys([0] * len(states), [""] * len(states))
    model = open_transformer(folder)
    motions = generate_tokens(model, states, keys, Sampling(greedy=True), max_tokens=50)
    return [motion.tolist() for motion in motions]


def test_greedy_motions_are_the_released_ones(released, imported):
    state = transformer_state(released)
    states = texts(5, 1, 11, 150)
    expected = [released.sample_greedily(state, text, HEADS) for text in states]
    assert greedy(imported, states) == expected
    assert max(map(len, expected)) == 50, "the released limit"
    assert min(len(set(motion)) for motion in expected) > 5


@pytest.mark.parametrize("step", [1, 3, 17])
def test_eos_ends_a_motion_as_released(released, files, statistics, tmp_path, step):
    states = texts(5, 8, 11)
    state = released.stop_at(transformer_state(released), states[0], HEADS, step)
    saved(files["trans"], trans=state)
    expected = [released.sample_greedily(state, text, HEADS) for text in states]
    assert 1 <= len(expected[0]) <= step
    assert greedy(do_import(files, tmp_path / "out", statistics), states) == expected


def test_eos_first_is_token_1_as_released_and_forbidden_here(released, files, statistics, tmp_path):
    (text,) = texts(6)
    state = released.stop_at(transformer_state(released), text, HEADS, 0)
    saved(files["trans"], trans=state)
    assert int(released.logits(state, text, [], HEADS)[-1].argmax()) == 240
    assert released.sample_greedily(state, text, HEADS) == [1]
    expected = released.sample_greedily(state, text, HEADS, allow_empty=False)
    assert expected[0] != 1
    assert greedy(do_import(files, tmp_path / "out", statistics), [text]) == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_transformer_keeps_its_dtype(released, statistics, tmp_path, dtype):
    trans = {name: t.to(dtype) for name, t in transformer_state(released).items()}
    net = {name: t.to(dtype) for name, t in tokenizer_state(released).items()}
    out = do_import(
        {"both": saved(tmp_path / "both.pth", net=net, trans=trans)}, tmp_path / "out", statistics
    )
    state = load_file(out / "model.safetensors")
    assert {t.dtype for t in state.values()} == {dtype}
    assert torch.equal(state["blocks.1.gate_up.weight"][:256], trans["transformer.h.1.mlp.c_fc1.weight"])
    assert torch.equal(state["blocks.1.gate_up.weight"][256:], trans["transformer.h.1.mlp.c_fc2.weight"])
    tokenizer = load_file(out / "tokenizer/model.safetensors")
    assert {t.dtype for t in tokenizer.values()} == {torch.float32}
    name = "decoder.model.6.weight"
    assert torch.equal(tokenizer[name], net[f"vqvae.{name}"].float())


# The whole model


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=TEXT, d_kv=6, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.T5EncoderModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_a_sentence_gives_the_released_motion(released, files, statistics, tmp_path, t5):
    out = do_import(files, tmp_path / "model", statistics, text_encoder=str(t5))
    model = ScaMo.load(out, device="cpu")
    trans, net = transformer_state(released), wide(tokenizer_state(released))
    *_, mean, std = random_motion(statistics)
    for sentence in ("a person walks slowly", "jumps"):
        motion = model.generate(sentence, greedy=True)
        text = torch.from_numpy(model.text_encoder.encode([sentence])[0]).float()
        expected = released.sample_greedily(trans, text, HEADS, allow_empty=False)
        assert motion.tokens.tolist() == expected
        quantised = released.fsq_vectors(net, torch.tensor([expected]), LEVELS[256])
        features = released.reconstruct(net, quantised)[0] * std + mean
        np.testing.assert_allclose(motion.features, features.numpy(), rtol=1e-5, atol=1e-4)


def test_the_folder_says_where_it_comes_from(files, statistics, imported):
    def hashes(*paths):
        return [{"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths]

    description = json.loads((imported / "config.json").read_text())
    assert description["provenance"] == {"importer": "scamo_official", "files": hashes(files["trans"])}
    description = json.loads((imported / "tokenizer/config.json").read_text())
    expected = hashes(files["net"], statistics["mean"], statistics["std"])
    assert description["provenance"] == {"importer": "scamo_official", "files": expected}


def test_a_tokenizer_folder_goes_with_a_transformer(released, files, statistics, imported, tmp_path):
    alone = import_scamo_official([files["net"]], tmp_path / "tokenizer", **statistics, codebook_size=256)
    out = import_scamo_official(
        [files["trans"]], tmp_path / "out", tokenizer=alone, text_encoder="t5", heads=HEADS
    )
    for name in ("model.safetensors", "config.json", "tokenizer/model.safetensors", "tokenizer/config.json"):
        assert (out / name).read_bytes() == (imported / name).read_bytes(), name

    net = released.draw(released.tokenizer_shapes(width=16, latent=12, codebook=240))
    vq = import_t2m_gpt_tokenizer(saved(tmp_path / "vq.pth", net=net), tmp_path / "vq", **statistics)
    out = import_scamo_official(
        [files["trans"]], tmp_path / "vq-model", tokenizer=vq, text_encoder="t5", heads=HEADS
    )
    assert type(load_tokenizer(out / "tokenizer")) is VQAutoencoder

    other = import_scamo_official([files["net"]], tmp_path / "t2", **statistics, codebook_size=512)
    with pytest.raises(ScaMoError, match="t2: the tokenizer has 512 codes, but the transformer .* for 240"):
        import_scamo_official(
            [files["trans"]], tmp_path / "out2", tokenizer=other, text_encoder="t5", heads=HEADS
        )


# What is refused


def change(path, key, **changes):
    """Rewrite tensors of a checkpoint; None takes one out."""
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[key].pop(name, None)
        if value is not None:
            content[key][name] = value
    torch.save(content, path)


H = "transformer.h.1"


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("trans", {f"{H}.attn.c_attn.weight": None}, rf"missing {H}.attn.c_attn.weight"),
        ("trans", {f"{H}.attn.bias": torch.zeros(2)}, rf"unknown {H}.attn.bias"),
        ("trans", {f"{H}.rms_1.scale": torch.ones(31)}, rf"{H}.rms_1.scale is \(31,\), expected \(32,\)"),
        ("trans", {"lm_head.weight": None}, "missing lm_head.weight"),
        (
            "trans",
            {"lm_head.weight": torch.ones(239, 32)},
            r"lm_head.weight is \(239, 32\), expected \(241, 32\)",
        ),
        (
            "trans",
            {"transformer.wte.weight": torch.ones(7)},
            r"transformer.wte.weight is \(7,\), expected 2 axes",
        ),
        (
            "trans",
            {"llama_proj.bias": torch.full((32,), torch.nan)},
            "llama_proj.bias holds values that are",
        ),
        ("trans", {"transformer.ln_f.scale": torch.ones(32).int()}, "ln_f.scale holds torch.int32"),
        ("trans", {f"{H}.rms_1.scale": 3}, "'trans': transformer.h.1.rms_1.scale is a int, expected a"),
        ("net", {"vqvae.encoder.model.3.0.weight": None}, "missing vqvae.encoder.model.3.0.weight"),
        ("net", {"vqvae.encoder.model.0.weight": None}, "missing vqvae.encoder.model.0.weight"),
        ("net", {"vqvae.quantizer.project_in.weight": None}, "missing vqvae.quantizer.project_in.weight"),
        ("net", {"vqvae.quantizer.codebook": torch.ones(9, 12)}, "unknown vqvae.quantizer.codebook"),
        (
            "net",
            {"vqvae.decoder.model.4.bias": torch.ones(3)},
            r"vqvae.decoder.model.4.bias is \(3,\), expected \(16,\)",
        ),
        (
            "net",
            {"vqvae.encoder.model.4.bias": torch.full((12,), torch.inf)},
            "vqvae.encoder.model.4.bias holds values that are not finite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(files, statistics, tmp_path, key, changes, message):
    change(files[key], key, **changes)
    with pytest.raises(ScaMoError, match=message) as caught:
        do_import(files, tmp_path / "out", statistics)
    assert f"{key}.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npy", ".npy", ".pth", ".pth"], "half-written"


def test_another_hidden_width_is_named(released, files, statistics, tmp_path):
    trans = transformer_state(released)
    for i in range(2):
        for name in ("c_fc1", "c_fc2"):
            trans[f"transformer.h.{i}.mlp.{name}.weight"] = torch.ones(88, 32)
        trans[f"transformer.h.{i}.mlp.c_proj.weight"] = torch.ones(32, 88)
    saved(files["trans"], trans=trans)
    with pytest.raises(ScaMoError, match=r"mlp.c_fc1.weight is \(88, 32\), expected \(256, 32\)"):
        do_import(files, tmp_path / "out", statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "trans.pth: 2 layers of width 32 are none of the paper's sizes, .*: give heads"),
        ({"heads": 5}, "trans.pth: width = 32 does not divide by heads = 5"),
        ({"mean": None}, "mean is missing: the released checkpoints do not hold .* 263 values each"),
        ({"std": None}, "std is missing: the released checkpoints do not hold"),
        ({"text_encoder": "flan-t5-xl"}, r"states of width 12, text encoder flan-t5-xl gives 2048"),
        (
            {"codebook_size": 512},
            r"256 \(240 codes\) or 512 .*, not codebook_size = 512 and .* of 240 codes",
        ),
        ({"fps": 0.0}, "fps = 0.0"),
        ({"tokenizer": "some/folder"}, "two tokenizers: .*net.pth and some/folder"),
    ],
)
def test_arguments_that_are_missing_or_do_not_fit(files, statistics, tmp_path, options, message):
    with pytest.raises(ScaMoError, match=message):
        do_import(files, tmp_path / "out", statistics | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("mean", np.zeros(251), r"mean.npy: float64 \(251,\), expected floats \(263,\)"),
        ("std", np.zeros(263), r"std.npy: value 0 is 0.0, expected a positive number"),
        ("std", np.full((1, 263), 2.0), r"std.npy: float64 \(1, 263\)"),
        ("mean", np.full(263, np.nan), r"mean.npy: value 0 is nan, expected a finite number"),
        ("mean", np.array([{}] * 263), r"mean.npy: not a readable .npy file"),
        ("mean", None, "mean.npy: no such file"),
    ],
)
def test_statistics_that_do_not_fit(files, statistics, tmp_path, name, array, message):
    statistics[name].unlink()
    if array is not None:
        np.save(statistics[name], array, allow_pickle=True)
    with pytest.raises(ScaMoError, match=message):
        do_import(files, tmp_path / "out", statistics)
    assert not (tmp_path / "out").exists()


def test_parts_that_are_missing_or_there_twice(files, statistics, tmp_path):
    with pytest.raises(ScaMoError, match="trans.pth: a transformer without its tokenizer"):
        import_scamo_official([files["trans"]], tmp_path / "out", text_encoder="t5", heads=HEADS)
    with pytest.raises(ScaMoError, match="mean, std and codebook_size belong to a tokenizer's checkpoint"):
        import_scamo_official([files["trans"]], tmp_path / "out", **statistics)
    with pytest.raises(ScaMoError, match="no checkpoint was given"):
        import_scamo_official([], tmp_path / "out", **statistics)
    again = tmp_path / "again.pth"
    for key, what in (("net", "tokenizers"), ("trans", "transformers")):
        shutil.copy(files[key], again)
        with pytest.raises(ScaMoError, match=rf"two {what}: .*{key}.pth and .*again.pth"):
            do_import(files | {"again": again}, tmp_path / "out", statistics)


def test_wrong_nesting_is_named(released, statistics, tmp_path):
    net, path = tokenizer_state(released), tmp_path / "a.pth"
    for content, message in (
        (net, "a.pth: neither a tokenizer .* nor a transformer .* found 'vqvae.* and 65 more"),
        ({"model": {"net": net}}, "a.pth: neither a tokenizer .* found 'model'"),
        ({"net": {"encoder": torch.ones(1)}}, r"a.pth: 'net' holds no vqvae.\*: found 'encoder'"),
        ({"trans": net}, r"a.pth: 'trans' holds no transformer.\*: found 'vqvae"),
        ({}, "a.pth: neither .*: found nothing"),
        ({"net": {"module.vqvae.a": torch.ones(1), "vqvae.a": torch.ones(1)}}, "vqvae.a is there with and"),
        ([net], "a.pth: holds a list, expected a dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ScaMoError, match=message):
            import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=256)


class Opened:
    """Touches a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_in_it_is_refused(released, statistics, tmp_path, zipped):
    path, flag = tmp_path / "bad.pth", tmp_path / "flag"
    content = {"net": tokenizer_state(released), "config": Opened(flag)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ScaMoError, match=r"bad.pth: holds a pickled object, \w+.mkdir, and not only"):
        import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=256)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists(), "the file would have run it"


def test_files_that_are_no_checkpoints(files, statistics, tmp_path):
    path = tmp_path / "a.pth"
    for data in (b"", b"hello world, no checkpoint", files["net"].read_bytes()[:-500]):
        path.write_bytes(data)
        with pytest.raises(ScaMoError, match="a.pth: not a torch checkpoint, or a damaged one"):
            import_scamo_official([path], tmp_path / "out", **statistics)
    with pytest.raises(ScaMoError, match="none.pth: no such file"):
        import_scamo_official([tmp_path / "none.pth"], tmp_path / "out", **statistics)
    with pytest.raises(ScaMoError, match="a folder, expected a file"):
        import_scamo_official([tmp_path], tmp_path / "out", **statistics)


def test_the_old_file_format_opens_too(released, statistics, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"net": tokenizer_state(released)}, path, _use_new_zipfile_serialization=False)
    out = import_scamo_official([path], tmp_path / "out", **statistics, codebook_size=256)
    assert load_tokenizer(out).codes == 240


def test_an_existing_folder_is_kept_unless_it_may_be_overwritten(files, statistics, imported, tmp_path):
    before = (imported / "model.safetensors").read_bytes()
    change(files["trans"], "trans", **{"transformer.ln_f.scale": torch.full((32,), 2.0)})
    with pytest.raises(ScaMoError, match="model exists: choose another name"):
        do_import(files, imported, statistics)
    assert (imported / "model.safetensors").read_bytes() == before
    do_import(files, imported, statistics, overwrite=True)
    assert load_file(imported / "model.safetensors")["norm.weight"].eq(2).all()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ScaMoError, match="was not written here"):
        do_import(files, tmp_path / "mine", statistics, overwrite=True)
