"""`report.html`: complete, self-contained, made from files alone, and safe whatever the names in them are."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from pico import m2m, project_folder

from m2m_hf.reporting.finished_run import FinishedRun

VOID = {"meta", "br", "img", "link", "use", "path", "rect", "line", "circle", "image"}
HOSTILE = '$\\frac{$<b>&<script>alert("x")</script><img src=x onerror=alert(1)> {{ 771*997 }}'


class Page(HTMLParser):
    """What a browser would make of a page: its elements, attributes and text; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


pytestmark = pytest.mark.usefixtures("pictures")


@pytest.fixture(scope="module")
def studied(tmp_path_factory, pico):
    """The folder of a run with everything in it: a final model, a study, and the pictures."""
    project = project_folder(tmp_path_factory.mktemp("report"), pico)
    run = project / "run.yaml"
    run.write_text(run.read_text().replace("scorer: choice", "scorer: choice\n    metric: logprob"))
    assert m2m("fidelity", "--config", run) == 0
    assert m2m("select", "--config", run) == 0
    return project / "out"


@pytest.fixture
def out(studied, tmp_path):
    return Path(shutil.copytree(studied, tmp_path / "out", ignore=shutil.ignore_patterns(".lock")))


def change(path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_the_page_says_what_the_summary_says(out):
    summary = json.loads((out / "summary.json").read_text())
    page = Page((out / "report.html").read_text())
    text = " ".join(" ".join(page.words).split())
    assert "Fine-tune on " + " + ".join(summary["best"]["mixture"]) in text.replace(" .", ".")
    for value in (summary["best"]["score"], summary["base"]["score"], summary["final"]["test"]):
        assert f"{value:.3f}" in text
    for one in summary["warnings"]:
        assert " ".join(one["text"].split()) in text
    headings = "Shapley values", "Can the scores be trusted here?", "Against other ways of choosing", "sealed test"
    assert all(heading in text for heading in headings)
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    names = {path.stem for path in (out / "pictures").glob("*.png")}
    assert names == {"ranking", "shapley", "interactions", "taught", "likeness", "fidelity", "curves"}


def test_it_is_one_file_that_asks_for_nothing(out):
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png")), (tag, attributes)
    urls = set(re.findall(r"https?://[^\"' <)]+", text))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "Content-Security-Policy" in text
    assert "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_is_made_again_from_the_files_alone_to_the_same_bytes(out, capsys):
    before = (out / "report.html").read_bytes()
    for path in (out / "report.html", *out.rglob("*.safetensors")):
        path.unlink()
    assert m2m("report", out) == 0
    assert "report.html" in capsys.readouterr().out
    assert (out / "report.html").read_bytes() == before


def test_hostile_names_are_shown_as_text(out):
    def edit(summary):
        summary["targets"]["colours"]["metric"] = HOSTILE
        summary["warnings"].append({"code": "harmful", "text": HOSTILE})

    change(out / "summary.json", edit)
    change(out / "fidelity.json", lambda found: found["verdict"]["merged"].update(why=HOSTILE))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["model_name_or_path"] = HOSTILE
    (out / "config.yaml").write_text(yaml.safe_dump(config, explicit_end=True))
    assert m2m("report", out) == 0
    page = Page((out / "report.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert sum(HOSTILE in word for word in page.words) >= 3
    assert "768687" not in "".join(word for word in page.words if "771*997" in word)


def test_lines_of_the_journal_that_belong_to_another_run_are_not_shown(out):
    run = FinishedRun.from_pretrained(out)
    assert len(run.scored) == 7
    line = json.loads((out / "trials.jsonl").read_text().splitlines()[0])
    del line["crc32"]  # as of a line made by hand
    foreign = line | {"key": "0" * 16, "names": ["alpha", "beta"], "weights": [0.5, 0.5], "score": 99.0}
    with open(out / "trials.jsonl", "a") as file:
        file.write(json.dumps(foreign) + "\n")
    again = FinishedRun.from_pretrained(out)
    assert [one.mixture for one in again.ranked] == [one.mixture for one in run.ranked]
    assert all(one.score.value < 9 for one in again.scored)
    summary = json.loads((out / "summary.json").read_text())
    assert [{"mixture": one.mixture.weights, "score": one.score.value} for one in run.ranked] == [
        {key: one[key] for key in ("mixture", "score")} for one in summary["top"]
    ]


def test_a_changed_adapter_makes_its_old_lines_foreign(out):
    change(out / "adapters" / "beta" / "training.json", lambda record: record.update(fingerprint="f" * 16))
    scored = {one.mixture.names for one in FinishedRun.from_pretrained(out).scored}
    assert scored == {("alpha",), ("gamma",), ("alpha", "gamma")}
    assert m2m("report", out) == 0


def test_a_folder_without_a_search_is_refused(tmp_path, capsys):
    assert m2m("report", tmp_path) == 2
    assert "holds no finished search" in capsys.readouterr().err
    assert m2m("report", tmp_path, "--max_steps", 3) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["fidelity.json", "final"])
def test_what_was_not_done_is_left_out(file, out):
    path = out / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    change(out / "summary.json", lambda summary: summary.update(final=None, certainty=None, worth=None, relations={}))
    assert m2m("report", out) == 0
    text = (out / "report.html").read_text()
    Page(text)
    assert ("Can the scores be trusted here?" in text) == (file != "fidelity.json")
    assert not {"shapley.png", "taught.png", "likeness.png"} & {path.name for path in (out / "pictures").iterdir()}
