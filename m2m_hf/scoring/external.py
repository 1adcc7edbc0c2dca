"""Scorers that hand the mixture to something else: a Python function, a command, or the lm-evaluation-harness.

All of them take one mixture after another. The function and the harness are given the gated model itself, so that nothing is
exported and nothing loaded again; a command is given the mixture as one exact PEFT adapter.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from datasets.fingerprint import Hasher
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import content_fingerprint, image_digest
from m2m_hf.errors import InputError, StoppedError, redact
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.modeling.devices import out_of_memory
from m2m_hf.scoring.forward import Weights
from m2m_hf.scoring.metrics import bootstrap
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.files import file_fingerprint
from m2m_hf.storage.run_folder import disk_is_full

MAX_OUTPUT = 1 << 24  # bytes of a command's output that are read
MAX_TOLD = 1000  # characters of a reason


class ExternalScorer(Scorer):
    """Base: one mixture after another; what the main process says holds for all."""

    def score(
        self,
        stack: Stack,
        mixtures: Sequence[Weights],
        tokens_per_batch: int,
        rows: Sequence[int] | None = None,
    ) -> list[Score | Failure]:
        """The score of every mixture, or why it has none: whatever went wrong, or a number that is not finite."""
        assert rows is None, "what runs elsewhere scores all its rows"
        results: list[Score | Failure] = []
        for weights in mixtures:
            stack.set(weights)
            stack.model.eval()
            try:
                found = [self.measure(stack, weights, tokens_per_batch)]
            except InputError as error:
                found = [Failure(redact(str(error))[:MAX_TOLD])]
            if PartialState().num_processes > 1:
                broadcast_object_list(found)
                stack.shrink = max(gather_object([stack.shrink]))  # or batches would differ between processes
            score = found[0]
            if isinstance(score, Score) and not score.finite:
                score = Failure(f"the score is not finite: {score.value}")
            results.append(score)
        return results

    @contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Turns whatever somebody else's code raises into an `InputError`, which is a trial's failure, and the search goes on.

        What we do ourselves stays outside: a full disk is no mixture's fault, wherever it is met.
        """
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if disk_is_full(error):
                raise
            raise InputError(f"{what} raised {type(error).__name__}: {error}") from error

    @abstractmethod
    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Any:
        """The score of the mixture that the stack is set to.

        Raises:
            InputError: it has none.
        """


class CallableScorer(ExternalScorer):
    """A Python function `(model, tokenizer, rows) -> number, numbers of the rows, or Score`; higher is better.

    The model is the base with the mixture's gates set, in evaluation mode; the function must leave it as it was. A journal
    recognises the function by its code and what that refers to.

    Args:
        function: the user's.
        rows: the target's rows as they were loaded, empty where it has no data.
    """

    def __init__(self, function: Any, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.function, self.rows, self.tokenizer = function, list(rows), tokenizer
        self.examples = len(self.rows)
        self.fingerprint = content_fingerprint(["callable", Hasher.hash(function), *self.rows], default=recognised)

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Score:
        with self.asked("the scorer"):
            return self._read(self.function(stack.model, self.tokenizer, self.rows))

    def _read(self, found: Any) -> Score:
        if isinstance(found, Score):
            return Score(
                float(found.value),
                None if found.stderr is None else float(found.stderr),
                tuple(map(float, found.values)),
                tuple(map(float, found.logprobs)),
            )
        if hasattr(found, "tolist"):
            found = found.tolist()
        if isinstance(found, (int, float)):
            return Score(float(found))
        if isinstance(found, (list, tuple)) and found and all(isinstance(value, (int, float)) for value in found):
            return Score.of([float(value) for value in found])
        raise InputError(f"a scorer gave {found!r}; expected a number, one number for each row, or a Score")


def recognised(value: Any) -> str:
    """What a row's value that JSON has not is known by."""
    return image_digest(value) if isinstance(value, Image.Image) else str(value)


class CommandScorer(ExternalScorer):
    """A command of the user's, run without a shell once per mixture, that leaves a number in JSON; higher is better.

    In its arguments `{adapter}` is replaced by the folder of the mixture as one exact PEFT adapter (of zeros for the base
    model), `{base_model}` by the base model and `{output}` by the file that it is to write. With full experts there is no
    adapter, and `{model}` is replaced by the folder of the merged model. Without `{output}` its standard output is read. The
    JSON may also hold `stderr`, and `values`: one number per example, whose mean is then the score.

    Args:
        command: program and arguments.
        key: which number of the JSON is the score.
        base: the base model's folder or Hub id.
        timeout: seconds after which it is stopped.
    """

    needs_adapter = True

    def __init__(self, command: Sequence[str], key: str, base: str, timeout: float = 3600) -> None:
        self.command, self.key, self.base, self.timeout = tuple(command), key, base, timeout
        self.examples = 0
        read = [file_fingerprint([Path(part)]) for part in command if Path(part).is_absolute() and Path(part).is_file()]
        self.fingerprint = content_fingerprint(["command", list(command), key, *read])

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Any:
        if not PartialState().is_main_process:
            return None
        with tempfile.TemporaryDirectory(prefix="m2m-") as folder:
            merged, output = Path(folder) / "merged", Path(folder) / "output.json"
            adapters = {name: one for name, one in stack.adapters.items() if isinstance(one, Adapter)}
            if adapters:
                write_adapter(merged, adapters, weights or {stack.names[0]: 0.0}, self.base)
            else:
                stack.model.save_pretrained(merged)
            places = {"{adapter}" if adapters else "{model}": str(merged)}
            places |= {"{base_model}": self.base, "{output}": str(output)}
            command = [re.sub("|".join(map(re.escape, places)), lambda m: places[m[0]], part) for part in self.command]
            return self._read(self._run(command, output))

    def _run(self, command: list[str], output: Path) -> str:
        """What the command has to say; stopped, with all that it has started, when it takes too long or we are stopped."""
        spoken = output.with_name("stdout"), output.with_name("stderr")
        with open(spoken[0], "wb") as out, open(spoken[1], "wb") as err:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                raise InputError(f"command: {command[0]!r} cannot be run ({error})") from error
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise InputError(
                    f"command: {' '.join(command)}\nwas stopped after {self.timeout:g} s (timeout)"
                ) from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            told = "\n".join((tail(spoken[1]) or tail(spoken[0])).strip().splitlines()[-5:])
            # A shell gives 128 more than the number of the signal that ended its program.
            number = -code if code < 0 else code - 128
            if number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # as whoever ends the whole run sends them
                raise StoppedError(
                    f"command: {' '.join(command)}\nwas stopped by {signal.Signals(number).name} from outside"
                )
            if disk_is_full(OSError(told), output.parent):
                raise OSError(errno.ENOSPC, f"command: {' '.join(command)} found the disk full")
            why = " (out of memory?)" if number == signal.SIGKILL else ""
            raise InputError(f"command: {' '.join(command)}\nended with exit code {code}{why}:\n{told}")
        if any("{output}" in part for part in self.command):
            if not output.is_file():
                raise InputError(f"command: {' '.join(command)}\nended well but did not write {{output}}")
            spoken = output, spoken[1]
        if spoken[0].stat().st_size > MAX_OUTPUT:
            raise InputError(
                f"command: {' '.join(command)}\nwrote {spoken[0].stat().st_size:,} bytes; expected a few numbers"
            )
        return spoken[0].read_text(encoding="utf-8", errors="replace")

    def _read(self, text: str) -> Score:
        try:
            given = json.loads(text)
            if isinstance(given, (int, float)):
                given = {self.key: given}
            if given.get("values"):
                return Score.of([float(value) for value in given["values"]])
            stderr = given.get("stderr")
            return Score(float(given[self.key]), None if stderr is None else float(stderr))
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
    """A task of EleutherAI's lm-evaluation-harness, run in this process on the gated model.

    A metric for which lower is better is negated. Where a task is a group, its members' samples count alike.

    Args:
        config: the target's.
        task: name of a task, or path of its YAML.
        where: for messages.

    Raises:
        InputError: the harness is not installed, there is no such task or metric, or it would run code that is not allowed.
    """

    def __init__(
        self, config: TargetConfig, task: str, tokenizer: PreTrainedTokenizerBase, allow_code: bool, where: str
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"{where}: scorer lm_eval needs the lm-evaluation-harness ({error}). Type: pip install 'm2m_hf[lm_eval]'"
            ) from error
        local = Path(task).suffix in (".yaml", ".yml")
        if local and not Path(task).is_file():
            raise InputError(f"{where}.task: there is no file {task}")
        if local and not allow_code:
            raise InputError(
                f"{where}.task: {task} may name Python functions, and holds templates, which the harness runs; say "
                "allow_metric_code: true if you trust it"
            )
        try:
            known = TaskManager(include_defaults=False) if local else harness_tasks()
            # The harness would take any file's name for that of a task, and run what it says.
            if not local and task not in known.all_tasks:
                raise InputError(f"{where}.task: the harness has no task {task!r}; a task of your own is a .yaml file")
            self.tasks = known.load([task])
        except InputError:
            raise
        except (KeyError, ValueError, OSError, ConnectionError) as error:
            raise InputError(f"{where}.task: the harness cannot load {task!r} ({error})") from error
        self.limit = config.limit
        self.tokenizer = tokenizer
        self.where = where
        for one in self.tasks["tasks"].values():
            if config.num_fewshot is not None:
                one.set_config(key="num_fewshot", value=config.num_fewshot)
            elif one.get_config("num_fewshot") is None:
                one.set_config(key="num_fewshot", value=0)
            one.set_fewshot_seed(seed=0)
        docs = [list(one.eval_docs)[: self.limit] for one in self.tasks["tasks"].values()]
        self.examples = sum(map(len, docs))
        first = next(iter(self.tasks["tasks"].values()))
        self.metric, _, self.filter = config.metric.partition(",")
        self.metric = self.metric or next(iter(first.higher_is_better()))
        if self.metric not in first.higher_is_better():
            raise InputError(
                f"{where}.metric: task {task!r} has {', '.join(first.higher_is_better())}; got {self.metric!r}"
            )
        self.higher = first.higher_is_better()[self.metric]
        self.fingerprint = content_fingerprint(
            ["lm_eval", version("lm_eval"), file_fingerprint([Path(task)]) if local else task, config.metric,
             config.num_fewshot, *(doc for of_task in docs for doc in of_task)],
            default=str,
        )  # fmt: skip

    def measure(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> Score:
        from lm_eval.evaluator import evaluate

        while True:
            size = max(1, tokens_per_batch // stack.shrink // 128)
            try:
                with self.asked("the harness"):
                    found = evaluate(
                        lm=quiet_harness_model(stack.model, self.tokenizer, size),
                        task_dict=self.tasks,
                        limit=self.limit,
                        bootstrap_iters=0,
                        log_samples=True,
                    )
                break
            except InputError as error:
                if size == 1 or not out_of_memory(error.__cause__):
                    raise
            clear_device_cache(garbage_collection=True)
            stack.shrink *= 2
        values: list[Any] = []
        for name in self.tasks["tasks"]:
            samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            kept = self.filter or samples[0]["filter"]
            values += [sample[self.metric] for sample in samples if sample["filter"] == kept]
        sign = 1.0 if self.higher else -1.0
        task = next(iter(self.tasks["tasks"].values()))
        aggregate = task.aggregation()[self.metric]
        value = float(aggregate(values))
        single = all(isinstance(one, (int, float)) for one in values)
        if single and math.isclose(value, sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-12):
            return Score.of([sign * float(one) for one in values])
        stderr = bootstrap(len(values), lambda chosen: float(aggregate([values[index] for index in chosen])))
        return Score(sign * value, stderr)


@functools.cache
def harness_tasks() -> Any:
    """All tasks of the harness, read once: it has thousands of files, which take seconds, and every target asks anew."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def quiet_harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's view of a model that is loaded already, without progress bars of its own."""
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Quiet(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
