"""The ensemble objective: a mixture's score from the probabilities that each of its adapters gives by itself.

Every adapter is scored once, and the probability p_i of every right answer kept. The surrogate for a mixture is Σ w_i p_i. So N
passes over the validation set suffice for all subsets and weights, and the best weights are a convex problem (Mixture of Data
Experts, arXiv 2502.15950; MixMin, arXiv 2502.10510).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.objectives.merged import MergedObjective, ScorerObjective
from m2m_hf.scoring.causal_lm import LossScorer
from m2m_hf.scoring.scorers import ROUND, AnswerScorer, LogprobScorer
from m2m_hf.search.model_based import SUBSETS
from m2m_hf.storage.files import readable, sync

BLOCK = 1 << 24  # numbers in one temporary tensor


class Ensemble:
    """Scores of mixtures from the probabilities of their parts.

    Args:
        probabilities: float32, of shape (parts, items, options). For choices an item is a row and an option a choice; otherwise
            an item is a scored token, and its probability the only option.
        accuracy: score by the share of items whose most probable option is right, instead of the log-probability.
        counts: items per row, if rows have several.
    """

    def __init__(
        self,
        names: Sequence[str],
        probabilities: torch.Tensor,
        answers: Sequence[int],
        accuracy: bool,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.probabilities = probabilities
        self.right = probabilities.gather(2, torch.tensor(answers)[None, :, None].expand(len(names), -1, 1))[..., 0]
        self.answers = torch.tensor(answers)
        self.accuracy = accuracy
        self.counts = counts

    def score(self, mixture: Mixture) -> Score:
        """The score of a mixture of these parts."""
        weights = torch.tensor([mixture.weights.get(name, 0.0) for name in self.names], dtype=torch.float64)
        logs = (weights @ self.right.double()).log()
        if self.counts is not None:
            rows = torch.tensor([float(part.sum()) for part in torch.split(logs, list(self.counts))])
            mean = len(logs) / len(rows)
            values = [round(value, ROUND) for value in (rows / mean).tolist()]
            return Score.of(values, [round(value, ROUND) for value in rows.tolist()])
        logprobs = [round(value, ROUND) for value in logs.tolist()]
        if not self.accuracy:
            return Score.of(logprobs, logprobs)
        guesses = torch.einsum("n,nro->ro", weights, self.probabilities.double()).argmax(1)
        return Score.of((guesses == self.answers).double().tolist(), logprobs)

    def values(self, weights: torch.Tensor) -> torch.Tensor:
        """Only the scores, of shape (mixtures,), from weights of shape (mixtures, parts)."""
        if self.accuracy:
            items, options = self.probabilities.shape[1:]
            mixed = (weights @ self.probabilities.flatten(1)).view(-1, items, options)
            return (mixed.argmax(2) == self.answers).float().mean(1)
        return (weights @ self.right).log_().mean(1)

    def best_subsets(self, space: SearchSpace, count: int = SUBSETS) -> list[Mixture]:
        """The best subsets of the space, best first, found by looking at all: 2^20 take seconds."""
        kept: list[tuple[float, tuple[int, ...]]] = []
        place = [self.names.index(name) for name in space.names]
        for bits in subset_blocks(space, max(1, BLOCK // self.probabilities[0].numel())):
            weights = torch.zeros(len(bits), len(self.names))
            weights[:, place] = bits / bits.sum(1, keepdim=True)
            values = self.values(weights)
            top = values.topk(min(count, len(values))).indices
            kept += [(float(values[row]), tuple(torch.nonzero(bits[row])[:, 0].tolist())) for row in top]
            kept = sorted(kept, key=lambda one: (-one[0], len(one[1]), one[1]))[:count]
        return [Mixture.subset([space.names[number] for number in members]) for _, members in kept]

    def best_weights(self, space: SearchSpace) -> list[Mixture]:
        """The mixtures that make the right answers most probable, best first.

        These are the optimum over all candidates and, for every allowed size, the optimum over the heaviest of them.
        """
        weights = self._optimum(space.names)
        order = sorted(weights, key=lambda name: (-weights[name], name))
        optima = [space.weighted(weights, drop=True)]
        for size in range(space.fewest, space.most + 1):
            optima.append(space.weighted(self._optimum(space.nearest(order, size))))
        allowed = [mixture for mixture in dict.fromkeys(optima) if mixture in space]
        return sorted(allowed, key=lambda mixture: (-self.score(mixture).mean_logprob, len(mixture), mixture.items))

    def _optimum(self, names: Sequence[str]) -> dict[str, float]:
        """The best weights of these parts; solves the concave problem by SciPy's SLSQP."""
        rows = self.right[[self.names.index(name) for name in names]].double().numpy()
        count = len(rows)

        def loss(weights: Any) -> tuple[float, Any]:
            mixed = weights @ rows
            return -float(np.log(mixed).mean()), -(rows / mixed).mean(1)

        solution = minimize(
            loss,
            np.full(count, 1 / count),
            jac=True,
            method="SLSQP",
            bounds=[(1e-9, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
            options={"maxiter": 500, "ftol": 1e-10},
        )
        return dict(zip(names, np.maximum(solution.x, 0).tolist(), strict=True))


def subset_blocks(space: SearchSpace, size: int) -> Iterator[torch.Tensor]:
    """All allowed subsets as rows of 0 and 1 in the order of `space.names`, in blocks of up to `size` rows."""
    count = len(space.names)
    costs = torch.tensor([space.cost_of(name) for name in space.names], dtype=torch.float64)
    required = torch.tensor([name in space.required for name in space.names])
    for start in range(1, 1 << count, size):
        codes = torch.arange(start, min(start + size, 1 << count))
        bits = (codes[:, None] >> torch.arange(count)) & 1
        sizes = bits.sum(1)
        allowed = (sizes >= space.fewest) & (sizes <= space.most) & (bits[:, required].all(1))
        allowed &= bits.double() @ costs <= space.max_cost * (1 + 1e-9)
        if allowed.any():
            yield bits[allowed].float()


class EnsembleObjective(ScorerObjective):
    """The second surrogate, far cheaper than the merged one of the same target. Keeps in `folder` what costs a forward pass."""

    name = "ensemble"
    scorer: LogprobScorer

    def __init__(self, merged: MergedObjective, folder: Path) -> None:
        super().__init__(merged.scorer, merged.keys, merged.target)
        self._merged = merged
        self._folder = folder
        self._parts: dict[str, torch.Tensor] = {}

    def evaluations(self, mixture: Mixture, rows: int) -> int:
        """Only the parts themselves cost a forward pass."""
        return rows if len(mixture) <= 1 else 0

    def _part(self, name: str) -> torch.Tensor:
        """The probabilities under one adapter; without a name, under the base model."""
        if name not in self._parts:
            alone = Mixture.subset([name] if name else [])
            path = self._folder / f"{self.key(alone)}.safetensors"
            if not readable(path):
                probabilities = self.scorer.probabilities(*self._merged.model(alone))
                if PartialState().is_main_process:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    save_file({"probabilities": probabilities}, path.with_suffix(".partial"))
                    sync(self._folder)
                    path.with_suffix(".partial").rename(path)
                    sync(self._folder, files=False)
                PartialState().wait_for_everyone()
            self._parts[name] = load_file(path)["probabilities"]
        return self._parts[name]

    def ensemble(self, names: Sequence[str]) -> Ensemble:
        """The probabilities of these parts; each unknown one costs a forward pass."""
        scorer = self.scorer
        parts = torch.stack([self._part(name) for name in names])
        if isinstance(scorer, LossScorer):
            return Ensemble(names, parts, [0] * parts.shape[1], False, scorer.counts)
        assert isinstance(scorer, AnswerScorer)
        return Ensemble(names, parts, [row.answer for row in scorer.rows], scorer.metric is not None)

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        return [self._score_one(mixture) for mixture in mixtures]

    def _score_one(self, mixture: Mixture) -> Score | Failure:
        ensemble = self.ensemble(mixture.names or ("",))
        if not torch.isfinite(ensemble.right).all() or not bool((ensemble.right > 0).any(0).all()):
            return Failure("a right answer has probability 0")
        return self._summarise(ensemble.score(mixture if mixture.items else Mixture((("", 1.0),))))
