"""Measures one case of the selection study: what every surrogate says of every mixture, and what training on it really gives.

```bash
python recipes/selection_study/data.py SOURCES DATA            # once
python recipes/selection_study/measure.py letters_loss --schedule epochs --seed 0 --data DATA --models MODELS
```

It is a run of the package: adapters, scores and fine-tuned mixtures go to `WORK/CASE-SCHEDULE-SEED` and are not made twice. What
came of it is one file, `tables/CASE-SCHEDULE-SEED.npz`, which `replay.py` reads; a run without a file is half done and goes on.

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
from typing import Any

import numpy as np
import yaml

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.objectives.merged import GatedObjective
from m2m_hf.run.comparison import target_similarity
from m2m_hf.run.context import RunContext
from m2m_hf.run.relations import taught
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.searcher import MergeToMixSearcher

HERE = Path(__file__).parent
SCHEDULES = ("epochs", "steps")
SUMMED = (0.0, 0.5)  # exponents of the number of datasets by which a sum of adapters is divided; 1 is the average
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="of the file of cases")
    parser.add_argument("--cases", type=Path, default=HERE / "cases.toml")
    parser.add_argument("--schedule", choices=SCHEDULES, default="epochs")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, order of rows and dropout")
    parser.add_argument("--data", type=Path, required=True, help="what data.py has written")
    parser.add_argument("--models", type=Path, required=True, help="holds a folder for each base model")
    parser.add_argument("--work", type=Path, default=Path("runs/selection_study"))
    parser.add_argument("--tables", type=Path, default=HERE / "tables")
    parser.add_argument("--keep", action="store_true", help="keep the run folder, with adapters and models")
    given = parser.parse_args()
    cases = tomllib.loads(given.cases.read_text())
    if given.case not in cases:
        raise SystemExit(f"case: expected one of {', '.join(cases)}, got {given.case}")
    name = f"{given.case}-{given.schedule}-{given.seed}"
    table = given.tables / f"{name}.npz"
    if table.exists():
        print(f"{table} is there")
        return
    folder = given.work / name
    folder.mkdir(parents=True, exist_ok=True)
    case = cases[given.case]
    config = configuration(
        case, (given.data / given.case).absolute(), given.models.absolute(), given.schedule, given.seed
    )
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(folder.absolute() / "run")}, sort_keys=False))
    searcher = MergeToMixSearcher.from_yaml(path)
    searcher.check()
    found = measure(searcher.run, searcher, given.schedule)
    found.facts |= {
        "case": given.case,
        "schedule": given.schedule,
        "seed": given.seed,
        "aside": bool(case.get("aside")),
    }
    found.write(table)
    if not given.keep:
        shutil.rmtree(folder)
    print(f"wrote {table}")


if __name__ == "__main__":
    main()
