"""Which prompts are held out together: whole groups or plain folds, once or several times, each with inner folds to choose in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut, RepeatedKFold

from .ridge import Fold

LEAVE_OUT_UP_TO = 10  # groups; with more, GroupKFold

Codes = Int[np.ndarray, " prompt"]
Cut = tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]


@dataclass(frozen=True)
class Folds:
    """Outer folds in rounds (each round tests every prompt once), and what they and their inner folds are in words."""

    rounds: tuple[tuple[Fold, ...], ...]
    outer: str
    inner: str

    @property
    def every(self) -> tuple[Fold, ...]:
        """The folds of all rounds after each other."""
        return tuple(fold for one in self.rounds for fold in one)


def make_folds(n: int, codes: Codes | None = None, n_folds: int | None = None, seed: int = 0, repeats: int = 1) -> Folds:
    """Outer folds with their inner folds. Groups, when there are any, are never cut; only where a fold trains on a single
    group are its inner folds plain.

    codes    group of each prompt, 0..G-1; None: shuffled K-fold (5), as scikit-learn's KFold(random_state=seed), and
             with `repeats` its RepeatedKFold. With groups: leave-one-group-out up to 10 groups, GroupKFold(5) beyond;
             `n_folds` given: GroupKFold of that many.
    repeats  rounds, each shuffled anew. Leave-one-group-out is the same in every round, so it takes no repeats.

    Errors: ValueError for more folds than prompts or groups, training sets of one row, repeats that change nothing.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: 1 is one round of folds, 10 ten of them, each shuffled anew")
    cuts, said = _cut(np.arange(n), codes, n_folds, seed, repeats)
    folds, inner_said = [], set()
    for train, test in cuts:
        whole = codes is not None and len(np.unique(codes[train])) > 1
        inner, words = _cut(train, codes if whole else None, None, seed, 1)
        inner_said.add(words)
        folds.append(Fold(train, test, tuple(inner)))
    size = len(folds) // repeats
    rounds = tuple(tuple(folds[start : start + size]) for start in range(0, len(folds), size))
    return Folds(rounds, said if repeats == 1 else f"{said}, {repeats} times", " or ".join(sorted(inner_said)))


def _cut(rows: Int[np.ndarray, " row"], codes: Codes | None, n_folds: int | None, seed: int, repeats: int) -> tuple[list[Cut], str]:
    mine = None if codes is None else codes[rows]
    units, name = (len(rows), "prompts") if mine is None else (len(np.unique(mine)), "groups")
    if n_folds is not None and not 2 <= n_folds <= units:
        raise ValueError(f"{n_folds} folds of {units} {name}: choose n_folds between 2 and {units}, or n_folds=None")
    if units < 2:
        raise ValueError(f"a fold trains on {units} {name}: too few to choose a penalty inside it; more rows are needed")
    if mine is None:
        count = n_folds or min(5, units)
        splitter = (
            KFold(count, shuffle=True, random_state=seed) if repeats == 1 else RepeatedKFold(n_splits=count, n_repeats=repeats, random_state=seed)
        )
        cuts, said = splitter.split(rows), f"shuffled {count}-fold over prompts"
    elif repeats > 1:
        count = n_folds or min(5, units)
        if count == units:
            raise ValueError(f"{repeats} repeats of leaving out one of {units} groups are all the same: choose n_folds below {units}, or repeats=1")
        rng = np.random.RandomState(seed)
        cuts = (cut for _ in range(repeats) for cut in GroupKFold(count, shuffle=True, random_state=rng).split(rows, groups=mine))
        said = f"shuffled {count}-fold over whole groups"
    elif n_folds is None and units <= LEAVE_OUT_UP_TO:
        cuts, said = LeaveOneGroupOut().split(rows, groups=mine), "leave one group out"
    else:
        cuts, said = GroupKFold(n_folds or 5).split(rows, groups=mine), f"{n_folds or 5}-fold over whole groups"
    return _numbered(rows, cuts), said


def _numbered(rows: Int[np.ndarray, " row"], cuts: Iterable[Sequence[np.ndarray]]) -> list[Cut]:
    return [(rows[train], rows[test]) for train, test in cuts]
