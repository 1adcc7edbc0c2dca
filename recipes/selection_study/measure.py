"""Measures one case of the selection study: what every surrogate says of every mixture, and what training on it really gives.

```bash
python recipes/selection_study/data.py SOURCES DATA            # once
python recipes/selection_study/measure.py letters_loss --schedule epochs --seed 0 --data DATA --models MODELS
```

It is a run of the package: adapters, scores and fine-tuned mixtures go to `WORK/CASE-SCHEDULE-SEED` and are not made twice. What
came of it is one file, `tables/CASE-SCHEDULE-SEED.npz`, which `replay.py` reads; a run without a file is half done and goes on.

With `--variant` only the adapters are trained, in another way, and only merging is asked; `replay.py` compares that with the
mixtures that were fine-tuned as the case says. `half_rate`, `double_rate` and `double_length` change the learning rate or the
epochs; `anchored` adds to each adapter's rows as many that all share (after DeMix, arXiv 2602.00747); `fitted` takes the case's
adapters, and fits the weights of every mixture to its own training rows.

Schedules: `epochs`, the rows of a mixture for the same epochs, so that larger mixtures train longer; `steps`, the same number of
steps for adapters and for all mixtures, both on the union of the rows and on equal shares of each candidate.
"""

import argparse
import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.objectives.merged import GatedObjective
from m2m_hf.run.comparison import target_similarity
from m2m_hf.run.context import RunContext
from m2m_hf.run.relations import MOST, taught
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.searcher import MergeToMixSearcher

HERE = Path(__file__).parent
SCHEDULES = ("epochs", "steps")
SUMMED = (0.0, 0.5)  # exponents of the number of datasets by which a sum of adapters is divided; 1 is the average
VARIANTS: dict[str, dict[str, float]] = {  # fields of a configuration and by what they are multiplied
    "half_rate": {"learning_rate": 0.5},
    "double_rate": {"learning_rate": 2},
    "double_length": {"num_train_epochs": 2, "max_steps": 2},
    "anchored": {},
    "fitted": {},
}
FITS, RATE = 8, 0.1  # steps of Adam, and their length, that fit the weights of a mixture
LORA = {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}


def configuration(case: Mapping[str, Any], folder: Path, models: Path, schedule: str, seed: int) -> dict[str, Any]:
    """The YAML of the case's run."""
    (sample,) = {path.suffix for path in folder.iterdir()}

    def rows(name: str) -> dict[str, str]:
        return {
            "path": {".jsonl": "json", ".parquet": "parquet"}[sample],
            "data_files": str(folder / f"{name}{sample}"),
        }

    fields = dict(case["settings"])
    if schedule == "steps":
        fields = {name: value for name, value in fields.items() if name != "num_train_epochs"}
        fields["max_steps"] = case["steps"]
    target = dict(case["target"])
    if target["scorer"] == "classification" and "labels" not in target:  # validation rows alone may not have all
        lines = [
            line for part in ("validation", "test") for line in (folder / f"{part}.jsonl").read_text().splitlines()
        ]
        target["labels"] = sorted({json.loads(line)["label"] for line in lines})
    lora = {} if fields.get("expert") == "full" else LORA
    return {
        "model_name_or_path": str(models / case["model"]),
        **lora,
        **fields,
        "seed": seed,
        "activation_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "candidates": {name: rows(name) for name in case["candidates"]},
        "targets": {"target": {"data": rows("validation"), "test_data": rows("test"), **target}},
    }


def subsets(names: Sequence[str]) -> list[Mixture]:
    """All mixtures of equal weights, by size."""
    return [Mixture.subset(some) for size in range(1, len(names) + 1) for some in combinations(names, size)]


class Table:
    """What is kept of a run: arrays of shape (mixtures, rows), and facts."""

    def __init__(self, names: Sequence[str], mixtures: Sequence[Mixture]) -> None:
        members = [[name in mixture.weights for name in names] for mixture in mixtures]
        self.arrays: dict[str, Any] = {"members": np.array(members, dtype=bool)}
        self.facts: dict[str, Any] = {"candidates": list(names)}

    def add(self, name: str, scores: Sequence[Any], by_row: bool = True) -> None:
        """Keeps values and, where these are others, log-probabilities of the right answers; NaN of what failed.

        Only their means, as a single column, unless `by_row`.
        """
        known = [score if isinstance(score, Score) else None for score in scores]
        for kind in ("values", "logprobs"):
            rows = max((len(getattr(score, kind)) for score in known if score), default=0)
            if rows and (kind == "values" or any(score and score.values != score.logprobs for score in known)):
                empty = np.full(rows, np.nan)
                stacked = np.stack([np.asarray(getattr(score, kind)) if score else empty for score in known])
                means = stacked.mean(1, keepdims=True, dtype=float).astype(np.float32)
                self.arrays[f"{name}.{kind}"] = stacked.astype(np.float16) if by_row else means

    def write(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez_compressed(file, facts=np.array(json.dumps(self.facts)), **self.arrays)
        partial.rename(path)


def equal_shares(run: RunContext, mixture: Mixture) -> dict[str, int]:
    """Equally many rows of each candidate, as many as `max_steps` take; of a small candidate some more than once."""
    rows = run.args.max_steps * run.args.train_batch_size * run.args.gradient_accumulation_steps
    return {name: -(-rows // len(mixture)) for name in mixture.names}


def measure(run: RunContext, searcher: MergeToMixSearcher, schedule: str) -> Table:
    """Everything that the study asks of one run."""
    names = list(run.candidates)
    mixtures = subsets(names)
    table = Table(names, mixtures)
    searcher.train_adapters()
    study, (scorer,), (sealed,) = run.study, run.validation_scorers.values(), run.test_scorers.values()
    for kind in study.surrogates:
        standings = study.standings(study.surrogates[kind], [Mixture(()), *mixtures], f"scoring mixtures, {kind}")
        scores = [standing.trials["target"].score for standing in standings]
        table.add(kind, scores[1:])
        if kind == "merged":
            table.add("base", scores[:1])
    sizes = {name: len(candidate.rows) for name, candidate in run.candidates.items()}
    stack = run.open_stack(AVERAGE)

    def scored(gates: Sequence[Mapping[str, float]], of: Scorer = scorer) -> list[Any]:
        return [of.score(stack, [one], run.tokens_per_batch)[0] for one in gates]

    for power in SUMMED:
        gates = [{name: len(mixture) ** -power for name in mixture.names} for mixture in mixtures]
        table.add(f"summed_{power:g}", scored(gates), by_row=False)
    gates = [
        {name: sizes[name] / sum(sizes[one] for one in mixture.names) for name in mixture.names} for mixture in mixtures
    ]
    table.add("by_rows", scored(gates), by_row=False)
    table.add("singles_test", scored([{name: 1.0} for name in names], sealed))
    learnt = taught(run, stack)[1]
    columns = [0, *(1 + stack.names.index(name) for name in names)]  # the base, and every adapter
    ways = {"union": [run.fine_tuned.counts(mixture) for mixture in mixtures]}
    if schedule == "steps" and len(set(sizes.values())) > 1:
        ways["shares"] = [equal_shares(run, mixture) for mixture in mixtures]
    (trained,) = run.trained_objectives(run.fine_tuned)
    for way, counts in ways.items():
        run.fine_tuned.train_all(counts, f"fine-tuning, {way}")
        for part, of in (("validation", scorer), ("test", sealed)):
            table.add(f"{way}.{part}", [trained.score(one, of) for one in counts])
        records = [run.fine_tuned.record(one) for one in counts]
        table.facts[way] = {key: [record.get(key) for record in records] for key in ("steps", "seconds", "loss")}
    adapters, (merged,) = run.bank.training(), run.objectives("merged")
    gradient = merged.gradient(mixtures[-1]) if isinstance(merged, GatedObjective) else None
    table.facts |= {
        "taught": [[learnt[name][column] for column in columns] for name in names],
        "gradient": list(gradient.gradient) if isinstance(gradient, Score) else None,
        "rows": sizes,
        "tokens": {name: candidate.tokens for name, candidate in run.candidates.items()},
        "adapters": {key: [adapters[name].get(key) for name in names] for key in ("steps", "seconds", "loss")},
        "similarity": target_similarity(run),
    }
    return table


def anchored(case: Mapping[str, Any], folder: Path, out: Path) -> Path:
    """A folder with the case's rows, each candidate's followed by the same rows of all, as many as a candidate has on average."""
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in case["candidates"]}
    share = sum(map(len, lines.values())) // len(lines) ** 2
    anchors = [line for rows in lines.values() for line in rows[:share]]
    out.mkdir(exist_ok=True)
    for name, rows in lines.items():
        (out / f"{name}.jsonl").write_text("\n".join([*rows, *anchors]) + "\n")
    for part in ("validation", "test"):
        shutil.copyfile(folder / f"{part}.jsonl", out / f"{part}.jsonl")
    return out


def fitted(run: RunContext, mixtures: Sequence[Mixture]) -> list[dict[str, float]]:
    """The weights of each mixture that make its own training rows likeliest, from equal ones on."""
    stack, found = run.open_stack(AVERAGE), []
    scorers = {name: run.task.own_scorer(name, MOST, run.scoring_setup) for name in run.candidates}
    for mixture in mixtures:
        gates = torch.tensor(list(mixture.weights.values()), dtype=torch.float64)
        adam = torch.optim.Adam([gates], lr=RATE, maximize=True)
        for _ in range(FITS if len(mixture) > 1 else 0):
            weights = dict(zip(mixture.names, gates.tolist(), strict=True))
            slopes = [
                cast(LogprobScorer, scorers[name]).gradient(stack, weights, run.tokens_per_batch)[1]
                for name in mixture.names
            ]
            gates.grad = torch.tensor([sum(of[name] for of in slopes) for name in mixture.names], dtype=torch.float64)
            adam.step()
        found.append(
            dict(zip(mixture.names, gates.tolist(), strict=True)) if len(mixture) > 1 else {mixture.names[0]: 1.0}
        )
    return found


def measure_variant(run: RunContext, searcher: MergeToMixSearcher, variant: str) -> Table:
    """What merging says of all mixtures, of adapters that were trained in another way."""
    mixtures = subsets(list(run.candidates))
    table = Table(list(run.candidates), mixtures)
    searcher.train_adapters()
    scores: list[Any]
    if variant == "fitted":
        stack, (scorer,) = run.open_stack(AVERAGE), run.validation_scorers.values()
        gates = fitted(run, mixtures)
        scores = [scorer.score(stack, [one], run.tokens_per_batch)[0] for one in gates]
    else:
        standings = run.study.standings(run.objectives("merged"), mixtures, "scoring mixtures")
        scores = [standing.trials["target"].score for standing in standings]
    table.add(variant, scores, by_row=False)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="of the file of cases")
    parser.add_argument("--cases", type=Path, default=HERE / "cases.toml")
    parser.add_argument("--schedule", choices=SCHEDULES, default="epochs")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, order of rows and dropout")
    parser.add_argument("--variant", choices=VARIANTS, help="only merging, of adapters that are trained in another way")
    parser.add_argument("--data", type=Path, required=True, help="what data.py has written")
    parser.add_argument("--models", type=Path, required=True, help="holds a folder for each base model")
    parser.add_argument("--work", type=Path, default=Path("runs/selection_study"))
    parser.add_argument("--tables", type=Path, default=HERE / "tables")
    parser.add_argument("--keep", action="store_true", help="keep the run folder, with adapters and models")
    given = parser.parse_args()
    cases = tomllib.loads(given.cases.read_text())
    if given.case not in cases:
        raise SystemExit(f"case: expected one of {', '.join(cases)}, got {given.case}")
    name = "-".join([given.case, given.schedule, str(given.seed), *filter(None, [given.variant])])
    table = given.tables / f"{name}.npz"
    if table.exists():
        print(f"{table} is there")
        return
    folder = given.work / name
    folder.mkdir(parents=True, exist_ok=True)
    case = cases[given.case]
    rows = (given.data / given.case).absolute()
    if given.variant == "anchored":
        rows = anchored(case, rows, folder.absolute() / "rows")
    config = configuration(case, rows, given.models.absolute(), given.schedule, given.seed)
    for field, factor in VARIANTS.get(given.variant, {}).items():
        if field in config:
            config[field] = type(config[field])(config[field] * factor)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(folder.absolute() / "run")}, sort_keys=False))
    searcher = MergeToMixSearcher.from_yaml(path)
    searcher.check()
    if given.variant:
        found = measure_variant(searcher.run, searcher, given.variant)
    else:
        found = measure(searcher.run, searcher, given.schedule)
    found.facts |= {
        "case": given.case,
        "schedule": given.schedule,
        "seed": given.seed,
        "variant": given.variant,
        "aside": bool(case.get("aside")),
    }
    found.write(table)
    if not given.keep:
        shutil.rmtree(folder)
    print(f"wrote {table}")


if __name__ == "__main__":
    main()
