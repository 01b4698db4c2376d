"""Training and measuring of ScaleMoGen's tokenizer: whole motions, SmoothL1, AdamW."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from scamo.config import TokenizerTrainingConfig, to_dict
from scamo.data.dataset import MotionDataset
from scamo.data.storage import whole_folder
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.motion.measures import acceleration_error, mpjpe, root_error, velocity_error
from scamo.motion.representation import Representation
from scamo.tokenizers.encode import BATCH_FRAMES, ItemFeatures, length_groups, open_matching
from scamo.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer, latents_of
from scamo.tokenizers.skeletal import DOWNSAMPLING
from scamo.tokenizers.train import feature_weights, learning_rate, use_bfloat16


@dataclass(frozen=True)
class MultiscaleTrainingConfig:
    """The recipe; the defaults are the released code's, but for `steps`, which it does not name.

    frames: motions longer than this are cut to a random run of it; 0 for the tokenizer's max_frames.
    schedule: of the rate after the warm-up, "step" (times `decay` from each of `milestones`, shares of the
        run, on) or "cosine" (down to `decay`; milestones are not used).
    latent_norm: above 0, the start for short runs: latents scaled to this length on the first batch.
    scale_dropout: probability that a step leaves out a scale, of each but the last.
    feature_weight, position_weight, root_weight, velocity_weight: of the mean over all features, and extra
        of the positions, the root's features and the velocities.
    bitwise_weight: of the quantiser's commitment and entropy.
    precision: of the convolutions: float32, bfloat16, or auto (bfloat16 where matrix units make it fast).
    """

    steps: int = 300_000
    batch_size: int = 64
    frames: int = 0
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_ratio: float = 1 / 150
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.5, 5 / 6)
    decay: float = 0.3
    latent_norm: float = 0.0
    scale_dropout: float = 0.5
    feature_weight: float = 1.0
    position_weight: float = 0.0
    root_weight: float = 0.5
    velocity_weight: float = 0.5
    bitwise_weight: float = 4.0
    clip_norm: float = 0.5
    precision: str = "float32"
    validate_every: int = 5000
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.shared  # says what is wrong with steps, batch_size, learning_rate, schedule, ...
        for name in ("frames", "latent_norm", "clip_norm", "bitwise_weight"):
            if getattr(self, name) < 0:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.scale_dropout <= 1:
            raise ScaMoError(f"scale_dropout = {self.scale_dropout}: expected a probability in [0, 1]")

    @property
    def shared(self) -> TokenizerTrainingConfig:
        """What this recipe has in common with that of the other tokenizers, but for the milestones."""
        return TokenizerTrainingConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_ratio=self.warmup_ratio,
            schedule=self.schedule,
            decay=self.decay if self.schedule == "cosine" else 1.0,
            feature_weight=self.feature_weight,
            position_weight=self.position_weight,
            root_weight=self.root_weight,
            precision=self.precision,
            validate_every=self.validate_every,
            log_every=self.log_every,
        )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        rate = learning_rate(self.shared, step)
        if self.schedule == "step":
            rate *= self.decay ** sum(step >= share * self.steps for share in self.milestones)
        return rate


@dataclass(frozen=True)
class MultiscaleRunConfig:
    """What `train_multiscale` reads: [tokenizer] and [training]."""

    tokenizer: MultiscaleConfig = field(default_factory=MultiscaleConfig)
    training: MultiscaleTrainingConfig = field(default_factory=MultiscaleTrainingConfig)


class Motions:
    """Batches of a split's clips, each as likely as any other; batch `step` is a function of (seed, step).

    Clips longer than `frames` are cut to a random run of so many. clips: how many there are. Raises
    ScaMoError for a split without clips.
    """

    def __init__(
        self, dataset: MotionDataset, split: str, *, frames: int, batch_size: int, seed: int
    ) -> None:
        self.dataset, self.frames, self.batch_size, self.seed = dataset, frames, batch_size, seed
        self._clips = np.flatnonzero(np.array([s == split for s in dataset.clip_splits], dtype=bool))
        self._lengths = np.diff(dataset.clip_offsets)[self._clips]
        self.clips = len(self._clips)
        if not self.clips:
            raise ScaMoError(f"{dataset.folder}: no clips in the split {split}")

    def draw(self, step: int) -> NDArray[np.int64]:
        """The motions of a step: int64 (batch_size, 3) of clip, first frame and frames."""
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(self.clips, size=self.batch_size)
        lengths = np.minimum(self._lengths[chosen], self.frames)
        first = rng.integers(self._lengths[chosen] - lengths + 1)
        return np.stack([self._clips[chosen], first, lengths], axis=1)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Raw features float32 (batch_size, longest, C), 0 past a motion's end, and lengths int64."""
        drawn = self.draw(step)
        out = np.zeros((len(drawn), drawn[:, 2].max(), self.dataset.feature_dim), dtype=np.float32)
        for row, (clip, first, length) in zip(out, drawn, strict=True):
            row[:length] = self.dataset.clip_features(clip)[first : first + length]
        return torch.from_numpy(out), torch.from_numpy(drawn[:, 2].copy())


def loss_weights(config: MultiscaleTrainingConfig, feature_dim: int) -> Tensor:
    """Weight of each normalised feature in the loss, float32 (C,): see `feature_weights`, and velocities."""
    weights = feature_weights(config.shared, feature_dim)
    velocities = Representation.of(feature_dim).velocities
    weights[velocities] += config.velocity_weight / (velocities.stop - velocities.start)
    return weights


def masked_loss(made: Tensor, true: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """SmoothL1 of normalised features (B, T, C), weighted per feature (C,), averaged over all real frames."""
    there = torch.arange(true.shape[1], device=true.device) < lengths[:, None]
    frames = (F.smooth_l1_loss(made, true, reduction="none") * weights).sum(-1)
    return frames.masked_fill(~there, 0).sum() / there.sum()


@torch.no_grad()
def scale_latents(model: MultiscaleTokenizer, features: Tensor, lengths: Tensor, norm: float) -> None:
    """Scale and shift `project_in` so that the latents of raw features have mean 0 and this root mean square.

    Codes have length 1 on every scale. Left alone, latents start far shorter: each scale then takes away
    more than there is, and the next ones only undo it.
    """
    z = model.latents(features, lengths)
    there = torch.arange(z.shape[1]) < latents_of(lengths)[:, None]
    z = z[there].flatten(0, -2)
    mean = z.mean(0)
    scale = norm / (z - mean).square().sum(-1).mean().sqrt().clamp_min(1e-6)
    model.project_in.weight.mul_(scale)
    model.project_in.bias.sub_(mean).mul_(scale)


@torch.inference_mode()
def multiscale_metrics(
    tokenizer: MultiscaleTokenizer,
    motions: Sequence[NDArray[np.float32]],
    lengths: Sequence[int] | NDArray,
    *,
    fps: float,
    scales: int | None = None,
    batch_frames: int = BATCH_FRAMES,
) -> dict[str, Any]:
    """Encode and decode motions and compare, as `evaluate.reconstruction_metrics` does.

    motions: raw features (T, C); lengths: their T. Frames past whole latents, and past max_frames, are not
    compared. scales: decode only the first so many. Returns motions, frames, too_short, too_long, l1,
    mpjpe_mm, root_mm, velocity_mm_s, acceleration_mm_s2, tokens (of all scales) and bit_entropy: the mean
    over scales and channels of a bit's entropy, in bits; 1 where all are used evenly. Raises ScaMoError
    when nothing is long enough.
    """
    config, device = tokenizer.config, tokenizer.mean.device
    representation = Representation.of(config.feature_dim)
    kept = np.minimum(np.asarray(lengths), config.max_frames) // DOWNSAMPLING * DOWNSAMPLING
    sums: dict[str, float] = defaultdict(float)
    frames = steps = bends = compared = tokens = 0
    channels = torch.arange(config.bits, dtype=torch.int32, device=device)
    ones = torch.zeros(len(config.scales), config.bits, dtype=torch.float64, device=device)
    counts = torch.zeros(len(config.scales), 1, dtype=torch.float64, device=device)
    for batch in length_groups(kept, DOWNSAMPLING, batch_frames):
        length = int(kept[batch[0]])
        raw = np.stack([motions[index][:length] for index in batch])
        if not np.isfinite(raw).all():
            bad = batch[int(np.argmin(np.isfinite(raw).all(axis=(1, 2))))]
            raise ScaMoError(f"motion {bad}: a feature is not finite")
        features = torch.from_numpy(raw).to(device)
        size, width = len(batch), features.shape[2]
        many = torch.full((size,), length, device=device)
        bits, valid = tokenizer.encode(features, many), tokenizer.valid(many)
        decoded = tokenizer.decode(bits, many, scales=scales)
        for number, span in enumerate(tokenizer.quantizer.slices):
            own = bits[:, span][valid[:, span]]
            ones[number] += (own[:, None] >> channels & 1).sum(0)
            counts[number] += len(own)
        tokens += int(valid.sum())
        true, made = (representation.to_joints(one.double()) for one in (features, decoded))
        now, step, bend = (size * max(length - n, 0) for n in range(3))
        compared, frames, steps, bends = compared + size, frames + now, steps + step, bends + bend
        sums["l1"] += float(((decoded - features) / tokenizer.std).abs().double().sum()) / width
        sums["mpjpe_mm"] += now * mpjpe(made, true)
        sums["root_mm"] += now * root_error(made, true)
        sums["velocity_mm_s"] += step * velocity_error(made, true, fps)
        sums["acceleration_mm_s2"] += bend * acceleration_error(made, true, fps)
    if compared == 0:
        raise ScaMoError(f"none of the {len(lengths)} motions has the {DOWNSAMPLING} frames of a latent")
    share = ones / counts
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)
    return {
        "motions": compared,
        "frames": frames,
        "too_short": len(lengths) - compared,
        "too_long": int((np.asarray(lengths) > config.max_frames).sum()),
        "l1": sums["l1"] / frames,
        "mpjpe_mm": sums["mpjpe_mm"] / frames,
        "root_mm": sums["root_mm"] / frames,
        "velocity_mm_s": sums["velocity_mm_s"] / max(steps, 1),
        "acceleration_mm_s2": sums["acceleration_mm_s2"] / max(bends, 1),
        "tokens": tokens,
        "bit_entropy": float(entropy.mean()),
    }


def evaluate_multiscale(
    folder: str | Path,
    dataset_folder: str | Path,
    *,
    split: str = "val",
    scales: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Reconstruction and use of the bits of a trained multi-scale tokenizer on a split of a dataset.

    Args:
        folder: the tokenizer.
        dataset_folder: the dataset.
        split: train, val or test; every item of it is compared.
        scales: decode only the first so many.
        device: auto, cpu or cuda.

    Returns:
        `multiscale_metrics` and split, scales, tokens_per_second and bits_per_second of motion, all scales.

    Raises:
        ScaMoError: a folder that does not open or fit, an unknown or empty split, or no such scale.
    """
    tokenizer = MultiscaleTokenizer.load(folder, resolve_device(device))
    dataset = open_matching(cast(Any, tokenizer), dataset_folder)
    motions = ItemFeatures(dataset, dataset.items(split))
    if not len(motions):
        raise ScaMoError(f"{dataset.folder}: the split {split} is empty")
    metrics = multiscale_metrics(tokenizer, motions, motions.lengths, fps=dataset.fps, scales=scales)
    rate = metrics["tokens"] * dataset.fps / metrics["frames"]
    head = {
        "split": split,
        "scales": scales or len(tokenizer.config.scales),
        "tokens_per_second": rate,
        "bits_per_second": rate * tokenizer.config.bits,
    }
    return head | metrics


def train_multiscale(
    config: MultiscaleRunConfig,
    dataset_folder: str | Path,
    out_folder: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a multi-scale tokenizer on the train split and write it to OUT, with its log.jsonl.

    The weights kept are those of the last step; validation only reports. At every validation but the last the
    tokenizer so far is written to OUT.unfinished, which a run that ends well removes. On the CPU the same
    config, data and threads give the same bits.

    Args:
        config: the network and the recipe.
        dataset_folder: the dataset.
        out_folder: the tokenizer folder to write.
        device: auto, cpu or cuda.
        threads: CPU threads; None leaves torch's number.
        overwrite: replace an existing tokenizer.
        progress: show a bar and print each validation.

    Returns:
        The last validation's metrics (see `multiscale_metrics`; empty without a val split) and the loss.

    Raises:
        ScaMoError: the dataset does not open or fit, its train split is empty, OUT exists, or the loss stops
            being finite; OUT is then not written.
    """
    out = Path(out_folder)
    if out.exists() and not overwrite:
        raise ScaMoError(f"{out} exists: choose another name, or ask for it to be overwritten")
    where = resolve_device(device)
    dataset = MotionDataset.open(dataset_folder)
    if config.tokenizer.feature_dim not in (0, dataset.feature_dim):
        raise ScaMoError(
            f"{dataset.folder}: {dataset.feature_dim} features a frame, the config has "
            f"tokenizer.feature_dim = {config.tokenizer.feature_dim}: leave it out"
        )
    config = replace(config, tokenizer=replace(config.tokenizer, variant=dataset.variant))
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with whole_folder(out, overwrite=overwrite) as temporary:
            run = _Run(config, dataset, where, progress)
            unfinished = out.with_name(out.name + ".unfinished")
            report = run.train(unfinished)
            run.write(temporary, finished=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        torch.set_num_threads(threads_before)
    return report


class _Run:
    """One training: what its steps, validations and folders share."""

    def __init__(
        self, config: MultiscaleRunConfig, dataset: MotionDataset, device: torch.device, progress: bool
    ) -> None:
        training, self.dataset = config.training, dataset
        self.training, self.device, self.progress = training, device, progress
        self.bfloat16 = use_bfloat16(training.precision, device)
        longest = config.tokenizer.max_frames
        self.motions = Motions(
            dataset,
            "train",
            frames=min(training.frames or longest, longest),
            batch_size=training.batch_size,
            seed=training.seed,
        )
        self.validation = ItemFeatures(dataset, dataset.items("val"))
        self.step = 0
        self.log: list[dict[str, Any]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = MultiscaleTokenizer(config.tokenizer, dataset.mean, dataset.std)
        if training.latent_norm > 0:
            scale_latents(self.model.eval(), *self.motions.batch(0), training.latent_norm)
            self.model.train()
        self.model.to(device)
        self.weights = loss_weights(training, dataset.feature_dim).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=training.betas, weight_decay=training.weight_decay, fused=True
        )

    def train(self, unfinished: Path) -> dict[str, Any]:
        training, report = self.training, {}
        self._say(f"train: {self.motions.clips} clips, at most {self.motions.frames} frames of each")
        if not len(self.validation):
            self._say("the dataset has no val split: nothing will be validated")
        total, since, frames, started = torch.zeros((), device=self.device), 0, 0, time.perf_counter()
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            tqdm(total=training.steps, desc="tokenizer", unit="step", disable=not self.progress) as bar,
        ):
            while self.step < training.steps:
                dropout = np.random.default_rng((training.seed, self.step, 2))
                torch.manual_seed(int(dropout.integers(2**63)))
                loss, seen = self._update()
                total += loss
                self.step, since, frames = self.step + 1, since + 1, frames + seen
                bar.update()
                last = self.step == training.steps
                validate = last or self.step % training.validate_every == 0
                if not (validate or self.step % training.log_every == 0):
                    continue
                mean = float(total) / since
                if not np.isfinite(mean):
                    self._refuse(since)
                speed = frames / (time.perf_counter() - started)
                rate = training.rate(self.step - 1)
                self._record(loss=mean, learning_rate=rate, frames_per_second=round(speed))
                bar.set_postfix(loss=f"{mean:.4f}", frames_s=f"{speed:,.0f}")
                if validate and len(self.validation):
                    report = self._validate()
                if last:
                    report = report | {"loss": mean}
                elif validate:
                    with whole_folder(unfinished, overwrite=unfinished.exists()) as folder:
                        self.write(folder, finished=False)
                total.zero_()
                since, frames, started = 0, 0, time.perf_counter()
        return report

    def _update(self) -> tuple[Tensor, int]:
        """One step of the optimiser; returns its loss, detached, and the frames that it saw."""
        training = self.training
        features, lengths = self.motions.batch(self.step)
        seen = int(lengths.sum())
        true, lengths = self.model.normalize(features.to(self.device)), lengths.to(self.device)
        rng = np.random.default_rng((training.seed, self.step, 1))
        count = len(self.model.config.scales)
        skip = [*(rng.random(count - 1) < training.scale_dropout).tolist(), False]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            made = self.model(true, lengths, skip)
        loss = masked_loss(made.features, true, lengths, self.weights) + training.bitwise_weight * made.loss
        self.optimizer.zero_grad()
        loss.backward()
        if training.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = training.rate(self.step)
        self.optimizer.step()
        return loss.detach(), seen

    def _validate(self) -> dict[str, Any]:
        self.model.eval()
        lengths = self.validation.lengths
        metrics = multiscale_metrics(self.model, self.validation, lengths, fps=self.dataset.fps)
        self.model.train()
        self._record(validation=metrics)
        self._say(
            f"step {self.step}: L1 {metrics['l1']:.4f}, MPJPE {metrics['mpjpe_mm']:.1f} mm, "
            f"{metrics['bit_entropy']:.3f} bits of entropy a bit"
        )
        return metrics

    def _refuse(self, since: int) -> None:
        """Stop at a loss that is not finite, and say where it comes from."""
        message = f"the loss is not finite between steps {self.step - since} and {self.step - 1}"
        for step in range(self.step - since, self.step):
            bad = ~self.motions.batch(step)[0].isfinite().all(-1).all(-1)
            if bad.any():
                clip = self.motions.draw(step)[int(bad.int().argmax()), 0]
                name = self.dataset.clip_names[clip]
                raise ScaMoError(f"{message}: clip {name} has features that are not finite")
        rate = self.training.rate(self.step - 1)
        raise ScaMoError(f"{message}: lower training.learning_rate (now {rate:g}) or training.clip_norm")

    def _record(self, **values: Any) -> None:
        self.log.append({"step": self.step} | values)

    def _say(self, message: str) -> None:
        if self.progress:
            tqdm.write(message)

    def write(self, folder: Path, *, finished: bool) -> None:
        """The tokenizer as it is now, its log and where it comes from, into an existing folder."""
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        (folder / "log.jsonl").write_text(lines, encoding="utf-8")
        provenance = {
            "training": to_dict(self.training),
            "dataset": {"name": self.dataset.folder.name, "manifest_sha256": self.dataset.manifest_sha256},
            "clips": self.motions.clips,
            "step": self.step,
            "finished": finished,
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "torch": torch.__version__,
        }
        self.model.write_files(folder, provenance=provenance)
