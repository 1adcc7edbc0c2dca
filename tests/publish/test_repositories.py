"""What the Hub's repositories hold, and what stays on this machine."""

import json

import pytest
import yaml

from m2m_hf.errors import InputError
from m2m_hf.publish.repositories import plan, published, row_licenses
from m2m_hf.storage.run_folder import RunFolder


@pytest.mark.parametrize(
    ("licenses", "words"),
    [
        (("mit", None), "the license of beta (none given) is not known to permit it"),
        (("mit", "cc-by-nd-4.0"), "the license of beta (cc-by-nd-4.0) is not known to permit it"),
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
    assert "rows not published" in data.notes[0]
    card = yaml.safe_load(data.files["README.md"].decode().split("---")[1])
    assert card["viewer"] is False
    assert card["license"] == "other"


@pytest.mark.parametrize("name", ["quiz", "org/quiz/x", "../quiz", "org/qu iz", "org/", "", "org/a--b", "org/x.git"])
def test_names_that_are_none(finished, name):
    with pytest.raises(InputError, match="repo_id: "):
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
