"""Greedy answers to many prompts: rows that are finished leave the batch, and others take their places.

A batch then lasts as long as its tokens, not as its longest answer. transformers' continuous batching (`generate_batch`) packs
the rows of a pass into a single one, in which a mixture per row would have nothing to act on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import to_device
from m2m_hf.modeling.devices import out_of_memory
from m2m_hf.scoring.forward import TOO_LARGE, Job
from m2m_hf.scoring.packing import padded
from m2m_hf.scoring.prefixes import Past, scored_positions

SPARE = 64  # tokens of every row by which the room for keys and values grows
# Of a GenerationConfig, what a greedy answer by one beam does not depend on, or what is done here.
FOLLOWED = {
    "max_new_tokens", "max_length", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping",
    "length_penalty", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "transformers_version", "disable_compile", "_from_model_config",
}  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """The tokens of an answer, and whether it ended by itself: with an end token or a stop string, not at its limit."""

    ids: list[int]
    ended: bool


def is_plain(settings: GenerationConfig, model: PreTrainedModel) -> bool:
    """True if `generate` does no more, with these settings and the model's own, than take the likeliest token."""
    given = {name: value for name, value in model.generation_config.to_dict().items() if value is not None}
    given |= {name: value for name, value in settings.to_dict().items() if value is not None}
    usual = {
        **GenerationConfig._get_default_generation_params(),
        "cache_implementation": "hybrid",
    }  # which it drops itself
    return all(name in FOLLOWED or value is False or value == usual.get(name) for name, value in given.items())


class Places:
    """The keys and values of a batch's rows, each in a place of its own; which of them a forward pass is about.

    Attributes:
        cache: what the model is given.
        rows: the places of a pass.
        seen: tokens of every row before this pass; in a step, of the longest one.
        each: in a step, the numbers of the rows.
        ends: by row, where its next token goes; None while prompts are read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = self.tokens = 0  # for which there is room
        self.layers = [KeptLayer(self) for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=list(self.layers))
        self.rows = slice(0, 0)
        self.seen = 0
        self.each = torch.arange(0)
        self.ends: torch.Tensor | None = None

    def reserve(self, count: int, tokens: int) -> None:
        """Makes room for so many rows of so many tokens."""
        if count > self.count or tokens > self.tokens:
            self.count, self.tokens = count, max(tokens + SPARE, self.tokens)
            for layer in self.layers:
                layer.resize()

    def begin(self, past: Sequence[Past]) -> None:
        """Gives the rows of the next pass the beginnings that were computed for them."""
        for number, layer in enumerate(self.layers):
            parts = [one[number] for one in (past[:1] if all(one is past[0] for one in past) else past)]
            keys, values = (torch.cat(of) if len(of) > 1 else of[0] for of in zip(*parts, strict=True))
            layer.fill(keys, values)

    def move(self, sources: Sequence[int], places: Sequence[int]) -> None:
        """Rows take the places of others."""
        for layer in self.layers if sources else ():
            layer.keys[list(places)] = layer.keys[list(sources)]
            layer.values[list(places)] = layer.values[list(sources)]


class KeptLayer(DynamicLayer):
    """One layer's keys and values of shape (places, heads, tokens, dimensions), written in place.

    What is not written is zero: what an earlier row left there could be not a number, which no mask hides.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def get_seq_length(self) -> int:
        return self._places.seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._allocate(key_states, value_states)
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._allocate(keys, values)
        self.keys[self._places.rows, :, : keys.shape[2]] = keys
        self.values[self._places.rows, :, : keys.shape[2]] = values

    def resize(self) -> None:
        if self.is_initialized:
            old = self.keys, self.values
            self.is_initialized = False
            self._allocate(*old)
            for one, other in zip((self.keys, self.values), old, strict=True):
                rows, tokens = min(len(one), len(other)), min(one.shape[2], other.shape[2])
                one[:rows, :, :tokens] = other[:rows, :, :tokens]

    def _allocate(self, *like: torch.Tensor) -> None:
        if not self.is_initialized:
            of = self._places
            self.keys, self.values = (one.new_zeros(of.count, one.shape[1], of.tokens, one.shape[3]) for one in like)
            self.is_initialized = True

    def _written(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        of = self._places
        end = of.seen + new.shape[2]
        if of.ends is not None:
            kept[of.each, :, of.ends] = new[:, :, 0]
            return kept[of.rows, :, :end]
        kept[of.rows, :, of.seen : end] = new
        kept[of.rows, :, end:] = 0
        return kept[of.rows, :, :end] if of.seen else new


@dataclass
class Row:
    """A row of the batch: its prompt's tokens and those of its answer."""

    job: Job
    ids: list[int]
    start: int  # of the answer


class Decoder:
    """Answers jobs greedily.

    Args:
        prompts: tokens of every row.
        limit: row -> new tokens at most.
        longest: new tokens of any row at most, for which room is kept.
        ends: tokens that end an answer.
        stops: (tokens of texts) -> which of them end with a stop string.
        kind: only jobs of one kind have their prompts read together.
        ahead: (jobs) -> the beginnings of their rows, which are not read again; or nothing.
        set_rows: is given the jobs of the rows of the next passes.
        choose: (jobs, logits) -> the tokens that they go on with.

    Attributes:
        found: the answers, by job.
        queue: jobs whose rows have no place yet.
        living: rows of the batch, by place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        limit: Callable[[int], int],
        longest: int,
        *,
        ends: set[int],
        stops: Callable[[list[list[int]]], list[bool]] | None = None,
        kind: Callable[[Job], Any] = lambda job: 0,
        ahead: Callable[[list[Job]], Sequence[Past]] = lambda jobs: (),
        set_rows: Callable[[list[Job]], None] = lambda jobs: None,
        choose: Callable[[list[Job], torch.Tensor], torch.Tensor] = lambda jobs, logits: logits.argmax(-1),
    ) -> None:
        self.model, self.prompts, self.limit, self.longest = model, prompts, limit, longest
        self.ends, self.stops, self.kind, self.ahead, self.set_rows, self.choose = (
            ends,
            stops,
            kind,
            ahead,
            set_rows,
            choose,
        )
        # Refilling p places k at a time wastes k / 2p of them and a pass per k answers of n tokens: least for k = p √(2 / n).
        self.share = min(1.0, math.sqrt(2 / longest))
        self.found: dict[Job, Decoded] = {}
        self.queue: list[Job] = []
        self.living: list[Row] = []
        self._places = Places(model)
        self._room = 0  # places that fit into memory
        self._has_changed = False

    def run(self, jobs: Sequence[Job], budget: int, at_once: int, most: int | float = math.inf) -> None:
        """Answers these jobs and those that were left when memory ran out.

        Args:
            budget: tokens of all rows of a batch together.
            at_once: tokens of prompts that one pass reads.
            most: rows of a batch.
        """
        self.queue = sorted(
            [*jobs, *self.queue, *(row.job for row in self.living)],
            key=lambda job: (self.kind(job), -len(self.prompts[job[1]]), job[1], job[0]),
        )
        self.living, self._places = [], Places(self.model)
        while self.queue or self.living:
            while group := self._next(budget, at_once, most):
                self._read(group)
            if self.living:
                self._step()

    def _next(self, budget: int, at_once: int, most: int | float) -> list[Job]:
        """The jobs that take free places, if enough are free for a pass of their own."""
        if not self.queue:
            return []
        longest = max(map(len, [self.prompts[self.queue[0][1]], *(self.prompts[row.job[1]] for row in self.living)]))
        self._room = int(max(1, min(budget // (longest + self.longest), most)))
        free = self._room - len(self.living)
        if free < min(len(self.queue), math.ceil(self._room * self.share)):
            return []
        kind = self.kind(self.queue[0])
        fitting = max(1, at_once // len(self.prompts[self.queue[0][1]]))
        group = [job for job in self.queue[: min(free, fitting)] if self.kind(job) == kind]
        self.queue = self.queue[len(group) :]
        return group

    def _read(self, jobs: list[Job]) -> None:
        """Rows join: one pass reads their prompts and gives their first tokens."""
        rows = [Row(job, list(self.prompts[job[1]]), len(self.prompts[job[1]])) for job in jobs]
        first, device, places = len(self.living), self.model.device, self._places
        self.living += rows
        past = self.ahead(jobs)
        self.set_rows(jobs)
        self._has_changed = True
        seen = past[0][0][0].shape[2] if past else 0
        own = [row.ids[seen:] for row in rows]
        width = max(map(len, own))
        places.reserve(len(self.living), seen + width)
        places.rows, places.seen, places.ends = slice(first, len(self.living)), seen, None
        at = torch.arange(seen, seen + width, device=device).expand(len(rows), -1)
        mask = None
        if past:
            places.begin(past)
            mask = self._mask(at, seen + width)
        last = torch.tensor([place * width + len(ids) - 1 for place, ids in enumerate(own)])
        with scored_positions(self.model, to_device(last, device)):
            logits = self._forward(to_device(padded(own, width), device), at, mask)[0]
        self._append(rows, logits)

    def _step(self) -> None:
        """Every row reads its newest token."""
        rows, places, device = self.living, self._places, self.model.device
        if self._has_changed:
            self.set_rows([row.job for row in rows])
            self._has_changed = False
        longest = max(len(row.ids) for row in rows)
        places.reserve(max(len(rows), min(places.count, self._room)) if longest > places.tokens else len(rows), longest)
        newest = torch.tensor([[row.ids[-1] for row in rows], [len(row.ids) - 1 for row in rows]])
        ids, at = to_device(newest, device)
        places.rows, places.seen, places.ends = slice(0, len(rows)), longest - 1, at
        if len(places.each) != len(rows):
            places.each = torch.arange(len(rows), device=device)
        self._append(rows, self._forward(ids[:, None], at[:, None], self._mask(at[:, None], longest))[:, -1])

    def _forward(self, ids: torch.Tensor, at: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=ids, position_ids=at, attention_mask=mask, past_key_values=self._places.cache, use_cache=True
        ).logits
        return logits

    def _mask(self, at: torch.Tensor, width: int) -> torch.Tensor:
        """Tokens at these positions see those up to their own."""
        hidden = torch.arange(width, device=at.device) > at[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=at.device)
        return mask.masked_fill_(hidden, torch.finfo(self.model.dtype).min)

    def _append(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Rows get their next token, and leave if it is their last one; the last rows then take their places."""
        for row, token in zip(rows, self.choose([row.job for row in rows], logits).tolist(), strict=True):
            row.ids.append(token)
        stopped = self.stops([row.ids for row in rows]) if self.stops else [False] * len(rows)
        for row, stop in zip(rows, stopped, strict=True):
            ended = stop or row.ids[-1] in self.ends
            if ended or len(row.ids) - row.start >= self.limit(row.job[1]):
                self.found[row.job] = Decoded(row.ids[row.start :], ended)
        staying = [place for place, row in enumerate(self.living) if row.job not in self.found]
        if len(staying) == len(self.living):
            return
        sources = [place for place in staying if place >= len(staying)]
        free = sorted({*range(len(staying))} - {*staying})
        self._places.move(sources, free)
        for source, place in zip(sources, free, strict=True):
            self.living[place] = self.living[source]
        del self.living[len(staying) :]
        self._has_changed = True


def decode(stack: Stack, decoder: Decoder, jobs: Sequence[Job], budget: int, at_once: int) -> dict[Job, Decoded]:
    """Answers jobs, in smaller batches once memory has run out; what was answered by then stays."""
    most: int | float = math.inf
    left = jobs
    while True:
        try:
            decoder.run(left, budget // stack.shrink, at_once // stack.shrink, most)
            return decoder.found
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(decoder.living) == 1:
                raise InputError(TOO_LARGE) from error
        clear_device_cache(garbage_collection=True)  # here, where the error no longer holds tensors
        stack.shrink *= 2
        most, left = len(decoder.living) // 2, []
