"""Which merge method predicts fine-tuned mixtures best? Scores the mixtures of a correlation study with each, and compares.

```bash
python recipes/compare_merge_methods.py --config x.yaml
python recipes/compare_merge_methods.py --config x.yaml --methods average ties:density=0.5
```

The truth is that of the run's own correlation study (`m2m fidelity`, which is made first where it is missing). Nothing more is
trained; every score is a line of the journal, so that the comparison goes on from where it stands.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

from m2m_hf.console import LibraryLog, Terminal

LOG = LibraryLog()  # libraries have things to say when they are imported

import argparse
from pathlib import Path

from study_truth import fine_tuned_truth, show, surrogate_standings

from m2m_hf.analysis.study_report import compare
from m2m_hf.cli.exits import report_errors
from m2m_hf.config.parsing import parse
from m2m_hf.config.run_config import MERGE_PARAMETERS, check_merge_parameters
from m2m_hf.errors import InputError
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.searcher import MergeToMixSearcher

METHODS = (
    "average", "task_arithmetic", "task_arithmetic:scaling=1", "ties", "ties:density=0.5", "dare", "dare:density=0.1", "linear",
)  # fmt: skip


def method(text: str, seed: int) -> MergeMethod:
    """The method that `name:parameter=value,...` names.

    Raises:
        InputError: no such method, or a parameter that it does not take.
    """
    name, _, rest = text.partition(":")
    if name not in MERGE_PARAMETERS:
        raise InputError(f"--methods: expected one of {', '.join(MERGE_PARAMETERS)}, got {name!r}")
    parameters: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise InputError(f"--methods {text}: expected {name}:parameter=number, got {part!r}") from None
    check_merge_parameters(name, parameters, f"--methods {text}")
    return MergeMethod.of(name, parameters, seed)


def main() -> None:
    """Scores, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    given, flags = parser.parse_known_args()
    LOG.silence_libraries()
    terminal = Terminal()
    searcher = MergeToMixSearcher(*parse(given.config, flags), terminal)
    searcher.check()
    run = searcher.run
    methods = [method(text, run.args.seed) for text in given.methods]
    searcher.prepare()
    LOG.open(run.folder.log)
    mixtures, true, complete = fine_tuned_truth(run, searcher.search())
    found = {one.label: compare(surrogate_standings(run, mixtures, method=one), true, complete) for one in methods}
    if "ensemble" in run.study.surrogates:
        found["ensemble"] = compare(surrogate_standings(run, mixtures, "ensemble"), true, complete)
    title = "how well merged models predict what was fine-tuned"
    show(title, found, terminal, run.folder.root / "merge_methods.json")


if __name__ == "__main__":
    sys.exit(report_errors(main))
