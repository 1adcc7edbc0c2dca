"""Benchmarks by name: what `benchmark:` stands for in an entry of `targets:`.

A preset is a file of `benchmarks/`: a target as a configuration has it, and a `description`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_hf.config.yaml_files import load_yaml
from m2m_hf.errors import InputError

FOLDER = Path(__file__).parent / "benchmarks"
SHAPING = ("columns", "template")  # what stays of a preset's rows where they come from elsewhere


def names() -> list[str]:
    """All presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def text_of(name: Any, where: str) -> str:
    """The YAML of a preset; refuses an unknown name with those that are near."""
    if name not in names():
        near = [one for one in names() if name and str(name) in one] or difflib.get_close_matches(str(name), names())
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(names())}"
        raise InputError(f"{where}: unknown benchmark {name!r}; {hint} m2m targets lists them")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def preset(name: Any, where: str = "benchmark") -> dict[str, Any]:
    """A preset as a mapping."""
    made: dict[str, Any] = load_yaml(text_of(name, where))
    return made


def resolve(entry: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """An entry of `targets:` with what its `benchmark` stands for, over which all that stands beside it goes.

    Rows are merged key by key. Of rows from another `path` the preset only says how they are shaped; of another scorer, only
    which rows it scores.
    """
    if "benchmark" not in entry:
        return entry
    given = {key: value for key, value in entry.items() if key != "benchmark"}
    made = {
        key: value for key, value in preset(entry["benchmark"], f"{where}.benchmark").items() if key != "description"
    }
    if given.get("scorer", made["scorer"]) != made["scorer"]:
        made = {key: made[key] for key in ("data", "test_data")}
    for key, value in given.items():
        rows = made.get(key)
        if isinstance(value, Mapping) and isinstance(rows, Mapping) and key != "labels":
            value = {**(rows if value.get("path") is None else {k: rows[k] for k in SHAPING if k in rows}), **value}
        made[key] = value
    return made
