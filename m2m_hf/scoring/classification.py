"""Scoring by a frozen head."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.classification import ImageRow, Length, recognised
from m2m_hf.data.rows import TargetRow, content_fingerprint, text_of
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.heads import Head
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.scoring.forward import Weights, row_gradient, row_outputs
from m2m_hf.scoring.metrics import Metric
from m2m_hf.scoring.scorers import AnswerScorer, metric_fingerprint

PIXELS = 1 << 30  # bytes of images that a scorer keeps as the model takes them


class LabelScorer(AnswerScorer):
    """Classification by a model with a frozen head: the softmax over a target's labels.

    Args:
        config: the target's.
        rows: texts or images with their labels as choices.
        processing: the tokenizer, or the image processor.
        head: the run's.
        length: counts tokens, and knows what they are cut to.
        metric: see `AnswerScorer`.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        processing: Any,
        head: Callable[[], Head],
        length: Length,
        metric: Metric | None,
    ) -> None:
        super().__init__(rows, metric, [[1.0] * len(row.choices) for row in rows])
        self._processing, self._head, self._limit = processing, head, length.limit
        sizes = length([row.prompt for row in rows])
        self._sizes = [min(size, length.limit) for size in sizes]
        self._kept: dict[int, torch.Tensor] = {}
        self._room = PIXELS
        self.cut = sum(size > length.limit for size in sizes)
        self.tokens = sum(self._sizes)
        about = [config.kind, metric_fingerprint(config), length.limit, *rows]
        self.fingerprint = content_fingerprint(about, default=recognised)

    def _inputs(self, rows: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """What the model is given of these rows. Images are kept so while there is room, as every mixture asks for them again."""
        found = {row: self._kept[row] for row in rows if row in self._kept}
        new = [row for row in rows if row not in found]
        asked = [self.rows[row] for row in new]
        content = [row.image if isinstance(row, ImageRow) else row.prompt for row in asked]
        made = inputs_of(self._processing, content, self._limit) if content else {}
        if set(made) - {"pixel_values"}:
            return made
        for row, pixels in zip(new, made.get("pixel_values", ()), strict=True):
            found[row] = pixels
            if pixels.nbytes <= self._room:
                self._kept[row] = pixels.clone()
                self._room -= pixels.nbytes
        return {"pixel_values": torch.stack([found[row] for row in rows])}

    def _ask(self, stack: Stack, rows: Sequence[int]) -> torch.Tensor:
        """The scores of the labels of these rows, all of which are a choice among the same ones."""
        head, model = self._head(), stack.model
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs(rows).items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        scores = head.scores(model(**inputs), inputs.get("attention_mask"))
        return scores[:, head.places(list(map(text_of, self.rows[0].choices)))]

    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        sizes = [self._sizes[row] for row in rows]

        def ask(numbers: Sequence[int]) -> torch.Tensor:
            return self._ask(stack, [rows[number] for number in numbers])

        return row_outputs(stack, mixtures, sizes, ask, tokens_per_batch)

    def measure_slope(
        self, stack: GatedStack, weights: Weights, tokens_per_batch: int
    ) -> tuple[list[tuple[float, ...]], dict[str, float]]:
        return row_gradient(stack, weights, self._sizes, partial(self._ask, stack), tokens_per_batch, self.slopes)
