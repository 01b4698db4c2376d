"""Files of prompts: plain sentences, or sentences with a group, tags and whatever else belongs to them.

The checked-in set "out-of-distribution" asks for what HumanML3D's captions do not show: long sentences
("complex"), pairs of common words that no caption joins ("combination"), verbs that hardly occur
("rare_verb"). What each group claims is counted in the captions themselves:
`python -m scamo.evaluation.prompt_files CAPTIONS` (a folder or .tar.xz of HumanML3D's texts) counts it anew
and writes the numbers beside the set.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scamo.data.storage import decode_utf8, json_lines
from scamo.errors import ScaMoError
from scamo.motion.files import replacing

OUT_OF_DISTRIBUTION = "out-of-distribution"
SUFFIXES = (".txt", ".json", ".jsonl")

# What the groups of the checked-in set claim of HumanML3D's captions.
LIMITS = {
    "complex_words": 20,
    "complex_verbs": 3,
    "complex_verb_captions": 50,
    "combination_captions": 100,
    "rare_verb_captions": 5,
}
# Past forms that the captions' own lemmas miss.
IRREGULAR = {"kneel": ("knelt",)}


@dataclass(frozen=True)
class Prompt:
    """A sentence to generate a motion for. group: "" where the file names none; meta: its further keys, among
    them "tokens" ("word/POS word/POS ...") where an evaluator needs them."""

    text: str
    group: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


def out_of_distribution_file() -> Path:
    """The checked-in set: 90 prompts in three groups."""
    return Path(__file__).parent / "prompts" / "out_of_distribution.jsonl"


def load_prompt_file(path: str | Path) -> list[Prompt]:
    """Read prompts, in the order of the file.

    Args:
        path: "out-of-distribution" (the checked-in set), or a file: .txt with a sentence a line (lines that
            start with # are comments, blank lines between them are skipped), .json with a list of strings,
            .jsonl with an object a line: "text", and if wanted "group", "tokens" and any further keys.

    Raises:
        ScaMoError: naming the file and the line (of a .json the item): no such file, another suffix, not
            UTF-8, not JSON, an empty sentence, the same sentence twice, no "text", a key of another type, no
            prompts.
    """
    path = out_of_distribution_file() if str(path) == OUT_OF_DISTRIBUTION else Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ScaMoError(
            f"{path}: expected a prompt file ({', '.join(SUFFIXES)}) or {OUT_OF_DISTRIBUTION!r}, "
            f"got suffix {suffix!r}"
        )
    source = _read(path)
    read = {".txt": _from_text, ".json": _from_list, ".jsonl": _from_objects}[suffix]
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, prompt in read(path, source):
        if not prompt.text:
            raise ScaMoError(f"{where}: an empty sentence")
        if prompt.text in seen:
            raise ScaMoError(f"{where}: the same sentence as {seen[prompt.text]}: {prompt.text!r}")
        seen[prompt.text] = where
        prompts.append(prompt)
    if not prompts:
        raise ScaMoError(f"{path}: holds no prompts")
    return prompts


def _read(path: Path) -> str:
    try:
        return decode_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise ScaMoError(f"{path}: cannot be read: {error.strerror}") from None


def _from_text(path: Path, source: str) -> Iterable[tuple[str, Prompt]]:
    for number, line in enumerate(source.split("\n"), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path}:{number}", Prompt(text)


def _from_list(path: Path, source: str) -> Iterable[tuple[str, Prompt]]:
    try:
        entries = json.loads(source)
    except json.JSONDecodeError as error:
        raise ScaMoError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(entries, list):
        raise ScaMoError(f"{path}: expected a list of strings, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        where = f"{path}: item {index}"
        if not isinstance(entry, str):
            raise ScaMoError(f"{where}: expected a string, got {type(entry).__name__}")
        yield where, Prompt(entry.strip())


def _from_objects(path: Path, source: str) -> Iterable[tuple[str, Prompt]]:
    for where, entry in json_lines(source, str(path)):
        if "text" not in entry:
            raise ScaMoError(f'{where}: missing key "text", found {sorted(entry)}')
        for key in ("text", "group", "tokens"):
            if not isinstance(entry.get(key, ""), str):
                raise ScaMoError(f'{where}: "{key}" is {entry[key]!r}, expected a string')
        meta = {key: value for key, value in entry.items() if key not in ("text", "group")}
        yield where, Prompt(entry["text"].strip(), entry.get("group", ""), meta)


class Caption(NamedTuple):
    """A caption: its sentence, its lower-case words with the lemmas of its file, the lemmas tagged VERB."""

    text: str
    words: frozenset[str]
    verbs: frozenset[str]


def read_captions(source: str | Path) -> list[Caption]:
    """Every caption of HumanML3D's texts, a folder of NAME.txt or a .tar.xz of one, without mirrored ones.

    Raises ScaMoError when there are none or `source` cannot be read.
    """
    source = Path(source)
    texts: dict[str, str] = {}
    try:
        if source.is_dir():
            for path in source.glob("*.txt"):
                texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
        else:
            with tarfile.open(source) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    if content is not None and member.name.endswith(".txt"):
                        texts[Path(member.name).name] = content.read().decode("utf-8", errors="replace")
    except (OSError, tarfile.TarError) as error:
        raise ScaMoError(f"{source}: not a folder or archive of caption files: {error}") from None
    captions = []
    for name in sorted(texts):
        if name.startswith("M"):
            continue
        for line in texts[name].splitlines():
            text, _, rest = line.partition("#")
            if not text.strip():
                continue
            tagged = [token.rpartition("/")[::2] for token in rest.partition("#")[0].split()]
            lemmas = frozenset(word for word, _ in tagged)
            verbs = frozenset(word for word, tag in tagged if tag == "VERB")
            captions.append(Caption(text.strip(), _words(text) | lemmas, verbs))
    if not captions:
        raise ScaMoError(f"{source}: holds no captions")
    return captions


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def forms(term: str) -> frozenset[str]:
    """The regular inflections of an English word, whether or not it takes them: walk, walks, walking, ..."""
    endings = {"", "s", "es", "d", "ed", "ing", f"{term[-1]}ed", f"{term[-1]}ing"}
    found = {term + ending for ending in endings} | {f"{term[:-1]}ing"} | set(IRREGULAR.get(term, ()))
    if term.endswith("y"):
        found |= {f"{term[:-1]}ies", f"{term[:-1]}ied"}
    return frozenset(found)


def mentions(term: str, captions: Sequence[Caption]) -> list[bool]:
    """Of each caption whether it mentions a term: a form of it is among the words or lemmas."""
    inflected = forms(term)
    return [not inflected.isdisjoint(caption.words) for caption in captions]


def count_claims(prompts: Sequence[Prompt], captions: Sequence[Caption]) -> dict[str, Any]:
    """What the groups of the checked-in set claim, counted.

    Returns {"complex": [{"words", "verbs": {verb: captions that tag it VERB}}], "combination": [{"captions":
    {term: captions}, "together"}], "rare_verb": {verb: captions}}. Raises ScaMoError naming the first prompt
    that breaks its group's claim (see LIMITS), lacks a form of its terms or equals a caption.
    """
    known = {_plain(caption.text) for caption in captions}
    tagged = Counter(verb for caption in captions for verb in caption.verbs)
    counts: dict[str, Any] = {"complex": [], "combination": [], "rare_verb": {}}
    for prompt in prompts:
        terms = prompt.meta.get("terms", [])
        found = [forms(term) & _words(prompt.text) for term in terms]
        right = bool(terms) and all(found) and _plain(prompt.text) not in known
        if prompt.group == "complex":
            words = len(prompt.text.split())
            verbs = {verb: tagged[verb] for verb in terms}
            counts["complex"].append({"words": words, "verbs": verbs})
            right &= words >= LIMITS["complex_words"] and len(verbs) >= LIMITS["complex_verbs"]
            right &= min(verbs.values(), default=0) >= LIMITS["complex_verb_captions"]
        elif prompt.group == "combination":
            each = [mentions(term, captions) for term in terms]
            together = sum(all(caption) for caption in zip(*each, strict=True))
            totals = {term: sum(where) for term, where in zip(terms, each, strict=True)}
            counts["combination"].append({"captions": totals, "together": together})
            right &= len(totals) == 2 and together == 0
            right &= min(totals.values(), default=0) >= LIMITS["combination_captions"]
        elif prompt.group == "rare_verb":
            totals = {term: sum(mentions(term, captions)) for term in terms}
            counts["rare_verb"] |= totals
            right &= len(totals) == 1 and max(totals.values(), default=0) <= LIMITS["rare_verb_captions"]
        else:
            raise ScaMoError(f"prompt {prompt.text!r}: group {prompt.group!r}, expected {list(counts)}")
        if not right:
            raise ScaMoError(f"prompt {prompt.text!r}: is not what {prompt.group} claims")
    return counts


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")


def main() -> None:
    """Count the claims in the captions of the first argument and write them beside the checked-in set."""
    path = out_of_distribution_file()
    prompts, captions = load_prompt_file(path), read_captions(sys.argv[1])
    about = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "prompts": len(prompts),
        "groups": dict(Counter(prompt.group for prompt in prompts)),
        "corpus": "HumanML3D's caption files, without the mirrored ones",
        "captions": len(captions),
        "limits": LIMITS,
        "counts": count_claims(prompts, captions),
    }
    with replacing(path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
