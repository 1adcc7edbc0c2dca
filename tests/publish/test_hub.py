"""The Hub: what is pushed, and pulled back, through the real client to a server on loopback."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Repository
from pico import COLOURS, RGB, ROOT, SHAPE, build_tokenizer, lines, picture, trials
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from m2m_hf.errors import InputError
from m2m_hf.publish.hub import fetch_expert

CODE = "import sys; from m2m_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def run(forks):
    """Runs `m2m`, or other code, in a process that is told of the server: the client reads its endpoint when it is imported.

    Gives what it printed; what it complained of where it is to end with another code than 0.
    """

    def run(*command: object, code: str = CODE, ends: int = 0, **environment: str) -> str:
        done = forks.run("-c", code, *command, **environment)
        assert done.returncode == ends, done.stderr
        return done.stderr if ends else done.stdout

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def metadata(files: dict[str, bytes]) -> dict:
    """Of a repository's card."""
    return yaml.safe_load(files["README.md"].decode().split("---")[1])


def serve(hub, kind: str, name: str, sha: str, files: dict[str, bytes]) -> Repository:
    """Puts a repository on the Hub."""
    repository = hub.repositories[kind, name] = Repository(False)
    repository.commits.append((sha, files))
    return repository


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub, *places: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of model and dataset, in which neither the token nor a place on this machine stands."""
    repositories = hub.files("model", "org/quiz"), hub.files("dataset", "org/quiz")
    for name, content in [file for files in repositories for file in files.items()]:
        assert not [one for one in (hub.token, *map(str, places)) if one.encode() in content], name
    return repositories


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


@pytest.mark.cpu_only("compares bytes or last digits with a forked process, which stays on the CPU")
def test_a_run_is_pushed_and_pulled_back_with_the_same_scores(hub, run, finished, tmp_path):
    out = finished / "out"
    push = ("push", out, "--repo_id", "org/quiz")
    dry = run(*push, "--dry_run")
    assert "adapters/beta/adapter_model.safetensors" in dry
    assert "nothing was sent" in dry
    assert not hub.repositories
    hub.broken = 1
    assert "org/quiz" in run(*push, "--private", ends=2)
    run(*push, "--private")
    assert all(repository.private for repository in hub.repositories.values())
    model, data = published(hub, finished)
    assert data["train.jsonl"] == (out / "mixture" / "train.jsonl").read_bytes()
    for name in ("alpha", "beta", "gamma"):
        file = f"adapters/{name}/adapter_model.safetensors"
        assert model[file] == (out / file).read_bytes()
    assert model["adapter_model.safetensors"] == (out / "final" / "adapter_model.safetensors").read_bytes()
    card = metadata(model)
    assert card["library_name"] == "peft"
    assert "org/quiz" in card["datasets"]
    assert {"license", "tags", "model-index"} <= set(card)
    card = metadata(data)
    assert (card["license"], card["tags"]) == ("cc-by-4.0", ["merge-to-mix", "instruction-tuning"])
    assert "| **final model** |" in model["README.md"].decode()
    # A public one does not become private by itself, and nothing is sent to it then.
    hub.repositories["dataset", "org/quiz"].private = False
    assert "is there already and public" in run(*push, "--private", ends=2)
    hub.repositories["dataset", "org/quiz"].private = True
    # Again: nothing changes.
    commits = {key: len(repository.commits) for key, repository in hub.repositories.items()}
    run(*push)
    assert commits == {key: len(repository.commits) for key, repository in hub.repositories.items()}
    # Pulled back by PEFT and datasets alone.
    config = yaml.safe_load((finished / "run.yaml").read_text())
    total, rows = run(config["model_name_or_path"], code=PULL).split()
    assert float(total) > 0
    assert int(rows) == read(out / "mixture" / "manifest.json")["rows"]
    # A search that starts from the published bank trains nothing and scores the same.
    search = ("search", "--config", finished / "run.yaml", "--adapters", "org/quiz", "--output_dir")
    assert "took 3 adapters that were trained elsewhere" in run(*search, tmp_path / "again")
    assert scores(out) == scores(tmp_path / "again")
    refusal = run(*search, tmp_path / "other", "--lora_alpha", 3, ends=2)
    assert "was trained with other settings, and only adapters" in refusal
    assert "lora_config.lora_alpha (" in refusal
    # What is no longer part of the run is taken away, and what is somebody else's is not.
    hub.files("model", "org/quiz")["mine.txt"] = b"kept"
    manifest = read(out / "mixture" / "manifest.json")
    for one in manifest["sources"].values():
        one["source"]["license"] = "cc-by-nd-4.0"
    (out / "mixture" / "manifest.json").write_text(json.dumps(manifest))
    (out / "summary.json").write_text(json.dumps(read(out / "summary.json") | {"final": None}))
    run(*push)
    assert "train.jsonl" not in hub.files("dataset", "org/quiz")
    assert "adapter_model.safetensors" not in hub.files("model", "org/quiz")
    assert "mine.txt" in hub.files("model", "org/quiz")


@pytest.mark.parametrize("answer", [b"<html>", {}, {"commitUrl": "here", "commitOid": "1", "hookOutput": ""}])
def test_an_answer_that_cannot_be_read_is_said(hub, run, finished, monkeypatch, answer):
    monkeypatch.setattr(hub, "commit", lambda *given: answer)
    complaint = run("push", finished / "out", "--repo_id", "org/quiz", ends=2)
    assert "org/quiz: the Hub cannot be used" in complaint
    assert "Traceback" not in complaint


def test_without_a_login_it_is_said_before_anything_is_trained(hub, run, project):
    flags = ("select", "--config", project / "run.yaml", "--push_to_hub", "true")
    assert "expected hub_model_id: org/name" in run(*flags, ends=2)
    refusal = run(*flags, "--hub_model_id", "org/quiz", ends=2, HF_TOKEN="hf_wrongwrongwrongwrong")
    assert "type hf auth login, or set HF_TOKEN" in refusal
    assert not (project / "out").exists()
    run(*flags, "--hub_model_id", "org/quiz")
    assert set(hub.repositories) == {("model", "org/quiz"), ("dataset", "org/quiz")}
    model, data = published(hub)
    for text in ((project / "out" / "recipe.yaml").read_bytes(), model["config.yaml"], data["recipe.yaml"]):
        assert b"push_to_hub" not in text  # or whoever trains by it would push here
        assert b"hub_model_id" not in text


def test_hub_datasets_and_models_are_pinned_to_their_commits(hub, run, project):
    config = yaml.safe_load((project / "run.yaml").read_text())
    rows = (project / "alpha.jsonl").read_bytes()
    data = serve(hub, "dataset", "org/alpha", "a" * 40, {"train.jsonl": rows})
    serve(hub, "model", "org/pico", "b" * 40, contents(Path(config["model_name_or_path"])))
    config["candidates"]["alpha"] = {"path": "org/alpha", "required": True}
    config["model_name_or_path"] = "org/pico"
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    run("search", "--config", project / "run.yaml")
    manifest = read(project / "out" / "mixture" / "manifest.json")
    assert manifest["sources"]["alpha"]["source"]["revision"] == "a" * 40
    recipe = yaml.safe_load((project / "out" / "recipe.yaml").read_text())
    assert (recipe["model_name_or_path"], recipe["model_revision"]) == ("org/pico", "b" * 40)
    # What comes later does not change a run that is resumed from its own configuration.
    data.commits.append(("c" * 40, {"train.jsonl": rows[: len(rows) // 2]}))
    run("search", "--config", project / "out" / "config.yaml")


KINDS = {"lora": (), "full": ("--expert", "full", "--learning_rate", "1e-3")}
CARD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import hf_hub_download
code = open(hf_hub_download("org/quiz", "README.md")).read().split("```python\\n")[1].split("```")[0]
"""
# The example of a card, run with other texts or images than it names.
USE = f"""{CARD}
rows = load_dataset(sys.argv[1].split(".")[-1].replace("jsonl", "json"), data_files=sys.argv[1], split="train")
column, given = ("text", '["a text"]') if "text" in rows.column_names else ("image", '[Image.open("picture.png")]')
assert code.count(given) == 1
found = {{"given": rows[column][:]}}
exec(code.replace(given, "given"), found)
told = {{"labels": found["labels"], "probabilities": found["probabilities"].tolist(), "right": rows["label"][:]}}
print(json.dumps(told | {{"rows": len(load_dataset("org/quiz", split="train"))}}))
"""
WEIGHTS = f"""{CARD}
found = {{}}
exec(code, found)
print(json.dumps({{name: float(one.double().abs().sum()) for name, one in found["model"].state_dict().items()}}))
"""


def logprobs(told: str, closed: bool = False) -> list[float]:
    """Of every row's label, among those of all rows, or of a label space that is given."""
    found = json.loads(told.splitlines()[-1])
    among = [found["labels"].index(label) for label in (found["labels"] if closed else sorted(set(found["right"])))]
    scores = torch.tensor(found["probabilities"]).log()[:, among].log_softmax(1)
    return [
        float(one[among.index(found["labels"].index(label))]) for one, label in zip(scores, found["right"], strict=True)
    ]


def scores(out: Path) -> list[tuple]:
    return [(one["key"], one["score"]) for one in trials(out)]


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
        serve(hub, "model", "org/base", "b" * 40, contents(Path(given["model_name_or_path"])))
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
    [("names", "lora"), ("vit", "full"), ("own", "full"), ("siglip", "lora")],
)
def test_a_classifier_is_pushed_and_classifies_as_its_card_says(
    request, hub, forks, run, published_run, tmp_path, monkeypatch, what, kind
):
    config, rows = published_run(what)
    out, images, named = tmp_path / "out", rows.suffix == ".parquet", what not in ("own", "vit")
    run("select", "--config", config, *KINDS[kind], "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    model, data = published(hub, tmp_path)
    file = "train.parquet" if images else "train.jsonl"
    assert data[file] == (out / "mixture" / file).read_bytes()
    assert ("head.safetensors" in model, "head.safetensors" in data) == (named, named)
    expert = "delta.safetensors" if kind == "full" else "adapter_model.safetensors"
    for path in (out / "adapters").iterdir():
        assert model[f"adapters/{path.name}/{expert}"] == (path / expert).read_bytes()
    task = f"{'image' if images else 'text'}-classification"
    card, readme = metadata(model), model["README.md"].decode()
    assert card["library_name"] == ("transformers" if kind == "full" else "peft")
    assert card["pipeline_tag"] == card["model-index"][0]["results"][0]["task"]["type"] == task
    assert {"lora", "sft", "trl"} & set(card["tags"]) == ({"lora"} if kind == "lora" else set())
    assert ("adapter" in readme.split("---")[2].replace("adapters/", "")) == (kind == "lora")
    assert ("take the softmax over those that may" in readme) == (named or what == "own")
    assert ("; a choice among blue, green" in readme) == (what == "own")
    card = metadata(data)
    assert card["task_categories"] == [task]
    assert card["configs"] == [{"config_name": "default", "data_files": file}]
    # Classified by what the card says, with what is on the Hub alone, it scores what the run says of its final model.
    used = run(rows, code=USE)
    found = logprobs(used, closed=what == "vit")
    assert sum(found) / len(found) == pytest.approx(read(out / "summary.json")["final"]["validation"], abs=2e-5)
    assert json.loads(used.splitlines()[-1])["rows"] == json.loads(data["manifest.json"])["rows"]
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
    monkeypatch.chdir(copy)
    done = forks.run(ROOT / "recipes" / "classify.py", "--config", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    ours, theirs = load(model[file]), load_file(copy / "trained-by-recipe" / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in ours)
    if what in ("names", "vit"):  # one of each task: a search elsewhere takes the bank and scores the same
        key = "experts" if kind == "full" else "adapters"
        again = ("--output_dir", tmp_path / "again")
        printed = run("search", "--config", config, *KINDS[kind], f"--{key}", "org/quiz", *again)
        assert f"took 3 {key} that were trained elsewhere" in printed
        assert scores(out) == scores(tmp_path / "again")


@pytest.mark.parametrize("kind", KINDS)
def test_before_there_is_a_final_model_an_expert_is_used(hub, run, published_run, tmp_path, kind):
    config, rows = published_run("names")
    run("search", "--config", config, *KINDS[kind])
    run("push", tmp_path / "out", "--repo_id", "org/quiz")
    assert "head.safetensors" in hub.files("model", "org/quiz")
    assert "model.safetensors" not in hub.files("model", "org/quiz")
    best = read(tmp_path / "out" / "summary.json")["best"]["mixture"]
    single = lines(tmp_path / "out")[frozenset({next(iter(best))})]
    assert logprobs(run(rows, code=USE)) == pytest.approx(single["logprobs"], abs=2e-5)


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
    run("select", "--config", config, "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    used = run(rows, code=USE)
    assert set(json.loads(used.splitlines()[-1])["labels"]) == set(labels)
    assert yaml.safe_load(hub.files("model", "org/quiz")["config.yaml"])["labels"] == labels
    found, summary = logprobs(used, closed=True), read(tmp_path / "out" / "summary.json")
    assert sum(found) / len(found) == pytest.approx(summary["final"]["validation"], abs=2e-5)


def test_a_full_causal_lm_is_pushed_whole_and_taken_away_whole(hub, run, project, tmp_path, pico):
    serve(hub, "model", "org/base", "b" * 40, contents(pico))
    config, out = project / "run.yaml", project / "out"
    given = yaml.safe_load(config.read_text()) | {"model_name_or_path": "org/base", "expert": "full"}
    for one in given["candidates"].values():
        one["license"] = "cc-by-4.0"
    config.write_text(yaml.safe_dump(given))
    run("select", "--config", config, "--push_to_hub", "true", "--hub_model_id", "org/quiz")
    model = hub.files("model", "org/quiz")
    training = json.loads(model["training.json"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(training["files"])
    assert {name: len(model[name]) for name in training["files"]} == {
        name: one["bytes"] for name, one in training["files"].items()
    }
    final = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    sums = {name: float(one.double().abs().sum()) for name, one in final.items()}
    assert json.loads(run(code=WEIGHTS).splitlines()[-1]) == pytest.approx(sums, rel=1e-12)
    # The final model is one that others may take as an expert; the bank beside it is then not asked for.
    hub.requests.clear()
    config.write_text(yaml.safe_dump(given | {"experts": {"alpha": "org/quiz"}}))
    assert "imported 1 fine-tune:" in run("search", "--config", config, "--output_dir", tmp_path / "taken")
    assert not [one for one in hub.requests if "delta.safetensors" in one]
    config.write_text(yaml.safe_dump(given))
    again = ("--experts", "org/quiz", "--output_dir", tmp_path / "again")
    assert "took 3 experts that were trained elsewhere" in run("search", "--config", config, *again)
    assert scores(out) == scores(tmp_path / "again")
    # Without a final model nothing of the earlier one stays, and what is somebody else's does.
    hub.files("model", "org/quiz")["model_of_mine.txt"] = b"kept"
    (out / "summary.json").write_text(json.dumps(read(out / "summary.json") | {"final": None}))
    run("push", out, "--repo_id", "org/quiz")
    left = set(hub.files("model", "org/quiz"))
    assert not left & set(training["files"])
    assert {"config.yaml", "model_of_mine.txt", "adapters/alpha/delta.safetensors"} <= left


def test_an_expert_that_is_no_model_is_told_from_a_bank(tmp_path):
    with pytest.raises(InputError, match=r"no config.json; expected a fine-tuned model.*set experts: org/name"):
        fetch_expert(str(tmp_path), "experts")
