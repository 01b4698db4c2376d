"""Does a motion do what its sentence says? Measured on the joints alone, against what the sentence mentions.

`measure` looks at joints (never at the sentence) and names one action with its slots; a motion is *exact*
when everything that the sentence mentions is among these labels. Nothing here comes from the generator of the
synthetic corpus: the thresholds are about human motion, and hold on recorded motion that was labelled by
others. Lengths are in leg lengths l (thigh + shin), times in frames of 1/20 s.

What a label asks for, by precedence (the first that holds names the action):
    sit     pelvis below 0.75 of its standing height in the last 10 frames
    jump    both feet above 0.12 l for 3 frames or more at less than 1.8 l/s; count: such flights, 4 frames
            apart or more; direction: where they carry the body, if by more than 0.25 l
    kick    an ankle above 0.55 l, ahead of or beside the pelvis by 0.25 l, at less than 1.8 l/s; count: such
            intervals, 6 frames apart or more
    punch   wrist forward from its shoulder at more than 1.8 l/s, from a bent arm (reach below 0.75) to a
            straight one (above 0.85) at shoulder height +- 0.25 l, pelvis slower than 1.8 l/s; count: such
            strikes, 6 frames apart or more
    circle  locomotion that turns by 270 degrees or more and ends within 0.35 of the path's diameter
    run     locomotion above 1.6 l/s with both feet 0.04 l off the floor in more than 4% of the moving frames
    walk    any other locomotion: more than 1.5 l of path made at more than 0.3 l/s, on average above 0.5 l/s
    turn    heading changed by more than 30 degrees within 0.5 l of the start
    squat   pelvis below 0.72 of its standing height, then above 0.9, ankles within 0.15 l; count: such dips
    wave    wrist above the shoulder - 0.2 l with 3 or more lateral reversals about the elbow, each > 0.07 l
    raise   wrist above the shoulder - 0.1 l for 4 frames or more, the trunk tilted by less than 25 degrees
    bow     head tilted forward over the pelvis by more than 25 degrees, pelvis above 0.8; count: such tilts,
            below 16 degrees in between
    stand   none of these
Speed, of walk (and circle) in units of 1.4 l/s and of run in 3.2 l/s: slow below 0.85, fast above 1.25.

Against the rules as first written down, and why (tuned on the corpus, on the corpus with noise or smoothing
added, and on Bandai-Namco's labelled recordings; never on a model's output):
    - a turn's size (90, 180, 360) is a slot of its own, `angle`: a sentence may mention only the way;
    - standing height is the 90th percentile of the pelvis, kept between 1.05 and 1.2 l: a clip that is mostly
      seated has no standing height of its own;
    - path, flight and speed are taken over the moving frames, and the speed is their median: the mean is
      pulled down by starting and stopping, which says nothing about the pace;
    - run asked for 0.06 l, 10% and 1.8 l/s above the lowest twentieth of the feet: elderly and exhausted
      runners of the recordings stay below (273 of 332 were found), and noise sinks that floor. The floor of
      this rule is the 40th percentile of the lower foot;
    - raise asked for 0.1 l above the shoulder: one style of the recordings raises hands to the shoulder only
      (1,050 of 1,315 were found); wave asked for swings of 0.1 l above the shoulder - 0.1 l (544 of 625);
    - a strike asked for 3 l/s: smoothing over three frames hides nearly every one. Instead the arm must get
      straight from bent, which a raised arm does not;
    - kicks and strikes need a slow pelvis, kicks a foot that is not behind: runners' heels and fists pass;
    - turning on the spot is judged by the distance from the start, not by the summed path, which grows with
      the length of a noisy clip;
    - a count is "many" from 4 on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.measures import physics
from scamo.motion.skeleton import N_JOINTS

FPS = 20
NONE = "none"
LABELS: dict[str, tuple[str, ...]] = {
    "action": (
        "stand", "walk", "run", "jump", "squat", "sit", "bow", "wave", "raise", "punch", "kick", "turn",
        "circle", NONE,
    ),
    "direction": ("forward", "back", "left", "right", NONE),
    "side": ("left", "right", "both", NONE),
    "speed": ("slow", "normal", "fast", NONE),
    "turn": ("left", "right", NONE),
    "angle": ("90", "180", "360", NONE),
    "count": ("1", "2", "3", "many", NONE),
}  # fmt: skip
SLOTS = tuple(LABELS)
GROUPS = ("wording", "combination")
MIN_FRAMES = 20  # a shorter motion is wrong
SPLITS = 17  # places where a sequence of two may be cut
PERMUTATIONS = 1000

PELVIS, HEAD = 0, 15
LEFT, RIGHT = 0, 1
HIP, KNEE, ANKLE, BALL, SHOULDER, ELBOW, WRIST = (
    (1, 2),
    (4, 5),
    (7, 8),
    (10, 11),
    (16, 17),
    (18, 19),
    (20, 21),
)


@dataclass(frozen=True)
class Labels:
    """What a motion does: one label per slot, each from `LABELS`. All "none": nothing can be said."""

    action: str = NONE
    direction: str = NONE
    side: str = NONE
    speed: str = NONE
    turn: str = NONE
    angle: str = NONE
    count: str = NONE


def measure(joints: np.ndarray) -> Labels:
    """Labels of one motion. joints (T, 22, 3) metres, Y up, 20 fps.

    Total: any finite array gives labels; one that is not finite, has fewer than 4 frames or no body gives
    `Labels()`. Raises ScaMoError only for another shape.
    """
    joints = np.asarray(joints)
    if joints.ndim != 3 or joints.shape[1:] != (N_JOINTS, 3):
        raise ScaMoError(f"joints: expected shape (T, {N_JOINTS}, 3), got {joints.shape}")
    if len(joints) < 4 or not np.isfinite(joints).all():
        return Labels()
    view = _View.of(np.asarray(joints, dtype=np.float64))
    if view is None:
        return Labels()
    for find in (_sit, _jump, _kick, _punch, _locomotion, _turn, _squat, _wave_or_raise, _bow):
        labels = find(view)
        if labels is not None:
            return labels
    return Labels("stand")


@dataclass(frozen=True)
class _View:
    """A motion in leg lengths above its floor, with what several rules need."""

    joints: np.ndarray  # (T, 22, 3) leg lengths
    height: np.ndarray  # (T, 22) above the floor
    standing: float  # height of the pelvis when standing
    feet: np.ndarray  # (T, 2) height of the lower of ankle and ball
    heading: np.ndarray  # (T) radians, unwrapped
    ahead: np.ndarray  # (T, 2) unit vector in X, Z
    aside: np.ndarray  # (T, 2) unit vector to the left
    path: np.ndarray  # (T, 2) pelvis in X, Z, smoothed
    velocity: np.ndarray  # (T, 2) leg lengths a second
    speed: np.ndarray  # (T)

    @staticmethod
    def of(joints: np.ndarray) -> _View | None:
        thigh = joints[:, KNEE] - joints[:, HIP]
        shin = joints[:, ANKLE] - joints[:, KNEE]
        leg = _percentile(np.linalg.norm(thigh, axis=-1) + np.linalg.norm(shin, axis=-1), 50)
        if not leg > 1e-6 or not np.abs(joints).max() < 1e6 * leg:
            return None
        joints = joints / leg
        low = joints[:, (*ANKLE, *BALL), 1]
        height = joints[..., 1] - _percentile(low, 5)
        feet = np.minimum(height[:, ANKLE], height[:, BALL])
        standing = min(max(_percentile(height[:, PELVIS], 90), 1.05), 1.2)
        across = joints[:, HIP[LEFT]] - joints[:, HIP[RIGHT]]
        across = across + joints[:, SHOULDER[LEFT]] - joints[:, SHOULDER[RIGHT]]
        heading = _mean(np.unwrap(np.arctan2(-across[:, 2], across[:, 0])), 5)
        ahead = np.stack((np.sin(heading), np.cos(heading)), axis=-1)
        aside = np.stack((np.cos(heading), -np.sin(heading)), axis=-1)
        path = _mean(joints[:, PELVIS][:, [0, 2]], 9)
        velocity = np.gradient(path, axis=0) * FPS
        speed = np.hypot(velocity[:, 0], velocity[:, 1])
        return _View(joints, height, standing, feet, heading, ahead, aside, path, velocity, speed)

    def along(self, vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
        """Component (T) of vectors (T, 3) along horizontal axes (T, 2)."""
        return vectors[:, 0] * axes[:, 0] + vectors[:, 2] * axes[:, 1]

    @property
    def turned(self) -> float:
        """Change of heading, radians, positive to the left."""
        return float(self.heading[-3:].mean() - self.heading[:3].mean())


def _percentile(values: np.ndarray, percent: float) -> float:
    """As numpy's, linear between ranks, at a fifth of its cost on arrays this small."""
    ranked = np.sort(values, axis=None)
    place = percent / 100 * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return float(ranked[low] + (place - low) * (ranked[high] - ranked[low]))


def _mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` frames along the first axis; at the ends the window shrinks evenly."""
    n = len(values)
    reach = np.minimum(window // 2, np.minimum(np.arange(n), np.arange(n)[::-1]))
    sums = np.concatenate((np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)))
    frames = np.arange(n)
    total = sums[frames + reach + 1] - sums[frames - reach]
    return total / (2 * reach + 1).reshape(-1, *[1] * (values.ndim - 1))


def _intervals(mask: np.ndarray, *, shortest: int = 1, gap: int = 1) -> list[tuple[int, int]]:
    """[start, end) of the runs of True; runs less than `gap` frames apart are one, short ones are dropped."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    runs: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if runs and start - runs[-1][1] < gap:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [(start, end) for start, end in runs if end - start >= shortest]


def _excursions(values: np.ndarray, beyond: float, back: float) -> int:
    """How often `values` (T) goes above `beyond` and comes back below `back` in between (hysteresis)."""
    count, out = 0, False
    for state in (np.int8(1) * (values > beyond) - np.int8(1) * (values < back)).tolist():
        if state > 0 and not out:
            count, out = count + 1, True
        elif state < 0:
            out = False
    return count


def _count(number: int) -> str:
    return str(number) if number <= 3 else "many"


def _sector(forward: float, left: float) -> str:
    """Which of the four 90-degree sectors a horizontal vector lies in."""
    if abs(forward) >= abs(left):
        return "forward" if forward >= 0 else "back"
    return "left" if left > 0 else "right"


def _sit(v: _View) -> Labels | None:
    if len(v.height) >= 10 and (v.height[-10:, PELVIS] < 0.75 * v.standing).all():
        return Labels("sit")
    return None


def _jump(v: _View) -> Labels | None:
    up = v.feet.min(axis=1) > 0.12
    flights = [
        (start, end)
        for start, end in _intervals(up, shortest=3, gap=4)
        if v.speed[start:end].mean() < 1.8
    ]  # fmt: skip
    if not flights:
        return None
    before, after = max(0, flights[0][0] - 6), min(len(v.path), flights[-1][1] + 6) - 1
    gone = v.path[after] - v.path[before]
    direction = NONE
    if np.hypot(*gone) > 0.25:
        direction = _sector(float(gone @ v.ahead[before]), float(gone @ v.aside[before]))
    return Labels("jump", direction=direction, count=_count(len(flights)))


def _kick(v: _View) -> Labels | None:
    best: tuple[float, int, int] | None = None
    for side in (LEFT, RIGHT):
        foot = v.joints[:, ANKLE[side]] - v.joints[:, PELVIS]
        outward = v.along(foot, v.aside) * (1 if side == LEFT else -1)
        out = np.maximum(v.along(foot, v.ahead), outward) > 0.25
        up = v.height[:, ANKLE[side]]
        runs = _intervals((up > 0.55) & out & (v.speed < 1.8), gap=6)
        if runs:
            top = max(float(up[start:end].max()) for start, end in runs)
            if best is None or top > best[0]:
                best = (top, side, len(runs))
    if best is None:
        return None
    return Labels("kick", side=("left", "right")[best[1]], count=_count(best[2]))


def _punch(v: _View) -> Labels | None:
    best: tuple[float, int, int] | None = None
    for side in (LEFT, RIGHT):
        arm = v.joints[:, WRIST[side]] - v.joints[:, SHOULDER[side]]
        upper = np.linalg.norm(v.joints[:, ELBOW[side]] - v.joints[:, SHOULDER[side]], axis=-1)
        fore = np.linalg.norm(v.joints[:, WRIST[side]] - v.joints[:, ELBOW[side]], axis=-1)
        reach = np.linalg.norm(arm, axis=-1) / np.maximum(upper + fore, 1e-9)
        straight, bent = reach > 0.85, reach < 0.75
        out = v.along(arm, v.ahead)
        rate = np.diff(out) * FPS
        fast = np.flatnonzero((rate > 1.8) & (v.speed[1:] < 1.8))
        strikes: list[int] = []
        for frame in fast.tolist():
            end = slice(frame + 1, frame + 5)
            there = straight[end] & (np.abs(arm[end, 1]) < 0.25) & (out[end] > 0.4)
            chambered = bent[max(0, frame - 4) : frame + 1].any()
            if chambered and there.any() and (not strikes or frame - strikes[-1] >= 6):
                strikes.append(frame)
        if strikes:
            top = float(rate[strikes].max()) + len(strikes)
            if best is None or top > best[0]:
                best = (top, side, len(strikes))
    if best is None:
        return None
    return Labels("punch", side=("left", "right")[best[1]], count=_count(best[2]))


def _locomotion(v: _View) -> Labels | None:
    moving = v.speed > 0.3
    if not moving.any():
        return None
    path = float(v.speed[moving].sum()) / FPS
    pace = _percentile(v.speed[moving], 50)
    if path <= 1.5 or v.speed[moving].mean() <= 0.5:
        return None
    lower = v.feet.min(axis=1)
    # Who moves has a foot on the floor most of the time: a steadier floor than the lowest twentieth.
    flight = (lower - _percentile(lower, 40) > 0.04)[moving].mean()
    gait = "run" if flight > 0.04 and pace > 1.6 else "walk"
    relative = pace / (3.2 if gait == "run" else 1.4)
    speed = "slow" if relative < 0.85 else "fast" if relative > 1.25 else "normal"
    forward = float((v.velocity * v.ahead).sum(axis=1)[moving].mean())
    left = float((v.velocity * v.aside).sum(axis=1)[moving].mean())
    turned = math.degrees(v.turned)
    turn = "left" if turned > 30 else "right" if turned < -30 else NONE
    centre = v.path.mean(axis=0)
    diameter = 2 * float(np.hypot(*(v.path - centre).T).max())
    home = float(np.hypot(*(v.path[-1] - v.path[0]))) < 0.35 * diameter
    if abs(turned) >= 270 and home:
        return Labels("circle", direction=_sector(forward, left), speed=speed, turn=turn)
    return Labels(gait, direction=_sector(forward, left), speed=speed, turn=turn, angle=_angle(turned))


def _angle(degrees: float) -> str:
    for angle in (90, 180, 360):
        if abs(abs(degrees) - angle) <= 30:
            return str(angle)
    return NONE


def _turn(v: _View) -> Labels | None:
    turned = math.degrees(v.turned)
    away = np.hypot(*(v.path - v.path[0]).T).max()
    if abs(turned) <= 30 or away >= 0.5:
        return None
    return Labels("turn", turn="left" if turned > 0 else "right", angle=_angle(turned))


def _squat(v: _View) -> Labels | None:
    pelvis = v.height[:, PELVIS] / v.standing
    low = np.flatnonzero(pelvis < 0.72)
    if not len(low) or not (pelvis[low[-1] :] > 0.9).any():
        return None
    ankles = v.joints[:, ANKLE][:, :, [0, 2]]
    # From the first dip to the last: what the feet do before and after is another matter.
    still = ankles[low[0] : low[-1] + 1]
    if np.linalg.norm(still - np.median(still, axis=0), axis=-1).max() >= 0.15:
        return None
    return Labels("squat", count=_count(_excursions(-pelvis, -0.72, -0.9)))


def _reversals(values: np.ndarray, size: float) -> int:
    """Turning points of (T) `values` between swings that are longer than `size`."""
    count, sign, extreme = 0, 0, float(values[0])
    for value in values.tolist():
        if sign == 0:
            if abs(value - extreme) > size:
                sign, extreme = (1 if value > extreme else -1), value
        elif (value - extreme) * sign > 0:
            extreme = value
        elif (extreme - value) * sign > size:
            count, sign, extreme = count + 1, -sign, value
    return count


def _wave_or_raise(v: _View) -> Labels | None:
    waving, raised = [], []
    # Who bows lowers the shoulders: that raises no hand.
    upright = _tilt(v) < 25
    for side in (LEFT, RIGHT):
        wrist, elbow = v.joints[:, WRIST[side]], v.joints[:, ELBOW[side]]
        above = wrist[:, 1] - v.joints[:, SHOULDER[side], 1]
        lateral = v.along(wrist - elbow, v.aside)
        swings = max(
            (_reversals(lateral[start:end], 0.07) for start, end in _intervals(above > -0.2, gap=3)),
            default=0,
        )
        waving.append(swings >= 3)
        raised.append(bool(_intervals((above > -0.1) & upright, shortest=4)))
    for action, arms in (("wave", waving), ("raise", raised)):
        if any(arms):
            side_name = "both" if all(arms) else "left" if arms[LEFT] else "right"
            return Labels(action, side=side_name)
    return None


def _tilt(v: _View) -> np.ndarray:
    """Angle (T), degrees, by which the head is ahead of the pelvis."""
    trunk = v.joints[:, HEAD] - v.joints[:, PELVIS]
    return np.degrees(np.arctan2(v.along(trunk, v.ahead), trunk[:, 1]))


def _bow(v: _View) -> Labels | None:
    tilt = _tilt(v)
    tilt[v.height[:, PELVIS] < 0.8 * v.standing] = 0.0
    if not _intervals(tilt > 25, shortest=3):
        return None
    return Labels("bow", count=_count(_excursions(tilt, 25, 16)))


Part = Mapping[str, str]


def _agrees(labels: Labels, part: Part) -> bool:
    return all(getattr(labels, slot) == value for slot, value in part.items())


def follows(joints: np.ndarray, spec: Sequence[Part]) -> bool:
    """Whether a motion (T, 22, 3) does everything that `spec` mentions.

    spec: one mapping slot -> label, or two for a sequence. Two are right if the motion can be cut, at one of
    `SPLITS` even places between a quarter and three quarters of it, into the first and the second, and can
    nowhere there be cut into the second and the first.
    """
    return _Measured(joints).follows(spec)


class _Measured:
    """A motion whose labels, whole and at every cut, are computed once for many specs."""

    def __init__(self, joints: np.ndarray) -> None:
        self.joints = joints
        self._whole: Labels | None = None
        self._cuts: list[tuple[Labels, Labels]] | None = None

    @property
    def whole(self) -> Labels:
        if self._whole is None:
            self._whole = measure(self.joints)
        return self._whole

    @property
    def cuts(self) -> list[tuple[Labels, Labels]]:
        if self._cuts is None:
            n = len(self.joints)
            places = sorted({round(n / 4 + n / 2 * k / (SPLITS - 1)) for k in range(SPLITS)})
            self._cuts = [(measure(self.joints[:cut]), measure(self.joints[cut:])) for cut in places]
        return self._cuts

    def follows(self, spec: Sequence[Part]) -> bool:
        if len(spec) == 1:
            return _agrees(self.whole, spec[0])
        first, second = spec
        ordered = any(_agrees(a, first) and _agrees(b, second) for a, b in self.cuts)
        return ordered and not any(_agrees(a, second) and _agrees(b, first) for a, b in self.cuts)


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95% score interval of a share. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At the ends the bound is exact; rounding would leave 1 - 2e-16.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    return low, 1.0 if successes == trials else (centre + spread) / scale


@dataclass(frozen=True)
class Prompt:
    """A sentence that is no training caption. spec: one or two mappings of the mentioned slots to labels."""

    text: str
    spec: tuple[dict[str, str], ...]
    group: str


@dataclass(frozen=True)
class PromptSet:
    """The prompts, and what the best constant answer per slot is in the training captions."""

    prompts: tuple[Prompt, ...]
    constant: dict[str, str]
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)


def default_prompts() -> Path:
    """The file of the 400 checked-in prompts."""
    return Path(__file__).parent / "prompts" / "synthetic.jsonl"


def load_prompts(path: str | Path | None = None) -> PromptSet:
    """Read prompts (JSON lines) with the manifest of the same name (.json) beside them.

    Raises ScaMoError naming the file when it is missing, when its SHA-256 is not the manifest's, or when a
    line has an unknown group, slot or label.
    """
    path = Path(path) if path is not None else default_prompts()
    manifest_path = path.with_suffix(".json")
    try:
        data = path.read_bytes()
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ScaMoError(f"{error.filename}: no such file; a prompt set is a .jsonl with its .json") from None
    except json.JSONDecodeError as error:
        raise ScaMoError(f"{manifest_path}: not valid JSON: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest.get("sha256"):
        raise ScaMoError(f"{path}: SHA-256 is {digest}, {manifest_path.name} says {manifest.get('sha256')}")
    prompts = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompt = Prompt(entry["text"], tuple(entry["spec"]), entry["group"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScaMoError(f"{path}:{number}: not a prompt: {error!r}") from None
        if prompt.group not in GROUPS or not 1 <= len(prompt.spec) <= 2:
            raise ScaMoError(f"{path}:{number}: expected a group of {GROUPS} and one or two parts")
        for part in prompt.spec:
            wrong = [slot for slot, value in part.items() if value not in LABELS.get(slot, ())]
            if wrong or "action" not in part:
                raise ScaMoError(f"{path}:{number}: {part} has no action, or an unknown slot or label")
        prompts.append(prompt)
    return PromptSet(tuple(prompts), manifest["constant"], digest)


def _share(right: np.ndarray, chance: float) -> dict[str, Any]:
    low, high = wilson(int(right.sum()), len(right))
    return {
        "exact": float(right.mean()) if len(right) else 0.0,
        "low": low,
        "high": high,
        "correct": int(right.sum()),
        "n": len(right),
        "chance": chance,
    }


def permutation_chance(right: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """97.5th percentile of the share that is right when the motions are matched to permuted specs.

    right (N, N) bool: [motion, spec].
    """
    n = len(right)
    if n == 0:
        return 0.0
    rng = np.random.default_rng(seed)
    rows = np.arange(n)
    shares = [right[rows, rng.permutation(n)].mean() for _ in range(permutations)]
    return float(np.percentile(shares, 97.5))


def evaluate(
    motions: Sequence[np.ndarray | None],
    prompts: PromptSet,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score one motion per prompt.

    motions: joints (T, 22, 3) metres at 20 fps, in the prompts' order; None, an empty, a non-finite or a
    shorter one than 20 frames is wrong and counted under "failures".
    Returns a report of plain values: overall and per group `exact` with Wilson's 95% interval (`low`, `high`)
    and `chance`, the largest of the 97.5th percentile over permuted specs, the best constant answer per slot
    (training frequencies), and the best of these motions if it were given to every prompt;
    `slots` (sentences of one action; a slot counts where it is mentioned), `actions`, `sequences`,
    `failures`, `physics` (means over the motions that count) and `prompts`, one entry per prompt.
    Raises ScaMoError when the numbers differ or a motion has another shape.
    """
    if len(motions) != len(prompts):
        raise ScaMoError(f"motions: expected one per prompt, {len(prompts)}, got {len(motions)}")
    failures = {"empty": 0, "not_finite": 0, "short": 0}
    measured: list[_Measured | None] = []
    known: dict[int, _Measured] = {}  # the same array for several prompts is measured once
    for index, joints in enumerate(motions):
        kind = None
        if joints is None or len(joints) == 0:
            kind = "empty"
        else:
            joints = np.asarray(joints)
            if joints.ndim != 3 or joints.shape[1:] != (N_JOINTS, 3):
                raise ScaMoError(f"motions[{index}]: expected shape (T, {N_JOINTS}, 3), got {joints.shape}")
            if not np.isfinite(joints).all():
                kind = "not_finite"
            elif len(joints) < MIN_FRAMES:
                kind = "short"
        if kind:
            failures[kind] += 1
            measured.append(None)
        else:
            measured.append(known.setdefault(id(motions[index]), _Measured(np.asarray(joints))))
        if progress:
            progress(index + 1, len(motions))

    specs = [prompt.spec for prompt in prompts.prompts]
    keys = {json.dumps(spec, sort_keys=True): spec for spec in specs}
    column = {key: position for position, key in enumerate(keys)}
    columns = np.array([column[json.dumps(spec, sort_keys=True)] for spec in specs], dtype=np.int64)
    table = np.array(
        [[one is not None and one.follows(spec) for spec in keys.values()] for one in measured], dtype=bool
    ).reshape(len(specs), len(keys))
    right = table[np.arange(len(specs)), columns]
    constant = np.array(
        [len(s) == 1 and _agrees(Labels(**prompts.constant), s[0]) for s in specs], dtype=bool
    )

    def summary(chosen: np.ndarray) -> dict[str, Any]:
        rows = np.flatnonzero(chosen)
        permuted = permutation_chance(
            table[rows][:, columns[rows]], permutations=permutations, seed=seed
        )  # fmt: skip
        best_constant = float(constant[rows].mean()) if len(rows) else 0.0
        repeated = float(table[rows][:, columns[rows]].mean(axis=1).max()) if len(rows) else 0.0
        return _share(right[rows], max(permuted, best_constant, repeated)) | {
            "chance_permuted": permuted,
            "chance_constant": best_constant,
            "chance_repeated": repeated,
        }

    group = np.array([prompt.group for prompt in prompts.prompts])
    single = np.array([len(spec) == 1 for spec in specs], dtype=bool)
    action = np.array([spec[0]["action"] for spec in specs])
    slots = {}
    for slot in SLOTS:
        rows = [k for k, spec in enumerate(specs) if len(spec) == 1 and slot in spec[0]]
        said = np.array([specs[k][0][slot] for k in rows])
        got = np.array([getattr(m.whole, slot) if (m := measured[k]) is not None else NONE for k in rows])
        matches = got[:, None] == said[None, :]
        chance = max(
            permutation_chance(matches, permutations=permutations, seed=seed),
            float((said == prompts.constant[slot]).mean()) if rows else 0.0,
        )
        slots[slot] = _share(got == said, chance)
    fit = [physics(one.joints, FPS) for one in measured if one is not None]
    entries = []
    for prompt, one, ok in zip(prompts.prompts, measured, right.tolist(), strict=True):
        labels = {k: v for k, v in asdict(one.whole).items() if v != NONE} if one is not None else {}
        entries.append(asdict(prompt) | {"measured": labels, "exact": bool(ok)})
    return {
        **summary(np.ones(len(specs), dtype=bool)),
        "groups": {name: summary(group == name) for name in GROUPS},
        "slots": slots,
        "actions": {
            name: {"exact": float(right[rows].mean()), "n": int(rows.sum())}
            for name in sorted(set(action[single].tolist()))
            for rows in [single & (action == name)]
        },
        "sequences": summary(~single),
        "failures": failures,
        "physics": {key: float(np.mean([f[key] for f in fit])) for key in fit[0]} if fit else {},
        "prompts_sha256": prompts.sha256,
        "prompts": entries,
    }
