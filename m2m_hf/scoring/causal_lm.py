"""Scoring the completions of a causal LM: `loss`, `choice`, `preference`, and `classification` by label words."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score, mean_and_stderr
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import appended, encode_choices
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.forward import QuestionInputs, Weights, measure
from m2m_hf.scoring.metrics.metric import load_metric, metric_fingerprint
from m2m_hf.scoring.packing import Question, Request
from m2m_hf.scoring.scorers import (
    ROUND,
    AnswerScorer,
    LogprobScorer,
    Setup,
)


def encode_rows(rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int) -> QuestionInputs:
    """Rows as the model reads them. One longer than `max_length`, the model's positions, loses the beginning of its prompt."""
    questions, truncated, reading = [], 0, ends_taken_off(tokenizer, rows)
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of the target"
        tokens, start, later = encode_choices(tokenizer, row.asked, row.choices, where, row.tools)
        reading += [[number, start]] if later else []
        if tokens.count(tokens[row.answer]) > 1:
            raise InputError(
                f"{where}: the tokenizer reads the right answer and another choice alike: {row.choices!r:.200}; leave out "
                "the row, or write them otherwise"
            )
        for ids in tokens:
            if len(ids) - start >= max_length:
                raise InputError(
                    f"{where}: a completion of {len(ids) - start} tokens does not fit into the model's {max_length} positions"
                )
        # All completions lose the same tokens, so that they still share one prompt.
        surplus = max(0, max(map(len, tokens)) - max_length)
        truncated += surplus > 0
        drop = min(surplus, start - 1)
        questions.append(Question([Request(tuple(ids[drop:]), start - drop) for ids in tokens]))
    return QuestionInputs(questions, truncated, reading=reading)


def ends_taken_off(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TargetRow]) -> list[Any]:
    """For fingerprints: how many end tokens of the tokenizer's own are taken off texts, if any are."""
    ends = appended(tokenizer) if rows and isinstance(rows[0].prompt, str) else 0
    return [{"ends": ends}] if ends else []


class LossScorer(LogprobScorer):
    """Token-weighted log-likelihood of the completions, Σ log p / Σ tokens: the negative of the usual validation loss.

    An example's value is its log-probability over the mean number of scored tokens, so that the mean of the values is
    the score. The standard error is that of a ratio of means (delta method).
    """

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        inputs = encode_rows(rows, setup.processing, setup.positions)
        super().__init__(rows, inputs)
        self._tokens = QuestionInputs(inputs.questions, by_token=True)
        self.fingerprint = content_fingerprint([config.kind, config.metric, *rows, *inputs.reading])
        self.counts = [question.requests[0].scored for question in inputs.questions]  # scored tokens of every row
        self.total = sum(self.counts)
        self.mean_count = self.total / len(rows)

    def reduce(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score:
        values = [round(value / self.mean_count, ROUND) for (value,) in logprobs]
        return Score.of(values, [round(value, ROUND) for (value,) in logprobs])

    def slopes(self, row: int, logprobs: Sequence[float]) -> list[float]:
        return [1 / self.total]

    def likelihood(self, score: Score) -> float:
        return score.value

    def probabilities(self, stack: Stack, weights: Weights, tokens_per_batch: int) -> torch.Tensor:
        """The probability of every scored token of all rows, of shape (tokens, 1)."""
        self._tokens.apart = self.apart
        (rows,) = measure(stack, [weights], self._tokens, range(self.examples), tokens_per_batch)
        logprobs = torch.tensor([value for tokens in rows for value in tokens], dtype=torch.float64)
        return logprobs.exp().float()[:, None]

    def whole(self, score: Score) -> Score:
        totals = zip(score.logprobs, self.counts, strict=True)
        residuals = [(total - score.value * count) / self.mean_count for total, count in totals]
        return Score(score.value, mean_and_stderr(residuals)[1], score.values, score.logprobs)


class ChoiceScorer(AnswerScorer):
    """Multiple choice. The log-probability of a choice may be taken per token or per UTF-8 byte."""

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        metric = None if config.metric == "margin" else load_metric(config, setup.allow_metric_code, setup.where)
        inputs = encode_rows(rows, setup.processing, setup.positions)
        lengths = [
            [
                {"none": 1, "tokens": request.scored, "bytes": len(text_of(choice).encode())}[config.normalize]
                for choice, request in zip(row.choices, question.requests, strict=True)
            ]
            for row, question in zip(rows, inputs.questions, strict=True)
        ]
        super().__init__(rows, inputs, metric, lengths)
        facts = [config.kind, metric_fingerprint(config), config.normalize, *rows, *inputs.reading]
        self.fingerprint = content_fingerprint(facts)


class PreferenceScorer(ChoiceScorer):
    """Which of two completions is more likely, and by how much.

    A row's choices are (rejected, chosen). Of equally likely ones the first counts as the answer: a tie is no win, as in TRL.
    Its `logprobs` are log σ(margin), natural logarithm, with the margin log p(chosen) − log p(rejected), each over its length.
    """

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        self.margin = config.metric == "margin"
        for number, row in enumerate(rows, start=1):
            if config.normalize == "bytes" and any(
                not isinstance(choice, str) and (len(choice) > 1 or "tool_calls" in choice[0]) for choice in row.choices
            ):
                raise InputError(
                    f"row {number} of the target: normalize: bytes counts one text, and chosen or rejected is more; expected "
                    "normalize: tokens"
                )
        super().__init__(config, rows, setup)
        self.has_ensemble = not self.margin  # an average of probabilities has no margin

    def reduce(self, logprobs: Sequence[tuple[float, ...]], rows: Sequence[int]) -> Score | Failure:
        score = super().reduce(logprobs, rows)
        if not self.margin or isinstance(score, Failure):
            return score
        pairs = self._distributions(rows, logprobs)
        return Score.of([round(chosen - rejected, ROUND) for rejected, chosen in pairs], score.logprobs)
