import math

import pytest

pytest.importorskip("viser")

from scamo.view.player import Player, frame_at


def test_time_passes_at_the_speed_while_playing_only():
    player = Player(4.0)
    player.advance(1.0)
    assert player.time == 0.0
    player.play()
    player.speed = 0.5
    player.advance(1.0)
    assert player.time == 0.5
    player.pause()
    player.advance(1.0)
    assert (player.time, player.playing) == (0.5, False)


def test_a_loop_begins_again_and_keeps_the_rest():
    player = Player(2.0, time=1.5, playing=True)
    player.advance(1.0)
    assert (player.time, player.playing) == (0.5, True)
    player.advance(7.0)
    assert player.time == pytest.approx(1.5)


def test_without_loop_it_stops_at_the_end_and_plays_again_from_the_start():
    player = Player(2.0, time=1.5, loop=False, playing=True)
    player.advance(1.0)
    assert (player.time, player.playing) == (2.0, False)
    player.play()
    assert (player.time, player.playing) == (0.0, True)


@pytest.mark.parametrize(
    ("to", "time"), [(-1.0, 0.0), (0.7, 0.7), (9.0, 2.0), (math.inf, 2.0), (math.nan, 1.0)]
)
def test_seek_stays_inside(to, time):
    player = Player(2.0, time=1.0)
    player.seek(to)
    assert player.time == time


@pytest.mark.parametrize(
    ("time", "fps", "frames", "frame"),
    [
        (0.0, 20, 40, 0),
        (0.049, 20, 40, 0),
        (1.15, 20, 40, 23),
        (2.0, 20, 40, 39),
        (9.0, 20, 40, 39),
        (1.0, 60, 90, 60),
    ],
)
def test_frame_at(time, fps, frames, frame):
    assert frame_at(time, fps, frames) == frame


def test_every_frame_has_its_time():
    assert [frame_at(i / 30, 30, 300) for i in range(300)] == list(range(300))
