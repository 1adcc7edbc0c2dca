"""What is told and kept of a training while it runs."""

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from m2m_hf.console import Bar


class TrainingRecorder(TrainerCallback):
    """Records what a training run really used; `record` is what goes into `training.json`.

    `record` holds: `steps`, `epochs`, `tokens` (seen, padding excluded), `seconds`, `loss_curve` ([step, loss] pairs), and
    `peak_memory_bytes` (allocated on the accelerator; on a CPU the highest resident size that the process has had).

    Args:
        before: seconds spent on the same training before it was interrupted.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.record: dict[str, Any] = {}
        self._before = before
        self._start = 0.0
        self.clock = time.monotonic  # another where a training shares its time with others

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return round(self._before + self.clock() - self._start, 3)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self.clock()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
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


class BankProgress(TrainerCallback):
    """Moves one bar through the optimizer steps of all trainings; `steps` counts them, by what identifies a training."""

    def __init__(self, bar: Bar, steps: dict[str, int], of: str, note: str) -> None:
        self._bar, self._steps, self._of, self._note = bar, steps, of, note

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._steps[self._of] = state.global_step
        self._bar.update(sum(self._steps.values()), self._note)
