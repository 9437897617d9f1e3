"""What learns to foretell: ridge, lasso, least squares, PLS, logistic, each with its settings chosen in inner folds only.

A `Learner` turns a feature block, targets and folds into out-of-fold predictions. Permuted targets are columns beside the
observed one; for each of them the whole choice is made again. Ridge, least squares and PLS take all columns at once; lasso
and logistic go through them one by one, in threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy
from sklearn.linear_model import LogisticRegression, lasso_path

from .names import meant
from .ridge import PENALTIES, Features, Fold, Nested, nested_ridge, penalty_grid, scale
from .threads import side_by_side

LASSO_PENALTIES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""As scikit-learn's Lasso(alpha=); the paper's grid."""
LOGISTIC_PENALTIES = tuple(float(a) for a in np.logspace(0, 6, 7))
"""As 1 / C of scikit-learn's LogisticRegression."""

Targets: TypeAlias = Float[np.ndarray, "prompt target"] | Float[np.ndarray, "fold prompt target"]
Weights: TypeAlias = Float[np.ndarray, "prompt target"] | None
Path: TypeAlias = Callable[
    [Float[np.ndarray, "train feature"], Float[np.ndarray, "train target"], Float[np.ndarray, "other feature"], Weights],
    Float[np.ndarray, "setting other target"],
]
"""From training rows (features scaled), their targets and other rows (and the training rows' weights, None for equal ones)
to the predictions of the other rows at each setting."""
Loss: TypeAlias = Callable[[Float[np.ndarray, "row target"], Float[np.ndarray, "setting row target"], Weights], Float[np.ndarray, "setting target"]]


@dataclass(frozen=True, eq=False)
class Learner:
    """A named way from features, targets and folds to out-of-fold predictions and the settings that inner folds chose.

    nested  (features, targets, folds, scaling, weights) -> `ridge.Nested`; targets [prompt, target], or [fold, prompt,
            target] when each fold has its own; weights [prompt, target] (trials behind a rate) or None.
    note    how the settings are chosen, in words.
    rates   it takes targets between 0 and 1 only.
    """

    name: str
    nested: Callable[[Features, Targets, Sequence[Fold], str, Weights], Nested]
    note: str
    rates: bool = False


def ridge(penalties: Sequence[float] = PENALTIES) -> Learner:
    """As scikit-learn's Ridge(alpha=): `emlens.ridge.nested_ridge`, all targets at once."""
    grid = _positive(penalties)
    return Learner("ridge", lambda features, targets, folds, scaling, weights: nested_ridge(features, targets, folds, grid, scaling), _chosen(grid))


def lasso(penalties: Sequence[float] = LASSO_PENALTIES, tol: float = 1e-10, choose: str = "mse") -> Learner:
    """As scikit-learn's Lasso(alpha=, tol=), along its path; one target after another.

    choose  "mse": least mean squared error over the inner folds; "r2": greatest mean R2 of them, as GridSearchCV does.
    """
    grid, losses = _positive(penalties), {"mse": squared_error, "r2": unexplained}
    if choose not in losses:
        raise ValueError(f"choose={choose!r}: 'mse' or 'r2', taken over the inner folds")
    order = np.argsort(grid)[::-1]  # the path goes down

    def path(
        x: Float[np.ndarray, "train feature"], y: Float[np.ndarray, "train target"], other: Float[np.ndarray, "other feature"], weights: Weights
    ) -> Float[np.ndarray, "setting other target"]:
        x, mean = np.asfortranarray(x), y.mean(axis=0)
        gram, rest = np.ascontiguousarray(x.T @ x), y - mean
        crossed = x.T @ rest

        def predicted(at: int) -> Float[np.ndarray, "setting other"]:
            how = {"precompute": gram, "Xy": np.ascontiguousarray(crossed[:, at]), "tol": tol, "max_iter": 100_000, "check_input": False}
            _, coefficients, _ = lasso_path(x, np.ascontiguousarray(rest[:, at]), alphas=np.array(grid)[order], **how)
            return mean[at] + (other @ coefficients[:, np.argsort(order)]).T

        return np.stack(list(side_by_side(predicted, range(y.shape[1]), y.shape[1])), axis=-1)

    return from_path("lasso", path, grid, _chosen(grid, "mean squared error" if choose == "mse" else "unexplained share (1 - R2)"), losses[choose])


def ols() -> Learner:
    """Least squares, as scikit-learn's LinearRegression: the shortest coefficients where there are more features than rows."""

    def path(
        x: Float[np.ndarray, "train feature"], y: Float[np.ndarray, "train target"], other: Float[np.ndarray, "other feature"], weights: Weights
    ) -> Float[np.ndarray, "setting other target"]:
        mean = y.mean(axis=0)
        return (mean + other @ np.linalg.lstsq(x, y - mean, rcond=None)[0])[None]

    return from_path("ols", path, (0.0,), "nothing to choose: no penalty")


def pls(components: Sequence[int] = tuple(range(1, 11))) -> Learner:
    """Partial least squares, as scikit-learn's PLSRegression(scale=False) on the scaled features, for each target alone; all
    targets at once in kernel form (Rosipal and Trejo 2001)."""
    counts = tuple(int(k) for k in components)
    if not counts or min(counts) < 1:
        raise ValueError(f"components are {list(components)}; needed are one or more numbers of components, each at least 1")

    def path(
        x: Float[np.ndarray, "train feature"], y: Float[np.ndarray, "train target"], other: Float[np.ndarray, "other feature"], weights: Weights
    ) -> Float[np.ndarray, "setting other target"]:
        x_mean, mean = x.mean(axis=0), y.mean(axis=0)
        x, other, left = x - x_mean, other - x_mean, y - mean
        gram, crossed = x @ x.T, other @ x.T
        found = [np.broadcast_to(mean, (len(other), y.shape[1]))]
        mine: list[np.ndarray] = []
        theirs: list[np.ndarray] = []
        for _ in range(min(max(counts), len(x) - 1)):
            score, seen = gram @ left, crossed @ left
            size = np.linalg.norm(score, axis=0)
            for _ in range(2):  # twice: Gram-Schmidt as orthogonal as rounding allows
                for a, b in zip(mine, theirs, strict=True):
                    shared = np.einsum("rt,rt->t", a, score)
                    score, seen = score - a * shared, seen - b * shared
            norm = np.linalg.norm(score, axis=0)
            step = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 1e-10 * size)  # nothing is left to explain: no step
            mine.append(score * step)
            theirs.append(seen * step)
            weight = np.einsum("rt,rt->t", mine[-1], left)
            left = left - mine[-1] * weight
            found.append(found[-1] + theirs[-1] * weight)
        return np.stack([found[min(k, len(found) - 1)] for k in counts])

    told = f"least mean squared error among {', '.join(map(str, counts))} components"
    return from_path("pls", path, tuple(map(float, counts)), told)


def logistic(penalties: Sequence[float] = LOGISTIC_PENALTIES) -> Learner:
    """Binomial regression of a rate between 0 and 1, as scikit-learn's LogisticRegression(C=1 / penalty): a prompt counts as
    often as it has trials (`trials=` of em.predict; else once); one target after another, settings by binomial deviance."""
    grid = _positive(penalties)

    def path(
        x: Float[np.ndarray, "train feature"], y: Float[np.ndarray, "train target"], other: Float[np.ndarray, "other feature"], weights: Weights
    ) -> Float[np.ndarray, "setting other target"]:
        if x.shape[1] > len(x):  # a rotation: the penalty does not see it
            _, _, axes = np.linalg.svd(x, full_matrices=False)
            x, other = x @ axes.T, other @ axes.T
        trials = np.ones_like(y) if weights is None else weights
        twice, labels = np.vstack([x, x]), np.repeat([1, 0], len(x))

        def probabilities(at: int) -> Float[np.ndarray, "setting other"]:
            counts = np.concatenate([trials[:, at] * y[:, at], trials[:, at] * (1 - y[:, at])])
            held = counts > 0
            if len(set(labels[held])) < 2:
                return np.full((len(grid), len(other)), float(y[0, at]))
            fits = (LogisticRegression(C=1 / a, tol=1e-8, solver="newton-cholesky").fit(twice[held], labels[held], counts[held]) for a in grid)
            return np.stack([fit.predict_proba(other)[:, 1] for fit in fits])

        return np.stack(list(side_by_side(probabilities, range(y.shape[1]), y.shape[1])), axis=-1)

    return from_path("logistic", path, grid, _chosen(grid, "binomial deviance"), deviance, rates=True)


# ---- a learner from a path


def squared_error(
    y: Float[np.ndarray, "row target"], found: Float[np.ndarray, "setting row target"], weights: Weights
) -> Float[np.ndarray, "setting target"]:
    """Mean squared error of an inner fold."""
    return np.square(y - found).mean(axis=1)


def unexplained(
    y: Float[np.ndarray, "row target"], found: Float[np.ndarray, "setting row target"], weights: Weights
) -> Float[np.ndarray, "setting target"]:
    """1 - R2 of an inner fold about its own mean."""
    spread = y.var(axis=0)
    return np.divide(squared_error(y, found, weights), spread, out=np.zeros((len(found), y.shape[1])), where=spread > 0)


def deviance(
    y: Float[np.ndarray, "row target"], found: Float[np.ndarray, "setting row target"], weights: Weights
) -> Float[np.ndarray, "setting target"]:
    """Mean binomial deviance (half) of an inner fold, over trials."""
    p, trials = np.clip(found, 1e-12, 1 - 1e-12), np.ones_like(y) if weights is None else weights
    return -(trials * (xlogy(y, p) + xlogy(1 - y, 1 - p))).sum(axis=1) / trials.sum(axis=0)


def from_path(name: str, path: Path, settings: Sequence[float], note: str, loss: Loss = squared_error, rates: bool = False) -> Learner:
    """A learner (of your own, too) from its `Path`: the setting with the least mean loss over the inner folds, the first of
    them when equal, is chosen for every target and outer fold; features are scaled by the training rows."""

    def nested(features: Features, targets: Targets, folds: Sequence[Fold], scaling: str, weights: Weights) -> Nested:
        predictions = np.full(targets.shape[-2:], np.nan)
        chosen = np.zeros((len(folds), targets.shape[-1]))
        for f, fold in enumerate(folds):
            y = targets if targets.ndim == 2 else targets[f]
            losses = np.zeros((len(settings), y.shape[1]))
            for train, test in fold.inner if len(settings) > 1 else ():
                losses += loss(y[test], _at(path, features, train, test, y, scaling, weights), None if weights is None else weights[test])
            best = losses.argmin(axis=0)
            found = _at(path, features, fold.train, fold.test, y, scaling, weights)
            predictions[fold.test] = np.take_along_axis(found, best[None, None], axis=0)[0]
            chosen[f] = np.array(settings)[best]
        return Nested(predictions, chosen)

    return Learner(name, nested, note, rates)


def _at(
    path: Path, features: Features, train: np.ndarray, test: np.ndarray, y: Float[np.ndarray, "prompt target"], scaling: str, weights: Weights
) -> Float[np.ndarray, "setting test target"]:
    z = scale(np.asarray(features(train), dtype=np.float64), train, scaling)
    return path(z[train], y[train], z[test], None if weights is None else weights[train])


# ---- by name

NAMED: dict[str, Callable[..., Learner]] = {"ridge": ridge, "lasso": lasso, "ols": ols, "pls": pls, "logistic": logistic, "binomial": logistic}
"""Learners by name ("binomial" is "logistic")."""
PENALISED = ("ridge", "lasso", "logistic", "binomial")


def learner(given: str | Learner, penalties: Sequence[float] | None = None) -> Learner:
    """A learner by its name, with these penalties or its own, or as it is; ValueError lists the names."""
    if isinstance(given, str) and given not in NAMED:
        raise ValueError(
            f"unknown model {given!r}: choose among {', '.join(map(repr, NAMED))}, or give a Learner, say em.learners.lasso([0.01, 0.1])."
            f"{meant(given, NAMED)}"
        )
    if penalties is None:
        return NAMED[given]() if isinstance(given, str) else given
    if not isinstance(given, str) or given not in PENALISED:
        named = given if isinstance(given, str) else given.name
        raise ValueError(f"penalties= are for {', '.join(map(repr, PENALISED))} by name; the model is {named!r}: leave them out, or give them to it")
    return NAMED[given](penalties)


def _positive(penalties: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(a) for a in penalty_grid(penalties))


def _chosen(grid: Sequence[float], measure: str = "mean squared error") -> str:
    return f"least {measure} among the penalties {', '.join(f'{a:.3g}' for a in grid)}"
