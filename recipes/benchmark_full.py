"""Measures what it costs to average full experts.

```bash
m2m adapters --config recipes/intents.yaml --expert full --learning_rate 2e-5 --output_dir runs/intents-full
python recipes/benchmark_full.py --config runs/intents-full/config.yaml
```

Writes the weights of all subsets of a finished bank's experts into the base model, one after another. Prints the time that a
mixture takes, by its size, and the most memory that the process had.
"""

import sys

sys.path.pop(0)  # this folder has files named like modules of the standard library

import argparse
import resource
import time
from itertools import combinations
from pathlib import Path

from m2m_hf import MergeToMixSearcher
from m2m_hf.core.mixture import Mixture
from m2m_hf.merging.dense_stack import DenseStack
from m2m_hf.merging.full_experts import floats
from m2m_hf.merging.methods import AVERAGE


def peak() -> float:
    """Returns the most MiB that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(config: Path) -> None:
    """Measures, and prints a table."""
    run = MergeToMixSearcher.from_yaml(config).run
    experts = run.bank.load()
    base = run.base.plain()
    size = sum(tensor.numel() * tensor.element_size() for tensor in floats(base).values()) / 2**20
    print(f"{len(experts)} experts of a base of {size:,.0f} MiB; {peak():,.0f} MiB in memory")
    start = time.monotonic()
    stack = DenseStack(base, experts, AVERAGE)
    print(f"opened in {time.monotonic() - start:.2f} s")
    for members in range(1, len(experts) + 1):
        mixtures = [Mixture.subset(names) for names in combinations(sorted(experts), members)]
        start = time.monotonic()
        for mixture in mixtures:
            stack.set(mixture.weights)
        seconds = (time.monotonic() - start) / len(mixtures)
        print(f"mixtures of {members}: {1000 * seconds:8.1f} ms each")
    stack.detach()
    print(f"memory: {peak():,.0f} MiB at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What it costs to average the full experts of a bank.")
    parser.add_argument(
        "--config", type=Path, required=True, help="of a run with expert: full, whose experts are trained"
    )
    main(parser.parse_args().config)
