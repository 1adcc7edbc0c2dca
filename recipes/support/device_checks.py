"""Every feature that touches a device, on pico models in float32, against the CPU; behind `recipes/gpu_check.py`.

Experts are trained on the device; then device and CPU score mixtures of the same experts, which must agree to rounding.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig
from PIL.Image import fromarray
from scoring_methods import random_model, random_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PrinterCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from trl import SFTConfig, SFTTrainer

from m2m_hf import MergeProbeCallback, MergeToMixSearcher, TargetScoreCallback
from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.core.score import Score
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.dense_stack import open_stack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.merging.methods import MergeMethod

Said = tuple[bool, str]  # whether a check passed, and what it found
NAMES = ("alpha", "beta", "gamma")
MIXTURES: list[Mapping[str, float]] = [{}, {"beta": 1.0}, {"alpha": 0.5, "beta": 0.2, "gamma": 0.3}]
CLOSE = 2e-4  # of the largest number: by so much may numbers in float32 differ between devices
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TRAINING = {
    "lora_r": 4, "lora_alpha": 32, "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "dtype": "float32",
    "bf16": False, "activation_checkpointing": False, "logging_steps": 1, "report_to": "none",
}  # fmt: skip


def fill(folder: Path, task: str) -> dict[str, Any]:
    """Writes a pico model and rows for candidates and a target to `folder`; the configuration of a run on them."""
    torch.manual_seed(0)
    model = random_model(folder / "model", "tiny")
    suffix, kind = "json", "json"
    made: list[dict[str, Any]]
    if task == "causal_lm":
        rows = random_rows(48)
        learned = [{"prompt": row.prompt, "completion": row.choices[0]} for row in rows[12:]]
        asked = [{"prompt": row.prompt, "choices": list(row.choices), "answer": row.answer} for row in rows[:12]]
        scorer, layers = "choice", "[q_proj, v_proj, down_proj]"
    else:
        labels, scorer, layers = ("red", "green", "blue"), "classification", "all-linear"
        given = [labels[number % 3] for number in range(48)]
        if task == "sequence_classification":
            config = BertConfig(**SHAPE, vocab_size=512, max_position_embeddings=64)
            BertModel(config).save_pretrained(model)
            made = [{"text": f"it is {label}, number {n}", "label": label} for n, label in enumerate(given)]
        else:
            names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
            ViTForImageClassification(ViTConfig(**SHAPE, image_size=8, patch_size=4, **names)).save_pretrained(model)
            ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(model)
            suffix = kind = "parquet"
            made = [{"image": picture(n), "label": label} for n, label in enumerate(given)]
        learned, asked = made[12:], made[:12]
    parts = {name: learned[12 * n : 12 * n + 12] for n, name in enumerate(NAMES)} | {"asked": asked}
    for name, part in parts.items():
        features = Features({"image": Image(), "label": Value("string")}) if kind == "parquet" else None
        data = Dataset.from_list(part, features=features)
        (data.to_parquet if kind == "parquet" else data.to_json)(str(folder / f"{name}.{suffix}"))
    sources = {name: {"path": kind, "data_files": f"{name}.{suffix}"} for name in parts}
    return TRAINING | {
        "model_name_or_path": str(model), "task": task, "lora_target_modules": yaml.safe_load(layers),
        "candidates": {name: sources[name] for name in NAMES},
        "targets": {"t": {"scorer": scorer, "metric": "logprob", "data": sources["asked"]}},
    }  # fmt: skip


def picture(number: int) -> Any:
    """8 by 8 noisy pixels, mostly of one of three colours."""
    draw = torch.Generator().manual_seed(number)
    noise = torch.randint(0, 90, (8, 8, 3), generator=draw)
    noise[..., number % 3] += 150
    return fromarray(noise.to(torch.uint8).numpy())


class Project:
    """A pico model with its data, whose runs are on the device or, `on_cpu`, beside it on the CPU."""

    def __init__(self, folder: Path, task: str, device: str) -> None:
        self.folder, self.device = folder, device
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(fill(folder, task)))

    def searcher(self, out: str, on_cpu: bool = False, **values: Any) -> MergeToMixSearcher:
        values |= {"output_dir": str(self.folder / out), "use_cpu": on_cpu or self.device == "cpu"}
        return MergeToMixSearcher(*parse(self.folder / "run.yaml", (), values), Terminal(quiet=True))

    def agrees(self, what: str, out: str, **values: Any) -> Said:
        """Trains a bank and scores its mixtures on the device, and the same bank's mixtures on the CPU."""
        ours = self.searcher(out, **values).search()
        shutil.copytree(self.folder / out / "adapters", self.folder / f"{out}-cpu" / "adapters")
        for path in (self.folder / f"{out}-cpu" / "adapters").glob("*/training.json"):
            record = json.loads(path.read_text())
            record["uniform"]["use_cpu"] = True  # or a run on the CPU would refuse what a device has trained
            path.write_text(json.dumps(record))
        theirs = self.searcher(f"{out}-cpu", on_cpu=True, **values).search()
        scores = [
            torch.tensor([trial.score.logprobs for trial in found.trials if isinstance(trial.score, Score)])
            for found in (ours, theirs)
        ]
        return compared(f"{what}, {len(ours.standings)} mixtures", *scores)


def compared(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> Said:
    """Whether the numbers are the CPU's; they must differ among themselves, or that would say nothing."""
    apart, largest, spread = float((ours - theirs).abs().max()), float(theirs.abs().max()), float(ours.std())
    return apart <= min(
        CLOSE * largest, spread / 10
    ) and spread > 0, f"{what}: at most {apart:.1e} from the CPU's numbers, whose standard deviation is {spread:.1e}"


class Bench:
    """The checks of one device, each a method that says whether it passed; `root` is a folder for their projects."""

    def __init__(self, root: Path, device: str) -> None:
        self.root, self.device = root, device

    @cached_property
    def _texts(self) -> Project:
        return Project(self.root / "texts", "sequence_classification", self.device)

    @cached_property
    def _language(self) -> Project:
        return Project(self.root / "language", "causal_lm", self.device)

    @cached_property
    def _bank(self) -> tuple[Mapping[str, Any], Any]:
        """Adapters of language models that were trained on the device, and their target's scorer."""
        run = self._language.searcher("out")
        run.train_adapters()
        return run.run.bank.load(), run.run.scorers["t"]["validation"]

    def _model(self, device: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._language.folder / "model", dtype=torch.float32)
        return model.to(device).eval()

    def _on_both(self, what: str, measure: Callable[[Any], torch.Tensor]) -> Said:
        """Compares what is measured with the language model on the device and on the CPU."""
        return compared(what, *(measure(self._model(device)) for device in (self.device, "cpu")))

    def classification_of_texts(self) -> Said:
        return self._texts.agrees("classification of texts", "lora")

    def full_experts(self) -> Said:
        return self._texts.agrees("full experts", "full", expert="full", learning_rate=1e-3)

    def classification_of_images(self) -> Said:
        project = Project(self.root / "images", "image_classification", self.device)
        return project.agrees("classification of images", "lora")

    def ensemble(self) -> Said:
        return self._language.agrees("ensemble", "ensemble", objective="ensemble")

    def fine_tuned_mixtures(self) -> Said:
        """A search by fine-tuned models, and what the same models score on the CPU."""
        searcher = self._language.searcher("trained", objective="trained")
        result, models = searcher.search(), searcher.run.fine_tuned
        scorer = searcher.run.validation_scorers["t"]
        ours: list[list[float]] = []
        theirs: list[list[float]] = []
        for mixture, standing in result.standings.items():
            if mixture.items:
                folder = models.folder(models.counts(mixture))
                stack = GatedStack(self._model("cpu"), {"trained": Adapter.load(folder)})
                (score,) = scorer.score(stack, [{"trained": 1.0}], 4096)
                for found, of in ((theirs, score), (ours, standing.trials["t"].score)):
                    assert isinstance(of, Score)
                    found.append(list(of.logprobs))
        return compared(f"{len(ours)} mixtures fine-tuned", torch.tensor(ours), torch.tensor(theirs))

    def groups(self) -> Said:
        """Adapters trained side by side, with dropout, and the same one after another."""
        values: dict[str, Any] = {"lora_dropout": 0.1, "max_steps": 6}
        banks = []
        for parallel in (3, 1):
            searcher = self._language.searcher(f"groups{parallel}", parallel_adapters=str(parallel), **values)
            searcher.train_adapters()
            found = [Adapter.load(searcher.run.folder.adapters / one).tensors.values() for one in NAMES]
            banks.append([part for tensors in found for part in tensors])
        ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in banks)
        apart, moved = float((ours - theirs).abs().max()), float(theirs.std())
        return (
            apart <= 1e-5,
            f"three adapters side by side, with dropout: {apart:.1e} from one after another, of {moved:.1e}",
        )

    def merge_methods(self) -> Said:
        adapters, scorer = self._bank

        def measure(model: Any) -> torch.Tensor:
            found = []
            for method in (MergeMethod("ties", density=0.3), MergeMethod("dare", density=0.5), MergeMethod("linear")):
                stack = open_stack(model, adapters, method)
                found += [scorer.score(stack, [weights], 4096)[0].logprobs for weights in MIXTURES]
                stack.detach()
            return torch.tensor(found)

        return self._on_both("TIES, DARE and linear merging", measure)

    def gradient(self) -> Said:
        adapters, scorer = self._bank

        def measure(model: Any) -> torch.Tensor:
            stack = GatedStack(model, adapters)
            return torch.tensor([list(scorer.gradient(stack, one, 512)[1].values()) for one in MIXTURES])

        return self._on_both("gradients by the weights", measure)

    def generation(self) -> Said:
        adapters, _ = self._bank
        data = {"path": "json", "data_files": "alpha.json"}
        target = {"scorer": "generation", "metric": "exact_match", "generation": {"max_new_tokens": 8}, "data": data}
        scorer: Any = self._language.searcher("generation", targets={"t": target}).run.scorers["t"]["validation"]
        answers: list[str] = []

        def keep(texts: Sequence[str], references: Sequence[str]) -> tuple[float, float, list[float]]:
            answers.extend(texts)
            return 0.0, 0.0, [0.0] * len(texts)

        scorer.metric = keep
        for device in (self.device, "cpu"):
            scorer.score(GatedStack(self._model(device), adapters), MIXTURES, 4096)
        half = len(answers) // 2
        same = sum(one == other for one, other in zip(answers[:half], answers[half:], strict=True))
        many = len({*answers})
        return (
            same >= 0.9 * half and many > 3,
            f"generation: {same} of {half} greedy answers, {many} different ones, are the CPU's",
        )

    def callbacks(self) -> Said:
        """One training with both callbacks; what they said at its end, and what the adapters it left score on the CPU."""
        adapters, scorer = self._bank
        folder = self._language.folder
        args = SFTConfig(
            str(folder / "script"), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=self.device == "cpu",
            bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            self._model(self.device), args, train_dataset=Dataset.from_json(str(folder / "alpha.json")),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
        data = {"path": "json", "data_files": str(folder / "asked.json")}
        targets = {"t": {"scorer": "choice", "metric": "logprob", "data": data}}
        score = TargetScoreCallback(trainer, targets)
        probe = MergeProbeCallback(trainer, "mine", {"beta": folder / "out" / "adapters" / "beta"}, targets, every=2)
        trainer.remove_callback(PrinterCallback)
        for one in (score, probe):
            trainer.add_callback(one)
        trainer.train()
        trainer.model.save_pretrained(folder / "mine")
        ranking = sorted(probe.ranking, key=lambda pair: pair[0].items)
        ours = [score.scores()["eval_t"], *(value for _, value in ranking)]
        stack = GatedStack(self._model("cpu"), {"mine": Adapter.load(folder / "mine"), "beta": adapters["beta"]})
        mixtures = [{"mine": 1.0}, *(dict(mixture.weights) for mixture, _ in ranking)]
        theirs = [scorer.score(stack, [one], 4096)[0].value for one in mixtures]
        return compared(
            "TargetScoreCallback and MergeProbeCallback in a training", torch.tensor(ours), torch.tensor(theirs)
        )

    def resume(self) -> Said:
        """A bank whose process is killed while it trains, and one that nothing happened to: the same bytes."""
        values: dict[str, Any] = {"max_steps": 12, "save_steps": 2}
        out, place = self._language.folder / "killed", "*/adapter_model.safetensors"
        flags = [
            f"--use_cpu={self.device == 'cpu'}",
            f"--output_dir={out}",
            *(f"--{key}={one}" for key, one in values.items()),
        ]
        command = [
            sys.executable,
            "-m",
            "m2m_hf.cli.main",
            "adapters",
            "--config",
            str(self._language.folder / "run.yaml"),
        ]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            with suppress(FileNotFoundError):  # what it looks at may be renamed meanwhile
                if len([*out.rglob("checkpoint-*")]) > 1:  # the first of which is whole
                    break
            time.sleep(0.002)
        process.kill()
        killed, left = process.wait() < 0, 3 - len([*(out / "adapters").glob(place)])
        found = []
        for name in ("killed", "whole"):
            self._language.searcher(name, **values).train_adapters()
            folder = self._language.folder / name / "adapters"
            found.append({path.parent.name: path.read_bytes() for path in sorted(folder.glob(place))})
        same = len(found[0]) == 3 and found[0] == found[1]
        said = f"resume: killed with {left} adapters to go, the bank has {'the' if same else 'OTHER'} bytes of one that was not"
        return killed and left > 0 and same, said

    def all(self) -> list[Callable[[], Said]]:
        return [
            self.classification_of_texts, self.classification_of_images, self.full_experts, self.ensemble,
            self.fine_tuned_mixtures, self.groups, self.merge_methods, self.gradient, self.generation, self.callbacks,
            self.resume,
        ]  # fmt: skip
