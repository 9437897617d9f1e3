"""Subspaces of Activations, per layer: principal angles and overlap; nulls, ceilings and controls.

A subspace is the span of the first k principal components of a set of prompts at a layer: rows centred on their own
mean, float64 (`emlens.subspaces` has the functions on arrays). Overlap is the mean squared cosine of the principal
angles unless another of `emlens.measures` is named: explained energy, whose chance is exactly k / d_model. What tuning
does to the prompts is asked in `emlens.shifts`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import nulls as null_draws
from . import stats
from ._draws import Clusters, Sides, groups_of, nulls_asked
from ._sides import both_places, check_same_layers, layer_rows, split_half_result
from .activations import Activations
from .measures import measure_named
from .subspaces import Sample, angles, cosines, explained_energy, half_sample_interval, principal_subspace
from .threads import one_thread


@one_thread
def principal_angles(a: Activations, b: Activations, k: int = 8) -> pd.DataFrame:
    """Principal angles between the first k principal components of two sets of prompts.

    Returns a frame layer, index (0 to k-1), angle (radians, ascending): exactly k rows a layer, a description without a
    null (see `overlap`). Errors: ValueError for different layers or widths, or fewer than k directions.
    """
    check_same_layers(a, b)
    found = [angles(u, v) for u, v in zip(_subspaces(a, k), _subspaces(b, k), strict=True)]
    return pd.DataFrame(
        {
            "layer": np.repeat(np.array(a.layers, dtype=np.int64), k),
            "index": np.tile(np.arange(k), len(a.layers)),
            "angle": np.concatenate(found),
        }
    )


@one_thread
def overlap(
    a: Activations,
    b: Activations,
    k: int | tuple[int, int] = 8,
    nulls: Sequence[str | Activations] | str | Activations = ("isotropic",),
    n_draws: int = 200,
    ceiling: bool = False,
    level: float = 0.95,
    seed: int = 0,
    n_splits: int = 20,
    measure: str = "mean_cos2",
    variance: float | None = None,
    reference: Activations | None = None,
    clusters: Clusters = None,
) -> stats.Result:
    """Overlap of two sets of prompts, per layer: by default of their k-dimensional principal subspaces, "mean_cos2", from 0
    (nothing in common) to 1.

    measure   a name of `emlens.measures.MEASURES`: of two subspaces ("mean_cos2", "mean_cos", "largest_cos", and the distances
              "grassmann", "chordal", "procrustes"); by prompt, the mean over b of what a's subspace holds of it
              ("explained_energy", "norm_fraction", the paper's); "linear_cka" of the same prompts on both sides (k says nothing).
    k         of both sets, or (of a, of b). variance: in place of k, at every layer the smallest k with which both sets explain
              that share of their variance (a, for a measure by prompt); the same k for both.
    nulls     any of these (`emlens.nulls.DESCRIPTIONS` says hypothesis, generator and tail of each, and so do the attrs). p is
              one-sided, of the tail on which sets have more in common (of "labels": less), corrected over layers within each
              metric and null (BH).
              "isotropic": one subspace is uniformly random (chance k / d_model); almost anything rejects it.
              "covariance": b is a fresh sample of the normal population of a separate set, reference=, of independent prompts, at
              least twice as many as b (else a UserWarning). Prefer the next null, which assumes nothing, for prompts that are
              clustered or heavy-tailed: there this one rejects too often (0.09 to 0.13 at .05).
              an Activations, shown as "reference": b overlaps a no more than those prompts do (give unrelated text, several times
              as many rows as b).
              "labels": a and b are exchangeable, low tail: a test of difference. Without `clusters`, prompts are taken as independent
              and different topics alone reject: two samples of one population, 8 topics of 12 prompts each, in 0.12, 0.36 and 0.73
              of cases at .05 where 0.17, 0.3 and 0.5 of the variance lie between topics; with `clusters`, in 0.06, 0.06 and 0.03.
              "questions": b against itself, at equal n (a control: the band of its split halves stands beside
              "... at ceiling n", without p).
              "pairs": for linear CKA, which prompt goes with which.
              How often each of them rejects where it should and where it should not: `emlens.calibration.rejection_rates`.
    ceiling   also rows at equal n, m = min(n_a, n_b) // 2 prompts a side, medians over n_splits: "ceiling a" and
              "ceiling b" (a set with its own other half), "ceiling" (their geometric mean: what two samples of one
              population reach at this n), and "mean_cos2 at ceiling n" (a against b at the same m).
    low/high  from complementary half-samples (`subspaces.half_sample_interval`). Rows are never repeated: a bootstrap
              repeats prompts, and repeated prompts bend a PCA towards themselves. The interval is for the overlap that
              is to be expected at this number of prompts (and of clusters): neither where the overlap of one other sample
              would fall (it is too narrow for that) nor what infinitely many prompts would give. The same ids on both
              sides are halved alike. NaN when a half spans fewer than k directions. Without `clusters`, prompts are
              taken as independent: where they come in topics the interval is too narrow (two samples as under "labels": a nominal
              95 % covered 0.81 to 0.93 without, 0.89 to 0.95 with `clusters`, t of as many degrees of freedom as topics less one).
    clusters  a column of the facts that says which prompts go together (category), or one of a and one of b, None where each
              prompt is its own. Halves are then of whole groups (those of the ceilings too: m is what the smallest holds), and
              "labels" deals out whole groups, sizes kept as near as they can be; groups that both sides hold are kept, and
              prompts dealt out inside them. Few groups have few arrangements: the attrs say how many, and p falls little below
              twice one of so many (4 and 4 groups: 70; 3 and 3: 20, too few for .05). The other nulls take no account of groups.

    Errors: ValueError for different layers or widths, unknown measures and nulls, nulls that say nothing about the measure, fewer
    than k directions, one cluster only, "labels" with clusters of one side; KeyError for an unknown column.
    """
    sides = Sides.of(a, b, k, variance, measure, clusters)
    asked = nulls_asked(nulls, sides, reference)
    observed = sides.values()
    own = layer_rows(a.layers, measure, (observed, *_interval(sides, observed, n_splits, level, seed)), b.n_prompts)
    rows = [] if set(asked) - {"questions"} else own
    for name, null in asked.items():
        if name != "questions":
            rows += null_draws.beside(own, {name: null.draws(sides, n_draws, seed)}, null.tail(sides.measure), level)
    if ceiling or "questions" in asked:
        at_ceiling, questions = _at_equal_n(sides, n_splits, level, seed)
        rows += (at_ceiling if ceiling else []) + (questions if "questions" in asked else [])
    table = pd.DataFrame(rows)
    if variance is not None:
        table["k"] = table["layer"].map(dict(zip(a.layers, (size for size, _ in sides.sizes), strict=True)))
    chances = [sides.measure.chance(*size, a.d_model) for size in sides.sizes]
    return stats.result(
        table,
        ["layer"],
        what=f"{_what(sides, k, variance)} ({a.n_prompts} and {b.n_prompts} prompts), {both_places(a, b)}",
        family=["metric", "null"],
        seed=seed,
        measure=measure,
        k=k if variance is None else [size for size, _ in sides.sizes],
        n_draws=n_draws,
        interval=f"{level:.0%}, {n_splits} complementary half-samples on the arcsine scale, of the overlap expected at this n (a new sample's "
        f"varies more), {sides.told}; none for ceilings",
        null={name: null.told(sides) for name, null in asked.items()},
        chance=chances[0] if variance is None else chances,
        **({"ceiling": null_draws.describe("ceiling")} if ceiling else {}),
    )


@one_thread
def split_half_overlap(
    a: Activations,
    k: int = 8,
    n_splits: int = 20,
    seed: int = 0,
    n: int | None = None,
    n_draws: int = 200,
    level: float = 0.95,
    measure: str = "mean_cos2",
    clusters: str | None = None,
) -> stats.Result:
    """Overlap of a set of prompts with itself: two disjoint random halves, metric "mean_cos2" (or another `measure` of two
    subspaces), the median over n_splits per layer.

    The questions-against-questions control, and the ceiling of any overlap with this set. Halves hold n_prompts // 2
    prompts, fewer than an estimate made with all of them, so the ceiling is low by that much: give `n` (prompts a half)
    and the estimate as many, so that both are equal (column n is the size of a half). low and high are the central 95 %
    of the splits: a spread, not a confidence interval. null "isotropic", tail as in `overlap`. clusters: a column of the facts
    whose groups are kept whole, so that halves are of different topics (of as many prompts as the smallest half, `n` at most).
    """
    how = measure_named(measure)
    draws = null_draws.isotropic_overlaps(_subspaces(a, k), n_draws, seed, measure)
    splits = null_draws.halves(a.n_prompts, n_splits, seed, n, groups_of(a, clusters))
    samples = (Sample(a.layer(layer), k) for layer in a.layers)
    values = np.array([[how.of(sample.part(one), sample.part(other)) for one, other in splits] for sample in samples]).T
    half = len(splits[0][0])
    return split_half_result(
        a,
        measure,
        values,
        half,
        draws,
        how.closer,
        level,
        what=f"overlap of random halves{f' of whole {clusters}' if clusters else ''} of one set ({half} prompts a half), "
        f"first {k} principal components, {a.place}",
        seed=seed,
        k=k,
        null={"isotropic": null_draws.describe("isotropic subspace", how.closer)},
        chance=how.chance(k, k, a.d_model),
    )


@one_thread
def overlap_by_prompt(train: Activations, acts: Activations, k: int = 8) -> pd.DataFrame:
    """How much of each prompt lies in the training subspace; one row per prompt and layer.

    Columns id, layer; explained_energy = ||P(x - mu)||^2 / ||x - mu||^2 with P, mu the k-component PCA of `train`
    (chance k / d_model); norm_fraction, its root (the paper's projection fraction); cosine_to_mean = cos(x, mean
    training prompt), uncentred: the one-line baseline.
    """
    check_same_layers(train, acts)
    parts = []
    for layer, basis in zip(train.layers, _subspaces(train, k), strict=True):
        x, centre = acts.layer(layer), train.layer(layer).mean(axis=0, dtype=np.float64)
        energy = explained_energy(x, basis, centre)
        columns = {"explained_energy": energy, "norm_fraction": np.sqrt(energy), "cosine_to_mean": cosines(x, centre)}
        parts.append(pd.DataFrame({"id": acts.facts["id"].to_numpy(), "layer": layer, **columns}))
    return pd.concat(parts, ignore_index=True)


# ---- inside


def _subspaces(acts: Activations, k: int) -> list[Float[np.ndarray, "d_model k"]]:
    """The principal subspace at every layer; an error names the layer."""
    found = []
    for layer in acts.layers:
        try:
            found.append(principal_subspace(acts.layer(layer), k))
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
    return found


def _interval(
    sides: Sides, observed: Float[np.ndarray, " layer"], n_splits: int, level: float, seed: int
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Half-sample interval of an overlap at every layer; NaN when a half spans fewer than k directions."""
    ends, how = np.full((2, len(observed)), np.nan), sides.measure
    if n_splits < 2:
        return ends[0], ends[1]
    splits = sides.splits(n_splits, seed)
    spans, degrees = sides.halves_span(splits), sides.degrees(n_splits)
    if any(spans):
        for i, (a, b) in enumerate(sides.halves(splits)):
            if spans[i]:
                m = min(sides.sizes[i])
                halves = np.array([[how.of(x, y) for x, y in zip(*split, strict=True)] for split in zip(a, b, strict=True)])
                ends[:, i] = how.unshare(half_sample_interval(float(how.share(observed[i], m)), how.share(halves, m), level, degrees), m)
    return ends[0], ends[1]


def _at_equal_n(sides: Sides, n_splits: int, level: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows at one number of prompts a side: both ceilings, their geometric mean and a against b; and a against b beside the
    questions-against-questions control."""
    if sides.measure.kind == "pairs":
        raise ValueError(f"two halves of a set hold different prompts, and {sides.measure.name} pairs prompts: it has no ceiling and no such control")
    splits = sides.splits(n_splits, seed, min(sides.a.n_prompts, sides.b.n_prompts) // 2)
    size, of, cross = len(splits[0][0][0]), sides.measure.of, f"{sides.measure.name} at ceiling n"
    rows, questions = [], []
    for layer, (a, b) in zip(sides.a.layers, sides.halves(splits), strict=True):
        own_a, own_b = (np.array([of(one, other) for one, other in side]) for side in (a, b))
        across = np.median([(of(x[0], y[1]) + of(x[1], y[0])) / 2 for x, y in zip(a, b, strict=True)])
        ceilings = {"ceiling a": np.median(own_a), "ceiling b": np.median(own_b)}
        found = {"ceiling": np.sqrt(np.prod(list(ceilings.values()))), **ceilings, cross: across}
        rows += [{"layer": layer, "metric": name, "estimate": value, "n": size} for name, value in found.items()]
        low, high = stats.null_band(own_b, level)
        questions.append({"layer": layer, "metric": cross, "estimate": across, "null": "questions", "null_low": low, "null_high": high, "n": size})
    return rows, questions


def _what(sides: Sides, k: int | tuple[int, int], variance: float | None) -> str:
    """What an overlap is of, for the attrs."""
    if sides.measure.kind == "pairs":
        return sides.measure.name
    many = f"the first {k} principal components" if variance is None else f"the principal components that explain {variance:.0%} of the variance"
    return f"overlap of {many}" if sides.measure.name == "mean_cos2" else f"{sides.measure.name} of {many}"
