"""Forward passes over a gated stack, for one mixture or several: log-probabilities of completions, outputs of whole rows.

Apart from rounding, results depend neither on the size of the batches, nor on the number of processes, nor on how many mixtures
share a batch. Every row of a batch may belong to another mixture, so a small validation set still fills the hardware.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.devices import out_of_memory
from m2m_hf.scoring.packing import Question, batches, padded

Weights = Mapping[str, float]
Job = tuple[int, int]  # (index of a mixture, index of an item that it is asked)
Slopes = Callable[[int, Sequence[float]], Sequence[float]]  # (index of a row, its log-probabilities) -> derivatives


class ScoredPositions:
    """While active, the output head of `model` computes logits only at the positions of the mask `keep`.

    A vocabulary is many times wider than the model, so logits for prompts and padding would dominate the cost. A hook before the
    head drops the other positions, and whatever a model does after its head (scaling, soft-capping) stays as it is. The logits
    then have shape `(1, kept positions, vocabulary)`.
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


class Pass:
    """Asks every mixture `count` items: batches, gates by row, shares of the processes, results in order."""

    def __init__(self, stack: Stack, mixtures: Sequence[Weights], count: int, tokens_per_batch: int) -> None:
        self.stack, self.mixtures, self.count = stack, mixtures, count
        self.budget = tokens_per_batch // stack.shrink
        self._shrink = stack.shrink
        self.jobs: list[Job] = [(mixture, item) for mixture in range(len(mixtures)) for item in range(count)]

    def set_gates(self, jobs: Sequence[Job]) -> None:
        """Sets the gates for a batch whose rows belong to these jobs."""
        if len(self.mixtures) > 1:
            self.stack.set_rows([self.mixtures[mixture] for mixture, _ in jobs])

    def batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Indices of jobs in batches, from the tokens of every item."""
        return batches([sizes[item] for _, item in self.jobs], self.budget)

    def run(self, job_batches: Iterable[list[int]], forward: Callable[[list[Job]], Sequence[Any]]) -> list[list[Any]]:
        """`forward` on every batch of jobs; results by mixture and item. Every process does its share and gets everything."""
        state = PartialState()
        self.stack.model.eval()
        if len(self.mixtures) == 1:
            self.stack.set(self.mixtures[0])
        results: list[tuple[Job, Any]] = []
        errors: list[str] = []
        try:
            for number, batch in enumerate(job_batches):
                if number % state.num_processes == state.process_index:
                    jobs = [self.jobs[index] for index in batch]
                    results.extend(zip(jobs, self._within_memory(forward, jobs), strict=True))
        except InputError as error:
            errors.append(str(error))
        if state.num_processes > 1:
            errors = gather_object(errors)
        if errors:  # raised by all processes
            raise InputError(errors[0])
        if state.num_processes > 1:
            results = gather_object(results)
            self.stack.shrink = max(gather_object([self.stack.shrink]))  # or batches would differ between processes
        by_job = dict(results)
        return [[by_job[mixture, item] for item in range(self.count)] for mixture in range(len(self.mixtures))]

    def _within_memory(
        self, forward: Callable[[list[Job]], Sequence[Any]], jobs: list[Job], parts: int = 1
    ) -> list[Any]:
        """`forward`; in halves once memory has run out.

        Args:
            parts: into how many parts the batch has been cut.
        """
        if parts * self._shrink < self.stack.shrink and len(jobs) > 1:
            half = len(jobs) // 2
            halves = (self._within_memory(forward, part, 2 * parts) for part in (jobs[:half], jobs[half:]))
            return list(chain.from_iterable(halves))
        try:
            return list(forward(jobs))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(jobs) == 1:
                raise InputError(
                    "not even one row fits into memory when it is scored; shorten the longest rows, load_in_4bit, or use a "
                    "machine with more memory"
                ) from error
        clear_device_cache(garbage_collection=True)  # here, where the error no longer holds tensors
        self.stack.shrink *= 2
        return self._within_memory(forward, jobs, parts)


class GradientPass(Pass):
    """A pass of one mixture that collects derivatives with respect to every adapter's weight, also of those with weight 0."""

    def __init__(self, stack: GatedStack, weights: Weights, count: int, tokens_per_batch: int) -> None:
        super().__init__(stack, [weights], count, tokens_per_batch)
        self.gated = stack
        self.weights = torch.tensor([weights.get(name, 0.0) for name in stack.names], requires_grad=True)

    def set_gates(self, jobs: Sequence[Job]) -> None:
        self.gated.set_gates(self.weights)  # for every batch, since a graph can be differentiated once

    def backward(self, outputs: torch.Tensor, factors: Sequence[Any]) -> None:
        """Adds the derivative of Σ factor × output."""
        torch.autograd.backward((outputs * torch.tensor(factors, device=outputs.device)).sum())

    def gradient(self) -> dict[str, float]:
        """The derivatives by name, summed over the processes; the stack is the base model again."""
        self.stack.set({})
        slope = torch.zeros_like(self.weights) if self.weights.grad is None else self.weights.grad
        shares = gather_object([slope.tolist()]) if PartialState().num_processes > 1 else [slope.tolist()]
        return {name: sum(share[number] for share in shares) for number, name in enumerate(self.stack.names)}


def completion_logprobs(
    stack: Stack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[float, ...]]]:
    """By mixture and question: the log-probability of every completion given its prompt (natural, summed over tokens)."""
    tokens = token_logprobs(stack, mixtures, questions, tokens_per_batch)
    return [[tuple(map(sum, completions)) for completions in of_mixture] for of_mixture in tokens]


@torch.inference_mode()
def token_logprobs(
    stack: Stack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[list[float], ...]]]:
    """By mixture and question: of every completion, the log-probability of every scored token.

    A question is one row: its prompt is computed once, and its completions stand side by side behind it, each seeing the
    prompt and itself. Where the model does not allow that, every completion is a row of its own.
    """
    rows = [row for _, _, row in rows_of(stack.model, questions)]
    work = Pass(stack, mixtures, len(rows), tokens_per_batch)

    def forward(jobs: list[Job]) -> list[tuple[list[float], ...]]:
        asked = [rows[item] for _, item in jobs]
        logprobs, owners = score_rows(work, positions, jobs, asked)
        return by_completion(asked, owners, logprobs)

    with ScoredPositions(stack.model) as positions:
        results = work.run(row_batches(work, rows), forward)
    return [by_question(questions, of_mixture) for of_mixture in results]


def weight_gradient(
    stack: GatedStack, weights: Weights, questions: Sequence[Question], tokens_per_batch: int, slopes: Slopes
) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """The derivative of a score with respect to every adapter's weight, in one backward pass.

    Args:
        slopes: (index of a question, log-probabilities of its completions) -> the score's derivatives with respect to these.

    Returns:
        The log-probabilities of the completions by question, and the derivatives by name.
    """
    rows = rows_of(stack.model, questions)
    known = None
    if len(rows) > len(
        questions
    ):  # completions of one question are in different rows, so slopes need a pass of their own
        known = completion_logprobs(stack, [weights], questions, tokens_per_batch)[0]
    work = GradientPass(stack, weights, len(rows), tokens_per_batch)

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        asked = [rows[item] for _, item in jobs]
        logprobs, owners = score_rows(work, positions, jobs, [row for _, _, row in asked])
        sums = [
            tuple(map(sum, tokens)) for tokens in by_completion([row for _, _, row in asked], owners, logprobs.detach())
        ]
        factors = []
        for (number, first, _), values in zip(asked, sums, strict=True):
            factors.append(slopes(number, values if known is None else known[number])[first : first + len(values)])
        work.backward(logprobs, [factors[row][completion] for row, completion in owners])
        return sums

    with ScoredPositions(stack.model) as positions, torch.enable_grad():
        results = work.run(row_batches(work, [row for _, _, row in rows]), forward)[0]
    return by_question(questions, results), work.gradient()


@torch.inference_mode()
def row_outputs(
    stack: Stack,
    mixtures: Sequence[Weights],
    sizes: Sequence[int],
    outputs_of: Callable[[Sequence[int]], torch.Tensor],
    tokens_per_batch: int,
) -> list[list[tuple[float, ...]]]:
    """By mixture and row: what a model gives for whole rows, such as the scores of a classifier's labels.

    Args:
        sizes: tokens of every row.
        outputs_of: indices of rows -> a tensor with as many rows, from one forward pass of the stack's model.
    """
    work = Pass(stack, mixtures, len(sizes), tokens_per_batch)

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        work.set_gates(jobs)
        return [tuple(values) for values in outputs_of([item for _, item in jobs]).double().tolist()]

    return work.run(work.batches(sizes), forward)


def row_gradient(
    stack: GatedStack,
    weights: Weights,
    sizes: Sequence[int],
    outputs_of: Callable[[Sequence[int]], torch.Tensor],
    tokens_per_batch: int,
    slopes: Slopes,
) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """`row_outputs` of one mixture, and the derivative of a score by every adapter's weight; see `weight_gradient`."""
    work = GradientPass(stack, weights, len(sizes), tokens_per_batch)

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        work.set_gates(jobs)
        rows = [item for _, item in jobs]
        outputs = outputs_of(rows)
        values = [tuple(row) for row in outputs.detach().double().tolist()]
        work.backward(outputs, [slopes(row, of_row) for row, of_row in zip(rows, values, strict=True)])
        return values

    with torch.enable_grad():
        results = work.run(work.batches(sizes), forward)[0]
    return results, work.gradient()


def rows_of(model: PreTrainedModel, questions: Sequence[Question]) -> list[tuple[int, int, Question]]:
    """(index of a question, its first completion in this row, the row): whole questions where the model allows it, else one
    row for every completion."""
    span = shared_span(model)
    rows: list[tuple[int, int, Question]] = []
    for number, question in enumerate(questions):
        whole = len(question.requests) == 1 or question.longest <= span
        parts = [question] if whole else question.parts
        rows.extend((number, first, part) for first, part in enumerate(parts))
    return rows


def row_batches(work: Pass, rows: Sequence[Question]) -> Iterator[list[int]]:
    """Batches of a pass's jobs. Rows that branch need an attention mask, and others are faster without, so they do not mix."""
    for branching in (True, False):
        numbers = [n for n, (_, item) in enumerate(work.jobs) if (len(rows[item].requests) > 1) == branching]
        packed = [rows[work.jobs[number][1]].row for number in numbers]
        for batch in batches([len(row.ids) for row in packed], work.budget, [row.heads for row in packed]):
            yield [numbers[index] for index in batch]


def shared_span(model: PreTrainedModel) -> float:
    """Up to how many tokens, prompt and completion together, the completions of a prompt may share a row with it.

    Infinite where every token sees all before it. With a sliding window, its width. 0 where a row cannot branch: with recurrent
    states, with ALiBi and whatever else counts distances itself, or with an attention that takes no custom mask.
    """
    layers = DynamicCache(config=model.config).layers
    if (
        {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        and "position_ids" in inspect.signature(model.forward).parameters
        and not getattr(model.config, "alibi", False)
        and model.config._attn_implementation in ("sdpa", "eager")
    ):
        return min((layer.sliding_window for layer in layers if layer.is_sliding), default=math.inf)
    return 0


def score_rows(
    work: Pass, positions: ScoredPositions, jobs: list[Job], questions: Sequence[Question]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """One forward pass over questions, each a row: the log-probability of every scored token, and the (row, completion) of each.

    Rows are padded on the right. Scored tokens cannot see what comes after them, so rows without branches need no attention mask,
    and attention takes its fastest path.
    """
    model = work.stack.model
    work.set_gates(jobs)
    rows = [question.row for question in questions]
    width = max(len(row.ids) for row in rows)
    inputs: dict[str, torch.Tensor] = {"input_ids": padded([row.ids for row in rows], width).to(model.device)}
    if len(questions[0].requests) > 1:
        branches = padded([row.branches for row in rows], width).to(model.device)
        visible = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
        hidden = ~visible.tril()[:, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
        inputs["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        inputs["position_ids"] = padded([row.places for row in rows], width).to(model.device)
    scored = [
        (number * width + index, token, (number, completion))
        for number, row in enumerate(rows)
        for index, token, completion in row.scored
    ]
    places = torch.tensor([place for place, _, _ in scored])
    tokens = torch.tensor([token for _, token, _ in scored])
    keep = torch.zeros(len(rows) * width, dtype=torch.bool)
    keep[places] = True
    positions.keep = keep.view(len(rows), width)
    logits = model(**inputs, use_cache=False).logits[0].float()
    # Several completions begin where the same prompt ends: its logits are there once.
    kept = (keep.cumsum(0) - 1)[places].to(logits.device)
    logprobs = logits[kept, tokens.to(logits.device)] - logits.logsumexp(dim=1)[kept]
    return logprobs, [owner for _, _, owner in scored]


def by_completion(
    rows: Sequence[Question], owners: Sequence[tuple[int, int]], logprobs: torch.Tensor
) -> list[tuple[list[float], ...]]:
    """By row: of every completion, the log-probabilities of its tokens."""
    tokens: list[tuple[list[float], ...]] = [tuple([] for _ in row.requests) for row in rows]
    for (number, completion), value in zip(owners, logprobs.double().tolist(), strict=True):
        tokens[number][completion].append(value)
    return tokens


def by_question(questions: Sequence[Question], of_rows: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """What rows hold of their completions, in order, as one tuple for every question."""
    values = chain.from_iterable(of_rows)
    return [tuple(next(values) for _ in question.requests) for question in questions]
