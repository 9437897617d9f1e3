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
    if _few(math.factorial(n_groups), n_draws):
        moves = np.array(list(itertools.permutations(range(n_groups))))[1:]
    else:
        moves = stats.permutations(n_groups, n_draws, seed)
    return (y - means[codes] + means[moves][:, codes]).T


def group_blocks(codes: Int[np.ndarray, " prompt"], n: int, n_draws: int, seed: int) -> Int[np.ndarray, "draws prompt"]:
    """Whole groups change places among groups of equal size, rows inside in their order of appearance.

    All arrangements but the identity, when they are at most `n_draws` or 6! = 720 (with the observed one counted in, p
    is then exact: 1/G! at least); else `n_draws` random ones. ValueError when no two groups are of one size.
    """
    members = [np.flatnonzero(codes == g) for g in range(int(codes.max()) + 1)]
    sizes = np.array([len(m) for m in members])
    classes = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    arrangements = math.prod(math.factorial(len(c)) for c in classes)
    if arrangements == 1:
        raise ValueError(
            f"no two of the {len(members)} groups are of one size ({sizes.tolist()}), so whole groups cannot change "
            "places: use nulls=('within_groups',), or drop prompts until groups are equal"
        )
    if _few(arrangements, n_draws):
        every = itertools.product(*(itertools.permutations(c) for c in classes))
        moves = [np.concatenate(move) for move in every][1:]
    else:
        rng = np.random.default_rng(seed)
        moves = [np.concatenate([rng.permutation(c) for c in classes]) for _ in range(n_draws)]
    orders = np.tile(np.arange(n), (len(moves), 1))
    for order, move in zip(orders, moves, strict=True):
        for old, new in zip(np.concatenate(classes), move, strict=True):
            order[members[old]] = members[new]
    return orders


def _few(arrangements: int, n_draws: int) -> bool:
    """Whether all arrangements but the identity are gone through: at most `n_draws` of them, or 6! (fewer than 7 groups)."""
    return arrangements - 1 <= max(n_draws, math.factorial(6))


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
