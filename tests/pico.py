"""Pico models, rows and projects, made in code: no network, milliseconds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import SFTTrainer

from m2m_hf.cli.main import main
from m2m_hf.config.candidates import DataConfig
from m2m_hf.config.parsing import parse
from m2m_hf.config.targets import TargetConfig
from m2m_hf.console import Terminal
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.make import make_scorer
from m2m_hf.scoring.packing import Question, Request
from m2m_hf.scoring.scorers import Scorer, Setup
from m2m_hf.searcher import MergeToMixSearcher

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("M2M_TEST_DEVICE") or "cpu"  # where models are: `make test DEVICE=cuda`
USE_CPU = DEVICE == "cpu"
SELECT = ROOT / "recipes" / "select.py"
TEXT = "question: what is the opposite of hot? answer: cold warm big small yes no one two three four red green blue"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(family: str, vocabulary: int = 320) -> torch.nn.Module:
    """A random model of two layers, on `DEVICE`, with the quirks of its family (soft-capping and scaled embeddings, Conv1D,
    q/k norms)."""
    torch.manual_seed(0)
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        **common,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape, query_pre_attn_scalar=8, sliding_window=16))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common))
    return model.to(DEVICE).eval()


TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


def build_adapter(family: str, folder: Path, seed: int, **lora) -> Path:
    """A PEFT adapter folder with random factors, written by PEFT itself."""
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS.get(family, ["q_proj", "v_proj", "down_proj"]),
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": family == "gpt2",
        **lora,
    }
    model = get_peft_model(build_model(family), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


COLOURS = ["red", "green", "blue", "one", "two", "three"]


def candidate_rows(word: str, count: int = 12) -> list[dict]:
    return [
        {"prompt": f"question: {word} {COLOURS[i % 6]} {i}? answer:", "completion": f" {COLOURS[(i + len(word)) % 6]}"}
        for i in range(count)
    ]


def choice_rows(count: int = 10, start: int = 100) -> list[dict]:
    return [
        {
            "prompt": f"question: {COLOURS[i % 6]} {i}? answer:",
            "choices": [" red", " green", " blue one"],
            "answer": i % 3,
        }
        for i in range(start, start + count)
    ]


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """8 by 8 noisy pixels of about this colour."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(-25, 25, (8, 8, 3), generator=draw) + torch.tensor(colour)
    return Image.fromarray(noise.to(torch.uint8).numpy())


def m2m(*arguments: object) -> int:
    """What `m2m` ends with."""
    return main([str(one) for one in arguments])


SETTINGS = f"""fine_tunes: 0
lora_r: 4
parallel_adapters: 1
learning_rate: 1.0e-2
max_steps: 3
per_device_train_batch_size: 4
activation_checkpointing: false
logging_steps: 1
use_cpu: {str(USE_CPU).lower()}
dtype: float32
bf16: false
"""


def project_folder(tmp_path: Path, pico: Path) -> Path:
    """A configuration file with three candidates and a target beside it; `run.yaml` is ready to be selected from."""
    for word in ("alpha", "beta", "gamma"):
        write_rows(tmp_path / f"{word}.jsonl", candidate_rows(word))
    write_rows(tmp_path / "validation.jsonl", choice_rows())
    write_rows(tmp_path / "test.jsonl", choice_rows(8, start=200))
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {pico}
lora_target_modules: [q_proj, v_proj]
{SETTINGS}output_dir: {tmp_path / "out"}
candidates:
  alpha: {{path: json, data_files: alpha.jsonl}}
  beta: {{path: json, data_files: beta.jsonl}}
  gamma: {{path: json, data_files: gamma.jsonl}}
targets:
  colours:
    data: {{path: json, data_files: validation.jsonl}}
    test_data: {{path: json, data_files: test.jsonl}}
    scorer: choice
"""
    )
    return tmp_path


def several_targets(project: Path, reward_model: Path, count: int) -> None:
    """Gives the project targets that choose, prefer, answer, and answer for a reward model, of so many rows each."""
    given = choice_rows(count)
    write_rows(project / "validation.jsonl", given)
    pairs = [{"prompt": row["prompt"], "chosen": row["choices"][0], "rejected": row["choices"][1]} for row in given]
    write_rows(project / "pairs.jsonl", pairs)
    write_rows(project / "asked.jsonl", [{"prompt": row["prompt"], "completion": row["choices"][0]} for row in given])
    short = {"generation": {"max_new_tokens": 3}}
    kinds = {
        "colours": ("validation", {"scorer": "choice"}),
        "pairs": ("pairs", {"scorer": "preference", "metric": "margin"}),
        "words": ("asked", {"scorer": "generation", "metric": "token_f1", **short}),
        "chat": ("asked", {"scorer": "reward", "reward_model": str(reward_model), **short}),
    }
    changed(
        project,
        "run",
        targets={
            name: {"data": {"path": "json", "data_files": f"{file}.jsonl"}, **entry}
            for name, (file, entry) in kinds.items()
        },
    )


INTENTS = {"greetings": ["hello_there", "good_bye"], "colours": ["red", "green", "blue"], "noise": ["one", "two"]}


def intent_rows(labels: list[str], count: int, start: int = 0) -> list[dict]:
    return [
        {"text": f"{labels[i % len(labels)]} {i} big small", "label": labels[i % len(labels)]}
        for i in range(start, start + count)
    ]


QUESTIONS = [Question((Request(tuple((7 * i + j) % 300 for j in range(5 + 3 * i)), start=2 + i),)) for i in range(5)]


def write_intents(folder: Path, model: Path) -> Path:
    """A classification run: three candidates with labels of their own, and a target with others; `intents.yaml`."""
    for name, labels in INTENTS.items():
        write_rows(folder / f"{name}.jsonl", intent_rows(labels, 12))
    for part, start in (("validation", 100), ("test", 200)):
        write_rows(folder / f"{part}_intents.jsonl", intent_rows(["red", "cold", "hot", "hello_there"], 10, start))
    (folder / "intents.yaml").write_text(
        f"""
model_name_or_path: {model}
task: sequence_classification
lora_target_modules: all-linear
{SETTINGS}output_dir: {folder / "out"}
candidates:
  greetings: {{path: json, data_files: greetings.jsonl}}
  colours: {{path: json, data_files: colours.jsonl}}
  noise: {{path: json, data_files: noise.jsonl}}
targets:
  intents:
    data: {{path: json, data_files: validation_intents.jsonl}}
    test_data: {{path: json, data_files: test_intents.jsonl}}
    scorer: classification
    metric: logprob
"""
    )
    return folder


def changed(folder: Path, name: str = "intents", **values) -> dict:
    """A configuration with other values, written."""
    path = folder / f"{name}.yaml"
    given = yaml.safe_load(path.read_text()) | values
    path.write_text(yaml.safe_dump(given))
    return given


def copy_project(folder: Path, copy: Path) -> Path:
    """A copy of a project and its runs, as if it had been made there: no path in it leads back."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".lock"), dirs_exist_ok=True)
    for path in copy.rglob("*"):
        if path.is_file() and str(folder).encode() in (content := path.read_bytes()):
            path.write_bytes(content.replace(str(folder).encode(), str(copy).encode()))
    return copy


RGB = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = SHAPE | {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}


def write_images(path: Path, labels: list[str], count: int, start: int = 0) -> Path:
    rows = [
        {"image": picture(RGB[labels[i % len(labels)]], i + start), "label": labels[i % len(labels)]}
        for i in range(count)
    ]
    Dataset.from_list(rows, features=Features({"image": ImageFeature(), "label": Value("string")})).to_parquet(path)
    return path


def trials(out: Path) -> list[dict]:
    """The lines of the journal of a run folder."""
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def lines(out: Path) -> dict[frozenset, dict]:
    """Members of a mixture -> its merged trial."""
    return {frozenset(one["names"]): one for one in trials(out) if one["objective"] == "merged"}


def searcher(project: Path, *flags: str, name: str = "intents", **values) -> MergeToMixSearcher:
    """A quiet searcher over `intents.yaml`, or over another configuration of the project."""
    return MergeToMixSearcher(*parse(project / f"{name}.yaml", flags, values), Terminal(quiet=True))


def language_searcher(project: Path, *flags: str) -> MergeToMixSearcher:
    """One over `run.yaml`."""
    return searcher(project, *flags, name="run")


def trained_by_trl(run: RunContext, candidate: str, folder: Path) -> SFTTrainer:
    """TRL's own Trainer on a fresh model, which has trained as a run would train an expert."""
    run.args.output_dir, run.args.save_strategy, run.args.report_to = str(folder), "no", []
    run.args.logging_first_step, run.args.include_num_input_tokens_seen = True, "non_padding"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run.model_args.model_name_or_path, dtype="float32"),
        args=run.args,
        train_dataset=run.candidates[candidate].rows,
        processing_class=run.task.tokenizer,
        peft_config=run.expert().lora,
    )
    trainer.train()
    return trainer


def images(project: Path, *flags: str) -> MergeToMixSearcher:
    """A searcher over `pictures_of`; batches of 3 of its 9 rows, as a batch of one has no variance."""
    return searcher(project, "--per_device_train_batch_size", "3", *flags, name="images")


def pooled(folder: Path, pooling: str) -> None:
    """Has a sentence encoder pool its tokens so."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))


def config(scorer: str, metric: str, **options) -> TargetConfig:
    return TargetConfig(scorer, metric, DataConfig(path="json"), **options)


def scorer_on(rows, tokenizer, kind: str, metric: str, positions: int = 128, **options) -> Scorer:
    return make_scorer(config(kind, metric, **options), rows, Setup(tokenizer, positions))


def questions_of_many_shapes(tokenizer) -> list[TargetRow]:
    """Prompts of different lengths, choices of one token and of several, some with a common beginning."""
    rows = []
    for number in range(7):
        prompt = "question: " + "red green " * number + "answer:"
        choices = [" red", " green blue one", " green two", " yes no yes no"][: 2 + number % 3]
        rows.append(TargetRow(prompt, tuple(choices), number % 2))
    return rows


def build_stack(tmp_path, family: str, **lora) -> GatedStack:
    adapters = {
        name: Adapter.load(build_adapter(family, tmp_path / name, seed, **lora)) for seed, name in enumerate("abc")
    }
    return GatedStack(build_model(family), adapters)


def observed(model, look: Callable[[int], None]) -> None:
    """Tells `look` the number of tokens of every forward pass."""

    def hook(module, args, kwargs):
        look(kwargs.get("input_ids", args[0] if args else None).numel())

    model.register_forward_pre_hook(hook, with_kwargs=True)


def small_memory(model, tokens: int) -> list[int]:
    """Gives the model memory for so many tokens at a time; returns how many were tried."""
    tried = []

    def look(count: int) -> None:
        tried.append(count)
        if count > tokens:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    observed(model, look)
    return tried


LAUNCH = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from forks import launch; launch()"


def arguments(
    project: Path, output: Path, *flags: str, script: Path = SELECT, config: str = "cpu_2proc", options: tuple = ()
) -> list[str]:
    """What `accelerate launch` is given to run a script in two processes over gloo."""
    port = str(20000 + os.getpid() % 20000)
    given = ["--num_processes", "2", "--main_process_port", port, *options]
    given += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(script)]
    return [*given, "--config", str(project / "run.yaml"), "--output_dir", str(output), *flags]
