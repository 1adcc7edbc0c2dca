"""Keys of trials: fingerprints of everything that a score depends on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.core.trial import Trial
from m2m_hf.storage.files import fingerprint

CAUSAL_FACTS = ("base_model", "dtype", "tokenizer", "chat_template", "quantization")
LABELLED_FACTS = (*CAUSAL_FACTS, "image_processor", "head", "labels", "label_template", "sides")


def base_key(facts: Mapping[str, Any]) -> str:
    """Fingerprint of the base model as it is scored, from what all experts have in common (`uniform` of a `training.json`)."""
    return fingerprint([facts.get(name) for name in (LABELLED_FACTS if "head" in facts else CAUSAL_FACTS)])


@dataclass(frozen=True)
class Keys:
    """Makes the keys of one target's trials.

    Everything they need stands in the run folder, so that readers of the journal can tell which lines belong to the run as it
    is now.

    Args:
        base: fingerprint of base weights, tokenizer and the like.
        scorer: fingerprint of the target's rows, scorer and metric.
        examples: rows of the target.
        adapters: name -> fingerprint of its adapter, which covers data, training arguments and library versions. A key covers
            the adapters of its own mixture only, so that trials stay valid when a candidate joins.
        rows: name -> how many rows the candidate has.
        stale: name -> fingerprint that an adapter of the rows as they are now would have, where its adapter is of others. What
            is fine-tuned on the rows has these; what is made of the adapters has `adapters`.
    """

    base: str
    scorer: str
    examples: int
    adapters: Mapping[str, str]
    rows: Mapping[str, int]
    stale: Mapping[str, str] = field(default_factory=dict)

    def of(self, objective: str, mixture: Mixture, rung: int | None = None) -> str:
        """The key of a score, or of the merged score's gradient, on `rung` rows (None: all)."""
        if objective == "trained":
            return self.trained(row_counts(mixture, self.rows), rung)
        if objective == "ensemble":
            return fingerprint(["ensemble", self.of("merged", mixture, rung)])
        if objective == "gradient":
            return f"{self.of('merged', mixture, rung)}/gradient"
        parts = [[name, weight, self.adapters[name]] for name, weight in mixture.items]
        return fingerprint([objective, self.base, self.scorer, self.examples if rung is None else rung, parts])

    def trained(self, counts: Mapping[str, int], rung: int | None = None) -> str:
        """The key of a model fine-tuned on so many rows of each candidate."""
        rows = self.examples if rung is None else rung
        return fingerprint(["trained", self.base, self.scorer, rows, self.model(counts)])

    def model(self, counts: Mapping[str, int]) -> str:
        """Fingerprint of that model, whatever it is scored on; without rows, of the base model."""
        if not counts:
            return fingerprint(["model", self.base])
        of = {**self.adapters, **self.stale}
        return fingerprint(["model", [[name, count, of[name]] for name, count in sorted(counts.items())]])

    def facts(self) -> dict[str, Any]:
        """What identifies all scores of a run; nothing is said of stale adapters where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "stale" or value}

    def own(self, trial: Trial) -> bool:
        """True if a line of the journal belongs to this run as it is now."""
        known = set(trial.mixture.names) <= set(self.adapters)
        return known and trial.key == self.of(trial.objective, trial.mixture, trial.rung)
