"""What a model does with rows that share a pass, tried before the first score.

Choices share their prompt's row, and rows of all lengths a batch. Some models then score a row otherwise than alone: attention
that counts places, frequencies that follow the longest row, recurrent states that read padding. No list of models tells.
"""

from collections.abc import Sequence

import torch

from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.modeling.devices import broadcast
from m2m_hf.scoring.forward import ALIKE, ALONE, TOGETHER, UNSHARED, Weights, agree_on_memory, forgetful, within_memory
from m2m_hf.scoring.scorers import Scorer

WAYS = {
    UNSHARED: "every choice is scored in a row of its own",
    ALIKE: "only rows of one length share a batch",
    ALONE: "rows are scored one at a time",
}


@torch.inference_mode()
def settle(stack: Stack, mixtures: Sequence[Weights], scorer: Scorer) -> str | None:
    """Has a scorer keep rows as far apart as the model needs, which it says where it does (collective)."""
    probe = Probe(stack, scorer)
    stack.model.eval()
    try:
        with forgetful(stack.model):
            apart, gap = broadcast(probe.find(mixtures))
    finally:
        stack.set({})
    agree_on_memory(stack)
    if apart > ALONE:
        raise InputError(
            f"the model scores a row otherwise after other rows than before them (by {gap:.2g} a token), so its scores would "
            "depend on what was scored earlier; expected a model without such a memory"
        )
    scorer.keep_apart(apart)
    return f"this model scores a row otherwise beside others (by {gap:.2g} a token): {WAYS[apart]}" if apart else None


class Probe:
    """Scores a few rows, short and long, together and alone."""

    def __init__(self, stack: Stack, scorer: Scorer) -> None:
        self.stack, self.scorer = stack, scorer

    def find(self, mixtures: Sequence[Weights]) -> tuple[int, float]:
        """(how far apart rows must be kept, by how much they differ nearer); beyond `ALONE` where that is not enough."""
        levels = [self.scorer.probes(self.stack.model, apart) for apart in (TOGETHER, UNSHARED, ALIKE)]
        rows = list(dict.fromkeys(row for groups in levels for group in groups for row in group))
        alone: list[dict[int, torch.Tensor]] = []
        allowed = worst = 0.0
        for weights in mixtures:
            self.stack.set_rows([weights])
            alone.append({row: self._numbers(ALONE, [row])[row] for row in rows})
            if len(alone) == 1:
                copies = max((difference(self._numbers(ALIKE, [row, row]), alone[0]) for row in rows), default=0.0)
                allowed = rounding(self.stack.model, copies)
                again = max((difference(self._numbers(ALONE, [row]), alone[0]) for row in reversed(rows)), default=0.0)
                if again > allowed:
                    return ALONE + 1, again
        for apart, groups in enumerate(levels):
            gap = 0.0
            for weights, expected in zip(mixtures, alone, strict=True):
                self.stack.set_rows([weights])
                gap = max([gap, *(difference(self._numbers(apart, group), expected) for group in groups)])
            if gap <= allowed:
                return apart, worst
            worst = max(worst, gap)
        return ALONE, worst

    def _numbers(self, apart: int, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        """What the model gives for rows of one batch that is kept so far apart."""
        scorer, before = self.scorer, self.scorer.apart
        scorer.apart = apart
        try:
            batch = [(0, row) for row in rows]
            found = within_memory(
                self.stack,
                self.stack.shrink,
                batch,
                lambda jobs: scorer.numbers(self.stack.model, [row for _, row in jobs]),
            )
        finally:
            scorer.apart = before
        return dict(zip(rows, found, strict=True))


def difference(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> float:
    """The mean difference of a row's numbers, of the row where it is largest."""
    gaps = [(numbers - expected[row]).abs().nan_to_num(0.0, 0.0, 0.0).mean() for row, numbers in found.items()]
    return float(max(gaps, default=0.0))


def rounding(model: torch.nn.Module, noise: float) -> float:
    """By how much rounding alone may change a log-probability, where a batch of copies changed it by `noise`."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if getattr(model, "is_quantized", False):
        dtypes.add(torch.bfloat16)
    elif torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many digits as TF32
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return min(max(16 * eps, 1e-5, 4 * noise), max(64 * eps, 1e-3))
