"""Python processes that are forks of one that has everything imported: importing takes longer than most commands.

`python tests/forks.py` reads lines of JSON, each of which says what to run, runs it in a fork of itself, and answers each with
the exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

IMPORTS = (  # nothing of our own: that is imported by whoever needs it
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "matplotlib.pyplot",
    "peft",
    "pytest",
    "rich.progress",
    "scipy.stats",
    "sklearn.linear_model",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "trl.scripts.sft",
    "trl.trainer.sft_trainer",
)


class Forks:
    """Runs Python with the modules of `IMPORTS` imported already, under environment variables that are set before that.

    Every command is a process of its own: nothing that one does to a module, a signal or a variable is seen by the next.

    Args:
        environment: on top of this process's own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        # What libraries say when they are imported, and why it ended, should it end.
        self.told = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.told,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.told.close()

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        """What `python ARGUMENTS` does: a script, `-m` and a module or `-c` and code, and what they are given."""
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory(prefix="m2m-forks-") as folder:
            spoken = [Path(folder) / name for name in ("stdout", "stderr")]
            given = {
                "arguments": command,
                "environment": environment,
                "folder": os.getcwd(),
                "spoken": list(map(str, spoken)),
            }
            self.process.stdin.write(json.dumps(given) + "\n")
            self.process.stdin.flush()
            code = self.process.stdout.readline()
            if not code:
                self.told.seek(0)
                raise RuntimeError(f"the process that forks has ended: {self.told.read()}")
            return subprocess.CompletedProcess(
                command, int(code), *(path.read_text(errors="replace") for path in spoken)
            )


def serve() -> dict | None:
    """Answers until there is nothing more to read. In every fork it returns what that is to do."""
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def become(given: dict) -> NoReturn:
    """Does in a fork what it is to do."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, handle in enumerate((nothing, *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in given["spoken"]))):
        os.dup2(handle, target)
        os.close(handle)
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    end(given["arguments"], atexit._run_exitfuncs)


def end(arguments: Sequence[str], *last: Callable[[], None]) -> NoReturn:
    """Runs Python and ends this process as that would end, but for taking everything imported apart, which takes seconds."""
    code: object = 1
    try:
        python(arguments)
        code = 0
    except SystemExit as given:
        code = given.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    try:
        for one in last:
            one()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def python(arguments: Sequence[str]) -> None:
    """See `Forks.run`."""
    first, *others = arguments
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = others
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")


class Launched:
    """A fork in place of the process that a launcher would start, with what a launcher asks of a `Popen`."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.args, self.returncode = arguments, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.environ.clear()
            os.environ.update(environment)
            end(arguments)

    def poll(self) -> int | None:
        if self.returncode is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def launch() -> None:
    """`accelerate launch`, whose processes are forks of it too."""
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def start(self, args: Sequence[str], env: dict[str, str]) -> Launched:
        assert args[:2] == (sys.executable, "-u"), args
        return Launched(args[2:], env)

    SubprocessHandler._popen = start
    main()


if __name__ == "__main__":
    sys.path.pop(0)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # or every fork would copy what it looks at
    if (told := serve()) is not None:
        become(told)
