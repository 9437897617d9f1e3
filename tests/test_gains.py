"""Guards what activations add to text: the gain is the fall of the pooled error, by scikit-learn's own fits, and the text is taken out of fold."""

import numpy as np
import pytest
import scikit
from sklearn.metrics import r2_score

from emlens import gains
from emlens.baselines import Block
from emlens.folds import make_folds
from emlens.learners import learner
from emlens.ridge import fixed, residuals
from emlens.scores import Asked

PENALTIES = (1.0, 30.0, 1000.0)
GROUPS = np.repeat(np.arange(5), 8)


def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x, text = rng.standard_normal((40, 20)), rng.standard_normal((40, 2))
    return x, text, x[:, 0] + text[:, 0] + 0.5 * rng.standard_normal(40)


def test_the_gain_is_the_fall_of_the_pooled_error():
    x, text, y = table()
    folds = make_folds(40, GROUPS).every
    left = residuals(fixed(text), y, folds, PENALTIES)
    gain, fall = gains.gain(Block("x", fixed(x), "each", ""), learner("ridge", PENALTIES), left, np.arange(40)[None], y, folds)
    first, stacked = np.empty(40), np.empty(40)
    second, _ = scikit.nested(x, left.T, folds, PENALTIES)
    for f, fold in enumerate(folds):
        first[fold.test] = y[fold.test] - left[f, fold.test]
        stacked[fold.test] = first[fold.test] + second[fold.test, f]
    assert gain[0] == pytest.approx(r2_score(y, stacked) - r2_score(y, first), abs=1e-8) and gain[0] > 0.1
    assert fall.sum() / np.square(y - y.mean()).sum() == pytest.approx(gain[0])


def test_what_lies_beyond_text_is_left_and_what_text_holds_is_not():
    x, text, _ = table()
    folds = make_folds(40, GROUPS).every
    block = Block("text", fixed(text), "each", "")
    held = text @ np.random.default_rng(2).standard_normal((2, 6))
    rest = gains.beyond_text(np.hstack([x, held]), block, folds, PENALTIES)
    size = np.square(rest).sum(axis=0) / np.square(np.hstack([x, held])).sum(axis=0)
    assert size[-6:].max() < 0.05 and size[:20].min() > 0.6
    oracle = np.hstack([x, held]) - scikit.nested(np.asarray(text), np.hstack([x, held]), folds, PENALTIES)[0]
    np.testing.assert_allclose(rest, oracle, atol=1e-8)


def test_out_of_fold_is_what_the_testing_fold_leaves():
    folds = make_folds(40, GROUPS).every
    left = np.random.default_rng(3).standard_normal((5, 40, 2))
    found = gains.out_of_fold(left, folds)
    for row in range(40):
        (fold,) = (f for f, one in enumerate(folds) if row in one.test)
        assert np.array_equal(found[row], left[fold, row])
    assert np.array_equal(gains.out_of_fold(left[..., 0], folds), found[:, 0])


def test_several_texts_are_taken_out_side_by_side():
    """Two correlated texts, activations and target linear in both: one after another, what the first leaves holds what the second brings back."""
    passed = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        codes = np.repeat(np.arange(8), 15)
        one = rng.standard_normal((120, 3))
        two = 0.7 * one + np.sqrt(1 - 0.49) * rng.standard_normal((120, 3))
        weights = rng.standard_normal((6, 8))
        x = np.hstack([one, two]) @ weights + 0.5 * rng.standard_normal((120, 8))
        y = np.hstack([one, two]) @ rng.standard_normal(6) + rng.standard_normal(120)
        texts = [Block(name, fixed(text), "each", "", text=True) for name, text in (("one", one), ("two", two))]
        asked = Asked(y, codes, make_folds(120, codes).rounds, 0.95, seed)
        added = gains.Added.beyond(("both", texts), asked, PENALTIES, 99)
        assert added.text.name == "one + two" and set(added.chosen) <= {"one", "two", "one + two"}
        found, _ = added.gains(Block("x", fixed(x), "each", ""), learner("ridge", PENALTIES), asked)
        passed.append((1 + (found[1:] >= found[0]).sum()) / 100 <= 0.05)
    assert np.mean(passed) <= 0.13, "taken out one after another 0.17 of 250 passed"
