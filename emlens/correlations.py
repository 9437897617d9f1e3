"""Correlations beside one another: given covariates, against a rival, and over several settings. Plain arrays.

`emlens.stats.correlation` is the correlation itself. Here: what is left of it when prompt length and topic are taken out, whether
a simpler measure correlates as well, and what several settings say together without being pooled.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as scipy_stats

from . import stats
from .resampling import bootstrap_weights, expanded_interval, refuse_not_finite
from .stats import Labels, Vector


def design(covariates: pd.DataFrame) -> Float[np.ndarray, "n column"]:
    """Covariates as columns of numbers, centred: numbers as they are, anything else as one indicator per value but the first."""
    columns = []
    for name in covariates.columns:
        values = covariates[name]
        if values.isna().any():
            raise ValueError(f"{int(values.isna().sum())} of {len(values)} rows have no {name!r}: fill or drop them first")
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            columns.append(values.to_numpy(dtype=np.float64)[:, None])
        else:
            columns.append(pd.get_dummies(values.astype(str), drop_first=True).to_numpy(dtype=np.float64))
    joined = np.concatenate(columns, axis=1) if columns else np.empty((len(covariates), 0))
    return joined - joined.mean(axis=0)


def partial_correlation(
    x: Vector,
    y: Vector,
    covariates: pd.DataFrame,
    clusters: Labels | None = None,
    n_permutations: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    n_boot: int = 2000,
    within: Labels | None = None,
) -> dict[str, Any]:
    """Correlation of x and y over rows with covariates taken out of both linearly: r, low, high, p, null_low, null_high, n,
    n_clusters, n_covariates.

    covariates  a frame of as many rows; numbers (prompt length) enter as they are, labels (category) as indicators.
    p           two-sided, residuals of y permuted and the covariates taken out of them anew (Freedman and Lane 1983): what the
                covariates explain stays as it is. Rows are taken as independent but for the covariates: where they come in groups
                (topics) that differ in level, give `within` [n] (residuals then change places inside their group only) and the groups
                among the covariates too, so that r itself is of what lies inside them. At a true r of 0, 8 groups of 12 rows (half of the
                variance between groups, length taken out) p <= .05 in 0.29 to 0.32 of cases without `within`, in 0.03 with it.
    low/high    bootstrap over rows, or whole clusters, covariates taken out in every resample.
    NaN when the covariates leave nothing of x or y.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not a.shape == b.shape == (len(covariates),):
        raise ValueError(f"x has shape {a.shape}, y {b.shape}, covariates {len(covariates)} rows: one value each per row is needed")
    refuse_not_finite(a + b)
    z = design(covariates)
    axes = _axes(z)
    n, n_covariates = len(a), axes.shape[1] - 1
    n_clusters = n if clusters is None else len(pd.unique(np.asarray(clusters)))
    left, right = a - axes @ (axes.T @ a), b - axes @ (axes.T @ b)
    counts = {"n": n, "n_clusters": n_clusters, "n_covariates": n_covariates}
    if n - n_covariates < 3 or _nothing(left, a) or _nothing(right, b):
        return dict.fromkeys(("r", "low", "high", "p", "null_low", "null_high"), np.nan) | counts
    r = float(left @ right / np.sqrt((left @ left) * (right @ right)))
    shuffled = right[stats.permutations(n, n_permutations, seed, within)]
    shuffled -= (shuffled @ axes) @ axes.T
    null = shuffled @ left / (np.linalg.norm(shuffled, axis=1) * np.linalg.norm(left))
    low, high = stats.bootstrap_interval(np.column_stack([a, b, z]), _partial_r, clusters, level, n_boot, seed)
    null_low, null_high = stats.null_band(null, level)
    p = stats.permutation_p(r, null, "two-sided")
    return {"r": r, "low": low, "high": high, "p": p, "null_low": null_low, "null_high": null_high} | counts


def williams(r_first: float, r_second: float, r_between: float, n: int) -> tuple[float, float]:
    """Williams' test that two measures correlate equally with a third over the same n rows: (t, p), n - 3 degrees of freedom,
    two-sided (Williams 1959; recommended by Steiger 1980, equation 7).

    r_first, r_second: of each with the third; r_between: of the two with each other. Rows are taken as independent and normal.
    NaN for fewer than four rows or two measures that are one.
    """
    determinant = 1 - r_first**2 - r_second**2 - r_between**2 + 2 * r_first * r_second * r_between
    spread = 2 * (n - 1) / (n - 3) * determinant + ((r_first + r_second) / 2) ** 2 * (1 - r_between) ** 3 if n > 3 else 0.0
    if not spread > 1e-12:
        return np.nan, np.nan
    t = (r_first - r_second) * np.sqrt((n - 1) * (1 + r_between) / spread)
    return float(t), float(2 * scipy_stats.t.sf(abs(t), n - 3))


def correlation_contrast(
    first: Vector, second: Vector, y: Vector, clusters: Labels | None = None, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Does one measure correlate with y more than another over the same rows? difference of the correlations, low, high
    (bootstrap of rows or whole clusters, all three together), t, p, n, n_clusters.

    p   two-sided: `williams` over independent rows. With `clusters` that test would reject far too often (in 0.29 of cases at .05 with 8
        clusters of 12 rows and half of the variance between them): p is then 1 less the largest level at which the bootstrap interval over
        clusters leaves out 0, and t is NaN. It cannot fall below what the number of clusters and of samples allows (0.018 for 8 and 2000).
    """
    columns = [np.asarray(each, dtype=np.float64) for each in (first, second, y)]
    if len({len(each) for each in columns}) != 1:
        raise ValueError(f"the measures have {[len(each) for each in columns]} rows: the same rows are needed")
    data = np.column_stack(columns)
    refuse_not_finite(data)
    n = len(data)
    n_clusters = n if clusters is None else len(pd.unique(np.asarray(clusters)))
    if n < 4 or any(_nothing(each - each.mean(), each) for each in columns):
        return dict.fromkeys(("difference", "low", "high", "t", "p"), np.nan) | {"n": n, "n_clusters": n_clusters}
    r: Float[np.ndarray, "three three"] = np.array(np.corrcoef(data, rowvar=False))
    standard = (data - data.mean(axis=0)) / data.std(axis=0)
    draws = np.concatenate([_differences(standard, weights) for weights in bootstrap_weights(n, n_boot, seed, clusters)])
    low, high = expanded_interval(draws, n_clusters, level)
    t, p = williams(r[0, 2], r[1, 2], r[0, 1], n) if clusters is None else (np.nan, _bootstrap_p(draws, n_clusters))
    return {"difference": float(r[0, 2] - r[1, 2]), "low": low, "high": high, "t": t, "p": p, "n": n, "n_clusters": n_clusters}


ENUMERATED = 7
"""Up to so many rows, all n! orders are gone through."""


def few_rows_correlation(
    x: Vector, y: Vector, method: str = "pearson", n_permutations: int = 5000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Correlation over few rows (runs, say), each of which counts: r, low, high, p, null_low, null_high, without_one_low,
    without_one_high, exact, p_floor, n.

    p           two-sided, of |r|, by permuting y against x: all n! orders for up to seven rows (exact), else drawn, with the +1 rule.
                p_floor: the least p there can be; four rows that agree in rank give no less than 2 / 24.
    low/high    Fisher's z, with Bonett and Wright's (2000) variance (1 + r^2 / 2) / (n - 3) for ranks; rows taken as independent and
                normal. A bootstrap of so few rows would mostly draw one of them twice.
    without_one the lowest and the highest r when any one row is left out: how much hangs on a single one.
    Errors: ValueError for fewer than four rows. A constant x or y gives NaN.
    """
    if method not in ("pearson", "spearman"):
        raise ValueError(f"unknown method {method!r}; choose 'pearson' or 'spearman'")
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(a)
    if a.shape != b.shape or a.ndim != 1 or n < 4:
        raise ValueError(
            f"x has shape {a.shape}, y {b.shape}: four rows at least are needed, the same on both sides. With three, a correlation of 1 comes "
            "by chance in one of three orders and has no interval; show the points instead"
        )
    refuse_not_finite(a + b)
    r = float(_of_standardised(a, b[None], method)[0])
    names = ("r", "low", "high", "p", "null_low", "null_high", "without_one_low", "without_one_high", "p_floor")
    if math.isnan(r):
        return dict.fromkeys(names, np.nan) | {"exact": n <= ENUMERATED, "n": n}
    if n <= ENUMERATED:
        null = _of_standardised(a, b[np.array(list(itertools.permutations(range(n))))], method)
        p, floor = float((np.abs(null) >= abs(r) - 1e-9).mean()), float((np.abs(null) >= np.abs(null).max() - 1e-9).mean())
    else:
        null = _of_standardised(a, b[stats.permutations(n, n_permutations, seed)], method)
        p, floor = stats.permutation_p(abs(r), np.abs(null), "greater"), 1 / (n_permutations + 1)
    spread = (1 + r**2 / 2 if method == "spearman" else 1.0) / (n - 3)
    reach = float(scipy_stats.norm.ppf((1 + level) / 2)) * math.sqrt(spread)
    ends = (math.tanh(math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)) + sign * reach) for sign in (-1, 1))
    without = [float(_of_standardised(np.delete(a, i), np.delete(b, i)[None], method)[0]) for i in range(n)]
    some = [each for each in without if not math.isnan(each)] or [np.nan]
    values = (r, *ends, p, *stats.null_band(null, level), min(some), max(some), floor)
    return dict(zip(names, values, strict=True)) | {"exact": n <= ENUMERATED, "n": n}


def random_effects(r: Vector, variance: Vector, level: float = 0.95) -> dict[str, float]:
    """Correlations of several settings, summarised with room for settings to differ: DerSimonian and Laird (1986) on Fisher's z,
    with the test and interval of Hartung and Knapp (2001).

    variance    of every arctanh(r): 1 / (n - 3) for n independent rows.
    Returns     r (of the mean setting), low, high, p (of mean 0: Student's t of n - 1 degrees of freedom on the spread of the settings about
                their mean, never taken smaller than DerSimonian and Laird's error), tau2 (variance of z between settings), cochran_q, cochran_p (that
                there is none), i2 (share of the spread that is between settings), predicted_low, predicted_high (where a new setting's
                true r is to be expected: t of n - 2 degrees of freedom, Higgins, Thompson and Spiegelhalter 2009, on Hartung and Knapp's
                error, Partlett and Riley 2017; NaN for fewer than three settings), n (settings).

    Normal quantiles on DerSimonian and Laird's error reject a true mean of 0 over three settings that differ in 0.17 to 0.20 of cases at .05,
    these in 0.05 (IntHout, Ioannidis and Borm 2014 recommend them for few studies). Settings of one model or one set of questions are not
    independent; then the interval is still too narrow. Errors: ValueError for fewer than two settings, or r at 1.
    """
    values, spread = np.asarray(r, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    if values.shape != spread.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(f"r has shape {values.shape}, variance {spread.shape}: one of each per setting, and two settings at least, are needed")
    if not (np.abs(values) < 1).all() or not (spread > 0).all():
        raise ValueError(f"correlations lie inside (-1, 1) and variances above 0; got r {values.tolist()}, variances {spread.tolist()}")
    z, weights, n = np.arctanh(values), 1 / spread, len(values)
    fixed = weights @ z / weights.sum()
    q = float(weights @ (z - fixed) ** 2)
    tau2 = max(0.0, (q - (n - 1)) / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (spread + tau2)
    mean = weights @ z / weights.sum()
    error = np.sqrt(max(1.0, weights @ (z - mean) ** 2 / (n - 1)) / weights.sum())
    reach = scipy_stats.t.ppf((1 + level) / 2, n - 1) * error
    beyond = scipy_stats.t.ppf((1 + level) / 2, n - 2) * np.sqrt(tau2 + error**2) if n > 2 else np.nan
    return {
        "r": float(np.tanh(mean)),
        "low": float(np.tanh(mean - reach)),
        "high": float(np.tanh(mean + reach)),
        "p": float(2 * scipy_stats.t.sf(abs(mean) / error, n - 1)),
        "tau2": float(tau2),
        "cochran_q": q,
        "cochran_p": float(scipy_stats.chi2.sf(q, n - 1)),
        "i2": max(0.0, 1 - (n - 1) / q) if q > 0 else 0.0,
        "predicted_low": float(np.tanh(mean - beyond)),
        "predicted_high": float(np.tanh(mean + beyond)),
        "n": n,
    }


def fisher_variance(n: Sequence[int] | np.ndarray, n_covariates: Sequence[int] | np.ndarray | int = 0) -> Float[np.ndarray, " setting"]:
    """Variance of arctanh(r) over n independent normal rows, n_covariates taken out: 1 / (n - n_covariates - 3)."""
    left = np.asarray(n, dtype=np.float64) - np.asarray(n_covariates) - 3
    if (left <= 0).any():
        raise ValueError(f"settings of {np.asarray(n).tolist()} rows: more than three (and the covariates) are needed")
    return 1 / left


# ---- inside


def _axes(z: Float[np.ndarray, "n column"]) -> Float[np.ndarray, "n axis"]:
    """An orthonormal basis of the columns and a constant; columns that say nothing new are left out."""
    joined = np.column_stack([np.ones(len(z)), z / np.maximum(np.linalg.norm(z, axis=0), 1e-300)])
    vectors, values, _ = np.linalg.svd(joined, full_matrices=False)
    return vectors[:, values > 1e-10 * values[0]]


def _of_standardised(x: Float[np.ndarray, " n"], y: Float[np.ndarray, "order n"], method: str) -> Float[np.ndarray, " order"]:
    """r of x with every row of y; NaN where one of them is constant."""
    if method == "spearman":
        x, y = scipy_stats.rankdata(x), scipy_stats.rankdata(y, axis=1)
    left, right = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    if _nothing(left, x) or _nothing(right[0], y[0]):
        return np.full(len(y), np.nan)
    return np.clip(right @ left / (np.linalg.norm(right, axis=1) * np.linalg.norm(left)), -1, 1)


def _nothing(left: Float[np.ndarray, " n"], whole: Float[np.ndarray, " n"]) -> bool:
    """Whether what is left of a vector is rounding."""
    return bool(np.linalg.norm(left) <= 1e-10 * np.linalg.norm(whole))


def _partial_r(rows: Float[np.ndarray, "n column"]) -> float:
    """Partial correlation of the first two columns given the others; NaN when they leave nothing. By the normal equations: over
    many rows and covariates five times as fast as an orthonormal basis, and the same unless covariates all but determine one another."""
    pair, z = rows[:, :2] - rows[:, :2].mean(axis=0), rows[:, 2:] - rows[:, 2:].mean(axis=0)
    z = z / np.maximum(np.linalg.norm(z, axis=0), 1e-300)
    values, vectors = np.linalg.eigh(z.T @ z)
    strong = values > 1e-12 * max(1.0, values[-1]) if len(values) else np.zeros(0, dtype=bool)
    inside = vectors[:, strong].T @ (z.T @ pair) / np.sqrt(values[strong])[:, None]
    whole = pair.T @ pair
    left = whole - inside.T @ inside
    if len(rows) - strong.sum() < 3 or (np.diag(left) <= 1e-12 * np.diag(whole)).any():
        return np.nan
    return float(np.clip(left[0, 1] / np.sqrt(left[0, 0] * left[1, 1]), -1, 1))


def _differences(rows: Float[np.ndarray, "n three"], weights: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
    """r of the first column with the third, less that of the second, in samples that hold row i `weights[draw, i]` times; NaN where a
    column of the sample is constant."""
    total = weights.sum(axis=1)
    mean, square = weights @ rows / total[:, None], weights @ rows**2 / total[:, None]
    product = weights @ (rows[:, :2] * rows[:, 2:]) / total[:, None]
    spread = square - mean**2
    scale = np.sqrt(np.where(spread > 1e-10, spread, np.nan))
    r = (product - mean[:, :2] * mean[:, 2:]) / (scale[:, :2] * scale[:, 2:])
    return r[:, 0] - r[:, 1]


def _bootstrap_p(draws: Float[np.ndarray, " draws"], n_units: int) -> float:
    """Two-sided p of 0 among bootstrap draws: 1 less the largest level at which `resampling.expanded_interval` leaves 0 out (+1 rule)."""
    known = draws[~np.isnan(draws)]
    if n_units < 2 or not len(known):
        return np.nan
    beyond = min((known <= 0).sum(), (known >= 0).sum()) + 1
    area = scipy_stats.norm.ppf(min(0.5, beyond / (len(known) + 1)))
    return float(2 * scipy_stats.t.cdf(area * np.sqrt((n_units - 1) / n_units), n_units - 1))
