"""A Result in few columns: what it says is what the Result says, and it fits a terminal."""

import json

import numpy as np
import pandas as pd
import pytest

import emlens as em
from emlens import stats
from emlens.summaries import telling_keys


def result(**changed):
    rows = [
        {"layer": layer, "features": "raw", "metric": metric, "estimate": size * (layer + 1), "low": -0.5, "high": 0.514, "null": null, "p": 0.01}
        | {"null_low": -0.04321, "null_high": 0.1, "n": 96, "n_clusters": 8, "reliability": np.nan, "ceiling": np.nan}
        | changed
        for layer in (0, 1)
        for metric, null, size in (("r2", "within_groups", 0.12345), ("slope", "activation_rows", 12.345))
    ]
    return stats.result(rows, ["layer", "features"], what="a test", correction="holm")


def test_a_summary_says_what_the_result_says():
    full = result()
    short = em.summary(full)
    assert list(short.index.names) == ["layer", "metric"] and list(short.columns) == ["estimate", "of nothing", "q"]
    assert short.loc[(0, "r2")].tolist() == ["0.12 [-0.50, 0.51]", "-0.04 to 0.10", "0.04"]
    assert short.loc[(1, "slope"), "estimate"] == "25 [-0, 1]", "decimals are those of the metric's largest estimate"
    assert em.summary(full, digits=4).loc[(1, "r2"), "estimate"] == "0.2469 [-0.5000, 0.5140]"
    assert short.attrs["what"] == "a test" and short.attrs["same"] == {"features": "raw", "n": 96} and json.dumps(short.attrs)
    assert full.columns[0] == "layer" and "same" not in full.attrs, "the Result stays as it was"


def test_what_varies_is_shown_and_what_does_not_is_told():
    rows = result()
    rows["n"] = [96, 95, 96, 96]
    assert em.summary(rows)["n"].tolist() == [96, 95, 96, 96]
    one = rows[rows["metric"] == "r2"]
    assert em.summary(one).index.names == ["layer"] and em.summary(one).attrs["same"] == {"features": "raw", "metric": "r2", "n": 96}
    two_nulls = pd.concat([one, one.assign(null="group_blocks")])
    assert telling_keys(two_nulls) == ["layer", "null"] and telling_keys(one) == ["layer"], "a null is named where nothing else tells rows apart"
    assert em.summary(one.head(1))["estimate"].tolist() == ["0.12 [-0.50, 0.51]"]


def test_what_is_not_there_is_left_empty_and_the_null_of_the_best_layer_is_shown_where_it_is_known():
    bare = em.summary(result(low=np.nan, null_low=np.nan, null_high=np.nan, p=np.nan))
    assert list(bare.columns) == ["estimate"] and bare["estimate"].iloc[0] == "0.12"
    best = em.summary(result(best_null_low=0.0, best_null_high=0.3))
    assert best["of nothing"].iloc[0] == "0.00 to 0.30"
    half = result()
    half.loc[0, ["null_low", "q"]] = np.nan
    assert em.summary(half).iloc[0].tolist()[1:] == ["", ""] and em.summary(half)["q"].iloc[1] == "0.04"
    assert em.summary(result(estimate=np.nan, low=np.nan))["estimate"].iloc[0] == "nan" and em.summary(result(estimate=0.0)).shape == (4, 3)


def test_a_prediction_and_a_comparison_fit_a_terminal():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame({"id": [f"q{i}" for i in range(40)], "question": [f"text {i * i} {'abc' * (i % 5)}" for i in range(40)]})
    facts = facts.assign(category=np.arange(40) % 4, y=rng.standard_normal(40))
    acts = em.Activations.from_array(rng.standard_normal((40, 2, 8)).astype(np.float32), layers=[0, 1], facts=facts)
    found = em.predict(acts, "y", groups="category", metrics=("r2", "within_spearman", "delta_r2"), n_permutations=19)
    before = facts.assign(aligned=rng.uniform(40, 90, 40))
    compared = em.compare_scores(before, before.assign(aligned=before["aligned"] - rng.uniform(0, 9, 40)), n_permutations=99, n_boot=50)
    for one in (found, compared):
        with pd.option_context("display.width", 80, "display.max_columns", 0):
            assert "..." not in str(em.summary(one)) and "..." in str(one)


def test_a_table_that_is_no_result_is_refused():
    with pytest.raises(KeyError, match=r"not there: \['metric'\]; the table has \['id', 'estimate'\]"):
        em.summary(pd.DataFrame({"id": ["a"], "estimate": [1.0]}))
