"""The outcome as a recipe that trains on the chosen mixture where m2m_hf is not installed."""

from glob import escape
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig

from m2m_hf.config.checks import hub_field
from m2m_hf.config.parsing import trl_fields
from m2m_hf.config.yaml_files import changed_fields, dump_yaml
from m2m_hf.core.mixture import Mixture
from m2m_hf.data.rows import LoadedData
from m2m_hf.modeling.dates import is_pinned
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder
from m2m_hf.training.trainers import Settings

COMMENT = """The chosen mixture: {mixture}
Run it with: trl sft --config {path}
Its data are in {data}; manifest.json beside them says where every row comes from.
When its folder has moved: m2m recipe --relocate FOLDER"""
LABEL_COMMENT = """The chosen mixture: {mixture}
Run it with: m2m recipe classify --config {path}
or, where m2m_hf is not installed, with its recipes/classify.py, which takes transformers and PEFT alone.
Its rows are in {data}; manifest.json beside them says where every one comes from.
When its folder has moved: m2m recipe --relocate FOLDER"""
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
LOADING = ("model_revision", "dtype", "attn_implementation")


def write_recipe(
    run: RunFolder, mixture: Mixture, train: Path, data: LoadedData, training: Settings, model_args: ModelConfig
) -> None:
    """Writes `OUT/recipe.yaml`, the final fine-tune on the rows in `train`: for `trl sft`, or for `recipes/classify.py`."""
    if training.head is None:
        recipe, comment = trl_recipe(run, train, data, training, model_args), COMMENT
        if training.expert.parameters is not None:  # for which TRL has no field
            comment += f"\nNot as in the run: TRL trains all parameters, and not only those called {training.expert.parameters}."
    else:
        recipe, comment = label_recipe(run, mixture, train, data, training, model_args), LABEL_COMMENT
    write_atomic(run.recipe, dump_yaml(recipe, comment.format(mixture=mixture, path=run.recipe, data=run.mixture)))


def trl_recipe(
    run: RunFolder, train: Path, data: LoadedData, training: Settings, model_args: ModelConfig
) -> dict[str, Any]:
    """What differs from TRL's defaults, and nothing that TRL does not know.

    It writes to `OUT/trl`, since `OUT/final` belongs to the scores beside it. The rows are in one shuffled file, since TRL's own
    `fraction` would take the first rows of every dataset.
    """
    fields = trl_fields(training.args, model_args)
    apart = {"output_dir", "save_strategy", "use_peft"}
    if training.expert.lora is None:
        apart |= {name for name in fields if name.startswith("lora_") or name == "use_rslora"}
    builder = "json" if train.suffix == ".jsonl" else "parquet"
    columns = next(iter(data.candidates.values())).rows.column_names
    template = getattr(training.processing, "chat_template", None)
    if data.format != "text" and isinstance(template, str) and is_pinned(template):
        write_atomic(run.chat_template, template)
        fields["chat_template_path"] = str(run.chat_template)
    return {
        "model_name_or_path": fields.pop("model_name_or_path"),
        "datasets": [{"path": builder, "data_files": escape(str(train)), "split": "train", "columns": columns}],
        "use_peft": training.expert.lora is not None,
        "output_dir": str(run.root / "trl"),
        "save_strategy": "no",
        **{key: value for key, value in fields.items() if key not in apart and not hub_field(key)},
    }


def label_recipe(
    run: RunFolder, mixture: Mixture, train: Path, data: LoadedData, training: Settings, model_args: ModelConfig
) -> dict[str, Any]:
    """The same for a classifier: what `recipes/classify.py` reads."""
    assert training.head is not None
    head, args = training.head, training.args
    images = head.plan.task == "image_classification"
    labels: dict[str, Any] = {"labels": list(head.labels), "columns": head.columns, "closed": head.closed}
    if head.vectors is not None:
        labels = {"file": str(run.head), "closed": head.closed}
    if not head.closed:
        labels["among"] = {name: list(training.among[name]) for name in mixture.names}
    recipe: dict[str, Any] = {
        "task": head.plan.task,
        "model_name_or_path": model_args.model_name_or_path,
        "model_class": head.plan.model_class,
        "train_file": str(train),
        "head": labels,
        "max_length": None if images else training.limit,
        "pad_token": None if images else args.pad_token,
        "image_mode": next(iter(data.candidates.values())).rows.features["image"].mode if images else None,
        "expert": training.expert.name,
        "trained_parameters": training.expert.parameters,
        "untrained_modules": head.plan.untrained,
    }
    recipe |= {name: getattr(model_args, name) for name in (*LOADING, *(LORA if training.expert.lora else ()))}
    fixed = {"output_dir": str(run.root / "trained-by-recipe"), "save_strategy": "no", "report_to": "none"}
    # SFTConfig's defaults are others than those of TrainingArguments, of which the recipe says what differs.
    changed = changed_fields(args, TrainingArguments(output_dir="out", use_cpu=args.use_cpu))
    others = {name: value for name, value in changed.items() if name not in fixed and not hub_field(name)}
    recipe["training"] = {**fixed, **others, "use_cpu": args.use_cpu}
    return {key: value for key, value in recipe.items() if value is not None}
