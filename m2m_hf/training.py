"""One LoRA fine-tune: TRL's SFTTrainer, going on from the last whole checkpoint; judged, and put in its place whole."""

import copy
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from .callbacks import Checkpoints, TrainingRecorder
from .data import Candidate
from .errors import InputError, StoppedError
from .forward import out_of_memory
from .journal import (
    MARK,
    altered,
    checkpoints,
    cut_short,
    describe_files,
    fingerprint,
    hidden,
    read_json,
    read_made,
    sync,
    write_json,
)
from .merging import Adapter
from .trackers import Tracker

DECIMALS = 6  # of a loss: more would tell how often its sum was interrupted


def sharded() -> bool:
    """Whether the launcher has training cut the model into pieces, one per process (FSDP, DeepSpeed)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


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


class AdapterTrainer(SFTTrainer):
    """TRL's trainer, with checkpoints that hold the adapter alone and with a sum of all losses.

    The Trainer forgets the losses before a checkpoint, and leaves out those that are not finite; what is logged here is the
    same whether or not training was interrupted. With an adapter it would ask the Hub for the base model's vocabulary whenever
    it writes a checkpoint.
    """

    loss_sum: Any = 0.0
    logged_step: int = 0
    logged_sum: float = 0.0

    @property
    def _precision(self) -> torch.dtype:
        return torch.float32 if self.args.device.type == "mps" else torch.float64  # which Apple's GPUs have not

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.loss_sum = self.loss_sum + loss.detach().to(self._precision)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            step, total = self.state.global_step, self.summed()
            logs = logs | {"loss": round((total - self.logged_sum) / max(1, step - self.logged_step), DECIMALS)}
            self.logged_step, self.logged_sum = step, total
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: nobody reads a checkpoint's."""

    def summed(self) -> float:
        """Over all steps so far, the mean over the processes."""
        total = torch.as_tensor(self.loss_sum, dtype=self._precision, device=self.args.device)
        return float(self.accelerator.gather(total).mean())

    def losses(self) -> dict[str, Any]:
        """What a training that goes on must know of those before; all processes must ask."""
        return {"loss_sum": self.summed(), "logged_step": self.logged_step, "logged_sum": self.logged_sum}


def last_checkpoint(folder: Path, of: str) -> Path | None:
    """The last checkpoint in `folder` that is whole and belongs to the training `of`."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)))):
        if cut_short(path, MARK) is None and read_made(path / MARK).get("of") == of and altered(path, MARK) is None:
            return path
    return None


def verdict(
    tensors: Mapping[str, torch.Tensor], loss: float, curve: Sequence[float], args: SFTConfig, vocabulary: int
) -> str | None:
    """Why a trained adapter is of no use; None where it is.

    Args:
        tensors: its factors; those of B start as zeros.
        loss: mean over the training.
        curve: losses as they were logged.
        vocabulary: of the model; guessing has a loss of its logarithm.
    """
    if not math.isfinite(loss) or not all(tensor.isfinite().all() for tensor in tensors.values()):
        return (
            f"it diverged: loss {loss:g}, or weights that are not finite; try a lower learning_rate (now {args.learning_rate:g}) "
            "or max_grad_norm"
        )
    if len(curve) > 1 and curve[-1] > max(curve[0], math.log(vocabulary)) + 1:
        return (
            f"it exploded: the loss went from {curve[0]:.3f} to {curve[-1]:.3f}, worse than guessing "
            f"({math.log(vocabulary):.3f}); try a lower learning_rate (now {args.learning_rate:g})"
        )
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name):
        return f"it learned nothing: every weight of its delta is 0; is the learning_rate ({args.learning_rate:g}) too small?"
    return None


def train_lora(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    config: LoraConfig,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    of: str = "",
    run: str = "training",
) -> dict[str, Any]:
    """Fine-tunes one LoRA adapter on `rows` with TRL's SFTTrainer, saves it to `folder`, and gives the base back untouched.

    Checkpoints are written to `checkpoints(folder)` as `args` say (TRL: every 500 steps), and stay until `publish`. From the
    last whole one of the same training it goes on, to the very weights that it would have had otherwise. Under FSDP or
    DeepSpeed there are none, and the base is not given back: it is in pieces, and of no further use.

    SFTTrainer seeds itself before it makes the adapter, so every call starts from the same adapter weights.

    Args:
        of: fingerprint of all that the outcome depends on.
        run: its name in the trackers that `report_to` names.

    Returns:
        What the run used: see `TrainingRecorder`; and `loss`, its mean over the steps.

    Raises:
        TrainingFailedError: nothing is saved.
        StoppedError: something ended it early.
    """
    tracker = Tracker(args, run, of, PartialState().is_main_process)
    args = copy.deepcopy(args)
    args.report_to = []
    saved = checkpoints(folder)
    args.output_dir = str(saved)
    if sharded():
        args.save_strategy = "no"
    args.save_total_limit = 2  # an older one is deleted before the newer one is marked as whole
    args.save_only_model = False
    args.eval_strategy = "no"
    args.push_to_hub = False
    args.disable_tqdm = True
    args.logging_first_step = True
    args.include_num_input_tokens_seen = "non_padding"
    state = PartialState()
    of = fingerprint([of, state.num_processes, sharded()])
    found: list[Any] = [None]
    if state.is_main_process:
        found = [last_checkpoint(saved, of)]
        if found[0] is None:
            shutil.rmtree(saved, ignore_errors=True)
    found = [agreed(found[0])]
    mark: dict[str, Any] = read_json(found[0] / MARK) if found[0] else {"seconds": 0.0, "losses": {}}
    recorder = TrainingRecorder(mark["seconds"])
    untouched = set(vars(base)), set(base.get_input_embeddings()._forward_hooks)
    trainer = AdapterTrainer(
        model=base,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(config),
        callbacks=[recorder, tracker, *callbacks],
    )
    trainer.add_callback(Checkpoints(of, recorder, trainer.losses))
    for name, value in mark["losses"].items():
        setattr(trainer, name, value)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    peft_model = trainer.model
    try:
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
                "gradient_accumulation_steps makes up for it) or max_length, or load_in_4bit"
            ) from error
        done, planned = trainer.state.global_step, trainer.state.max_steps
        if done < planned:
            raise StoppedError(f"the training was ended after {done:,} of {planned:,} steps")
        loss = trainer.summed() / max(1, done)
        # Where the weights are in pieces, all processes must help to put them together; the main one gets them.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded() else peft_model.state_dict()
        tensors = {name: tensor for name, tensor in weights.items() if "lora_" in name}
        curve = [loss for _, loss in recorder.record["loss_curve"]]
        reason = agreed(verdict(tensors, loss, curve, args, base.config.get_text_config().vocab_size))
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            if reason is None:
                for item in fields(peft_model.peft_config["default"]):
                    value = getattr(peft_model.peft_config["default"], item.name)
                    if isinstance(value, set):  # or their order would change from run to run
                        setattr(peft_model.peft_config["default"], item.name, sorted(value))
                peft_model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        state.wait_for_everyone()
        if reason is not None:
            raise TrainingFailedError(reason)
    finally:
        if not sharded():
            restore(base, peft_model, *untouched)
    return recorder.record | {"loss": round(loss, DECIMALS)}


def publish(folder: Path, record: Mapping[str, Any]) -> None:
    """Puts what was made in `hidden(folder)` into its place, together with its `training.json`."""
    if PartialState().is_main_process:
        partial = hidden(folder)
        partial.mkdir(parents=True, exist_ok=True)
        record = {**record, "files": describe_files(partial)}
        sync(partial)
        write_json(partial / "training.json", record)
        move(folder)
    PartialState().wait_for_everyone()


def move(folder: Path) -> None:
    """The last step of `publish`."""
    shutil.rmtree(checkpoints(hidden(folder)), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    hidden(folder).rename(folder)
    sync(folder.parent, files=False)


def finished(folder: Path, of: str) -> bool:
    """Whether `folder` is there and whole, or was when a crash kept it from its place, to which it is then moved.

    Args:
        of: the `fingerprint` that must stand in its `training.json`.
    """
    if PartialState().is_main_process and cut_short(folder) is not None:
        partial = hidden(folder)
        if cut_short(partial) is None and read_made(partial / "training.json").get("fingerprint") == of:
            move(folder)
    return bool(agreed(cut_short(folder) is None))


def agreed(value: Any) -> Any:
    """What the main process has; all must ask."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def load_trained(folder: Path) -> Adapter:
    """The adapter that was trained into `folder`.

    Raises:
        InputError: what is there is not what was trained.
    """
    if file := altered(folder):
        raise InputError(
            f"{folder / file} is not what was trained: its content has changed. Restore it, or delete {folder} to have it "
            "trained again"
        )
    return Adapter.load(folder)


def restore(base: PreTrainedModel, peft_model: PeftModel, attributes: set[str], hooks: set[int]) -> None:
    """Takes the adapter and TRL's patches off `base`, which can then be trained or scored as if it were freshly loaded.

    Args:
        attributes: names of the instance attributes that `base` had before.
        hooks: ids of the forward hooks that its input embeddings had before. With activation checkpointing TRL and the
            Trainer each put one there and remember the last one only, so that transformers' own way to take them off
            would leave one behind.
    """
    peft_model.unload()
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    embedding_hooks = base.get_input_embeddings()._forward_hooks
    for hook in set(embedding_hooks) - hooks:
        del embedding_hooks[hook]
    for name in set(vars(base)) - attributes:
        delattr(base, name)
    base.requires_grad_(False)
    base.eval()
