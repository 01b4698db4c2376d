"""The text input of Guo et al.'s evaluator (CVPR 2022): GloVe vectors and word classes of tagged sentences.

A tagged sentence is "word/POS word/POS ...", as HumanML3D's caption files hold it. POS is a universal tag; 15
classes are told apart, of which five ("VIP") go by the word itself.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scamo.errors import ScaMoError

# The place in this list is the place in the one-hot vector.
CLASSES = (
    "VERB",
    "NOUN",
    "DET",
    "ADP",
    "NUM",
    "AUX",
    "PRON",
    "ADJ",
    "ADV",
    "Loc_VIP",
    "Body_VIP",
    "Obj_VIP",
    "Act_VIP",
    "Desc_VIP",
    "OTHER",
)
VIP_WORDS = {
    "Loc_VIP": (
        "left right clockwise counterclockwise anticlockwise forward back backward up down straight curve"
    ),
    "Body_VIP": "arm chin foot feet face hand mouth leg waist eye knee shoulder thigh",
    "Obj_VIP": "stair dumbbell chair window floor car ball handrail baseball basketball",
    "Act_VIP": (
        "walk run swing pick bring kick put squat throw hop dance jump turn stumble stop sit lift lower "
        "raise wash stand kneel stroll rub bend balance flap jog shuffle lean rotate spin spread climb"
    ),
    "Desc_VIP": "slowly carefully fast careful slow quickly happy angry sad happily angrily sadly",
}
_CLASS_INDEX = {name: index for index, name in enumerate(CLASSES)}
_VIP_CLASS = {word: name for name, words in VIP_WORDS.items() for word in words.split()}

MAX_WORDS = 20  # of a sentence; a start and an end token come on top
UNKNOWN, START, END = "unk", "sos", "eos"
GLOVE_FILES = ("our_vab_data.npy", "our_vab_words.pkl", "our_vab_idx.pkl")
SPACY_MODEL = "en_core_web_sm"
INSTALL_SPACY = f"pip install 'scamo[spacy]' && python -m spacy download {SPACY_MODEL}"


class TaggedInput(NamedTuple):
    """One sentence for the text encoder, padded with the unknown word.

    vectors: float32 (MAX_WORDS + 2, D); classes: float32 one-hot (MAX_WORDS + 2, 15); length: with the start
    and end tokens.
    """

    vectors: NDArray[np.float32]
    classes: NDArray[np.float32]
    length: int


class WordVectors:
    """A vocabulary: vectors float32 (V, D) and its V words.

    Raises ScaMoError when they do not go together, a word comes twice, a value is not finite or "unk", which
    stands for every other word, is missing.
    """

    def __init__(self, vectors: NDArray, words: Sequence[str], *, where: str = "word vectors") -> None:
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise ScaMoError(
                f"{where}: {vectors.dtype} of shape {vectors.shape}, expected floats (words, width)"
            )
        if len(vectors) != len(words):
            raise ScaMoError(f"{where}: {len(vectors)} vectors for {len(words)} words")
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.words = list(words)
        bad = ~np.isfinite(self.vectors).all(axis=1)
        if bad.any():
            raise ScaMoError(f"{where}: the vector of {self.words[int(np.argmax(bad))]!r} is not finite")
        self._rows = {word: row for row, word in enumerate(self.words)}
        if len(self._rows) != len(self.words):
            twice = next(word for row, word in enumerate(self.words) if self._rows[word] != row)
            raise ScaMoError(f"{where}: {twice!r} is there twice")
        if UNKNOWN not in self._rows:
            raise ScaMoError(f"{where}: no {UNKNOWN!r} among the {len(words)} words")

    def __len__(self) -> int:
        return len(self.words)

    def look_up(self, word: str, pos: str) -> tuple[NDArray[np.float32], str]:
        """The vector (D,) and class of a tagged word; case counts, as in the published code."""
        row = self._rows.get(word)
        if row is None:
            return self.vectors[self._rows[UNKNOWN]], "OTHER"
        name = _VIP_CLASS.get(word, pos)
        return self.vectors[row], name if name in _CLASS_INDEX else "OTHER"

    def encode(self, tagged: str) -> TaggedInput:
        """ "word/POS word/POS ..." -> the text encoder's input; of a longer sentence the first MAX_WORDS.

        Raises ScaMoError naming the token that is not one word, a slash and a tag, or when there is none.
        """
        tokens = [(START, "OTHER"), *split_tagged(tagged)[:MAX_WORDS], (END, "OTHER")]
        length = len(tokens)
        tokens += [(UNKNOWN, "OTHER")] * (MAX_WORDS + 2 - length)
        vectors = np.empty((len(tokens), self.vectors.shape[1]), dtype=np.float32)
        classes = np.zeros((len(tokens), len(CLASSES)), dtype=np.float32)
        for i, (word, pos) in enumerate(tokens):
            vectors[i], name = self.look_up(word, pos)
            classes[i, _CLASS_INDEX[name]] = 1
        return TaggedInput(vectors, classes, length)

    @classmethod
    def from_glove(cls, folder: str | Path) -> WordVectors:
        """Read the three published files (GLOVE_FILES) of a folder.

        The two pickles may hold a list and a dict of plain strings and numbers; anything that would run code
        is refused. Raises ScaMoError naming the file that is missing, unreadable or does not fit the others.
        """
        data, words_file, index_file = (Path(folder) / name for name in GLOVE_FILES)
        try:
            vectors = np.load(data, allow_pickle=False)
        except FileNotFoundError:
            raise ScaMoError(f"{data}: no such file") from None
        except (OSError, ValueError, EOFError) as error:
            raise ScaMoError(f"{data}: not a readable .npy array: {str(error).splitlines()[0]}") from None
        if vectors.ndim != 2:
            raise ScaMoError(f"{data}: shape {vectors.shape}, expected (words, width)")
        words, index = read_plain_pickle(words_file), read_plain_pickle(index_file)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ScaMoError(f"{words_file}: expected a list of words")
        if not isinstance(index, dict) or not all(type(row) is int for row in index.values()):
            raise ScaMoError(f"{index_file}: expected a dict of words and their rows")
        words = list(dict.fromkeys(words))
        for word in words:
            if word not in index:
                raise ScaMoError(f"{index_file}: no row for {word!r} of {words_file.name}")
            if not 0 <= index[word] < len(vectors):
                raise ScaMoError(
                    f"{index_file}: {word!r} in row {index[word]}, {data.name} has {len(vectors)} rows"
                )
        return cls(vectors[[index[word] for word in words]], words, where=str(data))

    def save_words(self, path: Path) -> None:
        """Write the words as a JSON list in the order of the vectors."""
        path.write_text(json.dumps(self.words, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def load_words(path: Path) -> list[str]:
    """What `WordVectors.save_words` wrote. Raises ScaMoError naming the file."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ScaMoError(f"{path}: expected a list of words")
    return words


def split_tagged(tagged: str) -> list[tuple[str, str]]:
    """ "word/POS word/POS ..." -> [(word, POS), ...]. Raises ScaMoError as `WordVectors.encode`."""
    pairs = []
    for number, token in enumerate(tagged.split()):
        word, slash, pos = token.partition("/")
        if not slash or "/" in pos:
            raise ScaMoError(f"token {number} is {token!r}, expected word/POS")
        pairs.append((word, pos))
    if not pairs:
        raise ScaMoError("no tagged words, expected word/POS word/POS ...")
    return pairs


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only plain lists and dicts are read")


def read_plain_pickle(path: Path) -> Any:
    """A pickle of lists, dicts, strings and numbers; no class or function is ever looked up or called.

    Raises ScaMoError naming the file when it is missing, damaged or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ScaMoError(f"{path}: not a readable pickle: {error}") from None


@functools.cache
def _spacy_pipeline() -> Any:
    try:
        import spacy
    except ImportError:
        raise ScaMoError(f"sentences without word/POS tags need spaCy: {INSTALL_SPACY}") from None
    try:
        return spacy.load(SPACY_MODEL)
    except OSError:
        raise ScaMoError(
            f"sentences without word/POS tags need spaCy's model {SPACY_MODEL}: {INSTALL_SPACY}"
        ) from None


def tag_text(text: str, pipeline: Any = None) -> str:
    """Tag a sentence by spaCy as HumanML3D's captions were -> "word/POS word/POS ..."; may be empty.

    Hyphens are dropped and what is not all letters is left out; nouns and verbs but the word "left" are
    given by their lemma. The text is put into lower case first: so are all of HumanML3D's captions and the
    vocabulary. The tags depend on the version of spaCy's model.

    pipeline: a loaded spaCy pipeline; en_core_web_sm without one.
    Raises ScaMoError, with the commands that install them, when spaCy or its model is missing.
    """
    pipeline = pipeline or _spacy_pipeline()
    tagged = []
    for token in pipeline(text.lower().replace("-", "")):
        word = token.text
        if not word.isalpha():
            continue
        if token.pos_ in ("NOUN", "VERB") and word != "left":
            word = token.lemma_
        tagged.append(f"{word}/{token.pos_}")
    return " ".join(tagged)
