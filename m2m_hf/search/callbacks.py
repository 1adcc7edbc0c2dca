"""Callbacks that watch a search and may stop it."""

from dataclasses import dataclass

from m2m_hf.console import Bar
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial
from m2m_hf.search.result import SearchResult, score_of


@dataclass
class SearchControl:
    """How a callback acts on the search.

    Args:
        should_stop: set it to True to end the search as a spent budget does. What was scored is kept, and the same search
            continues from there. The base model, the single candidates and all together are scored in any case.
    """

    should_stop: bool = False


class SearchCallback:
    """Base class of callbacks for a search; override what you need.

    ```python
    class StopWhenGood(SearchCallback):
        def on_standing(self, standing, best, control):
            if best is not None and best.score.value > 0.9:
                control.should_stop = True

    searcher.search(callbacks=[StopWhenGood()])
    ```

    With several processes, callbacks run on each of them, and the main process decides whether to stop.
    """

    def on_search_begin(self, space: SearchSpace, planned: int, control: SearchControl) -> None:
        """Called before anything is scored; `planned` is about how many mixtures the search will score."""

    def on_trial(self, trial: Trial, recalled: bool, control: SearchControl) -> None:
        """Called for every scored trial, also for the rungs of a race; `recalled` ones come from the journal."""

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        """Called when it is settled how a mixture stands; `best` is the best mixture so far that may be chosen."""

    def on_search_end(self, result: SearchResult, control: SearchControl) -> None:
        """Called when the search has chosen a mixture."""


class ProgressCallback(SearchCallback):
    """Moves a progress bar by one for every mixture."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._scored: set[Mixture] = set()

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        self._scored.add(standing.mixture)  # a finalist of a race stands twice
        self._bar.update(len(self._scored), f"best so far {score_of(best).value:.4f} {best.mixture}" if best else "")
