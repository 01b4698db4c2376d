"""The pages in headless Chromium, used as a person would."""

import io
import shutil

import numpy as np
import pytest

pytest.importorskip("viser")
pytest.importorskip("playwright", reason="needs playwright")

from PIL import Image

from scamo.motion.motion import SUFFIXES, Motion
from scamo.view.prompt import Generator, PromptPage
from scamo.view.server import serving, view_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    contexts = []

    def load(server):
        contexts.append(chromium.new_context(viewport={"width": 640, "height": 400}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(f"http://127.0.0.1:{server.get_port()}")
        return page

    yield load
    for context in contexts:
        context.close()


def pixels(page):
    """The scene without the controls, RGB."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return np.asarray(picture)[150:, :300].astype(int)


def blue(picture):
    """Pixels of the left limbs."""
    return (picture[..., 2] - picture[..., 0]) > 40


def test_view_plays_pauses_scrubs_and_downloads(open_page, make_motion, tmp_path):
    motions = [make_motion(frames=200, text="a person slides"), make_motion(frames=100)]
    with serving(lambda client: view_page(client, motions, ["slide", "other"]), port=0) as server:
        page = open_page(server)
        page.get_by_role("button", name="Pause").click()
        page.get_by_text("a person slides").wait_for()
        field = page.locator(".mantine-NumberInput-input").first  # of the time
        field.fill("1")
        field.press("Enter")
        page.wait_for_timeout(1500)
        first = pixels(page)
        assert blue(first).sum() > 50  # bodies are seen
        field.fill("9")
        field.press("Enter")
        page.wait_for_timeout(1500)
        assert (blue(first) != blue(pixels(page))).sum() > 50  # and elsewhere
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("() => document.body.innerText.includes('Pause')")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == "slide" + (".bvh" if ".bvh" in SUFFIXES else ".npz")
        download.value.save_as(tmp_path / download.value.suggested_filename)
        saved = Motion.load(tmp_path / download.value.suggested_filename)
        np.testing.assert_allclose(saved.joints, motions[0].joints, atol=1e-3)


def test_two_people_generate_at_the_same_time(open_page, model):
    generator = Generator(model)
    with serving(lambda client: PromptPage(client, generator), port=0) as server:
        one, two = open_page(server), open_page(server)
        for page, text in [(one, "a person walks"), (two, "a person jumps 👋")]:
            page.locator("textarea").first.fill(text)
            page.wait_for_timeout(300)
            page.get_by_role("button", name="Generate").click()
        for page, text, other in [(one, "walks", "jumps"), (two, "jumps", "walks")]:
            page.get_by_role("button", name="Download").wait_for()
            page.locator("label", has_text="seed 2").wait_for()
            assert page.get_by_text(f"a person {text}").count()
            assert not page.get_by_text(f"a person {other}").count()
        two.locator("textarea").first.fill("")
        two.wait_for_timeout(300)
        two.get_by_role("button", name="Generate").click()
        two.get_by_text("the prompt is empty").wait_for()
        assert not one.get_by_text("the prompt is empty").count()
        two.close()
        seed = one.locator(".mantine-NumberInput-input").nth(1)
        seed.fill("5")
        seed.press("Enter")
        one.wait_for_timeout(300)
        one.get_by_role("button", name="Generate").click()
        one.locator("label", has_text="seed 7").wait_for()
    generator.close()
