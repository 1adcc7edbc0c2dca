"""Recognises a finished `m2m select` whose inputs have not changed, without importing any library that is slow to import."""

import argparse
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
from m2m_hf.storage.files import DIGESTS, fingerprint, read_json_or_empty, stamp, write_json
from m2m_hf.storage.run_folder import RunFolder

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "evaluate")
OPTIONAL_LIBRARIES = ("bitsandbytes",)
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate counts them
VARIABLES = re.compile("(ACCELERATE|CUDA|FSDP|HF|HIP|M2M|PYTORCH|ROCR|TORCH|TRANSFORMERS)_.*|PYTHONPATH|USE_.*")
MAX_FILES = 20_000  # of all inputs; looking at more takes longer than it saves
# What stands in a run folder and no result depends on.
BESIDE_RESULTS = {".lock", ".unchanged.json", DIGESTS, "log.txt", "export", "tensorboard", "trl"}
Stamps = dict[str, dict[str, list[int]]]


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
        files = [path for path in sorted(Path(m2m_hf.__path__[0]).rglob("*.*")) if path.suffix in (".py", ".yaml")]
        code = {str(path): stamp(path)[:2] for path in files}
        text = config.read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    place = [str(config.absolute()), os.getcwd(), platform.node(), sys.version]
    return fingerprint([text, list(flags), place, environment, libraries, code])


def output_folder(config: Path, flags: Sequence[str]) -> Path:
    """The run folder that a command names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", "--output-dir")
    said, _ = parser.parse_known_args(list(flags))
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    return Path(said.output_dir or content.get("output_dir") or f"runs/{config.stem}").absolute()


def watch(config: MergeToMixConfig, settings: Mapping[str, Any], run: Path) -> Stamps | None:
    """Stamps of all local inputs but the run folder `run`; take them before the inputs are read.

    None if an input may change without a trace on this disk, or there are too many files. `config` and TRL's `settings` are as
    they were given, before Hub ids are resolved.
    """
    candidates, targets = config.parsed_candidates.values(), config.parsed_targets.values()
    data = [one.data for one in candidates] + [one for target in targets for one in target.parts.values()]
    if any(data_may_change(one, config.task) for one in data) or any(map(target_may_change, targets)):
        return None
    if model_may_change(settings):
        return None
    try:
        places = {text for text in texts([config.to_yaml(), dict(settings)]) if is_place(text, run)}
        return {place: stamps_of(place, run) for place in sorted(places)}
    except (OSError, ValueError):
        return None


def is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) is not None


def data_may_change(data: DataConfig, task: str) -> bool:
    """True for rows in memory, at addresses, from a dataset without a commit, or that name image files."""
    path, files = data.path, data.data_files or ()
    if not path:
        return True
    if path not in BUILDERS and not exists(Path(path)):
        return not is_commit(data.revision)
    names_files = task == "image_classification" and path not in ("imagefolder", "parquet")
    return names_files or any("://" in file or ".." in Path(file).parts for file in files)


def target_may_change(target: TargetConfig) -> bool:
    """True for functions, the harness's tasks, and metrics and reward models of the Hub."""
    kind = SCORERS[target.kind]
    metric_of_hub = bool(kind.metrics) and target.metric not in kind.metrics and not exists(Path(target.metric))
    reward_of_hub = target.reward_model is not None and not exists(Path(target.reward_model))
    return metric_of_hub or reward_of_hub or not kind.watchable


def model_may_change(settings: Mapping[str, Any]) -> bool:
    """True for a model of the Hub without a commit and a chat template of the Hub; what is pushed may change there, too."""
    template = settings.get("chat_template_path")
    unpinned = not exists(Path(str(settings["model_name_or_path"]))) and not is_commit(settings.get("model_revision"))
    return bool(unpinned or (template and not exists(Path(template))) or settings.get("push_to_hub"))


def texts(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts(item)


def is_place(text: str, run: Path) -> bool:
    """True for a file, a folder or a pattern of files outside the run folder."""
    path = Path(text)
    return (exists(path) or (glob.has_magic(text) and path.is_absolute())) and not path.absolute().is_relative_to(run)


def stamps_of(place: str, run: Path) -> dict[str, list[int]]:
    """File -> stamp, of everything that a path or a pattern names."""
    path = Path(place)
    found: Iterable[Path] = [path] if exists(path) else map(Path, glob.iglob(str(path), recursive=True))
    files = (file for one in found for file in files_in(one, run))
    stamps = {str(file): stamp(file) for file in islice(files, MAX_FILES + 1)}
    if len(stamps) > MAX_FILES:
        raise ValueError(f"{place} holds too many files")
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
    """Writes down what a complete `select` was made from and what it printed at its end; if not possible, nothing is lost."""
    with suppress(OSError, ValueError):
        facts = {"command": command, "inputs": inputs, "results": results(run.root), "closing": list(closing)}
        write_json(run.unchanged, facts)


def recall(config: Path, flags: Sequence[str]) -> tuple[Path, list[dict[str, Any]]] | None:
    """(run folder, what its last `select` printed at the end) if the same command would find nothing to do."""
    try:
        root = output_folder(config, flags)
        known = read_json_or_empty(RunFolder(root).unchanged)
        same = (
            known["command"] == command_fingerprint(config, flags)
            and known["results"] == results(root)
            and all(stamps_of(place, root) == stamps for place, stamps in known["inputs"].items())
        )
        return (root, list(known["closing"])) if same else None
    except Exception:  # it cannot be told, for whatever reason, so the run is looked at in full
        return None
