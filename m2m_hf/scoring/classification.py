"""Scoring a classifier with a frozen head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.classification import Length
from m2m_hf.data.rows import ImageRow, TargetRow, content_fingerprint, text_of
from m2m_hf.modeling.heads import Head
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.scoring.forward import Inputs, Job, Outputs, job_batches, one_pass
from m2m_hf.scoring.metrics.metric import load_metric, metric_fingerprint
from m2m_hf.scoring.prefixes import Past
from m2m_hf.scoring.scorers import AnswerScorer, Setup

MAX_PIXEL_BYTES = 1 << 30  # of prepared images that a scorer keeps


class ClassifierInputs(Inputs):
    """Texts or images: what the model gives are the scores of the labels, the same for all rows."""

    def __init__(self, rows: Sequence[TargetRow], processing: Any, head: Callable[[], Head], length: Length) -> None:
        self._rows, self._processing, self._head, self._limit = rows, processing, head, length.limit
        sizes = length([row.prompt for row in rows])
        self._sizes = [min(size, length.limit) for size in sizes]
        self.tokens = sum(self._sizes)
        self.sizes = [(size, size, size) for size in self._sizes]
        self.truncated = sum(size > length.limit for size in sizes)
        self._pixels: dict[int, torch.Tensor] = {}
        self._room = MAX_PIXEL_BYTES

    def batches(self, model: Any, jobs: Sequence[Job], budget: int) -> Iterator[list[Job]]:
        return job_batches(self._sizes, jobs, budget)

    def outputs(self, model: Any, rows: Sequence[int], past: Sequence[Past] = ()) -> Outputs:
        if len(passes := one_pass([self._sizes[row] for row in rows], self.apart)) > 1:
            parts = [self._pass(model, [rows[place] for place in places]) for places in passes]
            order = torch.tensor([place for places in passes for place in places]).argsort().to(parts[0].device)
            scores = torch.cat(parts)[order]
        else:
            scores = self._pass(model, rows)
        return scores.flatten(), np.indices(scores.shape).reshape(2, -1).T

    def _pass(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        """The scores of the labels, of shape (rows, labels), from one forward pass."""
        head = self._head()
        inputs = {name: tensor.to(model.device) for name, tensor in self._prepared(rows).items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        scores = head.scores(model(**inputs), inputs.get("attention_mask"))
        labels = head.places(list(map(text_of, self._rows[0].choices)))
        return scores[:, labels]

    def _prepared(self, rows: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """The model's input for these rows. Prepared images are kept while there is room, as every mixture needs them again."""
        pixels = {row: self._pixels[row] for row in rows if row in self._pixels}
        new = [row for row in rows if row not in pixels]
        asked = [self._rows[row] for row in new]
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


class ClassificationScorer(AnswerScorer):
    """Classification by a model with a frozen head: the softmax over a target's labels, which are the rows' choices."""

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        head, length = setup.head, setup.length
        assert head is not None
        assert length is not None
        metric = load_metric(config, setup.allow_metric_code, setup.where)
        inputs = ClassifierInputs(rows, setup.processing, head, length)
        super().__init__(rows, inputs, metric, [[1.0] * len(row.choices) for row in rows])
        self.fingerprint = content_fingerprint([config.kind, metric_fingerprint(config), length.limit, *rows])
