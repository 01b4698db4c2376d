"""Sentences for specs: subjects × verbs × adverbs × templates, a fifth of each kept out of training.

Of every list the words after the bar are held out: they appear in no training caption, only in the prompts
for held-out wordings. A caption may leave slots unsaid; what it says comes with it as a spec of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scamo.motion.synthetic.spec import Spec


@dataclass(frozen=True)
class CaptionSpec:
    """A sentence and what it says: `spec` holds the mentioned slots only."""

    text: str
    spec: Spec


@dataclass(frozen=True)
class Words:
    """Alternatives that mean the same: for training, and held out."""

    train: tuple[str, ...]
    held: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Words:
        train, held = (tuple(word.strip() for word in part.split(",")) for part in text.split("|"))
        return cls(train, held)


# The verb comes first and is inflected. {limb} is the limb with its side, {n:x} "a x" or "two xs".
VERBS: dict[str, Words] = {
    action: Words.parse(text)
    for action, text in {
        "stand": "stand still, stay in place, remain motionless, stand in place, keep still, stay still, "
        "stand without moving, stand quietly, stay frozen on the spot, "
        "wait in place | hold still, freeze in place",
        "walk": "walk, walk, step, stride, pace, march, wander, take a walk, move at a walk, "
        "go on foot, saunter, "
        "tread, go for a walk | stroll, amble, trudge",
        "run": "run, run, jog, race, dash, trot, go running, charge, break into a run, rush, "
        "go for a run, hurry, "
        "move at a run | sprint, gallop, take off running",
        "jump": "jump, jump, leap, jump up, leap up, bounce, spring into the air, do {n:jump}, "
        "perform {n:jump}, "
        "make {n:leap}, jump off the ground | hop, soar into the air",
        "squat": "squat, squat down, crouch down, do {n:squat}, perform {n:squat}, "
        "bend the knees deeply, crouch, "
        "drop into a squat, sink into a crouch, lower into a squat "
        "| dip into a deep knee bend, go down into a crouch",
        "sit": "sit down, take a seat, sit on a chair, sit down on a stool, sink into a chair, sit, "
        "lower the body onto a chair, settle into a seat, sit on a bench, rest on a chair, rest on a stool "
        "| plop down on a chair, have a seat",
        "bow": "bow, bow down, take {n:bow}, make {n:bow}, bend forward at the waist, bend over, "
        "lean forward from the hips, fold forward at the waist, lean the upper body forward, "
        "tilt the torso forward, bend the back forward | stoop forward, dip forward at the waist",
        "wave": "wave, wave hello, wave goodbye, give a wave, wave at someone, wave to a friend, "
        "greet a friend, "
        "greet someone | signal hello, say hi",
        "raise": "raise {limb}, lift {limb}, put {limb} up, keep {limb} up high, bring {limb} up, "
        "lift {limb} overhead, stretch {limb} up, reach up with {limb}, move {limb} upward "
        "| elevate {limb}, extend {limb} upward",
        "punch": "punch, punch the air, throw {n:punch}, deliver {n:punch}, hit the air, box, "
        "strike out, do {n:punch}, hit out | jab, smack the air",
        "kick": "kick, kick the air, kick out, throw {n:kick}, do {n:kick}, deliver {n:kick}, kick forward, "
        "kick a ball, perform {n:front kick} | boot an imaginary ball, launch {n:kick}",
        "turn": "turn, turn, rotate, spin, pivot, turn on the spot, rotate in place, spin on the spot, "
        "turn in place, twist around on the spot, twirl on the spot | swivel, revolve",
        "circle": "walk in a circle, walk in a circle, go around in a circle, circle around, "
        "move in a circle, "
        "walk around a circle, trace a circle on the floor, walk around in circles, walk along a circle, "
        "circle around a point | follow a circular path, travel around a circle",
    }.items()
}

LIMBS: dict[str, Words] = {
    "wave": Words.parse("the S hand, their S hand, the S arm, their S arm | the S palm"),
    "raise": Words.parse("the S hand, their S hand, the S arm, their S arm | the S forearm"),
    "punch": Words.parse("the S hand, their S hand, the S fist, the S arm | the S knuckles"),
    "kick": Words.parse("the S foot, their S foot, the S leg, their S leg | the S heel"),
}
LIMBS_BOTH = Words.parse("both hands, both arms, both their hands, both their arms | the two hands")
LIMB_UNSAID = Words.parse("an arm, one arm, a hand, one hand | one forearm")


def _sided(text: str) -> dict[str, Words]:
    return {side: Words.parse(text.replace("LEFT", side)) for side in ("left", "right")}


PHRASES: dict[str, dict[str, Words]] = {
    "speed": {
        "slow": Words.parse(
            "slowly, slowly, at a slow pace, at a slow speed, unhurriedly, in a leisurely way, "
            "with slow steps, "
            "very slowly | sluggishly, at a leisurely pace"
        ),
        "normal": Words.parse(
            "at a normal pace, at a normal speed, at a regular pace, at a moderate speed, "
            "at an ordinary pace, "
            "at a moderate pace, at the usual pace, at a usual speed | at an average pace, at medium speed"
        ),
        "fast": Words.parse(
            "quickly, quickly, fast, at a fast pace, rapidly, at high speed, briskly, in a hurry, very fast "
            "| swiftly, at a quick pace"
        ),
    },
    "direction": {
        "forward": Words.parse(
            "forward, forward, forwards, ahead, straight ahead, to the front, in a forward direction, "
            "straight forward | onward, toward the front"
        ),
        "back": Words.parse(
            "backward, backwards, backwards, in reverse, to the rear, in a backward direction, to the back, "
            "straight backward | rearward, toward the back"
        ),
    }
    | _sided(
        "to the LEFT, LEFT, to the LEFT side, sideways to the LEFT, LEFTward, to their LEFT, sideways LEFT, "
        "in the LEFT direction | toward the LEFT, over on the LEFT side"
    ),
    "bend": _sided(  # a turn on the way
        "turning LEFT, turning to the LEFT, while turning LEFT, in a curve to the LEFT, curving LEFT, "
        "with a turn to the LEFT, making a LEFT turn, veering to the LEFT | swerving LEFT, "
        "drifting to the LEFT"
    ),
    "turn": {
        "left": Words.parse(
            "left, to the left, to the left, counterclockwise, to their left, anticlockwise, "
            "to the left side, in a counterclockwise direction | toward the left, leftwards"
        ),
        "right": Words.parse(
            "right, to the right, to the right, clockwise, to their right, clockwise, "
            "to the right side, in a clockwise direction | toward the right, rightwards"
        ),
    },
    "ring": {  # which way round a circle
        "left": Words.parse(
            "to the left, counterclockwise, anticlockwise, turning left, in a counterclockwise direction, "
            "counterclockwise, always turning to the left, curving to the left "
            "| bending leftwards, the counterclockwise way"
        ),
        "right": Words.parse(
            "to the right, clockwise, clockwise, turning right, in a clockwise direction, "
            "clockwise, always turning to the right, curving to the right "
            "| bending rightwards, the clockwise way"
        ),
    },
    "angle": {
        "90": Words.parse(
            "90 degrees, by 90 degrees, ninety degrees, by ninety degrees, a quarter turn, "
            "by a quarter turn, "
            "a quarter of the way around, through 90 degrees | by one quarter, a quarter of a rotation"
        ),
        "180": Words.parse(
            "180 degrees, by 180 degrees, half a turn, by half a turn, halfway around, "
            "to face the other way, "
            "through 180 degrees, a half turn | to face the opposite way, half of a rotation"
        ),
        "360": Words.parse(
            "360 degrees, by 360 degrees, a full turn, by a full turn, all the way around, a complete turn, "
            "through 360 degrees, completely around | a whole rotation, one entire turn"
        ),
    },
    "count": {
        "1": Words.parse(
            "once, once, one time, a single time, 1 time, just once | only once, one single time"
        ),
        "2": Words.parse(
            "twice, twice, two times, 2 times, two times in a row, "
            "twice in a row | a couple of times, two times over"
        ),
        "3": Words.parse(
            "three times, three times, 3 times, three times in a row, 3 times in a row, three times over "
            "| thrice, a total of three times"
        ),
    },
}

SUBJECTS = Words.parse(
    "a person, a person, a person, someone, a man, a woman, a figure, a human, a boy, a girl, somebody, "
    "an actor, an old man, a young woman, a dancer |"
).train
KNOWN_SUBJECTS = Words.parse(
    "the person, the man, the woman, the figure, he, she, this person, the actor, the human |"
).train

# S: subject, A: any subject; V3 "walks", VG "walking", V0 "walk", with all that follows the verb.
TEMPLATES = Words(
    (
        "A V3.",
        "A V3.",
        "A V3.",
        "A is VG.",
        "there is S VG.",
        "A begins to V0.",
        "a motion of S VG.",
        "V0.",
        "VG.",
        "A starts VG.",
        "in this clip A V3.",
        "the video shows S VG.",
        "you see S VG.",
        "here A V3.",
        "it looks like A is VG.",
        "a recording of S who V3.",
        "A seems to V0.",
        "this is S VG.",
        "all that A does is VG.",
    ),
    ("S can be seen VG.", "we watch as A V3.", "we observe S VG.", "S is shown VG."),
)
# The same for two, the second with W.
PAIR_TEMPLATES = Words(
    (
        "A V3 and then W3.",
        "A V3, then W3.",
        "first A V3, then A W3.",
        "A V3 and after that W3.",
        "A V3 before WG.",
        "after VG, A W3.",
        "A V3, and next W3.",
        "V0 and then W0.",
    ),
    ("A V3 and afterwards W3.", "A V3, followed by WG."),
)

_DOUBLED = {
    "hit",
    "run",
    "drop",
    "jog",
    "step",
    "sit",
    "spin",
    "squat",
    "put",
    "trot",
    "plop",
    "hop",
    "dip",
    "jab",
}


def third_person(verb: str) -> str:
    """walk -> walks, box -> boxes, say -> says, scurry -> scurries."""
    if verb == "have":
        return "has"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")


def gerund(verb: str) -> str:
    """walk -> walking, stride -> striding, run -> running."""
    if verb in _DOUBLED:
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("ch", "sh")) else "s")


class _Chooser:
    """Draws from `Words`: training words, or held-out ones with probability `share`, counted in `held`."""

    def __init__(self, rng: np.random.Generator, share: float) -> None:
        self.draws: Iterator[float] = iter(())
        self.rng, self.share, self.held = rng, share, 0

    def random(self) -> float:
        # One vectorised draw serves many choices: a scalar draw costs as much as eight of these.
        for value in self.draws:
            return value
        self.draws = iter(self.rng.random(32).tolist())
        return next(self.draws)

    def pick(self, items: tuple[str, ...]) -> str:
        return items[int(self.random() * len(items))]

    def word(self, words: Words) -> str:
        if self.share and self.random() < self.share:
            self.held += 1
            return self.pick(words.held)
        return self.pick(words.train)


def _said(spec: Spec, choose: _Chooser, everything: bool) -> Spec:
    """The slots that a caption of `spec` mentions: what is unusual nearly always, the default often not."""
    if everything:
        return dataclasses.replace(spec, then=None)
    keep = {}
    for name, value in spec.slots().items():
        chance = {"1": 0.5, "normal": 0.6}.get(value, 0.92)
        if name == "angle":
            chance = 0.8
        elif name == "direction":
            chance = 1.0 if value != "forward" else 0.4 if spec.action == "run" or spec.turn else 0.7
            chance = 0.92 if spec.action == "jump" else chance
        elif name == "turn":
            chance = 1.0 if spec.action in ("walk", "run") else 0.92
        elif name == "side" and value == "both":
            chance = 1.0
        if choose.random() < chance:
            keep[name] = value
    return Spec.from_list([{"action": spec.action, **keep}])


def _phrase(spec: Spec, said: Spec, choose: _Chooser) -> tuple[str, str, str | None]:
    """The verb, what follows it, and the -ly adverb that may stand before it (else None)."""
    verb, _, tail = choose.word(VERBS[spec.action]).partition(" ")
    parts: list[str] = []
    slots = said.slots()
    if spec.side is not None:
        if spec.side == "both":
            limb = choose.word(LIMBS_BOTH)
        elif "side" in slots:
            limb = choose.word(LIMBS[spec.action]).replace(" S ", f" {spec.side} ")
        else:
            limb = choose.word(LIMB_UNSAID) if spec.action == "raise" else ""
        if "{limb}" in tail:
            tail = tail.replace("{limb}", limb)
        elif limb:
            parts.append(("with " if choose.random() < 0.75 else "using ") + limb)
    count = slots.get("count")
    if counted := re.search(r"\{n:(.+?)\}", tail):
        noun = counted[1]
        number = {None: "a", "1": "one", "2": "two", "3": "three"}[count]
        if count is None and spec.count != "1":
            text = f"some {_plural(noun)}"
        else:
            text = f"{number} {noun if count in (None, '1') else _plural(noun)}"
        tail = tail.replace(counted[0], text)
    elif count is not None:
        parts.append(choose.word(PHRASES["count"][count]))
    if "direction" in slots:
        parts.insert(0, choose.word(PHRASES["direction"][slots["direction"]]))
    last: list[str] = []
    if "turn" in slots:
        kind = {"turn": "turn", "circle": "ring"}.get(spec.action, "bend")
        (last if kind == "bend" else parts).append(choose.word(PHRASES[kind][slots["turn"]]))
    if "angle" in slots:
        parts.append(choose.word(PHRASES["angle"][slots["angle"]]))
    before = None
    if "speed" in slots:
        adverb = choose.word(PHRASES["speed"][slots["speed"]])
        if adverb.endswith("ly") and " " not in adverb and choose.random() < 0.3:
            before = adverb
        else:
            parts.append(adverb)
    if len(parts) > 1 and choose.random() < 0.5:
        parts.reverse()
    return verb, " ".join(part for part in (tail, *parts, *last) if part), before


def _fill(template: str, letter: str, phrase: tuple[str, str, str | None]) -> str:
    verb, tail, before = phrase
    for mark, form in (("3", third_person(verb)), ("G", gerund(verb)), ("0", verb)):
        words = " ".join(word for word in (before, form, tail) if word)
        template = template.replace(letter + mark, words)
    return template


def caption(
    spec: Spec, rng: np.random.Generator, *, held_out: float = 0.0, everything: bool = False
) -> tuple[CaptionSpec, int]:
    """A sentence about a full spec.

    held_out: chance of each verb, phrase and template to be one of the held-out ones (0 in training).
    everything: mention every slot. Returns the caption and how many held-out choices it contains.
    """
    choose = _Chooser(rng, held_out)
    parts = spec.parts()
    said = [_said(part, choose, everything) for part in parts]
    phrases = [_phrase(part, mentioned, choose) for part, mentioned in zip(parts, said, strict=True)]
    text = choose.word(TEMPLATES if len(parts) == 1 else PAIR_TEMPLATES)
    for letter, phrase in zip("VW", phrases, strict=False):
        text = _fill(text, letter, phrase)
    subject = choose.pick(SUBJECTS)
    known = choose.pick(KNOWN_SUBJECTS) if choose.random() < 0.35 else subject
    text = re.sub(r"\bA\b", known, re.sub(r"\bS\b", subject, text))
    # "first a man ..., then the man ...".
    text = re.sub(
        r", then an? ", ", then the ", re.sub(r", then some(one|body)\b", ", then the person", text)
    )
    mentioned = said[0] if len(said) == 1 else dataclasses.replace(said[0], then=said[1])
    return CaptionSpec(text, mentioned), choose.held


def held_out_wordings() -> list[str]:
    """Every held-out wording as it would stand in a sentence, sides and inflections filled in."""
    out: set[str] = set()
    for words in VERBS.values():
        for phrase in words.held:
            verb, _, tail = phrase.partition(" ")
            tail = re.sub(r"\s*\{.*", "", tail)
            for form in (verb, third_person(verb), gerund(verb)):
                out.add(f"{form} {tail}".strip())
    for table in PHRASES.values():
        for words in table.values():
            out.update(words.held)
    for words in LIMBS.values():
        out.update(word.replace(" S ", f" {side} ") for word in words.held for side in ("left", "right"))
    out.update(LIMBS_BOTH.held + LIMB_UNSAID.held)
    # What the held-out templates have of their own.
    out.update(("can be seen", "we watch as", "we observe", "is shown", "afterwards", "followed by"))
    return sorted(out)
