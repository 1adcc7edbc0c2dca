"""Forward passes over a stack, for one mixture or several: what the model gives for rows, and its derivative by the weights.

Apart from rounding, results depend neither on the size of the batches, nor on the number of processes, nor on how many mixtures
share a batch. Every row of a batch may belong to another mixture, so a small validation set still fills the hardware.
"""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack, to_device
from m2m_hf.modeling.devices import out_of_memory
from m2m_hf.scoring.packing import Question, batches, padded
from m2m_hf.scoring.prefixes import (
    WEIGHT,
    Beginnings,
    Past,
    at_once,
    cache_of,
    computed,
    scored_positions,
    shared_beginnings,
    shared_span,
)

T = TypeVar("T")
Weights = Mapping[str, float]
Job = tuple[int, int]  # (index of a mixture, number of a row that it is asked)
# Numbers, and the row of the batch and the answer that each belongs to, of shape (numbers, 2): those of one answer in a run
Outputs = tuple[torch.Tensor, np.ndarray]
Results = Callable[[], Sequence[Any]]  # waits for the device, and reads what it found
# (row, numbers of its answers) -> a score's derivatives by these
Slopes = Callable[[int, Sequence[float]], Sequence[float]]

GPU_TOKENS = 16384  # in a pass, where memory was not measured for it: with gradients, and in the harness
TOO_LARGE = (
    "not even one row fits into memory when it is scored; shorten the longest rows, load_in_4bit, or use a machine "
    "with more memory"
)
POSITIONS = 2048  # whose logits are looked at in fp32 together

# How far rows are kept apart: choices share a row; have their own; only equally long rows share a batch; none do.
TOGETHER, UNSHARED, ALIKE, ALONE = range(4)


class Inputs(ABC):
    """A target's rows as a model reads them.

    Attributes:
        tokens: that one pass over all rows costs.
        truncated: rows that did not fit into the model.
        sizes: of every row, the tokens of its shortest and of its longest answer, and those of all together as one row.
        apart: how far rows are kept apart, see `probing.py`.
        beginnings: the tokens that many rows begin with, see `prefixes.py`.
    """

    tokens: int
    truncated: int
    sizes: Sequence[tuple[int, int, int]]
    apart: int = TOGETHER
    beginnings: Sequence[tuple[int, ...]] = ()

    def beginning_of(self, model: PreTrainedModel) -> Callable[[int], int]:
        """Row -> the number of the beginning that it shares with others, or -1."""
        return lambda row: -1

    @abstractmethod
    def batches(self, model: PreTrainedModel, jobs: Sequence[Job], budget: int) -> Iterator[list[Job]]:
        """The jobs in batches of at most `budget` tokens."""

    @abstractmethod
    def outputs(self, model: PreTrainedModel, rows: Sequence[int], past: Sequence[Past] = ()) -> Outputs:
        """What the model gives for rows of one batch, beginning as given if so; the numbers of one answer are summed."""

    def alone(self, model: PreTrainedModel, row: int) -> Outputs:
        """What the model gives for one row by itself, or for some of its answers."""
        return self.outputs(model, [row])


def job_batches(sizes: Sequence[int], jobs: Sequence[Job], budget: int, alike: bool = False) -> Iterator[list[Job]]:
    """Jobs in batches, from the tokens of every row; `alike`: of rows that have equally many."""
    for places in one_pass([sizes[row] for _, row in jobs], ALIKE if alike else TOGETHER):
        for batch in batches([sizes[jobs[place][1]] for place in places], budget):
            yield [jobs[places[index]] for index in batch]


def one_pass(sizes: Sequence[int], apart: int) -> list[list[int]]:
    """Which rows of a batch share a forward pass."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, size in enumerate(sizes):
        groups[{ALIKE: size, ALONE: place}.get(apart, 0)].append(place)
    return list(groups.values())


class QuestionInputs(Inputs):
    """Questions: what the model gives are the log-probabilities of the completions' tokens, which sum to the completions'.

    A question is one row: its prompt is computed once, and its completions stand side by side behind it, each seeing the
    prompt and itself. Where the model does not allow that, every completion takes a forward pass of its own. What many prompts
    begin with is computed once, except where gradients are.

    Args:
        by_token: every token counts as an answer of its own, of questions with one completion.
        reading: what a fingerprint says beside the rows, where tokens are not what the tokenizer gives for each text alone.
    """

    def __init__(
        self, questions: Sequence[Question], truncated: int = 0, by_token: bool = False, reading: Sequence[Any] = ()
    ) -> None:
        self.questions, self.truncated, self._by_token = questions, truncated, by_token
        self._numbers, self.beginnings = shared_beginnings(questions)
        # Where a journal has another fingerprint, nobody has tried whether this model's rows may share beginnings.
        self.reading = [*reading, "beginnings"] if self.beginnings else list(reading)
        self.tokens = sum(len(one.ids) + len(one.requests) for one in questions) + sum(map(len, self.beginnings))
        self.tokens -= sum(len(self.beginnings[number]) for number in self._numbers if number >= 0)
        lengths = [[len(request.ids) for request in one.requests] for one in questions]
        self.sizes = [(min(of), max(of), len(one.ids)) for of, one in zip(lengths, questions, strict=True)]

    def _span(self, model: PreTrainedModel) -> float:
        return 0 if self.apart else shared_span(model)

    def beginning_of(self, model: PreTrainedModel) -> Callable[[int], int]:
        span = 0 if torch.is_grad_enabled() else self._span(model)

        def number(row: int) -> int:
            return self._numbers[row] if self.sizes[row][1] <= span else -1

        return number if self.beginnings else super().beginning_of(model)

    def batches(self, model: PreTrainedModel, jobs: Sequence[Job], budget: int) -> Iterator[list[Job]]:
        """All questions of a batch are cut and begin alike. Rows that branch need an attention mask; others do not."""
        span, beginning = self._span(model), self.beginning_of(model)
        kind, sizes, heads = {}, {}, {}
        together: dict[int, int] = {}  # of how many mixtures a row's beginning is computed at once
        for row in {row for _, row in jobs}:
            parts, number = self.questions[row].within(span), beginning(row)
            kind[row] = len(parts[0].requests) > 1, len(parts), number
            sizes[row], heads[row] = max(len(part.ids) for part in parts), max(part.heads for part in parts)
            if number >= 0:
                ahead = self.beginnings[number]
                sizes[row] -= len(ahead) - len(ahead) // WEIGHT
                together[row] = at_once(ahead, budget)
        alike: dict[tuple[Any, ...], list[Job]] = defaultdict(list)
        for mixture, row in jobs:
            alike[*kind[row], mixture // together[row] if row in together else 0].append((mixture, row))
        for _, group in sorted(alike.items(), reverse=True, key=lambda item: item[0]):
            for batch in batches([sizes[row] for _, row in group], budget, [heads[row] for _, row in group]):
                yield [group[index] for index in batch]

    def outputs(self, model: PreTrainedModel, rows: Sequence[int], past: Sequence[Past] = ()) -> Outputs:
        span = self._span(model)
        if not past and (number := self.beginning_of(model)(rows[0])) >= 0:
            past = computed(model, self.beginnings[number])
        cut = [self.questions[row].within(span) for row in rows]
        tensors, owners = [], []
        for number, parts in enumerate(zip(*cut, strict=True)):
            for places in one_pass([len(part.ids) for part in parts], self.apart):
                logprobs, of_part = score_rows(model, [parts[place] for place in places], self.apart >= ALIKE, past)
                tensors.append(logprobs)
                owners.append(np.stack([np.array(places)[of_part[:, 0]], number + of_part[:, 1]], axis=1))
        of = np.concatenate(owners)
        if self._by_token:
            seen: Counter[int] = Counter()
            for one in of:
                one[1] = seen[one[0]]
                seen[one[0]] += 1
        return torch.cat(tensors), of

    def alone(self, model: PreTrainedModel, row: int) -> Outputs:
        """Of the last completion, which stands farthest from the prompt, and the longest one."""
        parts = self.questions[row].within(0)
        answers = sorted({len(parts) - 1, max(range(len(parts)), key=lambda answer: len(parts[answer].ids))})
        found = [score_rows(model, [parts[answer]], whole=True)[0] for answer in answers]
        owners = [(0, answer) for answer, logprobs in zip(answers, found, strict=True) for _ in logprobs]
        return torch.cat(found), np.array(owners)


def ask(
    stack: Stack,
    mixtures: Sequence[Weights],
    rows: Sequence[int],
    tokens_per_batch: int,
    batches: Callable[[list[Job], int], Iterable[list[Job]]],
    forward: Callable[[list[int]], Results],
    write: bool = False,
    before: Callable[[list[Job]], None] = lambda jobs: None,
) -> list[list[Any]]:
    """Asks every mixture the same rows, in batches: results by mixture and row.

    Args:
        batches: (jobs, tokens) -> the jobs in batches of so many tokens at most.
        forward: runs the model, whose gates are set, on the rows of one batch. What it found is read when all batches are under
            way, so that a device does not wait for Python between two of them.
        write: see `GatedStack.write`; of one mixture.
        before: is given the jobs of a batch before the gates are set for it.
    """
    state, shrink = PartialState(), stack.shrink

    def run(batch: list[Job]) -> Results:
        before(batch)
        if len(mixtures) > 1:
            stack.set_rows([mixtures[mixture] for mixture, _ in batch])
        return forward([row for _, row in batch])

    def work(every: list[Job]) -> Iterator[tuple[Job, Any]]:
        under_way: list[tuple[list[Job], Results]] = []
        for number, batch in enumerate(batches(every, tokens_per_batch // shrink)):
            if number % state.num_processes == state.process_index:
                under_way += within_memory(stack, shrink, batch, run)
        for jobs, read in under_way:
            yield from zip(jobs, read(), strict=True)

    return by_job(stack, mixtures, rows, work, write)


def by_job(
    stack: Stack,
    mixtures: Sequence[Weights],
    rows: Sequence[int],
    work: Callable[[list[Job]], Iterable[tuple[Job, Any]]],
    write: bool = False,
) -> list[list[Any]]:
    """Results by mixture and row. Every process does its share and gets everything.

    Args:
        work: (all jobs) -> this process's share of them, each with what was found. Of several mixtures, it sets the rows'.
        write: see `GatedStack.write`; of one mixture.
    """
    state = PartialState()
    every: list[Job] = [(mixture, row) for mixture in range(len(mixtures)) for row in rows]
    stack.model.eval()
    if write:
        assert isinstance(stack, GatedStack)
        stack.write(mixtures[0])
    elif len(mixtures) == 1:
        stack.set(mixtures[0])
    results: list[tuple[Job, Any]] = []
    errors: list[str] = []
    try:
        with forgetful(stack.model):
            results.extend(work(every))
    except InputError as error:
        errors.append(str(error))
    if errors := gather_object(errors) if state.num_processes > 1 else errors:
        raise InputError(errors[0])  # in all processes
    found = dict(gather_object(results) if state.num_processes > 1 else results)
    agree_on_memory(stack)
    return [[found[mixture, row] for row in rows] for mixture in range(len(mixtures))]


@contextmanager
def forgetful(model: PreTrainedModel) -> Iterator[None]:
    """While active, and afterwards, rotary frequencies do not remember longer rows of earlier passes (dynamic NTK)."""
    grown = [module for module in model.modules() if hasattr(module, "original_max_seq_len")]

    def forget(*_: Any) -> None:
        for module in grown:
            first = module.original_max_seq_len
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                if getattr(module, name) != first:
                    prefix = name.removesuffix("max_seq_len_cached")
                    original = getattr(module, f"{prefix}original_inv_freq")
                    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
                    setattr(module, name, first)

    handle = model.register_forward_pre_hook(forget)
    try:
        yield
    finally:
        handle.remove()
        forget()


def within_memory(
    stack: Stack, shrink: int, batch: list[Job], run: Callable[[list[Job]], T]
) -> list[tuple[list[Job], T]]:
    """Runs a batch that was made when the budget was divided by `shrink`; in smaller ones once memory has run out."""
    together = max(1, len(batch) * shrink // stack.shrink)
    results: list[tuple[list[Job], T]] = []
    done = 0
    while done < len(batch):
        try:
            part = batch[done : done + together]
            results.append((part, run(part)))
            done += len(part)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if together == 1:
                raise InputError(TOO_LARGE) from error
        clear_device_cache(garbage_collection=True)  # here, where the error no longer holds tensors
        stack.shrink *= 2
        together //= 2
    return results


def agree_on_memory(stack: Stack) -> None:
    """Has all processes use the smallest budget that one of them found, or batches would differ between them (collective)."""
    if PartialState().num_processes > 1:
        stack.shrink = max(gather_object([stack.shrink]))


class Sized(Protocol):
    """Rows that are asked: the tokens of all of them, and how far they are kept apart."""

    tokens: int
    apart: int


def per_pass(stack: Stack, asked: Sized, examples: int, rows: int, tokens_per_batch: int) -> int:
    """How many mixtures share a pass when some of so many rows are asked; 1 if one fills it, or has to be asked alone."""
    if not asked.tokens or not stack.takes_rows or asked.apart >= ALIKE:
        return 1
    return max(1, tokens_per_batch * examples // (asked.tokens * max(1, rows)))


@torch.inference_mode()
def measure(
    stack: Stack, mixtures: Sequence[Weights], inputs: Inputs, rows: Sequence[int], tokens_per_batch: int
) -> list[list[tuple[float, ...]]]:
    """By mixture and row: what the model gives for every possible answer.

    Whether the stack writes follows from the rows that are asked, and not from how many mixtures are, so scores do not either.
    """
    write = stack.writes and per_pass(stack, inputs, len(inputs.sizes), len(rows), tokens_per_batch) == 1
    if (write or inputs.apart >= ALIKE) and len(mixtures) > 1:  # else rows of a batch would take passes of their own
        return [measure(stack, [weights], inputs, rows, tokens_per_batch)[0] for weights in mixtures]

    number_of = inputs.beginning_of(stack.model)
    ahead = Beginnings(stack, mixtures, number_of, inputs.beginnings, tokens_per_batch)

    def forward(numbers: list[int]) -> Results:
        return partial(by_answer, *inputs.outputs(stack.model, numbers, ahead.past), len(numbers))

    batches = partial(inputs.batches, stack.model)
    return ask(stack, mixtures, rows, tokens_per_batch, batches, forward, write, ahead.prepare)


@torch.enable_grad()
def measure_gradient(
    stack: GatedStack, weights: Weights, inputs: Inputs, rows: Sequence[int], tokens_per_batch: int, slopes: Slopes
) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """(numbers by row and answer, derivative of a score by every adapter's weight, also of those with weight 0).

    One forward and one backward pass give both; `slopes` says how the score depends on the numbers.
    """
    gates = torch.tensor([weights.get(name, 0.0) for name in stack.names], requires_grad=True)

    def forward(numbers: list[int]) -> Results:
        stack.set_gates(gates)  # for every batch, since a graph can be differentiated once
        outputs, owners = inputs.outputs(stack.model, numbers)
        values = by_answer(outputs.detach(), owners, len(numbers))
        factors = [slopes(row, of_row) for row, of_row in zip(numbers, values, strict=True)]
        by_output = torch.tensor([factors[row][answer] for row, answer in owners.tolist()])
        torch.autograd.backward((outputs * by_output.to(outputs.device)).sum())
        return partial(list, values)

    # On a GPU the budget is that of a pass which keeps nothing for a backward pass.
    budget = tokens_per_batch if stack.model.device.type == "cpu" else min(tokens_per_batch, GPU_TOKENS)
    (results,) = ask(stack, [weights], rows, budget, partial(inputs.batches, stack.model), forward)
    stack.set({})
    slope = [0.0] * len(stack.names) if gates.grad is None else gates.grad.tolist()
    shares = gather_object([slope]) if PartialState().num_processes > 1 else [slope]
    return results, {name: sum(share[number] for share in shares) for number, name in enumerate(stack.names)}


def by_answer(outputs: torch.Tensor, owners: np.ndarray, rows: int) -> list[tuple[float, ...]]:
    """By row: the sum of every answer's numbers."""
    numbers = outputs.cpu().double().tolist()
    found: list[list[float]] = [[] for _ in range(rows)]
    ends = [*(np.flatnonzero((owners[1:] != owners[:-1]).any(axis=1)) + 1).tolist(), len(numbers)]
    start = 0
    for row, end in zip(owners[np.array(ends) - 1, 0].tolist(), ends, strict=True):
        found[row].append(sum(numbers[start:end]))
        start = end
    return list(map(tuple, found))


def completion_logprobs(
    stack: Stack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[float, ...]]]:
    """By mixture and question: the log-probability of every completion given its prompt (natural, summed over tokens)."""
    return measure(stack, mixtures, QuestionInputs(questions), range(len(questions)), tokens_per_batch)


def score_rows(
    model: PreTrainedModel, questions: Sequence[Question], whole: bool = False, past: Sequence[Past] = ()
) -> Outputs:
    """One forward pass over questions, each a row: the log-probability of every scored token, and the (row, completion) of each.

    Rows are padded on the right. Scored tokens cannot see what comes after them, so rows without branches need no attention mask,
    and attention takes its fastest path. What follows the last scored token's place is left out, unless the model is to be given
    the `whole` text, since it looks at how long that is. Of rows whose beginnings are `past`, only what follows is read.
    """
    different = list(dict.fromkeys(questions))  # several mixtures are asked the same: it is laid out once
    start = past[0][0][0].shape[-2] if past else 0
    texts = [row.requests[0].ids if whole else row.ids[start:] for row in different]
    width, device = max(map(len, texts)), model.device
    rows: Any = slice(None)
    if len(different) < len(questions):
        number = {question: place for place, question in enumerate(different)}
        rows = to_device(torch.tensor([number[question] for question in questions]), device)

    def laid_out(lists: Sequence[Sequence[int]]) -> torch.Tensor:
        return to_device(padded(lists, width), device)

    inputs: dict[str, torch.Tensor] = {"input_ids": laid_out(texts)[rows]}
    if past or len(questions[0].requests) > 1:
        branches = laid_out([row.branches[start:] for row in different])
        visible = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
        hidden = torch.nn.functional.pad(~visible.tril()[:, None], (start, 0))
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device)
        inputs["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)[rows]
        inputs["position_ids"] = laid_out([row.places[start:] for row in different])[rows]
    tables = [question.table for question in questions]
    row_of = np.repeat(np.arange(len(tables)), [table.shape[1] for table in tables])
    index, token, completion = np.concatenate(tables, axis=1)
    # Several completions begin where the same prompt ends: its logits are there once.
    places, kept = np.unique(row_of * width + index - start, return_inverse=True)
    own = {"past_key_values": cache_of(past), "use_cache": True} if past else {"use_cache": False}
    with scored_positions(model, to_device(torch.from_numpy(places), device)):
        logits = model(**inputs, **own).logits[0]
    return token_logprobs(logits, kept, token), np.stack([row_of, completion], axis=1)


def token_logprobs(logits: torch.Tensor, kept: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
    """The log-probability of every token, given at which of the logits' positions; in fp32, of a few positions at a time."""
    parts, order = [], []
    for start in range(0, len(logits), POSITIONS):
        part = logits[start : start + POSITIONS].float()
        (mine,) = ((kept >= start) & (kept < start + POSITIONS)).nonzero()
        where, what = to_device(torch.from_numpy(np.stack([kept[mine] - start, tokens[mine]])), logits.device)
        parts.append(part[where, what] - part.logsumexp(dim=1)[where])
        order.append(mine)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[to_device(torch.from_numpy(np.concatenate(order).argsort()), logits.device)]
