"""Exit codes: whatever ends a command becomes one message and one code."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from m2m_hf.console import Terminal
from m2m_hf.errors import InputError, StoppedError, first_line, printable, redact
from m2m_hf.storage.files import read_json_or_empty
from m2m_hf.storage.records import experts_noun
from m2m_hf.storage.run_folder import RunFolder, disk_is_full

PATIENCE = 5.0  # seconds a launcher takes to end the other processes once one has ended


class DamagedError(Exception):
    """Damage was found and reported; only the exit code is missing."""


class TerminatedError(BaseException):
    """SIGTERM: from a scheduler, or from the launcher because another process died."""


def terminate(signum: int, frame: object) -> NoReturn:
    raise TerminatedError


def what_is_safe() -> str:
    """What an interruption leaves, and how to go on."""
    folder = RunFolder.held
    kept = "finished work is safe"
    if folder is not None:
        records = [read_json_or_empty(path) for path in folder.adapters.glob("[!.]*/training.json")]
        trained = [one for one in records if one and "failed" not in one]
        noun = experts_noun(trained[0] if trained else {}, len(trained))
        trials = folder.trials.read_bytes().count(b"\n") if folder.trials.exists() else 0
        kept = f"{len(trained)} {noun} and {trials:,} scored trials are safe in {os.path.relpath(folder.root)}"
    return f"{kept}; the same command continues from there"


def lost_a_process(error: Exception) -> bool:
    """True for the errors by which gloo and NCCL say that another process is gone."""
    name = type(error).__name__
    return name in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def failed_alone() -> bool:
    """True if only this process met an error. If all did, the first one speaks and the launcher ends the others."""
    try:
        time.sleep(PATIENCE)
    except TerminatedError:
        return False
    return True


def report_errors(work: Callable[[], None]) -> int:
    """Does some work, reports whatever ends it, and returns the exit code."""
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        work()
    except BaseException as error:
        message, code = explain(error)
        if message:
            print(message, file=sys.stderr)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """(message, empty if another process or the terminal says it; exit code)."""
    rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    where = f"process {rank} of {processes}"
    match error:
        case DamagedError():
            return "", 1
        case KeyboardInterrupt():
            Terminal(quiet=rank != "0").say(f"\ninterrupted: {what_is_safe()}", "yellow")
            return "", 130
        case TerminatedError():
            reason = f"{where} was told to stop; if nobody asked for it, another process has died; see its error above"
            reason = "terminated" if processes == 1 else reason
            return f"m2m: {reason}: {what_is_safe()}", 128 + signal.SIGTERM
        case StoppedError():
            return printable(f"m2m: {error}\n{what_is_safe()}") if rank == "0" or failed_alone() else "", 1
        case Exception() if processes > 1 and lost_a_process(error):
            reason = first_line(error)
            return f"m2m: {where} lost another process, which died or is out of reach ({reason}): {what_is_safe()}", 1
        case Exception() if disk_is_full(error):
            return f"m2m: the disk is full: {what_is_safe()} once there is room", 1
        case InputError() if rank == "0":
            return printable(f"m2m: {error}"), 2
        case InputError():
            return printable(f"m2m: {where}: {error}") if failed_alone() else "", 2
        case Exception():
            return redact(traceback.format_exc()).rstrip("\n"), 1
    raise error
