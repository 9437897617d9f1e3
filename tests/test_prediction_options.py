"""Guards em.predict's choices: feature sets, models, repeated folds, nulls between groups, text it goes beyond, ceilings, presets, leaks."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from sklearn.linear_model import Lasso, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, RepeatedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import emlens as em
from emlens import features, gains, learners, presets, shuffles, stats
from emlens.activations import Activations
from emlens.folds import make_folds
from emlens.prediction import predict
from emlens.ridge import fixed, residuals

SOME = (1.0, 30.0, 1000.0, 1e5)
WORDS = np.array(["river", "stone", "cloud", "apple", "chair", "lamp", "music", "paper", "glass", "bread"])


def planted(seed: int = 1, n: int = 64, n_groups: int = 8, layers: int = 2, d: int = 12, at: int = 1) -> Activations:
    rng = np.random.default_rng(seed)
    group = np.sort(np.arange(n) % n_groups)
    values = rng.standard_normal((n, layers, d)).astype(np.float32)
    score = values[:, at, :4].sum(axis=1) + 0.5 * rng.standard_normal(n) + rng.standard_normal(n_groups)[group]
    text = [" ".join(rng.choice(WORDS, 5)) + f" {i}" for i in range(n)]
    return Activations.from_array(values, {"score": score, "category": [f"c{g}" for g in group], "text": text})


# ---- features and models


def test_feature_sets_are_one_family() -> None:
    acts = planted()
    ask = {"groups": "category", "baselines": ("mean", "length"), "n_permutations": 99, "penalties": SOME}
    both = predict(acts, "score", features=["raw", features.squared_projections(6), "joined"], **ask)
    assert both["layer"].tolist() == [0, 1, 0, 1, -2, -1, -1]
    assert both["features"].tolist() == ["resid_post"] * 2 + ["squared_projections n=6"] * 2 + ["joined", "mean", "length"]
    alone = predict(acts, "score", **ask)
    mine, theirs = both[both["features"] == "resid_post"], alone[alone["layer"] >= 0]
    assert mine["p"].tolist() == theirs["p"].tolist() and (mine["q"].to_numpy() >= theirs["q"].to_numpy()).all()
    assert both["q"][0] > alone["q"][0] and (both["q"] == both["p"]).tolist()[-2:] == [True, True]
    assert "principal" not in both.attrs["features"]["squared_projections n=6"] and both.attrs["correction"] == "max-statistic"
    with pytest.raises(ValueError, match="share a name.*named"):
        predict(acts, "score", features=["raw", "raw"], **ask)


def test_another_model_and_random_features_stand_beside_every_layer() -> None:
    acts, other = planted(), planted(at=0)
    rivals = {"twin": Activations.from_array(other.values, acts.facts), "random_features": "random_features"}
    table = predict(acts, "score", groups="category", baselines=rivals, n_permutations=39, penalties=SOME)
    assert table["features"].tolist() == ["resid_post"] * 2 + ["twin"] * 2 + ["random_features"] * 2 and table["layer"].tolist() == [0, 1] * 3
    twin = table[table["features"] == "twin"].set_index("layer")
    draws = predict(Activations.from_array(other.values, acts.facts), "score", groups="category", baselines=(), n_permutations=39, penalties=SOME)
    assert twin["q"].tolist() == draws["q"].tolist(), "a rival is a family of its own, over its layers"
    assert "twin, at layer 0" in table.attrs["baselines"]["twin"]
    last = predict(acts, "score", groups="category", baselines=rivals, n_permutations=9, penalties=SOME, features=presets.LAST_LAYER)
    assert last["layer"].tolist() == [1, 1, 1], "rivals stand beside the layers that are shown"


@pytest.mark.parametrize("model", ["lasso", "ols", "pls"])
def test_models_find_what_is_planted(model: str) -> None:
    table = predict(planted(), "score", groups="category", model=model, baselines=(), metrics=("r2", "delta_r2"), n_permutations=19).set_index(
        "layer"
    )
    assert (table["p"][1] == 0.05).all() and (table["p"][0] > 0.05).all() and table.attrs["model"] == model
    assert f"by {model}" in table.attrs["what"]


def test_permutation_p_of_lasso_equals_brute_force() -> None:
    acts = planted(n=24, n_groups=3, layers=1, d=5, at=0)
    acts = acts.with_facts(acts.facts[["id"]].assign(score=acts.layer(0)[:, 0] + 1.5 * np.random.default_rng(0).standard_normal(24)))
    grid = (0.05, 0.3)
    row = predict(acts, "score", groups="category", model="lasso", penalties=grid, baselines=(), n_permutations=19, seed=3).iloc[0]
    y, codes, x = acts.facts["score"].to_numpy(), pd.factorize(acts.facts["category"])[0], acts.layer(0).astype(float)

    def by_hand(target: np.ndarray) -> float:
        found = np.empty(24)
        for held in range(3):
            train, errors = np.flatnonzero(codes != held), np.zeros(2)
            for inner in set(codes[train]):
                a, b = train[codes[train] != inner], train[codes[train] == inner]
                fits = [make_pipeline(StandardScaler(), Lasso(alpha, tol=1e-12)).fit(x[a], target[a]) for alpha in grid]
                errors += [np.square(fit.predict(x[b]) - target[b]).mean() for fit in fits]
            best = make_pipeline(StandardScaler(), Lasso(grid[int(errors.argmin())], tol=1e-12)).fit(x[train], target[train])
            found[codes == held] = best.predict(x[codes == held])
        return float(r2_score(target, found))

    null = np.array([by_hand(y[order]) for order in stats.permutations(24, 19, 3, within=codes)])
    assert row["estimate"] == pytest.approx(by_hand(y), abs=1e-6)
    assert row["p"] == pytest.approx((1 + (null >= by_hand(y) - 1e-9).sum()) / 20) and 0.05 < row["p"] < 1
    assert row["null_low"] == pytest.approx(np.quantile(null, 0.025), abs=1e-6)


def test_logistic_foretells_rates_and_only_rates() -> None:
    acts = planted(n=40, n_groups=4)
    rng = np.random.default_rng(0)
    trials = rng.integers(5, 30, 40)
    rate = rng.binomial(trials, 1 / (1 + np.exp(-2 * acts.layer(1)[:, :2].sum(axis=1)))) / trials
    acts = acts.with_facts(acts.facts[["id"]].assign(rate=rate, trials=trials))
    ask = {"groups": "category", "model": "logistic", "penalties": (10.0,), "baselines": ("length",), "n_permutations": 19}
    table = predict(acts, "rate", trials="trials", metrics=("r2", "spearman"), **ask)
    at = table[table["metric"] == "r2"].set_index("features").iloc[:2]
    assert at["p"].iloc[1] == 0.05 and at["p"].iloc[0] > 0.05 and at["estimate"].iloc[1] > 0.5
    expected = 1 - (rate * (1 - rate) / (trials - 1)).mean() / rate.var()
    assert table["reliability"].tolist() == pytest.approx([expected] * 6) and at["ceiling"].iloc[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="rates between 0 and 1"):
        predict(acts, "score", **ask)
    with pytest.raises(ValueError, match="use model='ridge'"):
        predict(acts, "rate", **(ask | {"metrics": ("delta_r2",)}))
    with pytest.raises(ValueError, match="use model='ridge'"):
        predict(acts, "rate", **(ask | {"nulls": ("group_means",)}))


# ---- repeated folds


def test_repeated_folds_pool_within_a_round_and_average_over_rounds() -> None:
    acts = planted()
    y, x = acts.facts["score"].to_numpy(), acts.layer(1).astype(float)
    ask = {"baselines": (), "penalties": (3.0,), "n_permutations": 9, "n_folds": 4, "repeats": 3, "seed": 42}
    table = predict(acts, "score", metrics=("r2", "rmse", "fold_r2", "fold_rmse"), **ask)
    row = table[table["layer"] == 1].set_index("metric")
    pipeline, folds = make_pipeline(StandardScaler(), Ridge(3.0)), RepeatedKFold(n_splits=4, n_repeats=3, random_state=42)
    by_fold = cross_val_score(pipeline, x, y, cv=folds, scoring="r2")
    assert row["estimate"]["fold_r2"] == pytest.approx(by_fold.mean(), abs=1e-8)
    reach = scipy_stats.t.ppf(0.975, 11) * by_fold.std(ddof=1) * np.sqrt(1 / 12 + 16 / 48)
    assert (row["low"]["fold_r2"], row["high"]["fold_r2"]) == pytest.approx((by_fold.mean() - reach, by_fold.mean() + reach), abs=1e-8)
    errors = -cross_val_score(pipeline, x, y, cv=folds, scoring="neg_root_mean_squared_error")
    assert row["estimate"]["fold_rmse"] == pytest.approx(errors.mean(), abs=1e-8)
    cuts = list(folds.split(x))
    rounds = [cross_val_predict(pipeline, x, y, cv=cuts[at : at + 4]) for at in (0, 4, 8)]
    assert row["estimate"]["r2"] == pytest.approx(np.mean([r2_score(y, one) for one in rounds]), abs=1e-8)
    assert "Nadeau" in table.attrs["interval"] and "bootstrap" in table.attrs["interval"]
    once = predict(acts, "score", **(ask | {"repeats": 1, "metrics": ("r2",)}))
    assert "Nadeau" not in once.attrs["interval"] and "shuffled 4-fold" in once.attrs["folds"]
    with pytest.raises(ValueError, match="repeats=10 and no groups"):
        predict(acts, "score", metrics=("fold_r2",), baselines=())
    with pytest.raises(ValueError, match="repeats=10 and no groups"):
        predict(acts, "score", metrics=("fold_r2",), baselines=(), groups="category", n_folds=4, repeats=2)
    grouped = predict(acts, "score", groups="category", **(ask | {"metrics": ("r2", "delta_r2")}))
    assert "whole groups, 3 times" in grouped.attrs["folds"] and (grouped[grouped["layer"] == 1]["p"] == 0.1).all()


# ---- presets


def test_published_is_the_papers_procedure() -> None:
    acts = planted(n=60, layers=1, d=20, at=0)
    small = {"n_permutations": 3, "repeats": 2}
    table = predict(acts, "score", **(dict(em.PUBLISHED["predict"]) | small)).set_index(["features", "metric"])
    directions = np.linalg.qr(np.random.RandomState(0).standard_normal((20, 150)))[0]
    x, y = (acts.layer(0).astype(float) @ directions) ** 2, acts.facts["score"].to_numpy()
    found = []
    for train, test in RepeatedKFold(n_splits=5, n_repeats=2, random_state=42).split(x):
        scaler, best = StandardScaler().fit(x[train]), (-np.inf, 0.0)
        for alpha in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0):
            model = make_pipeline(StandardScaler(), Lasso(alpha, max_iter=100_000))
            best = max(best, (cross_val_score(model, x[train], y[train], cv=KFold(5, shuffle=True, random_state=42)).mean(), -alpha))
        fit = Lasso(-best[1], max_iter=100_000).fit(scaler.transform(x[train]), y[train])
        found.append(r2_score(y[test], fit.predict(scaler.transform(x[test]))))
    assert table["estimate"]["squared_projections", "fold_r2"] == pytest.approx(np.mean(found), abs=2e-3)
    preset = em.PUBLISHED["predict"]
    assert (preset["n_permutations"], preset["repeats"], preset["n_folds"], preset["seed"]) == (200, 10, 5, 42)
    assert "p >= 0.25" in table.attrs["null"]["all_rows"] and shuffles.told("x", 200, None).count("p >= 0.005") == 1


def test_review_is_the_review_pages() -> None:
    acts = planted()
    table = predict(acts, "score", **(dict(em.REVIEW["predict"]) | {"n_permutations": 9}))
    assert table[table["layer"] >= 0]["layer"].unique().tolist() == [1] and set(table["metric"]) == {"r2", "spearman"}
    assert set(table["features"]) == {"resid_post", "mean", "random_features"}
    x, y = acts.layer(1).astype(float), acts.facts["score"].to_numpy()
    found = cross_val_predict(make_pipeline(StandardScaler(), Ridge(1.0)), x, y, cv=KFold(5, shuffle=True, random_state=0))
    assert table["estimate"].iloc[0] == pytest.approx(r2_score(y, found), abs=1e-8)
    with pytest.raises(ValueError, match="reads the last token"):
        predict(Activations.from_array(acts.values, acts.facts, position="mean"), "score", **em.REVIEW["predict"])


# ---- nulls between groups


def test_group_means_are_permuted_among_groups_of_any_size() -> None:
    rng = np.random.default_rng(0)
    codes, y = np.array([0, 0, 1, 1, 1, 2]), rng.standard_normal(6)
    drawn = shuffles.group_means(y, codes, 10, 0)
    means = np.array([y[codes == g].mean() for g in range(3)])
    expected = [y - means[codes] + means[list(move)][codes] for move in itertools.permutations(range(3))][1:]
    np.testing.assert_allclose(drawn, np.array(expected).T)
    many = shuffles.group_means(rng.standard_normal(40), np.arange(40) % 10, 17, 0)
    assert many.shape == (40, 17)


def test_group_means_see_what_lies_between_groups_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(4, 12, 14)
    codes = np.repeat(np.arange(14), sizes)
    level = rng.standard_normal(14)[codes]
    values = rng.standard_normal((len(codes), 2, 4))
    values[:, 0, 0] += 3 * level
    inside = values[:, 1, 0] - np.array([values[codes == g, 1, 0].mean() for g in codes])
    acts = Activations.from_array(values, {"between": level + 0.3 * rng.standard_normal(len(codes)), "inside": inside, "category": codes})
    ask = {"groups": "category", "baselines": (), "penalties": SOME, "n_permutations": 99, "nulls": ("group_means", "within_groups")}
    between = predict(acts, "between", **ask).set_index(["layer", "null"])["p"]
    assert between[0, "group_means"] == 0.01 and between[1, "group_means"] > 0.05 and between[0, "within_groups"] > 0.05
    within = predict(acts, "inside", **ask).set_index(["layer", "null"])["p"]
    assert within[1, "within_groups"] == 0.01 and within[1, "group_means"] > 0.05
    few = predict(planted(n=40, n_groups=4), "score", **(ask | {"nulls": ("group_means",)}))
    assert "23 draws, p >= 0.042" in few.attrs["null"]["group_means"]


# ---- beyond the text


def test_best_text_is_chosen_in_inner_folds_among_the_texts_given() -> None:
    acts = planted(n=48, n_groups=6)
    y, folds = acts.facts["score"].to_numpy(), make_folds(48, np.sort(np.arange(48) % 6)).every
    rng = np.random.default_rng(0)
    good, bad = (
        em.baselines.Block(name, fixed(y[:, None] + s * rng.standard_normal((48, 3))), "each", "") for name, s in (("good", 1.0), ("bad", 99.0))
    )
    found = gains.left_by([bad, good], y, folds, SOME)
    assert found.chosen == ("good",) * 6
    np.testing.assert_allclose(found.residuals, residuals(good.features, y, folds, SOME))
    turned = y.copy()
    turned[folds[0].test] *= -50  # test rows have no say
    assert gains.left_by([bad, good], turned, folds[:1], SOME).chosen == ("good",)
    table = predict(acts, "score", groups="category", baselines=("mean", "tfidf", "length"), metrics=("delta_r2",), penalties=SOME, n_permutations=9)
    told = table.attrs["beyond"]
    assert (
        told["name"] == "best_text" and sum(told["chosen in outer folds"].values()) == 6 and set(told["chosen in outer folds"]) <= {"tfidf", "length"}
    )
    one = predict(acts, "score", groups="category", baselines=(), metrics=("delta_r2", "r2"), beyond="length", penalties=SOME, n_permutations=9)
    alone = predict(acts, "score", groups="category", baselines=("length",), penalties=SOME, n_permutations=9).iloc[-1]
    assert one.attrs["beyond"]["r2"] == pytest.approx(alone["estimate"])
    several = predict(
        acts, "score", groups="category", baselines=(), metrics=("delta_r2",), beyond=("length", "tfidf"), penalties=SOME, n_permutations=9
    )
    assert several.attrs["beyond"]["name"] == "best of length, tfidf"


# ---- ceilings, groups one by one, memory


def test_the_ceiling_is_what_the_noise_leaves() -> None:
    rng = np.random.default_rng(0)
    truth, se = rng.standard_normal(4000), 0.5 + rng.random(4000)
    y = truth + se * rng.standard_normal(4000)
    acts = planted(n=64)
    noisy = acts.with_facts(acts.facts[["id"]].assign(score_se=0.5, other_se=0.25, wrong=-1.0))
    ask = {"groups": "category", "baselines": (), "penalties": SOME, "n_permutations": 5, "metrics": ("r2", "rmse", "delta_r2", "spearman")}
    table = predict(noisy, "score", **ask).set_index("metric")
    share = 1 - 0.25 / acts.facts["score"].to_numpy().var()
    assert table["reliability"].tolist() == pytest.approx([share] * 8) and table["ceiling"]["r2"].tolist() == pytest.approx([share] * 2)
    assert table["ceiling"]["rmse"].iloc[0] == 0.5 and np.isnan(table["ceiling"]["spearman"].iloc[0])
    assert table["ceiling"]["delta_r2"].iloc[0] == pytest.approx(share - table.attrs["beyond"]["r2"])
    assert predict(noisy, "score", noise="other_se", **ask)["reliability"].iloc[0] > share and "'score_se'" in table.attrs["ceiling"]
    unknown = predict(acts, "score", **ask)
    assert unknown["ceiling"].isna().all() and "not known" in unknown.attrs["ceiling"]
    assert em.scores.reliability(y, se**2) == pytest.approx(r2_score(y, truth), abs=0.03)
    for words, option in (("negative", {"noise": "wrong"}), ("noise= names one", {"noise": "nothing"}), ("between 0 and 1", {"trials": "score_se"})):
        with pytest.raises((ValueError, KeyError), match=words):
            predict(noisy, "score", **(ask | option))


def test_every_groups_own_value_is_told() -> None:
    acts = planted()
    table = predict(
        acts, "score", groups="category", baselines=("length",), penalties=SOME, n_permutations=5, metrics=("r2", "within_r2", "delta_r2")
    )
    told = table.attrs["per_group"]
    assert told["groups"] == [f"c{g}" for g in range(8)] and set(told) == {"groups", "r2", "within_r2", "delta_r2"}
    assert set(told["r2"]) == {"resid_post at 0", "resid_post at 1", "length"} and set(told["delta_r2"]) == {"resid_post at 0", "resid_post at 1"}
    row = table[(table["metric"] == "within_r2") & (table["layer"] == 1)].iloc[0]
    assert np.mean(told["within_r2"]["resid_post at 1"]) == pytest.approx(row["estimate"], abs=1e-5)
    json.dumps(table.attrs, allow_nan=False)
    assert "per_group" not in predict(acts, "score", baselines=(), n_permutations=5, penalties=SOME).attrs


# ---- leaks


def test_the_target_in_a_fact_column_is_refused_or_said() -> None:
    acts = planted()
    y = acts.facts["score"]
    rng = np.random.default_rng(0)
    leaked = {"scaled": 3 - 2 * y, "bent": np.exp(y), "ranks": y.rank(), "by_group": y - y.groupby(acts.facts["category"]).transform("mean")}
    acts = acts.with_facts(acts.facts[["id"]].assign(**leaked, near=y + 0.02 * rng.standard_normal(64), fair=y + rng.standard_normal(64)))
    ask = {"groups": "category", "n_permutations": 5, "penalties": SOME}
    for name in leaked:
        with pytest.raises(ValueError, match="is the target|together are the target"):
            predict(acts, "score", baselines=(name,), **ask)
        with pytest.raises(ValueError, match="is the target|together are the target"):
            predict(acts, "score", baselines=(), metrics=("delta_r2",), beyond=name, **ask)
    with pytest.warns(UserWarning, match="orders the prompts as the target"):
        predict(acts, "score", baselines=("near",), **ask)
    assert predict(acts, "score", baselines=("fair",), **ask)["estimate"].iloc[-1] > 0.5


def test_a_learner_of_your_own_and_wrong_options() -> None:
    acts = planted()
    mine = learners.from_path("mean only", lambda x, y, other, weights: np.tile(y.mean(axis=0), (1, len(other), 1)), (0.0,), "nothing to choose")
    table = predict(acts, "score", groups="category", model=mine, baselines=("mean",), n_permutations=5)
    assert table["estimate"].nunique() == 1 and (table["p"] == 1).all()
    for words, option in (
        ("unknown model", {"model": "forest"}),
        ("unknown features", {"features": "rows"}),
        ("one or more feature sets", {"features": ()}),
    ):
        with pytest.raises(ValueError, match=words):
            predict(acts, "score", **({"baselines": ()} | option))
