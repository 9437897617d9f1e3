"""Guards the saved predictor: it is em.predict's own ridge, its intervals cover new groups as stated, and it refuses what it has not seen."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emlens import features as sets
from emlens.activations import Activations
from emlens.directions import mean_difference
from emlens.features import FeatureSet
from emlens.folds import make_folds
from emlens.prediction import predict
from emlens.predictor import MARGIN, Predictor, fit_predictor, load_predictor, portable
from emlens.ridge import fixed

SOME = (1.0, 10.0, 100.0, 1000.0)
MODEL = {"model": "small", "architecture": "Llama 3×12", "weights": {"a": "1f"}, "adapter": None, "adapter_sha256": None, "template_sha256": "77"}


def world(seed, n_groups, size=8, d=12, between=1.0, first=0, meta=None, **facts):
    """Prompts of exchangeable groups: activations and score have a part that the group shares."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), size)
    values = rng.standard_normal((n_groups, 2, d))[group] + rng.standard_normal((n_groups * size, 2, d)) + 3
    score = values[:, 1, :3].sum(axis=1) + between * rng.standard_normal(n_groups)[group] + rng.standard_normal(len(group))
    names = {"id": [f"{seed} {i}" for i in range(len(group))], "score": score, "category": [f"c{first + g}" for g in group]}
    return Activations.from_array(values, {**names, **facts}, layers=(4, 7), meta=MODEL if meta is None else meta)


def fitted(acts, groups="category", **options) -> Predictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit_predictor(acts, "score", **{"layer": 7, "groups": groups, "penalties": SOME, **options})


def unequal(acts):
    """Groups of two to eight prompts."""
    at = acts.facts.groupby("category", sort=False).cumcount().to_numpy()
    return acts.where(at < 2 + np.unique(acts.facts["category"], return_inverse=True)[1] % 7)


# ---- the fit


def test_the_fit_is_scikits_with_the_penalty_of_the_folds():
    acts = unequal(world(9, 9))
    found, x, y = fitted(acts), acts.layer(7).astype(float), acts.facts["score"].to_numpy()
    pipe = make_pipeline(StandardScaler(), Ridge())
    search = GridSearchCV(pipe, {"ridge__alpha": SOME}, cv=LeaveOneGroupOut(), scoring="neg_mean_squared_error").fit(
        x, y, groups=acts.facts["category"]
    )
    assert found.penalty == search.best_params_["ridge__alpha"] and 1 < found.penalty < 1000
    scaler, ridge = (search.best_estimator_.named_steps[name] for name in ("standardscaler", "ridge"))
    np.testing.assert_allclose(found.weights, ridge.coef_ / scaler.scale_, rtol=1e-9)
    new = world(2, 4)
    np.testing.assert_allclose(found.predict(new)["prediction"], search.predict(new.layer(7).astype(float)), rtol=1e-9)
    assert found.target_range == (y.min(), y.max()) and (found.n, found.n_groups) == (len(acts), 9)


@pytest.mark.parametrize("groups", ["category", None])
@pytest.mark.parametrize(
    ("features", "same"),
    [
        ("raw", sets.raw()),
        ("squared_projections", sets.squared_projections()),
        (portable("squared_projections", world(9, 4), n=3), sets.squared_projections(3, source=world(9, 4))),
        (portable("subspace_energy", world(9, 3), k=[1, 3]), sets.subspace_energy(world(9, 3), [1, 3])),
        (portable("anchors", world(9, 1)), sets.anchors(world(9, 1))),
    ],
    ids=["raw", "random squares", "squares", "energy", "anchors"],
)
def test_out_of_fold_r2_is_that_of_predict(features, same, groups):
    acts = world(3, 12)
    table = predict(acts, "score", groups=groups, features=same, baselines=(), n_permutations=1, penalties=SOME, seed=4)
    assert fitted(acts, groups, features=features, seed=4).r2 == pytest.approx(table.set_index("layer").loc[7, "estimate"], abs=1e-9)


# ---- the intervals


def quantile(values, weights, level):
    """The least value below or at which the weight is `level`; the greatest, if there is no such."""
    total = 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        total += weight
        if total >= level - 1e-12:
            return value
    return value


def brute(x, y, group, new, folds, level, spare):
    """CV+ with every group of equal weight, written out."""
    low, high, weights = [], [], []
    for train, test, alpha in folds:
        fit = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(x[train], y[train])
        there = fit.predict(new)
        for i in test:
            off = abs(y[i] - fit.predict(x[[i]])[0])
            low.append(-(there - off))
            high.append(there + off)
            weights.append(1 / ((len(set(group)) + spare) * (group == group[i]).sum()))
    ends = [[quantile(column, weights, level) for column in np.array(values).T] for values in (low, high)]
    return -np.array(ends[0]), np.array(ends[1])


@pytest.mark.parametrize(("n_groups", "spare"), [(12, 1), (9, 1), (8, 0)])
def test_intervals_are_those_of_cv_plus_written_out(n_groups, spare):
    acts, new = unequal(world(4, n_groups)), world(5, 3)
    found, group = fitted(acts, penalties=(30.0,)), acts.facts["category"].to_numpy()
    folds = [(fold.train, fold.test, 30.0) for fold in make_folds(len(acts), pd.factorize(group)[0]).every]
    x, y = acts.layer(7).astype(float), acts.facts["score"].to_numpy()
    low, high = brute(x, y, group, new.layer(7).astype(float), folds, 0.9, spare)
    table = found.predict(new)
    np.testing.assert_allclose(table[["low", "high"]], np.column_stack([low, high]), rtol=1e-8)
    assert found.half_width == pytest.approx((high - low).mean() / 2, rel=0.3) and found.half_width < found.half_width_of_mean


def test_intervals_cover_new_groups_as_was_measured_and_plain_folds_do_not():
    covered, measured, plain, refused = [], [], [], []
    for seed in range(24):
        acts, new = world(seed, 20, size=6), world(1000 + seed, 40, size=6)
        y = new.facts["score"].to_numpy()
        grouped, alone = fitted(acts), fitted(acts, None)
        inside = [(table["low"] <= y) & (y <= table["high"]) for table in (grouped.predict(new, outside="nan"), alone.predict(new, outside="nan"))]
        covered.append(inside[0].mean())
        plain.append(inside[1].mean())
        measured.append(grouped.coverage)
        refused.append(grouped.predict(new, outside="nan")["prediction"].isna().mean())
    assert 0.9 < np.mean(covered) < 0.97 and abs(np.mean(measured) - np.mean(covered)) < 0.02
    assert np.mean(plain) < 0.88
    assert np.mean(refused) < 0.001


def test_a_held_out_group_has_no_part_in_its_own_intervals():
    acts = world(6, 8)
    mine = (acts.facts["category"] == "c3").to_numpy()
    moved = acts.with_facts(acts.facts[["id"]].assign(score=acts.facts["score"] + 1000.0 * mine))
    before, after = (fitted(one, penalties=(10.0,)).held_out.set_index("group") for one in (acts, moved))
    assert after.loc["c3", "width"] == pytest.approx(before.loc["c3", "width"]) and after.loc["c3", "coverage"] == 0 < before.loc["c3", "coverage"]
    assert (after["width"] > before["width"] + 100).drop("c3").all()


def test_coverage_and_its_groups_are_told():
    found = fitted(unequal(world(7, 8)))
    table = found.predict(world(8, 2))
    assert found.coverage == pytest.approx(found.held_out["coverage"].mean()) and found.held_out["n"].sum() == found.n
    assert table.attrs["per_group"]["coverage"] == found.held_out["coverage"].tolist() and table.attrs["coverage"]["n_groups"] == 8
    assert "over 8 held-out groups of 'category'" in repr(found) and f"{found.coverage:.2f}" in repr(found)


def test_few_groups_give_a_warning_and_many_do_not():
    with pytest.warns(UserWarning, match="12 groups of 'category' were seen, fewer than 20"):
        fit_predictor(world(0, 12), "score", layer=7, groups="category", penalties=SOME)
    with pytest.warns(UserWarning, match=r"above level 0\.889"):
        fit_predictor(world(0, 8), "score", layer=7, groups="category", penalties=SOME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = fit_predictor(world(0, 20), "score", layer=7, groups="category", penalties=SOME)
    assert many.cautions == [] and "new category" in fitted(world(0, 20), None).cautions[0]


# ---- what is refused


def test_rows_far_outside_are_refused_and_rows_of_new_groups_are_not():
    acts, new = world(10, 20), world(11, 20)
    found = fitted(acts)
    table = found.predict(new)
    assert table["distance"].between(0, MARGIN).all() and table.notna().all().all()
    values = new.values.copy()
    values[3] += 40
    values[5, 1] = 3 + 8 * (values[5, 1] - 3)
    values[7, 0] += 1000  # another layer, which is not read
    planted = Activations(values, new.facts, new.place, new.meta)
    with pytest.raises(ValueError, match=r"2 of 160 prompts lie far outside .*: '11 3', '11 5': leave them out, or outside='nan'"):
        found.predict(planted)
    kept = found.predict(planted, outside="nan")
    assert list(np.flatnonzero(kept["prediction"].isna())) == [3, 5] and kept["distance"].notna().all()
    assert kept.drop([3, 5]).equals(table.drop([3, 5]))
    with pytest.raises(ValueError, match="'refuse' such rows"):
        found.predict(new, outside="clip")


def with_feature(acts, level):
    """One more feature, the same in all rows."""
    return Activations.from_array(np.pad(acts.values, ((0, 0), (0, 0), (0, 1)), constant_values=level), acts.facts, acts.layers)


def test_a_direction_that_no_training_row_had_is_far():
    acts, new = world(12, 20), world(13, 5)
    flat = [with_feature(acts, 5.0), with_feature(new, 5.0), with_feature(new, 900.0)]
    found = fitted(flat[0])
    assert found.predict(flat[1]).notna().all().all()
    with pytest.raises(ValueError, match="40 of 40 prompts lie far outside"):
        found.predict(flat[2])


def test_another_place_or_model_is_refused():
    acts, new = world(14, 20), world(15, 2)
    found = fitted(acts)
    assert found.predict(new).attrs["model"] == "as fitted"
    assert "not known" in found.predict(world(15, 2, meta={})).attrs["model"]
    wrong = {
        r"are resid_mid": Activations.from_array(new.values, new.facts, new.layers, site="resid_mid"),
        r"· mean: record": Activations.from_array(new.values, new.facts, new.layers, position="mean"),
        r"record that layer": new.select(layers=[4]),
        r"d_model 11": Activations.from_array(new.values[..., :11], new.facts, new.layers),
        r"weights differ": world(15, 2, meta={**MODEL, "weights": {"a": "2e"}}),
        r"adapter_sha256 differ": world(15, 2, meta={**MODEL, "adapter": "bad", "adapter_sha256": "99"}),
        r"variants differ": world(15, 2, meta={**MODEL, "variants": ["bad", "before"]}),
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message):
            found.predict(other)
    with pytest.raises(ValueError, match="leave it out"):
        found.predict(new.select(layers=[7]), anchors=new)


def test_anchors_move_to_another_model():
    acts, new, anchors = world(16, 20), world(17, 4), world(18, 5)
    found = fitted(acts, features=portable("anchors", anchors))
    turn = 5 * np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0][:12]
    other = [Activations.from_array(one.layer(7) @ turn, one.facts, (2,), meta={**MODEL, "model": "wide", "weights": {"a": "3"}, "architecture": "B"})
             for one in (new, anchors)]  # fmt: skip
    here, there = found.predict(new), found.predict(other[0], anchors=other[1][::-1])
    np.testing.assert_allclose(there[["prediction", "low", "high"]], here[["prediction", "low", "high"]], atol=1e-4)
    assert "wide, by way of the anchors" in there.attrs["model"] and here.attrs["model"] == "as fitted"
    with pytest.raises(ValueError, match="record that layer too"):
        found.predict(other[0])
    with pytest.raises(ValueError, match="39 anchors were given"):
        found.predict(other[0], anchors=other[1][:39])


def test_a_copy_in_another_group_is_refused_as_by_predict():
    acts = world(19, 8)
    values = acts.values.copy()
    values[20] = values[3]
    copied = Activations(values, acts.facts, acts.place)
    for call in (lambda: predict(copied, "score", groups="category", n_permutations=1), lambda: fitted(copied)):
        with pytest.raises(ValueError, match=r"copies .* '19 3' and '19 20', and lie in different groups"):
            call()
    values[20], values[4] = acts.values[20], values[3]
    assert fitted(Activations(values, acts.facts, acts.place)).n == 64  # within one group: held out together


def test_features_fitted_on_training_rows_are_refused():
    acts = world(20, 8, text=[f"word {i}" for i in range(64)])
    own = {
        "fitted": sets.squared_projections(4, source="pca"),
        "several layers": "joined",
        "or of the text": sets.from_text(),
        "more than the new row": sets.with_positions(acts),
        "trained on": sets.joined_sets(sets.raw(), sets.squared_projections(3)),
        "or is the target": of_row("leak", lambda one: one.facts[["score"]].to_numpy()),
        "change with": of_row("rank", lambda one: one.layer(7).argsort(axis=0).astype(float)),
    }
    for message, features in own.items():
        with pytest.raises(ValueError, match=rf"cannot be applied to new prompts: .*{message}"):
            fitted(acts, features=features)
    signs = fitted(acts, features=of_row("signs", lambda one: np.sign(one.layer(7) - 3.0)))
    assert set(np.unique(signs.predict(world(21, 2))["distance"].notna())) == {True} and signs.features.name == "signs"


def of_row(name, function):
    return FeatureSet(name, "", lambda acts: [(7, sets.Block(name, fixed(function(acts)), "each", ""))])


def test_requests_that_mean_nothing():
    acts = world(22, 8)
    for options, error in [({"level": 90.0}, ValueError), ({"layer": 5}, KeyError), ({"groups": "topic"}, KeyError), ({"penalties": ()}, ValueError)]:
        with pytest.raises(error):
            fitted(acts, **options)
    with pytest.raises(ValueError, match="no portable features 'pca'"):
        portable("pca")


# ---- the file

KINDS = {
    "raw": lambda: portable("raw"),
    "random": lambda: portable("squared_projections", n=5),
    "squares on given axes": lambda: portable("squared_projections", world(30, 4), n=3),
    "directions": lambda: portable("projections", mean_difference(world(31, 2), world(32, 2)), mean_difference(world(33, 2), world(34, 2))),
    "energy": lambda: portable("subspace_energy", world(35, 4), k=(1, 2)),
    "anchors": lambda: portable("anchors", world(36, 2, text=["a question"] * 16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_predicts_the_same_to_the_last_bit(kind, tmp_path):
    acts, new = unequal(world(23, 10)), world(24, 3)
    found = fitted(acts, features=KINDS[kind]())
    again = load_predictor(found.save(tmp_path / "kept.safetensors"))
    table, other = found.predict(new, outside="nan"), again.predict(new, outside="nan")
    assert other.equals(table) and other.attrs == table.attrs and table["prediction"].notna().sum() > 20
    assert repr(again) == repr(found) and again.held_out.equals(found.held_out) and again.meta == found.meta
    for mine, theirs in zip((found.weights, *found.conformal, *found.seen), (again.weights, *again.conformal, *again.seen), strict=True):
        assert np.array_equal(mine, theirs) and np.asarray(mine).dtype == np.asarray(theirs).dtype
    rest = (
        "target",
        "target_range",
        "place",
        "d_model",
        "groups",
        "n",
        "n_groups",
        "folds",
        "penalty",
        "r2",
        "level",
        "coverage_interval",
        "intercept",
    )
    assert [getattr(found, name) for name in rest] == [getattr(again, name) for name in rest]


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = fitted(world(25, 8)).save(tmp_path / "kept.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    retold = (
        whole.replace(b'\\"level\\":0.9', b'\\"level\\":0.5')
        if b'\\"level\\":0.9' in whole
        else whole.replace(b'\\"level\\": 0.9', b'\\"level\\": 0.5')
    )
    assert retold != whole
    for damaged in (bytes(flipped), whole[:200], retold):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_predictor(path)
    mean_difference(world(31, 2), world(32, 2)).save(path)
    with pytest.raises(ValueError, match="no predictor of ours"):
        load_predictor(path)
    with pytest.raises(FileNotFoundError):
        load_predictor(tmp_path / "none")
    with pytest.raises(ValueError, match="fit with portable"):
        fitted(world(25, 8), features=of_row("signs", lambda one: np.sign(one.layer(7) - 3.0))).save(path)
