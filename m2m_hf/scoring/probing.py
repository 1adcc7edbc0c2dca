"""What a model does with rows that share a pass, and how many fit into one, tried before the first score.

Choices share their prompt's row, and rows of all lengths a batch. Some models then score a row otherwise than alone: attention
that counts places, frequencies that follow the longest row, recurrent states that read padding. No list of models tells.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedModel

from m2m_hf.errors import InputError, first_line
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import two_rows
from m2m_hf.modeling.devices import broadcast, out_of_memory
from m2m_hf.modeling.processing import patches
from m2m_hf.scoring.forward import (
    ALIKE,
    ALONE,
    GPU_TOKENS,
    TOGETHER,
    UNSHARED,
    Weights,
    agree_on_memory,
    forgetful,
    score_rows,
    within_memory,
)
from m2m_hf.scoring.packing import HEAD, Question, Request
from m2m_hf.scoring.scorers import Numbers, Scorer

WAYS = {
    ALIKE: "only rows of one length share a batch",
    ALONE: "rows are scored one at a time",
}
SURE = 4  # times what rounding does; sharing did at most 2.6 times as much in fp32, bf16, fp16 and 4-bit, broken models 4.2
LEAST = 5e-5  # a difference of a log-probability that is never looked at
CPU_TOKENS = 1024  # in a forward pass; more are slower
BUSY, MOST_TOKENS = (
    2e13,
    1 << 17,
)  # parameters times tokens that a large GPU takes longer for than Python to launch the pass
SHARE = 0.5  # of the free memory, which a pass may take
MOST, MOST_EPS = 1e-2, 256  # what rounding is never believed to do: 0.01, or 2 in bfloat16


@torch.inference_mode()
def settle(stack: Stack, mixtures: Sequence[Weights], scorer: Scorer) -> str | None:
    """Has a scorer keep rows as far apart as the model needs, which it says where it does (collective)."""
    found: tuple[int, str] | InputError = TOGETHER, ""
    if PartialState().is_main_process:
        stack.model.eval()
        try:
            with forgetful(stack.model):
                found = Probe(stack, scorer).find(mixtures)
        except InputError as error:
            found = error
        finally:
            stack.set({})
    found = broadcast(found)
    if isinstance(found, InputError):
        raise found
    apart, by = found
    agree_on_memory(stack)
    if apart > ALONE:
        raise InputError(
            f"the model scores a row otherwise after other rows than before them ({by}), so its scores would depend on what was "
            "scored earlier; expected a model without such a memory"
        )
    scorer.keep_apart(apart)
    way = WAYS.get(apart, scorer.unshared)
    return f"this model scores a row otherwise beside others ({by}): {way}" if apart else None


class Probe:
    """Scores a few rows, short and long, together and alone."""

    def __init__(self, stack: Stack, scorer: Scorer) -> None:
        self.stack, self.scorer = stack, scorer
        self._alone: dict[tuple[int, int], Numbers] = {}  # by mixture and row
        self._failure = "it gives no finite number"  # of rows that differ by infinity

    def find(self, mixtures: Sequence[Weights]) -> tuple[int, str]:
        """(how far apart rows must be kept, by how much they differ nearer); beyond `ALONE` where that is not enough."""
        apart, gap = self._find(mixtures)
        return apart, f"by {gap:.2g} in a log-probability" if math.isfinite(gap) else self._failure

    def _find(self, mixtures: Sequence[Weights]) -> tuple[int, float]:
        allowed = worst = 0.0
        for apart in (TOGETHER, UNSHARED, ALIKE):
            groups, gap = self.scorer.probes(self.stack.model, apart), 0.0
            for number, weights in enumerate(mixtures if groups else ()):
                self.stack.set_rows([weights])
                for group in groups:
                    expected = [self.alone(number, row) for row in group]
                    found = self.tried(apart, group)
                    gap = max([gap, *map(difference, found, expected)])
                    if not allowed and found[0]:
                        allowed = self.rounding(apart, group, found)
            if gap <= allowed:
                return apart, worst
            if not worst and (again := self.forgets(mixtures[0])) > allowed:
                return ALONE + 1, again
            worst = max(worst, gap)
        return ALONE, worst

    def alone(self, mixture: int, row: int) -> Numbers:
        """What the model, whose mixture is set, gives for a row by itself; each is asked once, the shortest first."""
        if (mixture, row) not in self._alone:
            (self._alone[mixture, row],) = self._run([row], lambda rows: [self.scorer.alone(self.stack.model, rows[0])])
        return self._alone[mixture, row]

    def together(self, apart: int, rows: Sequence[int]) -> list[Numbers]:
        """What the model gives for rows of one batch that is kept so far apart."""
        before, self.scorer.apart = self.scorer.apart, apart
        try:
            return self._run(rows, lambda rows: self.scorer.numbers(self.stack.model, rows))
        finally:
            self.scorer.apart = before

    def tried(self, apart: int, rows: Sequence[int]) -> list[Numbers]:
        """Like `together`; nothing where the model cannot read the batch."""
        try:
            return self.together(apart, rows)
        except InputError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            self._failure = f"it fails: {first_line(error)}"
            return [{}] * len(rows)

    def rounding(self, apart: int, group: Sequence[int], found: Sequence[Numbers]) -> float:
        """By how much rounding alone may change the rows: some times as much as changing the last digit of what is read does."""
        eps = epsilon(self.stack.model)
        with changed_by(self.stack.model, eps):
            gaps = [difference(*pair) for pair in zip(self.together(apart, group), found, strict=True)]
        noise = torch.tensor(gaps).square().mean().sqrt().item()
        return min(max(LEAST, SURE * noise), max(MOST, MOST_EPS * eps))

    def forgets(self, weights: Weights) -> float:
        """By how much rows differ when they are asked once more, the last one first."""
        self.stack.set_rows([weights])
        before = {row: found for (mixture, row), found in self._alone.items() if mixture == 0}
        self._alone.clear()
        return max(difference(self.alone(0, row), before[row]) for row in reversed(before))

    def _run(self, rows: Sequence[int], work: Callable[[list[int]], list[Numbers]]) -> list[Any]:
        batch = [(0, row) for row in rows]
        parts = within_memory(self.stack, self.stack.shrink, batch, lambda jobs: work([row for _, row in jobs]))
        return [one for _, found in parts for one in found]


def difference(found: Numbers, expected: Numbers) -> float:
    """By how much what the model gives for a row differs, as the root of its mean square."""
    if not found:
        return math.inf
    mine, other = (torch.cat([one[answer].flatten() for answer in expected]) for one in (found, expected))
    gaps = (mine - other).nan_to_num(math.inf).where(other.isfinite(), torch.zeros(()))
    return gaps.square().mean().sqrt().item()


def epsilon(model: nn.Module) -> float:
    """The relative size of the last digit that a model computes with."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if getattr(model, "is_quantized", False):
        dtypes.add(torch.bfloat16)
    elif torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many digits as TF32
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@contextmanager
def changed_by(model: nn.Module, eps: float) -> Iterator[None]:
    """While active, what the model reads is off by at most this share of itself."""

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        draw = torch.Generator(output.device).manual_seed(0)
        factors = 1 + eps * (2 * torch.rand(output.shape, generator=draw, device=output.device) - 1)
        return (output.float() * factors).to(output.dtype)

    inputs = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Conv2d))]
    handles = [module.register_forward_hook(change) for module in inputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fitting_tokens(model: PreTrainedModel) -> int:
    """How many tokens to score in one forward pass of a model without a mixture (collective).

    On CUDA as many as keep the device busy, if a measured pass says that they fit into its memory.
    """
    device = model.device
    if device.type != "cuda":
        return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    found = tokens_within(model.num_parameters(exclude_embeddings=True), bytes_per_token(model), free)
    return min(gather_object([found])) if PartialState().num_processes > 1 else found


def tokens_within(parameters: int, each: float, free: int) -> int:
    """A power of two, so that a little less free memory changes nothing.

    Args:
        parameters: of the model, without embeddings.
        each: bytes that a token takes.
        free: bytes that are free.
    """
    tokens = 1 << int(math.log2(min(MOST_TOKENS, max(GPU_TOKENS, BUSY / max(1, parameters)))))
    while tokens > CPU_TOKENS and tokens * each > SHARE * free:
        tokens //= 2
    return tokens


def bytes_per_token(model: PreTrainedModel) -> float:
    """Of a CUDA device's memory, in the second of two small passes; infinite where not even these fit."""
    before = tokens = 0
    try:
        for _ in range(2):
            before = torch.cuda.memory_allocated(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
            tokens = small_pass(model)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    else:
        return (torch.cuda.max_memory_allocated(model.device) - before) / tokens
    clear_device_cache(garbage_collection=True)
    return math.inf


@torch.inference_mode()
def small_pass(model: PreTrainedModel, rows: int = 128, width: int = 32) -> int:
    """Runs a model on a small batch with as many scored positions as batches ever have; returns the tokens of it."""
    model.eval()
    inputs = two_rows(model)
    with forgetful(model):
        if "pixel_values" in inputs:
            model(**inputs)
            return len(inputs["pixel_values"]) * patches(model.config)
        if model.get_output_embeddings() is None:
            model(**{**inputs, "input_ids": inputs["input_ids"].new_zeros(rows, width)})
        else:
            score_rows(model, [Question([Request((0,) * (width + 1), width + 1 - width // HEAD)])] * rows)
    return rows * width
