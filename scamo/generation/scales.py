"""Generation of motions scale by scale: S steps for a batch of any lengths, coarse previews on the way.

A motion depends on its text, its seed, its length and the settings, not on its neighbours in a batch. An
exported predictor is a folder:

config.json         format, schema_version, model (NextScaleConfig), text_encoder, fps
model.safetensors   the predictor
tokenizer/          the multi-scale tokenizer
manifest.json       size and SHA-256 of the files above
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from scamo_kernels import bsq_dequantize
from torch import Tensor

from scamo.config import from_dict, to_dict
from scamo.data.batches import null_text
from scamo.data.storage import whole_folder
from scamo.data.text import TextEncoder
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.generation.sampling import Sampling, gumbel_noise, prompt_keys, sample
from scamo.models.next_scale import NextScale, NextScaleConfig, pack_bits
from scamo.motion.motion import Motion
from scamo.motion.representation import Representation
from scamo.tokenizers.multiscale import MultiscaleQuantizer, MultiscaleTokenizer, latents_of
from scamo.tokenizers.skeletal import DOWNSAMPLING, PARTS
from scamo.weights import CONFIG, WEIGHTS, check_state, read_description, read_state, write_files

FORMAT, SCHEMA_VERSION = "scamo-next-scale", 1


@dataclass(frozen=True)
class ScaleSampling:
    """How bits are drawn, each alone; the defaults are the released code's.

    temperature: divides the logits. guidance: w at the first and at the last scale, linear between them:
    logits = (1 + w) of the text - w of no text; (0, 0) for none. greedy: the likelier value of every bit, and
    the likeliest length.
    """

    temperature: float = 1.3
    guidance: tuple[float, float] = (0.0, 7.0)
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ScaMoError(f"temperature = {self.temperature}: expected a value above 0")
        if len(self.guidance) != 2 or not all(w >= 0 and math.isfinite(w) for w in self.guidance):
            raise ScaMoError(f"guidance = {self.guidance}: expected two values of 0 or more")

    def weight(self, scale: int, scales: int) -> float:
        """w at a scale of so many."""
        first, last = self.guidance
        return first + (last - first) * scale / max(scales - 1, 1)


class ScaleStep(NamedTuple):
    """What is known after a scale: scales that are done; bits int32 (B, L), 0 for tokens still to come.

    latents: int64 (B,), of each motion.
    """

    scales: int
    bits: Tensor
    latents: Tensor


@torch.no_grad()
def generate_bits(
    model: NextScale,
    quantizer: MultiscaleQuantizer,
    texts: Sequence[Tensor],
    keys: Tensor,
    sampling: ScaleSampling,
    *,
    latents: Sequence[int] | None = None,
    scales: int | None = None,
) -> Iterator[ScaleStep]:
    """Draw the bits of one motion for each text, scale by scale.

    model and quantizer: in evaluation mode, on one device. texts: float (P_i, text width) each. keys: int64
    (B,), the noise of each (prompt_keys): a bit's is a function of the key, the token and the channel.
    latents: of each motion, 1 to the most; None lets the model choose. scales: stop after so many.

    Raises:
        ScaMoError: no texts or bad ones, another number of keys or latents, latents or scales out of range,
            or guidance of a model that never lost its text in training.
    """
    config, count = model.config, len(texts)
    check_parts(config, quantizer)
    if keys.shape != (count,):
        raise ScaMoError(f"keys: shape {tuple(keys.shape)}, expected ({count},)")
    stop = len(config.scales) if scales is None else scales
    if not 1 <= stop <= len(config.scales):
        raise ScaMoError(f"scales = {scales}: expected 1 to {len(config.scales)}")
    guided = any(sampling.guidance)
    if guided and not config.drop_text:
        raise ScaMoError("guidance: this model was trained with drop_text = 0; use guidance = (0, 0)")
    device = model.words.weight.device
    keys = keys.to(device)
    null = torch.from_numpy(null_text(config.text_width)).to(device)
    cache = model.read_texts(
        [*(t.to(device) for t in texts), *([null] * count if guided else [])], config.tokens
    )
    if latents is None:
        logits = model.length_logits(cache)[:count]
        n = 1 + sample(logits, keys, config.tokens, Sampling(greedy=sampling.greedy))
    else:
        n = torch.as_tensor(latents, dtype=torch.int64, device=device)
        if n.shape != (count,) or int(n.min()) < 1 or int(n.max()) > config.latents:
            raise ScaMoError(f"latents = {n.tolist()}: expected {count}, of 1 to {config.latents}")

    valid, slices = quantizer.valid(n), quantizer.slices
    bits = torch.zeros(count, config.tokens, dtype=torch.int32, device=device)
    total = torch.zeros(count, config.latents, PARTS, config.bits, device=device)
    for number, span in enumerate(slices[:stop]):
        there = valid[:, span]
        row, token = there.nonzero(as_tuple=True)
        token = token + span.start
        inputs, counts = quantizer._down(number, total, n)[there], there.sum(1).tolist()
        if guided:
            logits = model.extend(cache, inputs.repeat(2, 1), token.repeat(2), counts * 2)
            given, none = logits.chunk(2)
            logits = given + sampling.weight(number, len(slices)) * (given - none)
        else:
            logits = model.extend(cache, inputs, token, counts)
        if not sampling.greedy:
            one, zero = gumbel_noise(keys[row], token, 2 * config.bits).chunk(2, -1)
            logits = logits.double() / sampling.temperature + (one - zero)
        bits[row, token] = pack_bits(logits > 0)
        codes = bsq_dequantize(bits[:, span].contiguous(), config.bits)
        total = total + quantizer._up(number, codes, n)
        yield ScaleStep(number + 1, bits.clone(), n)


def check_parts(config: NextScaleConfig, quantizer: MultiscaleQuantizer) -> None:
    """Raises ScaMoError when a predictor was made for other scales or bits than a tokenizer has."""
    found = tuple(quantizer.scales), quantizer.bits
    if found != (tuple(map(tuple, config.scales)), config.bits):
        raise ScaMoError("the predictor was made for other scales or bits than the tokenizer has")


class ScaleMoGen:
    """A predictor, its tokenizer and its text encoder. Make one with `ScaleMoGen.load`."""

    def __init__(
        self,
        model: NextScale,
        tokenizer: MultiscaleTokenizer,
        text_encoder: TextEncoder,
        fps: float | None = None,
    ) -> None:
        """fps: of the motions; None for that of the tokenizer's representation.

        Raises ScaMoError when the parts do not fit: scales, bits, or the width of the text states.
        """
        check_parts(model.config, tokenizer.quantizer)
        if text_encoder.width != model.config.text_width:
            raise ScaMoError(
                f"text encoder {text_encoder.name}: states of width {text_encoder.width}, "
                f"but the predictor was made for {model.config.text_width}"
            )
        self.model, self.tokenizer, self.text_encoder = model, tokenizer, text_encoder
        self.fps = Representation.of(tokenizer.config.feature_dim).fps if fps is None else fps

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", *, text_encoder: str | None = None) -> Self:
        """Load an exported predictor. text_encoder: where it is not the one of the training.

        Raises ScaMoError for a file that is missing, changed or of another format, or parts that do not fit.
        """
        folder, target = Path(folder), resolve_device(device)
        required = ("model", "text_encoder", "fps")
        found = read_description(folder, {FORMAT}, SCHEMA_VERSION, "predictor", required=required)
        config = from_dict(NextScaleConfig, found["model"], where=f"{folder / CONFIG}: model")
        with torch.device("meta"):
            model = NextScale(config)
        state = read_state(folder / WEIGHTS, str(target))
        check_state(state, model.state_dict(), str(folder / WEIGHTS))
        model.load_state_dict(state, assign=True)
        encoder = TextEncoder.load(
            text_encoder or found["text_encoder"], device=str(target), max_tokens=config.max_text
        )
        tokenizer = MultiscaleTokenizer.load(folder / "tokenizer", target)
        return cls(model.eval().requires_grad_(False), tokenizer, encoder, float(found["fps"]))

    def generate(
        self,
        texts: Sequence[str],
        *,
        frames: Sequence[int] | int | None = None,
        seeds: Sequence[int] | int = 0,
        sampling: ScaleSampling | None = None,
        scales: int | None = None,
    ) -> list[Motion]:
        """One motion of each text. scales: only the first so many are drawn, for a coarse motion.

        frames: of all or of each; None lets the model choose. seeds: of all or of each. Raises ScaMoError for
        an empty text, lengths out of range, another number of frames or seeds than texts, and as
        `generate_bits`.
        """
        *_, last = self.previews(texts, frames=frames, seeds=seeds, sampling=sampling, scales=scales, every=0)
        return last

    def previews(
        self,
        texts: Sequence[str],
        *,
        frames: Sequence[int] | int | None = None,
        seeds: Sequence[int] | int = 0,
        sampling: ScaleSampling | None = None,
        scales: int | None = None,
        every: int = 1,
    ) -> Iterator[list[Motion]]:
        """The motions after every so many scales, coarse to fine, and at last; `generate` gives the last.

        every: 0 for the last alone. The rest, and errors, as of `generate`.
        """
        texts, most = list(texts), self.tokenizer.config.max_frames
        asked = [frames] * len(texts) if isinstance(frames, int) else frames
        if asked is not None and not (len(asked) == len(texts) and all(1 <= f <= most for f in asked)):
            raise ScaMoError(f"frames = {list(asked)}: expected {len(texts)} numbers from 1 to {most}")
        numbers = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
        if len(numbers) != len(texts):
            raise ScaMoError(f"seeds: {len(numbers)} of them for {len(texts)} texts")
        # One text at a time: padding would change its states by a rounding, and so perhaps its motion.
        states = [torch.from_numpy(self.text_encoder.encode([t], batch_size=1)[0]).float() for t in texts]
        steps = generate_bits(
            self.model,
            self.tokenizer.quantizer,
            states,
            prompt_keys(numbers, texts),
            sampling or ScaleSampling(),
            latents=None if asked is None else latents_of(torch.tensor(asked)).tolist(),
            scales=scales,
        )
        stop = scales or len(self.model.config.scales)
        for step in steps:
            if step.scales == stop or (every and step.scales % every == 0):
                yield self._motions(step, texts, asked)

    @torch.no_grad()
    def _motions(self, step: ScaleStep, texts: list[str], frames: Sequence[int] | None) -> list[Motion]:
        quantizer, device = self.tokenizer.quantizer, step.bits.device
        if frames is None:
            lengths = DOWNSAMPLING * step.latents
        else:
            lengths = torch.tensor(frames, device=device)
        bits = step.bits[:, : quantizer.slices[step.scales - 1].stop]
        made = self.tokenizer.decode(bits, lengths, scales=step.scales).cpu().numpy()
        return [
            Motion.from_features(features[:length], fps=self.fps, text=text)
            for features, length, text in zip(made, lengths.tolist(), texts, strict=True)
        ]


def export_predictor(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: NextScaleConfig,
    tokenizer_folder: str | Path,
    text_encoder: str,
    *,
    fps: float,
    overwrite: bool = False,
) -> Path:
    """Write an exported predictor, whole or not at all.

    state: NextScale's state dict; tokenizer_folder: the tokenizer that made the latents, copied;
    text_encoder: what `TextEncoder.load` takes. Raises ScaMoError when the weights or the tokenizer do not
    fit the config, or the folder exists and `overwrite` is false.
    """
    with torch.device("meta"):
        expected = NextScale(config).state_dict()
    folder = Path(folder)
    check_state(state, expected, f"export to {folder}")
    tokenizer = MultiscaleTokenizer.load(tokenizer_folder)
    check_parts(config, tokenizer.quantizer)
    description = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model": to_dict(config),
        "text_encoder": text_encoder,
        "fps": fps,
    }
    with whole_folder(folder, overwrite=overwrite) as temporary:
        tokenizer.save(temporary / "tokenizer")
        write_files(temporary, state, description)
    return folder
