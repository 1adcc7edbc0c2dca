"""`report.html`: one self-contained page about a run, made from the files of its run folder; nothing is loaded or measured."""

from pathlib import Path

import jinja2
import yaml

from m2m_hf import __version__
from m2m_hf.analysis.fidelity import VERDICTS
from m2m_hf.console import duration
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.plots import draw
from m2m_hf.reporting.tables import BASELINES, interval, number, signed
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder

TABLE = 40  # mixtures in the page's table


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
        "interval": interval, "signed": signed, "number": number, "duration": duration, "VERDICTS": VERDICTS,
        "BASELINES": BASELINES, "TABLE": TABLE,
    }  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        run=run,
        pictures=draw(run, folder.pictures),
        best=next((one for one in run.scored if one.mixture == run.best.mixture), None),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100),
        recipe=folder.recipe.name,
    )
    write_atomic(folder.report, page)
    return folder.report
