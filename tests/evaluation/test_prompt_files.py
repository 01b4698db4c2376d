"""Prompt files of every kind, and the claims of the checked-in set, counted again in the real captions."""

import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict

import pytest

from scamo.errors import ScaMoError
from scamo.evaluation.prompt_files import (
    OUT_OF_DISTRIBUTION,
    Prompt,
    count_claims,
    forms,
    load_prompt_file,
    out_of_distribution_file,
    read_captions,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_every_kind(tmp_path):
    text = write(tmp_path / "p.txt", "\ufeff# a comment\na person walks\r\n\n  a person runs # fast \n")
    assert load_prompt_file(text) == [Prompt("a person walks"), Prompt("a person runs # fast")]
    assert load_prompt_file(write(tmp_path / "p.json", '["one", " two "]')) == [Prompt("one"), Prompt("two")]
    lines = [
        {"text": "a\u2028b", "group": "g", "tokens": "a/DET", "terms": ["x"], "n": 3},
        {"text": "only a sentence"},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert load_prompt_file(write(tmp_path / "p.jsonl", content + "\n\n")) == [
        Prompt("a\u2028b", "g", {"tokens": "a/DET", "terms": ["x"], "n": 3}),
        Prompt("only a sentence", "", {}),
    ]
    assert len({Prompt("a"), Prompt("a", "", {"n": [1]})}) == 2, "hashable, whatever the meta"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"fine\nna\xefve\n", r"p\.txt:2: not UTF-8 \(byte 0xef\)"),
        ("p.txt", "one\n# two\none\n", r"p\.txt:3: the same sentence as .*p\.txt:1: 'one'"),
        ("p.txt", "# nothing\n\n", r"p\.txt: holds no prompts"),
        ("p.csv", "one", r"p\.csv: expected a prompt file \(\.txt, \.json, \.jsonl\) or 'out-.*'\.csv'"),
        ("p.json", '["one",\n"two"', r"p\.json:2: not valid JSON"),
        ("p.json", '{"text": "one"}', r"p\.json: expected a list of strings, got dict"),
        ("p.json", '["one", 2]', r"p\.json: item 1: expected a string, got int"),
        ("p.json", '["one", "  "]', r"p\.json: item 1: an empty sentence"),
        ("p.json", "[]", r"p\.json: holds no prompts"),
        ("p.jsonl", '{"text": "one"}\n{"text": ""}', r"p\.jsonl:2: an empty sentence"),
        ("p.jsonl", '{"text": "one"}\n{"text": "one"}', r"p\.jsonl:2: the same sentence as .*p\.jsonl:1"),
        ("p.jsonl", '\n{"group": "a"}', r"p\.jsonl:2: missing key \"text\", found \['group'\]"),
        ("p.jsonl", '{"text": 3}', r"p\.jsonl:1: \"text\" is 3, expected a string"),
        ("p.jsonl", '{"text": "a", "tokens": ["a/DET"]}', r"p\.jsonl:1: \"tokens\" is \['a/DET'\], exp"),
        ("p.jsonl", '{"text": "a", "group": null}', r"p\.jsonl:1: \"group\" is None, expected a string"),
        ("p.jsonl", '["a"]', r"p\.jsonl:1: expected an object, got list"),
        ("p.jsonl", "a person", r"p\.jsonl:1: not valid JSON"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_line(tmp_path, name, content, message):
    with pytest.raises(ScaMoError, match=message):
        load_prompt_file(write(tmp_path / name, content))


def test_missing_file(tmp_path):
    with pytest.raises(ScaMoError, match=r"none\.txt: cannot be read: No such file"):
        load_prompt_file(tmp_path / "none.txt")


def test_forms():
    assert forms("walk") >= {"walk", "walks", "walked", "walking"}
    assert forms("dance") >= {"dance", "dances", "danced", "dancing"}
    assert forms("hop") >= {"hops", "hopped", "hopping"}
    assert forms("parry") >= {"parries", "parried", "parrying"}
    assert forms("kneel") >= {"kneels", "knelt"}


@pytest.fixture(scope="module")
def prompts():
    return load_prompt_file(OUT_OF_DISTRIBUTION)


@pytest.fixture(scope="module")
def about():
    return json.loads(out_of_distribution_file().with_suffix(".json").read_text(encoding="utf-8"))


def test_the_checked_in_set_is_the_one_that_was_counted(prompts, about):
    path = out_of_distribution_file()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
    assert about["groups"] == {"complex": 30, "combination": 30, "rare_verb": 30}
    assert Counter(prompt.group for prompt in prompts) == about["groups"]
    assert about["prompts"] == len(prompts) == len({prompt.text.lower() for prompt in prompts})
    terms = [tuple(prompt.meta["terms"]) for prompt in prompts if prompt.group != "complex"]
    assert len(set(terms)) == len(terms), "no claim twice"


@pytest.fixture(scope="module")
def caption_lines(shared):
    archive = shared / "data" / "humanml3d_captions_all.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    lines = []
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.rsplit("/", 1)[-1]
            if member.isfile() and name.endswith(".txt") and not name.startswith("M"):
                lines += files.extractfile(member).read().decode("utf-8", errors="replace").splitlines()
    return [line.split("#") for line in lines if line.split("#")[0].strip()]


def test_the_claims_hold_in_the_captions(prompts, about, caption_lines):
    """Word by word from the lines themselves: an index of captions for every lemma and every word."""
    assert about["captions"] == len(caption_lines) == 43692
    where, verbs = defaultdict(set), defaultdict(set)
    for number, (text, tokens, *_) in enumerate(caption_lines):
        for word in re.split("[^a-z]+", text.lower()):
            where[word].add(number)
        for token in tokens.split(" "):
            lemma, _, tag = token.rpartition("/")
            where[lemma].add(number)
            if tag == "VERB":
                verbs[lemma].add(number)
    vowel_less = re.compile("[^aeiou]$")

    def said(word):
        inflected = {word, *(word + end for end in ("s", "es", "d", "ed", "ing"))}
        inflected |= {word[:-1] + "ing"} | {word[:-1] + end for end in ("ies", "ied") if word[-1] == "y"}
        if vowel_less.search(word):
            inflected |= {word + word[-1] + end for end in ("ed", "ing")}
        if word == "kneel":
            inflected.add("knelt")
        return inflected

    def captions_of(word):
        return set.union(*(where[form] for form in said(word)))

    known = {" ".join(line[0].lower().split()).rstrip(" .") for line in caption_lines}
    counts = about["counts"]
    numbers = Counter()
    for prompt in prompts:
        terms, words = prompt.meta["terms"], set(re.split("[^a-z]+", prompt.text.lower()))
        assert " ".join(prompt.text.lower().split()).rstrip(" .") not in known
        assert all(said(term) & words for term in terms), (prompt, terms)
        stored, place = counts[prompt.group], numbers[prompt.group]
        numbers[prompt.group] += 1
        if prompt.group == "complex":
            assert stored[place] == {
                "words": len(prompt.text.split()),
                "verbs": {term: len(verbs[term]) for term in terms},
            }
            assert len(prompt.text.split()) >= 20
            assert len(set(terms)) >= 3
            assert min(len(verbs[term]) for term in terms) >= 50
        elif prompt.group == "combination":
            one, two = terms
            assert stored[place]["captions"] == {term: len(captions_of(term)) for term in terms}
            assert min(stored[place]["captions"].values()) >= 100
            assert stored[place]["together"] == len(captions_of(one) & captions_of(two)) == 0
        else:
            (verb,) = terms
            assert stored[verb] == len(captions_of(verb)) <= 5
    assert len(counts["rare_verb"]) == 30


def captions_folder(tmp_path):
    lines = ["a man walks#a/DET man/NOUN walk/VERB#0.0#0.0"] * 100
    lines += ["he claps#he/PRON clap/VERB#0.0#0.0"] * 100
    lines += ["she prowls#she/PRON prowl/VERB#nan#nan"] * 6 + [""]
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "000000.txt", "\n".join(lines))
    write(folder / "M000000.txt", "she walks and claps#she/PRON walk/VERB and/CCONJ clap/VERB#0.0#0.0")
    return folder


def test_a_broken_claim_is_named(tmp_path):
    captions = read_captions(captions_folder(tmp_path))
    assert len(captions) == 206
    good = Prompt("she walks and claps", "combination", {"terms": ["walk", "clap"]})
    assert count_claims([good], captions)["combination"] == [
        {"captions": {"walk": 100, "clap": 100}, "together": 0}
    ]
    for bad in (
        Prompt("he runs", "rare_verb", {"terms": ["sprint"]}),  # another word
        Prompt("He prowls.", "rare_verb", {"terms": ["prowl"]}),  # six captions
        Prompt("A man walks.", "rare_verb", {"terms": ["man"]}),  # a caption
        Prompt("she walks and prowls", "combination", {"terms": ["walk", "prowl"]}),  # not common
        Prompt("a man walks on", "combination", {"terms": ["walk", "man"]}),  # together
        Prompt("he walks, claps and prowls", "complex", {"terms": ["walk", "clap", "prowl"]}),  # short
        Prompt("a leopard", "rare_verb"),
    ):
        with pytest.raises(ScaMoError, match=f"'{bad.text}': is not what {bad.group} claims"):
            count_claims([good, bad], captions)
    with pytest.raises(ScaMoError, match="group 'other', expected"):
        count_claims([Prompt("x", "other")], captions)
    with pytest.raises(ScaMoError, match=r"none: not a folder or archive"):
        read_captions(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScaMoError, match=r"empty: holds no captions"):
        read_captions(tmp_path / "empty")
