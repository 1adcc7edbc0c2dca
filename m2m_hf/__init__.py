"""Which datasets belong in the fine-tuning mixture? Merge to Mix (arXiv 2505.16066) for Hugging Face models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Bank",
    "GatedStack",
    "InputError",
    "MergeProbeCallback",
    "MergeToMixConfig",
    "MergeToMixSearcher",
    "Mixture",
    "Score",
    "SearchResult",
    "TargetScoreCallback",
    "TrainingRecorder",
    "Trial",
]
_HOMES = {
    "Bank": "bank",
    "GatedStack": "merging",
    "InputError": "errors",
    "MergeProbeCallback": "plugins",
    "MergeToMixConfig": "config",
    "MergeToMixSearcher": "searcher",
    "Mixture": "mixture",
    "Score": "mixture",
    "SearchResult": "search",
    "TargetScoreCallback": "plugins",
    "TrainingRecorder": "callbacks",
    "Trial": "mixture",
}

if TYPE_CHECKING:
    from .bank import Bank
    from .callbacks import TrainingRecorder
    from .config import MergeToMixConfig
    from .errors import InputError
    from .merging import GatedStack
    from .mixture import Mixture, Score, Trial
    from .plugins import MergeProbeCallback, TargetScoreCallback
    from .search import SearchResult
    from .searcher import MergeToMixSearcher


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `m2m --help` need not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'm2m_hf' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
