"""A configuration of axolotl as a draft."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_hf.cli.drafts.draft import (
    DATA_KEYS,
    MESSAGE_NAMES,
    SAME,
    WHOLE,
    Draft,
    check_message_names,
    earlier_answers,
    instructions,
    read_datasets,
    renamed,
    said,
    translate,
    whole_text,
)
from m2m_hf.cli.drafts.sources import Source, read_columns, relocate

AXOLOTL = dict(zip(SAME, SAME, strict=True)) | {  # theirs -> ours
    "lora_r": "lora_r", "lora_target_modules": "lora_target_modules", "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size", "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type",
    "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "sample_packing": "packing",
    "warmup_ratio": "warmup_steps", "peft_use_rslora": "use_rslora",
}  # fmt: skip
AXOLOTL_MESSAGES = {
    "type", "field_messages", "field_tools", "message_property_mappings", "message_field_role", "message_field_content",
}  # fmt: skip
AXOLOTL_REPLACED = {"lora_target_linear", "base_model", "datasets", "adapter"}


def from_axolotl(config: Mapping[str, Any], folder: Path) -> Draft:
    datasets = config.get("datasets") or []
    candidates = read_datasets(datasets)
    lost = said(config) - {*AXOLOTL, *AXOLOTL_REPLACED} | (
        set() if config.get("adapter") in ("lora", "qlora") else {WHOLE}
    )
    for entry, (name, source) in zip(datasets, candidates.items(), strict=True):
        taken = read_axolotl_rows(entry, name, source, read_columns(relocate(source, folder, Path.cwd())))
        lost |= {f"datasets.{key}" for key in entry if key not in (*DATA_KEYS, "ds_type", *taken)}
        lost |= {earlier_answers(name)} if taken is AXOLOTL_MESSAGES else set()
    settings = translate(config, AXOLOTL)
    if config.get("lora_target_linear"):
        settings.setdefault("lora_target_modules", "all-linear")
    return Draft(str(config["base_model"] or ""), candidates, settings, sorted(lost))


def read_axolotl_rows(entry: Mapping[str, Any], name: str, source: Source, present: set[str]) -> set[str]:
    """Puts into `source` how rows of axolotl become ours; returns the keys of `entry` that say no more than that."""
    kind = entry.get("type")
    if kind in ("chat_template", "sharegpt"):
        old = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
        names = dict(zip(("role", "content"), MESSAGE_NAMES[kind == "sharegpt"], strict=True))
        names |= {key: value for key, value in old.items() if value} | (entry.get("message_property_mappings") or {})
        check_message_names(name, names)
        messages = entry.get("field_messages") or ("conversations" if kind == "sharegpt" else "messages")
        renamed(source, {messages: "messages", entry.get("field_tools") or "tools": "tools"})
        return AXOLOTL_MESSAGES
    if kind == "completion":
        whole_text(source, entry.get("field") or "text")
        return {"type", "field"}
    if kind == "alpaca" and (not present or "instruction" in present):  # of which the words around the prompt are lost
        instructions(source, ["instruction", "input"], "output", present)
    if isinstance(kind, Mapping) and not {"system_prompt", "field_system"} & kind.keys() and "system" not in present:
        names = {key: kind.get(f"field_{key}") or key for key in ("instruction", "input", "output")}
        has_input = names["input"] in present or (not present and "field_input" in kind)
        text = kind.get(*(("format", "{instruction} {input} ") if has_input else ("no_input_format", "{instruction} ")))
        for key in ("instruction", "input"):
            text = text.replace(f"{{{key}}}", f"{{{names[key]}}}")
        instructions(source, [names["instruction"]], names["output"], present, text)
        return {"type"}
    return set()
