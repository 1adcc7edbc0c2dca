"""Questions packed into rows, and rows into batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
import torch

HEAD = 4  # a scored position, with its logits over the whole vocabulary, counts as this many tokens of the budget


@dataclass(frozen=True)
class Request:
    """Token ids. Those from `start` on (at least one, and not the first) are scored given all before them."""

    ids: tuple[int, ...]
    start: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


class Question:
    """Completions of one prompt as one row of tokens: the prompt, then all but the last token of every completion.

    Attributes:
        requests: prompt and completion, of every completion.
        shared: how many tokens all requests share at their beginning, none of them scored.
        ids: the row's tokens.
        places: every token's position in the text that it belongs to.
        branches: 0 for the prompt's tokens, k for those of the k-th completion, which see the prompt and each other.
        scored: (index in this row, token that follows there, index of the completion) of every scored token.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        starts = zip(*(request.ids[: request.start] for request in requests))  # noqa: B905 - the shortest
        self.shared = shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, starts))
        self.ids, self.places, self.branches = list(requests[0].ids[:shared]), list(range(shared)), [0] * shared
        self.scored: list[tuple[int, int, int]] = []
        for number, request in enumerate(requests):
            # Where a token of this completion stands in the row; the prompt's last token predicts its first one.
            offset = len(self.ids) - shared
            for place in range(max(request.start, shared), len(request.ids)):
                index = place - 1 if place == shared else offset + place - 1
                self.scored.append((index, request.ids[place], number))
            tail = request.ids[shared:-1]
            self.ids += tail
            self.places += range(shared, shared + len(tail))
            self.branches += [number + 1] * len(tail)
        self.heads = len({index for index, _, _ in self.scored})  # positions whose logits are needed

    def within(self, span: float) -> Sequence["Question"]:
        """The question itself where prompt and completion have at most `span` tokens, else one question for every completion."""
        whole = len(self.requests) == 1 or max(len(request.ids) for request in self.requests) <= span
        return [self] if whole else self._parts

    @cached_property
    def table(self) -> np.ndarray:
        """`scored` as three rows of numbers: indices, tokens, completions."""
        return np.array(self.scored, dtype=np.int64).reshape(-1, 3).T

    @cached_property
    def _parts(self) -> list["Question"]:
        return [Question([request]) for request in self.requests]


def batches(sizes: Sequence[int], tokens_per_batch: int, scored: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar size, each at most `tokens_per_batch` with padding. A row longer than that goes alone.

    The longest rows come first, so that memory runs out at once if it does.

    Args:
        sizes: tokens of every row.
        scored: positions of every row whose logits are computed; see `HEAD`.
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


def padded(rows: Sequence[Sequence[int]], width: int, left: bool = False) -> torch.Tensor:
    """Rows as a tensor of shape (rows, width), filled up with 0."""
    fill = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([[*zeros, *row] if left else [*row, *zeros] for row, zeros in zip(rows, fill, strict=True)])
