"""Scorers: from a model to a score per target, with the values of every example kept wherever there are any.

A scorer prepares its target's rows once. Scoring then means forward passes (`forward.py`) over the gated stack and a reduction.
Scorers that run something else (a command, the lm-evaluation-harness, a Python function) are in `external.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score, mean_and_stderr
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import encode
from m2m_hf.errors import InputError, redact
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import Weights, completion_logprobs, token_logprobs, weight_gradient
from m2m_hf.scoring.metrics import Metric, module_file
from m2m_hf.scoring.packing import Question, Request
from m2m_hf.storage.files import file_fingerprint

ROUND = 6  # decimals kept of a log-probability: what is compared now is what the journal will say later


class Scorer(ABC):
    """Base of the scorers of one target and one set of its rows (validation or test).

    Attributes:
        examples: number of rows.
        tokens: of one pass over them, from which follows how many mixtures share a batch; 0 for scorers that take one mixture
            after another.
        cut: rows whose beginning did not fit into the model.
        fingerprint: what a score depends on beside the model.
        by_row: whether every row has a value that does not depend on the other rows, so that some of them can be scored alone.
        needs_adapter: whether it is given the mixture as a LoRA adapter rather than as a model.
    """

    examples: int
    tokens: int = 0
    cut: int = 0
    fingerprint: str
    by_row: bool = False
    needs_adapter: bool = False

    @abstractmethod
    def score(
        self,
        stack: Stack,
        mixtures: Sequence[Weights],
        tokens_per_batch: int,
        rows: Sequence[int] | None = None,
    ) -> list[Score | Failure]:
        """The score of every mixture, or why it has none.

        Args:
            rows: score these alone (only where `by_row`); the values then stand in this order.
        """

    def whole(self, score: Score) -> Score:
        """A score of all rows from their values, in the order of the rows."""
        return Score.of(score.values, score.logprobs)

    def likelihood(self, score: Score) -> float:
        """The mean log-probability of a row's right answer; for `loss`, of a token."""
        return score.mean_logprob

    def at_once(self, stack: Stack, tokens_per_batch: int, rows: int) -> int:
        """How many mixtures fill a batch with so many rows: more than one only where those of one do not."""
        if not self.tokens or not stack.takes_rows:
            return 1
        return max(1, tokens_per_batch * self.examples // (self.tokens * max(1, rows)))


class LogprobScorer(Scorer):
    """Base of the scorers that need only log-probabilities: of given completions, or of a classifier's labels."""

    by_row = True

    @abstractmethod
    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        """By mixture and row: the log-probabilities of what could be answered there, up to a constant for the row."""

    @abstractmethod
    def measure_slope(
        self, stack: GatedStack, weights: Weights, tokens_per_batch: int
    ) -> tuple[list[tuple[float, ...]], dict[str, float]]:
        """The same of one mixture and all rows, with the derivative of the `likelihood` by every adapter's weight."""

    def score(
        self,
        stack: Stack,
        mixtures: Sequence[Weights],
        tokens_per_batch: int,
        rows: Sequence[int] | None = None,
    ) -> list[Score | Failure]:
        """The score of every mixture; a model with log-probabilities that are not finite has none."""
        chosen = range(self.examples) if rows is None else rows
        results: list[Score | Failure] = []
        for sums in self.measure(stack, mixtures, tokens_per_batch, chosen):
            if all(math.isfinite(value) for values in sums for value in values):
                score = self.reduce(sums, chosen)
                results.append(self._whole(score) if rows is None else score)
            else:
                results.append(Failure("the model gives log-probabilities that are not finite"))
        return results

    @abstractmethod
    def reduce(self, sums: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score | Failure:
        """The score of these rows, from the log-probabilities of their completions."""

    @abstractmethod
    def slopes(self, number: int, sums: Sequence[float]) -> list[float]:
        """How the `likelihood` changes with the log-probabilities of the completions of one row."""

    def gradient(
        self, stack: Stack, weights: Weights, tokens_per_batch: int
    ) -> tuple[Score | Failure, dict[str, float]]:
        """The score, and the derivative of the `likelihood` by every adapter's weight."""
        assert isinstance(stack, GatedStack)
        sums, slope = self.measure_slope(stack, weights, tokens_per_batch)
        if not all(map(math.isfinite, (*slope.values(), *(value for values in sums for value in values)))):
            return Failure("the model gives gradients that are not finite"), {}
        return self._whole(self.reduce(sums, range(len(sums)))), slope

    def _whole(self, score: Score | Failure) -> Score | Failure:
        return self.whole(score) if isinstance(score, Score) and score.values else score

    @abstractmethod
    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """What a mixture makes of every row, for the ensemble objective; float32, see `ensemble.py`."""


class CompletionScorer(LogprobScorer):
    """Base of the scorers of a causal LM's completions.

    Args:
        config: the target's.
        rows: the questions.
        tokenizer: encodes them.
        max_length: positions that the model has; a longer question loses the beginning of its prompt, and is counted in `cut`.

    Raises:
        InputError: a completion that alone has more tokens than that.
    """

    def __init__(
        self, config: TargetConfig, rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.rows = rows
        self.examples = len(rows)
        self.fingerprint = content_fingerprint([config.kind, *self.settings(config), *rows], default=vars)
        self.questions: list[Question] = []
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the target"
            encoded = [encode(tokenizer, row.prompt, choice, where) for choice in row.choices]
            for ids, start in encoded:
                if len(ids) - start >= max_length:
                    raise InputError(
                        f"{where}: a completion of {len(ids) - start} tokens does not fit into the model's {max_length} positions"
                    )
            # All completions lose the same tokens, so that they go on having one prompt in common.
            surplus = max(0, max(len(ids) for ids, _ in encoded) - max_length)
            self.cut += surplus > 0
            requests = []
            for ids, start in encoded:
                drop = min(surplus, start - 1)
                requests.append(Request(tuple(ids[drop:]), start - drop))
            self.questions.append(Question(tuple(requests)))
        self.tokens = sum(
            one.shared + sum(len(request.ids) - one.shared for request in one.requests) for one in self.questions
        )

    def settings(self, config: TargetConfig) -> list[Any]:
        """What of the configuration a score depends on."""
        return [config.metric]

    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        return completion_logprobs(stack, mixtures, [self.questions[row] for row in rows], tokens_per_batch)

    def measure_slope(
        self, stack: GatedStack, weights: Weights, tokens_per_batch: int
    ) -> tuple[list[tuple[float, ...]], dict[str, float]]:
        return weight_gradient(stack, weights, self.questions, tokens_per_batch, self.slopes)


class LossScorer(CompletionScorer):
    """Token-weighted log-likelihood of the completions: Σ log p / Σ tokens, the negative of the usual validation loss.

    An example's value is its log-probability over the mean number of scored tokens, so that the mean of the values is
    the score. The standard error is that of a ratio of means (delta method).
    """

    @cached_property
    def counts(self) -> list[int]:
        """Scored tokens of every row."""
        return [question.requests[0].scored for question in self.questions]

    def reduce(self, sums: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score:
        mean_count = sum(self.counts) / len(self.counts)
        values = [round(value / mean_count, ROUND) for (value,) in sums]
        return Score.of(values, [round(value, ROUND) for (value,) in sums])

    def slopes(self, number: int, sums: Sequence[float]) -> list[float]:
        return [1 / sum(self.counts)]

    def likelihood(self, score: Score) -> float:
        return score.value

    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probability of every scored token, all rows in one; of shape (tokens, 1)."""
        found = token_logprobs(stack, [weights], self.questions, tokens_per_batch)[0]
        return (
            torch.tensor([value for (tokens,) in found for value in tokens], dtype=torch.float64).exp().float()[:, None]
        )

    def whole(self, score: Score) -> Score:
        mean_count = sum(self.counts) / len(self.counts)
        totals = zip(score.logprobs, self.counts, strict=True)
        residuals = [(total - score.value * count) / mean_count for total, count in totals]
        return Score(score.value, mean_and_stderr(residuals)[1], score.values, score.logprobs)


class AnswerScorer(LogprobScorer):
    """Base of the scorers by which a model's answer is what it finds most probable of what could be answered.

    The score is a metric of the answers' indices, or `logprob`: the log-probability of the right answer after normalising over
    those that are possible.

    Args:
        rows: the questions.
        metric: compares indices; None for `logprob`.
        lengths: of each row those by which the log-probabilities of its choices are divided.
    """

    def __init__(self, rows: Sequence[TargetRow], metric: Metric | None, lengths: Sequence[Sequence[float]]) -> None:
        self.rows = rows
        self.examples = len(rows)
        self.metric = metric
        self.by_row = metric is None or metric.by_example
        self.lengths = lengths

    def _distribution(self, row: int, sums: Sequence[float]) -> torch.Tensor:
        """Log-probabilities of a row's choices, normalised over them."""
        return (torch.tensor(sums, dtype=torch.float64) / torch.tensor(self.lengths[row])).log_softmax(0)

    def slopes(self, number: int, sums: Sequence[float]) -> list[float]:
        right = -self._distribution(number, sums).exp()
        right[self.rows[number].answer] += 1
        return (right / torch.tensor(self.lengths[number]) / self.examples).tolist()

    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probability of every choice; of shape (rows, most choices), 0 where a row has fewer."""
        sums = self.measure(stack, [weights], tokens_per_batch, range(self.examples))[0]
        found = torch.zeros(len(sums), max(map(len, sums)))
        for row, values in enumerate(sums):
            found[row, : len(values)] = self._distribution(row, values).exp().float()
        return found

    def reduce(self, sums: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score | Failure:
        guesses: list[int] = []
        logprobs: list[float] = []
        answers = [self.rows[row].answer for row in rows]
        for row, answer, values in zip(rows, answers, sums, strict=True):
            choices = self._distribution(row, values)
            guesses.append(int(choices.argmax()))
            logprobs.append(round(float(choices[answer]), ROUND))
        if self.metric is None:
            return Score.of(logprobs, logprobs)
        return measured(self.metric, guesses, answers, logprobs)


class ChoiceScorer(AnswerScorer, CompletionScorer):
    """Multiple choice, and classification by label words, by a causal LM.

    The log-probability of a choice may be taken per token or per UTF-8 byte.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        metric: Metric | None,
    ) -> None:
        CompletionScorer.__init__(self, config, rows, tokenizer, max_length)
        lengths = [
            [
                {"none": 1, "tokens": request.scored, "bytes": len(text_of(choice).encode())}[config.normalize]
                for choice, request in zip(row.choices, question.requests, strict=True)
            ]
            for row, question in zip(rows, self.questions, strict=True)
        ]
        AnswerScorer.__init__(self, rows, metric, lengths)

    def settings(self, config: TargetConfig) -> list[Any]:
        return [metric_fingerprint(config), config.normalize]


def measured(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], logprobs: Sequence[float] = ()
) -> Score | Failure:
    """What a metric says of predictions, as a score; a metric that raises, or gives no finite number, gives none."""
    try:
        value, stderr, values = metric(predictions, references)
    except Exception as error:  # a metric of the user's may raise anything, and the search goes on
        return Failure(redact(f"metric {metric.name} raised {type(error).__name__}: {error}")[:1000])
    score = Score.of(values, logprobs) if values else Score(value, stderr, (), tuple(logprobs))
    return score if score.finite else Failure(f"metric {metric.name} gives {value}")


def metric_fingerprint(config: TargetConfig) -> list[str | None]:
    """What recognises a target's metric: the bytes of its module, or its name where that is the Hub's or none."""
    module = module_file(config.metric)
    return [file_fingerprint([module]) if module else config.metric, config.metric_key]
