"""The families harness: one pico model of every family, three candidates, and scores compared with plain models.

    python tests/families.py ["FAMILY" ...]

Each family is made from its configuration class with random weights. The product trains an adapter per candidate and scores all
mixtures as it always does, with shared rows and batches. The same scores are then made of a plain model whose weights were set to
the average, one row at a time, by code that shares nothing with the product. Without names all families are tried, with
`lora_target_modules` unset and all-linear, and the table in docs/models.md is written.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="m2m-families-"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
import yaml
from datasets import Dataset, disable_progress_bars
from pico import (
    INTENTS,
    RGB,
    ROOT,
    SETTINGS,
    build_tokenizer,
    candidate_rows,
    intent_rows,
    searcher,
    trials,
    write_images,
    write_rows,
)
from pico_families import FAMILIES, PICTURES, SENTENCES, Family
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ViTImageProcessorPil
from transformers.pytorch_utils import Conv1D

from m2m_hf.errors import InputError, first_line
from m2m_hf.scoring.forward import ALIKE, ALONE, TOGETHER, UNSHARED, shared_span

QUICK = (
    "Llama", "Mistral, sliding window", "Qwen3-MoE", "Granite 4", "Phi-3, longrope", "GPT-Neo", "Qwen3-VL", "BERT", "ViT",
)  # fmt: skip
REFUSED = {"Llama 4"}
EXACT, MOVED = 1e-4, 1e-3  # how far scores may be off; how much adapters must change them for that to mean something


@dataclass
class Found:
    """What became of a family."""

    layers: list[str] = field(default_factory=list)  # that hold adapters
    rows: str = ""  # how far they are shared
    worst: float = 0.0  # the largest difference of a log-probability
    moved: float = 0.0  # by how much adapters changed a log-probability at most
    refused: str = ""


def build(family: Family, folder: Path) -> None:
    """A model with random weights, large enough that what it reads makes a difference."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **copy.deepcopy(family.config))
    model = getattr(transformers, family.loads).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if family.task == PICTURES:
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


WORDS = "red green blue one two three big small warm cold".split()


def prompts(count: int) -> list[str]:
    """Questions of very different lengths."""
    return [f"question: {' '.join((WORDS * 5)[i : i + 2 + 7 * i % 31])} {i}? answer:" for i in range(count)]


def write_project(family: Family, folder: Path, model: Path, layers: str | None) -> None:
    """Three candidates and the targets that the family can have, as `run.yaml`."""
    targets = {"choice": {"scorer": "choice", "metric": "logprob"}, "loss": {"scorer": "loss"}}
    if family.task == "causal_lm":
        for word in ("alpha", "beta", "gamma"):
            write_rows(folder / f"{word}.jsonl", candidate_rows(word, 8))
        choices = [" red", " green blue one", " green two", " yes no yes no"]
        asked = [{"prompt": one, "choices": choices[: 2 + i % 3], "answer": i % 2} for i, one in enumerate(prompts(7))]
        write_rows(folder / "choice.jsonl", asked)
        shots = "question: red blue one? answer: two " * 4  # which all rows begin with
        told = [
            {"prompt": shots + one, "completion": " " + " ".join(WORDS[: 1 + i])} for i, one in enumerate(prompts(6))
        ]
        write_rows(folder / "loss.jsonl", told)
        answers = [{"prompt": one, "completion": answer} for one, answer in base_answers(model) if answer]
        if answers:
            write_rows(folder / "generation.jsonl", answers)
            targets["generation"] = {
                "scorer": "generation",
                "metric": "exact_match",
                "generation": {"max_new_tokens": 6},
            }
    elif family.task == SENTENCES:
        own = "id2label" in family.config
        for number, (name, labels) in enumerate(INTENTS.items()):
            write_rows(folder / f"{name}.jsonl", intent_rows([*RGB] if own else labels, 12, 20 * number))
        rows = intent_rows([*RGB] if own else ["red", "cold", "hot", "hello_there"], 10, 100)
        rows = [row | {"text": row["text"] + " red blue" * (7 * i % 15)} for i, row in enumerate(rows)]
        write_rows(folder / "classification.jsonl", rows)
        targets = {"classification": {"scorer": "classification", "metric": "logprob"}}
    else:
        for number, (name, labels) in enumerate(
            {"warm": ["red", "green"], "cold": ["blue", "green"], "all": [*RGB]}.items()
        ):
            write_images(folder / f"{name}.parquet", labels, 8, 100 * number)
        write_images(folder / "classification.parquet", [*RGB], 7, 1000)
        targets = {"classification": {"scorer": "classification", "metric": "logprob"}}
    suffix, path = ("parquet", "parquet") if family.task == PICTURES else ("jsonl", "json")
    files = sorted(one.stem for one in folder.glob(f"*.{suffix}"))
    data = {name: {"path": path, "data_files": f"{name}.{suffix}"} for name in files}
    run = yaml.safe_load(SETTINGS) | {
        "model_name_or_path": str(model), "output_dir": str(folder / "out"), "task": family.task, "max_steps": 2,
        "learning_rate": 0.01 if family.task == "causal_lm" else 0.003, "activation_checkpointing": True,
        "candidates": {name: one for name, one in data.items() if name not in targets},
        "targets": {name: {"data": data[name]} | one for name, one in targets.items()},
    }  # fmt: skip
    if layers:
        run["lora_target_modules"] = layers
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def base_answers(model: Path) -> Iterator[tuple[str, str]]:
    """Prompts, and what the plain base model answers to each by itself."""
    plain, tokenizer = load(model), AutoTokenizer.from_pretrained(model)
    for prompt in prompts(5):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = copy.deepcopy(plain).generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        yield prompt, tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def load(model: Path) -> torch.nn.Module:
    architecture = json.loads((model / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(model, dtype=torch.float32).eval()


def averaged(model: Path, out: Path, mixture: dict[str, float]) -> torch.nn.Module:
    """The plain model, with the average of these adapters added to its weights."""
    plain = load(model)
    prefix = (
        "vision_model." if json.loads((model / "config.json").read_text())["architectures"][0] == "SiglipModel" else ""
    )
    for name, weight in mixture.items():
        shape = json.loads((out / "adapters" / name / "adapter_config.json").read_text())
        factors = load_file(out / "adapters" / name / "adapter_model.safetensors")
        for key in [key for key in factors if key.endswith("lora_A.weight")]:
            place = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            layer = plain.get_submodule(place if not prefix or place.startswith(prefix) else prefix + place)
            delta = factors[key.replace("lora_A", "lora_B")] @ factors[key] * shape["lora_alpha"] / shape["r"]
            with torch.no_grad():
                layer.weight += weight * (delta.T if isinstance(layer, Conv1D) else delta)
    return plain


def expected(family: Family, project: Path, model: Path, plain: torch.nn.Module, target: str) -> list[float]:
    """The log-probabilities of the right answers that a plain model gives, one row at a time."""
    out = project / "out"
    if family.task == "causal_lm":
        tokenizer = AutoTokenizer.from_pretrained(model)
        found = []
        for row in map(json.loads, (project / f"{target}.jsonl").read_text().splitlines()):
            start = tokenizer(row["prompt"])["input_ids"]
            values = []
            for choice in row.get("choices") or [row["completion"]]:
                ids = start + tokenizer(choice)["input_ids"]
                fresh = copy.deepcopy(plain) if "dynamic" in str(plain.config) else plain
                logits = fresh(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                values.append(sum(logits[i - 1, ids[i]] for i in range(len(start), len(ids))))
            found.append(torch.stack(values).log_softmax(0)[row["answer"]] if "choices" in row else values[0])
        return [float(one) for one in found]
    if family.task == SENTENCES:
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = [json.loads(line) for line in (project / "classification.jsonl").read_text().splitlines()]
        outputs = [plain(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)) for row in rows]
    else:
        processor = AutoImageProcessor.from_pretrained(model)
        rows = list(Dataset.from_parquet(str(project / "classification.parquet")))
        seen = [processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"] for row in rows]
        towers = hasattr(plain, "get_image_features")
        outputs = [plain.get_image_features(one) if towers else plain(pixel_values=one) for one in seen]
    if "id2label" in family.config:
        places = {label: place for place, label in family.config["id2label"].items()}
        scores = [output.logits[0] for output in outputs]
    else:
        with safe_open(out / "head.safetensors", "pt") as file:
            about, vectors = json.loads(file.metadata()["head"]), file.get_tensor("vectors")
        places = {label: place for place, label in enumerate(about["labels"])}
        features = [
            one.last_hidden_state[0].mean(0) if family.task == SENTENCES else one.pooler_output[0] for one in outputs
        ]
        scores = [about["scale"] * vectors @ torch.nn.functional.normalize(one, dim=0) for one in features]
    labels = sorted({row["label"] for row in rows})
    columns = torch.tensor([places[label] for label in labels])
    pairs = zip(scores, rows, strict=True)
    return [float(one.double()[columns].log_softmax(0)[labels.index(row["label"])]) for one, row in pairs]


@torch.no_grad()
def compare(family: Family, project: Path, model: Path, found: Found, sizes: tuple[int, ...]) -> None:
    """Compares the journal's lines of a mixture of each of these sizes with plain models."""
    base: dict[str, list[float]] = {}
    lines = [line for line in trials(project / "out") if line["objective"] == "merged"]
    names = sorted({name for line in lines for name in line["names"]})
    for members in (names[3 - size :] for size in sizes):
        mixture = {name: 1 / len(members) for name in members}
        plain = averaged(model, project / "out", mixture)
        for line in [one for one in lines if sorted(one["names"]) == members]:
            if line["target"] == "generation":
                if not members and set(line["values"]) != {1.0}:
                    found.worst = float("inf")
                continue
            wanted = expected(family, project, model, plain, line["target"])
            found.worst = max([found.worst, *(abs(a - b) for a, b in zip(wanted, line["logprobs"], strict=True))])
            first = base.setdefault(line["target"], wanted)
            found.moved = max([found.moved, *(abs(a - b) for a, b in zip(wanted, first, strict=True))])


def run(family: Family, folder: Path, layers: str | None = None, sizes: tuple[int, ...] = (0, 1, 2, 3)) -> Found:
    """Trains and scores one family, and compares."""
    model, found = folder / "model", Found()
    if not model.exists():
        build(family, model)
    write_project(family, folder, model, layers)
    try:
        search = searcher(folder, name="run")
        search.search()
    except InputError as error:
        if (folder / "out" / "adapters").exists():
            raise
        found.refused = first_line(error)
        return found
    if search.run.failed:
        raise RuntimeError(str(search.run.failed))
    keys = load_file(next((folder / "out" / "adapters").iterdir()) / "adapter_model.safetensors")
    found.layers = sorted({key.split(".")[-3] for key in keys})
    found.rows = how(search.run)
    compare(family, folder, model, found, sizes)
    return found


def how(run) -> str:
    """How far a model's rows are shared."""
    if run.config.task != "causal_lm":
        apart = max(scorer.apart for scorer in run.validation_scorers.values())
        return "batched" if apart == TOGETHER else "one length at a time" if apart == ALIKE else "one at a time"
    parts = []
    span = shared_span(run.open_stack(run.merge_method).model)
    apart = run.validation_scorers["choice"].apart
    words = {UNSHARED: "choices apart", ALIKE: "one length at a time", ALONE: "one at a time"}
    parts.append(
        words.get(apart)
        or ("choices apart" if not span else "shared" if span > 1e6 else f"shared within {span:g} tokens")
    )
    if "generation" in run.validation_scorers and (apart := run.validation_scorers["generation"].apart):
        parts.append(f"answers {(words | {UNSHARED: 'in fixed batches'})[apart]}")
    return ", ".join(parts)


def attempt(family: Family) -> tuple[Found, Found]:
    """A family with `lora_target_modules` unset, and with all-linear."""
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for number, layers in enumerate((None, "all-linear")):
            place = Path(folder) / str(number)
            place.mkdir()
            if number:
                (Path(folder) / "0" / "model").rename(place / "model")
            made.append(run(family, place, layers))
    return made[0], made[1]


def as_table(made: dict[str, tuple[Found, Found]]) -> str:
    """The table of docs/models.md, and below it why something was refused."""
    lines = [
        "| family | layers with adapters, unset | `all-linear` | rows | largest difference |",
        "|---|---|---|---|---|",
    ]
    reasons: dict[str, list[str]] = {}
    for name, (unset, linear) in made.items():
        for found in (unset, linear):
            if found.refused:
                reasons.setdefault(found.refused, []).append(name)
        if unset.refused:
            lines.append(f"| {name} | refused | refused | | |")
            continue
        more = [layer for layer in linear.layers if layer not in unset.layers]
        every = "refused" if linear.refused else f"and {', '.join(more)}" if more else "the same"
        worst = max(unset.worst, linear.worst)
        lines.append(f"| {name} | {', '.join(unset.layers)} | {every} | {unset.rows} | {worst:.0e} |")
    lines += ["", "What is refused, and why:", ""]
    lines += [f"- {', '.join(dict.fromkeys(names))}: *{reason}*" for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    made, wrong = {}, []
    for name in names or FAMILIES:
        start = time.time()
        try:
            made[name] = unset, linear = attempt(FAMILIES[name])
            is_right = bool(unset.refused) == (name in REFUSED) and all(map(is_exact, made[name]))
            about = unset.refused or f"{', '.join(unset.layers)}; {unset.rows}; {max(unset.worst, linear.worst):.0e}"
        except Exception as error:  # to be listed, and the others tried
            traceback.print_exc()
            is_right, about = False, f"{type(error).__name__}: {error}"
        wrong += [] if is_right else [name]
        print(f"{'ok' if is_right else 'WRONG'}  {name}: {about} ({time.time() - start:.1f} s)", flush=True)
    print(f"{len(made)} families" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    if not names and not wrong:
        page = ROOT / "docs" / "models.md"
        page.write_text(page.read_text().split("| family |")[0] + as_table(made))
    return len(wrong) > 0


def is_exact(found: Found) -> bool:
    """Whether a family was refused, or scored as plain models score, with adapters that made a difference."""
    return bool(found.refused) or (found.worst < EXACT and found.moved > MOVED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="families (default: all)")
    sys.exit(main(parser.parse_args().names))
