"""Trainer callbacks: what a run really used, and one progress bar for a whole bank."""

import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .console import Bar


class TrainingRecorder(TrainerCallback):
    """Records what a training run really used; `record` is what goes into `training.json`.

    `record` holds: `steps`, `epochs`, `tokens` (seen, padding excluded), `seconds`, `loss` (mean over the run),
    `loss_curve` ([step, loss] pairs), and `peak_memory_bytes` (allocated on the accelerator; on a CPU the highest resident
    size that the process has had).
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        self._start = 0.0

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
            "seconds": round(time.monotonic() - self._start, 3),
            "loss_curve": [[entry["step"], float(entry["loss"])] for entry in state.log_history if "loss" in entry],
            "peak_memory_bytes": peak,
        }


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
