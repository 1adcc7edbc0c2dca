"""Light commands start at once: they import no library that takes seconds to import."""

import os
import subprocess
import sys

import pytest
from pico import ROOT, m2m

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "evaluate", "accelerate", "bitsandbytes", "sklearn"}
CODE = f"""
import sys
from m2m_hf.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("imported:", *sorted({HEAVY!r} & set(sys.modules)))
sys.exit(code)
"""


@pytest.fixture
def light(monkeypatch, tmp_path):
    """Runs `m2m` in a process of its own, which must import nothing heavy; gives what it prints."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        command = [sys.executable, "-c", CODE, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stderr
        *lines, imported = done.stdout.splitlines(True)
        assert imported == "imported:\n"
        return "".join(lines)

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "m2m select   --config x.yaml"),
        (["select", "--help"], "tokens_per_batch"),
        (["--version"], "m2m_hf"),
        (["recipe"], "demo/data"),
        (["targets"], "generation: numeric_match"),
        (["status", "out"], "left: nothing"),
        (["status", "out", "--full"], "left: nothing"),
        (["report", "out"], "report: out/report.html"),
        (["export", "out", "--to", "trl"], "exported: out/export/trl"),
        (["export", "out", "--to", "jsonl"], "exported: out/export/jsonl"),
        (["compare", "out", "out"], "both chose the same mixture"),
        (["init", "--model", "a/b", "--data", "a=alpha.jsonl", "--target", "t=test.jsonl"], "written: m2m.yaml"),
    ],
)
def test_commands_on_a_finished_run_import_nothing_heavy(light, finished, arguments, words):
    assert words in light(*arguments)


def test_select_with_nothing_to_do_imports_nothing_heavy_and_prints_the_same(light, project, capsys):
    arguments = ("select", "--config", project / "run.yaml")
    for _ in range(2):
        assert m2m(*arguments, "--tokens_per_batch", 100) == 0
    slow = capsys.readouterr().out.split("colours: accuracy")[-1]
    assert m2m(*arguments) == 0
    capsys.readouterr()
    assert light(*arguments).split("colours: accuracy")[-1] == slow
    assert "nothing to do: out is complete" in slow


def test_every_module_imports_without_bitsandbytes_and_resource(forks):
    """As on Windows, and on machines without a GPU."""
    code = """
import importlib, pkgutil, sys
blocked = {name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"}
sys.modules |= dict.fromkeys({*blocked, "bitsandbytes", "resource"})
import m2m_hf
names = [module.name for module in pkgutil.walk_packages(m2m_hf.__path__, "m2m_hf.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60
