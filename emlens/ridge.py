"""Ridge regression by one eigendecomposition a training set: all penalties, targets and permutations at once.

Nested cross-validation of a small table (prompts x features, more features than prompts) is dominated by refitting. Here
each distinct training set is decomposed once and serves every penalty and every target; with whole groups held out, in
the outer and the inner folds alike, the training set without groups i and j serves outer fold i and outer fold j. A
permuted target is only one more column, so a permutation test that repeats the whole choice of penalties costs a matrix
product (the way of himalaya: Dupré la Tour et al. 2022).

Arrays in, arrays out; nothing of emlens is imported.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float, Int
from scipy.stats import rankdata

PENALTIES: tuple[float, ...] = tuple(float(a) for a in np.logspace(0, 7, 15))
"""Default penalties, on the scale of scikit-learn's `Ridge(alpha=)` over standardised features: with hundreds of
features on tens of prompts, 1 hardly shrinks and 1e7 leaves the mean."""

SCALINGS = ("each", "block")
SAME = 1e-10
"""Predictions (in standard deviations of the target) and scores that differ by less are ties."""

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
    if scaling not in SCALINGS:
        raise ValueError(f"unknown scaling {scaling!r}; choose one of {SCALINGS}")
    mean = features[train].mean(axis=0)
    centred = features - mean
    variance = np.square(centred[train]).mean(axis=0)
    if scaling == "block":
        variance = variance.mean(keepdims=True)
        mean = np.abs(mean).max(keepdims=True)
    eps, n = np.finfo(np.float64).eps, len(train)
    constant = variance <= n * eps * variance + (n * mean * eps) ** 2
    return centred / np.sqrt(np.where(constant, 1.0, variance))


def spectrum(
    features: Float[np.ndarray, "prompt feature"],
    train: Int[np.ndarray, " train"],
    other: Int[np.ndarray, " other"],
    scaling: str = "each",
) -> Spectrum:
    """Decompose one training set: Z Z' = U diag(l) U' of the scaled training rows Z (or Z' Z, whichever is smaller),
    and carry the `other` rows into the same basis."""
    z = scale(np.asarray(features, dtype=np.float64), train, scaling)
    z_train, z_other = z[train], z[other]
    wide = z.shape[1] >= len(train)
    eigenvalues, vectors = np.linalg.eigh(z_train @ z_train.T if wide else z_train.T @ z_train)
    kept = eigenvalues > max(z_train.shape) * np.finfo(np.float64).eps * eigenvalues.max(initial=0.0)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if wide:
        return Spectrum(eigenvalues, vectors, z_other @ (z_train.T @ vectors))
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
    grid = np.asarray(penalties, dtype=np.float64)
    if grid.ndim != 1 or not grid.size or not (np.isfinite(grid) & (grid > 0)).all():
        raise ValueError(f"penalties are {list(penalties)}; needed are one or more positive numbers")
    if any(not fold.inner for fold in folds):
        raise ValueError("a fold has no inner folds: the penalty cannot be chosen without looking at the test rows")
    shared = targets.ndim == 2
    of_fold = [targets if shared else targets[f] for f in range(len(folds))]
    n, n_targets = targets.shape[-2:]
    errors = np.zeros((len(folds), grid.size, n_targets))
    for train, uses in _training_sets(folds):
        found = spectrum(features(train), train, np.concatenate([test for _, test in uses]), scaling)
        stops = np.cumsum([len(test) for _, test in uses])
        crosses = np.split(found.cross, stops[:-1])
        projected: Float[np.ndarray, "k target"] | None = None
        for (f, test), cross in zip(uses, crosses, strict=True):
            y = of_fold[f]
            mean = y[train].mean(axis=0)
            if projected is None or not shared:
                projected = found.basis.T @ (y[train] - mean)
            rest = y[test] - mean
            for a, penalty in enumerate(grid):
                error = rest - (cross / (found.eigenvalues + penalty)) @ projected
                errors[f, a] += np.einsum("ij,ij->j", error, error) / (len(test) * len(folds[f].inner))
    chosen = grid[errors.argmin(axis=1)]
    predictions = np.full((n, n_targets), np.nan)
    for f, fold in enumerate(folds):
        found = spectrum(features(fold.train), fold.train, fold.test, scaling)
        predictions[fold.test] = predict_from(found, of_fold[f][fold.train], chosen[f])
    return Nested(predictions, chosen)


def residuals(
    features: Features,
    target: Float[np.ndarray, " prompt"],
    folds: Sequence[Fold],
    penalties: Sequence[float] = PENALTIES,
    scaling: str = "each",
) -> Float[np.ndarray, "fold prompt"]:
    """What a first model leaves for a second one to explain, per outer fold: stacking inside the folds.

    The test rows of a fold get the target minus the nested out-of-fold prediction; its training rows get the target
    minus the prediction of the inner fold that held them out, at the penalty the fold chose. So the second model learns
    from residuals of the kind it meets in the test rows, and never from a test row.
    """
    first = nested_ridge(features, target[:, None], folds, penalties, scaling)
    left = np.tile(target - first.predictions[:, 0], (len(folds), 1))
    for train, uses in _training_sets(folds):
        block = features(train)
        for f, test in uses:
            found = spectrum(block, train, test, scaling)
            left[f, test] = target[test] - predict_from(found, target[train, None], first.penalties[f])[:, 0]
    return left


def stacked_gain(
    features: Features,
    left: Float[np.ndarray, "fold prompt"],
    orders: Int[np.ndarray, "draws prompt"],
    y: Float[np.ndarray, " prompt"],
    folds: Sequence[Fold],
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " prompt"]]:
    """Delta R2 of a second ridge on what a first model leaves, and the fall of each prompt's squared error at the first
    of `orders`.

    left    from `ridge.residuals`: stacking inside the folds.
    orders  row orders that keep every fold's test rows among themselves (within held-out groups); the residual, with
            the target and the text it belongs to, changes place against the activation rows (Freedman and Lane 1983, on
            residuals out of fold). The first is the identity for the observed gain.
    """
    moved = rearrange(left[:, orders], "fold draws prompt -> fold prompt draws")
    second = nested_ridge(features, moved, folds, penalties).predictions
    fall = np.empty_like(second)
    for f, fold in enumerate(folds):
        before = moved[f, fold.test]
        fall[fold.test] = before**2 - (before - second[fold.test]) ** 2
    return reduce(fall, "prompt draws -> draws", "sum") / np.square(y - y.mean()).sum(), fall[:, 0]


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


def group_blocks(codes: Int[np.ndarray, " prompt"], n: int, n_draws: int, seed: int) -> Int[np.ndarray, "draws prompt"]:
    """Whole groups change places among groups of equal size, rows inside in their order of appearance.

    All arrangements but the identity, when they are at most `n_draws` or 6! = 720 (with the observed one counted in, p
    is then exact: 1/G! at least); else `n_draws` random ones. ValueError when no two groups are of one size.
    """
    members = [np.flatnonzero(codes == g) for g in range(int(codes.max()) + 1)]
    sizes = np.array([len(m) for m in members])
    classes = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    arrangements = math.prod(math.factorial(len(c)) for c in classes)
    if arrangements == 1:
        raise ValueError(
            f"no two of the {len(members)} groups are of one size ({sizes.tolist()}), so whole groups cannot change "
            "places: use nulls=('within_groups',), or drop prompts until groups are equal"
        )
    if arrangements - 1 <= max(n_draws, math.factorial(6)):
        every = itertools.product(*(itertools.permutations(c) for c in classes))
        moves = [np.concatenate(move) for move in every][1:]
    else:
        rng = np.random.default_rng(seed)
        moves = [np.concatenate([rng.permutation(c) for c in classes]) for _ in range(n_draws)]
    orders = np.tile(np.arange(n), (len(moves), 1))
    for order, move in zip(orders, moves, strict=True):
        for old, new in zip(np.concatenate(classes), move, strict=True):
            order[members[old]] = members[new]
    return orders


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
