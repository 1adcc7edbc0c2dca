"""Several fine-tunes of one base: side by side in groups where that saves time, else one after another.

Either way each comes out as if it had been alone, up to rounding, and writes the same files: a bank that is half trained the one
way is finished the other. A group has its checkpoints at the same steps, and what has ended is published once the others have a
checkpoint of that step; so a group that was killed goes on as it was, to the same bytes.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from m2m_hf.console import Bar
from m2m_hf.modeling.devices import broadcast, is_sharded
from m2m_hf.storage.files import checkpoints, read_json, staging_path, write_json
from m2m_hf.storage.records import COMPLETE, is_trained, last_common
from m2m_hf.training.fine_tune import (
    TOGETHER,
    as_launched,
    complete_checkpoints,
    publish,
    run_trainer,
    save_trained,
    seal,
    train_expert,
)
from m2m_hf.training.recording import BankProgress
from m2m_hf.training.shared_pass import UnsharedError, twin
from m2m_hf.training.side_by_side import LEAST_SHARED, Group, Member, tokens_beside
from m2m_hf.training.trackers import Tracker
from m2m_hf.training.trainers import BookkeepingTrainer, Settings, make_trainer

MOST = 32  # adapters in a group
BYTES, OF_FREE = 16, 0.4  # that a number of an adapter takes with its gradient and Adam's state, and the memory for all
Checkpoints = Mapping[int, Mapping[str, Any]]  # step -> `checkpoint_complete.json`
SPARE = 64  # tokens by which a pass may be wider than its rows


@dataclass(frozen=True)
class Job:
    """One fine-tune.

    Args:
        name: for people.
        folder: where the expert will be.
        of: fingerprint of all that the result depends on.
        run: its name in the trackers.
        steps: how many it will take, about.
        about: what else `training.json` says.
        where: what a reason for a failure begins with.
    """

    name: str
    folder: Path
    rows: Dataset
    settings: Settings
    of: str
    run: str
    steps: int
    about: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def record(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """The whole `training.json` of what `train_expert` has returned."""
        failed = {"failed": self.where + trained["failed"]} if "failed" in trained else {}
        return {**self.about, "fingerprint": self.of, **trained, **failed}


def train_jobs(
    base: Callable[[], PreTrainedModel],
    jobs: Sequence[Job],
    parallel: int | str,
    bar: Bar,
    say: Callable[..., None],
    done: Callable[[Job, Mapping[str, Any]], None] = lambda job, record: None,
) -> None:
    """Trains all jobs and publishes what comes of them (collective).

    Args:
        base: gives the base model.
        parallel: how many train side by side, or `auto`.
        bar: counts steps.
        done: is told of every job that was published, with its record.
    """
    steps: dict[str, int] = {}
    begun = broadcast({job.of: checkpoints_of(job.folder, job.of) for job in jobs})
    for group in groups(base, jobs, parallel, begun):
        refused = "" if len(group) == 1 else train_group(base(), group, begun, bar, steps, done)
        if len(group) > 1:
            clear_device_cache(garbage_collection=True)  # Trainers and twins of a group hold each other
        if refused:
            say(f"  trained one after another: {refused}", "yellow")
        for job in group if refused or len(group) == 1 else ():
            note = f"{job.name} ({len(steps) + 1} of {len(jobs)})" if len(jobs) > 1 else job.name
            callbacks = [BankProgress(bar, steps, job.of, note)]
            staged = staging_path(job.folder)
            record = job.record(train_expert(base(), job.rows, job.settings, staged, callbacks, job.of, job.run))
            publish(job.folder, record)
            done(job, record)


def groups(
    base: Callable[[], PreTrainedModel], jobs: Sequence[Job], parallel: int | str, begun: Mapping[str, Checkpoints]
) -> Iterator[list[Job]]:
    """The jobs that train together: what is left of a group that was interrupted, those begun alone, then the others."""
    mates = {of: mate["mates"] for found in begun.values() for mate in found.values() for of in mate["mates"]}
    alike: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: (job.of not in mates, not begun[job.of])):
        facts = [mates.get(job.of), bool(begun[job.of]) and job.of not in mates]
        facts += [job.settings.args.to_dict(), job.settings.expert.facts()]
        key = job.of if is_alone(job.settings) else json.dumps(facts, sort_keys=True, default=str)
        alike.setdefault(key, []).append(job)
    for members in alike.values():
        size = 1 if len(members) == 1 or parallel == 1 else group_size(base(), members[0].settings, parallel)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def group_size(base: PreTrainedModel, settings: Settings, parallel: int | str) -> int:
    """How many adapters train side by side."""
    if isinstance(parallel, int):
        return parallel
    device = settings.args.device
    if device.type == "cpu":
        return MOST if tokens_beside(base, device.type) >= LEAST_SHARED else 1
    if device.type != "cuda":
        return MOST
    with torch.random.fork_rng([device]):
        adapted = get_peft_model(twin(base), copy.deepcopy(settings.expert.lora))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    free, _ = torch.cuda.mem_get_info(device)
    return broadcast(max(1, min(MOST, int(OF_FREE * free / (BYTES * trained)))))


def beyond_rows(base: PreTrainedModel, settings: Settings) -> str:
    """What a model computes of all rows of a pass that a try need not show; empty if nothing."""
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in base.modules()):
        return "its statistics are of all rows of a pass"
    if (settings.limit or settings.args.max_length or math.inf) > rotated_alike(base) - SPARE:
        return "its rotary frequencies follow the longest row of a pass"
    return ""


def rotated_alike(base: PreTrainedModel) -> float:
    """How many tokens a row has before its rotary frequencies follow the longest row of its pass (dynamic NTK, LongRoPE)."""
    ropes: list[tuple[Any, Any]] = []
    for layer in base.modules():
        kinds = str(getattr(layer, "rope_type", ""))
        if "dynamic" in kinds or "longrope" in kinds:
            given: Any = layer.config.rope_parameters
            ropes += [(layer, rope) for rope in (given, *given.values()) if isinstance(rope, dict)]
    lengths = (rope.get("original_max_position_embeddings") or layer.original_max_seq_len for layer, rope in ropes)
    return min(lengths, default=math.inf)


def is_alone(settings: Settings) -> bool:
    """Whether a training changes more than its own adapter, or computes a pass otherwise than row by row."""
    args = settings.args
    optimizer = str(args.optim)
    return (
        settings.expert.lora is None
        or is_sharded()
        or args.packing
        or args.padding_free
        or args.use_liger_kernel
        or args.torch_compile
        or args.activation_offloading
        or args.auto_find_batch_size
        or args.enable_jit_checkpoint
        or bool(args.neftune_noise_alpha)
        or "layerwise" in optimizer
        or "lomo" in optimizer
    )


class SaveTogether(TrainerCallback):
    """Has all Trainers of a group write checkpoints at the same steps: where one of them is due, or has come to its end."""

    def __init__(self) -> None:
        self.trainers: list[BookkeepingTrainer] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = any(saves_at(trainer, state.global_step) for trainer in self.trainers)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = False


def saves_at(trainer: BookkeepingTrainer, step: int) -> bool:
    """Whether a Trainer alone would write a checkpoint at this step, or ends there."""
    state, strategy = trainer.state, str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy))
    if step >= state.max_steps:
        return bool(step == state.max_steps)
    if strategy == "epoch":
        batches = len(trainer.callback_handler.train_dataloader)
        return bool(step % math.ceil(batches / trainer.args.gradient_accumulation_steps) == 0)
    return bool(strategy == "steps" and step % state.save_steps == 0)


def checkpoints_of(folder: Path, of: str) -> Checkpoints:
    """The whole ones that belong to the training `of`."""
    return complete_checkpoints(checkpoints(staging_path(folder)), as_launched(of))


def starts(trainings: Sequence[str], begun: Mapping[str, Checkpoints]) -> dict[str, int]:
    """The steps from which trainings that share a group go on."""
    marks = {of: {step: record["mates"] for step, record in begun[of].items()} for of in trainings}
    return {of: last_common(of, marks) for of in trainings}


def steps_left(trainings: Sequence[tuple[Path, str, int]], parallel: int | str) -> list[int]:
    """The optimizer steps that are left of trainings, by folder, what identifies each, and all its steps; 0 if it is done."""
    begun = {of: checkpoints_of(folder, of) for folder, of, _ in trainings}
    groups = [[of] for of in begun] if parallel == 1 else [list(begun)]
    start = {of: step for group in groups for of, step in starts(group, begun).items()}
    return [0 if is_trained(folder, of) else max(1, steps - start[of]) for folder, of, steps in trainings]


def train_group(
    base: PreTrainedModel,
    jobs: Sequence[Job],
    begun: Mapping[str, Checkpoints],
    bar: Bar,
    steps: dict[str, int],
    done: Callable[[Job, Mapping[str, Any]], None],
) -> str:
    """Trains jobs side by side and publishes them. Returns why it cannot, before anything was trained; else nothing."""
    otherwise = "this model computes rows of several adapters otherwise than alone"
    if beyond := beyond_rows(base, jobs[0].settings):
        return f"{otherwise} ({beyond})"
    together, members, by_identity = SaveTogether(), [], {}
    begins = starts([job.of for job in jobs], begun)
    for job in jobs:
        saved, step = checkpoints(staging_path(job.folder)), begins[job.of]
        start = saved / f"{PREFIX_CHECKPOINT_DIR}-{step}" if step else None
        trainer = begin(base, job, start, [BankProgress(bar, steps, job.of, f"{len(jobs)} side by side"), together])
        trainer.mates = {mate.of: mate.folder.name for mate in jobs}
        together.trainers.append(trainer)
        members.append(Member(job.of, trainer, partial(run_trainer, trainer, start)))
        by_identity[job.of] = job
    try:
        group = Group(members)
        group.rehearse()
    except UnsharedError as reason:
        return f"{otherwise} ({reason})"

    def ended(some: Sequence[Member]) -> None:
        finish([(by_identity[member.of], member) for member in some], done)

    group.run(ended)
    return ""


def begin(
    base: PreTrainedModel, job: Job, start: Path | None, callbacks: Sequence[TrainerCallback]
) -> BookkeepingTrainer:
    """The Trainer of a job on a twin of the base; checkpoints after the one to start from are deleted."""
    saved = checkpoints(staging_path(job.folder))
    if PartialState().is_main_process:
        for path in saved.glob("*"):
            if start is None or int(path.name.rpartition("-")[2]) > int(start.name.rpartition("-")[2]):
                shutil.rmtree(path)
    PartialState().wait_for_everyone()
    of, resumed = as_launched(job.of), read_json(start / COMPLETE) if start else {}
    return make_trainer(twin(base), job.rows, job.settings, saved, of=of, resumed=resumed, callbacks=callbacks)


def finish(ended: Sequence[tuple[Job, Member]], done: Callable[[Job, Mapping[str, Any]], None]) -> None:
    """Publishes what has ended at one step: all of it, or, if killed before all is written, nothing."""
    records: dict[Path, dict[str, Any]] = {}
    for job, member in ended:
        member.draws.give()
        trained = save_trained(member.trainer, {}, set(), job.settings, staging_path(job.folder))
        records[job.folder] = seal(job.folder, job.record(trained))
        with Tracker(job.settings.args, job.run, job.of, PartialState().is_main_process) as tracker:
            for entry in member.trainer.state.log_history:
                tracker.log(entry["step"], {name: value for name, value in entry.items() if name != "step"})
    path = ended[0][0].folder.parent / TOGETHER
    if PartialState().is_main_process:
        write_json(path, {folder.name: record for folder, record in records.items()})
    for job, _ in ended:
        publish(job.folder, records[job.folder])
        done(job, records[job.folder])
    if PartialState().is_main_process:
        path.unlink()
