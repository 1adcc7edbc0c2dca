"""Scorers that run something else: a Python function, a command, the lm-evaluation-harness."""

import errno
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from pico import DEVICE, build_adapter, build_model, choice_rows, scorer_on, small_memory, write_rows

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.rows import TargetRow
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.external import CallableScorer, CommandScorer, HarnessScorer
from m2m_hf.scoring.scorers import Setup

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
IDS = torch.tensor([[5, 9, 200, 31, 17]], device=DEVICE)
MIXTURES = ({"a": 0.25, "b": 0.75}, {"a": 1.0}, {})


def build(tmp_path: Path, family: str = "llama", **lora) -> GatedStack:
    paths = {name: build_adapter(family, tmp_path / name, seed, **lora) for seed, name in enumerate("ab")}
    return GatedStack(build_model(family), {name: Adapter.load(path) for name, path in paths.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_mixture_is_the_gated_model(tmp_path, family, variant):
    if family == "gpt2" and variant in ("embedding", "patterns"):
        pytest.skip("names of Llama's layers")
    stack = build(tmp_path, family, **VARIANTS[variant])
    for number, weights in enumerate(MIXTURES):
        folder = tmp_path / f"mixture{number}"
        write_adapter(folder, stack.adapters, weights, "some/base")
        stack.set(weights)
        with torch.no_grad():
            gated = stack.model(input_ids=IDS).logits
            loaded = PeftModel.from_pretrained(build_model(family), folder).eval()
            assert torch.allclose(loaded(input_ids=IDS).logits, gated, atol=1e-5)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/base"


def calling(function, rows=(), tokenizer=None) -> CallableScorer:
    return CallableScorer(TargetConfig(function, "score"), rows, Setup(tokenizer))


def test_a_function_is_given_the_gated_model(tmp_path, tokenizer):
    stack = build(tmp_path)
    seen = []

    def function(model, given_tokenizer, rows):
        assert given_tokenizer is tokenizer
        assert not model.training
        seen.append(rows)
        with torch.no_grad():
            return model(input_ids=IDS).logits[0, :, 7]

    rows = [{"anything": 1}]
    scores = calling(function, rows, tokenizer).score(stack, MIXTURES, 100)
    assert seen == [rows] * 3
    for weights, score in zip(MIXTURES, scores, strict=True):
        stack.set(weights)
        with torch.no_grad():
            expected = stack.model(input_ids=IDS).logits[0, :, 7]
        assert score.values == pytest.approx(expected.tolist(), abs=1e-6)
        assert score.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert len({score.value for score in scores}) == 3


def raising(model, tokenizer, rows):
    raise KeyError("odd")


def failure(scorer, stack: GatedStack) -> str:
    """Why the scorer has no score."""
    (found,) = scorer.score(stack, [{}], 100)
    assert isinstance(found, Failure)
    return found.reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.5, Score(0.5)), ([0.0, 1.0], Score(0.5, 0.5, (0.0, 1.0))), (Score(0.1, 0.2), Score(0.1, 0.2))],
)
def test_what_a_function_may_give(tmp_path, given, expected):
    assert calling(lambda model, tokenizer, rows: given).score(build(tmp_path), [{}], 100) == [expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("good", "expected a number, one number for each row, or a Score"),
        ([0.5, "x"], "expected a number"),
        (None, "expected a number"),
        (float("nan"), "the score is not finite: nan"),
        ([0.5, float("inf")], "not finite"),
        (Score(0.5, float("nan")), "not finite"),
        (raising, "the scorer raised KeyError: 'odd'"),
    ],
)
def test_a_function_that_raises_or_gives_nonsense_has_no_score(tmp_path, given, message):
    function = given if given is raising else lambda model, tokenizer, rows: given
    assert message in failure(calling(function), build(tmp_path))


SCORE = """
import json, sys
from safetensors.numpy import load_file  # torch would take longer to import than all else here
adapter, base, out = sys.argv[1:4]
tensors = load_file(adapter + "/adapter_model.safetensors")
total = float(sum(abs(t).sum() for name, t in tensors.items() if "lora_B" in name))
open(out, "w").write(json.dumps({"score": total, "base": base, "stderr": 0.25, "odd; touch hacked": 1}))
"""


@pytest.mark.parametrize("out", ["{output}", "/dev/stdout"])
def test_a_command_is_given_the_mixture_as_an_adapter(tmp_path, out):
    stack = build(tmp_path)
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    command = (sys.executable, str(script), "{adapter}", "{base_model}", out)
    scores = running(*command, base="some/base; touch hacked").score(stack, MIXTURES, 100)
    sizes = {  # of B, times the scaling
        name: 2 * sum(float(tensor.abs().sum()) for key, tensor in adapter.tensors.items() if "lora_B" in key)
        for name, adapter in stack.adapters.items()
    }
    for weights, score in zip(MIXTURES, scores, strict=True):
        expected = sum(weight * sizes[name] for name, weight in weights.items())
        assert score == Score(pytest.approx(expected, rel=1e-5), 0.25)
    assert not Path("hacked").exists()


def running(*command: str, base: str = "b", timeout: float = 60) -> CommandScorer:
    return CommandScorer(TargetConfig("command", "score", timeout=timeout), command, Setup(None, base=base))


def python(code: str, *arguments: str, timeout: float = 60) -> CommandScorer:
    return running(sys.executable, "-c", code, *arguments, timeout=timeout)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('out of memory')", "ended with exit code 1:\nout of memory"),
        ("print('score: 3')", "expected JSON such as {\"score\": 0.5}, got 'score: 3'"),
        ("print('{}')", 'expected JSON such as {"score": 0.5}'),
        ("print('[]')", 'expected JSON such as {"score": 0.5}'),
        ("print('[' * 100000)", "RecursionError"),
        ("print('NaN')", "the score is not finite: nan"),
        ('print(\'{"score": 0.5, "stderr": 1e999}\')', "not finite"),
        ("import sys; sys.stdout.write('1' * (1 << 25))", "wrote 33,554,432 bytes; expected a few numbers"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", "expected JSON"),
        ("import sys; print(sys.stdin.read() or 'nothing to read')", "got 'nothing to read'"),
        ("import os; os.kill(os.getpid(), 9)", "ended with exit code -9"),
    ],
)
def test_a_command_that_fails_or_gives_nonsense_has_no_score(tmp_path, code, message):
    assert message in failure(python(code), build(tmp_path))


def disk_full(model, tokenizer, rows):
    raise RuntimeError("cannot write") from OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("scorer", "error", "message"),
    [
        (python("import os; os.kill(os.getpid(), 15)"), StoppedError, "was stopped by SIG"),
        (python("import sys; sys.exit(128 + 2)"), StoppedError, "was stopped by SIG"),
        (python("raise OSError(28, 'No space left on device')"), OSError, "found the disk full"),
        (python("import sys; sys.exit('Disk quota exceeded (os error 122)')"), OSError, "found the disk full"),
        (calling(disk_full), RuntimeError, "cannot write"),
    ],
)
def test_who_ends_the_run_or_a_full_disk_is_no_fault_of_the_mixture(tmp_path, scorer, error, message):
    """Its trial must not be written down as failed."""
    with pytest.raises(error, match=message):
        scorer.score(build(tmp_path), [{}], 100)


def test_processes_agree_on_what_fits_into_memory(tmp_path, tokenizer, monkeypatch):
    """Or the next pass would be cut into other batches on each of them."""
    stack = build(tmp_path)
    monkeypatch.setattr("m2m_hf.scoring.forward.PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr("m2m_hf.scoring.forward.gather_object", lambda found: [*found, 4])
    calling(lambda model, tokenizer, rows: 0.5).score(stack, [{}], 100)
    assert stack.shrink == 4


def test_commands_that_cannot_run_or_leave_nothing(tmp_path):
    stack = build(tmp_path)
    assert "'no-such-program' cannot be run" in failure(running("no-such-program"), stack)
    assert "did not write {output}" in failure(python("pass", "{output}"), stack)
    values = python("print('{\"values\": [0, 1]}')").score(stack, [{}], 100)
    assert values == [Score(0.5, 0.5, (0.0, 1.0))]


def test_a_command_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert "was stopped after 1 s (timeout)" in failure(python(code, timeout=1), build(tmp_path))
    assert time.monotonic() - start < 30
    time.sleep(3.5)
    assert not mark.exists()


def test_secrets_that_a_command_tells_are_not_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sesame-open-4711")
    code = "import os, sys; sys.exit('key ' + os.environ['MY_API_KEY'] + ' token hf_' + 'a' * 30 + ' https://me:pw@host/x')"
    reason = failure(python(code), build(tmp_path))
    assert "key *** token *** https://***@host/x" in reason.splitlines()[-1]


def test_functions_and_commands_are_recognised_by_their_code(tmp_path):
    def one(factor: float):
        return lambda model, tokenizer, rows: factor

    same, again, other = (calling(one(factor)).fingerprint for factor in (1.0, 1.0, 2.0))
    assert same == again != other
    script = tmp_path / "score.py"
    prints = []
    for content in "112":
        script.write_text(content)
        prints.append(running("python", str(script)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def task_file(folder: Path, rows: list[dict], metrics: list[str], **fields) -> Path:
    """A task of the harness, over these rows."""
    data = str(write_rows(folder / "rows.jsonl", rows))
    given = {"task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": data}}}
    given |= {"validation_split": "validation", "metric_list": [{"metric": metric} for metric in metrics]}
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(given | fields))
    return path


@pytest.fixture
def task(tmp_path) -> Path:
    choice = {
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    return task_file(tmp_path, choice_rows(12), ["acc", "acc_norm"], output_type="multiple_choice", **choice)


def harness(task: Path, tokenizer, **options) -> HarnessScorer:
    allow = options.pop("allow_code", True)
    config = TargetConfig("lm_eval", options.pop("metric", ""), task=str(task), **options)
    return HarnessScorer(config, str(task), Setup(tokenizer, allow_metric_code=allow, where="targets.t"))


def test_the_harness_scores_the_gated_model_as_our_own_scorer_does(tmp_path, tokenizer, task):
    stack = build(tmp_path)
    scorer = harness(task, tokenizer)
    assert scorer.examples == 12
    rows = [target_row(row, "text", "choice", "row") for row in choice_rows(12)]
    ours = scorer_on(rows, tokenizer, "choice", "accuracy")
    for weights in MIXTURES:
        theirs = scorer.score(stack, [weights], 100)[0]
        assert theirs.values == ours.score(stack, [weights], 100)[0].values
        assert theirs.value == sum(theirs.values) / 12
    assert len(harness(task, tokenizer, limit=5).score(stack, [{}], 100)[0].values) == 5
    assert harness(task, tokenizer, metric="acc_norm").fingerprint != scorer.fingerprint


def test_harness_metrics_of_a_whole_corpus_are_negated_where_lower_is_better(tmp_path, tokenizer):
    texts = [f"red green {n}" for n in range(6)]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task = task_file(tmp_path, [{"text": text} for text in texts], ["byte_perplexity"], **rolling)
    stack = build(tmp_path)
    (score,) = harness(task, tokenizer).score(stack, [{}], 100)
    ours = scorer_on([TargetRow("", (text,), 0) for text in texts], tokenizer, "loss", "loglikelihood")
    by_byte = sum(ours.score(stack, [{}], 100)[0].logprobs) / sum(map(len, texts))
    assert score.value == pytest.approx(-math.exp(-by_byte), rel=1e-4)
    assert score.values == ()
    assert 0 < score.stderr < 100


def test_the_harness_goes_on_with_smaller_batches_where_memory_does_not_suffice(tmp_path, tokenizer, task):
    expected = harness(task, tokenizer).score(build(tmp_path), [MIXTURES[1]], 100 * 128)
    stack = build(tmp_path / "small")
    small_memory(stack.model, 150)
    assert harness(task, tokenizer).score(stack, [MIXTURES[1]], 100 * 128) == expected
    assert stack.shrink > 1


def test_harness_tasks_that_cannot_be_used_are_refused(tokenizer, task, monkeypatch):
    with pytest.raises(InputError, match="there is no file"):
        harness(task.with_name("nothing.yaml"), tokenizer)
    with pytest.raises(InputError, match="has acc, acc_norm; got 'f1'"):
        harness(task, tokenizer, metric="f1")
    # It may name functions in many spellings, and its templates are code too.
    with pytest.raises(InputError, match="allow_metric_code: true if you trust it"):
        harness(task, tokenizer, allow_code=False)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'm2m_hf\[lm_eval\]'"):
        harness(task, tokenizer)
