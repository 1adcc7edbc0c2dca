"""What a training depends on beside its rows, and in which of these facts two trainings differ."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from accelerate import PartialState
from trl import SFTConfig

from m2m_hf.modeling.devices import is_sharded
from m2m_hf.training.experts import ExpertKind

# Settings that change where or how something is logged or stored, not what is learned.
OPERATIONAL = {
    "output_dir", "logging_strategy", "logging_first_step", "logging_steps", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "local_rank", "ddp_timeout", "skip_memory_metrics",
    "include_num_input_tokens_seen", "remove_unused_columns", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "model_init_kwargs", "trackio_bucket_id", "trackio_static_space_id",
}  # fmt: skip
LAUNCH = ("processes", "sharded")  # facts about how the training was launched
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def uniform_facts(args: SFTConfig, expert: ExpertKind, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything beside the data that an expert depends on, flat, so that a difference has a name.

    `about` says the base model, and how rows are prepared.
    """
    facts: dict[str, Any] = {**about, **expert.facts(), "processes": PartialState().num_processes}
    if is_sharded():
        facts["sharded"] = True  # accelerate then trains in float32 where it would otherwise not
    for name, value in args.to_dict().items():
        if name not in OPERATIONAL:
            facts[name] = getattr(args, name) if name.endswith("_token") else value  # to_dict hides tokens, as secrets
    for library in LIBRARIES:
        facts[f"version.{library}"] = version(library)
    # As JSON returns them, to compare with what was written.
    return dict(sorted(json.loads(json.dumps(facts, default=str)).items()))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the names of the facts in which two trainings differ, each with both values."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} now)" for name in names]
