"""What the user sees: a few lines of our own. What libraries have to say goes to the run's log file."""

import logging
import logging.handlers
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from m2m_hf.errors import printable, redact

PLAIN_SECONDS = 20.0  # at least, between two lines of progress where no bar can be drawn


def duration(seconds: float) -> str:
    """`4 s`, `2 min 05 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Terminal:
    """Our lines on standard output; silent on all processes but the main one."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 120)

    def say(self, text: str, style: str | None = None) -> None:
        """One line; `text` is shown as it is, whatever is in it, see `printable`."""
        self.console.print(Text(printable(text), style=style or ""))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and the others are figures; short rows are filled up."""
        self.say(title, "bold")
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table, soft_wrap=False)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A progress bar with the time left, or now and then a plain line where there is no terminal."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(title, total=total, completed=done, note="")
                yield Bar(self, title, total, done, progress, task)
        else:
            yield Bar(self, title, total, done)


class Bar:
    """What `Terminal.progress` gives: tell it how far the work is."""

    def __init__(
        self, terminal: Terminal, title: str, total: int, done: int, progress: Progress | None = None, task: Any = None
    ) -> None:
        self._terminal, self._title, self._total = terminal, title, total
        self._progress, self._task = progress, task
        self._first = self._done = done
        self._start = self._said = time.monotonic()

    def advance(self) -> None:
        """One more."""
        self.update(self._done + 1)

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total, with a short note behind the bar."""
        self._done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._said >= max(PLAIN_SECONDS, (now - self._start) / 10) and done > self._first:
            self._said = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            self._terminal.say(f"  {self._title}: {done}/{self._total}, {duration(left)} left  {note}".rstrip())


class Redacted(logging.Formatter):
    """Without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LibraryLog:
    """Sends what libraries log and warn to a file instead of the terminal.

    Made before the libraries are imported; keeps what they say in memory until `open` names the file.
    """

    def __init__(self) -> None:
        self._memory = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._handler: logging.Handler = self._memory
        logging.getLogger().addHandler(self._memory)
        logging.captureWarnings(True)

    def silence_libraries(self) -> None:
        """Takes away the handlers and progress bars that the libraries bring themselves."""
        import datasets
        import huggingface_hub
        import transformers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        for library in (transformers.utils.logging, datasets.utils.logging, huggingface_hub.utils.logging):
            library.enable_propagation()
        for name in (
            "transformers",
            "datasets",
            "huggingface_hub",
            "evaluate",
            "accelerate",
            "trl",
            "peft",
            "filelock",
        ):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
        # It warns of the same harmless cast in every layer of every forward pass.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()

    def open(self, path: Path) -> None:
        """From now on everything goes to the end of `path`."""
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._memory.setTarget(handler)
        self._memory.flush()
        self.close()
        self._handler = handler
        logging.captureWarnings(True)
        logging.getLogger().addHandler(handler)

    def close(self) -> None:
        """Leaves logging as it was."""
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
