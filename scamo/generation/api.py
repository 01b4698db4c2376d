"""Text in, motion out: load a trained model once, then call `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.config import ModelConfig
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.generation.decode import generate_tokens
from scamo.generation.export import check_codes, load_transformer, read_export, weights_file
from scamo.generation.sampling import Sampling, prompt_keys
from scamo.models.layers import check_bf16
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.motion import Motion
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ScaMo:
    """A transformer, its tokenizer and its text encoder. Make one with `ScaMo.load`."""

    def __init__(
        self,
        model: PrefixLM,
        tokenizer: MotionAutoencoder,
        text_encoder: TextEncoder,
        fps: float = 20.0,
    ) -> None:
        """Raises ScaMoError when the parts do not fit: numbers of codes, widths of the text states."""
        check_codes(model.config, tokenizer, "tokenizer")
        if text_encoder.width != model.config.text_width:
            raise ScaMoError(
                f"text encoder {text_encoder.name}: states of width {text_encoder.width}, "
                f"but the transformer was made for {model.config.text_width}"
            )
        self.model, self.tokenizer, self.text_encoder, self.fps = model, tokenizer, text_encoder, fps

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "auto",
        *,
        dtype: str = "float32",
        text_encoder: str | None = None,
        ema: bool | None = None,
    ) -> ScaMo:
        """Load a run's folder (its export/) or an exported model.

        Args:
            folder: the run or the exported model.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
            dtype: of the transformer, "float32" or "bfloat16". bfloat16 halves its memory; a prompt's motion
                may then differ with the number of prompts beside it.
            text_encoder: name or folder of the encoder, where it is not the one of the training.
            ema: the moving average of the weights (ema.safetensors) or the weights of the last step
                (model.safetensors); None takes the average where the training kept one.

        Raises:
            ScaMoError: a file is missing, changed, of another format, or its tensors do not fit the config;
                the parts do not fit together; the device is not there or lacks bfloat16; there is no average.
        """
        folder = Path(folder)
        target = _device(device)
        if dtype not in DTYPES:
            raise ScaMoError(f"dtype = {dtype!r}: expected {' or '.join(DTYPES)}")
        if DTYPES[dtype] == torch.bfloat16:
            check_bf16(target)
        if (folder / "export").is_dir():
            folder = folder / "export"
        elif (folder / "checkpoints").is_dir():
            raise ScaMoError(
                f"{folder / 'export'}: no such folder; the run has not finished: train.py --resume"
            )
        description, config = read_export(folder)
        tokenizer = load_tokenizer(folder / "tokenizer", target)
        check_codes(config, tokenizer, str(folder / "tokenizer"))
        model = load_transformer(weights_file(folder, ema), config, target, DTYPES[dtype])
        encoder = TextEncoder.load(
            text_encoder or description["text_encoder"], device=str(target), max_tokens=config.max_text
        )
        return cls(model, tokenizer, encoder, float(description["fps"]))

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def seconds_per_token(self) -> float:
        return self.tokenizer.downsampling / self.fps

    @overload
    def generate(self, text: str, **options: Any) -> Motion: ...
    @overload
    def generate(self, text: Sequence[str], **options: Any) -> list[Motion]: ...

    def generate(  # type: ignore[misc]
        self,
        text: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        batch_size: int = 32,
    ) -> Motion | list[Motion]:
        """Generate a motion for a sentence, or one for each of several.

        The same seed and sentence give the same tokens, alone or among others, in any batch size (the noise
        is a function of both; in float32 the logits differ by rounding only). A motion has at least one
        token: EOS is not allowed first. It ends at EOS or at the limit. Sentences of more than
        config.max_text word pieces are cut.

        Args:
            text: a sentence, or several.
            seed: of all sentences, or one for each.
            temperature, top_k, top_p, greedy: see Sampling.
            max_tokens, max_seconds: limits of the length, the tighter one counts; config.max_motion tokens
                without them.
            batch_size: sentences at a time; bounds the memory.

        Returns:
            A Motion with joints, features, tokens and text, or a list in the order of the sentences.

        Raises:
            ScaMoError: an empty sentence (with its index), a bad option, or a limit beyond the model's.
        """
        texts = [text] if isinstance(text, str) else list(text)
        for index, sentence in enumerate(texts):
            if not isinstance(sentence, str) or not sentence.strip():
                what = "is empty" if isinstance(sentence, str) else f"is not a text: {sentence!r}"
                raise ScaMoError(f"prompt {index} {what}")
        seeds = [seed] * len(texts) if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(texts):
            raise ScaMoError(f"{len(seeds)} seeds for {len(texts)} prompts: expected one, or one for each")
        if batch_size < 1:
            raise ScaMoError(f"batch_size = {batch_size}: expected a value above 0")
        sampling = Sampling(temperature, top_k, top_p, greedy)
        limit = self._limit(max_tokens, max_seconds)

        tokens: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            keys = prompt_keys(seeds[start : start + batch_size], part)
            # One text at a time: padding would change its states by a rounding, and so perhaps its motion.
            different = list(dict.fromkeys(part))
            encoded = self.text_encoder.encode(different, batch_size=1)
            state_of = {
                sentence: torch.from_numpy(state).float()
                for sentence, state in zip(different, encoded, strict=True)
            }
            states = [state_of[sentence] for sentence in part]
            tokens += generate_tokens(self.model, states, keys, sampling, max_tokens=limit)
        motions = [
            Motion.from_features(
                features, fps=self.fps, text=sentence, tokens=codes, meta={"seed": int(one_seed)}
            )
            for features, sentence, codes, one_seed in zip(
                self._decode(tokens, batch_size), texts, tokens, seeds, strict=True
            )
        ]
        return motions[0] if isinstance(text, str) else motions

    def _limit(self, max_tokens: int | None, max_seconds: float | None) -> int:
        limit = most = self.config.max_motion
        unit = self.seconds_per_token
        if max_tokens is not None:
            if not 1 <= max_tokens <= most:
                raise ScaMoError(f"max_tokens = {max_tokens}: expected 1 to {most}, the model's limit")
            limit = max_tokens
        if max_seconds is not None:
            # The epsilon: 0.6 / 0.2 is 2.9999999999999996.
            tokens = int(max_seconds / unit + 1e-6) if np.isfinite(max_seconds) else 0
            if not 1 <= tokens <= most:
                raise ScaMoError(
                    f"max_seconds = {max_seconds}: expected {unit:g} (one token) to {most * unit:g}, "
                    "the model's limit"
                )
            limit = min(limit, tokens)
        return limit

    @torch.no_grad()
    def _decode(self, tokens: list[NDArray[np.int32]], batch_size: int) -> list[NDArray[np.float32]]:
        """Features (frames, 263) of each motion. Only equal lengths share a batch: padding would leak in."""
        features: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(tokens)
        by_length: dict[int, list[int]] = {}
        for index, motion_tokens in enumerate(tokens):
            by_length.setdefault(len(motion_tokens), []).append(index)
        device = self.tokenizer.mean.device
        for members in by_length.values():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                codes = torch.from_numpy(np.stack([tokens[i] for i in part])).to(device)
                for index, motion in zip(part, self.tokenizer.decode(codes).cpu().numpy(), strict=True):
                    features[index] = motion
        return features


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ScaMoError(f"device = {device!r}: expected auto, cpu or cuda") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ScaMoError(
            f"device = {str(target)!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if target.type not in ("cpu", "cuda"):
        raise ScaMoError(f"device = {str(target)!r}: expected auto, cpu or cuda")
    return target
