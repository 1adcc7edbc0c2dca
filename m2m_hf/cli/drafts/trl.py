"""A configuration of TRL's scripts as a draft."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_hf.cli.drafts.draft import DATA_KEYS, WHOLE, Draft, read_datasets, whole_text
from m2m_hf.cli.drafts.sources import read_columns, relocate

TRL_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-5, "num_train_epochs": 3}
TRL_REPLACED = {
    "datasets", "dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field", "model_name_or_path", "use_peft",
}  # fmt: skip
TRL_LOST = {"output_dir", "eval_strategy", "eval_steps", "push_to_hub", "hub_model_id"}


def from_trl(config: Mapping[str, Any], folder: Path) -> Draft:
    from m2m_hf.config.parsing import FORMER, TRL_KEYS, UNSUPPORTED  # slow to import

    one = {"path": config.get("dataset_name"), "name": config.get("dataset_config")}
    datasets = config.get("datasets") or [one | {"split": config.get("dataset_train_split")}]
    model = str(config.get("model_name_or_path") or "")
    text, candidates = config.get("dataset_text_field") or "text", read_datasets(datasets)
    settings, lost = {}, [] if config.get("use_peft") else [WHOLE]
    for key, value in config.items():
        name = FORMER.get(key, key)
        if name in TRL_KEYS and name not in {*TRL_REPLACED, *TRL_LOST, *UNSUPPORTED}:
            settings[name] = value
        elif key not in TRL_REPLACED and value:
            lost.append(key)
    lost += [f"datasets.{key}" for entry in datasets for key in entry if key not in (*DATA_KEYS, "columns")]
    for source in candidates.values():
        present = read_columns(relocate(source, folder, Path.cwd()))
        if text in present and not present & {"prompt", "messages", "conversations", "label"}:
            whole_text(source, text)
    return Draft(model, candidates, TRL_DEFAULTS | settings, sorted(lost))
