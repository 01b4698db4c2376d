"""Text in, motion out: load a trained model once, then call `generate`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scamo.config import ModelConfig
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.generation.engine import Engine, Request, check_guidance, collect
from scamo.generation.export import check_codes, exported_folder, load_transformer, read_export, weights_file
from scamo.generation.long import (
    CONTEXT,
    LACK,
    WINDOW,
    Given,
    Part,
    Roll,
    Timeline,
    continued,
    filled,
    likelihood,
    unroll,
)
from scamo.generation.sampling import Sampling, prompt_keys
from scamo.generation.stream import FeatureStream, JointStream, context_tokens
from scamo.models.layers import check_bf16
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.motion import Motion
from scamo.motion.representation import Representation
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder
from scamo.tokenizers.encode import decode_tokens

if TYPE_CHECKING:
    from scamo.evaluation.evaluator import Evaluator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ScaMo:
    """A transformer, its tokenizer and its text encoder. Make one with `ScaMo.load`."""

    def __init__(
        self,
        model: PrefixLM,
        tokenizer: MotionAutoencoder,
        text_encoder: TextEncoder,
        fps: float | None = None,
    ) -> None:
        """fps: of the motions; None for that of the tokenizer's representation.

        Raises ScaMoError when the parts do not fit (numbers of codes, widths of the text states), or the
        tokenizer has features of no known representation.
        """
        check_codes(model.config, tokenizer, "tokenizer")
        if text_encoder.width != model.config.text_width:
            raise ScaMoError(
                f"text encoder {text_encoder.name}: states of width {text_encoder.width}, "
                f"but the transformer was made for {model.config.text_width}"
            )
        self.model, self.tokenizer, self.text_encoder = model, tokenizer, text_encoder
        self.representation = Representation.of(tokenizer.config.feature_dim)
        self.fps = self.representation.fps if fps is None else fps
        self._spare: dict[tuple[Sampling, int, float], Engine] = {}

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
        folder = exported_folder(folder)
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

    @property
    def stream_latency(self) -> int:
        """Tokens that `stream` waits for beyond those whose frames it yields, until the motion ends."""
        return context_tokens(self.tokenizer.config)[1]

    @overload
    def generate(self, text: str, *, samples: None = None, **options: Any) -> Motion: ...
    @overload
    def generate(self, text: str, *, samples: int, **options: Any) -> list[Motion]: ...
    @overload
    def generate(self, text: Sequence[str], *, samples: None = None, **options: Any) -> list[Motion]: ...
    @overload
    def generate(self, text: Sequence[str], *, samples: int, **options: Any) -> list[list[Motion]]: ...

    def generate(  # type: ignore[misc]
        self,
        text: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        samples: int | None = None,
        best_of: int | None = None,
        evaluator: str | Path | Evaluator | None = None,
        batch_size: int = 32,
        finished: Callable[[int], object] = lambda index: None,
        **settings: Any,
    ) -> Motion | list[Motion] | list[list[Motion]]:
        """Generate a motion for a sentence, or one for each of several.

        The same seed and sentence give the same tokens, alone or among others, in any batch size (the noise
        is a function of both; in float32 the logits differ by rounding only). A motion has at least one
        token: EOS is not allowed first. It ends at EOS or at the limit. Sentences of more than
        config.max_text word pieces are cut.

        Args:
            text: a sentence, or several.
            seed: of all sentences, or one for each.
            samples: motions of each sentence, of other noise each; the first is the one without `samples`.
            best_of: generate so many samples of each sentence and keep the one with the smallest matching
                score: the distance of sentence and motion in the evaluator's space.
            evaluator: for best_of: the folder of one, or what `load_evaluator` gave.
            batch_size: motions at a time; bounds the memory. Those that end make room for the next.
            finished: called with the index of a sentence when a motion of it has all its tokens.
            temperature, top_k, top_p, min_p, greedy: see Sampling.
            guidance: 1 (off) or more: logits = null + guidance (text - null), null being the logits without a
                text. For models that were trained with training.drop_text; takes twice the time.
            min_tokens, min_seconds: EOS is forbidden before; seconds are rounded up to whole tokens.
            max_tokens, max_seconds: limits of the length, the tighter one counts; config.max_motion tokens
                without them. Seconds are rounded down to whole tokens.
            seconds: the length, of all or one for each sentence, rounded to the nearest whole token; in place
                of the limits. `timeline` makes motions of any length.

        Returns:
            A Motion with joints, features, tokens and text, or a list in the order of the sentences; with
            `samples` a list of motions in place of each. meta holds seed, with samples also sample, with
            best_of sample and matching_score.

        Raises:
            ScaMoError: an empty sentence (with its index), a bad option, or a limit beyond the model's.
        """
        texts = _sentences([text] if isinstance(text, str) else list(text))
        seeds = [seed] * len(texts) if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(texts):
            raise ScaMoError(f"{len(seeds)} seeds for {len(texts)} prompts: expected one, or one for each")
        for name, value in (("batch_size", batch_size), ("samples", samples), ("best_of", best_of)):
            if value is not None and value < 1:
                raise ScaMoError(f"{name} = {value}: expected a value above 0")
        if samples is not None and best_of is not None:
            raise ScaMoError("samples and best_of: give one of them")
        if (best_of is None) != (evaluator is None):
            raise ScaMoError("best_of and evaluator: each needs the other")
        sampling, guidance, limits = self._settings(len(texts), **settings)
        judge = None if evaluator is None else self._judge(evaluator)

        count = samples or best_of or 1
        prompts = [
            _Prompt(sentence, int(one_seed), number, *limit)
            for sentence, one_seed, limit in zip(texts, seeds, limits, strict=True)
            for number in range(count)
        ]
        tokens: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(prompts)
        if prompts:
            with self._engine(sampling, min(batch_size, len(prompts)), guidance) as engine:
                for ticket, codes in collect(engine.run(self._requests(prompts))):
                    tokens[ticket] = codes
                    finished(ticket // count)
        motions = []
        for prompt, codes, features in zip(
            prompts, tokens, decode_tokens(self.tokenizer, tokens), strict=True
        ):
            meta = {"seed": prompt.seed} | ({} if count == 1 and not samples else {"sample": prompt.number})
            motions.append(
                Motion.from_features(features, fps=self.fps, text=prompt.text, tokens=codes, meta=meta)
            )
        groups = [motions[i : i + count] for i in range(0, len(motions), count)]
        if samples is not None:
            return groups[0] if isinstance(text, str) else groups
        chosen = [group[0] for group in groups] if judge is None else _best(groups, judge)
        return chosen[0] if isinstance(text, str) else chosen

    @overload
    def timeline(
        self, parts: Sequence[str | tuple[str, float | None]], *, samples: None = None, **options: Any
    ) -> Motion: ...
    @overload
    def timeline(
        self, parts: Sequence[str | tuple[str, float | None]], *, samples: int, **options: Any
    ) -> list[Motion]: ...

    def timeline(  # type: ignore[misc]
        self,
        parts: Sequence[str | tuple[str, float | None]],
        *,
        start: Motion | str | Path | None = None,
        seed: int = 0,
        samples: int | None = None,
        context: int | None = None,
        window: int | None = None,
        batch_size: int = 32,
        **sampling: Any,
    ) -> Motion | list[Motion]:
        """Generate one motion that does what several sentences say, one after the other, of any length.

        The model sees a part's sentence and the last `context` tokens of what is before it, as if they were
        the motion's first. A part of more than two `window`s goes on in the same way from its own last half
        window. All tokens are decoded in one row, so that nothing shows where they meet. The same seed gives
        the same motion, with `samples` or without; a single part of two windows or less, or until EOS, is
        what `generate` gives.

        Args:
            parts: sentences with their seconds, [("a person walks forward", 4.0), ("a person sits", None)],
                rounded to the nearest whole token; None, or a sentence alone: until EOS, at most
                config.max_motion tokens. One part of 60 seconds is a long motion.
            start: a motion that the first part goes on from, or its file: with features, of the model's frame
                rate, one token long at least. It stays as it is where it stands; see `continue_motion`.
            seed: of all parts.
            samples: make so many, of other noise each; the first is the one without `samples`.
            context: tokens of the past that a part sees, 0 without: its beginning knows nothing of the past,
                and decoding joins them. More follows the past more closely, and the sentence less.
            window: tokens that the model sees at a time while a sentence of given seconds goes on, 2 to
                config.max_motion, 16 without. A model brings its motion to an end where those that it was
                trained on end: take less than these have.
            batch_size: samples at a time.
            sampling: temperature, top_k, top_p, min_p, greedy, guidance, as in `generate`.

        Returns:
            A Motion with joints, features and tokens, or a list of them; meta holds seed, with samples also
            sample, and parts: text, first_frame and frames of each.

        Raises:
            ScaMoError: no part, a bad part (with its index), start or option.
        """
        (motions,) = self.timelines(
            [Timeline(parts, start, seed)], samples=samples, context=context, window=window,
            batch_size=batch_size, **sampling,
        )  # fmt: skip
        return motions if samples is not None else motions[0]

    def timelines(
        self,
        lines: Sequence[Timeline],
        *,
        samples: int | None = None,
        context: int | None = None,
        window: int | None = None,
        batch_size: int = 32,
        finished: Callable[[int], object] = lambda index: None,
        **sampling: Any,
    ) -> list[list[Motion]]:
        """Several timelines side by side: for each a list of `samples` motions, or of one.

        finished: called with the index of a line when a motion of it has all its tokens. All else as in
        `timeline`.
        """
        most = self.config.max_motion
        chosen, guidance = self._sampling(**sampling)
        context = self._tokens("context", context, CONTEXT, 0, most - 1)
        window = self._tokens("window", window, WINDOW, 2, most)
        if window <= context:
            raise ScaMoError(f"context = {context}: expected less than the window, {window} tokens")
        for name, value in (("samples", samples), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ScaMoError(f"{name} = {value}: expected a value above 0")
        parts = [self._parts(line.parts) for line in lines]
        starts = [None if line.start is None else self._given("start", line.start) for line in lines]
        pasts = [[] if start is None else start.last_tokens().tolist() for start in starts]
        rolls = [
            Roll(limits, int(line.seed), number, past)
            for line, limits, past in zip(lines, parts, pasts, strict=True)
            for number in range(samples or 1)
        ]
        if rolls:
            with self._engine(chosen, min(batch_size, len(rolls)), guidance) as engine:
                unroll(
                    engine,
                    rolls,
                    self._states(),
                    context,
                    window,
                    lambda index: finished(index // (samples or 1)),
                )
        made = iter(rolls)
        return [
            [self._told(next(made), start, samples is not None) for _ in range(samples or 1)]
            for start in starts
        ]

    def check_timeline(
        self, parts: Sequence[str | tuple[str, float | None]], start: Motion | str | Path | None = None
    ) -> None:
        """Raises ScaMoError where `timeline` would: for a bad part or start."""
        self._parts(parts)
        if start is not None:
            self._given("start", start)

    def _told(self, roll: Roll, given: Given | None, numbered: bool) -> Motion:
        """The motion of a filled roll."""
        if given is None:
            tokens = np.array(roll.tokens, dtype=np.int32)
            (features,) = decode_tokens(self.tokenizer, [tokens])
            motion = Motion.from_features(features, fps=self.fps, tokens=tokens)
        else:
            motion = continued(given, roll.tokens, roll.start, self.fps)
        frame, described = len(motion) - len(roll.tokens) * self.tokenizer.downsampling, []
        for part, length in zip(roll.parts, roll.lengths, strict=True):
            frames = length * self.tokenizer.downsampling
            described.append({"text": part.text, "first_frame": frame, "frames": frames})
            frame += frames
        texts = [given.motion.text] if given and given.motion.text else []
        motion.text = ", then ".join(texts + [part.text for part in roll.parts])
        sample = {"sample": roll.number} if numbered else {}
        motion.meta = {"seed": roll.seed, **sample, "parts": described}
        return motion

    def continue_motion(
        self, motion: Motion | str | Path, text: str, *, seconds: float | None = None, **options: Any
    ) -> Motion | list[Motion]:
        """Generate what follows a motion: `timeline` of one part with `start`.

        The result holds the given motion and the new frames; meta["parts"][0]["first_frame"] is the first of
        these. The given frames stay as they are, joints and features, and where they stand and face. The new
        ones are decoded together with the tokens of the given; what decoding these lacks to the given pose
        is added to the new frames and fades out within 0.4 seconds. tokens are those of the given motion's
        last whole tokens and of the new frames.

        Args:
            motion: a Motion with features, or the file of one.
            text: what happens next.
            seconds: of the new frames; None until EOS.
            options: seed to guidance, as in `timeline`.

        Raises:
            ScaMoError: as `timeline`.
        """
        return self.timeline([(text, seconds)], start=self._given("motion", motion).motion, **options)

    def inbetween(
        self,
        motion: Motion | str | Path,
        gap: tuple[int, int],
        text: str,
        *,
        candidates: int = 16,
        seed: int = 0,
        context: int | None = None,
        batch_size: int = 32,
        **sampling: Any,
    ) -> Motion:
        """Replace the frames gap[0] <= frame < gap[1] of a motion by others that lead to what follows.

        The model writes from left to right and does not see what follows. So `candidates` continuations of
        the frames before the gap are sampled, each of the gap's tokens, and the one is taken behind which
        the model, without guidance, finds the tokens after the gap likeliest and which ends near to where the
        motion goes on: LACK nats a token for every metre and half metre a radian (sampling and reranking; the
        model was not trained to fill gaps). All other frames stay as they are. Inside the gap, the difference
        to the given frames fades within 0.4 seconds of each end, and what heading and place lack at the end
        is spread over the gap, so that the motion goes on where it stood: meta says how much that was. Much
        of it shows as feet that slide: a gap that the sentence does not cross in its time.

        Args:
            motion: a Motion with features, or the file of one.
            gap: first frame, and the first frame behind; with a token's frames on both sides at least.
            text: what happens in the gap.
            candidates: how many to choose from.
            context: tokens that the model sees before the gap, and is asked about after it; 8 without.
            seed, batch_size, sampling: as in `timeline`.

        Returns:
            The motion, without tokens. meta holds seed and gap: text, first_frame, frames, sample (which of
            the candidates), log_likelihood (nats a token of what follows), turned (degrees) and moved (m).

        Raises:
            ScaMoError: a bad motion, gap, text or option.
        """
        given = self._given("motion", motion)
        _sentences([text])
        chosen, guidance = self._sampling(**sampling)
        context = self._tokens("context", context, WINDOW // 2, 1, self.config.max_motion - 1)
        for name, value in (("candidates", candidates), ("batch_size", batch_size)):
            if value < 1:
                raise ScaMoError(f"{name} = {value}: expected a value above 0")
        before, after, count = given.around(gap)
        part, states = Part(text, count, count), self._states()
        rolls = [Roll([part], int(seed), number, before.tolist()) for number in range(candidates)]
        with self._engine(chosen, min(batch_size, candidates), guidance) as engine:
            unroll(engine, rolls, states, context, self.config.max_motion)
        # Judged as far ahead as the model sees back.
        ahead = after[:context].tolist()
        seen = self.config.max_motion - len(ahead)
        rows = [[*before[-context:].tolist(), *roll.tokens][-seen:] + ahead for roll in rolls]
        scores = likelihood(self.model, states(text), rows, len(ahead))
        fills = [
            filled(given, gap, before.tolist(), [*before, *roll.tokens, *after], self.fps) for roll in rolls
        ]
        lacks = [abs(math.radians(turned)) / 2 + moved for _, turned, moved in fills]
        best = int((scores - LACK * np.array(lacks)).argmax())
        result, turned, moved = fills[best]
        result.text = given.motion.text or text
        described: dict[str, Any] = {"text": text, "first_frame": int(gap[0]), "frames": int(gap[1] - gap[0])}
        described |= {"sample": best, "log_likelihood": float(scores[best]), "turned": turned, "moved": moved}
        result.meta = {"seed": int(seed), "gap": described}
        return result

    def stream(self, text: str, *, seed: int = 0, chunk: int = 4, **settings: Any) -> Iterator[Motion]:
        """Generate a motion for a sentence and yield it in pieces, while it is being generated.

        The pieces end to end are what `generate` gives for the same seed and settings: the same tokens,
        features and joints to rounding (1e-5 m). A frame depends on `stream_latency` tokens after its own
        (22 with the default tokenizer); it is yielded when they are there, or when the motion has ended.

        Args:
            text: a sentence.
            seed: as in `generate`.
            chunk: tokens of a piece at least, but for the last piece. Smaller ones come sooner; each costs
                the tokenizer's decoder a window of its tokens and of those around that they depend on.
            settings: temperature to seconds, as in `generate`.

        Yields:
            Motions with joints, features and tokens of their frames, and text; meta holds seed and
            first_frame.

        Raises:
            ScaMoError: as `generate`, before the first piece.
        """
        _sentences([text])
        if chunk < 1:
            raise ScaMoError(f"chunk = {chunk}: expected a value above 0")
        sampling, guidance, (limits,) = self._settings(1, **settings)
        return self._stream(_Prompt(text, int(seed), 0, *limits), chunk, sampling, guidance)

    def _stream(self, prompt: _Prompt, chunk: int, sampling: Sampling, guidance: float) -> Iterator[Motion]:
        frames, path = FeatureStream(self.tokenizer, chunk), JointStream()
        with self._engine(sampling, 1, guidance) as engine:
            for _, tokens, done in engine.run(self._requests([prompt])):
                first = frames.given
                features = frames.push(tokens, end=done)
                if features is not None:
                    yield Motion(
                        path.push(features),
                        fps=self.fps,
                        text=prompt.text,
                        features=features,
                        tokens=np.array(frames.tokens[first : frames.given], dtype=np.int32),
                        meta={"seed": prompt.seed, "first_frame": first * self.tokenizer.downsampling},
                    )

    @contextmanager
    def _engine(self, sampling: Sampling, slots: int, guidance: float) -> Iterator[Engine]:
        """An engine for one call; on CUDA the last one is kept, for its graph."""
        capacity = self.config.max_text + self.config.max_motion - 1
        key = (sampling, slots, guidance)
        engine = self._spare.pop(key, None)
        if engine is None:
            engine = Engine(self.model, sampling, slots=slots, capacity=capacity, guidance=guidance)
        try:
            yield engine
        finally:
            if self.model.embedding.weight.is_cuda:
                self._spare = {key: engine}

    def _requests(self, prompts: Sequence[_Prompt]) -> Iterator[Request]:
        """What the engine takes; a text is encoded when its turn comes."""
        states = self._states()
        for prompt in prompts:
            key = prompt_keys([prompt.seed], [prompt.text], [prompt.number])
            yield Request(states(prompt.text), int(key), prompt.most, prompt.least)

    def _states(self) -> Callable[[str], Tensor]:
        """Of a text; the last ones are kept."""

        # One text at a time: padding would change its states by a rounding, and so perhaps its motion.
        @functools.lru_cache(maxsize=256)
        def states(text: str) -> Tensor:
            return torch.from_numpy(self.text_encoder.encode([text], batch_size=1)[0]).float()

        return states

    def _given(self, name: str, motion: Motion | str | Path) -> Given:
        loaded = motion if isinstance(motion, Motion) else Motion.load(motion)
        return Given(loaded, self.tokenizer, self.fps, name)

    def _parts(self, parts: Sequence[str | tuple[str, float | None]]) -> list[Part]:
        if isinstance(parts, str) or not len(parts):
            raise ScaMoError(f"parts = {parts!r}: expected a list of (text, seconds), at least one")
        pairs = [(part, None) if isinstance(part, str) else part for part in parts]
        found = []
        for index, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ScaMoError(f"part {index} is {pair!r}: expected a text or (text, seconds)")
            text, seconds = pair
            if not isinstance(text, str) or not text.strip():
                raise ScaMoError(f"part {index}: text = {text!r}, expected a sentence")
            least, most = 1, self.config.max_motion
            if seconds is not None:
                least = most = self._tokens_of(f"part {index}: seconds", seconds, _nearest, math.inf)
            found.append(Part(text, least, most))
        return found

    def _sampling(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        guidance: float = 1.0,
    ) -> tuple[Sampling, float]:
        sampling = Sampling(temperature, top_k, top_p, greedy, min_p)
        check_guidance(self.model, guidance)
        return sampling, guidance

    def _tokens(self, name: str, value: int | None, default: int, least: int, most: int) -> int:
        if value is not None and not least <= value <= most:
            raise ScaMoError(f"{name} = {value}: expected {least} to {most} tokens")
        return min(default, most) if value is None else value

    def _settings(
        self,
        count: int,
        *,
        min_tokens: int | None = None,
        min_seconds: float | None = None,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        seconds: float | Sequence[float] | None = None,
        **settings: Any,
    ) -> tuple[Sampling, float, list[tuple[int, int]]]:
        """Sampling, guidance and, for each of `count` prompts, its least and most tokens."""
        sampling, guidance = self._sampling(**settings)
        limits = (min_tokens, min_seconds, max_tokens, max_seconds)
        if seconds is not None:
            if limits != (None,) * 4:
                raise ScaMoError("seconds is the whole length: give no minimum or maximum beside it")
            each = [seconds] * count if isinstance(seconds, int | float) else list(seconds)
            if len(each) != count:
                raise ScaMoError(f"{len(each)} seconds for {count} prompts: expected one, or one for each")
            lengths = [self._tokens_of("seconds", one, _nearest) for one in each]
            return sampling, guidance, [(length, length) for length in lengths]
        most = self.config.max_motion
        least = 1
        for name, tokens in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
            if tokens is not None and not 1 <= tokens <= most:
                raise ScaMoError(f"{name} = {tokens}: expected 1 to {most}, the model's limit")
        # The epsilons: 0.6 / 0.2 is 2.9999999999999996.
        if max_seconds is not None:
            most = self._tokens_of("max_seconds", max_seconds, lambda n: math.floor(n + 1e-6))
        if min_seconds is not None:
            least = self._tokens_of("min_seconds", min_seconds, lambda n: math.ceil(n - 1e-6))
        least, most = max(least, min_tokens or 1), min(most, max_tokens or most)
        if least > most:
            raise ScaMoError(f"the shortest length, {least} tokens, is above the longest, {most}")
        return sampling, guidance, [(least, most)] * count

    def _tokens_of(
        self, name: str, seconds: float, rounded: Callable[[float], int], most: float | None = None
    ) -> int:
        unit, most = self.seconds_per_token, most or self.config.max_motion
        number = isinstance(seconds, int | float | np.number) and np.isfinite(seconds)
        tokens = rounded(seconds / unit) if number else 0
        if not 1 <= tokens <= most:
            limit = f"to {most * unit:g}, the model's limit" if most < math.inf else "or more"
            more = "; timeline makes longer motions" if tokens > most else ""
            raise ScaMoError(f"{name} = {seconds}: expected {unit:g} (one token) {limit}{more}")
        return tokens

    def _judge(self, evaluator: str | Path | Evaluator) -> Evaluator:
        from scamo.evaluation.evaluator import check_statistics, load_evaluator

        tokenizer = self.tokenizer
        judge = evaluator
        if isinstance(judge, str | Path):
            judge = load_evaluator(judge, tokenizer.mean.device)
        if abs(judge.fps - self.fps) > 1e-6:
            raise ScaMoError(
                f"evaluator {judge.name} was trained at {judge.fps:g} fps, the model makes {self.fps:g}"
            )
        if judge.variant != tokenizer.config.variant:
            raise ScaMoError(
                f"evaluator {judge.name} was trained on {judge.variant} features, the model makes "
                f"{tokenizer.config.variant} ones"
            )
        found = tokenizer.mean.cpu().numpy(), tokenizer.std.cpu().numpy()
        check_statistics(f"evaluator {judge.name}", (judge.mean, judge.std), found, "the model's tokenizer")
        return judge


class _Prompt(NamedTuple):
    """A sentence, its noise (seed and number of the sample) and the limits of its length in tokens."""

    text: str
    seed: int
    number: int
    least: int
    most: int


def _sentences(texts: list[str]) -> list[str]:
    """The texts; ScaMoError with its index for one that is empty or none."""
    for index, sentence in enumerate(texts):
        if not isinstance(sentence, str) or not sentence.strip():
            what = "is empty" if isinstance(sentence, str) else f"is not a text: {sentence!r}"
            raise ScaMoError(f"prompt {index} {what}")
    return texts


def _nearest(tokens: float) -> int:
    return math.floor(tokens + 0.5 + 1e-6)


def _best(groups: list[list[Motion]], judge: Evaluator) -> list[Motion]:
    """Of each group of one text, the motion that the evaluator finds nearest to it, the first of equals."""
    from scamo.evaluation.evaluator import held

    texts = judge.embed_texts([str(group[0].text) for group in groups])
    chosen = []
    for text, group in zip(texts, groups, strict=True):
        points = judge.embed_motions([held(np.asarray(m.features), judge.min_frames) for m in group])
        distances = np.linalg.norm(points - text, axis=1)
        best = int(distances.argmin())
        group[best].meta |= {"sample": best, "matching_score": float(distances[best])}
        chosen.append(group[best])
    return chosen


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
