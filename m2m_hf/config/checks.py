"""Names, paths and keys of a configuration, checked."""

import difflib
import enum
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m2m_hf.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


BUILDERS = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder")


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """Names the key that is not known and the one that was probably meant."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    listed = (
        f"expected one of: {', '.join(sorted(known))}"
        if len(known) < 30
        else "`m2m select --help` tells which there are"
    )
    hint = f"did you mean {near[0]!r}?" if near else listed
    return f"{where}: unknown key {key!r}; {hint}"


def check_name(name: Any, what: str) -> str:
    """A name that is safe as a folder name; anything else is refused."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"{what} name {name!r} is not allowed: use 1 to 64 letters, digits, '_', '-' and single '.', "
            "starting with a letter or digit"
        )
    return name


def names_of_labels(given: Any) -> dict[str, str] | None:
    """Label -> what stands for it, of a list or a mapping."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else zip(given, given, strict=True)
    return {str(label): str(word) for label, word in pairs}


def plain(value: Any) -> Any:
    """`value` as YAML can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def resolve_existing(path: str, folder: Path) -> str:
    """`path` made absolute where it exists, seen from `folder` or from the working directory; otherwise as it is.

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
    """Whether there is a file or folder; there is none under a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    return exists(path) and path.is_file()


def absolute(path: str, folder: Path) -> str:
    """`path` seen from `folder`, without `..`; links stay as they are."""
    return os.path.normpath(folder.absolute() / path)
