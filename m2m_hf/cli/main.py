"""`m2m`: the command line. Libraries are imported inside functions, so that light commands start at once.

Exit codes: 0 done, 2 bad input (one message, no traceback), 130 interrupted, 143 terminated, 1 anything else; `m2m status` ends
with 1 if it finds damage.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from m2m_hf.cli.exits import report_errors
from m2m_hf.cli.help import CONFIGURED, make_parser
from m2m_hf.console import LibraryLog
from m2m_hf.errors import InputError


def carry_out(command: argparse.Namespace) -> None:
    if command.flags and not command.takes_flags:
        raise InputError(f"unknown arguments: {' '.join(command.flags)}; see m2m {command.command} --help")
    command.run(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `m2m` and returns its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] and words[0] in CONFIGURED and words[1:] and not words[1].startswith("-") and "--config" not in words:
        words.insert(1, "--config")  # m2m select run.yaml
    command, flags = make_parser().parse_known_args(words)
    command.words, command.flags, command.log = words, flags, LibraryLog()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return report_errors(lambda: carry_out(command))
    finally:
        command.log.close()


if __name__ == "__main__":
    sys.exit(main())
