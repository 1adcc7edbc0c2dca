"""Terminal output: a few lines of our own. What libraries print goes to the run's log file."""

import logging
import logging.handlers
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_hf.errors import printable, redact

if TYPE_CHECKING:  # rich is slow to import, and many commands end before they print
    from rich.console import Console
    from rich.progress import Progress

PLAIN_SECONDS = 20.0  # at least, between two lines of progress without a bar


def duration(seconds: float) -> str:
    """`4 s`, `2 min 05 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Terminal:
    """Prints to standard output; with `quiet`, as on all processes but the main one, prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._kept: list[dict[str, Any]] = []

    @cached_property
    def console(self) -> "Console":
        from rich.console import Console

        console = Console(quiet=self._quiet, highlight=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = max(console.width, 120)
        return console

    def say(self, text: str, style: str | None = None) -> None:
        """Prints one line literally; see `printable`."""
        from rich.text import Text

        text = printable(text)
        self._kept.append({"text": text, "style": style})
        self.console.print(Text(text, style=style or ""))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
        """Prints a table: the first columns are texts, the others are numbers. Short rows are filled up."""
        from rich.table import Table
        from rich.text import Text

        rows = [[printable(cell) for cell in row] for row in rows]
        self._kept.append({"title": title, "columns": list(columns), "rows": rows, "texts": texts})
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, column in enumerate(columns):
            table.add_column(
                column, justify="left" if number < texts else "right", overflow="fold", no_wrap=number >= texts
            )
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(Text(printable(title), style="bold"))
        self.console.print(table, soft_wrap=False)

    @contextmanager
    def keep(self) -> Iterator[list[dict[str, Any]]]:
        """Collects what is printed meanwhile, for `replay`."""
        self._kept = []
        yield self._kept
        self._kept = []

    def replay(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Prints again what `keep` collected."""
        for arguments in kept:
            (self.table if "columns" in arguments else self.say)(**arguments)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A progress bar with the time left; without a terminal, a plain line now and then."""
        if self._quiet or not self.console.is_terminal:
            yield Bar(self, title, total, done)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

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
            progress.add_task(title, total=total, completed=done, note="")
            yield Bar(self, title, total, done, progress)


@dataclass
class Bar:
    """Shows how far the work is; made by `Terminal.progress`."""

    terminal: Terminal
    title: str
    total: int
    done: int
    progress: "Progress | None" = None

    def __post_init__(self) -> None:
        self._first = self.done
        self._start = self._said = time.monotonic()

    def advance(self) -> None:
        """Moves on by one."""
        self.update(self.done + 1)

    def update(self, done: int, note: str = "") -> None:
        """Moves to `done` of the total, with a short note behind the bar."""
        self.done = done = min(done, self.total)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._said >= max(PLAIN_SECONDS, (now - self._start) / 10) and done > self._first:
            self._said = now
            left = (now - self._start) / (done - self._first) * (self.total - done)
            self.terminal.say(f"  {self.title}: {done}/{self.total}, {duration(left)} left  {note}".rstrip())


class Redacted(logging.Formatter):
    """Removes secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LibraryLog:
    """Sends the libraries' log lines and warnings to a file instead of the terminal.

    Make it before the libraries are imported; it keeps their lines in memory until `open` names the file.
    """

    def __init__(self) -> None:
        self._memory = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        logging.getLogger().addHandler(self._memory)
        logging.captureWarnings(True)

    def silence_libraries(self) -> None:
        """Removes the handlers and progress bars of the libraries."""
        import datasets
        import huggingface_hub
        import transformers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        for library in (transformers.utils.logging, datasets.utils.logging, huggingface_hub.utils.logging):
            library.enable_propagation()
        for name in "transformers datasets huggingface_hub evaluate accelerate trl peft filelock".split():
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
        # It warns of the same harmless cast in every layer of every forward pass.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()

    def open(self, path: Path) -> None:
        """Appends everything to `path`, from the beginning on."""
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._memory.setTarget(handler)
        self._memory.flushLevel = logging.NOTSET
        self._memory.flush()

    def close(self) -> None:
        """Restores logging."""
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._memory)
        file = self._memory.target
        self._memory.close()
        if file is not None:
            file.close()
