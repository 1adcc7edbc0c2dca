"""Exit codes: whatever ends a command, told in one message."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from m2m_hf.console import Terminal
from m2m_hf.errors import InputError, StoppedError, printable, redact

PATIENCE = 5.0  # seconds in which a launcher ends the other processes, once one has ended


class DamagedError(Exception):
    """Said already; the exit code alone is left to give."""


def safe() -> str:
    """What an end before the end leaves, and how to go on."""
    from m2m_hf.storage.run_folder import RunFolder

    folder = RunFolder.held
    kept = "what is finished is safe"
    if folder is not None:
        adapters = len(list(folder.adapters.glob("[!.]*/training.json")))
        trials = len(folder.trials.read_bytes().splitlines()) if folder.trials.exists() else 0
        kept = f"{adapters} adapters and {trials:,} scored trials are safe in {os.path.relpath(folder.root)}"
    return f"{kept}; the same command goes on from there"


def full(error: BaseException) -> bool:
    """Whether the disk is, of which this error tells."""
    from m2m_hf.storage.run_folder import disk_is_full

    return disk_is_full(error)


class Terminated(BaseException):
    """SIGTERM: a scheduler ends the job, or the launcher does because another process of it died."""


def terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


def tells_of_a_lost_process(error: Exception) -> bool:
    """Whether this is how gloo or NCCL say that another process is gone."""
    name = type(error).__name__
    return name in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def alone() -> bool:
    """Whether this process alone has met an error: where all have, the first one says so, and the launcher ends the others."""
    try:
        time.sleep(PATIENCE)
    except Terminated:
        return False
    return True


def report_errors(work: Callable[[], None]) -> int:
    """Does some work, tells of whatever ends it, and returns the exit code for that."""
    rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    first = rank == "0"  # one process speaks, unless it may be the one that died
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        work()
    except InputError as error:
        if full(error):
            print(f"m2m: the disk is full: {safe()} once there is room", file=sys.stderr)
            return 1
        if first or alone():
            who = "" if first else f"process {rank} of {processes}: "
            print(printable(f"m2m: {who}{error}"), file=sys.stderr)
        return 2
    except StoppedError as error:
        print(printable(f"m2m: {error}\n{safe()}"), file=sys.stderr)
        return 1
    except DamagedError:
        return 1
    except KeyboardInterrupt:
        Terminal(quiet=not first).say(f"\ninterrupted: {safe()}", "yellow")
        return 130
    except Terminated:
        if processes == 1:
            print(f"m2m: terminated: {safe()}", file=sys.stderr)
        else:
            print(
                f"m2m: process {rank} of {processes} was told to stop; where nobody asked for it, another process has died, "
                f"and says why above: {safe()}",
                file=sys.stderr,
            )
        return 128 + signal.SIGTERM
    except Exception as error:
        if processes > 1 and tells_of_a_lost_process(error):
            print(
                f"m2m: process {rank} of {processes} lost another process, which died or is out of reach "
                f"({str(error).splitlines()[0]}): {safe()}",
                file=sys.stderr,
            )
        elif full(error):
            print(f"m2m: the disk is full: {safe()} once there is room", file=sys.stderr)
        else:
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
