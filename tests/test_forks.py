"""Forks end as new processes do, and leave nothing behind (`forks.py`)."""

import pytest


@pytest.mark.parametrize(
    ("code", "expected", "out", "err"),
    [
        ("import sys; print(sys.argv[1:]); print('b', file=sys.stderr)", 0, "['x', '1']\n", "b\n"),
        ("import sys; sys.exit(3)", 3, "", ""),
        ("import sys; sys.exit('no')", 1, "", "no\n"),
        ("import atexit; atexit.register(print, 'last')", 0, "last\n", ""),
        ("import os; os.write(1, b'raw'); os.kill(os.getpid(), 9)", -9, "raw", ""),
        ("import os; print(os.environ['MINE'], os.read(0, 9))", 0, "here b''\n", ""),
    ],
)
def test_a_fork_ends_as_a_process_does(forks, code, expected, out, err):
    done = forks.run("-c", code, "x", 1, MINE="here")
    assert (done.returncode, done.stdout, done.stderr) == (expected, out, err)


def test_a_fork_does_not_see_what_another_changed(forks, tmp_path, monkeypatch):
    done = forks.run("-c", "import json, os; json.mine = 1; os.environ['MINE'] = 'x'; raise ValueError('odd')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: odd\n")
    monkeypatch.chdir(tmp_path)
    code = (
        "import json, os, sys\n"
        "print(hasattr(json, 'mine'), 'MINE' in os.environ, os.getcwd(), {'torch', 'm2m_hf'} & {*sys.modules})"
    )
    assert forks.run("-c", code).stdout == f"False False {tmp_path} {{'torch'}}\n"


def test_scripts_and_modules_run_as_python_runs_them(forks, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    code = "import sys\nfrom beside import VALUE\nif __name__ == '__main__': print(VALUE, sys.argv)\n"
    (tmp_path / "script.py").write_text(code)
    said = f"5 ['{tmp_path}/script.py', 'x']\n"
    assert forks.run(tmp_path / "script.py", "x").stdout == said
    monkeypatch.chdir(tmp_path)
    assert forks.run("-m", "script", "x").stdout == said
