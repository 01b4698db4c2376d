"""The page that generates, over real sockets and with a real, small model."""

import threading

import pytest

pytest.importorskip("viser")

from scamo.errors import ScaMoError
from scamo.view.prompt import MAX_CHARACTERS, MAX_VARIANTS, Generator, PromptPage, Request
from scamo.view.server import demo_page, serving


@pytest.fixture
def generator(model):
    generator = Generator(model)
    yield generator
    generator.close()


@pytest.fixture
def server(generator):
    with serving(lambda client: PromptPage(client, generator), port=0) as server:
        yield server


def ready(client):
    return client.until(lambda c: c.element("Generate") and c.element("Speed"))


def titles(client):
    return {props["text"] for name, props in client.nodes.items() if name.endswith("/title")}


def test_two_clients_each_get_their_own_variants(server, connect, generator):
    one, two = ready(connect(server)), ready(connect(server))
    for client, text, variants, seed in [(one, "a person walks", 2, 7), (two, "jumps 👋 跳", 3, 40)]:
        client.set("Text", text)
        client.set("Variants", variants)
        client.set("Seed", seed)
        client.click("Generate")
    one.until(lambda c: c.element("Download"))
    two.until(lambda c: c.element("Download"))
    assert titles(one) == {"seed 7", "seed 8"}
    assert titles(two) == {"seed 40", "seed 41", "seed 42"}
    longest = max(
        motion.duration for motion in generator.generate(Request("a person walks", 2, 7, 1, 1, 2.0))
    )
    assert one.element("Time (s)")["max"] == pytest.approx(longest)
    one.set("Variants", 1)
    one.click("Generate")
    one.until(lambda c: titles(c) == {"seed 7"})
    assert not one.element("Generate")["disabled"]


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Text", "", "the prompt is empty"),
        ("Text", " \n ", "the prompt is empty"),
        ("Text", "w" * (MAX_CHARACTERS + 1), "the prompt has 10001 characters"),
        ("Variants", 10**6, "variants = 1000000: expected 1 to 8"),
        ("Seed", -1, "seed = -1: expected 0 to"),
        ("Temperature", 0.0, "temperature = 0.0"),
        ("Top-p", 7.0, "top_p = 7.0"),
        ("Seconds at most", 1e9, "max_seconds = 1000000000.0"),
    ],
)
def test_what_cannot_be_generated_is_said_and_the_page_goes_on(server, connect, label, value, message):
    client = ready(connect(server))
    before = client.element(label)["value"]
    client.set(label, value)
    client.click("Generate")
    client.until(lambda c: c.told(message))
    client.set(label, before)
    client.click("Generate")
    client.until(lambda c: c.element("Download"))


def test_a_long_prompt_is_cut_and_says_so(server, connect):
    client = ready(connect(server))
    client.set("Text", "walks " * (MAX_CHARACTERS // 6))
    client.click("Generate")
    client.until(lambda c: c.element("Download") and c.told("the first 16 word pieces"))


def test_who_waits_is_told_and_who_leaves_is_forgotten(server, connect, generator):
    stays, leaves = ready(connect(server)), ready(connect(server))
    go = threading.Event()
    generator.submit(lambda: go.wait(60))
    leaves.click("Generate")
    leaves.until(lambda c: c.told("1 before you"))
    stays.click("Generate")
    stays.until(lambda c: c.told("2 before you"))
    leaves.socket.socket.close()
    stays.click("Generate")  # a second click while the first one waits
    go.set()
    stays.until(lambda c: c.element("Download"))
    assert [title for title, _ in stays.notices.values()] == ["Generating"]


def test_a_client_that_goes_away_while_its_motion_is_made(server, connect):
    gone = ready(connect(server))
    gone.set("Variants", MAX_VARIANTS)
    gone.click("Generate")
    gone.until(lambda c: c.told(f"{MAX_VARIANTS} ×"))
    gone.socket.socket.close()
    other = ready(connect(server))
    other.click("Generate")
    other.until(lambda c: c.element("Download"))


def test_jobs_run_one_at_a_time_in_their_order(generator):
    running, order = threading.Semaphore(1), []

    def job(number):
        assert running.acquire(blocking=False)
        order.append(number)
        running.release()

    futures = [generator.submit(lambda number=number: job(number))[0] for number in range(20)]
    for future in futures:
        future.result(60)
    assert order == list(range(20))


def test_a_page_without_a_model(tmp_path):
    with pytest.raises(ScaMoError, match=str(tmp_path)):
        demo_page(tmp_path, device="cpu", port=0)
