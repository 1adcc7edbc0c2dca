"""Several processes and machines by `m2m` itself, and what ships beside the package, by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pico import LAUNCH, arguments, m2m, trials

from m2m_hf.cli.launch import find, names, relaunched
from m2m_hf.cli.main import main
from m2m_hf.config.parsing import parse
from m2m_hf.errors import InputError
from m2m_hf.run.checks import check_machines, has_content
from m2m_hf.searcher import MergeToMixSearcher

ROOT = Path(__file__).parents[2]
SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"
SRUN = """#!/bin/bash
shift # --kill-on-bad-exit
for node in $(seq 1 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & done
SLURM_NODEID=0 "$@"
code=$?
wait
exit $code
"""


@pytest.mark.cpu_only("processes over gloo")
def test_two_machines_give_the_result_of_one(project, tmp_path, forks):
    """The Slurm recipe with a launcher for each of two machines, on loopback, against one launcher of two processes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    told = {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(os.getpid())}
    paths = {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(ROOT / "recipes" / "slurm.sh"), "--config", str(project / "run.yaml"), "--accelerate_config", "cpu_2proc"],
        capture_output=True, text=True, env=os.environ | told | paths, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scored 8 mixtures") == 1  # one process of one machine speaks
    one = forks.run("-c", LAUNCH, *arguments(project, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    here, there = project / "out", tmp_path / "one"
    for name in ("adapters/alpha", "adapters/beta", "adapters/gamma", "final"):
        weights = f"{name}/adapter_model.safetensors"
        assert (here / weights).read_bytes() == (there / weights).read_bytes(), name
    first, second = ([line | {"seconds": 0} for line in trials(folder)] for folder in (here, there))
    assert first == second


def test_a_machine_with_another_folder_or_other_rows_is_refused(project, monkeypatch):
    here = MergeToMixSearcher(*parse(project / "run.yaml"))
    here.prepare()
    monkeypatch.setattr("m2m_hf.run.checks.has_content", lambda path, content: has_content(path, content, 0))
    monkeypatch.setattr("m2m_hf.run.checks.broadcast", lambda value: ["another configuration", value[1]])
    with pytest.raises(InputError, match="use a shared file system"):
        check_machines(here.run)
    for what, name, value in (
        ("configuration", "learning_rate", 0.5),
        ("settings", "base_model", "other"),
        ("candidates", "beta", "other"),
        ("targets", "colours", {}),
    ):

        def other(mine, what=what, name=name, value=value):
            return [mine[0], mine[1] | {what: mine[1][what] | {name: value}}]

        monkeypatch.setattr("m2m_hf.run.checks.broadcast", other)
        with pytest.raises(InputError, match=f"{what}: .* differs from the first process: {name} "):
            check_machines(here.run)
    monkeypatch.setattr("m2m_hf.run.checks.broadcast", lambda value: value)
    check_machines(here.run)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("multi_gpu --num_machines 2 --machine_rank=1", "--num_processes 8 --num_machines 2 --machine_rank 1"),
        ("cpu_2proc", "--main_process_port 0"),
        ("multi_gpu --num_processes 3", "--num_processes 3 --main_process_port 0"),
        ("mine.yaml", ""),  # a file of one's own is complete by itself
    ],
)
def test_the_command_of_accelerate(monkeypatch, tmp_path, given, told):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("num_machines: 2\nnum_processes: 16\nmain_process_port: 29500\n")
    name, *flags = given.split()
    command = relaunched(["select", "--accelerate_config", name, "--config", "x.yaml", *flags, "--seed", "1"])
    config = name if name == "mine.yaml" else str(ROOT / f"accelerate_configs/{name}.yaml")
    assert command[1:5] == ["-m", "accelerate.commands.launch", "--config_file", config]
    ours = "--module m2m_hf.cli.main select --config x.yaml --seed 1"
    assert command[5:] == [*told.split(), *ours.split()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--accelerate_config", "multi_gpus"], "multi_gpus: expected one of cpu, cpu_2proc, fsdp2, multi_gpu"),
        (["--accelerate_config", "cpu", "--num_processes"], "--num_processes: expected one argument"),
        (["--accelerate_config", "cpu", "--num_machines=a"], "--num_machines: invalid int value: 'a'"),
    ],
)
def test_an_unknown_configuration_or_a_missing_value_is_refused(project, capsys, flags, words):
    assert main(["select", "--config", str(project / "run.yaml"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (project / "out").exists()


def test_recipes_are_listed_and_found_by_name(capsys):
    assert main(["recipe"]) == 0
    printed = capsys.readouterr().out
    for name in ("demo", "demo/data", "gpu_check", "slurm"):
        assert f"  {name} " in printed
    assert "#!" not in printed
    assert "support" not in printed
    assert main(["recipe", "demo"]) == 0
    given = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    shown = yaml.safe_load(capsys.readouterr().out)  # for the folder in which it is put
    assert shown["model_name_or_path"] == given["model_name_or_path"].removeprefix("../")
    assert shown["candidates"].keys() == given["candidates"].keys()
    assert main(["recipe", "demos"]) == 2
    assert "demos: expected one of ablate_uniformity," in capsys.readouterr().err
    assert set(names("accelerate_configs", ".yaml")) == {*"cpu cpu_2proc fsdp2 multi_gpu single_gpu zero3".split()}
    assert find("accelerate_configs", "zero3.yaml", ".yaml").name == "zero3.yaml"


def test_a_recipe_that_is_a_script_runs(tmp_path):
    command = [sys.executable, "-m", "m2m_hf.cli.main", "recipe", "demo/data", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "opposites.jsonl").exists()


@pytest.mark.parametrize("words", [["--dry_run"], ["--dry_run", "true"], ["--seed", "3", "--dry_run", "True"]])
def test_the_configuration_may_be_the_first_word(project, capsys, words):
    assert m2m("select", project / "run.yaml", *words) == 0
    assert "candidates (text format)" in capsys.readouterr().out
    assert not (project / "out").exists()


def test_dry_run_false_works(project):
    assert m2m("adapters", project / "run.yaml", "--max_steps", "1") == 0
    assert m2m("select", project / "run.yaml", "--max_steps", "1", "--train_final", "false", "--dry_run", "false") == 0
    assert (project / "out" / "recipe.yaml").exists()


def test_two_configurations_are_refused(project, capsys):
    assert m2m("select", "other.yaml", "--config", project / "run.yaml", "--dry_run") == 2
    assert "unrecognised arguments: other.yaml" in capsys.readouterr().err


def test_a_dry_run_that_is_neither_is_refused(project, capsys):
    with pytest.raises(SystemExit, match="2"):
        m2m("select", project / "run.yaml", "--dry_run", "maybe")
    assert "expected true or false, got 'maybe'" in capsys.readouterr().err
