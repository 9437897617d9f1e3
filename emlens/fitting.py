"""Ways to find a direction, as functions on arrays and on Activations, and erasing what is linear in a label.

A `Method` fits all draws of labels at once, so that a null can repeat the whole fit. Whether a method's direction tells apart
prompts it was not fitted on, and how far it depends on the prompts it was fitted on, are `emlens.separation`'s questions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pandas as pd
import scipy.linalg
from jaxtyping import Bool, Float

from ._sides import check_same_place, facts_column
from .activations import Activations
from .covariance import ledoit_wolf
from .directions import Direction, found_in
from .subspaces import principal_components
from .threads import one_thread

Fit: TypeAlias = Callable[[Float[np.ndarray, "row d_model"], Bool[np.ndarray, "draws row"]], Float[np.ndarray, "draws d_model"]]
"""From rows, and which of them are in a under each draw of labels, to a direction of any length for each draw, towards a."""


@dataclass(frozen=True)
class Method:
    """A way to find a direction from two sets of rows.

    turns  turning the rows turns the direction along, and it lies in what the centred rows span: it may then be given the
           rows in fewer coordinates, which is quicker. False is always right.
    """

    name: str
    fit: Fit
    turns: bool = False


# ---- on arrays


def mean_differences(x: Float[np.ndarray, "row d_model"], in_a: Bool[np.ndarray, "draws row"]) -> Float[np.ndarray, "draws d_model"]:
    """mean(a) - mean(b); 0 where a side is empty."""
    n_a = in_a.sum(axis=1, keepdims=True)
    weights = np.where(in_a, 1 / np.maximum(n_a, 1), -1 / np.maximum(in_a.shape[1] - n_a, 1))
    both = (n_a > 0) & (n_a < in_a.shape[1])
    return (weights * both) @ x


def principal_directions(
    x: Float[np.ndarray, "row d_model"], in_a: Bool[np.ndarray, "draws row"], component: int = 1
) -> Float[np.ndarray, "draws d_model"]:
    """The principal component of all rows, whose labels only fix its sign: mean(a) projects higher than mean(b)."""
    axis = principal_components(x, component)[0][:, -1]
    return np.where(mean_differences(x, in_a) @ axis < 0, -1.0, 1.0)[:, None] * axis


def discriminants(
    x: Float[np.ndarray, "row d_model"], in_a: Bool[np.ndarray, "draws row"], shrinkage: float | None = None
) -> Float[np.ndarray, "draws d_model"]:
    """Fisher's linear discriminant with a shrunk covariance: ((1 - r) S + r v I)^-1 (mean(a) - mean(b)).

    S is the covariance of all rows about their common mean, v its mean variance over d_model, r the shrinkage: a number
    from 0 to 1, or None for that of Ledoit and Wolf 2004. S is the covariance within the sides plus a multiple of the mean
    difference's outer product, which changes the length of the solution only (Sherman and Morrison): the direction is that
    of linear discriminant analysis, and labels drawn anew are shrunk alike. r = 1 is the mean difference.
    """
    rows = x - x.mean(axis=0)
    fitted, variance = ledoit_wolf(rows)
    r = fitted if shrinkage is None else shrinkage
    if not 0 <= r <= 1:
        raise ValueError(f"a shrinkage lies from 0 (the covariance as it is) to 1 (the mean difference); got {shrinkage}")
    differences = mean_differences(rows, in_a)
    n, d = rows.shape
    if r * variance <= 0:
        return np.linalg.lstsq(rows.T @ rows / n, differences.T, rcond=None)[0].T
    # (p I + q X'X)^-1 D = D / p - X' (p I + q X X')^-1 (q / p) X D: the smaller of the two matrices is solved
    p, q = r * variance, (1 - r) / n
    if d <= n:
        return scipy.linalg.solve(p * np.eye(d) + q * rows.T @ rows, differences.T, assume_a="pos").T
    inner = scipy.linalg.solve(p * np.eye(n) + q * rows @ rows.T, rows @ differences.T, assume_a="pos")
    return (differences - q * inner.T @ rows) / p


def logistic_gradients(
    x: Float[np.ndarray, "row d_model"], in_a: Bool[np.ndarray, "draws row"], penalty: float = 1.0
) -> Float[np.ndarray, "draws d_model"]:
    """The direction in which the logit of logistic regression rises fastest, per unit of x: w / s.

    Columns are standardised (s their standard deviations, 1 where 0), w minimises the sum of the log-losses plus
    penalty / 2 ||w||^2, the intercept is free. 0 where a side is empty. One fit a draw: milliseconds, where the other
    methods share one solution among all draws.
    """
    from sklearn.linear_model import LogisticRegression

    spread = x.std(axis=0)
    spread[spread == 0] = 1.0
    z = (x - x.mean(axis=0)) / spread
    axes = np.linalg.qr(z.T)[0] if len(z) < z.shape[1] else np.eye(z.shape[1])  # w lies in the span of the rows
    model = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=1000)
    both = in_a.any(axis=1) & ~in_a.all(axis=1)
    fitted = np.zeros((len(in_a), axes.shape[1]))
    for draw in np.flatnonzero(both):
        fitted[draw] = model.fit(z @ axes, in_a[draw]).coef_[0]
    return fitted @ axes.T / spread


METHODS = {
    method.name: method
    for method in (
        Method("mean difference", mean_differences, turns=True),
        Method("pca", principal_directions, turns=True),
        Method("lda", discriminants, turns=True),
        Method("logistic", logistic_gradients),
    )
}


def method_named(method: str | Method) -> Method:
    """The method of that name, or the one given."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {list(METHODS)}, or give Method(name, fit)")
    return METHODS[method]


# ---- on Activations


def pca_direction(acts: Activations, other: Activations | None = None, component: int = 1, name: str = "pca") -> Direction:
    """The first (or another) principal component at every layer; norms keep the standard deviation along it.

    Of the prompts of both sides together, where `other` is given; its sign is such that `acts` projects higher on average
    than `other`. Alone: such that the prompts themselves project positively on average. `pca_direction(after - before)` is
    repeng's "pca_diff" (Vogel 2024), centred as there.

    Which direction varies most is not which one separates. Errors: ValueError for different places or widths, or prompts
    that span fewer directions than `component`.
    """
    sides = {"a": acts} if other is None else {"a": acts, "b": other}
    check_same_place(acts, acts if other is None else other)
    found = []
    for layer in acts.layers:
        x = np.concatenate([side.layer(layer) for side in sides.values()]).astype(np.float64)
        basis, variances = principal_components(x, component)
        axis = basis[:, -1] * np.sqrt(variances[-1])
        toward = acts.layer(layer).mean(axis=0, dtype=np.float64) - (0 if other is None else other.layer(layer).mean(axis=0, dtype=np.float64))
        found.append(-axis if toward @ axis < 0 else axis)
    return Direction.from_array(np.stack(found), acts.layers, acts.site, name, found_in(f"principal component {component}", **sides))


def lda_direction(a: Activations, b: Activations, shrinkage: float | None = None, name: str = "lda") -> Direction:
    """Fisher's linear discriminant of a against b at every layer (see `discriminants`): the mean difference, less where
    prompts vary anyway.

    shrinkage: from 0 to 1 (the mean difference); None: Ledoit and Wolf's. Errors: as for `mean_difference`.
    """
    told = "of Ledoit and Wolf" if shrinkage is None else f"{shrinkage:g}"
    return _found(a, b, Method("lda", lambda x, in_a: discriminants(x, in_a, shrinkage)), name, f"lda, shrinkage {told}")


def logistic_direction(a: Activations, b: Activations, penalty: float = 1.0, name: str = "logistic") -> Direction:
    """The direction in which a ridge-penalised logistic regression of a against b rises fastest, at every layer (see
    `logistic_gradients`); norms keep how much the logit rises per unit of the stream.

    penalty: on the squared weights of standardised activations. Errors: as for `mean_difference`.
    """
    return _found(a, b, Method("logistic", lambda x, in_a: logistic_gradients(x, in_a, penalty)), name, f"logistic, ridge penalty {penalty:g}")


@one_thread
def _found(a: Activations, b: Activations, method: Method, name: str, told: str) -> Direction:
    check_same_place(a, b)
    in_a = np.arange(len(a) + len(b))[None] < len(a)
    rows = [method.fit(np.concatenate([a.layer(i), b.layer(i)]).astype(np.float64), in_a)[0] for i in a.layers]
    return Direction.from_array(np.stack(rows), a.layers, a.site, name, found_in(told, a=a, b=b))


# ---- erasing


@dataclass(frozen=True)
class Eraser:
    """x -> x - left (right (x - centre)): what `leace` fits."""

    centre: Float[np.ndarray, " d_model"]
    left: Float[np.ndarray, "d_model k"]
    right: Float[np.ndarray, "k d_model"]

    def __call__(self, x: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, "row d_model"]:
        return x - (x - self.centre) @ self.right.T @ self.left.T


def leace(x: Float[np.ndarray, "row d_model"], z: Float[np.ndarray, "row label"]) -> Eraser:
    """Least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3): of all affine maps that leave x
    without covariance with z, the one that moves x least.

    r(x) = x - W^+ P W (x - mean), W = (S_xx^(1/2))^+ and P the projection on the column space of W S_xz. No linear
    predictor of z from r(x) then beats a constant, on the rows it was fitted on; with fewer rows than d_model, other rows
    keep some.

    With X = A S V' the centred rows, W S_xz = V A' Z / sqrt(n) times what does not matter: P is V U U' V', U a basis of A' Z.
    """
    centre = x.mean(axis=0, dtype=np.float64)
    a, sizes, v = np.linalg.svd(x - centre, full_matrices=False)
    rank = int((sizes > sizes[0] * max(x.shape) * np.finfo(np.float64).eps).sum())
    inner = a[:, :rank].T @ (z - z.mean(axis=0))
    u, strength, _ = np.linalg.svd(inner, full_matrices=False)
    u = u[:, strength > 1e-10 * max(1e-300, float(np.linalg.norm(z - z.mean(axis=0))))]
    return Eraser(centre, (v[:rank].T * sizes[:rank]) @ u, (u.T / sizes[:rank]) @ v[:rank])


def erase(acts: Activations, label: str, fit: Activations | None = None) -> Activations:
    """The activations with nothing linear left in them about a label, changed as little as can be (see `leace`), layer by layer.

    label  a column of the facts: floats are taken as they are, all else as categories.
    fit    the prompts it is fitted on, at the same place; None: `acts` themselves. The guarantee is for these. Whether it
           holds for others too, `held_out_separation` of the erased sides says, with fit= on other prompts only: fitted on the same
           ones, what one half has lost the other has gained, and sides that differ look the same (AUC far below 0.5, down to 0).

    Errors: KeyError for a column that is not there; ValueError for other places, labels that are missing or all the same.
    """
    source = acts if fit is None else fit
    check_same_place(acts, source)
    labels = pd.Series(facts_column(source, label))
    if labels.isna().any() or labels.nunique() < 2:
        raise ValueError(
            f"{label!r} has {labels.nunique()} values and is missing for {int(labels.isna().sum())} prompts; two values at least, for all"
        )
    z = labels.to_numpy()[:, None] if pd.api.types.is_float_dtype(labels) else pd.get_dummies(labels).to_numpy()
    cleaned = [leace(source.layer(i).astype(np.float64), z.astype(np.float64))(acts.layer(i).astype(np.float64)) for i in acts.layers]
    values = np.stack(cleaned, axis=1).astype(np.float32)
    return replace(acts, values=values, meta={**acts.meta, "erased": [*acts.meta.get("erased", []), label]})
