"""`report.html`: one self-contained page about a run, made from the files of its run folder; nothing is loaded or measured."""

from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from m2m_hf import __version__
from m2m_hf.analysis.fidelity import VERDICTS
from m2m_hf.console import duration
from m2m_hf.core.jsonable import Measurement
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import paired
from m2m_hf.core.trial import scores_of
from m2m_hf.reporting.finished_run import FinishedRun, estimate
from m2m_hf.reporting.plots import draw
from m2m_hf.reporting.tables import BASELINES, interval, number, signed
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder

TABLE = 40  # mixtures in the page's table


@dataclass(frozen=True)
class Row:
    """A mixture in the page's table; `behind` is how far the chosen one lies above it."""

    place: int
    mixture: Mixture
    score: float
    stderr: float | None
    behind: str
    chosen: bool


def ranking_rows(run: FinishedRun) -> list[Row]:
    """The page's table of mixtures."""
    best = next((one for one in run.scored if one.mixture == run.best.mixture), None)
    rows = []
    for place, one in enumerate(run.ranked[:TABLE], start=1):
        chosen = one is best
        behind = Measurement(*paired(scores_of(one), scores_of(best), one.weights)) if best and not chosen else None
        stderr = one.score.stderr if one.score else None
        rows.append(Row(place, one.mixture, estimate(one), stderr, signed(behind), chosen))
    return rows


def costs(run: FinishedRun) -> list[tuple[str, str, str]]:
    """(what, how much, how long) of everything that was done."""
    spent, counts = run.costs, run.counts
    rows = [
        (f"{counts.candidates} {run.expert}s", f"{spent.adapter_steps:,} steps", duration(spent.train_seconds)),
        (f"{counts.trials} trials", f"{spent.example_evaluations:,} examples", duration(spent.search_seconds)),
    ]
    if spent.compare_seconds:
        rows.append(("mixtures fine-tuned to compare", "", duration(spent.compare_seconds)))
    if run.final:
        rows.append(("final model", f"{run.final.steps:,} steps", duration(spent.final_seconds or 0)))
    return rows


def write_report(root: Path) -> Path:
    """Makes `report.html`, and its pictures as `pictures/*.png`, of the run in `root`.

    Raises:
        InputError: there is no finished search in it.
    """
    folder = RunFolder(root)
    run = FinishedRun.from_pretrained(folder.root)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2m_hf.reporting"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "interval": interval, "signed": signed, "number": number, "VERDICTS": VERDICTS, "BASELINES": BASELINES,
    }  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        run=run,
        pictures=draw(run, folder.pictures),
        rows=ranking_rows(run),
        costs=costs(run),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100),
        recipe=folder.recipe.name,
    )
    write_atomic(folder.report, page)
    return folder.report
