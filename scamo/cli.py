"""The `scamo` command: each command is a thin front of one public function, imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from scamo.errors import ScaMoError

if TYPE_CHECKING:
    from scamo.motion.motion import Motion

Out = Annotated[Path, arg(aliases=["-o"])]

app = tyro.extras.SubcommandApp()
prepare = tyro.extras.SubcommandApp()
data = tyro.extras.SubcommandApp()
tokenizer = tyro.extras.SubcommandApp()
evaluator = tyro.extras.SubcommandApp()
importers = tyro.extras.SubcommandApp()
scaling = tyro.extras.SubcommandApp()
study = tyro.extras.SubcommandApp()


@app.command
def doctor(*, json: bool = False, hub: bool = False) -> None:
    """Print what this machine has (packages, GPUs, tools, disk), what is missing and what to do about it.

    Args:
        json: as JSON.
        hub: also ask whether the hub can be reached, for 3 seconds at most.
    """
    from scamo.doctor import report

    print(report(hub=hub, as_json=json))


@prepare.command(name="synthetic")
def prepare_synthetic(
    out: Positional[Path],
    *,
    clips: int = 10_000,
    captions: int = 3,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
) -> None:
    """Generate the procedural corpus and write it as a dataset.

    Args:
        out: the dataset folder to write.
        clips: number of motions.
        captions: sentences for each motion.
        seed: clip i is a function of (seed, i) alone.
        workers: processes; 0 means one per core.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.synthetic import prepare_synthetic

    prepare_synthetic(
        out, clips=clips, captions=captions, seed=seed, workers=workers or None, overwrite=overwrite
    )


@prepare.command(name="humanml3d")
def prepare_humanml3d(
    source: Positional[Path],
    out: Positional[Path],
    *,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | None = None,
    target_offsets: Path | None = None,
    mirror: bool = True,
    split: tuple[float, float, float] = (0.8, 0.05, 0.15),
    variant: Literal["original", "fixed"] = "original",
    min_frames: int | None = None,
    max_frames: int | None = None,
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read a folder of HumanML3D's or KIT-ML's shape and write it as a dataset; what is refused is listed.

    A run that was stopped is gone on with by the same command.

    Args:
        source: folder with texts/, train.txt, val.txt, test.txt and new_joint_vecs/ or joints/ (new_joints/).
        out: the dataset folder to write.
        fps: frames a second of the dataset; those of its features (20, KIT-ML 12.5) without it.
        source_fps: of the files; as fps without it.
        units: of joints/: m, cm, mm, or metres of one unit; found by the leg without it.
        target_offsets: (22, 3) .npy of the uniform skeleton, used with joints; the bones are kept without it.
        mirror: make the mirrored copies (M...) that the split lists name and the folder lacks.
        split: parts of train, val and test, where the folder has no split lists.
        variant: of 263 features: to the letter, or without the oddities of the original that can be mended.
        min_frames: shorter clips are refused; those of the features' evaluation protocol (40) without it.
        max_frames: clips of this many frames or more are refused; likewise (200).
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.humanml3d import prepare_humanml3d

    prepare_humanml3d(
        source,
        out,
        fps=fps,
        source_fps=source_fps,
        units=units,
        target_offsets=target_offsets,
        mirror=mirror,
        split=split,
        variant=variant,
        min_frames=min_frames,
        max_frames=max_frames,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="mocap")
def prepare_mocap(
    source: Positional[Path],
    out: Positional[Path],
    *,
    joint_map: str | None = None,
    captions: Path | None = None,
    template: str | None = None,
    feature_dim: Literal[263, 272] = 263,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | None = None,
    up: Literal["x", "y", "z", "-x", "-y", "-z"] | None = None,
    mirror: bool = False,
    split: tuple[float, float, float] = (0.8, 0.05, 0.15),
    split_by: Literal["clip", "subject"] = "clip",
    target_offsets: Path | None = None,
    rest_pose: Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read a folder of .bvh and .asf/.amc files of any skeleton and write it as a dataset.

    Args:
        source: the folder; folders below it are read too.
        out: the dataset folder to write.
        joint_map: the name of a known map or a TOML file; found by the joints' names without it.
        captions: a CSV or JSON lines: name, caption or label[, start, end, split, fps]; NAME.txt beside each
            file without it.
        template: makes captions of labels, "a person does {label}".
        feature_dim: 263, or 272 with the files' own rotations.
        fps: frames a second of the dataset; 20 of 263 and 30 of 272 features without it.
        source_fps: of the files, where what they say is wrong.
        units: of the files: m, cm, mm, inch, cmu or metres of one unit; found by the leg without it.
        up: the axis that points up in the files; found without it.
        mirror: add a mirrored copy of every clip.
        split: parts of train, val and test; where a file goes is a function of its name.
        split_by: clip, or subject: what stands before the last underscore of the name.
        target_offsets: (22, 3) .npy of a skeleton whose bone lengths all clips take.
        rest_pose: (22, 3) .npy of a T-pose onto which all clips are retargeted.
        min_frames: shorter clips are refused; 2 s without it.
        max_frames: clips of this many frames or more are cut or refused; 10 s without it.
        long: what happens to these.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.mocap import prepare_mocap

    prepare_mocap(
        source,
        out,
        joint_map=joint_map,
        captions=captions,
        template=template,
        feature_dim=feature_dim,
        fps=fps,
        source_fps=source_fps,
        units=units,
        up=up,
        mirror=mirror,
        split=split,
        split_by=split_by,
        target_offsets=target_offsets,
        rest_pose=rest_pose,
        min_frames=min_frames,
        max_frames=max_frames,
        long=long,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="amass")
def prepare_amass(
    amass: Positional[Path],
    index: Positional[Path],
    texts: Positional[Path],
    out: Positional[Path],
    *,
    model: Path,
    feature_dim: Literal[263, 272] = 263,
    target_offsets: Path | None = None,
    fit_joints: bool = False,
    mirror: bool = True,
    min_frames: int | None = None,
    max_frames: int | None = None,
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Make HumanML3D from AMASS: joints by forward kinematics, no mesh is skinned.

    Args:
        amass: folder of the unpacked sets.
        index: HumanML3D's index.csv.
        texts: HumanML3D's folder with texts/ and the split lists.
        out: the dataset folder to write.
        model: your SMPL+H: the folder with male/model.npz and female/model.npz, or one .npz for everybody.
        feature_dim: 263 at 20 fps, or 272 at 30 fps with SMPL's own rotations.
        target_offsets: (22, 3) .npy of the uniform skeleton; that of clip 000021 without it.
        fit_joints: for 272 features, take HumanAct12 too, whose rotations are then fitted.
        mirror: add the mirrored copies that the split lists name.
        min_frames: shorter clips are refused; 2 s without it.
        max_frames: clips of this many frames or more are refused; 10 s without it.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.amass import prepare_amass

    prepare_amass(
        amass,
        index,
        texts,
        out,
        model=model,
        feature_dim=feature_dim,
        target_offsets=target_offsets,
        fit_joints=fit_joints,
        mirror=mirror,
        min_frames=min_frames,
        max_frames=max_frames,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="arrays")
def prepare_arrays(
    source: Positional[Path],
    out: Positional[Path],
    *,
    captions: Path | None = None,
    template: str | None = None,
    key: str | None = None,
    feature_dim: Literal[263, 272] = 263,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | None = None,
    up: Literal["x", "y", "z", "-x", "-y", "-z"] | None = None,
    mirror: bool = False,
    split: tuple[float, float, float] = (0.8, 0.05, 0.15),
    target_offsets: Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read arrays of 22 joints, .npy or .npz of one clip or of many, and write them as a dataset.

    Args:
        source: the folder or one file.
        out: the dataset folder to write.
        captions: a CSV or JSON lines: name, caption or label[, start, end, split, fps]; NAME.txt without it.
        template: makes captions of labels, "a person does {label}".
        key: the array with the joints in every .npz; joints, positions or pos without it.
        feature_dim: 263, or 272 with rotations that are fitted to the joints.
        fps: frames a second of the dataset; 20 of 263 and 30 of 272 features without it.
        source_fps: of the arrays, where neither a .npz nor the table says it.
        units: m, cm, mm or metres of one unit; found by the leg without it.
        up: the axis that points up; found without it.
        mirror: add a mirrored copy of every clip.
        split: parts of train, val and test; where a clip goes is a function of its recording's name.
        target_offsets: (22, 3) .npy of a skeleton whose bone lengths all clips take.
        min_frames: shorter clips are refused; 2 s without it.
        max_frames: clips of this many frames or more are cut or refused; 10 s without it.
        long: what happens to these.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.arrays import prepare_arrays

    prepare_arrays(
        source,
        out,
        captions=captions,
        template=template,
        key=key,
        feature_dim=feature_dim,
        fps=fps,
        source_fps=source_fps,
        units=units,
        up=up,
        mirror=mirror,
        split=split,
        target_offsets=target_offsets,
        min_frames=min_frames,
        max_frames=max_frames,
        long=long,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="motionx")
def prepare_motionx(
    source: Positional[Path],
    out: Positional[Path],
    *,
    model: Path,
    fps: float | None = None,
    mocap_fps: float | None = None,
    up: Literal["x", "y", "z", "-x", "-y", "-z"] | None = None,
    mirror: bool = False,
    split: tuple[float, float, float] = (0.8, 0.05, 0.15),
    target_offsets: Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read Motion-X's SMPL-X poses: joints by forward kinematics, no mesh is skinned.

    Args:
        source: the folder, with motion_data/smplx_322/ and texts/semantic_labels/.
        out: the dataset folder to write.
        model: your SMPL-X, SMPLX_NEUTRAL.npz.
        fps: frames a second of the dataset; 20 without it.
        mocap_fps: of the subsets humanml, GRAB and EgoBody, whatever your conversion wrote; others have 30.
        up: the axis that points up; found for every subset without it.
        mirror: add a mirrored copy of every clip that the folder has none of.
        split: parts of train, val and test, where the folder has no split lists.
        target_offsets: (22, 3) .npy of a skeleton whose bone lengths all clips take.
        min_frames: shorter clips are refused; 2 s without it.
        max_frames: clips of this many frames or more are cut or refused; 10 s without it.
        long: what happens to these.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.motionx import prepare_motionx

    prepare_motionx(
        source,
        out,
        model=model,
        fps=fps,
        mocap_fps=mocap_fps,
        up=up,
        mirror=mirror,
        split=split,
        target_offsets=target_offsets,
        min_frames=min_frames,
        max_frames=max_frames,
        long=long,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="motionmillion")
def prepare_motionmillion(
    source: Positional[Path],
    out: Positional[Path],
    *,
    splits: str | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read MotionMillion, or MotionStreamer's HumanML3D or BABEL, as a dataset of 272 features at 30 fps.

    Args:
        source: the folder, with motion_data/ and texts/.
        out: the dataset folder to write.
        splits: folder in it of train.txt, val.txt and test.txt; split/version1/t2m_60_300, or split.
        min_frames: shorter clips are refused; 2 s without it.
        max_frames: clips of this many frames or more are refused; 10 s without it.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.motionmillion import prepare_motionmillion

    prepare_motionmillion(
        source,
        out,
        splits=splits,
        min_frames=min_frames,
        max_frames=max_frames,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="snapmogen")
def prepare_snapmogen(
    source: Positional[Path],
    out: Positional[Path],
    *,
    min_frames: int | None = None,
    max_frames: int | None = None,
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
) -> None:
    """Read SnapMoGen as a dataset of 296 features (24 joints) at 30 fps.

    Args:
        source: the folder, with renamed_feats/, all_caption_clean.json and data_split_info/.
        out: the dataset folder to write.
        min_frames: shorter clips are refused; 128 without it.
        max_frames: clips of this many frames or more are refused; 361 without it.
        workers: processes; 0 means one per core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words, for the manifest and model cards.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.snapmogen import prepare_snapmogen

    prepare_snapmogen(
        source,
        out,
        min_frames=min_frames,
        max_frames=max_frames,
        workers=workers,
        strict=strict,
        license=license,
        overwrite=overwrite,
    )


@prepare.command(name="union")
def prepare_union(
    config: Positional[Path],
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    *,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
    overwrite: bool = False,
) -> None:
    """Build a union of prepared datasets: copies found, static clips left out, no source clip in two splits.

    Args:
        config: the TOML that names the sources, as configs/motionunion.toml.
        out: the dataset folder to write, instead of the config's.
        set: override a key of the config; may be repeated.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.union import prepare_union

    prepare_union(config, out, overrides=set, overwrite=overwrite)


@prepare.command(name="degrade")
def prepare_degrade(
    dataset: Positional[Path],
    out: Positional[Path],
    *,
    keep: float = 1.0,
    jitter: float = 0.0,
    foot_skate: float = 0.0,
    caption_noise: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a dataset again with less or worse training data; val and test stay as they are.

    Args:
        dataset: the dataset to degrade, of 263 features.
        out: the dataset folder to write.
        keep: share of the train clips that stay.
        jitter: deviation in metres of noise on every joint, frame by frame.
        foot_skate: speed in m/s at which bodies drift over the floor.
        caption_noise: chance of a caption to be swapped for another clip's.
        seed: of all that is random.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.degrade import degrade

    degrade(
        dataset,
        out,
        keep=keep,
        jitter=jitter,
        foot_skate=foot_skate,
        caption_noise=caption_noise,
        seed=seed,
        overwrite=overwrite,
    )


@data.command(name="check")
def data_check(
    dataset: Positional[Path],
    *,
    hashes: bool = True,
    tokenizers: tuple[Path, ...] = (),
    encoders: bool = False,
    limit: int = 10,
    json: Path | None = None,
) -> None:
    """Name everything that is wrong with a dataset; the exit status is 1 if there is an error.

    Args:
        dataset: the dataset folder.
        hashes: read every file again and compare its SHA-256 with the manifest.
        tokenizers: tokenizer folders that tokens of the dataset are said to come from.
        encoders: also compare the text encoders' weights with those of the text states.
        limit: findings of one kind that are printed; the file has all.
        json: also write the findings there.
    """
    from scamo.data.checks import check

    report = check(dataset, hashes=hashes, tokenizers=tokenizers, encoders=encoders)
    print(report.text(limit))
    if json is not None:
        try:
            json.write_text(dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ScaMoError(f"{json}: cannot be written: {error.strerror}") from None
    if report.exit_status:
        sys.exit(report.exit_status)


@data.command(name="stats")
def data_stats(
    dataset: Positional[Path], out: Annotated[Path | None, arg(aliases=["-o"])] = None, *, top: int = 10
) -> None:
    """Count a dataset: lengths, speeds, contacts, captions, duplicates, static clips, outliers, by source.

    Args:
        dataset: the dataset folder.
        out: also write OUT.json and OUT.md.
        top: outliers of each kind.
    """
    from scamo.data.report import stats

    report = stats(dataset, top=top)
    print(report.markdown())
    if out is not None:
        report.save(out)


@data.command(name="show")
def data_show(
    dataset: Positional[Path],
    out: Out,
    *,
    count: int = 12,
    names: tuple[str, ...] = (),
    split: Literal["", "train", "val", "test"] = "",
    seed: int = 0,
    sort: Literal[
        "random", "longest", "shortest", "jerk", "speed", "highest", "lowest", "bones", "skate", "still"
    ] = "random",
) -> None:
    """Draw clips of a dataset with their captions: a picture and a page that plays them.

    Args:
        dataset: the dataset folder.
        out: folder for the pictures.
        count: number of clips.
        names: these clips.
        split: of one split only.
        seed: of the choice.
        sort: which clips: at random, or those with the most or least of something.
    """
    from scamo.data.report import show

    for path in show(dataset, out, count=count, names=names, split=split, seed=seed, sort=sort):
        print(path)


@data.command(name="info")
def data_info(dataset: Positional[Path], *, verify: bool = False) -> None:
    """Print the counts of a dataset, its tokens and text states.

    Args:
        dataset: the dataset folder.
        verify: read every file again and compare its SHA-256 with the manifest.
    """
    from scamo.data.dataset import MotionDataset

    print(MotionDataset.open(dataset, verify="full" if verify else True).summary())


@app.command(name="encode-text")
def encode_text(
    dataset: Positional[Path],
    *,
    encoder: str = "flan-t5-xl",
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Encode every caption of a dataset once with a frozen text encoder; training reads the cached states.

    Args:
        dataset: the dataset folder.
        encoder: flan-t5-xl (the paper's), minilm (offline; the extra scamo[minilm]), a hub name or a folder.
        batch_size: captions at a time.
        device: auto, cpu or cuda.
        overwrite: replace states of the same name.
    """
    from scamo.data.text import encode_text

    encode_text(dataset, encoder, batch_size=batch_size, device=device, overwrite=overwrite)


@tokenizer.command(name="train")
def tokenizer_train(
    dataset: Positional[Path],
    out: Out,
    *,
    config: Path = Path("configs/tokenizer_full.toml"),
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SECTION.KEY=VALUE")]] = (),
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Train a motion tokenizer, FSQ or VQ, plain, grouped or residual, on the train split of a dataset.

    Args:
        dataset: the dataset folder.
        out: the tokenizer folder to write.
        config: TOML with [tokenizer] and [training].
        set: override a key of the config; may be repeated.
        device: auto, cpu or cuda.
        overwrite: replace an existing tokenizer.
    """
    from scamo.config import TokenizerRunConfig, load_config
    from scamo.tokenizers.train import train_tokenizer

    train_tokenizer(
        load_config(TokenizerRunConfig, config, set), dataset, out, device=device, overwrite=overwrite
    )


@tokenizer.command(name="evaluate")
def tokenizer_evaluate(
    tokenizer: Positional[Path],
    dataset: Positional[Path],
    *,
    split: Literal["train", "val", "test"] = "val",
    evaluator: Path | None = None,
    device: str = "auto",
) -> None:
    """Print the reconstruction error and the codebook use of a tokenizer as JSON.

    Args:
        tokenizer: the tokenizer folder.
        dataset: the dataset folder.
        split: which part of it; `scamo evaluate` has the tokenizer's row on the test split.
        evaluator: folder of an evaluator, for the reconstruction's FID.
        device: auto, cpu or cuda.
    """
    from scamo.tokenizers.evaluate import evaluate_tokenizer

    report = evaluate_tokenizer(tokenizer, dataset, split=split, device=device)
    if evaluator is not None:
        from scamo.evaluation.reconstruction import reconstruction_fid

        report["fid"] = reconstruction_fid(tokenizer, dataset, evaluator, split, device=device)
    print(dumps(report, indent=2))


@tokenizer.command(name="encode")
def tokenizer_encode(
    tokenizer: Positional[Path],
    dataset: Positional[Path],
    *,
    name: str = "",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write the tokens of every item of a dataset beside its features.

    Args:
        tokenizer: the tokenizer folder.
        dataset: the dataset folder.
        name: what to call the tokens; the tokenizer folder's name without it.
        device: auto, cpu or cuda.
        overwrite: replace tokens of the same name.
    """
    from scamo.tokenizers.encode import encode_dataset

    encode_dataset(tokenizer, dataset, name=name, device=device, overwrite=overwrite)


@app.command
def plan(
    *,
    config: Path,
    ds_config: Path = Path("configs/ds_zero3.json"),
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SECTION.KEY=VALUE")]] = (),
    gpu_memory: float | None = None,
    ranks: int = 1,
    mfu: float = 0.45,
    peak_tflops: float | None = None,
    dataset: Path | None = None,
    motion_tokens: int = 0,
    micro_batch_tokens: int | None = None,
    json: bool = False,
) -> None:
    """Print what a training run takes before it starts: memory of a GPU by part, time, disk and data.

    Args:
        config: TOML of the run, as train.py takes it.
        ds_config: DeepSpeed's JSON.
        set: override a key of the config; may be repeated.
        gpu_memory: GiB of one GPU (24, 80, 141); that of the GPU here without it.
        ranks: number of GPUs.
        mfu: share of the peak FLOP/s that training is taken to reach.
        peak_tflops: dense bfloat16 TFLOP/s of one GPU.
        dataset: a dataset folder, for codes, text width, lengths and the size of a pass.
        motion_tokens: motion tokens of a pass, where there is no dataset.
        micro_batch_tokens: positions of a micro-batch, instead of the config's.
        json: print JSON (bytes, seconds, FLOPs).
    """
    from scamo.scaling.plan import as_dict, as_text, make_plan

    made = make_plan(
        config,
        ds_config,
        overrides=set,
        ranks=ranks,
        gpu_memory=gpu_memory,
        mfu=mfu,
        peak_tflops=peak_tflops,
        dataset=dataset,
        motion_tokens=motion_tokens,
        micro_batch_tokens=micro_batch_tokens,
    )
    print(dumps(as_dict(made), indent=2) if json else as_text(made))


@scaling.command(name="run")
def scaling_run(
    config: Positional[Path],
    *,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
    dry_run: bool = False,
) -> None:
    """Train a grid of model sizes, vocabularies and compute budgets; the same command goes on after a stop.

    Exit status 1 if a run failed; the others are made all the same.

    Args:
        config: the TOML of the grid, as configs/scaling_cpu.toml.
        set: override a key of the config; may be repeated.
        dry_run: only print the runs, their steps and what they spend.
    """
    from scamo.scaling.grid import run_grid

    _exit_after(run_grid(config, overrides=set, dry_run=dry_run))


def _exit_after(failed: Sequence[str]) -> None:
    """Exit with status 1 if runs or cells failed; what went wrong has been said."""
    if failed:
        print(f"scamo: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


@scaling.command(name="fit")
def scaling_fit(
    runs: Positional[tuple[Path, ...]] = (),
    *,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    convention: Literal["counted", "paper"] = "counted",
    draws: int = 300,
    paper: bool = False,
) -> None:
    """Fit the scaling laws to training runs: N_nv, N_v, D and L_u against compute, and surfaces of L_u.

    Args:
        runs: runs of train.py, or folders of them.
        out: folder for fit.json, which `scamo scaling predict` reads, table.md, pictures and report.html.
        convention: FLOPs and parameters as counted here, or in the units of the paper's plots.
        draws: resamples of the runs, for 95% intervals.
        paper: the paper's own points instead: its laws refitted, under b + c = 1, and as printed.
    """
    if paper == bool(runs):
        raise ScaMoError("name the runs to fit, or --paper for the paper's points, and not both")
    if paper:
        from scamo.scaling.paper import table as paper_table

        text = paper_table()
        if out is not None:
            from scamo.motion.files import replacing

            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / "paper.md") as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        print(text)
        return
    from scamo.scaling.fit import fit_runs, table, write_fit

    fit = fit_runs(runs, convention=convention, draws=draws)
    for warning in fit.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if out is not None:
        from scamo.scaling.report import write_report

        write_fit(fit, out)
        write_report(fit, out)
    print(table(fit))


@scaling.command(name="predict")
def scaling_predict(
    *,
    flops: float | None = None,
    fit: Path | None = None,
    grid: Path | None = None,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
) -> None:
    """Print the model size, vocabulary, tokens and L_u that the laws ask for at a compute.

    Args:
        flops: of forward and backward, for example 1e18.
        fit: fit.json of `scamo scaling fit`; without it the paper's printed laws.
        grid: the TOML of a grid instead: L_u of each of its runs, before they are made.
        set: override a key of the grid; may be repeated.
    """
    from scamo.scaling.predict import predict, predict_printed, predict_runs, read_fit, runs_table, table

    if (flops is None) == (grid is None):
        raise ScaMoError("name a compute, --flops, or the runs of a grid, --grid, and not both")
    if grid is not None:
        from scamo.config import load_config
        from scamo.scaling.grid import GridConfig, plan_grid

        if fit is None:
            raise ScaMoError("--grid needs --fit: the printed laws say nothing of single runs")
        planned = plan_grid(load_config(GridConfig, grid, set))
        print(runs_table(predict_runs(read_fit(fit), planned)))
        return
    assert flops is not None
    if fit is None:
        print(table([predict_printed(flops)]))
        return
    predictions, warnings = predict(read_fit(fit), flops)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(table(predictions))


@app.command
def generate(
    text: Positional[tuple[str, ...]],
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    *,
    run: Path = Path("runs/quickstart/run"),
    prompts: str | None = None,
    format: str | None = None,
    seed: int = 0,
    seeds: tuple[int, ...] = (),
    samples: int | None = None,
    best_of: int | None = None,
    evaluator: Path | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    guidance: float = 1.0,
    seconds: float | None = None,
    min_seconds: float | None = None,
    max_seconds: float | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    foot_lock: bool = False,
    smooth: float | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    text_encoder: str | None = None,
    ema: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Generate motion from one or more sentences, or from a file of them.

    With --prompts or --format OUT is a folder: a file for each motion and format, manifest.json (model,
    hashes, settings, versions) and motions.jsonl (a line for each motion: sentence, seed, files, SHA-256).
    After a stop of any kind the same command goes on; the folder ends up the same to the byte.

    Args:
        text: the sentences. With several, all go into one .html or .png, else into OUT-0, OUT-1, ...
        out: where to write, motion.html without it; the suffix says what: .npz, .npy, .csv, .bvh, .glb, .gif,
            .mp4, .png or .html.
        run: a training run or an exported model.
        prompts: a .txt with a sentence a line, or .jsonl or .csv with text and where wanted seed, seconds and
            name; - reads sentences from stdin.
        format: what to write into the folder, as npz,bvh; npz without it.
        seed: the same seed and sentence give the same motion, alone or among others.
        seeds: one for each sentence.
        samples: motions of each sentence.
        best_of: make so many motions of each sentence, keep the one that the evaluator finds nearest to it.
        evaluator: an evaluator folder, for --best-of.
        temperature: of the sampling; below 1 is more careful.
        top_k: sample among the k likeliest tokens only; 0 means all.
        top_p: sample among the likeliest tokens that have this much probability together.
        min_p: sample among the tokens that are at least this much as likely as the likeliest.
        greedy: take the likeliest token every time.
        guidance: above 1, classifier-free guidance; for models trained with training.drop_text.
        seconds: length of the motion, to the nearest token.
        min_seconds: the motion does not end before.
        max_seconds: length limit; 10 s at most for the released sizes.
        min_tokens: the same in tokens.
        max_tokens: the same in tokens.
        foot_lock: pin the feet while they stand.
        smooth: low-pass filter of this many Hz.
        batch_size: motions at a time.
        device: auto, cpu or cuda.
        dtype: of the transformer; bfloat16 takes half the memory.
        text_encoder: name or folder of the encoder, where it is not the one of the training.
        ema: True for the moving average of the weights, False for the last ones; by default the average
            where there is one.
        overwrite: begin the folder again.
    """
    from scamo.generation.jobs import generate_folder, prompts_of, read_prompts
    from scamo.motion.motion import SUFFIXES, check_suffix, save_motions

    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "greedy": greedy,
        "guidance": guidance,
        "seconds": seconds,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
    }
    if prompts is not None and (text or seeds):
        raise ScaMoError("--prompts has the sentences and seeds: give none beside it")
    if prompts is None and not text:
        raise ScaMoError("no sentence to generate from: give one or more, in quotes, or --prompts FILE")
    sentences = prompts_of(text, seeds) if prompts is None else read_prompts(prompts)
    if prompts is not None or format is not None:
        if out is None or out.suffix in SUFFIXES:
            raise ScaMoError(f"--out is {out or 'missing'}: with --prompts or --format it is a folder")
        generate_folder(
            run,
            sentences,
            out,
            formats=format or "npz",
            seed=seed,
            samples=samples,
            best_of=best_of,
            evaluator=evaluator,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            text_encoder=text_encoder,
            ema=ema,
            foot_lock=foot_lock,
            smooth=smooth,
            overwrite=overwrite,
            **sampling,
        )
        print(out)
        return
    from scamo.generation.api import ScaMo

    out = out or Path("motion.html")
    check_suffix(out)
    if not out.parent.is_dir():
        raise ScaMoError(f"{out.parent}: no such folder")
    model = ScaMo.load(run, device=device, dtype=dtype, text_encoder=text_encoder, ema=ema)
    made: list[Any] = model.generate(
        [sentence.text for sentence in sentences],
        seed=seeds or seed,
        samples=samples,
        best_of=best_of,
        evaluator=evaluator,
        batch_size=batch_size,
        **sampling,
    )
    motions: list[Motion] = made if samples is None else [motion for group in made for motion in group]
    if foot_lock or smooth is not None:
        motions = [motion.cleaned(foot_lock=foot_lock, smooth=smooth) for motion in motions]
    for path in save_motions(motions, out):
        print(path)


@app.command
def timeline(
    text: Positional[tuple[str, ...]],
    out: Out = Path("motion.html"),
    *,
    run: Path = Path("runs/quickstart/run"),
    seconds: tuple[float, ...] = (),
    start: Path | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    guidance: float = 1.0,
    context: int | None = None,
    window: int | None = None,
    foot_lock: bool = False,
    smooth: float | None = None,
    device: str = "auto",
) -> None:
    """Generate one motion that does what several sentences say, one after the other, of any length.

    With --start it goes on from a given motion, which stays as it is.

    Args:
        text: the sentences, in order; one of them with --seconds 60 is a long motion.
        out: where to write; the suffix says what, as in `scamo generate`.
        run: a training run or an exported model.
        seconds: of each sentence, or one number for all; until the model ends each of them without it.
        start: a motion to go on from, with features (.npz as `scamo generate` writes it).
        seed: the same seed gives the same motion.
        temperature: of the sampling; below 1 is more careful.
        top_k: sample among the k likeliest tokens only; 0 means all.
        top_p: sample among the likeliest tokens that have this much probability together.
        min_p: sample among the tokens that are at least this much as likely as the likeliest.
        greedy: take the likeliest token every time.
        guidance: above 1, classifier-free guidance; for models trained with training.drop_text.
        context: tokens of the past that a sentence begins with; 0 without.
        window: tokens that the model sees at a time while a sentence of given seconds goes on; 16 without.
        foot_lock: pin the feet while they stand.
        smooth: low-pass filter of this many Hz.
        device: auto, cpu or cuda.
    """
    from scamo.generation.api import ScaMo
    from scamo.motion.motion import check_suffix, save_motions

    check_suffix(out)
    if not text:
        raise ScaMoError("no sentence to generate from: give one or more, in quotes")
    if len(seconds) not in (0, 1, len(text)):
        raise ScaMoError(f"--seconds: {len(seconds)} values for {len(text)} sentences, expected one, or each")
    lengths: list[float | None] = [
        *(seconds if len(seconds) == len(text) else (seconds or (None,)) * len(text))
    ]
    motion = ScaMo.load(run, device=device).timeline(
        list(zip(text, lengths, strict=True)),
        start=start,
        seed=seed,
        context=context,
        window=window,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        greedy=greedy,
        guidance=guidance,
    )
    if foot_lock or smooth is not None:
        motion = motion.cleaned(foot_lock=foot_lock, smooth=smooth)
    for path in save_motions([motion], out):
        print(path)


@app.command
def inbetween(
    motion: Positional[Path],
    text: Positional[str],
    out: Out = Path("motion.html"),
    *,
    frames: tuple[int, int],
    run: Path = Path("runs/quickstart/run"),
    candidates: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    context: int | None = None,
    device: str = "auto",
) -> None:
    """Replace some frames of a motion by generated ones that lead to what follows; the others stay.

    Args:
        motion: a motion with features (.npz as `scamo generate` writes it).
        text: what happens in the gap.
        out: where to write; the suffix says what, as in `scamo generate`.
        frames: the first frame of the gap, and the first one behind it.
        run: a training run or an exported model.
        candidates: how many to choose from, by what follows and by how near they end to it.
        seed: the same seed gives the same motion.
        temperature: of the sampling; below 1 is more careful.
        top_p: sample among the likeliest tokens that have this much probability together.
        context: tokens that the model sees before the gap, and is asked about after it; 8 without.
        device: auto, cpu or cuda.
    """
    from scamo.generation.api import ScaMo
    from scamo.motion.motion import check_suffix, save_motions

    check_suffix(out)
    made = ScaMo.load(run, device=device).inbetween(
        motion,
        frames,
        text,
        candidates=candidates,
        seed=seed,
        context=context,
        temperature=temperature,
        top_p=top_p,
    )
    gap = made.meta["gap"]
    for path in save_motions([made], out):
        print(path)
    turned, moved = gap["turned"], gap["moved"]
    print(f"spread over the gap so that the rest stands where it stood: {turned:.0f} degrees, {moved:.2f} m")


@app.command
def export(
    run: Positional[Path],
    out: Positional[Path],
    *,
    name: str = "",
    description: str = "",
    license: str = "",
    data_license: str = "",
    datasets: tuple[str, ...] = (),
    reports: tuple[Path, ...] = (),
    text_encoder: str = "",
    ema: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as one folder to give away, as a hub takes it: weights, tokenizer, hashes, model card.

    The card has what the run's folder knows: sizes, data, settings, the tables in RUN/evaluation.

    Args:
        run: a training run, or an exported or imported model.
        out: the folder to write.
        name: of the model; the folder's without it.
        description: a sentence or more for the card.
        license: of the weights, by the hub's identifier (cc-by-nc-4.0, ...) or in words.
        data_license: of the training data, in words.
        datasets: the hub's names of the training data.
        reports: further .json reports of `scamo evaluate` for the card.
        text_encoder: what others load it by, where it is a folder of this machine.
        ema: True for the moving average of the weights, False for the last ones; by default the average
            where there is one.
        overwrite: replace an earlier one.
    """
    from scamo.generation.export import publish

    warnings = publish(
        run,
        out,
        name=name,
        description=description,
        license=license,
        data_license=data_license,
        datasets=datasets,
        reports=reports,
        text_encoder=text_encoder,
        ema=ema,
        overwrite=overwrite,
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(out)


@app.command
def convert(
    motion: Positional[Path],
    out: Out,
    *,
    foot_lock: bool = False,
    smooth: float | None = None,
    constant_bones: bool = False,
    scale: float = 1.0,
    stretch: bool | None = None,
) -> None:
    """Write a stored motion in another format, cleaned on the way if you like.

    Args:
        motion: .npz, .npy of joints or features, or .bvh as this project writes it.
        out: where to write; the suffix says what: .npz, .npy, .csv, .bvh, .glb, .gif, .mp4, .png or .html.
        foot_lock: pin the feet while they stand; says the foot skate before and after.
        smooth: low-pass filter of this many Hz.
        constant_bones: give every bone its mean length.
        scale: of .bvh, units a metre: 100 writes centimetres.
        stretch: of .bvh and .glb: whether joints may also move (motions whose bones change their length); by
            default where constant bones would miss a joint by more than half a millimetre.
    """
    from scamo.motion.motion import Motion, check_suffix

    suffix = check_suffix(out)
    made = Motion.load(motion)
    if foot_lock or smooth is not None or constant_bones:
        made = made.cleaned(foot_lock=foot_lock, smooth=smooth, constant_bones=constant_bones)
        done = made.meta["clean"]
        print(f"foot skate {done['foot_skate_before']:.1%} before, {done['foot_skate_after']:.1%} after")
    rig = {"scale": scale, "stretch": stretch} if suffix == ".bvh" else {"stretch": stretch}
    made.save(out, **(rig if suffix in (".bvh", ".glb") else {}))
    print(out)


@app.command
def view(files: Positional[tuple[Path, ...]], *, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Play motion files side by side in an interactive page, until Ctrl-C.

    Args:
        files: .npz, .npy or .bvh.
        host: address to listen at; only this machine reaches the default one.
        port: to listen at; 0 takes a free one.
    """
    from scamo.view.server import view

    view(files, host=host, port=port)


@app.command
def evaluate(
    run: Positional[Path],
    *,
    protocol: Literal["humanml3d", "strict", "text-following"] = "humanml3d",
    evaluator: Path | None = None,
    dataset: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    repeats: int = 20,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    items: int = 0,
    mm_texts: int = 100,
    batch_size: int = 32,
    out: Path | None = None,
    again: bool = False,
    device: str = "auto",
) -> None:
    """Measure a model: FID, R-precision and the rest beside real data and reconstruction, or text-following.

    humanml3d is the protocol of Guo et al. to the letter; strict asks the same without its randomness;
    text-following generates the 400 checked-in prompts of the synthetic corpus and measures the joints.
    Under `torchrun --nproc-per-node N -m scamo.cli evaluate ...` every process generates its part.

    Args:
        run: a training run or an exported model.
        protocol: humanml3d, strict or text-following.
        evaluator: an evaluator folder (`scamo evaluator train` or `scamo import t2m-evaluator`).
        dataset: the dataset folder; the one the run was trained on without it.
        split: choose models on val; each protocol meets a run's test split once.
        repeats: of the humanml3d protocol.
        seed: of the draws and the sampling.
        temperature: of the sampling.
        top_k: sample among the k likeliest tokens only; 0 means all.
        top_p: sample among the likeliest tokens that have this much probability together.
        greedy: take the likeliest token every time.
        items: of the split, drawn once for all models; 0 means all.
        mm_texts: sentences of the multimodality, 30 motions each in every repeat; 0 leaves it out.
        batch_size: sentences generated at a time; the numbers do not depend on it.
        out: where to write the report; RUN/evaluation/PROTOCOL-SPLIT-DATASET.json and .md without it.
        again: meet the test split once more; the report counts it.
        device: auto, cpu or cuda.
    """
    if protocol == "text-following":
        _text_following_only(
            {"--evaluator": evaluator, "--dataset": dataset, "--top-k": top_k, "--again": again}
            | {"--top-p": top_p != 1, "--split": split != "test", "--items": items}
        )
        from scamo.evaluation.run_text_following import run_text_following

        run_text_following(run, seed=seed, temperature=temperature, greedy=greedy, out=out, device=device)
        return
    from scamo.evaluation.protocol import Settings, evaluate_run

    if evaluator is None:
        raise ScaMoError(
            f"protocol {protocol} needs an evaluator: name one with --evaluator (`scamo evaluator train`, or "
            "`scamo import t2m-evaluator` for the published one)"
        )
    settings = Settings(
        protocol=protocol,
        split=split,
        repeats=repeats,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        items=items,
        mm_texts=mm_texts,
        batch_size=batch_size,
    )
    evaluate_run(run, evaluator, dataset=dataset, settings=settings, out=out, again=again, device=device)


def _text_following_only(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ScaMoError(
            f"protocol text-following has its own prompts and measure: leave out {', '.join(given)}"
        )


@app.command
def compare(
    runs: Positional[tuple[Path, ...]],
    out: Out,
    *,
    prompts: str = "out-of-distribution",
    evaluator: Path | None = None,
    names: tuple[str, ...] = (),
    samples: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    pictures: int = 24,
    batch_size: int = 32,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Give the same prompts and seeds to several models: one page of players side by side and paired numbers.

    Args:
        runs: training runs or exported models; differences are to the first.
        out: the folder to write: index.html, table.md, report.json and every motion.
        prompts: a .txt, .json or .jsonl file, or out-of-distribution: 90 prompts that belong to the project.
        evaluator: also measure how well text and motion agree, with this evaluator.
        names: what to call the runs on the page, one each.
        samples: motions per prompt and run; they are averaged, the prompt is what is resampled.
        seed: of the sampling.
        temperature: of the sampling.
        top_k: sample among the k likeliest tokens only; 0 means all.
        top_p: sample among the likeliest tokens that have this much probability together.
        greedy: take the likeliest token every time.
        pictures: prompts that are shown, evenly spread over the groups; all are measured.
        batch_size: sentences generated at a time.
        device: auto, cpu or cuda.
        overwrite: replace an earlier comparison.
    """
    from scamo.evaluation.compare import compare, markdown

    report = compare(
        runs,
        prompts,
        out,
        evaluator=evaluator,
        seed=seed,
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        names=names or None,
        pictures=pictures,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
    )
    print(markdown(report))
    print(out / "index.html")


@evaluator.command(name="train")
def evaluator_train(
    datasets: Positional[tuple[Path, ...]],
    out: Out,
    *,
    config: Path = Path("configs/evaluator_full.toml"),
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SECTION.KEY=VALUE")]] = (),
    text: str = "",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Train an evaluator on the train split of one or more datasets, so that custom data can be scored.

    Args:
        datasets: dataset folders with text states; the first one's val split chooses the step.
        out: the evaluator folder to write.
        config: TOML with [evaluator] and [training].
        set: override a key of the config; may be repeated.
        text: name of the text states; the only ones without it.
        device: auto, cpu or cuda.
        overwrite: replace an existing evaluator.
    """
    from scamo.config import EvaluatorRunConfig, load_config
    from scamo.evaluation.train_evaluator import train_evaluator

    run = load_config(EvaluatorRunConfig, config, set)
    train_evaluator(run, datasets, out, text=text, device=device, overwrite=overwrite)


@evaluator.command(name="evaluate")
def evaluator_evaluate(
    evaluator: Positional[Path],
    dataset: Positional[Path],
    *,
    split: Literal["train", "val", "test"] = "test",
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Print how well an evaluator tells a dataset's own sentences and motions apart (strict protocol).

    Args:
        evaluator: the evaluator folder.
        dataset: the dataset folder.
        split: which part of it.
        out: also write the report, as OUT.json and OUT.md.
        device: auto, cpu or cuda.
    """
    from scamo.evaluation.protocol import Settings, evaluate_run

    settings = Settings(protocol="strict", split=split)
    evaluate_run(None, evaluator, dataset=dataset, settings=settings, out=out, device=device)


@importers.command(name="scamo-official")
def import_scamo_official(
    checkpoints: Positional[tuple[Path, ...]],
    out: Out,
    *,
    mean: Path | None = None,
    std: Path | None = None,
    tokenizer: Path | None = None,
    codebook_size: int = 0,
    text_encoder: str = "flan-t5-xl",
    heads: int = 0,
    overwrite: bool = False,
) -> None:
    """Convert the released ScaMo checkpoints; tokenizer and transformer together make a model.

    Args:
        checkpoints: the tokenizer's and the transformer's file, in any order, or one of them.
        out: the folder to write: an exported model, or a tokenizer where there is no transformer.
        mean: .npy (263,) of the tokenizer's training, which its checkpoint does not hold.
        std: .npy (263,) that goes with it.
        tokenizer: a tokenizer folder for a transformer alone.
        codebook_size: the paper's name of the codebook, for a tokenizer alone whose levels are ambiguous.
        text_encoder: what the transformer reads: a name or a folder.
        heads: of a transformer that is none of the paper's sizes.
        overwrite: replace what was written there before.
    """
    from scamo.importers.scamo_official import import_scamo_official

    path = import_scamo_official(
        checkpoints,
        out,
        mean=mean,
        std=std,
        tokenizer=tokenizer,
        codebook_size=codebook_size,
        text_encoder=text_encoder,
        heads=heads,
        overwrite=overwrite,
    )
    print(path)


@importers.command(name="t2m-gpt-tokenizer")
def import_t2m_gpt_tokenizer(
    checkpoint: Positional[Path], out: Out, *, mean: Path, std: Path, overwrite: bool = False
) -> None:
    """Convert T2M-GPT's VQ tokenizer.

    Args:
        checkpoint: its net_last.pth.
        out: the tokenizer folder to write.
        mean: .npy (263,) of its training.
        std: .npy (263,) that goes with it.
        overwrite: replace an existing tokenizer.
    """
    from scamo.importers.t2m_gpt import import_t2m_gpt_tokenizer

    print(import_t2m_gpt_tokenizer(checkpoint, out, mean=mean, std=std, overwrite=overwrite))


@importers.command(name="t2m-evaluator")
def import_t2m_evaluator(
    source: Positional[Path],
    out: Out,
    *,
    mean: Path | None = None,
    std: Path | None = None,
    glove: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Convert the published evaluator of Guo et al. (finest.tar, its statistics, the GloVe words).

    Args:
        source: the folder with the published files anywhere below it, or finest.tar itself.
        out: the evaluator folder to write.
        mean: the evaluator's own mean.npy, where it is not below `source`.
        std: the std.npy that goes with it.
        glove: the folder with our_vab_data.npy, our_vab_words.pkl and our_vab_idx.pkl.
        overwrite: replace an existing evaluator.
    """
    from scamo.importers.t2m_evaluator import import_t2m_evaluator

    print(import_t2m_evaluator(source, out, mean=mean, std=std, glove=glove, overwrite=overwrite))


@app.command
def demo(
    run: Positional[Path | None] = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    *,
    model: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    dataset: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    count: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    device: str = "auto",
) -> None:
    """With --model a page that generates what you type; else pictures of sentences never trained on.

    RUN -o DIR writes DIR/motions.html, .png and .json. Beside each motion stands the nearest window of the
    training clips and its distance, so that a copy shows. `--model RUN` serves the page until Ctrl-C.

    Args:
        run: a training run or an exported model, for the pictures.
        out: folder for the pictures.
        model: a training run or an exported model, for the page.
        host: address that the page listens at; only this machine reaches the default one.
        port: of the page; 0 takes a free one.
        dataset: take the sentences from this dataset; the synthetic prompts without it.
        split: which part of the dataset.
        count: number of sentences, evenly spread.
        seed: of the sampling.
        temperature: of the sampling.
        device: auto, cpu or cuda.
    """
    if model is not None:
        if run is not None or out is not None or dataset is not None:
            raise ScaMoError("--model opens the page, RUN -o DIR draws pictures: give one of them")
        from scamo.view.server import demo_page

        demo_page(model, device=device, host=host, port=port)
        return
    if run is None or out is None:
        raise ScaMoError("expected RUN and -o DIR for pictures, or --model RUN for the page")
    from scamo.evaluation.demo import demo

    demo(
        run,
        out,
        dataset=dataset,
        split=split,
        count=count,
        seed=seed,
        temperature=temperature,
        device=device,
    )


@study.command(name="tokenizers")
def study_tokenizers(
    config: Positional[Path],
    *,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
    dry_run: bool = False,
) -> None:
    """Train and compare tokenizers of all families and sizes; the same command goes on after a stop.

    Args:
        config: the TOML of the study, as configs/study_tokenizers_cpu.toml.
        set: override a key of the config; may be repeated.
        dry_run: only print the tokenizers.
    """
    from scamo.studies.tokenizers import run_tokenizer_study

    _exit_after(run_tokenizer_study(config, overrides=set, dry_run=dry_run))


@study.command(name="report")
def study_report(
    results: Positional[Path], *, out: Annotated[Path | None, arg(aliases=["-o"])] = None
) -> None:
    """Draw a study of tokenizers again from its results.jsonl.

    Args:
        results: the folder of the study.
        out: folder for the report; the study's own without it.
    """
    from scamo.studies.tokenizer_report import report_tokenizer_study

    print("\n".join(str(path) for path in report_tokenizer_study(results, out)))


@study.command(name="text")
def study_text(
    config: Positional[Path],
    *,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Sentence or words, read causally or in both directions: train and measure each, over several seeds.

    Args:
        config: the TOML of the study, as configs/study_text.toml.
        set: override a key of the config; may be repeated.
        device: of the measurements: auto, cpu or cuda.
        dry_run: only print the cells.
    """
    from scamo.studies.text import run_text_study

    _exit_after(run_text_study(config, overrides=set, device=device, dry_run=dry_run))


@study.command(name="data")
def study_data(
    config: Positional[Path],
    *,
    set: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]] = (),
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Less data or worse data: train and measure every quantity with every quality.

    Args:
        config: the TOML of the study, as configs/study_data.toml.
        set: override a key of the config; may be repeated.
        device: of the measurements: auto, cpu or cuda.
        dry_run: only print the cells.
    """
    from scamo.studies.data import run_data_study

    _exit_after(run_data_study(config, overrides=set, device=device, dry_run=dry_run))


@study.command(name="metrics")
def study_metrics(
    grid: Positional[Path],
    *,
    evaluator: Path,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    protocol: Literal["humanml3d", "strict"] = "strict",
    split: str = "test",
    temperature: float = 1.0,
    seed: int = 0,
    items: int = 0,
    text_following: bool = True,
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Measure every run of a grid (FID, R-precision, matching, diversity) and rank the metrics against L_u.

    Args:
        grid: the folder that `scamo scaling run` wrote.
        evaluator: folder of an evaluator.
        out: folder for the results and the report; GRID/metrics without it.
        protocol: of the evaluation.
        split: whose captions are the prompts.
        temperature: of the sampling.
        seed: of the sampling.
        items: of the split, drawn once; 0 means all.
        text_following: also with the checked-in prompts of the synthetic corpus.
        device: auto, cpu or cuda.
        dry_run: only print the runs.
    """
    from scamo.studies.metrics import run_metrics_study

    failed = run_metrics_study(
        grid,
        evaluator,
        out=out,
        protocol=protocol,
        split=split,
        temperature=temperature,
        seed=seed,
        items=items,
        text_following=text_following,
        device=device,
        dry_run=dry_run,
    )
    _exit_after(failed)


@app.command
def quickstart(*, out: Out = Path("runs/quickstart"), ranks: int = 2) -> None:
    """The whole way once: corpus, tokenizer, ZeRO-3 training on the CPU, generation, measure, pictures.

    Args:
        out: folder for everything it writes.
        ranks: training processes.
    """
    from scamo.quickstart import quickstart

    quickstart(out, ranks=ranks)


app.command(prepare, name="prepare", help="Turn motion and captions into a dataset.")
app.command(data, name="data", help="Look into a dataset.")
app.command(tokenizer, name="tokenizer", help="Train, evaluate and apply the motion tokenizer.")
app.command(evaluator, name="evaluator", help="Train and judge the networks that metrics rest on.")
app.command(importers, name="import", help="Convert published checkpoints.")
app.command(study, name="study", help="Studies: tokenizers, text, data, and metrics against L_u.")
app.command(scaling, name="scaling", help="Scaling laws: runs of a grid, fits and predictions.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after a one-line message about bad input."""
    try:
        app.cli(prog="scamo", args=args, description="Text in, human motion out.", sort_subcommands=False)
    except ScaMoError as error:
        print(f"scamo: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("scamo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
