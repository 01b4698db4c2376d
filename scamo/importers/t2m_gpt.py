"""T2M-GPT's motion tokenizer: VQ with 512 codes of width 512 in the released checkpoints."""

from __future__ import annotations

from pathlib import Path

from scamo.importers.autoencoder import build, infer_config, read_statistics
from scamo.importers.checkpoint import check_free, provenance, read_checkpoint, tensors_under


def import_t2m_gpt_tokenizer(
    checkpoint: str | Path,
    out: str | Path,
    *,
    mean: str | Path | None,
    std: str | Path | None,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer folder from a T2M-GPT checkpoint (`net_last.pth`); whole or not at all.

    Args:
        checkpoint: the file; its weights, under "net", are converted to float32.
        out: the tokenizer folder.
        mean, std: .npy files (263,), which the checkpoint does not hold: those of its training are in
            checkpoints/t2m/VQVAEV3_CB1024_CMT_H1024_NRES3/meta, not the dataset's Mean.npy and Std.npy.
        overwrite: replace an existing tokenizer folder.

    Returns:
        `out`.

    Raises:
        ScaMoError: a file is missing or not what it should be, a tensor is missing, unknown, misshapen or not
            finite, or `out` exists.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_free(out, overwrite)
    tensors = tensors_under(read_checkpoint(checkpoint), "net", checkpoint)
    config = infer_config(tensors, checkpoint, "vq")
    statistics = read_statistics(mean, std, config.feature_dim)
    tokenizer = build(tensors, config, statistics, checkpoint)
    source = provenance("t2m_gpt", checkpoint, *statistics.files)
    tokenizer.save(out, provenance=source, overwrite=overwrite)
    return out
