"""`m2m status`: what of a run is done, what is left, what it has cost, and whether its folder is whole; from the files alone."""

import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.console import duration
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.errors import InputError
from m2m_hf.storage.digests import Digests
from m2m_hf.storage.files import checkpoints, read_json, read_json_or_empty, readable, staging_path
from m2m_hf.storage.journal import Journal, damaged_values
from m2m_hf.storage.records import COMPLETE, experts_noun, find_incomplete, find_modified, weights_of
from m2m_hf.storage.run_folder import RunFolder, read_config


@dataclass
class Status:
    """What `m2m status` tells.

    Args:
        lines: to print.
        damage: what is damaged, and what to do about it.
        digests: of the files that were read.
    """

    lines: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    digests: Digests = field(kw_only=True, repr=False)


def status(run: RunFolder, full: bool = False) -> Status:
    """Reads and checks a run folder: every adapter, every model, every line of the journal.

    Args:
        full: read every file again, also those that have not changed since they were checked last.

    Raises:
        InputError: it is no run folder.
    """
    if not run.config.exists():
        raise InputError(f"{run.root} is no run folder: it has no config.yaml; expected the output_dir of m2m select")
    run.refuse_links()
    found = Status(digests=Digests(run.root, full))
    given = read_config(run.config)
    own = {item.name for item in fields(MergeToMixConfig)}
    config = MergeToMixConfig(**{key: value for key, value in given.items() if key in own})
    names = list(config.parsed_candidates)
    found.lines.append(
        f"{os.path.relpath(run.root)}: {len(names)} candidates, target{'s' * (len(config.parsed_targets) > 1)} "
        f"{', '.join(config.parsed_targets)}, model {given.get('model_name_or_path')}"
    )
    if at_work(run):
        found.lines.append("a process is at work in it now")
    left = []
    trained, seconds = adapters(run, names, found, experts_noun(given))
    missing = [name for name in names if name not in trained]
    failed = [name for name, record in trained.items() if "failed" in record]
    if missing:
        left.append(f"{len(missing)} {experts_noun(given)} ({', '.join(missing)})")
    spent = {experts_noun(given): seconds}
    searched = search(run, config, [name for name in names if name not in failed], found, spent)
    summary = read_json_or_empty(run.summary)
    if searched:
        left.append(searched)
    final = read_json_or_empty(run.final / "training.json")
    weights = weights_of(final)
    models = sorted(path.parent for path in run.trained.glob("[!.]*/training.json"))
    checked = [check(folder, found, "it is trained again when it is needed") for folder in models]
    # The final model may be a copy of one of them, and is counted once.
    others = [seconds for record, seconds in checked if weights_of(record) != weights]
    if others:
        spent["mixtures fine-tuned"] = sum(others)
        found.lines.append(f"fine-tuned to compare: {len(others)} models, {duration(sum(others))}")
    rows = run.rows
    manifest = read_json_or_empty(run.mixture / "manifest.json")
    if rows.exists() and manifest.get("sha256_16") != found.digests.of(rows):
        found.damage.append(f"{os.path.relpath(rows)}: not what its manifest says; m2m search writes it again")
    for path in (run.targets, run.summary, run.fidelity):
        if path.exists() and not read_json_or_empty(path):
            found.damage.append(f"{os.path.relpath(path)}: it is not JSON; the command that made it makes it again")
    for path in sorted((run.root / "ensemble").glob("*.safetensors")):
        if not readable(path):
            found.damage.append(f"{os.path.relpath(path)}: it was cut short; it is made again when it is needed")
    for folder in sorted(run.root.glob("final.*")):
        check(folder, found, "nothing needs it")
    if run.final.exists():
        record, _ = check(run.final, found, "m2m sft makes it again")
        spent["final"] = number(record.get("total_seconds"))
        if record:
            try:
                mixture = str(Mixture.of(record["mixture"]))
            except (KeyError, TypeError, ValueError, AttributeError):
                mixture = "?"
            found.lines.append(
                f"final model: {mixture}, {number(record.get('steps')):,.0f} steps, {duration(spent['final'])}"
            )
    if config.train_final and not (summary and summary.get("final")):
        left.append("the final fine-tune")
    parts = ", ".join(f"{key} {duration(value)}" for key, value in spent.items() if value)
    found.lines.append(f"spent: {duration(sum(spent.values()))}" + (f" ({parts})" if parts else ""))
    found.lines.append(f"left: {'; '.join(left)}" if left else "left: nothing")
    found.lines += [f"damaged: {one}" for one in found.damage]
    if not found.damage:
        found.lines.append(f"whole: {experts_noun(given)}, models, journal and mixture are as they were written")
    if left or found.damage:
        found.lines.append(f"go on with: m2m select --config {os.path.relpath(run.config)}")
    found.digests.save()
    return found


def at_work(run: RunFolder) -> bool:
    """Whether another process holds the folder."""
    if RunFolder.held is not None and RunFolder.held.root == run.root:
        return False
    lock = FileLock(run.root / ".lock", is_singleton=False)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to
        return False


def check(folder: Path, found: Status, remedy: str) -> tuple[dict[str, Any], float]:
    """(`training.json`, seconds) of a folder with something trained in it; what is wrong with it goes into `found`."""
    place = os.path.relpath(folder)
    if reason := find_incomplete(folder):
        found.damage.append(f"{place}: {reason}; {remedy}")
        return {}, 0.0
    record = read_json(folder / "training.json")
    if not isinstance(record, dict):
        found.damage.append(f"{place}: training.json is not one; {remedy} once it is deleted")
        return {}, 0.0
    if file := find_modified(folder, digest=found.digests.of):
        found.damage.append(f"{place}: {file} is not what was trained; restore it, or delete the folder and {remedy}")
    return record, number(record.get("seconds"))


def number(value: Any) -> float:
    """What a file says, if it is a number that makes sense for an amount; else 0."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e15 else 0.0


def adapters(run: RunFolder, names: list[str], found: Status, word: str) -> tuple[dict[str, dict[str, Any]], float]:
    """(candidate -> `training.json` of every expert that is there, seconds spent on them).

    Args:
        word: what they are called.
    """
    trained: dict[str, dict[str, Any]] = {}
    total = 0.0
    for name in names:
        folder = run.adapters / name
        if folder.exists():
            record, seconds = check(folder, found, "m2m select trains it again")
            total += seconds
            if record:
                trained[name] = record
    steps = sum(number(one.get("steps")) for one in trained.values())
    found.lines.append(f"{word}: {len(trained)} of {len(names)}, {steps:,.0f} steps, {duration(total)}")
    for name, record in trained.items():
        if "failed" in record:
            found.lines.append(f"  {name}: failed: {record['failed']}")
    for name in names:
        marks = [
            read_json_or_empty(path)
            for path in checkpoints(staging_path(run.adapters / name)).glob(f"checkpoint-*/{COMPLETE}")
        ]
        reached = max((number(mark.get("steps")) for mark in marks), default=0.0)
        if name not in trained and reached:
            found.lines.append(f"  {name}: interrupted; goes on from step {reached:,.0f}")
    return trained, total


def search(
    run: RunFolder, config: MergeToMixConfig, names: list[str], found: Status, spent: dict[str, float]
) -> str | None:
    """What is left of the search; what is in the journal goes into `found`."""
    try:
        journal = Journal(run.trials)
    except InputError as error:
        found.damage.append(str(error))
        return "the search"
    for key in damaged_values(run.trials):
        found.damage.append(
            f"{os.path.relpath(run.trials)}: the values of trial {key} are not what was measured; delete its line to have it "
            "measured again"
        )
    if journal.lost and not at_work(run):  # which may be writing that line
        found.damage.append(
            f"{os.path.relpath(run.trials)}: {journal.lost} lines were cut short or have lost their values; their trials are "
            "measured again"
        )
    trials = list(journal.trials.values())
    states = Counter(trial.state for trial in trials)
    spent["trials"] = sum(trial.seconds for trial in trials)
    counted = ", ".join(f"{states[state]:,} {state}" for state in ("complete", "pruned", "failed") if states[state])
    found.lines.append(f"trials: {len(trials):,} ({counted or 'none'}), {duration(spent['trials'])}")
    for trial in [one for one in trials if one.state == "failed"][:5]:
        found.lines.append(f"  failed: {trial.mixture} on {trial.target}: {trial.reason}")
    summary = read_json_or_empty(run.summary)
    listed = summary.get("candidates")
    if (
        summary.get("best")
        and isinstance(listed, list)
        and sorted(map(str, listed)) == sorted(config.parsed_candidates)
    ):
        try:
            best, score = Mixture.of(summary["best"]["mixture"]), float(summary["best"]["score"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.damage.append(
                f"{os.path.relpath(run.summary)}: not as it was written ({error}); m2m search writes it again"
            )
            return "the search"
        found.lines.append(f"search: finished; chosen {best}, score {score:.3f}")
        return None
    if config.strategy != "exhaustive" or not names:
        return "the search"
    space = SearchSpace(
        tuple(name for name in names if not config.parsed_candidates[name].excluded),
        frozenset(name for name, one in config.parsed_candidates.items() if one.required),
        config.min_datasets,
        config.max_datasets,
    )
    wanted = {Mixture.subset([]), Mixture.subset(names), *(Mixture.subset([name]) for name in names), *space.subsets()}
    kind = "ensemble" if config.objective == "ensemble" else None
    done = Counter(
        trial.mixture
        for trial in trials
        if trial.mixture in wanted and (kind is None) == (trial.objective != "ensemble")
    )
    missing = sum(done[mixture] < len(config.parsed_targets) for mixture in wanted)
    return f"up to {missing:,} of {len(wanted):,} mixtures to score"
