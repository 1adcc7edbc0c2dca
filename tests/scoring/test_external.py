"""Scorers that run something else: a Python function, a command, the lm-evaluation-harness."""

import errno
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from pico import build_adapter, build_model, choice_rows, write_rows

from m2m_hf.config.candidates import DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.tokens import encode
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.external import CallableScorer, CommandScorer, HarnessScorer

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
IDS = torch.tensor([[5, 9, 200, 31, 17]])
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
    for number, weights in enumerate(MIXTURES[:2]):
        folder = tmp_path / f"mixture{number}"
        write_adapter(folder, stack.adapters, weights, "some/base")
        stack.set(weights)
        with torch.no_grad():
            gated = stack.model(input_ids=IDS).logits
            loaded = PeftModel.from_pretrained(build_model(family), folder).eval()
            assert torch.allclose(loaded(input_ids=IDS).logits, gated, atol=1e-5)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/base"


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
    scores = CallableScorer(function, rows, tokenizer).score(stack, MIXTURES, 100)
    assert seen == [rows] * 3
    for weights, score in zip(MIXTURES, scores, strict=True):
        stack.set(weights)
        with torch.no_grad():
            expected = stack.model(input_ids=IDS).logits[0, :, 7]
        assert score.values == pytest.approx(expected.tolist(), abs=1e-6)
        assert score.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert len({score.value for score in scores}) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, Score(0.5)),
        ([0.0, 1.0], Score(0.5, 0.5, (0.0, 1.0))),
        (Score(0.1, 0.2), Score(0.1, 0.2)),
        (float("nan"), Failure("the score is not finite: nan")),
    ],
)
def test_what_a_function_may_give(tmp_path, tokenizer, given, expected):
    scorer = CallableScorer(lambda model, tokenizer, rows: given, [], tokenizer)
    assert scorer.score(build(tmp_path), [{}], 100) == [expected]


def failure(scorer, stack: GatedStack) -> str:
    """Why the scorer has no score."""
    (found,) = scorer.score(stack, [{}], 100)
    assert isinstance(found, Failure)
    return found.reason


def raising(model, tokenizer, rows):
    raise KeyError("odd")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, tokenizer, rows: "good", "expected a number, one number for each row, or a Score"),
        (lambda model, tokenizer, rows: [0.5, "x"], "expected a number"),
        (lambda model, tokenizer, rows: None, "expected a number"),
        (lambda model, tokenizer, rows: [0.5, float("inf")], "not finite"),
        (lambda model, tokenizer, rows: Score(0.5, float("nan")), "not finite"),
        (raising, "the scorer raised KeyError: 'odd'"),
    ],
)
def test_a_function_that_raises_or_gives_nonsense_has_no_score(tmp_path, tokenizer, function, message):
    assert message in failure(CallableScorer(function, [], tokenizer), build(tmp_path))


def test_a_function_is_recognised_by_its_code(tokenizer):
    def one(factor: float):
        return lambda model, tokenizer, rows: factor

    prints = [CallableScorer(function, [], tokenizer).fingerprint for function in (one(1.0), one(1.0), one(2.0))]
    assert prints[0] == prints[1] != prints[2]


SCORE = """
import json, sys
from safetensors.numpy import load_file  # torch would take longer to import than all else here
adapter, base, out = sys.argv[1:4]
tensors = load_file(adapter + "/adapter_model.safetensors")
total = float(sum(abs(t).sum() for name, t in tensors.items() if "lora_B" in name))
given = {"score": total, "base": base, "stderr": 0.25, "odd; touch hacked": 1}
if out == "-":
    print(json.dumps(given))
else:
    open(out, "w").write(json.dumps(given))
"""


@pytest.mark.parametrize("out", ["{output}", "-"])
def test_a_command_is_given_the_mixture_as_an_adapter(tmp_path, out):
    stack = build(tmp_path)
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    command = (sys.executable, str(script), "{adapter}", "{base_model}", out)
    scores = CommandScorer(command, "score", "some/base; touch hacked").score(stack, MIXTURES, 100)
    for weights, score in zip(MIXTURES, scores, strict=True):
        parts = [
            w * (b * stack.adapters[n].config.lora_alpha / 4) for n, w in weights.items() for b in lora_b(stack, n)
        ]
        assert score == Score(pytest.approx(sum(float(part.abs().sum()) for part in parts), rel=1e-5), 0.25)
    assert not Path("hacked").exists()


def lora_b(stack: GatedStack, name: str) -> list[torch.Tensor]:
    return [tensor for key, tensor in stack.adapters[name].tensors.items() if "lora_B" in key]


def python(code: str, *arguments: str, timeout: float = 60) -> CommandScorer:
    return CommandScorer((sys.executable, "-c", code, *arguments), "score", "b", timeout)


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


def test_who_ends_the_run_or_a_full_disk_is_no_fault_of_the_mixture(tmp_path):
    """Its trial must not be written down as failed."""
    stack = build(tmp_path)
    for code in ("import os; os.kill(os.getpid(), 15)", "import sys; sys.exit(128 + 2)"):
        with pytest.raises(StoppedError, match="was stopped by SIG"):
            python(code).score(stack, [{}], 100)
    for code in (
        "raise OSError(28, 'No space left on device')",
        "import sys; sys.exit('Disk quota exceeded (os error 122)')",
    ):
        with pytest.raises(OSError, match="found the disk full"):
            python(code).score(stack, [{}], 100)

    def function(model, tokenizer, rows):
        raise RuntimeError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="cannot write"):
        CallableScorer(function, [], None).score(stack, [{}], 100)


def test_processes_agree_on_what_fits_into_memory(tmp_path, tokenizer, monkeypatch):
    """Or the next pass would be cut into other batches on each of them."""
    stack = build(tmp_path)
    monkeypatch.setattr("m2m_hf.scoring.external.PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr("m2m_hf.scoring.external.broadcast_object_list", lambda found: found)
    monkeypatch.setattr("m2m_hf.scoring.external.gather_object", lambda found: [*found, 4])
    CallableScorer(lambda model, tokenizer, rows: 0.5, [], tokenizer).score(stack, [{}], 100)
    assert stack.shrink == 4


def test_commands_that_cannot_run_or_leave_nothing(tmp_path):
    stack = build(tmp_path)
    assert "'no-such-program' cannot be run" in failure(CommandScorer(("no-such-program",), "score", "b"), stack)
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


def test_a_command_is_recognised_by_the_files_that_it_names(tmp_path):
    script = tmp_path / "score.py"
    script.write_text("1")
    first = CommandScorer(("python", str(script)), "score", "b").fingerprint
    assert CommandScorer(("python", str(script)), "score", "b").fingerprint == first
    script.write_text("2")
    assert CommandScorer(("python", str(script)), "score", "b").fingerprint != first


TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def task(tmp_path) -> Path:
    data = write_rows(tmp_path / "rows.jsonl", choice_rows(12))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data))
    return tmp_path / "colours.yaml"


def harness(task: Path, tokenizer, **options) -> HarnessScorer:
    allow = options.pop("allow_code", True)
    config = TargetConfig("lm_eval", options.pop("metric", ""), task=str(task), **options)
    return HarnessScorer(config, str(task), tokenizer, allow, "targets.t")


def test_the_harness_scores_the_gated_model_as_our_own_scorer_does(tmp_path, tokenizer, task):
    stack = build(tmp_path)
    scorer = harness(task, tokenizer)
    assert scorer.examples == 12
    rows = [target_row(row, "text", "choice", "row") for row in choice_rows(12)]
    ours = make_causal_lm_scorer(TargetConfig("choice", "accuracy", DataConfig(path="json")), rows, tokenizer, 128)
    for weights in MIXTURES:
        theirs = scorer.score(stack, [weights], 100)[0]
        assert theirs.values == ours.score(stack, [weights], 100)[0].values
        assert theirs.value == sum(theirs.values) / 12
    assert len(harness(task, tokenizer, limit=5).score(stack, [{}], 100)[0].values) == 5
    assert harness(task, tokenizer, metric="acc_norm").fingerprint != scorer.fingerprint


LOSS = """
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


def test_harness_metrics_of_a_whole_corpus_are_negated_where_lower_is_better(tmp_path, tokenizer):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"red green {n}"} for n in range(6)])
    task = tmp_path / "words.yaml"
    task.write_text(LOSS.format(data=data))
    score = harness(task, tokenizer).score(build(tmp_path), [{}], 100)[0]
    model = build_model("llama")
    total, count = 0.0, 0
    for n in range(6):
        ids, start = encode(tokenizer, "", f"red green {n}")
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))
        count += len(f"red green {n}".encode())
    assert score.value == pytest.approx(-torch.tensor(-total / count).exp().item(), rel=1e-4)
    assert score.values == ()
    assert 0 < score.stderr < 100


def test_harness_tasks_of_ones_own_are_refused_unless_allowed(tokenizer, task):
    """They may name functions in many spellings, and their templates are code too."""
    with pytest.raises(InputError, match="allow_metric_code: true if you trust it"):
        harness(task, tokenizer, allow_code=False)


def test_the_harness_goes_on_with_smaller_batches_where_memory_does_not_suffice(tmp_path, tokenizer, task):
    expected = harness(task, tokenizer).score(build(tmp_path), [MIXTURES[1]], 100 * 128)
    stack = build(tmp_path / "small")

    def look(module, args, kwargs):
        if (kwargs.get("input_ids", args[0] if args else None)).numel() > 150:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    stack.model.register_forward_pre_hook(look, with_kwargs=True)
    assert harness(task, tokenizer).score(stack, [MIXTURES[1]], 100 * 128) == expected
    assert stack.shrink > 1


def test_harness_tasks_that_are_not_there(tokenizer, task):
    with pytest.raises(InputError, match="there is no file"):
        harness(task.with_name("nothing.yaml"), tokenizer)
    with pytest.raises(InputError, match="has acc, acc_norm; got 'f1'"):
        harness(task, tokenizer, metric="f1")


def test_without_the_harness_the_message_says_what_to_type(tokenizer, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'm2m_hf\[lm_eval\]'"):
        harness(task, tokenizer)
