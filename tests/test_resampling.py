"""Guards which rows are drawn: permutations inside their groups, and intervals that cover also when prompts are few and in categories."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from emlens import resampling, stats

CATEGORIES = np.repeat([f"category {i}" for i in range(8)], 12)


def test_permutations_stay_within_their_groups():
    orders = resampling.permutations(96, 50, seed=0, within=CATEGORIES)
    assert (np.sort(orders, axis=1) == np.arange(96)).all()
    assert (CATEGORIES[orders] == CATEGORIES).all()
    free = resampling.permutations(96, 50, seed=0)
    assert (np.sort(free, axis=1) == np.arange(96)).all() and (CATEGORIES[free] != CATEGORIES).any()


# ---- bootstrap


def test_bootstrap_equals_scipy_for_a_large_sample():
    x = np.random.default_rng(4).gamma(2.0, size=2000)
    ours = resampling.bootstrap_interval(x, n_boot=4000, seed=0)
    theirs = scipy_stats.bootstrap((x,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert np.allclose(ours, (theirs.low, theirs.high), atol=0.01)
    median = resampling.bootstrap_interval(x, np.median, n_boot=500, seed=0)
    assert median[0] < np.median(x) < median[1] < ours[0]


@pytest.mark.parametrize("n", [8, 24])
def test_bootstrap_covers_also_when_few(n):
    samples = np.random.default_rng(5).normal(size=(n, 600))  # 600 experiments side by side
    low, high = resampling.bootstrap_interval(samples, seed=0, n_boot=1000)
    assert 0.92 <= np.mean((low < 0) & (high > 0)) <= 0.98
    low, high = resampling.bootstrap_interval(samples + 2, seed=0, n_boot=1000)
    assert np.mean((low < 0) & (high > 0)) < 0.05


def test_bootstrap_of_clusters_covers_where_rows_alone_do_not():
    rng = np.random.default_rng(6)
    samples = np.repeat(rng.normal(size=(8, 400)), 12, axis=0) + 0.5 * rng.normal(size=(96, 400))

    def coverage(low, high):
        return np.mean((low < 0) & (high > 0))

    assert coverage(*resampling.bootstrap_interval(samples, clusters=CATEGORIES, n_boot=1000)) > 0.90
    assert coverage(*resampling.bootstrap_interval(samples, n_boot=1000)) < 0.70


def test_bootstrap_mean_is_the_same_by_weights_and_by_rows():
    x = np.random.default_rng(7).normal(size=96)
    fast = resampling.bootstrap_interval(x, clusters=CATEGORIES, n_boot=2000, seed=0)
    slow = resampling.bootstrap_interval(x, lambda rows: rows.mean(axis=0), clusters=CATEGORIES, n_boot=2000, seed=0)
    assert np.allclose(fast, slow, atol=1e-12)


def test_bootstrap_refuses_and_admits_ignorance():
    assert np.isnan(resampling.bootstrap_interval([1.0])).all()
    assert np.isnan(resampling.bootstrap_interval([1.0, 2.0], clusters=["a", "a"])).all()
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        resampling.bootstrap_interval([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one row"):
        resampling.bootstrap_interval([])
    with pytest.raises(ValueError, match="one label per row"):
        resampling.bootstrap_interval([1.0, 2.0], clusters=["a"])
    with pytest.raises(ValueError, match="no label"):
        resampling.bootstrap_interval([1.0, 2.0], clusters=["a", None])


def test_chunks_are_all_draws_and_within_the_budget():
    for n_draws, width in ((7, 1), (2000, 96), (100, resampling.BUDGET // 3)):
        parts = list(resampling.chunks(n_draws, width))
        assert sum(parts) == n_draws and all(part * width <= resampling.BUDGET for part in parts)
    assert list(resampling.chunks(3, 10 * resampling.BUDGET)) == [1, 1, 1]  # a row wider than the budget goes alone


def test_stats_hands_the_same_functions_on():
    for name in ("bootstrap_interval", "bootstrap_weights", "expanded_interval", "permutations"):
        assert getattr(stats, name) is getattr(resampling, name) and name in stats.__all__
