"""Property-based fuzzing: whatever is put into configurations, rows, journals and adapter folders, no traceback reaches the user.

A few cases in every test run; `make fuzz` tries thousands.
"""

import copy
import json
import os
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import DEVICE, build_adapter, build_model, candidate_rows, choice_rows
from safetensors.torch import load_file, save_file

from m2m_hf.config.parsing import KEYS, parse
from m2m_hf.console import Terminal
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.searcher import MergeToMixSearcher
from m2m_hf.storage.journal import Journal

common = {
    "deadline": timedelta(seconds=30),  # nothing hangs
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=12, derandomize=True, database=None, **common)
settings.register_profile("full", max_examples=500, **common)
settings.load_profile(os.environ.get("M2M_FUZZ", "quick"))

ODD = [
    "", " ", "..", "../../etc/passwd", "/", "a/b", "nan", "-1", "é\u202e", "\x00", "\ud800", "a" * 300, "{x}", "$(touch x)",
    "null", "true",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**30, -(10**30), 2**31, 0.5, -0.5, 1e308]),
    st.floats(), st.sampled_from(ODD), st.text(max_size=12),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree):
    """(mapping or list, key or index) of everything below the root of a tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


@st.composite
def changed(draw, tree):
    """A tree with some of its places changed, removed or added to."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(list(places(root))))
        kind = draw(st.sampled_from(["change", "change", "remove", "add"]))
        if kind == "remove" and parent is not root:
            del parent[key]
        elif kind == "add" and isinstance(parent[key], dict):
            parent[key][draw(st.text(max_size=8))] = draw(VALUES)
        else:
            parent[key] = draw(VALUES)
    return root[0]


WRONG_INPUT = suppress(InputError)  # the only thing that may be said


@pytest.fixture
def configuration(project):
    return yaml.safe_load((project / "run.yaml").read_text())


def as_yaml(tree) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


@given(data=st.data())
def test_configurations(configuration, project, data):
    tree = data.draw(changed(configuration))
    path = project / "fuzz.yaml"
    path.write_text(as_yaml(tree), encoding="utf-8", errors="surrogatepass")
    with WRONG_INPUT:
        MergeToMixSearcher(*parse(path), Terminal(quiet=True)).check()


@given(name=st.sampled_from(sorted(KEYS)), value=VALUES)
def test_every_field(configuration, project, name, value):
    path = project / "fuzz.yaml"
    path.write_text(as_yaml(configuration | {name: value}), encoding="utf-8", errors="surrogatepass")
    with WRONG_INPUT:
        parse(path)


@given(flags=st.lists(st.one_of(st.sampled_from([f"--{name}" for name in KEYS]), SCALARS.map(str)), max_size=4))
def test_flags(project, flags):
    with WRONG_INPUT:
        parse(project / "run.yaml", flags)


@given(
    text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
)
def test_files_that_are_no_configuration(project, text):
    path = project / "fuzz.yaml"
    path.write_bytes(text)
    with WRONG_INPUT:
        parse(path)


ROW = candidate_rows("alpha", 1)[0]
CHAT = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}
QUESTION = choice_rows(1)[0]


@st.composite
def files_of_rows(draw, rows):
    """A file of rows, some of them odd; now and then not JSON at all."""
    lines = []
    for row in rows:
        odd = draw(st.one_of(st.just(row), changed(row), VALUES))
        lines.append(json.dumps(odd).encode())
    if draw(st.booleans()):
        lines.append(draw(st.binary(max_size=20)))
    return b"\n".join(lines)


def check(project, **files) -> None:
    """A run's check with other rows."""
    for name, content in files.items():
        (project / f"{name}.jsonl").write_bytes(content)
    with WRONG_INPUT:
        MergeToMixSearcher(*parse(project / "run.yaml"), Terminal(quiet=True)).check()


@given(content=files_of_rows([ROW, ROW, CHAT]))
def test_rows_of_candidates(project, content):
    check(project, alpha=content)


@given(
    content=files_of_rows([QUESTION, QUESTION]),
    scorer=st.sampled_from(["choice", "classification", "loss", "generation", "preference"]),
)
def test_rows_of_targets(project, configuration, content, scorer):
    configuration["targets"]["colours"]["scorer"] = scorer
    (project / "run.yaml").write_text(as_yaml(configuration))
    check(project, validation=content, test=content)


LINE = Trial("k", Mixture.subset("ab"), "merged", "t", 2, "complete", Score.of([0.0, 1.0], [-1.0, -2.0]), 1.0).to_json()


@given(records=st.lists(st.one_of(changed(LINE), VALUES), max_size=3), rest=st.binary(max_size=20))
def test_journals(tmp_path, records, rest):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in [LINE, *records]) + rest)
    (tmp_path / "trials.values").write_bytes(b"12345678" * 3)
    with WRONG_INPUT:
        journal = Journal(path)
        for trial in journal.trials.values():
            assert trial.score is None or trial.score.finite
        journal.append(Trial("new", Mixture.subset("a"), "merged", "t", 2, "failed", None, 1.0, "why"))
        assert Journal(path).get("new")


@given(data=st.data())
def test_adapter_folders(tmp_path_factory, adapter_folder, data):
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(adapter_folder, folder)
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    kind = data.draw(st.sampled_from(["config", "config", "bytes", "tensors"]))
    if kind == "config":
        config.write_text(json.dumps(data.draw(changed(json.loads(config.read_text())))))
    elif kind == "bytes":
        path = data.draw(st.sampled_from([config, weights]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, min(len(content) - 1, 2000)))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    else:
        tensors = load_file(weights)
        name = data.draw(st.sampled_from(sorted(tensors)))
        new = data.draw(st.sampled_from(["nan", "wide", "scalar", "gone", "renamed", "integers", "empty"]))
        one = tensors.pop(name)
        other = {
            "nan": one * float("nan"), "wide": torch.ones(3, 5), "scalar": torch.tensor(1.0), "integers": one.int(),
            "empty": one[:0],
        }  # fmt: skip
        if new == "renamed":
            tensors["base_model.model.nowhere.lora_A.weight"] = one
        elif new != "gone":
            tensors[name] = other[new].contiguous()
        save_file(tensors, weights)
    with WRONG_INPUT:
        adapters = {"a": Adapter.load(folder), "b": Adapter.load(adapter_folder)}
        stack = GatedStack(build_model("llama"), adapters)
        stack.set({"a": 0.5, "b": 0.5})
        with torch.inference_mode():
            logits = stack.model(input_ids=torch.tensor([[1, 2, 3]], device=DEVICE)).logits
        assert logits.isfinite().all()
        write_adapter(folder.with_name("merged"), adapters, {"a": 0.5, "b": 0.5}, "base")


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory) -> Path:
    return build_adapter("llama", tmp_path_factory.mktemp("adapter") / "a", 1)
