"""Guards the learners: predictions and chosen settings equal to scikit-learn's with the same folds, target by target."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emlens import learners
from emlens.folds import make_folds
from emlens.ridge import fixed

N, D = 60, 25


def planted(targets: int = 3, d: int = D) -> tuple[np.ndarray, np.ndarray, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, d)) @ np.diag(np.logspace(0, -1, d)) + 3
    y = x[:, :3] @ rng.standard_normal((3, targets)) + rng.standard_normal((N, targets))
    return x, y, make_folds(N, np.arange(N) % 5)


def by_scikit(model: Any, grid: dict[str, list[Any]], x: np.ndarray, y: np.ndarray, folds: Any, scoring: str) -> tuple[np.ndarray, list[Any]]:
    """A pipeline in a grid search on the same inner folds; predictions out of fold and what was chosen."""
    predictions, chosen = np.empty(len(y)), []
    for train, test, inner in folds:
        marks = np.zeros(len(train), dtype=int)
        for k, (_, rows) in enumerate(inner):
            marks[np.isin(train, rows)] = k
        search = GridSearchCV(make_pipeline(StandardScaler(), model), grid, scoring=scoring, cv=PredefinedSplit(marks)).fit(x[train], y[train])
        predictions[test] = search.predict(x[test]).ravel()
        chosen.append(next(iter(search.best_params_.values()), None))
    return predictions, chosen


GRID = [0.01, 0.1, 0.5]
CASES: list[tuple[Callable[[], learners.Learner], Any, dict[str, list[Any]], str, int]] = [
    (lambda: learners.ridge([1.0, 30.0, 1000.0]), Ridge(), {"ridge__alpha": [1.0, 30.0, 1000.0]}, "neg_mean_squared_error", D),
    (lambda: learners.lasso(GRID), Lasso(tol=1e-12, max_iter=100_000), {"lasso__alpha": GRID}, "neg_mean_squared_error", D),
    (lambda: learners.lasso(GRID), Lasso(tol=1e-12, max_iter=100_000), {"lasso__alpha": GRID}, "neg_mean_squared_error", 2 * N),
    (lambda: learners.lasso(GRID, choose="r2"), Lasso(tol=1e-12, max_iter=100_000), {"lasso__alpha": GRID}, "r2", D),
    (learners.ols, LinearRegression(), {}, "r2", D),
    (learners.ols, LinearRegression(), {}, "r2", 2 * N),
    (lambda: learners.pls([1, 2, 5]), PLSRegression(scale=False, tol=1e-12), {"plsregression__n_components": [1, 2, 5]}, "neg_mean_squared_error", D),
    (lambda: learners.pls([3]), PLSRegression(scale=False), {"plsregression__n_components": [3]}, "neg_mean_squared_error", 2 * N),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_predictions_are_those_of_scikit_learn(case: int) -> None:
    make, model, grid, scoring, d = CASES[case]
    x, y, folds = planted(d=d)
    found = make().nested(fixed(x), y, folds.every, "each", None)
    for target in range(y.shape[1]):
        expected, chosen = by_scikit(model, grid, x, y[:, target], folds.every, scoring)
        np.testing.assert_allclose(found.predictions[:, target], expected, atol=1e-6)
        assert [c for c in chosen if c is not None] == (found.penalties[:, target].tolist() if grid else [])


def test_logistic_is_that_of_scikit_learn_and_counts_trials() -> None:
    x, y, folds = planted(2)
    rng = np.random.default_rng(1)
    trials = rng.integers(2, 9, (N, 2)).astype(float)
    rates = rng.binomial(trials.astype(int), 1 / (1 + np.exp(y.mean(axis=0) - y))) / trials
    found = learners.logistic([3.0]).nested(fixed(x), rates, folds.every, "each", trials)
    for target in (0, 1):
        for train, test, _ in folds.every:
            scaler = StandardScaler().fit(x[train])
            answers = [
                [1] * int(round(m * r)) + [0] * int(round(m * (1 - r))) for m, r in zip(trials[train, target], rates[train, target], strict=True)
            ]
            rows = np.repeat(scaler.transform(x[train]), [len(a) for a in answers], axis=0)
            fit = LogisticRegression(C=1 / 3, tol=1e-10, max_iter=10_000).fit(rows, np.concatenate(answers))
            np.testing.assert_allclose(found.predictions[test, target], fit.predict_proba(scaler.transform(x[test]))[:, 1], atol=1e-5)
    equal = learners.logistic([3.0]).nested(fixed(x), rates, folds.every, "each", None)
    assert np.abs(equal.predictions - found.predictions).max() > 0.01, "trials weigh"


def test_logistic_takes_the_penalty_of_least_deviance_and_wide_features_are_only_turned() -> None:
    x, y, folds = planted(1, d=2 * N)
    rates = np.random.default_rng(2).random((N, 1)) > 0.5  # nothing to find: the strongest penalty is best
    found = learners.logistic([1e-2, 1e4]).nested(fixed(x), rates.astype(float), folds.every, "each", None)
    assert (found.penalties == 1e4).all()
    train, test, _ = folds.every[0]
    scaler = StandardScaler().fit(x[train])
    fit = LogisticRegression(C=1e-4, tol=1e-10).fit(scaler.transform(x[train]), rates[train, 0])
    np.testing.assert_allclose(found.predictions[test, 0], fit.predict_proba(scaler.transform(x[test]))[:, 1], atol=1e-5)


@pytest.mark.parametrize("name", ["ridge", "lasso", "ols", "pls", "logistic"])
def test_features_that_say_nothing_give_the_mean(name: str) -> None:
    _, y, folds = planted(2)
    y = (y > y.mean(axis=0)).astype(float)
    found = learners.learner(name).nested(fixed(np.ones((N, 3))), y, folds.every, "each", None).predictions
    for train, test, _ in folds.every:
        np.testing.assert_allclose(found[test], np.tile(y[train].mean(axis=0), (len(test), 1)), atol=1e-5)


def test_targets_of_each_fold_and_alone_are_the_same() -> None:
    x, y, folds = planted(2)
    for learner in (learners.lasso(GRID), learners.pls([1, 3])):
        together = learner.nested(fixed(x), y, folds.every, "each", None).predictions
        alone = learner.nested(fixed(x), y[:, 1:], folds.every, "each", None).predictions
        of_fold = learner.nested(fixed(x), np.stack([y + f for f in range(5)]), folds.every, "each", None).predictions
        np.testing.assert_allclose(together[:, 1:], alone, atol=1e-10)
        for f, fold in enumerate(folds.every):
            np.testing.assert_allclose(of_fold[fold.test], together[fold.test] + f, atol=1e-7)


def test_the_setting_is_chosen_without_the_test_rows() -> None:
    """Test rows that would like another penalty change nothing in what is chosen, or in other folds' predictions."""
    x, y, folds = planted(1)
    learner, fold = learners.lasso(GRID), folds.every[0]
    before = learner.nested(fixed(x), y, folds.every, "each", None)
    turned = y.copy()
    turned[fold.test] = -100 * turned[fold.test]
    after = learner.nested(fixed(x), turned, folds.every, "each", None)
    np.testing.assert_array_equal(after.predictions[fold.test], before.predictions[fold.test])
    assert after.penalties[0] == before.penalties[0]


def test_a_learner_of_your_own() -> None:
    def nearest(x: np.ndarray, y: np.ndarray, other: np.ndarray, weights: Any) -> np.ndarray:
        order = np.argsort(((other[:, None] - x[None]) ** 2).sum(axis=-1), axis=1)
        return np.stack([y[order[:, :k]].mean(axis=1) for k in (1, 10)])

    x, y, folds = planted(1, d=3)
    mine = learners.from_path("nearest", nearest, (1, 10), "number of neighbours by squared error")
    found = mine.nested(fixed(x), y, folds.every, "each", None)
    assert set(np.unique(found.penalties)) <= {1, 10} and np.isfinite(found.predictions).all()
    assert learners.learner(mine) is mine


def test_bad_learners_name_the_way_out() -> None:
    for words, call in (
        ("'ridge', 'lasso', 'ols'", lambda: learners.learner("forest")),
        ("penalties= are for .* the model is 'ols'", lambda: learners.learner("ols", [1.0])),
        ("the model is 'lasso'", lambda: learners.learner(learners.lasso(), [1.0])),
        ("positive", lambda: learners.learner("lasso", [0.0])),
        ("at least 1", lambda: learners.pls([0])),
        ("'mse' or 'r2'", lambda: learners.lasso(choose="r")),
    ):
        with pytest.raises(ValueError, match=words):
            call()
