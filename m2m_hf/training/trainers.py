"""The Trainers of TRL and transformers, with the bookkeeping that this package adds."""

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer
from trl.trainer.utils import add_fused_lm_head

from m2m_hf.errors import InputError
from m2m_hf.modeling.devices import is_sharded
from m2m_hf.modeling.heads import Head
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.storage.files import staging_path, sync, write_json
from m2m_hf.storage.records import COMPLETE, describe_files
from m2m_hf.training.experts import ExpertKind
from m2m_hf.training.flat import Flat
from m2m_hf.training.recording import TrainingRecorder

FIRST_ROWS = 16  # that tell whether a loss exploded
DECIMALS = 6  # of a loss: more would tell how often its sum was interrupted


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned: everything but the base model and the rows."""

    args: SFTConfig
    processing: Any  # the tokenizer, or the image processor
    expert: ExpertKind
    head: Head | None = None  # of a classifier
    limit: int = 0  # tokens that a classifier's text is cut to
    among: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # its datasets -> the labels that their rows may have


class Collate:
    """Makes a batch of a classifier's rows: the model's inputs, `labels` (places in the head) and `allowed` (rows, labels).

    Where the label space is closed, a row may have any label, whatever `among` says of its dataset.
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


class LoopModel:
    """A model as the Trainer's loop uses it at every step, which visits the parameters that are trained and no others."""

    def __init__(self, model: torch.nn.Module, trainer: "BookkeepingTrainer") -> None:
        self._model, self._trainer = model.train(), trainer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yields those that are trained."""
        return iter(self._trainer.trained)

    def train(self) -> None:
        """Puts all modules into training mode, unless the model is in it."""
        if not self._model.training:
            self._model.train()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self._trainer.trained:
            parameter.grad = None


class BookkeepingTrainer(Trainer):
    """What both trainers add to transformers': checkpoints that a training resumes from exactly, and a sum of all losses.

    The Trainer forgets the losses before a checkpoint, and drops those that are not finite; here the logged losses are the same
    whether or not training was interrupted. `of` identifies the training that a checkpoint belongs to; `resumed` is the
    `checkpoint_complete.json` to go on from, or empty.

    A step does nothing but train: losses and counts stay on the device until they are logged or saved, nothing visits parameters
    that are frozen, and nothing is counted twice.
    """

    optimizer: Any

    def __init__(
        self, of: str, resumed: Mapping[str, Any], callbacks: Sequence[TrainerCallback], **kwargs: Any
    ) -> None:
        self.recorder = TrainingRecorder(resumed.get("seconds", 0.0))
        super().__init__(callbacks=[self.recorder, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        self.loss_before: float | None = None  # on the first rows
        self.loss_after: float | None = None
        self.member: Any = None  # of a group that trains side by side
        self.flat: Flat | None = None  # its parameters as one tensor
        self.mates: dict[str, str] = {}  # what identifies all that the group was made of -> its folder's name
        self._of = of
        losses = resumed.get("losses", {})
        self._loss_sum: float = losses.get("loss_sum", 0.0)
        self._logged_step: int = losses.get("logged_step", 0)
        self._logged_sum: float = losses.get("logged_sum", 0.0)
        self._unread: list[torch.Tensor] = []  # losses
        self._uncounted: list[torch.Tensor] = []  # tokens

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Leaves a model without weights where it is; see `check_training`."""
        if not any(parameter.is_meta for parameter in model.parameters()):
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model, batches = super()._prepare_for_training(*args, **kwargs)
        return (model if is_sharded() else LoopModel(model, self)), batches

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What its optimizer steps."""
        return [self.flat.whole] if self.flat is not None and self.flat.is_whole else self._parameters

    @cached_property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().create_optimizer(*args, **kwargs)
        if self.flat is not None:
            self.flat.join(self.optimizer)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.flat is None or not self.flat.is_whole or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        return self.flat.clip(self.args.max_grad_norm)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Takes accelerate's wrapper off the optimizer, which looks for LOMO in all folders of the path at every step."""
        needed = is_sharded() or self.accelerator.scaler is not None or self.accelerator.has_lomo_optimizer
        if isinstance(self.optimizer, AcceleratedOptimizer) and not needed:
            self.optimizer = self.optimizer.optimizer
        return super().create_scheduler(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        step = super().training_step
        loss: torch.Tensor = (
            step(model, inputs, *args)
            if self.member is None
            else self.member.compute(lambda shared, batch: step(shared, batch, *args), model, inputs)
        )
        self._unread.append(loss)
        return loss

    def uncount(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Takes the last batch out of what trackers are told, as it is computed again."""

    def _track_num_input_tokens(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Counts as the Trainer does, and leaves the count on the device."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = inputs["input_ids"] != self.processing_class.pad_token_id
        self._uncounted.append(mask.sum())

    def floating_point_ops(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """Estimates as the Trainer does, and counts the parameters once."""
        main = inputs.get(self._counted[0])
        return 0 if main is None else 6 * main.numel() * self._counted[1]

    @cached_property
    def _counted(self) -> tuple[str, int]:
        """(name of the model's main input, number of its parameters without embeddings)."""
        model: Any = self.model
        return model.main_input_name, model.num_parameters(exclude_embeddings=True)

    def read_steps(self) -> None:
        """Reads what the steps since the last time have left on the device (collective)."""
        if self._unread:
            for loss in torch.stack(self._unread).tolist():
                self._loss_sum += loss
        if self._uncounted:
            self.state.num_input_tokens_seen += int(self.accelerator.gather(torch.stack(self._uncounted).sum()).sum())
        self._unread, self._uncounted = [], []

    def summed(self) -> float:
        """Returns the sum of the losses of all steps so far, averaged over the processes (collective)."""
        self.read_steps()
        if PartialState().num_processes == 1:
            return self._loss_sum
        total = torch.tensor(self._loss_sum, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.gather(total).mean())

    def loss_on_first_rows(self) -> float:
        """Returns the mean loss on the dataset's first rows, without dropout: the same rows before and after training."""
        rows = [self.train_dataset[number] for number in range(min(len(self.train_dataset), FIRST_ROWS))]
        size, was_training, losses = self.args.per_device_train_batch_size, self.model.training, []
        model = self.model if self.member is None else self.member.shared(self.model)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                inputs = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                losses.append(float(self.compute_loss(model, inputs)))
        self.model.train(was_training)
        return sum(losses) / len(losses)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.read_steps()
        if "loss" in logs:
            step, total = self.state.global_step, self.summed()
            mean = (total - self._logged_sum) / max(1, step - self._logged_step)
            logs = logs | {"loss": round(mean, DECIMALS)}
            self._logged_step, self._logged_sum = step, total
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint, and marks it as complete when everything in it is written."""
        step = self.state.global_step
        if step >= self.state.max_steps:
            return  # the Trainer would resume from it with one step too many
        self.read_steps()
        super()._save_checkpoint(model, trial)
        losses = {"loss_sum": self.summed(), "logged_step": self._logged_step, "logged_sum": self._logged_sum}
        PartialState().wait_for_everyone()  # every process writes the state of its random numbers
        if PartialState().is_main_process:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            for old in (folder / COMPLETE, staging_path(folder / COMPLETE)):  # of a checkpoint that was killed here
                old.unlink(missing_ok=True)
            sync(folder)
            known = {"of": self._of, "steps": step, "seconds": self.recorder.seconds, "losses": losses}
            known["mates"] = self.mates
            write_json(folder / COMPLETE, known | {"files": describe_files(folder)})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the adapter alone: the Trainer would ask the Hub for the base model's vocabulary at every checkpoint."""
        if self.args.should_save and isinstance(self.model, PeftModel):
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        elif self.args.should_save:
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: nobody reads a checkpoint's."""


class CompletionTrainer(BookkeepingTrainer, SFTTrainer):
    """TRL's, for causal LMs.

    Beside the loss, TRL computes entropy and accuracy of all tokens and reads them from the device at every step. Here they are
    computed if `shown` to a tracker, and read when they are.
    """

    def __init__(self, shown: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shown = shown
        self._plain = not (
            self.args.loss_type != "nll"
            or self.label_smoother
            or self.aux_loss_enabled
            or self.accelerator.parallelism_config
        )
        self._measured: list[torch.Tensor] = []
        if self._plain and not shown:
            model: Any = self.model
            add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes TRL's loss of one batch; losses other than the usual one are left to TRL."""
        if not self._plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs | {"use_cache": False}, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (-outputs.log_probs).sum() / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self._shown and self.model.training:
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].size(1)
            sums = outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()
            self._measured.append(
                torch.stack([torch.as_tensor(one, device=loss.device).float() for one in (*sums, seen)])
            )
        return (loss, outputs) if return_outputs else loss

    def uncount(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self._plain:
            del self._measured[-1:]
            return
        for name in ("entropy", "mean_token_accuracy"):
            self._metrics["train"][name].pop()
        self._total_train_tokens -= int(inputs["attention_mask"].sum())

    def read_steps(self) -> None:
        super().read_steps()
        if not self._measured:
            return
        sums = self.accelerator.gather(torch.stack(self._measured)[None]).sum(0)
        means, metrics = (sums[:, 1:3] / sums[:, :1].clamp(min=1)).T.tolist(), self._metrics["train"]
        metrics["entropy"] += means[0]
        metrics["mean_token_accuracy"] += means[1]
        self._total_train_tokens += sum(map(int, sums[:, 3].tolist()))
        metrics["num_tokens"] = [self._total_train_tokens]
        self._measured = []


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


def make_trainer(
    base: PreTrainedModel, rows: Dataset, settings: Settings, saved: Path, **bookkeeping: Any
) -> BookkeepingTrainer:
    """Makes the Trainer that the settings ask for, over the base with an adapter on it or with its parameters free."""
    args = arguments(settings, saved)
    set_seed(args.seed)
    head = settings.head
    adapter = settings.expert.prepare(base, None if head is None else head.plan)
    common = {"args": args, "train_dataset": rows, "processing_class": settings.processing, **bookkeeping}
    if head is None:
        with seeded_as_loaded(base):
            return CompletionTrainer(bool(settings.args.report_to), model=base, peft_config=adapter, **common)
    collate = Collate(settings.processing, head, settings.among, settings.limit)
    model = base if adapter is None else get_peft_model(base, adapter)
    return LabelTrainer(head, model=model, data_collator=collate, **common)


def check_training(
    model: PreTrainedModel, rows: Dataset, settings: Settings, where: str, every_row: bool = True
) -> None:
    """Makes the Trainer of a training on a model without weights, and refuses what it refuses or would not get to see.

    `where` says in messages what is trained on; without `every_row`, `rows` are only the first few of it.
    """
    args = settings.args
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise InputError(f"{where}: use_liger_kernel needs Liger. Type: pip install liger-kernel")
    try:
        with tempfile.TemporaryDirectory(prefix="m2m-check-") as folder:  # the Trainer makes its output_dir
            trainer = make_trainer(model, rows, settings, Path(folder), of="", resumed={}, callbacks=[])
            left = len(trainer.train_dataset)
            batches = len(trainer.get_train_dataloader()) if left else 0
    except InputError:
        raise
    except Exception as error:  # TRL, PEFT and transformers raise many kinds
        raise InputError(f"{where} cannot be trained with these settings: {error or type(error).__name__}") from error
    if every_row and not left:
        raise InputError(f"{where}: no completion fits into max_length {args.max_length}; raise it")
    if every_row and not batches:
        raise InputError(
            f"{where}: its {left} rows fill no batch of {args.per_device_train_batch_size}, and dataloader_drop_last leaves out "
            "what fills none; set dataloader_drop_last: false, or lower per_device_train_batch_size"
        )


@contextmanager
def seeded_as_loaded(base: PreTrainedModel) -> Iterator[None]:
    """While active, TRL seeds as if it loaded the base model itself: `trl sft` makes the adapter after it has."""
    drawn = getattr(base, "drawn", None)

    def seed(number: int) -> None:
        set_seed(number)
        if drawn is not None and drawn.seed == number:
            drawn.restore()

    sft_trainer.set_seed = seed
    try:
        yield
    finally:
        sft_trainer.set_seed = set_seed


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
    args.logging_nan_inf_filter = False  # it would read the loss at every step; ours are summed apart
    args.accelerator_config.non_blocking = args.dataloader_pin_memory
    args.include_num_input_tokens_seen = "non_padding"
    if settings.head is not None:
        args.remove_unused_columns = False  # the collator reads them
        if settings.head.plan.task == "image_classification":
            args.include_num_input_tokens_seen = "no"
    return args
