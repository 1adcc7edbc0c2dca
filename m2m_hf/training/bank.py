"""The bank: one expert per candidate, all trained alike, none trained twice.

The average of the experts can stand in for training on the mixture only if they are uniform (arXiv 2505.16066). So everything
but their data is recorded, compared, and refused if it differs.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from m2m_hf.console import Terminal, duration
from m2m_hf.core.jsonable import to_json
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError
from m2m_hf.merging.expert import Expert
from m2m_hf.modeling.devices import broadcast
from m2m_hf.storage.files import fingerprint, read_json, staging_path, sync, write_json
from m2m_hf.storage.records import (
    Drift,
    compare_rows,
    experts_noun,
    files_of,
    find_incomplete,
    read_digests,
    write_digests,
)
from m2m_hf.training.experts import load_trained
from m2m_hf.training.fine_tune import finished, move, planned_steps, publish
from m2m_hf.training.jobs import Job, train_jobs
from m2m_hf.training.trainers import Settings
from m2m_hf.training.uniformity import LAUNCH, differing

NEEDED = {"fingerprint", "data", "rows", "uniform", "steps", "seconds", "files"}  # in every `training.json`
MAX_LOST = 0.01  # share of a delta's norm; a warning above it


def lost_to_dtype(record: Mapping[str, Any]) -> str | None:
    """Says what the dtype of a full expert lost, if it is much; see `save_delta` for what is `kept`."""
    kept = record.get("kept", {})
    if kept.get("lost", 0.0) <= MAX_LOST:
        return None
    return f"delta_dtype {kept['dtype']} has lost {kept['lost']:.1%} of what was learned"


class Bank:
    """The experts of one run, in `OUT/adapters/<candidate>/`.

    A candidate whose training failed has a folder too; its `training.json` says why.

    Args:
        folder: `OUT/adapters`.
        candidates: each needs an expert.
        facts: candidate -> `uniform_facts`; the same for all, unless `allow_mixed_training`.
        digests: where the digests of the rows are that experts were trained on.
        when_changed: `changed_candidates`, what to do about an expert of other rows: `refuse`, `retrain` or `keep`.
    """

    def __init__(
        self,
        folder: Path,
        candidates: Mapping[str, Candidate],
        facts: Mapping[str, Mapping[str, Any]],
        digests: Path,
        when_changed: str,
    ) -> None:
        self.folder, self.candidates, self.facts = folder, candidates, facts
        self.digests, self.when_changed = digests, when_changed

    def training(self) -> dict[str, dict[str, Any]]:
        """Returns name -> `training.json` of every expert; its `fingerprint` identifies the expert.

        Raises:
            InputError: one that does not say how its expert was trained.
        """
        return {name: read_record(self.folder / name) for name in self.candidates}

    def load(self) -> dict[str, Expert]:
        """Loads every expert but those that failed.

        Raises:
            InputError: one whose files were modified.
        """
        records = self.training()
        return {name: load_trained(self.folder / name) for name in records if "failed" not in records[name]}

    def check(self) -> list[str]:
        """Returns the names of the experts that must still be trained, with those that a crash left incomplete.

        Those of other rows than now are among them with `retrain`; with `keep` only if their training failed.

        Raises:
            InputError: an expert was trained with other settings, or, with `refuse`, on other rows; nothing is overwritten.
        """
        there = self._there()
        kept = {
            name: record
            for name, record in there.items()
            if record["data"] == self.candidates[name].fingerprint
            or self.when_changed == "refuse"
            or (self.when_changed == "keep" and "failed" not in record)
        }
        self._refuse_different(self.folder, kept)
        return [name for name in self.candidates if name not in kept]

    def _there(self) -> dict[str, dict[str, Any]]:
        """`training.json` of every expert that is complete, of these rows or of others."""
        folders = {name: self.folder / name for name in self.candidates}
        return {name: read_record(path) for name, path in folders.items() if find_incomplete(path) is None}

    def changed(self) -> dict[str, Drift]:
        """Candidate -> what became of its rows since the expert that is there was trained, where they changed."""
        return self._drifts(self._there())

    def _drifts(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Drift]:
        drifts = {}
        for name, record in records.items():
            candidate, before = self.candidates[name], record["rows"]
            if record["data"] != candidate.fingerprint:
                data = str(record["data"])
                digests = read_digests(self.digests / data, before) if data.isalnum() else None
                counts = () if digests is None else compare_rows(digests, candidate.digests)
                now = candidate.fingerprint, len(candidate.rows), candidate.tokens, self.identity(name)
                drifts[name] = Drift(*now, before, *counts)
        return drifts

    def remember_rows(self) -> None:
        """Writes the digests of all rows, and marks the experts that are of other rows (main process)."""
        for candidate in self.candidates.values():
            write_digests(self.digests / candidate.fingerprint, candidate.digests)
        records = self._there()
        drifts = self._drifts(records)
        for name, record in records.items():
            marked = {key: value for key, value in record.items() if key != "stale"}
            if name in drifts:
                marked["stale"] = to_json(drifts[name])
            if marked != record:
                write_json(self.folder / name / "training.json", marked)

    def _refuse_different(self, folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuses experts that were trained with other settings than this run's, or on other rows.

        A complete bank may be searched with any number of processes, so how a training was launched counts only while experts
        are missing. `folder` is of this bank, or of one that experts are taken from.
        """
        ours = folder == self.folder
        launch: dict[str, Any] = {}
        if len(records) == len(self.candidates):
            first = next(iter(records.values()))["uniform"]
            launch = {fact: first.get(fact) for fact in LAUNCH}
        differences = {
            name: found
            for name, record in records.items()
            if (found := differing({**self.facts[name], **launch}, record["uniform"]))
        }
        for name, record in records.items():
            noun = experts_noun(record, 1)
            if name in differences:
                how = f"with other settings, and only {noun}s that differ in nothing but their data can be averaged"
                again = f"{folder} to train all again" if len(differences) > 1 else f"{folder / name} to train it again"
                if "source" in record:
                    how = f"by others, and taken from {record['source']} when this run had other settings"
                    again = f"{folder / name} to take it again"
                remedy = f"choose another --output_dir, or delete {again}" if ours else f"or leave out {noun}s:"
                raise InputError(
                    f"{noun} {name!r} in {folder} was trained {how}: {'; '.join(differences[name])}. "
                    f"Restore the settings, {remedy}"
                )
        if self.when_changed == "refuse" and (drifts := self._drifts(records)):
            noun = self.noun(1)
            changes = (
                f"candidate {name!r} has changed since its {noun} was trained ({drifts[name]})" for name in drifts
            )
            raise InputError(
                f"{'; '.join(changes)}. Restore the rows, {'' if ours else f'leave out {noun}s: ({folder}), '}give the changed "
                f"ones another name, or set changed_candidates: retrain (its {noun} is trained again, all others and their "
                f"scores are kept) or keep (its {noun} stands in, marked stale)"
            )

    def take(self, folder: Path, missing: Sequence[str], terminal: Terminal) -> None:
        """Copies missing experts from another bank if they are what this run would train.

        Args:
            folder: with a folder for every candidate, as in `OUT/adapters`.

        Raises:
            InputError: one was trained with other settings, on other rows, or is incomplete or modified.
        """
        records = {name: read_record(folder / name, "fetch it again") for name in missing if (folder / name).is_dir()}
        if self.when_changed == "retrain":
            for name, drift in self._drifts(records).items():
                terminal.say(f"{name}: the one in {folder} is of other rows ({drift}), and is not taken", "yellow")
                del records[name]
        self._refuse_different(folder, records)
        for name, record in records.items():
            if reason := record.get("failed") or find_incomplete(folder / name):
                raise InputError(f"{folder / name} holds no expert that can be taken: {reason}; fetch it again")
            load_trained(folder / name)
        if PartialState().is_main_process:
            for name, record in records.items():
                partial = staging_path(self.folder / name)
                shutil.rmtree(partial, ignore_errors=True)
                for file in ("training.json", *files_of(record)):  # no links, and nothing that is not described
                    (partial / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name / file, partial / file)
                sync(partial)
                move(self.folder / name)
            self.remember_rows()
        PartialState().wait_for_everyone()
        if records:
            word = experts_noun(next(iter(records.values())), len(records))
            terminal.say(f"took {len(records)} {word} that were trained elsewhere: {', '.join(records)}")

    def about(self, name: str) -> dict[str, Any]:
        """What `training.json` says of a candidate."""
        candidate = self.candidates[name]
        return {
            "candidate": name,
            "data": candidate.fingerprint,
            "rows": len(candidate.rows),
            "data_tokens": candidate.tokens,
            "uniform": self.facts[name],
        }

    def identity(self, name: str) -> str:
        """Fingerprint of all that a candidate's expert depends on."""
        return fingerprint([self.facts[name], self.candidates[name].fingerprint])

    def publish(self, name: str, of: str, record: Mapping[str, Any]) -> None:
        """Renames an expert into place from its staging path (collective); `of` identifies it, `record` says how it was made."""
        publish(self.folder / name, {**self.about(name), "fingerprint": of, **record})

    def train_missing(
        self,
        base: Callable[[], PreTrainedModel],
        settings: Callable[[str], Settings],
        terminal: Terminal,
        parallel: int | str = 1,
    ) -> None:
        """Trains the experts that `check` names.

        An expert is renamed into place when it is complete. One that fails leaves its reason, and the others are trained.

        Args:
            base: gives the base model.
            settings: candidate -> how its expert is trained.
            parallel: how many train side by side, or `auto`.

        Raises:
            InputError: all failed.
        """
        jobs = []
        for name in broadcast(self.check()):
            folder, candidate = self.folder / name, self.candidates[name]
            of = self.identity(name)
            torn = find_incomplete(folder) if folder.exists() else None
            if finished(folder, of):
                continue
            if torn:
                terminal.say(f"  {name}: {torn}; its {experts_noun(self.facts[name], 1)} is trained again", "yellow")
            how = settings(name)
            steps = planned_steps(how.args, candidate.trained_rows, candidate.tokens)
            jobs.append(Job(name, folder, candidate.rows, how, of, f"adapters/{name}", steps, self.about(name)))
        with terminal.progress(f"training {self.noun()}", sum(job.steps for job in jobs)) as bar:
            train_jobs(base, jobs, parallel, bar, terminal.say, lambda job, record: tell(job.name, record, terminal))
        records = self.training().values()
        PartialState().wait_for_everyone()
        if all("failed" in record for record in records):
            if PartialState().is_main_process:
                for name in self.candidates:
                    shutil.rmtree(self.folder / name)
            PartialState().wait_for_everyone()
            reasons = dict.fromkeys(record["failed"] for record in records)
            raise InputError(f"not one {self.noun(1)} could be trained: {'; '.join(reasons)}")

    def noun(self, count: int = 2) -> str:
        """What messages call so many of its experts: adapter, adapters, expert or experts."""
        return experts_noun(next(iter(self.facts.values())), count)


def tell(name: str, record: Mapping[str, Any], terminal: Terminal) -> None:
    """Prints how a training went."""
    if "failed" in record:
        terminal.say(f"  {name}: failed: {record['failed']}", "yellow")
        return
    curve = [loss for _, loss in record["loss_curve"]]
    loss = f"{curve[0]:.3f} → {curve[-1]:.3f}" if len(curve) > 1 else f"{record['loss']:.3f} on average"
    seen = f"{record['tokens']:,} tokens, " if record["tokens"] else ""
    terminal.say(f"  {name}: {record['steps']:,} steps, {seen}loss {loss}, {duration(record['seconds'])}")
    if warning := lost_to_dtype(record):
        terminal.say(f"  {name}: {warning}", "yellow")


def read_record(folder: Path, remedy: str = "") -> dict[str, Any]:
    """Returns the `training.json` of an expert; refuses one that does not say how the expert was trained."""
    record = read_json(folder / "training.json")
    kinds = {"uniform": dict, "rows": int}
    if not isinstance(record, dict) or not (
        set(record) >= NEEDED and all(isinstance(record[key], kind) for key, kind in kinds.items())
    ):
        remedy = remedy or f"delete {folder}, and it is made again"
        raise InputError(f"{folder / 'training.json'} does not say how the expert was trained; {remedy}")
    return record
