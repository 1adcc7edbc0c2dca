"""The shipped metrics as one `evaluate` module that works offline: `evaluate.load(path, config_name="token_f1")`.

All are between 0 and 1. `per_example` holds what each example contributed; macro F1, a metric of the whole corpus, has none.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import datasets
import evaluate

SEPARATORS = ",\u00a0\u202f"  # of thousands: also spaces that do not break
# A minus, of either kind, behind a letter or digit is no sign, and neither is a comma between other groups a separator.
NUMBER = re.compile(
    rf"((?<!\w)[-\u2212])?((?:\d{{1,3}}(?:[{SEPARATORS}]\d{{2,3}})*[{SEPARATORS}]\d{{3}}(?!\d)|\d+)(?:\.\d*)?|(?<!\w)\.\d+)"
    r"(?:[eE]([-+]?\d+))?(?:/([1-9]\d*))?"
)
TOLERANCE = Fraction(1, 10**6)
MAX_POWER = 10_000  # of ten; a number beyond counts as one with it
PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(guess: int, truth: int) -> float:
    """1 if the prediction equals its reference."""
    return float(guess == truth)


def exact_match(guess: str, truth: str) -> float:
    """1 if the prediction equals its reference apart from white space; letter case counts."""
    return float(guess.split() == truth.split())


def numeric_match(guess: str, truth: str) -> float:
    """1 if the last numbers in both texts are equal: whole numbers exactly, decimals to a relative 1e-6.

    A decimal for a whole number must be within 1e-6 of it, however large. A text without a number never matches.
    """
    guessed, right = last_number(guess), last_number(truth)
    if guessed is None or right is None or (guessed % 1 == 0 and right % 1 == 0):
        return float(guessed is not None and guessed == right)
    return float(abs(guessed - right) <= TOLERANCE * (1 if right % 1 == 0 else abs(right)))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, where a worked answer states its result; a fraction such as 3/4 is one number."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    minus, digits, exponent, divisor = numbers[-1]
    power = max(-MAX_POWER, min(MAX_POWER, int(exponent or 0)))
    number = Fraction(Decimal(digits.translate(dict.fromkeys(map(ord, SEPARATORS))))) * Fraction(10) ** power
    return (-number if minus else number) / Fraction(divisor or 1)


def token_f1(guess: str, truth: str) -> float:
    """F1 of the words that prediction and reference share (Rajpurkar et al., SQuAD, 2016); 1 if both are empty."""
    guessed, right = words(guess), words(truth)
    if not guessed or not right:
        return float(guessed == right)
    common = sum((Counter(guessed) & Counter(right)).values())
    return 2 * common / (len(guessed) + len(right))


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and English articles, as SQuAD's own evaluation counts them."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Mean F1 over the labels that are predicted or right somewhere, by scikit-learn; every label counts alike."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0))


BY_EXAMPLE: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "token_f1": token_f1,
}
OF_INDICES = ("accuracy", "macro_f1")  # the others compare texts


class Shipped(evaluate.Metric):
    """The metric that `config_name` names."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in (*BY_EXAMPLE, "macro_f1"):
            raise ValueError(
                f"config_name: expected one of {', '.join(BY_EXAMPLE)}, macro_f1, got {self.config_name!r}"
            )
        value = datasets.Value("int64" if self.config_name in OF_INDICES else "string")
        return evaluate.MetricInfo(
            description=str(BY_EXAMPLE.get(self.config_name, macro_f1).__doc__),
            citation="",
            inputs_description="predictions and references: indices or texts.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        if self.config_name == "macro_f1":
            return {"macro_f1": macro_f1(predictions, references)}
        values = list(map(BY_EXAMPLE[self.config_name], predictions, references))
        return {self.config_name: sum(values) / len(values), "per_example": values}
