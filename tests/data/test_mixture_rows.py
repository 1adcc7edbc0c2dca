"""A mixture as rows: the same bytes every time, and the texts that a recipe trains on."""

import json

from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pico import candidate_rows

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.core.mixture import Mixture
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.data.mixture_rows import write_mixture
from m2m_hf.data.rows import Candidate


def load(candidates: dict, tokenizer) -> dict[str, Candidate]:
    configs = {name: CandidateConfig(DataConfig(rows=Dataset.from_list(rows))) for name, rows in candidates.items()}
    return load_causal_lm_data(configs, {}, tokenizer, seed=0, max_length=64, assistant_only_loss=False).candidates


def test_mixture_is_written_the_same_every_time(tokenizer, tmp_path):
    candidates = load({name: candidate_rows(name) for name in ("a", "b", "c")}, tokenizer)
    mixture = Mixture.subset(["a", "c"])
    first = write_mixture(tmp_path / "1", mixture, candidates, seed=3)
    second = write_mixture(tmp_path / "2", mixture, dict(reversed(candidates.items())), seed=3)
    assert first.read_bytes() == second.read_bytes()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    union = candidate_rows("a") + candidate_rows("c")
    assert sorted(rows, key=str) == sorted(union, key=str)
    assert rows != union
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["rows"] == 24
    assert manifest["sources"]["a"]["weight"] == 0.5


DATES = st.sampled_from(["2024-01-01", "2024-01-01 00:00:00", "2024-01-01T00:00:00Z"])
ODD = st.sampled_from(["1", "1e5", "0" * 30, "null", "a\u2028b\x85c\x00", "\r\n", "[]", "{}", "\u00e9"])


@given(rows=st.lists(st.tuples(DATES | ODD, DATES) | st.tuples(ODD, ODD), min_size=1, max_size=3), turns=st.booleans())
@example(rows=[("q", "2024-01-01"), ("q", "2024-01-02")], turns=False)
@example(rows=[("2024-01-01", "2024-01-01")], turns=True)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recipe_trains_on_the_texts_that_the_run_has(tokenizer, tmp_path, rows, turns):
    made = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    if turns:
        made = [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
            for prompt, completion in rows
        ]
    candidates = load({"a": made}, tokenizer)
    train = write_mixture(tmp_path, Mixture.subset(["a"]), candidates, seed=0)
    builder = {".jsonl": "json"}.get(train.suffix, "parquet")
    read = load_dataset(builder, data_files=str(train), split="train")
    assert sorted(read.to_list(), key=str) == sorted(candidates["a"].rows.to_list(), key=str)
    assert {path.name for path in tmp_path.iterdir()} == {train.name, "manifest.json"}
