"""Scoring a causal LM's free answers, compared with references."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import first_token, render
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.forward import Job, Pass, Weights
from m2m_hf.scoring.metrics.metric import Metric, metric_fingerprint
from m2m_hf.scoring.packing import padded
from m2m_hf.scoring.scorers import Scorer, metric_score

MAX_NEW_TOKENS = 64  # default length of an answer
DECODING = 4096  # tokens in a batch at least: every step adds one token to a row, which is cheap for many rows together


class GenerationScorer(Scorer):
    """The model answers freely, greedily by default, and a metric compares with the reference answers.

    A prompt that leaves no room for the answer within `max_length`, the model's positions, loses its beginning.

    Raises:
        InputError: settings that transformers' `GenerationConfig` does not know or refuses.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        metric: Metric,
    ) -> None:
        fields: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **config.generation}
        self.settings = generation_config(fields)
        self.tokenizer = tokenizer
        self.metric = metric
        self.by_row = metric.by_example
        self.examples = len(rows)
        self.references = [text_of(row.choices[0]).strip() for row in rows]
        self.prompts: list[list[int]] = []
        new = int(self.settings.max_new_tokens)
        if max_length <= new:
            raise InputError(f"generation.max_new_tokens: {new} do not fit into the model's {max_length} positions")
        for number, row in enumerate(rows, start=1):
            ids = render(tokenizer, row.prompt, f"row {number} of the target", answering=True) or [
                first_token(tokenizer)
            ]
            self.truncated += len(ids) > max_length - new
            self.prompts.append(ids[new - max_length :])
        alone = self.settings.do_sample or self.settings.num_beams not in (None, 1)
        self.tokens = 0 if alone else sum(len(ids) + new for ids in self.prompts)
        self.fingerprint = content_fingerprint(["generation", metric_fingerprint(config), fields, *rows])

    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        chosen = range(self.examples) if rows is None else rows
        ends = stack.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.settings.eos_token_id = sorted({*ends, self.tokenizer.eos_token_id} - {None})
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        prompts = {row: self.prompts[row] for row in chosen}
        budget = max(tokens_per_batch, DECODING)
        answers = generate(stack, mixtures, prompts, self.tokenizer, self.settings, budget)
        references = [self.references[row] for row in chosen]
        return [metric_score(self.metric, [text.strip() for text in texts], references) for texts in answers]


@torch.inference_mode()
def generate(
    stack: Stack,
    mixtures: Sequence[Weights],
    prompts: Mapping[int, Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    tokens_per_batch: int,
) -> list[list[str]]:
    """Answers by mixture and prompt, without special tokens and up to a stop string.

    Prompts are padded on the left. Where `settings` sample, every prompt goes alone with its own number as its seed, so that the
    answers depend neither on the batches nor on which prompts are asked.

    Args:
        prompts: number -> token ids.
    """
    model, numbers = stack.model, list(prompts)
    work = Pass(stack, mixtures, len(prompts), tokens_per_batch)

    def forward(jobs: list[Job]) -> list[str]:
        work.set_gates(jobs)
        asked = [prompts[numbers[item]] for _, item in jobs]
        width = max(map(len, asked))
        ids = padded(asked, width, left=True).to(model.device)
        mask = padded([[1] * len(prompt) for prompt in asked], width, left=True).to(model.device)
        if settings.do_sample:
            set_seed(numbers[jobs[0][1]])
        output = model.generate(ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer)
        texts = (tokenizer.decode(row, skip_special_tokens=True) for row in output[:, width:])
        return [before_stop(text, settings.stop_strings) for text in texts]

    sizes = [len(prompts[number]) + settings.max_new_tokens for number in numbers]
    alone = ([index] for index in range(len(work.jobs)))
    return work.run(alone if settings.do_sample else work.batches(sizes), forward)


def before_stop(text: str, stop: Sequence[str] | str | None) -> str:
    """`text` before the first of the stop strings."""
    for string in [stop] if isinstance(stop, str) else stop or ():
        text = text.split(string)[0]
    return text


def generation_config(fields: Mapping[str, Any]) -> GenerationConfig:
    """transformers' `GenerationConfig` with these fields.

    Raises:
        InputError: an unknown field, or a value that it refuses.
    """
    known = GenerationConfig().to_dict()
    for key in fields:
        if key not in known or key.startswith("_"):
            raise InputError(
                f"generation: GenerationConfig has no field {key!r}; usual ones are max_new_tokens, stop_strings"
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
