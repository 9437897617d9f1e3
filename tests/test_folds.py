"""Guards the folds: groups never cut, every prompt tested once a round, scikit-learn's own splits where it has them."""

import numpy as np
import pytest
from sklearn.model_selection import KFold, RepeatedKFold

from emlens.folds import make_folds


@pytest.mark.parametrize(
    ("n_groups", "n_folds", "repeats", "outer"), [(2, None, 1, 2), (6, None, 1, 6), (6, 3, 1, 3), (14, None, 1, 5), (6, 3, 4, 12)]
)
def test_groups_never_leak(n_groups: int, n_folds: int | None, repeats: int, outer: int) -> None:
    codes = np.random.default_rng(0).permutation(np.arange(84) % n_groups)
    folds = make_folds(84, codes, n_folds, repeats=repeats)
    assert len(folds.every) == outer and len(folds.rounds) == repeats
    for one in folds.rounds:
        assert sorted(np.concatenate([f.test for f in one])) == list(range(84))
    for fold in folds.every:
        assert not set(codes[fold.train]) & set(codes[fold.test])
        assert sorted(np.concatenate([test for _, test in fold.inner])) == sorted(fold.train)
        for train, test in fold.inner:
            assert set(train) | set(test) == set(fold.train) and not set(train) & set(test)
            assert n_groups == 2 or not set(codes[train]) & set(codes[test])


def test_rounds_of_groups_differ() -> None:
    rounds = make_folds(84, np.arange(84) % 14, 5, repeats=3).rounds
    assert len({tuple(sorted(tuple(f.test) for f in one)) for one in rounds}) == 3


def test_plain_folds_are_those_of_scikit_learn() -> None:
    repeated = make_folds(53, n_folds=5, seed=42, repeats=10)
    theirs = list(RepeatedKFold(n_splits=5, n_repeats=10, random_state=42).split(np.arange(53)))
    assert len(repeated.every) == 50 and [len(one) for one in repeated.rounds] == [5] * 10
    for fold, (train, test) in zip(repeated.every, theirs, strict=True):
        assert fold.train.tolist() == train.tolist() and fold.test.tolist() == test.tolist()
        inner = KFold(5, shuffle=True, random_state=42).split(train)
        assert [b.tolist() for _, b in fold.inner] == [train[b].tolist() for _, b in inner]
    once = make_folds(53, seed=3)
    for fold, (_, test) in zip(once.every, KFold(5, shuffle=True, random_state=3).split(np.arange(53)), strict=True):
        assert fold.test.tolist() == test.tolist()
    assert "10 times" in repeated.outer and "times" not in once.outer


def test_folds_that_cannot_be_name_the_way_out() -> None:
    codes = np.arange(20) % 4
    for words, ask in (
        ("9 folds of 4 groups: choose n_folds between 2 and 4", {"codes": codes, "n_folds": 9}),
        ("repeats of leaving out one of 4 groups are all the same", {"codes": codes, "repeats": 3}),
        ("repeats is 0", {"repeats": 0}),
        ("too few to choose a penalty", {"n_folds": 20, "n": 2}),
    ):
        with pytest.raises(ValueError, match=words if "few" not in words else "20 folds of 2 prompts"):
            make_folds(**({"n": 20} | ask))
