"""Which datasets belong in the fine-tuning mixture? Merge to Mix (arXiv 2505.16066) for Hugging Face models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Bank",
    "FinishedRun",
    "GatedStack",
    "InputError",
    "MergeProbeCallback",
    "MergeToMixConfig",
    "MergeToMixSearcher",
    "Mixture",
    "Score",
    "SearchCallback",
    "SearchResult",
    "TargetScoreCallback",
    "TrainingRecorder",
    "Trial",
]
_HOMES = {
    "Bank": "training.bank",
    "FinishedRun": "reporting.finished_run",
    "GatedStack": "merging.gated_stack",
    "InputError": "errors",
    "MergeProbeCallback": "callbacks",
    "MergeToMixConfig": "config.run_config",
    "MergeToMixSearcher": "searcher",
    "Mixture": "core.mixture",
    "Score": "core.score",
    "SearchCallback": "search.callbacks",
    "SearchResult": "search.result",
    "TargetScoreCallback": "callbacks",
    "TrainingRecorder": "training.recording",
    "Trial": "core.trial",
}

if TYPE_CHECKING:
    from m2m_hf.callbacks import MergeProbeCallback, TargetScoreCallback
    from m2m_hf.config.run_config import MergeToMixConfig
    from m2m_hf.core.mixture import Mixture
    from m2m_hf.core.score import Score
    from m2m_hf.core.trial import Trial
    from m2m_hf.errors import InputError
    from m2m_hf.merging.gated_stack import GatedStack
    from m2m_hf.reporting.finished_run import FinishedRun
    from m2m_hf.search.callbacks import SearchCallback
    from m2m_hf.search.result import SearchResult
    from m2m_hf.searcher import MergeToMixSearcher
    from m2m_hf.training.bank import Bank
    from m2m_hf.training.recording import TrainingRecorder


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `m2m --help` need not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'm2m_hf' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
