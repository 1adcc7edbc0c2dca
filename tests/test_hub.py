"""The Hub: what is pushed, and pulled back, through the real client to a server on loopback."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from hub_server import Repository

from m2m_hf.errors import InputError
from m2m_hf.hub import plan, published, row_licenses
from m2m_hf.journal import RunFolder

CODE = "import sys; from m2m_hf.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def run(forks):
    """Runs `m2m`, or other code, in a process that is told of the server: the client reads its endpoint when it is imported."""

    def run(*command: object, code: str = CODE, **environment: str) -> subprocess.CompletedProcess:
        return forks.run("-c", code, *command, **environment)

    return run


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


def test_a_run_is_pushed_and_pulled_back_with_the_same_scores(hub, run, finished, tmp_path):
    out = finished / "out"
    dry = run("push", out, "--repo_id", "org/quiz", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "adapters/beta/adapter_model.safetensors" in dry.stdout
    assert "nothing was sent" in dry.stdout
    assert not hub.repositories
    hub.broken = 1
    failed = run("push", out, "--repo_id", "org/quiz", "--private")
    assert failed.returncode == 2
    assert "org/quiz" in failed.stderr
    done = run("push", out, "--repo_id", "org/quiz", "--private")
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
    # A public one does not become private by itself, and nothing is sent to it then.
    hub.repositories["dataset", "org/quiz"].private = False
    told = run("push", out, "--repo_id", "org/quiz", "--private")
    assert told.returncode == 2
    assert "is there already and public" in told.stderr
    hub.repositories["dataset", "org/quiz"].private = True
    # Again: nothing changes.
    commits = {key: len(repository.commits) for key, repository in hub.repositories.items()}
    assert run("push", out, "--repo_id", "org/quiz").returncode == 0
    assert commits == {key: len(repository.commits) for key, repository in hub.repositories.items()}
    # Pulled back by PEFT and datasets alone.
    config = yaml.safe_load((finished / "run.yaml").read_text())
    pulled = run(config["model_name_or_path"], code=PULL)
    assert pulled.returncode == 0, pulled.stderr
    total, rows = pulled.stdout.split()
    assert float(total) > 0
    assert int(rows) == json.loads((out / "mixture" / "manifest.json").read_text())["rows"]
    # A search that starts from the published bank trains nothing and scores the same.
    search = ("search", "--config", finished / "run.yaml", "--adapters", "org/quiz", "--output_dir")
    again = run(*search, tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "took 3 adapters that were trained elsewhere" in again.stdout
    assert "training adapters" not in again.stdout
    scores = [
        [(line["key"], line["score"]) for line in map(json.loads, (folder / "trials.jsonl").read_text().splitlines())]
        for folder in (out, tmp_path / "again")
    ]
    assert scores[0] == scores[1]
    other = run(*search, tmp_path / "other", "--lora_alpha", 3)
    assert other.returncode == 2
    assert "was trained otherwise than this run asks for" in other.stderr
    assert "lora_config.lora_alpha (" in other.stderr


@pytest.mark.parametrize(
    ("licenses", "words"),
    [
        (("mit", None), "the license of beta (none given) does not say that they may be published"),
        (("mit", "cc-by-nd-4.0"), "the license of beta (cc-by-nd-4.0) does not say"),
        (("cc-by-sa-4.0", "mit"), "cc-by-sa-4.0 and mit cannot be combined in one dataset"),
        (("cc-by-sa-4.0", "cc-by-sa-4.0"), None),
        (("MIT", "apache-2.0"), None),
    ],
)
def test_rows_are_published_where_every_license_allows_it(licenses, words):
    sources = {
        name: {"source": {"path": "json"} | ({"license": one} if one else {})}
        for name, one in zip(("alpha", "beta"), licenses, strict=True)
    }
    found, reason = row_licenses({"sources": sources})
    assert (words is None) == (reason is None)
    assert words is None or words in reason
    assert found == sorted({one.lower() for one in licenses if one})


def test_rows_that_may_not_be_published_stay_and_recipe_and_manifest_go(finished):
    out = finished / "out"
    manifest = out / "mixture" / "manifest.json"
    told = json.loads(manifest.read_text())
    for one in told["sources"].values():
        del one["source"]["license"]
    manifest.write_text(json.dumps(told))
    data, _ = plan(RunFolder(out), "org/quiz")
    assert set(data.files) == {"README.md", "manifest.json", "recipe.yaml"}
    assert "the rows stay here" in data.notes[0]
    card = yaml.safe_load(data.files["README.md"].decode().split("---")[1])
    assert card["viewer"] is False
    assert card["license"] == "other"


def test_without_a_login_it_is_said_before_anything_is_trained(hub, run, project):
    flags = ("select", "--config", project / "run.yaml", "--push_to_hub", "true")
    told = run(*flags)
    assert told.returncode == 2
    assert "expected hub_model_id: org/name" in told.stderr
    told = run(*flags, "--hub_model_id", "org/quiz", HF_TOKEN="hf_wrongwrongwrongwrong")
    assert told.returncode == 2
    assert "type hf auth login, or set HF_TOKEN" in told.stderr
    assert not (project / "out").exists()
    told = run(*flags, "--hub_model_id", "org/quiz")
    assert told.returncode == 0, told.stderr
    assert set(hub.repositories) == {("model", "org/quiz"), ("dataset", "org/quiz")}
    recipe = (project / "out" / "recipe.yaml").read_text()
    for text in (
        recipe,
        *map(
            bytes.decode,
            (hub.files("model", "org/quiz")["config.yaml"], hub.files("dataset", "org/quiz")["recipe.yaml"]),
        ),
    ):
        assert "push_to_hub" not in text  # or whoever trains by it would push here
        assert "hub_model_id" not in text


def test_hub_datasets_and_models_are_pinned_to_their_commits(hub, run, project, tmp_path):
    config = yaml.safe_load((project / "run.yaml").read_text())
    rows = (project / "alpha.jsonl").read_bytes()
    data = hub.repositories["dataset", "org/alpha"] = Repository(False)
    data.commits.append(("a" * 40, {"train.jsonl": rows}))
    model = hub.repositories["model", "org/pico"] = Repository(False)
    base = Path(config["model_name_or_path"])
    model.commits.append(("b" * 40, {path.name: path.read_bytes() for path in base.iterdir()}))
    config["candidates"]["alpha"] = {"path": "org/alpha", "required": True}
    config["model_name_or_path"] = "org/pico"
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    done = run("search", "--config", project / "run.yaml")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((project / "out" / "mixture" / "manifest.json").read_text())
    assert manifest["sources"]["alpha"]["source"]["revision"] == "a" * 40
    recipe = yaml.safe_load((project / "out" / "recipe.yaml").read_text())
    assert recipe["model_name_or_path"] == "org/pico"
    assert recipe["model_revision"] == "b" * 40
    # What comes later does not change a run that is resumed from its own configuration.
    data.commits.append(("c" * 40, {"train.jsonl": rows[: len(rows) // 2]}))
    again = run("search", "--config", project / "out" / "config.yaml")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("name", ["quiz", "org/quiz/x", "../quiz", "org/qu iz", "org/", ""])
def test_names_that_are_none(finished, name):
    with pytest.raises(InputError, match="repo_id: expected org/name"):
        plan(RunFolder(finished / "out"), name)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/private/x.json", "x.json"),
        ("--data=/home/me/private/x.json", "--data=x.json"),
        ("file:///home/me/a.json", "a.json"),
        ("../private/x", "x"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\x.json", "x.json"),
        ("cannot read '/home/me/secret/x' (no such file)", "cannot read 'x' (no such file)"),
        ("https://host/a/b.json", "https://host/a/b.json"),
        ("org/name", "org/name"),
        ("/no_think {question}", "/no_think {question}"),
        ("/", "/"),
        ("either/or and 1/2", "either/or and 1/2"),
    ],
)
def test_no_place_on_this_machine_is_published(given, shown):
    assert published({"a": [given]}) == {"a": [shown]}


def test_what_is_no_longer_part_of_the_run_is_taken_away(hub, run, finished):
    out = finished / "out"
    assert run("push", out, "--repo_id", "org/quiz").returncode == 0
    hub.repositories["model", "org/quiz"].commits[-1][1]["mine.txt"] = b"kept"
    manifest = out / "mixture" / "manifest.json"
    told = json.loads(manifest.read_text())
    for one in told["sources"].values():
        one["source"]["license"] = "cc-by-nd-4.0"
    manifest.write_text(json.dumps(told))
    summary = json.loads((out / "summary.json").read_text()) | {"final": None}
    (out / "summary.json").write_text(json.dumps(summary))
    done = run("push", out, "--repo_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    assert "train.jsonl" not in hub.files("dataset", "org/quiz")
    assert "adapter_model.safetensors" not in hub.files("model", "org/quiz")
    assert "mine.txt" in hub.files("model", "org/quiz")
