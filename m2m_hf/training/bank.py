"""The bank: one expert per candidate, all trained alike, none trained twice.

Uniformity is what makes the average of the experts stand in for training on the mixture (arXiv 2505.16066), so everything
that could tell two of them apart except their data is written down, compared, and refused where it differs.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from m2m_hf.console import Terminal, duration
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Expert
from m2m_hf.modeling.devices import broadcast, is_sharded
from m2m_hf.modeling.lora import lora_facts
from m2m_hf.storage.files import fingerprint, read_json, staging_path, sync
from m2m_hf.storage.records import experts_noun, files_of, find_incomplete, find_modified
from m2m_hf.training.fine_tune import (
    TrainingFailedError,
    finished,
    load_trained,
    move,
    planned_steps,
    publish,
    train_expert,
)
from m2m_hf.training.trainers import BankProgress, Settings

# Settings that change where or how something is told, not what is learned.
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
NEEDED = {"fingerprint", "data", "uniform", "steps", "seconds", "files"}  # in every `training.json`
MAX_LOST = 0.01  # share of a delta's norm, above which it is said
LAUNCH = ("processes", "sharded")  # facts about how the training was launched
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def uniform_facts(
    args: SFTConfig,
    config: LoraConfig | None,
    processing: Mapping[str, Any],
    base: str,
    dtype: str | None,
    data_format: str,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything beside the data that an expert depends on, flat, so that what differs can be named.

    Args:
        config: the LoRA shape; None for full experts.
        processing: what prepares the data, see `tokenizer_facts`.
        base: fingerprint of the base weights.
        dtype: the base's dtype as asked for.
        data_format: the run's format (`data.py`, `labelled.py`).
        more: how the base is quantised, where the head comes from, what a full expert trains and keeps.
    """
    facts: dict[str, Any] = {
        "base_model": base,
        "dtype": dtype,
        "data_format": data_format,
        **processing,
        **(more or {}),
    }
    facts["processes"] = PartialState().num_processes
    if is_sharded():
        facts["sharded"] = True  # accelerate then trains in float32 where it would otherwise not
    for name, value in args.to_dict().items():
        if name not in OPERATIONAL:
            facts[name] = getattr(args, name) if name.endswith("_token") else value  # to_dict hides tokens, as secrets
    if config is not None:
        facts |= lora_facts(config)
    for library in LIBRARIES:
        facts[f"version.{library}"] = version(library)
    # As JSON gives them back, so that what is in memory compares with what was written.
    return dict(sorted(json.loads(json.dumps(facts, default=str)).items()))


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Any]:
    """What recognises a tokenizer, and where it is used its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        content = json.loads(backend.to_str())
        for one in ("truncation", "padding"):  # as they were asked for last
            content.pop(one, None)
    return {
        "tokenizer": fingerprint([content, str(tokenizer.special_tokens_map)]),
        "chat_template": fingerprint(tokenizer.chat_template) if chat else None,
    }


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of the facts in which two trainings differ, each with both values."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} now)" for name in names]


class Bank:
    """The adapters of one run, in `OUT/adapters/<candidate>/`.

    A candidate whose training failed has a folder too, which says why in place of an adapter.

    Args:
        folder: `OUT/adapters`.
        candidates: what there must be an adapter for.
        facts: `uniform_facts` of this run.
        mixed: name -> those of a candidate that is trained otherwise (`allow_mixed_training`).
    """

    def __init__(
        self,
        folder: Path,
        candidates: Mapping[str, Candidate],
        facts: Mapping[str, Any],
        mixed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder = folder
        self.candidates = dict(candidates)
        self.facts = {name: dict((mixed or {}).get(name, facts)) for name in candidates}

    def check(self) -> list[str]:
        """The names of the adapters that are still to be trained, those that a crash cut short among them.

        Processes and sharding count only where adapters are still to be trained: they change what is learned, but a
        complete bank may be searched with any.

        Raises:
            InputError: an adapter is there that was trained otherwise, or on other rows; nothing is overwritten.
        """
        missing = [name for name in self.candidates if find_incomplete(self.folder / name) is not None]
        trained = self.training(skip=missing)
        for name, there in trained.items():
            self._refuse_others(name, there, self.folder, trained if not missing else {})
        return missing

    def _refuse_others(
        self, name: str, there: Mapping[str, Any], folder: Path, bank: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Refuses an adapter that was trained otherwise than this run asks for, or on other rows.

        Args:
            there: its `training.json`.
            folder: where it stands.
            bank: all of a complete bank, whose launch then does not count.
        """
        launch = {fact: next(iter(bank.values()))["uniform"].get(fact) for fact in LAUNCH} if bank else {}
        ours = folder == self.folder
        differences = differing(self.facts[name] | launch, there["uniform"])
        if differences and "source" in there:
            raise InputError(
                f"adapter {name!r} in {folder} was taken from {there['source']} when this run asked for other settings: "
                f"{'; '.join(differences)}. Restore them, choose another --output_dir, or delete {folder / name} to have it "
                "taken anew"
            )
        if differences:
            raise InputError(
                f"adapter {name!r} in {folder} was trained otherwise than this run asks for, and adapters that "
                f"differ in anything but their data cannot be averaged: {'; '.join(differences)}. Restore the settings, "
                + (
                    f"choose another --output_dir, or delete {self.folder} to train all again"
                    if ours
                    else f"or leave out {experts_noun(there)}:"
                )
            )
        if there["data"] != self.candidates[name].fingerprint:
            raise InputError(
                f"candidate {name!r} has changed since its adapter was trained (rows {there['data']} there, "
                f"{self.candidates[name].fingerprint} now). Restore the data, give the new data another name, or "
                + (
                    f"delete {self.folder / name} to have this adapter trained again"
                    if ours
                    else f"leave out {experts_noun(there)}: ({folder})"
                )
            )

    def take(self, folder: Path, missing: Sequence[str], terminal: Terminal) -> None:
        """Copies adapters of a bank that was made elsewhere, where they are missing here and are what this run would train.

        Args:
            folder: with a folder for every candidate, as in `OUT/adapters`.

        Raises:
            InputError: one of them was trained otherwise, on other rows, or is not whole.
        """
        there = {name: read_json(folder / name / "training.json") for name in missing if (folder / name).is_dir()}
        for name, record in there.items():
            if (
                not isinstance(record, dict)
                or not set(record) >= NEEDED
                or "failed" in record
                or not isinstance(record["uniform"], dict)
            ):
                raise InputError(f"{folder / name} holds no adapter that can be taken: see its training.json")
            self._refuse_others(name, record, folder, there if len(there) == len(self.candidates) else {})
            if (reason := find_incomplete(folder / name)) or find_modified(folder / name):
                raise InputError(f"{folder / name}: {reason or 'not what was trained'}; fetch it again")
            load_trained(folder / name)
        if PartialState().is_main_process:
            for name, record in there.items():
                partial = staging_path(self.folder / name)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for file in ("training.json", *files_of(record)):  # no links, and nothing that is not described
                    (partial / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name / file, partial / file)
                sync(partial)
                move(self.folder / name)
        PartialState().wait_for_everyone()
        if there:
            word = experts_noun(next(iter(there.values())))
            terminal.say(f"took {len(there)} {word} that were trained elsewhere: {', '.join(there)}")

    def train_missing(
        self,
        base: Callable[[], PreTrainedModel],
        settings: Callable[[str], Settings],
        terminal: Terminal,
    ) -> None:
        """Trains the adapters that `check` names, one after another, each on what `base` gives and with what `settings` give.

        An adapter is made in a hidden folder and moved to its place when it is complete, so that an interrupted one
        leaves nothing that looks finished. One that fails leaves its reason, and the others are trained all the same.
        """
        of = {name: fingerprint([self.facts[name], self.candidates[name].fingerprint]) for name in self.candidates}
        asked: list[str] = broadcast(self.check())
        torn = {name: find_incomplete(self.folder / name) for name in asked if (self.folder / name).exists()}
        missing = [name for name in asked if not finished(self.folder / name, of[name])]
        steps = {
            name: planned_steps(settings(name).args, self.candidates[name].trained_rows, self.candidates[name].tokens)
            for name in missing
        }
        for name in missing:
            if name in torn:
                terminal.say(f"  {name}: {torn[name]}; its adapter is trained again", "yellow")
        done = 0
        with terminal.progress("training adapters", sum(steps.values())) as bar:
            for number, name in enumerate(missing, start=1):
                folder = self.folder / name
                progress = BankProgress(bar, done, f"{name} ({number} of {len(missing)})")
                about = {
                    "candidate": name,
                    "fingerprint": of[name],
                    "data": self.candidates[name].fingerprint,
                    "rows": len(self.candidates[name].rows),
                    "data_tokens": self.candidates[name].tokens,
                }
                done += steps[name]
                try:
                    record = train_expert(
                        base(),
                        self.candidates[name].rows,
                        settings(name),
                        staging_path(folder),
                        [progress],
                        of[name],
                        f"adapters/{name}",
                    )
                except TrainingFailedError as error:
                    nothing = {"steps": 0, "seconds": 0.0, "failed": str(error)}
                    publish(folder, {**about, **nothing, "uniform": self.facts[name]})
                    terminal.say(f"  {name}: failed: {error}", "yellow")
                    continue
                publish(folder, {**about, **record, "uniform": self.facts[name]})
                curve = [loss for _, loss in record["loss_curve"]]
                loss = f"{curve[0]:.3f} → {curve[-1]:.3f}" if len(curve) > 1 else f"{record['loss']:.3f} on average"
                seen = f"{record['tokens']:,} tokens, " if record["tokens"] else ""
                terminal.say(f"  {name}: {record['steps']:,} steps, {seen}loss {loss}, {duration(record['seconds'])}")
                if (lost := record.get("kept", {}).get("lost", 0.0)) > MAX_LOST:
                    terminal.say(
                        f"  {name}: delta_dtype {record['kept']['dtype']} has lost {lost:.1%} of what was learned",
                        "yellow",
                    )

        records = self.training().values()
        PartialState().wait_for_everyone()
        if all("failed" in one for one in records):
            if PartialState().is_main_process:
                for name in self.candidates:
                    shutil.rmtree(self.folder / name)
            PartialState().wait_for_everyone()
            reasons = dict.fromkeys(one["failed"] for one in records)
            raise InputError(f"not one adapter could be trained: {'; '.join(reasons)}")

    def training(self, skip: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Name -> `training.json` of every adapter but those to skip; its `fingerprint` says what the adapter is.

        Raises:
            InputError: one that does not say how its adapter was trained.
        """
        records = {}
        for name in self.candidates:
            if name in skip:
                continue
            path = self.folder / name / "training.json"
            record = read_json(path)
            if not isinstance(record, dict) or not set(record) >= NEEDED:
                raise InputError(
                    f"{path} does not say how the adapter was trained; delete {path.parent} to have it trained again"
                )
            records[name] = record
        return records

    def load(self) -> dict[str, Expert]:
        """Name -> expert, from the disk; without those that failed.

        Raises:
            InputError: one that is not the one that was trained.
        """
        return {name: load_trained(self.folder / name) for name, one in self.training().items() if "failed" not in one}
