"""Answers that did not end by themselves, over all sessions of a run."""

from m2m_hf.core.trial import Standing
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.generation import AnsweringScorer
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.storage.files import read_json_or_empty, write_json

OFTEN, SOME = 0.05, 20  # share of answers that a user is warned of, where there are so many


class WarnOfCutOff(SearchCallback):
    """Warns once of every target whose answers are often cut off, as soon as it is known."""

    def __init__(self, run: RunContext) -> None:
        self._run, self._told = run, set[str]()

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        for target, text in cut_off(self._run).items():
            if target not in self._told:
                self._told.add(target)
                self._run.terminal.say(text, "yellow")


def cut_off(run: RunContext) -> dict[str, str]:
    """Target -> what to say where many answers were cut off. Writes down those since the last time."""
    known = read_json_or_empty(run.folder.cut_off)
    now, found = dict(known), {}
    for target, scorer in run.validation_scorers.items():
        if not isinstance(scorer, AnsweringScorer):
            continue
        of = now.get(target, {})
        if of.get("scorer") != scorer.fingerprint:
            of = {"scorer": scorer.fingerprint, "cut": 0, "all": 0}
        cut, every = of["cut"] + scorer.cut_off, of["all"] + scorer.answered
        scorer.cut_off = scorer.answered = 0
        now[target] = of | {"cut": cut, "all": every}
        if every >= SOME and cut > OFTEN * every:
            share = f"{100 * cut / every:.0f} %"
            found[target] = (
                f"{target}: {cut:,} of {every:,} answers ({share}) were cut off at generation.max_new_tokens and are rated as "
                "they stand; raise it, or have the prompt ask for a short answer"
            )
    if run.is_main and now != known:
        write_json(run.folder.cut_off, now)
    return found
