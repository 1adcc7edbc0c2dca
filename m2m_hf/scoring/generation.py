"""Free answers, compared with references."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import render
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.forward import Job, Pass, Weights
from m2m_hf.scoring.metrics import Metric
from m2m_hf.scoring.packing import batches, padded
from m2m_hf.scoring.scorers import Scorer, measured, metric_fingerprint


@torch.inference_mode()
def generate(
    stack: Stack,
    mixtures: Sequence[Weights],
    prompts: Mapping[int, Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    tokens_per_batch: int,
) -> list[list[str]]:
    """Answers to prompts (token ids), by mixture and prompt, without special tokens and cut before a stop string.

    Prompts are padded on the left. Where `settings` sample, every prompt goes alone and with its own number as its seed, so
    that the answers depend neither on the batches nor on which prompts are asked.

    Args:
        prompts: token ids by number.
    """
    model = stack.model
    numbers = list(prompts)
    work = Pass(stack, mixtures, len(prompts))
    sizes = [len(prompts[numbers[index]]) + settings.max_new_tokens for _, index in work.jobs]

    def forward(jobs: list[Job]) -> list[str]:
        work.set(jobs)
        chosen = [prompts[numbers[index]] for _, index in jobs]
        width = max(map(len, chosen))
        ids = padded(chosen, width, left=True).to(model.device)
        mask = (
            (torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in chosen])).long().to(model.device)
        )
        if settings.do_sample:
            set_seed(numbers[jobs[0][1]])
        found = model.generate(ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer)
        return [cut(tokenizer.decode(row, skip_special_tokens=True), settings.stop_strings) for row in found[:, width:]]

    made = (
        ([[index] for index in range(len(sizes))])
        if settings.do_sample
        else batches(sizes, tokens_per_batch // stack.shrink)
    )
    return work.run(iter(made), forward)


def cut(text: str, stop: Sequence[str] | str | None) -> str:
    """`text` before the first of the stop strings."""
    for string in [stop] if isinstance(stop, str) else stop or ():
        text = text.split(string)[0]
    return text


MAX_NEW_TOKENS = 64  # of a generated answer, where nothing else is said


DECODING = 4096  # tokens in a batch at least: every step adds one token to a row, which is cheap for many rows together


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
