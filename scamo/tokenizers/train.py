"""Training of the motion tokenizers, all by one recipe: random windows, SmoothL1, AdamW (paper Tab. 4).

FSQ has the reconstruction loss alone (eq. 4); VQ adds the commitment (eq. 2), and averages move its codebook.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from scamo.config import TokenizerRunConfig, TokenizerTrainingConfig, to_dict
from scamo.data.dataset import MotionDataset
from scamo.data.storage import whole_folder
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.representation import Representation
from scamo.tokenizers.autoencoder import Conv, MotionAutoencoder, ResidualBlock, kind_of
from scamo.tokenizers.average import CodebookAverage
from scamo.tokenizers.encode import ItemFeatures
from scamo.tokenizers.evaluate import COLLAPSE_SHARE, reconstruction_metrics
from scamo.tokenizers.vq import VQ

# Each of up to 8 levels is reached within |z| < 1.43; here the slope of tanh is 0.18.
SATURATED = 1.5


class Windows:
    """Batches of random windows of a split's clips; batch `step` is a function of (seed, step) alone.

    Every window of the split is equally likely, so a long clip is drawn more often. clips: how many are long
    enough; skipped: how many are not; windows: how many different windows there are.

    Raises:
        ScaMoError: no clip of the split is as long as a window.
    """

    def __init__(
        self, dataset: MotionDataset, split: str, *, window: int, batch_size: int, seed: int
    ) -> None:
        self.dataset, self.window, self.batch_size, self.seed = dataset, window, batch_size, seed
        clips = np.array([s == split for s in dataset.clip_splits], dtype=bool)
        lengths = np.diff(dataset.clip_offsets)
        chosen = np.flatnonzero(clips & (lengths >= window))
        self.clips, self.skipped = len(chosen), int(clips.sum()) - len(chosen)
        if not self.clips:
            longest = int(lengths[clips].max()) if clips.any() else 0
            raise ScaMoError(
                f"{dataset.folder}: no clip of the split {split} has the {window} frames of a window; "
                f"the longest of {int(clips.sum())} has {longest}"
            )
        self._clips = chosen
        self._ends = np.cumsum(lengths[chosen] - window + 1)
        self.windows = int(self._ends[-1])

    def draw(self, step: int) -> NDArray[np.int64]:
        """The windows of a step: int64 (batch_size, 2) of clip and first frame."""
        numbers = np.random.default_rng((self.seed, step)).integers(self.windows, size=self.batch_size)
        place = np.searchsorted(self._ends, numbers, side="right")
        first = numbers - np.where(place > 0, self._ends[place - 1], 0)
        return np.stack([self._clips[place], first], axis=1)

    def batch(self, step: int) -> Tensor:
        """Raw features float32 (batch_size, window, C) of a step."""
        out = np.empty((self.batch_size, self.window, self.dataset.feature_dim), dtype=np.float32)
        for row, (clip, first) in zip(out, self.draw(step), strict=True):
            row[:] = self.dataset.clip_features(clip)[first : first + self.window]
        return torch.from_numpy(out)


def feature_weights(config: TokenizerTrainingConfig, feature_dim: int) -> Tensor:
    """Weight of each normalised feature in the loss, float32 (C,): 1/C, and more for positions and root.

    With the defaults the loss is the released code's: SmoothL1 averaged over the features, plus half the
    SmoothL1 averaged over the positions, features 4:67 of 263. Where positions and root are, the
    representation says; features of an unknown one have none to weigh.
    """
    weights = torch.full((feature_dim,), config.feature_weight / feature_dim)
    representation = Representation.find(feature_dim)
    if representation is not None:
        columns = torch.arange(feature_dim)
        for part, weight in (
            (columns[representation.positions], config.position_weight),
            (torch.tensor(extremities(representation)), config.extremity_weight),
            (columns[representation.root], config.root_weight),
        ):
            weights[part] += weight / len(part)
    return weights


def extremities(representation: Representation) -> list[int]:
    """Columns of the positions of ankles, feet and wrists."""
    body, start = Body.of(representation.n_joints), representation.positions.start
    joints = [joint for foot in body.feet for joint in foot] + list(body.wrists)
    return [
        start + 3 * (joint - representation.first_position) + axis
        for joint in sorted(joints)
        for axis in range(3)
    ]


def reconstruction_loss(made: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """SmoothL1 of normalised features (B, T, C), weighted per feature (C,), averaged over B and T."""
    return (torch.nn.functional.smooth_l1_loss(made, true, reduction="none") * weights).sum(-1).mean()


def saturation(z: Tensor) -> Tensor:
    """Mean squared excess of |z| over SATURATED: (..., channels) -> a number.

    Beyond, tanh is flat: all motions fall on one code, and no gradient brings them back.
    """
    return (z.abs() - SATURATED).relu().square().mean()


def learning_rate(config: TokenizerTrainingConfig, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then by config.schedule.

    "step": constant, times `decay` from `milestone` of the run on. "cosine": down to `decay` at the end.
    """
    warmup = round(config.warmup_ratio * config.steps)
    rate = config.learning_rate * min(1.0, (step + 1) / (warmup + 1))
    if config.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, config.steps - warmup)))
        return rate * (config.decay + (1 - config.decay) * fall)
    return rate * config.decay if step >= config.milestone * config.steps else rate


@torch.no_grad()
def spread_latents(
    model: MotionAutoencoder, normalized: Tensor, std: float, generator: torch.Generator
) -> None:
    """Start a short training with latents that use the codebook.

    Kaiming weights for every convolution and small residual branches, then `project_in` (of a VQ, which has
    none, the encoder's last convolution) scaled and shifted so that on `normalized` (B, T, C) each channel
    has mean 0 and deviation `std`. Left alone, FSQ's latents start within a twentieth of a level, and
    hundreds of steps pass before the rounding gives a signal.
    """
    for module in model.modules():
        if isinstance(module, Conv):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(cast(Tensor, module.bias))
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.2)
    z = model.encoder(normalized)
    last = cast(nn.Conv1d | nn.Linear, model.encoder.model[-1])
    if not isinstance(model.quantizer, VQ):
        last = model.quantizer.project_in
        z = last(z)
    z = z.flatten(0, 1)
    scale = std / z.std(0).clamp_min(1e-6)
    last.weight.mul_(scale.view(-1, *[1] * (last.weight.dim() - 1)))
    cast(Tensor, last.bias).sub_(z.mean(0)).mul_(scale)


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the convolutions run in bfloat16. "auto": on GPUs that have it and on CPUs with AMX.

    Raises ScaMoError for "bfloat16" on a GPU without it.
    """
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bfloat16" and not has:
            raise ScaMoError(f"precision = 'bfloat16': {torch.cuda.get_device_name(device)} does not have it")
    else:
        has = torch.cpu.get_capabilities().get("amx_bf16", False)
    return precision == "bfloat16" or (precision == "auto" and has)


def check_recipe(config: TokenizerRunConfig) -> None:
    """Raises ScaMoError, naming both keys, for a training that the quantiser has no use for."""
    tokenizer, training = config.tokenizer, config.training
    kind = f"tokenizer.quantizer = {tokenizer.quantizer!r}"
    if training.noise_ratio > 0 and tokenizer.quantizer == "vq":
        raise ScaMoError(f"training.noise_ratio = {training.noise_ratio} with {kind}: there is no rounding")
    if training.noise_ratio > 0 and tokenizer.residual > 1:
        raise ScaMoError(
            f"training.noise_ratio = {training.noise_ratio} with tokenizer.residual = {tokenizer.residual}: "
            "noise replaces the rounding of one stage only"
        )
    if training.saturation_weight > 0 and tokenizer.quantizer == "vq":
        raise ScaMoError(
            f"training.saturation_weight = {training.saturation_weight} with {kind}: there is no tanh"
        )
    if training.quantizer_dropout > 0 and tokenizer.residual == 1:
        raise ScaMoError(
            f"training.quantizer_dropout = {training.quantizer_dropout} with tokenizer.residual = 1: there "
            "are no stages to leave out"
        )


def train_tokenizer(
    config: TokenizerRunConfig,
    dataset_folder: str | Path,
    out_folder: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a tokenizer on the train split and write it to OUT, with its log.jsonl.

    The weights kept are those of the last step, whose rate has decayed; validation only reports. At every
    validation but the last the tokenizer so far is written to OUT.unfinished (whole and loadable), which a
    run that ends well removes. On the CPU the same config, data, threads and precision give the same bits.

    Args:
        config: the network and the recipe.
        dataset_folder: the dataset.
        out_folder: the tokenizer folder to write.
        device: auto, cpu or cuda.
        threads: CPU threads; None leaves torch's number.
        overwrite: replace an existing tokenizer.
        progress: show a bar and print each validation.

    Returns:
        The last validation's metrics (see `reconstruction_metrics`; empty without a val split) and the loss.

    Raises:
        ScaMoError: the dataset does not open or fit, no clip is as long as a window, OUT exists, a setting is
            not for the quantiser, or the loss stops being finite; OUT is then not written.
    """
    out = Path(out_folder)
    if out.exists() and not overwrite:
        raise ScaMoError(f"{out} exists: choose another name, or ask for it to be overwritten")
    check_recipe(config)
    training, where = config.training, resolve_device(device)
    bfloat16 = use_bfloat16(training.precision, where)
    dataset = MotionDataset.open(dataset_folder)
    if config.tokenizer.feature_dim not in (0, dataset.feature_dim):
        raise ScaMoError(
            f"{dataset.folder}: {dataset.feature_dim} features a frame, the config has "
            f"tokenizer.feature_dim = {config.tokenizer.feature_dim}: leave it out"
        )
    config = replace(config, tokenizer=replace(config.tokenizer, variant=dataset.variant))
    if training.window % config.tokenizer.downsampling:
        raise ScaMoError(
            f"training.window = {training.window}: expected a multiple of the "
            f"{config.tokenizer.downsampling} frames of a token"
        )
    windows = Windows(
        dataset, "train", window=training.window, batch_size=training.batch_size, seed=training.seed
    )
    validation = ItemFeatures(dataset, dataset.items("val"))
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with whole_folder(out, overwrite=overwrite) as temporary:
            run = _Run(config, dataset, windows, validation, where, bfloat16, progress)
            report = run.train(out.with_name(out.name + ".unfinished"))
            run.write(temporary, finished=True)
        shutil.rmtree(out.with_name(out.name + ".unfinished"), ignore_errors=True)
    finally:
        torch.set_num_threads(threads_before)
    return report


class _Run:
    """One training: what its steps, validations and folders share."""

    def __init__(
        self,
        config: TokenizerRunConfig,
        dataset: MotionDataset,
        windows: Windows,
        validation: ItemFeatures,
        device: torch.device,
        bfloat16: bool,
        progress: bool,
    ) -> None:
        self.config, self.training = config, config.training
        self.dataset, self.windows, self.validation = dataset, windows, validation
        self.device, self.bfloat16, self.progress = device, bfloat16, progress
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.collapsed = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            self.model = kind_of(config.tokenizer)(config.tokenizer, dataset.mean, dataset.std)
        if self.training.latent_std > 0:
            first = self.model.normalize(windows.batch(0))
            generator = torch.Generator().manual_seed(self.training.seed)
            spread_latents(self.model, first, self.training.latent_std, generator)
        self.model.to(device)
        self.average = self._start_codebook() if isinstance(self.model.quantizer, VQ) else None
        self.weights = feature_weights(self.training, dataset.feature_dim).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=self.training.betas,
            weight_decay=self.training.weight_decay,
            fused=True,
        )

    def _start_codebook(self) -> CodebookAverage:
        """The codebook of latents of the first batches, as many as have one for each entry."""
        quantizer, training = cast(VQ, self.model.quantizer), self.training
        average = CodebookAverage(
            quantizer,
            decay=training.ema_decay,
            reset_below=training.reset_below,
            reset_averages=training.reset_averages,
        )
        rows = training.batch_size * training.window // self.config.tokenizer.downsampling
        latents = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            for step in range(-(-self.model.codes // rows)):
                batch = self.model.normalize(self.windows.batch(step).to(self.device))
                latents.append(self.model.encoder(batch).float().flatten(0, 1))
        average.start(torch.cat(latents), self._rng(2))
        return average

    def _rng(self, purpose: int) -> np.random.Generator:
        """Random numbers of this step: a function of (seed, step, purpose)."""
        return np.random.default_rng((self.training.seed, self.step, purpose))

    def train(self, unfinished: Path) -> dict[str, Any]:
        training = self.training
        report: dict[str, Any] = {}
        self._say(
            f"train: {self.windows.clips} clips, {self.windows.windows} windows of {training.window} frames; "
            f"{self.windows.skipped} clips are shorter and skipped"
        )
        if not len(self.validation):
            self._say("the dataset has no val split: nothing will be validated")
        total, since, started = torch.zeros((), device=self.device), 0, time.perf_counter()
        with tqdm(total=training.steps, desc="tokenizer", unit="step", disable=not self.progress) as bar:
            while self.step < training.steps:
                total += self._update()
                self.step, since = self.step + 1, since + 1
                bar.update()
                last = self.step == training.steps
                validate = last or self.step % training.validate_every == 0
                if not (validate or self.step % training.log_every == 0):
                    continue
                # One NaN makes the sum NaN: a look once in a while sees all and does not stall a GPU.
                loss = float(total) / since
                if not np.isfinite(loss):
                    self._refuse(since)
                seconds = time.perf_counter() - started
                speed = since * training.batch_size * training.window / seconds
                self._record(
                    loss=loss,
                    learning_rate=learning_rate(training, self.step - 1),
                    frames_per_second=round(speed),
                )
                bar.set_postfix(loss=f"{loss:.4f}", frames_s=f"{speed:,.0f}")
                if validate and len(self.validation):
                    report = self._validate() | {"loss": loss}
                elif last:
                    report = {"loss": loss}
                if validate and not last:
                    with whole_folder(unfinished, overwrite=unfinished.exists()) as folder:
                        self.write(folder, finished=False)
                total.zero_()
                since, started = 0, time.perf_counter()
        return report

    def _update(self) -> Tensor:
        """One step of the optimiser; returns its loss, detached."""
        true = self.model.normalize(self.windows.batch(self.step).to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            made = self.model(true, self._noise(), self._stages())
        loss = reconstruction_loss(made.features, true, self.weights)
        if self.average is not None:
            distance = self.average.quantizer.commitment(made.z, made.indices)
            loss = loss + self.training.commitment_weight * distance
        if self.training.saturation_weight:
            loss = loss + self.training.saturation_weight * saturation(made.z)
        self.optimizer.zero_grad()
        loss.backward()
        if self.training.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(made.z.detach(), made.indices, self._rng(3))
        return loss.detach()

    def _noise(self) -> Tensor | None:
        """What replaces the rounding in the first part of the run: a function of (seed, step)."""
        training, tokenizer = self.training, self.config.tokenizer
        if self.step >= training.noise_ratio * training.steps:
            return None
        channels = tokenizer.groups * len(tokenizer.fsq_levels)
        shape = training.batch_size, training.window // tokenizer.downsampling, channels
        return torch.from_numpy(self._rng(1).random(shape, dtype=np.float32) - 0.5).to(self.device)

    def _stages(self) -> int | None:
        """How many residual stages this step uses when it leaves some out: a function of (seed, step)."""
        if not self.training.quantizer_dropout:
            return None
        rng = self._rng(4)
        left_out = rng.random() < self.training.quantizer_dropout
        return int(rng.integers(1, self.config.tokenizer.residual)) if left_out else None

    def _validate(self) -> dict[str, Any]:
        self.model.eval()
        metrics = reconstruction_metrics(
            self.model, self.validation, self.validation.lengths, fps=self.dataset.fps
        )
        self.model.train()
        self._record(validation=metrics)
        joints = f"MPJPE {metrics['mpjpe_mm']:.1f} mm, " if "mpjpe_mm" in metrics else ""
        self._say(
            f"step {self.step}: L1 {metrics['l1']:.4f}, {joints}utilisation {metrics['utilisation']:.1%}, "
            f"exp. entropy {metrics['exp_entropy']:.0f} of {self.model.codes}"
        )
        if metrics["collapsed"] and not self.collapsed:
            most = min(self.model.codes, metrics["tokens"] // self.config.tokenizer.indices_per_token)
            self._say(
                f"warning: the codebook has collapsed at step {self.step}: exp. entropy "
                f"{metrics['exp_entropy']:.1f} is below {COLLAPSE_SHARE:.0%} of the {most} it could be",
                always=True,
            )
        self.collapsed = metrics["collapsed"]
        return metrics

    def _refuse(self, since: int) -> None:
        """Stop at a loss that is not finite, and say where it comes from."""
        first = self.step - since
        message = f"the loss is not finite between steps {first} and {self.step - 1}"
        for step in range(first, self.step):
            bad = ~self.windows.batch(step).isfinite().all(-1).all(-1)
            if bad.any():
                clip, frame = self.windows.draw(step)[int(bad.int().argmax())]
                name = self.dataset.clip_names[clip]
                raise ScaMoError(
                    f"{message}: clip {name} has features that are not finite from frame {frame} on"
                )
        rate = learning_rate(self.training, self.step - 1)
        raise ScaMoError(f"{message}: lower training.learning_rate (now {rate:g}) or set training.clip_norm")

    def _record(self, **values: Any) -> None:
        self.log.append({"step": self.step} | values)

    def _say(self, message: str, *, always: bool = False) -> None:
        if self.progress or always:
            tqdm.write(message)

    def write(self, folder: Path, *, finished: bool) -> None:
        """The tokenizer as it is now, its log and where it comes from, into an existing folder."""
        with contextlib.closing(open(folder / "log.jsonl", "w", encoding="utf-8")) as file:
            file.writelines(json.dumps(line) + "\n" for line in self.log)
        provenance = {
            "training": to_dict(self.training),
            "dataset": {"name": self.dataset.folder.name, "manifest_sha256": self.dataset.manifest_sha256},
            "clips": self.windows.clips,
            "clips_shorter_than_the_window": self.windows.skipped,
            "step": self.step,
            "finished": finished,
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "torch": torch.__version__,
        }
        self.model.write_files(folder, provenance=provenance)
