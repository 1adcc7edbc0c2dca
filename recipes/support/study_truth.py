"""The correlation study of a run as the truth that recipes compare surrogates with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from m2m_hf.analysis.fidelity import LARGER, Agreement
from m2m_hf.console import Terminal
from m2m_hf.core.jsonable import to_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.trial import Standing
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.reporting.tables import Table, number, span
from m2m_hf.run.comparison import read_study, study_fidelity
from m2m_hf.run.context import RunContext
from m2m_hf.search.result import SearchResult
from m2m_hf.storage.files import write_json


def fine_tuned_truth(run: RunContext, result: SearchResult) -> tuple[list[Mixture], list[Standing], bool]:
    """(mixtures, how they stand fine-tuned, whether these are all) of the correlation study, made where it is missing."""
    found = read_study(run) or study_fidelity(run, result, unseal=False)
    mixtures = [Mixture.of(one["mixture"]) for one in found["mixtures"]]
    return mixtures, run.study.trained_standings(mixtures, result.base), found["all_mixtures"]


def surrogate_standings(
    run: RunContext, mixtures: Sequence[Mixture], kind: str = "merged", method: MergeMethod | None = None
) -> list[Standing]:
    """How mixtures stand by a surrogate, `merged` (by another merge method if given) or `ensemble`, on all rows."""
    label = (method or run.merge_method).label if kind == "merged" else kind
    return run.study.standings(run.objectives(kind, method), mixtures, f"scoring mixtures, {label}")


def show(title: str, found: Mapping[str, Mapping[str, Agreement]], terminal: Terminal, path: Path) -> None:
    """Prints what was found of every surrogate, and writes it to `path`."""
    for table in comparison_tables(title, found):
        terminal.table(*table)
    write_json(path, to_json(found))


def comparison_tables(title: str, found: Mapping[str, Mapping[str, Agreement]]) -> list[Table]:
    """By measure, of surrogates: the correlations over mixtures of two or more, and the regret over all."""
    columns = ["", "Pearson", "CI over rows", "Spearman", "CI over rows", "regret", "of random"]
    tables: list[Table] = []
    for measure in ("score", "logprob"):
        if not all(measure in of for of in found.values()):
            continue
        rows = []
        for name, of in found.items():
            larger = of.get(measure + LARGER)
            estimates = (larger.pearson, larger.spearman) if larger else ()
            cells = [cell for one in estimates for cell in (number(one.value), span(one.row_ci))] or ["–"] * 4
            rows.append([name, *cells, number(of[measure].regret.value, 3), number(of[measure].random_regret, 3)])
        tables.append((f"{measure}: {title}", columns, rows))
    return tables
