"""The text input of Guo et al.'s evaluator: classes, unknown and over-long sentences, files, tagging."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.evaluation import word_vectors
from scamo.evaluation.word_vectors import (
    CLASSES,
    GLOVE_FILES,
    MAX_WORDS,
    VIP_WORDS,
    WordVectors,
    load_words,
    read_plain_pickle,
    split_tagged,
    tag_text,
)

VOCABULARY = ["the", "unk", "sos", "eos", "a", "man", "and", "walk", "left", "hand", "car", "slowly"]
VOCABULARY += ["person", "two", "be", "to"]


@pytest.fixture(scope="module")
def words() -> WordVectors:
    """Row i of the vectors is (i, -i, i / 2): a sentence's rows can be read off."""
    row = np.arange(len(VOCABULARY), dtype=np.float64)
    return WordVectors(np.stack([row, -row, row / 2], axis=1), VOCABULARY)


def read_back(encoded) -> list[str]:
    """What an encoded sentence says, by its rows and classes: "word/CLASS"."""
    assert encoded.vectors.shape == (22, 3)
    assert encoded.vectors.dtype == encoded.classes.dtype == np.float32
    assert encoded.classes.shape == (22, 15)
    np.testing.assert_array_equal(np.sort(encoded.classes, axis=1), [[0.0] * 14 + [1.0]] * 22)
    rows, classes = encoded.vectors[:, 0].astype(int), encoded.classes.argmax(axis=1)
    np.testing.assert_array_equal(encoded.vectors, np.stack([rows, -rows, rows / 2], axis=1))
    return [f"{VOCABULARY[row]}/{CLASSES[name]}" for row, name in zip(rows, classes, strict=True)]


def test_classes_and_their_order():
    order = "VERB NOUN DET ADP NUM AUX PRON ADJ ADV Loc_VIP Body_VIP Obj_VIP Act_VIP Desc_VIP OTHER"
    assert list(CLASSES) == order.split()
    counts = {name: len(set(words.split())) for name, words in VIP_WORDS.items()}
    assert counts == {"Loc_VIP": 12, "Body_VIP": 13, "Obj_VIP": 10, "Act_VIP": 34, "Desc_VIP": 12}
    listed = " ".join(VIP_WORDS.values()).split()
    assert len(set(listed)) == len(listed) == 81


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("man/NOUN", "man/NOUN"),
        ("the/DET", "the/DET"),
        ("two/NUM", "two/NUM"),
        ("be/AUX", "be/AUX"),
        ("and/CCONJ", "and/OTHER"),  # a tag outside the classes
        ("to/PART", "to/OTHER"),
        ("man/", "man/OTHER"),
        ("man/noun", "man/OTHER"),
        ("walk/NOUN", "walk/Act_VIP"),  # the word goes before its tag
        ("left/VERB", "left/Loc_VIP"),
        ("hand/NOUN", "hand/Body_VIP"),
        ("car/PROPN", "car/Obj_VIP"),
        ("slowly/ADV", "slowly/Desc_VIP"),
        ("man/Act_VIP", "man/Act_VIP"),  # a class may be given as a tag
        ("zebra/NOUN", "unk/OTHER"),  # an unknown word loses its tag
        ("jump/VERB", "unk/OTHER"),  # listed, but not in this vocabulary
        ("Man/NOUN", "unk/OTHER"),  # case counts
        ("unk/NOUN", "unk/NOUN"),
        ("/NOUN", "unk/OTHER"),
    ],
)
def test_one_word(words, token, expected):
    encoded = words.encode(token)
    assert encoded.length == 3
    assert read_back(encoded) == ["sos/OTHER", expected, "eos/OTHER", *["unk/OTHER"] * 19]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 35])
def test_sentences_are_cut_and_padded(words, count):
    tokens = [f"{VOCABULARY[4 + i % 2]}/NOUN" for i in range(count)]
    encoded = words.encode(" ".join(tokens))
    kept = tokens[:20]
    assert encoded.length == len(kept) + 2
    expected = ["sos/OTHER", *kept, "eos/OTHER"]
    assert read_back(encoded) == expected + ["unk/OTHER"] * (22 - len(expected))


def test_spaces_do_not_matter(words):
    assert split_tagged("  a/DET   man/NOUN\n") == [("a", "DET"), ("man", "NOUN")]
    once, twice = words.encode("a/DET man/NOUN"), words.encode(" a/DET  man/NOUN ")
    np.testing.assert_array_equal(once.vectors, twice.vectors)


@pytest.mark.parametrize("tagged", ["a/DET man walk/VERB", "a/DET man/NOUN/x"])
def test_a_token_without_one_slash(words, tagged):
    with pytest.raises(ScaMoError, match=r"token 1 is 'man(/NOUN/x)?', expected word/POS"):
        words.encode(tagged)


@pytest.mark.parametrize("tagged", ["", "  \n"])
def test_no_tokens(words, tagged):
    with pytest.raises(ScaMoError, match="no tagged words"):
        words.encode(tagged)


def test_start_and_end_words_need_not_be_known():
    """The published look-up takes the unknown word's vector for them, as for any other."""
    encoded = WordVectors(np.float32([[7], [8]]), ["unk", "man"]).encode("man/NOUN")
    assert encoded.vectors[:4, 0].tolist() == [7, 8, 7, 7]


def test_vocabulary_errors():
    vectors = np.zeros((3, 4), np.float32)
    with pytest.raises(ScaMoError, match="3 vectors for 2 words"):
        WordVectors(vectors, ["unk", "a"])
    with pytest.raises(ScaMoError, match="'a' is there twice"):
        WordVectors(vectors, ["a", "unk", "a"])
    with pytest.raises(ScaMoError, match="no 'unk' among the 3 words"):
        WordVectors(vectors, ["a", "b", "c"])
    with pytest.raises(ScaMoError, match=r"int64 of shape \(3, 4\)"):
        WordVectors(vectors.astype(int), ["unk", "a", "b"])
    with pytest.raises(ScaMoError, match=r"of shape \(3,\)"):
        WordVectors(vectors[:, 0], ["unk", "a", "b"])
    vectors[1, 2] = np.inf
    with pytest.raises(ScaMoError, match="here: the vector of 'a' is not finite"):
        WordVectors(vectors, ["unk", "a", "b"], where="here")


def write_glove(folder, vectors, words, index) -> None:
    np.save(folder / GLOVE_FILES[0], vectors)
    for name, value in zip(GLOVE_FILES[1:], (words, index), strict=True):
        (folder / name).write_bytes(pickle.dumps(value))


def test_published_files(tmp_path):
    """Rows go by the index file, in whatever order the words are listed; a word listed twice is one word."""
    vectors = np.arange(12.0).reshape(4, 3)
    write_glove(tmp_path, vectors, ["man", "unk", "a", "man"], {"a": 0, "man": 2, "unk": 3, "unlisted": 1})
    words = WordVectors.from_glove(tmp_path)
    assert words.vectors.dtype == np.float32
    assert words.words == ["man", "unk", "a"]
    np.testing.assert_array_equal(words.vectors, vectors[[2, 3, 0]])
    np.testing.assert_array_equal(words.encode("a/DET unlisted/X").vectors[1:3], vectors[[0, 3]])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path, protocol):
    value = {"a": 1, "b": [2, -(10**12), "é", 1.5, None, True]}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(tmp_path / "x.pkl") == value


class Runs:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_that_would_run_code(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / GLOVE_FILES[1]
    path.write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(ScaMoError, match=r"our_vab_words.pkl: .* it names (_?io|builtins)\.open"):
        read_plain_pickle(path)
    assert not mark.exists()
    for value in (OrderedDict(a=1), {1, 2}.__class__, np.float32(1)):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ScaMoError, match="only plain lists and dicts are read"):
            read_plain_pickle(path)


def test_published_files_errors(tmp_path):
    vectors, words, index = np.zeros((2, 3)), ["unk", "a"], {"unk": 0, "a": 1}

    def expect(message: str) -> None:
        with pytest.raises(ScaMoError, match=message):
            WordVectors.from_glove(tmp_path)

    for name in GLOVE_FILES:
        write_glove(tmp_path, vectors, words, index)
        (tmp_path / name).unlink()
        expect(f"{name}: no such file")
        (tmp_path / name).write_bytes(b"\x80\x04not this")
        expect(f"{name}: not a readable")
    write_glove(tmp_path, vectors[0], words, index)
    expect(r"our_vab_data.npy: shape \(3,\)")
    write_glove(tmp_path, vectors, ("unk", "a"), index)
    expect("our_vab_words.pkl: expected a list of words")
    write_glove(tmp_path, vectors, ["unk", 3], index)
    expect("our_vab_words.pkl: expected a list of words")
    write_glove(tmp_path, vectors, words, {"unk": 0, "a": "1"})
    expect("our_vab_idx.pkl: expected a dict of words and their rows")
    write_glove(tmp_path, vectors, words, {"unk": 0})
    expect("our_vab_idx.pkl: no row for 'a' of our_vab_words.pkl")
    write_glove(tmp_path, vectors, words, {"unk": 0, "a": 2})
    expect("our_vab_idx.pkl: 'a' in row 2, our_vab_data.npy has 2 rows")
    write_glove(tmp_path, vectors, ["a"], index)
    expect("our_vab_data.npy: no 'unk'")


def test_the_word_list_of_an_evaluator(tmp_path):
    names = ["unk", "naïve", 'quo"te', "new\nline", "a b"]
    words = WordVectors(np.zeros((5, 2), np.float32), names)
    words.save_words(tmp_path / "words.json")
    assert load_words(tmp_path / "words.json") == names
    with pytest.raises(ScaMoError, match=r"none.json: no such file"):
        load_words(tmp_path / "none.json")
    for text, message in (("[1]", "expected a list of words"), ("[", "not valid JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ScaMoError, match=f"bad.json: {message}"):
            load_words(tmp_path / "bad.json")


def test_real_captions(shared):
    """HumanML3D's caption lines against a restatement of the rules, on a vocabulary that lacks words."""
    lines = [
        line.split("#")
        for path in sorted((shared / "data" / "humanml3d_cmu" / "texts").glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    if not lines:
        pytest.skip("no caption files in the reference data")
    seen = sorted({token.split("/")[0] for line in lines for token in line[1].split(" ")})
    known = ["unk", "sos", "eos", *(word for i, word in enumerate(seen) if i % 7)]
    words = WordVectors(np.arange(len(known), dtype=np.float32)[:, None], known)
    classes = set()
    for line in lines:
        encoded = words.encode(line[1])
        tokens = line[1].split(" ")[:MAX_WORDS]
        assert encoded.length == len(tokens) + 2
        for i, token in enumerate(tokens, start=1):
            word, pos = token.split("/")
            name = "OTHER"
            if word in known:
                listed = [vip for vip, vip_words in VIP_WORDS.items() if word in vip_words.split()]
                name = listed[0] if listed else pos if pos in CLASSES else "OTHER"
            assert CLASSES[int(encoded.classes[i].argmax())] == name
            assert known[int(encoded.vectors[i, 0])] == (word if word in known else "unk")
            classes.add(name)
    assert classes == set(CLASSES)  # every class is exercised


@pytest.fixture
def pipeline():
    """A real spaCy pipeline with the tags and lemmas of a few words."""
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    for word, pos, lemma in (
        ("a", "DET", "a"),
        ("man", "NOUN", "man"),
        ("walks", "VERB", "walk"),
        ("clockwise", "NOUN", "clockwise"),
        ("left", "VERB", "leave"),
        ("hands", "NOUN", "hand"),
        ("his", "PRON", "he"),
        ("quickly", "ADV", "quick"),
        ("is", "AUX", "be"),
        ("2nd", "ADJ", "2nd"),
        ("90", "NUM", "90"),
        (".", "PUNCT", "."),
        (",", "PUNCT", ","),
    ):
        ruler.add([[{"LOWER": word}]], {"POS": pos, "LEMMA": lemma})
    return nlp


@pytest.mark.parametrize(
    ("text", "tagged"),
    [
        ("a man walks.", "a/DET man/NOUN walk/VERB"),
        ("A man WALKS", "a/DET man/NOUN walk/VERB"),
        ("a man walks clock-wise, left.", "a/DET man/NOUN walk/VERB clockwise/NOUN left/VERB"),
        ("his hands", "his/PRON hand/NOUN"),  # other words keep their form
        ("a man is quickly", "a/DET man/NOUN is/AUX quickly/ADV"),
        ("90 2nd man's man", "man/NOUN man/NOUN"),  # not all letters
        ("zebra", "zebra/"),
        ("90 .", ""),
    ],
)
def test_tagging(pipeline, text, tagged):
    assert tag_text(text, pipeline) == tagged


def test_tagged_text_can_be_encoded(pipeline, words):
    encoded = words.encode(tag_text("A man walks, left hands.", pipeline))
    assert read_back(encoded)[: encoded.length] == [
        "sos/OTHER",
        "a/DET",
        "man/NOUN",
        "walk/Act_VIP",
        "left/Loc_VIP",
        "hand/Body_VIP",
        "eos/OTHER",
    ]


def test_spacy_is_missing(monkeypatch):
    word_vectors._spacy_pipeline.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)  # as Python marks a module that can't be imported
    with pytest.raises(ScaMoError, match=r"need spaCy: pip install 'scamo\[spacy\]' && python -m spacy down"):
        tag_text("a man walks")


def test_its_model_is_missing(monkeypatch):
    pytest.importorskip("spacy")
    word_vectors._spacy_pipeline.cache_clear()
    monkeypatch.setattr(word_vectors, "SPACY_MODEL", "en_core_web_absent")
    with pytest.raises(ScaMoError, match=r"need spaCy's model en_core_web_absent: .*download en_core_web_sm"):
        tag_text("a man walks")
