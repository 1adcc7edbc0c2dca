"""`m2m status`: what of a run is done, what is left, what it has cost, and whether its folder is whole; from the files alone."""

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.search_space import objective_name, search_space
from m2m_hf.console import duration
from m2m_hf.core.jsonable import from_json
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.reporting.finished_run import FinishedRun, by_mixture, own_trials
from m2m_hf.search.model_based import SUBSETS, choose_strategy, ensemble_shortcut
from m2m_hf.search.result import default_budget
from m2m_hf.storage.files import Digests, checkpoints, read_json, read_json_or_empty, readable, staging_path
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.judgements import Judged
from m2m_hf.storage.keys import Keys, base_key
from m2m_hf.storage.records import (
    COMPLETE,
    Drift,
    experts_noun,
    find_incomplete,
    find_modified,
    last_common,
    weights_of,
)
from m2m_hf.storage.run_folder import RunFolder, read_config


def status(run: RunFolder, full: bool = False) -> "Status":
    """Reads and checks a run folder: every adapter, every model, every line of the journal.

    Args:
        full: read every file again, also those that have not changed since they were checked last.

    Raises:
        InputError: it is no run folder.
    """
    if not run.config.exists():
        raise InputError(f"{run.root} is no run folder: it has no config.yaml; expected the output_dir of m2m select")
    run.refuse_links()
    found = Status(run, full)
    found.inspect()
    return found


class Status:
    """What `m2m status` prints (`lines`), what of it is damaged (`damage`), what is left to do and what was spent."""

    def __init__(self, run: RunFolder, full: bool) -> None:
        self.run = run
        self.settings = read_config(run.config)
        own = {item.name for item in fields(MergeToMixConfig)}
        self.config = MergeToMixConfig(**{key: value for key, value in self.settings.items() if key in own})
        self.noun = experts_noun(self.settings)
        self.digests = Digests(run.root, full)
        self.busy = at_work(run)
        self.lines: list[str] = []
        self.damage: list[str] = []
        self.left: list[str] = []
        self.spent: dict[str, float] = {}

    def inspect(self) -> None:
        names, targets = list(self.config.parsed_candidates), list(self.config.parsed_targets)
        self.lines.append(
            f"{os.path.relpath(self.run.root)}: {len(names)} candidates, target{'s' * (len(targets) > 1)} {', '.join(targets)}, "
            f"model {self.settings.get('model_name_or_path')}"
        )
        if self.busy:
            self.lines.append("a process is at work in it now")
        summary = self.finished_search(self.experts(names))
        if self.config.train_final and (summary is None or summary.final is None):
            self.left.append("the final fine-tune")
        self.models()
        self.judges()
        self.files()
        self.conclude()
        self.digests.save()

    def damaged(self, path: Path, reason: str) -> None:
        self.damage.append(f"{os.path.relpath(path)}: {reason}")

    def check(self, folder: Path, remedy: str) -> dict[str, Any]:
        """The `training.json` of a folder with something trained in it; empty where it is damaged."""
        if reason := find_incomplete(folder):
            self.damaged(folder, f"{reason}; {remedy}")
            return {}
        record = read_json(folder / "training.json")
        if not isinstance(record, dict):
            self.damaged(folder, f"training.json holds no training record; delete it, and {remedy}")
            return {}
        if file := find_modified(folder, digest=self.digests.of):
            self.damaged(folder, f"{file} is not what was trained; restore it, or delete the folder and {remedy}")
        return record

    def experts(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Candidate -> `training.json` of every expert that is there."""
        folders = {name: self.run.adapters / name for name in names}
        found = {
            name: self.check(path, "m2m select trains it again") for name, path in folders.items() if path.exists()
        }
        trained = {name: record for name, record in found.items() if record}
        self.spent[self.noun] = sum(number(record.get("seconds")) for record in trained.values())
        steps = sum(number(record.get("steps")) for record in trained.values())
        self.lines.append(
            f"{self.noun}: {len(trained)} of {len(names)}, {steps:,.0f} steps, {duration(self.spent[self.noun])}"
        )
        for name, record in trained.items():
            if "failed" in record:
                self.lines.append(f"  {name}: failed: {record['failed']}")
            if drift := drift_of(record):
                again = "to be trained again" if self.config.changed_candidates == "retrain" else "stale"
                self.lines.append(f"  {name}: {again}, since the candidate has changed ({drift})")
        if self.config.changed_candidates == "retrain":
            trained = {name: record for name, record in trained.items() if not drift_of(record)}
        missing = [name for name in names if name not in trained]
        begun = {name: marks(folders[name]) for name in missing}
        for name in filter(begun.__getitem__, missing):
            step = last_common(name, {name: begun[name]} if self.config.parallel == 1 else begun)
            goes_on = f"continues from step {step:,}" if step else "begins again: its group has no checkpoint in common"
            self.lines.append(f"  {name}: interrupted; {goes_on}")
        if missing:
            noun = experts_noun(self.settings, len(missing))
            self.left.append(f"{len(missing)} {noun} ({', '.join(missing)})")
        return trained

    def finished_search(self, trained: dict[str, dict[str, Any]]) -> FinishedRun | None:
        """The summary of a search that has nothing left to do; None of any other."""
        trials, summary = self.journal(), self.summary()
        if trials is None:
            self.left.append("the search")
            return None
        failed = {name: str(record["failed"]) for name, record in trained.items() if "failed" in record}
        tokens = {name: number(as_now(record).get("data_tokens")) for name, record in trained.items()}
        try:
            space = search_space(self.config, tokens, failed)
        except InputError as error:
            self.left.append(f"the search, which cannot go on: {error}")
            return None
        own = self.own(trials, trained)
        rest = remaining(self.config, space, failed, own)
        scored = {trial.mixture for trial in own}
        whole = summary is not None and all(Mixture.subset([name]) in scored for name in summary.singles)
        if summary is not None and whole and self.belongs(summary, space) and not (rest.exact and rest.mixtures):
            self.lines.append(f"search: finished; chosen {summary.best.mixture}, score {summary.best.score:.3f}")
            if (count := self.config.to_verify) and summary.verified is None:
                most = "" if count == "auto" else f"up to {count} "
                self.left.append(f"{most}mixtures to fine-tune (fine_tunes)")
            return summary
        what = "fine-tune and score" if self.config.objective == "trained" else "score"
        self.left.append(f"up to {rest.mixtures:,} of {rest.total:,} mixtures to {what}")
        return None

    def journal(self) -> list[Trial] | None:
        """All trials; None where the journal cannot be read."""
        path = self.run.trials
        try:
            journal = Journal(path)
        except InputError as error:
            self.damage.append(str(error))
            return None
        for key in journal.damaged_values():
            reason = f"the values of trial {key} are not what was measured; delete its line to have it measured again"
            self.damaged(path, reason)
        if journal.lost and not self.busy:  # a process at work may be writing that line
            reason = f"{journal.lost} lines were cut short or have lost their values; their trials are measured again"
            self.damaged(path, reason)
        trials = list(journal.trials.values())
        states = Counter(trial.state for trial in trials)
        self.spent["trials"] = sum(trial.seconds for trial in trials)
        counted = ", ".join(f"{states[state]:,} {state}" for state in ("complete", "pruned", "failed") if states[state])
        self.lines.append(f"trials: {len(trials):,} ({counted or 'none'}), {duration(self.spent['trials'])}")
        for trial in [one for one in trials if one.state == "failed"][:5]:
            self.lines.append(f"  failed: {trial.mixture} on {trial.target}: {trial.reason}")
        return trials

    def own(self, trials: list[Trial], trained: dict[str, dict[str, Any]]) -> list[Trial]:
        """The trials of this run's objective, and its gradients, whose key is what the run gives them now."""
        facts = [uniform for record in trained.values() if isinstance(uniform := record.get("uniform"), dict)]
        if not facts:
            return []
        experts = {name: str(record.get("fingerprint")) for name, record in trained.items()}
        rows = {name: int(number(as_now(record).get("rows"))) for name, record in trained.items()}
        stale = {name: drift.fingerprint for name, record in trained.items() if (drift := drift_of(record))}
        base = base_key(facts[0])
        keys = {name: Keys(base, str(scorer), 0, experts, rows, stale) for name, scorer in self.scorers().items()}
        objectives = (self.objective, "gradient") if self.objective == "merged" else (self.objective,)
        return own_trials(trials, keys, objectives)

    @property
    def objective(self) -> str:
        """What the journal calls the run's objective."""
        seed = self.settings.get("seed", 42)
        return objective_name(self.config, seed if isinstance(seed, int) else 42)

    def scorers(self) -> dict[str, Any]:
        """Target -> fingerprint of its rows, scorer and metric, as far as they are known."""
        known = self.run.known_targets()
        return {name: known.get(name, {}).get("validation") for name in self.config.parsed_targets}

    def summary(self) -> FinishedRun | None:
        """`summary.json`; None where there is none, or it is damaged."""
        content = read_json_or_empty(self.run.summary)
        if not content:
            return None
        try:
            return from_json(FinishedRun, content)
        except (ValueError, TypeError, AttributeError) as error:
            self.damaged(self.run.summary, f"not as it was written ({error}); m2m search writes it again")
            return None

    def belongs(self, summary: FinishedRun, space: SearchSpace) -> bool:
        """True if a summary is of the objective, candidates, targets and constraints of the configuration.

        Costs may differ: they are the candidates' own, and may have been counted otherwise.
        """
        return (
            summary.objective == self.objective
            and sorted(summary.candidates) == sorted(self.config.parsed_candidates)
            and {name: one.fingerprints.get("scorer") for name, one in summary.targets.items()} == self.scorers()
            and replace(summary.space, costs={}) == replace(space, costs={})
        )

    def models(self) -> None:
        """The models that were fine-tuned: to be compared, and the final one."""
        folders = sorted(path.parent for path in self.run.trained.glob("[!.]*/training.json"))
        records = [self.check(folder, "it is trained again when it is needed") for folder in folders]
        # The final model may be a copy of one of them, and is counted once.
        weights = weights_of(read_json_or_empty(self.run.final / "training.json"))
        others = [number(record.get("seconds")) for record in records if weights_of(record) != weights]
        if others:
            self.spent["mixtures fine-tuned"] = sum(others)
            self.lines.append(f"mixtures fine-tuned: {len(others)} models, {duration(sum(others))}")
        for folder in sorted(self.run.root.glob("final.*")):
            self.check(folder, "nothing needs it")
        if self.run.final.exists() and (record := self.check(self.run.final, "m2m sft makes it again")):
            self.spent["final"] = number(record.get("total_seconds"))
            steps = number(record.get("steps"))
            mixture = mixture_of(record)
            self.lines.append(f"final model: {mixture}, {steps:,.0f} steps, {duration(self.spent['final'])}")

    def judges(self) -> None:
        """What judges were asked, and said."""
        for name, target in self.config.parsed_targets.items():
            if target.judge is None:
                continue
            try:
                said = Judged.read(self.run.judged(name))
            except InputError as error:
                self.damage.append(str(error))
                continue
            self.lines.append(
                f"judge of {name}: {said.requests:,} of {target.judge.max_requests:,} requests; for the first answer "
                f"{said.first:,}, for the second {said.second:,}, ties {said.tie:,}, without a verdict {said.none:,}"
            )

    def files(self) -> None:
        """The other files of the folder."""
        rows = self.run.rows
        manifest = read_json_or_empty(self.run.mixture / "manifest.json")
        if rows.exists() and manifest.get("sha256_16") != self.digests.of(rows):
            self.damaged(rows, "not what its manifest says; m2m search writes it again")
        for path in (self.run.targets, self.run.summary, self.run.fidelity):
            if path.exists() and not read_json_or_empty(path):
                self.damaged(path, "it is not JSON; m2m search (or m2m fidelity) writes it again")
        if len(self.run.known_targets()) < len(read_json_or_empty(self.run.targets)):
            self.damaged(self.run.targets, "it does not say what the targets are; m2m search writes it again")
        for path in sorted((self.run.root / "ensemble").glob("*.safetensors")):
            if not readable(path):
                self.damaged(path, "it was cut short; it is made again when it is needed")

    def conclude(self) -> None:
        """The last lines: what was spent, what is left, what is damaged, what to type."""
        total = sum(self.spent.values())
        parts = ", ".join(f"{key} {duration(value)}" for key, value in self.spent.items() if value)
        self.lines.append(f"spent: {duration(total)}" + (f" ({parts})" if parts else ""))
        self.lines.append(f"left: {'; '.join(self.left) or 'nothing'}")
        self.lines += [f"damaged: {one}" for one in self.damage]
        if not self.damage:
            self.lines.append(f"intact: {self.noun}, models, journal and mixture are as they were written")
        if self.left or self.damage:
            self.lines.append(f"continue with: m2m select --config {os.path.relpath(self.run.config)}")


def at_work(run: RunFolder) -> bool:
    """True if another process holds the folder."""
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


def marks(folder: Path) -> dict[int, list[str]]:
    """Step -> folders of all that trained side by side, of the checkpoints of what is trained into `folder`."""
    paths = checkpoints(staging_path(folder)).glob(f"checkpoint-*/{COMPLETE}")
    records = [read_json_or_empty(path) for path in paths]
    groups = {int(number(record.get("steps"))): record.get("mates") for record in records}
    return {
        step: [*map(str, mates.values())] if isinstance(mates, dict) else [] for step, mates in groups.items() if step
    }


def number(value: Any) -> float:
    """What a file says, if it is a number that makes sense for an amount; else 0."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e15 else 0.0


def drift_of(record: Mapping[str, Any]) -> Drift | None:
    """What became of a candidate's rows since its expert was trained; None of one that is of the rows as they are."""
    with suppress(ValueError):
        return from_json(Drift, record["stale"]) if "stale" in record else None
    return None


def as_now(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `training.json` of an expert, with what it says of the candidate's rows as they are now."""
    drift = drift_of(record)
    return {**record, **vars(drift)} if drift else record


def mixture_of(record: dict[str, Any]) -> str:
    try:
        return str(Mixture.of(record["mixture"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return "?"


@dataclass(frozen=True)
class Remaining:
    """What is left of a search: at most `mixtures` of `total`. `exact` where the strategy scores all mixtures."""

    mixtures: int
    total: int
    exact: bool


def remaining(
    config: MergeToMixConfig, space: SearchSpace, failed: Collection[str], trials: Sequence[Trial]
) -> Remaining:
    """Counts as the search would: constraints, costs, licences and budgets included; by the trials of the run as it is now."""
    candidates = list(config.parsed_candidates)
    together = Mixture.subset([name for name in candidates if name not in failed])
    first = dict.fromkeys([BASE, *(Mixture.subset([name]) for name in candidates), together])
    scores = [one for one in trials if one.objective != "gradient"]
    known = by_mixture(scores, config.parsed_targets)
    most = len(first) + proposals(config, space)
    exact = most == math.inf
    most = min(config.max_trials or math.inf, most)
    if exact or not space.continuous:
        possible = chain(first, (mixture for mixture in space.subsets() if mixture not in first))
        wanted = list(islice(possible, None if most == math.inf else int(most)))
        most = len(wanted)
    missing = sum(mixture not in known for mixture in wanted) if exact else max(0, most - len(known))
    ahead = [mixture for mixture in first if mixture not in known]
    climbs = config.strategy == "gradient" or (config.strategy == "auto" and space.continuous)
    allowed = len(ahead) + affordable(config, trials if climbs else scores, known.get(BASE, {}), ahead)
    return Remaining(int(min(missing, allowed)), int(most), exact)


def proposals(config: MergeToMixConfig, space: SearchSpace) -> float:
    """How many mixtures the strategy proposes at most; infinity stands for all that may be chosen."""
    if config.objective == "ensemble":
        shortcut = ensemble_shortcut(space, config.strategy, len(config.parsed_targets))
        if shortcut is not None:
            return SUBSETS if shortcut == "subsets" else 2 + space.most - space.fewest
    strategy = config.strategy
    if strategy == "auto":
        strategy, _ = choose_strategy(space, False, config.max_trials or 0)
    return math.inf if strategy == "exhaustive" else default_budget(len(space.names))


def affordable(
    config: MergeToMixConfig, spent: Sequence[Trial], base: Mapping[str, Trial], ahead: Collection[Mixture]
) -> float:
    """How many mixtures the budgets of rows and seconds allow after those `ahead`, with which every search begins.

    `spent` has every rung of a race, and passes for gradients; the base model's trials tell how many rows the targets have.
    """
    if config.max_seconds is not None and sum(trial.seconds for trial in spent) >= config.max_seconds:
        return 0
    rows = sum(trial.rung for trial in base.values())
    if config.max_example_evaluations is None or not rows:
        return math.inf
    seen: dict[tuple[bool, Mixture, str], int] = {}  # a rung of a race adds its new rows only
    for trial in spent:
        key = trial.objective == "gradient", trial.mixture, trial.target
        seen[key] = max(trial.rung, seen.get(key, 0))
    seen |= {(False, mixture, target): trial.rung for mixture in ahead for target, trial in base.items()}
    ensemble = config.objective == "ensemble"  # a mixture then costs nothing beyond its parts
    left = config.max_example_evaluations - sum(
        rung for (_, mixture, _), rung in seen.items() if not ensemble or len(mixture) <= 1
    )
    if left <= 0:
        return 0
    return math.inf if ensemble else math.ceil(left / rows)
