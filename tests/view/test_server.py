"""The page of `scamo view` over real sockets."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("viser")

from scamo.errors import ScaMoError
from scamo.view.server import check_address, load_motions, serving, view, view_page


@pytest.fixture
def server(make_motion):
    motions = [make_motion(text="a person <b>walks</b>"), make_motion(frames=20, fps=10.0)]
    with serving(lambda client: view_page(client, motions, ["one", "two"]), port=0) as server:
        yield server


def ready(client):
    return client.until(lambda c: c.element("Download") and "/motion-1/title" in c.nodes)


def test_a_client_gets_bodies_and_controls(server, connect):
    client = ready(connect(server))
    assert {f"/motion-{i}/{part}" for i in (0, 1) for part in ("joints", "bones", "way")} <= set(client.nodes)
    assert client.element("one")["value"] is True
    assert client.element("Time (s)")["max"] == 2.0
    text = [e["content"] for e in client.elements.values() if "content" in e]
    assert any("a person &lt;b&gt;walks&lt;/b&gt;" in content for content in text)


def test_it_listens_on_this_machine_only(server):
    assert server.get_host() == "127.0.0.1"


def test_clients_do_not_move_one_another(server, connect):
    one, two = ready(connect(server)), ready(connect(server))
    one.set("Time (s)", 1.25)
    two.set("Time (s)", 0.5)
    for client in (one, two):
        client.until(lambda c: c.element("Play"))
    one.click("Play")
    one.until(lambda c: c.element("Pause"))
    one.until(lambda c: c.element("Time (s)")["value"] > 1.5)
    assert not two.receive(0.2)  # paused: nothing is sent
    assert two.element("Time (s)")["value"] == 0.5


def test_playing_moves_every_body_and_stops_at_the_end_without_loop(server, connect):
    client = ready(connect(server))
    client.set("Loop", False)
    client.until(lambda c: c.element("Play"))
    assert client.element("Time (s)")["value"] == 2.0
    client.click("Play")
    client.until(lambda c: c.element("Pause") and 0 < c.element("Time (s)")["value"] < 2)


def test_a_motion_is_hidden_and_downloaded(server, connect):
    client = ready(connect(server))
    client.set("two", False)
    client.set("File of", "two")
    client.set("Format", ".npz")
    client.click("Download")
    client.until(lambda c: getattr(c, "file", None))
    assert client.file == "two.npz"


def test_a_client_that_leaves_is_cleaned_up_and_noise_changes_nothing(server, connect):
    before = {t for t in threading.enumerate() if t.name.startswith("stage-")}
    noisy, broken, steady = (ready(connect(server)) for _ in range(3))
    noisy.socket.send(b"\xff\x00 no message")
    broken.socket.socket.close()
    with socket.create_connection(("127.0.0.1", server.get_port())) as raw:
        raw.sendall(b"GET /%00 HTTP/9\r\n" + os.urandom(64))
    end = time.monotonic() + 30
    while len(new := {t for t in threading.enumerate() if t.name.startswith("stage-")} - before) > 1:
        assert time.monotonic() < end, new
        steady.receive(0.05)
    ready(connect(server))
    steady.click("Pause")
    steady.until(lambda c: c.element("Play"))


def test_no_client_opens_the_page_to_the_internet(server, connect):
    client = ready(connect(server))
    client.send("ShareUrlRequest")
    client.click("Pause")
    client.until(lambda c: c.element("Play"))
    assert server._share_tunnel is None


def test_an_address_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ScaMoError, match=f"host 127.0.0.1, port {port}: cannot listen there"):
            check_address("127.0.0.1", port)
    with pytest.raises(ScaMoError, match="port = 65536: expected 0 to 65535"):
        check_address("127.0.0.1", 65536)
    with pytest.raises(ScaMoError, match="host no.such.host.invalid, port 8080: cannot listen there"):
        check_address("no.such.host.invalid", 8080)
    with pytest.raises(ScaMoError, match="host 203.0.113.7, port 8080: cannot listen there"):
        check_address("203.0.113.7", 8080)


def test_bad_files(tmp_path, make_motion):
    with pytest.raises(ScaMoError, match="name at least one"):
        view([])
    with pytest.raises(ScaMoError, match=r"gone\.npz: no such file"):
        view([tmp_path / "gone.npz"])
    with pytest.raises(ScaMoError, match=r"walk\.xyz.*suffix"):
        view([tmp_path / "walk.xyz"])
    joints = make_motion().joints
    joints[3, 5] = np.nan
    np.save(tmp_path / "nan.npy", joints)
    with pytest.raises(ScaMoError, match=r"nan\.npy: joints: frame 3, joint 5"):
        view([tmp_path / "nan.npy"])


def test_names_are_those_of_the_files_and_all_different(tmp_path, make_motion):
    make_motion().save(tmp_path / "walk.npz")
    assert load_motions([tmp_path / "walk.npz"])[1] == ["walk.npz"]
    assert load_motions([tmp_path / "walk.npz"] * 2)[1] == ["1. walk.npz", "2. walk.npz"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a process")
def test_ctrl_c_ends_it_with_status_0(tmp_path, make_motion):
    make_motion().save(tmp_path / "walk.npz")
    code = f"from scamo.view.server import view; view([{str(tmp_path / 'walk.npz')!r}], port=0)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        with contextlib.suppress(StopIteration):
            next(line for line in process.stdout if b"Ctrl-C" in line)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")


def test_without_viser_the_message_says_what_to_install():
    code = "import sys; sys.modules['viser'] = None\nimport scamo.view.server"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.stderr.splitlines()[-1].endswith("not installed: pip install 'scamo[view]'")
