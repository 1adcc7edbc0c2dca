"""`report.html`: one self-contained page about a run, made from the files of its run folder; nothing is loaded or measured."""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from m2m_hf import __version__
from m2m_hf.analysis.fidelity import LARGER, VERDICTS
from m2m_hf.console import duration
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import paired
from m2m_hf.core.trial import scores_of
from m2m_hf.reporting.plots import INTERVAL, draw
from m2m_hf.reporting.record import Record
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder

TABLE = 40  # mixtures in the page's table


def interval(value: float, stderr: float | None) -> str:
    """`0.777 to 0.907`: 95 %."""
    return "" if stderr is None else f"{value - INTERVAL * stderr:.3f} to {value + INTERVAL * stderr:.3f}"


def signed(value: float | None, stderr: float | None = None) -> str:
    """`+0.012 ± 0.004`"""
    if value is None:
        return "–"
    return f"{value:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def ranking_rows(record: Record) -> list[dict[str, Any]]:
    """The page's table of mixtures."""
    best = next((one for one in record.scored if one.mixture == record.best), None)
    rows = []
    for place, one in enumerate(record.ranked[:TABLE], start=1):
        score = record.score(one)
        behind = paired(scores_of(one), scores_of(best), one.weights) if best else (None, None)
        rows.append(
            {
                "place": place,
                "mixture": one.mixture,
                "score": score,
                "behind": "" if one.mixture == record.best else signed(*behind),
                "chosen": one.mixture == record.best,
            }
        )
    return rows


def costs(record: Record) -> list[tuple[str, str, str]]:
    """(what, how much, how long) of everything that was done."""
    spent = record.summary["costs"]
    counts = record.summary["counts"]
    rows = [
        (
            f"{counts['candidates']} {record.expert}s",
            f"{spent['adapter_steps']:,} steps",
            duration(spent["train_seconds"]),
        ),
        (
            f"{record.summary['counts']['trials']} trials",
            f"{spent['example_evaluations']:,} examples",
            duration(spent["search_seconds"]),
        ),
    ]
    if spent["compare_seconds"]:
        rows.append(("mixtures fine-tuned to compare", "", duration(spent["compare_seconds"])))
    if record.final:
        rows.append(("final model", f"{record.final['steps']:,} steps", duration(spent["final_seconds"])))
    return rows


def write_report(root: Path) -> Path:
    """Makes `report.html`, and the pictures in it as `pictures/*.png`, of the run in `root`.

    Raises:
        InputError: there is no finished search in it.
    """
    run = RunFolder(root)
    record = Record.read(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2m_hf.reporting"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "interval": interval, "signed": signed, "LARGER": LARGER, "VERDICTS": VERDICTS, "Mixture": Mixture,
    }  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        record=record,
        summary=record.summary,
        fidelity=record.fidelity,
        pictures=draw(record, run.pictures),
        rows=ranking_rows(record),
        costs=costs(record),
        left_out=[name for name in record.candidates if name not in record.best.names],
        config=yaml.safe_dump(dict(record.config), sort_keys=False, allow_unicode=True, width=100),
        recipe=run.recipe.name,
    )
    write_atomic(run.report, page)
    return run.report
