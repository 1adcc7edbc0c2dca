"""Scorers: from a model's log-probabilities to a score per target, with the values of every example kept.

A scorer turns its target's rows into requests once; a request is a token sequence and where the completion in it starts.
Scoring a model means one pass over the requests, longest batches first, and a reduction. Scores do not depend on the size of
the batches or the number of processes, beyond rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import TargetConfig
from .data import TargetRow, encode
from .errors import InputError
from .mixture import Score, mean_and_stderr

ROUND = 6  # decimals kept of a log-probability: what is compared now is what the journal will say later


@dataclass(frozen=True)
class Request:
    """Token ids, of which those from `start` on are scored given all before them."""

    ids: tuple[int, ...]
    start: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


def batches(requests: Sequence[Request], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of requests in batches of similar length, the longest first, each at most `tokens_per_batch` with padding.

    The longest come first so that memory that does not suffice shows at once. A request longer than the budget goes alone.
    """
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].ids), index))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(requests[batch[0]].ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class ScoredPositions:
    """While active, the output head of `model` computes logits only where a token is scored.

    A vocabulary is many times wider than the model, so logits for prompts and padding would cost more than they are worth.
    A hook before the head drops the other positions, which leaves all that a model does after its head (scaling,
    soft-capping) as it is; the logits then have shape `(1, scored positions, vocabulary)`.
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


@torch.inference_mode()
def completion_logprobs(model: PreTrainedModel, requests: Sequence[Request], tokens_per_batch: int) -> list[float]:
    """Log-probability of each request's completion given what stands before it (natural logarithm, summed over tokens).

    Rows are padded on the right. In a causal model no scored token can see what comes after it, so no attention mask is
    needed, and attention takes its fastest path. Under several processes each scores its share and all get everything.
    """
    state = PartialState()
    model.eval()
    mine: list[tuple[int, float]] = []
    with ScoredPositions(model) as positions:
        for number, batch in enumerate(batches(requests, tokens_per_batch)):
            if number % state.num_processes != state.process_index:
                continue
            chosen = [requests[index] for index in batch]
            width = max(len(request.ids) for request in chosen)
            ids = torch.tensor([request.ids + (0,) * (width - len(request.ids)) for request in chosen])
            place = torch.arange(width)
            start = torch.tensor([[request.start] for request in chosen])
            end = torch.tensor([[len(request.ids)] for request in chosen])
            # The logits at one position are of the token at the next one.
            positions.keep = (place >= start - 1) & (place < end - 1)
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
            scored = ids[(place >= start) & (place < end)].to(logits.device)
            picked = logits.gather(1, scored[:, None])[:, 0] - logits.logsumexp(dim=1)
            sums = torch.stack([part.sum() for part in picked.double().split([request.scored for request in chosen])])
            mine.extend(zip(batch, sums.tolist(), strict=True))
    everyone = gather_object(mine) if state.num_processes > 1 else mine
    return [value for _, value in sorted(everyone)]


class Scorer(ABC):
    """Base of the scorers: holds the encoded rows of one target and reduces log-probabilities to a `Score`.

    Args:
        rows: the questions.
        tokenizer: encodes them.
        max_length: positions that the model has; a longer request loses the beginning of its prompt, and is counted in `cut`.

    Raises:
        InputError: a completion that alone has more tokens than that.
    """

    def __init__(self, rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.rows = rows
        self.requests: list[Request] = []
        self.cut = 0
        for number, row in enumerate(rows, start=1):
            for choice in row.choices:
                ids, start = encode(tokenizer, row.prompt, choice, f"row {number} of the target")
                if len(ids) - start >= max_length:
                    raise InputError(
                        f"row {number} of the target: a completion of {len(ids) - start} tokens does not fit into the model's "
                        f"{max_length} positions"
                    )
                surplus = max(0, len(ids) - max_length)
                self.cut += surplus > 0
                self.requests.append(Request(tuple(ids[surplus:]), start - surplus))

    def score(self, model: PreTrainedModel, tokens_per_batch: int) -> Score:
        """The model's score on all rows.

        Raises:
            FloatingPointError: a log-probability is not finite; such a model has no score.
        """
        sums = completion_logprobs(model, self.requests, tokens_per_batch)
        if not all(map(torch.isfinite, torch.tensor(sums))):
            raise FloatingPointError("the model gives log-probabilities that are not finite")
        return self.reduce(sums)

    @abstractmethod
    def reduce(self, sums: list[float]) -> Score:
        """The score, from the log-probability of every request in order."""


class LossScorer(Scorer):
    """Token-weighted log-likelihood of the completions: Σ log p / Σ tokens, the negative of the usual validation loss.

    An example's value is its log-probability over the mean number of scored tokens, so that the mean of the values is
    the score. The standard error is that of a ratio of means (delta method).
    """

    def reduce(self, sums: list[float]) -> Score:
        counts = [request.scored for request in self.requests]
        mean_count = sum(counts) / len(counts)
        logprobs = tuple(round(value, ROUND) for value in sums)
        values = tuple(round(value / mean_count, ROUND) for value in sums)
        value = sum(values) / len(values)
        residuals = tuple((total - value * count) / mean_count for total, count in zip(sums, counts, strict=True))
        return Score(value, mean_and_stderr(residuals)[1], values, logprobs)


class ChoiceScorer(Scorer):
    """Multiple choice: the model's answer is the completion that it finds most probable.

    The score is `accuracy`, or `logprob`: the log-probability of the right answer after normalising over the choices.
    """

    def __init__(
        self, rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int, metric: str
    ) -> None:
        super().__init__(rows, tokenizer, max_length)
        self.metric = None if metric == "logprob" else evaluate.load(str(files("m2m_hf") / "metrics" / metric))

    def reduce(self, sums: list[float]) -> Score:
        guesses: list[int] = []
        logprobs: list[float] = []
        position = 0
        for row in self.rows:
            choices = torch.tensor(sums[position : position + len(row.choices)], dtype=torch.float64)
            position += len(row.choices)
            guesses.append(int(choices.argmax()))
            logprobs.append(round(float(choices.log_softmax(0)[row.answer]), ROUND))
        values = logprobs
        if self.metric is not None:
            result: dict[str, Any] = self.metric.compute(
                predictions=guesses, references=[row.answer for row in self.rows]
            )
            values = result["per_example"]
        return Score(*mean_and_stderr(tuple(values)), tuple(values), tuple(logprobs))


def make_scorer(
    config: TargetConfig, rows: Sequence[TargetRow], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Scorer:
    """The scorer that `config` asks for, over `rows`."""
    if config.scorer == "loss":
        return LossScorer(rows, tokenizer, max_length)
    return ChoiceScorer(rows, tokenizer, max_length, config.metric)
