"""Scorers that run something else: a Python function, a command, or the lm-evaluation-harness.

All of them score one mixture after another. The function and the harness get the gated model itself, so nothing is exported or
loaded again. A command gets the mixture as one exact PEFT adapter.
"""

import errno
import functools
import json
import math
import os
import re
import signal
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import content_fingerprint
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.dense_stack import DenseStack, Stack
from m2m_hf.modeling.devices import broadcast, out_of_memory
from m2m_hf.scoring.forward import GPU_TOKENS, Weights, agree_on_memory
from m2m_hf.scoring.metrics.metric import bootstrap
from m2m_hf.scoring.scorers import Scorer, Setup, failure
from m2m_hf.storage.files import digest_of
from m2m_hf.storage.run_folder import disk_is_full

MAX_OUTPUT = 1 << 24  # bytes of a command's output that are read


class ExternalScorer(Scorer):
    """Base: scores one mixture after another; the main process's result holds for all processes.

    Attributes:
        name: of what is run, for messages.
        exports: whether it hands on the mixture as files, written by `export_mixture`.
    """

    name: str
    exports = False

    @abstractmethod
    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Any:
        """The score of the mixture that the stack is set to; an `InputError` says why it has none.

        Called on every process; the others may return None.
        """

    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        assert rows is None, "an external scorer scores all its rows"
        if self.exports and isinstance(stack, DenseStack) and adapters_of(stack):
            raise InputError(
                f"merge_method: {stack.method.name} makes no adapter to hand to {self.name}; expected average"
            )
        return [self._score(stack, weights, tokens_per_batch) for weights in mixtures]

    def _score(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Score | Failure:
        stack.set(weights)
        stack.model.eval()
        score: Score | Failure
        try:
            score = self.measure(stack, weights, tokens_per_batch)
        except InputError as error:
            score = failure(str(error))
        except Exception as error:  # whatever foreign code raises, and the search goes on
            if isinstance(error, StoppedError) or disk_is_full(error):  # which is no mixture's fault
                raise
            score = failure(f"{self.name} raised {type(error).__name__}: {error}")
        score = broadcast(score)
        agree_on_memory(stack)
        if isinstance(score, Score) and not score.finite:
            return Failure(f"the score is not finite: {score.value}")
        return score


def adapters_of(stack: Stack) -> dict[str, Adapter]:
    return {name: expert for name, expert in stack.adapters.items() if isinstance(expert, Adapter)}


def export_mixture(stack: Stack, weights: Weights, folder: Path, base: str) -> None:
    """Writes the mixture that the stack is set to: as one exact PEFT adapter, of full experts as the merged model."""
    if adapters := adapters_of(stack):
        write_adapter(folder, adapters, weights, base)
    else:
        stack.model.save_pretrained(folder)


class CallableScorer(ExternalScorer):
    """A Python function `(model, tokenizer, rows) -> number, numbers of the rows, or Score`; higher is better.

    The model is the base with the mixture's gates set, in evaluation mode; the function must leave it as it was. The journal
    identifies the function by its code and what that refers to. The rows are as they were loaded; a target without data has none.
    """

    name = "the scorer"

    def __init__(self, config: TargetConfig, rows: Sequence[Mapping[str, Any]], setup: Setup) -> None:
        self.function: Any = config.scorer
        self.rows, self.tokenizer = list(rows), setup.processing
        self.examples = len(self.rows)
        self.fingerprint = content_fingerprint(["callable", Hasher.hash(self.function), *self.rows])

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Score:
        result = self.function(stack.model, self.tokenizer, self.rows)
        if isinstance(result, Score):
            stderr = None if result.stderr is None else float(result.stderr)
            return Score(
                float(result.value), stderr, tuple(map(float, result.values)), tuple(map(float, result.logprobs))
            )
        if hasattr(result, "tolist"):
            result = result.tolist()
        if isinstance(result, (int, float)):
            return Score(float(result))
        if isinstance(result, (list, tuple)) and result and all(isinstance(value, (int, float)) for value in result):
            return Score.of(list(map(float, result)))
        raise InputError(f"a scorer gave {result!r}; expected a number, one number for each row, or a Score")


class CommandScorer(ExternalScorer):
    """A command of the user's that writes a number as JSON; run once per mixture, without a shell. Higher is better.

    In its arguments `{adapter}` becomes the folder of the mixture as one exact PEFT adapter (of zeros for the base model),
    `{base_model}` the base model, and `{output}` the file to write. With full experts there is no adapter, and `{model}` becomes
    the folder of the merged model. Without `{output}` the command's standard output is read. The JSON may also hold `stderr`, and
    `values`: one number per example, whose mean is then the score.
    """

    name = "the command"
    exports = True

    def __init__(self, config: TargetConfig, command: Sequence[str], setup: Setup) -> None:
        self.command, self.key, self.base, self.timeout = tuple(command), config.metric, setup.base, config.timeout
        self.examples = 0
        files = [digest_of(Path(part)) for part in command if Path(part).is_absolute() and Path(part).is_file()]
        self.fingerprint = content_fingerprint(["command", list(command), self.key, *files])

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Any:
        if not PartialState().is_main_process:
            return None
        with tempfile.TemporaryDirectory(prefix="m2m-") as folder:
            merged, output = Path(folder) / "merged", Path(folder) / "output.json"
            export_mixture(stack, weights, merged, self.base)
            places = {"{adapter}" if adapters_of(stack) else "{model}": str(merged)}
            places |= {"{base_model}": self.base, "{output}": str(output)}
            command = [re.sub("|".join(map(re.escape, places)), lambda m: places[m[0]], part) for part in self.command]
            return self._as_score(self._run(command, output))

    def _run(self, command: list[str], output: Path) -> str:
        """What the command wrote. It is killed, with all its children, when it takes too long or when we are stopped."""
        shown = f"command: {' '.join(command)}\n"
        out, err = output.with_name("stdout"), output.with_name("stderr")
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file, start_new_session=True
                )
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                raise InputError(f"command: {command[0]!r} cannot be run ({error})") from error
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise InputError(f"{shown}was stopped after {self.timeout:g} s (timeout)") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            self._refuse(code, shown, "\n".join((tail(err) or tail(out)).strip().split("\n")[-5:]), output.parent)
        if any("{output}" in part for part in self.command):
            if not output.is_file():
                raise InputError(f"{shown}succeeded but did not write {{output}}")
            out = output
        if (size := out.stat().st_size) > MAX_OUTPUT:
            raise InputError(f"{shown}wrote {size:,} bytes; expected a few numbers")
        return out.read_text(encoding="utf-8", errors="replace")

    def _refuse(self, code: int, shown: str, message: str, folder: Path) -> None:
        """Raises what an exit code means: the whole run is stopped, the disk is full, or this mixture has no score."""
        number = -code if code < 0 else code - 128  # a shell adds 128 to the signal that ended its program
        if number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            raise StoppedError(f"{shown}was stopped by {signal.Signals(number).name} from outside")
        if disk_is_full(OSError(message), folder):
            raise OSError(errno.ENOSPC, f"{shown.strip()} found the disk full")
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        raise InputError(f"{shown}ended with exit code {code}{hint}:\n{message}")

    def _as_score(self, text: str) -> Score:
        try:
            result = json.loads(text)
            if isinstance(result, (int, float)):
                result = {self.key: result}
            if result.get("values"):
                return Score.of([float(value) for value in result["values"]])
            stderr = result.get("stderr")
            return Score(float(result[self.key]), None if stderr is None else float(stderr))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f'command: expected JSON such as {{"{self.key}": 0.5}}, got {text.strip()[:200]!r} ({error!r})'
            ) from error


def tail(path: Path) -> str:
    """The end of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        return file.read().decode(errors="replace")


class HarnessScorer(ExternalScorer):
    """A task of EleutherAI's lm-evaluation-harness (its name, or the path of its YAML), run in this process on the gated model.

    A metric for which lower is better is negated. Of a group of tasks, all samples count alike.
    """

    name = "the harness"

    def __init__(self, config: TargetConfig, task: str, setup: Setup) -> None:
        local = Path(task).suffix in (".yaml", ".yml")
        self.tasks = load_tasks(task, local, setup.allow_metric_code, setup.where)
        self.limit, self.tokenizer = config.limit, setup.processing
        members = list(self.tasks["tasks"].values())
        for member in members:
            if config.num_fewshot is not None or member.get_config("num_fewshot") is None:
                member.set_config(key="num_fewshot", value=config.num_fewshot or 0)
            member.set_fewshot_seed(seed=0)
        docs = [doc for member in members for doc in list(member.eval_docs)[: self.limit]]
        self.examples = len(docs)
        higher_is_better = members[0].higher_is_better()
        self.metric, _, self.filter = config.metric.partition(",")
        self.metric = self.metric or next(iter(higher_is_better))
        if self.metric not in higher_is_better:
            raise InputError(
                f"{setup.where}.metric: task {task!r} has {', '.join(higher_is_better)}; got {self.metric!r}"
            )
        self.sign = 1.0 if higher_is_better[self.metric] else -1.0
        self.aggregate = members[0].aggregation()[self.metric]
        source = digest_of(Path(task)) if local else task
        self.fingerprint = content_fingerprint(
            ["lm_eval", version("lm_eval"), source, config.metric, config.num_fewshot, *docs]
        )

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Score:
        samples = self._evaluate(stack, tokens_per_batch)
        values: list[Any] = []
        for name in self.tasks["tasks"]:
            of_task = sorted(samples[name], key=lambda sample: sample["doc_id"])
            kept = self.filter or of_task[0]["filter"]
            values += [sample[self.metric] for sample in of_task if sample["filter"] == kept]
        value = float(self.aggregate(values))
        numbers = all(isinstance(number, (int, float)) for number in values)
        if numbers and math.isclose(value, sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-12):
            return Score.of([self.sign * float(number) for number in values])
        stderr = bootstrap(len(values), lambda chosen: float(self.aggregate([values[index] for index in chosen])))
        return Score(self.sign * value, stderr)

    def _evaluate(self, stack: Stack, tokens_per_batch: int) -> Any:
        """The harness's samples by task; in smaller batches once memory has run out."""
        from lm_eval.evaluator import evaluate

        while True:
            size = max(
                1, min(tokens_per_batch, GPU_TOKENS) // stack.shrink // 128
            )  # which has the logits of all tokens
            model = quiet_harness_model(stack.model, self.tokenizer, size)
            given = {"lm": model, "task_dict": self.tasks, "limit": self.limit}
            try:
                return evaluate(**given, bootstrap_iters=0, log_samples=True)["samples"]
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
            clear_device_cache(garbage_collection=True)
            stack.shrink *= 2


def load_tasks(task: str, local: bool, allow_code: bool, where: str) -> Any:
    """The harness's task, or group of tasks; `local` means a YAML file."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"{where}: scorer lm_eval needs the lm-evaluation-harness ({error}). Type: pip install 'm2m_hf[lm_eval]'"
        ) from error
    if local and not Path(task).is_file():
        raise InputError(f"{where}.task: there is no file {task}")
    if local and not allow_code:
        raise InputError(
            f"{where}.task: {task} may name Python functions, and holds templates, which the harness runs; say "
            "allow_metric_code: true if you trust it"
        )
    try:
        manager = TaskManager(include_defaults=False) if local else all_tasks()
        # The harness would take any file's name for that of a task, and run what the file says.
        if not local and task not in manager.all_tasks:
            raise InputError(f"{where}.task: the harness has no task {task!r}; a task of your own is a .yaml file")
        return manager.load([task])
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}.task: the harness cannot load {task!r} ({error})") from error


@functools.cache
def all_tasks() -> Any:
    """All tasks of the harness, read once: reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def quiet_harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's view of a loaded model, without its progress bars."""
    from lm_eval.models.huggingface import HFLM

    quiet = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(quiet, name, functools.partial(getattr(quiet, name), disable_tqdm=True))
    return quiet
