"""`m2m`: the command line. Libraries are imported inside functions, so that light commands start at once.

Exit codes: 0 done, 2 bad input (one message, no traceback), 130 interrupted, 143 terminated, 1 anything else; `m2m status` ends
with 1 if it finds damage.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from m2m_hf.cli.exits import report_errors
from m2m_hf.cli.help import make_parser
from m2m_hf.console import LibraryLog
from m2m_hf.errors import InputError

RUN_COMMANDS = ("select", "adapters", "search", "fidelity", "sft")


def dispatch(command: argparse.Namespace, flags: Sequence[str], log: LibraryLog, arguments: Sequence[str]) -> None:
    """Carries out one command.

    Args:
        flags: `--field value`, overriding the configuration.
        arguments: the whole command line, for a launcher.
    """
    if command.command == "recipe":
        from m2m_hf.cli.launch import run_recipe

        run_recipe(command.name, [*command.arguments, *flags])
    elif command.command in RUN_COMMANDS:
        from m2m_hf.cli.commands import run

        run(command, flags, log, arguments)
    elif flags:
        raise InputError(f"unknown arguments: {' '.join(flags)}; see m2m {command.command} --help")
    else:
        from m2m_hf.cli.commands import COMMANDS

        COMMANDS[command.command](command, log)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `m2m` and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, flags = make_parser().parse_known_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = LibraryLog()
    try:
        return report_errors(lambda: dispatch(command, flags, log, arguments))
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
