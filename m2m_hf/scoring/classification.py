"""Scoring a classifier with a frozen head."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.classification import Length
from m2m_hf.data.rows import ImageRow, TargetRow, content_fingerprint, text_of
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.heads import Head
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.scoring.forward import Weights, row_gradient, row_outputs
from m2m_hf.scoring.metrics.metric import load_metric, metric_fingerprint
from m2m_hf.scoring.scorers import AnswerScorer, Gradient

MAX_PIXEL_BYTES = 1 << 30  # of prepared images that a scorer keeps


class ClassificationScorer(AnswerScorer):
    """Classification by a model with a frozen head: the softmax over a target's labels.

    Args:
        rows: texts or images, with the labels as choices.
        processing: the tokenizer, or the image processor.
        head: gives the run's head, which may not be there yet.

    Raises:
        InputError: a metric that cannot be loaded, or compares texts.
    """

    def __init__(
        self,
        config: TargetConfig,
        rows: Sequence[TargetRow],
        processing: Any,
        head: Callable[[], Head],
        length: Length,
        *,
        allow_metric_code: bool = False,
        where: str = "target",
    ) -> None:
        metric = load_metric(config, allow_metric_code, where)
        super().__init__(rows, metric, [[1.0] * len(row.choices) for row in rows])
        self._processing, self._head, self._limit = processing, head, length.limit
        sizes = length([row.prompt for row in rows])
        self._sizes = [min(size, length.limit) for size in sizes]
        self._pixels: dict[int, torch.Tensor] = {}
        self._room = MAX_PIXEL_BYTES
        self.truncated = sum(size > length.limit for size in sizes)
        self.tokens = sum(self._sizes)
        self.fingerprint = content_fingerprint([config.kind, metric_fingerprint(config), length.limit, *rows])

    def _inputs(self, rows: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """The model's input for these rows. Prepared images are kept while there is room, as every mixture needs them again."""
        pixels = {row: self._pixels[row] for row in rows if row in self._pixels}
        new = [row for row in rows if row not in pixels]
        asked = [self.rows[row] for row in new]
        content = [row.image if isinstance(row, ImageRow) else row.prompt for row in asked]
        inputs = inputs_of(self._processing, content, self._limit) if content else {}
        if set(inputs) - {"pixel_values"}:
            return inputs
        for row, image in zip(new, inputs.get("pixel_values", ()), strict=True):
            pixels[row] = image
            if image.nbytes <= self._room:
                self._pixels[row] = image.clone()
                self._room -= image.nbytes
        return {"pixel_values": torch.stack([pixels[row] for row in rows])}

    def _outputs(self, stack: Stack, rows: Sequence[int]) -> torch.Tensor:
        """The scores of the labels of these rows, which are a choice among the same labels."""
        head, model = self._head(), stack.model
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs(rows).items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        scores = head.scores(model(**inputs), inputs.get("attention_mask"))
        return scores[:, head.places(list(map(text_of, self.rows[0].choices)))]

    def measure(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int]
    ) -> list[list[tuple[float, ...]]]:
        def outputs_of(numbers: Sequence[int]) -> torch.Tensor:
            return self._outputs(stack, [rows[number] for number in numbers])

        return row_outputs(stack, mixtures, [self._sizes[row] for row in rows], outputs_of, tokens_per_batch)

    def measure_gradient(self, stack: GatedStack, weights: Weights, tokens_per_batch: int) -> Gradient:
        return row_gradient(stack, weights, self._sizes, partial(self._outputs, stack), tokens_per_batch, self.slopes)
