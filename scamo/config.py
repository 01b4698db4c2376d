"""Configurations: frozen dataclasses, read from TOML. An unknown key is an error, never ignored."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scamo.errors import ScaMoError

T = TypeVar("T")

# Codebook sizes as the paper names them -> FSQ levels of the released code (their product is the real size).
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    2048: (8, 8, 6, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}

# Tab. 1 of the paper: name -> (layers, heads, width).
MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "44M": (8, 8, 512),
    "111M": (12, 12, 768),
    "343M": (24, 16, 1024),
    "775M": (36, 20, 1280),
    "1.4B": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """The conv auto-encoder and its quantiser (paper section 3.1; released code for the network).

    codebook_size: for "fsq" one of the paper's names (256 ... 65536), or the product of `levels` when those
        are given; for "vq" the exact number of codes.
    feature_dim: features a frame; 0 takes them from the statistics that the network is given, which are the
        dataset's, and 263 without any.
    quantizer: "fsq" or "vq" (the baseline of eqs. 1-2, with a learnt codebook; it has no levels).
    variant: of the features (`scamo.motion.features.FIXED`); training takes it from the dataset.
    groups: for "fsq": so many times the channels, each group with the same levels and an index of its own.
    residual: stages, each with an index of its own, that quantise what the stages before them left.
    """

    codebook_size: int = 65536
    levels: tuple[int, ...] | None = None
    feature_dim: int = 0
    width: int = 512
    latent_width: int = 512
    downsample_stages: int = 2
    depth: int = 3
    dilation_base: int = 3
    quantizer: str = "fsq"
    variant: str = "original"
    groups: int = 1
    residual: int = 1

    def __post_init__(self) -> None:
        if self.quantizer not in ("fsq", "vq"):
            raise ScaMoError(f"quantizer = {self.quantizer!r}: expected fsq or vq")
        if self.quantizer == "vq":
            if self.levels is not None:
                raise ScaMoError("levels: quantizer = 'vq' has none; give its number of codes, codebook_size")
            _positive(self, "codebook_size")
        elif self.levels is None and self.codebook_size not in FSQ_LEVELS:
            known = ", ".join(str(size) for size in FSQ_LEVELS)
            raise ScaMoError(
                f"codebook_size = {self.codebook_size} has no FSQ levels: use one of {known}, or give levels"
            )
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
            if not self.levels or min(self.levels) < 2:
                raise ScaMoError(f"levels = {list(self.levels)}: expected at least one level, each 2 or more")
        _not_negative(self, "feature_dim")
        _positive(
            self, "width", "latent_width", "downsample_stages", "depth", "dilation_base", "groups", "residual"
        )
        self._check_stages()

    def _check_stages(self) -> None:
        if self.groups > 1 and self.quantizer == "vq":
            raise ScaMoError(f"groups = {self.groups}: quantizer = 'vq' has none, only 'fsq' has")
        if self.groups > 1 and self.residual > 1:
            raise ScaMoError(
                f"groups = {self.groups} and residual = {self.residual}: one of the two, not both together"
            )
        if self.residual > 1 and self.quantizer == "fsq":
            levels = self.fsq_levels
            # What the kernels can do: two levels do not get finer, and a float32 has 24 bits.
            if min(levels) == 2 or (max(levels) - 1) ** (self.residual - 1) > 2**24:
                raise ScaMoError(
                    f"residual = {self.residual} with levels {list(levels)}: expected 3 levels or more a "
                    f"channel and (L - 1)^(residual - 1) of at most 2^24"
                )

    @property
    def fsq_levels(self) -> tuple[int, ...]:
        """Values of each channel. Raises ScaMoError for quantizer = "vq"."""
        if self.quantizer != "fsq":
            raise ScaMoError(f"quantizer = {self.quantizer!r} has no FSQ levels")
        return self.levels if self.levels is not None else FSQ_LEVELS[self.codebook_size]

    @property
    def codes(self) -> int:
        """Number of codes K of an index: for "fsq" the product of the levels (64,000 for 65536)."""
        if self.quantizer == "vq":
            return self.codebook_size
        product = 1
        for level in self.fsq_levels:
            product *= level
        return product

    @property
    def indices_per_token(self) -> int:
        """Indices Q of a token: more than one with groups or residual stages."""
        return self.groups * self.residual

    @property
    def bits_per_token(self) -> float:
        """Q log2 K."""
        return self.indices_per_token * math.log2(self.codes)

    @property
    def downsampling(self) -> int:
        """Frames per token."""
        return 2**self.downsample_stages


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """Tokenizer training (paper Tab. 4 and the defaults that the released code inherits).

    feature_weight: weight of the mean over all features.
    position_weight: extra weight of the positions, features 4:67 of 263 (the released code's 0.5).
    extremity_weight: extra weight of the positions of ankles, feet and wrists, which gestures are made with.
    root_weight: extra weight of the root's features that paths come from, 0:4 of 263: velocities and height.
    saturation_weight: weight of the squared excess of the latents over 1.5, where tanh has lost its slope;
        above 0 it keeps a codebook alive under learning rates that are high for the width.
    schedule: of the rate after the warm-up: "step" (times `decay` from `milestone` of the run on) or "cosine"
        (down to `decay` of the rate; `milestone` is not used).
    latent_std: above 0, the start for short runs: Kaiming weights, and latents scaled to this deviation on
        the first batch. 0 keeps torch's default initialisation, as released.
    noise_ratio: share of the run, at its start, in which noise of one level replaces the rounding; for "fsq"
        without residual stages.
    ema_decay: for "vq", of the moving averages that are its codebook.
    commitment_weight: for "vq", weight of the squared distance of the latents from their entries.
    reset_below: for "vq", an entry that is chosen less often than this, in the moving average of choices per
        step, is replaced by a random latent of the batch; 0 for never.
    reset_averages: for "vq", the averages of a replaced entry begin anew too, with its latent and the count
        `reset_below`, so that being chosen once a step keeps it; false keeps them, as released.
    quantizer_dropout: probability that a step uses only the first of the residual stages, a random number.
    precision: of the convolutions: float32, bfloat16, or auto (bfloat16 where matrix units make it fast).
    """

    steps: int = 200_000
    batch_size: int = 256
    window: int = 64
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.003
    schedule: str = "step"
    milestone: float = 0.6
    decay: float = 0.05
    latent_std: float = 0.0
    noise_ratio: float = 0.0
    ema_decay: float = 0.99
    commitment_weight: float = 0.02
    reset_below: float = 1.0
    reset_averages: bool = False
    quantizer_dropout: float = 0.0
    feature_weight: float = 1.0
    position_weight: float = 0.5
    extremity_weight: float = 0.0
    root_weight: float = 0.0
    saturation_weight: float = 0.0
    precision: str = "float32"
    clip_norm: float = 0.0
    validate_every: int = 5000
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "window", "learning_rate", "validate_every", "log_every")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ScaMoError(f"precision = {self.precision!r}: expected auto, float32 or bfloat16")
        if self.schedule not in ("step", "cosine"):
            raise ScaMoError(f"schedule = {self.schedule!r}: expected step or cosine")
        if not 0 <= self.noise_ratio <= 1:
            raise ScaMoError(f"noise_ratio = {self.noise_ratio}: expected a share of the run in [0, 1]")
        _not_negative(self, "commitment_weight", "reset_below")
        if not 0 <= self.ema_decay < 1:
            raise ScaMoError(f"ema_decay = {self.ema_decay}: expected a decay in [0, 1)")
        if not 0 <= self.quantizer_dropout <= 1:
            raise ScaMoError(
                f"quantizer_dropout = {self.quantizer_dropout}: expected a probability in [0, 1]"
            )


@dataclass(frozen=True)
class TokenizerRunConfig:
    """What `scamo tokenizer train` reads: [tokenizer] and [training]."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)


@dataclass(frozen=True)
class EvaluatorConfig:
    """The two encoders of our own evaluator.

    feature_dim, text_width, max_frames: taken from the dataset when they are 0.
    layers: residual blocks at a quarter of the frame rate, dilations 1, base, base^2, 1, ...
    max_frames: longer motions are cut; the longest of the dataset's representation, 196 of 263 features.
    variant: of the features; training takes it from the dataset.
    """

    feature_dim: int = 0
    text_width: int = 0
    width: int = 256
    embedding: int = 256
    layers: int = 3
    dilation_base: int = 3
    dropout: float = 0.1
    max_frames: int = 0
    variant: str = "original"

    def __post_init__(self) -> None:
        _not_negative(self, "feature_dim", "text_width", "max_frames")
        _positive(self, "width", "embedding", "layers", "dilation_base")
        if not 0 <= self.dropout < 1:
            raise ScaMoError(f"dropout = {self.dropout}: expected a probability in [0, 1)")


@dataclass(frozen=True)
class EvaluatorTrainingConfig:
    """Training of our own evaluator.

    same_text: captions whose mean states, less their common mean, have a larger cosine than this are no
        negatives of each other.
    crop: shortest part of a motion that is drawn, as a share of it.
    noise: deviation of the noise on normalised features. drop_pieces: probability that a word piece's state
    is left out.
    """

    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    same_text: float = 0.7
    crop: float = 0.6
    noise: float = 0.1
    drop_pieces: float = 0.1
    clip_norm: float = 1.0
    validate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "learning_rate", "same_text", "crop", "validate_every")
        for name in ("same_text", "crop"):
            if getattr(self, name) > 1:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected a value in (0, 1]")
        if self.batch_size < 2:
            raise ScaMoError(f"batch_size = {self.batch_size}: a contrastive loss needs at least 2")


@dataclass(frozen=True)
class EvaluatorRunConfig:
    """What `scamo evaluator train` reads: [evaluator] and [training]."""

    evaluator: EvaluatorConfig = field(default_factory=EvaluatorConfig)
    training: EvaluatorTrainingConfig = field(default_factory=EvaluatorTrainingConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The text-prefix transformer (paper section 3.2 and Tab. 1).

    size names a row of Tab. 1; layers, heads and width override it, and stand alone when size is "".
    codes (the number K of motion tokens) and text_width are taken from the dataset when they are 0.
    text: "words", all text states as a prefix (ScaMo), or "sentence", their mean as a prefix of one position:
        a sentence embedding and causal attention (the T2M-GPT style of the paper's Tab. 2).
    prefix: text states see each other in both directions, "bidirectional" (ScaMo), or only those before them,
        "causal". A sentence's one position is the same either way.
    null_text: the model was trained without text now and then (training.drop_text, by which the trainer sets
        it), so that generation can guide it.
    """

    size: str = "44M"
    layers: int = 0
    heads: int = 0
    width: int = 0
    codes: int = 0
    text_width: int = 0
    max_text: int = 150
    max_motion: int = 50
    text: str = "words"
    prefix: str = "bidirectional"
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    null_text: bool = False

    def __post_init__(self) -> None:
        if self.size and self.size not in MODEL_SIZES:
            raise ScaMoError(f"size = {self.size!r} is not known: use one of {', '.join(MODEL_SIZES)}, or ''")
        if self.size:
            layers, heads, width = MODEL_SIZES[self.size]
            for name, value in (("layers", layers), ("heads", heads), ("width", width)):
                object.__setattr__(self, name, getattr(self, name) or value)
        _positive(self, "layers", "heads", "width", "max_text", "max_motion")
        _one_of(self, "text", "words", "sentence")
        _one_of(self, "prefix", "bidirectional", "causal")
        if self.width % self.heads:
            raise ScaMoError(f"width = {self.width} does not divide by heads = {self.heads}")
        if self.head_dim % 4 or self.head_dim > 128:
            raise ScaMoError(
                f"width / heads = {self.head_dim}: the attention kernels need a multiple of 4 up to 128"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """SwiGLU width: 8/3 of the width, rounded up to a multiple of 256."""
        return -(-int(8 * self.width / 3) // 256) * 256

    @property
    def max_positions(self) -> int:
        """Text, motion and EOS: 201 in the paper."""
        return self.max_text + self.max_motion + 1

    def both_ways(self, prefixes: Any) -> Any:
        """Of prefix lengths, an array or tensor, what is read in both directions: all, or 0 of each."""
        return prefixes if self.prefix == "bidirectional" else prefixes * 0


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens and the text states come from: a dataset folder and the names inside it."""

    dataset: str = ""
    tokens: str = ""
    text: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ScaMoError("data.dataset is missing: the folder that `scamo prepare` wrote")


@dataclass(frozen=True)
class TrainingConfig:
    """Transformer training (paper Tab. 4). A step is `micro_batches` packed batches over all ranks.

    micro_batch_tokens: positions (text + motion) of one packed micro-batch at most.
    micro_batches: micro-batches of a step over all ranks; ranks x accumulation must equal it.
    drop_token: probability that a sample loses one token at its head or tail (released code: 1/3).
    drop_text: probability that a sample loses its text, for classifier-free guidance.
    weight_decay: of matrices; norms, biases and the embedding have none.
    ema_decay: of the moving average of the weights, which is exported beside them; 0 for none.
    checkpoint_activations: keep only the blocks' inputs, and compute the blocks again in the backward.
    kernels: the implementation of all kernels: auto, triton or torch.
    keep_checkpoints: the newest so many stay; keep_every: those of steps that it divides stay too (0: none).
    peak_tflops: dense bfloat16 TFLOP/s of one device, for MFU; 0 takes what its maker states, if known.
    """

    run: str = "runs/scamo"
    steps: int = 100_000
    micro_batch_tokens: int = 16_384
    micro_batches: int = 1
    learning_rate: float = 2e-4
    min_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-6
    warmup_ratio: float = 0.1
    clip_norm: float = 1.0
    drop_token: float = 1 / 3
    drop_text: float = 0.0
    ema_decay: float = 0.0
    checkpoint_activations: bool = False
    kernels: str = "auto"
    validate_every: int = 1000
    validate_batches: int = 0
    save_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    log_every: int = 10
    peak_tflops: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(
            self, "steps", "micro_batch_tokens", "micro_batches", "learning_rate", "validate_every",
            "save_every", "keep_checkpoints", "log_every",
        )  # fmt: skip
        _one_of(self, "kernels", "auto", "triton", "torch")
        _not_negative(self, "keep_every", "peak_tflops", "validate_batches", "weight_decay", "clip_norm")
        if self.keep_every % self.save_every:
            raise ScaMoError(
                f"keep_every = {self.keep_every}: expected a multiple of save_every = {self.save_every}"
            )
        for name in ("drop_token", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected a probability in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ScaMoError(f"ema_decay = {self.ema_decay}: expected a decay in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """What `train.py --config` reads: [data], [model] and [training]."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ScaMoError(f"{name} = {getattr(config, name)}: expected a value above 0")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ScaMoError(f"{name} = {getattr(config, name)}: expected 0 or more")


def _one_of(config: Any, name: str, *choices: str) -> None:
    if getattr(config, name) not in choices:
        raise ScaMoError(f"{name} = {getattr(config, name)!r}: expected {' or '.join(choices)}")


def load_config(cls: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> T:
    """Read `cls` from a TOML file; `overrides` are "section.key=value" strings (values in TOML syntax).

    Raises ScaMoError naming the file and the key: unreadable TOML, an unknown or missing key, a wrong type.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScaMoError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ScaMoError(f"override {override!r}: expected section.key=value")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value  # a bare word is a string
        *sections, name = key.strip().split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ScaMoError(f"override {override!r}: {section} is not a section")
        target[name] = parsed
    return from_dict(cls, data, where=str(path))


def from_dict(cls: type[T], data: dict[str, Any], *, where: str = "config") -> T:
    """Build the dataclass `cls` from a plain dict, strictly. Raises ScaMoError naming `where` and the key."""
    return _build(cls, data, where, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict of a config (tuples become lists): what JSON stores and `from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _build(cls: type[T], data: Any, where: str, prefix: str) -> T:
    if not isinstance(data, dict):
        raise ScaMoError(f"{where}: {prefix or 'the file'}: expected a table of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(fields)}"
            raise ScaMoError(f"{where}: unknown key {prefix}{key}{hint}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], where, prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ScaMoError(f"{where}: missing key {prefix}{name}")
    try:
        return cls(**values)
    except ScaMoError as error:
        raise ScaMoError(f"{where}: {'[' + prefix[:-1] + '] ' if prefix else ''}{error}") from None


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, key + ".")
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        arguments = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise ScaMoError(f"{where}: {key} = {value!r}: expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ScaMoError(f"{where}: {key} = {value!r}: expected {len(arguments)} values")
        return tuple(_convert(arguments[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ScaMoError(f"{where}: {key} = {value!r}: expected {hint.__name__}")
    return value
