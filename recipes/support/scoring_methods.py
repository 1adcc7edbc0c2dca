"""What scoring a mixture costs, side by side with the ways in which it is done today; behind `recipes/benchmark.py`.

All methods see the same rows, weights and mixtures in one process, and take turns mixture by mixture, so that whatever else
the machine does falls on all of them:

- **ours**: the gated stack;
- **floor**: a plain forward pass of one merged model through the same loop, the least that scoring can cost;
- **unshared**: the gated stack, with what many rows begin with computed for each of them;
- **repeated**: the same, with the prompt computed once for every completion, as harnesses and trainers do;
- **cat**: PEFT's `add_weighted_adapter(combination_type="cat")` for each mixture, and the same loop;
- **trainer**: the same adapter, scored by `Trainer.evaluate`, one row per completion;
- **harness**: the mixture exported as an adapter and given to the lm-evaluation-harness, which loads the model again.
"""

import copy
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import QuestionInputs, Weights, completion_logprobs, measure
from m2m_hf.scoring.packing import Question

Sums = list[tuple[float, ...]]
METHODS = ("ours", "floor", "unshared", "repeated", "cat", "trainer", "harness")
SIZES = {  # of random models: hidden, intermediate, layers, heads, key/value heads, vocabulary
    "pico": (32, 48, 2, 4, 2, 320),
    "tiny": (64, 128, 2, 4, 2, 512),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 32000),
}


def random_model(folder: Path, size: str) -> Path:
    """Writes a Llama with random weights in bfloat16 and a tokenizer of single bytes; needs no download.

    Args:
        size: `pico`, `tiny`, `135m` (the shape of SmolLM2-135M) or `1b` (about a billion parameters).
    """
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # The harness cuts a model's vocabulary down to its tokenizer's, so the two must agree.
    tokens += [f"<|unused {number}|>" for number in range(len(tokens), vocabulary)]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
    return folder


def random_adapters(
    model: PreTrainedModel, count: int, rank: int, targets: str | list[str], seed: int = 0
) -> dict[str, Adapter]:
    """`count` adapters with random factors, small enough to leave the model a model."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    shapes = {
        name.replace(".default", ""): parameter.shape
        for name, parameter in get_peft_model(empty, copy.deepcopy(config)).named_parameters()
        if "lora_" in name
    }
    draw = torch.Generator().manual_seed(seed)
    return {
        f"random{number}": Adapter(
            config,
            {name: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 * 0.1 for name, shape in shapes.items()},
        )
        for number in range(count)
    }


def random_rows(count: int, prompt: int = 60, choices: int = 4, shots: int = 0) -> list[TargetRow]:
    """Questions of `prompt` bytes with choices of 3 to 6 bytes, for the tokenizer of `random_model`; all begin with `shots`."""
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return "".join(chr(97 + int(n)) for n in torch.randint(26, (length,), generator=draw))

    ahead = text(shots)
    return [
        TargetRow(ahead + text(prompt - number % 7), tuple(" " + text(2 + (number + n) % 4) for n in range(choices)), 0)
        for number in range(count)
    ]


def spread_mixtures(names: Sequence[str], count: int) -> list[Weights]:
    """`count` subsets of equal weights, from single candidates to all of them."""
    sizes = [max(1, round(1 + (len(names) - 1) * n / max(1, count - 1))) for n in range(count)]
    chosen = [[names[(number + n) % len(names)] for n in range(size)] for number, size in enumerate(sizes)]
    return [dict.fromkeys(sorted(subset), 1 / len(subset)) for subset in chosen]


def merged(model: PreTrainedModel, adapters: Mapping[str, Adapter], weights: Weights) -> PreTrainedModel:
    """A copy of the model with the mixture's deltas added to its weights, in its own dtype."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            for module, (a, b) in adapters[name].factors().items():
                layer = model.get_submodule(module)
                delta = weight * (b.to(layer.weight.device) @ a.to(layer.weight.device))
                layer.weight.copy_(layer.weight.float() + (delta if delta.shape == layer.weight.shape else delta.T))
    return model


@dataclass
class Workload:
    """What is measured on.

    Args:
        model: the base model; several methods make copies of it.
        adapters: of the candidates.
        questions: encoded.
        rows: the same as text, for the harness; None where they are not plain text.
        source: the base model's folder or Hub id.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapters: Mapping[str, Adapter]
    questions: Sequence[Question]
    rows: Sequence[TargetRow] | None
    source: str
    tokens_per_batch: int

    @property
    def plain(self) -> bool:
        """Whether the base's weights can be added to: not so where they are quantised."""
        return not getattr(self.model, "is_quantized", False)

    @property
    def eval_rows(self) -> int:
        """Rows in a batch of the Trainer and of the harness that fill the token budget at the longest row."""
        longest = max(len(request.ids) for question in self.questions for request in question.requests)
        return max(8, self.tokens_per_batch // longest)


@dataclass
class Measured:
    """Seconds of every mixture, what was scored, and the memory that it took."""

    seconds: list[float] = field(default_factory=list)
    sums: list[Sums] = field(default_factory=list)
    peak_bytes: int = 0


def now(device: torch.device) -> float:
    """Wall time in seconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def methods(
    load: Workload, chosen: Sequence[str], folder: Path, afterwards: ExitStack
) -> dict[str, Callable[[Weights], Sums]]:
    """name -> a function that scores one mixture from beginning to end, as that method's user would."""
    made: dict[str, Callable[[Weights], Sums]] = {}

    def loop(stack: GatedStack, weights: Weights) -> Sums:
        return completion_logprobs(stack, [weights], load.questions, load.tokens_per_batch)[0]

    if "floor" in chosen:
        everything = dict.fromkeys(load.adapters, 1 / len(load.adapters))
        one = merged(load.model, load.adapters, everything) if load.plain else copy.deepcopy(load.model)
        floor = GatedStack(one, {})
        made["floor"] = lambda weights: loop(floor, {})
    if {"cat", "trainer"} & set(chosen):
        for name in load.adapters:
            write_adapter(folder / name, load.adapters, {name: 1.0}, load.source)
        first, *others = load.adapters
        peft_model = PeftModel.from_pretrained(copy.deepcopy(load.model), folder / first, adapter_name=first)
        for name in others:
            peft_model.load_adapter(folder / name, adapter_name=name)
        peft_model.eval()
        bare = GatedStack(peft_model.get_base_model(), {})
        judge = trainer_of(peft_model, load, folder)

        def with_cat(score: Callable[[], Sums]) -> Callable[[Weights], Sums]:
            def run(weights: Weights) -> Sums:
                peft_model.add_weighted_adapter(
                    list(weights), list(weights.values()), "mixture", combination_type="cat"
                )
                peft_model.set_adapter("mixture")
                peft_model.requires_grad_(False)
                try:
                    return score()
                finally:
                    peft_model.set_adapter(first)
                    peft_model.delete_adapter("mixture")

            return run

        if "cat" in chosen:
            made["cat"] = with_cat(lambda: loop(bare, {}))
        if "trainer" in chosen:
            made["trainer"] = with_cat(judge)
    if "harness" in chosen and load.rows is not None:
        made["harness"] = lambda weights: harness(load, weights, folder)
    # Last, since the others are made from copies of a base without hooks.
    stack = GatedStack(load.model, load.adapters)
    afterwards.callback(stack.detach)
    if "ours" in chosen:
        made["ours"] = lambda weights: loop(stack, weights)

    def unshared(questions: Sequence[Question], weights: Weights) -> Sums:
        inputs = QuestionInputs(questions)
        inputs.beginnings = ()
        return measure(stack, [weights], inputs, range(len(questions)), load.tokens_per_batch)[0]

    if "unshared" in chosen:
        made["unshared"] = partial(unshared, load.questions)
    if "repeated" in chosen:
        apart = [Question((request,)) for question in load.questions for request in question.requests]

        def repeated(weights: Weights) -> Sums:
            sums = chain.from_iterable(unshared(apart, weights))
            return [tuple(islice(sums, len(question.requests))) for question in load.questions]

        made["repeated"] = repeated
    return {name: made[name] for name in METHODS if name in made}


def trainer_of(model: PeftModel, load: Workload, folder: Path) -> Callable[[], Sums]:
    """Scores the model with `Trainer.evaluate`: every completion a row of its own, log-probabilities kept instead of logits."""
    requests = [request for question in load.questions for request in question.requests]
    rows = Dataset.from_list(
        [{"input_ids": list(one.ids), "labels": [-100] * one.start + list(one.ids[one.start :])} for one in requests]
    )
    found: list[float] = []

    def logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = logits[:, :-1].float().log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        return (each * (labels[:, 1:] != -100)).sum(1)

    def keep(predictions: Any) -> dict[str, float]:
        found.extend(predictions.predictions.tolist())
        return {}

    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder / "trainer"),
            per_device_eval_batch_size=load.eval_rows,
            use_cpu=load.model.device.type == "cpu",
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        ),
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(load.tokenizer),
        compute_metrics=keep,
        preprocess_logits_for_metrics=logprobs,
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> Sums:
        found.clear()
        trainer.evaluate()
        values = iter(found)
        return [tuple(next(values) for _ in question.requests) for question in load.questions]

    return run


def harness(load: Workload, weights: Weights, folder: Path) -> Sums:
    """Scores an exported mixture with the lm-evaluation-harness, loaded anew; on the same rows as a local task."""
    from lm_eval import simple_evaluate

    assert load.rows is not None
    data = folder / "rows.jsonl"
    if not data.exists():
        docs = [{"prompt": row.prompt, "choices": list(row.choices), "answer": row.answer} for row in load.rows]
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    several = len(load.rows[0].choices) > 1
    task = {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice" if several else "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "answer" if several else "{{choices[0]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc" if several else "perplexity"}],
        **({"doc_to_choice": "choices"} if several else {}),
    }
    with tempfile.TemporaryDirectory() as exported:
        write_adapter(Path(exported), load.adapters, weights, load.source)
        found = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": load.source,
                "peft": exported,
                "dtype": str(load.model.dtype).removeprefix("torch."),
            },
            tasks=[task],
            device=str(load.model.device),
            batch_size=load.eval_rows,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["rows"], key=lambda sample: sample["doc_id"])
    return [tuple(float(response[0][0]) for response in sample["resps"]) for sample in samples]


def compare(
    load: Workload, mixtures: Sequence[Weights], chosen: Sequence[str], tell: Callable[[str], None] = lambda line: None
) -> dict[str, Measured]:
    """Every chosen method on every mixture, in turns; the first mixture once more before, to warm up.

    Args:
        tell: told what is being done.
    """
    device = load.model.device
    results = {name: Measured() for name in METHODS if name in chosen}
    with tempfile.TemporaryDirectory(prefix="m2m-benchmark-") as folder, ExitStack() as afterwards:
        made = methods(load, chosen, Path(folder), afterwards)
        for turn, weights in enumerate([mixtures[0], *mixtures]):
            for name, score in made.items():
                if turn == 0 and name == "harness":
                    continue  # it loads everything anew each time; there is nothing to warm up
                tell(f"{name}, mixture {turn} of {len(mixtures)}" if turn else f"{name}, warming up")
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = now(device)
                sums = score(weights)
                seconds = now(device) - start
                if turn:
                    results[name].seconds.append(seconds)
                    results[name].sums.append(sums)
                results[name].peak_bytes = max(results[name].peak_bytes, peak_memory(device))
    return {name: one for name, one in results.items() if one.seconds}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device since the last reset, or of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def switching_seconds(load: Workload, stack: GatedStack, mixtures: Sequence[Weights], rounds: int = 50) -> float:
    """Median time of changing the mixture on a stack that is in place."""
    device = load.model.device
    times = []
    for number in range(rounds * len(mixtures)):
        start = now(device)
        stack.set(mixtures[number % len(mixtures)])
        times.append(now(device) - start)
    return statistics.median(times)


def ratio(results: Mapping[str, Measured], above: str, below: str) -> float:
    """Median over the mixtures of how many times as long one method takes as the other, side by side."""
    if above not in results or below not in results:
        return math.nan
    return statistics.median(a / b for a, b in zip(results[above].seconds, results[below].seconds, strict=True))


def differences(first: Measured, second: Measured) -> list[float]:
    """How far apart the log-probabilities are that two methods gave the same completions."""
    return [
        abs(x - y)
        for mine, theirs in zip(first.sums, second.sums, strict=True)
        for a, b in zip(mine, theirs, strict=True)
        for x, y in zip(a, b, strict=True)
    ]


def other_answers(first: Measured, second: Measured) -> float:
    """Of how many questions two methods find another completion the most probable, as a share."""

    def answers(measured: Measured) -> list[int]:
        return [max(range(len(values)), key=values.__getitem__) for sums in measured.sums for values in sums]

    pairs = list(zip(answers(first), answers(second), strict=True))
    return sum(one != other for one, other in pairs) / len(pairs)


def report(load: Workload, results: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the table that the recipe prints."""
    rows = []
    for name, one in results.items():
        seconds = statistics.median(one.seconds)
        agreement = ""
        if name not in ("ours", "floor") and "ours" in results:
            apart = differences(results["ours"], one)
            others = other_answers(results["ours"], one)
            agreement = f"{statistics.fmean(apart):.1e}, at most {max(apart):.1e}; answers {others:.1%}"
        rows.append([
            name,
            f"{seconds:.3f} s",
            f"{len(load.questions) / seconds:,.1f}",
            f"{ratio(results, name, 'floor'):.2f}",
            f"{ratio(results, name, 'ours'):.2f}",
            f"{one.peak_bytes / 2**20:,.0f} MiB",
            agreement,
        ])  # fmt: skip
    return ["", "per mixture", "rows/s", "to floor", "to ours", "peak", "differs from ours by"], rows
