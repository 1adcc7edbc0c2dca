"""One fine-tune: TRL's SFTTrainer, or transformers' Trainer for classification.

It resumes from its last complete checkpoint, its result is checked, and the folder is renamed into place when complete.
"""

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from trl import SFTConfig

from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.full_experts import floats
from m2m_hf.modeling.devices import broadcast, is_sharded, out_of_memory
from m2m_hf.storage.files import checkpoints, fingerprint, read_json, read_json_or_empty, staging_path, sync, write_json
from m2m_hf.storage.records import COMPLETE, describe_files, find_incomplete, find_modified, is_trained
from m2m_hf.training.experts import ExpertKind, Tensors
from m2m_hf.training.trackers import Tracker
from m2m_hf.training.trainers import DECIMALS, BookkeepingTrainer, LabelTrainer, Settings, make_trainer

TOGETHER = ".ended.json"  # records of trainings that ended at one step, while they are published


def planned_steps(args: SFTConfig, rows: int, tokens: int) -> int:
    """Counts the optimizer steps that the Trainer will make on rows of so many tokens in all; with packing, about."""
    if args.packing and args.max_length:
        rows = math.ceil(tokens / args.max_length)
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = rows / (args.per_device_train_batch_size * PartialState().num_processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(per_epoch * float(args.num_train_epochs))


def mixture_steps(args: SFTConfig, candidates: Mapping[str, Candidate], counts: Mapping[str, int]) -> int:
    """Counts the optimizer steps that the Trainer will make on so many rows of each candidate."""
    rows = tokens = 0
    for name, count in counts.items():
        candidate = candidates[name]
        rows += candidate.trained_rows * count // len(candidate.rows)
        tokens += candidate.tokens * count // len(candidate.rows)
    return planned_steps(args, rows, tokens)


def on_main_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `work` gives on the main process; all processes raise what it refuses there (collective)."""
    result: dict[str, Any] = {}
    refused: InputError | None = None
    if PartialState().is_main_process:
        try:
            result = work()
        except InputError as error:
            refused = error
    result, refused = broadcast((result, refused))
    if refused is not None:
        raise refused
    return result


class BaseSnapshot:
    """The base model before a Trainer has seen it, to be restored afterwards.

    `before` holds its weights as far as a training may change them, `learned` names its parameters. If the model is sharded,
    only the main process has the weights.
    """

    def __init__(self, base: PreTrainedModel, kind: ExpertKind) -> None:
        self._base = base
        self._attributes = set(vars(base))
        self._hooks = set(input_hooks(base))
        # The Trainer writes the tokenizer's special tokens into both, by which some models find a text's end.
        configs = (base.config, getattr(base, "generation_config", None))
        self._configs = [(config, copy.deepcopy(vars(config))) for config in configs if config]
        self.learned = {name for name, _ in base.named_parameters()}
        is_here = PartialState().is_main_process or not is_sharded()
        self.before = {
            name: tensor.detach().cpu().clone()
            for name, tensor in (floats(base).items() if is_here else ())
            # Beside an adapter only running statistics of normalisation change.
            if kind.lora is None or not isinstance(tensor, torch.nn.Parameter)
        }
        self._counts = {  # such as the number of batches that running statistics have seen
            name: tensor.detach().clone() for name, tensor in base.named_buffers() if not tensor.is_floating_point()
        }

    def restore(self, model: Any) -> None:
        """Restores the base, to be trained or scored as if it were freshly loaded.

        With activation checkpointing TRL and the Trainer each put a hook on the input embeddings and remember the last one
        only, so transformers' own way to remove them would leave one behind. `model` is the base, or the PEFT model around it.
        """
        base = self._base
        if isinstance(model, PeftModel):
            model.unload()
        for name, layer in list(base.named_modules()):  # if the Trainer failed while it was made
            if isinstance(layer, LoraLayer):
                base.set_submodule(name, layer.get_base_layer())
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        hooks = input_hooks(base)
        for hook in set(hooks) - self._hooks:
            del hooks[hook]
        for name in set(vars(base)) - self._attributes:
            delattr(base, name)
        for config, values in self._configs:
            vars(config).clear()
            vars(config).update(values)
        base.requires_grad_(False)
        saved = self.before | self._counts
        with torch.no_grad():
            for name, tensor in (floats(base) | dict(base.named_buffers())).items():
                if name in saved:
                    tensor.copy_(saved[name])
        base.eval()


def input_hooks(model: PreTrainedModel) -> dict[int, Any]:
    """Returns the forward hooks on a model's input embeddings; empty if it has no such layer."""
    try:
        hooks: dict[int, Any] = model.get_input_embeddings()._forward_hooks
    except (NotImplementedError, AttributeError):
        return {}
    return hooks


def as_launched(of: str) -> str:
    """Identifies a training together with its launch, on which its checkpoints depend."""
    return fingerprint([of, PartialState().num_processes, is_sharded()])


def complete_checkpoints(folder: Path, of: str) -> dict[int, dict[str, Any]]:
    """Step -> `checkpoint_complete.json` in `folder`, of those that are complete and belong to the training `of`."""
    found = {}
    for path in map(Path, sort_checkpoints(str(folder))):
        known = read_json_or_empty(path / COMPLETE) if find_incomplete(path, COMPLETE) is None else {}
        if known.get("of") == of and not find_modified(path, COMPLETE):
            found[int(known["steps"])] = known
    return found


def last_checkpoint(folder: Path, of: str) -> Path | None:
    """Returns the last checkpoint in `folder` that is complete and belongs to the training `of`."""
    found = complete_checkpoints(folder, of)
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{max(found)}" if found else None


def verdict(
    finite: bool, changed: bool, loss: float, before: float, after: float, lr: float, choices: int
) -> str | None:
    """Says why what was trained is useless; None if it is not. Guessing among so many choices has the loss log(choices).

    `loss` is the mean of the training, `before` and `after` are of the same rows, without the noise of small batches.
    """
    lower, guess = f"try a lower learning_rate (now {lr:g})", math.log(choices)
    if not math.isfinite(loss) or not finite:
        return f"it diverged: loss {loss:g}, or weights that are not finite; {lower} or max_grad_norm"
    if not after <= max(before, guess) + 1:  # nan too
        return (
            f"it exploded: the loss went from {before:.3f} to {after:.3f}, worse than guessing ({guess:.3f}); {lower}"
        )
    if not changed:
        return f"it learned nothing: no weight changed; is the learning_rate ({lr:g}) too small?"
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
    """Fine-tunes on `rows`, saves the expert to `folder`, restores the base, and returns what `training.json` says of it.

    If the result is useless (not finite, worse than guessing, or no change at all) nothing is saved, and `failed` says why.

    Checkpoints go to `checkpoints(folder)` as the arguments say (TRL: every 500 steps), and stay until `publish`. A training
    resumes from its last complete checkpoint and ends with the same weights as without an interruption. Under FSDP or DeepSpeed
    there are no checkpoints, and the base is not restored: it is sharded, and of no further use.

    Args:
        of: fingerprint of all that the result depends on.
        run: its name in the trackers that `report_to` names.

    Raises:
        StoppedError: something ended it early.
    """
    state = PartialState()
    tracker = Tracker(settings.args, run, of, state.is_main_process)
    of = as_launched(of)
    saved = checkpoints(folder)
    checkpoint = last_checkpoint(saved, of) if state.is_main_process else None
    if checkpoint is None and state.is_main_process:
        shutil.rmtree(saved, ignore_errors=True)  # of another training
    checkpoint = broadcast(checkpoint)
    resumed = read_json(checkpoint / COMPLETE) if checkpoint else {}
    snapshot = BaseSnapshot(base, settings.expert)
    trainer: BookkeepingTrainer | None = None
    try:
        trainer = make_trainer(base, rows, settings, saved, of=of, resumed=resumed, callbacks=[tracker, *callbacks])
        with tracker:
            run_trainer(trainer, checkpoint)
        return save_trained(trainer, snapshot.before, snapshot.learned, settings, folder)
    finally:
        if not is_sharded():
            snapshot.restore(base if trainer is None else trainer.model)


def run_trainer(trainer: BookkeepingTrainer, checkpoint: Path | None) -> None:
    """Trains to the last step, and says what to do where memory or a checkpoint is in the way."""
    args = trainer.args
    try:
        trainer.loss_before = None if is_sharded() else trainer.loss_on_first_rows()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.loss_after = None if is_sharded() else trainer.loss_on_first_rows()
    except UnpicklingError as error:
        raise InputError(
            f"{checkpoint}: contains pickled objects and was not loaded; delete {args.output_dir}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        more = "" if isinstance(trainer, LabelTrainer) else ", max_length, or load_in_4bit"
        raise InputError(
            f"training does not fit into memory: lower per_device_train_batch_size (now {args.per_device_train_batch_size}; "
            f"gradient_accumulation_steps makes up for it){more}"
        ) from error
    done, planned = trainer.state.global_step, trainer.state.max_steps
    if done < planned:
        raise StoppedError(f"the training was ended after {done:,} of {planned:,} steps")


def save_trained(
    trainer: BookkeepingTrainer, base: Tensors, learned: set[str], settings: Settings, folder: Path
) -> dict[str, Any]:
    """Saves what was trained, if it is of use, and returns what `train_expert` returns (collective).

    `base` and `learned` are those of a `BaseSnapshot`.
    """
    loss = trainer.summed() / max(1, trainer.state.global_step)
    sharded = is_sharded()  # then the main process gets the weights
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else trainer.model.state_dict()
    weights, changed = settings.expert.trained_weights(state, base, learned)
    before, after = trainer.loss_before, trainer.loss_after
    if before is None or after is None:  # sharded: no process can compute it alone
        logged = [value for _, value in trainer.recorder.record["loss_curve"]]
        before, after = logged[0], min(logged[-5:])

    def save() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        head = settings.head
        choices = len(head.labels) if head else trainer.model.config.get_text_config().vocab_size
        record = trainer.recorder.record | {"loss": round(loss, DECIMALS)}
        if reason := verdict(is_finite(weights), changed, loss, before, after, settings.args.learning_rate, choices):
            return failure(reason)
        try:
            return record | settings.expert.save(trainer.model, base, weights, folder)
        except InputError as error:
            return failure(str(error))

    return on_main_process(save)


def failure(reason: str) -> dict[str, Any]:
    """What `training.json` says of a training that gave nothing of use."""
    return {"steps": 0, "seconds": 0.0, "failed": reason}


def is_finite(weights: Tensors) -> bool:
    """True if all weights and their squares are finite: a step of 1e30 may leave weights that nothing can be made of."""
    return all(tensor.float().square().sum().isfinite() for tensor in weights.values())


def seal(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole `training.json` of what lies in `staging_path(folder)`, once that is on the disk (collective)."""

    def work() -> dict[str, Any]:
        partial = staging_path(folder)
        partial.mkdir(parents=True, exist_ok=True)
        sync(partial)
        return {**record, "files": describe_files(partial)}

    return on_main_process(work)


def publish(folder: Path, record: Mapping[str, Any]) -> None:
    """Renames `staging_path(folder)` into place, together with its `training.json` (collective)."""
    sealed = seal(folder, record)
    if PartialState().is_main_process:
        write_json(staging_path(folder) / "training.json", sealed)
        move(folder)
    PartialState().wait_for_everyone()


def move(folder: Path) -> None:
    """The last step of `publish`."""
    shutil.rmtree(checkpoints(staging_path(folder)), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    staging_path(folder).rename(folder)
    sync(folder.parent, files=False)


def finished(folder: Path, of: str) -> bool:
    """True if `folder` is complete and holds what `of` identifies (collective); a crash may have left it in its staging path."""
    if PartialState().is_main_process and not is_trained(folder, of):
        partial = staging_path(folder)
        ended = read_json_or_empty(folder.parent / TOGETHER).get(folder.name)
        if ended and partial.is_dir():
            write_json(partial / "training.json", ended)
            if find_modified(partial):  # of another training than this one
                (partial / "training.json").unlink()
        if is_trained(partial, of):
            move(folder)
    return broadcast(is_trained(folder, of))
