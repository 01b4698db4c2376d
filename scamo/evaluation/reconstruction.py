"""Reconstruction FID: how far what a tokenizer makes of motions is from the motions, for an evaluator."""

from __future__ import annotations

from pathlib import Path

from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.items import draw_strict
from scamo.evaluation.metrics import frechet_distance
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.encode import decode_tokens, encode_motions, open_matching


def reconstruction_fid(
    tokenizer_folder: str | Path,
    dataset_folder: str | Path,
    evaluator_folder: str | Path,
    split: str = "val",
    *,
    device: str = "auto",
) -> float:
    """The `fid` of the reconstruction's row in `scamo evaluate --protocol strict`, of a tokenizer alone.

    Args:
        tokenizer_folder: the tokenizer; its tokens may have several indices.
        dataset_folder: the dataset.
        evaluator_folder: the evaluator whose points of every motion and of its reconstruction are compared.
        split: train, val or test.
        device: auto, cpu or cuda.

    Raises:
        ScaMoError: a folder that does not open; tokenizer, evaluator and dataset that do not go together; an
            unknown split or one with fewer than two motions; a motion shorter than the evaluator takes.
    """
    where = resolve_device(device)
    tokenizer = load_tokenizer(tokenizer_folder, where)
    judge = load_evaluator(evaluator_folder, where)
    data = open_matching(tokenizer, dataset_folder)
    judge.check_dataset(data)
    items = data.items(split)
    if len(items) < 2:
        raise ScaMoError(f"{data.folder}: {len(items)} items in the split {split}, a distance needs two")
    least = max(judge.min_frames, tokenizer.downsampling)
    short = items[data.item_lengths[items] < least]
    if len(short):
        raise ScaMoError(
            f"{data.folder}: item {data.item_name(int(short[0]))} has {data.item_lengths[short[0]]} frames, "
            f"evaluator {judge.name} and the tokenizer need {least}"
        )
    real = draw_strict(data, items, 0).features(data)
    rebuilt = decode_tokens(tokenizer, encode_motions(tokenizer, real))
    return frechet_distance(judge.embed_motions(real), judge.embed_motions(rebuilt))
