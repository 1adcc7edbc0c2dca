"""One fine-tune, of an adapter or of all parameters: TRL's SFTTrainer, or transformers' Trainer for classification.

It goes on from the last whole checkpoint, is judged, and put in its place whole.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig

from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.dense_stack import Expert
from m2m_hf.merging.full_experts import DELTA_FILE, Delta
from m2m_hf.modeling.devices import broadcast, is_sharded, out_of_memory
from m2m_hf.storage.files import checkpoints, fingerprint, read_json, read_json_or_empty, staging_path, sync, write_json
from m2m_hf.storage.records import COMPLETE, describe_files, find_incomplete, find_modified
from m2m_hf.training.base_snapshot import BaseSnapshot
from m2m_hf.training.trackers import Tracker
from m2m_hf.training.trainers import (
    DECIMALS,
    Checkpoints,
    CompletionTrainer,
    LabelTrainer,
    Settings,
    TrainingRecorder,
    arguments,
    make_trainer,
)


def planned_steps(args: SFTConfig, rows: int, tokens: int) -> int:
    """Optimizer steps that the Trainer will make on `rows` rows of together `tokens` tokens; with packing about."""
    if args.packing and args.max_length:
        rows = math.ceil(tokens / args.max_length)
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(rows / (args.per_device_train_batch_size * PartialState().num_processes))
    per_epoch: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(per_epoch * float(args.num_train_epochs))


def mixture_steps(args: SFTConfig, candidates: Mapping[str, Candidate], counts: Mapping[str, int]) -> int:
    """Optimizer steps that the Trainer will make on so many rows of each candidate."""
    chosen = [(candidates[name], count) for name, count in counts.items()]
    rows = sum(one.trained_rows * count // len(one.rows) for one, count in chosen)
    return planned_steps(args, rows, sum(one.tokens * count // len(one.rows) for one, count in chosen))


class TrainingFailedError(InputError):
    """A training whose outcome is of no use: not finite, worse than guessing, or no change at all."""


def last_checkpoint(folder: Path, of: str) -> Path | None:
    """The last checkpoint in `folder` that is whole and belongs to the training `of`."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)))):
        if (
            find_incomplete(path, COMPLETE) is None
            and read_json_or_empty(path / COMPLETE).get("of") == of
            and find_modified(path, COMPLETE) is None
        ):
            return path
    return None


def verdict(
    finite: bool, changed: bool, loss: float, curve: Sequence[float], args: SFTConfig, choices: int
) -> str | None:
    """Why what was trained is of no use; None where it is.

    Args:
        finite: whether all its weights are.
        changed: whether anything was.
        loss: mean over the training.
        curve: losses as they were logged.
        choices: tokens of the vocabulary, or labels; guessing has a loss of the logarithm.
    """
    if not math.isfinite(loss) or not finite:
        return (
            f"it diverged: loss {loss:g}, or weights that are not finite; try a lower learning_rate (now {args.learning_rate:g}) "
            "or max_grad_norm"
        )
    if len(curve) > 1 and curve[-1] > max(curve[0], math.log(choices)) + 1:
        return (
            f"it exploded: the loss went from {curve[0]:.3f} to {curve[-1]:.3f}, worse than guessing "
            f"({math.log(choices):.3f}); try a lower learning_rate (now {args.learning_rate:g})"
        )
    if not changed:
        return f"it learned nothing: every weight of its delta is 0; is the learning_rate ({args.learning_rate:g}) too small?"
    return None


def train_expert(
    base: PreTrainedModel,
    rows: Dataset,
    settings: Settings,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    of: str = "",
    run: str = "training",
) -> dict[str, Any]:
    """Fine-tunes on `rows`, saves the adapter, or what changed of all parameters, to `folder`, and gives the base back untouched.

    Checkpoints are written to `checkpoints(folder)` as the arguments say (TRL: every 500 steps), and stay until `publish`. From
    the last whole one of the same training it goes on, to the very weights that it would have had otherwise. Under FSDP or
    DeepSpeed there are none, and the base is not given back: it is in pieces, and of no further use.

    Every call seeds itself before it makes an adapter, so that all start from the same weights.

    Args:
        of: fingerprint of all that the outcome depends on.
        run: its name in the trackers that `report_to` names.

    Returns:
        What the run used: see `TrainingRecorder`; `loss`, its mean over the steps; and of full experts `kept`, see `save_delta`.

    Raises:
        TrainingFailedError: nothing is saved.
        StoppedError: something ended it early.
    """
    state = PartialState()
    tracker = Tracker(settings.args, run, of, state.is_main_process)
    saved = checkpoints(folder)
    args = arguments(settings, saved)
    of = fingerprint([of, state.num_processes, is_sharded()])
    found: list[Any] = [None]
    if state.is_main_process:
        found = [last_checkpoint(saved, of)]
        if found[0] is None:
            shutil.rmtree(saved, ignore_errors=True)
    found = [broadcast(found[0])]
    mark: dict[str, Any] = read_json(found[0] / COMPLETE) if found[0] else {"seconds": 0.0, "losses": {}}
    recorder = TrainingRecorder(mark["seconds"])
    untouched = BaseSnapshot(base, settings)
    trainer: CompletionTrainer | LabelTrainer | None = None
    try:
        trainer = make_trainer(base, rows, settings, args, [recorder, tracker, *callbacks])
        trainer.add_callback(Checkpoints(of, recorder, trainer.losses))
        for name, value in mark["losses"].items():
            setattr(trainer, name, value)
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        try:
            with tracker:
                trainer.train(resume_from_checkpoint=str(found[0]) if found[0] else None)
        except UnpicklingError as error:
            raise InputError(f"{found[0]}: it holds more than numbers, and is not loaded; delete {saved}") from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"training does not fit into memory: lower per_device_train_batch_size (now {args.per_device_train_batch_size}; "
                f"gradient_accumulation_steps makes up for it){'' if settings.head else ', max_length, or load_in_4bit'}"
            ) from error
        done, planned = trainer.state.global_step, trainer.state.max_steps
        if done < planned:
            raise StoppedError(f"the training was ended after {done:,} of {planned:,} steps")
        loss = trainer.summed() / max(1, done)
        choices = len(settings.head.labels) if settings.head else base.config.get_text_config().vocab_size
        curve = [loss for _, loss in recorder.record["loss_curve"]]
        weights, changed = untouched.trained(trainer)
        # Of numbers whose squares are not, nothing can be made either: a step of 1e30 may leave a loss that is finite.
        finite = all(tensor.float().square().sum().isfinite() for tensor in weights.values())
        reason = broadcast(verdict(finite, changed, loss, curve, args, choices))
        kept: dict[str, Any] = {}
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            if reason is None:
                try:
                    kept = untouched.save(trainer.model, weights, folder)
                except InputError as error:  # what its dtype cannot hold; the other processes must hear of it
                    reason = str(error)
            if kept and not kept["kept"]["parameters"]:
                reason = f"delta_dtype: {settings.delta_dtype} keeps nothing of what was learned; expected float32"
        reason = broadcast(reason)
        if reason is not None:
            raise TrainingFailedError(reason)
    finally:
        if not is_sharded():
            untouched.restore(base if trainer is None else trainer.model)
    return recorder.record | {"loss": round(loss, DECIMALS)} | kept


def publish(folder: Path, record: Mapping[str, Any]) -> None:
    """Puts what was made in `staging_path(folder)` into its place, together with its `training.json`."""
    if PartialState().is_main_process:
        partial = staging_path(folder)
        partial.mkdir(parents=True, exist_ok=True)
        record = {**record, "files": describe_files(partial)}
        sync(partial)
        write_json(partial / "training.json", record)
        move(folder)
    PartialState().wait_for_everyone()


def move(folder: Path) -> None:
    """The last step of `publish`."""
    shutil.rmtree(checkpoints(staging_path(folder)), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    staging_path(folder).rename(folder)
    sync(folder.parent, files=False)


def finished(folder: Path, of: str) -> bool:
    """Whether `folder` is there and whole, or was when a crash kept it from its place, to which it is then moved.

    Args:
        of: the `fingerprint` that must stand in its `training.json`.
    """
    if PartialState().is_main_process and find_incomplete(folder) is not None:
        partial = staging_path(folder)
        if find_incomplete(partial) is None and read_json_or_empty(partial / "training.json").get("fingerprint") == of:
            move(folder)
    return bool(broadcast(find_incomplete(folder) is None))


def load_trained(folder: Path) -> Expert:
    """The expert that was trained into `folder`.

    Raises:
        InputError: what is there is not what was trained.
    """
    if file := find_modified(folder):
        raise InputError(
            f"{folder / file} is not what was trained: its content has changed. Restore it, or delete {folder} to have it "
            "trained again"
        )
    return Delta(folder) if (folder / DELTA_FILE).exists() else Adapter.load(folder)
