"""Whole runs through the command line, on a pico model."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from peft import PeftModel
from pico import USE_CPU, candidate_rows, changed, choice_rows, m2m, trials, write_rows
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from m2m_hf import InputError, MergeToMixConfig, MergeToMixSearcher
from m2m_hf.cli.exits import report_errors
from m2m_hf.console import Terminal
from m2m_hf.errors import StoppedError
from m2m_hf.merging.gated_stack import GatedStack


def files(folder: Path) -> dict[str, int]:
    """Relative path -> time of last change, but for the log and the lock."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock")
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_select_from_beginning_to_end_and_again_without_doing_anything(project, capsys, monkeypatch):
    assert m2m("select", "--config", project / "run.yaml") == 0
    out = project / "out"
    printed = capsys.readouterr()
    assert printed.err == ""
    words = "base model|alpha|all 3, merged|chosen: |Shapley value|final model|±|recipe: trl sft --config"
    for word in words.split("|"):
        assert word in printed.out
    expected = set("config.yaml trials.jsonl recipe.yaml summary.json log.txt adapters mixture final".split())
    assert expected <= {path.name for path in out.iterdir()}

    summary = read(out / "summary.json")
    assert set("best base all best_single top targets final counts costs".split()) <= set(summary)
    assert set(summary["best"]) == {"mixture", "score", "stderr"}
    assert summary["counts"] == {"candidates": 3, "trials": 8, "pruned": 0, "failed": 0}
    assert summary["costs"]["adapter_steps"] == 9
    assert summary["costs"]["example_evaluations"] == 80
    assert {"validation", "test"} <= set(summary["final"])
    assert summary["best"]["score"] == max(trial["score"] for trial in summary["top"])

    journal = load_dataset("json", data_files=str(out / "trials.jsonl"), split="train")
    assert len(journal) == 8
    assert all(len(values) == 10 for values in journal["values"])
    chosen = [row for name in summary["best"]["mixture"] for row in candidate_rows(name)]
    assert len(load_dataset("json", data_files=str(out / "mixture" / "train.jsonl"), split="train")) == len(chosen)
    base = AutoModelForCausalLM.from_pretrained(yaml.safe_load((out / "recipe.yaml").read_text())["model_name_or_path"])
    PeftModel.from_pretrained(base, out / "final")

    before = files(out)
    monkeypatch.setattr("m2m_hf.run.base_model.load_base", lambda *args: pytest.fail("the model was loaded"))
    for config in (project / "run.yaml", out / "config.yaml"):
        assert m2m("select", "--config", config) == 0
        assert "nothing to do" in capsys.readouterr().out
        unchanged = {name for name, time in files(out).items() if before.get(name) == time}
        assert {"trials.jsonl", "final/adapter_model.safetensors"} <= unchanged


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_interrupted_search_goes_on(project, tmp_path, capsys, monkeypatch, stop):
    command = ("search", "--config", project / "run.yaml", "--tokens_per_batch", 100)  # mixtures one by one
    assert m2m(*command, "--output_dir", tmp_path / "reference") == 0
    real, count = GatedStack.set, 0

    def interrupting(self, weights):
        nonlocal count
        if weights and count == stop:
            raise KeyboardInterrupt
        count += bool(weights)
        real(self, weights)

    out = project / "out"
    with monkeypatch.context() as patch:
        patch.setattr(GatedStack, "set", interrupting)
        assert m2m(*command) == 130
    kept = f"interrupted: 3 adapters and {stop + 1} scored trials are safe in {os.path.relpath(out)}"
    assert f"{kept}; the same command continues" in capsys.readouterr().out
    written = trials(out)
    assert len(written) == stop + 1
    assert m2m(*command) == 0
    assert f"scored {7 - stop} mixtures" in capsys.readouterr().out
    assert trials(out)[: stop + 1] == written
    whole = [line | {"seconds": 0} for line in trials(tmp_path / "reference")]
    assert [line | {"seconds": 0} for line in trials(out)] == whole


def test_search_then_sft_is_select(project, tmp_path, capsys):
    out = project / "out"
    assert m2m("select", "--config", project / "run.yaml", "--output_dir", tmp_path / "whole") == 0
    assert m2m("adapters", "--config", project / "run.yaml") == 0
    assert not (out / "trials.jsonl").exists()
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert read(out / "summary.json")["final"] is None
    assert f"next: m2m sft {os.path.relpath(out)}" in capsys.readouterr().out
    assert m2m("sft", out) == 0
    whole = read(tmp_path / "whole" / "summary.json")
    assert read(out / "summary.json") | {"costs": None} == whole | {"costs": None}


@pytest.mark.cpu_only("compares bytes or last digits with a forked process, which stays on the CPU")
def test_the_recipe_trains_the_same_with_trl_alone(project, tmp_path, forks):
    assert m2m("select", "--config", project / "run.yaml", "--lora_dropout", "0.1") == 0
    recipe = project / "out" / "recipe.yaml"
    assert "m2m" not in "".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("#"))
    ours = read(project / "out" / "final" / "training.json")["loss"]
    code = (
        "import sys; assert 'm2m_hf' not in sys.modules; sys.modules['m2m_hf'] = None\n"
        "from trl.scripts.sft import make_parser\n"
        "from trl.trainer.sft_trainer import SFTTrainer\n"
        "import trl.scripts.sft as sft\n"
        "train = SFTTrainer.train\n"
        "def spy(self, *a, **k):\n"
        "    out = train(self, *a, **k); print('LOSS', repr(out.training_loss)); return out\n"
        "SFTTrainer.train = spy\n"
        "sft.main(*make_parser().parse_args_and_config(fail_with_unknown_args=True))\n"
    )
    done = forks.run("-c", code, "--config", recipe, "--output_dir", tmp_path / "trl")
    assert done.returncode == 0, done.stderr
    theirs = float(next(line for line in done.stdout.splitlines() if line.startswith("LOSS")).split()[1])
    assert round(theirs, 6) == ours


def test_final_overrides_and_loss_scorer(project):
    rows = [{"prompt": row["prompt"], "completion": row["choices"][0]} for row in choice_rows()]
    write_rows(project / "loss.jsonl", rows)
    target = {"data": {"path": "json", "data_files": "loss.jsonl"}, "scorer": "loss"}
    changed(project, "run", targets={"t": target}, final={"max_steps": 5, "lora_r": 2})
    assert m2m("select", "--config", project / "run.yaml") == 0
    summary = read(project / "out" / "summary.json")
    assert summary["final"]["steps"] == 5
    assert summary["costs"]["compare_seconds"] == 0  # the final model was not made to be compared
    assert summary["final"]["test"] is None
    assert summary["best"]["score"] < 0
    assert read(project / "out" / "final" / "adapter_config.json")["r"] == 2
    recipe = yaml.safe_load((project / "out" / "recipe.yaml").read_text())
    assert (recipe["max_steps"], recipe["lora_r"]) == (5, 2)


def test_conversations(project):
    for name in ("alpha", "beta"):
        turns = [((row["prompt"], "user"), (row["completion"].strip(), "assistant")) for row in candidate_rows(name)]
        rows = [{"messages": [{"role": role, "content": text} for text, role in pair]} for pair in turns]
        write_rows(project / f"{name}.jsonl", rows)
    candidates = {name: {"path": "json", "data_files": f"{name}.jsonl"} for name in ("alpha", "beta")}
    changed(project, "run", candidates=candidates)
    assert m2m("select", "--config", project / "run.yaml") == 0
    flags = ("--assistant_only_loss", "true", "--output_dir", project / "all turns")
    assert m2m("select", "--config", project / "run.yaml", *flags) == 0
    rows = (project / "all turns" / "mixture" / "train.jsonl").read_text().splitlines()
    assert list(json.loads(rows[0])) == ["messages"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {"a": {"path": "json", "data_files": "none.jsonl"}}}, "candidates.a: nothing found"),
        ({"candidates": {"a": {"path": "json", "data_files": "validation.jsonl"}}}, "column 'completion' missing"),
        ({"use_dora": True}, "use_dora=True cannot be averaged"),
        ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] cannot be averaged"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: it would stop training midway"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: adapters must be trained with the same batch size"),
        ({"ignore_data_skip": True}, "ignore_data_skip: a resumed training would see other rows"),
        ({"final": {"lora_rr": 1}}, "final: unknown key 'lora_rr'"),
        ({"final": {"use_dora": True}}, "cannot be averaged"),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(project, capsys, change, message):
    changed(project, "run", **change)
    assert m2m("select", "--config", project / "run.yaml") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("m2m: ")
    assert message in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert not (project / "out").exists()


def test_questions_of_the_target_in_a_candidate(project, capsys):
    rows = [{"prompt": row["prompt"].upper(), "completion": " red"} for row in choice_rows(2)]
    write_rows(project / "beta.jsonl", [*candidate_rows("beta"), *rows])
    assert m2m("search", "--config", project / "run.yaml") == 2
    assert "are also in beta (2)" in capsys.readouterr().err
    assert m2m("search", "--config", project / "run.yaml", "--allow_overlap", "true") == 0


def test_a_changed_configuration_is_refused_unless_it_only_adds(project, capsys):
    config = yaml.safe_load((project / "run.yaml").read_text())
    gamma = config["candidates"].pop("gamma")
    test_data = config["targets"]["colours"].pop("test_data")
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    assert m2m("search", "--config", project / "run.yaml") == 0
    before = files(project / "out")
    for flags, word in (
        (("--learning_rate", "0.5"), "learning_rate (0.01 there, 0.5 now)"),
        (("--seed", "1"), "seed"),
        (("--attn_implementation", "eager"), "was made with another one (None there, eager now)"),
    ):
        assert m2m("search", "--config", project / "run.yaml", *flags) == 2
        assert word in capsys.readouterr().err
    assert files(project / "out") == before
    config["candidates"]["gamma"] = gamma
    config["targets"]["colours"]["test_data"] = test_data
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    assert m2m("search", "--config", project / "run.yaml", "--dataloader_num_workers", "0", "--logging_steps", "2") == 0
    assert "scored 4 mixtures" in capsys.readouterr().out


def test_a_start_that_made_nothing_does_not_bind(project, capsys):
    run = project / "run.yaml"
    assert m2m("search", "--config", run, "--learning_rate", "1e38", "--max_grad_norm", "0") == 2
    assert "diverged" in capsys.readouterr().err
    assert m2m("search", "--config", run) == 0


def test_a_model_without_a_pad_token_is_finished_once(project, tmp_path, pico, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(pico, bare)
    settings = read(bare / "tokenizer_config.json")
    del settings["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    for _ in range(2):
        assert m2m("select", "--config", project / "run.yaml", "--model_name_or_path", bare) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_target_that_is_scored_otherwise_is_refused_by_the_field(finished, capsys):
    text = (finished / "run.yaml").read_text()
    (finished / "run.yaml").write_text(text.replace("scorer: choice", "scorer: choice\n    metric: logprob"))
    assert m2m("search", "--config", finished / "run.yaml") == 2
    assert "metric ('accuracy' there, 'logprob' now)). Restore it, or give" in capsys.readouterr().err


def test_another_final_model_leaves_the_old_one(finished, capsys):
    final = finished / "out" / "final"
    old = read(final / "training.json")
    changed(finished, "run", final={"max_steps": 2})
    assert m2m("select", "--config", finished / "run.yaml") == 0
    aside = final.with_name(f"final.{old['fingerprint']}")
    assert read(aside / "training.json") == old
    assert read(final / "training.json")["steps"] == 2
    assert f"is now {os.path.relpath(aside)}" in capsys.readouterr().out


def test_python_objects_in_memory(project, pico):
    """Datasets and configurations made in Python, without any file; what TRL would take and this cannot do is refused."""
    candidates = {name: Dataset.from_list(candidate_rows(name)) for name in ("alpha", "beta")}
    targets = {"colours": {"data": Dataset.from_list(choice_rows()), "scorer": "choice"}}
    config = MergeToMixConfig(candidates=candidates, targets=targets)
    args = SFTConfig(
        output_dir=str(project / "memory"), max_steps=2, use_cpu=USE_CPU, bf16=False, activation_checkpointing=False
    )
    model_args = ModelConfig(model_name_or_path=str(pico), lora_target_modules=["q_proj", "v_proj"])
    searcher = MergeToMixSearcher(config, args, model_args, terminal=Terminal(quiet=True))
    summary = searcher.train_final()
    assert summary["counts"]["trials"] == 4
    assert summary["best"]["mixture"] == searcher.search().best.mixture.weights
    again = MergeToMixSearcher(config, args, model_args, terminal=Terminal(quiet=True))
    assert again.search().measured == 0
    assert MergeToMixSearcher.from_yaml(project / "run.yaml", seed=3).run.args.seed == 3
    with pytest.raises(InputError, match="push_to_hub: expected hub_model_id: org/name"):
        MergeToMixSearcher(
            config, SFTConfig(args.output_dir, use_cpu=USE_CPU, bf16=False, push_to_hub=True), model_args
        )
    with pytest.raises(InputError, match="model_name_or_path is missing"):
        MergeToMixSearcher(config, args, ModelConfig())


@pytest.mark.parametrize("place", ["journal", "adapters"])
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(project, capsys, monkeypatch, place):
    real = os.fsync
    left = 12 if place == "journal" else 1

    def full(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert m2m("search", "--config", project / "run.yaml") == 1
    told = capsys.readouterr().err
    assert told.startswith("m2m: the disk is full: ")
    assert "Traceback" not in told
    assert m2m("search", "--config", project / "run.yaml") == 0


def test_what_only_one_of_several_processes_knows_is_said(monkeypatch, capsys):
    """Where all have met the same error the launcher ends all but the first, before they have said it too."""

    def work():
        raise InputError("odd rows")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("m2m_hf.cli.exits.PATIENCE", 0.1)
    assert report_errors(work) == 2
    assert capsys.readouterr().err == "m2m: process 1 of 2: odd rows\n"
    monkeypatch.setattr("m2m_hf.cli.exits.PATIENCE", 30)
    before = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert report_errors(work) == 2
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not capsys.readouterr().err


def test_what_outside_ended_is_said_with_what_is_safe(capsys):
    def work():
        raise StoppedError("a command was stopped by SIGTERM from outside")

    assert report_errors(work) == 1
    told = capsys.readouterr().err
    assert told.startswith("m2m: a command was stopped by SIGTERM from outside\n")
    assert "the same command continues from there" in told


@pytest.mark.cpu_only("compares bytes or last digits with a forked process, which stays on the CPU")
def test_the_same_seed_gives_the_same_bytes(project, tmp_path, forks):
    """In another process, whose sets have their elements in another order (`served`)."""
    code = "import sys; from m2m_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command, one, other = ("select", "--config", project / "run.yaml", "--output_dir"), tmp_path / "1", tmp_path / "2"
    assert m2m(*command, one) == 0
    done = forks.run("-c", code, *command, other)
    assert done.returncode == 0, done.stderr
    compared = [path.relative_to(one) for path in one.glob("adapters/*/*") if path.name != "training.json"]
    assert len(compared) >= 9
    for name in (*compared, Path("recipe.yaml"), Path("mixture/train.jsonl")):
        assert (one / name).read_bytes().replace(b"/1/", b"/2/") == (other / name).read_bytes(), name
    ours, theirs = ([line | {"seconds": 0} for line in trials(out)] for out in (one, other))
    assert ours == theirs
