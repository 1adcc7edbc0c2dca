"""The scorer that a target asks for."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.classification import Length
from m2m_hf.data.rows import TargetRow
from m2m_hf.errors import InputError
from m2m_hf.modeling.heads import Head
from m2m_hf.scoring.classification import LabelScorer
from m2m_hf.scoring.generation import GenerationScorer
from m2m_hf.scoring.metrics import Metric
from m2m_hf.scoring.scorers import ChoiceScorer, LossScorer, Scorer


def make_label_scorer(
    config: TargetConfig,
    rows: Sequence[TargetRow],
    processing: Any,
    head: Callable[[], Head],
    length: Length,
    *,
    allow_metric_code: bool = False,
    where: str = "target",
) -> LabelScorer:
    """The scorer of a classification run's target; see `LabelScorer`.

    Raises:
        InputError: a metric that cannot be loaded, or compares texts.
    """
    metric = None if config.metric == "logprob" else Metric(config.metric, config.metric_key, allow_metric_code, where)
    if metric is not None and metric.takes_text:
        raise InputError(f"{where}.metric: {config.metric!r} compares texts, and scorer classification gives indices")
    return LabelScorer(config, rows, processing, head, length, metric)


def make_scorer(
    config: TargetConfig,
    rows: Sequence[TargetRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    allow_metric_code: bool = False,
    where: str = "target",
) -> Scorer:
    """The scorer that `config` asks for, over `rows`.

    Raises:
        InputError: rows that do not fit the model, a metric that cannot be loaded or does not fit the scorer.
    """
    if config.kind == "loss":
        return LossScorer(config, rows, tokenizer, max_length)
    metric = None if config.metric == "logprob" else Metric(config.metric, config.metric_key, allow_metric_code, where)
    if metric is not None and metric.takes_text != (config.kind == "generation"):
        raise InputError(
            f"{where}.metric: {config.metric!r} compares {'texts' if metric.takes_text else 'indices'}, and scorer "
            f"{config.kind} gives {'texts' if config.kind == 'generation' else 'indices'}"
        )
    if config.kind == "generation":
        assert metric is not None
        return GenerationScorer(config, rows, tokenizer, max_length, metric)
    return ChoiceScorer(config, rows, tokenizer, max_length, metric)
