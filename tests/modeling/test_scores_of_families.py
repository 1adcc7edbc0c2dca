"""Families whose scores are compared with plain models in every test run; `make families` tries all."""

import pytest
from families import FAMILIES, QUICK, is_exact, run


@pytest.mark.parametrize("name", QUICK)
def test_scores_are_those_of_a_plain_model_one_row_at_a_time(name, tmp_path):
    found = run(FAMILIES[name], tmp_path, sizes=(0, 2))
    assert not found.refused
    assert is_exact(found), found
