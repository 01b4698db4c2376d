"""Motion tokenizers: features <-> discrete tokens. `load_tokenizer` opens any of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from scamo.tokenizers.autoencoder import FSQAutoencoder


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> FSQAutoencoder:
    """Read a tokenizer folder into the class that its config.json names, in evaluation mode.

    Raises ScaMoError naming the file when it is missing, damaged, of an unknown format, or does not fit.
    """
    from scamo.tokenizers import autoencoder

    known = {autoencoder.FORMAT: autoencoder.FSQAutoencoder}
    description = autoencoder.read_description(Path(folder), known)
    return known[description["format"]].load(folder, device)
