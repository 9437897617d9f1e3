"""Two values of the same rows: how far apart, how much wider, how alike; each effect with the tests that go with it. Plain arrays.

An effect is a function of a `Pair` and of weights (how often each row is in a sample), so one definition gives the estimate and its
bootstrap. A test is a name, the effect it stands beside, what it supposes, and p. All are two-sided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats as scipy_stats

from . import stats
from .resampling import bootstrap_weights, expanded_interval
from .stats import weighted_pearson, weighted_ranks

Values = Float[np.ndarray, " n"]
Weights = Float[np.ndarray, "draws n"]
Draws = Float[np.ndarray, " draws"]

UNDEFINED = 0.05
"""Share of bootstrap samples without a value above which an interval is refused: what is left would be the well-behaved part."""


class Pair(NamedTuple):
    """Two values of the same n rows, after them the squared standard errors they carry (NaN: not known), and the row's cluster (0 … G - 1)."""

    before: Values
    after: Values
    error_before: Values
    error_after: Values
    clusters: Int[np.ndarray, " n"]


# ---- effects


def difference(pair: Pair, weights: Weights) -> Draws:
    """Mean of after - before."""
    return weights @ (pair.after - pair.before) / weights.sum(axis=1)


def cohen_dz(pair: Pair, weights: Weights) -> Draws:
    """Mean of after - before over the standard deviation of the differences: small where the two are alike over rows, whatever their spread."""
    mean, sd = _moments(pair.after - pair.before, weights)
    return _over(mean, sd)


def cohen_d(pair: Pair, weights: Weights) -> Draws:
    """Mean of after - before over the root of the mean variance of the two: as if they were of different rows (Cohen 1988)."""
    (low, spread), (high, wider) = _moments(pair.before, weights), _moments(pair.after, weights)
    return _over(high - low, np.sqrt((spread**2 + wider**2) / 2))


def rank_biserial(pair: Pair, weights: Weights) -> Draws:
    """Of the signed ranks of after - before: (those up - those down) / all, in [-1, 1] (Kerby 2014). Rows that did not change are left out;
    0 where none did."""
    change = pair.after - pair.before
    moved = weights * (change != 0)
    ranks = moved * (weighted_ranks(np.abs(change), moved) + 0.5)
    total = ranks.sum(axis=1)
    return np.divide(ranks @ np.sign(change), total, out=np.zeros(len(total)), where=total > 0)


def cliffs_delta(pair: Pair, weights: Weights) -> Draws:
    """P(after > before) - P(after < before) for two rows drawn independently (Cliff 1993): the rank-biserial correlation of unpaired values."""
    n, total = len(pair.after), weights.sum(axis=1)
    pooled = weighted_ranks(np.concatenate([pair.before, pair.after]), np.concatenate([weights, weights], axis=1))[:, n:]
    below = (weights * (pooled - weighted_ranks(pair.after, weights))).sum(axis=1)
    return 2 * below / total**2 - 1


def log_sd_ratio(pair: Pair, weights: Weights) -> Draws:
    """Natural log of the standard deviation over rows after over that before: 0 is as wide, log 2 twice as wide."""
    before, after = _moments(pair.before, weights)[1], _moments(pair.after, weights)[1]
    ratio = _over(after, before)
    return np.log(ratio, out=np.full(len(ratio), np.nan), where=ratio > 0)


def ks_distance(pair: Pair, weights: Weights) -> Draws:
    """Largest distance of the two cumulative distributions (Kolmogorov and Smirnov), of the rows as they are: resampling, which can only
    enlarge a distance, gives no interval."""
    return np.full(len(weights), scipy_stats.ks_2samp(pair.after, pair.before).statistic)


def pearson_r(pair: Pair, weights: Weights) -> Draws:
    """Pearson correlation of before and after over rows."""
    return weighted_pearson(pair.before[None], pair.after[None], weights)


def spearman_r(pair: Pair, weights: Weights) -> Draws:
    """Rank correlation of before and after over rows."""
    return weighted_pearson(weighted_ranks(pair.before, weights), weighted_ranks(pair.after, weights), weights)


def slope(pair: Pair, weights: Weights) -> Draws:
    """Least-squares slope of after on before, with an intercept. Noise in before pulls it to 0."""
    return pearson_r(pair, weights) * _over(_moments(pair.after, weights)[1], _moments(pair.before, weights)[1])


def reliability_before(pair: Pair, weights: Weights) -> Draws:
    """Share of the variance of before over rows that is not sampling: 1 - mean(squared standard error) / variance."""
    return _reliability(pair.before, pair.error_before, weights)


def reliability_after(pair: Pair, weights: Weights) -> Draws:
    """`reliability_before`, of after."""
    return _reliability(pair.after, pair.error_after, weights)


def disattenuated_r(pair: Pair, weights: Weights) -> Draws:
    """Correlation of the values without sampling noise: r / sqrt(reliability before x reliability after) (Spearman 1904). May lie outside
    [-1, 1], and is NaN where a reliability is not above 0: then the values say nothing about how rows differ."""
    before, after = reliability_before(pair, weights), reliability_after(pair, weights)
    known = (before > 0) & (after > 0)
    return _over(pearson_r(pair, weights), np.sqrt(np.where(known, before * after, np.nan)))


def effect(measure: Callable[[Pair, Weights], Draws], pair: Pair, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> dict[str, float]:
    """An effect with its bootstrap interval over rows, or whole clusters: estimate, low, high.

    NaN for fewer than three rows; no interval for a distance, or where more than 5 % of the samples have no value.
    """
    if len(pair.before) < 3:
        return dict.fromkeys(("estimate", "low", "high"), np.nan)
    estimate = float(measure(pair, np.ones((1, len(pair.before))))[0])
    if measure is ks_distance:
        return {"estimate": estimate, "low": np.nan, "high": np.nan}
    draws = np.concatenate([measure(pair, weights) for weights in bootstrap_weights(len(pair.before), n_boot, seed, pair.clusters)])
    undefined = np.isnan(estimate) or np.isnan(draws).mean() > UNDEFINED
    low, high = (np.nan, np.nan) if undefined else expanded_interval(draws, int(pair.clusters.max()) + 1, level)
    return {"estimate": estimate, "low": low, "high": high}


# ---- tests


class Procedure(NamedTuple):
    """What a named test stands beside and supposes; `p` is None where it is drawn (see `tested`) or there is no test of its own."""

    measures: tuple[Callable[[Pair, Weights], Draws], ...]
    hypothesis: str
    p: Callable[[Pair], float] | None = None


def _unless_same(pair: Pair, test: Callable[[], float]) -> float:
    """p of a test; 1 where before and after are the same values row by row, NaN where one of them does not vary."""
    if np.array_equal(pair.before, pair.after):
        return 1.0
    return float(test()) if np.ptp(pair.before) > 0 and np.ptp(pair.after) > 0 else np.nan


def _signed_ranks(pair: Pair) -> float:
    change = pair.after - pair.before
    return float(scipy_stats.wilcoxon(change[change != 0]).pvalue) if change.any() else 1.0


def _paired_t(pair: Pair) -> float:
    change = pair.after - pair.before
    return float(scipy_stats.ttest_1samp(change, 0.0).pvalue) if np.ptp(change) > 0 else 0.0 if change.any() else 1.0


def _f(pair: Pair) -> float:
    ratio, freedom = pair.after.var(ddof=1) / pair.before.var(ddof=1), len(pair.before) - 1
    return min(1.0, 2 * min(scipy_stats.f.cdf(ratio, freedom, freedom), scipy_stats.f.sf(ratio, freedom, freedom)))


def _pitman_morgan(pair: Pair) -> float:
    total, change = pair.after + pair.before, pair.after - pair.before
    return float(scipy_stats.pearsonr(total, change).pvalue) if min(np.ptp(total), np.ptp(change)) > 0 else 1.0


TESTS: dict[str, Procedure] = {
    "sign_flip": Procedure((difference,), "differences of a question are symmetric about 0; signs flipped, of whole clusters together"),
    "wilcoxon": Procedure((rank_biserial,), "differences are symmetric about 0, questions independent; Wilcoxon signed ranks", _signed_ranks),
    "paired_t": Procedure((cohen_dz,), "the mean difference is 0, questions independent; paired t", _paired_t),
    "t": Procedure(
        (cohen_d,),
        "equal means of two independent samples; Student's t, which ignores the pairing",
        lambda pair: _unless_same(pair, lambda: scipy_stats.ttest_ind(pair.after, pair.before).pvalue),
    ),
    "rank_sum": Procedure(
        (cliffs_delta,),
        "one distribution, two independent samples; Wilcoxon rank sum (Mann-Whitney), which ignores the pairing",
        lambda pair: float(scipy_stats.mannwhitneyu(pair.after, pair.before).pvalue) if np.ptp([pair.after, pair.before]) > 0 else 1.0,
    ),
    "f": Procedure(
        (log_sd_ratio,),
        "equal variances over questions of two independent normal samples; F, which is wrong for scores that pile up at a ceiling",
        lambda pair: _unless_same(pair, lambda: _f(pair)),
    ),
    "brown_forsythe": Procedure(
        (log_sd_ratio,),
        "equal spread over questions about the median, two independent samples; Brown-Forsythe",
        lambda pair: _unless_same(pair, lambda: scipy_stats.levene(pair.after, pair.before, center="median").pvalue),
    ),
    "pitman_morgan": Procedure(
        (log_sd_ratio,),
        "equal variances over questions of paired normal values; r of sum and difference is 0 (Pitman 1939, Morgan 1939), which is wrong for scores "
        "that pile up at a ceiling (false alarms several times too many)",
        lambda pair: _unless_same(pair, lambda: _pitman_morgan(pair)),
    ),
    "paired_levene": Procedure(
        (log_sd_ratio,),
        "equal spread over questions: absolute distances from each side's median differ symmetrically about 0; signs flipped, of whole clusters "
        "together (Levene's idea for pairs: Grambsch 1994)",
    ),
    "ks": Procedure(
        (ks_distance,),
        "one distribution, two independent samples; Kolmogorov-Smirnov, which ignores the pairing",
        lambda pair: float(scipy_stats.ks_2samp(pair.after, pair.before).pvalue),
    ),
    "pearson": Procedure((pearson_r,), "no correlation over questions, normal and independent", lambda pair: _correlated(scipy_stats.pearsonr, pair)),
    "spearman": Procedure((spearman_r,), "no rank correlation over independent questions", lambda pair: _correlated(scipy_stats.spearmanr, pair)),
    "permutation": Procedure((pearson_r,), "after does not order with before; after permuted over questions, inside clusters where there are any"),
    "slope": Procedure((slope,), "none of its own: that the slope is 0 is that r is 0"),
    "reliability": Procedure((reliability_before, reliability_after), "none: a property of each side"),
    "disattenuated": Procedure((disattenuated_r,), "none of its own: that it is 0 is that r is 0"),
}
"""Name -> what it measures and supposes; the names `em.compare_scores` takes."""


def _correlated(test: Callable[[Values, Values], Any], pair: Pair) -> float:
    return float(test(pair.before, pair.after).pvalue) if min(np.ptp(pair.before), np.ptp(pair.after)) > 0 else np.nan


def tested(name: str, pair: Pair, level: float = 0.95, n_boot: int = 2000, n_permutations: int = 5000, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one test: metric, estimate, low, high, null (the test's name), p, and null_low, null_high where the null is
    drawn."""
    test, enough = TESTS[name], len(pair.before) >= 3
    rows: list[dict[str, Any]] = []
    for measure in test.measures:
        row: dict[str, Any] = {"metric": measure.__name__, **effect(measure, pair, level, n_boot, seed), "null": name, "p": np.nan}
        if enough and name in ("sign_flip", "paired_levene"):
            before, after = (side if name == "sign_flip" else np.abs(side - np.median(side)) for side in (pair.before, pair.after))
            found = stats.paired(before, after, pair.clusters, n_permutations, seed, level)
            row |= {key: found[key] for key in (("p", "p_floor", "null_low", "null_high") if name == "sign_flip" else ("p", "p_floor"))}
        elif enough and name == "permutation":
            inside = pair.clusters if pair.clusters.max() + 1 < len(pair.clusters) else None
            found = stats.correlation(pair.before, pair.after, None, n_permutations, seed, within=inside, level=level, n_boot=2)
            row |= {key: found[key] for key in ("p", "null_low", "null_high")}
        elif enough and test.p is not None:
            row["p"] = test.p(pair)
        rows.append(row)
    return rows


# ---- inside


def _moments(values: Values, weights: Weights) -> tuple[Draws, Draws]:
    """Mean and standard deviation (n - 1) in samples that hold row i `weights[draw, i]` times."""
    total = weights.sum(axis=1)
    mean = weights @ values / total
    centre = values.mean()  # squares about it: no cancellation for values far from 0
    squares = np.maximum(weights @ (values - centre) ** 2 - total * (mean - centre) ** 2, 0.0)
    spread = np.sqrt(squares / np.maximum(total - 1, 1))
    return mean, np.where(spread > 1e-7 * max(1.0, float(np.abs(values).max())), spread, 0.0)


def _over(above: Draws, below: Draws) -> Draws:
    """A quotient; NaN where the divisor is not above 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _reliability(values: Values, error: Values, weights: Weights) -> Draws:
    """Questions of one answer have no standard error: theirs is taken to be the mean of the others'."""
    known = weights * ~np.isnan(error)
    return 1 - _over(_over(known @ np.nan_to_num(error), known.sum(axis=1)), _moments(values, weights)[1] ** 2)
