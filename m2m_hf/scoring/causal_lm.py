"""Scoring a causal LM: completions (`loss`, `choice`, and `classification` by label words), and free answers (`generation`)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score, mean_and_stderr
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import appended, before_answer, encode_choices, first_token, render
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.forward import ALIKE, ALONE, Job, QuestionInputs, Weights, ask, job_batches, measure, one_pass
from m2m_hf.scoring.metrics.metric import load_metric, metric_fingerprint
from m2m_hf.scoring.packing import Question, Request, padded
from m2m_hf.scoring.scorers import (
    ROUND,
    AnswerScorer,
    LogprobScorer,
    Numbers,
    Scorer,
    Setup,
    metric_score,
    probe_groups,
)

MAX_NEW_TOKENS = 64  # default length of an answer
DECODING = 4096  # tokens in a batch at least: every step adds one token to a row, which is cheap for many rows together


def encode_rows(rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int) -> QuestionInputs:
    """Rows as the model reads them. One longer than `max_length`, the model's positions, loses the beginning of its prompt."""
    questions, truncated, reading = [], 0, ends_taken_off(tokenizer, rows)
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of the target"
        tokens, start, later = encode_choices(tokenizer, row.prompt, row.choices, where, row.tools)
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
        metric = load_metric(config, setup.allow_metric_code, setup.where)
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


class GenerationScorer(Scorer):
    """The model answers freely, greedily by default, and a metric compares with the reference answers.

    A prompt that leaves no room for the answer within the model's positions loses its beginning.
    """

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        metric = load_metric(config, setup.allow_metric_code, setup.where)
        assert metric is not None
        fields: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **config.generation}
        self.settings = generation_config(fields)
        self.tokenizer = tokenizer = setup.processing
        self.metric, self.by_row = metric, metric.by_example
        self.examples = len(rows)
        self.references = [text_of(row.choices[0]).strip() for row in rows]
        new, positions = int(self.settings.max_new_tokens), setup.positions
        if positions <= new:
            raise InputError(f"generation.max_new_tokens: {new} do not fit into the model's {positions} positions")
        reading, prompts = ends_taken_off(tokenizer, rows), []
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the target"
            prompts.append(before_answer(tokenizer, row.prompt, where, row.tools))
            plain = render(tokenizer, row.prompt, where, True, row.tools) or [first_token(tokenizer)]
            reading += [[number, prompts[-1]]] if prompts[-1] != plain else []
        self.truncated = sum(len(ids) > positions - new for ids in prompts)
        self.prompts = [ids[new - positions :] for ids in prompts]
        self._sizes = [len(ids) + new for ids in self.prompts]
        alone = self.settings.do_sample or self.settings.num_beams not in (None, 1)
        self.tokens = 0 if alone else sum(self._sizes)
        self.fingerprint = content_fingerprint([config.kind, metric_fingerprint(config), fields, *rows, *reading])

    @torch.inference_mode()
    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        chosen = range(self.examples) if rows is None else rows
        ends = stack.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.settings.eos_token_id = sorted({*ends, self.tokenizer.eos_token_id} - {None})
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        # What is sampled goes alone, seeded by its row, so that it depends neither on batches nor on which rows are asked.
        alone = self.settings.do_sample or self.apart == ALONE
        batches = one_by_one if alone else partial(job_batches, self._sizes, alike=self.apart == ALIKE)
        budget = max(tokens_per_batch, DECODING)
        answers = ask(
            stack, mixtures, chosen, budget, batches, lambda asked: partial(list, self._generate(stack.model, asked))
        )
        references = [self.references[row] for row in chosen]
        return [metric_score(self.metric, texts, references) for texts in answers]

    def probes(self, model: Any, apart: int) -> list[list[int]]:
        if self.settings.do_sample:
            return []
        return probe_groups([range(self.examples)], [(size, size, size) for size in self._sizes], apart)

    def numbers(self, model: Any, rows: Sequence[int]) -> list[Numbers]:
        """The log-probabilities of all tokens at every one of three steps, each of which goes on with the same token."""
        places = one_pass([self._sizes[row] for row in rows], self.apart)
        found = {
            place: one
            for of in places
            for place, one in zip(of, self._steps(model, [rows[p] for p in of]), strict=True)
        }
        return [{0: found[place]} for place in range(len(rows))]

    def _steps(self, model: Any, rows: Sequence[int]) -> list[torch.Tensor]:
        ids, mask = self._padded(model, rows)
        token = self.prompts[0][0]  # the same in every batch
        settings = GenerationConfig(
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = model.generate(
            ids, attention_mask=mask, generation_config=settings, prefix_allowed_tokens_fn=lambda *_: [token]
        )
        return list(torch.stack(output.logits, dim=1).float().log_softmax(-1).double().cpu())

    def _generate(self, model: Any, rows: Sequence[int]) -> list[str]:
        """Answers without special tokens, up to a stop string. Prompts are padded on the left."""
        ids, mask = self._padded(model, rows)
        if self.settings.do_sample:
            set_seed(rows[0])
        output = model.generate(ids, attention_mask=mask, generation_config=self.settings, tokenizer=self.tokenizer)
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [before_stop(text, self.settings.stop_strings).strip() for text in texts]

    def _padded(self, model: Any, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' prompts and their mask, padded on the left."""
        asked = [self.prompts[row] for row in rows]
        width = max(map(len, asked))
        mask = padded([[1] * len(prompt) for prompt in asked], width, left=True)
        return padded(asked, width, left=True).to(model.device), mask.to(model.device)


def one_by_one(jobs: list[Job], budget: int) -> Iterator[list[Job]]:
    return ([job] for job in jobs)


def before_stop(text: str, stop: Sequence[str] | str | None) -> str:
    """`text` before the first of the stop strings."""
    for string in [stop] if isinstance(stop, str) else stop or ():
        text = text.split(string)[0]
    return text


def generation_config(fields: Mapping[str, Any]) -> GenerationConfig:
    """transformers' `GenerationConfig` with these fields; it would itself accept a field that it does not know."""
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    if unknown := sorted(fields.keys() - known):
        raise InputError(
            f"generation: GenerationConfig has no field {unknown[0]!r}; usual ones are max_new_tokens, stop_strings"
        )
    new = fields["max_new_tokens"]
    if not isinstance(new, int) or new < 1:
        raise InputError(f"generation.max_new_tokens: expected an integer of at least 1, got {new!r}")
    try:
        settings = GenerationConfig(**fields)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"generation: {error}") from error
    return settings
