"""What the Hub repositories of a run hold: files, cards, licences."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import httpx2
import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
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

Files = dict[str, bytes | Path]  # path in the repository -> content, or the file that has it
# The client's errors are OSErrors, but for a bad name and for what goes wrong with a large file, a RuntimeError.
FAILURES = (HFValidationError, httpx2.HTTPError, OSError, RuntimeError)


@dataclass
class Repository:
    """What a repository is to hold, and what whoever pushes should know."""

    kind: str  # `model` or `dataset`
    files: Files
    notes: list[str]


def published(value: Any) -> Any:
    """`value` as others may see it: of absolute paths the last part alone, no address of a judge, and no secrets."""
    if isinstance(value, Mapping):
        shown = {key: one for key, one in value.items() if key != "base_url"}
        return {key: one if key in LABELS else published(one) for key, one in shown.items()}
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


def on_hub(source: Mapping[str, Any]) -> bool:
    """Whether rows came from a dataset on the Hub, as its path tells."""
    path = source.get("path") or ""
    return "/" in path and not os.path.isabs(path) and not source.get("data_files")


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


def plan(run: RunFolder, repo_id: str) -> list[Repository]:
    """What the repositories `repo_id` are to hold: first the dataset's, then the model's."""
    check_name(repo_id)
    finished = FinishedRun.from_pretrained(run.root)
    recipe, manifest = read_outcome(run)
    outcome = Outcome(run, finished, repo_id, recipe, manifest)
    if outcome.has_names and not run.head.exists():
        raise InputError(f"{run.head} is missing; m2m search writes it again")
    return [outcome.dataset(), outcome.model()]


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to publish, as `repo_id`."""

    run: RunFolder
    finished: FinishedRun
    repo_id: str
    recipe: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def labelled(self) -> bool:
        return self.finished.task != "causal_lm"

    @property
    def has_names(self) -> bool:
        """Whether the head is made of labels' names, and stands in a file."""
        return "file" in self.recipe.get("head", {})

    @property
    def head_files(self) -> Files:
        return {self.run.head.name: self.run.head} if self.has_names else {}

    @property
    def command(self) -> str:
        """What runs the published recipe."""
        return f"{self.finished.recipe_runner} --config recipe.yaml"

    @property
    def base_model(self) -> tuple[str, bool]:
        """(how the base model is called, whether that is its id on the Hub)."""
        name = str(self.finished.config["model_name_or_path"])
        local = os.path.isabs(name) or Path(name).is_dir()
        return (Path(name).name, False) if local else (name, True)

    def dataset(self) -> Repository:
        """The mixture: its rows where they may be published, its manifest and recipe."""
        licenses, refusal = row_licenses(self.manifest)
        rows = self.run.rows.name
        comment = f"The chosen mixture: {self.finished.best.mixture}\nRun it "
        comment += (
            f"{'in this folder ' if self.labelled or 'chat_template_path' in self.recipe else ''}with: {self.command}"
        )
        if refusal:
            comment += f"\n{rows} is made from the sources in manifest.json; it may not be published."
        link = f"https://huggingface.co/datasets/{self.repo_id}/blob/main/manifest.json"
        sources = [one["source"] for one in self.manifest["sources"].values()]
        card = DatasetCardData(
            **license_fields(licenses[0] if len(licenses) == 1 else None, "see-sources", link),
            tags=["merge-to-mix"] if self.labelled else ["merge-to-mix", "instruction-tuning"],
            task_categories=[TASKS[self.finished.task][0]],
            source_datasets=[source["path"] for source in sources if on_hub(source)] or None,
            configs=None if refusal else [{"config_name": "default", "data_files": rows}],
            viewer=False if refusal else None,
        )
        recipe = published(self.moved_recipe(None if refusal else self.repo_id))
        files: Files = {
            "README.md": self.render("dataset_card.md.jinja", card, refusal=refusal, on_hub=on_hub),
            "manifest.json": as_json(published(self.manifest)),
            "recipe.yaml": dump_yaml(recipe, comment).encode(),
            **self.head_files,
        }
        if template := self.recipe.get("chat_template_path"):
            files[Path(template).name] = Path(template)
        if not refusal:
            files[rows] = self.run.rows
        return Repository("dataset", files, [refusal] if refusal else [])

    def moved_recipe(self, dataset: str | None) -> dict[str, Any]:
        """The recipe as it runs elsewhere: in a folder with its files, or with the rows of a dataset on the Hub."""
        recipe, rows = self.recipe | {"model_name_or_path": self.base_model[0]}, self.run.rows.name
        if self.labelled:
            head = recipe["head"] | ({"file": self.run.head.name} if self.has_names else {})
            training = recipe["training"] | {"output_dir": Path(recipe["training"]["output_dir"]).name}
            return recipe | {"train_file": rows, "head": head, "training": training}
        (data,) = recipe["datasets"]
        published_data = {"path": dataset, "split": "train", "columns": data["columns"]}
        return recipe | {"datasets": [published_data if dataset else data | {"data_files": rows}], "output_dir": "trl"}

    def model(self) -> Repository:
        """All experts, the final model, and what the run found."""
        run, finished = self.run, self.finished
        name, is_id = self.base_model
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
        tags = ["merge-to-mix", *([] if finished.full else ["lora"]), *([] if self.labelled else ["sft", "trl"])]
        card = ModelCardData(
            base_model=name if is_id else None,
            library_name="transformers" if finished.full else "peft",
            pipeline_tag=task,
            **license_fields(license_name, "as-the-base-model", f"https://huggingface.co/{name}" if is_id else None),
            tags=tags,
            datasets=[self.repo_id, *sorted({one["path"] for one in chosen if on_hub(one)})],
            model_name=self.repo_id.split("/")[1] if results else None,
            eval_results=results or None,
        )
        pictures = {path.stem: path for path in sorted(run.pictures.glob("*.png"))}
        config = published({key: one for key, one in finished.config.items() if not hub_field(key)})
        config["output_dir"] = "run"
        files: Files = {
            "README.md": self.render("model_card.md.jinja", card, pictures=[*pictures], base=name),
            "config.yaml": (dump_yaml(config, "The configuration of the run.") + END).encode(),
            "summary.json": as_json(published(finished.summary())),
            **{f"pictures/{path.name}": path for path in pictures.values()},
            **self.head_files,
        }
        for candidate in finished.candidates:
            files |= expert_files(run.adapters / candidate, f"adapters/{candidate}/")
        notes = [] if is_id else [f"the base model is a local folder; only its name is published, {name}"]
        if finished.final:
            files |= expert_files(run.final, "")
        else:
            notes.append("there is no final model yet; m2m sft makes it, and the same command then adds it")
        return Repository("model", files, notes)

    @property
    def pooling(self) -> str | None:
        """How a head that is made of names pools a row's features."""
        if not self.has_names:
            return None
        with safe_open(self.run.head, "np") as file:
            return str(json.loads(file.metadata()["head"])["pooling"])

    @property
    def asked(self) -> dict[str, list[str]]:
        """Target of a classifier -> the labels that its rows are a choice among, where it says so."""
        targets = self.finished.config["targets"] if self.labelled else {}
        given = {name: one["labels"] for name, one in targets.items() if one.get("labels")}
        return {
            name: sorted(set(labels.values() if isinstance(labels, dict) else labels)) for name, labels in given.items()
        }

    def render(self, template: str, card: Any, **more: Any) -> bytes:
        """A card: metadata and a page, in which whatever comes from the run is shown as text."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("m2m_hf.publish"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        environment.globals |= {"score_figure": score_figure, "stand_in": stand_in, "with_error": with_error}
        shown = from_json(FinishedRun, {**published(self.finished.summary()), "config": self.finished.config})
        page = environment.get_template(template).render(
            run=shown, repo_id=self.repo_id, version=__version__, command=self.command, recipe=self.recipe,
            manifest=self.manifest, labelled=self.labelled, has_names=self.has_names, pooling=self.pooling, asked=self.asked,
            loads=self.recipe["model_class"] if self.has_names else TASKS[self.finished.task][1], **more,
        )  # fmt: skip
        return redact(f"---\n{card.to_yaml()}\n---\n\n{page}").encode()
