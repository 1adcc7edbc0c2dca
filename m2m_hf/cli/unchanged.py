"""Recognises a finished `m2m select` whose inputs have not changed, without importing any library that is slow to import."""

import glob
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

import m2m_hf
from m2m_hf.config.candidates import DataConfig
from m2m_hf.config.checks import BUILDERS, exists
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.errors import SECRET_NAMES
from m2m_hf.storage.digests import NAME as DIGESTS
from m2m_hf.storage.digests import stamp
from m2m_hf.storage.files import fingerprint, read_json_or_empty, write_json
from m2m_hf.storage.run_folder import RunFolder

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "evaluate")
OPTIONAL_LIBRARIES = ("bitsandbytes",)
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate counts them
VARIABLES = re.compile("(ACCELERATE|CUDA|FSDP|HF|HIP|M2M|PYTORCH|ROCR|TORCH|TRANSFORMERS)_.*|PYTHONPATH|USE_.*")
MAX_FILES = 20_000  # of all inputs; looking at more takes longer than it saves
# What stands in a run folder and no result depends on.
BESIDE_RESULTS = {".lock", ".unchanged.json", DIGESTS, "log.txt", "export", "tensorboard", "trl"}
Stamps = dict[str, dict[str, list[int]]]


class Unwatchable(Exception):  # noqa: N818 - no error: it only means that the run has to be looked at in full
    """An input that may change without a trace on this disk."""


def command_fingerprint(config: Path, flags: Sequence[str]) -> str | None:
    """Fingerprint of a command, its environment and the code that carries it out; None if it cannot be repeated by it."""
    if any(os.environ.get(name, "1") != "1" for name in PROCESSES):
        return None  # all processes must go the same way
    environment = {
        name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name) and not SECRET_NAMES.search(name)
    }
    try:
        libraries = [version(name) for name in LIBRARIES]
        libraries += [version(name) for name in OPTIONAL_LIBRARIES if find_spec(name)]
        code = {str(path): stamp(path)[:2] for path in sorted(Path(m2m_hf.__path__[0]).rglob("*.py"))}
        text = config.read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    place = [str(config.absolute()), os.getcwd(), platform.node(), sys.version]
    return fingerprint([text, list(flags), place, environment, libraries, code])


def output_folder(config: Path, flags: Sequence[str]) -> Path | None:
    """The run folder that a command names; None if its YAML cannot be read."""
    folder: str | None = None
    words = iter(flags)
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--output_dir":
            folder = value or next(words, None)
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        folder = folder or content.get("output_dir") or f"runs/{config.stem}"
        return Path(folder).absolute()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None


def watch(config: MergeToMixConfig, settings: Mapping[str, Any], run: Path) -> Stamps | None:
    """Stamps of all local inputs; take them before the inputs are read. None if an input cannot be watched.

    Args:
        config: as it was given, before Hub ids are resolved.
        settings: TRL's fields.
        run: the run folder, which is no input.
    """
    try:
        for data in data_of(config):
            check_data(data, config.task)
        for target in config.parsed_targets.values():
            check_target(target)
        check_model(settings)
        places = {text for text in texts([config.to_yaml(), dict(settings)]) if is_place(text, run)}
        return {place: stamps_of(place, run) for place in sorted(places)}
    except (Unwatchable, OSError, ValueError):
        return None


def data_of(config: MergeToMixConfig) -> Iterator[DataConfig]:
    for candidate in config.parsed_candidates.values():
        yield candidate.data
    for target in config.parsed_targets.values():
        yield from (data for data in (target.data, target.test_data) if data is not None)


def is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) is not None


def check_data(data: DataConfig, task: str) -> None:
    """Refuses rows in memory, at addresses, from an unpinned dataset, or that name image files."""
    path, files = data.path, data.data_files or ()
    if not path:
        raise Unwatchable("rows in memory")
    local = path in BUILDERS or exists(Path(path))
    names_files = task == "image_classification" and path not in ("imagefolder", "parquet")
    elsewhere = any("://" in file or ".." in Path(file).parts for file in files)
    if (local and (names_files or elsewhere)) or not (local or is_commit(data.revision)):
        raise Unwatchable(path)


def check_target(target: TargetConfig) -> None:
    """Refuses the harness's tasks and metrics of the Hub, which may change there."""
    kind = SCORERS[target.kind]
    metric_of_hub = bool(kind.metrics) and target.metric not in kind.metrics and not exists(Path(target.metric))
    if metric_of_hub or not kind.watchable:
        raise Unwatchable(target.kind)


def check_model(settings: Mapping[str, Any]) -> None:
    """Refuses models of the Hub without a commit, chat templates of the Hub, and pushing."""
    model, template = Path(str(settings["model_name_or_path"])), settings.get("chat_template_path")
    unpinned = not exists(model) and not is_commit(settings.get("model_revision"))
    if unpinned or (template and not exists(Path(template))) or settings.get("push_to_hub"):
        raise Unwatchable(str(model))


def texts(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts(item)


def is_place(text: str, run: Path) -> bool:
    """True for a file, a folder or a pattern of files outside the run folder."""
    path = Path(text)
    return (exists(path) or (glob.has_magic(text) and path.is_absolute())) and not path.absolute().is_relative_to(run)


def stamps_of(place: str, run: Path) -> dict[str, list[int]]:
    """File -> stamp, of everything that a path or a pattern names.

    Raises:
        Unwatchable: these are too many files.
    """
    path = Path(place)
    found: Iterable[Path] = [path] if exists(path) else map(Path, glob.iglob(str(path), recursive=True))
    files = (file for one in found for file in files_in(one, run))
    stamps = {str(file): stamp(file) for file in islice(files, MAX_FILES + 1)}
    if len(stamps) > MAX_FILES:
        raise Unwatchable(place)
    return stamps


def files_in(path: Path, without: Path) -> Iterator[Path]:
    """A file, or the files in a folder and below."""
    if not path.is_dir():
        yield path
        return
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if Path(folder, name).absolute() != without]
        yield from (Path(folder, name) for name in files)


def results(run: Path) -> dict[str, list[int]]:
    """File -> stamp, of everything in a run folder that its result stands on."""
    there = [path for path in sorted(run.iterdir()) if path.name not in BESIDE_RESULTS]
    return {file.relative_to(run).as_posix(): stamp(file) for path in there for file in files_in(path, run)}


def remember(run: RunFolder, command: str, inputs: Stamps, closing: Sequence[Mapping[str, Any]]) -> None:
    """Writes down, at the end of a complete `select`, what it was made from and what it printed at its end.

    Where that is not possible nothing is lost: the same command looks at the run in full.
    """
    with suppress(OSError, ValueError):
        facts = {"command": command, "inputs": inputs, "results": results(run.root), "closing": list(closing)}
        write_json(run.unchanged, facts)


def recall(config: Path, flags: Sequence[str]) -> tuple[Path, list[dict[str, Any]]] | None:
    """(run folder, what its last `select` printed at the end) if the same command would find nothing to do."""
    root = output_folder(config, flags)
    known = read_json_or_empty(RunFolder(root).unchanged) if root else {}
    try:
        if not root or not known or known["command"] != command_fingerprint(config, flags):
            return None
        if known["results"] != results(root):
            return None
        if any(stamps_of(place, root) != stamps for place, stamps in known["inputs"].items()):
            return None
        return root, list(known["closing"])
    except (Unwatchable, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
