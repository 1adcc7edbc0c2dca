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
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError
from m2m_hf.merging.expert import Expert
from m2m_hf.modeling.devices import broadcast
from m2m_hf.storage.files import fingerprint, read_json, staging_path, sync
from m2m_hf.storage.records import experts_noun, files_of, find_incomplete
from m2m_hf.training.experts import load_trained
from m2m_hf.training.fine_tune import finished, move, planned_steps, publish
from m2m_hf.training.jobs import Job, train_jobs
from m2m_hf.training.trainers import Settings
from m2m_hf.training.uniformity import LAUNCH, differing

NEEDED = {"fingerprint", "data", "uniform", "steps", "seconds", "files"}  # in every `training.json`
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
    """

    def __init__(
        self, folder: Path, candidates: Mapping[str, Candidate], facts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.folder, self.candidates, self.facts = folder, candidates, facts

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

        Raises:
            InputError: an expert was trained with other settings, or on other rows; nothing is overwritten.
        """
        missing = [name for name in self.candidates if find_incomplete(self.folder / name) is not None]
        records = {name: read_record(self.folder / name) for name in self.candidates if name not in missing}
        self._refuse_different(self.folder, records)
        return missing

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
            if record["data"] != (data := self.candidates[name].fingerprint):
                remedy = f"delete {folder / name} to train this {noun} again"
                raise InputError(
                    f"candidate {name!r} has changed since its {noun} was trained (rows {record['data']} there, {data} now). "
                    "Restore the data, give the new data another name, or "
                    + (remedy if ours else f"leave out {noun}s: ({folder})")
                )

    def take(self, folder: Path, missing: Sequence[str], terminal: Terminal) -> None:
        """Copies missing experts from another bank if they are what this run would train.

        Args:
            folder: with a folder for every candidate, as in `OUT/adapters`.

        Raises:
            InputError: one was trained with other settings, on other rows, or is incomplete or modified.
        """
        records = {name: read_record(folder / name, "fetch it again") for name in missing if (folder / name).is_dir()}
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
    if not isinstance(record, dict) or not set(record) >= NEEDED or not isinstance(record["uniform"], dict):
        remedy = remedy or f"delete {folder}, and it is made again"
        raise InputError(f"{folder / 'training.json'} does not say how the expert was trained; {remedy}")
    return record
