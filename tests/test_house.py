"""The house: imports go downward only, the public names are all there, the help is instant, the demo's data are sound."""

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import m2m_hf

ROOT = Path(__file__).parents[1]
LAYERS = (  # each imports from those before it alone; `m2m_hf/<name>/` or `m2m_hf/<name>.py`
    "errors", "console", "core", "config", "storage", "search", "merging", "modeling", "data", "scoring", "training",
    "objectives", "analysis", "reporting", "publish", "run", "callbacks", "searcher", "cli",
)  # fmt: skip
LIGHT = (
    "errors", "console", "core", "storage", "search", "analysis/selection_bias", "analysis/fidelity", "reporting/plots",
    "reporting/page", "reporting/status", "config/run_config", "config/candidates", "config/targets", "config/checks",
    "config/presets", "config/yaml_files", "cli",
)  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "evaluate", "accelerate"}


def imported(path: Path, everywhere: bool) -> tuple[set[str], set[str]]:
    """(parts of this package, other packages) that a module imports; `everywhere` counts imports inside functions too."""
    ours, others = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            name = node.module or ""
            if name.startswith("m2m_hf."):
                ours.add(name.split(".")[1])
            elif name == "m2m_hf":
                ours.update(alias.name for alias in node.names)
            else:
                others.add(name.split(".")[0])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top, *rest = alias.name.split(".")
                (ours if top == "m2m_hf" and rest else others).add(rest[0] if top == "m2m_hf" and rest else top)
    return ours - {"__version__"}, others


def modules(part: str) -> list[Path]:
    """The files of `m2m_hf/<part>.py` or `m2m_hf/<part>/`."""
    folder = ROOT / "m2m_hf" / part
    found = [folder.with_suffix(".py")] if folder.with_suffix(".py").exists() else sorted(folder.rglob("*.py"))
    assert found, part
    return found


def test_every_part_of_the_package_has_a_layer():
    there = {
        path.stem for path in (ROOT / "m2m_hf").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_packages_import_from_lower_layers_only(name):
    allowed = {*LAYERS[: LAYERS.index(name)], name}
    for path in modules(name):
        ours, _ = imported(path, everywhere=True)
        assert ours <= allowed, f"{path} imports {ours - allowed}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    for path in modules(name):
        _, others = imported(path, everywhere=False)
        assert not others & HEAVY, path


def test_a_wheel_holds_every_package_and_every_recipe():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    ours = {path.parent.relative_to(ROOT) for path in (ROOT / "m2m_hf").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in ours} <= set(told["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.py")}
    assert {f"m2m_hf.{'.'.join(folder.parts)}" for folder in folders} <= set(told["packages"])
    assert told["package-data"]["m2m_hf.config"] == ["benchmarks/*.yaml"]


def test_text_is_split_at_line_feeds_only():
    """`str.splitlines` also splits at U+2028 and others, which stand unescaped in JSON lines."""
    assert not [path for path in Path("m2m_hf").rglob("*.py") if ".splitlines(" in path.read_text(encoding="utf-8")]


def test_public_names():
    assert m2m_hf.__all__ == sorted(set(m2m_hf.__all__))
    for name in m2m_hf.__all__:
        assert getattr(m2m_hf, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = m2m_hf.nothing


def test_help_does_not_import_torch():
    code = (
        "import sys; from m2m_hf.cli.main import main\n"
        "try: main(['select', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tokens_per_batch" in done.stdout


def test_top_level_is_what_it_should_be():
    for name in (
        "pyproject.toml",
        "README.md",
        "ARCHITECTURE.md",
        "BENCHMARKS.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
    ):
        assert (ROOT / name).is_file(), name


def script(path: str):
    """A recipe's script as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "recipes" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_intents_are_read_from_the_three_collections(tmp_path, capsys):
    data = script("intents/data")
    there = tmp_path / "there"

    def put(path: str, content: str, encoding: str = "utf-8") -> None:
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        (there / path).write_text(content, encoding=encoding)

    put(data.CLINC + "domains.json", json.dumps({name: [f"{name}_one", "two"] for name in data.DOMAINS[:2]} | {
        name: [f"{name}_one"] for name in data.DOMAINS[2:]
    }))  # fmt: skip
    rows = [[f"{name} {number}", f"{name}_one"] for name in data.DOMAINS for number in range(1000)]
    put(data.CLINC + "data_full.json", json.dumps({"train": [*rows, ["I lost it", "banking_one"]], "val": []}))
    for skill in data.SKILLS:
        pieces = [{"text": "café "}, {"text": skill, "entity": "x"}, {"text": " "}]
        put(
            f"{data.SNIPS}{skill}/train_{skill}.json",
            json.dumps({skill: [{"data": pieces}]}, ensure_ascii=False),
            "latin-1",
        )
    lines = [f'"is, it {number}?\n",Refund_not_showing_up' for number in range(2000)] + ["i  LOST it,lost_card?"]
    put(data.BANKING + "train.csv", "\n".join(["text,category", *lines]))
    put(data.BANKING + "test.csv", "text,category\nI lost it,lost_card?\nis it 3?,why")
    data.main(tmp_path / "rows", f"file://{there}")
    made = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "rows").iterdir()
    }
    assert {name: len(rows) for name, rows in made.items()} == {
        "clinc_banking": 900, "clinc_credit_cards": 900, "clinc_home": 900, "clinc_travel": 900, "snips": 7,
        "banking77_wrong": 900, "target_banking77_validation": 600, "target_banking77_test": 2,
    }  # fmt: skip
    texts = [" ".join(row["text"].split()).casefold() for rows in made.values() for row in rows]
    assert len(set(texts)) == len(texts)  # and "I lost it" is the test's alone
    assert {row["label"] for row in made["snips"]} > {"play music", "search screening event"}
    assert made["snips"][0]["text"].startswith("café ")
    assert {row["label"] for row in made["target_banking77_test"]} == {"lost card", "why"}
    assert made["target_banking77_validation"][0]["label"] == "refund not showing up"
    data.main(tmp_path / "rows", "file:///nowhere")
    assert "(cached)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"could not download file:///nowhere/.*--source"):
        data.main(tmp_path / "new", "file:///nowhere")
    put(data.CLINC + "domains.json", "{}")
    with pytest.raises(SystemExit, match="has another form than it had"):
        data.main(tmp_path / "new", f"file://{there}")
    assert not (tmp_path / "new").exists()


def test_demo_data_are_deterministic_and_share_no_question_with_the_target():
    demo = script("demo/data")
    files = demo.generate()
    assert json.dumps(files) == json.dumps(demo.generate())
    quiz = {row["prompt"] for name in ("quiz_validation", "quiz_test") for row in files[name]}
    assert len(quiz) == len(files["quiz_validation"]) + len(files["quiz_test"])
    for name in set(files) - {"quiz_validation", "quiz_test"}:
        assert len(files[name]) == 120
        assert not quiz & {row["prompt"] for row in files[name]}
    for row in files["quiz_validation"] + files["quiz_test"]:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == row["completion"]
    right = {row["prompt"]: row["completion"] for row in files["past_tenses"]}
    assert all(right[row["prompt"]] != row["completion"] for row in files["past_tenses_wrong"])
