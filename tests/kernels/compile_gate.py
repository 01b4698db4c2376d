"""Compile kernels for GPUs that are not there and report what ptxas made of them.

Run as a script, since the Triton interpreter must be off in the process: it reads a JSON list of cases from
stdin, {"kernel": module.function, "signature": {...}, "constants": {...}, "warps": w, "stages": s, "arch":
80, "registers": most of a thread or none}, and writes a JSON list of {"registers", "stack", "spills",
"loads", "wide_loads" (of 16 bytes), "loads_of_8_bytes", "tensor_cores", "shared" (bytes), "tensor_memory"
(columns), "triton" (its version)}.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_case(case: dict) -> dict[str, int | str]:
    module, function = case["kernel"].rsplit(".", 1)
    kernel = getattr(importlib.import_module(f"scamo_kernels.{module}"), function)
    names = kernel.arg_names
    constants = {
        (names.index(name),): tuple(value) if isinstance(value, list) else value
        for name, value in case["constants"].items()
    }
    signature = {name: case["signature"].get(name, "constexpr") for name in names}
    # As the launcher sees tensors of the allocator; integers are not specialised.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", case["arch"], 32),
        options={
            "num_warps": case["warps"],
            "num_stages": case["stages"],
            "maxnreg": case.get("registers"),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(binary))
        sass = tool("nvdisasm", "-c", str(binary))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", sass)),
        "loads_of_8_bytes": len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.64\b", sass)),
        "loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E", sass)),
        # Of sm_80, sm_90 and sm_100.
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
        "shared": compiled.metadata.shared,
        "tensor_memory": compiled.metadata.tmem_size,
        "triton": triton.__version__,
    }


def main() -> None:
    json.dump([compile_case(case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
