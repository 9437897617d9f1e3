"""The nulls of prediction: which targets could as well stand with other prompts, if a hypothesis held.

A `Null` draws targets that are all alike under its hypothesis. What it keeps is what it grants: permuted within groups, a
target keeps all that the group explains, so what is left to find is "beyond the group"; with whole groups or group means
exchanged it keeps all that holds inside groups, and asks for what holds between them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from . import stats
from .ridge import group_blocks

Codes = Int[np.ndarray, " prompt"]
Vector = Float[np.ndarray, " prompt"]


class Shuffled(NamedTuple):
    """Drawn targets [prompt, draw], and whose target each prompt got [draw, prompt] (None where targets are made anew)."""

    targets: Float[np.ndarray, "prompt draw"]
    orders: Int[np.ndarray, "draw prompt"] | None


class Null(NamedTuple):
    """A way to draw targets from (y, codes, n_draws, seed), and the hypothesis under which they are all alike."""

    draw: Callable[[Any, Any, int, int], Shuffled]
    hypothesis: str


def group_means(y: Vector, codes: Codes, n_draws: int, seed: int) -> Float[np.ndarray, "prompt draw"]:
    """Targets whose group means have changed places among all groups, of whatever size, the deviations inside groups kept.

    All arrangements but the identity, when they are at most `n_draws` or 6! = 720 (fewer than 7 groups: p is then exact,
    1/G! at least); else `n_draws` random ones.
    """
    sizes = np.bincount(codes)
    means, n_groups = np.bincount(codes, y) / sizes, len(sizes)
    if math.factorial(n_groups) - 1 <= max(n_draws, math.factorial(6)):
        moves = np.array(list(itertools.permutations(range(n_groups))))[1:]
    else:
        moves = stats.permutations(n_groups, n_draws, seed)
    return (y - means[codes] + means[moves][:, codes]).T


def _ordered(y: Vector, orders: Int[np.ndarray, "draw prompt"]) -> Shuffled:
    return Shuffled(y[orders].T, orders)


NULLS = {
    "within_groups": Null(
        lambda y, codes, n_draws, seed: _ordered(y, stats.permutations(len(y), n_draws, seed, within=codes)),
        "nothing beyond the group: target permuted within groups",
    ),
    "group_blocks": Null(
        lambda y, codes, n_draws, seed: _ordered(y, group_blocks(codes, len(y), n_draws, seed)),
        "nothing at all, whole groups exchangeable: groups' targets, each kept whole, permuted among groups of equal size",
    ),
    "group_means": Null(
        lambda y, codes, n_draws, seed: Shuffled(group_means(y, codes, n_draws, seed), None),
        "nothing between groups: group means of the target permuted among groups of any size, deviations inside groups kept "
        "(exact where means of groups of different size vary alike)",
    ),
    "all_rows": Null(
        lambda y, codes, n_draws, seed: _ordered(y, stats.permutations(len(y), n_draws, seed)),
        "nothing at all, prompts exchangeable: target permuted over all rows",
    ),
}
OF_GROUPS = ("within_groups", "group_blocks", "group_means")


def told(hypothesis: str, n_draws: int, groups: str | None) -> str:
    """A null in words: hypothesis, groups, draws, the smallest p there can be, tail."""
    inside = "" if groups is None else f" (groups: {groups!r})"
    return f"{hypothesis}{inside}; {n_draws} draws, p >= {1 / (n_draws + 1):.2g}; tail: greater (rmse: less)"
