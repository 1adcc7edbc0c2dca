"""The benchmark compares methods that really score the same; the GPU's checks run, as far as a CPU can tell."""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from answering_methods import ANSWERING, compare_answering, spread_lengths
from forks import Launched
from lm_eval.tasks import TaskManager
from scoring_methods import (
    METHODS,
    Workload,
    compare,
    differences,
    other_answers,
    random_adapters,
    random_model,
    random_rows,
    report,
    spread_mixtures,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from m2m_hf.scoring.causal_lm import encode_rows

ROOT = Path(__file__).parents[2]


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize(
    ("targets", "methods"), [(["q_proj", "k_proj", "v_proj", "o_proj"], METHODS), ("all-linear", METHODS[:-1])]
)
def test_all_methods_score_the_same(tmp_path, monkeypatch, targets, methods):
    # The harness would read all the tasks that it has for every mixture; the one that it is given here is not among them.
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", functools.partial(TaskManager, include_defaults=False))
    folder = random_model(tmp_path / "model", "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = random_rows(5, shots=64)
    questions = encode_rows(rows, tokenizer, 2048).questions
    adapters = random_adapters(model, 3, 4, targets)
    load = Workload(model, tokenizer, adapters, questions, rows, str(folder), 200)
    mixtures = spread_mixtures(list(adapters), 3)
    assert [len(one) for one in mixtures] == [1, 2, 3]
    results = compare(load, mixtures, methods)
    assert set(results) == set(methods)
    for name in methods[2:]:
        assert other_answers(results["ours"], results[name]) == 0
        assert max(differences(results["ours"], results[name])) < 1e-4, name
    assert results["floor"].sums[0] == results["floor"].sums[2]  # one merged model, whatever the mixture
    last = [one.sums[2] for one in (results["ours"], results["floor"])]
    assert torch.allclose(*map(torch.tensor, last), atol=1e-4)  # that of all candidates
    columns, lines = report(load, results)
    assert all(len(line) == len(columns) for line in lines)
    assert not any(module._forward_hooks for module in model.modules())


def test_all_methods_answer_the_same(tmp_path):
    folder = random_model(tmp_path / "model", "pico")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), random_rows(8, shots=64)
    load = Workload(model, tokenizer, random_adapters(model, 2, 4, ["q_proj"]), [], rows, str(folder), 200)
    lengths = spread_lengths(8, 2, 9)
    assert sorted(lengths) == list(range(2, 10))
    _, lines, seconds = compare_answering(load, [{"random1": 1.0}], lengths, ANSWERING)
    assert [line[-1] for line in lines] == ["", "0 of 8", "0 of 8", ""]
    assert set(seconds) == set(ANSWERING)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_checks_for_a_gpu_run_on_a_cpu(capsys, monkeypatch):
    import device_checks

    def fork(command: list[str], stdout: None) -> Launched:
        assert command[1:3] == ["-m", "m2m_hf.cli.main"]
        code = "import sys; from m2m_hf.cli.main import main; main(sys.argv[1:])"
        return Launched(["-c", code, *command[3:]], dict(os.environ))

    monkeypatch.setattr(device_checks, "subprocess", SimpleNamespace(Popen=fork, DEVNULL=None))
    assert recipe("gpu_check").main(["--size", "tiny", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok ") == 25
    assert "no checks failed" in printed


def test_the_benchmark_recipe(tmp_path, forks):
    flags = ("--random", "tiny", "--rows", 6, "--mixtures", 2, "--methods", "ours,floor")
    done = forks.run(ROOT / "recipes" / "benchmark.py", *flags, "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "changing the mixture:" in done.stdout
    assert {"ours", "floor", "ratios", "switching_seconds"} <= set(json.loads((tmp_path / "figures.json").read_text()))


@pytest.mark.parametrize("task", ["random", "intents"])
def test_the_benchmark_of_training_trains_what_bare_trainers_train(request, tmp_path, forks, task):
    given = ("--random", "pico", "--candidates", 2, "--rows", 8)
    if task == "intents":
        given = ("--config", request.getfixturevalue("intents") / "intents.yaml")
    flags = ("--repeats", 1, "--use_cpu", "true", "--max_steps", 3, "--parallel_adapters", 2, "--dtype", "float32")
    done = forks.run(ROOT / "recipes" / "benchmark_training.py", *given, *flags, "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["differences"]["one by one"] == 0.0
    assert figures["differences"]["side by side"] < 1e-3
    assert all(len(figures[name]["seconds"]) == 1 for name in ("bare", "one by one", "side by side", "single"))
