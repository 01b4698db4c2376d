"""Pictures of motions: .gif and .mp4, strips of poses as .png, and a player in one .html file.

A projection of our own with flat Matplotlib artists instead of mplot3d: the body hides itself correctly, and
only the body is drawn anew for a frame. The left limbs are blue, the right ones orange.
"""

from __future__ import annotations

import base64
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.files import replacing
from scamo.motion.motion import Motion

_VIEWER = Path(__file__).parent / "viewer.html"

_PAPER = "#fbfaf7"
_INK = "#22303c"
_FAINT_INK = "#7b8794"
_TILE = "#e9e7e1"
_SHADOW = "#cfccc4"
PATH_COLOUR = "#b9305a"
_PATH_AHEAD = "#e7bcc8"
COLOURS = {"left": "#2878b5", "right": "#e07b28", "middle": "#40505f"}

# Metres across; a body is drawn as round-ended sticks along its bones.
HEAD_WIDTH = 0.19
_OUTLINE = 0.022

_AZIMUTH, _ELEVATION = math.radians(52), math.radians(17)  # from +Z towards +X; above the horizon
_FIELD = math.radians(26)  # vertical angle of view


class _Camera:
    """A perspective camera; screen units are halves of the picture's height, the middle is (0, 0)."""

    def __init__(self, target: np.ndarray, distance: float) -> None:
        horizontal = np.array([math.sin(_AZIMUTH), 0.0, math.cos(_AZIMUTH)])
        back = math.cos(_ELEVATION) * horizontal + np.array([0.0, math.sin(_ELEVATION), 0.0])
        right = np.cross([0.0, 1.0, 0.0], back)
        right /= np.linalg.norm(right)
        self.axes = np.stack([right, np.cross(back, right), back])
        self.target = np.asarray(target, dtype=np.float64)
        self.distance = distance
        self.focal = 1 / math.tan(_FIELD / 2)

    def view(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) world -> right, up, distance from the eye."""
        seen = (points - self.target) @ self.axes.T
        seen[..., 2] = np.maximum(self.distance - seen[..., 2], 0.05)
        return seen

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., 3) world -> (..., 2) screen and (...) screen units a metre there."""
        seen = self.view(points)
        scale = self.focal / seen[..., 2]
        return seen[..., :2] * scale[..., None], scale

    @classmethod
    def framing(cls, points: np.ndarray, aspect: float, low: float, high: float) -> _Camera:
        """The camera that sees all points (n, 3) between screen heights low and high at this aspect ratio."""
        camera = cls(0.5 * (points.min(0) + points.max(0)), 10.0)
        half = (high - low) / 2
        for _ in range(12):
            right, up, away = np.moveaxis((points - camera.target) @ camera.axes.T, -1, 0)
            # A point at (right, up, away) is inside if focal * |up| / (distance - away) <= half.
            distance = np.max(
                np.maximum(camera.focal * np.abs(up) / half, camera.focal * np.abs(right) / (0.95 * aspect))
                + away
            )
            camera = cls(camera.target, max(float(distance), 3.0))
            screen, _ = camera.project(points)
            off = 0.5 * (screen.min(0) + screen.max(0)) / camera.focal * camera.distance
            camera.target = camera.target + off @ camera.axes[:2]
        # Shift the picture so that the middle of what is seen lies between low and high.
        shift = -0.5 * (low + high) / camera.focal * camera.distance
        camera.target = camera.target + shift * camera.axes[1]
        return camera


def _floor_of(joints: np.ndarray) -> float:
    return float(joints[..., 1].min())


def _on_floor(points: np.ndarray, floor: float) -> np.ndarray:
    flat = np.array(points, dtype=np.float64)
    flat[..., 1] = floor
    return flat


def _corners(joints: np.ndarray) -> np.ndarray:
    """What has to be in the picture: all joints with a margin, and the ground below them."""
    points = joints.reshape(-1, 3).astype(np.float64)
    corners = [points + [x, y, z] for x in (-0.1, 0.1) for y in (-0.03, 0.14) for z in (-0.1, 0.1)]
    return np.concatenate([*corners, _on_floor(points, _floor_of(joints))])


def _ground(axes: Any, camera: _Camera, centre: np.ndarray, floor: float, reach: float, far: float) -> None:
    """A chequered floor of half-metre tiles (larger for long ways) that fades out between reach and far."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    size = 0.5 * 2 ** max(0, math.ceil(math.log2(far / 6)))
    low = np.floor((centre - far) / size).astype(int)
    high = np.ceil((centre + far) / size).astype(int)
    tiles, shades = [], []
    paper, tile = np.array(to_rgb(_PAPER)), np.array(to_rgb(_TILE))
    for i in range(low[0], high[0]):
        for k in range(low[2], high[2]):
            if (i + k) % 2:
                continue
            middle = np.array([i + 0.5, k + 0.5]) * size - centre[[0, 2]]
            # Few shades: a GIF has 256 colours.
            fade = np.ceil(8 * np.clip((far - np.hypot(*middle)) / (far - reach), 0, 1)) / 8
            if fade > 0:
                tiles.append([[i, k], [i + 1, k], [i + 1, k + 1], [i, k + 1]])
                shades.append(paper + fade * (tile - paper))
    square = np.array(tiles, dtype=np.float64) * size
    points = np.stack([square[..., 0], np.full(square.shape[:-1], floor), square[..., 1]], axis=-1)
    near = camera.view(points)[..., 2].min(-1) > 0.2
    screen, _ = camera.project(points[near])
    axes.add_collection(
        PolyCollection(list(screen), facecolors=np.array(shades)[near], edgecolors="none", zorder=0)
    )


class _Figure:
    """The artists of one pose: shadow and sticks, drawn far to near so that limbs hide each other."""

    def __init__(self, axes: Any, body: Body, camera: _Camera, floor: float, points_per_unit: float) -> None:
        from matplotlib.collections import LineCollection
        from matplotlib.colors import to_rgba

        self.camera, self.floor, self.per_unit = camera, floor, points_per_unit
        self.sticks = LineCollection([], capstyle="round", zorder=4)
        self.shadow = LineCollection([], capstyle="round", zorder=2, colors=_SHADOW)
        axes.add_collection(self.shadow)
        axes.add_collection(self.sticks)
        self.body = body
        self.ends = np.array([*range(1, len(body)), body.head])
        self.starts = np.array([*body.parents[1:], body.head])
        self.widths = np.append(body.widths[1:], HEAD_WIDTH)
        self.colours = np.array([to_rgba(COLOURS[body.sides[j]]) for j in self.ends])
        self.outline = np.array(to_rgba(_PAPER))
        self.artists = (self.shadow, self.sticks)

    def place(self, joints: np.ndarray) -> None:
        """Move to a pose (J, 3)."""
        joints = joints.astype(np.float64)
        # The head is a ball a little above the head joint, along the neck.
        head = joints[self.body.head]
        neck = head - joints[self.body.parents[self.body.head]]
        crown = head + 0.06 * neck / max(np.linalg.norm(neck), 1e-6)
        starts, ends = joints[self.starts], joints[self.ends]
        # Agg drops lines much shorter than a pixel, round caps and all.
        starts[-1] = crown - [0, 0.01, 0]
        ends[-1] = crown + [0, 0.01, 0]
        screen, scale = self.camera.project(np.stack([starts, ends], axis=1))
        scale = scale.mean(-1) * self.per_unit
        order = np.argsort(self.camera.view(0.5 * (starts + ends))[:, 2])[::-1]
        lines, widths, colours = [], [], []
        for i in order:
            lines += [screen[i], screen[i]]
            widths += [scale[i] * (self.widths[i] + _OUTLINE), scale[i] * self.widths[i]]
            colours += [self.outline, self.colours[i]]
        self.sticks.set_segments(lines)
        self.sticks.set_linewidth(widths)
        self.sticks.set_colors(colours)
        flat = np.stack([_on_floor(starts, self.floor), _on_floor(ends, self.floor)], axis=1)
        screen, scale = self.camera.project(flat)
        self.shadow.set_segments(list(screen))
        self.shadow.set_linewidth(scale.mean(-1) * self.per_unit * self.widths * 0.9)


def _blank_axes(figure: Any, box: tuple[float, float, float, float]) -> Any:
    """Axes over a box of the figure (fractions) whose units are halves of the box's height."""
    axes = figure.add_axes(box)
    width, height = figure.get_size_inches()
    aspect = box[2] * width / (box[3] * height)
    axes.set_xlim(-aspect, aspect)
    axes.set_ylim(-1, 1)
    axes.set_axis_off()
    return axes


def _figure(width: float, height: float, dpi: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    return figure


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …"))


def _frames(motion: Motion, size: int, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """RGB pictures (size, size, 3) uint8 of some frames, from one camera that sees the whole motion."""
    dpi = 100
    figure = _figure(size, size, dpi)
    axes = _blank_axes(figure, (0, 0, 1, 1))
    joints = motion.joints
    caption = _wrapped(motion.text or "", 46, 3)
    top = 0.93 - 0.1 * (caption.count("\n") + 1 if caption else 0)
    camera = _Camera.framing(_corners(joints), 1.0, -0.9, top)
    floor = _floor_of(joints)
    root = joints[:, 0].astype(np.float64)
    centre = _on_floor(0.5 * (root.min(0) + root.max(0)), floor)
    reach = float(np.linalg.norm(root - root.mean(0), axis=-1).max()) + 0.8
    _ground(axes, camera, centre, floor, reach, 2 * reach + 1.5)
    path, _ = camera.project(_on_floor(root, floor))
    axes.plot(*path.T, color=_PATH_AHEAD, linewidth=2, solid_capstyle="round", zorder=1)
    font = size / 480
    axes.text(
        0, 0.95, caption, fontsize=11.5 * font, color=_INK, ha="center", va="top", parse_math=False, zorder=6
    )
    (trail,) = axes.plot([], [], color=PATH_COLOUR, linewidth=2.5, solid_capstyle="round", zorder=3)
    clock = axes.text(0.95, -0.95, "", fontsize=9 * font, color=_FAINT_INK, ha="right", zorder=6)
    figure_of = _Figure(axes, motion.body, camera, floor, size / 2 * 72 / dpi)
    moving = (figure_of.shadow, trail, figure_of.sticks, clock)
    for artist in moving:
        artist.set_animated(True)
    canvas: Any = figure.canvas
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    for frame in frames:
        canvas.restore_region(still)
        trail.set_data(*path[: frame + 1].T)
        figure_of.place(joints[frame])
        clock.set_text(f"{frame / motion.fps:.1f} s")
        for artist in moving:
            axes.draw_artist(artist)
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _packed(picture: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _unpacked(colours: np.ndarray) -> np.ndarray:
    return np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], axis=-1)


def _palette(pictures: np.ndarray) -> np.ndarray:
    """The up to 256 commonest colours, (n, 3): all that fill an area, and most of the edges between."""
    colours, counts = np.unique(_packed(pictures), return_counts=True)
    return _unpacked(colours[np.argsort(-counts, kind="stable")[:256]])


def save_gif(motion: Motion, path: str | Path, *, size: int = 480) -> None:
    """An endlessly repeating animation, size x size pixels, in the motion's real time.

    A GIF counts time in hundredths of a second and browsers slow down anything faster than 50 fps:
    frame times are rounded so that the sum stays right, and above 50 fps frames are left out.
    """
    from PIL import Image

    stride = math.ceil(motion.fps / 50 - 1e-9)
    shown = range(0, len(motion), stride)
    ends = np.round(100 * np.minimum(np.arange(1, len(shown) + 1) * stride, len(motion)) / motion.fps)
    times = np.maximum(np.diff(ends, prepend=0), 2).astype(int) * 10
    rendered = list(_frames(motion, size, shown))
    palette = _palette(np.stack([rendered[i] for i in sorted({0, len(rendered) // 2, len(rendered) - 1})]))
    nearest = np.full(1 << 24, -1, dtype=np.int16)
    pictures = []
    for picture in rendered:
        colours = _packed(picture)
        unknown = np.unique(colours[nearest[colours] < 0])
        distance = np.square(_unpacked(unknown)[:, None] - palette).sum(-1)
        nearest[unknown] = distance.argmin(-1)
        indexed = Image.fromarray(nearest[colours].astype(np.uint8), mode="P")
        indexed.putpalette(palette.astype(np.uint8).tobytes())
        pictures.append(indexed)
    with replacing(path) as partial:
        pictures[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=times.tolist(),
            loop=0,
            optimize=False,
        )


def save_mp4(motion: Motion, path: str | Path, *, size: int = 640) -> None:
    """An H.264 film, size x size pixels (even), at the motion's frame rate. Needs imageio-ffmpeg."""
    import imageio

    if size % 2:
        raise ScaMoError(f"size: H.264 needs an even number of pixels, got {size}")
    with replacing(path) as partial:
        options: dict[str, Any] = {"codec": "libx264", "quality": 8, "macro_block_size": 2, "fps": motion.fps}
        with imageio.get_writer(partial, format="FFMPEG", mode="I", **options) as film:  # type: ignore[arg-type]
            writer: Any = film
            for picture in _frames(motion, size, range(len(motion))):
                writer.append_data(picture)


def _plan(axes: Any, motion: Motion, instants: Sequence[int]) -> None:
    """The way from above, +Z up, with a ring where it starts and a mark for each pose of the strip."""
    from matplotlib.collections import LineCollection

    # Seen from above with +Z up the screen, +X (the body's left at the start) points to the left.
    way = motion.joints[:, 0][:, [0, 2]].astype(np.float64) * [-1, 1]
    middle = 0.5 * (way.min(0) + way.max(0))
    reach = max(float(np.abs(way - middle).max()) * 1.25, 0.6)
    scale = 0.8 / reach
    way = (way - middle) * scale
    unit = 0.5 * 2 ** max(0, math.ceil(math.log2(reach / 1.5)))
    lines = []
    for axis in range(2):
        first, last = math.ceil((middle[axis] - reach) / unit), math.floor((middle[axis] + reach) / unit)
        for i in range(first, last + 1):
            at = (i * unit - middle[axis]) * scale
            lines.append([[at, -0.8], [at, 0.8]] if axis == 0 else [[-0.8, at], [0.8, at]])
    axes.add_collection(LineCollection(lines, colors=_TILE, linewidths=0.8, zorder=0))
    axes.plot(*way.T, color=PATH_COLOUR, linewidth=1.6, solid_capstyle="round", zorder=2)
    axes.plot(*way[list(instants)].T, "o", color=PATH_COLOUR, markersize=3.5, zorder=3)
    axes.plot(*way[0], "o", color=_PAPER, markeredgecolor=PATH_COLOUR, markersize=6, zorder=4)
    axes.text(0, -0.97, f"from above, grid {unit:g} m", fontsize=7.5, color=_FAINT_INK, ha="center")


def save_png(motion: Motion, path: str | Path, *, poses: int = 8, title: str | None = None) -> None:
    """One strip: `poses` poses over the time, then the way from above. title: instead of the caption."""
    grid_png([(motion.text or "" if title is None else title, motion)], path, poses=poses)


def grid_png(
    rows: Sequence[tuple[str, Motion]], path: str | Path, *, poses: int = 8, columns: int = 1, dpi: int = 140
) -> None:
    """One picture of several motions: for each (title, motion) a strip of poses and the way from above.

    The camera goes along with the body, so that all poses have the same size; the floor and the trail on it
    stay where they are. `columns` puts several strips side by side. Raises ScaMoError for no rows.
    """
    if not rows:
        raise ScaMoError("rows: there is no motion to draw")
    if poses < 1 or columns < 1:
        raise ScaMoError(f"poses and columns: expected at least 1, got {poses} and {columns}")
    lines = math.ceil(len(rows) / columns)
    panel, height, head = 105, 170, 30  # points: width of a pose, height of a strip, of its title
    strip = panel * poses + height
    figure = _figure(columns * strip * dpi / 72, lines * (height + head) * dpi / 72, dpi)
    total = lines * (height + head)
    for index, (title, motion) in enumerate(rows):
        line, column = divmod(index, columns)
        bottom = (total - (line + 1) * (height + head)) / total
        box_height, left = height / total, column / columns
        figure.text(
            left + 14 / (columns * strip),
            bottom + (height + 0.32 * head) / total,
            _wrapped(title, int(strip / 6), 1),
            fontsize=11,
            color=_INK,
            parse_math=False,
        )
        instants = np.round(np.linspace(0, len(motion) - 1, poses)).astype(int).tolist()
        joints = motion.joints
        floor = _floor_of(joints)
        root = joints[:, 0].astype(np.float64)
        local = joints - (joints[:, :1] * [1, 0, 1])
        camera = _Camera.framing(_corners(local[instants]), panel / height, -0.8, 0.95)
        resting = camera.target
        for place, frame in enumerate(instants):
            box = (
                left + place * panel / (columns * strip),
                bottom,
                panel / (columns * strip),
                box_height,
            )
            axes = _blank_axes(figure, box)
            here = _on_floor(root[frame], 0)
            camera.target = resting + here
            _ground(axes, camera, here + [0, floor, 0], floor, 0.5, 1.5)
            way, _ = camera.project(_on_floor(root, floor))
            axes.plot(*way.T, color=_PATH_AHEAD, linewidth=1.4, solid_capstyle="round", zorder=1)
            axes.plot(*way[: frame + 1].T, color=PATH_COLOUR, linewidth=1.8, solid_capstyle="round", zorder=3)
            _Figure(axes, motion.body, camera, floor, height / 2).place(joints[frame])
            axes.text(0, -0.97, f"{frame / motion.fps:.1f} s", fontsize=7.5, color=_FAINT_INK, ha="center")
        box = (left + poses * panel / (columns * strip), bottom, height / (columns * strip), box_height)
        _plan(_blank_axes(figure, box), motion, instants)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", facecolor=_PAPER)


def figure_script() -> str:
    """The JavaScript of the player that draws a body on a canvas, for other pages.

    It defines decode, readColours, fit and drawFigure, and expects `data` with `body_constants` in it and the
    player's CSS colours.
    """
    page = _VIEWER.read_text(encoding="utf-8")
    return page[page.index("// The figure,") : page.index("// The end of the figure.")]


def body_constants(motions: Sequence[Motion]) -> dict[str, Any]:
    """What `figure_script` needs to know of the body of the motions; ScaMoError if they have several."""
    counts = sorted({len(motion.body) for motion in motions})
    if len(counts) > 1:
        found = " and ".join(map(str, counts))
        raise ScaMoError(f"motions: bodies of {found} joints, expected one body in a page")
    body = motions[0].body
    return {
        "parents": list(body.parents),
        "sides": list(body.sides),
        "widths": body.widths.tolist(),
        "neck": [body.parents[body.head], body.head],
        "head": HEAD_WIDTH,
    }


def script_json(data: Any) -> str:
    """JSON for inside <script>, where only "<" is dangerous: a caption could hold "</script>"."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def embedded(motion: Motion, text: str) -> dict[str, Any]:
    """A motion for the viewer: 16-bit integers over the range of the coordinates, base64, little-endian."""
    joints = motion.joints.astype(np.float64)
    low = joints.min((0, 1))
    scale = max(float((joints.max((0, 1)) - low).max()), 1e-6) / 65535
    steps = np.round((joints - low) / scale).astype("<u2")
    return {
        "text": text,
        "fps": motion.fps,
        "frames": len(motion),
        "low": low.tolist(),
        "scale": scale,
        "joints": base64.b64encode(steps.tobytes()).decode("ascii"),
    }


def save_html(
    motions: Motion | Sequence[Motion],
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """A player in one file that needs no network: play, scrub, orbit, zoom; several motions in a list.

    About 35 KB for a motion of 10 s; joints are exact to 1/131070 of the motion's extent. titles: instead of
    the captions; title: of the page. Raises ScaMoError for no motion or another number of titles.
    """
    motions = [motions] if isinstance(motions, Motion) else list(motions)
    if not motions:
        raise ScaMoError(f"{path}: there is no motion to write")
    if titles is None:
        titles = [motion.text or "" for motion in motions]
    elif len(titles) != len(motions):
        raise ScaMoError(f"titles: expected {len(motions)}, one for each motion, got {len(titles)}")
    shown = [embedded(*pair) for pair in zip(motions, titles, strict=True)]
    data = body_constants(motions) | {"motions": shown}
    template = _VIEWER.read_text(encoding="utf-8")
    if title is None:
        title = (titles[0] or "motion") if len(motions) == 1 else f"{len(motions)} motions"
    page = template.replace("__TITLE__", escape(title)).replace("__DATA__", script_json(data))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
