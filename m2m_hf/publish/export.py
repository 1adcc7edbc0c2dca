"""`m2m export`: the chosen mixture and its settings as another trainer reads them.

Whichever it is, it trains on the same rows in the same order, `train.jsonl` or `train.parquet`: mixing was done when that was
written. What a trainer calls otherwise is translated, and a conversation's prompt and completion are one list of messages
there; what has no counterpart is listed in a comment.
"""

import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pyarrow.parquet import read_table

from m2m_hf.config.yaml_files import dump_yaml, plain
from m2m_hf.errors import InputError
from m2m_hf.storage.files import digest_of, read_json, read_json_or_empty, write_atomic, write_json
from m2m_hf.storage.run_folder import RunFolder, read_config

if TYPE_CHECKING:  # TRL is slow to import, and neither the recipe nor the rows need it
    from trl import ModelConfig, SFTConfig

LEARNED = "train"  # of a message, whether it is
COMMANDS = {  # what runs an exported configuration, whose file is named last
    "trl": "trl sft --config recipe.yaml",
    "axolotl": "axolotl train config.yml",
    "llamafactory": "llamafactory-cli train config.yaml",
}
KINDS = (*COMMANDS, "jsonl")
# What differs from TRL's defaults, and stands in a recipe, but not in what other trainers are given.
TRANSLATED = {
    "model_name_or_path", "model_revision", "datasets", "use_peft", "output_dir", "save_strategy", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit", "load_in_8bit", "max_length", "packing",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "optim",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "gradient_checkpointing",
    "activation_checkpointing", "seed", "logging_steps", "use_cpu", "dtype",
}  # fmt: skip
LORA = ("lora_r", "lora_alpha", "lora_dropout")
ALIKE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "seed"
)  # fmt: skip
# TRL's names of settings -> theirs, where they differ; see the references of configuration options of both.
AXOLOTL = {
    "model_name_or_path": "base_model",
    "model_revision": "revision_of_model",
    "use_rslora": "peft_use_rslora",
    "max_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
}
LLAMAFACTORY = {"lora_r": "lora_rank", "max_length": "cutoff_len"}


def export(run: RunFolder, kind: str, folder: Path | None = None) -> tuple[Path, list[str]]:
    """Writes the chosen mixture for another trainer; returns the folder, and the settings that could not be translated.

    Of the kinds, `trl` is the recipe itself with its rows beside it, `jsonl` the rows alone.
    """
    if kind not in KINDS:
        raise InputError(f"--to: expected {', '.join(KINDS)}, got {kind!r}")
    run.refuse_links()
    recipe, manifest = read_outcome(run)
    if "task" in recipe:
        raise InputError(
            f"{run.root} is a run of task: {recipe['task']}, whose frozen head no other trainer has; expected one of "
            f"task: causal_lm. Use its recipe in their place: python recipes/classify.py --config {run.recipe}"
        )
    folder = (folder or run.root / "export" / kind).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", manifest)
    lost: list[str] = []
    if kind in ("trl", "jsonl"):
        if kind == "trl":
            shutil.copyfile(run.rows, folder / run.rows.name)
        else:
            save_rows(load_rows(run.rows), folder / "train.jsonl")
        config = recipe | {"datasets": [{**recipe["datasets"][0], "data_files": run.rows.name}], "output_dir": "trl"}
        if kind == "trl" and (template := recipe.get("chat_template_path")):
            inside = run.chat_template if Path(template).name == run.chat_template.name else Path(template)
            config["chat_template_path"] = inside.name
            shutil.copyfile(inside, folder / inside.name)
    else:
        config, lost = translate(run, kind, recipe, manifest, folder)
    if kind == "jsonl":
        return folder, lost
    if read_config(run.config).get("trained_parameters"):
        lost = ["trained_parameters", *lost]  # which TRL's own recipe cannot say either
    note = f"# Without a counterpart there: {', '.join(lost)}\n" if lost else ""
    comment = f"Run it in this folder with: {COMMANDS[kind]}"
    write_atomic(folder / COMMANDS[kind].split()[-1], note + dump_yaml(config, comment))
    return folder, lost


def read_outcome(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and the manifest of the chosen mixture, whose rows are those of the manifest."""
    if not run.recipe.exists():
        raise InputError(
            f"{run.root} has no recipe.yaml; expected the output_dir of a finished m2m search or m2m select"
        )
    manifest = read_json_or_empty(run.mixture / "manifest.json")
    if not run.rows.exists() or manifest.get("sha256_16") != digest_of(run.rows):
        raise InputError(f"{run.rows}: not what its manifest says; m2m search writes it again")
    return yaml.safe_load(run.recipe.read_text(encoding="utf-8")), manifest


def translate(
    run: RunFolder, kind: str, recipe: dict[str, Any], manifest: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """(configuration for axolotl or LLaMA-Factory, what has no counterpart there); writes the rows as these read them."""
    from trl import ModelConfig, SFTConfig

    from m2m_hf.config.parsing import Parser
    from m2m_hf.training.fine_tune import planned_steps

    known = {key: value for key, value in recipe.items() if key in TRANSLATED | {"eos_token"} - {"datasets"}}
    args, model = Parser(SFTConfig, ModelConfig).read(known | {"output_dir": str(folder), "use_cpu": True})
    data_format = write_rows(run, kind, recipe, args, model, folder)
    modules = target_modules(run) if model.use_peft else []
    lost = sorted(set(recipe) - TRANSLATED)
    if not args.max_length:
        lost.append("max_length: null, which is 2048 here")
    if kind == "axolotl":
        names, config = AXOLOTL, axolotl(args, model, modules, data_format)
        config["datasets"][0] |= {"path": recipe["datasets"][0]["path"], "data_files": [run.rows.name]}
    else:
        if any(re.search(r"[^\w.]", one) for one in modules):
            lost.append("lora_target_modules, a pattern")
        if 0 < args.warmup_steps < 1:  # it takes a share or steps, as its transformers does
            tokens = sum(one["tokens"] for one in manifest["sources"].values())
            args.warmup_steps = args.get_warmup_steps(planned_steps(args, manifest["rows"], tokens))
        names, config = LLAMAFACTORY, llamafactory(args, model, modules, data_format)
        config["use_cpu"] = recipe.get("use_cpu") or None
        write_json(folder / "dataset_info.json", {"mixture": {"file_name": run.rows.name, **columns(data_format)}})
    config = {names.get(key, key): value for key, value in settings(args, model).items()} | config
    return {key: value for key, value in config.items() if value is not None}, lost


def write_rows(
    run: RunFolder, kind: str, recipe: dict[str, Any], args: "SFTConfig", model: "ModelConfig", folder: Path
) -> str:
    """Writes the rows as a trainer reads them. Returns their format: `text`, `chat` or `messages`."""
    names = recipe["datasets"][0]["columns"]
    if "tools" in names:
        raise InputError(
            f"--to: {run.rows} holds messages of more than role and content, or tools, which trl and jsonl keep; got {kind!r}"
        )
    rows = load_rows(run.rows)
    chat, messages = isinstance(rows[0].get("prompt"), list), "messages" in names
    if chat:
        change = partial(in_one_list, marked=kind == "axolotl")
    elif kind == "llamafactory" and not messages:
        from m2m_hf.modeling.processing import load_tokenizer

        change = partial(ended, end=load_tokenizer(model, args).eos_token)
    else:
        shutil.copyfile(run.rows, folder / run.rows.name)
        return "messages" if messages else "text"
    save_rows(list(map(change, rows)), folder / run.rows.name)
    return "chat" if chat else "text"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a mixture's file."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows: list[dict[str, Any]] = Dataset(read_table(path)).to_list()
        return rows
    with path.open(encoding="utf-8") as file:  # whose lines end with \n alone: JSON may hold other ends of lines
        return [json.loads(line) for line in file]


def save_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(list(rows)).to_parquet(path)
    else:
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def ended(row: dict[str, Any], end: str) -> dict[str, Any]:
    """A row whose completion ends with this token, as TRL has it and LLaMA-Factory's empty template does not."""
    return {**row, "completion": row["completion"] + end}


def settings(args: "SFTConfig", model: "ModelConfig") -> dict[str, Any]:
    """What both trainers have, under TRL's names; None where there is nothing to say."""
    local, by_steps = Path(model.model_name_or_path).is_dir(), args.max_steps > 0
    lora = {name: getattr(model, name) for name in LORA} | {"use_rslora": model.use_rslora or None}
    return {
        "model_name_or_path": model.model_name_or_path,
        "model_revision": None if local else model.model_revision,
        **(lora if model.use_peft else {}),
        **{name: getattr(args, name) for name in ALIKE},
        "max_length": args.max_length or 2048,
        "num_train_epochs": None if by_steps else float(args.num_train_epochs),
        "max_steps": args.max_steps if by_steps else None,
        "optim": str(plain(args.optim)),
        "lr_scheduler_type": str(plain(args.lr_scheduler_type)),
        **warmup(args.warmup_steps),
        "bf16": bool(args.bf16),
        "save_strategy": "no",
    }


def axolotl(args: "SFTConfig", model: "ModelConfig", modules: Sequence[str], data_format: str) -> dict[str, Any]:
    """What is axolotl's alone."""
    rows: dict[str, Any] = {"type": "chat_template", "field_messages": "messages", "train_on_eos": "turn"}
    if data_format == "text":
        bare = {"format": "{instruction}", "no_input_format": "{instruction}"}
        rows = {"type": {"field_instruction": "prompt", "field_output": "completion", **bare}}
    elif data_format == "chat":
        rows |= {"roles_to_train": [], "message_field_training": LEARNED}
    else:
        rows["roles_to_train"] = ["assistant"]
    kind = "qlora" if model.load_in_4bit else "lora"
    return {
        "load_in_4bit": model.load_in_4bit or None,
        "load_in_8bit": model.load_in_8bit or None,
        "adapter": kind if model.use_peft else None,
        "lora_target_modules": (modules[0] if len(modules) == 1 else modules) or None,
        "datasets": [{"split": "train", **rows}],
        "train_on_inputs": False,
        "sample_packing": bool(args.packing),
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "logging_steps": int(max(1, args.logging_steps)),
        "output_dir": "axolotl",
    }


def llamafactory(args: "SFTConfig", model: "ModelConfig", modules: Sequence[str], data_format: str) -> dict[str, Any]:
    """What is LLaMA-Factory's alone."""
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if model.use_peft else "full",
        "lora_target": ",".join(modules) or None,
        "quantization_bit": 4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        "dataset": "mixture",
        "dataset_dir": ".",
        "mask_history": data_format == "chat" or None,
        "template": "empty" if data_format == "text" else None,  # without one it takes the tokenizer's own
        "packing": bool(args.packing) or None,
        "disable_gradient_checkpointing": not args.gradient_checkpointing or None,
        "logging_steps": args.logging_steps,
        "output_dir": "llamafactory",
    }


def columns(data_format: str) -> dict[str, Any]:
    """How LLaMA-Factory reads the rows."""
    if data_format == "text":
        return {"columns": {"prompt": "prompt", "response": "completion"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags | {"system_tag": "system"}}


def warmup(steps: float) -> dict[str, Any]:
    """`warmup_steps` of transformers 5, of which less than 1 is a share, as others have it."""
    return {"warmup_ratio": steps} if 0 < steps < 1 else {"warmup_steps": int(steps)}


def in_one_list(row: dict[str, Any], marked: bool) -> dict[str, Any]:
    """A conversation whose last turn is the completion as one list, in which every message may say if it is learned."""
    messages = []
    for part in ("prompt", "completion"):
        mark = {LEARNED: part == "completion"} if marked else {}
        messages += [message | mark for message in row[part]]
    return {"messages": messages}


def target_modules(run: RunFolder) -> list[str]:
    """The names of the layers that were adapted, as PEFT found them on this model."""
    for path in (run.final, *sorted(run.adapters.glob("[!.]*"))):
        if (path / "adapter_config.json").exists():
            found = read_json(path / "adapter_config.json")["target_modules"]
            return [found] if isinstance(found, str) else sorted(found)
    raise InputError(f"{run.adapters} holds no adapter; m2m select trains them")
