"""Guards the fast nested ridge: equal to scikit-learn on the same folds, blind to what is held out, one decomposition a training set."""

import math

import numpy as np
import pytest
import scikit
from scipy import stats as scipy_stats
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emlens import ridge
from emlens.ridge import Fold, fixed, nested_ridge

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def leave_one_group_out(groups):
    return [Fold(*fold) for fold in scikit.leave_one_group_out(groups)]


def shuffled(n, seed=0):
    folds = []
    for train, test in KFold(4, shuffle=True, random_state=seed).split(np.arange(n)):
        inner = KFold(3, shuffle=True, random_state=seed).split(train)
        folds.append(Fold(train, test, tuple((train[a], train[b]) for a, b in inner)))
    return folds


def table(seed, n, d, n_targets):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * np.logspace(1, -2, d) + rng.standard_normal(d)
    y = x[:, :3] @ rng.standard_normal((3, n_targets)) / 5 + rng.standard_normal((n, n_targets)) * np.linspace(0.1, 8, n_targets) + 3
    return x, y


@pytest.mark.parametrize("d", [4, 100], ids=["fewer features than prompts", "more features than prompts"])
@pytest.mark.parametrize("kind", ["grouped", "shuffled"])
@pytest.mark.parametrize("n_targets", [3, 300], ids=["few targets", "many targets"])
def test_equals_scikit_learn(d, kind, n_targets):
    n = 40
    x, y = table(1, n, d, n_targets)
    x[:, 2] = 7.0  # a constant feature
    unequal = np.repeat(np.arange(5), [3, 4, 6, 9, 18])[np.random.default_rng(0).permutation(n)]
    folds = leave_one_group_out(unequal) if kind == "grouped" else shuffled(n)
    found = nested_ridge(fixed(x), y, folds, PENALTIES)
    predictions, chosen = scikit.nested(x, y, folds, PENALTIES)
    assert found.penalties.tolist() == chosen.tolist()
    np.testing.assert_allclose(found.predictions, predictions, rtol=0, atol=1e-8)
    assert len(np.unique(found.penalties)) > 1, "the case should make the folds choose"


def test_what_is_written_out_is_scikit_learns_grid_search():
    x, y = table(1, 40, 8, 1)
    folds = shuffled(40)
    predictions, chosen = scikit.nested(x, y, folds, PENALTIES)
    for fold, (train, test, inner) in enumerate(folds):
        where = {row: i for i, row in enumerate(train)}
        cv = [([where[r] for r in a], [where[r] for r in b]) for a, b in inner]
        grid = {"ridge__alpha": list(PENALTIES)}
        search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), grid, scoring="neg_mean_squared_error", cv=cv).fit(x[train], y[train, 0])
        assert search.best_params_["ridge__alpha"] == chosen[fold, 0]
        np.testing.assert_allclose(search.predict(x[test]), predictions[test, 0], atol=1e-10)


def test_float32_activations_are_computed_in_float64():
    x, y = table(2, 40, 60, 1)
    folds = shuffled(40)
    narrow = x.astype(np.float32)
    found = nested_ridge(fixed(narrow), y, folds, PENALTIES).predictions[:, 0]
    np.testing.assert_allclose(found, scikit.nested(narrow.astype(np.float64), y, folds, PENALTIES)[0][:, 0], atol=1e-8)


def test_targets_do_not_touch_each_other():
    x, y = table(3, 40, 60, 5)
    folds = leave_one_group_out(np.repeat(np.arange(5), 8))
    together = nested_ridge(fixed(x), y, folds, PENALTIES)
    alone = nested_ridge(fixed(x), y[:, 3:4], folds, PENALTIES)
    np.testing.assert_allclose(together.predictions[:, 3], alone.predictions[:, 0], atol=1e-10)


def test_one_decomposition_per_distinct_training_set():
    x, y = table(4, 64, 80, 2)
    calls = []

    def features(train):
        calls.append(tuple(train))
        return x

    nested_ridge(features, y, leave_one_group_out(np.repeat(np.arange(8), 8)), PENALTIES)
    assert len(calls) == len(set(calls)) == math.comb(8, 2) + 8, "28 pairs left out, 8 single groups left out"


def doubted(monkeypatch, instead):
    """`ridge._in_doubt` replaced by `instead`(the targets it names, their number), and how many it named, fold by fold."""
    named, judge = [], ridge._in_doubt

    def judged(errors, bounds, best):
        named.append(judge(errors, bounds, best))
        return instead(named[-1], len(best))

    monkeypatch.setattr(ridge, "_in_doubt", judged)
    return named


@pytest.mark.parametrize("own", [False, True], ids=["targets shared by folds", "targets of each fold"])
def test_near_ties_are_decided_as_float64_decides_them(own, monkeypatch):
    hasty = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(20, 50)), int(rng.choice([3, 90]))
        x, y = table(seed, n, d, 300)
        y = (y + rng.choice([0, 1e3])) * rng.choice([1e-21, 1e-20, 1, 1e20])  # squares too small or large for float32
        targets = np.stack([y, y[:, ::-1], -y, y**2 / np.abs(y).max()]) if own else y
        penalties = np.outer(10.0 ** np.sort(rng.uniform(-3, 6, 4)), [1, 1 + 1e-8, 1 + 1e-6, 1 + 1e-4]).ravel()
        ask = fixed(x), targets, shuffled(n, seed), penalties
        found = nested_ridge(*ask)
        with monkeypatch.context() as only:
            only.setattr(ridge, "_KEPT", 0)  # all in float64
            exact = nested_ridge(*ask)
        with monkeypatch.context() as only:
            doubted(only, lambda columns, n_targets: columns[:0])  # all in float32
            hasty += (nested_ridge(*ask).penalties != exact.penalties).sum()
        assert (found.penalties == exact.penalties).all()
        np.testing.assert_allclose(found.predictions, exact.predictions, rtol=1e-12)
    assert hasty > 100, "the twin: without a second look, float32 chooses otherwise"


def test_rounding_stays_inside_its_bound_and_leaves_few_in_doubt(monkeypatch):
    n, folds = 64, leave_one_group_out(np.repeat(np.arange(8), 8))
    grid = np.logspace(-6, 6, 15)
    for seed, d in enumerate([5, 30, 100, 1000]):
        x, y = table(seed, n, d, 200)
        y[:, :100] += 1e3 * x[:, :1]  # predicted so well that what is left is far smaller than what was subtracted
        inner = [ridge._decomposed(fixed(x), train, uses, "each") for train, uses in ridge._training_sets(folds)]
        in_float32 = ridge._inner_errors(inner, [y] * 8, folds, grid, np.float32)
        in_float64 = ridge._inner_errors(inner, [y] * 8, folds, grid, np.float64)
        for (quick, bound), (exact, _) in zip(in_float32, in_float64, strict=True):
            assert (np.abs(quick - exact) <= bound).all()
            assert np.abs(quick - exact).max() > 0, "the twin: it does round"
    named = doubted(monkeypatch, lambda columns, n_targets: columns)
    x, y = table(9, n, 100, 1000)
    nested_ridge(fixed(x), y, folds)
    assert len(named) == 8 and sum(map(len, named)) < 0.15 * 8000


def test_exact_ties_choose_the_first_penalty():
    y = np.random.default_rng(0).standard_normal((40, 100))
    assert (nested_ridge(fixed(np.ones((40, 3))), y, shuffled(40), PENALTIES).penalties == PENALTIES[0]).all()


def test_one_penalty_needs_no_choice():
    x, y = table(4, 40, 60, 2)
    folds = shuffled(40)
    found = nested_ridge(fixed(x), y, folds, [10.0])
    np.testing.assert_allclose(found.predictions, scikit.nested(x, y, folds, [10.0])[0], atol=1e-8)
    assert found.penalties.tolist() == [[10.0, 10.0]] * 4


def test_held_out_rows_cannot_be_seen():
    x, y = table(5, 40, 60, 1)
    groups = np.repeat(np.arange(5), 8)
    folds = leave_one_group_out(groups)
    before = nested_ridge(fixed(x), y, folds, PENALTIES).predictions
    changed, spread = y.copy(), x.copy()
    changed[groups == 2] += 100 * np.random.default_rng(0).standard_normal((8, 1))
    spread[(groups == 2) & (np.arange(40) % 8 > 0)] *= 50  # would change a scale that looked at test rows
    after = nested_ridge(fixed(spread), changed, folds, PENALTIES).predictions
    assert after[groups == 2][0] == before[groups == 2][0]
    assert not np.allclose(after[groups != 2], before[groups != 2]), "the twin: training rows do matter"


def test_each_fold_may_have_targets_of_its_own():
    x, y = table(6, 40, 60, 5)
    folds = leave_one_group_out(np.repeat(np.arange(5), 8))
    own = np.stack([y[:, [f, 0]] for f in range(5)])
    found = nested_ridge(fixed(x), own, folds, PENALTIES).predictions
    each = nested_ridge(fixed(x), y, folds, PENALTIES).predictions
    for f, fold in enumerate(folds):
        np.testing.assert_allclose(found[fold.test, 0], each[fold.test, f], atol=1e-10)
        np.testing.assert_allclose(found[fold.test, 1], each[fold.test, 0], atol=1e-10)


def test_residuals_are_out_of_fold_in_test_and_in_training_rows():
    x, y = table(7, 40, 3, 1)
    folds = leave_one_group_out(np.repeat(np.arange(5), 8))
    left = ridge.residuals(fixed(x), y[:, 0], folds, PENALTIES)
    predictions, chosen = scikit.nested(x, y, folds, PENALTIES)
    for f, fold in enumerate(folds):
        np.testing.assert_allclose(left[f, fold.test], (y - predictions)[fold.test, 0], atol=1e-8)
        for train, test in fold.inner:
            np.testing.assert_allclose(left[f, test], (y[test] - scikit.predicted(x, y, train, test, chosen[f])[0])[:, 0], atol=1e-8)


def test_residuals_of_many_targets_are_those_of_each():
    x, y = table(5, 40, 12, 3)
    folds = leave_one_group_out(np.repeat(np.arange(5), 8))
    together = ridge.residuals(fixed(x), y, folds, PENALTIES)
    assert together.shape == (5, 40, 3)
    for column in range(3):
        np.testing.assert_allclose(together[..., column], ridge.residuals(fixed(x), y[:, column], folds, PENALTIES), atol=1e-10)


def test_scaling():
    x = np.random.default_rng(0).standard_normal((30, 5)) * [1, 10, 100, 0, 3] + 5
    train = np.arange(20)
    np.testing.assert_allclose(ridge.scale(x, train), StandardScaler().fit(x[train]).transform(x), atol=1e-12)
    block = ridge.scale(x, train, "block")
    assert np.square(block[train]).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(block.std(axis=0)[1] / block.std(axis=0)[0], x.std(axis=0)[1] / x.std(axis=0)[0])
    assert np.isfinite(ridge.scale(np.ones((30, 2)), train, "block")).all()
    with pytest.raises(ValueError, match="'each', 'block'"):
        ridge.scale(x, train, "none")


def test_a_feature_that_never_varies_predicts_the_training_mean():
    y = np.arange(40.0)[:, None]
    folds = shuffled(40)
    found = nested_ridge(fixed(np.zeros((40, 1))), y, folds, PENALTIES).predictions
    for fold in folds:
        np.testing.assert_allclose(found[fold.test], y[fold.train].mean())


def test_scores_equal_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    y, found = rng.integers(0, 5, (50, 4)).astype(float), rng.integers(0, 5, (50, 4)).astype(float)
    for column in range(4):
        a, b = y[:, column], found[:, column]
        assert ridge.r2(y, found)[column] == pytest.approx(r2_score(a, b))
        assert ridge.rmse(y, found)[column] == pytest.approx(root_mean_squared_error(a, b))
        assert ridge.spearman(y, found)[column] == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    codes = np.arange(50) % 3
    inside = ridge.per_group(ridge.r2, y, found, codes)
    assert inside.shape == (3, 4) and inside[1, 2] == pytest.approx(r2_score(y[codes == 1, 2], found[codes == 1, 2]))


def test_scores_of_constants():
    y = np.linspace(0, 1, 20)[:, None]
    noise = 3 + 1e-15 * np.random.default_rng(0).standard_normal((20, 1))
    assert ridge.spearman(y, noise)[0] == 0, "rounding noise orders nothing"
    assert np.isnan(ridge.r2(np.full((20, 1), 0.1), noise)[0]) and np.isnan(ridge.spearman(np.ones((20, 1)), y)[0])


def test_bad_requests():
    x, y = table(9, 40, 5, 1)
    with pytest.raises(ValueError, match="positive"):
        nested_ridge(fixed(x), y, shuffled(40), (0.0, 1.0))
    with pytest.raises(ValueError, match="inner folds"):
        nested_ridge(fixed(x), y, [Fold(np.arange(30), np.arange(30, 40), ())], PENALTIES)
