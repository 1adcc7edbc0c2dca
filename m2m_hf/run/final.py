"""The final model: one fine-tune on the chosen mixture, scored on validation and, once, on the sealed test rows."""

import os
import shutil
import time
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score, paired
from m2m_hf.errors import InputError
from m2m_hf.objectives.trained import FineTunedModels, TrainedObjective
from m2m_hf.run.context import RunContext
from m2m_hf.storage.files import fingerprint, read_json_or_empty, staging_path
from m2m_hf.storage.records import find_incomplete
from m2m_hf.training.bank import LAUNCH
from m2m_hf.training.experts import expert_kind
from m2m_hf.training.fine_tune import publish
from m2m_hf.training.trackers import Tracker

Scores = dict[str, dict[str, dict[str, Any]]]


class FinalModel:
    """`OUT/final` of a run."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def read(self, mixture: Mixture) -> dict[str, Any] | None:
        """`final/training.json`, where the model is complete and was trained and scored as this run asks for."""
        final = read_json_or_empty(self.run.folder.final / "training.json")
        complete = find_incomplete(self.run.folder.final) is None
        return final if complete and final.get("fingerprint") == self.fingerprint(mixture) else None

    def fingerprint(self, mixture: Mixture) -> str:
        """Identifies everything that the model and its scores depend on."""
        counts = self.run.fine_tuned.counts(mixture)
        return fingerprint([self._model_key(counts), mixture.items, self.run.target_fingerprints()])

    def _model_key(self, counts: Mapping[str, int]) -> str:
        """Identifies a model that was trained with the final settings on so many rows of each candidate."""
        facts = self.run.training_facts(*self.run.final_settings)
        # Another number of processes that look at a final model do not make it another one.
        facts = {name: value for name, value in facts.items() if name not in LAUNCH}
        sources = [[name, count, self.run.candidates[name].fingerprint] for name, count in sorted(counts.items())]
        return fingerprint([sources, facts])

    @cached_property
    def _models(self) -> FineTunedModels:
        """Where the model is made: without settings of its own it is the very model that a study fine-tunes."""
        run = self.run
        if not run.config.final and not run.launch_changes():
            return run.fine_tuned
        args, model_args = run.final_settings
        settings = partial(run.training_settings, args, model_args)
        return FineTunedModels(run.folder.trained, run.candidates, self._model_key, run.base.to_train, args, settings)

    def train(self, mixture: Mixture) -> None:
        """Fine-tunes on the mixture, scores base and final model, and publishes `OUT/final`."""
        run, models = self.run, self._models
        counts = models.counts(mixture)
        start = time.monotonic()
        with run.terminal.progress(f"final fine-tune on {mixture}", models.steps(counts)) as bar:
            trained = models.train(counts, bar, run="final")
        seconds = time.monotonic() - start
        scores = self._score(counts)
        record = models.record(counts)
        if run.is_main:
            self._keep_previous()
            shutil.rmtree(staging_path(run.folder.final), ignore_errors=True)
            self._stage(trained)
        publish(
            run.folder.final,
            {
                **record,
                **expert_kind(run.config.expert).origin(record),
                "fingerprint": self.fingerprint(mixture),
                "mixture": mixture.weights,
                "rows": sum(counts.values()),
                "scores": scores,
                "total_seconds": round(max(seconds, record["seconds"]), 3),
            },
        )
        with Tracker(run.args, "scores", enabled=run.is_main) as tracker:
            for step, model in enumerate(("base", "final")):
                values = {
                    ("eval_" if part == "validation" else "test_") + target: score["score"]
                    for target, of in scores.items()
                    for part, score in of[model].items()
                }
                tracker.log(step, values)

    def _score(self, counts: Mapping[str, int]) -> Scores:
        """Target -> `base`, `final` -> part -> score; the final model's also over the base model's on the same rows."""
        run = self.run
        base = run.trained_objectives(run.fine_tuned)
        final = run.trained_objectives(self._models)
        scores: Scores = {}
        total = sum(2 * len(parts) for parts in run.scorers.values())
        with run.terminal.progress("scoring base and final model", total) as bar:
            for number, (target, parts) in enumerate(run.scorers.items()):
                scores[target] = {"base": {}, "final": {}}
                for part in parts:
                    found: dict[str, Score] = {}
                    for model, objective, rows in (("base", base[number], {}), ("final", final[number], counts)):
                        found[model] = score = self._score_part(objective, rows, target, part, model)
                        scores[target][model][part] = {"score": score.value, "stderr": score.stderr}
                        bar.advance()
                    value, stderr = paired({target: found["final"]}, {target: found["base"]}, {target: 1.0})
                    scores[target]["final"][part]["over_base"] = {"value": value, "stderr": stderr}
        return scores

    def _score_part(
        self, objective: TrainedObjective, counts: Mapping[str, int], target: str, part: str, model: str
    ) -> Score:
        """A model's score on validation or sealed test rows; the latter are looked at once."""
        if part == "test":
            return objective.sealed(counts, self.run.scorers[target][part])
        score = objective.score(counts)
        if isinstance(score, Failure):
            raise InputError(f"the {model} model has no score on {target}: {score.reason}")
        return score

    def _stage(self, trained: Path) -> None:
        """Puts together what `OUT/final` holds: the adapter, or the whole model as it was scored; and the head."""
        run = self.run
        folder = staging_path(run.folder.final)
        expert_kind(run.config.expert).write_final(trained, folder, run.base.plain, run.task.processing)
        if run.task.head is not None and run.task.head.vectors is not None:
            shutil.copyfile(run.folder.head, folder / run.folder.head.name)

    def _keep_previous(self) -> None:
        """Renames a final model of another mixture or of other settings, rather than overwriting it."""
        final = self.run.folder.final
        name = read_json_or_empty(final / "training.json").get("fingerprint")
        if find_incomplete(final) is None and isinstance(name, str) and name.isalnum():
            kept = final.with_name(f"final.{name}")
            if not kept.exists():
                final.rename(kept)
                self.run.terminal.say(f"the previous final model is now {os.path.relpath(kept)}")
