"""The thirteen actions as channels of the rig (`rig.py`): how each is timed, posed and stepped.

Every action starts and ends standing at rest with the feet side by side (a seat stays a seat), so that any
two can follow each other without a jump. Lengths that grow with the body are in leg lengths (`body.leg`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scamo.motion.synthetic import rig
from scamo.motion.synthetic.rig import Body
from scamo.motion.synthetic.spec import Spec

FPS = 20
GRAVITY = 9.81

# Leg lengths per second. A gap of more than a fifth parts the bins.
WALK_SPEED = {"slow": (0.72, 1.02), "normal": (1.37, 1.56), "fast": (1.95, 2.3)}
RUN_SPEED = {"slow": (2.05, 2.42), "normal": (3.05, 3.5), "fast": (4.45, 5.0)}
DIRECTION = {"forward": 0.0, "left": math.pi / 2, "back": math.pi, "right": -math.pi / 2}


@dataclass(frozen=True)
class Style:
    """What one person keeps through a clip. rest (N_CHANNELS): the channels of standing at ease."""

    body: Body
    rest: np.ndarray
    tempo: float
    swing: float
    bounce: float
    idle: np.ndarray  # (3, 4, 2): amplitude scale, frequency and phase of the sways


@dataclass(frozen=True)
class Segment:
    """One action: body (T, N_CHANNELS), feet (T, 2, 5), and the frames [first, last) that can stand alone."""

    body: np.ndarray
    feet: np.ndarray
    first: int
    last: int


def make_style(rng: np.random.Generator) -> Style:
    body = rig.make_body(rng)
    rest = np.zeros(rig.N_CHANNELS)
    rest[rig.BEND] = rng.uniform(-0.02, 0.16)
    rest[rig.NOD] = rng.uniform(-0.12, 0.08) - 0.5 * rest[rig.BEND]
    swing_out = rng.uniform(0.08, 0.22)
    for side in (0, 1):
        arm = rest[rig.ARMS + 4 * side : rig.ARMS + 4 * side + 4]
        arm[0] = rng.uniform(-0.08, 0.06)
        arm[1] = swing_out + rng.uniform(-0.02, 0.02)
        arm[2] = arm[0] + rng.uniform(0.12, 0.4)
        arm[3] = rng.uniform(0.02, 0.12)
    idle = np.stack(
        (rng.uniform(0.3, 1.0, (4, 2)), rng.uniform(0.15, 0.55, (4, 2)), rng.uniform(0, 2 * math.pi, (4, 2)))
    )
    return Style(body, rest, rng.uniform(0.9, 1.12), rng.uniform(0.75, 1.25), rng.uniform(0.7, 1.2), idle)


def _clock(seconds: float) -> np.ndarray:
    return np.arange(max(2, math.ceil(seconds * FPS) + 1)) / FPS


def smooth(u: np.ndarray) -> np.ndarray:
    """0 to 1 with level ends, clipped outside (cubic)."""
    u = np.clip(u, 0.0, 1.0)
    return u * u * (3 - 2 * u)


def keyed(
    t: np.ndarray, times: Sequence[float], values: Sequence[float], slopes: Sequence[float] | None = None
) -> np.ndarray:
    """Cubic Hermite curve through (times, values), level at every key unless `slopes` says otherwise."""
    at = np.asarray(times, dtype=float)
    value = np.asarray(values, dtype=float)
    k = np.minimum(np.searchsorted(at, t, side="right"), len(at) - 1) - 1
    np.maximum(k, 0, out=k)
    span = at[k + 1] - at[k]
    u = np.clip((t - at[k]) / span, 0.0, 1.0)
    rise = u * u * (3 - 2 * u)
    out = value[k] + (value[k + 1] - value[k]) * rise
    if slopes is not None:
        slope = np.asarray(slopes, dtype=float)
        out += span * u * (1 - u) * ((1 - u) * slope[k] - u * slope[k + 1])
    return out


def _ball(body: Body, side: int, x: Any, z: Any, yaw: Any) -> tuple[Any, Any]:
    """Ground place of the ball of a flat foot whose ankle stands over (x, z)."""
    bone = body.offsets[10 + side]
    c, s = np.cos(yaw), np.sin(yaw)
    return x + c * bone[0] + s * bone[2], z - s * bone[0] + c * bone[2]


def _neutral_feet(style: Style) -> np.ndarray:
    """(2, 5): the feet of a body that stands at the origin and faces +Z."""
    feet = np.zeros((2, 5))
    for side, sign in ((0, 1), (1, -1)):
        yaw = sign * style.body.toe_out
        x, z = _ball(style.body, side, sign * style.body.stance, 0.0, yaw)
        feet[side] = (x, rig.FLOOR, z, yaw, 0.0)
    return feet


def _standing(style: Style, n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(style.rest, (n, 1)), np.tile(_neutral_feet(style), (n, 1, 1))


def _aim(channels: np.ndarray, side: int, pose: Sequence[float], weight: np.ndarray) -> None:
    """Blend one arm from where it is to the four angles of `pose`, by `weight` (T)."""
    arm = channels[:, rig.ARMS + 4 * side : rig.ARMS + 4 * side + 4]
    arm += weight[:, None] * (np.asarray(pose) - arm)


def _sides(side: str | None) -> tuple[int, ...]:
    return {"left": (0,), "right": (1,)}.get(side or "", (0, 1))


@dataclass(frozen=True)
class _Gait:
    cadence: float  # steps a second
    duty: float  # share of its cycle that a foot stands
    height: float  # of the ball of the foot in the swing, metres
    heel: float  # pitch of the foot as it leaves the floor
    kick: float  # further pitch in the swing: the heel that comes up behind a runner
    toe: float  # toe up before it lands
    spread: float  # added to half the stance width
    early: float  # where in its stance a foot is under the root
    ease: float  # seconds to get up to speed, and down


def _track(
    t: np.ndarray,
    body: Body,
    side: int,
    land: np.ndarray,
    lift: np.ndarray,
    place: np.ndarray,
    gait: _Gait,
) -> np.ndarray:
    """One foot (T, 5). Stance k lasts from land[k] to lift[k] at place[k] = (x, z, yaw) of the ankle."""
    k = np.maximum(np.searchsorted(land, t, side="right") - 1, 0)
    after = np.minimum(k + 1, len(land) - 1)
    gap = np.where(after > k, land[after] - lift[k], 1.0)
    u = np.where(after > k, np.clip((t - lift[k]) / gap, 0.0, 1.0), 0.0)
    x, z = _ball(body, side, place[:, 0], place[:, 1], place[:, 2])
    go = smooth(u)
    out = np.empty((len(t), 5))
    out[:, rig.FOOT_X] = x[k] + (x[after] - x[k]) * go
    out[:, rig.FOOT_Z] = z[k] + (z[after] - z[k]) * go
    out[:, rig.FOOT_YAW] = place[k, 2] + (place[after, 2] - place[k, 2]) * go
    stood = np.minimum(lift - land, 0.8)[k] * 0.45
    off = np.where(after > k, smooth(1 - (lift[k] - t) / stood), 0.0)
    up = np.where(u > 0, 1 - smooth(u / 0.65), off)
    toe = gait.toe * np.sin(np.pi * np.clip(2 * u - 1, 0.0, 1.0))
    out[:, rig.FOOT_PITCH] = (
        gait.heel * up + gait.kick * np.sin(np.pi * np.clip(u / 0.75, 0.0, 1.0)) ** 2 - toe
    )
    arc = np.sin(np.pi * u) ** 0.85
    # A toe that points up turns about the heel: the ball of the foot rises, the heel does not sink.
    out[:, rig.FOOT_Y] = rig.FLOOR + gait.height * arc + body.offsets[10, 2] * np.sin(toe)
    return out


def _stepping(
    style: Style,
    gait: _Gait,
    *,
    speed: float,
    direction: float,
    seconds: float,
    turn: float,
    turn_span: tuple[float, float],
    lead: int,
    running: bool = False,
) -> Segment:
    """Feet that step along a path: `speed` m/s at `direction` radians from the heading, which turns by `turn`
    in the share `turn_span` of the way. `lead` steps first. From rest to rest."""
    body = style.body
    step = 1 / gait.cadence
    swing = (1 - gait.duty) * 2 * step
    start = 0.05
    steps = max(3, round((seconds - start - swing) / step) + 1)
    lifts = start + step * np.arange(steps)
    lands = lifts + swing
    stop = lands[-1] - 0.35 * step
    t = _clock(lands[-1] + 0.1)

    pace = smooth(t / gait.ease) * smooth((stop - t) / gait.ease)
    gone = np.concatenate(([0.0], np.cumsum(0.5 * (pace[1:] + pace[:-1])))) / FPS
    low, high = turn_span
    heading = turn * (smooth if low > 0 else lambda u: np.clip(u, 0, 1))(
        (gone / gone[-1] - low) / (high - low)
    )
    velocity = speed * pace
    way = heading + direction
    vx, vz = velocity * np.sin(way), velocity * np.cos(way)
    x = np.concatenate(([0.0], np.cumsum(0.5 * (vx[1:] + vx[:-1])))) / FPS
    z = np.concatenate(([0.0], np.cumsum(0.5 * (vz[1:] + vz[:-1])))) / FPS

    n = len(t)
    channels = np.tile(style.rest, (n, 1))
    channels[:, rig.X], channels[:, rig.Z], channels[:, rig.YAW] = x, z, heading
    feet = np.empty((n, 2, 5))
    for side, sign in ((0, 1), (1, -1)):
        mine = np.arange(0 if side == lead else 1, steps, 2)
        land = np.concatenate(([-1.0], lands[mine]))
        lift = np.concatenate((lifts[mine], [t[-1] + 1.0]))
        middle = land + gait.early * (lift - land)
        middle[0], middle[-1] = 0.0, t[-1]
        yaw = np.interp(middle, t, heading)
        wide = np.full(len(middle), body.stance + gait.spread)
        wide[0] = wide[-1] = body.stance
        place = np.stack(
            (
                np.interp(middle, t, x) + sign * wide * np.cos(yaw),
                np.interp(middle, t, z) - sign * wide * np.sin(yaw),
                yaw + sign * body.toe_out,
            ),
            axis=-1,
        )
        feet[:, side] = _track(t, body, side, land, lift, place, gait)

    # Cycle phase: 0 as the left foot lands.
    phase = 2 * np.pi * (t - lands[0] - (step if lead else 0.0)) / (2 * step)
    busy = smooth(t / 0.3) * smooth((lands[-1] - t) / 0.3)
    duty = 2 * np.pi * gait.duty
    metres = speed / body.leg
    onward = math.cos(direction)
    stride = np.cos(phase)
    channels[:, rig.SWAY] += busy * 0.022 * np.cos(phase - duty / 2) * (0.5 if running else 1.0)
    channels[:, rig.HIP_YAW] -= busy * onward * min(0.05 * metres, 0.14) * stride
    channels[:, rig.TWIST] += busy * onward * min(0.11 * metres, 0.3) * style.swing * stride
    channels[:, rig.ROLL] += busy * 0.03 * np.sin(phase - duty / 2)
    if running:
        lean = min(0.05 * metres, 0.2) * (1 if onward > 0 else -0.2)
        flight = np.cos(2 * phase - (duty + np.pi))
        channels[:, rig.RISE] += busy * body.leg * (0.035 * style.bounce * flight - 0.035)
        amplitude = min(0.35 + 0.1 * metres, 0.85) * style.swing
        flex, outward = 1.45, 0.18
    else:
        lean = 0.03 * metres * onward
        channels[:, rig.RISE] -= busy * body.leg * 0.012
        amplitude = (0.1 + 0.22 * metres) * style.swing * abs(onward)
        flex, outward = 0.22 + 0.12 * metres, 0.12
    # The start and the stop lean into the change of speed.
    channels[:, rig.PITCH] += 0.4 * lean * pace
    channels[:, rig.BEND] += 0.6 * lean * pace
    sign = 1 if onward >= 0 else -1
    for side, counter in ((0, -1), (1, 1)):
        upper = counter * sign * amplitude * stride
        arm = channels[:, rig.ARMS + 4 * side : rig.ARMS + 4 * side + 4]
        arm[:, 0] += busy * (upper - (0.15 if running else 0.0))
        arm[:, 1] += busy * (outward - arm[:, 1]) * 0.5
        arm[:, 2] += busy * (upper * (0.9 if running else 1.15) + flex + 0.1 * counter * sign * stride - 0.15)
        arm[:, 3] += busy * (-0.25 if running else -0.03)
    steady = np.flatnonzero(pace > 0.995)
    whole = turn_span[0] == 0.0 or speed == 0.0
    first, last = (0, n) if whole or len(steady) < 2 else (int(steady[0]), int(steady[-1]) + 1)
    return Segment(channels, feet, first, last)


def _walk_gait(style: Style, pace: float, direction: float) -> _Gait:
    """Gait of a walk of `pace` leg lengths a second."""
    cadence = (1.15 + 0.51 * pace) * style.tempo
    aside, back = abs(math.sin(direction)), max(0.0, -math.cos(direction))
    cadence *= 1 + 0.35 * aside + 0.15 * back
    reach = pace * style.body.leg / cadence
    return _Gait(
        cadence=cadence,
        duty=0.62 - 0.03 * max(0.0, pace - 1.4) - 0.06 * aside,
        height=0.035 + 0.012 * style.bounce,
        heel=(0.45 + 0.22 * pace) * (1 - aside) * (1 - 0.75 * back) + 0.15,
        kick=0.0,
        toe=0.22 * (1 - aside) * (1 - back),
        spread=aside * max(0.0, reach / 2 + 0.05 - style.body.stance),
        early=0.5 - 0.08 * (1 - aside) * (1 - back) + 0.05 * back,
        ease=0.35 + 0.1 * pace,
    )


def _run_gait(style: Style, pace: float, direction: float) -> _Gait:
    back = max(0.0, -math.cos(direction))
    return _Gait(
        cadence=(2.35 + 0.16 * pace) * (0.5 + 0.5 * style.tempo) * (1 + 0.1 * back),
        duty=0.37 - 0.016 * pace,
        height=0.11 + 0.03 * pace,
        heel=0.75 * (1 - 0.7 * back),
        kick=(0.25 + 0.1 * pace) * (1 - back),
        toe=0.15 * (1 - back),
        spread=-0.3 * style.body.stance,
        early=0.45 + 0.05 * back,
        ease=0.45 + 0.07 * pace,
    )


def _go(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    running = spec.action == "run"
    low, high = (RUN_SPEED if running else WALK_SPEED)[spec.speed or "normal"]
    pace = rng.uniform(low, high)
    direction = DIRECTION[spec.direction or "forward"]
    gait = (_run_gait if running else _walk_gait)(style, pace, direction)
    seconds = rng.uniform(2.0, 2.6) if short else rng.uniform(2.3, 4.0)
    # The way at full speed is two leg lengths and more; the ramps come on top.
    seconds = max(seconds, 2.2 / pace) + gait.ease + 0.5
    sign = {"left": 1, "right": -1}.get(spec.turn or "", 0)
    centre = rng.uniform(0.42, 0.58)
    width = rng.uniform(0.3, 0.45)
    return _stepping(
        style,
        gait,
        speed=pace * style.body.leg,
        direction=direction + rng.uniform(-0.12, 0.12),
        seconds=min(seconds, 5.2),
        turn=sign * math.radians(rng.uniform(65, 115)),
        turn_span=(centre - width / 2, centre + width / 2),
        lead={"left": 0, "right": 1}.get(spec.direction or "", int(rng.integers(2))),
        running=running,
    )


def _circle(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    pace = rng.uniform(*WALK_SPEED[spec.speed or "normal"])
    low, high = {"slow": (0.6, 0.72), "normal": (0.9, 1.15), "fast": (1.35, 1.7)}[spec.speed or "normal"]
    radius = rng.uniform(low, high) * style.body.leg
    gait = _walk_gait(style, pace, 0.0)
    sign = 1 if spec.turn == "left" else -1
    around = math.radians(rng.uniform(353, 367))
    speed = pace * style.body.leg
    seconds = around * radius / speed + gait.ease
    return _stepping(
        style,
        gait,
        speed=speed,
        direction=0.0,
        seconds=seconds,
        turn=sign * around,
        turn_span=(0.0, 1.0),
        lead=0 if sign > 0 else 1,
    )


def _turn(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    angle = float(spec.angle or 180) + rng.uniform(-12, 12)
    sign = 1 if spec.turn == "left" else -1
    # A whole turn in less than four seconds would cancel the heading that the 263 features smooth over one.
    rate = rng.uniform(78, 90) if spec.angle == "360" else rng.uniform(80, 115) * style.tempo
    gait = _Gait(
        cadence=rng.uniform(2.2, 2.8),
        duty=0.6,
        height=rng.uniform(0.03, 0.06),
        heel=0.35,
        kick=0.0,
        toe=0.0,
        spread=0.0,
        early=0.5,
        ease=0.4,
    )
    segment = _stepping(
        style,
        gait,
        speed=0.0,
        direction=0.0,
        seconds=max(1.3, angle / rate + 0.5),
        turn=sign * math.radians(angle),
        turn_span=(0.0, 1.0),
        lead=0 if sign > 0 else 1,
    )
    pace = np.gradient(segment.body[:, rig.YAW])
    segment.body[:, rig.LOOK] += 2.0 * pace
    segment.body[:, rig.TWIST] += 1.2 * pace
    return segment


def _stand(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    t = _clock(rng.uniform(2.0, 4.6))
    channels, feet = _standing(style, len(t))
    beats = np.linspace(0, t[-1], 4).tolist()
    channels[:, rig.LOOK] += keyed(t, beats, (0, rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), 0))
    channels[:, rig.SWAY] += keyed(t, beats, (0, rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), 0))
    return Segment(channels, feet, 0, len(t))


def _jump(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    body, count = style.body, int(spec.count or 1)
    flight = rng.uniform(0.42, 0.54)
    crouch = rng.uniform(0.28, 0.4) / style.tempo
    push = rng.uniform(0.16, 0.22)
    absorb = rng.uniform(0.16, 0.22)
    rest = rng.uniform(0.12, 0.3)
    settle = rng.uniform(0.3, 0.45)
    depth = rng.uniform(0.14, 0.24) * body.leg
    launch = 0.5 * GRAVITY * flight
    tuck = rng.uniform(0.08, 0.2) * body.leg
    far = 0.0 if spec.direction is None else rng.uniform(0.42, 0.62) * body.leg
    way = DIRECTION[spec.direction or "forward"] + rng.uniform(-0.15, 0.15)

    now = rng.uniform(0.05, 0.3)
    times, heights, slopes = [0.0, now], [0.0, 0.0], [0.0, 0.0]
    offs, downs = [], []
    for k in range(count):
        low = now + (crouch if k == 0 else rest)
        offs.append(low + push)
        downs.append(offs[-1] + flight)
        now = downs[-1] + absorb
        times += [low, offs[-1], downs[-1], now]
        heights += [-depth, 0.01, 0.01, -0.8 * depth]
        slopes += [0.0, launch, -launch, 0.0]
    times.append(now + settle)
    heights.append(0.0)
    slopes.append(0.0)
    t = _clock(max(times[-1] + 0.1, 2.0))
    channels, feet = _standing(style, len(t))
    rise = keyed(t, times, heights, slopes)
    channels[:, rig.RISE] += rise

    gone = np.zeros(len(t))
    air = np.zeros(len(t))
    pitch = np.zeros(len(t))
    step = np.zeros(len(t))
    for off, down in zip(offs, downs, strict=True):
        u = np.clip((t - off) / flight, 0.0, 1.0)
        step += smooth(u)
        gone += smooth((t - off + 0.12) / (flight + 0.24))
        parabola = 4 * u * (1 - u)
        air += parabola * (GRAVITY * flight**2 / 8 * 0.92 + tuck * np.sin(np.pi * u))
        pitch += keyed(t, (off - 0.15, off, off + 0.6 * flight, down), (0.0, 0.75, 0.25, 0.0))
    for axis, foot_axis, part in (
        (rig.X, rig.FOOT_X, math.sin(way)),
        (rig.Z, rig.FOOT_Z, math.cos(way)),
    ):
        channels[:, axis] += far * part * gone
        feet[:, :, foot_axis] += (far * part * step)[:, None]
    feet[:, :, rig.FOOT_Y] += air[:, None]
    feet[:, :, rig.FOOT_PITCH] += pitch[:, None]

    crouched = np.clip(-rise / depth, 0.0, 1.0)
    channels[:, rig.PITCH] += 0.3 * crouched
    channels[:, rig.BEND] += 0.35 * crouched
    channels[:, rig.SHIFT] -= 0.07 * crouched
    high = np.clip(air / (tuck + 0.2), 0.0, 1.0)
    forward = rng.uniform(0.5, 1.1)
    for side in (0, 1):
        _aim(channels, side, (-0.6, 0.2, -0.35, 0.15), 0.9 * crouched)
        _aim(channels, side, (forward, 0.25, forward + 0.7, 0.15), high)
    return Segment(channels, feet, 0, len(t))


def _reps(
    rng: np.random.Generator, count: int, down: float, hold: float, up: float, rest: float
) -> tuple[list[float], list[float]]:
    """Times and weights (0, 1, 1, 0, ...) of `count` repetitions."""
    times, weights = [0.0, rng.uniform(0.05, 0.3)], [0.0, 0.0]
    for k in range(count):
        times += [times[-1] + down, times[-1] + down + hold, times[-1] + down + hold + up]
        weights += [1.0, 1.0, 0.0]
        if k + 1 < count:
            times.append(times[-1] + rest)
            weights.append(0.0)
    times.append(times[-1] + rng.uniform(0.1, 0.3))
    weights.append(0.0)
    return times, weights


def _squat(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    count = int(spec.count or 1)
    pace = style.tempo * (0.8, 0.95, 1.1)[count - 1]
    times, weights = _reps(
        rng, count, 0.6 / pace, rng.uniform(0.05, 0.25), 0.6 / pace, rng.uniform(0.1, 0.25)
    )  # fmt: skip
    t = _clock(times[-1])
    channels, feet = _standing(style, len(t))
    low = keyed(t, times, weights)
    depth = rng.uniform(0.42, 0.53) * style.body.stand_height
    channels[:, rig.RISE] -= depth * low
    channels[:, rig.SHIFT] -= rng.uniform(0.14, 0.2) * low
    channels[:, rig.PITCH] += 0.45 * low
    channels[:, rig.BEND] += rng.uniform(0.1, 0.3) * low
    channels[:, rig.NOD] -= 0.3 * low
    forward = rng.uniform(0.9, 1.5)
    bent = rng.choice((0.05, 0.9))
    for side in (0, 1):
        _aim(channels, side, (forward - 0.4 * bent, 0.1, min(forward + bent, 2.0), 0.0), low)
    return Segment(channels, feet, 0, len(t))


def _sit(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    down = rng.uniform(0.8, 1.2) / style.tempo
    start = rng.uniform(0.1, 0.4)
    hold = rng.uniform(0.9, 1.4) if short else rng.uniform(1.0, 2.4)
    t = _clock(start + down + hold)
    channels, feet = _standing(style, len(t))
    low = keyed(t, (0.0, start, start + down, t[-1] + 0.1), (0, 0, 1, 1))
    back = keyed(t, (0.0, start, start + 0.8 * down, t[-1] + 0.1), (0, 0, 1, 1))
    channels[:, rig.RISE] -= rng.uniform(0.4, 0.48) * style.body.stand_height * low
    channels[:, rig.SHIFT] -= rng.uniform(0.44, 0.52) * style.body.leg * back
    lean = keyed(t, (0.0, start, start + 0.6 * down, start + 1.1 * down + 0.2), (0, 0, 1, 0.15))
    channels[:, rig.PITCH] += 0.35 * lean
    channels[:, rig.BEND] += 0.35 * lean
    reach = rng.uniform(0.35, 0.6)
    for side in (0, 1):
        _aim(channels, side, (reach, 0.12, reach + rng.uniform(0.7, 1.0), -0.05), low)
    return Segment(channels, feet, 0, len(t))


def _bow(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    count = int(spec.count or 1)
    pace = style.tempo * (0.75, 0.95, 1.1)[count - 1]
    times, weights = _reps(
        rng, count, 0.6 / pace, rng.uniform(0.1, 0.4) / count, 0.65 / pace, rng.uniform(0.12, 0.25)
    )  # fmt: skip
    t = _clock(times[-1])
    channels, feet = _standing(style, len(t))
    low = keyed(t, times, weights)
    angle = math.radians(rng.uniform(55, 80))
    channels[:, rig.PITCH] += 0.5 * angle * low
    channels[:, rig.BEND] += 0.5 * angle * low
    channels[:, rig.SHIFT] -= 0.1 * low
    channels[:, rig.NOD] += rng.uniform(-0.1, 0.25) * low
    hang = rng.uniform(0.2, 0.8)
    for side in (0, 1):
        channels[:, rig.ARMS + 4 * side] += hang * angle * low
        channels[:, rig.ARMS + 4 * side + 2] += hang * angle * low
    return Segment(channels, feet, 0, len(t))


def _wave(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    start, up, down = rng.uniform(0.05, 0.3), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
    rate = rng.uniform(1.3, 1.9) * style.tempo
    swings = (rng.uniform(2.5, 3.5) if short else rng.uniform(2.5, 4.5)) / rate
    a, b = start + up, start + up + swings
    t = _clock(b + down + 0.1)
    channels, feet = _standing(style, len(t))
    high = keyed(t, (0.0, start, a, b, b + down), (0, 0, 1, 1, 0))
    busy = keyed(t, (0.0, a - 0.15, a + 0.1, b - 0.1, b + 0.15), (0, 0, 1, 1, 0))
    amplitude = rng.uniform(0.42, 0.62)
    forward, outward = rng.uniform(0.1, 0.5), rng.uniform(1.25, 1.75)
    phase = rng.uniform(0, 2 * math.pi)
    for side in _sides(spec.side):
        _aim(channels, side, (forward, outward, forward * 0.5, rng.uniform(2.75, 3.0)), high)
        beat = busy * np.sin(2 * np.pi * rate * (t - a) + phase)
        channels[:, rig.ARMS + 4 * side + 3] += amplitude * beat
        channels[:, rig.ARMS + 4 * side + 1] += 0.12 * amplitude * beat
    if spec.side in ("left", "right"):
        channels[:, rig.LEAN] += rng.uniform(-0.05, 0.08) * high * (1 if spec.side == "left" else -1)
    return Segment(channels, feet, 0, len(t))


def _raise(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    start, up, down = rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.8)
    hold = rng.uniform(0.4, 0.8) if short else rng.uniform(0.5, 1.6)
    t = _clock(start + up + hold + down + 0.1)
    channels, feet = _standing(style, len(t))
    high = keyed(t, (0.0, start, start + up, start + up + hold, start + up + hold + down), (0, 0, 1, 1, 0))
    aside = rng.random() < 0.5
    top, bent = rng.uniform(2.5, 2.95), rng.uniform(-0.1, 0.2)
    for side in _sides(spec.side):
        pose = (0.15, top, 0.15, top + bent) if aside else (top, 0.1, top + bent, 0.05)
        _aim(channels, side, pose, high)
    channels[:, rig.NOD] -= rng.uniform(0, 0.25) * high
    # The arm may stay up when nothing follows.
    last = len(t) if rng.random() < 0.6 else max(40, int((start + up + hold) * FPS))
    return Segment(channels, feet, 0, min(last, len(t)))


def _punch(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    count = int(spec.count or 1)
    side = _sides(spec.side)[0]
    ready = rng.uniform(0.35, 0.5)
    reach, hold, back = rng.uniform(0.15, 0.2), rng.uniform(0.1, 0.2), rng.uniform(0.25, 0.35)
    rest = rng.uniform(0.25, 0.4)
    now = rng.uniform(0.1, 0.25) + ready + rng.uniform(0.1, 0.35)
    begin = 0.05
    times, weights = [0.0, now], [0.0, 0.0]
    for _ in range(count):
        times += [now + reach, now + reach + hold, now + reach + hold + back]
        weights += [1.0, 1.0, 0.0]
        now = times[-1] + rest
        times.append(now)
        weights.append(0.0)
    end = now + rng.uniform(0.4, 0.6)
    t = _clock(max(end + 0.1, 2.0))
    channels, feet = _standing(style, len(t))
    guard = keyed(t, (0.0, begin, begin + ready, now, end), (0, 0, 1, 1, 0))
    out = keyed(t, times, weights)
    cock = rng.uniform(-0.55, -0.3)
    for arm in (0, 1):
        _aim(channels, arm, (cock if arm == side else 0.1, 0.25, rng.uniform(1.6, 2.0), -0.15), guard)
    level = rng.uniform(1.42, 1.6)
    _aim(channels, side, (level, -0.02, level, -0.1), out)
    sign = 1 if side == 0 else -1
    # The shoulder of the striking arm goes ahead.
    channels[:, rig.TWIST] -= sign * (0.32 * out - 0.12 * guard)
    channels[:, rig.HIP_YAW] -= sign * 0.1 * out
    channels[:, rig.PITCH] += 0.06 * out
    channels[:, rig.SHIFT] += 0.03 * out
    channels[:, rig.RISE] -= 0.02 * guard
    return Segment(channels, feet, 0, len(t))


def _kick(style: Style, spec: Spec, rng: np.random.Generator, short: bool) -> Segment:
    body, count = style.body, int(spec.count or 1)
    side = _sides(spec.side)[0]
    sign = 1 if side == 0 else -1
    lift, strike = rng.uniform(0.26, 0.34), rng.uniform(0.15, 0.2)
    back, down = rng.uniform(0.18, 0.24), rng.uniform(0.24, 0.32)
    rest = rng.uniform(0.12, 0.3)
    height = rng.uniform(0.72, 0.95) * body.leg
    chamber_up = rng.uniform(0.4, 0.5) * body.leg
    ahead = rng.uniform(0.78, 0.86) * body.leg
    now = rng.uniform(0.25, 0.45)
    times, ups, outs, points = [0.0, now], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for _ in range(count):
        times += [now + lift, now + lift + strike, now + lift + strike + back]
        times.append(times[-1] + down)
        ups += [chamber_up, height, chamber_up, 0.0]
        outs += [0.05 * body.leg, ahead, 0.08 * body.leg, 0.0]
        points += [0.5, -0.5, 0.4, 0.0]
        now = times[-1] + rest
        times.append(now)
        for values in (ups, outs, points):
            values.append(0.0)
    begin, end = times[1], times[-1]
    t = _clock(max(end + 0.3, 2.0))
    channels, feet = _standing(style, len(t))
    up, out, point = keyed(t, times, ups), keyed(t, times, outs), keyed(t, times, points)
    yaw = feet[:, side, rig.FOOT_YAW] * (1 - np.clip(up / chamber_up, 0, 1))
    rest_bone = rig.foot_bone(body, side, feet[:, side, rig.FOOT_YAW], np.zeros(len(t)))
    ankle = feet[:, side, :3] - rest_bone
    ankle[:, 1] += up
    ankle[:, 2] += out
    ankle[:, 0] -= sign * 0.5 * body.stance * np.clip(up / chamber_up, 0, 1)
    feet[:, side, rig.FOOT_YAW] = yaw
    feet[:, side, rig.FOOT_PITCH] = point
    feet[:, side, :3] = ankle + rig.foot_bone(body, side, yaw, point)

    stand = keyed(t, (0.0, begin - 0.2, begin + 0.1, end - 0.1, end + 0.2), (0, 0, 1, 1, 0))
    share = out / ahead
    channels[:, rig.SWAY] -= sign * 0.8 * body.stance * stand
    channels[:, rig.PITCH] -= rng.uniform(0.1, 0.25) * share
    channels[:, rig.SHIFT] += 0.06 * share
    channels[:, rig.HIP_YAW] -= sign * 0.15 * share
    channels[:, rig.ROLL] += 0.08 * sign * stand
    channels[:, rig.RISE] -= 0.015 * stand
    for arm in (0, 1):
        raised = 0.5 if arm == side else 0.8
        _aim(channels, arm, (raised - 0.5 * (arm == side), 0.35, 1.5, 0.0), 0.8 * stand)
    return Segment(channels, feet, 0, len(t))


BUILDERS: dict[str, Callable[[Style, Spec, np.random.Generator, bool], Segment]] = {
    "stand": _stand,
    "walk": _go,
    "run": _go,
    "jump": _jump,
    "squat": _squat,
    "sit": _sit,
    "bow": _bow,
    "wave": _wave,
    "raise": _raise,
    "punch": _punch,
    "kick": _kick,
    "turn": _turn,
    "circle": _circle,
}


def build(style: Style, spec: Spec, rng: np.random.Generator, *, short: bool = False) -> Segment:
    """The segment of one full spec; `short` asks for the brisk version that fits into a sequence."""
    return BUILDERS[spec.action](style, spec, rng, short)


def sway(style: Style, channels: np.ndarray) -> None:
    """Add the small movements of a body that is never quite still, in place."""
    t = np.arange(len(channels)) / FPS
    scale, rate, phase = style.idle
    waves = scale[..., None] * np.sin(2 * np.pi * rate[..., None] * t + phase[..., None])
    bend, twist, lean, arms = waves.sum(axis=1)
    channels[:, rig.BEND] += 0.012 * bend
    channels[:, rig.TWIST] += 0.015 * twist
    channels[:, rig.LEAN] += 0.01 * lean
    channels[:, rig.SWAY] += 0.004 * lean
    channels[:, rig.LOOK] += 0.03 * twist
    for side in (0, 1):
        channels[:, rig.ARMS + 4 * side] += 0.015 * arms
        channels[:, rig.ARMS + 4 * side + 2] += 0.02 * arms
