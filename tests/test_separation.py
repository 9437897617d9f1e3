"""Guards the held-out check of a direction, and how far it depends on its prompts: it is believed on unseen prompts only, and not where there is
nothing."""

import itertools
from functools import partial

import numpy as np
import pytest
from planted import VARIANT_LAYERS, acts, named, variants
from scipy import stats as scipy_stats

from emlens import directions, fitting, separation

CATEGORIES = np.repeat([f"c{i}" for i in range(8)], 4)


def test_a_planted_direction_is_found_and_the_same_data_shuffled_is_not():
    a, b, _ = variants(1.5)
    found = separation.held_out_separation(a, b, n_permutations=300)
    assert set(found["metric"]) == {"auc", "cohen_d", "pair_accuracy"} and (found["q"] < 0.02).all()
    assert (found.query("metric == 'pair_accuracy'")["estimate"] > 0.9).all() and (found["n"] == 32).all()
    swap = np.random.default_rng(0).random(32) < 0.5  # the same rows, which variant is which forgotten
    left, right = (np.where(swap[:, None, None], y.values, x.values) for x, y in ((a, b), (b, a)))
    nothing = separation.held_out_separation(acts(left, VARIANT_LAYERS), acts(right, VARIANT_LAYERS), n_permutations=300)
    assert (nothing["q"] > 0.05).all()


def test_holding_out_is_what_makes_the_difference():
    a, b, _ = variants(0.0, n=16, layers=tuple(range(40)))  # noise only, 40 repeats
    d = directions.mean_difference(a, b)
    fitted = (directions.project(a, d) > directions.project(b, d)).mean()
    unseen = separation.held_out_separation(a, b, n_permutations=50).query("metric == 'pair_accuracy'")["estimate"]
    assert fitted.mean() > 0.75  # on the prompts it was fitted on, a direction always looks good
    assert unseen.mean() == pytest.approx(0.5, abs=0.04)


def test_held_out_p_is_uniform_when_variants_differ_by_noise_only():
    """200 repeats as layers: the band covers 95 +- 3 %, p is uniform, the maximum over layers is calm."""
    a, b, _ = variants(0.0, layers=tuple(range(200)))
    table = separation.held_out_separation(a, b, n_splits=2, n_permutations=200)
    for metric, part in table.groupby("metric"):
        inside = (part["null_low"] <= part["estimate"]) & (part["estimate"] <= part["null_high"])
        assert 0.92 <= inside.mean() <= 0.98, metric
        if metric != "pair_accuracy":  # of 32 pairs: too coarse for a uniform p
            assert scipy_stats.kstest(part["p"], "uniform").pvalue > 0.01, metric
        assert part["q"].min() > 0.05, metric


def test_held_out_scores_equal_refitting_by_hand():
    a, b, _ = variants(1.0, n=16)
    sides = separation._sides(a, b, None)
    folds = separation._folds(sides, 2, np.random.default_rng(0))
    x = np.concatenate([a.layer(5), b.layer(5)]).astype(float)
    ours = separation._held_out_projections(x, sides.labels[None], folds, fitting.mean_differences)[0]
    by_hand = np.zeros(32)
    for fold, keep in itertools.product(folds, (True, False)):
        fit = np.flatnonzero((fold == keep)[:16])
        rows = np.flatnonzero((fold != keep)[:16])
        d = directions.mean_difference(a.select(ids=a.ids[fit]), b.select(ids=b.ids[fit]))
        centre = np.concatenate([a.layer(5)[fit], b.layer(5)[fit]]).mean(axis=0)
        for half, side in enumerate((a, b)):
            by_hand[rows + 16 * half] += (side.layer(5)[rows] - centre) @ d.layer(5) / 2
    assert np.allclose(ours, by_hand, atol=1e-4)
    assert (folds[:, :16] == folds[:, 16:]).all() and (folds.sum(axis=1) == 16).all()  # variants stay together


def test_statistics_equal_scipy():
    rng = np.random.default_rng(1)
    scores, labels = rng.standard_normal((1, 20)), np.r_[np.ones(12), -np.ones(8)][None]
    auc, d = separation._separations(scores, labels, paired=False)[0]
    x, y = scores[0, :12], scores[0, 12:]
    assert auc == pytest.approx(scipy_stats.mannwhitneyu(x, y).statistic / 96)
    assert d == pytest.approx(scipy_stats.ttest_ind(x, y).statistic * np.sqrt(1 / 12 + 1 / 8))
    pairs = separation._separations(np.array([[3.0, 1, 2, 1]]), np.array([[1.0, 1, -1, -1]]), paired=True)[0]
    assert pairs[2] == 0.75  # one in order, one tie


def test_interval_of_separation_covers_its_estimate_and_narrows_with_prompts():
    few, many = (separation.held_out_separation(*variants(1.0, n=n)[:2], n_permutations=50) for n in (32, 320))
    for table in (few, many):
        assert ((table["low"] <= table["estimate"]) & (table["estimate"] <= table["high"])).all()
    width = [(t["high"] - t["low"]).where(t["metric"] == "cohen_d").mean() for t in (few, many)]
    assert width[1] < 0.6 * width[0]


def test_whole_groups_are_held_out_and_swapped():
    a, b, _ = variants(1.5)
    sides = separation._sides(a, b, "category")
    rng = np.random.default_rng(0)
    for fold in separation._folds(sides, 5, rng):
        assert not set(CATEGORIES[fold[:32]]) & set(CATEGORIES[~fold[:32]]) and fold[:32].sum() == 16
    labels = separation._swapped(sides, 50, rng)
    assert (labels[:, :32] == -labels[:, 32:]).all() and (labels[:, :32:4] == labels[:, 1:32:4]).all()
    table = separation.held_out_separation(a, b, groups="category", n_permutations=300)
    assert (table.query("metric == 'auc'")["q"] < 0.05).all() and "groups: category" in table.attrs["null"]["labels permuted"]


def test_few_groups_are_swapped_in_every_way_and_p_is_exact():
    """8 groups: the observed labels and all 255 other ways; all swapped turns the direction round, so no p lies below 2 / 256."""
    sides = separation._sides(*variants(1.0)[:2], "category")
    labels = separation._swapped(sides, 256, np.random.default_rng(0))
    assert len(labels) == 255 and len(np.unique(labels, axis=0)) == 255 and not (labels == sides.labels).all(axis=1).any()
    assert len(separation._swapped(sides, 255, np.random.default_rng(0))) == 255, "fewer draws than ways are drawn"
    found = separation.held_out_separation(*variants(3.0)[:2], groups="category", n_permutations=1000)
    assert found["p"].min() == pytest.approx(2 / 256) and (found["n_clusters"] == 8).all()
    assert np.allclose(found["p"] * 256, np.round(found["p"] * 256))


# ---- other ways to fit


WAYS = {
    "pca": fitting.pca_direction,
    "lda": fitting.lda_direction,
    "logistic": fitting.logistic_direction,
    "mean difference": directions.mean_difference,
}


@pytest.mark.parametrize("method", WAYS)
def test_each_method_is_refitted_on_one_half_and_read_on_the_other(method):
    a, b, _ = variants(1.0, n=24)
    table = separation.held_out_separation(a, b, n_splits=2, n_permutations=3, seed=4, method=method)
    folds = separation._folds(separation._sides(a, b, None), 2, np.random.default_rng(4))[:, :24]
    scores = np.zeros((2, 24))
    for fold, keep in itertools.product(folds, (True, False)):
        fit = fold == keep
        d = WAYS[method](a.where(fit), b.where(fit)).layer(5)
        centre = np.concatenate([a.layer(5)[fit], b.layer(5)[fit]]).mean(axis=0)
        scores[:, ~fit] += [(side.layer(5)[~fit] - centre) @ d / 2 for side in (a, b)]
    auc = scipy_stats.mannwhitneyu(*scores).statistic / 24**2
    assert table.query("metric == 'auc' and layer == 5")["estimate"].iloc[0] == pytest.approx(auc, abs=2 / 24**2)
    assert table.query("metric == 'pair_accuracy' and layer == 5")["estimate"].iloc[0] == pytest.approx((scores[0] > scores[1]).mean(), abs=1e-9)
    assert f"by {method}, " in table.attrs["what"]


def crossed(strength, n=40, d=12, seed=0):
    """Sides apart along axis 0; prompts vary most along a direction askew to it, which hides it from the mean difference."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * n, 3, d)) + 8 * rng.standard_normal((2 * n, 3, 1)) * np.r_[0.8, 0.6, np.zeros(d - 2)]
    rows[:n, :, 0] += strength
    return acts(rows[:n], VARIANT_LAYERS, id=named("a", n)), acts(rows[n:], VARIANT_LAYERS, id=named("b", n))


WEAK = fitting.Method("weakly penalised", partial(fitting.logistic_gradients, penalty=0.01))


@pytest.mark.parametrize(("method", "draws"), [("lda", 200), (WEAK, 40)])
def test_a_method_that_knows_the_spread_finds_what_the_mean_difference_misses_and_nothing_in_noise(method, draws):
    there, plain = (separation.held_out_separation(*crossed(2.5), n_permutations=draws, n_splits=2, method=m) for m in (method, "mean difference"))
    auc, plain_auc = (table.query("metric == 'auc'") for table in (there, plain))
    assert (auc["estimate"] > 0.7).all() and (auc["q"] < 0.05).all() and (plain_auc["estimate"] < auc["estimate"] - 0.1).all()
    nothing = separation.held_out_separation(*crossed(0.0), n_permutations=draws, n_splits=2, method=method)
    assert (nothing["q"] > 0.05).all()


def test_held_out_p_is_uniform_for_lda_too():
    a, b, _ = variants(0.0, layers=tuple(range(100)))
    table = separation.held_out_separation(a, b, n_splits=1, n_permutations=100, method="lda").query("metric == 'auc'")
    assert scipy_stats.kstest(table["p"], "uniform").pvalue > 0.01 and table["q"].min() > 0.05


def test_a_method_of_ones_own_is_fitted_too():
    a, b, planted = variants(1.5)
    known = fitting.Method("as planted", lambda x, in_a: np.tile(planted[1], (len(in_a), 1)))
    table = separation.held_out_separation(a.select(layers=[5]), b.select(layers=[5]), n_permutations=20, method=known)
    assert (table.query("metric == 'pair_accuracy'")["estimate"] > 0.95).all() and "by as planted" in table.attrs["what"]
    with pytest.raises(ValueError, match="unknown method 'svm'"):
        separation.held_out_separation(a, b, method="svm")


# ---- stability


@pytest.mark.parametrize("method", ["mean difference", "lda"])
def test_a_planted_direction_is_stable_and_one_of_noise_is_as_stable_as_labels_permuted(method):
    found = separation.stability(*variants(1.0)[:2], method=method)
    nothing = separation.stability(*variants(0.0)[:2], method=method)
    assert (found["estimate"] > 0.85).all() and (found["q"] < 0.05).all() and (found["null_high"] < found["estimate"]).all()
    assert (nothing["estimate"].between(0.5, 0.85)).all() and (nothing["q"] > 0.05).all(), "a bootstrap is stable even in noise: hence the null"
    for table in (found, nothing):
        assert ((table["low"] < table["estimate"]) & (table["estimate"] < table["high"])).all() and (table["high"] <= 1).all()
        assert list(table["layer"]) == [2, 5, 9] and (table["metric"] == "cosine").all() and (table["n"] == 32).all()
        assert "not a confidence interval" in table.attrs["interval"] and table.attrs["n_boot"] == 50


def test_stability_equals_resampling_by_hand_and_grows_with_prompts():
    a, b, _ = variants(1.0)
    table = separation.stability(a, b, n_boot=7, n_permutations=5, seed=3)
    whole, rng = directions.mean_difference(a, b), np.random.default_rng(3)
    cosines = []
    for _ in range(7):
        rows = rng.choice(np.arange(32), 32)
        cosines.append([(a.layer(i)[rows] - b.layer(i)[rows]).mean(axis=0) for i in VARIANT_LAYERS])
    cosines = [[float(v @ whole.layer(i) / np.linalg.norm(v)) for v, i in zip(row, VARIANT_LAYERS, strict=True)] for row in cosines]
    assert np.allclose(table["estimate"], np.mean(cosines, axis=0), atol=1e-5)
    assert np.allclose(table["low"], np.quantile(cosines, 0.025, axis=0), atol=1e-5)
    more = separation.stability(*variants(1.0, n=320)[:2], n_boot=20, n_permutations=5)
    assert (more["estimate"] > table["estimate"]).all() and (more["low"] > table["low"]).all()


def test_stability_over_topics_is_less_than_over_prompts_where_topics_have_their_own_directions():
    a, b, planted = variants(0.5, n=64)
    rng = np.random.default_rng(7)
    own = 2 * rng.standard_normal((8, 3, 16)) / 4
    topics = a.facts["category"].str[1:].astype(int).to_numpy()
    moved = acts(a.values + own[topics], VARIANT_LAYERS, category=a.facts["category"].to_numpy())
    prompts, whole = (separation.stability(moved, b, clusters=g, n_permutations=20) for g in (None, "category"))
    assert (whole["estimate"] < prompts["estimate"] - 0.05).all() and (whole["n_clusters"] == 8).all() and (prompts["n_clusters"] == 64).all()


def test_stability_of_sides_that_share_no_prompt_and_what_is_refused():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((60, 3, 16))
    a = acts(rows[:25] + 2 * np.eye(16)[0], VARIANT_LAYERS, id=named("a", 25), category=["x"] * 25)
    b = acts(rows[25:], VARIANT_LAYERS, id=named("b", 35), category=["y"] * 35)
    assert (separation.stability(a, b)["q"] < 0.05).all()
    with pytest.raises(ValueError, match="a sample of 2 groups holds prompts of one side only"):
        separation.stability(a, b, clusters="category")
    with pytest.raises(ValueError, match="different places"):
        separation.stability(a, b.select(layers=[2]))


# ---- fitted on one pair, read on another


def pairs_of_sides(own, shared, seed=0):
    """Two pairs of variants of the same prompts: what moves a from b is partly the same in both pairs."""
    rng = np.random.default_rng(seed)
    prompts, noise = 3 * rng.standard_normal((32, 3, 16)), lambda: 0.3 * rng.standard_normal((32, 3, 16))
    common, one, two = np.linalg.qr(rng.standard_normal((16, 3)))[0].T
    sides = [prompts + noise() + move for move in (shared * common + own * one, 0, shared * common + own * two, 0)]
    return [acts(side, VARIANT_LAYERS, category=CATEGORIES) for side in sides]


def test_a_direction_in_common_is_found_across_and_a_mark_of_one_pair_is_not():
    """Both pairs are told apart by their own directions; only what they share tells across."""
    for shared, finds in ((1.0, True), (0.0, False)):
        fit_a, fit_b, a, b = pairs_of_sides(1.0, shared)
        assert (separation.held_out_separation(a, b, n_permutations=100).query("metric == 'auc'")["estimate"] > 0.55).all()
        table = separation.transferred_separation(fit_a, fit_b, a, b, groups="category", n_permutations=300)
        auc = table[table["metric"] == "auc"]
        assert (auc["q"] < 0.05).all() == finds and ((auc["q"] > 0.05).all() == (not finds)), auc
        assert set(table["metric"]) == {"auc", "cohen_d", "pair_accuracy"} and (table["n"] == 32).all() and (table["n_clusters"] == 8).all()
        assert ((table["low"] <= table["estimate"]) & (table["estimate"] <= table["high"])).all()


def test_across_and_turned_round_lies_below_chance():
    fit_a, fit_b, a, b = pairs_of_sides(0.0, 1.0)
    there, back = (separation.transferred_separation(fit_a, fit_b, *sides, n_permutations=50) for sides in ((a, b), (b, a)))
    assert np.allclose(there.query("metric == 'auc'")["estimate"], 1 - back.query("metric == 'auc'")["estimate"])
    assert (back.query("metric == 'auc'")["p"] > 0.9).all()


def test_across_equals_fitting_by_hand():
    fit_a, fit_b, a, b = pairs_of_sides(0.5, 0.5)
    table = separation.transferred_separation(fit_a, fit_b, a, b, n_splits=1, n_permutations=5, seed=3)
    fold = separation._folds(separation._sides(a, b, None), 1, np.random.default_rng(3))[0][:32]
    scores = np.zeros((2, 32))
    for keep in (fold, ~fold):
        d = directions.mean_difference(fit_a.where(keep), fit_b.where(keep))
        centre = np.concatenate([a.layer(5)[keep], b.layer(5)[keep]]).mean(axis=0)
        scores[:, ~keep] = [(side.layer(5)[~keep] - centre) @ d.layer(5) for side in (a, b)]
    expected = scipy_stats.mannwhitneyu(*scores).statistic / 32**2
    assert table.query("metric == 'auc' and layer == 5")["estimate"].iloc[0] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="four sides hold different prompts"):
        separation.transferred_separation(fit_a.where(fold), fit_b, a, b)


def test_sides_that_share_no_prompt_are_told_apart_too():
    rng = np.random.default_rng(2)
    rows, planted = rng.standard_normal((60, 3, 16)), np.eye(16)[0]
    topic = np.tile(["x", "y"], 30)
    for strength, finds in ((2.0, True), (0.0, False)):
        a = acts(rows[:25] + strength * planted, VARIANT_LAYERS, id=named("a", 25), category=topic[:25])
        b = acts(rows[25:], VARIANT_LAYERS, id=named("b", 35), category=topic[25:])
        table = separation.held_out_separation(a, b, n_permutations=300)
        assert set(table["metric"]) == {"auc", "cohen_d"} and (table["n"] == 60).all()
        assert (table["q"] < 0.05).all() == finds and ((table["q"] > 0.05).all() == (not finds))


def test_held_out_separation_refuses():
    a, b, _ = variants(1.0)
    with pytest.raises(ValueError, match="16 prompts are on both sides, 16 on one only"):
        separation.held_out_separation(a, b.where(np.arange(32) < 16))
    with pytest.raises(ValueError, match="at least 2 of each"):
        separation.held_out_separation(*(x.where(np.arange(32) < 3) for x in (a, b)))
    with pytest.raises(ValueError, match="1 groups"):
        separation.held_out_separation(*(x.where(CATEGORIES == "c0") for x in (a, b)), groups="category")
    with pytest.raises(KeyError, match="no column 'topic'"):
        separation.held_out_separation(a, b, groups="topic")
