"""The trackers that `report_to` names: every training, the search and the scores are runs of one group."""

import contextlib
import copy
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)
from trl import SFTConfig

from m2m_hf.console import Terminal
from m2m_hf.core.trial import Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.result import SearchResult, score_of
from m2m_hf.storage.files import fingerprint

MAX_NAME = 80  # characters of a run's name, which is also TensorBoard's folder


def make_trackers(args: SFTConfig) -> list[Any]:
    """Makes the callback of every tracker that `report_to` names.

    Raises:
        InputError: one is unknown, or not installed.
    """
    try:
        with captured_output():
            return [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"report_to: {error}") from error


def tracker_group(args: SFTConfig) -> str:
    """Returns the name of the group: `run_name`, or the run folder's name with a few digits of its path's fingerprint."""
    out = Path(args.output_dir).absolute()
    return args.run_name or f"{out.name}-{fingerprint(str(out))[:4]}"


class CapturedOutput(io.StringIO):
    """Captures standard output. Progress bars still show: rich draws them on `rich_proxied_file`."""

    def __init__(self) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)


@contextlib.contextmanager
def captured_output() -> Iterator[None]:
    """Logs what is printed inside, as libraries log."""
    output = CapturedOutput()
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        for line in filter(None, output.getvalue().split("\n")):
            logging.getLogger(__name__).info(line)


class Tracker(TrainerCallback):
    """One run in the trackers that `report_to` names. It is a callback of a training; `log` takes any other numbers.

    All runs of a run folder are one group. A run is called `<group>/<run>`; Weights & Biases and trackio also know the group.
    TensorBoard's files are in `OUT/tensorboard/<run>`, or in `<group>/<run>` below TENSORBOARD_LOGGING_DIR. A run that was
    interrupted is resumed if the tracker can do so.

    Args:
        args: the Trainer's; their `output_dir` is the run folder.
        run: the name in the group, such as `adapters/gsm8k`.
        of: fingerprint of what is tracked: another training of the same name is another run.
        enabled: False on processes other than the main one.
    """

    def __init__(self, args: SFTConfig, run: str, of: str = "", enabled: bool = True) -> None:
        out, run = Path(args.output_dir).absolute(), run[:MAX_NAME]
        boards = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self._group = tracker_group(args)
        self._board = Path(boards).expanduser() / self._group / run if boards else out / "tensorboard" / run
        self._id = fingerprint([str(out), run, of])
        self._args = copy.deepcopy(args)
        self._args.run_name = f"{self._group}/{run}"
        if self._args.trackio_static_space_id is None:
            self._args.trackio_static_space_id = False  # None would make a Space of every run that ends
        self._trackers = make_trackers(args) if enabled else []
        self._begun = False

    def _each(self, tell: Callable[[Any], None]) -> None:
        """Tells every tracker. One that fails is dropped, and the run goes on."""
        for tracker in list(self._trackers):
            try:
                with captured_output():
                    tell(tracker)
            except Exception as error:  # whatever a tracker, or the network behind it, raises
                self._trackers.remove(tracker)
                name = type(tracker).__name__.removesuffix("Callback")
                Terminal().say(
                    f"report_to: {name} failed, and is told nothing more of {self._args.run_name}: {error}", "yellow"
                )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun = True

        def begin(tracker: Any) -> None:
            if isinstance(tracker, TensorBoardCallback):
                tracker.logging_dir = str(self._board)
            if isinstance(tracker, WandbCallback):  # it would log to a run that is open
                if tracker._wandb.run is not None:
                    raise RuntimeError("another W&B run is active in this process; it is left as it is")
                tracker._wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "huggingface"),
                    name=self._args.run_name,
                    group=self._group,
                    id=self._id,
                    resume="allow",
                    settings={"silent": True, "console": "off"},
                )
            tracker.on_train_begin(self._args, state, control, **kwargs)
            if isinstance(tracker, TrackioCallback):  # it has no argument for the group
                tracker._trackio.config["_Group"] = self._group

        self._each(begin)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._each(lambda tracker: tracker.on_log(self._args, state, control, logs=dict(logs), **kwargs))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun = False

        def end(tracker: Any) -> None:
            tracker.on_train_end(self._args, state, control, **kwargs)
            if isinstance(tracker, WandbCallback):
                tracker._wandb.finish()  # or the next run would continue this one

        self._each(end)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        if self._begun:
            self.on_train_end(self._args, TrainerState(), TrainerControl())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step; the prefixes `eval_` and `test_` put a name under that heading."""
        state, control = TrainerState(global_step=step), TrainerControl()
        if not self._begun:
            self.on_train_begin(self._args, state, control, model=None)
        self.on_log(self._args, state, control, values)


class SearchTracker(SearchCallback):
    """Tells the trackers of a search: the score of every mixture and the best so far, from the first mixture on.

    It tells nothing of a search that the journal answers, since the trackers know that one. Unless `live`, it tells all at the
    end: a search that fine-tunes has other runs before, and some trackers have one at a time.
    """

    def __init__(self, tracker: Tracker, live: bool = True) -> None:
        self._tracker, self._live = tracker, live
        self._measured = False
        self._steps = 0
        self._untold: list[dict[str, float]] = []

    def on_trial(self, trial: Trial, recalled: bool, control: SearchControl) -> None:
        self._measured |= not recalled

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        if standing.score is not None and best is not None:
            self._untold.append({"eval_score": standing.score.value, "eval_best_score": score_of(best).value})
        if self._live:
            self._tell()

    def on_search_end(self, result: SearchResult, control: SearchControl) -> None:
        self._tell()

    def _tell(self) -> None:
        if not self._measured:
            return
        for values in self._untold:
            self._steps += 1
            self._tracker.log(self._steps, values)
        self._untold.clear()
