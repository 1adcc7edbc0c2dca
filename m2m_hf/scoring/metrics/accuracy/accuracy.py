"""Accuracy as an `evaluate` module that works offline and keeps what each example contributed."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, between 0 and 1; `per_example` holds the 0s and 1s behind it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class or choice indices.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, object]:
        hits = [float(guess == truth) for guess, truth in zip(predictions, references, strict=True)]
        return {"accuracy": sum(hits) / len(hits), "per_example": hits}
