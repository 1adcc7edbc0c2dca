"""What each command does: those that train and score, and those that read a run folder."""

import gc
import os
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_hf.cli import unchanged
from m2m_hf.cli.exits import DamagedError
from m2m_hf.cli.launch import relaunched, replace_process
from m2m_hf.config import presets
from m2m_hf.console import Terminal
from m2m_hf.errors import InputError
from m2m_hf.storage.run_folder import RunFolder, read_config

if TYPE_CHECKING:  # it imports torch
    from m2m_hf.searcher import MergeToMixSearcher


def work(step: Callable[["MergeToMixSearcher"], None], command: Namespace) -> None:
    """Carries out a step of the method, in other processes if an accelerate configuration is named."""
    if command.accelerate_config:
        replace_process(relaunched(command.words))
    if command.command == "sft":
        config, flags = config_of(command.out), [*command.flags, "--output_dir", str(command.out)]
    else:
        config, flags = command.config, command.flags
    dry_run = step is select and command.dry_run
    whole = step is select and not dry_run
    if whole and (known := unchanged.recall(config, flags)):
        root, closing = known
        Terminal().replay(closing)
        Terminal().say(f"nothing to do: {os.path.relpath(root)} is complete", "green")
        return
    fingerprint = unchanged.command_fingerprint(config, flags) if whole else None

    from m2m_hf.config.parsing import parse
    from m2m_hf.searcher import MergeToMixSearcher

    pass_over_libraries()
    command.log.silence_libraries()
    ours, args, model_args = parse(config, flags)
    inputs = unchanged.watch(ours, vars(args) | vars(model_args), Path(args.output_dir)) if fingerprint else None
    searcher = MergeToMixSearcher(ours, args, model_args)
    searcher.check()
    context = searcher.run
    if dry_run:
        from m2m_hf.run.estimate import show_estimate

        show_estimate(context)
        return
    searcher.prepare(pushes=step in (select, sft))
    if context.is_main:
        command.log.open(context.folder.log)
    step(searcher)
    if fingerprint and inputs is not None and context.is_main:
        unchanged.remember(context.folder, fingerprint, inputs, searcher.closing)


@cache
def pass_over_libraries() -> None:
    """Keeps garbage collections from looking at all that was imported: every training begins with one."""
    gc.freeze()


def config_of(out: Path) -> Path:
    """`OUT/config.yaml`, readable."""
    config = out / "config.yaml"
    if not config.exists():
        raise InputError(f"{out} is no run folder: it has no config.yaml; expected the output_dir of m2m select")
    read_config(config)
    return config


def select(searcher: "MergeToMixSearcher") -> None:
    searcher.select()


def adapters(searcher: "MergeToMixSearcher") -> None:
    searcher.train_adapters()
    context = searcher.run
    failed = context.failed
    trained = len(context.candidates) - len(failed)
    context.terminal.say(
        f"{trained} {context.bank.noun(trained)} complete: {os.path.relpath(context.folder.adapters)}"
        + (f"; the training of {', '.join(failed)} failed" if failed else "")
    )


def search(searcher: "MergeToMixSearcher") -> None:
    searcher.write_outcome()
    searcher.show()


def fidelity(searcher: "MergeToMixSearcher") -> None:
    from m2m_hf.analysis.study_report import StudyReport
    from m2m_hf.core.jsonable import from_json
    from m2m_hf.reporting.page import write_report
    from m2m_hf.reporting.tables import baselines_table, fidelity_remarks, fidelity_tables

    found, context = from_json(StudyReport, searcher.fidelity()), searcher.run
    for table in (*fidelity_tables(found), baselines_table(found.baselines)):
        context.terminal.table(*table)
        context.terminal.say("")
    for line in fidelity_remarks(found):
        context.terminal.say(line)
    if context.is_main:
        context.terminal.say(f"report: {os.path.relpath(write_report(context.folder.root))}")


def sft(searcher: "MergeToMixSearcher") -> None:
    searcher.train_final()
    searcher.show()
    if searcher.run.args.push_to_hub:
        searcher.push_to_hub()


def show_targets(command: Namespace) -> None:
    """The table of all presets, or the YAML of one."""
    terminal = Terminal()
    if command.name:
        for line in presets.text_of(command.name, "m2m targets").rstrip("\n").split("\n"):
            terminal.say(line)
        return
    rows = []
    for name in presets.names():
        made = presets.preset(name)
        chosen, sealed = (
            f"{'all' if part.get('max_examples') is None else part['max_examples']} of {part['split']}"
            for part in (made["data"], made["test_data"])
        )
        scored = f"{made['scorer']}: {made['metric']}"
        rows.append([name, made["description"], scored, str(made.get("num_fewshot", 0)), chosen, sealed])
    columns = ("name", "what it measures", "scorer: metric", "shots", "chooses on", "sealed")
    terminal.table("benchmarks by name, such as targets: {gsm8k: {benchmark: gsm8k}}", columns, rows, texts=3)


def show_status(command: Namespace) -> None:
    """Raises DamagedError, once everything is said, if the folder is damaged."""
    from m2m_hf.reporting.status import status

    report = status(RunFolder(command.out), full=command.full)
    terminal = Terminal()
    for line in report.lines:
        terminal.say(line)
    if report.damage:
        raise DamagedError


def make_report(command: Namespace) -> None:
    from m2m_hf.reporting.page import write_report

    Terminal().say(f"report: {os.path.relpath(write_report(command.out))}")


def show_comparison(command: Namespace) -> None:
    from m2m_hf.reporting.compare import compare

    compare(command.out, command.other, Terminal())


def export_mixture(command: Namespace) -> None:
    from m2m_hf.publish.export import export

    if command.to in ("axolotl", "llamafactory"):  # which import libraries
        command.log.silence_libraries()
    folder, lost = export(RunFolder(command.out), command.to, command.folder)
    if lost:
        Terminal().say(f"no counterpart in {command.to}: {', '.join(lost)}", "yellow")
    Terminal().say(f"exported: {os.path.relpath(folder)}")


def push_to_hub(command: Namespace) -> None:
    from m2m_hf.publish.hub import push

    command.log.silence_libraries()
    push(RunFolder(command.out), command.repo_id, Terminal(), command.private, command.dry_run)
