"""Motion tokenizers: features <-> discrete tokens. `load_tokenizer` opens any of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from scamo.tokenizers.autoencoder import MotionAutoencoder


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> MotionAutoencoder:
    """Read a tokenizer folder into the class that its config.json names, in evaluation mode.

    Raises ScaMoError naming the file when it is missing, damaged, of an unknown format, or does not fit.
    """
    from scamo.tokenizers.autoencoder import KINDS, read_tokenizer

    folder = Path(folder)
    description = read_tokenizer(folder)
    return KINDS[description["format"]].from_description(folder, description, device)
