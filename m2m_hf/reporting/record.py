"""A finished run as its files tell it; nothing is loaded or measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

from m2m_hf.config.checks import check_name
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import TargetInfo, race_order
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.files import read_json, read_json_or_empty
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.keys import Keys
from m2m_hf.storage.run_folder import RunFolder, read_config


@dataclass(frozen=True)
class Record:
    """What the run folder holds.

    Args:
        config: `config.yaml`.
        summary: `summary.json`.
        training: candidate -> `adapters/<candidate>/training.json`.
        final: `final/training.json`, or None.
        fidelity: `fidelity.json`, or None.
        order: how every mixture stands by the search's objective, in the order in which it was first scored; the base model's
            is not among them.
        base_standing: the base model's, where it has one.
    """

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    training: Mapping[str, Mapping[str, Any]]
    final: Mapping[str, Any] | None
    fidelity: Mapping[str, Any] | None
    order: list[Standing]
    base_standing: Standing | None

    @classmethod
    def read(cls, run: RunFolder) -> "Record":
        """Reads a run folder.

        Raises:
            InputError: there is no finished search in it, or a file is damaged.
        """
        if not run.config.exists() or not run.summary.exists():
            raise InputError(
                f"{run.root} holds no finished search: it has no {'config.yaml' if not run.config.exists() else 'summary.json'}; "
                "expected the output_dir of m2m search or m2m select"
            )
        run.refuse_links()
        config = read_config(run.config)
        summary = read_json(run.summary)
        if not isinstance(summary, dict) or not {"candidates", "targets", "best", "space", "study"} <= set(summary):
            raise InputError(f"{run.summary} is none of this version; m2m search --config writes it again")
        for name in summary["candidates"]:
            check_name(name, "candidate")
        training = {name: read_json(run.adapters / name / "training.json") for name in summary["candidates"]}
        final = read_json_or_empty(run.final / "training.json") if summary["final"] else {}
        study = read_json_or_empty(run.fidelity)
        standings = recorded(Journal(run.trials), summary, training)
        return cls(
            config,
            summary,
            training,
            final or None,
            study if study.get("fingerprint") == summary["study"] else None,
            [one for one in standings if one.mixture.items],
            next((one for one in standings if not one.mixture.items), None),
        )

    @property
    def candidates(self) -> list[str]:
        return list(self.training)

    @property
    def usable(self) -> list[str]:
        """The candidates that have an adapter; those whose training failed have none."""
        return [name for name, one in self.training.items() if "failed" not in one]

    @property
    def task(self) -> str:
        """What the model is trained to do; runs of before there was a choice do not say."""
        return str(self.config.get("task", "causal_lm"))

    @property
    def full(self) -> bool:
        """Whether all parameters are trained, and not adapters."""
        return bool(self.config.get("expert") == "full")

    @property
    def expert(self) -> str:
        """What the expert of a candidate is called where people read of it."""
        return "expert" if self.full else "adapter"

    @property
    def best(self) -> Mixture:
        return Mixture.of(self.summary["best"]["mixture"])

    @property
    def base(self) -> float | None:
        return self.summary["base"]["score"] if self.summary["base"] else None

    @property
    def metric(self) -> str:
        """What is plotted: the only target's metric, or the mean of several."""
        metrics = [one["metric"] or "score" for one in self.summary["targets"].values()]
        return metrics[0] if len(metrics) == 1 else "weighted mean"

    @cached_property
    def space(self) -> SearchSpace:
        """The mixtures that may be chosen."""
        given = dict(self.summary["space"])
        given["names"], given["required"] = tuple(given["names"]), frozenset(given["required"])
        given["max_cost"] = inf if given["max_cost"] is None else given["max_cost"]
        return SearchSpace(**given)

    @staticmethod
    def score(standing: Standing) -> Score:
        """The score of a standing, corrected where it left a race."""
        assert standing.score is not None
        return Score(standing.score.value + standing.offset, standing.score.stderr)

    @cached_property
    def scored(self) -> list[Standing]:
        """The mixtures that were scored on all rows."""
        return [one for one in self.order if one.complete]

    @cached_property
    def ranked(self) -> list[Standing]:
        """Those that may be chosen, best first, the chosen one before its equals."""
        allowed = [one for one in self.scored if one.mixture in self.space and not one.short]
        return sorted(allowed, key=lambda one: (-self.score(one).value, one.mixture != self.best, len(one.mixture)))


def recorded(journal: Journal, summary: Mapping[str, Any], training: Mapping[str, Mapping[str, Any]]) -> list[Standing]:
    """How mixtures stand by the journal lines that belong to this run: those whose key is what the run gives them now."""
    targets = summary["targets"]
    adapters = {name: one["fingerprint"] for name, one in training.items()}
    keys = {
        name: Keys(one["fingerprints"]["base"], one["fingerprints"]["scorer"], one["validation_rows"], adapters)
        for name, one in targets.items()
    }
    found: dict[Mixture, dict[str, Trial]] = {}
    for trial in journal.trials.values():
        if (
            trial.objective == summary["objective"]
            and trial.target in keys
            and set(trial.mixture.names) <= set(adapters)
        ):
            of = keys[trial.target]
            if trial.objective == "ensemble":
                expected = of.ensemble(trial.mixture)
            else:
                expected = of.merged(trial.mixture, trial.rung, trial.objective)
            if trial.key == expected and trial.score is not None:
                known = found.setdefault(trial.mixture, {}).get(trial.target)
                if known is None or known.rung <= trial.rung:
                    found[trial.mixture][trial.target] = trial
    infos = [
        TargetInfo(
            name, of.examples, targets[name]["weight"], targets[name]["min_delta"], race_order(of.scorer, of.examples)
        )
        for name, of in keys.items()
    ]
    whole = {mixture: trials for mixture, trials in found.items() if len(trials) == len(targets)}
    usable = [name for name, one in training.items() if "failed" not in one]
    reference = Reference(infos, whole.get(BASE, {}), whole.get(Mixture.subset(usable), {}))
    return [reference.standing(mixture, trials) for mixture, trials in whole.items()]
