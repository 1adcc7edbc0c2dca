"""Commands that train and score: select, adapters, search, fidelity, sft."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_hf.cli.launch import relaunched, replace_process
from m2m_hf.console import LibraryLog, Terminal
from m2m_hf.errors import InputError
from m2m_hf.run import unchanged

if TYPE_CHECKING:  # it imports torch
    from m2m_hf.searcher import MergeToMixSearcher


def run(command: argparse.Namespace, flags: Sequence[str], log: LibraryLog, arguments: Sequence[str]) -> None:
    """Carries out a command, in other processes if an accelerate configuration is named."""
    if command.accelerate_config:
        replace_process(relaunched(arguments))
    if command.command == "sft":
        config, flags = config_of(command.out), [*flags, "--output_dir", str(command.out)]
    else:
        config = command.config
    select = command.command == "select" and not command.dry_run
    if select and (known := unchanged.recall(config, flags)):
        root, closing = known
        Terminal().replay(closing)
        Terminal().say(f"nothing to do: {os.path.relpath(root)} is complete", "green")
        return
    fingerprint = unchanged.command_fingerprint(config, flags) if select else None

    from m2m_hf.config.parsing import parse
    from m2m_hf.searcher import MergeToMixSearcher

    log.silence_libraries()
    ours, args, model_args = parse(config, flags)
    inputs = unchanged.watch(ours, vars(args) | vars(model_args), Path(args.output_dir)) if fingerprint else None
    searcher = MergeToMixSearcher(ours, args, model_args)
    searcher.check()
    context = searcher.run
    if command.command == "select" and command.dry_run:
        from m2m_hf.run.estimate import show_estimate

        show_estimate(context)
        return
    if command.command in ("select", "sft") and context.args.push_to_hub:
        from m2m_hf.publish.hub import check_login

        check_login(context.args.hub_model_id)
    searcher.prepare()
    if context.is_main:
        log.open(context.folder.log)
    {"adapters": adapters, "search": search, "fidelity": fidelity, "sft": sft, "select": MergeToMixSearcher.select}[
        command.command
    ](searcher)
    if fingerprint and inputs is not None:
        unchanged.remember(context.folder, fingerprint, inputs, searcher.closing)


def config_of(out: Path) -> Path:
    """`OUT/config.yaml`, readable.

    Raises:
        InputError: it is missing or damaged.
    """
    from m2m_hf.storage.run_folder import read_config

    config = out / "config.yaml"
    if not config.exists():
        raise InputError(f"{out} is no run folder: it has no config.yaml; expected the output_dir of m2m select")
    read_config(config)
    return config


def adapters(searcher: "MergeToMixSearcher") -> None:
    searcher.train_adapters()
    context = searcher.run
    failed, noun = context.failed, context.expert().noun()
    context.terminal.say(
        f"{len(context.candidates) - len(failed)} {noun} are complete: {os.path.relpath(context.folder.adapters)}"
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
