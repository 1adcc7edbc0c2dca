"""Checks that all configurations share: fields with their rules, keys, names and paths."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from m2m_hf.core.jsonable import is_number
from m2m_hf.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
BUILDERS = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder")
SUFFIXES = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Rule(NamedTuple):
    """What a field accepts: in the words of an error message, and as a predicate."""

    expected: str
    accepts: Callable[[Any], bool]


def option(rule: Rule, default: Any = None, help: str = "") -> Any:
    """A field of a dataclass with its rule and its text for `--help`; `default` may be a factory, such as `dict`."""
    key = "default_factory" if callable(default) else "default"
    return field(**{key: default}, metadata={"rule": rule, "help": help})


def rules(config: type) -> dict[str, Rule]:
    """The rules of a dataclass made of options, by field."""
    return {item.name: item.metadata["rule"] for item in fields(config) if item.metadata}


def text(expected: str) -> Rule:
    return Rule(expected, is_text)


def mapping(expected: str, keys: type = object, values: Any = object) -> Rule:
    """A mapping whose keys and values are of these types."""
    return Rule(
        expected,
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(key, keys) and isinstance(item, values) for key, item in value.items())
        ),
    )


def integer(lowest: int) -> Rule:
    return Rule(
        f"an integer of at least {lowest}",
        lambda value: is_number(value) and isinstance(value, int) and value >= lowest,
    )


def number(lowest: float) -> Rule:
    return Rule(f"a number of at least {lowest}", lambda value: is_number(value) and value >= lowest)


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_text, value))


BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
POSITIVE = Rule("a number above 0", lambda value: is_number(value) and value > 0)
LABELS = Rule(
    "a list of at least two labels, or {label: words}",
    lambda value: (
        isinstance(value, (list, tuple, Mapping)) and not unquoted(value) and len(names_of_labels(value) or ()) >= 2
    ),
)


def check_fields(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Checks every value against the rule of its field."""
    for name, value in values.items():
        if not rules[name].accepts(value):
            place = f"{where}.{name}" if where else name
            raise InputError(f"{place}: expected {rules[name].expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value of a YAML as a message shows it."""
    if value is None:
        return "nothing; give a value or remove the key"
    return f"{value!r:.100}" + ("" if is_number(value) else unquoted(value))


def unquoted(value: Any) -> str:
    """What to do where YAML does not read a value, or one within it, as the word that stands there; nothing if all is text."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(unquoted, value)), "")
    if value is None or isinstance(value, bool | float | date):
        return f" ({value}: YAML reads yes, no, on, off, null, 1.10 and dates so; where the word is meant, quote it)"
    return ""


def read_entry(entry: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    """The values of a mapping in the YAML, checked; empty keys are left out."""
    for key in entry:
        if key not in rules:
            raise InputError(unknown_key_message(str(key), rules, where))
    values = {key: value for key, value in entry.items() if value is not None}
    check_fields(values, rules, where)
    return values


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """Names the unknown key and the one that was probably meant."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1)
    every = f"expected one of: {', '.join(known)}" if len(known) < 30 else "see `m2m select --help` for all keys"
    return f"{where}: unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else every}"


def check_name(name: Any, what: str) -> str:
    """Returns a name that is safe as a folder name, and refuses any other."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"{what} name {name!r} is not allowed: use 1 to 64 letters, digits, '_', '-' and single '.', "
            "starting with a letter or digit" + ("" if isinstance(name, str) else unquoted(name) or "; quote it")
        )
    return name


def names_of_labels(labels: Any) -> dict[str, str] | None:
    """Label -> words, from a list of labels or from such a mapping."""
    if labels is None:
        return None
    pairs = labels.items() if isinstance(labels, Mapping) else zip(labels, labels, strict=True)
    return {str(label): str(words) for label, words in pairs}


def resolve_existing(path: str, folder: Path) -> str:
    """The absolute path if it exists in `folder` or in the working directory, else `path` unchanged.

    A model or dataset is named by a local folder or by a Hub id, and both look alike.
    """
    if path in BUILDERS:
        return path
    for root in (folder, Path.cwd()):
        if exists(root / path):
            return absolute(path, root)
    if path.startswith((".", "/", "~")):
        return absolute(str(Path(path).expanduser()), folder)
    return path


def exists(path: Path) -> bool:
    """True for a file or folder; False also for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def absolute(path: str, folder: Path) -> str:
    """`path` seen from `folder`, without `..` and `~`; links stay as they are."""
    return os.path.normpath(folder.absolute() / os.path.expanduser(path))


def hub_field(name: str) -> bool:
    """True for fields of TRL that tell what goes to the Hub: `m2m push` does that, and a recipe must not repeat it."""
    return name == "push_to_hub" or name.startswith("hub_")
