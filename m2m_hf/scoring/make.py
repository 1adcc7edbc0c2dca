"""From targets to scorers: the table of all kinds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.data.rows import Target
from m2m_hf.scoring.causal_lm import ChoiceScorer, LossScorer, PreferenceScorer
from m2m_hf.scoring.classification import ClassificationScorer
from m2m_hf.scoring.external import CallableScorer, CommandScorer, HarnessScorer
from m2m_hf.scoring.generation import GenerationScorer
from m2m_hf.scoring.judge import JudgeScorer
from m2m_hf.scoring.judge_server import JudgeServer
from m2m_hf.scoring.reward import RewardScorer
from m2m_hf.scoring.reward_model import RewardModel
from m2m_hf.scoring.scorers import Scorer, Setup

CLASSES: dict[str, Callable[[TargetConfig, Any, Setup], Scorer]] = {  # given what is scored: rows, a command or a task
    "choice": ChoiceScorer,
    "classification": ChoiceScorer,  # by the words of the labels; with a head `ClassificationScorer`
    "loss": LossScorer,
    "generation": GenerationScorer,
    "preference": PreferenceScorer,
    "reward": RewardScorer,
    "judge": JudgeScorer,
    "command": CommandScorer,
    "lm_eval": HarnessScorer,
    "callable": CallableScorer,
}


def make_scorer(config: TargetConfig, given: Any, setup: Setup) -> Scorer:
    """The scorer that `config` asks for, of the rows, the command or the task that is given."""
    if config.kind == "classification" and setup.head is not None:
        return ClassificationScorer(config, given, setup)
    return CLASSES[config.kind](config, given, setup)


def make_scorers(target: Target, setup: Setup) -> dict[str, Scorer]:
    """`validation` and, where anything is sealed, `test` -> scorer of a target."""
    config, setup = target.config, replace(setup, where=f"targets.{target.name}")
    if config.reward_model is not None:  # loaded once for both parts
        setup = replace(setup, reward=RewardModel(config.reward_model, setup.where))
    if config.judge is not None and setup.judged is not None:  # one limit for both parts
        setup = replace(setup, judge=JudgeServer(config.judge, setup.judged(target.name), setup.where))
    what, sealed = SCORERS[config.kind].options[:2]
    parts: dict[str, Any] = {
        "validation": target.rows or getattr(config, what) or (),
        "test": target.test_rows or getattr(config, sealed),
    }
    return {part: make_scorer(config, given, setup) for part, given in parts.items() if part == "validation" or given}
