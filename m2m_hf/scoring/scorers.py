"""The contract of all scorers: a model in, a score of one target out, with the values of all examples where there are any.

A scorer prepares its target's rows once. To score is then to run forward passes over the stack (`forward.py`) and to reduce their
results. `causal_lm.py`, `generation.py` and `classification.py` hold the scorers; `external.py` those that run something else.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2m_hf.core.score import AnswerPair, Failure, Score
from m2m_hf.data.classification import Length
from m2m_hf.data.rows import TargetRow, content_fingerprint
from m2m_hf.errors import redact
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.heads import Head
from m2m_hf.scoring.forward import (
    ALIKE,
    ALONE,
    TOGETHER,
    UNSHARED,
    Inputs,
    Weights,
    measure,
    measure_gradient,
    per_pass,
)
from m2m_hf.scoring.metrics.metric import Metric

ROUND = 6  # decimals kept of a log-probability, so that what is compared now is what the journal will hold
PASSES = 4  # over which mixtures that share passes are spread on a GPU
MAX_REASON = 1000  # characters of a failure's reason
Numbers = Mapping[int, torch.Tensor]  # answer of a row -> what the model gives for it


@dataclass(frozen=True)
class Setup:
    """What scorers are made of, beside a target and its rows."""

    processing: Any  # the tokenizer, or the image processor
    positions: int = 0  # tokens that the model takes
    head: Callable[[], Head] | None = None  # of a classifier, whose head may not be there yet
    length: Length | None = None  # of a classifier
    base: str = ""  # the base model's folder or Hub id
    allow_metric_code: bool = False
    answers: Path | None = None  # a folder that keeps what models answer
    reward: Any = None  # the `RewardModel` that rates them, where several scorers share one
    judged: Callable[[str], Path] | None = None  # target -> the file that keeps what its judge says
    judge: Any = None  # the `JudgeServer` that compares answers
    base_key: Callable[[], str] = str  # identifies the base model as it is scored
    where: str = "target"  # for messages


class Scorer(ABC):
    """Base of the scorers of one target and one set of its rows (validation or test).

    Attributes:
        examples: number of rows.
        tokens: of one pass over the rows, which tells how many mixtures share a batch; 0 if mixtures are scored one by one.
        truncated: rows that did not fit into the model.
        fingerprint: of everything a score depends on beside the model.
        by_row: whether a row's value does not depend on the other rows, so that some of them can be scored alone.
        has_ensemble: whether the ensemble objective can score the target, from the probabilities of right answers.
        apart: how far rows are kept apart, as `probing.py` has found.
        unshared: what `UNSHARED` means here, for people.
    """

    unshared = "every choice is scored in a row of its own"
    examples: int
    tokens: int = 0
    truncated: int = 0
    fingerprint: str
    by_row: bool = False
    has_ensemble: bool = False
    apart: int = TOGETHER

    def probes(self, model: Any, apart: int) -> list[list[int]]:
        """Batches of rows that tell whether rows may be kept no further apart than this."""
        return []

    def numbers(self, model: Any, rows: Sequence[int]) -> list[Numbers]:
        """What the model gives for every row of a batch, in the same order however far apart rows are kept."""
        raise NotImplementedError

    def alone(self, model: Any, row: int) -> Numbers:
        """What the model gives for one row by itself, or for some of its answers."""
        return self.numbers(model, [row])[0]

    def keep_apart(self, apart: int) -> None:
        """Keeps rows so far apart from now on; scores made otherwise are others."""
        self.apart = apart
        self.fingerprint = apart_fingerprint(self.fingerprint, apart)

    def recall(self, fingerprint: str | None) -> bool:
        """True if `fingerprint` is of this scorer, which then keeps rows as far apart as that one did."""
        for apart in (TOGETHER, UNSHARED, ALIKE, ALONE):
            if fingerprint == apart_fingerprint(self.fingerprint, apart):
                self.keep_apart(apart)
                return True
        return False

    @abstractmethod
    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        """The score of every mixture, or why it has none.

        Args:
            rows: score only these (needs `by_row`); the values then stand in this order.
        """

    def rehearse(self, stack: Stack, tokens_per_batch: int, rows: Sequence[int]) -> None:
        """Does what a mixture's score on these rows takes of this machine, to measure it."""
        self.score(stack, [{}], tokens_per_batch, rows)

    def whole(self, score: Score) -> Score:
        """The score of all rows from their values, if it has any, in the order of the rows."""
        return Score.of(score.values, score.logprobs) if score.values else score

    def likelihood(self, score: Score) -> float:
        """The mean log-probability of a row's right answer; for `loss`, of a token."""
        return score.mean_logprob

    def answer_pairs(self, base: Score, final: Score) -> list[AnswerPair]:
        """The rows that gained and lost most, with both answers; none where the scorer keeps no answers."""
        return []

    def at_once(self, stack: Stack, tokens_per_batch: int, rows: int) -> int:
        """How many mixtures are best asked together on this number of rows; 1 if those of one mixture fill a pass."""
        share = per_pass(stack, self, self.examples, rows, tokens_per_batch)
        # While a GPU is at one pass, Python makes the next one ready.
        return share * PASSES if share > 1 and stack.model.device.type == "cuda" else share


def apart_fingerprint(fingerprint: str, apart: int) -> str:
    """A scorer's fingerprint where rows are kept so far apart."""
    return content_fingerprint([fingerprint, apart]) if apart else fingerprint


def probe_groups(
    batches: Iterable[Sequence[int]], sizes: Sequence[tuple[int, int, int]], apart: int
) -> list[list[int]]:
    """Of batches, up to three of the largest: their shortest, longest and widest rows; or rows of one size."""
    groups = []
    for rows in sorted(batches, key=len, reverse=True)[:3]:
        if apart == ALIKE:
            alike: dict[Any, list[int]] = defaultdict(list)
            for row in rows:
                alike[sizes[row]].append(row)
            groups.append(max(alike.values(), key=len)[:2])
            continue
        picks = [
            pick(rows, key=lambda row: sizes[row][part]) for pick, part in ((min, 1), (min, 0), (max, 1), (max, 2))
        ]
        groups.append(list(dict.fromkeys(picks)))
    return groups


def numbers_of(outputs: torch.Tensor, owners: np.ndarray, rows: int) -> list[Numbers]:
    """By row and answer: its numbers, as `probing.py` compares them."""
    found: list[dict[int, list[float]]] = [defaultdict(list) for _ in range(rows)]
    for (row, answer), value in zip(owners.tolist(), outputs.double().tolist(), strict=True):
        found[row][answer].append(value)
    return [{answer: torch.tensor(values, dtype=torch.float64) for answer, values in one.items()} for one in found]


class LogprobScorer(Scorer):
    """Base of the scorers that need only log-probabilities: of given completions, or of a classifier's labels.

    Args:
        rows: the questions.
        inputs: the same as the model reads them; gives the log-probabilities of a row's possible answers, up to a constant.
    """

    by_row = True
    has_ensemble = True

    def __init__(self, rows: Sequence[TargetRow], inputs: Inputs) -> None:
        self.rows, self.inputs = rows, inputs
        self.examples, self.tokens, self.truncated = len(rows), inputs.tokens, inputs.truncated

    @property
    def apart(self) -> int:
        return self.inputs.apart

    @apart.setter
    def apart(self, apart: int) -> None:
        self.inputs.apart = apart

    def probes(self, model: Any, apart: int) -> list[list[int]]:
        before, self.apart = self.apart, apart
        batches = list(self.inputs.batches(model, [(0, row) for row in range(self.examples)], 1 << 60))
        self.apart = before
        return probe_groups([[row for _, row in batch] for batch in batches], self.inputs.sizes, apart)

    def numbers(self, model: Any, rows: Sequence[int]) -> list[Numbers]:
        return numbers_of(*self.inputs.outputs(model, rows), len(rows))

    def alone(self, model: Any, row: int) -> Numbers:
        return numbers_of(*self.inputs.alone(model, row), 1)[0]

    @abstractmethod
    def reduce(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score | Failure:
        """The score of these rows, from the log-probabilities of their possible answers."""

    @abstractmethod
    def slopes(self, row: int, logprobs: Sequence[float]) -> list[float]:
        """The derivatives of the `likelihood` with respect to the log-probabilities of one row's possible answers."""

    @abstractmethod
    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probabilities that a mixture gives, for the ensemble objective; float32, see `ensemble.py`."""

    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        chosen = range(self.examples) if rows is None else rows
        measured = measure(stack, mixtures, self.inputs, chosen, tokens_per_batch)
        return [self._score(logprobs, rows) for logprobs in measured]

    def gradient(
        self, stack: Stack, weights: Weights, tokens_per_batch: int
    ) -> tuple[Score | Failure, dict[str, float]]:
        """The score, and the derivative of the `likelihood` with respect to every adapter's weight."""
        assert isinstance(stack, GatedStack)
        every = range(self.examples)
        logprobs, slopes = measure_gradient(stack, weights, self.inputs, every, tokens_per_batch, self.slopes)
        if not all(map(math.isfinite, slopes.values())):
            return Failure("the model gives gradients that are not finite"), {}
        return self._score(logprobs, None), slopes

    def _score(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int] | None) -> Score | Failure:
        if not all(math.isfinite(value) for values in logprobs for value in values):
            return Failure("the model gives log-probabilities that are not finite")
        score = self.reduce(logprobs, range(self.examples) if rows is None else rows)
        return self.whole(score) if rows is None and isinstance(score, Score) else score


class AnswerScorer(LogprobScorer):
    """Base of the scorers by which a model answers with the most probable of the possible answers.

    The score is a metric of the answers' indices, or `logprob`: the log-probability of the right answer, normalised over the
    possible ones.

    Args:
        metric: compares indices; None for `logprob`.
        lengths: of every row, the numbers by which the log-probabilities of its choices are divided.
    """

    def __init__(
        self, rows: Sequence[TargetRow], inputs: Inputs, metric: Metric | None, lengths: Sequence[Sequence[float]]
    ) -> None:
        super().__init__(rows, inputs)
        self.metric, self.lengths = metric, lengths
        self.by_row = metric is None or metric.by_example
        self.has_ensemble = metric is None or metric.name == "accuracy"

    def _distributions(self, rows: Sequence[int], logprobs: Sequence[Sequence[float]]) -> list[list[float]]:
        """Log-probabilities of every row's choices, normalised over them; of all rows with equally many at once."""
        found: list[list[float]] = [[] for _ in rows]
        alike: dict[int, list[int]] = defaultdict(list)
        for place, values in enumerate(logprobs):
            alike[len(values)].append(place)
        for places in alike.values():
            lengths = torch.tensor([self.lengths[rows[place]] for place in places])
            totals = torch.tensor([logprobs[place] for place in places], dtype=torch.float64)
            for place, normalised in zip(places, (totals / lengths).log_softmax(1).tolist(), strict=True):
                found[place] = normalised
        return found

    def slopes(self, row: int, logprobs: Sequence[float]) -> list[float]:
        right = -torch.tensor(self._distributions([row], [logprobs])[0], dtype=torch.float64).exp()
        right[self.rows[row].answer] += 1
        return (right / torch.tensor(self.lengths[row]) / self.examples).tolist()

    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probability of every choice, of shape (rows, most choices); 0 where a row has fewer."""
        (answers,) = measure(stack, [weights], self.inputs, range(self.examples), tokens_per_batch)
        probabilities = torch.zeros(len(answers), max(map(len, answers)))
        for row, values in enumerate(self._distributions(range(len(answers)), answers)):
            probabilities[row, : len(values)] = torch.tensor(values, dtype=torch.float64).exp().float()
        return probabilities

    def reduce(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score | Failure:
        answers = [self.rows[row].answer for row in rows]
        choices = self._distributions(rows, logprobs)
        right = [round(values[answer], ROUND) for values, answer in zip(choices, answers, strict=True)]
        if self.metric is None:
            return Score.of(right, right)
        return metric_score(self.metric, [values.index(max(values)) for values in choices], answers, right)


def metric_score(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], logprobs: Sequence[float] = ()
) -> Score | Failure:
    """A metric's value as a score. A metric that raises, or gives no finite number, is a failure."""
    try:
        value, stderr, values = metric(predictions, references)
    except Exception as error:  # a metric of the user's may raise anything, and the search goes on
        return failure(f"metric {metric.name} raised {type(error).__name__}: {error}")
    score = Score.of(values, logprobs) if values else Score(value, stderr, (), tuple(logprobs))
    return score if score.finite else Failure(f"metric {metric.name} gives {value}")


def failure(reason: str) -> Failure:
    """A failure whose reason the journal may hold."""
    return Failure(redact(reason)[:MAX_REASON])
