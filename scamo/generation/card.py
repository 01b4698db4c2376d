"""The model card of a published model: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scamo.config import ModelConfig
from scamo.data.dataset import FORMAT as DATASET_FORMAT
from scamo.data.dataset import SCHEMA_VERSION as DATASET_SCHEMA
from scamo.data.storage import read_manifest, sha256_of
from scamo.errors import ScaMoError
from scamo.evaluation.report import FORMAT as REPORT_FORMAT
from scamo.evaluation.report import MAIN, summary
from scamo.motion.representation import Representation
from scamo.weights import CONFIG

TAGS = ["text-to-motion", "human-motion", "motion-generation", "scamo"]
PIPELINE = "text-to-3d"  # the nearest that the hub has

# What is known of a dataset by the command that made it; the second: whether others' licences may bind.
SOURCES = {
    "synthetic": ("procedural clips and captions (`scamo prepare synthetic`): nobody's recordings", False),
    "humanml3d": ("motion capture and captions in HumanML3D's layout (`scamo prepare humanml3d`)", True),
    "mocap": ("motion capture from BVH or ASF/AMC files (`scamo prepare mocap`)", True),
    "amass": ("AMASS with HumanML3D's captions (`scamo prepare amass`)", True),
    "union": ("a mixture of datasets (`scamo prepare union`)", True),
}
TRAINING = (
    "steps",
    "micro_batch_tokens",
    "micro_batches",
    "learning_rate",
    "min_learning_rate",
    "betas",
    "weight_decay",
    "warmup_ratio",
    "clip_norm",
    "drop_token",
    "drop_text",
    "ema_decay",
    "seed",
)


class Card(NamedTuple):
    """text: README.md. warnings: what it says in bold, one line each."""

    text: str
    warnings: list[str]


class Sizes(NamedTuple):
    """Parameters of transformer and tokenizer, bytes of the transformer, frames of the longest motion."""

    transformer: int
    tokenizer: int
    weights: int
    frames: int


class Report(NamedTuple):
    """A report of `scamo evaluate`: its .json, what it holds, and its Markdown."""

    path: Path
    data: dict[str, Any]
    markdown: str

    def copy(self, folder: Path) -> None:
        """Copy the .json, and the .md beside it, into a folder that may not exist yet."""
        folder.mkdir(exist_ok=True)
        for path in (self.path, self.path.with_suffix(".md")):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def read_reports(folder: Path, more: Sequence[str | Path] = ()) -> list[Report]:
    """The reports of a run's evaluation folder, if it has one, and those of `more`, each .json once.

    Raises ScaMoError naming the file that is no report, or two of one name.
    """
    reports: dict[str, Report] = {}
    for path in [*sorted(folder.glob("*.json")), *map(Path, more)]:
        before = reports.get(path.name)
        if before and before.path.resolve() != path.resolve():
            raise ScaMoError(f"{path}: {before.path} has the same name: rename one")
        reports[path.name] = _read_report(path)
    return list(reports.values())


def _read_report(path: Path) -> Report:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        beside = path.with_suffix(".md")
        if data.get("format") == REPORT_FORMAT:
            # What was written with the report: an older one may lack what is summed up today.
            text = beside.read_text(encoding="utf-8") if beside.is_file() else summary(data)
        elif "prompts_sha256" in data:
            from scamo.evaluation.run_text_following import summary as text_following

            how = ", ".join(f"{key} {value}" for key, value in data["sampling"].items())
            text = f"Text-following, measured on joints ({how}).\n\n```\n{text_following(data)}\n```"
        else:
            raise ScaMoError(f"{path}: is no report of `scamo evaluate`")
        result = _result(data)
    except OSError as error:
        raise ScaMoError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ScaMoError(f"{path}: is no report of this version: {type(error).__name__}: {error}") from None
    return Report(path, data | {"model-index": result}, text.strip())


def _result(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result of the hub's model-index; None where no model was measured."""
    task = {"type": "text-to-motion", "name": "text to motion"}
    if "prompts_sha256" in data:
        return {
            "task": task,
            "dataset": {"name": "checked-in prompts", "type": "scamo-text-following"},
            "metrics": [
                {
                    "type": "text_following_exact",
                    "name": "all slots right",
                    "value": data["exact"],
                    "args": {"prompts_sha256": data["prompts_sha256"], **data["sampling"]},
                }
            ],
        }
    row = next((row for row in data["rows"] if row["name"] == "generated"), None)
    if row is None:
        return None
    evaluator, settings = data["evaluator"], data["settings"]
    how = {"evaluator_sha256": evaluator["sha256"], "seed": settings["seed"]}
    how |= {key: settings[key] for key in ("temperature", "top_k", "top_p", "greedy")}
    return {
        "task": task,
        "dataset": {
            "name": data["dataset"]["name"],
            "type": _slug(data["dataset"]["name"]),
            "config": data["protocol"],
            "split": data["split"],
            "revision": data["dataset"]["manifest_sha256"],
        },
        "metrics": [
            {
                "type": key,
                "name": heading.rstrip(" ↑↓→"),
                "value": row["metrics"][key]["value"],
                "args": {**how},
            }
            for key, (heading, _, _) in MAIN.items()
            if row["metrics"].get(key, {}).get("value") is not None
        ],
    }


def provenance_of(run: Path, *, average: bool) -> dict[str, Any]:
    """How a run was trained and on what, from its config.json, its log and the dataset where it still lies.

    average: whether the weights are the moving average. Empty for a folder that is no run.
    """
    try:
        stored = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not str(stored.get("format", "")).startswith("scamo-run-"):
        return {}
    folder, digest = Path(stored["data"]["dataset"]), stored["fingerprint"]["dataset"]
    dataset: dict[str, Any] = {"name": folder.name, "manifest_sha256": digest}
    if (folder / "manifest.json").is_file() and sha256_of(folder / "manifest.json") == digest:
        manifest = read_manifest(folder, format=DATASET_FORMAT, schema_version=DATASET_SCHEMA)
        dataset |= {"made_by": manifest["provenance"], "train": manifest["splits"].get("train", {})}
    found = {
        "run": run.resolve().name,
        "training": stored["training"],
        "weights": "moving average" if average else "last step",
        "precision": stored["precision"],
        "ranks": stored["ranks"],
        "zero_stage": stored["ds_config"].get("zero_optimization", {}).get("stage"),
        "dataset": dataset,
    }
    found["training"].pop("run", None)  # a path of this machine
    last = [line for line in _log(run / "log.jsonl") if line.get("kind") == "val"][-1:]
    if last:
        found["validation"] = {key: last[0][key] for key in ("step", "loss", "l_u") if key in last[0]}
    return found


def _log(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # a line that a stop cut off
                continue


def model_card(
    folder: str,
    description: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Mapping[str, Any],
    sizes: Sizes,
    reports: Sequence[Report],
) -> Card:
    """The card of a model. folder: its name; description, tokenizer: the config.json of both."""
    import yaml

    warnings: list[str] = []
    source = description["provenance"]
    name = source.get("name") or folder
    results = [report.data["model-index"] for report in reports if report.data["model-index"]]
    head: dict[str, Any] = _license(source.get("license", ""))
    head |= {"library_name": "scamo", "pipeline_tag": PIPELINE, "tags": TAGS}
    if source.get("datasets"):
        head["datasets"] = source["datasets"]
    if results:
        head["metrics"] = list(dict.fromkeys(m["type"] for result in results for m in result["metrics"]))
        head["model-index"] = [{"name": name, "results": results}]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=100)
    seconds = sizes.frames / description["fps"]
    about = source.get("description") or "A text-to-motion transformer: a sentence in, human motion out."
    parts = [
        f"---\n{front}---",
        f"# {name}\n\n{about}",
        _use(folder, description),
        "## Sizes\n\n"
        "| part | parameters | |\n|---|---|---|\n"
        f"| transformer | {sizes.transformer:,d} | {config.layers} layers, width {config.width}, "
        f"{config.heads} heads; {sizes.weights / 1e6:,.1f} MB |\n"
        f"| motion tokenizer | {sizes.tokenizer:,d} | {tokenizer['format']}, {config.codes:,d} codes |\n"
        f"| text encoder | not in this folder | `{description['text_encoder']}`, states of width "
        f"{config.text_width} |",
        "## Licences\n\n" + _licences(description, tokenizer, warnings),
        "## Training\n\n" + _training(source, tokenizer),
        "## Measured\n\n" + _measured(reports),
        "## Limits\n\n"
        f"- A motion has at most {sizes.frames} frames, {seconds:g} s at {description['fps']:g} fps; of a "
        f"sentence the first {config.max_text} word pieces are read.\n"
        f"- {_body(tokenizer)}\n"
        "- It knows the motions and the words of its training data; how well it does on others is what the "
        "measures above say, and no more. Feet may slide.",
    ]
    return Card("\n\n".join(parts) + "\n", warnings)


def _body(tokenizer: Mapping[str, Any]) -> str:
    representation = Representation.of(tokenizer["tokenizer"]["feature_dim"])
    what = "those of the features" if representation.true_rotations else "fitted to joint positions"
    return (
        f"One body of {representation.n_joints} joints ({representation.feature_dim} features a frame), "
        f"without hands, face, shape, objects or other people. Rotations in .bvh and .glb are {what}."
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def _license(license: str) -> dict[str, str]:
    """The hub's fields of a licence: its identifier, a name of one's own, or that nobody has said."""
    if not license:
        return {"license": "unknown"}
    if re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9.]+)*", license):
        return {"license": license}
    return {"license": "other", "license_name": _slug(license)}


def _use(folder: str, description: Mapping[str, Any]) -> str:
    need = "scamo[minilm]" if description["text_encoder"] == "minilm" else "scamo"
    return (
        "## Use\n\n"
        f"With `{need}` installed and this folder at hand "
        f"(`hf download OWNER/{folder} --local-dir {folder}`):\n\n"
        "```python\n"
        "from scamo import ScaMo\n\n"
        f"model = ScaMo.load({json.dumps(folder)})\n"
        'motion = model.generate("a person walks in a circle", seed=0)\n'
        'motion.save("walk.bvh")  # or .npz .csv .glb .gif .mp4 .png .html\n'
        "```\n\n"
        "Weights are safetensors, the rest is JSON: nothing is unpickled. Loading compares weights, "
        "tokenizer and settings with their SHA-256 in `manifest.json`."
    )


def _licences(description: Mapping[str, Any], tokenizer: Mapping[str, Any], warnings: list[str]) -> str:
    source = description["provenance"]
    dataset = source.get("dataset", {})
    made_by = dataset.get("made_by", {})
    lines = []

    def warn(text: str) -> None:
        warnings.append(text)
        lines.append(f"- **WARNING: {text}**")

    if source.get("license"):
        lines.append(f"- The weights: {source['license']}.")
    else:
        warn("no licence of the weights is stated: nobody may use or pass on this model until one is.")
    what, others = SOURCES.get(made_by.get("source"), ("", True))
    stated = source.get("data_license") or made_by.get("license")
    if stated:
        lines.append(f"- The training data: {stated}. What it demands binds this model too.")
    elif others:
        warn(
            "the licence of the training data is not stated. Motion-capture data often forbid commercial use "
            "or passing on what was made from them, and bind the model as well (HumanML3D: the licences of "
            "AMASS and HumanAct12)."
        )
    else:
        lines.append(f"- The training data: {what}, so no licence of others binds the model.")
    own = tokenizer.get("provenance", {}).get("dataset", {})
    if own and dataset and own.get("manifest_sha256") != dataset["manifest_sha256"]:
        warn(
            f"the tokenizer was trained on another dataset, {own.get('name')} "
            f"({str(own.get('manifest_sha256'))[:12]}): its licence binds the model too."
        )
    encoder = description["text_encoder"]
    if Path(encoder).is_absolute() or Path(encoder).is_dir():
        warn(
            f"the text encoder is a folder of the machine that trained the model ({encoder}): others cannot "
            "load it by this name."
        )
    lines.append("- The text encoder is loaded from elsewhere and has a licence of its own.")
    return "\n".join(lines)


def _training(source: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str:
    lines = []
    if "training" in source:
        dataset, training = source["dataset"], source["training"]
        train = dataset.get("train", {})
        made_by = dataset.get("made_by")
        if made_by is None:
            what = "**its description was not at hand when this card was written.**"
        else:
            what = SOURCES.get(made_by.get("source"), (json.dumps(made_by), True))[0]
            counts = (f"{train.get(key, 0):,d} {key}" for key in ("clips", "captions", "frames"))
            what += f"; train split of {', '.join(counts)}."
        lines.append(f"- Dataset `{dataset['name']}` (manifest {dataset['manifest_sha256'][:12]}): {what}")
        settings = ", ".join(f"{key} {training[key]}" for key in TRAINING if key in training)
        lines.append(
            f"- DeepSpeed ZeRO-{source['zero_stage']}, {source['ranks']} ranks, {source['precision']}."
        )
        lines.append(f"- {settings}. The weights are those of the {source['weights']}.")
        if "validation" in source:
            last = source["validation"]
            lines.append(
                f"- Validation at step {last['step']}: loss {last['loss']:.4f}, L_u {last['l_u']:+.4f}."
            )
    elif "importer" in source:
        files = ", ".join(f"{file['name']} ({file['sha256'][:12]})" for file in source["files"])
        lines.append(f"- Converted by `{source['importer']}` from {files}; its training is described there.")
    else:
        lines.append("- **Nothing is known of the training: this was made from a model without its run.**")
    made = tokenizer.get("provenance", {})
    if "dataset" in made:
        lines.append(
            f"- Tokenizer: {made.get('step', '?')} steps on `{made['dataset']['name']}` "
            f"(manifest {made['dataset']['manifest_sha256'][:12]})."
        )
    return "\n".join(lines)


def _measured(reports: Sequence[Report]) -> str:
    if not reports:
        return "**Nothing was measured on this model, or no report was given.**"
    return "\n\n".join(f"### {report.path.stem}\n\n{report.markdown}" for report in reports)
