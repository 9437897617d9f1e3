"""Which rows are drawn: permutations, and bootstrap samples of rows or of whole clusters, with the interval they give.

Everything takes plain arrays; nothing of emlens is imported. Every random function takes `seed` and gives the same
numbers for the same seed. `emlens.stats` hands these on under its own name.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Real
from scipy import stats as scipy_stats

Labels: TypeAlias = np.ndarray | Sequence[Any] | pd.Series | pd.Index

BUDGET = 4_000_000
"""Numbers held at once by a vectorised resampling."""


def permutations(n: int, n_draws: int, seed: int | np.random.Generator, within: Labels | None = None) -> Int[np.ndarray, "draws n"]:
    """`n_draws` random orders of n rows; with `within` [n], rows only change places inside their own group."""
    rng = np.random.default_rng(seed)
    orders = np.tile(np.arange(n), (n_draws, 1))
    if within is None:
        return rng.permuted(orders, axis=1)
    codes, n_groups = codes_of(within, n, "within")
    for group in range(n_groups):
        members = np.flatnonzero(codes == group)
        orders[:, members] = rng.permuted(np.tile(members, (n_draws, 1)), axis=1)
    return orders


def bootstrap_interval(
    values: Real[np.ndarray, " n *m"] | Sequence[float | int] | pd.Series,
    statistic: Callable[[np.ndarray], Any] | None = None,
    clusters: Labels | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Bootstrap interval of a statistic of the rows of values [n] or [n, m]; whole clusters are drawn when `clusters`
    [n] is given.

    statistic   maps values [rows(, m)] to a number (or an array); None: the mean over rows, vectorised.
    Returns     (low, high): floats when the statistic is a number, else arrays. NaN when there are fewer than two rows
                (or clusters) to draw.

    Percentile interval with Hesterberg's expansion for small samples (What teachers should know about the bootstrap,
    2015): the tail areas are Phi(sqrt(G/(G-1)) t_{alpha/2, G-1}) with G the number of drawn units, so that eight
    categories do not look like eighty. It is the plain percentile for large G.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim == 0 or len(data) == 0:
        raise ValueError(f"values have shape {data.shape}: an interval needs at least one row")
    refuse_not_finite(data)
    codes, n_groups = codes_of(clusters, len(data), "clusters")
    if statistic is None:
        flat = data.reshape(len(data), -1)
        means = [(w @ flat) / w.sum(axis=1)[:, None] for w in bootstrap_weights(len(data), n_boot, seed, codes)]
        draws = np.concatenate(means).reshape(n_boot, *data.shape[1:])
    else:
        members = [np.flatnonzero(codes == group) for group in range(n_groups)]
        picks = np.random.default_rng(seed).integers(n_groups, size=(n_boot, n_groups))
        samples = (data[np.concatenate([members[group] for group in pick])] for pick in picks)
        draws = np.stack([np.asarray(statistic(sample), dtype=np.float64) for sample in samples])
    return expanded_interval(draws, n_groups, level)


def expanded_interval(draws: Float[np.ndarray, " draws *m"], n_units: int, level: float = 0.95) -> tuple[Any, Any]:
    """Quantiles of bootstrap draws at the tail areas of `bootstrap_interval`, for `n_units` resampled rows or clusters;
    NaN draws (a constant resample) are left out. Fewer than two units give NaN."""
    if n_units < 2 or np.isnan(draws).all():
        low = high = np.full(draws.shape[1:], np.nan)
    else:
        widening = np.sqrt(n_units / (n_units - 1))
        area = scipy_stats.norm.cdf(widening * scipy_stats.t.ppf((1 - level) / 2, n_units - 1))
        low, high = np.nanquantile(draws, [area, 1 - area], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def bootstrap_weights(n: int, n_boot: int, seed: int | np.random.Generator, clusters: Labels | None = None) -> Iterator[Float[np.ndarray, "draws n"]]:
    """How often each of n rows is in each bootstrap sample, in chunks of samples; whole clusters [n] go together."""
    rng = np.random.default_rng(seed)
    codes, n_groups = codes_of(clusters, n, "clusters")
    for count in chunks(n_boot, n):
        picks = rng.integers(n_groups, size=(count, n_groups)) + n_groups * np.arange(count)[:, None]
        drawn = np.bincount(picks.ravel(), minlength=count * n_groups).reshape(count, n_groups)
        yield drawn[:, codes].astype(np.float64)


def refuse_not_finite(values: np.ndarray) -> None:
    """ValueError when values hold NaN or infinity."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} of {values.size} values are NaN or infinite: drop those rows first, on every side")


def codes_of(labels: Labels | None, n: int, name: str) -> tuple[Int[np.ndarray, " n"], int]:
    """Labels [n] as integers 0..G-1 and G; None: every row its own group."""
    if labels is None:
        return np.arange(n), n
    if len(labels) != n:
        raise ValueError(f"{name} has {len(labels)} labels for {n} rows: one label per row is needed")
    codes, unique = pd.factorize(np.asarray(labels))
    if (codes < 0).any():
        raise ValueError(f"{int((codes < 0).sum())} of {n} rows have no label in {name}: fill or drop them first")
    return codes.astype(np.int64), len(unique)


def chunks(n_draws: int, width: int) -> Iterator[int]:
    """n_draws in parts, so that a part of draws of `width` numbers each stays within the budget."""
    step = max(1, BUDGET // max(width, 1))
    for start in range(0, n_draws, step):
        yield min(step, n_draws - start)
