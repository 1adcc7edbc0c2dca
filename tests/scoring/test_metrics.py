"""Metrics through `evaluate`: the shipped ones, and a metric of the user's."""

import evaluate
import pytest
from pico import scorer_on

from m2m_hf import InputError
from m2m_hf.core.score import mean_and_stderr
from m2m_hf.scoring.metrics.metric import SHIPPED, Metric, bootstrap


def test_shipped_accuracy_is_an_evaluate_module():
    module = evaluate.load(str(SHIPPED["accuracy"]), config_name="accuracy")
    assert isinstance(module, evaluate.Metric)
    result = module.compute(predictions=[0, 1, 2], references=[0, 2, 2])
    assert result == {"accuracy": pytest.approx(2 / 3), "per_example": [1.0, 0.0, 1.0]}
    with pytest.raises(ValueError, match=r"config_name: expected one of accuracy, .*, got 'default'"):
        evaluate.load(str(SHIPPED["accuracy"]))


def test_macro_f1_counts_every_label_alike_and_has_no_values_of_examples():
    value, stderr, each = Metric("macro_f1", None, False, "t")([0, 0, 1, 1, 3], [0, 1, 1, 2, 1])
    assert value == pytest.approx((2 / 3 + 2 / 5 + 0 + 0) / 4)
    assert stderr > 0
    assert each == ()


def test_shipped_text_metrics():
    def values(name: str, *pairs: tuple[str, str]) -> tuple[float, ...]:
        value, _, each = Metric(name, None, False, "t")([a for a, _ in pairs], [b for _, b in pairs])
        assert value == pytest.approx(sum(each) / len(each))
        return each

    pairs = [(" a  b\n", "a b"), ("A b", "a b"), ("", ""), ("a", "")]
    assert values("exact_match", *pairs) == (1, 0, 1, 0)
    pairs = [
        ("so 1,234.0 it is", "#### 1234"),
        ("12", "the answer is -12"),
        ("none", "3"),
        ("3 then 4.", "4"),
        ("5", "none"),
    ]
    assert values("numeric_match", *pairs) == (1, 0, 0, 1, 0)
    pairs = [("The cat sat.", "a cat sat down"), ("", ""), ("dog", "cat"), ("x x y", "x y y")]
    assert values("token_f1", *pairs) == (pytest.approx(0.8), 1, 0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("guess", "truth", "hit"),
    [
        ("8000001", "8000000", 0),
        ("9,007,199,254,740,993", "9007199254740992", 0),
        ("8000001.0", "8000000", 0),
        ("8e6", "8,000,000", 1),
        ("8000000.5", "8000000", 0),
        ("19999.99", "20000.00", 0),
        ("0.9999999", "1", 1),
        ("-0", "0", 1),
        ("0.3333333", "0.333333", 1),
        ("0.3334", "0.3333", 0),
        ("1e99999999999999999999", "2", 0),
        ("1e-99999999999999999999", "0.5", 0),
        ("\u22125", "-5", 1),
        ("\u22125", "5", 0),
        ("10-5", "5", 1),
        ("x = -5", "-5", 1),
        ("1,2,3", "123", 0),
        ("(1,5)", "15", 0),
        ("1,00,000", "100000", 1),
        ("1\u202f000", "1000", 1),
        ("Rs.500", "500", 1),
        (".5", "0.5", 1),
        ("1/4", "3/4", 0),
        ("3/4", "0.75", 1),
        ("-6/4", "-1.5", 1),
        ("3/0", "0", 1),
        ("\uff11\uff12 apples", "12", 1),
        ("50%", "50", 1),
        ("50%", "0.5", 0),
    ],
)
def test_whole_numbers_match_exactly_and_decimals_to_a_millionth(guess, truth, hit):
    assert Metric("numeric_match", None, False, "t")([guess], [truth])[0] == hit


CORPUS = '''
import datasets
import evaluate
class Spread(evaluate.Metric):
    """How many different predictions there are, over how many there are."""
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"spread": len(set(predictions)) / len(predictions), "other": 1.0}
'''


def test_a_metric_of_ones_own_runs_only_when_allowed(tmp_path):
    module = tmp_path / "spread" / "spread.py"
    module.parent.mkdir()
    module.write_text(CORPUS)
    with pytest.raises(InputError, match="allow_metric_code: true"):
        Metric(str(module.parent), None, False, "targets.t")
    metric = Metric(str(module.parent), None, True, "targets.t")
    value, stderr, each = metric(["a", "b", "b", "c"], ["x"] * 4)
    assert (value, each) == (0.75, ())
    assert 0 < stderr < 0.5  # a bootstrap's, since a corpus metric has no values of its own for the examples
    assert metric(["a", "b", "b", "c"], ["x"] * 4)[1] == stderr
    assert Metric(str(module), "other", True, "t")(["a", "b"], ["x", "y"])[0] == 1.0
    with pytest.raises(InputError, match="say which of them is the score with metric_key"):
        Metric(str(module), "nothing", True, "t")(["a", "b"], ["x", "y"])
    with pytest.raises(InputError, match="cannot be loaded"):
        Metric(str(tmp_path / "nowhere"), None, True, "t")


def test_bootstrap_agrees_with_the_formula_for_a_mean():
    assert mean_and_stderr((1.0,)) == (1.0, 0.0)
    assert mean_and_stderr((0.0, 1.0, 1.0, 0.0)) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
    values = [float(n % 7 == 0) for n in range(200)]
    estimate = bootstrap(len(values), lambda chosen: sum(values[i] for i in chosen) / len(chosen))
    assert estimate == pytest.approx(mean_and_stderr(values)[1], rel=0.15)


def test_a_metric_that_does_not_fit_its_scorer_is_refused(tokenizer, questions):
    with pytest.raises(InputError, match="compares texts, and scorer choice gives indices"):
        scorer_on(questions, tokenizer, "choice", "exact_match")
