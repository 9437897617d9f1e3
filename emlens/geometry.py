"""Subspaces of Activations, per layer: principal angles and overlap; nulls, ceilings and controls.

A subspace is the span of the first k principal components of a set of prompts at a layer: rows centred on their own
mean, float64 (`emlens.subspaces` has the functions on arrays). Overlap is the mean squared cosine of the principal
angles: explained energy, whose chance is exactly k / d_model. What tuning does to the prompts is asked in `emlens.shifts`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import nulls as null_draws
from . import stats
from ._sides import both_places, check_same_layers, layer_rows, split_half_result
from .activations import Activations
from .subspaces import angles, cosines, explained_energy, half_sample_interval, half_subspaces, mean_cos2, one_thread, principal_subspace

_CROSS = "mean_cos2 at ceiling n"


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
    k: int = 8,
    nulls: Sequence[str | Activations] | str | Activations = ("isotropic",),
    n_draws: int = 200,
    ceiling: bool = False,
    level: float = 0.95,
    seed: int = 0,
    n_splits: int = 20,
) -> stats.Result:
    """Overlap of the k-dimensional principal subspaces of two sets of prompts, per layer: "mean_cos2", from 0 to 1.

    nulls     "isotropic": the subspace of b is a uniformly random one (chance k / d_model). An Activations, shown as
              "reference": b overlaps a no more than those prompts do (give unrelated text, several times as many rows
              as b). p is one-sided, greater, corrected over layers within each metric and null (BH).
    ceiling   also rows at equal n, m = min(n_a, n_b) // 2 prompts a side, medians over n_splits: "ceiling a" and
              "ceiling b" (a set with its own other half), "ceiling" (their geometric mean: what two samples of one
              population reach at this n), and "mean_cos2 at ceiling n" (a against b at the same m).
    low/high  from complementary half-samples (`subspaces.half_sample_interval`). Rows are never repeated: a bootstrap
              repeats prompts, and repeated prompts bend a PCA towards themselves. The interval is for the overlap that
              is to be expected at this number of prompts: neither where the overlap of one other sample would fall (it is
              too narrow for that) nor what infinitely many prompts would give. The same
              ids on both sides are halved alike. NaN when a half spans fewer than k directions.

    Errors: ValueError for different layers or widths, unknown nulls, fewer than k directions.
    """
    check_same_layers(a, b)
    references = _named_nulls(nulls)
    u, v = _subspaces(a, k), _subspaces(b, k)
    observed = np.array([mean_cos2(x, y) for x, y in zip(u, v, strict=True)])
    ends = _interval(a, b, k, observed, n_splits, level, seed)
    draws: dict[str, Float[np.ndarray, "draws layer"]] = {}
    told: dict[str, str] = {}
    for name, reference in references.items():
        if reference is None:
            draws[name] = null_draws.isotropic_overlaps(np.stack(v), n_draws, seed)
            told[name] = null_draws.describe("isotropic subspace")
        else:
            draws[name] = _reference_overlaps(u, b, reference, n_draws, seed)
            told[name] = f"{null_draws.describe('reference')}; {reference.n_prompts} reference prompts"
    rows = null_draws.beside(layer_rows(a.layers, "mean_cos2", (observed, *ends), b.n_prompts), draws, "greater", level)
    if ceiling:
        rows += _ceiling_rows(a, b, k, n_splits, seed)
    return stats.result(
        rows,
        ["layer"],
        what=f"overlap of the first {k} principal components ({a.n_prompts} and {b.n_prompts} prompts), {both_places(a, b)}",
        family=["metric", "null"],
        seed=seed,
        k=k,
        n_draws=n_draws,
        interval=f"{level:.0%}, {n_splits} complementary half-samples on the arcsine scale, of the overlap expected at this n (a new sample's "
        "varies more); none for ceilings",
        null=told,
        chance=k / a.d_model,
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
) -> stats.Result:
    """Overlap of a set of prompts with itself: two disjoint random halves, metric "mean_cos2", the median over n_splits
    per layer.

    The questions-against-questions control, and the ceiling of any overlap with this set. Halves hold n_prompts // 2
    prompts, fewer than an estimate made with all of them, so the ceiling is low by that much: give `n` (prompts a half)
    and the estimate as many, so that both are equal (column n is the size of a half). low and high are the central 95 %
    of the splits: a spread, not a confidence interval. null "isotropic", tail greater, as in `overlap`.
    """
    splits = null_draws.halves(a.n_prompts, n_splits, seed, n)
    found = [half_subspaces(a.layer(layer), k, splits) for layer in a.layers]
    values = np.array([[mean_cos2(one, other) for one, other in layer] for layer in found]).T
    draws = null_draws.isotropic_overlaps(np.stack(_subspaces(a, k)), n_draws, seed)
    half = len(splits[0][0])
    return split_half_result(
        a,
        "mean_cos2",
        values,
        half,
        draws,
        "greater",
        level,
        what=f"overlap of random halves of one set ({half} prompts a half), first {k} principal components, {a.place}",
        seed=seed,
        k=k,
        null={"isotropic": null_draws.describe("isotropic subspace")},
        chance=k / a.d_model,
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


def _named_nulls(nulls: Sequence[str | Activations] | str | Activations) -> dict[str, Activations | None]:
    """Null names in order, with their reference set where they have one."""
    named: dict[str, Activations | None] = {}
    for null in [nulls] if isinstance(nulls, (str, Activations)) else nulls:
        if isinstance(null, Activations):
            number = sum(name.startswith("reference") for name in named) + 1
            named["reference" if number == 1 else f"reference {number}"] = null
        elif null == "isotropic":
            named[null] = None
        else:
            raise ValueError(f"unknown null {null!r}; choose 'isotropic' or give Activations of reference prompts")
    return named


def _subspaces(acts: Activations, k: int) -> list[Float[np.ndarray, "d_model k"]]:
    """The principal subspace at every layer; an error names the layer."""
    found = []
    for layer in acts.layers:
        try:
            found.append(principal_subspace(acts.layer(layer), k))
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
    return found


def _half_bases(
    a: Activations, b: Activations, k: int, n_splits: int, seed: int, n: int | None = None
) -> Iterator[tuple[Float[np.ndarray, "split two d_model k"], Float[np.ndarray, "split two d_model k"]]]:
    """Per layer, the subspaces of both halves of every split, on both sides; the same prompts are split alike."""
    rng = np.random.default_rng(seed)
    splits_a = null_draws.halves(a.n_prompts, n_splits, rng, n)
    if a.n_prompts == b.n_prompts and set(a.facts["id"]) == set(b.facts["id"]):
        b, splits_b = b.select(ids=a.facts["id"]), splits_a
    else:
        splits_b = null_draws.halves(b.n_prompts, n_splits, rng, n)
    for layer in a.layers:
        yield half_subspaces(a.layer(layer), k, splits_a), half_subspaces(b.layer(layer), k, splits_b)


def _interval(
    a: Activations,
    b: Activations,
    k: int,
    observed: Float[np.ndarray, " layer"],
    n_splits: int,
    level: float,
    seed: int,
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Half-sample interval of an overlap at every layer; NaN when a half spans fewer than k directions."""
    ends = np.full((2, len(observed)), np.nan)
    if min(a.n_prompts, b.n_prompts) // 2 > k and n_splits > 1:
        for i, (u, v) in enumerate(_half_bases(a, b, k, n_splits, seed)):
            halves = [[mean_cos2(u[s, h], v[s, h]) for h in (0, 1)] for s in range(n_splits)]
            ends[:, i] = half_sample_interval(observed[i], np.array(halves), level)
    return ends[0], ends[1]


def _ceiling_rows(a: Activations, b: Activations, k: int, n_splits: int, seed: int) -> list[dict[str, Any]]:
    """Rows of both ceilings, their geometric mean, and a against b, at one number of prompts a side."""
    size = min(a.n_prompts, b.n_prompts) // 2
    rows = []
    for layer, (u, v) in zip(a.layers, _half_bases(a, b, k, n_splits, seed, size), strict=True):
        own_a, own_b = (np.median([mean_cos2(one, other) for one, other in side]) for side in (u, v))
        cross = np.median([(mean_cos2(x[0], y[1]) + mean_cos2(x[1], y[0])) / 2 for x, y in zip(u, v, strict=True)])
        found = {"ceiling": np.sqrt(own_a * own_b), "ceiling a": own_a, "ceiling b": own_b, _CROSS: cross}
        rows += [{"layer": layer, "metric": name, "estimate": value, "n": size} for name, value in found.items()]
    return rows


def _reference_overlaps(
    bases: list[Float[np.ndarray, "d_model k"]], b: Activations, reference: Activations, n_draws: int, seed: int
) -> Float[np.ndarray, "draws layer"]:
    """Overlap of a's subspaces with those of n_b prompts drawn from the reference and b together."""
    check_same_layers(b, reference)
    shared = {prompt: row for row, prompt in enumerate(b.facts["id"])}
    fresh = [
        row
        for row, prompt in enumerate(reference.facts["id"])
        if prompt not in shared or not np.array_equal(reference.values[row], b.values[shared[prompt]])
    ]
    if not fresh:
        raise ValueError("the reference holds no prompt that is not in b: give unrelated prompts, best several times as many as b")
    rows = list(null_draws.subsamples(b.n_prompts + len(fresh), b.n_prompts, n_draws, seed))
    pools = (np.concatenate([b.layer(layer), reference.layer(layer)[fresh]]) for layer in b.layers)
    found = [null_draws.reference_overlaps(u, pool, rows) for u, pool in zip(bases, pools, strict=True)]
    return np.stack(found, axis=1)
