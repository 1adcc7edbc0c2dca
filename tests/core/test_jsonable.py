"""Dataclasses to JSON and back."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from m2m_hf.core.jsonable import OPTIONAL, Measurement, from_json, to_json
from m2m_hf.core.mixture import Mixture


@dataclass(frozen=True)
class Part:
    mixture: Mixture
    value: float
    top: int | None
    more: Mapping[str, float] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    found: Mapping[int, Measurement] = field(metadata={"name": "worth"})
    pair: tuple[str, float] = ("a", 1.0)
    names: frozenset[str] = frozenset()
    most: float = math.inf


WHOLE = Whole(
    (Part(Mixture.subset(["a", "b"]), 0.5, None), Part(Mixture.of({"c": 1.0}), -1.0, 2, {"t": 0.25})),
    {3: Measurement(0.1), 5: Measurement(0.2, 0.01)},
    names=frozenset("zy"),
)
JSON = {
    "parts": [
        {"mixture": {"a": 0.5, "b": 0.5}, "value": 0.5, "top": None},
        {"mixture": {"c": 1.0}, "value": -1.0, "top": 2, "more": {"t": 0.25}},
    ],
    "worth": {"3": {"value": 0.1, "stderr": None}, "5": {"value": 0.2, "stderr": 0.01}},
    "pair": ["a", 1.0],
    "names": ["y", "z"],
    "most": None,
}


def test_a_dataclass_becomes_json_and_comes_back():
    assert to_json(WHOLE) == JSON
    assert from_json(Whole, json.loads(json.dumps(JSON)) | {"unknown": 1}) == WHOLE
    assert math.isnan(from_json(Measurement, {"value": None}).value)  # it has no default


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": {}}, "expected a list"),
        ({"worth": {"3": 1}}, "expected an object"),
        ({"worth": {"three": {"value": 1}}}, "invalid literal"),
        ({"pair": ["a"]}, "shorter|argument 2"),
        ({"parts": [{"mixture": {"a": 0.5}, "value": 1, "top": 1}]}, "sum to 1"),
        ({"parts": [{"mixture": {"a": 1}, "value": True, "top": 1}]}, "expected a number"),
        ({"parts": [{"mixture": {"a": 1}, "value": 1, "top": "one"}]}, "expected int"),
        ({"parts": [{"value": 1, "top": 1}]}, "mixture is missing"),
    ],
)
def test_what_is_of_another_kind_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_json(Whole, JSON | change)
