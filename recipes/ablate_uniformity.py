"""What if the adapters are not trained alike? Varies one setting between candidates on purpose, and measures what is lost.

```bash
python recipes/ablate_uniformity.py --config x.yaml --vary learning_rate=2 learning_rate=4 seed
```

The truth is that of the run's own correlation study (`m2m fidelity`, which is made first where it is missing): mixtures really
fine-tuned with the uniform settings. For every setting to vary, one more bank of adapters is trained in OUT/ablation/, in which
half of the candidates, drawn at random, have it raised and the others lowered, so that `learning_rate=4` means that the highest
is four times the lowest; `seed` gives every candidate one of its own. What its averages predict is then held against the same
truth.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

from m2m_hf.console import LibraryLog, Terminal

LOG = LibraryLog()  # libraries have things to say when they are imported

import argparse
import random
from pathlib import Path
from typing import Any

from study_truth import fine_tuned_truth, show, surrogate_standings

from m2m_hf.analysis.study_report import compare
from m2m_hf.cli.exits import report_errors
from m2m_hf.config.parsing import parse
from m2m_hf.config.yaml_files import read_yaml
from m2m_hf.errors import InputError
from m2m_hf.searcher import MergeToMixSearcher

VARIED = ("learning_rate=2", "learning_rate=4", "num_train_epochs=4", "per_device_train_batch_size=4", "seed")


def settings(searcher: MergeToMixSearcher, field: str, factor: float | None) -> dict[str, Any]:
    """Name -> what the candidate's adapter is trained with in place of the run's own setting.

    Raises:
        InputError: a setting that is not a number, or that plays no part in this run.
    """
    names = list(searcher.run.candidates)
    if field == "seed":
        return {name: searcher.run.args.seed + 1 + number for number, name in enumerate(names)}
    own = getattr(searcher.run.args, field, None)
    if field == "num_train_epochs":
        own = float(searcher.run.args.num_train_epochs)
    if not isinstance(own, (int, float)) or isinstance(own, bool) or factor is None or factor <= 1:
        raise InputError(
            f"--vary {field}={factor}: expected seed, or a field of SFTConfig that is a number, =FACTOR above 1"
        )
    if field == "num_train_epochs" and searcher.run.args.max_steps > 0:
        raise InputError("--vary num_train_epochs: this run goes by max_steps; vary that")
    raised = set(random.Random(searcher.run.args.seed).sample(names, len(names) // 2))
    whole = isinstance(own, int)
    found = {}
    for name in names:
        value = own * factor**0.5 if name in raised else own / factor**0.5
        found[name] = round(value) if whole else value
    if min(found.values()) <= 0 or abs(max(found.values()) / min(found.values()) / factor - 1) > 0.3:
        raise InputError(
            f"--vary {field}={factor:g}: {own} cannot be varied so in whole numbers; take a larger {field}"
        )
    return found


def main() -> None:
    """Trains the banks, scores, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML")
    parser.add_argument(
        "--vary", nargs="+", default=VARIED, metavar="FIELD=FACTOR", help=f"default: {' '.join(VARIED)}"
    )
    given, flags = parser.parse_known_args()
    LOG.silence_libraries()
    terminal = Terminal()
    searcher = MergeToMixSearcher(*parse(given.config, flags), terminal)
    searcher.check()
    run = searcher.run
    varied = {}
    for asked in given.vary:
        field, _, text = asked.partition("=")
        try:
            factor = float(text) if text else None
        except ValueError:
            raise InputError(f"--vary {asked}: expected FIELD=FACTOR, such as learning_rate=4") from None
        varied[asked] = settings(searcher, field, factor)
    searcher.prepare()
    LOG.open(run.folder.log)
    mixtures, true, complete = fine_tuned_truth(run, searcher.search())
    found = {"uniform": compare(surrogate_standings(run, mixtures), true, complete)}
    for asked, values in varied.items():
        terminal.say(f"\n{asked}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()), "bold")
        candidates = read_yaml(given.config)["candidates"]
        for name, value in values.items():
            own = candidates[name].get("training", {})
            candidates[name]["training"] = {**own, asked.partition("=")[0]: value}
        folder = run.folder.root / "ablation" / asked.replace("=", "-")
        other = MergeToMixSearcher(
            *parse(
                given.config,
                [*flags, "--output_dir", str(folder)],
                {"candidates": candidates, "allow_mixed_training": True},
            ),
            Terminal(quiet=True),
        )
        other.run.terminal = terminal
        other.train_adapters()
        other.prepare()
        found[asked] = compare(surrogate_standings(other.run, mixtures), true, complete)
        title = "how well averages of mixed adapters predict what was fine-tuned"
        show(title, found, terminal, run.folder.root / "ablation" / "ablation.json")


if __name__ == "__main__":
    sys.exit(report_errors(main))
