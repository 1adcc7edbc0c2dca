"""A handful of what `make crash` does: runs killed, files cut short (`crash.py`)."""

from pathlib import Path


def test_killed_runs_end_as_if_nothing_had_happened(forks):
    done = forks.run(Path(__file__).parent / "crash.py", "--kills", 5, "--files", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills in" in done.stdout
    assert "4 files cut short" in done.stdout
