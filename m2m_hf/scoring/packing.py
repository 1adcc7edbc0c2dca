"""Questions packed into rows, and rows into batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch

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
class Row:
    """A question as one row of tokens: its prompt, and behind it of every completion all but the last token.

    Args:
        ids: the tokens.
        places: of each token its position in the text that it belongs to.
        branches: 0 for the tokens of the prompt, k for those of the k-th completion, which see the prompt and each other.
        scored: (index in this row, token that follows there, index of the completion) for everything to be scored.
    """

    ids: list[int]
    places: list[int]
    branches: list[int]
    scored: list[tuple[int, int, int]]

    @property
    def heads(self) -> int:
        """Positions whose logits are needed."""
        return len({index for index, _, _ in self.scored})


@dataclass(frozen=True)
class Question:
    """Completions of one prompt."""

    requests: tuple[Request, ...]

    @cached_property
    def shared(self) -> int:
        """How many tokens, none of them scored, all requests begin with."""
        starts = (request.ids[: request.start] for request in self.requests)
        return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*starts)))  # noqa: B905 - the shortest

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return max(len(request.ids) for request in self.requests)

    @cached_property
    def row(self) -> Row:
        shared = self.shared
        row = Row(list(self.requests[0].ids[:shared]), list(range(shared)), [0] * shared, [])
        for number, request in enumerate(self.requests):
            # Where a token of this completion stands in the row; its first one is predicted by the prompt's last.
            offset = len(row.ids) - shared
            for place in range(max(request.start, shared), len(request.ids)):
                index = place - 1 if place == shared else offset + place - 1
                row.scored.append((index, request.ids[place], number))
            tail = request.ids[shared:-1]
            row.ids.extend(tail)
            row.places.extend(range(shared, shared + len(tail)))
            row.branches.extend([number + 1] * len(tail))
        return row


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


def padded(rows: Sequence[Sequence[int]], width: int, left: bool = False) -> torch.Tensor:
    """Token ids as a tensor of shape (rows, width), filled up with 0."""
    return torch.tensor(
        [[0] * (width - len(row)) * left + [*row] + [0] * (width - len(row)) * (not left) for row in rows]
    )
