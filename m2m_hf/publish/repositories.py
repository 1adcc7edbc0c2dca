"""What the Hub repositories of a run hold: files, cards, licences."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import httpx2
import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, though in no __all__
from safetensors import safe_open

from m2m_hf import __version__
from m2m_hf.config.checks import exists, hub_field
from m2m_hf.config.yaml_files import dump_yaml
from m2m_hf.core.jsonable import from_json
from m2m_hf.errors import InputError, redact
from m2m_hf.publish.export import read_outcome
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.tables import score_figure, stand_in, with_error
from m2m_hf.storage.files import read_json_or_empty
from m2m_hf.storage.records import files_of, find_incomplete
from m2m_hf.storage.run_folder import END, RunFolder

# What a push has put there before, and takes away when it is no longer part of the run; see `put_before`.
OWN = (
    "adapters/", "pictures/", "train.jsonl", "train.parquet", "head.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "training.json",
)  # fmt: skip

# The Hub's name of a task, and the class that loads its models.
TASKS = {
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "image_classification": ("image-classification", "AutoModelForImageClassification"),
}

LABELS = ("labels", "id2label", "among")  # names, which may look like paths

PATHS = re.compile(r"(?<![\w/:.~])(?:file://)?(?:\.{0,2}/|~/)(?:[^\s/'\"=:,;()\[\]]+/)+([^\s/'\"=:,;()\[\]]*)")

# As the Hub spells them: those under which rows may be published again, with their source named.
SHARE_ALIKE = ("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odbl", "cdla-sharing-1.0", "gfdl")

REPUBLISHABLE = {
    "apache-2.0", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "zlib", "unlicense", "wtfpl", "cc0-1.0", "pddl",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "odc-by",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "afl-3.0", "artistic-2.0", "ecl-2.0", *SHARE_ALIKE,
}  # fmt: skip

Files = dict[str, bytes | Path]
# The client wraps what goes wrong with a large file in a RuntimeError.
FAILURES = (
    HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError, OSError, RuntimeError
)  # fmt: skip


@dataclass
class Repository:
    """What a repository of some kind, `model` or `dataset`, is to hold.

    Args:
        files: path in the repository -> content, or the file that has it.
        notes: what whoever pushes should know.
    """

    kind: str
    files: Files
    notes: list[str]


def published(value: Any) -> Any:
    """`value` as others may see it: of absolute paths the last part alone, and no secrets."""
    if isinstance(value, Mapping):
        return {key: one if key in LABELS else published(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [published(one) for one in value]
    if isinstance(value, str):
        if PureWindowsPath(value).drive:
            return PureWindowsPath(value).name
        if "/" in value and Path(value).name and exists(Path(value)):  # whole: it may have spaces in it
            return Path(value).name
        return redact(PATHS.sub(r"\1", value))
    return value


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def row_licenses(manifest: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """(licences of the mixture's rows, why the rows may not be published; None where they may)."""
    found = {name: (one["source"].get("license") or "").lower() for name, one in manifest["sources"].items()}
    missing = [name for name, one in found.items() if one not in REPUBLISHABLE]
    licenses = sorted({one for one in found.values() if one})
    if missing:
        given = ", ".join(f"{name} ({found[name] or 'none given'})" for name in missing)
        return licenses, (
            f"rows not published: the license of {given} is not known to permit it; if it does, set "
            f"candidates.{missing[0]}.license: cc-by-4.0"
        )
    if len(licenses) > 1 and set(licenses) & set(SHARE_ALIKE):
        return licenses, f"rows not published: {' and '.join(licenses)} cannot be combined in one dataset"
    return licenses, None


def base_model(finished: FinishedRun) -> tuple[str, bool]:
    """(how the base model is called, whether that is its id on the Hub)."""
    name = str(finished.config["model_name_or_path"])
    local = os.path.isabs(name) or Path(name).is_dir()
    return (Path(name).name, False) if local else (name, True)


def license_of(name: str) -> str | None:
    """The license that a model's card states; None where there is no card, or no license in it."""
    try:
        found = ModelCard.load(name, ignore_metadata_errors=True).data.get("license")
    except FAILURES:
        return None
    return found if isinstance(found, str) else None


def license_fields(license: str | None, name: str, link: str | None) -> dict[str, Any]:
    """Of a card's metadata: one that the Hub knows, or where to read about it."""
    return {"license": license} if license else {"license": "other", "license_name": name, "license_link": link}


def expert_files(folder: Path, where: str) -> Files:
    """What was trained, and its `training.json`, which tells how to recognise what is published of it."""
    if reason := find_incomplete(folder):
        raise InputError(f"{folder}: {reason}; m2m select makes it again")
    training = read_json_or_empty(folder / "training.json")
    files: Files = {}
    described = files_of(training)
    described.pop("README.md", None)  # we have our own
    for name in described:
        files[where + name] = folder / name
        if name.endswith("config.json"):  # not every JSON: a vocabulary's tokens may look like paths
            content = as_json(published(json.loads((folder / name).read_text(encoding="utf-8"))))
            files[where + name] = content
            described[name] = {"bytes": len(content), "sha256_16": hashlib.sha256(content).hexdigest()[:16]}
    return files | {f"{where}training.json": as_json(published(training | {"files": described}))}


def plan(run: RunFolder, repo_id: str) -> list[Repository]:
    """What the repositories `repo_id` are to hold: first the dataset's, then the model's."""
    check_name(repo_id)
    finished = FinishedRun.from_pretrained(run.root)
    recipe, manifest = read_outcome(run)
    head: Files = {}
    if has_names(recipe):
        if not run.head.exists():
            raise InputError(f"{run.head} is missing; m2m search writes it again")
        head = {run.head.name: run.head}
    dataset = mixture_repository(run, finished, repo_id, recipe, manifest)
    model = model_repository(run, finished, repo_id, recipe)
    return [replace(one, files=head | one.files) for one in (dataset, model)]


def has_names(recipe: Mapping[str, Any]) -> bool:
    """Whether the head of a run is made of labels' names, and stands in a file."""
    return "file" in recipe.get("head", {})


def check_name(repo_id: str) -> None:
    """Refuses what can be no repository's id."""
    try:
        validate_repo_id(repo_id)
        valid = re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII)
    except HFValidationError:
        valid = None
    if not valid:
        raise InputError(
            "repo_id: expected org/name, of letters, digits, '.', '-' and '_', no '--' or '..' and no .git at the end, got "
            f"{repo_id!r}"
        )


def mixture_repository(
    run: RunFolder, finished: FinishedRun, repo_id: str, recipe: dict[str, Any], manifest: Mapping[str, Any]
) -> Repository:
    licenses, refusal = row_licenses(manifest)
    rows, labelled = run.rows.name, finished.task != "causal_lm"
    command = recipe_command(finished)
    comment = (
        f"The chosen mixture: {finished.best.mixture}\nRun it {'in this folder ' if labelled else ''}with: {command}"
    )
    if refusal:
        comment += f"\n{rows} is made from the sources in manifest.json; it may not be published."
    link = f"https://huggingface.co/datasets/{repo_id}/blob/main/manifest.json"
    sources = [one["source"] for one in manifest["sources"].values()]
    card = DatasetCardData(
        **license_fields(licenses[0] if len(licenses) == 1 else None, "see-sources", link),
        tags=["merge-to-mix"] if labelled else ["merge-to-mix", "instruction-tuning"],
        task_categories=[TASKS[finished.task][0]],
        source_datasets=[source["path"] for source in sources if on_hub(source)] or None,
        configs=None if refusal else [{"config_name": "default", "data_files": rows}],
        viewer=False if refusal else None,
    )
    text = render(
        "dataset_card.md.jinja", finished, repo_id, card, manifest=manifest, refusal=refusal, on_hub=on_hub,
        command=command, labelled=labelled, has_names=has_names(recipe),
    )  # fmt: skip
    moved = published(moved_recipe(run, finished, recipe, None if refusal else repo_id))
    files: Files = {
        "README.md": text,
        "manifest.json": as_json(published(manifest)),
        "recipe.yaml": dump_yaml(moved, comment).encode(),
    }
    if not refusal:
        files[rows] = run.rows
    return Repository("dataset", files, [refusal] if refusal else [])


def moved_recipe(run: RunFolder, finished: FinishedRun, recipe: dict[str, Any], dataset: str | None) -> dict[str, Any]:
    """The recipe as it runs elsewhere: in a folder with its files, or with the rows of a dataset on the Hub."""
    recipe = recipe | {"model_name_or_path": base_model(finished)[0]}
    if finished.task != "causal_lm":
        head = recipe["head"] | ({"file": run.head.name} if has_names(recipe) else {})
        training = recipe["training"] | {"output_dir": Path(recipe["training"]["output_dir"]).name}
        return recipe | {"train_file": run.rows.name, "head": head, "training": training}
    (data,) = recipe["datasets"]
    if dataset is None:
        data = data | {"data_files": run.rows.name}
    else:
        data = {"path": dataset, "split": "train", "columns": data["columns"]}
    return recipe | {"datasets": [data], "output_dir": "trl"}


def recipe_command(finished: FinishedRun) -> str:
    """What runs the published recipe."""
    runner = "trl sft" if finished.task == "causal_lm" else "m2m recipe classify"
    return f"{runner} --config recipe.yaml"


def on_hub(source: Mapping[str, Any]) -> bool:
    """Whether rows came from a dataset on the Hub, as its path tells."""
    path = source.get("path") or ""
    return "/" in path and not os.path.isabs(path) and not source.get("data_files")


def model_repository(run: RunFolder, finished: FinishedRun, repo_id: str, recipe: Mapping[str, Any]) -> Repository:
    name, is_id = base_model(finished)
    license_name = license_of(str(finished.config["model_name_or_path"]))
    task = TASKS[finished.task][0]
    results = [
        EvalResult(
            task_type=task, dataset_type=target, dataset_name=target, dataset_split=part,
            metric_type=finished.targets[target].metric or "score", metric_value=one.score,
        )
        for target, scores in (finished.final.scores.items() if finished.final else ())
        for part, one in scores["final"].items()
    ]  # fmt: skip
    chosen = [finished.config["candidates"][one] for one in finished.best.mixture.names]
    tags = [*([] if finished.full else ["lora"]), *(["sft", "trl"] if finished.task == "causal_lm" else [])]
    card = ModelCardData(
        base_model=name if is_id else None,
        library_name="transformers" if finished.full else "peft",
        pipeline_tag=task,
        **license_fields(license_name, "as-the-base-model", f"https://huggingface.co/{name}" if is_id else None),
        tags=["merge-to-mix", *tags],
        datasets=[repo_id, *sorted({one["path"] for one in chosen if on_hub(one)})],
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )
    pictures = sorted(run.pictures.glob("*.png"))
    config = published({key: one for key, one in finished.config.items() if not hub_field(key)}) | {"output_dir": "run"}
    files: Files = {
        "README.md": render(
            "model_card.md.jinja", finished, repo_id, card, pictures=[path.stem for path in pictures], base=name,
            command=recipe_command(finished), recipe=recipe, use=use(run, finished, recipe),
        ),
        "config.yaml": (dump_yaml(config, "The configuration of the run.") + END).encode(),
        "summary.json": as_json(published(finished.summary())),
        **{f"pictures/{path.name}": path for path in pictures},
    }  # fmt: skip
    for candidate in finished.candidates:
        files |= expert_files(run.adapters / candidate, f"adapters/{candidate}/")
    notes = [] if is_id else [f"the base model is a local folder; only its name is published, {name}"]
    if finished.final:
        files |= expert_files(run.final, "")
    else:
        notes.append("there is no final model yet; m2m sft makes it, and the same command then adds it")
    return Repository("model", files, notes)


def use(run: RunFolder, finished: FinishedRun, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a card's example of use is made of beside the recipe: classes, how features are pooled, and labels."""
    names, head = has_names(recipe), recipe.get("head", {})
    pooling = None
    if names:
        with safe_open(run.head, "np") as file:
            pooling = json.loads(file.metadata()["head"])["pooling"]
    images = finished.task == "image_classification"
    targets = finished.config["targets"] if finished.task != "causal_lm" else {}
    asked = {name: labels for name, one in targets.items() if (labels := one.get("labels"))}
    return {
        "loads": recipe["model_class"] if names else TASKS[finished.task][1],
        "prepares": "AutoImageProcessor" if images else "AutoTokenizer",
        "images": images,
        "names": names,
        "pooling": pooling,
        "closed": head.get("closed"),
        "labels": head.get("labels") if finished.config.get("labels") else None,  # else all that the classifier has
        "asked": {
            name: sorted(set(labels.values() if isinstance(labels, dict) else labels)) for name, labels in asked.items()
        },
    }


def render(template: str, finished: FinishedRun, repo_id: str, card: Any, **more: Any) -> bytes:
    """A card: metadata and a page, in which whatever comes from the run is shown as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2m_hf.publish"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.globals |= {"score_figure": score_figure, "stand_in": stand_in, "with_error": with_error}
    shown = from_json(FinishedRun, {**published(finished.summary()), "config": finished.config})
    page = environment.get_template(template).render(run=shown, repo_id=repo_id, version=__version__, **more)
    return redact(f"---\n{card.to_yaml()}\n---\n\n{page}").encode()
