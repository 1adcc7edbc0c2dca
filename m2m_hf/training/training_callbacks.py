"""Trainer callbacks: what a run really used, and one progress bar for a whole bank."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from m2m_hf.console import Bar
from m2m_hf.storage.journal import MARK, describe_files, hidden, sync, write_json


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
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.record = {
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "tokens": int(state.num_input_tokens_seen),
            "seconds": self.seconds,
            "loss_curve": [[entry["step"], float(entry["loss"])] for entry in state.log_history if "loss" in entry],
            "peak_memory_bytes": peak,
        }


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole once everything in it is written, with what it takes to go on as if nothing had happened.

    At the last step there is none: going on from it, the Trainer would make one step too many.

    Args:
        of: fingerprint of what is trained; another training does not go on from its checkpoints.
        recorder: of the same training.
        losses: gives what is to be known of the losses of all steps so far; every process must call it.
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
            for old in (folder / MARK, hidden(folder / MARK)):  # of a checkpoint that was killed, or passed over, here
                old.unlink(missing_ok=True)
            sync(folder)
            known = {
                "of": self._of,
                "steps": state.global_step,
                "seconds": self._recorder.seconds,
                "losses": losses,
            }
            write_json(folder / MARK, known | {"files": describe_files(folder)})


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
