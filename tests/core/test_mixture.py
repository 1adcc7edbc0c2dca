"""Mixtures."""

import pytest

from m2m_hf.core.mixture import BASE, Mixture


def test_mixtures():
    assert Mixture.subset(["b", "a"]).items == (("a", 0.5), ("b", 0.5))
    assert str(Mixture.subset(["b", "a"])) == "a + b"
    assert str(Mixture.of({"b": 0.75, "a": 0.25})) == "0.25 a + 0.75 b"
    assert str(BASE) == "base model"
    for wrong in ({"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ValueError, match="weights must"):
            Mixture.of(wrong)
    with pytest.raises(ValueError, match="sorted"):
        Mixture((("b", 0.5), ("a", 0.5)))
