"""What the doctor says of this machine is true, and of others what they would need."""

import http.server
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from scamo import doctor
from scamo.doctor import GIB, examine, judge, judge_gpu, judge_interpreter, reachable, report


def by_name(**options):
    return {line.name: line for line in examine(**options)}


def test_it_says_what_this_machine_has(tmp_path):
    found = by_name(folder=tmp_path)
    assert found["torch"].found.startswith(torch.__version__)
    assert found["numpy"].state == "ok"
    assert re.match(rf"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores", found["cpu"].found)
    assert str(tmp_path) in found["disk"].found
    assert found["generate, evaluate"].state == "ok"
    assert (found["train (ZeRO-3)"].state == "ok") == (sys.platform == "linux")
    if not torch.cuda.is_available():
        assert found["cuda"].state != "ok"
        assert "cuda:0" not in found


def test_every_fault_comes_with_advice():
    lines = examine()
    assert len({line.name for line in lines}) == len(lines)
    assert all(line.advice for line in lines if line.state != "ok")


def test_every_requirement_is_compared_with_what_is_installed():
    names = {
        re.match(r"[\w-]+", text)[0] for text in importlib.metadata.requires("scamo") if "extra" not in text
    }
    found = by_name()
    assert {"torch", "numpy", "transformers"} <= names
    for name in names:
        assert found[name].found.split(",")[0] == importlib.metadata.version(name)


def test_text_and_json_hold_the_same_lines(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = report().splitlines()
    values = json.loads(report(as_json=True))
    assert [set(value) for value in values] == [{"name", "state", "found", "advice"}] * len(lines)
    for line, value in zip(lines, values, strict=True):
        assert line.startswith(value["state"])
        assert value["name"] in line
        assert value["advice"] in line
    assert sum("HF_HUB_OFFLINE is set" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("version", "admitted", "extra", "state", "words"),
    [
        ("2.11.0", ">=2.11,<2.14", "", "ok", "2.11.0"),
        ("2.13.0+cu130", ">=2.11,<2.14", "", "ok", "2.13.0+cu130"),
        ("2.10.1", ">=2.11,<2.14", "", "problem", "2.10.1, admitted is >=2.11,<2.14"),
        ("2.14.0", ">=2.11,<2.14", "", "problem", "2.14.0"),
        (None, ">=2.11,<2.14", "", "missing", "needed"),
        (None, ">=2.7", "flash", "missing", "optional"),
    ],
)
def test_versions(version, admitted, extra, state, words):
    line = judge("thing", version, admitted, extra)
    assert line.state == state
    assert words in line.found
    wanted = "" if state == "ok" else f"pip install '{'scamo[flash]' if extra else 'thing' + admitted}'"
    assert line.advice == wanted


@pytest.mark.parametrize(
    ("triton", "numpy", "state"),
    [
        ("3.6.0", "2.4.0", "problem"),
        ("3.6.0", "2.3.5", "ok"),
        ("3.7.1", "2.4.6", "ok"),
    ],
)
def test_the_interpreter_and_numpy(triton, numpy, state):
    assert judge_interpreter(triton, numpy).state == state


@pytest.mark.parametrize(
    ("capability", "bf16", "built_for", "state", "words"),
    [
        ((9, 0), True, ["sm_80", "sm_90", "compute_90"], "ok", ""),
        ((8, 6), True, ["sm_80", "sm_90"], "ok", ""),
        ((9, 0), True, ["sm_90a"], "ok", ""),
        ((10, 0), True, ["sm_80", "sm_90"], "problem", "sm_80, sm_90 only"),
        ((10, 0), True, ["sm_80", "compute_90"], "ok", ""),
        ((8, 0), True, ["sm_86"], "problem", "another build"),
        ((12, 0), True, ["sm_90", "sm_120"], "ok", ""),
        ((7, 5), False, ["sm_75"], "problem", "fp32"),
    ],
)
def test_gpus(capability, bf16, built_for, state, words):
    line = judge_gpu(1, "Card", capability, 80 * GIB, bf16, built_for)
    assert (line.name, line.state) == ("cuda:1", state)
    assert f"sm_{capability[0]}{capability[1]}, 80 GiB" in line.found
    assert words in line.advice


@pytest.mark.gpu
def test_the_gpus_of_this_machine():
    found = by_name()
    for index in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(index) in found[f"cuda:{index}"].found


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "FREE_DISK", shutil.disk_usage(tmp_path).total + 1)
    assert by_name(folder=tmp_path / "not" / "yet" / "there")["disk"].state == "problem"


def test_a_server_that_answers_and_one_that_does_not(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # 501 to a HEAD request: an answer all the same.
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert reachable(f"http://127.0.0.1:{server.server_port}").state == "ok"
    server.shutdown()
    server.server_close()
    assert reachable(f"http://127.0.0.1:{server.server_port}").state == "problem"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        line = reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
    assert line.state == "problem"
    assert "HF_HUB_OFFLINE" in line.advice


def test_the_network_is_left_alone_unless_asked():
    """In a process that may open no socket; only the question about the hub fails, and as a line."""
    program = """
import socket
def refuse(*a, **k):
    raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from scamo.doctor import examine
print({line.name: line.state for line in examine()}["hub"])
print({line.name: line.found for line in examine(hub=True)}["hub"])
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and k != "HF_ENDPOINT"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    quiet, asked = done.stdout.splitlines()
    assert quiet == "ok"
    assert "no network here" in asked
