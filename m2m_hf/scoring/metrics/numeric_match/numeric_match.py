"""Numeric match as an `evaluate` module that works offline and keeps what each example contributed."""

import math
import re

import datasets
import evaluate

NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number in `text`, with thousands separators read away: where a worked answer states its result."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class NumericMatch(evaluate.Metric):
    """Share of predictions whose last number equals the reference's last number to a relative 1e-6; none never matches."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions whose last number equals the last number of their reference.",
            citation="",
            inputs_description="predictions and references: texts with numbers in them.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        hits = []
        for guess, truth in zip(map(last_number, predictions), map(last_number, references), strict=True):
            hits.append(float(guess is not None and truth is not None and math.isclose(guess, truth, rel_tol=1e-6)))
        return {"numeric_match": sum(hits) / len(hits), "per_example": hits}
