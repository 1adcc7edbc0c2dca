"""The final model, `OUT/final`: one fine-tune on the chosen mixture, scored on validation and, once, on the sealed test rows."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from m2m_hf.core.jsonable import Measurement, to_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import AnswerPair, Failure, Score, paired
from m2m_hf.errors import InputError
from m2m_hf.objectives.trained import Counts, FineTunedModels, TrainedObjective
from m2m_hf.reporting.finished_run import FinalScore
from m2m_hf.run.context import RunContext
from m2m_hf.storage.files import fingerprint, read_json_or_empty, staging_path
from m2m_hf.storage.records import find_incomplete
from m2m_hf.training.experts import expert_kind
from m2m_hf.training.fine_tune import publish
from m2m_hf.training.trackers import Tracker
from m2m_hf.training.uniformity import LAUNCH

Scores = dict[str, dict[str, dict[str, FinalScore]]]
Answers = dict[str, list[AnswerPair]]


def read_final(run: RunContext, mixture: Mixture) -> dict[str, Any] | None:
    """`final/training.json`, where the model is complete and was trained and scored as this run asks for."""
    final = read_json_or_empty(run.folder.final / "training.json")
    complete = find_incomplete(run.folder.final) is None
    return final if complete and final.get("fingerprint") == final_fingerprint(run, mixture) else None


def final_fingerprint(run: RunContext, mixture: Mixture) -> str:
    """Identifies everything that the model and its scores depend on."""
    counts = run.fine_tuned.counts(mixture)
    return fingerprint([model_key(run, counts), mixture.items, run.target_fingerprints()])


def model_key(run: RunContext, counts: Counts) -> str:
    """Identifies a model that was trained with the final settings on so many rows of each candidate."""
    facts = run.training_facts(*run.final_settings)
    # Another number of processes that look at a final model do not make it another one.
    facts = {name: value for name, value in facts.items() if name not in LAUNCH}
    sources = [[name, count, run.candidates[name].fingerprint] for name, count in sorted(counts.items())]
    return fingerprint([sources, facts])


def final_models(run: RunContext) -> FineTunedModels:
    """Where the model is made: without settings of its own it is the very model that a study fine-tunes."""
    if not run.config.final and not run.launch_changes():
        return run.fine_tuned
    args, model_args = run.final_settings
    settings = partial(run.training_settings, args, model_args)
    name, progress = partial(model_key, run), run.terminal.progress
    return FineTunedModels(run.folder.trained, run.candidates, name, run.base.to_train, args, settings, progress)


def make_final(run: RunContext, mixture: Mixture) -> None:
    """Fine-tunes on the mixture, scores base and final model, and publishes `OUT/final`."""
    models = final_models(run)
    counts = models.counts(mixture)
    start = time.monotonic()
    models.train_all([counts], f"final fine-tune on {mixture}", run="final")
    record = models.record(counts)
    if "failed" in record:
        raise InputError(record["failed"])
    seconds = time.monotonic() - start
    scores, answers = score_base_and_final(run, models, counts)
    if run.is_main:
        keep_previous(run)
        stage(run, models.folder(counts))
    publish(
        run.folder.final,
        {
            **record,
            **expert_kind(run.config.expert).origin(record),
            "fingerprint": final_fingerprint(run, mixture),
            "mixture": mixture.weights,
            "rows": sum(counts.values()),
            "scores": to_json(scores),
            **({"answers": to_json(answers)} if answers else {}),
            "total_seconds": round(max(seconds, record["seconds"]), 3),
        },
    )
    prefixes = {"validation": "eval_", "test": "test_"}
    with Tracker(run.args, "scores", enabled=run.is_main) as tracker:
        for step, model in enumerate(("base", "final")):
            parts = [(target, part, score) for target, of in scores.items() for part, score in of[model].items()]
            tracker.log(step, {prefixes[part] + target: score.score for target, part, score in parts})


def score_base_and_final(run: RunContext, models: FineTunedModels, counts: Counts) -> tuple[Scores, Answers]:
    """Target -> `base`, `final` -> part -> score, the final model's also over the base model's on the same rows; and answers."""
    scores: Scores = {}
    answers: Answers = {}
    objectives = zip(run.trained_objectives(run.fine_tuned), run.trained_objectives(models), strict=True)
    total = sum(2 * len(parts) for parts in run.scorers.values())
    with run.terminal.progress("scoring base and final model", total) as bar:
        for (target, parts), (of_base, of_final) in zip(run.scorers.items(), objectives, strict=True):
            scores[target] = {"base": {}, "final": {}}
            for part in parts:
                base = score_part(run, of_base, {}, part)
                bar.advance()
                final = score_part(run, of_final, counts, part)
                bar.advance()
                gain = Measurement(*paired({target: final}, {target: base}, {target: 1.0}))
                scores[target]["base"][part] = FinalScore(base.value, base.stderr)
                scores[target]["final"][part] = FinalScore(final.value, final.stderr, gain)
                if pairs := parts[part].answer_pairs(base, final):
                    answers[target] = pairs  # of the sealed rows, where there are any, since these come last
    return scores, answers


def score_part(run: RunContext, objective: TrainedObjective, counts: Counts, part: str) -> Score:
    """A model's score on validation or sealed test rows; the latter are looked at once."""
    target = objective.target.name
    if part == "test":
        return objective.sealed(counts, run.scorers[target][part])
    score = objective.score(counts)
    if isinstance(score, Failure):
        raise InputError(f"the {'final' if counts else 'base'} model has no score on {target}: {score.reason}")
    return score


def stage(run: RunContext, trained: Path) -> None:
    """Puts together what `OUT/final` holds: the adapter, or the whole model as it was scored; and the head."""
    folder = staging_path(run.folder.final)
    shutil.rmtree(folder, ignore_errors=True)
    expert_kind(run.config.expert).write_final(trained, folder, run.base.plain, run.task.processing)
    if run.task.head is not None and run.task.head.vectors is not None:
        shutil.copyfile(run.folder.head, folder / run.folder.head.name)


def keep_previous(run: RunContext) -> None:
    """Renames a final model of another mixture or of other settings, rather than overwriting it."""
    final = run.folder.final
    name = read_json_or_empty(final / "training.json").get("fingerprint")
    if find_incomplete(final) is None and isinstance(name, str) and name.isalnum():
        kept = final.with_name(f"final.{name}")
        if not kept.exists():
            final.rename(kept)
            run.terminal.say(f"the previous final model is now {os.path.relpath(kept)}")
