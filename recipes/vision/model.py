"""Makes the vision recipe's model: a small vision transformer, trained from nothing on much fashion and few digits.

```bash
python recipes/vision/data.py .vision/data
python recipes/vision/model.py .vision/data .vision/vit
```

No package that is at hand carries a small image model, so one is trained here: once, in about two minutes, with a fixed seed.
It runs on one CPU core, because threads that wait for each other make it many times slower where other programs run too. It is
a transformers `ViTForImageClassification` with 0.8 million parameters and the 20 labels of the data, kept with its image
processor. With a Hub connection any image model does that has the data's labels.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

EPOCHS = 15
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
SUMS = "sha256.txt"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(data: Path, folder: Path) -> str:
    """Digests of what the model was made from and of its weights."""
    files = (data / "pretraining.parquet", Path(__file__), folder / "model.safetensors")
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def is_complete(data: Path, folder: Path) -> bool:
    """Whether `folder` holds a model that this very script made from the data, with the weights it wrote."""
    written = [folder / name for name in ("config.json", "preprocessor_config.json", "model.safetensors", SUMS)]
    return all(path.exists() for path in written) and (folder / SUMS).read_text() == sums(data, folder)


def new_model(labels: list[str]) -> Any:
    """A vision transformer with random weights: 16 patches of 7x7 grey pixels, four layers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return ViTForImageClassification(config)


def new_processor() -> Any:
    """Turns 28x28 images in mode L into tensors of one channel from -1 to 1."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": 28, "width": 28}, do_resize=True, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )


def train(model: Any, pixels: Any, labels: Any) -> None:
    """A plain loop: AdamW, a warm-up and a cosine, cross-entropy; each batch is moved by up to two pixels."""
    import torch

    steps = EPOCHS * (len(pixels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(pixels))[: len(pixels) // BATCH_SIZE * BATCH_SIZE]
        for places in torch.split(order, BATCH_SIZE):
            shift = torch.randint(-2, 3, (2,)).tolist()
            moved = torch.roll(pixels[places], shift, (2, 3))
            loss = model(pixel_values=moved, labels=labels[places]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(places)
        print(f"model: epoch {epoch + 1} of {EPOCHS}, loss {total / len(order):.3f}", flush=True)


def make(data: Path, folder: Path) -> None:
    """Trains a model on the pre-training data and writes it to `folder`."""
    import torch
    from datasets import load_dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        source = str(data / "pretraining.parquet")
        rows = load_dataset("parquet", data_files=source, split="train", cache_dir=cache)
        images, words = list(rows["image"]), list(rows["label"])
    names = sorted(set(words))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = new_model(names), new_processor()
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    train(model, pixels, torch.tensor([names.index(word) for word in words]))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def main(data: Path, target: Path) -> None:
    """Trains, unless `target` is complete."""
    if not (data / "pretraining.parquet").exists():
        raise SystemExit(f"{data}: no pretraining.parquet; first: python recipes/vision/data.py {data}")
    if is_complete(data, target):
        print(f"model: {target} (cached)")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read by the libraries on import
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name) / "model"
        print("model: training a small vision transformer (once, about two minutes)", flush=True)
        make(data, work)
        (work / SUMS).write_text(sums(data, work))
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    print(f"model: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Makes the vision recipe's model: a small vision transformer, trained on the CPU, once."
    )
    parser.add_argument("data", type=Path, help="the folder that recipes/vision/data.py wrote")
    parser.add_argument("folder", type=Path, help="where to, for example .vision/vit")
    command = parser.parse_args()
    main(command.data, command.folder)
