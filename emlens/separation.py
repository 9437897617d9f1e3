"""Does a direction tell two sets of prompts apart that it was not fitted on, and how far does it depend on those it was fitted on?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

from . import nulls, stats
from ._sides import check_same_place, layer_rows
from .activations import Activations
from .fitting import Fit, Method, method_named
from .subspaces import common_coordinates, row_cosines, unit_rows
from .threads import one_thread


@one_thread
def held_out_separation(
    a: Activations,
    b: Activations,
    n_splits: int = 5,
    n_permutations: int = 1000,
    seed: int = 0,
    groups: str | None = None,
    level: float = 0.95,
    method: str | Method = "mean difference",
) -> stats.Result:
    """Does a direction tell a from b on prompts it was not fitted on? Per layer, with q over layers.

    Prompts (by id, both variants of a prompt together) are split in random halves; the direction fitted on one half is
    projected on by the other, and the other way round, each centred on the half it was fitted on. A prompt's projection
    is its mean over n_splits. Metrics "auc" (chance 0.5) and "cohen_d" (pooled sd, a minus b) over prompts, and where a
    and b hold the same prompts "pair_accuracy", the share of prompts whose a lies above their b (chance 0.5).

    groups    a column of the facts: halves are of whole groups, so a direction is scored on topics it has not seen.
    method    how it is fitted: "mean difference", "pca", "lda", "logistic", or a `Method` (`emlens.fitting`). "logistic" is
              refitted draw by draw, some milliseconds each: 30 layers x 10 halves x 1000 draws take a quarter of an hour.
    p         null "labels permuted", greater, the whole procedure repeated: a and b are swapped within prompts (within
              whole groups when `groups` is given); where a and b share no prompt, labels are permuted over prompts
              (inside their group). All ways to swap few groups are gone through: 8 groups allow no p below 2 / 256, since
              swapping all of them turns the direction round and scores the same. q is by the maximum over layers within
              each metric (Westfall and Young).
    low/high  bootstrap over prompts (or groups) of the held-out projections, given the fitted directions.

    Errors: ValueError for different places or widths, sides that share some but not all prompts, too few to split.
    """
    check_same_place(a, b)
    how_fitted = method_named(method)
    sides = _sides(a, b, groups)
    rng = np.random.default_rng(seed)
    folds = _folds(sides, n_splits, rng)
    labels = np.concatenate([sides.labels[None], _swapped(sides, n_permutations, rng)])
    found = []
    for layer in a.layers:
        projections = _held_out_projections(_rows(a, b, sides, layer, how_fitted), labels, folds, how_fitted.fit)
        low, high = _separation_ends(projections[0], sides, level, seed)
        found.append((_separations(projections, labels, sides.paired), low, high))
    how = f"by {how_fitted.name}, {a.place}"
    return _as_result(a, b, sides, found, how, "", groups, level, seed=seed, n_splits=n_splits, n_permutations=n_permutations)


@one_thread
def transferred_separation(
    fit_a: Activations,
    fit_b: Activations,
    a: Activations,
    b: Activations,
    n_splits: int = 5,
    n_permutations: int = 1000,
    seed: int = 0,
    groups: str | None = None,
    level: float = 0.95,
) -> stats.Result:
    """Does the mean difference of one pair of sides tell another pair apart? As `held_out_separation`, fitted elsewhere.

    The direction mean(fit_a) - mean(fit_b) is fitted on one half of the prompts and projected on by a and b of the other
    half, and the other way round. All four sides hold the same prompts (matched by id). What two tunings' marks have in
    common is asked, so a direction that is a mark of one tuning alone gives 0.5. Metrics, interval and q as there.

    p         null "labels permuted", greater: a and b swapped within prompts (whole groups when `groups` is given), the
              direction as it is: about these prompts, given these four tunings.

    Errors: ValueError for different places or widths, or sides that do not hold the same prompts.
    """
    for other in (fit_b, a, b):
        check_same_place(fit_a, other)
    sides = _sides(a, b, groups)
    if not (sides.paired and set(a.ids) == set(fit_a.ids) == set(fit_b.ids)):
        raise ValueError("the four sides hold different prompts: select(ids=...) the common ones on all of them")
    fit_a, fit_b = fit_a.select(ids=a.ids), fit_b.select(ids=a.ids)
    rng = np.random.default_rng(seed)
    folds = _folds(sides, n_splits, rng)
    labels = np.concatenate([sides.labels[None], _swapped(sides, n_permutations, rng)])
    half = a.n_prompts
    found = []
    for layer in a.layers:
        x = _rows(a, b, sides, layer)
        difference = fit_a.layer(layer).astype(np.float64) - fit_b.layer(layer)
        projection = np.zeros(len(x))
        for fold in folds:
            for fit in (fold, ~fold):
                direction = difference[fit[:half]].mean(axis=0)
                length = max(float(np.linalg.norm(direction)), 1e-150)
                projection[~fit] += (x[~fit] - x[fit].mean(axis=0)) @ direction / length / len(folds)
        low, high = _separation_ends(projection, sides, level, seed)
        found.append((_separations(np.tile(projection, (len(labels), 1)), labels, True), low, high))
    how = f"by the mean difference of two other sides, {a.place}"
    told = "; the direction is not refitted"
    return _as_result(a, b, sides, found, how, told, groups, level, seed=seed, n_splits=n_splits, n_permutations=n_permutations)


@one_thread
def stability(
    a: Activations,
    b: Activations,
    method: str | Method = "mean difference",
    n_boot: int = 50,
    n_permutations: int = 100,
    seed: int = 0,
    clusters: str | None = None,
    level: float = 0.95,
) -> stats.Result:
    """How far does a direction depend on which prompts it was fitted on? Per layer, metric "cosine".

    estimate   mean over n_boot bootstrap samples of prompts (both variants of a prompt together; whole groups where
               `clusters`, a column of the facts, is given) of the cosine between the direction refitted on the sample and
               that of all prompts. 1: it does not depend on them.
    low/high   the central `level` of these cosines: a spread over samples, not a confidence interval.
    p          null "labels permuted" (see `held_out_separation`), greater: the same of the direction that permuted labels
               give. It is far from 0: a bootstrap sample shares most prompts with all of them, so a direction of pure noise
               comes back at a cosine of some 0.7. q is by the maximum over layers.

    method as in `held_out_separation`; "logistic" takes n_boot x n_permutations fits a layer. Errors: as there, and
    ValueError when a sample of clusters holds no prompt of one side.
    """
    check_same_place(a, b)
    how_fitted = method_named(method)
    sides = _sides(a, b, clusters)
    rng = np.random.default_rng(seed)
    samples = _resampled(sides, n_boot, rng)
    labels = np.concatenate([sides.labels[None], _swapped(sides, n_permutations, rng)]) > 0
    spread = []
    for layer in a.layers:
        x = _rows(a, b, sides, layer, how_fitted)
        whole = how_fitted.fit(x, labels)
        spread.append(np.stack([row_cosines(how_fitted.fit(x[rows], labels[:, rows]), whole) for rows in samples]))
    means = np.stack([cosines.mean(axis=0) for cosines in spread], axis=1)
    ends = np.stack([stats.null_band(cosines[:, 0], level) for cosines in spread], axis=1)
    q = stats.max_statistic_p(means[0], means[1:], "greater")
    rows = [{**row, "q": qi} for row, qi in zip(layer_rows(a.layers, "cosine", (means[0], *ends), sides.n), q, strict=True)]
    return stats.result(
        pd.DataFrame(nulls.beside(rows, {"labels permuted": means[1:]}, "greater", level)).assign(n_clusters=len(np.unique(sides.units))),
        ["layer"],
        what=f"cosine of {how_fitted.name} refitted on resampled prompts with that of all, {a.place}",
        correction="max-statistic",
        interval=f"central {level:.0%} of {n_boot} bootstrap samples of {clusters or 'prompts'}: a spread, not a confidence interval",
        null={"labels permuted": nulls.describe("labels permuted") + (f"; clusters: {clusters}" if clusters else "")},
        seed=seed,
        n_boot=n_boot,
        n_permutations=n_permutations,
    )


def _as_result(
    a: Activations, b: Activations, sides: "_Sides", found: Sequence[Any], how: str, told: str, groups: str | None, level: float, **settings: int
) -> stats.Result:
    """Per layer ``(separations of the labels and of every draw, low, high)`` as a Result; ``how`` and ``told`` end its texts."""
    return stats.result(
        _separation_rows(a.layers, sides, found, level),
        ["layer"],
        what=f"held-out separation of {a.n_prompts} and {b.n_prompts} prompts {how}",
        correction="max-statistic",
        family=["metric"],
        interval=f"{level:.0%}, bootstrap over {groups or 'prompts'} of held-out projections, given the directions",
        null={"labels permuted": nulls.describe("labels permuted") + told + (f"; groups: {groups}" if groups else "")},
        **settings,
    )


@dataclass(frozen=True)
class _Sides:
    """Both sides as one list of rows (a's first), each with its label (+1 a, -1 b) and unit: what is split and drawn
    whole."""

    rows_a: Int[np.ndarray, " prompt"]
    rows_b: Int[np.ndarray, " other"]
    labels: Float[np.ndarray, " row"]
    units: Int[np.ndarray, " row"]
    paired: bool
    grouped: bool

    @property
    def n(self) -> int:
        return len(self.rows_a) if self.paired else len(self.labels)


def _separation_rows(layers: Sequence[int], sides: _Sides, found: Sequence[Any], level: float) -> pd.DataFrame:
    """Rows of all metrics; found has, for each layer, the statistics [draws, metric] (the observed first) and both ends."""
    rows: list[dict[str, Any]] = []
    metrics = ("auc", "cohen_d", "pair_accuracy") if sides.paired else ("auc", "cohen_d")
    for m, metric in enumerate(metrics):
        values = np.stack([statistics[:, m] for statistics, _, _ in found], axis=1)
        q = stats.max_statistic_p(values[0], values[1:], "greater")
        table = zip(layers, values[0], q, found, strict=True)
        own = [
            {"layer": layer, "metric": metric, "estimate": e, "low": low[m], "high": high[m], "q": qi, "n": sides.n}
            for layer, e, qi, (_, low, high) in table
        ]
        rows += nulls.beside(own, {"labels permuted": values[1:]}, "greater", level)
    return pd.DataFrame(rows).assign(n_clusters=len(np.unique(sides.units)))


def _sides(a: Activations, b: Activations, groups: str | None) -> _Sides:
    """Pair the sides by id when they hold the same prompts; otherwise they may share none."""
    ids_a, ids_b = pd.Index(a.facts["id"]), pd.Index(b.facts["id"])
    common = len(ids_a.intersection(ids_b))
    paired = common == len(ids_a) == len(ids_b)
    if common and not paired:
        raise ValueError(
            f"{common} prompts are on both sides, {len(ids_a) + len(ids_b) - 2 * common} on one only: "
            "select(ids=...) the common ones, or give sides that share none"
        )
    rows_a = np.arange(len(ids_a))
    rows_b = ids_b.get_indexer(ids_a) if paired else np.arange(len(ids_b))
    units = np.concatenate([ids_a.to_numpy(), ids_b.to_numpy()[rows_b]])
    if groups is not None:
        missing = [side for side, acts in (("a", a), ("b", b)) if groups not in acts.facts.columns]
        if missing:
            where = " and ".join(missing)
            raise KeyError(f"no column {groups!r} in the facts of side {where}: join it with with_facts(...)")
        units = np.concatenate([a.facts[groups].to_numpy(), b.facts[groups].to_numpy()[rows_b]])
    codes = pd.factorize(units)[0].astype(np.int64)
    labels = np.r_[np.ones(len(rows_a)), -np.ones(len(rows_b))]
    return _Sides(rows_a, rows_b, labels, codes, paired, groups is not None)


def _folds(sides: _Sides, n_splits: int, rng: np.random.Generator) -> Bool[np.ndarray, "split row"]:
    """Which rows are in the first half of each split; whole units, and as many of either side as can be where units are
    single rows."""
    folds = np.zeros((n_splits, len(sides.labels)), dtype=bool)
    for fold in folds:
        for units in _kinds(sides):
            fold |= np.isin(sides.units, rng.permutation(units)[: len(units) // 2])
        counts = [int((sides.labels[half] * sign > 0).sum()) for half in (fold, ~fold) for sign in (1, -1)]
        if min(counts) < 2:
            raise ValueError(
                f"a half holds {min(counts)} prompts of one side; at least 2 of each are needed in both: there are "
                f"{len(sides.rows_a)} and {len(sides.rows_b)} prompts in {len(np.unique(sides.units))} "
                f"{'groups' if sides.grouped else 'prompts'}; give more prompts or split without groups"
            )
    return folds


def _resampled(sides: _Sides, n_boot: int, rng: np.random.Generator) -> list[Int[np.ndarray, " sampled"]]:
    """Rows of bootstrap samples: whole units with replacement, as many as there are; of each side by itself where units are
    single rows."""
    members = [np.flatnonzero(sides.units == unit) for unit in range(int(sides.units.max()) + 1)]
    samples = []
    for _ in range(n_boot):
        drawn = [rng.choice(units, len(units)) for units in _kinds(sides)]
        rows = np.concatenate([members[unit] for units in drawn for unit in units])
        if len(set(sides.labels[rows])) < 2:
            raise ValueError(f"a sample of {len(members)} groups holds prompts of one side only: give more groups, or resample prompts (groups=None)")
        samples.append(rows)
    return samples


def _kinds(sides: _Sides) -> list[Int[np.ndarray, " unit"]]:
    """Units that are drawn apart: those of either side where units are single rows, else all together."""
    apart = not sides.paired and not sides.grouped
    return [sides.units[sides.labels > 0], sides.units[sides.labels < 0]] if apart else [np.unique(sides.units)]


def _swapped(sides: _Sides, n_draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws row"]:
    """Labels under the null: swapped for whole units where sides are paired (all ways but the observed one, where these
    are no more than n_draws), else permuted over rows (inside their group)."""
    if sides.paired:
        n_units = int(sides.units.max()) + 1
        if 2.0**n_units <= n_draws:
            flips = 1.0 - 2.0 * ((np.arange(1, 2**n_units)[:, None] >> np.arange(n_units)) & 1)
        else:
            flips = rng.choice([-1.0, 1.0], size=(n_draws, n_units))
        return sides.labels * flips[:, sides.units]
    within = sides.units if sides.grouped else None
    return sides.labels[stats.permutations(len(sides.labels), n_draws, rng, within)]


def _rows(a: Activations, b: Activations, sides: _Sides, layer: int, method: Method | None = None) -> Float[np.ndarray, "row coordinate"]:
    """Rows of both sides at a layer, float64; in as few coordinates as hold all of them where the method may be given those."""
    x = np.concatenate([a.layer(layer)[sides.rows_a], b.layer(layer)[sides.rows_b]]).astype(np.float64)
    return common_coordinates(x)[0] if method is not None and method.turns else x


def _held_out_projections(
    x: Float[np.ndarray, "row coordinate"], labels: Float[np.ndarray, "draws row"], folds: Bool[np.ndarray, "split row"], fit: Fit
) -> Float[np.ndarray, "draws row"]:
    """Every row's projection on the unit direction fitted, under each draw of labels, on the half it is not in, centred on
    that half; mean over splits."""
    out = np.zeros(labels.shape)
    for fold in folds:
        for half in (fold, ~fold):
            direction = unit_rows(fit(x[half], labels[:, half] > 0))
            out[:, ~half] += direction @ (x[~half] - x[half].mean(axis=0)).T
    return out / len(folds)


def _separations(
    projections: Float[np.ndarray, "draws row"], labels: Float[np.ndarray, "draws row"], paired: bool
) -> Float[np.ndarray, "draws metric"]:
    """AUC, Cohen's d and, when paired, the share of pairs in order, of every draw."""
    in_a = labels > 0
    n_a, n_b = in_a.sum(axis=1), (~in_a).sum(axis=1)
    ranks = scipy_stats.rankdata(projections, axis=1)
    auc = ((ranks * in_a).sum(axis=1) - n_a * (n_a + 1) / 2) / (n_a * n_b)
    mean_a, mean_b = (projections * in_a).sum(axis=1) / n_a, (projections * ~in_a).sum(axis=1) / n_b
    residual = projections - np.where(in_a, mean_a[:, None], mean_b[:, None])
    d = (mean_a - mean_b) / np.sqrt((residual**2).sum(axis=1) / (n_a + n_b - 2))
    if not paired:
        return np.stack([auc, d], axis=1)
    half = projections.shape[1] // 2
    ahead = (projections[:, :half] - projections[:, half:]) * labels[:, :half]
    return np.stack([auc, d, ((ahead > 0) + 0.5 * (ahead == 0)).mean(axis=1)], axis=1)


def _separation_ends(
    projection: Float[np.ndarray, " row"], sides: _Sides, level: float, seed: int
) -> tuple[Float[np.ndarray, " metric"], Float[np.ndarray, " metric"]]:
    """Bootstrap ends of the metrics of `_separations`, units drawn whole; a sample's rows are weighted by how often it
    holds them."""
    n_a = len(sides.rows_a)
    x, y = projection[:n_a], projection[n_a:]
    above = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    draws = []
    for weights in stats.bootstrap_weights(len(projection), 1000, seed, sides.units):
        w_a, w_b = weights[:, :n_a], weights[:, n_a:]
        total_a, total_b = w_a.sum(axis=1), w_b.sum(axis=1)
        mean_a, mean_b = w_a @ x / total_a, w_b @ y / total_b
        squares = w_a @ x**2 - total_a * mean_a**2 + w_b @ y**2 - total_b * mean_b**2
        auc = ((w_a @ above) * w_b).sum(axis=1) / (total_a * total_b)
        values = [auc, (mean_a - mean_b) / np.sqrt(squares / (total_a + total_b - 2))]
        if sides.paired:
            values.append(w_a @ ((x > y) + 0.5 * (x == y)) / total_a)
        draws.append(np.stack(values, axis=1))
    return stats.expanded_interval(np.concatenate(draws), len(np.unique(sides.units)), level)
