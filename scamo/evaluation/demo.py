"""`scamo demo`: motions for unseen sentences, drawn, with the nearest training window beside each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from scamo.data.dataset import MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.nearest import nearest_windows
from scamo.evaluation.text_following import Prompt, follows, load_prompts
from scamo.generation.api import ScaMo
from scamo.motion.render import grid_png, save_html


def demo(
    run: str | Path,
    out: str | Path,
    *,
    dataset: str | Path | None = None,
    split: str = "test",
    count: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Generate `count` motions and write OUT/motions.html, OUT/motions.png and OUT/motions.json.

    Args:
        run: a training run (whose own train split is searched for the nearest window) or an exported model.
        out: folder for the files; made when missing.
        dataset: take every k-th item of `split` and its first caption; the held-out wordings without.
        split: part of `dataset`.
        count: number of sentences.
        seed, temperature: of the sampling.
        device: auto, cpu or cuda.

    Returns:
        One dict per motion: text, frames; for the held-out wordings `exact`, whether the measure of
        text-following finds everything right; and, where training clips are at hand, the nearest one with its
        distance in mm and the same distance for the real motion of that sentence.

    Raises:
        ScaMoError: no model, dataset or sentences.
    """
    if count < 1:
        raise ScaMoError(f"count = {count}: expected at least one sentence")
    model = ScaMo.load(run, device=device)
    real: list[np.ndarray] = []
    prompts: list[Prompt] = []
    if dataset is not None:
        source = MotionDataset.open(dataset)
        items = source.items(split)
        if not len(items):
            raise ScaMoError(f"{dataset}: the {split} split has no items")
        chosen = items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
        texts = [source.caption(int(source.captions_of(int(item))[0])) for item in chosen]
        real = [np.asarray(source.item_features(int(item))) for item in chosen]
    else:
        wordings = [prompt for prompt in load_prompts().prompts if prompt.group == "wording"]
        places = np.linspace(0, len(wordings) - 1, min(count, len(wordings))).astype(int)
        prompts = [wordings[i] for i in places]
        texts = [prompt.text for prompt in prompts]
    train_clips = _training_clips(run, dataset)

    motions = model.generate(texts, seed=seed, temperature=temperature)
    rows: list[dict[str, Any]] = [
        {"text": text, "frames": len(motion)} for text, motion in zip(texts, motions, strict=True)
    ]
    if prompts:
        for row, motion, prompt in zip(rows, motions, prompts, strict=True):
            row["exact"] = follows(motion.joints, prompt.spec)
    if train_clips:
        made = [np.asarray(motion.features) for motion in motions]
        for row, near in zip(rows, nearest_windows(made, train_clips), strict=True):
            row |= {"nearest": near.name, "nearest_frame": near.start}
            row["nearest_mm"] = round(near.distance_mm, 1)
        if real:
            for row, near in zip(rows, nearest_windows(real, train_clips), strict=True):
                row["real_nearest_mm"] = round(near.distance_mm, 1)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    titles = []
    for row in rows:
        notes = []
        if "exact" in row:
            notes.append("exact" if row["exact"] else "not exact")
        if "nearest_mm" in row:
            notes.append(f"nearest training window {row['nearest_mm']:.0f} mm")
        titles.append(row["text"] + (f"  ({'; '.join(notes)})" if notes else ""))
    save_html(motions, out / "motions.html", titles=titles)
    grid_png(list(zip(titles, motions, strict=True)), out / "motions.png")
    (out / "motions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))
    print(out / "motions.html")
    return rows


def _training_clips(run: str | Path, dataset: str | Path | None) -> list[tuple[str, np.ndarray]]:
    """The train split that the run learnt from, or else that of `dataset`; empty when neither is there."""
    folder = dataset
    config = Path(run) / "config.json"
    if config.is_file():
        folder = json.loads(config.read_text(encoding="utf-8")).get("data", {}).get("dataset") or dataset
    if not folder or not Path(folder).is_dir():
        return []
    source = MotionDataset.open(folder)
    clips = sorted({source.item_clip(int(item)) for item in source.items("train")})
    return [(source.clip_names[clip], np.asarray(source.clip_features(clip))) for clip in clips]
