"""How good out-of-fold predictions are, with an interval and the value inside every group; what noise in the target allows.

A `Metric` scores one round of folds, all targets at once (the observed one and its permutations); rounds are averaged.
Intervals resample whole groups (or prompts), folds and fits as they are. The means over folds, `fold_r2` and `fold_rmse`,
belong to repeated K-fold and have the interval of Nadeau and Bengio.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from . import stats
from .crossvalidated import nadeau_bengio
from .ridge import Fold, per_group, r2, rmse, spearman

Codes = Int[np.ndarray, " prompt"]
Observed = Float[np.ndarray, "round prompt block"]
Band = tuple[Float[np.ndarray, " block"], Float[np.ndarray, " block"]]


class Asked(NamedTuple):
    """What every metric needs to know: the target, who belongs together, the rounds of folds, level and seed."""

    y: Float[np.ndarray, " prompt"]
    codes: Codes | None
    rounds: tuple[tuple[Fold, ...], ...]
    level: float
    seed: int


class Metric(NamedTuple):
    """How one round of predictions is scored (column by column), which tail is better than chance, the interval of the
    observed predictions, the value inside each group, and the best that noise of the given variance allows."""

    score: Callable[[np.ndarray, np.ndarray, Codes | None, Sequence[Fold]], np.ndarray]
    tail: str
    interval: Callable[[Asked, Observed], Band]
    of_group: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ceiling: Callable[[np.ndarray, np.ndarray, Codes | None], float]


def in_groups(metric: Metric, asked: Asked, found: Observed) -> Float[np.ndarray, "group block"]:
    """The metric inside each group, averaged over rounds; NaN where the group's target does not vary."""
    y = np.tile(asked.y[:, None], found.shape[2])
    return np.mean([per_group(metric.of_group, y, one, asked.codes) for one in found], axis=0)


def gain_in_groups(asked: Asked, fall: Float[np.ndarray, "prompt block"]) -> Float[np.ndarray, "group block"]:
    """Of delta_r2, inside each group: the fall of the squared errors over the squares of the target about the group's mean."""

    def share(y: np.ndarray, of_prompt: np.ndarray) -> np.ndarray:
        total = np.square(y - y.mean(axis=0)).sum(axis=0)
        return np.divide(of_prompt.sum(axis=0), total, out=np.full(len(total), np.nan), where=total > 0)

    return per_group(share, np.tile(asked.y[:, None], fall.shape[1]), fall, asked.codes)


# ---- noise in the target


def noise_variance(
    facts: pd.DataFrame, target: str, y: Float[np.ndarray, " prompt"], noise: str | None, trials: str | None
) -> Float[np.ndarray, " prompt"] | None:
    """Variance of the noise in each prompt's target: the squared standard error `noise` (the fact "<target>_se" when there is
    one), or of a rate y from m trials the unbiased y (1 - y) / (m - 1); None when nothing is known, as from single trials."""
    if noise is None and trials is None:
        noise = f"{target}_se" if f"{target}_se" in facts.columns else None
    if noise is not None:
        errors = numbers(facts, noise, "noise")
        if (errors < 0).any():
            raise ValueError(f"noise={noise!r} holds negative standard errors: a standard error of the target per prompt is needed")
        return errors**2
    if trials is None:
        return None
    counts = numbers(facts, trials, "trials")
    if (counts < 1).any() or y.min() < 0 or y.max() > 1:
        raise ValueError(
            f"trials={trials!r} needs a rate between 0 and 1 and at least 1 trial a prompt; {target!r} lies in [{y.min():.3g}, {y.max():.3g}], "
            f"the fewest trials are {counts.min():.3g}: divide by 100, or give noise= a standard error"
        )
    return y * (1 - y) / (counts - 1) if (counts > 1).all() else None


def numbers(facts: pd.DataFrame, column: str, option: str) -> Float[np.ndarray, " prompt"]:
    """A column of finite numbers, or an error that names the option it was given for."""
    if column not in facts.columns:
        raise KeyError(f"no column {column!r} among the facts {list(facts.columns)}: {option}= names one of them, or None")
    if not pd.api.types.is_numeric_dtype(facts[column]):
        raise TypeError(f"{option}={column!r} is of type {facts[column].dtype}; a number per prompt is needed")
    values = facts[column].to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{option}={column!r} is NaN or infinite for {int((~np.isfinite(values)).sum())} of {len(values)} prompts: fill or drop them"
        )
    return values


def reliability(y: Float[np.ndarray, " prompt"], variance: Float[np.ndarray, " prompt"]) -> float:
    """1 - mean(se^2) / var(y): the R2 of a predictor that knows the score without noise; 0 when noise is all there is."""
    return max(0.0, 1 - float(variance.mean() / y.var()))


# ---- intervals


def error_interval(statistic: Callable[[np.ndarray, float, float], np.ndarray], asked: Asked, errors: Float[np.ndarray, "prompt block"]) -> Band:
    """Bootstrap over groups of statistic(summed errors [block], number of prompts, sum of squares about the mean)."""
    y, codes = asked.y, asked.codes
    centred = (y - y.mean())[:, None]
    parts = np.hstack([np.ones_like(centred), centred, centred**2, errors])
    units = np.arange(len(y)) if codes is None else codes
    sums = np.zeros((int(units.max()) + 1, parts.shape[1]))
    np.add.at(sums, units, parts)

    def resampled(rows: np.ndarray) -> np.ndarray:
        n, first, second, *_ = total = rows.sum(axis=0)
        spread = second - first**2 / n
        return statistic(total[3:], n, spread if spread > 1e-12 * second else np.nan)

    return stats.bootstrap_interval(sums, resampled, level=asked.level, seed=asked.seed)


def _spearman_interval(asked: Asked, found: Observed) -> Band:
    """The mean over rounds of each round's interval."""

    def one_of(column: Float[np.ndarray, " prompt"]) -> tuple[float, float]:
        cell = stats.correlation(asked.y, column, asked.codes, n_permutations=1, seed=asked.seed, method="spearman", level=asked.level)
        return cell["low"], cell["high"]

    ends = np.array([[one_of(column) for column in one.T] for one in found]).mean(axis=0)
    return ends[:, 0], ends[:, 1]


# ---- the metrics


def _of_errors(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tail: str,
    statistic: Callable[[np.ndarray, float, float], np.ndarray],
    of_group: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ceiling: Callable[[np.ndarray, np.ndarray, Codes | None], float],
) -> Metric:
    """A measure that depends on the squared errors by their sum, and can so be resampled group by group."""
    return Metric(
        lambda y, found, codes, folds: measure(y, found),
        tail,
        lambda asked, found: error_interval(statistic, asked, np.square(asked.y[:, None] - found).mean(axis=0)),
        of_group,
        ceiling,
    )


def _within(measure: Callable[[np.ndarray, np.ndarray], np.ndarray], ceiling: Callable[[np.ndarray, np.ndarray, Codes | None], float]) -> Metric:
    """The measure inside each group, averaged over the groups whose target varies; groups resampled for the interval."""

    def interval(asked: Asked, found: Observed) -> Band:
        y = np.tile(asked.y[:, None], found.shape[2])
        of_group = np.mean([per_group(measure, y, one, asked.codes) for one in found], axis=0)
        return stats.bootstrap_interval(of_group[~np.isnan(of_group[:, 0])], level=asked.level, seed=asked.seed)

    return Metric(lambda y, found, codes, folds: np.nanmean(per_group(measure, y, found, codes), axis=0), "greater", interval, measure, ceiling)


def _over_folds(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], tail: str, ceiling: Callable[[np.ndarray, np.ndarray, Codes | None], float]
) -> Metric:
    """The mean over folds of the measure in the test rows."""

    def of_folds(y: np.ndarray, found: np.ndarray, folds: Sequence[Fold]) -> Float[np.ndarray, "fold target"]:
        return np.stack([measure(y[fold.test], found[fold.test]) for fold in folds])

    def interval(asked: Asked, found: Observed) -> Band:
        y = np.tile(asked.y[:, None], found.shape[2])
        values = np.concatenate([of_folds(y, one, folds) for one, folds in zip(found, asked.rounds, strict=True)])
        each = [nadeau_bengio(column, 1 / len(asked.rounds[0]), asked.level) for column in values.T]
        return np.array([one["low"] for one in each]), np.array([one["high"] for one in each])

    return Metric(lambda y, found, codes, folds: of_folds(y, found, folds).mean(axis=0), tail, interval, measure, ceiling)


def _share(y: np.ndarray, variance: np.ndarray, codes: Codes | None) -> float:
    return reliability(y, variance)


def _root(y: np.ndarray, variance: np.ndarray, codes: Codes | None) -> float:
    return float(np.sqrt(variance.mean()))


def _share_in_groups(y: np.ndarray, variance: np.ndarray, codes: Codes | None) -> float:
    members = np.zeros(len(y)) if codes is None else codes
    each = [reliability(y[members == g], variance[members == g]) for g in np.unique(members) if np.ptp(y[members == g]) > 0]
    return float(np.mean(each))


def _unknown(y: np.ndarray, variance: np.ndarray, codes: Codes | None) -> float:
    return np.nan


METRICS = {
    "r2": _of_errors(r2, "greater", lambda errors, n, spread: 1 - errors / spread, r2, _share),
    "spearman": Metric(lambda y, found, codes, folds: spearman(y, found), "greater", _spearman_interval, spearman, _unknown),
    "rmse": _of_errors(rmse, "less", lambda errors, n, spread: np.sqrt(errors / n), rmse, _root),
    "within_r2": _within(r2, _share_in_groups),
    "within_spearman": _within(spearman, _unknown),
    "fold_r2": _over_folds(r2, "greater", _share),
    "fold_rmse": _over_folds(rmse, "less", _root),
}
OF_FOLDS = ("fold_r2", "fold_rmse")
WITHIN = ("within_r2", "within_spearman")
