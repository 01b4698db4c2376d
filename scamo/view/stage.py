"""The motions of one client: bodies, timeline, list and downloads. Nothing here is shared between clients."""

from __future__ import annotations

import math
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import viser
from numpy.typing import NDArray

from scamo.errors import ScaMoError
from scamo.motion.motion import SUFFIXES, Motion
from scamo.view.body import Body, places
from scamo.view.player import Player

_Vector = NDArray[np.floating]
_RATE = 30.0  # frames a second that are sent at most
_SPEEDS = {"0.25×": 0.25, "0.5×": 0.5, "1×": 1.0, "2×": 2.0, "4×": 4.0}
_FIELD = math.radians(35)  # vertical angle of view
_VIEW = np.array([0.35, 0.35, 1.0])  # from the motions towards the camera
# The files that other programs read come first.
_FORMATS = tuple(sorted(SUFFIXES, key=lambda suffix: (suffix != ".bvh", suffix != ".npz")))

# Matplotlib does not promise to draw in two threads at once.
_saving = threading.Lock()


def complain(client: viser.ClientHandle, title: str, error: Exception) -> None:
    """Tell one client what went wrong; the traceback of a fault of ours goes to the server's terminal."""
    if isinstance(error, ScaMoError):
        client.add_notification(title, str(error), color="red")
        return
    traceback.print_exception(error)
    client.add_notification(title, f"{type(error).__name__}; the server's terminal says more", color="red")


class Stage:
    """What one client sees and plays. A thread moves the bodies; it sleeps while the clock is paused."""

    def __init__(self, client: viser.ClientHandle) -> None:
        self._client = client
        self._player = Player(0.0)
        self._bodies: list[Body] = []
        self._closed = False
        self._lock = threading.Condition()  # of the four fields above
        scene, gui = client.scene, client.gui
        scene.add_grid(
            "/ground",
            plane="xz",
            infinite_grid=True,
            fade_distance=25.0,
            cell_color=(225, 222, 214),
            section_color=(198, 194, 184),
            shadow_opacity=0.25,
        )
        self._look(np.array([-1.0, 0.0, -1.0]), np.array([1.0, 1.8, 1.0]), _VIEW)
        self._playback = gui.add_folder("Playback", visible=False)
        with self._playback:
            self._time = gui.add_slider("Time (s)", 0.0, 1.0, 0.01, 0.0)
            self._button = gui.add_button("Play")
            self._speed = gui.add_dropdown("Speed", tuple(_SPEEDS), initial_value="1×")
            self._loop = gui.add_checkbox("Loop", True)
        self._motions = gui.add_folder("Motions", visible=False)
        self._time.on_update(self._scrub)
        self._button.on_click(self._toggle)
        self._speed.on_update(self._settings)
        self._loop.on_update(self._settings)
        threading.Thread(target=self._run, name=f"stage-{client.client_id}", daemon=True).start()

    def show(self, motions: Sequence[Motion], names: Sequence[str]) -> None:
        """Put these in the place of what is there, and play. names: what to call them, all different."""
        ground = places(motions)
        with self._lock:
            if self._closed:
                return
            with self._client.atomic():
                for body in self._bodies:
                    body.remove()
                self._bodies = [
                    Body(self._client.scene, f"/motion-{i}", name, motion, place)
                    for i, (name, motion, place) in enumerate(zip(names, motions, ground, strict=True))
                ]
                self._player.duration = max(motion.duration for motion in motions)
                self._player.time = 0.0
                self._time.max = self._player.duration
                self._playback.visible = True
                self._list(names)
                self._frame(motions, ground)
                self._set_playing(True)
                self._draw()

    def close(self) -> None:
        """The client is gone: end the thread, send nothing more."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _run(self) -> None:
        last: float | None = None
        while True:
            with self._lock:
                while not (self._player.playing or self._closed):
                    last = None
                    self._lock.wait()
                if self._closed:
                    return
                now = time.monotonic()
                if last is not None:
                    self._player.advance(now - last)
                    self._draw()
                    if not self._player.playing:
                        self._set_playing(False)
                last = now
                # The lock is given up while waiting: a click comes through at once.
                self._lock.wait(max(0.0, 1 / _RATE - (time.monotonic() - now)))

    def _draw(self) -> None:
        with self._client.atomic():
            for body in self._bodies:
                body.show(self._player.time)
            self._time.value = round(self._player.time, 2)  # type: ignore[misc]

    def _set_playing(self, playing: bool) -> None:
        if playing:
            self._player.play()
        else:
            self._player.pause()
        self._button.label = "Pause" if playing else "Play"
        self._lock.notify_all()

    def _toggle(self, event: viser.GuiEvent) -> None:
        with self._lock:
            if not self._closed:
                self._set_playing(not self._player.playing)

    def _scrub(self, event: viser.GuiEvent) -> None:
        if event.client is None:  # the clock moved it
            return
        with self._lock:
            if self._closed:
                return
            self._set_playing(False)
            self._player.seek(self._time.value)
            self._draw()

    def _settings(self, event: viser.GuiEvent) -> None:
        with self._lock:
            self._player.speed = _SPEEDS.get(self._speed.value, 1.0)
            self._player.loop = self._loop.value

    def _list(self, names: Sequence[str]) -> None:
        gui = self._client.gui
        self._motions.remove()
        self._motions = gui.add_folder("Motions")
        caption = None
        with self._motions:
            for name, body in zip(names, self._bodies, strict=True):
                motion = body.motion
                gui.add_checkbox(name, True, hint="Show or hide it").on_update(self._shower(body))
                about = f"{len(motion)} frames, {motion.duration:.1f} s"
                if motion.text and motion.text != caption:
                    about += f"<br>{escape(motion.text)}"
                caption = motion.text
                # No Markdown: the page would run what a caption holds.
                gui.add_html(
                    f'<div style="margin:-0.4em 1em 0.6em;font-size:0.8em;opacity:0.75;max-height:6em;'
                    f'overflow:auto;overflow-wrap:anywhere">{about}</div>'
                )
            which = gui.add_dropdown("File of", tuple(names))
            kind = gui.add_dropdown("Format", _FORMATS)
            button = gui.add_button("Download")
        by_name = dict(zip(names, self._bodies, strict=True))

        @button.on_click
        def _(event: viser.GuiEvent) -> None:
            body = by_name.get(which.value)
            if body is not None and kind.value in _FORMATS:
                self._download(body.motion, which.value, kind.value)

    def _shower(self, body: Body) -> Callable[[viser.GuiEvent], None]:
        def update(event: viser.GuiEvent) -> None:
            with self._lock:
                if body in self._bodies:
                    body.visible = event.target.value

        return update

    def _download(self, motion: Motion, name: str, suffix: str) -> None:
        name = re.sub(r"^\d+\. ", "", name)  # of load_motions
        stem = Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name
        file = (re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:80] or "motion") + suffix
        try:
            with _saving, tempfile.TemporaryDirectory() as folder:
                motion.save(Path(folder) / file)
                content = (Path(folder) / file).read_bytes()
        except Exception as error:
            complain(self._client, f"{file}: not made", error)
            return
        self._client.send_file_download(file, content, save_immediately=True)

    def _frame(self, motions: Sequence[Motion], ground: _Vector) -> None:
        """Turn the camera to all motions; the direction that the client has chosen stays."""
        boxes = [
            (motion.joints.min((0, 1)) + place, motion.joints.max((0, 1)) + place)
            for motion, place in zip(motions, ground, strict=True)
        ]
        camera = self._client.camera
        view = np.asarray(camera.position) - np.asarray(camera.look_at)
        self._look(np.min(boxes, axis=(0, 1)), np.max(boxes, axis=(0, 1)), view)

    def _look(self, low: _Vector, high: _Vector, view: _Vector) -> None:
        """See the whole box, with room for the labels, from the direction `view`."""
        camera = self._client.camera
        back = view / max(float(np.linalg.norm(view)), 1e-6)
        right = np.cross([0.0, 1.0, 0.0], back)
        right /= max(float(np.linalg.norm(right)), 1e-6)
        half = 0.5 * (high - low) + [0.3, 0.4, 0.3]
        corners = half * list(product((-1, 1), repeat=3))
        slope = np.tan(0.5 * _FIELD)
        sideways = np.abs(corners @ right) / max(camera.aspect, 0.1)
        upright = np.abs(corners @ np.cross(back, right))
        distance = float(np.max(np.maximum(sideways, upright) / slope + corners @ back))
        centre = 0.5 * (low + high)
        camera.fov = _FIELD
        camera.position = centre + distance * back
        camera.look_at = centre
