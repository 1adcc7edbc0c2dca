"""Commands that write a configuration or read a run folder: init, status, report, compare, export, push."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from m2m_hf.cli.exits import DamagedError
from m2m_hf.console import LibraryLog, Terminal
from m2m_hf.errors import InputError
from m2m_hf.storage.run_folder import RunFolder


def init(command: argparse.Namespace, log: LibraryLog) -> None:
    from m2m_hf.cli.init import Draft, init, parse_source, parse_sources, read_trainer_config

    def ask(text: str, default: str) -> str:
        try:
            return input(f"{text} [{default}]: ").strip() or default
        except EOFError:
            raise InputError("no answer, so nothing was written") from None

    draft = read_trainer_config(command.origin) if command.origin else Draft()
    draft.model = command.model or draft.model
    draft.candidates |= parse_sources(command.data)
    draft.target = parse_source(command.target) if command.target else None
    draft.scorer = command.scorer
    folder = command.origin.parent if command.origin else Path.cwd()
    init(draft, command.output, ask if sys.stdin.isatty() else None, folder)
    Terminal().say(f"written: {command.output}; go on with: m2m select --config {command.output}")


def show_status(command: argparse.Namespace, log: LibraryLog) -> None:
    """Raises DamagedError, once everything is said, if the folder is damaged."""
    from m2m_hf.reporting.status import status

    report = status(RunFolder(command.out), full=command.full)
    terminal = Terminal()
    for line in report.lines:
        terminal.say(line)
    if report.damage:
        raise DamagedError


def make_report(command: argparse.Namespace, log: LibraryLog) -> None:
    from m2m_hf.reporting.page import write_report

    Terminal().say(f"report: {os.path.relpath(write_report(command.out))}")


def show_comparison(command: argparse.Namespace, log: LibraryLog) -> None:
    from m2m_hf.reporting.compare import MOST, compare
    from m2m_hf.reporting.finished_run import FinishedRun

    terminal, folders = Terminal(), (command.out, command.other)
    names = [path.absolute().name for path in folders]
    if names[0] == names[1]:
        names = [os.path.relpath(path) for path in folders]
    found = compare(*(FinishedRun.from_pretrained(str(path)) for path in folders))
    if found.differences:
        rows = [[shorten(cell) for cell in row] for row in found.differences[:MOST]]
        terminal.table("different settings", ["", *names], rows)
        if len(found.differences) > MOST:
            terminal.say(f"and {len(found.differences) - MOST} more fields: see both config.yaml")
        terminal.say("")
    terminal.table("results", ["", *names], found.outcome)
    terminal.say("")
    for line in found.remarks:
        terminal.say(line)


def shorten(text: str, most: int = 48) -> str:
    """`text`, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def export_mixture(command: argparse.Namespace, log: LibraryLog) -> None:
    from m2m_hf.publish.export import TRAINERS, export

    if command.to in TRAINERS:  # which import libraries
        log.silence_libraries()
    folder, lost = export(RunFolder(command.out), command.to, command.folder)
    if lost:
        Terminal().say(f"no counterpart in {command.to}: {', '.join(lost)}", "yellow")
    Terminal().say(f"exported: {os.path.relpath(folder)}")


def push_to_hub(command: argparse.Namespace, log: LibraryLog) -> None:
    from m2m_hf.publish.hub import push

    log.silence_libraries()
    push(RunFolder(command.out), command.repo_id, Terminal(), command.private, command.dry_run)


COMMANDS: dict[str, Callable[[argparse.Namespace, LibraryLog], None]] = {
    "init": init,
    "status": show_status,
    "report": make_report,
    "compare": show_comparison,
    "export": export_mixture,
    "push": push_to_hub,
}
