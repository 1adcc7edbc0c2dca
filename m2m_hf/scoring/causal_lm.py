"""Scoring a causal LM's completions: `loss`, `choice`, and `classification` by label words."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Score, mean_and_stderr
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import encode
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import Weights, completion_logprobs, token_logprobs, weight_gradient
from m2m_hf.scoring.generation import GenerationScorer
from m2m_hf.scoring.metrics.metric import Metric, load_metric, metric_fingerprint
from m2m_hf.scoring.packing import Question, Request
from m2m_hf.scoring.scorers import ROUND, AnswerScorer, Gradient, LogprobScorer, Scorer


def make_causal_lm_scorer(
    config: TargetConfig,
    rows: Sequence[TargetRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    allow_metric_code: bool = False,
    where: str = "target",
) -> Scorer:
    """The scorer that `config` asks for, over `rows`.

    Raises:
        InputError: rows that do not fit the model, a metric that cannot be loaded or does not fit the scorer.
    """
    if config.kind == "loss":
        return LossScorer(config, rows, tokenizer, max_length)
    metric = load_metric(config, allow_metric_code, where)
    if config.kind == "generation":
        assert metric is not None
        return GenerationScorer(config, rows, tokenizer, max_length, metric)
    return ChoiceScorer(config, rows, tokenizer, max_length, metric)


class CompletionScorer(LogprobScorer):
    """Base of the scorers of a causal LM's completions.

    A question longer than `max_length`, the model's positions, loses the beginning of its prompt, and counts as truncated.

    Raises:
        InputError: a completion that alone has more tokens than that.
    """

    def __init__(
        self, config: TargetConfig, rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.rows = rows
        self.examples = len(rows)
        self.fingerprint = content_fingerprint([config.kind, *self.settings(config), *rows])
        self.questions: list[Question] = []
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the target"
            encoded = [encode(tokenizer, row.prompt, choice, where) for choice in row.choices]
            for ids, start in encoded:
                if len(ids) - start >= max_length:
                    raise InputError(
                        f"{where}: a completion of {len(ids) - start} tokens does not fit into the model's {max_length} positions"
                    )
            # All completions lose the same tokens, so that they still share one prompt.
            surplus = max(0, max(len(ids) for ids, _ in encoded) - max_length)
            self.truncated += surplus > 0
            drops = [(ids, start, min(surplus, start - 1)) for ids, start in encoded]
            self.questions.append(
                Question(tuple(Request(tuple(ids[drop:]), start - drop) for ids, start, drop in drops))
            )
        self.tokens = sum(
            question.shared + sum(len(request.ids) - question.shared for request in question.requests)
            for question in self.questions
        )

    def settings(self, config: TargetConfig) -> list[Any]:
        """What of the configuration a score depends on."""
        return [config.metric]

    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        return completion_logprobs(stack, mixtures, [self.questions[row] for row in rows], tokens_per_batch)

    def measure_gradient(self, stack: GatedStack, weights: Weights, tokens_per_batch: int) -> Gradient:
        return weight_gradient(stack, weights, self.questions, tokens_per_batch, self.slopes)


class LossScorer(CompletionScorer):
    """Token-weighted log-likelihood of the completions, Σ log p / Σ tokens: the negative of the usual validation loss.

    An example's value is its log-probability over the mean number of scored tokens, so that the mean of the values is
    the score. The standard error is that of a ratio of means (delta method).
    """

    @cached_property
    def counts(self) -> list[int]:
        """Scored tokens of every row."""
        return [question.requests[0].scored for question in self.questions]

    @cached_property
    def total(self) -> int:
        """Scored tokens of all rows."""
        return sum(self.counts)

    @property
    def mean_count(self) -> float:
        return self.total / len(self.counts)

    def reduce(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score:
        values = [round(value / self.mean_count, ROUND) for (value,) in logprobs]
        return Score.of(values, [round(value, ROUND) for (value,) in logprobs])

    def slopes(self, row: int, logprobs: Sequence[float]) -> list[float]:
        return [1 / self.total]

    def likelihood(self, score: Score) -> float:
        return score.value

    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probability of every scored token of all rows, of shape (tokens, 1)."""
        rows = token_logprobs(stack, [weights], self.questions, tokens_per_batch)[0]
        logprobs = torch.tensor([value for (tokens,) in rows for value in tokens], dtype=torch.float64)
        return logprobs.exp().float()[:, None]

    def whole(self, score: Score) -> Score:
        totals = zip(score.logprobs, self.counts, strict=True)
        residuals = [(total - score.value * count) / self.mean_count for total, count in totals]
        return Score(score.value, mean_and_stderr(residuals)[1], score.values, score.logprobs)


class ChoiceScorer(AnswerScorer, CompletionScorer):
    """Multiple choice. The log-probability of a choice may be taken per token or per UTF-8 byte."""

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
