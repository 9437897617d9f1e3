"""Shifts (after less before) of Activations, per layer: how long, how alike, and whether nearness to the training prompts says how alike.

Similarity is the mean cosine of each prompt's shift with the mean shift of the training prompts; nulls and controls
stand beside it as in `emlens.geometry`, which asks the same of the prompts' subspaces.

Where a shift is needed, give `after - before`: what a model recorded is refused. `clusters=` names the column whose groups are
drawn whole in a bootstrap (`groups=`, elsewhere, the one whose groups are held out whole).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import nulls as null_draws
from . import stats
from ._sides import both_places, check_same_layers, check_shifts, facts_column, layer_rows, split_half_result
from .activations import Activations
from .by_prompt import correlation_rows
from .geometry import overlap_by_prompt
from .subspaces import cosines, row_cosines, unit_rows
from .threads import one_thread


def shift_norms(shift: Activations, before: Activations) -> pd.DataFrame:
    """Length of shifts per layer: norm (median over prompts, L2) and relative (to the median length of `before`); a
    description, no null.

    Where the weights had 16 bits, also noise: the length that rounding alone gives a shift (rms over prompts), its floor.
    For the floor that another seed of the same tuning sets, see `shift_agreement`.
    """
    check_shifts(shift=shift)
    check_same_layers(shift, before)
    norm, residual = (np.median(np.linalg.norm(x.values.astype(np.float64), axis=2), axis=0) for x in (shift, before))
    table = pd.DataFrame({"layer": shift.layers, "norm": norm, "relative": norm / residual})
    floor = shift.meta.get("noise_floor")
    return table if not floor else table.assign(noise=[floor[layer] * np.sqrt(shift.d_model) for layer in shift.layers])


@one_thread
def mean_share(
    train_shift: Activations, shift: Activations | None = None, clusters: str | None = None, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Share of shifts' energy that the mean training shift alone explains, per layer: 1 - sum ||d - nu||^2 / sum ||d||^2, the k = 0
    baseline that every reconstruction from components must beat.

    shift   shifts of other prompts; below 0 where no shift at all would be a better guess. None: of the training prompts
            themselves, their spread with divisor n - 1: of pure noise the mean of n explains 1/n, and this says 0.

    Returns a frame layer, metric "explained by the mean", estimate, low, high (bootstrap over prompts, or over the groups of the
    column `clusters`, given the mean), n; a description without a null. Errors: ValueError for different
    layers or widths, or one training prompt; KeyError for an unknown column.
    """
    of = train_shift if shift is None else shift
    check_shifts(train_shift=train_shift, shift=of)
    check_same_layers(train_shift, of)
    if train_shift.n_prompts < 2:
        raise ValueError("a mean over one training prompt says nothing of others: give two at least")
    n, residuals, lengths = train_shift.n_prompts, [], []
    for layer in of.layers:
        d, mean = of.layer(layer).astype(np.float64), train_shift.layer(layer).mean(axis=0, dtype=np.float64)
        residuals.append(((d - mean) ** 2).sum(axis=1) * (n / (n - 1) if shift is None else 1))
        lengths.append((d**2).sum(axis=1))
    data = np.stack([*residuals, *lengths], axis=1)

    def share(rows: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, " layer"]:
        left, whole = np.split(rows.sum(axis=0), 2)
        return 1 - np.divide(left, whole, out=np.ones(len(whole)), where=whole > 0)

    low, high = stats.bootstrap_interval(data, share, facts_column(of, clusters), level, seed=seed)
    return pd.DataFrame(layer_rows(of.layers, "explained by the mean", (share(data), low, high), of.n_prompts))


def shift_cosines(shifts: Mapping[str, Activations]) -> pd.DataFrame:
    """How alike several tunings shift the same prompts: for every two of them, per layer, cosine_of_means (of their mean shifts)
    and mean_cosine (of their shifts of one prompt, the mean over prompts).

    Returns a frame layer, one, other, cosine_of_means, mean_cosine, n (prompts, matched by id), each two names once; a description
    without a null (`shift_agreement` gives an interval, two seeds of one tuning the ceiling, `similarity` a null). Errors: ValueError
    for fewer than two, different layers, widths or prompts.
    """
    if len(shifts) < 2:
        raise ValueError(f"two named shifts at least are needed to compare; got {list(shifts)}")
    check_shifts(**shifts)
    first = next(iter(shifts.values()))
    known = {name: _in_order(first, shift) for name, shift in shifts.items()}
    means = {name: shift.values.mean(axis=0, dtype=np.float64) for name, shift in known.items()}
    parts = []
    for one, other in combinations(known, 2):
        alike = {"cosine_of_means": row_cosines(means[one], means[other]), "mean_cosine": _cosines(known[one], known[other]).mean(axis=0)}
        parts.append(pd.DataFrame({"layer": first.layers, "one": one, "other": other, **alike, "n": first.n_prompts}))
    return pd.concat(parts, ignore_index=True)


def shift_agreement(
    pairs: Sequence[tuple[Activations, Activations]], clusters: str | None = None, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How alike two tunings shift one prompt: the cosine of their shifts, mean over prompts and over the pairs of tunings
    given, per layer.

    Two seeds of one tuning give the noise floor of a shift: shifts that agree as well as that are not told apart.

    pairs     shifts of two tunings each, of the same prompts (matched by id), all of one set of prompts.
    clusters  a column of the first shift's facts, drawn whole in the bootstrap.

    Returns a frame layer, metric "mean cosine", estimate, low, high (bootstrap over prompts, given the tunings), n
    (prompts), pairs; a description without a null. Errors: ValueError for no pair, different layers, widths or prompts;
    KeyError for an unknown column.
    """
    if not pairs:
        raise ValueError("no pair of shifts was given; at least one is needed")
    for one, other in pairs:
        check_shifts(one=one, other=other)
    first = pairs[0][0]
    values = np.mean([_cosines(*(_in_order(first, shift) for shift in pair)) for pair in pairs], axis=0)
    low, high = stats.bootstrap_interval(values, clusters=facts_column(first, clusters), level=level, n_boot=n_boot, seed=seed)
    table = pd.DataFrame(layer_rows(first.layers, "mean cosine", (values.mean(axis=0), low, high), first.n_prompts))
    n_clusters = first.n_prompts if clusters is None else first.facts[clusters].nunique()
    return table.assign(pairs=len(pairs), n_clusters=n_clusters)


def similarity(
    train_shift: Activations,
    shift: Activations,
    nulls: Sequence[str] | str = ("isotropic",),
    n_draws: int = 1000,
    seed: int = 0,
    clusters: str | None = None,
    level: float = 0.95,
) -> stats.Result:
    """Mean over prompts of cos(shift of the prompt, mean training shift), per layer: metric "mean cosine".

    low/high  bootstrap over prompts, over whole categories when `clusters` names a column of the facts; given the mean
              training shift.
    nulls     "isotropic": a random direction in place of the mean training shift, the same one for all prompts; two-
              sided (an opposite shift is a finding too).
    Errors: ValueError for a recording in the place of a shift, different layers or widths, or unknown nulls; KeyError for an
    unknown column.
    """
    check_shifts(train_shift=train_shift, shift=shift)
    check_same_layers(train_shift, shift)
    names = [nulls] if isinstance(nulls, str) else list(nulls)
    if set(names) - {"isotropic"}:
        raise ValueError(f"similarity knows the null 'isotropic'; got {names}")
    means = [train_shift.layer(i).mean(axis=0, dtype=np.float64) for i in shift.layers]
    values = np.stack([cosines(shift.layer(i), mean) for i, mean in zip(shift.layers, means, strict=True)], axis=1)
    ends = stats.bootstrap_interval(values, clusters=facts_column(shift, clusters), level=level, seed=seed)
    draws = {name: _isotropic_cosines(shift, n_draws, seed) for name in names}
    rows = layer_rows(shift.layers, "mean cosine", (values.mean(axis=0), *ends), shift.n_prompts)
    n_clusters = shift.n_prompts if clusters is None else shift.facts[clusters].nunique()
    return stats.result(
        pd.DataFrame(null_draws.beside(rows, draws, "two-sided", level)).assign(n_clusters=n_clusters),
        ["layer"],
        what=f"mean cosine of {shift.n_prompts} shifts with the mean of {train_shift.n_prompts} training shifts, " + both_places(train_shift, shift),
        family=["metric", "null"],
        seed=seed,
        n_draws=n_draws,
        interval=f"{level:.0%}, bootstrap over {clusters or 'prompts'}, given the mean training shift",
        null={name: null_draws.describe("isotropic direction") for name in names},
    )


def similarity_contrast(
    train_shift: Activations,
    other_train_shift: Activations,
    shift: Activations,
    clusters: str | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> stats.Result:
    """Do prompts shift more like the training prompts of their own tuning than like those of another one?

    Per layer: metrics "own" and "other", the mean over prompts of the cosine of the prompt's shift with the mean shift of
    `train_shift` and of `other_train_shift`; "own minus other", the mean of the difference, paired over prompts. What all
    tunings of a model share is in both and falls out.

    low/high  bootstrap over prompts, over whole categories when `clusters` names a column of the facts; given both means.
    An estimate with an interval, no test: the null of no difference would need many tunings, not many prompts.
    Errors: ValueError for different layers or widths; KeyError for an unknown column.
    """
    check_shifts(train_shift=train_shift, other_train_shift=other_train_shift, shift=shift)
    groups = facts_column(shift, clusters)
    cosine = []
    for side in (train_shift, other_train_shift):
        check_same_layers(side, shift)
        means = [side.layer(i).mean(axis=0, dtype=np.float64) for i in shift.layers]
        cosine.append(np.stack([cosines(shift.layer(i), mean) for i, mean in zip(shift.layers, means, strict=True)], axis=1))
    values = {"own": cosine[0], "other": cosine[1], "own minus other": cosine[0] - cosine[1]}
    rows = []
    for metric, each in values.items():
        ends = stats.bootstrap_interval(each, clusters=groups, level=level, seed=seed)
        rows += layer_rows(shift.layers, metric, (each.mean(axis=0), *ends), shift.n_prompts)
    n_clusters = shift.n_prompts if groups is None else len(set(groups))
    return stats.result(
        pd.DataFrame(rows).assign(n_clusters=n_clusters),
        ["layer"],
        what=f"mean cosine of {shift.n_prompts} shifts with the mean training shift of their own and of another tuning, {shift.place}",
        correction="none",
        seed=seed,
        interval=f"{level:.0%}, bootstrap over {clusters or 'prompts'}, paired over prompts, given the mean training shifts",
    )


def split_half_similarity(
    shift: Activations,
    n_splits: int = 20,
    seed: int = 0,
    n: int | None = None,
    n_draws: int = 1000,
    level: float = 0.95,
) -> stats.Result:
    """Similarity of a set of shifts with itself: mean over one random half of the cosine with the mean shift of the
    other; the median over n_splits.

    The control beside `similarity`. Halves hold n_prompts // 2 prompts, or `n` each, to equal an estimate's n. low and
    high are the central 95 % of the splits: a spread, not a confidence interval. null "isotropic", two-sided, as in
    `similarity`.
    """
    check_shifts(shift=shift)
    splits = null_draws.halves(shift.n_prompts, n_splits, seed, n)
    values = np.empty((len(splits), len(shift.layers)))
    for column, layer in enumerate(shift.layers):
        x = shift.layer(layer).astype(np.float64)
        values[:, column] = [cosines(x[one], x[other].mean(axis=0)).mean() for one, other in splits]
    half = len(splits[0][0])
    return split_half_result(
        shift,
        "mean cosine",
        values,
        half,
        _isotropic_cosines(shift, n_draws, seed),
        "two-sided",
        level,
        what=f"mean cosine of the shifts of a random half with the mean of the other ({half} a half), {shift.place}",
        seed=seed,
        null={"isotropic": null_draws.describe("isotropic direction")},
    )


def similarity_by_prompt(train_shift: Activations, shift: Activations) -> pd.DataFrame:
    """Each prompt's shift against the mean training shift: columns id, layer, cosine, scalar_projection (onto its unit
    vector; residual stream units)."""
    check_shifts(train_shift=train_shift, shift=shift)
    check_same_layers(train_shift, shift)
    parts = []
    for layer in shift.layers:
        x, mean = shift.layer(layer).astype(np.float64), train_shift.layer(layer).mean(axis=0, dtype=np.float64)
        columns = {"cosine": cosines(x, mean), "scalar_projection": x @ unit_rows(mean[None])[0]}
        parts.append(pd.DataFrame({"id": shift.facts["id"].to_numpy(), "layer": layer, **columns}))
    return pd.concat(parts, ignore_index=True)


def overlap_similarity(
    train: Activations,
    acts: Activations,
    train_shift: Activations,
    shift: Activations,
    k: int = 8,
    clusters: str | None = None,
    n_permutations: int = 2000,
    seed: int = 0,
    measure: str = "explained_energy",
    within: str | None = None,
    level: float = 0.95,
) -> stats.Result:
    """Over prompts: does a prompt that lies more in the training subspace shift more like the training prompts?

    Per layer and within one setting (one tuning, one set of questions). Metrics "pearson" and "spearman": correlation
    of `measure` before tuning with the cosine of the shift to the mean training shift; "pearson baseline": the cosine
    to the mean training prompt in place of the overlap. Prompts of `acts` and `shift` are matched by id.

    measure   "explained_energy", or its root "norm_fraction" (the paper's).
    p, band   prompts permuted, two-sided; inside the groups of the column `within` when given (topics, say).
    low/high  bootstrap over prompts, or over the groups of the column `clusters`.

    The estimate and its interval are of the correlation over all prompts; with `within`, p asks for more: a correlation that
    groups alone do not make. All rows share the training mean and subspace: the statement is about these prompts and this tuning, and is not to
    be pooled over settings. Errors: ValueError for different layers or prompts; KeyError for an unknown column.
    """
    if measure not in ("explained_energy", "norm_fraction"):
        raise ValueError(f"unknown measure {measure!r}; choose 'explained_energy' or 'norm_fraction'")
    check_same_layers(acts, shift)
    table = overlap_by_prompt(train, acts, k).merge(similarity_by_prompt(train_shift, shift), on=["id", "layer"], validate="one_to_one")
    if len(table) != acts.n_prompts * len(acts.layers) or acts.n_prompts != shift.n_prompts:
        raise ValueError(
            f"acts holds {acts.n_prompts} prompts, shift {shift.n_prompts}, and {len(table) // len(acts.layers)} ids "
            "are in both: record the same prompts"
        )
    groups, strata = facts_column(acts, clusters), facts_column(acts, within)
    rows = []
    for layer, part in table.groupby("layer", sort=False):
        found = correlation_rows(part, measure, "cosine", "cosine_to_mean", groups, strata, n_permutations, seed, level)
        rows += [{"layer": layer, **row} for row in found]
    inside = f", inside {within}" if within else ""
    return stats.result(
        rows,
        ["layer"],
        what=f"correlation over prompts of {measure} (k={k}) with shift similarity, {acts.place}",
        family=["metric", "null"],
        seed=seed,
        k=k,
        n_permutations=n_permutations,
        interval=f"{level:.0%}, bootstrap over {clusters or 'prompts'}, of the correlation over all prompts",
        null={"prompts permuted": null_draws.describe("prompts permuted") + inside},
    )


# ---- inside


def _in_order(first: Activations, shift: Activations) -> Activations:
    """A shift with its prompts in the order of the first one's; ValueError unless they are the same prompts at the same layers."""
    check_same_layers(first, shift)
    strange = set(first.ids) ^ set(shift.ids)
    if strange:
        raise ValueError(f"{len(strange)} prompts are on one side only, e.g. {min(strange)!r}: give shifts of the same prompts")
    return shift.select(ids=first.ids)


def _cosines(x: Activations, y: Activations) -> Float[np.ndarray, "prompt layer"]:
    """Cosine of every prompt's shift in x with its shift in y."""
    return np.stack([row_cosines(x.layer(layer), y.layer(layer)) for layer in x.layers], axis=1)


def _isotropic_cosines(shift: Activations, n_draws: int, seed: int) -> Float[np.ndarray, "draws layer"]:
    """Mean cosine of the shifts with random directions."""
    mean_unit = np.stack([unit_rows(shift.layer(layer)).mean(axis=0) for layer in shift.layers])
    return null_draws.isotropic_similarities(mean_unit, n_draws, seed)
