"""Intervals, permutation tests, corrections and the one shape every estimate leaves the house in (a *Result*).

Small samples of prompts are the rule here, prompts come in categories, and layers are many. So: resample whole
clusters, permute what the hypothesis says may be permuted, count the observed arrangement among the permuted ones (p is
never 0), and correct over the family that is shown.

Everything takes plain arrays; of emlens only `resampling` is imported (which rows are drawn), and handed on: this is
the room that others import. Every random function takes `seed` and gives the same numbers for the same seed.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Real
from scipy import stats as scipy_stats

from .resampling import Labels, bootstrap_interval, bootstrap_weights, chunks, codes_of, expanded_interval, permutations, refuse_not_finite

__all__ = [
    "COLUMNS",
    "Labels",
    "Result",
    "Vector",
    "adjust",
    "bootstrap_interval",
    "bootstrap_weights",
    "correlation",
    "expanded_interval",
    "max_statistic_p",
    "null_band",
    "paired",
    "permutation_p",
    "permutations",
    "result",
]

Result: TypeAlias = pd.DataFrame
"""A tidy table: key columns, then `COLUMNS`, one row per key x metric x null; `.attrs` says how it was made."""
Vector: TypeAlias = Real[np.ndarray, " n"] | Sequence[float | int] | pd.Series

COLUMNS = ("metric", "estimate", "low", "high", "null", "null_low", "null_high", "p", "q", "n")
_NUMBERS = ("estimate", "low", "high", "null_low", "null_high", "p", "q")
_ADJUSTMENTS = ("bh", "holm", "bonferroni", "none")
_GIVEN = ("given", "max-statistic")
_TAILS = ("greater", "less", "two-sided")


def result(
    rows: Sequence[dict[str, Any]] | pd.DataFrame,
    keys: Sequence[str],
    *,
    what: str,
    correction: str = "bh",
    family: Sequence[str] | None = None,
    **attrs: Any,
) -> Result:
    """Build a Result: fill what is missing, order the columns, correct p into q, and note how.

    rows        one dict (or frame row) per key x metric x null; `metric` and `estimate` are needed, the rest becomes
                NaN or "" when absent. Columns that are neither keys nor of the Result stay at the end. Giving Results
                that were stacked with `pd.concat` corrects them anew, over all of them.
    correction  "bh" (Benjamini-Hochberg), "holm", "bonferroni" or "none" (then q = p); "given" or "max-statistic" keep
                the column q that the rows bring.
    family      columns within whose groups the correction is done, for example ["metric", "null"]; None: over all rows.
                Rows without p do not count.
    attrs       kept in `.attrs` beside what, correction and family (seed=, interval=, null={name: hypothesis,
                generator, tail}); must be JSON-serialisable.

    Errors: ValueError for an unknown correction, missing columns, or two rows of the same key, metric and null;
    TypeError for attrs JSON cannot hold.
    """
    frame = pd.DataFrame(rows).reset_index(drop=True)
    missing = [name for name in (*keys, "metric", "estimate") if name not in frame.columns]
    if missing:
        raise ValueError(f"a Result needs the columns {missing}; the rows bring {list(frame.columns)}: add them to every row")
    for name in COLUMNS:
        if name not in frame.columns:
            frame[name] = "" if name == "null" else np.nan
    for name in _NUMBERS:
        frame[name] = frame[name].astype(np.float64)
    frame["null"] = frame["null"].fillna("").astype(str)
    if frame["n"].notna().all():
        frame["n"] = frame["n"].astype(np.int64)
    identity = [*keys, "metric", "null"]
    twice = frame.duplicated(identity)
    if twice.any():
        first = frame.loc[twice, identity].iloc[0].to_dict()
        raise ValueError(f"two rows share {first}: a Result has one row per key, metric and null; add the column that tells them apart to `keys`")
    within = list(family) if family is not None else []
    unknown = [name for name in within if name not in frame.columns]
    if unknown:
        raise ValueError(f"family names the columns {unknown}, which are not there; choose among {identity}")
    if correction in _ADJUSTMENTS:
        groups = frame.groupby(within, sort=False, dropna=False).indices.values() if within else [np.arange(len(frame))]
        for rows_of_family in groups:
            frame.loc[rows_of_family, "q"] = adjust(frame.loc[rows_of_family, "p"], correction)
    elif correction in _GIVEN:
        absent = frame["p"].notna() & frame["q"].isna()
        if absent.any():
            raise ValueError(
                f"correction={correction!r} keeps the q of the rows, but {int(absent.sum())} rows have p and no q: give q or let it be computed"
            )
    else:
        raise ValueError(f"unknown correction {correction!r}; choose one of {_ADJUSTMENTS + _GIVEN}")
    others = [name for name in frame.columns if name not in (*keys, *COLUMNS)]
    frame = frame[[*keys, *COLUMNS, *others]].copy()
    shown = f"within {', '.join(within)}" if within else "all rows"
    told: dict[Any, Any] = {"what": what, "correction": correction, "family": shown, **attrs}
    try:
        json.dumps(told)
    except TypeError as error:
        raise TypeError(
            f"the attrs of a Result are written to disk as JSON and one is not JSON-serialisable ({error}): turn it into numbers, text or lists"
        ) from error
    frame.attrs = told
    return frame


def adjust(p: Vector, method: str = "bh") -> Float[np.ndarray, " n"]:
    """Correct p-values for their number; NaN stays NaN and does not count.

    "bh": Benjamini and Hochberg 1995 (false discovery rate); "holm": Holm 1979 and "bonferroni": family-wise error;
    "none": unchanged.
    """
    values = np.asarray(p, dtype=np.float64)
    known = ~np.isnan(values)
    some = values[known]
    if ((some < 0) | (some > 1)).any():
        raise ValueError(f"p-values lie in [0, 1]; got {some.min():.3g} to {some.max():.3g}")
    if method == "bh":
        corrected = scipy_stats.false_discovery_control(some) if some.size else some
    elif method == "holm":
        order = np.argsort(some, kind="stable")
        corrected = np.empty_like(some)
        corrected[order] = np.minimum(1.0, np.maximum.accumulate((some.size - np.arange(some.size)) * some[order]))
    elif method == "bonferroni":
        corrected = np.minimum(1.0, some * some.size)
    elif method == "none":
        corrected = some
    else:
        raise ValueError(f"unknown correction {method!r}; choose one of {_ADJUSTMENTS}")
    out = np.full_like(values, np.nan)
    out[known] = corrected
    return out


def permutation_p(observed: Any, null: Real[np.ndarray, " draws *m"], tail: str = "greater") -> Any:
    """p of an observed statistic among `draws` of it under the null, the observed one counted in: (b + 1) / (draws + 1)
    (Phipson and Smyth 2010).

    observed: a number, or an array [*m] tested element by element against null [draws, *m]. Returns a float, or an
    array [*m]. tail: "greater", "less", or "two-sided" (twice the smaller one-sided p, at most 1: right for skewed and
    off-centre nulls too). Draws equal to the observed value up to rounding count as reaching it. NaN observed gives
    NaN; NaN among the draws is refused.
    """
    value, draws = _checked_null(observed, null, tail)
    if np.isnan(draws).any():
        raise ValueError(
            f"{int(np.isnan(draws).sum())} of {draws.size} null draws are NaN: the statistic is undefined under this null (is an input constant?)"
        )
    slack = 100 * np.finfo(np.float64).eps * np.abs(value)
    upper = ((draws >= value - slack).sum(axis=0) + 1) / (len(draws) + 1)
    lower = ((draws <= value + slack).sum(axis=0) + 1) / (len(draws) + 1)
    p = {"greater": upper, "less": lower, "two-sided": np.minimum(1.0, 2 * np.minimum(upper, lower))}[tail]
    p = np.where(np.isnan(value), np.nan, p)
    return float(p) if p.ndim == 0 else p


def _checked_null(observed: Any, null: Any, tail: str) -> tuple[np.ndarray, np.ndarray]:
    """Observed [*m] and its null [draws, *m] as float64, or a ValueError."""
    if tail not in _TAILS:
        raise ValueError(f"unknown tail {tail!r}; choose one of {_TAILS}")
    value, draws = np.asarray(observed, dtype=np.float64), np.asarray(null, dtype=np.float64)
    if draws.ndim == 0 or len(draws) == 0 or draws.shape[1:] != value.shape:
        raise ValueError(
            f"observed has shape {value.shape}, the null {draws.shape}: the null needs shape (draws, *observed.shape) with at least one draw"
        )
    return value, draws


def null_band(null: Real[np.ndarray, "..."], level: float = 0.95, axis: int = 0) -> tuple[Any, Any]:
    """The central `level` of null draws along `axis`: (low, high), floats for one-dimensional draws, else arrays."""
    low, high = np.quantile(np.asarray(null, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2], axis=axis)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def max_statistic_p(observed: Vector, null: Real[np.ndarray, "draws m"], tail: str = "greater") -> Float[np.ndarray, " m"]:
    """Family-wise p of m statistics (layers, say) against the null of their largest (Westfall and Young 1993, single
    step, +1 rule).

    observed [m]; null [draws, m], each draw one permutation applied to all m alike: that keeps the dependence between
    layers and makes the correction milder than Bonferroni's. Statistics should be of one scale (correlations, overlaps
    at one k); "two-sided" takes distances from each column's centre, the mean of its draws and the observed value. A
    NaN in observed gives NaN there; its column is left out of the maximum.
    """
    value, draws = _checked_null(observed, null, tail)
    out = np.full(value.shape, np.nan)
    known = ~np.isnan(value)
    if not known.any():
        return out
    value, draws = value[known], draws[:, known]
    if tail == "two-sided":
        centre = np.vstack([value, draws]).mean(axis=0)
        value, draws = np.abs(value - centre), np.abs(draws - centre)
    elif tail == "less":
        value, draws = -value, -draws
    largest = np.repeat(draws.max(axis=1)[:, None], value.size, axis=1)
    out[known] = permutation_p(value, largest, "greater")
    return out


def paired(
    before: Vector,
    after: Vector,
    clusters: Labels | None = None,
    n_permutations: int = 5000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Compare two values of the same rows (prompts), after minus before.

    Returns difference (mean), low, high (bootstrap, whole clusters when given), p with null_low and null_high (sign
    flips, two-sided: differences are symmetric about 0; whole clusters flip together when given), cohen_dz (mean / sd
    of the differences), rank_biserial (Kerby 2014), wilcoxon_p (signed ranks; knows nothing of clusters), n, n_clusters,
    exact and p_floor (the smallest p there can be). When all 2^G flips number at most `n_permutations` they are
    enumerated and p is exact (8 categories: the smallest possible p is 2/256); else they are sampled with the +1 rule.
    """
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) == 0:
        raise ValueError(f"before has shape {x.shape}, after {y.shape}: two vectors over the same rows are needed")
    change = y - x
    refuse_not_finite(change)
    n, mean = len(change), float(change.mean())
    codes, n_groups = codes_of(clusters, n, "clusters")
    sums = np.bincount(codes, weights=change, minlength=n_groups)
    exact = 2.0**n_groups <= n_permutations
    if exact:
        signs = 2.0 * ((np.arange(2**n_groups)[:, None] >> np.arange(n_groups)) & 1) - 1
        null = signs @ sums / n
        p = float((np.abs(null) >= abs(mean) - 1e-12 * np.abs(sums).sum() / n).mean())
    else:
        rng = np.random.default_rng(seed)
        flips = (2.0 * rng.integers(2, size=(count, n_groups)) - 1 for count in chunks(n_permutations, n_groups))
        null = np.concatenate([signs @ sums / n for signs in flips])
        p = permutation_p(abs(mean), np.abs(null), "greater")
    low, high = bootstrap_interval(change, clusters=codes, level=level, seed=seed)
    null_low, null_high = null_band(null, level)
    spread = float(change.std(ddof=1)) if n > 1 else np.nan
    moved = change[change != 0]
    ranks = scipy_stats.rankdata(np.abs(moved))
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "null_low": null_low,
        "null_high": null_high,
        "p": p,
        "cohen_dz": mean / spread if spread > 0 else np.nan,
        "rank_biserial": float((np.sign(moved) * ranks).sum() / ranks.sum()) if moved.size else 0.0,
        "wilcoxon_p": float(scipy_stats.wilcoxon(moved).pvalue) if moved.size else 1.0,
        "n": n,
        "n_clusters": n_groups,
        "exact": exact,
        "p_floor": 2 / 2**n_groups if exact else 1 / (n_permutations + 1),
    }


def correlation(
    x: Vector,
    y: Vector,
    clusters: Labels | None = None,
    n_permutations: int = 2000,
    seed: int = 0,
    method: str = "pearson",
    within: Labels | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
) -> dict[str, Any]:
    """Correlation of x and y over rows: r, low, high, p, null_low, null_high, n, n_clusters.

    method   "pearson" or "spearman" (ranks are taken anew in every resample, ties get mid-ranks).
    low/high bootstrap over rows, or over whole clusters when `clusters` [n] is given (see `bootstrap_interval`).
    p        two-sided, by permuting the rows of y against x: the hypothesis is that rows are exchangeable. Where a
             common cause of x and y sits between groups (topic, say), give `within` [n]: rows are then permuted inside
             their group only and the null keeps what the groups explain.
    A constant x or y (or fewer than three rows) gives NaN for r, its interval and p.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"unknown method {method!r}; choose 'pearson' or 'spearman'")
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"x has shape {a.shape}, y {b.shape}: two vectors over the same rows are needed")
    refuse_not_finite(a + b)
    n = len(a)
    codes, n_groups = codes_of(clusters, n, "clusters")
    nothing = dict.fromkeys(("low", "high", "p", "null_low", "null_high"), np.nan)
    if n < 3 or _constant(a) or _constant(b):
        return {"r": np.nan, **nothing, "n": n, "n_clusters": n_groups}
    rng = np.random.default_rng(seed)
    left, right = (a, b) if method == "pearson" else (scipy_stats.rankdata(a), scipy_stats.rankdata(b))
    left, right = (left - left.mean()) / left.std(), (right - right.mean()) / right.std()
    r = float(np.clip(left @ right / n, -1, 1))
    null = np.concatenate([right[permutations(n, count, rng, within)] @ left / n for count in chunks(n_permutations, n)])
    draws = []
    for rows in bootstrap_weights(n, n_boot, rng, codes):
        u, v = left[None], right[None]
        if method == "spearman":
            u, v = weighted_ranks(a, rows), weighted_ranks(b, rows)
        draws.append(weighted_pearson(u, v, rows))
    p = permutation_p(r, null, "two-sided")
    ends = (*expanded_interval(np.concatenate(draws), n_groups, level), p, *null_band(null, level))
    return {"r": r, **dict(zip(nothing, ends, strict=True)), "n": n, "n_clusters": n_groups}


def _constant(x: Float[np.ndarray, " n"]) -> bool:
    """Whether x varies no more than rounding does."""
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())


def weighted_ranks(x: Float[np.ndarray, " n"], weights: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws n"]:
    """Mid-ranks of x in samples that hold row i `weights[draw, i]` times."""
    _, inverse = np.unique(x, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, inverse]


def weighted_pearson(
    x: Float[np.ndarray, "#draws n"], y: Float[np.ndarray, "#draws n"], weights: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """Pearson correlation in samples that hold row i `weights[draw, i]` times; NaN where a sample is constant."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    varies: Bool[np.ndarray, " draws"] = spread > 1e-12 * total[:, 0]
    return np.divide((weights * x * y).sum(axis=1), spread, out=np.full(len(spread), np.nan), where=varies)
