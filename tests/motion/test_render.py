import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import imageio.v3 as iio
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from scamo.errors import ScaMoError
from scamo.motion import render
from scamo.motion.motion import Motion
from scamo.motion.skeleton import PARENTS, forward_kinematics, mirror_joints

CAPTION = 'walks </script><script>document.title="hacked"</script> & "costs" $5 <b>'


def walk(frames=20, length=1.5, fps=20.0, text: str | None = "a person walks"):
    """Straight ahead, the left arm up, the right one down."""
    turns = np.zeros((frames, 22, 4))
    turns[..., 0] = 1
    turns[:, 16] = [np.cos(0.6), 0, 0, np.sin(0.6)]
    turns[:, 17] = [np.cos(0.6), 0, 0, np.sin(0.6)]
    swing = 0.25 * np.sin(0.5 * np.arange(frames))
    turns[:, 1, 0], turns[:, 1, 1] = np.cos(swing), np.sin(swing)
    turns[:, 2, 0], turns[:, 2, 1] = np.cos(swing), -np.sin(swing)
    root = np.linspace([0, 0.96, 0], [0, 0.96, length], frames)
    return Motion(forward_kinematics(turns, root=root), fps=fps, text=text)


def share(picture, colour, tolerance=6):
    wanted = np.round(255 * np.array(to_rgb(colour)))
    return float((np.abs(picture[..., :3].astype(float) - wanted).max(-1) <= tolerance).mean())


def centre_of(picture, colour):
    wanted = np.round(255 * np.array(to_rgb(colour)))
    rows, columns = np.nonzero(np.abs(picture[..., :3].astype(float) - wanted).max(-1) <= 6)
    return rows.mean(), columns.mean()


def test_camera_sees_every_joint_of_any_motion():
    rng = np.random.default_rng(0)
    for length in (0, 1, 30):
        joints = walk(length=length).joints + rng.normal(size=3) * 5
        corners = render._corners(joints)
        camera = render._Camera.framing(corners, 1.0, -0.9, 0.7)
        screen, _ = camera.project(corners)
        assert np.abs(screen[:, 0]).max() < 0.97
        assert screen[:, 1].max() < 0.75
        assert screen[:, 1].min() > -0.95
        assert max(np.abs(screen[:, 0]).max(), (np.ptp(screen[:, 1])) / 1.6) > 0.6, "and fills the picture"


def test_camera_is_a_pinhole():
    camera = render._Camera(np.array([0.3, 1.0, -0.2]), 4.0)
    np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(camera.axes) == pytest.approx(1)
    np.testing.assert_allclose(camera.project(camera.target)[0], 0, atol=1e-12)
    eye = camera.target + 4.0 * camera.axes[2]
    # Points on one ray from the eye fall on one another, and the nearer one is larger.
    ray = np.array([-0.4, -0.3, -2.0]) + 0.1 * camera.axes[0]
    (near, far), scales = camera.project(np.stack([eye + ray, eye + 2 * ray]))
    np.testing.assert_allclose(near, far, atol=1e-12)
    assert scales[0] == pytest.approx(2 * scales[1])
    up, _ = camera.project(camera.target + np.array([0, 1.0, 0]))
    assert up[0] == pytest.approx(0, abs=1e-12)
    assert up[1] > 0


def test_gif_has_the_frames_the_time_and_both_sides(tmp_path):
    motion = walk(frames=30)
    motion.save(tmp_path / "m.gif")
    with Image.open(tmp_path / "m.gif") as gif:
        assert gif.size == (480, 480)
        assert gif.n_frames == 30
        assert gif.info["loop"] == 0
        times, pictures = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            times.append(gif.info["duration"])
            pictures.append(np.array(gif.convert("RGB")))
    assert times == [50] * 30
    for side in ("left", "right"):
        for picture in (pictures[0], pictures[-1]):
            assert share(picture, render.COLOURS[side], 0) > 0.002
    # It walks towards +Z, which comes down the screen and to the left.
    (row0, column0), (row1, column1) = (centre_of(pictures[i], render.COLOURS["middle"]) for i in (0, -1))
    assert column1 < column0 - 50
    assert row1 > row0 + 10
    # Floor and caption stand still.
    assert (pictures[0][:40] == pictures[-1][:40]).all()
    assert share(pictures[0][:60], render._INK, 40) > 0.002


@pytest.mark.parametrize(("fps", "frames"), [(30, 31), (12.5, 9), (120, 48)])
def test_gif_lasts_as_long_as_the_motion(tmp_path, fps, frames):
    motion = walk(frames=frames, fps=fps)
    render.save_gif(motion, tmp_path / "m.gif", size=96)
    with Image.open(tmp_path / "m.gif") as gif:
        times = []
        for i in range(gif.n_frames):
            gif.seek(i)
            times.append(gif.info["duration"])
    assert min(times) >= 20
    assert sum(times) == pytest.approx(1000 * motion.duration, abs=10)


def test_mp4_has_the_frames_and_the_rate(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    motion = walk(frames=25, fps=25)
    render.save_mp4(motion, tmp_path / "m.mp4", size=160)
    about = iio.immeta(tmp_path / "m.mp4", plugin="FFMPEG")
    assert about["fps"] == pytest.approx(25)
    assert about["size"] == (160, 160)
    assert about["codec"] == "h264"
    frames = iio.imread(tmp_path / "m.mp4", plugin="FFMPEG")
    assert len(frames) == 25
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1
    with pytest.raises(ScaMoError, match="size: H.264 needs an even number of pixels, got 161"):
        render.save_mp4(motion, tmp_path / "odd.mp4", size=161)
    assert [p.name for p in tmp_path.iterdir()] == ["m.mp4"]


def test_strip_shows_the_poses_side_by_side_and_the_way(tmp_path):
    motion = walk(frames=40)
    render.save_png(motion, tmp_path / "m.png", poses=5)
    with Image.open(tmp_path / "m.png") as png:
        picture = np.array(png.convert("RGB"))
    panel = round(105 * 140 / 72)
    assert abs(picture.shape[1] - (5 * 105 + 170) * 140 / 72) <= 1
    for i in range(5):
        pose = picture[:, i * panel : (i + 1) * panel]
        assert share(pose, render.COLOURS["left"]) > 0.01
        assert share(pose, render.COLOURS["right"]) > 0.01
        # The camera goes along: every pose is in the middle of its panel.
        _, column = centre_of(pose, render.COLOURS["middle"])
        assert abs(column - panel / 2) < 0.15 * panel
    way = picture[:, 5 * panel :]
    assert share(way, render.COLOURS["left"]) == 0
    assert share(way, render.PATH_COLOUR) > 0.002


def test_the_way_from_above_has_the_left_on_the_left(tmp_path):
    motion = walk(frames=20, length=1.0)
    motion.joints[:, :, 0] += np.linspace(0, 2, 20)[:, None]  # drifts to +X, its left
    columns = []
    for i, joints in enumerate([motion.joints, mirror_joints(motion.joints)]):
        render.save_png(Motion(joints), tmp_path / f"{i}.png", poses=2)
        with Image.open(tmp_path / f"{i}.png") as png:
            picture = np.array(png.convert("RGB"))[:, round(2 * 105 * 140 / 72) :]
        high = np.nonzero(np.abs(picture - 255 * np.array(to_rgb(render.PATH_COLOUR))).max(-1) < 6)
        columns.append(high[1][high[0].argmin()] / picture.shape[1])
    assert columns[0] < 0.4 < 0.6 < columns[1], "the end of the way, at the top"


def test_grid_holds_a_row_for_each_motion(tmp_path):
    rows = [(f"row {i} $x^2$ & <b>", walk(frames=6 + i)) for i in range(3)]
    render.grid_png(rows, tmp_path / "grid.png", poses=3, dpi=70)
    render.grid_png(rows, tmp_path / "columns.png", poses=3, columns=2, dpi=70)
    with Image.open(tmp_path / "grid.png") as one, Image.open(tmp_path / "columns.png") as two:
        assert abs(one.size[1] - 3 * 200 * 70 / 72) <= 1
        assert abs(two.size[0] - 2 * one.size[0]) <= 2
        assert abs(two.size[1] - 2 * 200 * 70 / 72) <= 1
        picture = np.array(one.convert("RGB"))
    height = picture.shape[0] // 3
    for i in range(3):
        assert share(picture[i * height : (i + 1) * height], render.COLOURS["left"]) > 0.01
    with pytest.raises(ScaMoError, match="no motion to draw"):
        render.grid_png([], tmp_path / "none.png")
    with pytest.raises(ScaMoError, match="expected at least 1, got 0 and 1"):
        render.grid_png(rows, tmp_path / "none.png", poses=0)
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".html"])
def test_one_frame_far_away_without_caption(tmp_path, suffix):
    motion = walk(frames=1, text=None)
    motion.joints += np.float32([100, -3, 40])
    motion.save(tmp_path / f"m{suffix}")
    assert (tmp_path / f"m{suffix}").stat().st_size > 1000


class Page(HTMLParser):
    """The scripts of a page and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self.title, self._inside = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        if self._inside == "title":
            self.title += data


def embedded_joints(motion):
    steps = np.frombuffer(base64.b64decode(motion["joints"]), dtype="<u2").astype(np.float64)
    return steps.reshape(motion["frames"], 22, 3) * motion["scale"] + motion["low"]


def test_html_is_one_file_with_the_motions_inside(tmp_path):
    motions = [walk(frames=196, length=6, fps=30, text=CAPTION), walk(frames=5, text=None)]
    render.save_html(motions, tmp_path / "m.html", title='two & "more" <i>')
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.scripts) == 2, "a caption must not open a script of its own"
    assert unescape(page.title) == 'two & "more" <i>'
    about, source = page.scripts[0]
    assert about == {"id": "data", "type": "application/json"}
    data = json.loads(source)
    assert data["parents"] == list(PARENTS)
    assert [data["sides"][j] for j in (0, 16, 17)] == ["middle", "left", "right"]
    assert [m["text"] for m in data["motions"]] == [CAPTION, ""]
    assert [m["fps"] for m in data["motions"]] == [30, 20]
    for motion, stored in zip(motions, data["motions"], strict=True):
        extent = np.ptp(motion.joints.reshape(-1, 3), axis=0).max()
        np.testing.assert_allclose(
            embedded_joints(stored), motion.joints, rtol=0, atol=extent / 131070 + 1e-6
        )
    assert len(text) - len(source) < 40_000
    assert len(data["motions"][0]["joints"]) < 36_000


def test_html_titles_replace_captions(tmp_path):
    render.save_html([walk(), walk()], tmp_path / "m.html", titles=["first", "second"])
    page = Page((tmp_path / "m.html").read_text(encoding="utf-8"))
    assert [m["text"] for m in json.loads(page.scripts[0][1])["motions"]] == ["first", "second"]
    assert page.title == "2 motions"
    with pytest.raises(ScaMoError, match="titles: expected 2, one for each motion, got 1"):
        render.save_html([walk(), walk()], tmp_path / "n.html", titles=["first"])
    with pytest.raises(ScaMoError, match="no motion to write"):
        render.save_html([], tmp_path / "n.html")
    assert not (tmp_path / "n.html").exists()


def test_html_script_is_valid(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    walk().save(tmp_path / "m.html")
    script = tmp_path / "script.js"
    script.write_text(Page((tmp_path / "m.html").read_text(encoding="utf-8")).scripts[1][1])
    subprocess.run([node, "--check", str(script)], check=True)


def browse(tmp_path, page, fragment, *options):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,640", "--virtual-time-budget=3000"),
        *options,
        f"{page.as_uri()}#{fragment}",
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=True, text=True).stdout


def test_html_opens_at_a_frame_in_a_browser(tmp_path):
    page = tmp_path / "m.html"
    render.save_html([walk(text=CAPTION), walk(frames=31, text="the second")], page)
    dom = browse(tmp_path, page, "motion=2&frame=12", "--dump-dom")
    assert re.search(r"<h1[^>]*>the second</h1>", dom)
    assert 'data-frame="12"' in dom
    assert "0.60 / 1.50 s" in dom
    assert "<title>2 motions</title>" in dom, "no caption ran as a script"


PROBE = """<script>
const told = [];
const key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const tell = (what) => told.push(what + " " + [motions.indexOf(motion), frame, playing, follow].join(" "));
seek(0); tell("start");
last = 9; clock = 0; tick(0); tell("stamp before the press");
last = 0; clock = 0; tick(1240); tell("after 1.24 s");
key(" "); tell("space");
key("ArrowRight"); tell("right");
key("ArrowLeft"); key("ArrowLeft"); tell("left left");
key("End"); tell("end");
key("n"); tell("n");
key("f"); tell("f");
key("Home"); key("ArrowLeft"); tell("home left");
$("scrub").value = 7; $("scrub").oninput(); tell("scrub");
const turn = azimuth;
const pointer = (type, x) => canvas.dispatchEvent(
  new PointerEvent(type, { pointerId: 1, clientX: x, clientY: 9, bubbles: true }));
canvas.setPointerCapture = () => {};
pointer("pointerdown", 0); pointer("pointermove", 100);
pointer("pointerup", 100); pointer("pointermove", 500);
told.push("turned " + (turn - azimuth).toFixed(2));
canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -200, cancelable: true }));
told.push("zoom " + (zoom > 1));
key("r");
told.push("reset " + (azimuth === turn && zoom === 1));
$("caption").textContent = told.join(" | ");
</script></body>"""


def test_html_answers_to_clock_keys_and_pointer(tmp_path):
    page = tmp_path / "m.html"
    render.save_html([walk(frames=200, text=CAPTION), walk(frames=31)], page)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    dom = browse(tmp_path, page, "motion=1", "--dump-dom")
    told = re.search(r"<h1[^>]*>(.*?)</h1>", dom)
    assert told is not None
    assert told[1].split(" | ") == [
        "start 0 0 true false",
        "stamp before the press 0 0 true false",
        "after 1.24 s 0 24 true false",
        "space 0 24 false false",
        "right 0 25 false false",
        "left left 0 23 false false",
        "end 0 199 false false",
        "n 1 0 false false",
        "f 1 0 false true",
        "home left 1 0 false true",
        "scrub 1 7 false true",
        "turned 0.80",
        "zoom true",
        "reset true",
    ]
    assert ">Play</button>" in dom


def test_html_draws_the_body_in_a_browser(tmp_path):
    page = tmp_path / "m.html"
    walk().save(page)
    browse(tmp_path, page, "frame=3", f"--screenshot={tmp_path / 'shot.png'}")
    with Image.open(tmp_path / "shot.png") as shot:
        picture = np.array(shot.convert("RGB"))[60:520]
    for side in ("left", "right", "middle"):
        assert share(picture, render.COLOURS[side]) > 0.001
    assert share(picture, render._TILE, 4) > 0.02
    # The camera looks from the front and the body's left: its left side is on the right.
    left, right = (centre_of(picture, render.COLOURS[side])[1] for side in ("left", "right"))
    assert left > right


def test_motions_of_one_body_share_a_page(tmp_path):
    other = Motion(np.random.default_rng(0).normal(size=(3, 21, 3)), fps=12.5)
    with pytest.raises(ScaMoError, match="bodies of 21 and 22 joints, expected one body"):
        render.save_html([walk(), other], tmp_path / "m.html")
    assert not list(tmp_path.iterdir())
    render.grid_png([("a", walk()), ("b", other)], tmp_path / "m.png", poses=2)
    assert (tmp_path / "m.png").stat().st_size > 1000
