"""The selection study: what it measures of a run, and what it says of ways of choosing."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations

import numpy as np
import pytest
from choosing import Problem, best_single, sequential, verified
from pico import ROOT, candidate_rows, choice_rows, write_rows


def recipe(name: str):
    spec = spec_from_file_location(f"selection_study_{name}", ROOT / "recipes" / "selection_study" / f"{name}.py")
    module = module_from_spec(spec)
    path = sys.path[0]
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path[0] = path
    return module


def problem(truth, said) -> Problem:
    """Three candidates, all seven mixtures; two validation rows."""
    members = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=bool)
    rows = {name: np.stack([scores, scores], 1) for name, scores in {"merged": said, "trained": truth}.items()}
    return Problem(members, {"merged": rows["merged"]}, rows["trained"], np.ones(3), np.zeros(3))


def test_fine_tuned_mixtures_are_counted_and_singles_are_not():
    truth = np.array([1.0, 0.5, 0.2, 0.7, 0.6, 3.0, 0.4])
    said = np.array([1.0, 0.5, 0.2, 0.9, 0.1, 0.8, 0.7])
    single, first, second = problem(truth, said), problem(truth, said), problem(truth, said)
    assert best_single(single) == 0
    assert single.asked == set()
    assert verified(["merged"], 2)(first) == 0  # all together, and what merging puts first of the larger ones
    assert first.asked == {3, 6}
    assert verified(["merged"], 2, with_all=False)(second) == 5
    assert second.asked == {3, 5}
    third = problem(truth, said)
    assert sequential(6)(third) == 5
    assert third.asked == {3, 4, 5, 6}


def test_a_run_becomes_a_table_that_is_replayed(tmp_path, pico, monkeypatch, capsys):
    folder = tmp_path / "data" / "colours"
    folder.mkdir(parents=True)
    write_rows(folder / "alpha.jsonl", candidate_rows("alpha", 8))
    write_rows(folder / "beta.jsonl", candidate_rows("beta", 4))
    write_rows(folder / "validation.jsonl", choice_rows(6))
    write_rows(folder / "test.jsonl", choice_rows(4, start=200))
    (tmp_path / "cases.toml").write_text(f"""
[colours]
model = "{pico.name}"
candidates = ["alpha", "beta"]
steps = 3
settings = {{ learning_rate = 1e-2, num_train_epochs = 1, per_device_train_batch_size = 4, bf16 = false }}
target = {{ scorer = "choice", metric = "logprob" }}
""")
    measure, tables = recipe("measure"), tmp_path / "tables"
    given = ["--cases", "cases.toml", "--data", "data", "--models", pico.parent, "--work", "work", "--tables", tables]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["measure.py", "colours", "--schedule", "steps", *map(str, given)])
    measure.main()
    with np.load(tables / "colours-steps-0.npz") as found:
        assert found["members"].tolist() == [[True, False], [False, True], [True, True]]
        assert found["merged.values"].shape == (3, 6)
        assert found["union.test.values"].shape == (3, 4)
        facts = json.loads(str(found["facts"]))
        assert np.array(facts["taught"]).shape == (2, 3)
        assert facts["taught"][0][1] > facts["taught"][0][0]  # an adapter has learnt its own rows
        assert len(facts["gradient"]) == 2
        alone = found["merged.values"][:2].mean(1, dtype=float)  # a sum of one adapter is that adapter
        assert found["summed_0.values"][:2, 0] == pytest.approx(alone, rel=1e-3)
        assert (found["union.test.values"][2] != found["shares.test.values"][2]).any()
    assert list(tmp_path.glob("work/*")) == []
    for variant in ("anchored", "fitted"):
        monkeypatch.setattr(
            sys, "argv", ["measure.py", "colours", "--schedule", "steps", *map(str, given), "--variant", variant]
        )
        measure.main()
        with np.load(tables / f"colours-steps-0-{variant}.npz") as other:
            said = other[f"{variant}.values"][:, 0]
        assert (said[:2] == pytest.approx(alone, rel=1e-3)) == (variant == "fitted")  # a single is its adapter
        assert np.isfinite(said).all()
    replay = recipe("replay")
    union, shares = replay.read(tables)
    assert {"anchored", "fitted", "quadratic"} <= {*union.problems[0]["surrogates"]}
    assert (union.way, shares.way) == ("union, steps", "shares, steps")
    best = int(union.mean.argmax())
    assert union.regret(best, 0) == 0
    monkeypatch.setattr(sys, "argv", ["replay.py", "--tables", str(tables), "--way", "union"])
    replay.main()
    assert "3 fine-tunes" in capsys.readouterr().out


def test_a_public_table_of_subsets_is_replayed(tmp_path, monkeypatch, capsys):
    models = [chosen for size in range(1, 6) for chosen in combinations(range(1, 6), size)]
    random = np.random.default_rng(0)
    for part in ("x", "x_test"):
        lines = ["model,task1,task2,task3,task4,task5"]
        for model in models:
            losses = [f"{random.random():.3f}" if task in model else "" for task in range(1, 6)]
            lines.append(",".join(["".join(map(str, model)), *losses]))
        (tmp_path / f"{part}.csv").write_text("\n".join(lines))
    public = recipe("public")
    known = public.problems(tmp_path / "x.csv")
    assert [members.shape for members, _, _ in known] == [(15, 4)] * 5
    members, scores, _ = known[0]
    assert public.lost(members, scores, scores, 10) == 0  # all are measured
    assert public.lost(members, scores, scores, 0) >= public.lost(members, scores, scores, 3)
    monkeypatch.setattr(sys, "argv", ["public.py", str(tmp_path)])
    monkeypatch.setattr(public, "ORDERS", 2)
    public.main()
    assert "regret, 5 targets of 15 mixtures" in capsys.readouterr().out
