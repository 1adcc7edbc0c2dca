"""Forward passes over a gated stack: log-probabilities of completions, and generated answers, for one mixture or several.

What is measured does not depend on the size of the batches, the number of processes, or how many mixtures share a batch,
beyond rounding. Every row of a batch may belong to another mixture, so a small validation set still fills the hardware.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .merging import GatedStack

Weights = Mapping[str, float]
SHARED_CACHE = 4  # cached positions in one pass over shared prompts, in units of the token budget
HEAD = 4  # a scored position, with its logits over the whole vocabulary, counts as this many tokens of the budget


@dataclass(frozen=True)
class Request:
    """Token ids, of which those from `start` on (at least one, and not the first) are scored given all before them."""

    ids: tuple[int, ...]
    start: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Question:
    """Completions of one prompt."""

    requests: tuple[Request, ...]

    @cached_property
    def shared(self) -> int:
        """How many tokens, none of them scored, all requests begin with."""
        starts = (request.ids[: request.start] for request in self.requests)
        return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*starts)))  # noqa: B905 - the shortest


Job = tuple[int, int]  # (index of a mixture, index of what is asked of it)


def batches(sizes: Sequence[int], tokens_per_batch: int, scored: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar size, the longest first, each at most `tokens_per_batch` with padding.

    The longest come first so that memory that does not suffice shows at once. What is longer than the budget goes alone.

    Args:
        sizes: tokens of each row.
        scored: positions of each row whose logits are computed; see `HEAD`.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    batch: list[int] = []
    heads = 0
    for index in order:
        head = HEAD * scored[index] if scored else 0
        if batch and ((len(batch) + 1) * sizes[batch[0]] > tokens_per_batch or heads + head > tokens_per_batch):
            yield batch
            batch, heads = [], 0
        batch.append(index)
        heads += head
    if batch:
        yield batch


class ScoredPositions:
    """While active, the output head of `model` computes logits only at the positions of the mask `keep`.

    A vocabulary is many times wider than the model, so logits for prompts and padding would cost more than they are worth.
    A hook before the head drops the other positions, which leaves all that a model does after its head (scaling,
    soft-capping) as it is; the logits then have shape `(1, kept positions, vocabulary)`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.keep: torch.Tensor | None = None
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        assert self.keep is not None
        return (hidden[self.keep.to(hidden.device)].unsqueeze(0), *rest)

    def __enter__(self) -> "ScoredPositions":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


def padded(rows: Sequence[Sequence[int]], width: int, left: bool = False) -> torch.Tensor:
    """Token ids as a tensor of shape (rows, width), filled up with 0."""
    return torch.tensor(
        [[0] * (width - len(row)) * left + [*row] + [0] * (width - len(row)) * (not left) for row in rows]
    )


class Pass:
    """Runs jobs for several mixtures: batches, gates per row, shares between processes, results in order.

    Args:
        stack: what to set the mixtures on.
        mixtures: the weights of each.
        count: how many things are asked of every mixture.
    """

    def __init__(self, stack: GatedStack, mixtures: Sequence[Weights], count: int) -> None:
        self.stack = stack
        self.mixtures = mixtures
        self.count = count
        self.jobs: list[Job] = [(mixture, index) for mixture in range(len(mixtures)) for index in range(count)]

    def set(self, jobs: Sequence[Job]) -> None:
        """Gates for a batch whose rows belong to these jobs."""
        if len(self.mixtures) > 1:
            self.stack.set_rows([self.mixtures[mixture] for mixture, _ in jobs])

    def run(self, made: Iterator[list[int]], forward: Callable[[list[Job]], Sequence[Any]]) -> list[list[Any]]:
        """`forward` on every batch of jobs; results by mixture, in the order of what was asked.

        Under several processes each does its share of the batches, and all get everything.
        """
        state = PartialState()
        self.stack.model.eval()
        if len(self.mixtures) == 1:
            self.stack.set(self.mixtures[0])
        mine: list[tuple[Job, Any]] = []
        for number, batch in enumerate(made):
            if number % state.num_processes == state.process_index:
                jobs = [self.jobs[index] for index in batch]
                mine.extend(zip(jobs, forward(jobs), strict=True))
        found = dict(gather_object(mine) if state.num_processes > 1 else mine)
        return [[found[mixture, index] for index in range(self.count)] for mixture in range(len(self.mixtures))]


@torch.inference_mode()
def completion_logprobs(
    stack: GatedStack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[float, ...]]]:
    """Log-probability of every completion given what stands before it (natural logarithm, summed over its tokens).

    Where a question has several completions, their common prompt is computed once and its keys and values are shared.

    Returns:
        By mixture and question, one number per completion.
    """
    model = stack.model
    with ScoredPositions(model) as positions:
        if any(len(question.requests) > 1 for question in questions) and shares_prompts(model):
            work = Pass(stack, mixtures, len(questions))
            sizes = [questions[index].shared for _, index in work.jobs]
            made = batches(sizes, tokens_per_batch)
            return work.run(
                made,
                lambda jobs: shared_prompts(work, positions, jobs, [questions[i] for _, i in jobs], tokens_per_batch),
            )
        requests = [request for question in questions for request in question.requests]
        work = Pass(stack, mixtures, len(requests))
        chosen = [requests[index] for _, index in work.jobs]
        made = batches([len(one.ids) for one in chosen], tokens_per_batch, [one.scored for one in chosen])
        sums = work.run(made, lambda jobs: whole(work, positions, jobs, [requests[index] for _, index in jobs]))
    ordered = [iter(of_mixture) for of_mixture in sums]
    return [[tuple(next(values) for _ in question.requests) for question in questions] for values in ordered]


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model keeps keys and values that can be handed to other rows: not so with recurrent states or ALiBi."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return (
        kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of token ids (n,) under logits (n, vocabulary); float64 on the CPU, ready to be summed."""
    logits = logits.float()
    picked: torch.Tensor = logits.gather(1, ids.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=1)
    return picked.double().cpu()


def sums_of(values: torch.Tensor, counts: Sequence[int]) -> list[float]:
    """Sums of consecutive pieces of `values`, which have these lengths."""
    return [float(part.sum()) for part in torch.split(values, list(counts))]


def whole(work: Pass, positions: ScoredPositions, jobs: list[Job], requests: Sequence[Request]) -> list[float]:
    """Requests from their first token on.

    Rows are padded on the right. In a causal model no scored token can see what comes after it, so no attention mask is
    needed, and attention takes its fastest path.
    """
    model = work.stack.model
    work.set(jobs)
    width = max(len(request.ids) for request in requests)
    ids = padded([request.ids for request in requests], width)
    place = torch.arange(width)
    start = torch.tensor([[request.start] for request in requests])
    end = torch.tensor([[len(request.ids)] for request in requests])
    # The logits at one position are of the token at the next one.
    positions.keep = (place >= start - 1) & (place < end - 1)
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    each = token_logprobs(logits, ids[(place >= start) & (place < end)])
    return sums_of(each, [request.scored for request in requests])


def shared_prompts(
    work: Pass, positions: ScoredPositions, jobs: list[Job], questions: Sequence[Question], tokens_per_batch: int
) -> list[tuple[float, ...]]:
    """Questions in two passes: the prompts once, then what is different of every completion behind its prompt.

    Prompts are padded on the left, so that keys and values end where the completions begin. A completion's first token is
    predicted by its prompt, so completions of one token need no second pass.
    """
    model = work.stack.model
    work.set(jobs)
    width = max(question.shared for question in questions)
    ids = padded([question.requests[0].ids[: question.shared] for question in questions], width, left=True)
    lengths = torch.tensor([question.shared for question in questions])
    place = torch.arange(width)
    mask = place >= (width - lengths)[:, None]
    inputs: dict[str, torch.Tensor] = {"input_ids": ids.to(model.device)}
    if not mask.all():
        inputs["attention_mask"] = mask.long().to(model.device)
        inputs["position_ids"] = (place - (width - lengths)[:, None]).clamp(min=0).to(model.device)
    positions.keep = (place == width - 1).expand(len(questions), width)
    tails = [
        (row, number, request.ids[question.shared :], request.start - question.shared)
        for row, question in enumerate(questions)
        for number, request in enumerate(question.requests)
    ]
    more = any(len(tail) > 1 for _, _, tail, _ in tails)
    output = model(**inputs, past_key_values=DynamicCache(config=model.config) if more else None, use_cache=more)
    sums = [[0.0] * len(question.requests) for question in questions]
    first = [(row, number, tail[0]) for row, number, tail, start in tails if start == 0]
    scores = output.logits[0][torch.tensor([row for row, _, _ in first], device=output.logits.device)]
    for (row, number, _), value in zip(
        first, token_logprobs(scores, torch.tensor([t for _, _, t in first])), strict=True
    ):
        sums[row][number] += float(value)

    longer = [tail for tail in tails if len(tail[2]) > 1]
    # The cache holds a prompt for every completion, so it counts as well as the tokens do.
    sizes = [max(len(tail) - 1, (width + len(tail)) // SHARED_CACHE) for _, _, tail, _ in longer]
    for batch in batches(sizes, tokens_per_batch, [len(longer[index][2]) - 1 for index in range(len(longer))]):
        chosen = [longer[index] for index in batch]
        rows = torch.tensor([row for row, _, _, _ in chosen])
        work.set([jobs[row] for row in rows.tolist()])
        span = max(len(tail) for _, _, tail, _ in chosen) - 1
        ids = padded([tail[:-1] for _, _, tail, _ in chosen], span)
        following = padded([tail[1:] for _, _, tail, _ in chosen], span)
        place = torch.arange(span)
        begin = torch.tensor([[max(0, start - 1)] for _, _, _, start in chosen])
        end = torch.tensor([[len(tail) - 1] for _, _, tail, _ in chosen])
        positions.keep = (place >= begin) & (place < end)
        seen = torch.cat([mask[rows], torch.ones(len(chosen), span, dtype=torch.bool)], dim=1)
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=None if seen.all() else seen.long().to(model.device),
            position_ids=(lengths[rows][:, None] + place).to(model.device),
            past_key_values=rows_of(output.past_key_values, rows.to(model.device)),
            use_cache=True,
        ).logits[0]
        each = token_logprobs(logits, following[positions.keep])
        parts = sums_of(each, (end - begin).clamp(min=0)[:, 0].tolist())
        for (row, number, _, _), part in zip(chosen, parts, strict=True):
            sums[row][number] += part
    return [tuple(found) for found in sums]


def rows_of(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache whose rows are those of `cache` at these indices; `cache` stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


@torch.inference_mode()
def generate(
    stack: GatedStack,
    mixtures: Sequence[Weights],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    tokens_per_batch: int,
) -> list[list[str]]:
    """Answers to prompts (token ids), by mixture and prompt, without special tokens and cut before a stop string.

    Prompts are padded on the left. Where `settings` sample, every prompt goes alone and with its own seed, so that the answers
    do not depend on the batches.
    """
    model = stack.model
    work = Pass(stack, mixtures, len(prompts))
    sizes = [len(prompts[index]) + settings.max_new_tokens for _, index in work.jobs]

    def forward(jobs: list[Job]) -> list[str]:
        work.set(jobs)
        chosen = [prompts[index] for _, index in jobs]
        width = max(map(len, chosen))
        ids = padded(chosen, width, left=True).to(model.device)
        mask = (
            (torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in chosen])).long().to(model.device)
        )
        if settings.do_sample:
            set_seed(jobs[0][1])
        found = model.generate(ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer)
        return [cut(tokenizer.decode(row, skip_special_tokens=True), settings.stop_strings) for row in found[:, width:]]

    made = ([[index] for index in range(len(sizes))]) if settings.do_sample else batches(sizes, tokens_per_batch)
    return work.run(iter(made), forward)


def cut(text: str, stop: Sequence[str] | str | None) -> str:
    """`text` before the first of the stop strings."""
    for string in [stop] if isinstance(stop, str) else stop or ():
        text = text.split(string)[0]
    return text
