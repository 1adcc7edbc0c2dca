"""Scoring the free answers of a causal LM."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig, StopStringCriteria, set_seed

from m2m_hf.config.targets import TargetConfig, marks
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.data.tokens import before_answer, first_token, render
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.causal_lm import ends_taken_off
from m2m_hf.scoring.decoding import Decoded, Decoder, decode, is_plain
from m2m_hf.scoring.forward import ALIKE, ALONE, TOGETHER, Job, Weights, ask, by_job, job_batches, one_pass
from m2m_hf.scoring.metrics.metric import load_metric, metric_fingerprint
from m2m_hf.scoring.packing import Question, Request, padded
from m2m_hf.scoring.prefixes import Beginnings, Past, at_once, computed, shared_beginnings, shared_span
from m2m_hf.scoring.scorers import Numbers, Scorer, Setup, metric_score, probe_groups
from m2m_hf.scoring.thoughts import Thoughts

MAX_NEW_TOKENS = 64  # default length of an answer
STEPS = 3  # that rows are tried for
DECODING = 4096  # tokens in a batch at least: every step adds one token to a row, which is cheap for many rows together
PLACES = 16384  # the same where rows leave when they are finished: prompts are read a few at a time, and keys and values kept


class AnsweringScorer(Scorer):
    """Base of the scorers by which the model answers freely, greedily by default; a scorer of this kind rates the answers.

    A prompt that leaves no room for the answer within the model's positions loses its beginning.

    Attributes:
        limits: new tokens of every row at most.
        beginnings: the tokens that many prompts begin with, see `prefixes.py`.
        facts: for the fingerprint: how the model is asked, and what.
        answered: answers so far, of all processes.
        cut_off: those of them that did not end by themselves.
    """

    unshared = "rows are answered in batches that last as long as their longest answer"
    answered = cut_off = 0

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        fields: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **config.generation}
        self.settings = generation_config(fields)
        self.tokenizer = tokenizer = setup.processing
        self.examples = len(rows)
        new, positions = int(self.settings.max_new_tokens), setup.positions
        if positions <= new:
            raise InputError(f"generation.max_new_tokens: {new} do not fit into the model's {positions} positions")
        reading, prompts = ends_taken_off(tokenizer, rows), []
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the target"
            plain = render(tokenizer, row.asked, where, True, row.tools) or [first_token(tokenizer)]
            # Whose thoughts are not rated may think: it is asked as its template asks.
            thinks = config.strip and not isinstance(row.prompt, str)
            prompts.append(plain if thinks else before_answer(tokenizer, row.asked, where, row.tools))
            reading += [[number, prompts[-1]]] if prompts[-1] != plain else []
        self.truncated = sum(len(ids) > positions - new for ids in prompts)
        self.prompts = [ids[new - positions :] for ids in prompts]
        self.limits = [new] * len(rows)
        self._sizes = [len(ids) + new for ids in self.prompts]
        alone = self.settings.do_sample or self.settings.num_beams not in (None, 1)
        self.tokens = 0 if alone else sum(self._sizes)
        self._numbers, self.beginnings = shared_beginnings(
            [Question([Request((*ids, ids[0]), len(ids))]) for ids in self.prompts]
        )
        # Where a journal has another fingerprint, nobody has tried whether rows may leave, join and share beginnings.
        reading += [] if alone else ["refilled"]
        self.facts: list[Any] = [fields, *rows, *reading, *([{"strip": marks(config.strip)}] if config.strip else [])]
        # A stop string must not end a thought, so it is looked for when the thoughts are gone.
        self._stop_strings = self.settings.stop_strings
        self._thoughts = Thoughts(tokenizer, config.strip) if config.strip else None
        if self._thoughts:
            self.settings.stop_strings = None

    def answers(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[str]]:
        """What every mixture answers to these rows."""
        found = self.decoded(stack, mixtures, tokens_per_batch, rows)
        texts = [[self.text(row, one) for row, one in zip(rows, answers, strict=True)] for answers in found]
        every = [one for answers in texts for one in answers]
        self.answered += len(every)
        self.cut_off += sum(cut for _, cut in every)
        return [[text for text, _ in answers] for answers in texts]

    def text(self, row: int, answer: Decoded) -> tuple[str, bool]:
        """(the text of a row's answer without special tokens and thoughts, up to a stop string; whether it was cut off)."""
        if self._thoughts:
            text = self._thoughts.text(self.prompts[row], answer.ids)
        else:
            text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        found = before_stop(text, self._stop_strings)
        return found.strip(), not answer.ended and found == text

    @torch.inference_mode()
    def decoded(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[Decoded]]:
        """The tokens that every mixture answers to these rows."""
        ends = stack.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.settings.eos_token_id = sorted({*ends, self.tokenizer.eos_token_id} - {None}) or None
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        if self.refills(stack.model):
            return by_job(stack, mixtures, rows, partial(self._refilled, stack, mixtures, tokens_per_batch))
        # What is sampled goes alone, seeded by its row, so that it depends neither on batches nor on which rows are asked.
        alone = self.settings.do_sample or self.apart == ALONE
        budget = max(tokens_per_batch, DECODING)
        batches = one_by_one if alone else partial(job_batches, self._sizes, alike=self.apart == ALIKE)
        return ask(
            stack, mixtures, rows, budget, batches, lambda asked: partial(list, self._generate(stack.model, asked))
        )

    def refills(self, model: Any) -> bool:
        """True if rows leave the batch when they are finished, so that others take their places."""
        fits = max(self._sizes) <= shared_span(model)
        return self.apart == TOGETHER and fits and is_plain(self.settings, model)

    def _refilled(
        self, stack: Stack, mixtures: Sequence[Weights], tokens: int, jobs: Sequence[Job]
    ) -> Iterable[tuple[Job, Decoded]]:
        """This process's share of the jobs, decoded."""
        ahead = Beginnings(stack, mixtures, self._numbers.__getitem__, self.beginnings, tokens)

        def set_rows(jobs: list[Job]) -> None:
            if len(mixtures) > 1:
                stack.set_rows([mixtures[mixture] for mixture, _ in jobs])

        def beginnings(jobs: list[Job]) -> Sequence[Past]:
            ahead.prepare(jobs)
            return ahead.past

        def kind(job: Job) -> tuple[int, int]:
            """Of one kind are rows with one beginning, of mixtures whose beginnings are computed in one pass."""
            number = self._numbers[job[1]]
            return number, job[0] // at_once(self.beginnings[number], tokens) if number >= 0 else 0

        decoder = self._decoder(
            stack.model, kind=kind, ahead=beginnings, set_rows=set_rows, stops=self._stops(stack.model)
        )
        state = PartialState()
        mine = sorted(jobs, key=lambda job: (kind(job), self._sizes[job[1]], job))[
            state.process_index :: state.num_processes
        ]
        return decode(stack, decoder, mine, max(tokens, PLACES), tokens).items()

    def _stops(self, model: Any) -> Callable[[list[list[int]]], list[bool]] | None:
        """Which texts of tokens end with a stop string, as `generate` sees it; None where there are no stop strings."""
        strings = self.settings.stop_strings or model.generation_config.stop_strings
        if not strings:
            return None
        criteria = StopStringCriteria(self.tokenizer, strings)
        width = max(len(one.encode()) for one in ([strings] if isinstance(strings, str) else strings))
        unknown = 1 << 40  # a token that is none

        def stops(texts: list[list[int]]) -> list[bool]:
            tails = [[unknown] * (width - len(ids)) + ids[-width:] for ids in texts]
            found: list[bool] = criteria(torch.tensor(tails), None).tolist()
            return found

        return stops

    def at_once(self, stack: Stack, tokens_per_batch: int, rows: int) -> int:
        return super().at_once(stack, max(tokens_per_batch, PLACES), rows)

    def probes(self, model: Any, apart: int) -> list[list[int]]:
        if self.settings.do_sample:
            return []
        return probe_groups([range(self.examples)], [(size, size, size) for size in self._sizes], apart)

    def numbers(self, model: Any, rows: Sequence[int]) -> list[Numbers]:
        """The log-probabilities of all tokens at every one of three steps, each of which goes on with the same token."""
        if self.refills(model):
            return self._side_by_side(model, rows)
        places = one_pass([self._sizes[row] for row in rows], self.apart)
        found = {
            place: one
            for of in places
            for place, one in zip(of, self._steps(model, [rows[p] for p in of]), strict=True)
        }
        return [{0: found[place]} for place in range(len(rows))]

    def alone(self, model: Any, row: int) -> Numbers:
        return {0: self._steps(model, [row])[0]}

    def _side_by_side(self, model: Any, rows: Sequence[int]) -> list[Numbers]:
        """The same of rows that leave one by one, and whose two places others take; every other row goes on for a fourth step."""
        found: dict[int, list[torch.Tensor]] = defaultdict(list)
        every, number = list(dict.fromkeys(rows)), self._numbers.__getitem__

        def choose(jobs: list[Job], logits: torch.Tensor) -> torch.Tensor:
            for (_, row), one in zip(jobs, logits.float().log_softmax(-1).double().cpu(), strict=True):
                found[row].append(one)
            return torch.full((len(jobs),), self.prompts[0][0])

        def beginnings(jobs: list[Job]) -> Sequence[Past]:
            shared = number(jobs[0][1])
            return computed(model, self.beginnings[shared]) * len(jobs) if shared >= 0 else ()

        def limit(row: int) -> int:
            return STEPS + every.index(row) % 2

        decoder = self._decoder(
            model, limit, ends=set(), kind=lambda job: number(job[1]), ahead=beginnings, choose=choose
        )
        decoder.run([(0, row) for row in every], 1 << 60, 1 << 60, most=2)
        return [{0: torch.stack(found[row][:STEPS])} for row in rows]

    def _decoder(self, model: Any, limit: Callable[[int], int] | None = None, **how: Any) -> Decoder:
        how = {"ends": set(self.settings.eos_token_id or ())} | how
        return Decoder(model, self.prompts, limit or self.limits.__getitem__, int(self.settings.max_new_tokens), **how)

    def _steps(self, model: Any, rows: Sequence[int]) -> list[torch.Tensor]:
        ids, mask = self._padded(model, rows)
        token = self.prompts[0][0]  # the same in every batch
        settings = GenerationConfig(
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
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

    def _generate(self, model: Any, rows: Sequence[int]) -> list[Decoded]:
        """Answers by transformers' `generate`. Prompts are padded on the left."""
        ids, mask = self._padded(model, rows)
        if self.settings.do_sample:
            set_seed(rows[0])
        output = model.generate(ids, attention_mask=mask, generation_config=self.settings, tokenizer=self.tokenizer)
        return [self._cut(new) for new in output[:, ids.shape[1] :].tolist()]

    def _cut(self, ids: list[int]) -> Decoded:
        """New tokens of a row without those that fill it up to the batch's longest answer."""
        ends, new, longest = set(self.settings.eos_token_id or ()), ids, int(self.settings.max_new_tokens)
        end = next((place for place, token in enumerate(ids, start=1) if token in ends), 0)
        if end:
            new = ids[:end]
        while new and not end and new[-1] == self.settings.pad_token_id:
            new = new[:-1]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Decoded(new, bool(end) or len(new) < longest or before_stop(text, self.settings.stop_strings) != text)

    def _padded(self, model: Any, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' prompts and their mask, padded on the left."""
        asked = [self.prompts[row] for row in rows]
        width = max(map(len, asked))
        mask = padded([[1] * len(prompt) for prompt in asked], width, left=True)
        return padded(asked, width, left=True).to(model.device), mask.to(model.device)


class GenerationScorer(AnsweringScorer):
    """A metric compares the model's answers with the reference answers."""

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        super().__init__(config, rows, setup)
        metric = load_metric(config, setup.allow_metric_code, setup.where)
        assert metric is not None
        self.metric, self.by_row = metric, metric.by_example
        self.references = [text_of(row.choices[0]).strip() for row in rows]
        metric.check(self.references)
        self.fingerprint = content_fingerprint([config.kind, metric_fingerprint(config), *self.facts])

    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        chosen = range(self.examples) if rows is None else rows
        references = [self.references[row] for row in chosen]
        answers = self.answers(stack, mixtures, tokens_per_batch, chosen)
        return [metric_score(self.metric, texts, references) for texts in answers]


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
