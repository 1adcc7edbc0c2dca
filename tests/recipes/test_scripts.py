"""Every recipe that is a script starts, wherever it lies and whatever it imports from `support/`."""

import pytest
from pico import ROOT

SCRIPTS = sorted(
    path.relative_to(ROOT / "recipes").as_posix()
    for path in (ROOT / "recipes").rglob("*.py")
    if path.parent.name != "support"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_shows_its_help(forks, name):
    done = forks.run(ROOT / "recipes" / name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
