"""Guards the corrected interval of repeated cross-validation: the formula by hand, and what it is for, folds that share their rows."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from emlens.crossvalidated import corrected_t, nadeau_bengio


def test_by_hand() -> None:
    scores = np.random.default_rng(0).normal(0.4, 0.1, 50)
    found = nadeau_bengio(scores, 1 / 5)
    error = scores.std(ddof=1) * np.sqrt(1 / 50 + 1 / 4)
    assert found["estimate"] == scores.mean() and (found["n"], found["sd"]) == (50, scores.std(ddof=1))
    assert (found["low"], found["high"]) == pytest.approx(scipy_stats.t.interval(0.95, 49, scores.mean(), error))
    assert found["p"] == pytest.approx(2 * scipy_stats.t.sf(scores.mean() / error, 49))
    assert corrected_t(scores.mean(), scores.std(ddof=1), 50, 1 / 5) == found
    naive = scipy_stats.t.interval(0.95, 49, scores.mean(), scores.std(ddof=1) / np.sqrt(50))
    assert (found["high"] - found["low"]) / (naive[1] - naive[0]) == pytest.approx(3.674, abs=1e-3)
    assert nadeau_bengio(scores, 1 / 5, null=0.4)["p"] > 0.5 and nadeau_bengio(scores, 1 / 5, level=0.5)["low"] > found["low"]


def test_two_models_on_the_same_folds() -> None:
    first = np.random.default_rng(0).normal(0.4, 0.1, 50)
    second = first + np.random.default_rng(1).normal(0.05, 0.01, 50)
    assert nadeau_bengio(second - first, 1 / 5)["p"] < 1e-6 and nadeau_bengio(np.zeros(50) + 0.1, 1 / 5)["p"] == 0.0


def test_what_cannot_be_told_is_not() -> None:
    assert np.isnan(nadeau_bengio([0.3], 1 / 5)["low"]) and np.isnan(nadeau_bengio([0.0, 0.0], 1 / 2)["p"])
    with pytest.raises(ValueError, match="test_fraction=5.0"):
        nadeau_bengio([0.1, 0.2], 5.0)
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        nadeau_bengio([0.1, np.nan], 1 / 5)
    with pytest.raises(ValueError, match="one score per fold"):
        nadeau_bengio([], 1 / 5)


def folds_of(seed: int) -> np.ndarray:
    """By how much guessing 1 errs more than guessing -1, over 5 folds x 4 of values about 0: neither is better."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=60)
    more = np.abs(y - 1) - np.abs(y + 1)
    return np.array([more[test].mean() for _ in range(4) for test in np.array_split(rng.permutation(60), 5)])


def test_false_alarms_where_the_naive_interval_sounds_them() -> None:
    """The folds share rows: a t over 20 folds as if they were independent rejects far too often; corrected, not."""
    drawn = [folds_of(seed) for seed in range(400)]
    naive = np.mean([scipy_stats.ttest_1samp(each, 0).pvalue <= 0.05 for each in drawn])
    corrected = np.mean([nadeau_bengio(each, 1 / 5)["p"] <= 0.05 for each in drawn])
    assert naive > 0.2 and corrected <= 0.07
