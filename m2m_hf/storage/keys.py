"""Keys of trials: fingerprints of everything that a score depends on."""

from collections.abc import Mapping
from dataclasses import dataclass

from m2m_hf.core.mixture import Mixture
from m2m_hf.storage.files import fingerprint


@dataclass(frozen=True)
class Keys:
    """Makes the keys of one target's trials: fingerprints of everything that a score depends on.

    They need nothing but what is written in the run folder, so that whoever reads the journal can tell which of its lines
    belong to the run as it is now.

    Args:
        base: fingerprint of base weights, tokenizer and the like.
        scorer: fingerprint of the target's rows, scorer and metric.
        examples: rows of the target.
        adapters: name -> fingerprint of its adapter, which covers data, training arguments and library versions. A key covers
            those of its own mixture only, so that another candidate makes no old trial worthless.
    """

    base: str
    scorer: str
    examples: int
    adapters: Mapping[str, str]

    def merged(self, mixture: Mixture, rung: int | None = None, method: str = "merged") -> str:
        """Of the merged objective, seen on `rung` rows (None: all)."""
        parts = [[name, weight, self.adapters[name]] for name, weight in mixture.items]
        return fingerprint([method, self.base, self.scorer, self.examples if rung is None else rung, parts])

    def ensemble(self, mixture: Mixture) -> str:
        return fingerprint(["ensemble", self.merged(mixture)])

    def trained(self, counts: Mapping[str, int]) -> str:
        """Of a model fine-tuned on so many rows of each candidate."""
        return fingerprint(["trained", self.base, self.scorer, self.examples, self.model(counts)])

    def model(self, counts: Mapping[str, int]) -> str:
        """Fingerprint of that model itself, whatever it is scored on; without rows, of the base model."""
        if not counts:
            return fingerprint(["model", self.base])
        return fingerprint(["model", [[name, count, self.adapters[name]] for name, count in sorted(counts.items())]])
