"""The Hub: what is pushed, and pulled back, through the real client to a server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import Hub

ROOT = Path(__file__).parents[1]
CODE = "import sys; from m2m_hf.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def run(hub: Hub, *command: object, code: str = CODE, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: the client reads its endpoint when it is imported."""
    told = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub.token,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        env=os.environ | told | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def finished(project):
    from m2m_hf.cli import main

    path = project / "run.yaml"
    given = yaml.safe_load(path.read_text())
    for one in given["candidates"].values():
        one["license"] = "cc-by-4.0"
    path.write_text(yaml.safe_dump(given))
    assert main(["select", "--config", str(path)]) == 0
    return project


PULL = """
import sys, json
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, "org/quiz", subfolder="adapters/beta")
print(sum(float(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n))
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "org/quiz")
print(len(load_dataset("org/quiz", split="train")))
"""


def test_a_run_is_pushed_and_pulled_back_with_the_same_scores(hub, finished, tmp_path):
    out = finished / "out"
    dry = run(hub, "push", out, "--repo_id", "org/quiz", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "adapters/beta/adapter_model.safetensors" in dry.stdout
    assert "nothing was sent" in dry.stdout
    assert not hub.repositories
    hub.broken = 1
    failed = run(hub, "push", out, "--repo_id", "org/quiz", "--private")
    assert failed.returncode == 2
    assert "org/quiz" in failed.stderr
    done = run(hub, "push", out, "--repo_id", "org/quiz", "--private")
    assert done.returncode == 0, done.stderr
    assert all(repository.private for repository in hub.repositories.values())
    model, data = hub.files("model", "org/quiz"), hub.files("dataset", "org/quiz")
    assert data["train.jsonl"] == (out / "mixture" / "train.jsonl").read_bytes()
    for name in ("alpha", "beta", "gamma"):
        file = f"adapters/{name}/adapter_model.safetensors"
        assert model[file] == (out / file).read_bytes()
    assert model["adapter_model.safetensors"] == (out / "final" / "adapter_model.safetensors").read_bytes()
    for content in (*model.values(), *data.values()):
        assert str(finished).encode() not in content  # no place on this machine
        assert hub.token.encode() not in content
    card = yaml.safe_load(model["README.md"].decode().split("---")[1])
    assert card["library_name"] == "peft"
    assert "org/quiz" in card["datasets"]
    assert {"license", "tags", "model-index"} <= set(card)
    assert yaml.safe_load(data["README.md"].decode().split("---")[1])["license"] == "cc-by-4.0"
    assert "| **final model** |" in model["README.md"].decode()
    # Again: nothing changes.
    commits = {key: len(repository.commits) for key, repository in hub.repositories.items()}
    assert run(hub, "push", out, "--repo_id", "org/quiz").returncode == 0
    assert commits == {key: len(repository.commits) for key, repository in hub.repositories.items()}
    # Pulled back by PEFT and datasets alone.
    config = yaml.safe_load((finished / "run.yaml").read_text())
    pulled = run(hub, config["model_name_or_path"], code=PULL)
    assert pulled.returncode == 0, pulled.stderr
    total, rows = pulled.stdout.split()
    assert float(total) > 0
    assert int(rows) == json.loads((out / "mixture" / "manifest.json").read_text())["rows"]
    # A search that starts from the published bank trains nothing and scores the same.
    search = ("search", "--config", finished / "run.yaml", "--adapters", "org/quiz", "--output_dir")
    again = run(hub, *search, tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "took 3 adapters that were trained elsewhere" in again.stdout
    assert "training adapters" not in again.stdout
    scores = [
        [(line["key"], line["score"]) for line in map(json.loads, (folder / "trials.jsonl").read_text().splitlines())]
        for folder in (out, tmp_path / "again")
    ]
    assert scores[0] == scores[1]
    other = run(hub, *search, tmp_path / "other", "--lora_alpha", 3)
    assert other.returncode == 2
    assert "was trained otherwise than this run asks for" in other.stderr
    assert "lora_config.lora_alpha (" in other.stderr
