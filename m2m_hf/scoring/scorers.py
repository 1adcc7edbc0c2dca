"""Scorers: from a model to a score per target, with the values of every example kept wherever there are any.

A scorer prepares its target's rows once. Scoring then means forward passes (`forward.py`) over the gated stack and a reduction.
Scorers that run something else (a command, the lm-evaluation-harness, a Python function) are in `external.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from m2m_hf.config.entries import TargetConfig
from m2m_hf.core.mixture import Failure, Score, mean_and_stderr
from m2m_hf.data.classification import ImageRow, Length, inputs_of, recognised
from m2m_hf.data.loading import TargetRow, content_fingerprint, encode, render, text_of
from m2m_hf.errors import InputError, redact
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.merging.methods import Stack
from m2m_hf.modeling.heads import Head
from m2m_hf.scoring.forward import (
    Question,
    Request,
    Weights,
    completion_logprobs,
    generate,
    row_gradient,
    row_outputs,
    token_logprobs,
    weight_gradient,
)
from m2m_hf.scoring.metrics import Metric, module_file
from m2m_hf.storage.journal import file_fingerprint

ROUND = 6  # decimals kept of a log-probability: what is compared now is what the journal will say later
MAX_NEW_TOKENS = 64  # of a generated answer, where nothing else is said
DECODING = 4096  # tokens in a batch at least: every step adds one token to a row, which is cheap for many rows together
PIXELS = 1 << 30  # bytes of images that a scorer keeps as the model takes them


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


class LabelScorer(AnswerScorer):
    """Classification by a model with a frozen head: the softmax over a target's labels.

    Args:
        config: the target's.
        rows: texts or images with their labels as choices.
        processing: the tokenizer, or the image processor.
        head: the run's.
        length: counts tokens, and knows what they are cut to.
        metric: see `AnswerScorer`.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        processing: Any,
        head: Callable[[], Head],
        length: Length,
        metric: Metric | None,
    ) -> None:
        super().__init__(rows, metric, [[1.0] * len(row.choices) for row in rows])
        self._processing, self._head, self._limit = processing, head, length.limit
        sizes = length([row.prompt for row in rows])
        self._sizes = [min(size, length.limit) for size in sizes]
        self._kept: dict[int, torch.Tensor] = {}
        self._room = PIXELS
        self.cut = sum(size > length.limit for size in sizes)
        self.tokens = sum(self._sizes)
        about = [config.kind, metric_fingerprint(config), length.limit, *rows]
        self.fingerprint = content_fingerprint(about, default=recognised)

    def _inputs(self, rows: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """What the model is given of these rows. Images are kept so while there is room, as every mixture asks for them again."""
        found = {row: self._kept[row] for row in rows if row in self._kept}
        new = [row for row in rows if row not in found]
        asked = [self.rows[row] for row in new]
        content = [row.image if isinstance(row, ImageRow) else row.prompt for row in asked]
        made = inputs_of(self._processing, content, self._limit) if content else {}
        if set(made) - {"pixel_values"}:
            return made
        for row, pixels in zip(new, made.get("pixel_values", ()), strict=True):
            found[row] = pixels
            if pixels.nbytes <= self._room:
                self._kept[row] = pixels.clone()
                self._room -= pixels.nbytes
        return {"pixel_values": torch.stack([found[row] for row in rows])}

    def _ask(self, stack: Stack, rows: Sequence[int]) -> torch.Tensor:
        """The scores of the labels of these rows, all of which are a choice among the same ones."""
        head, model = self._head(), stack.model
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs(rows).items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        scores = head.scores(model(**inputs), inputs.get("attention_mask"))
        return scores[:, head.places(list(map(text_of, self.rows[0].choices)))]

    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        sizes = [self._sizes[row] for row in rows]

        def ask(numbers: Sequence[int]) -> torch.Tensor:
            return self._ask(stack, [rows[number] for number in numbers])

        return row_outputs(stack, mixtures, sizes, ask, tokens_per_batch)

    def measure_slope(
        self, stack: GatedStack, weights: Weights, tokens_per_batch: int
    ) -> tuple[list[tuple[float, ...]], dict[str, float]]:
        return row_gradient(stack, weights, self._sizes, partial(self._ask, stack), tokens_per_batch, self.slopes)


class GenerationScorer(Scorer):
    """The model answers freely, greedily unless told otherwise, and a metric compares with the reference answers.

    Args:
        config: the target's; `generation` holds fields of transformers' `GenerationConfig`.
        rows: prompts, each with its reference answer.
        tokenizer: encodes and decodes.
        max_length: positions that the model has; a prompt that leaves no room for the answer loses its beginning.
        metric: compares texts.

    Raises:
        InputError: settings that `GenerationConfig` does not know or take.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        metric: Metric,
    ) -> None:
        given: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **config.generation}
        self.settings = generation_config(given)
        self.tokenizer = tokenizer
        self.metric = metric
        self.by_row = metric.by_example
        self.examples = len(rows)
        self.references = [text_of(row.choices[0]).strip() for row in rows]
        self.prompts: list[list[int]] = []
        room = max_length - int(self.settings.max_new_tokens)
        if room < 1:
            raise InputError(
                f"generation.max_new_tokens: {given['max_new_tokens']} do not fit into the model's {max_length} positions"
            )
        for number, row in enumerate(rows, start=1):
            ids = render(tokenizer, row.prompt, f"row {number} of the target", answering=True)
            if not ids:  # a model needs something to go on from
                ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
            self.cut += len(ids) > room
            self.prompts.append(ids[-room:])
        alone = self.settings.do_sample or self.settings.num_beams not in (None, 1)
        self.tokens = 0 if alone else sum(len(ids) + int(self.settings.max_new_tokens) for ids in self.prompts)
        self.fingerprint = content_fingerprint(["generation", metric_fingerprint(config), given, *rows], default=vars)

    def score(
        self,
        stack: Stack,
        mixtures: Sequence[Weights],
        tokens_per_batch: int,
        rows: Sequence[int] | None = None,
    ) -> list[Score | Failure]:
        """The score of every mixture."""
        chosen = range(self.examples) if rows is None else rows
        ends = stack.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.settings.eos_token_id = sorted({*ends, self.tokenizer.eos_token_id} - {None})
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        prompts = {row: self.prompts[row] for row in chosen}
        budget = max(tokens_per_batch, DECODING)
        answers = generate(stack, mixtures, prompts, self.tokenizer, self.settings, budget)
        references = [self.references[row] for row in chosen]
        return [measured(self.metric, [one.strip() for one in given], references) for given in answers]


def generation_config(given: Mapping[str, Any]) -> GenerationConfig:
    """transformers' `GenerationConfig` with these fields.

    Raises:
        InputError: a field that it does not have, or a value that it refuses.
    """
    known = set(GenerationConfig().to_dict())
    for key in given:
        if key not in known or key.startswith("_"):
            raise InputError(
                f"generation: GenerationConfig has no field {key!r}; usual ones are max_new_tokens, stop_strings"
            )
    if not isinstance(given["max_new_tokens"], int) or given["max_new_tokens"] < 1:
        raise InputError(
            f"generation.max_new_tokens: expected an integer of at least 1, got {given['max_new_tokens']!r}"
        )
    try:
        settings = GenerationConfig(**given)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"generation: {error}") from error
    return settings


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


def make_label_scorer(
    config: TargetConfig,
    rows: Sequence[TargetRow],
    processing: Any,
    head: Callable[[], Head],
    length: Length,
    *,
    allow_metric_code: bool = False,
    where: str = "target",
) -> LabelScorer:
    """The scorer of a classification run's target; see `LabelScorer`.

    Raises:
        InputError: a metric that cannot be loaded, or compares texts.
    """
    metric = None if config.metric == "logprob" else Metric(config.metric, config.metric_key, allow_metric_code, where)
    if metric is not None and metric.takes_text:
        raise InputError(f"{where}.metric: {config.metric!r} compares texts, and scorer classification gives indices")
    return LabelScorer(config, rows, processing, head, length, metric)


def make_scorer(
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
    metric = None if config.metric == "logprob" else Metric(config.metric, config.metric_key, allow_metric_code, where)
    if metric is not None and metric.takes_text != (config.kind == "generation"):
        raise InputError(
            f"{where}.metric: {config.metric!r} compares {'texts' if metric.takes_text else 'indices'}, and scorer "
            f"{config.kind} gives {'texts' if config.kind == 'generation' else 'indices'}"
        )
    if config.kind == "generation":
        assert metric is not None
        return GenerationScorer(config, rows, tokenizer, max_length, metric)
    return ChoiceScorer(config, rows, tokenizer, max_length, metric)
