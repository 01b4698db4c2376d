"""Running one op with any implementation, on the CPU, under the Triton interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


def _load(name: str) -> Any:
    # The tests are no packages, so a sibling is loaded by its path.
    spec = importlib.util.spec_from_file_location(f"kernel_tests_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess that imports this checkout's scamo_kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(KERNELS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment | changes


class Interpreter:
    """A process in which Triton kernels run in the interpreter; it answers one request at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "evaluate.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        )

    def __call__(self, function: str, *arguments: Any) -> Any:
        pickle.dump((function, arguments), self.process.stdin)
        self.process.stdin.flush()
        good, answer = pickle.load(self.process.stdout)
        if not good:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def interpreter():
    pytest.importorskip("triton")
    process = Interpreter()
    yield process
    process.close()


@pytest.fixture(scope="session")
def environment():
    """child_environment(**changes) -> the environment of a subprocess."""
    return child_environment


@pytest.fixture
def run(request):
    """run(impl, op, *arguments, differentiate=(), cotangent=None, **keywords) -> (outputs, gradients).

    impl "interpreter" is impl="triton" in the interpreter; the others run in this process, where the tensors
    are.
    """
    evaluate = _load("evaluate").evaluate

    def call(impl, op, *arguments, differentiate=(), cotangent=None, **keywords):
        if impl != "interpreter":
            return evaluate(op, arguments, {**keywords, "impl": impl}, differentiate, cotangent)
        interpreter = request.getfixturevalue("interpreter")
        return interpreter(
            "evaluate", op, arguments, {**keywords, "impl": "triton"}, differentiate, cotangent
        )

    return call
