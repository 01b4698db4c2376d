"""Fixtures that every package's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # With several processes a file's tests share one, and its fixtures. Those of the kernels share none.
        if item.path.parent.name != "kernels":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference vectors and real motion beside the repository; not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip(f"no reference data: {folder} does not exist")
    return folder
