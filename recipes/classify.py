"""Fine-tunes a classifier as an `OUT/recipe.yaml` of m2m_hf says: with transformers and PEFT alone, m2m_hf need not be installed.

```bash
python recipes/classify.py --config runs/intents/recipe.yaml
accelerate launch recipes/classify.py --config runs/intents/recipe.yaml
```

The head is frozen: either the classifier that the base model has, or vectors made of the labels' names (`head.safetensors`), with
which a row's features are compared by cosine. The same rows in the same order and the same arguments give the weights of
`OUT/final`.
"""

import sys

# Python puts a script's own folder first on its path, where a file has the name of a module of the standard library.
sys.path.pop(0)

import argparse
import json
import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import Trainer, TrainingArguments, set_seed


class FrozenHead:
    """Scores of labels from a model's output.

    Args:
        recipe: of `OUT/recipe.yaml`.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.closed = recipe["head"]["closed"]
        if "file" in recipe["head"]:
            with safe_open(recipe["head"]["file"], "pt") as file:
                about = json.loads(file.metadata()["head"])
                self.vectors = file.get_tensor("vectors")
            self.labels, self.scale, self.pooling = about["labels"], about["scale"], about["pooling"]
        else:
            self.labels = recipe["head"]["labels"]
            self.columns = recipe["head"]["columns"]
        self.among = recipe["head"].get("among", {})

    def __call__(self, outputs: Any, mask: torch.Tensor | None) -> torch.Tensor:
        if not hasattr(self, "vectors"):
            logits: torch.Tensor = outputs.logits.float()[:, self.columns]
            return logits
        found = outputs["last_hidden_state" if self.pooling in ("mean", "cls") else self.pooling].float()
        if self.pooling == "cls":
            found = found[:, 0]
        elif self.pooling == "mean":
            weights = torch.ones(found.shape[:2], device=found.device) if mask is None else mask.to(found.dtype)
            found = (found * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        scores: torch.Tensor = (
            self.scale * torch.nn.functional.normalize(found, dim=-1) @ self.vectors.to(found.device).T
        )
        return scores


class Collate:
    """Batches with `labels`, and `allowed`: the labels of the dataset that a row comes from, or all of a given space."""

    def __init__(self, processing: Any, head: FrozenHead, rows: Any, limit: int | None) -> None:
        self.processing, self.limit = processing, limit
        self.place = {label: number for number, label in enumerate(head.labels)}
        self.allowed = {source: torch.full((len(head.labels),), head.closed) for source in rows.unique("source")}
        for source, labels in head.among.items():
            self.allowed[source][[self.place[label] for label in labels]] = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "text" in rows[0]:
            texts = [row["text"] for row in rows]
            given = {"truncation": True, "max_length": self.limit, "padding": True}
            batch = dict(self.processing(texts, return_tensors="pt", **given))
        else:
            batch = dict(self.processing(images=[row["image"] for row in rows], return_tensors="pt"))
        batch["labels"] = torch.tensor([self.place[row["label"]] for row in rows])
        batch["allowed"] = torch.stack([self.allowed[row["source"]] for row in rows])
        return batch


class FrozenHeadTrainer(Trainer):
    """Cross-entropy over the labels that a row may have."""

    loss_is_scaled_for_ga = False  # it is a mean over the rows of a batch
    head: FrozenHead

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of one batch."""
        labels, allowed = inputs.pop("labels"), inputs.pop("allowed")
        outputs = model(**inputs)
        scores = self.head(outputs, inputs.get("attention_mask")).masked_fill(~allowed, -torch.inf)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        return (loss, outputs) if return_outputs else loss


def main(path: Path) -> None:
    """Trains, and saves the adapter or the model to the recipe's `output_dir`."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    args = TrainingArguments(**recipe["training"], remove_unused_columns=False)
    name, revision = recipe["model_name_or_path"], recipe["model_revision"]
    kind = getattr(transformers, recipe["model_class"])
    model = kind.from_pretrained(
        name,
        revision=revision,
        dtype=recipe["dtype"],
        attn_implementation=recipe.get("attn_implementation"),
        use_safetensors=True,
    )
    loads = (
        transformers.AutoTokenizer if recipe["task"] == "sequence_classification" else transformers.AutoImageProcessor
    )
    processing = loads.from_pretrained(name, revision=revision)
    if recipe["task"] == "sequence_classification":
        processing.padding_side = "right"  # where positions begin with the text
        processing.pad_token = recipe.get("pad_token") or processing.pad_token
    file = recipe["train_file"]
    rows = load_dataset("parquet" if file.endswith(".parquet") else "json", data_files=escape(file), split="train")
    head = FrozenHead(recipe)
    frozen = recipe.get("untrained_modules")
    set_seed(args.seed)
    if recipe["expert"] == "lora":
        shape = LoraConfig(
            r=recipe["lora_r"], lora_alpha=recipe["lora_alpha"], lora_dropout=recipe["lora_dropout"],
            target_modules=recipe.get("lora_target_modules"), use_rslora=recipe["use_rslora"], exclude_modules=frozen,
        )  # fmt: skip
        model = get_peft_model(model, shape)
    else:
        wanted = recipe.get("trained_parameters") or ""
        for key, parameter in model.named_parameters():
            kept = frozen is not None and re.fullmatch(frozen, key)
            parameter.requires_grad_(not kept and re.search(wanted, key) is not None)
    trainer = FrozenHeadTrainer(
        model=model, args=args, train_dataset=rows, processing_class=processing,
        data_collator=Collate(processing, head, rows, recipe.get("max_length")),
    )  # fmt: skip
    trainer.head = head
    trainer.train()
    trainer.save_model()
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tunes a classifier as an OUT/recipe.yaml of m2m_hf says.")
    parser.add_argument("--config", type=Path, required=True, help="for example runs/intents/recipe.yaml")
    main(parser.parse_args().config)
