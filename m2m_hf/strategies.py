"""Strategies: generators that propose mixtures and learn how they stand.

A strategy yields a list of mixtures and is sent how they stand, in the same order. It keeps nothing on the disk: to
resume is to run it again, with the journal answering what is known already. It knows neither models nor objectives.
"""

from collections.abc import Generator

from .mixture import Mixture, SearchSpace, Standing

Strategy = Generator[list[Mixture], list[Standing], None]


def exhaustive(space: SearchSpace) -> Strategy:
    """Every mixture of the space once: the paper's search over all 2^N − 1 subsets (arXiv 2505.16066)."""
    yield list(space.subsets())
