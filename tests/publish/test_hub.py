"""The Hub: what is pushed, and pulled back, through the real client to a server on loopback."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Repository
from pico import COLOURS, RGB, SHAPE, build_tokenizer, lines, picture
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from m2m_hf.errors import InputError
from m2m_hf.publish.hub import fetch_expert

CODE = "import sys; from m2m_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"


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
    scores = [
        [(line["key"], line["score"]) for line in map(json.loads, (folder / "trials.jsonl").read_text().splitlines())]
        for folder in (out, tmp_path / "again")
    ]
    assert scores[0] == scores[1]
    other = run(*search, tmp_path / "other", "--lora_alpha", 3)
    assert other.returncode == 2
    assert "was trained with other settings, and only adapters" in other.stderr
    assert "lora_config.lora_alpha (" in other.stderr


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


KINDS = {"lora": (), "full": ("--expert", "full", "--learning_rate", "1e-3")}
# The example of a card, run with other texts or images than it names.
USE = """
import json, sys
from datasets import load_dataset
from huggingface_hub import hf_hub_download
code = open(hf_hub_download("org/quiz", "README.md")).read().split("```python\\n")[1].split("```")[0]
if len(sys.argv) > 1:
    file = sys.argv[1]
    rows = load_dataset("parquet" if file.endswith("parquet") else "json", data_files=file, split="train")
    given = "[Image.open(\\"picture.png\\")]" if "image" in rows.column_names else "[\\"a text\\"]"
    assert code.count(given) == 1
    code = code.replace(given, "given")
found = {"given": rows["image" if "image" in rows.column_names else "text"][:]} if len(sys.argv) > 1 else {}
exec(code, found)
if len(sys.argv) > 1:
    told = {"labels": found["labels"], "probabilities": found["probabilities"].tolist(), "right": rows["label"][:]}
    print(json.dumps(told | {"rows": len(load_dataset("org/quiz", split="train"))}))
else:
    print(json.dumps({name: float(one.double().abs().sum()) for name, one in found["model"].state_dict().items()}))
"""


def logprobs(told: str, closed: bool = False) -> list[float]:
    """Of every row's label, among those of all rows, or of a label space that is given."""
    found = json.loads(told.splitlines()[-1])
    among = [found["labels"].index(label) for label in (found["labels"] if closed else sorted(set(found["right"])))]
    scores = torch.tensor(found["probabilities"]).log()[:, among].log_softmax(1)
    return [
        float(one[among.index(found["labels"].index(label))]) for one, label in zip(scores, found["right"], strict=True)
    ]


def trials(out: Path) -> list[tuple]:
    return [(one["key"], one["score"]) for one in map(json.loads, (out / "trials.jsonl").read_text().splitlines())]


def serve(hub, model: Path) -> None:
    """Puts a model on the Hub as org/base."""
    there = hub.repositories["model", "org/base"] = Repository(False)
    there.commits.append(("b" * 40, {path.name: path.read_bytes() for path in model.iterdir()}))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    text = {**SHAPE, "vocab_size": 320, "max_position_embeddings": 64, "projection_size": 16}
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1}
    config = SiglipConfig(text_config=text | ids, vision_config={**SHAPE, "image_size": 8, "patch_size": 4})
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def published_run(request, hub, tmp_path):
    """what of -> the configuration of a run on `org/base`, whose rows may be published, and its validation rows."""

    def make(what: str) -> tuple[Path, Path]:
        if what in ("names", "own"):
            folder = request.getfixturevalue("intents" if what == "names" else "own")
            path, rows = folder / "intents.yaml", folder / "validation_intents.jsonl"
        else:
            model = request.getfixturevalue(what)
            folder = request.getfixturevalue("pictures_of")(
                model, "all-linear" if what == "vit" else ".*(q_proj|v_proj)"
            )
            path, rows = folder / "images.yaml", folder / "validation.parquet"
        given = yaml.safe_load(path.read_text())
        serve(hub, Path(given["model_name_or_path"]))
        if rows.suffix == ".parquet":
            for label, colour in RGB.items():
                for number in range(3):
                    place = tmp_path / "files" / label / f"{number}.png"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    picture(colour, number).save(place)
            given["candidates"]["all"] = {"path": "imagefolder", "data_dir": "files", "required": True}
            given["targets"]["colours"]["metric"] = "logprob"
        if what == "names":  # texts are cut
            given["max_length"] = 6
        if what == "own":  # of three that the classifier has
            given["targets"]["intents"]["labels"] = ["green", "blue"]
        given["model_name_or_path"] = "org/base"
        for one in given["candidates"].values():
            one["license"] = "cc-by-4.0"
        path.write_text(yaml.safe_dump(given))
        return path, rows

    return make


@pytest.mark.parametrize(
    ("what", "kind"),
    [("names", "lora"), ("vit", "full"), ("own", "full"), ("clip", "lora"), ("siglip", "full")],
)
def test_a_classifier_is_pushed_and_classifies_as_its_card_says(request, hub, run, published_run, tmp_path, what, kind):
    config, rows = published_run(what)
    out, images, named = tmp_path / "out", rows.suffix == ".parquet", what not in ("own", "vit")
    done = run("select", "--config", config, *KINDS[kind], "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    model, data = hub.files("model", "org/quiz"), hub.files("dataset", "org/quiz")
    for name, content in (*model.items(), *data.items()):
        assert str(tmp_path).encode() not in content, name
        assert hub.token.encode() not in content, name
    file = "train.parquet" if images else "train.jsonl"
    assert data[file] == (out / "mixture" / file).read_bytes()
    for files in (model, data):
        assert ("head.safetensors" in files) == named
    expert = "delta.safetensors" if kind == "full" else "adapter_model.safetensors"
    for path in (out / "adapters").iterdir():
        assert model[f"adapters/{path.name}/{expert}"] == (path / expert).read_bytes()
    task = f"{'image' if images else 'text'}-classification"
    card = yaml.safe_load(model["README.md"].decode().split("---")[1])
    assert card["library_name"] == ("transformers" if kind == "full" else "peft")
    assert card["pipeline_tag"] == card["model-index"][0]["results"][0]["task"]["type"] == task
    assert {"lora", "sft", "trl"} & set(card["tags"]) == ({"lora"} if kind == "lora" else set())
    assert ("adapter" in model["README.md"].decode().split("---")[2].replace("adapters/", "")) == (kind == "lora")
    card = yaml.safe_load(data["README.md"].decode().split("---")[1])
    assert card["task_categories"] == [task]
    assert card["configs"] == [{"config_name": "default", "data_files": file}]
    # Classified by what the card says, with what is on the Hub alone, it scores what the run says of its final model.
    used = run(rows, code=USE)
    assert used.returncode == 0, used.stderr
    found = logprobs(used.stdout, closed=what == "vit")
    summary = json.loads((out / "summary.json").read_text())
    assert sum(found) / len(found) == pytest.approx(summary["final"]["validation"], abs=2e-5)
    assert json.loads(used.stdout.splitlines()[-1])["rows"] == json.loads(data["manifest.json"])["rows"]
    readme = model["README.md"].decode()
    assert ("take the softmax over those that may" in readme) == (named or what == "own")
    assert ("; a choice among blue, green" in readme) == (what == "own")
    if what == "siglip":  # whose text tower was trained on names of full length
        tower = SiglipModel.from_pretrained(request.getfixturevalue("siglip"))
        given = build_tokenizer()(["blue"], padding="max_length", max_length=64, return_tensors="pt")
        with torch.no_grad():
            vector = torch.nn.functional.normalize(tower.get_text_features(**given).pooler_output[0], dim=0)
        assert torch.allclose(load(model["head.safetensors"])["vectors"][0], vector, atol=1e-5)
    # The published recipe gives the published weights, wherever it is.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in data.items():
        (copy / name).write_bytes(content)
    there = f"import os; os.chdir({str(copy)!r}); {CODE}"
    trained = run("recipe", "classify", "--config", "recipe.yaml", code=there)
    assert trained.returncode == 0, trained.stderr
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    ours, theirs = load(model[file]), load_file(copy / "trained-by-recipe" / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in ours)
    if what not in ("names", "vit"):  # one of each task
        return
    # A search elsewhere takes the bank and scores the same.
    key = "--experts" if kind == "full" else "--adapters"
    again = run("search", "--config", config, *KINDS[kind], key, "org/quiz", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert f"took 3 {key[2:]} that were trained elsewhere" in again.stdout
    assert trials(out) == trials(tmp_path / "again")


@pytest.mark.parametrize("kind", KINDS)
def test_before_there_is_a_final_model_an_expert_is_used(hub, run, published_run, tmp_path, kind):
    config, rows = published_run("names")
    done = run("search", "--config", config, *KINDS[kind])
    assert done.returncode == 0, done.stderr
    done = run("push", tmp_path / "out", "--repo_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    assert "head.safetensors" in hub.files("model", "org/quiz")
    assert "model.safetensors" not in hub.files("model", "org/quiz")
    used = run(rows, code=USE)
    assert used.returncode == 0, used.stderr
    best = json.loads((tmp_path / "out" / "summary.json").read_text())["best"]["mixture"]
    single = lines(tmp_path / "out")[frozenset({next(iter(best))})]
    assert logprobs(used.stdout) == pytest.approx(single["logprobs"], abs=2e-5)


@pytest.mark.parametrize("what", ["names", "own"])
def test_labels_that_are_given_are_those_of_the_card(hub, run, published_run, tmp_path, what):
    config, rows = published_run(what)
    given = yaml.safe_load(config.read_text())
    labels = ["green", "blue"]
    if what == "names":
        labels = [*COLOURS, "cold", "hot", "hello_there", "good_bye", "/a/b"]
    else:  # of three that the classifier has
        del given["candidates"]["colours"]
        for one in given["candidates"].values():
            one["labels"] = {"red": "green"}
    given |= {"labels": labels}
    config.write_text(yaml.safe_dump(given))
    done = run("select", "--config", config, "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    used = run(rows, code=USE)
    assert used.returncode == 0, used.stderr
    assert set(json.loads(used.stdout.splitlines()[-1])["labels"]) == set(labels)
    assert yaml.safe_load(hub.files("model", "org/quiz")["config.yaml"])["labels"] == labels
    found = logprobs(used.stdout, closed=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(found) / len(found) == pytest.approx(summary["final"]["validation"], abs=2e-5)


def test_a_full_causal_lm_is_pushed_whole_and_taken_away_whole(hub, run, project, tmp_path, pico):
    serve(hub, pico)
    config = project / "run.yaml"
    given = yaml.safe_load(config.read_text()) | {"model_name_or_path": "org/base", "expert": "full"}
    for one in given["candidates"].values():
        one["license"] = "cc-by-4.0"
    config.write_text(yaml.safe_dump(given))
    out = project / "out"
    done = run("select", "--config", config, "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    model = hub.files("model", "org/quiz")
    training = json.loads(model["training.json"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(training["files"])
    for name, one in training["files"].items():
        assert len(model[name]) == one["bytes"]
    used = run(code=USE)
    assert used.returncode == 0, used.stderr
    final = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    sums = {name: float(one.double().abs().sum()) for name, one in final.items()}
    assert json.loads(used.stdout.splitlines()[-1]) == pytest.approx(sums, rel=1e-12)
    # The final model is one that others may take as an expert; the bank beside it is then not asked for.
    hub.requests.clear()
    config.write_text(yaml.safe_dump(given | {"experts": {"alpha": "org/quiz"}}))
    taken = run("search", "--config", config, "--output_dir", tmp_path / "taken")
    assert taken.returncode == 0, taken.stderr
    assert "imported 1 fine-tune:" in taken.stdout
    assert not [one for one in hub.requests if "delta.safetensors" in one]
    config.write_text(yaml.safe_dump(given))
    again = run("search", "--config", config, "--experts", "org/quiz", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "took 3 experts that were trained elsewhere" in again.stdout
    assert trials(out) == trials(tmp_path / "again")
    # Without a final model nothing of the earlier one stays, and what is somebody else's does.
    hub.repositories["model", "org/quiz"].commits[-1][1]["model_of_mine.txt"] = b"kept"
    summary = json.loads((out / "summary.json").read_text()) | {"final": None}
    (out / "summary.json").write_text(json.dumps(summary))
    done = run("push", out, "--repo_id", "org/quiz")
    assert done.returncode == 0, done.stderr
    left = set(hub.files("model", "org/quiz"))
    assert not left & set(training["files"])
    assert {"config.yaml", "model_of_mine.txt", "adapters/alpha/delta.safetensors"} <= left


def test_an_expert_that_is_no_model_is_told_from_a_bank(tmp_path):
    with pytest.raises(InputError, match=r"no config.json; expected a fine-tuned model.*set experts: org/name"):
        fetch_expert(str(tmp_path), "experts")
