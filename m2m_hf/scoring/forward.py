"""Forward passes over a gated stack: log-probabilities of completions, and generated answers, for one mixture or several.

What is measured does not depend on the size of the batches, the number of processes, or how many mixtures share a batch,
beyond rounding. Every row of a batch may belong to another mixture, so a small validation set still fills the hardware.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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


Job = tuple[int, int]  # (index of a mixture, index of what is asked of it)


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


class Pass:
    """Runs jobs for several mixtures: batches, gates per row, shares between processes, results in order.

    Args:
        stack: what to set the mixtures on.
        mixtures: the weights of each.
        count: how many things are asked of every mixture.
    """

    def __init__(self, stack: Stack, mixtures: Sequence[Weights], count: int) -> None:
        self.stack = stack
        self.mixtures = mixtures
        self.count = count
        self._shrunk = stack.shrink
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
        wrong: list[str] = []
        try:
            for number, batch in enumerate(made):
                if number % state.num_processes == state.process_index:
                    jobs = [self.jobs[index] for index in batch]
                    mine.extend(zip(jobs, self._within_memory(forward, jobs), strict=True))
        except InputError as error:
            wrong.append(str(error))
        if state.num_processes > 1:
            wrong = gather_object(wrong)
        if wrong:  # on all processes, of which one speaks
            raise InputError(wrong[0])
        if state.num_processes > 1:
            mine = gather_object(mine)
            self.stack.shrink = max(gather_object([self.stack.shrink]))  # or batches would differ between processes
        found = dict(mine)
        return [[found[mixture, index] for index in range(self.count)] for mixture in range(len(self.mixtures))]

    def _within_memory(
        self, forward: Callable[[list[Job]], Sequence[Any]], jobs: list[Job], cuts: int = 1
    ) -> list[Any]:
        """`forward`, in halves from the first time that memory does not suffice on.

        Args:
            cuts: into how many parts the batch has been cut.
        """
        if cuts * self._shrunk < self.stack.shrink and len(jobs) > 1:
            half = len(jobs) // 2
            halves = (self._within_memory(forward, part, 2 * cuts) for part in (jobs[:half], jobs[half:]))
            return list(chain.from_iterable(halves))
        try:
            return list(forward(jobs))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(jobs) == 1:
                raise InputError(
                    "not even one row fits into memory when it is scored; shorten the longest rows, load_in_4bit, or take a "
                    "machine with more"
                ) from error
        clear_device_cache(garbage_collection=True)  # here, where the error holds no tensors any more
        self.stack.shrink *= 2
        return self._within_memory(forward, jobs, cuts)


def completion_logprobs(
    stack: Stack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[float, ...]]]:
    """Log-probability of every completion given what stands before it (natural logarithm, summed over its tokens).

    Returns:
        By mixture and question, one number per completion.
    """
    found = token_logprobs(stack, mixtures, questions, tokens_per_batch)
    return [[tuple(map(sum, completions)) for completions in of_mixture] for of_mixture in found]


@torch.inference_mode()
def token_logprobs(
    stack: Stack, mixtures: Sequence[Weights], questions: Sequence[Question], tokens_per_batch: int
) -> list[list[tuple[list[float], ...]]]:
    """Log-probability of every scored token.

    A question is one row: its prompt is computed once, and its completions stand side by side behind it, each seeing the
    prompt and itself. Where the model cannot be told so, every completion is a row of its own.

    Returns:
        By mixture and question, the tokens of every completion.
    """
    pieces = pieces_of(stack.model, questions)
    work = Pass(stack, mixtures, len(pieces))

    def forward(jobs: list[Job]) -> list[tuple[list[float], ...]]:
        rows = [pieces[index] for _, index in jobs]
        each, owners = score_rows(work, positions, jobs, rows)
        tokens: list[tuple[list[float], ...]] = [tuple([] for _ in row.requests) for row in rows]
        for (number, completion), value in zip(owners, each.double().tolist(), strict=True):
            tokens[number][completion].append(value)
        return tokens

    with ScoredPositions(stack.model) as positions:
        found = work.run(batches_of_rows(work, pieces, tokens_per_batch // stack.shrink), forward)
    ordered = [chain.from_iterable(of_mixture) for of_mixture in found]
    return [[tuple(next(values) for _ in question.requests) for question in questions] for values in ordered]


def weight_gradient(
    stack: GatedStack,
    weights: Weights,
    questions: Sequence[Question],
    tokens_per_batch: int,
    slopes: Callable[[int, Sequence[float]], Sequence[float]],
) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """The derivative of a score with respect to every adapter's weight, those of weight 0 among them; one backward pass.

    Args:
        slopes: (number of a question, log-probabilities of its completions) -> the derivatives of the score by these.

    Returns:
        The log-probabilities of the completions by question, and the derivatives by name.
    """
    pieces = pieces_of(stack.model, questions)
    owners = [number for number, question in enumerate(questions) for _ in range(len(question.requests))]
    known = None
    if len(pieces) > len(
        questions
    ):  # the completions of a question are in different rows: its slopes must be known before
        known = completion_logprobs(stack, [weights], questions, tokens_per_batch)[0]
    starts: list[tuple[int, int]] = []  # of every piece its question, and the place of its first completion in that
    seen: Counter[int] = Counter()
    position = 0
    for piece in pieces:
        number = owners[position]
        starts.append((number, seen[number]))
        seen[number] += len(piece.requests)
        position += len(piece.requests)
    alpha = torch.tensor([weights.get(name, 0.0) for name in stack.names], requires_grad=True)
    work = Pass(stack, [weights], len(pieces))

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        rows = [pieces[index] for _, index in jobs]
        stack.set_gates(alpha)  # anew, since a graph can be gone through once
        each, places = score_rows(work, positions, jobs, rows)
        values = each.detach().double().tolist()
        sums = [[0.0] * len(row.requests) for row in rows]
        for (row, completion), value in zip(places, values, strict=True):
            sums[row][completion] += value
        factors = []
        for (_, index), found in zip(jobs, sums, strict=True):
            number, first = starts[index]
            factors.append(slopes(number, found if known is None else known[number])[first : first + len(found)])
        factor = torch.tensor([factors[row][completion] for row, completion in places], device=each.device)
        torch.autograd.backward((each * factor).sum())
        return [tuple(found) for found in sums]

    with ScoredPositions(stack.model) as positions, torch.enable_grad():
        found = work.run(batches_of_rows(work, pieces, tokens_per_batch // stack.shrink), forward)[0]
    values = chain.from_iterable(found)
    sums = [tuple(next(values) for _ in question.requests) for question in questions]
    return sums, gathered_slope(stack, alpha)


@torch.inference_mode()
def row_outputs(
    stack: Stack,
    mixtures: Sequence[Weights],
    sizes: Sequence[int],
    ask: Callable[[Sequence[int]], torch.Tensor],
    tokens_per_batch: int,
) -> list[list[tuple[float, ...]]]:
    """What a model gives for whole rows, such as the scores of a classifier's labels.

    Args:
        sizes: tokens of every row.
        ask: numbers of rows -> a tensor with as many rows, from one forward pass of the stack's model.

    Returns:
        By mixture and row, the numbers of that row.
    """
    work = Pass(stack, mixtures, len(sizes))

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        work.set(jobs)
        return [tuple(values) for values in ask([index for _, index in jobs]).double().tolist()]

    made = batches([sizes[index] for _, index in work.jobs], tokens_per_batch // stack.shrink)
    return work.run(made, forward)


def row_gradient(
    stack: GatedStack,
    weights: Weights,
    sizes: Sequence[int],
    ask: Callable[[Sequence[int]], torch.Tensor],
    tokens_per_batch: int,
    slopes: Callable[[int, Sequence[float]], Sequence[float]],
) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """`row_outputs` of one mixture, and the derivative of a score by every adapter's weight; see `weight_gradient`."""
    alpha = torch.tensor([weights.get(name, 0.0) for name in stack.names], requires_grad=True)
    work = Pass(stack, [weights], len(sizes))

    def forward(jobs: list[Job]) -> list[tuple[float, ...]]:
        stack.set_gates(alpha)  # anew, since a graph can be gone through once
        rows = [index for _, index in jobs]
        found = ask(rows)
        values = [tuple(one) for one in found.detach().double().tolist()]
        factor = torch.tensor([slopes(row, one) for row, one in zip(rows, values, strict=True)], device=found.device)
        torch.autograd.backward((found * factor).sum())
        return values

    with torch.enable_grad():
        found = work.run(batches(sizes, tokens_per_batch // stack.shrink), forward)[0]
    return found, gathered_slope(stack, alpha)


def gathered_slope(stack: GatedStack, alpha: torch.Tensor) -> dict[str, float]:
    """The derivatives that a pass has left on the weights, summed over the processes; the stack is the base model again."""
    stack.set({})
    slope = torch.zeros_like(alpha) if alpha.grad is None else alpha.grad
    shares = gather_object([slope.tolist()]) if PartialState().num_processes > 1 else [slope.tolist()]
    return {name: sum(share[number] for share in shares) for number, name in enumerate(stack.names)}


def pieces_of(model: PreTrainedModel, questions: Sequence[Question]) -> list[Question]:
    """The rows to compute: whole questions where the model can be told to, else their completions."""
    span = shared_span(model)
    pieces: list[Question] = []
    for question in questions:
        whole = len(question.requests) == 1 or question.longest <= span
        pieces.extend([question] if whole else [Question((request,)) for request in question.requests])
    return pieces


def batches_of_rows(work: "Pass", pieces: Sequence[Question], tokens_per_batch: int) -> Iterator[list[int]]:
    """Batches of a pass's jobs; rows that branch need a mask, and others do better without, so they do not mix."""
    for branching in (True, False):
        numbers = [n for n, (_, index) in enumerate(work.jobs) if (len(pieces[index].requests) > 1) == branching]
        rows = [pieces[work.jobs[number][1]].row for number in numbers]
        for batch in batches([len(row.ids) for row in rows], tokens_per_batch, [row.heads for row in rows]):
            yield [numbers[index] for index in batch]


def shared_span(model: PreTrainedModel) -> float:
    """Up to how many tokens, prompt and completion together, the completions of a prompt may stand in one row with it.

    Infinite where every token sees all before it. 0 where a row cannot branch: with recurrent states, with ALiBi and whatever
    else counts distances itself, or with an attention that takes no mask of one's own. With a sliding window, its width.
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

    Rows are padded on the right. Nothing scored can see what comes after it, so rows without branches need no attention mask,
    and attention takes its fastest path.
    """
    model = work.stack.model
    work.set(jobs)
    rows = [question.row for question in questions]
    width = max(len(row.ids) for row in rows)
    inputs: dict[str, torch.Tensor] = {"input_ids": padded([row.ids for row in rows], width).to(model.device)}
    if len(questions[0].requests) > 1:
        branches = padded([row.branches for row in rows], width).to(model.device)
        seen = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
        hidden = ~seen.tril()[:, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
        inputs["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        inputs["position_ids"] = padded([row.places for row in rows], width).to(model.device)
    scored = [
        (number * width + index, token, (number, completion))
        for number, row in enumerate(rows)
        for index, token, completion in row.scored
    ]
    place, token = (
        torch.tensor(values) for values in zip(*((place, token) for place, token, _ in scored), strict=True)
    )
    keep = torch.zeros(len(rows) * width, dtype=torch.bool)
    keep[place] = True
    positions.keep = keep.view(len(rows), width)
    logits = model(**inputs, use_cache=False).logits[0].float()
    # Several completions begin where the same prompt ends: its logits are there once.
    index = (keep.cumsum(0) - 1)[place].to(logits.device)
    each = logits[index, token.to(logits.device)] - logits.logsumexp(dim=1)[index]
    return each, [owner for _, _, owner in scored]
