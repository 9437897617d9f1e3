"""Guards what is asked prompt by prompt: the paper's table by its formulas, partial and rival correlations, settings side by side."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted import LAYERS, acts, anisotropic, isotropic, named
from scipy import stats as scipy_stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from emlens import by_prompt, correlations, shifts

# ---- the paper's table


def sets(seed=0):
    train, before = acts(anisotropic(50, seed + 1), LAYERS), acts(anisotropic(12, seed + 2), LAYERS, n_tokens=np.arange(12), category=list("abc") * 4)
    return train, before, acts(anisotropic(50, seed + 3, frame=2), LAYERS), acts(anisotropic(12, seed + 4, frame=2), LAYERS)


def test_every_column_is_its_formula():
    train, before, train_shift, shift = sets()
    order = np.random.default_rng(0).permutation(12)
    table = by_prompt.prompt_geometry(train, before, train_shift, shift.select(ids=shift.ids.iloc[order]), k=3, shift_k=5)
    assert len(table) == 24 and list(table.columns[:2]) == ["id", "layer"] and list(table.columns[-2:]) == ["n_tokens", "category"]
    row = table.query("layer == 7 and id == 'q4'").iloc[0]
    x, d = before.layer(7)[4].astype(float), shift.layer(7)[4].astype(float)
    fit, moved = PCA(3, svd_solver="full").fit(train.layer(7).astype(float)), PCA(5, svd_solver="full").fit(train_shift.layer(7).astype(float))
    mu, nu, c, e = fit.mean_, moved.mean_, fit.transform(x[None])[0], moved.transform(d[None])[0]
    again = moved.inverse_transform(e[None])[0]
    norm, cos = np.linalg.norm, lambda u, v: u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    unit = nu / norm(nu)
    expected = {
        "k": 3,
        "explained_energy": (norm(c) / norm(x - mu)) ** 2,
        "norm_fraction": norm(c) / norm(x - mu),
        "cosine_to_mean": cos(x, mu),
        "mahalanobis": np.sqrt((c**2 / fit.explained_variance_).sum()),
        "shift_k": 5,
        "shift_norm": norm(d),
        "shift_cosine": cos(d, nu),
        "scalar_projection": d @ unit,
        "orthogonal_remainder": norm(d - (d @ unit) * unit),
        "mean_explained": 1 - norm(d - nu) ** 2 / norm(d) ** 2,
        "explained_raw": 1 - norm(d - again) ** 2 / norm(d) ** 2,
        "explained_centred": 1 - norm(d - again) ** 2 / norm(d - nu) ** 2,
        "reconstruction_cosine": cos(again, d),
        "shift_mahalanobis": np.sqrt((e**2 / moved.explained_variance_).sum()),
    }
    assert row[list(expected)].astype(float).to_dict() == pytest.approx(expected, abs=1e-6)
    assert list(table.columns[2:-2]) == list(expected) and row["n_tokens"] == 4 and row["category"] == "b"
    alike = shifts.similarity_by_prompt(train_shift, shift).query("layer == 7 and id == 'q4'").iloc[0]
    assert (row["shift_cosine"], row["scalar_projection"]) == pytest.approx((alike["cosine"], alike["scalar_projection"]))


def test_a_shift_that_is_the_mean_is_explained_without_components():
    train, before, train_shift, shift = sets()
    mean = np.tile(train_shift.values.mean(axis=0), (12, 1, 1))
    table = by_prompt.prompt_geometry(train, before, train_shift, acts(mean, LAYERS), 3, 5)
    for column in ("mean_explained", "explained_raw", "shift_cosine", "reconstruction_cosine"):
        assert np.allclose(table[column], 1, atol=1e-5)
    assert np.allclose(table["orthogonal_remainder"], 0, atol=1e-3 * table["shift_norm"].max())
    other = by_prompt.prompt_geometry(train, before, train_shift, shift, 3, 5)
    assert (other["explained_raw"] > other["mean_explained"]).all() and (other["orthogonal_remainder"] > 0.01).all()


def test_components_by_share_of_the_variance():
    table = by_prompt.prompt_geometry(*sets(), variance=0.9, shift_variance=0.5)
    fit = PCA(0.9, svd_solver="full").fit(sets()[0].layer(7).astype(float))
    assert (table.loc[table["layer"] == 7, "k"] == fit.n_components_).all() and (table["shift_k"] < table["k"]).all()


def test_prompt_geometry_refuses():
    train, before, train_shift, shift = sets()
    with pytest.raises(ValueError, match="4 prompts are in acts or in shift only"):
        by_prompt.prompt_geometry(train, before, train_shift, shift.where(np.arange(12) < 8))
    with pytest.raises(ValueError, match="different layers"):
        by_prompt.prompt_geometry(train, before, train_shift, shift.select(layers=[3]))
    with pytest.raises(ValueError, match="train_shift is a recording"):
        by_prompt.prompt_geometry(train, before, replace(train_shift, meta={"prompts_sha256": "0"}), shift)
    with pytest.raises(ValueError, match="layer 3: .*k=60 was asked"):
        by_prompt.prompt_geometry(train, before, train_shift, shift, k=60)


# ---- partial correlations


def test_partial_correlation_is_that_of_sklearns_residuals():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"length": rng.normal(size=80), "topic": rng.choice(list("abcd"), 80)})
    x, y = rng.normal(size=80) + table["length"], rng.normal(size=80) - table["length"]
    z = pd.get_dummies(table, columns=["topic"]).to_numpy(dtype=float)
    left, right = (v - LinearRegression().fit(z, v).predict(z) for v in (x, y))
    found = correlations.partial_correlation(x, y, table, n_permutations=200, n_boot=100)
    assert found["r"] == pytest.approx(scipy_stats.pearsonr(left, right)[0]) and found["n_covariates"] == 4
    assert found["low"] < found["r"] < found["high"] and found["null_low"] < 0 < found["null_high"]
    none = correlations.partial_correlation(x, y, table[[]], n_permutations=20, n_boot=20)
    assert none["r"] == pytest.approx(scipy_stats.pearsonr(x, y)[0]) and none["n_covariates"] == 0


def test_partial_p_holds_where_a_covariate_makes_all_of_the_correlation_and_falls_where_it_does_not():
    """Twenty covariates on 40 rows: permuting residuals alone would reject too often."""
    rng = np.random.default_rng(1)
    p, found = [], []
    for _ in range(200):
        z = pd.DataFrame(rng.normal(size=(40, 20)))
        x, y = z.sum(axis=1) + rng.normal(size=40), z.sum(axis=1) + rng.normal(size=40)
        p.append(correlations.partial_correlation(x, y, z, n_permutations=199, n_boot=2)["p"])
        found.append(correlations.partial_correlation(x, y + x, z, n_permutations=199, n_boot=2)["p"])
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01 and np.mean(np.array(p) <= 0.05) < 0.09
    assert np.mean(np.array(found) <= 0.05) > 0.8


def test_partial_correlation_of_what_the_covariates_are_is_nothing():
    rng = np.random.default_rng(2)
    z = pd.DataFrame({"a": rng.normal(size=30)})
    assert np.isnan(correlations.partial_correlation(2 * z["a"] + 1, rng.normal(size=30), z)["r"])
    with pytest.raises(ValueError, match="have no 'a'"):
        correlations.partial_correlation(np.arange(3), np.arange(3), pd.DataFrame({"a": [1, None, 2]}))
    with pytest.raises(ValueError, match="covariates 30 rows"):
        correlations.partial_correlation(np.arange(3), np.arange(3), z)


# ---- against a rival


def test_williams_test_is_that_of_the_literature():
    t, p = correlations.williams(0.4, 0.5, 0.1, 103)  # Steiger 1980, case A, as the R package psych prints it: t -0.89, p 0.37
    assert t == pytest.approx(-0.89, abs=0.005) and p == pytest.approx(0.37, abs=0.005)
    assert correlations.williams(0.5, 0.4, 0.1, 103) == pytest.approx((-t, p))
    assert np.isnan(correlations.williams(0.4, 0.4, 1.0, 50)).all() and np.isnan(correlations.williams(0.4, 0.5, 0.1, 3)).all()


def test_williams_test_holds_for_equal_rivals_and_falls_for_unequal_ones():
    rng = np.random.default_rng(3)
    level = {"equal": [], "unequal": []}
    for _ in range(300):
        y = rng.normal(size=60)
        first, second = y + rng.normal(size=60), y + rng.normal(size=60)
        level["equal"].append(correlations.correlation_contrast(first, second, y, n_boot=2)["p"])
        level["unequal"].append(correlations.correlation_contrast(first, second + 2 * rng.normal(size=60), y, n_boot=2)["p"])
    assert scipy_stats.kstest(level["equal"], "uniform").pvalue > 0.01 and np.mean(np.array(level["unequal"]) < 0.05) > 0.5


def in_topics(rng, share=0.5, groups=8, size=12):
    """A column of rows in groups of which a share of the variance is the group's."""
    return np.sqrt(share) * np.repeat(rng.normal(size=groups), size) + np.sqrt(1 - share) * rng.normal(size=groups * size)


def test_p_of_rows_in_topics_holds_with_the_topics_named_and_not_without():
    """Partial correlation 0 and equal rivals over 8 topics of 12 prompts, half of the variance between topics; and both where they are not."""
    rng, topic = np.random.default_rng(8), np.repeat(np.arange(8), 12)
    partial, contrast = correlations.partial_correlation, correlations.correlation_contrast
    rejected = {name: [] for name in ("partial", "rows", "partial there", "contrast", "williams", "contrast there")}
    for i in range(150):
        x, y, one, two = (in_topics(rng) for _ in range(4))
        length = pd.DataFrame({"length": rng.normal(size=96), "topic": topic.astype(str)})
        rejected["partial"].append(partial(x, y, length[["length"]], n_permutations=99, n_boot=2, seed=i, within=topic)["p"])
        rejected["rows"].append(partial(x, y, length[["length"]], n_permutations=99, n_boot=2, seed=i)["p"])
        rejected["partial there"].append(partial(x, y + 0.7 * x, length, n_permutations=99, n_boot=2, seed=i, within=topic)["p"])
        a, b = 0.6 * y + 0.8 * one, 0.6 * y + 0.8 * two
        rejected["contrast"].append(contrast(a, b, y, topic, n_boot=400, seed=i)["p"])
        rejected["williams"].append(contrast(a, b, y, n_boot=2, seed=i)["p"])
        rejected["contrast there"].append(contrast(1.5 * y + one, two, y, topic, n_boot=400, seed=i)["p"])
    rates = {name: np.mean(np.array(p) <= 0.05) for name, p in rejected.items()}
    assert max(rates["partial"], rates["contrast"]) <= 0.10 < 0.2 < min(rates["rows"], rates["williams"])
    assert min(rates["partial there"], rates["contrast there"]) > 0.6


def test_p_of_a_contrast_over_topics_is_where_its_interval_touches_nothing():
    rng, topic = np.random.default_rng(9), np.repeat(np.arange(8), 12)
    y = in_topics(rng)
    columns, options = (y + rng.normal(size=96), y + 1.7 * rng.normal(size=96), y), {"clusters": topic, "n_boot": 4000}
    found = correlations.correlation_contrast(*columns, **options)
    assert 0.02 < found["p"] < 0.6 and np.isnan(found["t"]) and found["n_clusters"] == 8
    for level, reaches in ((1 - found["p"] - 0.005, False), (1 - found["p"] + 0.005, True)):
        at = correlations.correlation_contrast(*columns, level=level, **options)
        assert (at["low"] <= 0 <= at["high"]) == reaches
    resampled = [np.concatenate([np.flatnonzero(topic == t) for t in pick]) for pick in np.random.default_rng(0).integers(8, size=(4000, 8))]
    corr = [np.corrcoef(np.stack(columns)[:, rows]) for rows in resampled]
    by_hand = np.quantile([r[0, 2] - r[1, 2] for r in corr], scipy_stats.norm.cdf(np.sqrt(8 / 7) * scipy_stats.t(7).ppf([0.025, 0.975])))
    assert (found["low"], found["high"]) == pytest.approx(tuple(by_hand))


def test_the_interval_of_a_contrast_resamples_all_three_together():
    rng = np.random.default_rng(4)
    y = rng.normal(size=200)
    first = y + rng.normal(size=200)
    found = correlations.correlation_contrast(first, first + 0.05 * rng.normal(size=200), y)
    assert -0.05 < found["low"] < found["difference"] < found["high"] < 0.05  # each r alone has an interval of 0.14
    far = correlations.correlation_contrast(first, rng.normal(size=200), y)
    assert far["low"] > 0.4 and far["difference"] == pytest.approx(0.7, abs=0.15)
    assert np.isnan(correlations.correlation_contrast(np.ones(9), np.arange(9), np.arange(9))["p"])


# ---- over settings


def by_the_book(z, v):
    """DerSimonian and Laird as in their paper, with the error of Hartung and Knapp (not below theirs), line by line."""
    w = [1 / one for one in v]
    fixed = sum(a * b for a, b in zip(w, z, strict=True)) / sum(w)
    q = sum(a * (b - fixed) ** 2 for a, b in zip(w, z, strict=True))
    tau2 = max(0, (q - len(z) + 1) / (sum(w) - sum(a * a for a in w) / sum(w)))
    star = [1 / (one + tau2) for one in v]
    mean = sum(a * b for a, b in zip(star, z, strict=True)) / sum(star)
    knapp = sum(a * (b - mean) ** 2 for a, b in zip(star, z, strict=True)) / (len(z) - 1) / sum(star)
    return mean, max(knapp, 1 / sum(star)) ** 0.5, tau2, q


def test_random_effects_are_those_of_dersimonian_and_laird_tested_as_hartung_and_knapp_do():
    r, n = [0.849, 0.887, 0.607, 0.257], np.array([1414, 320, 320, 60])
    found = correlations.random_effects(r, correlations.fisher_variance(n))
    mean, error, tau2, q = by_the_book(np.arctanh(r), 1 / (n - 3))
    assert (found["r"], found["tau2"], found["cochran_q"]) == pytest.approx((np.tanh(mean), tau2, q))
    law = scipy_stats.t(3)
    reach = law.ppf(0.975) * error
    assert (found["low"], found["high"], found["p"]) == pytest.approx((np.tanh(mean - reach), np.tanh(mean + reach), 2 * law.sf(mean / error)))
    wide = scipy_stats.t.ppf(0.975, 2) * np.sqrt(tau2 + error**2)
    assert (found["predicted_low"], found["predicted_high"]) == pytest.approx((np.tanh(mean - wide), np.tanh(mean + wide)))
    assert found["i2"] == pytest.approx(1 - 3 / q) and found["cochran_p"] == pytest.approx(scipy_stats.chi2(3).sf(q)) and found["n"] == 4
    alike = correlations.random_effects([0.5, 0.5, 0.5], [0.01, 0.02, 0.03])
    assert alike["tau2"] == 0 == alike["i2"] and alike["r"] == pytest.approx(0.5)
    assert alike["p"] == pytest.approx(2 * scipy_stats.t(2).sf(np.arctanh(0.5) * np.sqrt(100 + 50 + 100 / 3)))  # not below theirs: 0 here
    assert np.isnan(correlations.random_effects([0.5, 0.4], [0.01, 0.02])["predicted_low"])


def test_random_effects_cover_the_mean_of_settings_that_differ_and_find_their_spread():
    rng, n, settings = np.random.default_rng(5), 100, 40
    hits, taus = [], []
    for _ in range(200):
        true = 0.4 + 0.3 * rng.normal(size=settings)
        found = correlations.random_effects(np.tanh(true + rng.normal(size=settings) / np.sqrt(n - 3)), np.full(settings, 1 / (n - 3)))
        hits.append(found["low"] < np.tanh(0.4) < found["high"])
        taus.append(found["tau2"])
    assert 0.90 <= np.mean(hits) <= 0.99 and np.mean(taus) == pytest.approx(0.09, rel=0.1)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_three_settings_that_differ_do_not_reject_a_mean_of_nothing_too_often_and_three_that_agree_reject(tau):
    """1500 summaries of three settings; normal quantiles on DerSimonian and Laird's error reject in 0.19 of those that differ."""
    rng, spread = np.random.default_rng(6), np.full(3, 1 / 300)
    z = tau * rng.normal(size=(1500, 3)) + rng.normal(size=(1500, 3)) / np.sqrt(300)
    p = np.array([correlations.random_effects(np.tanh(each), spread)["p"] for each in z])
    assert (p <= 0.05).mean() <= 0.065 and (tau == 0 or (p <= 0.05).mean() >= 0.035)
    there = [correlations.random_effects(np.tanh(0.6 + each), spread)["p"] for each in z[:200]]
    assert np.mean(np.array(there) <= 0.05) > (0.95 if tau == 0 else 0.2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: correlations.random_effects([0.5], [0.1]), "two settings at least"),
        (lambda: correlations.random_effects([0.5, 1.0], [0.1, 0.1]), "inside"),
        (lambda: correlations.fisher_variance([3, 50]), "more than three"),
    ],
)
def test_what_cannot_be_summarised_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ---- over few rows


def test_few_rows_are_gone_through_in_every_order():
    rng = np.random.default_rng(6)
    for n in (4, 6):
        x, y = rng.normal(size=(2, n))
        found = correlations.few_rows_correlation(x, y)
        every = [scipy_stats.pearsonr(x, order)[0] for order in itertools.permutations(y)]
        assert found["r"] == pytest.approx(every[0]) and found["exact"] and found["n"] == n
        assert found["p"] == pytest.approx(np.mean([abs(r) >= abs(every[0]) - 1e-9 for r in every]))
        interval = scipy_stats.pearsonr(x, y).confidence_interval()
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
        without = [scipy_stats.pearsonr(np.delete(x, i), np.delete(y, i))[0] for i in range(n)]
        assert (found["without_one_low"], found["without_one_high"]) == pytest.approx((min(without), max(without)))
    ranks = correlations.few_rows_correlation([1, 2, 3, 4], [1, 5, 6, 100], "spearman")
    assert ranks["r"] == pytest.approx(1) and ranks["p"] == ranks["p_floor"] == pytest.approx(2 / 24), "four runs in order cannot reach .05"
    many = correlations.few_rows_correlation(np.arange(30.0), np.arange(30.0) + rng.normal(size=30), n_permutations=500)
    assert not many["exact"] and many["p"] == many["p_floor"] == 1 / 501


def test_the_exact_p_of_few_rows_is_uniform_and_one_odd_row_is_seen():
    rng = np.random.default_rng(7)
    p = [correlations.few_rows_correlation(*rng.normal(size=(2, 6)))["p"] for _ in range(200)]
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01 and np.mean(np.array(p) <= 0.05) < 0.1
    odd = correlations.few_rows_correlation([0.1, -0.1, 0.1, -0.1, 5], [0.1, 0.1, -0.1, -0.1, 5])
    assert odd["r"] > 0.99 and abs(odd["without_one_low"]) < 0.3
    assert np.isnan(correlations.few_rows_correlation(np.ones(5), np.arange(5))["p"])


def test_three_runs_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="four rows at least.*a correlation of 1 comes by chance in one of three orders"):
        correlations.few_rows_correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="unknown method"):
        correlations.few_rows_correlation(np.arange(4), np.arange(4), "kendall")


# ---- by setting


def published(seed=0, settings=("one", "two", "three"), strength=1.0, n=60):
    """A table as the paper's: overlap drives similarity by `strength` in each setting, and prompt length drives both."""
    rng, parts = np.random.default_rng(seed), []
    for number, setting in enumerate(settings):
        length, own = rng.normal(size=n), rng.normal(size=n)
        columns = {"length": length, "explained_energy": own + length, "shift_cosine": strength * own + length + 0.5 * rng.normal(size=n)}
        parts.append(pd.DataFrame({"id": named("q", n), "layer": 32, "setting": setting, "category": list("abcd") * (n // 4), **columns}))
        parts[-1]["cosine_to_mean"] = parts[-1]["shift_cosine"] + 0.3 * rng.normal(size=n)
        parts[-1]["shift_cosine"] += 10 * number  # settings differ in level: pooled, the correlation is another one
    return pd.concat(parts, ignore_index=True)


def test_correlations_are_within_each_setting_and_length_is_taken_out():
    table = published(strength=0.0)
    found = by_prompt.overlap_correlations(table, covariates=["length"], by=["setting", "layer"], n_permutations=300).set_index(["setting", "metric"])
    part = table[table["setting"] == "two"]
    assert found.loc[("two", "pearson"), "estimate"] == pytest.approx(scipy_stats.pearsonr(part["explained_energy"], part["shift_cosine"])[0])
    assert found.loc[("two", "spearman"), "estimate"] == pytest.approx(scipy_stats.spearmanr(part["explained_energy"], part["shift_cosine"])[0])
    assert (found.xs("pearson", level=1)["p"] < 0.01).all() and (found.xs("partial", level=1)["p"] > 0.02).all()
    assert (found.xs("overlap minus baseline", level=1)["high"] < 0).all() and (found.xs("overlap minus baseline", level=1)["p"] < 0.01).all()
    there = by_prompt.overlap_correlations(published(), covariates=["length", "category"], by=["setting", "layer"], n_permutations=300)
    assert (there[there["metric"] == "partial"]["p"] < 0.01).all() and set(there.attrs["null"]) == set(there["null"])
    assert there.groupby("setting").size().tolist() == [5, 5, 5]


NESTED = [(None, None), (None, "category"), ("category", "category")]


def test_clusters_and_strata_are_used():
    table = published(settings=("one",))
    plain, grouped = (by_prompt.overlap_correlations(table, clusters=c, within=c, n_permutations=300) for c in (None, "category"))
    assert np.allclose(plain["estimate"], grouped["estimate"]) and not np.allclose(plain["low"], grouped["low"])
    assert (grouped.set_index("metric").loc["pearson", "n_clusters"]) == 4 and "inside category" in grouped.attrs["null"]["prompts permuted"]
    options = {"covariates": ["length"], "n_permutations": 300}
    plain, within, both = (by_prompt.overlap_correlations(table, clusters=c, within=w, **options).set_index("metric") for c, w in NESTED)
    assert within.loc["partial", "p"] == both.loc["partial", "p"] and within.loc["partial", "null_low"] != plain.loc["partial", "null_low"]
    assert "inside category" in within.attrs["null"]["residuals permuted"] and "inside" not in plain.attrs["null"]["residuals permuted"]
    contrast = [each.loc["overlap minus baseline"] for each in (plain, within, both)]
    assert contrast[0]["p"] < 0.01 and np.isnan(contrast[1]["p"]) and contrast[0]["p"] < contrast[2]["p"] < 0.1
    assert "Williams" in plain.attrs["null"]["equal correlations"] and "over clusters" in both.attrs["null"]["equal correlations"]


def test_settings_are_not_pooled_silently():
    with pytest.raises(ValueError, match="'q0' is twice in one setting"):
        by_prompt.overlap_correlations(published())
    with pytest.raises(KeyError, match=r"no columns \['prompt_len'\]"):
        by_prompt.overlap_correlations(published(settings=("one",)), covariates=["prompt_len"])


def test_settings_are_summarised_per_layer_with_either_variance():
    found = by_prompt.overlap_correlations(published(), covariates=["length"], by=["setting", "layer"], clusters="category", n_permutations=100)
    r = found.loc[found["metric"] == "pearson", "estimate"]
    summary = by_prompt.over_settings(found, by=["layer"])
    expected = correlations.random_effects(r, np.full(3, 1 / 57))
    row = summary.iloc[0]
    assert (row["estimate"], row["low"], row["tau2"], row["n"]) == pytest.approx((expected["r"], expected["low"], expected["tau2"], 3))
    assert row["layer"] == 32 and row["metric"] == "pearson over settings" and row["p"] < 0.01 and row["predicted_low"] < row["low"]
    partial = by_prompt.over_settings(found, "partial").iloc[0]
    own = found[found["metric"] == "partial"]
    assert partial["estimate"] == pytest.approx(correlations.random_effects(own["estimate"], np.full(3, 1 / 56))["r"])
    by_interval = by_prompt.over_settings(found, variance="interval", by=["layer"]).iloc[0]
    assert by_interval["estimate"] == pytest.approx(row["estimate"], abs=0.05) and by_interval["low"] != pytest.approx(row["low"], abs=1e-4)
    for refused, says in (({"metric": "overlap minus baseline"}, "no correlations"), ({"variance": "none"}, "unknown variance")):
        with pytest.raises(ValueError, match=says):
            by_prompt.over_settings(found, **refused)


def test_a_frame_of_prompt_geometry_goes_straight_in():
    train, before, train_shift, shift = (
        acts(isotropic(50, 1)),
        acts(isotropic(40, 2), category=list("abcd") * 10),
        acts(isotropic(50, 3)),
        acts(isotropic(40, 4)),
    )
    table = by_prompt.prompt_geometry(train, before, train_shift, shift)
    found = by_prompt.overlap_correlations(table, covariates=["category", "shift_norm"], clusters="category", n_permutations=200)
    same = shifts.overlap_similarity(train, before, train_shift, shift, clusters="category", n_permutations=200)
    both = found.merge(same, on=["layer", "metric"])
    assert len(both) == len(same) == 6
    for column in ("estimate", "low", "high", "p"):
        assert np.allclose(both[f"{column}_x"], both[f"{column}_y"])
    assert (found["p"] > 0.01).all()


# ---- what foretells the change of a score


def scored(strength, seed=0, n=96):
    """Prompts in eight categories that differ in level; the change follows the overlap inside categories by `strength`."""
    rng, category = np.random.default_rng(seed), np.repeat(list("abcdefgh"), n // 8)
    level = dict(zip("abcdefgh", rng.normal(size=8), strict=True))
    table = pd.DataFrame({"id": named("q", n), "layer": 5, "category": category, "n_tokens": rng.integers(5, 40, n)})
    for column in ("explained_energy", "shift_norm", "shift_cosine", "cosine_to_mean"):
        table[column] = rng.normal(size=n) + 2 * table["category"].map(level)
    return table.assign(change=strength * table["explained_energy"] + 2 * table["category"].map(level) + rng.normal(size=n))


def test_what_categories_make_foretells_nothing_and_what_lies_inside_them_does():
    options = {"covariates": ["n_tokens", "category"], "n_permutations": 400, "n_boot": 200}
    gone = by_prompt.change_correlations(scored(0.0, seed=1), "change", **options).set_index(["measure", "metric"])
    pearson = gone.xs("pearson", level="metric")
    assert (pearson["estimate"] > 0.3).all() and (pearson["p"] > 0.01).all(), "over all prompts alike, inside categories not"
    assert (gone.xs("partial", level="metric")["p"] > 0.01).all()
    there = by_prompt.change_correlations(scored(1.0), "change", **options).set_index(["measure", "metric"])
    assert there.loc[("explained_energy", "pearson"), "q"] < 0.02 and there.loc[("explained_energy", "partial"), "q"] < 0.02
    assert there.loc[("explained_energy", "overlap minus baseline"), "low"] > 0 and there.loc[("shift_norm", "partial"), "q"] > 0.02
    assert ("cosine_to_mean", "pearson") in there.index and ("cosine_to_mean", "overlap minus baseline") not in there.index
    assert "pearson baseline" not in set(there.index.get_level_values("metric"))
    same = by_prompt.overlap_correlations(
        scored(1.0), "shift_norm", "change", None, clusters="category", within="category", n_permutations=400, n_boot=200
    )
    columns = ["estimate", "low", "high", "p"]
    assert np.allclose(same.set_index("metric").loc["spearman", columns].astype(float), there.loc[("shift_norm", "spearman"), columns].astype(float))


def test_changes_are_summarised_over_settings_and_corrected_over_all_measures():
    table = pd.concat([scored(1.0, seed).assign(setting=f"s{seed}") for seed in range(3)])
    with pytest.raises(ValueError, match="twice in one setting"):
        by_prompt.change_correlations(table, "change")
    found = by_prompt.change_correlations(table, "change", by=["setting", "layer"], n_permutations=200, n_boot=50)
    pearson = found[found["metric"] == "pearson"]
    assert len(pearson) == 12 and np.allclose(pearson["q"], scipy_stats.false_discovery_control(pearson["p"]))
    summary = by_prompt.over_settings(found, variance="interval", by=["measure", "layer"]).set_index("measure")
    assert summary.loc["explained_energy", "low"] > 0 and (summary["n"] == 3).all()
    wider = by_prompt.change_correlations(table.query("setting == 's0'"), "change", level=0.99, n_permutations=50, n_boot=400)
    narrow = by_prompt.change_correlations(table.query("setting == 's0'"), "change", level=0.5, n_permutations=50, n_boot=400)
    reach = [(f["high"] - f["low"])[f["metric"] == "pearson"].to_numpy() for f in (wider, narrow)]
    assert (reach[0] > reach[1]).all()
