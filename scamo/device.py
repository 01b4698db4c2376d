"""The word of a `--device` option -> a torch device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scamo.errors import ScaMoError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """ "auto" -> CUDA where there is a GPU, else the CPU; otherwise the device that torch calls `name`.

    Raises ScaMoError when the name means nothing or the device is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ScaMoError(f"device {name!r}: expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ScaMoError(f"device {name!r}: expected auto, cpu or cuda")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ScaMoError(f"device {name!r}: torch {torch.__version__} sees no such GPU")
    return device
