"""What it costs to average full experts: running sums against adding the experts of every mixture anew.

```bash
m2m adapters --config recipes/intents.yaml --expert full --learning_rate 2e-5 --output_dir runs/intents-full
python recipes/benchmark_full.py --config runs/intents-full/config.yaml
```

Takes the experts of a finished bank and writes the weights of all their subsets into the base, one after another: in the order
of the Gray code with running sums, in the order of size with running sums, and by adding all experts of each mixture. The
weights are the same but for rounding, which is checked. The highest resident memory is that of the process.
"""

import sys

sys.path.pop(0)  # of this folder, where files have the names of modules of the standard library

import argparse
import resource
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from m2m_hf import MergeToMixSearcher
from m2m_hf.core.mixture import Mixture, gray_code_order
from m2m_hf.merging.dense_stack import DenseStack
from m2m_hf.merging.full_experts import floats
from m2m_hf.merging.methods import AVERAGE


def peak() -> float:
    """MiB that this process has had in memory at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def timed(stack: DenseStack, mixtures: Sequence[Mixture]) -> float:
    """Seconds for one mixture, on average."""
    start = time.monotonic()
    for mixture in mixtures:
        stack.set(mixture.weights)
    return (time.monotonic() - start) / len(mixtures)


def main(config: Path) -> None:
    """Measures, and prints a table."""
    run = MergeToMixSearcher.from_yaml(config)
    experts = run.bank.load()
    base = run._plain_base()
    size = sum(tensor.numel() * tensor.element_size() for tensor in floats(base).values()) / 2**20
    largest = max(tensor.numel() * 4 for tensor in floats(base).values()) / 2**20
    loaded = peak()
    by_size = [
        Mixture.subset(one) for size in range(1, len(experts) + 1) for one in combinations(sorted(experts), size)
    ]
    print(
        f"{len(experts)} experts, {len(by_size)} mixtures; the base has {size:,.0f} MiB, its largest weight {largest:,.0f} MiB"
    )
    start = time.monotonic()
    stack = DenseStack(base, experts, AVERAGE, run.run.root)
    print(f"opened in {time.monotonic() - start:.2f} s")
    rows = {"running sums, Gray code": timed(stack, gray_code_order(by_size))}
    print(f"memory: {loaded:,.0f} MiB with the base, {peak():,.0f} MiB at the most with the sums")
    rows["running sums, by size"] = timed(stack, by_size)
    stack.set(by_size[-1].weights)
    summed = {name: tensor.detach().clone() for name, tensor in floats(base).items()}
    stack.set({})
    stack._sums = None  # and now every mixture from all its experts
    rows["every expert anew"] = timed(stack, by_size)
    stack.set(by_size[-1].weights)
    off = max(float((tensor - summed[name]).detach().abs().max()) for name, tensor in floats(base).items())
    stack.detach()
    for name, seconds in rows.items():
        print(f"{name:26} {1000 * seconds:8.1f} ms a mixture")
    print(f"largest difference between the two ways: {off:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What it costs to average the full experts of a bank.")
    parser.add_argument(
        "--config", type=Path, required=True, help="of a run with expert: full, whose experts are trained"
    )
    main(parser.parse_args().config)
