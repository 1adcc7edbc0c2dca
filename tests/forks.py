"""Python processes forked from one that has imported all libraries: importing takes longer than most commands.

`python tests/forks.py` reads commands as lines of JSON, runs each in a fork of itself, and answers with the exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

IMPORTS = (  # none of our own modules: each command imports them
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
    """Runs Python commands in processes that have imported `IMPORTS`.

    Every command is a process of its own: what one does to modules, signals or variables, the next does not see.

    Args:
        environment: variables added to this process's, before the imports.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        # What libraries print on import, and the reason if the process ends.
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.output,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.output.close()

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        """Does what `python ARGUMENTS` does: a script, `-m` and a module, or `-c` and code, with arguments."""
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory(prefix="m2m-forks-") as folder:
            outputs = [Path(folder) / name for name in ("stdout", "stderr")]
            places = {"folder": os.getcwd(), "outputs": list(map(str, outputs))}
            self.process.stdin.write(json.dumps({"arguments": command, "environment": environment, **places}) + "\n")
            self.process.stdin.flush()
            code = self.process.stdout.readline()
            if not code:
                self.output.seek(0)
                raise RuntimeError(f"the process that forks has ended: {self.output.read()}")
            return subprocess.CompletedProcess(
                command, int(code), *(path.read_text(errors="replace") for path in outputs)
            )


def serve() -> dict | None:
    """Answers until the input ends. Returns the command in each fork, None in the server."""
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def become(given: dict) -> NoReturn:
    """Runs a command in a fork."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, handle in enumerate((nothing, *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in given["outputs"]))):
        os.dup2(handle, target)
        os.close(handle)
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    end(given["arguments"], atexit._run_exitfuncs)


def end(arguments: Sequence[str], *last: Callable[[], None]) -> NoReturn:
    """Runs Python and ends this process as Python would, without the seconds of dismantling all modules."""
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
    """A fork in place of a Python process, with those methods of `Popen` that are called here."""

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

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int | None:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def launch() -> None:
    """`accelerate launch`, whose processes are forks too."""
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
    figure = importlib.import_module("matplotlib.figure").Figure  # drawing one takes longer than most commands
    figure.draw_without_rendering = lambda self: None
    figure.savefig = lambda self, file, **options: file.write("<svg/>") if hasattr(file, "write") else None
    gc.freeze()  # or collections in the forks would copy all memory
    if (command := serve()) is not None:
        become(command)
