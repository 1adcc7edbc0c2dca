"""Runs of several processes on the CPU, over gloo, through accelerate: the same result as one, and nothing lost when one dies."""

import json
import os
from pathlib import Path

import pytest
import torch
from pico import LAUNCH, arguments, changed, m2m, several_targets, trials
from safetensors.torch import load_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM

pytestmark = pytest.mark.cpu_only("processes over gloo")
# accelerate cuts models into pieces on accelerators only. What it does is the same on the CPU, once it believes to be on one.
ON_AN_ACCELERATOR = """
from accelerate import PartialState
from accelerate.utils import DistributedType
init = PartialState.__init__
def pretend(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = pretend
"""
ONE_DIES = """
import os, signal
from m2m_hf.storage.journal import Journal
extend = Journal.extend
def die(self, trials):
    found = extend(self, trials)
    if len(self.trials) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Journal.extend = die
"""
STOPS = """
import json, os, sys
from pathlib import Path
from m2m_hf import MergeToMixSearcher, SearchCallback

class Stop(SearchCallback):
    told = []
    def on_trial(self, trial, recalled, control):
        self.told.append(trial.key)
        control.should_stop |= os.environ["RANK"] == "1" or len(self.told) == 6

result = MergeToMixSearcher.from_yaml(sys.argv[2]).search(callbacks=[Stop()])
found = {"told": Stop.told, "ended": result.ended, "best": result.best.mixture.names, "score": result.best.score.value}
Path(__file__).with_name(os.environ["RANK"] + ".json").write_text(json.dumps(found))
"""

RUN = "\nimport sys\nfrom m2m_hf.cli.main import main\nsys.exit(main(['select', *sys.argv[1:]]))\n"


@pytest.fixture
def launch_forks(forks):
    """A script under accelerate, in two processes over gloo, which have everything imported already; it must end well."""

    def launch_forks(project: Path, output: Path, *flags: str, **options) -> str:
        done = forks.run("-c", LAUNCH, *arguments(project, output, *flags, **options))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return launch_forks


def assert_same_scores(one: list[dict], two: list[dict]) -> None:
    assert [line["key"] for line in one] == [line["key"] for line in two]
    for left, right in zip(one, two, strict=True):
        assert left["logprobs"] == pytest.approx(right["logprobs"], abs=2e-5)


def test_two_processes_give_the_journal_of_one(project, reward_model, tmp_path, launch_forks):
    """Two gloo processes share the scoring; the adapters are the same ones, so only rounding may differ."""
    several_targets(project, reward_model, 10)
    assert m2m("search", "--config", project / "run.yaml") == 0
    (tmp_path / "two").mkdir()
    os.rename(project / "out" / "adapters", tmp_path / "two" / "adapters")
    printed = launch_forks(project, tmp_path / "two", "--train_final", "false")
    assert printed.count("scored 32 trials on 4 targets") == 1  # one process speaks
    one, two = trials(project / "out"), trials(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert left["values"] == pytest.approx(right["values"], abs=2e-5)
    assert_same_scores(one, two)
    counts = [json.loads((out / "cut_off.json").read_text()) for out in (project / "out", tmp_path / "two")]
    assert counts[0] == counts[1]


def test_two_processes_keep_rows_as_far_apart_as_one(project, tokenizer, tmp_path, launch_forks):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    GPTNeoForCausalLM(GPTNeoConfig(**shape, **ids, window_size=8)).save_pretrained(tmp_path / "gpt_neo")
    tokenizer.save_pretrained(tmp_path / "gpt_neo")
    changed(project, "run", model_name_or_path=str(tmp_path / "gpt_neo"))
    assert m2m("search", "--config", project / "run.yaml") == 0
    (tmp_path / "two").mkdir()
    os.rename(project / "out" / "adapters", tmp_path / "two" / "adapters")
    launch_forks(project, tmp_path / "two", "--train_final", "false")
    assert_same_scores(trials(project / "out"), trials(tmp_path / "two"))


def same_weights(project: Path, launch_forks, tmp_path: Path, file: str, flags: tuple, options: tuple) -> str:
    """Trains data-parallel, and with the model cut into pieces (FSDP), and compares the weights in `file`."""
    said = launch_forks(project, tmp_path / "whole", *flags)
    script = tmp_path / "pieces.py"
    script.write_text(ON_AN_ACCELERATOR + RUN)
    options = ("--mixed_precision", "no", *options)
    launch_forks(project, tmp_path / "pieces", *flags, script=script, config="fsdp2", options=options)
    for name in ("alpha", "gamma"):
        whole, pieces = (load_file(tmp_path / run / "adapters" / name / file) for run in ("whole", "pieces"))
        torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=0)
    return said


def uniform(out: Path) -> dict:
    return json.loads((out / "adapters" / "alpha" / "training.json").read_text())["uniform"]


def test_whole_models_and_models_in_pieces_learn_the_same(project, tmp_path, capsys, launch_forks):
    """Data-parallel training, the same with the model cut into pieces (FSDP), and one process that finds all of it done.

    Whole models train side by side, those in pieces one after another. The choice is verified, so that mixtures are fine-tuned
    and compared by several processes too.
    """
    changed(project, "run", gradient_accumulation_steps=2, parallel_adapters=3)
    said = same_weights(project, launch_forks, tmp_path, "adapter_model.safetensors", ("--fine_tunes", "2"), ())
    assert "one after another" not in said
    assert uniform(tmp_path / "whole")["processes"] == 2
    assert uniform(tmp_path / "pieces")["sharded"]
    final = [load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "pieces")]
    torch.testing.assert_close(*final, atol=1e-6, rtol=0)
    # What two processes fine-tuned to verify a choice one process finds done; it trains none itself.
    for run in ("whole", "pieces"):
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert summary["verified"]["baselines"]["all"]["test"]["score"] is not None
        flags = ("--config", project / "run.yaml", "--output_dir", tmp_path / run, "--fine_tunes")
        assert m2m("select", *flags, 2) == 0
        assert "nothing to do" in capsys.readouterr().out
        assert json.loads((tmp_path / run / "summary.json").read_text()) == summary
    assert m2m("select", *flags, 7) == 2
    assert "processes (2 there, 1 now)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_classifiers_of_two_processes_are_those_of_one(intents, tmp_path, launch_forks, kind):
    """Trained by two processes they are scored by one, and by two, to the same journal."""
    os.rename(intents / "intents.yaml", intents / "run.yaml")
    flags = ("--expert", kind, "--learning_rate", "1e-3")
    launch_forks(intents, tmp_path / "two", *flags)
    os.rename(tmp_path / "two" / "trials.jsonl", tmp_path / "trials.jsonl")
    assert m2m("search", "--config", intents / "run.yaml", "--output_dir", tmp_path / "two", *flags) == 0
    one, two = trials(tmp_path / "two"), trials(tmp_path)
    assert len(one) == 8
    assert_same_scores(one, [line for line in two if line["objective"] == "merged"][:8])


def test_full_experts_of_models_in_pieces_are_those_of_whole_ones(project, tmp_path, launch_forks):
    flags = ("--expert", "full", "--learning_rate", "1e-3", "--train_final", "false", "--trained_parameters", "layers")
    options = ("--fsdp_activation_checkpointing", "true")  # which renames what is inside of layers
    same_weights(project, launch_forks, tmp_path, "delta.safetensors", flags, options)
    assert uniform(tmp_path / "pieces")["sharded"]
    assert uniform(tmp_path / "pieces")["expert"] == "full"


def test_a_process_that_dies_ends_the_job_with_a_message_and_nothing_lost(project, tmp_path, forks):
    (tmp_path / "dies.py").write_text(ONE_DIES + RUN)
    flags = arguments(project, project / "out", "--tokens_per_batch", "100", script=tmp_path / "dies.py")
    done = forks.run("-c", LAUNCH, *flags)
    assert done.returncode != 0
    assert "lost another process" in done.stderr or "another process has died" in done.stderr
    assert "the same command continues from there" in done.stderr
    kept = trials(project / "out")
    assert len(kept) >= 3
    assert m2m("select", "--config", project / "run.yaml", "--tokens_per_batch", "100") == 0
    assert trials(project / "out")[: len(kept)] == kept
    assert len(trials(project / "out")) == 8


def test_a_callback_stops_both_processes_alike_and_the_search_goes_on_from_there(project, tmp_path, launch_forks):
    """The callback of the main process decides, after six mixtures; that of the other asks from the first one on."""
    changed(project, "run", tokens_per_batch=100)
    (tmp_path / "stops.py").write_text(STOPS)
    launch_forks(project, project / "out", script=tmp_path / "stops.py")
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main == other
    assert main["ended"] == "callback"
    kept = trials(project / "out")
    assert [line["key"] for line in kept] == main["told"]
    assert [line["state"] for line in kept] == ["complete"] * 6
    assert m2m("search", "--config", project / "run.yaml") == 0
    whole = trials(project / "out")
    assert whole[:6] == kept
    assert len({line["key"] for line in whole}) == len(whole) == 8
