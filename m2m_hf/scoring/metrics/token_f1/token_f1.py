"""Token F1 as an `evaluate` module that works offline and keeps what each example contributed."""

import re
import string
from collections import Counter

import datasets
import evaluate

PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokens(text: str) -> list[str]:
    """Words in lower case, without punctuation and English articles, as SQuAD's own evaluation counts them."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def f1(guess: list[str], truth: list[str]) -> float:
    """Harmonic mean of precision and recall of the words; 1 where both are empty."""
    if not guess or not truth:
        return float(guess == truth)
    common = sum((Counter(guess) & Counter(truth)).values())
    return 2 * common / (len(guess) + len(truth))


class TokenF1(evaluate.Metric):
    """Mean F1 of the words of prediction and reference, between 0 and 1 (Rajpurkar et al., SQuAD, 2016)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean F1 over the words that prediction and reference share.",
            citation="Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016",
            inputs_description="predictions and references: texts.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        pairs = zip(predictions, references, strict=True)
        scores = [f1(tokens(guess), tokens(truth)) for guess, truth in pairs]
        return {"token_f1": sum(scores) / len(scores), "per_example": scores}
