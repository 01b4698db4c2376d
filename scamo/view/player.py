"""What a page plays: a clock over motions of different lengths and frame rates. It knows no display."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Player:
    """A clock that runs from 0 to `duration` seconds; a new one is paused at 0.

    speed: seconds of the motion in a second. loop: begin again at the end instead of stopping there.
    """

    duration: float
    time: float = 0.0
    speed: float = 1.0
    loop: bool = True
    playing: bool = False

    def play(self) -> None:
        """Run; from the beginning if the end was reached."""
        if self.time >= self.duration:
            self.time = 0.0
        self.playing = True

    def pause(self) -> None:
        self.playing = False

    def seek(self, time: float) -> None:
        """Go to a time, the nearest one there is; what is no number changes nothing."""
        if not math.isnan(time):
            self.time = min(max(time, 0.0), self.duration)

    def advance(self, seconds: float) -> None:
        """Let `seconds` of real time pass; nothing happens while paused."""
        if not self.playing:
            return
        self.time += seconds * self.speed
        if self.time < self.duration:
            return
        if self.loop and self.duration > 0:
            self.time %= self.duration
        else:
            self.time, self.playing = self.duration, False


def frame_at(time: float, fps: float, frames: int) -> int:
    """The frame, 0 to frames - 1, that a motion shows at `time` seconds; the last one after its end."""
    # The epsilon: 1.15 * 20 is 22.999999999999996.
    return min(int(time * fps + 1e-6), frames - 1)
