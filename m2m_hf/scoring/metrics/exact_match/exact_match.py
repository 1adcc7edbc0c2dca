"""Exact match as an `evaluate` module that works offline and keeps what each example contributed."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of predictions that equal their reference but for white space; letter case counts. `per_example` holds 0s and 1s."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference; white space around and between words is made alike.",
            citation="",
            inputs_description="predictions and references: texts.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        pairs = zip(predictions, references, strict=True)
        hits = [float(guess.split() == truth.split()) for guess, truth in pairs]
        return {"exact_match": sum(hits) / len(hits), "per_example": hits}
