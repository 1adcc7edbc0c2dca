"""`m2m export`: the chosen mixture and its settings as another trainer reads them.

Whichever it is, it trains on the same rows in the same order, `train.jsonl`: mixing was done when that was written. What a
trainer calls otherwise is translated, and a conversation's prompt and completion are one list of messages there; what has no
counterpart is listed in a comment.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from m2m_hf.config.yaml_files import dump_yaml
from m2m_hf.errors import InputError
from m2m_hf.storage.files import digest_of, read_json, read_json_or_empty, write_atomic, write_json
from m2m_hf.storage.run_folder import RunFolder, read_config

if TYPE_CHECKING:  # TRL is slow to import, and neither the recipe nor the rows need it
    from trl import ModelConfig, SFTConfig

DATA = "train.jsonl"
LEARNED = "train"  # of a message, whether it is


def axolotl(args: "SFTConfig", model: "ModelConfig", targets: list[str], data_format: str) -> dict[str, str]:
    """`axolotl train config.yml`; see its reference of configuration options."""
    rows: dict[str, Any]
    if data_format != "text":
        rows = {"type": "chat_template", "field_messages": "messages", "train_on_eos": "turn"}
        learned = {"roles_to_train": []} if data_format == "chat" else {"roles_to_train": ["assistant"]}
        rows |= {**learned, "message_field_training": LEARNED} if data_format == "chat" else learned
    else:
        bare = {"format": "{instruction}", "no_input_format": "{instruction}"}
        rows = {"type": {"field_instruction": "prompt", "field_output": "completion", **bare}}
    lora = {
        "adapter": "qlora" if model.load_in_4bit else "lora",
        "lora_r": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "lora_target_modules": targets[0] if len(targets) == 1 else targets,
        "peft_use_rslora": model.use_rslora or None,
    }
    config = {
        "base_model": model.model_name_or_path,
        "revision_of_model": revision(model),
        "load_in_4bit": model.load_in_4bit or None,
        "load_in_8bit": model.load_in_8bit or None,
        **(lora if model.use_peft else {}),
        "datasets": [{"path": "json", "data_files": [DATA], "split": "train", **rows}],
        "train_on_inputs": False,
        "sequence_len": args.max_length or 2048,
        "sample_packing": bool(args.packing),
        "micro_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "learning_rate": args.learning_rate,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        **warmup(args.warmup_steps),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "bf16": bool(args.bf16),
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "seed": args.seed,
        "save_strategy": "no",
        "logging_steps": int(max(1, args.logging_steps)),
        "output_dir": "axolotl",
    }
    comment = "Run it in this folder with: axolotl train config.yml"
    return {"config.yml": dump_yaml({key: value for key, value in config.items() if value is not None}, comment)}


def llamafactory(args: "SFTConfig", model: "ModelConfig", targets: list[str], data_format: str) -> dict[str, str]:
    """`llamafactory-cli train config.yaml`, with the `dataset_info.json` that it looks for beside the rows."""
    if data_format != "text":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        about = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags | {"system_tag": "system"}}
    else:
        about = {"columns": {"prompt": "prompt", "response": "completion"}}
    lora = {
        "lora_rank": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "lora_target": ",".join(targets),
        "use_rslora": model.use_rslora or None,
    }
    config = {
        "model_name_or_path": model.model_name_or_path,
        "model_revision": revision(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if model.use_peft else "full",
        **(lora if model.use_peft else {}),
        "quantization_bit": 4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        "dataset": "mixture",
        "dataset_dir": ".",
        "mask_history": data_format == "chat" or None,
        "template": None if data_format != "text" else "empty",  # without one it takes the tokenizer's own
        "cutoff_len": args.max_length or 2048,
        "packing": bool(args.packing) or None,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_train_epochs": float(args.num_train_epochs) if args.max_steps <= 0 else None,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "learning_rate": args.learning_rate,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        **warmup(args.warmup_steps),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "bf16": bool(args.bf16),
        "use_cpu": args.use_cpu or None,
        "disable_gradient_checkpointing": not args.gradient_checkpointing or None,
        "seed": args.seed,
        "save_strategy": "no",
        "logging_steps": args.logging_steps,
        "output_dir": "llamafactory",
    }
    comment = "Run it in this folder with: llamafactory-cli train config.yaml"
    info = {"mixture": {"file_name": DATA, **about}}
    return {
        "config.yaml": dump_yaml({key: value for key, value in config.items() if value is not None}, comment),
        "dataset_info.json": json.dumps(info, indent=2) + "\n",
    }


def revision(model: "ModelConfig") -> str | None:
    """The commit of a Hub model; a local folder has none."""
    return None if Path(model.model_name_or_path).is_dir() else model.model_revision


def warmup(steps: float) -> dict[str, Any]:
    """`warmup_steps` of transformers 5, of which less than 1 is a share, as others have it."""
    return {"warmup_ratio": steps} if 0 < steps < 1 else {"warmup_steps": int(steps)}


TRAINERS: dict[str, Callable[["SFTConfig", "ModelConfig", list[str], str], dict[str, str]]] = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
}
KINDS = ("trl", *TRAINERS, "jsonl")
# What differs from TRL's defaults, and stands in a recipe, but not in what other trainers are given.
TRANSLATED = {
    "model_name_or_path", "model_revision", "datasets", "use_peft", "output_dir", "save_strategy", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit", "load_in_8bit", "max_length", "packing",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "optim",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "gradient_checkpointing",
    "activation_checkpointing", "seed", "logging_steps", "use_cpu", "dtype",
}  # fmt: skip


def export(run: RunFolder, kind: str, folder: Path | None = None) -> tuple[Path, list[str]]:
    """Writes the chosen mixture for another trainer.

    Args:
        kind: one of `KINDS`; `trl` is the recipe itself with its rows beside it, `jsonl` the rows alone.
        folder: where to (default: `OUT/export/<kind>`).

    Returns:
        The folder, and the names of settings that could not be translated.

    Raises:
        InputError: no recipe in the run folder, one for a classifier, or rows that are not those of its manifest.
    """
    if kind not in KINDS:
        raise InputError(f"--to: expected {', '.join(KINDS)}, got {kind!r}")
    run.refuse_links()
    if not run.recipe.exists():
        raise InputError(
            f"{run.root} has no recipe.yaml; expected the output_dir of a finished m2m search or m2m select"
        )
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    if "task" in recipe:
        raise InputError(
            f"{run.root} is a run of task: {recipe['task']}, whose frozen head no other trainer has; expected one of "
            f"task: causal_lm. Use its recipe in their place: python recipes/classify.py --config {run.recipe}"
        )
    rows = run.mixture / DATA
    manifest = read_json_or_empty(run.mixture / "manifest.json")
    if not rows.exists() or manifest.get("sha256_16") != digest_of(rows):
        raise InputError(f"{rows}: not what its manifest says; m2m search writes it again")
    folder = (folder or run.root / "export" / kind).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    columns = recipe["datasets"][0]["columns"]
    data_format = "text"
    if columns == ["messages"]:
        data_format = "messages"
    elif isinstance(json.loads(rows.read_text(encoding="utf-8").splitlines()[0])["prompt"], list):
        data_format = "chat"
    if data_format == "chat" and kind in TRAINERS:
        write_atomic(folder / DATA, in_one_list(rows, marked=kind == "axolotl"))
    elif data_format == "text" and kind == "llamafactory":
        write_atomic(folder / DATA, ended(rows, recipe))
    else:
        shutil.copyfile(rows, folder / DATA)
    write_json(folder / "manifest.json", manifest)
    lost: list[str] = []
    if kind != "jsonl" and read_config(run.config).get("trained_parameters"):
        lost.append("trained_parameters")  # which TRL's own recipe cannot say either
    if kind == "trl":
        (data,) = recipe["datasets"]
        recipe |= {"datasets": [{**data, "data_files": DATA}], "output_dir": "trl"}
        write_atomic(
            folder / "recipe.yaml", dump_yaml(recipe, "Run it in this folder with: trl sft --config recipe.yaml")
        )
    elif kind != "jsonl":
        from trl import ModelConfig, SFTConfig

        from m2m_hf.config.parsing import with_overrides
        from m2m_hf.training.fine_tune import planned_steps

        lost += sorted(set(recipe) - TRANSLATED)
        settings = {key: value for key, value in recipe.items() if key in TRANSLATED - {"datasets", "output_dir"}}
        base = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False), ModelConfig()
        model_settings = {key: settings.pop(key) for key in ("model_name_or_path", "model_revision") if key in settings}
        for key in ("load_in_4bit", "load_in_8bit", "dtype"):
            if key in settings:
                model_settings[key] = settings.pop(key)
        for key, value in model_settings.items():
            setattr(base[1], key, value)
        args, model = with_overrides(*base, {**settings, "use_cpu": True}, "recipe")
        args.use_cpu = bool(recipe.get("use_cpu"))
        if (
            kind == "llamafactory" and 0 < args.warmup_steps < 1
        ):  # of which it takes a share or steps, as its transformers does
            tokens = sum(one["tokens"] for one in manifest["sources"].values())
            args.warmup_steps = args.get_warmup_steps(planned_steps(args, manifest["rows"], tokens))
        modules = target_modules(run) if model.use_peft else []
        if kind == "llamafactory" and any(re.search(r"[^\w.]", one) for one in modules):
            lost.append("lora_target_modules, a pattern")
        if not args.max_length:
            lost.append("max_length: null, which is 2048 here")
        for name, text in TRAINERS[kind](args, model, modules, data_format).items():
            note = f"# Without a counterpart there: {', '.join(lost)}\n" if lost and name.startswith("config") else ""
            write_atomic(folder / name, note + text)
    return folder, lost


def in_one_list(rows: Path, marked: bool) -> str:
    """Conversations whose last turn is the completion, as one list of messages each.

    Args:
        marked: whether every message says if it is learned.
    """
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = [(part, part == "completion") for part in ("prompt", "completion")]
        messages = [one | ({LEARNED: learned} if marked else {}) for part, learned in parts for one in row[part]]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


def ended(rows: Path, recipe: Mapping[str, Any]) -> str:
    """Rows whose completions end with the end-of-text token, as TRL has them and LLaMA-Factory's empty template does not."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            recipe["model_name_or_path"], revision=recipe.get("model_revision"), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model_name_or_path: its tokenizer cannot be loaded ({error})") from error
    end = recipe.get("eos_token") or tokenizer.eos_token
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return "".join(
        json.dumps({**row, "completion": row["completion"] + end}, ensure_ascii=False) + "\n" for row in made
    )


def target_modules(run: RunFolder) -> list[str]:
    """The names of the layers that were adapted, as PEFT found them on this model."""
    for path in (run.final, *sorted(run.adapters.glob("[!.]*"))):
        if (path / "adapter_config.json").exists():
            found = read_json(path / "adapter_config.json")["target_modules"]
            return [found] if isinstance(found, str) else sorted(found)
    raise InputError(f"{run.adapters} holds no adapter; m2m select trains them")
