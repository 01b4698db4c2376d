"""Makes the prompt set that text-following is measured on. The set is checked in: a new one is another test.

`python -m scamo.motion.synthetic.prompts FILE.jsonl` writes the prompts and, beside them, FILE.json with
their SHA-256 and the best constant answer per slot in the training captions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from scamo.motion.synthetic.captions import caption
from scamo.motion.synthetic.corpus import FIRST, SECOND, draw_part, generate_corpus, trained
from scamo.motion.synthetic.spec import ACTIONS, HELD_OUT, HELD_OUT_PAIRS, NOT_PAIRED, SLOTS, Spec

SINGLES = 18  # held-out wordings per action
PAIRS = 26  # held-out wordings of trained sequences
PER_COMBINATION = 12
PER_PAIR = 32  # training wordings of held-out pairs, in all
FREQUENCY_CLIPS = 4000


def make_prompts(seed: int = 0) -> list[dict]:
    """The 400 prompts as plain dicts: text, spec (one or two parts with what the text mentions), group.

    260 "wording": trained combinations, at least one held-out verb, phrase or template in each, 18 sentences
    per action and 26 sequences. 140 "combination": training words, everything mentioned, combinations and
    pairs of actions that training never shows.
    """
    rng = np.random.default_rng((seed, 400))
    prompts: list[dict] = []
    seen: set[str] = set()

    def add(spec: Spec, group: str) -> None:
        while True:
            wording = group == "wording"
            said, held = caption(spec, rng, held_out=0.5 if wording else 0.0, everything=not wording)
            if said.text not in seen and (held > 0) == wording:
                break
        seen.add(said.text)
        prompts.append({"text": said.text, "spec": said.spec.to_list(), "group": group})

    for action in ACTIONS:
        options = trained(action)
        order = np.concatenate([rng.permutation(len(options)) for _ in range(SINGLES)])
        for k in order[:SINGLES]:
            add(options[int(k)], "wording")
    pairs = [
        (a, b) for a in FIRST for b in SECOND if a != b and (a, b) not in HELD_OUT_PAIRS | NOT_PAIRED
    ]  # fmt: skip
    for k in rng.permutation(len(pairs))[:PAIRS]:
        add(_sequence(pairs[int(k)], rng), "wording")
    for spec in sorted(HELD_OUT, key=lambda one: str(one.to_list())):
        for _ in range(PER_COMBINATION):
            add(spec, "combination")
    held = sorted(HELD_OUT_PAIRS)
    for k in range(PER_PAIR):
        add(_sequence(held[k % len(held)], rng), "combination")
    return prompts


def _sequence(pair: tuple[str, str], rng: np.random.Generator) -> Spec:
    one, two = (draw_part(trained(action), rng) for action in pair)
    return dataclasses.replace(one, then=two)


def constant_answer(clips: int = FREQUENCY_CLIPS) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """The most frequent label per slot among what the captions of training mention, and all the counts."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("action", *SLOTS)}
    for clip in generate_corpus(clips, split="train", sequences=0.0):
        for said in clip.captions:
            for slot, value in said.spec.to_list()[0].items():
                counts[slot][value] += 1
    best = {slot: max(sorted(count), key=lambda value: count[value]) for slot, count in counts.items()}
    return best, {slot: dict(sorted(count.items())) for slot, count in counts.items()}


def main() -> None:
    """Write the set to the path of the first argument."""
    path = Path(sys.argv[1])
    prompts = make_prompts()
    data = "".join(json.dumps(prompt) + "\n" for prompt in prompts).encode()
    constant, counts = constant_answer()
    manifest = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "prompts": len(prompts),
        "groups": dict(Counter(prompt["group"] for prompt in prompts)),
        "constant": constant,
        "training_mentions": counts,
    }
    for target, content in (
        (path, data),
        (path.with_suffix(".json"), (json.dumps(manifest, indent=1) + "\n").encode()),
    ):
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(target)


if __name__ == "__main__":
    main()
