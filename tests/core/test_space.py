"""The search space: its constraints, neighbours and random draws."""

import itertools
import random
from dataclasses import replace

import pytest
from searches import COSTS, NAMES, SPACES

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"required": frozenset({"z"})}, "required: z is excluded, so it cannot be in a mixture"),
        ({"min_datasets": 8}, "asks for at least 8 candidates, but .* allows at most 7"),
        ({"min_datasets": 4, "max_datasets": 3}, "at least 4 .* at most 3"),
        ({"required": frozenset("abc"), "max_datasets": 2}, "at least 3 .* at most 2"),
        ({"costs": COSTS, "max_cost": 0.5}, "the cheapest mixture costs 1, more than 0.5"),
        ({"costs": COSTS, "max_cost": 7, "required": frozenset("g"), "min_datasets": 2}, "costs 8, more than 7"),
    ],
)
def test_impossible_constraints(options, message):
    with pytest.raises(InputError, match=message):
        SearchSpace(NAMES, **options)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_space_agrees_with_itself(space):
    everything = (Mixture.subset(names) for size in range(1, 8) for names in itertools.combinations(NAMES, size))
    every = [mixture for mixture in everything if mixture in space]
    assert list(space.subsets()) == every
    assert space.at_most(127)
    draw = random.Random(0)
    drawn = {space.draw(draw) for _ in range(300)}
    assert drawn <= set(every)
    assert len(drawn) > len(every) / 3
    for mixture in every[::5]:
        near = {*space.added(mixture), *space.dropped(mixture), *space.swapped(mixture)}
        assert near == {
            other
            for other in every
            if 0 < len(set(mixture.names) ^ set(other.names)) <= 2 and abs(len(mixture) - len(other)) <= 1
        }


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_drawn_weights_keep_the_constraints_and_reach_all_sizes(space):
    space, draw = replace(space, continuous=True), random.Random(0)
    drawn = [space.draw(draw) for _ in range(200)]
    assert all(mixture in space for mixture in drawn)
    assert {len(mixture) for mixture in drawn} == {len(mixture) for mixture in space.subsets()}
