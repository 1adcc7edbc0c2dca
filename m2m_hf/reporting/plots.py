"""The pictures of a report, drawn with matplotlib: as SVG for the page, which colours it, and as PNG files."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2m_hf.analysis.study_report import StudyReport
from m2m_hf.core.mixture import Mixture
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.tables import INTERVAL
from m2m_hf.search.result import score_of

# Colours by what they mean. In a page they become its CSS variables, so that they follow its light or dark scheme.
INK, MUTED, LINE, FIRST, SECOND, BAD = "#1b1c1d", "#6b6c6d", "#d0d1d2", "#1d6fb8", "#c5621c", "#b3261e"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", FIRST: "first", SECOND: "second", BAD: "bad"}
STYLE = {
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.labelsize": 10,
    "text.color": INK, "text.parse_math": False, "font.size": 10, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 9,
    "svg.fonttype": "none", "svg.hashsalt": "m2m_hf", "figure.constrained_layout.use": True, "axes.unicode_minus": True,
}  # fmt: skip
WIDTH = 4.6  # inches: readable on a phone, two beside each other on a screen
SHOWN = 24  # mixtures in the picture of the ranking


def short(name: str, most: int = 26) -> str:
    """A name that does not push the picture aside."""
    return name if len(name) <= most else name[: most - 1] + "…"


def ranking(run: FinishedRun) -> Figure | None:
    """The best mixtures with their intervals, and below which candidates are in them (after UpSet; Lex et al., 2014)."""
    shown = run.ranked[:SHOWN]
    if len(shown) < 2:
        return None
    figure, upper = above_members(run, [one.mixture for one in shown])
    for place, one in enumerate(shown):
        chosen, score = one.mixture == run.best.mixture, score_of(one)
        colour, error = FIRST if chosen else MUTED, INTERVAL * (score.stderr or 0.0)
        upper.errorbar(place, score.value, error, fmt="o", ms=4.5, color=colour, elinewidth=1.2)
    if run.base is not None:
        upper.axhline(run.base.score, color=SECOND, lw=1, ls="--")
        upper.annotate("base model", (0.01, run.base.score), xycoords=("axes fraction", "data"), color=SECOND, fontsize=9,
                       va="bottom")  # fmt: skip
    return figure


def above_members(run: FinishedRun, mixtures: Sequence[Mixture]) -> tuple[Figure, Axes]:
    """Axes to draw scores of mixtures on, side by side, and below them which candidates are in each (after UpSet)."""
    often = {name: sum(name in one.names for one in mixtures) for name in run.candidates}
    names = sorted(often, key=lambda name: (-often[name], name))
    figure = Figure(figsize=(WIDTH, 2.4 + 0.22 * len(names)))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, max(0.9, 0.24 * len(names))])
    for place, mixture in enumerate(mixtures):
        colour, rows = FIRST if mixture == run.best.mixture else INK, [names.index(name) for name in mixture.names]
        lower.scatter([place] * len(names), range(len(names)), s=12, color=LINE)
        lower.scatter([place] * len(rows), rows, s=26, color=colour)
        lower.plot([place, place], [min(rows), max(rows)], color=colour, lw=1)
    upper.set_ylabel(short(run.metric))
    upper.tick_params(bottom=False)
    lower.set_yticks(range(len(names)), [short(name) for name in names])
    lower.set_ylim(len(names) - 0.5, -0.5)
    lower.set_xlim(-0.7, len(mixtures) - 0.3)
    lower.set_xticks([])
    lower.tick_params(length=0)
    lower.spines[:].set_visible(False)
    return figure, upper


def shapley(run: FinishedRun) -> Figure | None:
    """Shapley values with intervals."""
    if run.shapley is None:
        return None
    items = sorted(run.shapley.shapley.items(), key=lambda item: item[1].value)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.28 * len(items)))
    axes = figure.subplots()
    for row, (_, one) in enumerate(items):
        axes.barh(row, one.value, color=FIRST if one.value >= 0 else BAD, height=0.6, alpha=0.85)
        axes.errorbar(one.value, row, xerr=INTERVAL * (one.stderr or 0.0), color=INK, elinewidth=1)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(items)), [short(name) for name, _ in items])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"Shapley value, {short(run.metric)}")
    return figure


def interactions(run: FinishedRun) -> Figure | None:
    """What every pair gains beyond what its two gain apart."""
    names = run.usable
    if run.shapley is None or not run.shapley.interactions or len(names) < 3:
        return None
    table = np.full((len(names), len(names)), np.nan)
    for one in run.shapley.interactions:
        first, second = sorted(names.index(name) for name in one.pair)
        table[second, first] = one.value
    most = float(np.nanmax(np.abs(table))) or 1.0
    return heat_map(table[1:, :-1], names[1:], names[:-1], most, "+.3f")


def taught(run: FinishedRun) -> Figure | None:
    """What every expert alone adds to the log-probability of every candidate's own rows."""
    gains, names = run.relations.gains, run.usable
    rows = [name for name in run.candidates if name in gains]
    if not rows or len(run.candidates) < 2:
        return None
    table = np.array([[gains[row].get(name, np.nan) for name in names] for row in rows])
    own = [abs(gains[name][name]) for name in names if name in gains]
    figure = heat_map(table, rows, names, float(np.nanmax(own or np.abs(table))) or 1.0, "+.2f")
    figure.axes[0].set_xlabel(f"{run.expert} of")
    figure.axes[0].set_ylabel("rows of")
    return figure


def likeness(run: FinishedRun) -> Figure | None:
    """Of every pair of experts: below the diagonal their cosine, above it their sign conflict, coloured by the same scale."""
    names = run.usable
    table, colours = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    for one in run.relations.pairs:
        if set(one.pair) <= set(names):
            first, second = sorted(names.index(name) for name in one.pair)
            table[second, first], table[first, second] = one.cosine, one.sign_conflict
            colours[second, first], colours[first, second] = one.cosine, 1 - 2 * one.sign_conflict
    return heat_map(table, names, names, 1.0, ".2f", colours) if np.isfinite(table).any() else None


def heat_map(
    table: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    most: float,
    style: str,
    colours: np.ndarray | None = None,
) -> Figure:
    """A table of figures, blue above 0 and red below; up to eight columns show them. `most` has the full colour."""
    figure = Figure(figsize=(min(WIDTH, 2.9 + 0.36 * len(columns)), min(WIDTH, 1.7 + 0.36 * (1 + len(rows)))))
    axes = figure.subplots()
    colours = table if colours is None else colours
    image = axes.pcolormesh(colours, cmap="RdBu", vmin=-most, vmax=most)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value) and len(columns) <= 8:
            dark = abs(colours[row, column]) > 0.6 * most
            text = f"{value:{style}}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{style}}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center",
                      fontsize=8.5 if len(columns) < 7 else 7, color="#ffffff" if dark else "#202122")  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, [short(name, 18) for name in columns], rotation=40, ha="right")
    axes.set_yticks(np.arange(len(rows)) + 0.5, [short(name, 18) for name in rows])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.7).outline.set_visible(False)
    return figure


def expected(run: FinishedRun) -> Figure | None:
    """What fine-tuning is expected to give and has given, by mixture, beside what the search said."""
    if run.verified is None:
        return None
    found = run.verified.expectation
    shown = found.mixtures[:SHOWN]
    figure, axes = above_members(run, [one.mixture for one in shown])
    noise = found.training_noise
    axes.axhspan(run.choice.value - noise, run.choice.value + noise, color=LINE, alpha=0.5, lw=0)
    for place, one in enumerate(shown):
        colour = FIRST if one.mixture == run.best.mixture else INK
        axes.plot(place, one.surrogate, "x", ms=4.5, color=SECOND)
        axes.errorbar(place, one.expected, one.spread, color=MUTED, elinewidth=1.2)
        if one.trained is not None or not one.spread:
            axes.plot(place, one.expected if one.trained is None else one.trained, "o", ms=5, color=colour)
    return figure


def fidelity(run: FinishedRun) -> Figure | None:
    """The scores that mixtures were predicted against those of the fine-tuned models, by surrogate."""
    study = run.fidelity
    if study is None:
        return None
    kinds = list(study.agreement)
    measures = {"score": short(run.metric)}
    if all(one.trained.logprob is not None for one in study.mixtures):
        measures["logprob"] = "log-prob."
    figure = Figure(figsize=(WIDTH, 2.5 * len(measures) + 0.2))
    grid = figure.subplots(len(measures), len(kinds), squeeze=False)
    for row, (measure, words) in enumerate(measures.items()):
        for axes, kind in zip(grid[row], kinds, strict=True):
            axes.set_title(f"{kind}, {words}", fontsize=10)
            agree(axes, study, kind, measure)
        grid[row, 0].set_ylabel("fine-tuned")
    for axes in grid[-1]:
        axes.set_xlabel("predicted")
    grid[0, 0].legend(loc="lower right", handletextpad=0.2)
    return figure


def agree(axes: Axes, study: StudyReport, kind: str, measure: str) -> None:
    """A surrogate's predictions of a measure, single candidates apart."""
    known = [one for one in study.mixtures if getattr(one.predicted(kind), measure) is not None]
    if not known:
        return
    x = np.array([getattr(one.predicted(kind), measure) for one in known])
    y = np.array([getattr(one.trained, measure) for one in known])
    single = np.array([len(one.mixture) == 1 for one in known])
    for kept, colour, label in ((single, SECOND, "single"), (~single, FIRST, "two or more")):
        axes.scatter(x[kept], y[kept], s=22, lw=0, color=colour, label=label, alpha=0.85)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=LINE, lw=1, zorder=0)
    agreement = study.agreement[kind].get(measure)
    if agreement and np.isfinite(agreement.pearson.value):
        axes.annotate(f"r = {agreement.pearson.value:.2f}", (0.04, 0.95), xycoords="axes fraction", va="top")


def curves(run: FinishedRun) -> Figure | None:
    """The training loss of every adapter."""
    known = {name: one.loss_curve for name, one in run.training.items()}
    if not any(len(curve) > 1 for curve in known.values()):
        return None
    figure = Figure(figsize=(WIDTH, 2.9))
    axes = figure.subplots()
    colours = mpl.colormaps["tab10" if len(known) <= 10 else "tab20"]
    for number, (name, curve) in enumerate(known.items()):
        if len(curve) > 1:
            axes.plot(*np.array(curve).T, color=colours(number % colours.N), lw=1.3, label=short(name))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(ncols=2 if len(known) > 6 else 1)
    return figure


PICTURES: dict[str, Callable[[FinishedRun], Figure | None]] = {
    "ranking": ranking,
    "shapley": shapley,
    "interactions": interactions,
    "taught": taught,
    "likeness": likeness,
    "expected": expected,
    "fidelity": fidelity,
    "curves": curves,
}


def draw(run: FinishedRun, folder: Path) -> dict[str, str]:
    """Draws all pictures that there are data for; writes them as PNG into `folder`.

    Returns:
        name -> SVG for a page.
    """
    drawn = {}
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, picture in PICTURES.items():
            if (figure := picture(run)) is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # what was laid out once need not be for every file
                figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white", metadata={"Software": None})
                drawn[name] = svg(figure, name)
    for path in folder.glob("*.png"):
        if path.stem not in drawn:  # of an earlier state of the run
            path.unlink()
    return drawn


def svg(figure: Figure, name: str) -> str:
    """A picture as it stands in a page: without a header of its own, ids that are unique there, colours as variables."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"',
                  lambda found: f"<svg {found[1] or found[2] or ''}{found[3] or ''}", text, count=1)  # fmt: skip
