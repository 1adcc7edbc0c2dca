"""Checks on a CUDA machine what the test suite checks on the CPU, and how fast it is there; downloads nothing.

```bash
make gpu-check
python recipes/gpu_check.py --size tiny --device cpu     # the same checks without their limits of speed, to see that they run
```

On a random model of about a billion parameters in bfloat16 with 8 random adapters of rank 16:

1. log-probabilities of the gated model, and of the one whose layers are written, against those of weights merged in float32: no
   further from them than those of weights merged in bfloat16, which is what everybody else would score;
2. time against a plain forward pass of one merged model, at most 1.10 times as long, and tokens per second of both;
3. several candidates in one pass against one after another: the same scores, and how much faster;
4. a 4-bit base: training, scoring, and training again after scoring, which must still get gradients;
5. on a random model of SmolLM2-135M's shape, 32 mixtures of 8 adapters of rank 8 and 200 rows, in less than a second;
6. on the same model, adapters that train side by side: a step of eight at most 1.5 times as long as a step of one, a bank of
   eight at most 2 times as long as a bank of one, all 31 mixtures of five candidates of 200 rows in less than 2 minutes.

Then, on pico models in float32 whose experts are trained on the device, every feature that touches it gives the CPU's numbers:
classification of texts and of images, full experts, the ensemble, fine-tuned mixtures, TIES, DARE and linear merging, gradients,
generation, both callbacks. Adapters side by side, with dropout, are those of one after another. A training that is killed goes on
to the same bytes (`support/device_checks.py`, `support/training_checks.py`).

Exits with 1 where a check fails.
"""

import os
import sys

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when CUDA starts: products in float32 are to be those of the CPU
sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

from m2m_hf.console import LibraryLog

LOG = LibraryLog()  # libraries have things to say when they are imported

import argparse
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from device_checks import Bench
from scoring_methods import (
    SIZES,
    Sums,
    Workload,
    compare,
    merged,
    now,
    random_adapters,
    random_model,
    random_rows,
    ratio,
    spread_mixtures,
)
from training_checks import trainings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import ModelConfig, SFTConfig

from m2m_hf.config.targets import TargetConfig
from m2m_hf.console import Terminal
from m2m_hf.core.score import Score
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.loading import load_base
from m2m_hf.modeling.lora import lora_config
from m2m_hf.scoring.causal_lm import ChoiceScorer, encode_rows
from m2m_hf.scoring.forward import Weights, completion_logprobs
from m2m_hf.scoring.probing import fitting_tokens
from m2m_hf.scoring.scorers import Setup
from m2m_hf.training.experts import LoraKind
from m2m_hf.training.fine_tune import train_expert
from m2m_hf.training.recording import BankProgress
from m2m_hf.training.trainers import Settings

ADAPTERS, RANK, SLOWEST = 8, 16, 1.10
MOST_SECONDS, MOST_APART = 1.0, 0.02  # of a mean log-probability in bfloat16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Checks:
    """Says how every check went, and remembers whether one failed."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.failed = 0

    def __call__(self, passed: bool, text: str) -> None:
        self.failed += not passed
        self.terminal.say(f"{'ok  ' if passed else 'FAIL'}  {text}", "green" if passed else "red")


def numbers(sums: Sums) -> torch.Tensor:
    return torch.tensor([value for values in sums for value in values], dtype=torch.float64)


def scores(model: PreTrainedModel, load: Workload) -> Sums:
    """Of a model as it is."""
    return completion_logprobs(GatedStack(model, {}), [{}], load.questions, load.tokens_per_batch)[0]


def exactness(load: Workload, folder: Path, where: str, check: Checks) -> None:
    """Check 1."""
    weights: Weights = dict.fromkeys(load.adapters, 1 / len(load.adapters))
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(load.model.device).eval()
    truth = numbers(scores(merged(full, load.adapters, weights), load))
    base = numbers(scores(full, load))
    del full
    dense = (numbers(scores(merged(load.model, load.adapters, weights), load)) - truth).square().mean().sqrt()
    for way in ("gated", "written"):
        stack = GatedStack(load.model, load.adapters, writes=way == "written")
        found = numbers(completion_logprobs(stack, [weights], load.questions, load.tokens_per_batch)[0])
        stack.detach()
        error = (found - truth).square().mean().sqrt()
        check(
            bool(error <= 1.25 * dense + 1e-4),
            f"exactness, {where}, {way}: {load.model.dtype} differs from weights merged in float32 by {error:.4f} (root mean "
            f"square of {len(truth)} log-probabilities), weights merged in {load.model.dtype} by {dense:.4f}; the merge itself "
            f"moves them by {(base - truth).square().mean().sqrt():.4f}",
        )


def speed(load: Workload, where: str, check: Checks, limit: bool) -> None:
    """Check 2."""
    mixtures = spread_mixtures(list(load.adapters), 7)
    results = compare(load, mixtures, ["ours", "floor"])
    found = ratio(results, "ours", "floor")
    tokens = sum(len(request.ids) for question in load.questions for request in question.requests)
    per_second = {name: tokens / statistics.median(one.seconds) for name, one in results.items()}
    check(
        not limit or found <= SLOWEST,
        f"speed, {where}: {found:.3f} times as long as a plain forward pass of one merged model"
        + (f" (at most {SLOWEST})" if limit else "")
        + f"; {per_second['ours']:,.0f} tokens/s against {per_second['floor']:,.0f}",
    )


def together(load: Workload, check: Checks) -> None:
    """Check 3."""
    stack = GatedStack(load.model, load.adapters)
    mixtures = spread_mixtures(list(load.adapters), 8)
    few = load.questions[:8]  # a validation set that does not fill the device by itself
    times: dict[str, float] = {}
    found: dict[str, list[Sums]] = {}
    for _ in range(2):  # the first time warms up
        start = now(load.model.device)
        found["alone"] = [completion_logprobs(stack, [one], few, load.tokens_per_batch)[0] for one in mixtures]
        middle = now(load.model.device)
        found["together"] = completion_logprobs(stack, mixtures, few, load.tokens_per_batch)
        times = {"alone": middle - start, "together": now(load.model.device) - middle}
    stack.detach()
    alone, both = (torch.stack([numbers(one) for one in found[name]]) for name in ("alone", "together"))
    apart = (both - alone).abs().max()
    spread = alone.std(0).mean()
    check(
        bool(apart <= 0.02 * alone.abs().max()) and stack.takes_rows,
        f"{len(mixtures)} candidates in one pass: log-probabilities differ by at most {apart:.4f} from one after another "
        f"(candidates differ by {spread:.4f}), {times['alone'] / times['together']:.1f} times as fast on {len(few)} rows",
    )


def quantised(folder: Path, device: str, check: Checks) -> None:
    """Check 4."""
    model_args = ModelConfig(
        model_name_or_path=str(folder),
        dtype="bfloat16",
        load_in_4bit=True,
        lora_r=RANK,
        lora_dropout=0.0,
        lora_target_modules=ATTENTION,
    )
    args = SFTConfig(
        str(folder / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        optim="adamw_8bit" if device == "cpu" else "paged_adamw_8bit",
    )
    base = load_base(model_args, args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = random_rows(32, choices=2)
    data = Dataset.from_list([{"prompt": row.prompt, "completion": row.choices[0]} for row in rows])
    questions = encode_rows(rows, tokenizer, 2048).questions
    values, trained = [], []
    for number in range(2):
        with Terminal(quiet=True).progress("", 3) as bar:
            out = folder / f"adapter{number}"
            train_expert(
                base,
                data,
                Settings(args, tokenizer, LoraKind(lora_config(model_args))),
                out,
                [BankProgress(bar, {}, "", "")],
            )
        adapter = Adapter.load(out)
        trained.append(all(bool(tensor.any()) for name, tensor in adapter.tensors.items() if "lora_B" in name))
        stack = GatedStack(base, {"adapter": adapter})
        values += completion_logprobs(stack, [{}], questions, 4096)
        values += completion_logprobs(stack, [{"adapter": 1.0}], questions, 4096)
        stack.detach()
    check(all(trained), "4-bit: every LoRA layer learns, also in a training after scoring")
    first, second, third, fourth = map(numbers, values)
    finite = all(math.isfinite(value) for value in torch.cat([first, second]).tolist())
    check(
        finite and bool((second - first).abs().max() > 0),
        f"4-bit: scores are finite, and the adapter changes them by {(second - first).abs().mean():.3f} on average",
    )
    check(
        torch.equal(first, third) and torch.equal(second, fourth),
        "4-bit: base and adapter give the same scores after training again",
    )


def crowd(folder: Path, device: str, check: Checks, limit: bool) -> None:
    """Check 5: as a search asks mixtures, in groups of as many as it would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    adapters = random_adapters(model, ADAPTERS, 8, [*ATTENTION, "down_proj"])
    config = TargetConfig.parse({"data": {"path": "none"}, "scorer": "choice", "metric": "logprob"}, "target", folder)
    rows = random_rows(200 if limit else 8)
    scorer = ChoiceScorer(config, rows, Setup(AutoTokenizer.from_pretrained(folder), 2048))
    stack, mixtures = GatedStack(model, adapters), spread_mixtures(list(adapters), 32)
    budget = fitting_tokens(model)
    group = scorer.at_once(stack, budget, len(rows))
    groups = [mixtures[start : start + group] for start in range(0, len(mixtures), group)]

    def values(some: Sequence[Weights]) -> list[float]:
        return [score.value for score in scorer.score(stack, some, budget) if isinstance(score, Score)]

    for _ in range(3):  # the first time warms up
        start = now(model.device)
        together = [value for some in groups for value in values(some)]
        seconds = now(model.device) - start
    middle = now(model.device)
    alone = [value for one in mixtures for value in values([one])]
    one_by_one = now(model.device) - middle
    stack.detach()
    apart = max(abs(one - other) for one, other in zip(together, alone, strict=True))
    check(
        len(alone) == len(mixtures) and apart <= MOST_APART and (not limit or seconds < MOST_SECONDS),
        f"{len(mixtures)} mixtures of {len(rows)} rows: {seconds:.2f} s"
        + (f" (less than {MOST_SECONDS})" if limit else "")
        + f" in groups of {group} and passes of {budget:,} tokens, one after another {one_by_one:.2f} s; "
        f"scores differ by at most {apart:.4f} (at most {MOST_APART}), those of the mixtures by {max(alone) - min(alone):.4f}",
    )


def features(bench: Bench, check: Checks) -> None:
    """The checks of every feature; one that breaks off has failed, and the others are tried all the same."""
    for one in bench.all():
        try:
            check(*one())
        except Exception:
            check(False, f"{one.__name__}: {traceback.format_exc()}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the random model (default: 1b)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is to be seen; --device cpu --size tiny tries the checks without one")
    LOG.silence_libraries()
    terminal = Terminal()
    check = Checks(terminal)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="m2m-gpu-check-") as name:
        folder = random_model(Path(name) / "model", given.size)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(given.device).eval()
        place = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        size = sum(parameter.numel() for parameter in model.parameters())
        terminal.say(
            f"{place}, torch {torch.__version__}: {size / 1e6:,.0f} M parameters, {ADAPTERS} adapters of rank {RANK}"
        )
        rows = random_rows(200 if given.device == "cuda" else 8)
        questions = encode_rows(rows, tokenizer, 2048).questions
        budget = 16384 if given.device == "cuda" else 1024
        for where, targets in (("attention", ATTENTION), ("all linear layers", "all-linear")):
            adapters = random_adapters(model, ADAPTERS, RANK, targets)
            load = Workload(model, tokenizer, adapters, questions, rows, str(folder), budget)
            exactness(load, folder, where, check)
            if where == "attention":
                together(load, check)
            speed(load, where, check, limit=given.device == "cuda")
        del model, load
        quantised(folder, given.device, check)
        small = folder if given.size == "tiny" else random_model(Path(name) / "small", "135m")
        crowd(small, given.device, check, limit=given.device == "cuda")
        trainings(small, given.device, check, limit=given.device == "cuda")
        features(Bench(Path(name), given.device), check)
    terminal.say(f"{check.failed or 'no'} checks failed, {time.monotonic() - start:.0f} s")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
