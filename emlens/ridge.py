"""Ridge regression by one eigendecomposition a training set: all penalties, targets and permutations at once.

Nested cross-validation of a small table (prompts x features, more features than prompts) is dominated by refitting. Here
each distinct training set is decomposed once and serves every penalty and every target; with whole groups held out, in
the outer and the inner folds alike, the training set without groups i and j serves outer fold i and outer fold j. A
permuted target is only one more column, so a permutation test that repeats the whole choice of penalties costs a matrix
product (the way of himalaya: Dupré la Tour et al. 2022). Many targets choose their penalties in float32, with a bound on
its rounding; the few that the bound leaves in doubt choose again in float64, and predictions are always float64.

Arrays in, arrays out; nothing of emlens is imported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int
from scipy.stats import rankdata

PENALTIES: tuple[float, ...] = tuple(float(a) for a in np.logspace(0, 7, 15))
"""Default penalties, on the scale of scikit-learn's `Ridge(alpha=)` over standardised features: with hundreds of
features on tens of prompts, 1 hardly shrinks and 1e7 leaves the mean."""

SCALINGS = ("each", "block")
SAME = 1e-10
"""Predictions (in standard deviations of the target) and scores that differ by less are ties."""

_FEW = 64  # targets up to which float32 would save nothing
_KEPT = 2**28  # bytes of inner decompositions that may be kept for those in doubt; where they are larger, all is float64
_COLUMNS = 256  # targets at a time, so that errors are squared in the processor's cache

Features: TypeAlias = Callable[[Int[np.ndarray, " train"]], Float[np.ndarray, "prompt feature"]]
"""A feature block: from the rows it may learn from to the feature matrix of all rows. A plain matrix is
`fixed(matrix)`; TF-IDF fits its vocabulary on the rows it is given."""


class Fold(NamedTuple):
    """One outer fold: row numbers to train on and to predict, and the inner (train, test) pairs inside `train` that
    choose the penalty."""

    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    inner: tuple[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]], ...]


class Spectrum(NamedTuple):
    """A training set's eigenbasis. The ridge prediction at penalty a is mean(y) + cross / (eigenvalues + a) @ basis.T @
    (y - mean(y))."""

    eigenvalues: Float[np.ndarray, " k"]
    basis: Float[np.ndarray, "train k"]
    cross: Float[np.ndarray, "other k"]


class Nested(NamedTuple):
    """Out-of-fold predictions, and per outer fold and target the penalty that the inner folds chose."""

    predictions: Float[np.ndarray, "prompt target"]
    penalties: Float[np.ndarray, "fold target"]


def fixed(matrix: Float[np.ndarray, "prompt feature"]) -> Features:
    """A feature block that needs no fitting."""
    return lambda train: matrix


def scale(
    features: Float[np.ndarray, "prompt feature"], train: Int[np.ndarray, " train"], scaling: str = "each"
) -> Float[np.ndarray, "prompt feature"]:
    """Centre and scale by the training rows only.

    "each": every feature by its own standard deviation, as scikit-learn's StandardScaler (a feature that is constant in
    training keeps scale 1). "block": one number for the block, the root of the mean variance, so that features keep
    their relative weight (rare words stay light) and one grid of penalties means the same for every block.
    """
    _, mean, spread = _centred(features[train], scaling)
    return (features - mean) / spread


def _centred(
    rows: Float[np.ndarray, "train feature"], scaling: str
) -> tuple[Float[np.ndarray, "train feature"], Float[np.ndarray, " feature"], Float[np.ndarray, " spread"]]:
    """Training rows about their mean, the mean, and what to divide by (one number for "block")."""
    if scaling not in SCALINGS:
        raise ValueError(f"unknown scaling {scaling!r}; choose one of {SCALINGS}")
    mean = rows.mean(axis=0)
    rows = rows - mean
    n, eps = len(rows), np.finfo(np.float64).eps
    variance, size = np.einsum("ij,ij->j", rows, rows) / n, mean
    if scaling == "block":
        variance, size = variance.mean(keepdims=True), np.abs(mean).max(keepdims=True)
    constant = variance <= n * eps * variance + (n * size * eps) ** 2
    return rows, mean, np.sqrt(np.where(constant, 1.0, variance))


def spectrum(
    features: Float[np.ndarray, "prompt feature"],
    train: Int[np.ndarray, " train"],
    other: Int[np.ndarray, " other"],
    scaling: str = "each",
) -> Spectrum:
    """Decompose one training set: Z Z' = U diag(l) U' of the scaled training rows Z (or Z' Z, whichever is smaller),
    and carry the `other` rows into the same basis."""
    rows, mean, spread = _centred(features[train].astype(np.float64), scaling)
    z_train, z_other = rows / spread, (features[other] - mean) / spread
    wide = z_train.shape[1] >= len(train)
    eigenvalues, vectors = np.linalg.eigh(z_train @ z_train.T if wide else z_train.T @ z_train)
    kept = eigenvalues > max(z_train.shape) * np.finfo(np.float64).eps * eigenvalues.max(initial=0.0)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if wide:
        return Spectrum(eigenvalues, vectors, (z_other @ z_train.T) @ vectors)
    root = np.sqrt(eigenvalues)
    return Spectrum(eigenvalues, z_train @ vectors / root, z_other @ vectors * root)


def predict_from(
    found: Spectrum, targets: Float[np.ndarray, "train target"], penalties: Float[np.ndarray, " target"]
) -> Float[np.ndarray, "other target"]:
    """Ridge predictions of the other rows, each target at its own penalty."""
    mean = targets.mean(axis=0)
    weights = found.basis.T @ (targets - mean) / (found.eigenvalues[:, None] + penalties[None, :])
    return mean + found.cross @ weights


def nested_ridge(
    features: Features,
    targets: Float[np.ndarray, "prompt target"] | Float[np.ndarray, "fold prompt target"],
    folds: Sequence[Fold],
    penalties: Sequence[float] = PENALTIES,
    scaling: str = "each",
) -> Nested:
    """Out-of-fold ridge predictions with the penalty chosen in the inner folds, for every target separately.

    features   a feature block; see `Features`.
    targets    [prompt, target]; or [fold, prompt, target] when each outer fold has targets of its own (residuals of a
               first model, see `residuals`).
    penalties  as scikit-learn's Ridge(alpha=); the one with the least mean over inner folds of the mean squared error
               wins, the first of them when equal.

    Equal to Pipeline(StandardScaler(), Ridge(alpha)) in GridSearchCV(scoring="neg_mean_squared_error", cv=inner) on the
    same folds, target by target, to rounding. A row in no test set is predicted NaN.

    Errors: ValueError for penalties that are not positive or folds without inner folds.
    """
    grid = penalty_grid(penalties)
    if any(not fold.inner for fold in folds):
        raise ValueError("a fold has no inner folds: the penalty cannot be chosen without looking at the test rows")
    targets = np.ascontiguousarray(targets, dtype=np.float64)
    chosen = grid[_choices(features, targets, folds, grid, scaling)]
    predictions = np.full(targets.shape[-2:], np.nan)
    for f, (fold, y) in enumerate(zip(folds, _by_fold(targets, folds), strict=True)):
        found = spectrum(features(fold.train), fold.train, fold.test, scaling)
        predictions[fold.test] = predict_from(found, y[fold.train], chosen[f])
    return Nested(predictions, chosen)


def penalty_grid(penalties: Sequence[float]) -> Float[np.ndarray, " penalty"]:
    """Penalties as an array; ValueError unless they are one or more positive numbers."""
    grid = np.asarray(penalties, dtype=np.float64)
    if grid.ndim != 1 or not grid.size or not (np.isfinite(grid) & (grid > 0)).all():
        raise ValueError(f"penalties are {list(penalties)}; needed are one or more positive numbers")
    return grid


def residuals(
    features: Features,
    target: Float[np.ndarray, " prompt"] | Float[np.ndarray, "prompt target"],
    folds: Sequence[Fold],
    penalties: Sequence[float] = PENALTIES,
    scaling: str = "each",
) -> Float[np.ndarray, "fold prompt"] | Float[np.ndarray, "fold prompt target"]:
    """What a first model leaves of a target (or of each of many) for a second one to explain, per outer fold: stacking inside the folds.

    The test rows of a fold get the target minus the nested out-of-fold prediction; its training rows get the target
    minus the prediction of the inner fold that held them out, at the penalty the fold chose. So the second model learns
    from residuals of the kind it meets in the test rows, and never from a test row.
    """
    targets = target[:, None] if target.ndim == 1 else target
    first = nested_ridge(features, targets, folds, penalties, scaling)
    left = np.tile(targets - first.predictions, (len(folds), 1, 1))
    for train, uses in _training_sets(folds):
        _, found, parts = _decomposed(features, train, uses, scaling)
        for f, test, cross in parts:
            left[f, test] = targets[test] - predict_from(found._replace(cross=cross), targets[train], first.penalties[f])
    return left[..., 0] if target.ndim == 1 else left


# ---- the choice of penalties


class _Inner(NamedTuple):
    """A decomposed inner training set, and the outer folds that use it: (fold, the rows it predicts, `cross` of these)."""

    train: Int[np.ndarray, " train"]
    found: Spectrum
    uses: list[tuple[int, Int[np.ndarray, " test"], Float[np.ndarray, "test k"]]]


def _choices(
    features: Features,
    targets: Float[np.ndarray, "prompt target"] | Float[np.ndarray, "fold prompt target"],
    folds: Sequence[Fold],
    grid: Float[np.ndarray, " penalty"],
    scaling: str,
) -> Int[np.ndarray, "fold target"]:
    """Which penalty has the least mean over inner folds of the mean squared error: the choice of float64, whichever way."""
    n, n_targets = targets.shape[-2:]
    if grid.size == 1:
        return np.zeros((len(folds), n_targets), dtype=np.int64)
    sets = list(_training_sets(folds))
    inner = (_decomposed(features, train, uses, scaling) for train, uses in sets)
    if n_targets <= _FEW or 8 * n * sum(len(train) for train, _ in sets) > _KEPT:
        return np.stack([errors.argmin(axis=0) for errors, _ in _inner_errors(inner, _by_fold(targets, folds), folds, grid, np.float64)])
    kept = list(inner)
    unit = np.ldexp(targets, -np.frexp(targets.std(axis=-2, keepdims=True))[1])  # by powers of two: any unit fits float32, no digit changes
    quick = _inner_errors(kept, _by_fold(unit, folds), folds, grid, np.float32)
    chosen = np.stack([errors.argmin(axis=0) for errors, _ in quick])
    doubtful = [_in_doubt(errors, bounds, best) for (errors, bounds), best in zip(quick, chosen, strict=True)]
    again = [y[:, columns] for y, columns in zip(_by_fold(targets, folds), doubtful, strict=True)]
    for best, columns, (errors, _) in zip(chosen, doubtful, _inner_errors(kept, again, folds, grid, np.float64), strict=True):
        best[columns] = errors.argmin(axis=0)
    return chosen


def _in_doubt(
    errors: Float[np.ndarray, "penalty target"], bounds: Float[np.ndarray, "penalty target"], best: Int[np.ndarray, " target"]
) -> Int[np.ndarray, " column"]:
    """Targets whose least error, with what it may be off by, does not lie below all others."""
    highest = np.take_along_axis(errors + bounds, best[None], axis=0)[0]
    lowest = errors - bounds
    np.put_along_axis(lowest, best[None], np.inf, axis=0)
    return np.flatnonzero(~(highest < lowest.min(axis=0)))


def _inner_errors(
    inner: Iterable[_Inner],
    of_fold: Sequence[Float[np.ndarray, "prompt target"]],
    folds: Sequence[Fold],
    grid: Float[np.ndarray, " penalty"],
    dtype: type[np.floating],
) -> list[tuple[Float[np.ndarray, "penalty target"], Float[np.ndarray, "penalty target"]]]:
    """Mean over a fold's inner folds of the mean squared error, and how far rounding to `dtype` may have moved it.

    With unit roundoff u, an error e = r - h p of k products, summed in any order, is off by at most (k + 5) u |h| |p| + 3 u |r|
    (Higham 2002, section 3.1). Over the rows of all inner folds, weighted w, the squared distance is at most
    D = 2 sum w ((k + 5)^2 u^2 ||H||^2 ||p||^2 + 9 u^2 ||r||^2), and the error E off by 2 sqrt(E D) + D + (rows + 5) u E.
    Projections are made in float64, whose rounding does not count beside float32's.
    """
    u = np.finfo(dtype).eps / 2
    errors = [np.zeros((grid.size, y.shape[1])) for y in of_fold]
    bounds = [np.zeros((grid.size, y.shape[1])) for y in of_fold]
    for train, (eigenvalues, basis, _), uses in inner:
        shrunk = 1 / (eigenvalues + grid[:, None])
        last: Float[np.ndarray, "prompt target"] | None = None
        for f, test, cross in uses:
            y, weight = of_fold[f], 1 / (len(test) * len(folds[f].inner))
            if last is not y:
                last, mean = y, y[train].mean(axis=0)
                projected = basis.T @ (y[train] - mean)
                sizes = np.einsum("kj,kj->j", projected, projected)
                projected = projected.astype(dtype)
            rest = y[test] - mean
            squares = shrunk**2 @ np.einsum("tk,tk->k", cross, cross)
            bounds[f] += 2 * weight * u**2 * ((len(eigenvalues) + 5) ** 2 * squares[:, None] * sizes + 9 * np.einsum("tj,tj->j", rest, rest))
            hat = rearrange(cross.astype(dtype) * shrunk.astype(dtype)[:, None], "penalty test k -> (penalty test) k")
            rest = rest.astype(dtype)
            for start in range(0, y.shape[1], _COLUMNS):
                some = slice(start, start + _COLUMNS)
                error = rearrange(hat @ projected[:, some], "(penalty test) target -> penalty test target", penalty=grid.size)
                error -= rest[:, some]
                errors[f][:, some] += weight * np.einsum("ptj,ptj->pj", error, error)
    longest = max(len(test) for fold in folds for _, test in fold.inner)
    return [(e, 2 * np.sqrt(e * d) + d + (longest + 5) * u * e) for e, d in zip(errors, bounds, strict=True)]


def _decomposed(features: Features, train: Int[np.ndarray, " train"], uses: list[tuple[int, Int[np.ndarray, " test"]]], scaling: str) -> _Inner:
    found = spectrum(features(train), train, np.concatenate([test for _, test in uses]), scaling)
    crosses = np.split(found.cross, np.cumsum([len(test) for _, test in uses])[:-1])
    return _Inner(train, found, [(f, test, cross) for (f, test), cross in zip(uses, crosses, strict=True)])


def _by_fold(
    targets: Float[np.ndarray, "prompt target"] | Float[np.ndarray, "fold prompt target"], folds: Sequence[Fold]
) -> list[Float[np.ndarray, "prompt target"]]:
    return list(targets) if targets.ndim == 3 else [targets] * len(folds)


def _training_sets(
    folds: Sequence[Fold],
) -> Iterator[tuple[Int[np.ndarray, " train"], list[tuple[int, Int[np.ndarray, " test"]]]]]:
    """The distinct inner training sets, each with the outer folds that use it and the rows it predicts for them."""
    sets: dict[bytes, list[tuple[int, Int[np.ndarray, " test"]]]] = {}
    for f, fold in enumerate(folds):
        for train, test in fold.inner:
            sets.setdefault(np.sort(train).astype(np.int64).tobytes(), []).append((f, test))
    for key, uses in sets.items():
        yield np.frombuffer(key, dtype=np.int64), uses


# ---- scores: targets and out-of-fold predictions, column by column


def r2(y: Float[np.ndarray, "prompt target"], predictions: Float[np.ndarray, "prompt target"]) -> Float[np.ndarray, " target"]:
    """Pooled out-of-fold R2: 1 - sum (y - yhat)^2 / sum (y - mean y)^2, about the overall mean; NaN for constant y."""
    total = np.square(y - y.mean(axis=0)).sum(axis=0)
    varies = total > len(y) * (1e-12 * np.abs(y).max(axis=0)) ** 2
    error = np.square(y - predictions).sum(axis=0)
    return 1 - np.divide(error, total, out=np.full(len(total), np.nan), where=varies)


def rmse(y: Float[np.ndarray, "prompt target"], predictions: Float[np.ndarray, "prompt target"]) -> Float[np.ndarray, " target"]:
    """Root of the pooled mean squared out-of-fold error, in the target's unit."""
    return np.sqrt(np.square(y - predictions).mean(axis=0))


def spearman(y: Float[np.ndarray, "prompt target"], predictions: Float[np.ndarray, "prompt target"]) -> Float[np.ndarray, " target"]:
    """Rank correlation of targets and out-of-fold predictions; 0 for predictions that order nothing, NaN for constant y.

    Pooled under leave-one-group-out, a prediction that is but the mean of the other groups correlates *negatively* with
    the target; permuted targets carry the same bias.
    """
    spread = y.std(axis=0)
    steps = np.where(spread > 0, spread, 1.0) * SAME
    a, b = rankdata(y, axis=0), rankdata(np.round((predictions - y.mean(axis=0)) / steps), axis=0)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    rho = np.divide((a * b).sum(axis=0), size, out=np.zeros(len(size)), where=size > 0)
    return np.where((a * a).sum(axis=0) > 0, rho, np.nan)


def per_group(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    y: Float[np.ndarray, "prompt target"],
    predictions: Float[np.ndarray, "prompt target"],
    codes: Int[np.ndarray, " prompt"] | None,
) -> Float[np.ndarray, "group target"]:
    """A score inside each group (codes 0..G-1; None: all prompts are one); NaN where the group's target does not vary."""
    members = np.zeros(len(y), dtype=np.int64) if codes is None else codes
    return np.stack([measure(y[members == g], predictions[members == g]) for g in range(int(members.max()) + 1)])
