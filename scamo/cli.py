"""The `scamo` command: each command is a thin front of one public function, imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from scamo.errors import ScaMoError

Out = Annotated[Path, arg(aliases=["-o"])]

app = tyro.extras.SubcommandApp()
prepare = tyro.extras.SubcommandApp()
data = tyro.extras.SubcommandApp()
tokenizer = tyro.extras.SubcommandApp()
evaluate = tyro.extras.SubcommandApp()


@app.command
def doctor() -> None:
    """Print what this machine has (Python, torch, Triton, DeepSpeed, GPU, compiler) and what that permits."""
    from scamo.doctor import report

    print(report())


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
    target_offsets: Path | None = None,
    mirror: bool = True,
    min_frames: int = 40,
    max_frames: int = 200,
    overwrite: bool = False,
) -> None:
    """Read a HumanML3D-shaped folder and write it as a dataset, with a report of what was refused and why.

    Args:
        source: folder with texts/, train.txt, val.txt, test.txt and new_joint_vecs/ or joints/ (new_joints/).
        out: the dataset folder to write.
        target_offsets: (22, 3) .npy of the uniform skeleton, used with joints; the bones are kept without it.
        mirror: make the mirrored copies (M...) that the split lists name and the folder lacks.
        min_frames: shorter clips are refused.
        max_frames: clips of this many frames or more are refused.
        overwrite: replace an existing dataset.
    """
    from scamo.data.prepare.humanml3d import prepare_humanml3d

    prepare_humanml3d(
        source,
        out,
        target_offsets=target_offsets,
        mirror=mirror,
        min_frames=min_frames,
        max_frames=max_frames,
        overwrite=overwrite,
    )


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
    """Train the Motion FSQ-VAE on the train split of a dataset.

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
    split: Literal["train", "val", "test"] = "test",
    device: str = "auto",
) -> None:
    """Print the reconstruction error and the codebook use of a tokenizer as JSON.

    Args:
        tokenizer: the tokenizer folder.
        dataset: the dataset folder.
        split: which part of it.
        device: auto, cpu or cuda.
    """
    import json

    from scamo.tokenizers.evaluate import evaluate_tokenizer

    print(json.dumps(evaluate_tokenizer(tokenizer, dataset, split=split, device=device), indent=2))


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
def generate(
    text: Positional[tuple[str, ...]],
    out: Out = Path("motion.html"),
    *,
    run: Path = Path("runs/quickstart/run"),
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    max_seconds: float | None = None,
    device: str = "auto",
) -> None:
    """Generate motion from one or more sentences.

    Args:
        text: the sentences. With several, all go into one .html or .png, else into OUT-0, OUT-1, ...
        out: where to write; the suffix says what: .npz, .npy, .gif, .mp4, .png or .html.
        run: a training run or an exported model.
        seed: the same seed and sentence give the same motion, alone or among others.
        temperature: of the sampling; below 1 is more careful.
        top_k: sample among the k likeliest tokens only; 0 means all.
        top_p: sample among the likeliest tokens that have this much probability together.
        greedy: take the likeliest token every time.
        max_seconds: length limit; 10 s at most for the released sizes.
        device: auto, cpu or cuda.
    """
    from scamo.generation.api import ScaMo
    from scamo.motion.motion import check_suffix, save_motions

    check_suffix(out)
    if not text:
        raise ScaMoError("no sentence to generate from: give one or more, in quotes")
    model = ScaMo.load(run, device=device)
    motions = model.generate(
        list(text),
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        max_seconds=max_seconds,
    )
    for path in save_motions(motions, out):
        print(path)


@app.command
def view(motion: Positional[Path], out: Out) -> None:
    """Draw a stored motion (.npz with joints, or .npy of joints or features) as .gif, .mp4, .png or .html.

    Args:
        motion: the motion file.
        out: the picture to write.
    """
    from scamo.motion.motion import Motion

    Motion.load(motion).save(out)
    print(out)


@evaluate.command(name="text-following")
def evaluate_text_following(
    run: Positional[Path],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    greedy: bool = False,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Generate one motion for each of the 400 checked-in prompts and measure whether it does what they say.

    Args:
        run: a training run or an exported model that was trained on the synthetic corpus.
        seed: of the sampling.
        temperature: of the sampling.
        greedy: take the likeliest token every time.
        out: also write the report as JSON.
        device: auto, cpu or cuda.
    """
    from scamo.evaluation.run_text_following import run_text_following

    run_text_following(run, seed=seed, temperature=temperature, greedy=greedy, out=out, device=device)


@app.command
def demo(
    run: Positional[Path],
    out: Out,
    *,
    dataset: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    count: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    device: str = "auto",
) -> None:
    """Generate motions for sentences that were never trained on, and write OUT/motions.html, .png and .json.

    Beside each motion stands the nearest window of the training clips and its distance, so that a copy shows.

    Args:
        run: a training run or an exported model.
        out: folder for the pictures.
        dataset: take the sentences from this dataset; the synthetic prompts without it.
        split: which part of the dataset.
        count: number of sentences, evenly spread.
        seed: of the sampling.
        temperature: of the sampling.
        device: auto, cpu or cuda.
    """
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
app.command(evaluate, name="evaluate", help="Measure a trained model.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after a one-line message about bad input."""
    try:
        app.cli(prog="scamo", args=args, description="Text in, human motion out.", sort_subcommands=False)
    except ScaMoError as error:
        print(f"scamo: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
