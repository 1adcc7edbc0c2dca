"""The Trainers of TRL and transformers, with the bookkeeping that this package adds."""

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from m2m_hf.console import Bar
from m2m_hf.modeling.devices import is_sharded
from m2m_hf.modeling.heads import Head
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.storage.files import staging_path, sync, write_json
from m2m_hf.storage.records import COMPLETE, describe_files
from m2m_hf.training.experts import ExpertKind


class Collate:
    """Makes a batch of training rows: the model's inputs, `labels` (places in the head) and `allowed`, of shape (rows, labels).

    Args:
        processing: the tokenizer, or the image processor.
        head: the run's.
        among: `source` -> the labels that a row of it may have; without effect where the label space is closed.
        limit: tokens that a text is cut to.
    """

    def __init__(self, processing: Any, head: Head, among: Mapping[str, Sequence[str]], limit: int) -> None:
        self._inputs = partial(inputs_of, processing, limit=limit)
        self._place = {label: number for number, label in enumerate(head.labels)}
        self._allowed: dict[str, torch.Tensor] = {}
        for source, labels in among.items():
            self._allowed[source] = torch.zeros(len(head.labels), dtype=torch.bool)
            self._allowed[source][head.places(head.labels if head.closed else labels)] = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = dict(self._inputs([row.get("text", row.get("image")) for row in rows]))
        batch["labels"] = torch.tensor([self._place[row["label"]] for row in rows])
        batch["allowed"] = torch.stack([self._allowed[row["source"]] for row in rows])
        return batch


class TrainingRecorder(TrainerCallback):
    """Records what a training run really used; `record` is what goes into `training.json`.

    `record` holds: `steps`, `epochs`, `tokens` (seen, padding excluded), `seconds`, `loss` (mean over the run),
    `loss_curve` ([step, loss] pairs), and `peak_memory_bytes` (allocated on the accelerator; on a CPU the highest resident
    size that the process has had).

    Args:
        before: seconds spent on the same training before it was interrupted.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.record: dict[str, Any] = {}
        self._before = before
        self._start = 0.0

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return round(self._before + time.monotonic() - self._start, 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.record = {
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "tokens": int(state.num_input_tokens_seen),
            "seconds": self.seconds,
            "loss_curve": [[entry["step"], float(entry["loss"])] for entry in state.log_history if "loss" in entry],
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """Returns the most bytes allocated on the accelerator; on a CPU, the most memory that the process has had (0 on Windows)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete when everything in it is written, and adds what resuming exactly needs.

    There is none at the last step: the Trainer would resume from it with one step too many.

    Args:
        of: fingerprint of what is trained; another training does not resume from its checkpoints.
        recorder: of the same training.
        losses: gives the losses of all steps so far (collective).
    """

    def __init__(self, of: str, recorder: TrainingRecorder, losses: Callable[[], dict[str, Any]]) -> None:
        self._of, self._recorder, self._losses = of, recorder, losses

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = self._losses()
        PartialState().wait_for_everyone()  # every process writes the state of its random numbers
        if PartialState().is_main_process:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for old in (folder / COMPLETE, staging_path(folder / COMPLETE)):  # of a checkpoint that was killed here
                old.unlink(missing_ok=True)
            sync(folder)
            known = {
                "of": self._of,
                "steps": state.global_step,
                "seconds": self._recorder.seconds,
                "losses": losses,
            }
            write_json(folder / COMPLETE, known | {"files": describe_files(folder)})


class BankProgress(TrainerCallback):
    """Moves one bar through the training of a whole bank.

    Args:
        bar: counts optimizer steps.
        before: steps that the bar had done when this training began.
        note: what is being trained.
    """

    def __init__(self, bar: Bar, before: int, note: str) -> None:
        self._bar, self._before, self._note = bar, before, note

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._before + state.global_step, self._note)


DECIMALS = 6  # of a loss: more would tell how often its sum was interrupted


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned: everything but the base model and the rows.

    Args:
        args: the Trainer's.
        processing: the tokenizer, or the image processor.
        expert: the kind of expert, with its own settings.
        head: of a classifier; None for a causal LM.
        limit: tokens that a classifier's text is cut to.
        among: dataset of a classifier -> the labels that its rows may have.
    """

    args: SFTConfig
    processing: Any
    expert: ExpertKind
    head: Head | None = None
    limit: int = 0
    among: Mapping[str, Sequence[str]] = field(default_factory=dict)


class BookkeepingTrainer(Trainer):
    """What both trainers add to transformers': checkpoints of the adapter alone, and a sum of all losses.

    The Trainer forgets the losses before a checkpoint, and drops those that are not finite; here the logged losses are the same
    whether or not training was interrupted. With an adapter, the Trainer would ask the Hub for the base model's vocabulary at
    every checkpoint.
    """

    loss_sum: Any = 0.0
    logged_step: int = 0
    logged_sum: float = 0.0

    @property
    def _precision(self) -> torch.dtype:
        return torch.float32 if self.args.device.type == "mps" else torch.float64  # Apple's GPUs have no float64

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
        """Writes none: nobody reads a checkpoint's."""

    def summed(self) -> float:
        """Returns the sum of the losses of all steps so far, averaged over the processes (collective)."""
        total = torch.as_tensor(self.loss_sum, dtype=self._precision, device=self.args.device)
        return float(self.accelerator.gather(total).mean())

    def losses(self) -> dict[str, Any]:
        """Returns what a resumed training must know of the losses before it (collective)."""
        return {"loss_sum": self.summed(), "logged_step": self.logged_step, "logged_sum": self.logged_sum}


class CompletionTrainer(BookkeepingTrainer, SFTTrainer):
    """TRL's, for causal LMs."""


class LabelTrainer(BookkeepingTrainer):
    """transformers' own, for classifiers with a frozen head: cross-entropy over the labels that a row may have."""

    loss_is_scaled_for_ga = False  # it is a mean over the rows of a batch

    def __init__(self, head: Head, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._head = head

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of one batch. Without `labels` among its inputs, the model gives features or logits."""
        labels, allowed = inputs.pop("labels"), inputs.pop("allowed")
        outputs = model(**inputs)
        scores = self._head.scores(outputs, inputs.get("attention_mask"))
        loss = torch.nn.functional.cross_entropy(scores.masked_fill(~allowed, -math.inf), labels)
        return (loss, outputs) if return_outputs else loss


def arguments(settings: Settings, saved: Path) -> SFTConfig:
    """The Trainer's arguments for one training, whose checkpoints go to `saved`."""
    args = copy.deepcopy(settings.args)
    args.report_to = []
    args.output_dir = str(saved)
    if is_sharded():
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
) -> BookkeepingTrainer:
    """Makes the Trainer that the settings ask for, over the base with an adapter on it or with its parameters free."""
    set_seed(args.seed)
    head = settings.head
    adapter = settings.expert.prepare(base, None if head is None else head.plan)
    common: dict[str, Any] = {
        "args": args,
        "train_dataset": rows,
        "processing_class": settings.processing,
        "callbacks": list(callbacks),
    }
    if head is None:
        return CompletionTrainer(model=base, peft_config=adapter, **common)
    collate = Collate(settings.processing, head, settings.among, settings.limit)
    model = base if adapter is None else get_peft_model(base, adapter)
    return LabelTrainer(head, model=model, data_collator=collate, **common)
