"""The package as other projects meet it: what importing it needs, and the name that it must not take."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scamo_kernels
from scamo_kernels import reference

ROOT = Path(__file__).resolve().parents[2]

# A stand-in for the `kernels` package of PyPI: every name exists and decorators give back what they decorate.
FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated=None, *args, **kwargs): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {})
"""


def python(environment, program: str, **changes: str) -> str:
    """What a fresh interpreter prints; a failure shows its traceback."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_folder_kernels_is_no_package():
    assert (ROOT / "kernels" / "scamo_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_package_of_pypi_is_not_shadowed(tmp_path, environment):
    """With the repository first on the path, transformers still finds PyPI's `kernels`, and T5 imports."""
    pytest.importorskip("transformers")
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    path = f"{ROOT}:{ROOT / 'kernels'}:{tmp_path}"
    program = (
        "from transformers.utils import is_kernels_available; assert is_kernels_available()\n"
        "from transformers import T5EncoderModel; import kernels, scamo_kernels\n"
        "print(T5EncoderModel.__name__, kernels.__file__)"
    )
    name, file = python(environment, program, PYTHONPATH=path).split()
    assert name == "T5EncoderModel"
    assert Path(file).parent == tmp_path / "kernels"


def test_importing_and_running_needs_no_triton(environment):
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, scamo_kernels\n"
        "cu, p = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)\n"
        "q = torch.ones(3, 1, 4)\n"
        "print(scamo_kernels.prefix_causal_attention(q, q, q, cu, p).sum().item())\n"
        "try: scamo_kernels.fsq_quantize(torch.zeros(1, 1), [5], impl='triton')\n"
        "except ValueError as error: print(error)"
    )
    total, message = python(environment, program).split("\n")
    assert float(total) == 12
    assert message == 'impl = "triton": the triton package is not installed; use impl="torch"'


def test_importing_does_not_import_triton_kernels_or_scamo(environment):
    program = (
        "import sys, torch; before = set(sys.modules); import scamo_kernels\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'scamo')"
        " or m.endswith('_triton')])"
    )
    assert python(environment, program) == "[]"


def test_triton_on_the_cpu_is_refused_without_the_interpreter(environment):
    pytest.importorskip("triton")
    program = (
        "import torch, scamo_kernels\n"
        "try: scamo_kernels.code_histogram(torch.zeros(1, dtype=torch.int32), 5, impl='triton')\n"
        "except ValueError as error: print(error)"
    )
    message = python(environment, program)
    assert message.startswith('impl = "triton": needs a CUDA tensor, not one on cpu (TRITON_INTERPRET=1')


def test_another_project_uses_it_in_five_lines(tmp_path, environment):
    """README.md's example with nothing but kernels/ on the path, where scamo cannot be imported."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (example,) = (block for block in blocks if "from scamo_kernels import" in block)
    assert len([line for line in example.splitlines() if line and "import" not in line.split()]) <= 5
    program = (
        f"import sys; sys.modules['scamo'] = None\n{example}"
        "from scamo_kernels import reference\n"
        "torch.testing.assert_close(out, reference.prefix_causal_attention(q, k, v, cu_seqlens, prefix))\n"
    )
    command = [sys.executable, "-c", program]
    variables = environment(PYTHONPATH=str(ROOT / "kernels"))
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", scamo_kernels.__all__)
def test_every_op_is_specified_and_documented(name):
    op, specification = getattr(scamo_kernels, name), getattr(reference, name)
    assert op.__doc__
    assert specification.__doc__
    parameters = inspect.signature(op).parameters
    assert parameters["impl"].default == "auto"
    assert parameters["impl"].kind is inspect.Parameter.KEYWORD_ONLY
    shared = [p for p in parameters if p not in ("impl", "max_seqlen")]
    assert list(inspect.signature(specification).parameters) == shared
