"""What many rows of a target begin with, few-shot examples or a system turn: computed once for every mixture.

The keys and values of such a beginning are kept while a target is asked, and passes over its rows read the rows' own tokens.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import to_device
from m2m_hf.scoring.packing import Question

LEAST = 32  # tokens of a beginning that is shared
WORTH = 0.25  # of the tokens of the rows' own, that sharing must save: rows behind a beginning need an attention mask
MANY, MOST = 1024, 0.25  # tokens saved, or share of all rows, that are worth passes of their own
WEIGHT = 8  # so many tokens ahead of a row take the memory and time of one of its own

# Of one mixture: keys and values of every layer, each of shape (1, heads, tokens, dimensions)
Past = Sequence[tuple[torch.Tensor, torch.Tensor]]


def shared_beginnings(questions: Sequence[Question]) -> tuple[list[int], list[tuple[int, ...]]]:
    """(by question: the number of its beginning, or -1; the beginnings' tokens), from all questions of a target.

    At least one token of a prompt stays in its row, since it predicts the first one that is scored. Where questions begin in
    several ways (few-shot examples by subject behind one system turn), they are parted so that most tokens are saved.
    """
    keys = [tuple(question.ids[: question.shared - 1]) for question in questions]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    arrays = [np.array(keys[row], dtype=np.int64) for row in order]
    alike = np.array([common(*pair) for pair in pairwise(arrays)], dtype=np.int64)  # tokens that neighbours share
    best: list[tuple[list[int], int]] = []
    most, least = 0, LEAST
    while least <= alike.max(initial=0):
        groups, total = [], 0
        for places in np.split(np.arange(len(order)), np.flatnonzero(alike < least) + 1):
            rows, length = [order[place] for place in places], int(alike[places[:-1]].min(initial=1 << 60))
            saved = (len(rows) - 1) * length
            own = sum(len(questions[row].ids) - length for row in rows)
            if len(rows) > 1 and saved >= WORTH * own and (saved >= MANY or len(rows) >= MOST * len(order)):
                groups.append((rows, length))
                total += saved
        if total > most:
            best, most = groups, total
        least *= 2
    numbers = [-1] * len(questions)
    for number, (rows, _) in enumerate(best):
        for row in rows:
            numbers[row] = number
    return numbers, [keys[rows[0]][:length] for rows, length in best]


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts share at their beginning."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


class Ahead(DynamicLayer):
    """A layer's keys and values of beginnings, one for every row of a batch or one for all, which come before the rows' own.

    They are joined for one layer at a time and not kept.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys[0], values[0], True
        self._parts = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (self._before(*pair) for pair in zip(self._parts, (key_states, value_states), strict=True))
        return keys, values

    @staticmethod
    def _before(parts: Sequence[torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        before = parts[0].expand(len(own), -1, -1, -1) if len(parts) == 1 else torch.cat(list(parts))
        return torch.cat([before, own], dim=-2)


def cache_of(past: Sequence[Past]) -> Cache:
    """What a forward pass is given of the beginnings of a batch's rows."""
    if all(one is past[0] for one in past):
        past = past[:1]
    layers = zip(*past, strict=True)
    return Cache(layers=[Ahead([keys for keys, _ in layer], [values for _, values in layer]) for layer in layers])


def computed(model: PreTrainedModel, ids: Sequence[int], count: int = 1) -> list[Past]:
    """The keys and values of one beginning for so many mixtures, which the rows of the stack's next pass are set to."""
    cache = DynamicCache()
    rows = to_device(torch.tensor([ids] * count), model.device)
    with scored_positions(model, torch.zeros(1, dtype=torch.long)):
        model(input_ids=rows, past_key_values=cache, use_cache=True)
    return [[(layer.keys[row, None], layer.values[row, None]) for layer in cache.layers] for row in range(count)]


class Beginnings:
    """The beginning that the rows of one batch share, of every mixture of the batch; kept until batches go on to others.

    Args:
        number_of: row -> the number of its beginning, or -1.
        texts: the tokens of every beginning.
        tokens: of one pass if memory suffices, which says how many mixtures' beginnings are kept.

    Attributes:
        past: of every row of the batch, or nothing.
    """

    def __init__(
        self,
        stack: Stack,
        mixtures: Sequence[Mapping[str, float]],
        number_of: Callable[[int], int],
        texts: Sequence[Sequence[int]],
        tokens: int,
    ) -> None:
        self._stack, self._mixtures, self._number_of, self._texts, self._tokens = (
            stack, mixtures, number_of, texts, tokens,
        )  # fmt: skip
        self._number = -1
        self._held: dict[int, Past] = {}  # by mixture
        self.past: list[Past] = []

    def prepare(self, jobs: Sequence[tuple[int, int]]) -> None:
        """Computes what is missing for a batch; the stack's rows must be set after that."""
        number = self._number_of(jobs[0][1])
        wanted = list(dict.fromkeys(mixture for mixture, _ in jobs))
        self.past = []
        if number != self._number:
            self._held, self._number = {}, number
        if number < 0:
            return
        missing = [mixture for mixture in wanted if mixture not in self._held]
        if missing and len(self._held) + len(missing) > at_once(
            self._texts[number], self._tokens // self._stack.shrink
        ):
            self._held, missing = {}, wanted
        if missing:
            if len(self._mixtures) > 1:
                self._stack.set_rows([self._mixtures[mixture] for mixture in missing])
            found = computed(self._stack.model, self._texts[number], len(missing))
            self._held.update(zip(missing, found, strict=True))
        self.past = [self._held[mixture] for mixture, _ in jobs]


def at_once(ids: Sequence[int], tokens: int) -> int:
    """Of how many mixtures a beginning is computed in one pass of so many tokens."""
    return max(1, tokens // len(ids))


@contextmanager
def scored_positions(model: PreTrainedModel, places: torch.Tensor) -> Iterator[None]:
    """While active, the output head of `model` computes logits only at these places, counted through all rows of a batch.

    A vocabulary is many times wider than the model, so logits for prompts and padding would dominate the cost. A hook before the
    head drops the other positions, and whatever a model does after its head (scaling, soft-capping) stays as it is. The logits
    then have shape `(1, places, vocabulary)`.
    """

    def select(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, 1)[places.to(hidden.device)].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


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
