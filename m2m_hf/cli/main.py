"""`m2m`: the command line. Libraries are imported inside the functions, so that `--help` answers at once.

Exit codes: 0 done, 2 bad input (one message, no traceback), 130 interrupted, 143 terminated, 1 anything else; of `m2m status`, 1
where something is damaged.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from m2m_hf.cli.exits import DamagedError, report_errors
from m2m_hf.cli.help import make_parser
from m2m_hf.cli.launch import find, relaunched, shown_recipes
from m2m_hf.console import LibraryLog, Terminal
from m2m_hf.errors import InputError

if TYPE_CHECKING:
    from m2m_hf.searcher import MergeToMixSearcher


def open_searcher(config: Path, overrides: Sequence[str], log: LibraryLog) -> "MergeToMixSearcher":
    """The searcher of a configuration; imports everything heavy."""
    from m2m_hf.config.parsing import parse
    from m2m_hf.searcher import MergeToMixSearcher

    log.silence_libraries()
    return MergeToMixSearcher(*parse(config, overrides))


def run(command: argparse.Namespace, overrides: Sequence[str], log: LibraryLog, arguments: Sequence[str]) -> None:
    """Carries out one command."""
    if command.command == "recipe":
        run_recipe(command.name, [*command.arguments, *overrides])
        return
    if getattr(command, "accelerate_config", None):
        replace_process(relaunched(arguments))
    if command.command in ("report", "status", "push", "export", "compare", "init"):
        if overrides:
            raise InputError(f"not understood: {' '.join(overrides)}; see m2m {command.command} --help")
        if command.command == "status":
            show_status(command.out)
        elif command.command == "init":
            write_configuration(command)
        elif command.command == "compare":
            show_comparison(command.out, command.other)
        elif command.command == "export":
            from m2m_hf.publish.export import export
            from m2m_hf.storage.run_folder import RunFolder

            log.silence_libraries()
            folder, lost = export(RunFolder(command.out), command.to, command.folder)
            if lost:
                Terminal().say(f"without a counterpart there: {', '.join(lost)}", "yellow")
            Terminal().say(f"exported: {os.path.relpath(folder)}")
        elif command.command == "push":
            from m2m_hf.publish.hub import push
            from m2m_hf.storage.run_folder import RunFolder

            log.silence_libraries()
            push(RunFolder(command.out), command.repo_id, Terminal(), command.private, command.dry_run)
        else:
            from m2m_hf.reporting.page import write_report

            Terminal().say(f"report: {os.path.relpath(write_report(command.out))}")
        return
    if command.command == "sft":
        from m2m_hf.storage.run_folder import read_config

        config = command.out / "config.yaml"
        if not config.exists():
            raise InputError(
                f"{command.out} is no run folder: it has no config.yaml; expected the output_dir of m2m select"
            )
        read_config(config)
        overrides = [*overrides, "--output_dir", str(command.out)]
    else:
        config = command.config
    searcher = open_searcher(config, overrides, log)
    searcher.check()
    if getattr(command, "dry_run", False):
        searcher.show_plan()
        return
    if command.command in ("select", "sft"):
        searcher.check_hub()
    searcher.prepare()
    if searcher.state.is_main_process:
        log.open(searcher.run.log)
    if command.command == "adapters":
        searcher.train_adapters()
        failed, word = searcher.failed, "experts" if searcher.config.expert == "full" else "adapters"
        searcher.terminal.say(
            f"{len(searcher.candidates) - len(failed)} {word} are complete: {os.path.relpath(searcher.run.adapters)}"
            + (f"; the training of {', '.join(failed)} failed" if failed else "")
        )
    elif command.command == "search":
        searcher.write_outcome()
        searcher.show()
    elif command.command == "fidelity":
        searcher.fidelity()
        searcher.write_outcome()
        searcher.show_fidelity()
    elif command.command == "sft":
        searcher.train_final()
        searcher.show()
        if searcher.args.push_to_hub:
            searcher.push_to_hub()
    else:
        searcher.select()


def run_recipe(name: str | None, arguments: Sequence[str]) -> None:
    """Carries out `m2m recipe`."""
    if name is None:
        for line in ("recipes; m2m recipe NAME runs a script, and prints a configuration:", *shown_recipes()):
            Terminal().say(line)
        return
    path = find("recipes", name, ".py", ".sh", ".yaml")
    if path.suffix == ".py":
        replace_process([sys.executable, str(path), *arguments])
    # Their paths are seen from the folder of recipes in a checkout; what is printed is for the one where it is put.
    print(path.read_text(encoding="utf-8").replace("../.demo", ".demo"), end="")


def replace_process(command: Sequence[str]) -> NoReturn:
    """Becomes another command, so that signals and the exit code are its own."""
    sys.stdout.flush()
    os.execv(command[0], list(command))


def show_status(out: Path) -> None:
    """Prints the status of a run folder.

    Raises:
        Damaged: something in it is not whole.
    """
    from m2m_hf.reporting.status import status
    from m2m_hf.storage.run_folder import RunFolder

    found = status(RunFolder(out))
    for line in found.lines:
        Terminal().say(line)
    if found.damage:
        raise DamagedError


def write_configuration(command: argparse.Namespace) -> None:
    """Carries out `m2m init`."""
    from m2m_hf.cli.init import init, parse_sources
    from m2m_hf.config.trainer_configs import Draft, parse_source, read_trainer_config

    def question(text: str, default: str) -> str:
        try:
            return input(f"{text} [{default}]: ").strip() or default
        except EOFError:
            raise InputError("no answer, and nothing was written") from None

    draft = read_trainer_config(command.origin) if command.origin else Draft()
    draft.model = command.model or draft.model
    draft.candidates |= parse_sources(command.data)
    draft.target = parse_source(command.target) if command.target else None
    draft.scorer = command.scorer
    asked = question if sys.stdin.isatty() else None
    init(draft, command.output, asked, command.origin.parent if command.origin else Path.cwd())
    Terminal().say(f"written: {command.output}; go on with: m2m select --config {command.output}")


def show_comparison(one: Path, other: Path) -> None:
    """Prints two runs side by side."""
    from m2m_hf.reporting.compare import MOST, compare
    from m2m_hf.reporting.record import Record
    from m2m_hf.storage.run_folder import RunFolder

    terminal = Terminal()
    names = [path.absolute().name for path in (one, other)]
    if names[0] == names[1]:
        names = [os.path.relpath(path) for path in (one, other)]
    found = compare(*(Record.read(RunFolder(path)) for path in (one, other)))
    if found.differences:
        shown = [[short(cell) for cell in row] for row in found.differences[:MOST]]
        terminal.table("asked differently", ["", *names], shown)
        if len(found.differences) > MOST:
            terminal.say(f"and {len(found.differences) - MOST} more fields: see both config.yaml")
        terminal.say("")
    terminal.table("what came of it", ["", *names], found.outcome)
    terminal.say("")
    for line in found.remarks:
        terminal.say(line)


def short(text: str, most: int = 48) -> str:
    """`text`, of which the middle is left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `m2m` and returns its exit code."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    command, overrides = parser.parse_known_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = LibraryLog()
    try:
        return report_errors(lambda: run(command, overrides, log, arguments))
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
