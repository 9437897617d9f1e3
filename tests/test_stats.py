"""Guards what every finding rests on: p is uniform when nothing is there, small when something is; corrections; comparisons."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from emlens import stats

CATEGORIES = np.repeat([f"category {i}" for i in range(8)], 12)


def rows_of(p, **columns):
    return [{"layer": i, "metric": "r", "estimate": 0.1, "p": value, **columns} for i, value in enumerate(p)]


# ---- Result


def test_result_has_the_columns_in_order_and_says_how_it_was_made():
    table = stats.result(rows_of([0.01, 0.2], n=24, n_clusters=8), ["layer"], what="test", seed=3, null={"": "none"}, interval="none")
    assert list(table.columns) == ["layer", *stats.COLUMNS, "n_clusters"]
    assert table["null"].tolist() == ["", ""] and table["low"].isna().all() and table["n"].tolist() == [24, 24]
    assert table.attrs["correction"] == "bh" and table.attrs["family"] == "all rows" and table.attrs["seed"] == 3
    assert json.loads(json.dumps(table.attrs)) == table.attrs


def test_result_corrects_within_the_family_only():
    first, second = rows_of([0.01, 0.02]), [{**row, "metric": "rho"} for row in rows_of([0.5, 0.5, 0.03])]
    apart = stats.result(first + second, ["layer"], what="x", family=["metric"])
    assert np.allclose(apart.query("metric == 'r'")["q"], stats.adjust([0.01, 0.02]))
    assert np.allclose(apart.query("metric == 'rho'")["q"], stats.adjust([0.5, 0.5, 0.03]))
    together = stats.result(apart.drop(columns="q"), ["layer"], what="x")
    assert np.allclose(together["q"], stats.adjust([0.01, 0.02, 0.5, 0.5, 0.03]))
    assert not np.allclose(together["q"], apart["q"])


def test_result_keeps_a_given_q_and_refuses_when_it_is_not_there():
    table = stats.result(rows_of([0.01, 0.2], q=0.7), ["layer"], what="x", correction="max-statistic")
    assert table["q"].tolist() == [0.7, 0.7] and table.attrs["correction"] == "max-statistic"
    with pytest.raises(ValueError, match="2 rows have p and no q"):
        stats.result(rows_of([0.01, 0.2]), ["layer"], what="x", correction="given")


@pytest.mark.parametrize(
    ("rows", "kwargs", "error", "says"),
    [
        ([{"layer": 0, "metric": "r"}], {}, ValueError, "needs the columns"),
        (rows_of([0.1]) + rows_of([0.2]), {}, ValueError, "two rows share"),
        (rows_of([0.1]), {"correction": "sidak"}, ValueError, "unknown correction"),
        (rows_of([0.1]), {"family": ["site"]}, ValueError, "family names the columns"),
        (rows_of([0.1]), {"seed": np.int64(3)}, TypeError, "JSON"),
    ],
)
def test_result_refuses_what_it_cannot_hold(rows, kwargs, error, says):
    with pytest.raises(error, match=says):
        stats.result(rows, ["layer"], what="x", **kwargs)


def test_results_that_were_stacked_are_corrected_anew():
    one, two = (stats.result(rows_of([p], run=run), ["run", "layer"], what="x") for run, p in [("a", 0.03), ("b", 0.04)])
    both = stats.result(pd.concat([one, two]), ["run", "layer"], what="both")
    assert one["q"].tolist() == [0.03] and both["q"].tolist() == [0.04, 0.04]


# ---- multiple testing


def test_adjust_equals_the_written_out_procedures_and_ignores_nan():
    p = np.array([0.01, 0.02, np.nan, 0.03, 0.5])
    assert np.allclose(stats.adjust(p, "bh"), [0.04, 0.04, np.nan, 0.04, 0.5], equal_nan=True)
    assert np.allclose(stats.adjust(p, "holm"), [0.04, 0.06, np.nan, 0.06, 0.5], equal_nan=True)
    assert np.allclose(stats.adjust(p, "bonferroni"), [0.04, 0.08, np.nan, 0.12, 1], equal_nan=True)
    assert np.array_equal(stats.adjust(p, "none"), p, equal_nan=True)
    assert stats.adjust([np.nan]).shape == (1,)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        stats.adjust([1.5])


def test_max_statistic_keeps_the_family_error_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    smallest = []
    for _ in range(400):
        shared = rng.normal(size=(200, 1))
        family = shared + rng.normal(size=(200, 10))  # ten dependent statistics, the first draw plays the observed one
        smallest.append(stats.max_statistic_p(family[0], family[1:], "two-sided").min())
    assert 0.02 <= np.mean(np.array(smallest) <= 0.05) <= 0.08
    null = rng.normal(size=(199, 10))
    p = stats.max_statistic_p(np.r_[8.0, np.zeros(8), np.nan], null)
    assert p[0] == 1 / 200 and (p[1:9] > 0.5).all() and np.isnan(p[9])
    assert (stats.max_statistic_p(-np.r_[8.0, np.zeros(9)], null, "less")[0]) == 1 / 200


def test_max_statistic_is_never_below_the_single_p():
    rng = np.random.default_rng(1)
    observed, null = rng.normal(size=6) + 1, rng.normal(size=(99, 6))
    assert (stats.max_statistic_p(observed, null) >= stats.permutation_p(observed, null)).all()


# ---- permutation p


def test_permutation_p_counts_the_observed_arrangement():
    null = np.arange(99.0)
    assert stats.permutation_p(1000.0, null) == 1 / 100
    assert stats.permutation_p(98.0, null) == 2 / 100  # a tie counts
    assert stats.permutation_p(98.0 * (1 + 1e-15), null) == 2 / 100  # so does a tie up to rounding
    assert stats.permutation_p(-1.0, null, "less") == 1 / 100
    assert stats.permutation_p(-1.0, null, "two-sided") == 2 / 100
    assert stats.permutation_p(49.0, null, "two-sided") == 1.0
    assert np.isnan(stats.permutation_p(np.nan, null))
    assert stats.permutation_p(np.array([1000.0, -1.0]), np.stack([null, null], axis=1)).tolist() == [0.01, 1.0]


def test_permutation_p_is_uniform_under_its_null_and_small_off_it():
    draws = np.random.default_rng(2).normal(size=(400, 200))
    for tail in ("greater", "less", "two-sided"):
        p = stats.permutation_p(draws[0], draws[1:], tail)
        assert scipy_stats.kstest(p, "uniform").pvalue > 0.01, tail
    assert np.mean(stats.permutation_p(draws[0] + 3, draws[1:], "greater") < 0.05) > 0.8


def test_null_band_covers_95_of_100():
    draws = np.random.default_rng(3).normal(size=(1001, 200))
    low, high = stats.null_band(draws[1:])
    assert 0.92 <= np.mean((low <= draws[0]) & (draws[0] <= high)) <= 0.98
    assert stats.null_band(np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0))


@pytest.mark.parametrize(
    ("null", "tail", "says"),
    [
        ([], "greater", "at least one draw"),
        ([[1.0]], "greater", "shape"),
        ([np.nan], "greater", "NaN"),
        ([1.0], "up", "unknown tail"),
    ],
)
def test_permutation_p_refuses(null, tail, says):
    with pytest.raises(ValueError, match=says):
        stats.permutation_p(1.0, np.array(null), tail)


# ---- paired comparison


def test_paired_equals_scipy():
    rng = np.random.default_rng(8)
    before = rng.normal(size=60)
    after = before + 0.3 + rng.normal(size=60)
    ours = stats.paired(before, after)
    theirs = scipy_stats.permutation_test(
        (after, before),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        rng=1,
    )
    assert ours["difference"] == pytest.approx((after - before).mean())
    assert ours["p"] == pytest.approx(theirs.pvalue, abs=0.015) and not ours["exact"] and ours["p_floor"] == 1 / 5001
    assert ours["wilcoxon_p"] == pytest.approx(scipy_stats.wilcoxon(after, before).pvalue)
    assert ours["cohen_dz"] == pytest.approx(ours["difference"] / np.std(after - before, ddof=1))
    assert ours["low"] < ours["difference"] < ours["high"] and ours["n"] == ours["n_clusters"] == 60


def test_rank_biserial_counts_favourable_ranks():
    assert stats.paired([0, 0, 0], [1, 2, 3])["rank_biserial"] == 1.0
    assert stats.paired([0, 0, 0, 0], [1, 2, -3, 0])["rank_biserial"] == 0.0  # ranks 1 + 2 against 3, the zero left out


def test_few_clusters_are_enumerated():
    rng = np.random.default_rng(9)
    result = stats.paired(np.zeros(96), 1 + 0.1 * rng.normal(size=96), clusters=CATEGORIES)
    assert result["exact"] and result["p"] == 2 / 256 == result["p_floor"] and result["n_clusters"] == 8
    assert stats.paired([0, 0], [1, 1])["p"] == 0.5


def test_whole_clusters_flip_as_enumerated_by_hand():
    change, clusters = np.array([3.0, -1, 2, -2.5, 1, 0.5, -4]), np.array(list("aabbccd"))
    means = [np.mean(change * np.array([dict(zip("abcd", flip, strict=True))[c] for c in clusters])) for flip in itertools.product([1, -1], repeat=4)]
    ours = stats.paired(np.zeros(7), change, clusters=clusters)
    assert ours["p"] == np.mean(np.abs(means) >= abs(change.mean()) - 1e-12) and ours["n_clusters"] == 4
    assert (ours["null_low"], ours["null_high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_paired_p_is_uniform_when_nothing_changed_also_with_clusters():
    rng = np.random.default_rng(10)
    plain = [stats.paired(*rng.normal(size=(2, 20)), n_permutations=400, seed=i)["p"] for i in range(200)]
    assert scipy_stats.kstest(plain, "uniform").pvalue > 0.01 and np.mean(np.array(plain) < 0.05) <= 0.08
    topic = np.repeat(rng.normal(size=(200, 8)), 12, axis=1) + 0.5 * rng.normal(size=(200, 96))  # topics move together
    whole = np.array([stats.paired(np.zeros(96), row, clusters=CATEGORIES, n_permutations=256)["p"] for row in topic])
    apart = np.array([stats.paired(np.zeros(96), row, n_permutations=400)["p"] for row in topic])
    assert 0.02 <= np.mean(whole <= 0.05) <= 0.08  # calibrated when whole topics flip
    assert np.mean(apart <= 0.05) > 0.3  # and badly wrong when prompts do


def test_paired_finds_a_planted_change_and_says_nothing_of_no_change():
    rng = np.random.default_rng(11)
    found = [stats.paired(x := rng.normal(size=40), x + 0.8 + rng.normal(size=40), n_permutations=400)["p"] < 0.05 for _ in range(30)]
    assert np.mean(found) > 0.9
    nothing = stats.paired([1.0, 2.0], [1.0, 2.0])
    assert nothing["p"] == 1.0 and nothing["wilcoxon_p"] == 1.0 and np.isnan(nothing["cohen_dz"])
    with pytest.raises(ValueError, match="same rows"):
        stats.paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="NaN"):
        stats.paired([1.0, np.nan], [1.0, 2.0])


# ---- correlation


@pytest.mark.parametrize(("method", "oracle"), [("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)])
def test_correlation_equals_scipy(method, oracle):
    rng = np.random.default_rng(12)
    x = np.round(rng.normal(size=80), 1)  # with ties
    y = np.round(0.3 * x + rng.normal(size=80), 1)
    ours = stats.correlation(x, y, method=method, n_permutations=5000)
    theirs = oracle(x, y)
    assert ours["r"] == pytest.approx(theirs.statistic, abs=1e-12)
    assert ours["p"] == pytest.approx(theirs.pvalue, abs=0.02)
    boot = scipy_stats.bootstrap(
        (x, y),
        lambda a, b: oracle(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert np.allclose((ours["low"], ours["high"]), (boot.low, boot.high), atol=0.03)


def testweighted_ranks_are_the_ranks_of_the_resample():
    x = np.array([3.0, 1.0, 3.0, 2.0])
    times = np.array([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    for weights, ranks in zip(times, stats.weighted_ranks(x, times), strict=True):
        sample = np.repeat(np.arange(4), weights.astype(int))
        expected = scipy_stats.rankdata(x[sample])
        assert np.allclose(ranks[sample] + 0.5, expected)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_correlation_p_is_uniform_without_relation_and_small_with_one(method):
    rng = np.random.default_rng(13)
    null = [stats.correlation(*rng.normal(size=(2, 24)), n_permutations=300, n_boot=10, seed=i, method=method)["p"] for i in range(200)]
    assert scipy_stats.kstest(null, "uniform").pvalue > 0.01 and 0.02 <= np.mean(np.array(null) < 0.05) <= 0.08
    x = rng.normal(size=60)
    there = stats.correlation(x, x + rng.normal(size=60), method=method)
    assert there["p"] < 0.01 and there["low"] > 0


def test_the_band_of_a_correlation_without_relation_covers_95_of_100():
    rng = np.random.default_rng(14)
    inside = []
    for seed in range(200):
        r = stats.correlation(*rng.normal(size=(2, 30)), n_permutations=400, n_boot=10, seed=seed)
        inside.append(r["null_low"] <= r["r"] <= r["null_high"])
    assert 0.92 <= np.mean(inside) <= 0.98


def test_within_topic_permutation_is_not_fooled_by_topics():
    rng = np.random.default_rng(15)
    topic = np.repeat(rng.normal(size=8), 12) * 3
    x, y = topic + rng.normal(size=96), topic + rng.normal(size=96)  # only the topic is shared
    assert stats.correlation(x, y)["p"] < 0.01
    assert stats.correlation(x, y, within=CATEGORIES)["p"] > 0.05
    assert stats.correlation(x, x - topic, within=CATEGORIES)["p"] < 0.01


def test_correlation_does_not_depend_on_units_and_admits_a_constant():
    rng = np.random.default_rng(16)
    x, y = rng.normal(size=(2, 40))
    small = stats.correlation(1e-9 * x, 1e6 * y + 7)
    for name, value in stats.correlation(x, y).items():
        assert small[name] == pytest.approx(value, abs=1e-6), name
    constant = stats.correlation(np.full(40, 0.1) + 1e-18, y)
    assert np.isnan(constant["r"]) and np.isnan(constant["p"]) and constant["n"] == 40
    with pytest.raises(ValueError, match="unknown method"):
        stats.correlation(x, y, method="kendall")


def test_the_same_seed_gives_the_same_numbers():
    x, y = np.random.default_rng(17).normal(size=(2, 50))
    assert stats.correlation(x, y, seed=5) == stats.correlation(x, y, seed=5)
    assert stats.correlation(x, y, seed=5) != stats.correlation(x, y, seed=6)
    assert stats.paired(x, y, seed=5) == stats.paired(x, y, seed=5)
