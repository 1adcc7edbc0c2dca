"""Every command, configuration and piece of Python in README and docs runs, as it stands there, where it can run here."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hub_server import Repository
from pico import ROOT, candidate_rows, choice_rows, intent_rows, write_rows

from m2m_hf.cli.launch import relaunched

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TRAINER = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
rows = load_dataset("json", data_files="data/openbookqa.jsonl", split="train")
args = SFTConfig("runs/any", max_steps=1, report_to="none", use_cpu=not torch.cuda.is_available())
trainer = SFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args, train_dataset=rows, peft_config=LoraConfig(r=2))
"""
CHECK = """
import sys
from m2m_hf.searcher import MergeToMixSearcher
from m2m_hf.config.parsing import parse
from pathlib import Path
MergeToMixSearcher(*parse(Path(sys.argv[1]))).check()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands behind the fence, and its text."""

    language: str
    words: tuple[str, ...]
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for fence, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        language, *words = fence.split() or [""]
        found.append(Block(language, tuple(words), text))
    return found


def commands(text: str) -> list[str]:
    """The lines of a shell block, without what is said behind them."""
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def world(tmp_path, monkeypatch, hub, forks, pico, encoder, reward_model):
    """A folder with the data that the pages speak of, a Hub with their model and dataset, and a way to run Python there."""
    (tmp_path / "data").mkdir()
    shutil.copytree(reward_model, tmp_path / "models" / "reward")
    for name in ("openbookqa", "mawps", "chat", "sums_validation", "chat_validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", candidate_rows(name, 12))
    write_rows(tmp_path / "data" / "arc_validation.jsonl", choice_rows(12))
    write_rows(
        tmp_path / "data" / "pairs.jsonl", [{"chosen": f"red {n} one", "rejected": f"red {n} two"} for n in "abc"]
    )
    followed = [{"prompt": f"Name {n}.", "checks": [{"id": "punctuation:no_comma"}]} for n in range(8)]
    write_rows(tmp_path / "data" / "instructions.jsonl", followed)
    write_rows(tmp_path / "data" / "arc_test.jsonl", choice_rows(8, start=200))
    write_rows(tmp_path / "data" / "arc_train.jsonl", choice_rows(8, start=300))
    shutil.copy(tmp_path / "data" / "arc_validation.jsonl", tmp_path / "quiz.jsonl")
    leaking = [{"prompt": row["prompt"], "completion": row["choices"][row["answer"]]} for row in choice_rows(12)]
    write_rows(tmp_path / "data" / "leaking.jsonl", leaking)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    asked = [{"role": "user", "content": "Is it late?"}, call, {"role": "tool", "content": "23:50"}]
    asking = {"messages": [*asked, {"role": "assistant", "content": "Yes."}], "tools": [{"name": "now"}]}
    write_rows(tmp_path / "data" / "tools.jsonl", [asking] * 8)
    mixed = [row | {"source": word} for word in ("flan", "math") for row in candidate_rows(word, 8)]
    write_rows(tmp_path / "data" / "mixed.jsonl", mixed)
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = hub.repositories["model", MODEL] = Repository(False)
    model.commits.append(("b" * 40, {path.name: path.read_bytes() for path in pico.iterdir()}))
    for name, labels in (("banking", ["card arrival", "lost card"]), ("travel", ["book a flight", "weather"])):
        write_rows(tmp_path / "data" / f"{name}.jsonl", intent_rows(labels, 12))
    for number, part in enumerate(("validation", "test")):
        asked = intent_rows(["card arrival", "top up"], 8, 100 * (number + 1))
        write_rows(tmp_path / "data" / f"requests_{part}.jsonl", asked)
    hub.repositories["model", ENCODER] = Repository(False)
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    hub.repositories["model", ENCODER].commits.append(("c" * 40, files))
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in candidate_rows("gsm8k", 12)]
    write_rows(tmp_path / "gsm8k.jsonl", rows)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    card = f"---\n{yaml.safe_dump({'configs': [{'config_name': 'main', 'data_files': files}]})}---\n".encode()
    data = hub.repositories["dataset", "openai/gsm8k"] = Repository(False)
    held = (tmp_path / "gsm8k.jsonl").read_bytes()
    test = held.replace(b"gsm8k", b"others")
    data.commits.append(("a" * 40, {"README.md": card, "train.jsonl": held, "test.jsonl": test}))
    (tmp_path / "x.yaml").write_text(configuration())
    given = yaml.safe_load(configuration())
    for name, candidate, file in (
        ("leaking", "leaking", "data/leaking.jsonl"),
        ("columns", "renamed", "gsm8k.jsonl"),
        ("tools", "tools", "data/tools.jsonl"),
    ):
        other = {candidate: {"path": "json", "data_files": file}}
        text = yaml.safe_dump(given | {"candidates": given["candidates"] | other, "output_dir": f"runs/{name}"})
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = forks.run(*arguments, **environment)
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def configuration() -> str:
    """The configuration that stands in the README."""
    (text,) = [block.text for block in blocks(ROOT / "README.md") if block.words == ("x.yaml",)]
    return text


def run_command(world, line: str, code: int = 0, **environment: str) -> str:
    """Runs one line of a shell; what it says.

    What fetches, submits or serves is only looked at: make's rules, pip's requirements, what Slurm is given, other tools' names.
    Several processes are one here.
    """
    tool, *words = shlex.split(line)
    if words == ["init"]:
        code = 2  # it asks, and nobody is there
    if tool == "m2m":
        if any(word.startswith("--accelerate_config") for word in words):
            command = relaunched(words)
            words = command[command.index("m2m_hf.cli.main") + 1 :]
        done = world("-m", "m2m_hf.cli.main", *words, code=code, **environment)
        return done.stdout + done.stderr
    assert code == 0
    if tool == "accelerate":
        (place,) = [place for place, word in enumerate(words) if word.endswith(".py")]
        assert (ROOT / words[words.index("--config_file") + 1]).exists(), line
        world(ROOT / words[place], *words[place + 1 :])
    elif tool == "trl":
        assert words[:2] == ["sft", "--config"], line
        world("-m", "trl.scripts.sft", *words[1:])
    elif tool == "python":
        world(*words)
    elif tool == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif tool == "pip":
        assert words[0] == "install", line
        known = (ROOT / "pyproject.toml").read_text()
        for word in re.findall(r"m2m_hf\[(\w+)\]", line):
            assert f"{word} = [" in known, line
        for word in words[1:]:
            assert not word.endswith(".txt") or (ROOT / word).exists(), line
    elif tool == "sbatch":
        (script,) = [word for word in words if word.endswith(".sh")]
        subprocess.run(["bash", "-n", ROOT / script], check=True)
    else:
        assert (Path(sys.executable).parent / tool).exists(), f"{tool}: unknown to this test and not installed"
    return ""


def pattern(text: str) -> str:
    """A regular expression of a text in which … stands for anything."""
    return ".*?".join(map(re.escape, " ".join(text.split()).split("…")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(world, page):
    given = blocks(page)
    assert given, page
    if page.stem not in ("README", "quick_start", "targets", "trl_scripts"):
        run_command(world, "m2m select --config x.yaml")
    if page.stem in ("README", "report"):
        run_command(world, "m2m search --config x.yaml --output_dir runs/another")
    said = ""
    for block in given:
        if block.language == "yaml" and block.words:
            Path(block.words[0]).write_text(block.text)
        elif block.language == "yaml":
            whole = yaml.safe_load(configuration()) | yaml.safe_load(block.text) | {"output_dir": "runs/of_a_snippet"}
            Path("snippet.yaml").write_text(yaml.safe_dump(whole))
            world("-c", CHECK, "snippet.yaml")
        elif block.language == "python" and block.words:
            Path(block.words[0]).write_text(block.text)
            world(block.words[0])
        elif block.language == "python":
            needs = TRAINER if "trainer." in block.text and "trainer =" not in block.text else ""
            world("-c", needs + block.text)
        elif block.language == "bash":
            settings = dict(word.split("=") for word in block.words)
            code = int(settings.pop("exit", 0))
            said = "".join(run_command(world, line, code, **settings) for line in commands(block.text))
        elif block.language == "text":
            assert re.search(pattern(block.text), " ".join(said.split())), f"{block.text}\nbut\n{said}"
        else:
            assert not block.language, f"{page.name}: nothing is known of {block.language}"


def test_every_command_is_explained_somewhere(capsys):
    from m2m_hf.cli.help import make_parser

    told = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in make_parser()._subparsers._group_actions[0].choices:
        assert f"m2m {name}" in told, name


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                path, _, anchor = link.partition("#")
                found = page.parent / path if path else page
                assert found.exists(), f"{page.name}: {link}"
                titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
                assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], link
