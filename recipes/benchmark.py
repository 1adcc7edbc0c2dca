"""Measures what scoring a mixture costs, side by side with what people use today, on the same rows and weights.

```bash
python recipes/benchmark.py --config x.yaml                       # its model, its target's rows, its adapters (else random ones)
python recipes/benchmark.py --config x.yaml --random-adapters 8 --lora_r 16 --lora_target_modules all-linear
python recipes/benchmark.py --random 1b --random-adapters 8       # nothing is downloaded
python recipes/benchmark.py --random 135m --random-adapters 8 --shots 800 --methods ours,unshared   # few-shot examples
python recipes/benchmark.py --random 135m --random-adapters 8 --answers 20-400        # free answers of so many tokens
```

`support/scoring_methods.py` has the methods, `support/answering_methods.py` those of `--answers`.
Fields of the configuration can be given as `--field value`.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

import os

from m2m_hf.console import LibraryLog

LOG = LibraryLog()  # libraries have things to say when they are imported
os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is imported

import argparse
import json
import logging
import re
import statistics
import tempfile
from pathlib import Path

import torch
from answering_methods import ANSWERING, compare_answering, spread_lengths
from scoring_methods import (
    METHODS,
    SIZES,
    Workload,
    compare,
    random_adapters,
    random_model,
    random_rows,
    ratio,
    report,
    spread_mixtures,
    switching_seconds,
)
from trl import ModelConfig

from m2m_hf import InputError, MergeToMixSearcher
from m2m_hf.config import parsing
from m2m_hf.console import Terminal
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.loading import load_base
from m2m_hf.modeling.processing import load_tokenizer
from m2m_hf.scoring.causal_lm import encode_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a configuration of m2m select")
    parser.add_argument("--random", choices=SIZES, help="instead: a random model of this size and random rows")
    parser.add_argument(
        "--random-adapters", type=int, default=0, metavar="N", help="N random adapters instead of trained ones"
    )
    parser.add_argument("--rows", type=int, help="only the first rows of the target (with --random: 200)")
    parser.add_argument("--shots", type=int, default=0, help="with --random: so many tokens that all rows begin with")
    parser.add_argument("--mixtures", type=int, default=5, help="how many mixtures, of 1 to N candidates (default: 5)")
    parser.add_argument(
        "--answers", metavar="LEAST-MOST", help="instead of scoring: have rows answer in so many tokens"
    )
    parser.add_argument("--methods", help="which (default: all that are installed)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    given, flags = parser.parse_known_args()
    known = ANSWERING if given.answers else METHODS
    chosen = (given.methods or ",".join(known)).split(",")
    if (given.config is None) == (given.random is None):
        parser.error("give either --config or --random")
    if set(chosen) - set(known):
        parser.error(f"--methods: expected some of {','.join(known)}, got {given.methods}")
    if given.answers and not re.fullmatch(r"[1-9]\d*-[1-9]\d*", given.answers):
        parser.error(f"--answers: expected two lengths such as 20-400, got {given.answers!r}")
    LOG.silence_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        try:
            load = prepare(given, flags, Path(folder), terminal)
        except InputError as error:
            parser.error(str(error))
        if "harness" in chosen and not harness_can(load, terminal):
            chosen.remove("harness")
        mixtures = spread_mixtures(list(load.adapters), given.mixtures)
        device = (
            torch.cuda.get_device_name()
            if load.model.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        about = f"{device}, {load.model.dtype}"
        if given.answers:
            lengths = spread_lengths(len(load.questions), *map(int, given.answers.split("-")))
            columns, lines, seconds = compare_answering(
                load, mixtures, lengths, chosen, lambda line: terminal.say(line, style="dim")
            )
            terminal.table(f"{about}, {sum(lengths):,} tokens of answers", columns, lines)
            if given.output:
                given.output.write_text(json.dumps({"seconds": seconds, "device": device}) + "\n", encoding="utf-8")
            return
        results = compare(load, mixtures, chosen, lambda line: terminal.say(line, style="dim"))
        switching = switching_seconds(load, GatedStack(load.model, load.adapters), mixtures)
        terminal.say("")
        terminal.table(f"{about}, medians of {len(mixtures)} mixtures", *report(load, results))
        terminal.say(f"changing the mixture: {switching * 1e3:.3f} ms")
        if given.output:
            figures = {name: {"seconds": one.seconds, "peak_bytes": one.peak_bytes} for name, one in results.items()}
            ratios = {f"{name}/floor": ratio(results, name, "floor") for name in results}
            ratios |= {f"{name}/ours": ratio(results, name, "ours") for name in results}
            figures |= {"ratios": ratios, "switching_seconds": switching, "device": device}  # type: ignore[dict-item]
            given.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def prepare(given: argparse.Namespace, flags: list[str], folder: Path, terminal: Terminal) -> Workload:
    """The model, adapters and rows to measure on.

    Raises:
        InputError: a configuration that is wrong.
    """
    if given.random:
        model_folder = random_model(folder / "model", given.random)
        values = {
            "model_name_or_path": str(model_folder),
            "candidates": {"unused": {"path": "json", "data_files": "unused"}},
            "targets": {"unused": {"scorer": "command", "command": ["true"]}},
            "output_dir": str(folder / "run"),
        }
        config, args, model_args = parsing.parse(None, flags, values)
        tokenizer = load_tokenizer(model_args, args)
        rows = random_rows(given.rows or 200, shots=given.shots)
        questions = encode_rows(rows, tokenizer, 2048).questions
        budget = config.tokens_per_batch
        base = load_base(model_args, args)
        adapters = None
    else:
        run = MergeToMixSearcher(*parsing.parse(given.config, flags), terminal).run
        target = next(iter(run.targets.values()))
        if target.config.kind not in ("choice", "classification", "loss"):
            raise InputError("the benchmark needs a target with scorer choice, classification or loss")
        rows = list(target.rows[: given.rows])
        questions = encode_rows(rows, run.task.tokenizer, 10**6).questions
        model_args, tokenizer, base = run.model_args, run.task.tokenizer, run.base.plain()
        budget = run.config.tokens_per_batch
        whole = {} if given.random_adapters or run.bank.check() else run.bank.load()
        adapters = {name: one for name, one in whole.items() if isinstance(one, Adapter)} or None
        if adapters is None and not given.random_adapters:
            terminal.say("the run has no complete bank; random adapters stand in, which cost the same")
            given.random_adapters = len(run.candidates)
    if adapters is None:
        adapters = random_adapters(base, given.random_adapters or 8, model_args.lora_r, lora_targets(model_args))
    tokens = sum(len(request.ids) for question in questions for request in question.requests)
    lengths = [question.shared for question in questions]
    terminal.say(
        f"{len(rows):,} rows, {statistics.mean(len(row.choices) for row in rows):.1f} completions each, prompts of "
        f"{statistics.median(lengths):.0f} tokens, {tokens:,} tokens in all; {len(adapters)} adapters of rank "
        f"{model_args.lora_r} on {lora_targets(model_args)}"
    )
    budget = budget or (1024 if base.device.type == "cpu" else 16384)
    plain = all(isinstance(row.prompt, str) for row in rows)
    return Workload(
        base, tokenizer, adapters, questions, rows if plain else None, model_args.model_name_or_path, budget
    )


def lora_targets(model_args: ModelConfig) -> str | list[str]:
    """What LoRA adapts; by default query, key, value and output projections."""
    given: str | list[str] | None = model_args.lora_target_modules
    if given is None:
        return ["q_proj", "k_proj", "v_proj", "o_proj"]
    return given[0] if isinstance(given, list) and len(given) == 1 else given


def harness_can(load: Workload, terminal: Terminal) -> bool:
    """Whether the lm-evaluation-harness is installed and can read the rows."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        terminal.say("without the lm-evaluation-harness: pip install 'm2m_hf[lm_eval]'")
        return False
    if load.rows is None:
        terminal.say("without the lm-evaluation-harness: the rows are conversations")
    return load.rows is not None


if __name__ == "__main__":
    main()
