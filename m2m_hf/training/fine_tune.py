"""One fine-tune, of an adapter or of all parameters: TRL's SFTTrainer, or transformers' Trainer for classification.

It goes on from the last whole checkpoint, is judged, and put in its place whole.
"""

import copy
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from m2m_hf.data.classification import Collate
from m2m_hf.data.loading import Candidate
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.full_experts import DELTA_FILE, Delta, floats, save_delta
from m2m_hf.merging.gated_stack import Adapter
from m2m_hf.merging.methods import Expert
from m2m_hf.modeling.heads import Head, HeadPlan
from m2m_hf.scoring.forward import out_of_memory
from m2m_hf.storage.journal import (
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
from m2m_hf.training.trackers import Tracker
from m2m_hf.training.training_callbacks import Checkpoints, TrainingRecorder

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


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned: everything but the base model and the rows.

    Args:
        args: the Trainer's.
        processing: the tokenizer, or the image processor.
        lora: the shape of the adapter; None to train all parameters.
        head: of a classifier; None for a causal LM.
        limit: tokens that a classifier's text is cut to.
        among: of a classifier's datasets the labels that a row may have.
        parameters: of those that are trained in full, a pattern of their names (None: all).
        delta_dtype: that these are kept in.
    """

    args: SFTConfig
    processing: Any
    lora: LoraConfig | None
    head: Head | None = None
    limit: int = 0
    among: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parameters: str | None = None
    delta_dtype: str = "float32"


class Bookkeeping(Trainer):
    """What both trainers add to transformers': checkpoints that hold an adapter alone, and a sum of all losses.

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
        if self.args.should_save and isinstance(self.model, PeftModel):
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        elif self.args.should_save:
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: nobody reads a checkpoint's."""

    def summed(self) -> float:
        """Over all steps so far, the mean over the processes."""
        total = torch.as_tensor(self.loss_sum, dtype=self._precision, device=self.args.device)
        return float(self.accelerator.gather(total).mean())

    def losses(self) -> dict[str, Any]:
        """What a training that goes on must know of those before; all processes must ask."""
        return {"loss_sum": self.summed(), "logged_step": self.logged_step, "logged_sum": self.logged_sum}


class CompletionTrainer(Bookkeeping, SFTTrainer):
    """TRL's, for causal LMs."""


class LabelTrainer(Bookkeeping):
    """transformers' own, for classifiers with a frozen head: cross-entropy over the labels that a row may have."""

    loss_is_scaled_for_ga = False  # it is a mean over the rows of a batch

    def __init__(self, head: Head, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._head = head

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch: the model, without `labels` among its inputs, gives features or logits."""
        labels, allowed = inputs.pop("labels"), inputs.pop("allowed")
        outputs = model(**inputs)
        scores = self._head.scores(outputs, inputs.get("attention_mask"))
        loss = torch.nn.functional.cross_entropy(scores.masked_fill(~allowed, -math.inf), labels)
        return (loss, outputs) if return_outputs else loss


def last_checkpoint(folder: Path, of: str) -> Path | None:
    """The last checkpoint in `folder` that is whole and belongs to the training `of`."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)))):
        if cut_short(path, MARK) is None and read_made(path / MARK).get("of") == of and altered(path, MARK) is None:
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
    of = fingerprint([of, state.num_processes, sharded()])
    found: list[Any] = [None]
    if state.is_main_process:
        found = [last_checkpoint(saved, of)]
        if found[0] is None:
            shutil.rmtree(saved, ignore_errors=True)
    found = [agreed(found[0])]
    mark: dict[str, Any] = read_json(found[0] / MARK) if found[0] else {"seconds": 0.0, "losses": {}}
    recorder = TrainingRecorder(mark["seconds"])
    untouched = Untouched(base, settings)
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
        reason = agreed(verdict(finite, changed, loss, curve, args, choices))
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
        reason = agreed(reason)
        if reason is not None:
            raise TrainingFailedError(reason)
    finally:
        if not sharded():
            untouched.restore(base if trainer is None else trainer.model)
    return recorder.record | {"loss": round(loss, DECIMALS)} | kept


def arguments(settings: Settings, saved: Path) -> SFTConfig:
    """The Trainer's arguments for one training, whose checkpoints go to `saved`."""
    args = copy.deepcopy(settings.args)
    args.report_to = []
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
    if settings.head is not None:
        args.remove_unused_columns = False  # the collator reads them
        if settings.head.plan.task == "image_classification":
            args.include_num_input_tokens_seen = "no"
    return args


def make_trainer(
    base: PreTrainedModel, rows: Dataset, settings: Settings, args: SFTConfig, callbacks: Sequence[TrainerCallback]
) -> "CompletionTrainer | LabelTrainer":
    """The Trainer that the settings ask for, over the base with an adapter on it or with its parameters free."""
    common = {
        "args": args,
        "train_dataset": rows,
        "processing_class": settings.processing,
        "callbacks": list(callbacks),
    }
    set_seed(args.seed)
    plan = None if settings.head is None else settings.head.plan
    if settings.lora is None:
        base.requires_grad_(False)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(is_trained(name, plan, settings.parameters))
    if settings.head is None:
        adapter = {} if settings.lora is None else {"peft_config": copy.deepcopy(settings.lora)}
        return CompletionTrainer(model=base, **common, **adapter)
    collate = Collate(settings.processing, settings.head, settings.among, settings.limit)
    model = base if settings.lora is None else get_peft_model(base, copy.deepcopy(settings.lora))
    return LabelTrainer(settings.head, model=model, data_collator=collate, **common)


def is_trained(name: str, plan: HeadPlan | None, parameters: str | None) -> bool:
    """Whether a full expert may change the parameter of this name: one that the pattern allows, and not the head's."""
    kept = plan.untrained if plan else None
    if kept is not None and re.fullmatch(kept, name):
        return False
    return parameters is None or re.search(parameters, name) is not None


class Untouched:
    """What a base model was before a training, to tell what was trained, and to give it back as it was.

    Args:
        base: before a Trainer has seen it.
        settings: of the training.
    """

    def __init__(self, base: PreTrainedModel, settings: Settings) -> None:
        self._base, self._settings = base, settings
        self._attributes = set(vars(base))
        # By the names that they have while nothing is put around layers; and not the statistics of what a model saw.
        self._learned = {name for name, _ in base.named_parameters()}
        # The Trainer writes the tokenizer's special tokens into both, by which some models find a text's end.
        self._configs = [
            (one, copy.deepcopy(vars(one))) for one in (base.config, getattr(base, "generation_config", None)) if one
        ]
        self._hooks = set(input_hooks(base))
        here = PartialState().is_main_process or not sharded()  # or the weights are elsewhere
        # Of an adapter's base only what training changes beside parameters: running statistics of normalisation.
        self._before = {
            name: tensor.detach().cpu().clone()
            for name, tensor in (floats(base).items() if here else ())
            if settings.lora is None or not isinstance(tensor, torch.nn.Parameter)
        }
        self._counts = {  # such as of the batches that running statistics have seen
            name: tensor.detach().clone() for name, tensor in base.named_buffers() if not tensor.is_floating_point()
        }

    def trained(self, trainer: "CompletionTrainer | LabelTrainer") -> tuple[dict[str, torch.Tensor], bool]:
        """(the weights that were trained, whether they changed anything); all processes must ask.

        Where the weights are in pieces all must help to put them together, and the main one gets them.
        """
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded() else trainer.model.state_dict()
        if self._settings.lora is not None:
            weights = {name: tensor for name, tensor in whole.items() if "lora_" in name}
            rise = [tensor for name, tensor in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
            return weights, any(tensor.any() for tensor in rise)
        weights = {name: whole[name] for name in self._before if name in whole}
        moved = (not torch.equal(weights[name].cpu(), self._before[name]) for name in self._learned & set(weights))
        return weights, any(moved)

    def save(self, model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Any]:
        """Writes the expert; on the main process."""
        if self._settings.lora is None:
            dtype = getattr(torch, self._settings.delta_dtype)
            return {"kept": save_delta(folder, self._before, weights, dtype) | {"dtype": self._settings.delta_dtype}}
        shape = model.peft_config["default"]
        for item in fields(shape):
            value = getattr(shape, item.name)
            if isinstance(value, set):  # or their order would change from run to run
                setattr(shape, item.name, sorted(value))
        model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
        return {}

    def restore(self, model: Any) -> None:
        """Gives the base back, to be trained or scored as if it were freshly loaded.

        With activation checkpointing TRL and the Trainer each put a hook on the input embeddings and remember the last one
        only, so that transformers' own way to take them off would leave one behind.

        Args:
            model: what was trained: the base, or the PEFT model around it.
        """
        base = self._base
        if isinstance(model, PeftModel):
            model.unload()
        for name, layer in list(base.named_modules()):  # where no trainer came to be around them
            if isinstance(layer, LoraLayer):
                base.set_submodule(name, layer.get_base_layer())
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        hooks = input_hooks(base)
        for hook in set(hooks) - self._hooks:
            del hooks[hook]
        for name in set(vars(base)) - self._attributes:
            delattr(base, name)
        for config, known in self._configs:
            vars(config).clear()
            vars(config).update(known)
        base.requires_grad_(False)
        with torch.no_grad():
            for name, tensor in floats(base).items():
                if name in self._before:
                    tensor.copy_(self._before[name])
            for name, tensor in base.named_buffers():
                if name in self._counts:
                    tensor.copy_(self._counts[name])
        base.eval()


def input_hooks(model: PreTrainedModel) -> dict[int, Any]:
    """The forward hooks on a model's input embeddings; none where it has no such layer."""
    try:
        hooks: dict[int, Any] = model.get_input_embeddings()._forward_hooks
    except (NotImplementedError, AttributeError):
        return {}
    return hooks


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


def load_trained(folder: Path) -> Expert:
    """The expert that was trained into `folder`.

    Raises:
        InputError: what is there is not what was trained.
    """
    if file := altered(folder):
        raise InputError(
            f"{folder / file} is not what was trained: its content has changed. Restore it, or delete {folder} to have it "
            "trained again"
        )
    return Delta(folder) if (folder / DELTA_FILE).exists() else Adapter.load(folder)
