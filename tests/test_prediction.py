"""Guards em.predict: the pooled R2 it promises, nulls right where nothing is and rejected where something is, whole groups held out."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import scikit
from sklearn.metrics import r2_score

from emlens import gains, ridge, stats
from emlens.activations import Activations
from emlens.baselines import Block
from emlens.folds import make_folds
from emlens.learners import learner
from emlens.prediction import predict

SOME = (1.0, 30.0, 1000.0, 1e5)
WORDS = np.array(["river", "stone", "cloud", "apple", "chair", "lamp", "music", "paper", "glass", "bread"])


def planted(seed=1, n=64, n_groups=8, layers=3, d=16, strength=2.0, between=1.0, at=1):
    """Activations whose layer `at` carries the target inside groups; the target also differs between groups."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), n // n_groups)
    values = rng.standard_normal((n, layers, d)).astype(np.float32)
    signal = values[:, at, :4].sum(axis=1) / 2
    score = strength * signal + 0.5 * rng.standard_normal(n) + between * rng.standard_normal(n_groups)[group]
    text = [" ".join(rng.choice(WORDS, 5)) + f" {i}" for i in range(n)]
    return Activations.from_array(values, {"score": score, "category": [f"c{g}" for g in group], "text": text})


def shuffled_within(acts, seed=0):
    order = stats.permutations(len(acts), 1, seed, within=acts.facts["category"])[0]
    return acts.with_facts(acts.facts[["id"]].assign(score=acts.facts["score"].to_numpy()[order]))


def pooled_by_scikit(x, y, groups, penalties):
    """Leave-one-group-out inside leave-one-group-out, as anyone would write it; y of one target or ``[row, target]``."""
    return scikit.nested(x, y.reshape(len(y), -1), scikit.leave_one_group_out(groups), penalties)[0].reshape(y.shape)


def test_contract_one_row_per_layer_of_pooled_r2():
    acts = planted()
    table = predict(acts, "score", groups="category", baselines=(), n_permutations=20, penalties=SOME, seed=0)
    assert table["layer"].tolist() == [0, 1, 2] and set(table["features"]) == {"resid_post"}
    assert list(table.columns) == ["layer", "features", *stats.COLUMNS, "n_clusters", "reliability", "ceiling", "best_null_low", "best_null_high"]
    y, groups = acts.facts["score"].to_numpy(), acts.facts["category"].to_numpy()
    expected = [r2_score(y, pooled_by_scikit(acts.layer(i).astype(float), y, groups, SOME)) for i in acts.layers]
    np.testing.assert_allclose(table["estimate"], expected, atol=1e-6)
    assert (table["n"] == 64).all() and (table["null"] == "within_groups").all()
    assert ((table["low"] <= table["estimate"]) & (table["estimate"] <= table["high"])).all()
    json.dumps(table.attrs)
    assert table.attrs["correction"] == "max-statistic" and table.attrs["n_clusters"] == 8 and "under-covers" in table.attrs["interval"]
    assert "leave one group out" in table.attrs["folds"] and "tail" in table.attrs["null"]["within_groups"]


def test_layers_keep_their_numbers():
    acts = planted().select(layers=[2, 1])
    table = predict(acts, "score", groups="category", baselines=("mean",), n_permutations=5, penalties=SOME)
    assert table["layer"].tolist() == [2, 1, -1] and table["estimate"].idxmax() == 1


def test_permutation_p_equals_brute_force():
    rng = np.random.default_rng(3)
    groups = np.repeat([0, 1, 2], 4)
    values = rng.standard_normal((12, 2, 3))
    y = values[:, 0, 0] + 0.6 * rng.standard_normal(12)
    acts = Activations.from_array(values, {"score": y, "category": groups})
    table = predict(acts, "score", groups="category", baselines=(), n_permutations=29, penalties=(1.0, 10.0), seed=5)
    orders = stats.permutations(12, 29, 5, within=groups)
    x = acts.values.astype(np.float64)
    targets = np.column_stack([y, *y[orders]])
    found = (pooled_by_scikit(x[:, i], targets, groups, (1.0, 10.0)) for i in (0, 1))
    brute = np.column_stack([r2_score(targets, layer, multioutput="raw_values") for layer in found])
    p = [(1 + (brute[1:, i] >= brute[0, i]).sum()) / 30 for i in (0, 1)]
    q = [(1 + (brute[1:].max(axis=1) >= brute[0, i]).sum()) / 30 for i in (0, 1)]
    assert table["p"].tolist() == pytest.approx(p) and table["q"].tolist() == pytest.approx(q)
    assert p[0] < 0.2 < max(p[1], q[1]) and p != q
    np.testing.assert_allclose(table[["null_low", "null_high"]].T, np.quantile(brute[1:], [0.025, 0.975], axis=0), atol=1e-8)


@pytest.mark.parametrize("metric", ["r2", "spearman", "rmse", "within_r2", "within_spearman"])
def test_planted_signal_is_found_and_shuffled_is_not(metric):
    acts = planted()
    ask = {"groups": "category", "baselines": (), "metrics": (metric,), "penalties": SOME, "n_permutations": 99}
    found = predict(acts, "score", **ask).set_index("layer")
    assert found["q"][1] == 0.01 and (found["p"][[0, 2]] > 0.05).all()
    assert len(found.attrs["cautions"]) == (metric in ("spearman", "within_r2")) + 1 and "near-copies" in found.attrs["cautions"][-1]
    assert found["estimate"].idxmax() == 1 or metric == "rmse" and found["estimate"].idxmin() == 1
    nothing = predict(shuffled_within(acts), "score", **ask)
    assert (nothing["q"] > 0.05).all() and (nothing["q"] >= nothing["p"]).all()


def test_null_band_covers_where_nothing_is():
    """200 repeats: 10 group-structured targets x 20 unrelated layers whose rows are group-structured and anisotropic."""
    inside, false = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(6), 8)
        values = (rng.standard_normal((48, 20, 10)) + 2 * rng.standard_normal((6, 20, 10))[group]) * np.logspace(0, -1.5, 10)
        score = 3 * rng.standard_normal(6)[group] + (0.5 + rng.random(6))[group] * rng.standard_normal(48)
        acts = Activations.from_array(values, {"score": score, "category": group})
        table = predict(acts, "score", groups="category", baselines=(), n_permutations=199, penalties=SOME, seed=seed)
        inside += ((table["estimate"] >= table["null_low"]) & (table["estimate"] <= table["null_high"])).tolist()
        false += (table["p"] <= 0.05).tolist()
    assert len(inside) == 200 and 0.92 <= np.mean(inside) <= 0.98
    assert 0.02 <= np.mean(false) <= 0.08


def test_topic_alone_is_not_skill_beyond_topic():
    """Rows and target share only the group. Plain folds see a great deal; 'nothing beyond the group' stands."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(8), 8)
    values = (rng.standard_normal((64, 1, 12)) + 3 * rng.standard_normal((8, 12))[group][:, None]).astype(np.float32)
    acts = Activations.from_array(values, {"score": 3 * rng.standard_normal(8)[group] + rng.standard_normal(64), "category": group})
    plain = predict(acts, "score", baselines=("category",), n_permutations=99, penalties=SOME)
    assert (plain["estimate"] > 0.6).all() and (plain["p"] == 0.01).all()
    held = predict(acts, "score", groups="category", baselines=("category",), n_permutations=99, penalties=SOME)
    assert held["p"].iloc[0] > 0.05 and held["p"].iloc[1] == 1 and (held["estimate"] < 0.2).all()


def test_baselines_stand_in_the_same_table_and_folds():
    acts = planted()
    noisy = acts.facts["score"] + 0.5 * np.random.default_rng(9).standard_normal(64)
    acts = acts.with_facts(acts.facts[["id"]].assign(before=noisy))

    def halves(facts):
        return (facts["score"] > 1).to_numpy()

    names = ("mean", "category", "length", "tfidf", "before", halves)
    table = predict(acts, "score", groups="category", baselines=names, n_permutations=39, penalties=SOME)
    rivals = table[table["layer"] == -1].set_index("features")
    assert rivals.index.tolist() == ["mean", "category", "length", "tfidf", "before", "halves"]
    y = acts.facts["score"].to_numpy()
    rest = np.array([y[acts.facts["category"] != c].mean() for c in acts.facts["category"]])
    assert rivals["estimate"]["mean"] == pytest.approx(r2_score(y, rest))
    assert rivals["estimate"]["category"] == pytest.approx(rivals["estimate"]["mean"]), "a held-out category is unknown"
    assert rivals["p"]["mean"] == 1 and rivals["p"]["before"] == 1 / 40 and rivals["estimate"]["before"] > 0.7
    assert (rivals["q"] == rivals["p"]).all() and "knows nothing" in table.attrs["baselines"]["category"]
    with pytest.raises(ValueError, match="share a name"):
        predict(acts, "score", groups="category", baselines=("mean", "mean"))


def test_interval_is_the_bootstrap_of_whole_groups():
    acts = planted()
    table = predict(acts, "score", groups="category", baselines=(), metrics=("r2", "rmse", "within_spearman"), n_permutations=5, penalties=SOME)
    y, groups = acts.facts["score"].to_numpy(), acts.facts["category"].to_numpy()
    found = pooled_by_scikit(acts.layer(1).astype(float), y, groups, SOME)
    both = np.column_stack([y, found])

    def r2(rows):
        return 1 - np.square(rows[:, 0] - rows[:, 1]).sum() / np.square(rows[:, 0] - rows[:, 0].mean()).sum()

    low, high = stats.bootstrap_interval(both, r2, clusters=groups, n_boot=2000, seed=0)
    assert r2(both) == pytest.approx(r2_score(y, found))
    row = table[(table["layer"] == 1) & (table["metric"] == "r2")].iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-6)
    ranks = predict(acts, "score", groups="category", baselines=(), metrics=("spearman",), n_permutations=5, penalties=SOME).iloc[1]
    expected = stats.correlation(y, found, clusters=groups, n_permutations=1, method="spearman")
    assert (ranks["estimate"], ranks["low"], ranks["high"]) == pytest.approx((expected["r"], expected["low"], expected["high"]), abs=1e-6)
    plain = predict(acts, "score", baselines=(), n_permutations=5, penalties=SOME)
    assert plain.attrs["n_clusters"] == 64 and "under-covers" not in plain.attrs["interval"]


def test_delta_r2_asks_what_activations_add_to_the_text():
    acts = planted(between=0.5)
    ask = {"groups": "category", "baselines": (), "metrics": ("delta_r2",), "n_permutations": 99, "penalties": SOME}
    added = predict(acts, "score", **ask).set_index("layer")
    assert added["q"][1] == 0.01 and added["estimate"][1] > 0.2 and added["p"][0] > 0.05 and set(added["null"]) == {"activation_rows"}
    assert added["low"][1] < added["estimate"][1] < added["high"][1] and "'best_text'" in added.attrs["null"]["activation_rows"]

    def same(facts):  # a text model that already holds what the activations hold
        return acts.layer(1)[:, :4].sum(axis=1)

    nothing = predict(acts, "score", beyond=same, **ask).set_index("layer")
    assert nothing["p"][1] > 0.05 and nothing["estimate"][1] < 0.05


def test_delta_r2_permutes_rows_of_what_activations_hold_beyond_the_text():
    acts = planted(n=32, n_groups=4, layers=1, d=6, at=0)
    codes = pd.factorize(acts.facts["category"])[0]
    text = acts.layer(0)[:, :1] + np.random.default_rng(0).standard_normal((32, 1))
    ask = {"groups": "category", "baselines": (), "metrics": ("delta_r2",), "n_permutations": 19, "penalties": SOME, "seed": 2}
    row = predict(acts, "score", beyond=lambda facts: text, **ask).iloc[0]
    y, folds = acts.facts["score"].to_numpy(), make_folds(32, codes).every
    x, grid = acts.layer(0).astype(float), scikit.leave_one_group_out(codes)
    rest, fitted = x - scikit.nested(text, x, grid, SOME)[0], scikit.nested(text, y[:, None], grid, SOME)[0][:, 0]
    left = ridge.residuals(ridge.fixed(text), y, folds, SOME)

    def gain(rows):
        second = ridge.nested_ridge(ridge.fixed(rows), left[:, :, None], folds, SOME).predictions[:, 0]
        return r2_score(y, fitted + second) - r2_score(y, fitted)

    null = [gain(rest[np.argsort(order)]) for order in stats.permutations(32, 19, 2, within=codes)]
    assert row["estimate"] == pytest.approx(gain(rest)), "r2 of both minus r2 of the text"
    assert (row["null_low"], row["null_high"]) == pytest.approx(tuple(np.quantile(null, [0.025, 0.975])))


def test_delta_r2_null_is_calibrated():
    """Text and target are related, activations to neither: 120 p-values, none too many small."""
    p = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(5), 8)
        text = rng.standard_normal((40, 2))
        score = text.sum(axis=1) + 2 * rng.standard_normal(5)[group] + rng.standard_normal(40)
        acts = Activations.from_array(rng.standard_normal((40, 20, 8)), {"score": score, "category": group})
        table = predict(
            acts,
            "score",
            groups="category",
            baselines=(),
            metrics=("delta_r2",),
            beyond=lambda _, t=text: t,
            n_permutations=99,
            penalties=SOME,
            seed=seed,
        )
        p += table["p"].tolist()
    assert len(p) == 120 and 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.10 and 0.4 < np.mean(p) < 0.6


def test_delta_r2_passes_no_more_than_chance_where_activations_know_the_text():
    """Activations hold the text and nothing more, groups share a topic, the target bends with the text: 30 p-values. Permuting
    rows of the activations as they are passes far too often."""
    right, naive = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(6), 10)
        text = rng.standard_normal((60, 5)) + 2 * rng.standard_normal((6, 5))[group]
        x = text @ rng.standard_normal((5, 12)) + rng.standard_normal((60, 12))
        y = np.tanh(text @ rng.standard_normal(5) / 2) * 2 + rng.standard_normal(6)[group] + 0.5 * rng.standard_normal(60)
        acts = Activations.from_array(x, {"score": y, "category": group})
        ask = {"groups": "category", "baselines": (), "penalties": SOME, "n_permutations": 39, "metrics": ("delta_r2",), "seed": seed}
        right.append(predict(acts, "score", beyond=lambda _, t=text: t, **ask)["p"].iloc[0])
        folds = make_folds(60, group).every
        left = ridge.residuals(ridge.fixed(text), y, folds, SOME)
        orders = np.vstack([np.arange(60), stats.permutations(60, 39, seed, within=group)])
        raw = Block("raw", ridge.fixed(acts.layer(0)), "each", "")
        gain = gains.gain(raw, learner("ridge", SOME), left, orders, y, folds)[0]
        naive.append(stats.permutation_p(gain[0], gain[1:]))
    assert np.mean(np.array(right) <= 0.05) <= 0.14 < 0.25 < np.mean(np.array(naive) <= 0.05)


def test_several_nulls_are_several_rows_and_few_groups_are_enumerated():
    acts = planted(n=32, n_groups=4)
    table = predict(acts, "score", groups="category", baselines=(), nulls=("within_groups", "group_blocks"), penalties=SOME)
    assert len(table) == 6 and table["null"].nunique() == 2
    assert "23 draws, p >= 0.042" in table.attrs["null"]["group_blocks"]
    steps = table[table["null"] == "group_blocks"]["p"] * 24
    np.testing.assert_allclose(steps, steps.round())


def test_same_seed_same_table_other_seed_other_null():
    acts = planted()
    ask = {"groups": "category", "baselines": (), "n_permutations": 30, "penalties": SOME}
    one, two, other = (predict(acts, "score", seed=s, **ask) for s in (4, 4, 5))
    pd.testing.assert_frame_equal(one, two)
    assert (one["estimate"] == other["estimate"]).all() and (one["null_low"] != other["null_low"]).all()


def test_two_groups_are_enough():
    table = predict(planted(n_groups=2), "score", groups="category", baselines=(), n_permutations=39, penalties=SOME).set_index("layer")
    assert table["p"][1] == 1 / 40


def test_groups_equal_to_rows_and_other_bad_requests_name_the_way_out():
    acts = planted()
    own = acts.with_facts(acts.facts[["id"]].assign(own=range(64), one="a", gap=[None, *"b" * 63], flat=1.0, word="x"))
    hole = own.facts["score"].where(own.facts["score"].index > 1)
    own = own.with_facts(own.facts[["id"]].assign(hole=hole, infinite=own.facts["score"] / 0, level=pd.factorize(own.facts["category"])[0]))
    cases = [
        (KeyError, "join scores with acts.with_facts", "nothing", {}),
        (TypeError, "a number per prompt", "word", {}),
        (ValueError, "constant", "flat", {}),
        (ValueError, "2 of 64 prompts: drop them", "hole", {}),
        (ValueError, "infinite for 64 of 64", "infinite", {}),
        (KeyError, "groups= names one of them", "score", {"groups": "nothing"}),
        (ValueError, "at least 2 are needed", "score", {"groups": "one"}),
        (ValueError, "1 of 64 prompts have no 'gap'", "score", {"groups": "gap"}),
        (ValueError, "every prompt is a group of its own", "score", {"groups": "own"}),
        (ValueError, "9 folds of 8 groups: choose n_folds between 2 and 8", "score", {"groups": "category", "n_folds": 9}),
        (ValueError, "65 folds of 64 prompts", "score", {"n_folds": 65}),
        (ValueError, "constant inside every group.*group_blocks", "level", {"groups": "category"}),
        (ValueError, "need groups", "score", {"metrics": ("r2", "within_r2")}),
        (ValueError, "need groups", "score", {"metrics": ("delta_r2",)}),
        (ValueError, "need groups", "score", {"nulls": ("group_blocks",)}),
        (ValueError, "a name or a sequence of these.*within_spearman", "score", {"metrics": ("R2",)}),
        (ValueError, "unknown .*'R3'", "score", {"metrics": "R3"}),
        (ValueError, "all_rows", "score", {"nulls": ("rows",)}),
        (ValueError, "no estimate is given without its null", "score", {"n_permutations": 0}),
        (KeyError, "unknown baseline 'entropy'", "score", {"baselines": ("entropy",)}),
        (ValueError, "is the target 'score' itself", "score", {"baselines": ("score",)}),
        (ValueError, "positive", "score", {"penalties": (-1.0,)}),
    ]
    for error, words, target, ask in cases:
        with pytest.raises(error, match=words):
            predict(own, target, **({"baselines": ("mean",)} | ask))
    with pytest.raises(ValueError, match="use 3 groups"):
        predict(planted(n_groups=2), "score", groups="category", baselines=(), metrics=("delta_r2",), n_permutations=5)


def test_nan_in_activations_is_refused():
    values = planted().values.copy()
    values[3, 1, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        predict(Activations.from_array(values, planted().facts), "score", groups="category")


def test_a_copy_in_another_group_is_refused():
    acts = planted()
    values, facts = acts.values.copy(), acts.facts.copy()
    values[40] = values[0]
    ask = {"groups": "category", "baselines": (), "n_permutations": 5, "penalties": SOME}
    with pytest.raises(ValueError, match="copies.*different groups of 'category'"):
        predict(Activations.from_array(values, facts), "score", **ask)
    facts.loc[9, "text"] = facts.loc[63, "text"].upper()
    with pytest.raises(ValueError, match="copies"):
        predict(Activations.from_array(acts.values, facts), "score", **ask)
    with pytest.warns(UserWarning, match="plain folds"):
        predict(Activations.from_array(acts.values, facts), "score", **(ask | {"groups": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(acts, "score", **ask)


def test_default_penalties_reach_from_hardly_any_shrinkage_to_the_mean():
    acts = planted(d=400, n=64)
    folds = make_folds(64, pd.factorize(acts.facts["category"])[0]).every
    y = acts.facts["score"].to_numpy()[:, None]
    least, most = (ridge.nested_ridge(ridge.fixed(acts.layer(1)), y, folds, [a]).predictions for a in (ridge.PENALTIES[0], ridge.PENALTIES[-1]))
    mean = np.concatenate([np.full(len(f.test), y[f.train].mean()) for f in folds])
    assert np.abs(most[:, 0] - mean).max() < 0.01 * y.std() < least.std()
