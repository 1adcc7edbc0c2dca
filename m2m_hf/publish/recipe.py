"""The outcome as files: the chosen mixture as data, and a recipe that TRL runs as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from m2m_hf.config.checks import hub_field
from m2m_hf.config.parsing import trl_fields
from m2m_hf.config.yaml_files import changed_fields, dump_yaml
from m2m_hf.core.mixture import Mixture
from m2m_hf.data.mixture_rows import write_mixture
from m2m_hf.data.rows import FEATURES, Candidate
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder
from m2m_hf.training.trainers import Settings

COMMENT = """The chosen mixture: {mixture}
Run it with: trl sft --config {path}
Its data are in {data}; manifest.json beside them says where every row comes from."""


def write_recipe(
    run: RunFolder,
    mixture: Mixture,
    candidates: Mapping[str, Candidate],
    data_format: str,
    args: SFTConfig,
    model_args: ModelConfig,
    expert: str,
    parameters: str | None,
) -> Path:
    """Writes `OUT/mixture/` and `OUT/recipe.yaml`.

    The recipe holds what differs from TRL's defaults and nothing that TRL does not know, so that `trl sft --config` runs it
    where m2m_hf is not installed. It writes to `OUT/trl`, since `OUT/final` belongs to the scores beside it. The rows are in one
    shuffled file, since TRL's own `fraction` would take the first rows of every dataset.

    Args:
        args: the final fine-tune's arguments (`final:` applied).
        expert: `lora`, or `full` to train all parameters.
        parameters: those that are trained alone, which TRL has no field for: a comment says so.

    Returns:
        The path of the training data.
    """
    train = write_mixture(run.mixture, mixture, candidates, args.seed)
    fields = trl_fields(args, model_args)
    apart = ["output_dir", "save_strategy", "use_peft"]
    if expert == "full":
        apart += [name for name in fields if name.startswith("lora_") or name == "use_rslora"]
    recipe = {
        "model_name_or_path": fields.pop("model_name_or_path"),
        "datasets": [
            {"path": "json", "data_files": str(train), "split": "train", "columns": list(FEATURES[data_format])}
        ],
        "use_peft": expert == "lora",
        "output_dir": str(run.root / "trl"),
        "save_strategy": "no",
        **{key: value for key, value in fields.items() if key not in apart and not hub_field(key)},
    }
    comment = COMMENT.format(mixture=mixture, path=run.recipe, data=run.mixture)
    if parameters is not None:
        comment += f"\nNot as in the run: TRL trains all parameters, and not only those called {parameters}."
    write_atomic(run.recipe, dump_yaml(recipe, comment))
    return train


LABEL_COMMENT = """The chosen mixture: {mixture}
Run it with: m2m recipe classify --config {path}
or, where m2m_hf is not installed, with its recipes/classify.py, which takes transformers and PEFT alone.
Its rows are in {data}; manifest.json beside them says where every one comes from."""
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
LOADING = ("model_revision", "dtype", "attn_implementation")


def write_label_recipe(
    run: RunFolder,
    mixture: Mixture,
    candidates: Mapping[str, Candidate],
    training: Settings,
    model_args: ModelConfig,
) -> Path:
    """The same of a classification run: `OUT/recipe.yaml` for `recipes/classify.py`.

    Returns:
        The path of the training data.
    """
    assert training.head is not None
    head, args = training.head, training.args
    images = head.plan.task == "image_classification"
    train = write_mixture(run.mixture, mixture, candidates, args.seed)
    recipe: dict[str, Any] = {
        "task": head.plan.task,
        "model_name_or_path": model_args.model_name_or_path,
        "model_class": head.plan.model_class,
        "train_file": str(train),
        "head": {"labels": list(head.labels), "columns": head.columns, "closed": head.closed},
        "max_length": None if images else training.limit,
        "pad_token": None if images else args.pad_token,
        "image_mode": next(iter(candidates.values())).rows.features["image"].mode if images else None,
        "expert": training.expert.name,
        "trained_parameters": training.expert.parameters,
        "untrained_modules": head.plan.untrained,
    }
    if head.vectors is not None:
        recipe["head"] = {"file": str(run.head), "closed": head.closed}
    if not head.closed:
        recipe["head"]["among"] = {name: list(training.among[name]) for name in mixture.names}
    recipe |= {name: getattr(model_args, name) for name in LOADING}
    recipe |= {name: getattr(model_args, name) for name in LORA} if training.expert.lora is not None else {}
    # SFTConfig's defaults are others than those of TrainingArguments, of which the recipe says what differs.
    defaults = TrainingArguments(output_dir="out", use_cpu=args.use_cpu)
    recipe["training"] = {"output_dir": str(run.root / "trained-by-recipe"), "save_strategy": "no", "report_to": "none"}
    recipe["training"] |= {
        name: value
        for name, value in changed_fields(args, defaults).items()
        if name not in recipe["training"] and not hub_field(name)
    }
    recipe["training"]["use_cpu"] = args.use_cpu
    comment = LABEL_COMMENT.format(mixture=mixture, path=run.recipe, data=run.mixture)
    write_atomic(run.recipe, dump_yaml({key: value for key, value in recipe.items() if value is not None}, comment))
    return train
