"""Intervals for new rows of new groups, and how far such rows lie from those a ridge was fitted on. Arrays in, arrays out.

CV+ (Barber, Candes, Ramdas and Tibshirani 2021, arXiv 1905.02928) over whole groups, every group of equal weight however many
rows it has, as in the hierarchical jackknife+ (Lee, Barber and Willett 2023, arXiv 2306.06342).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from .ridge import scale, spectrum

_SHRUNK = 0.01  # axes whose eigenvalue is below this share of the penalty count as shrunk to nothing

Matrix: TypeAlias = Float[np.ndarray, "prompt feature"]


class Conformal(NamedTuple):
    """The fits without each fold, and how far off they were for its rows: what an interval is made of."""

    weights: Float[np.ndarray, "fold feature"]
    intercepts: Float[np.ndarray, " fold"]
    residuals: Float[np.ndarray, " prompt"]
    fold: Int[np.ndarray, " prompt"]
    masses: Float[np.ndarray, " prompt"]


class Seen(NamedTuple):
    """Where the training rows lie, and the largest distance that a row of a held-out group had from the other groups."""

    mean: Float[np.ndarray, " feature"]
    slope: Float[np.ndarray, " feature"]
    axes: Float[np.ndarray, "feature k"]
    eigenvalues: Float[np.ndarray, " k"]
    farthest: float = 1.0


def _scaled(
    x: Matrix, train: Int[np.ndarray, " train"], scaling: str
) -> tuple[Float[np.ndarray, "train feature"], Float[np.ndarray, " feature"], Float[np.ndarray, " feature"]]:
    """The training rows as `ridge.scale` scales them, their mean, and what it multiplies every feature by."""
    rows = x[train]
    mean = rows.mean(axis=0)
    z = scale(np.vstack([rows, mean, mean + 1]), np.arange(len(rows)), scaling)
    return z[:-2], mean, z[-1] - z[-2]


def line(
    x: Matrix, y: Float[np.ndarray, " prompt"], train: Int[np.ndarray, " train"], penalty: float, scaling: str = "each"
) -> tuple[Float[np.ndarray, " feature"], float]:
    """Weights and intercept, in the units of the features, of the ridge on the training rows scaled by themselves."""
    z, mean, slope = _scaled(x, train, scaling)
    found = spectrum(x, train, train[:0], scaling)
    level = y[train].mean()
    weights = slope * (z.T @ (found.basis @ (found.basis.T @ (y[train] - level) / (found.eigenvalues + penalty))))
    return weights, float(level - mean @ weights)


def conformal(
    x: Matrix,
    y: Float[np.ndarray, " prompt"],
    units: Int[np.ndarray, " prompt"],
    cuts: Sequence[tuple[np.ndarray, np.ndarray]],
    penalties: Sequence[float],
    spare: bool,
    scaling: str = "each",
) -> Conformal:
    """A fit without each cut's test rows (at its penalty), and their absolute residuals, with weights for the quantile.

    cuts   (training rows, test rows) pairs; every row is a test row once.
    spare  each of K units (whole groups) has the weight 1 / (K + 1), its rows share it, and the rest is at infinity, for the new
           one. False: 1 / K, for units too few for a finite interval otherwise (`guaranteed`).
    """
    lines = [line(x, y, train, penalty, scaling) for (train, _), penalty in zip(cuts, penalties, strict=True)]
    weights, intercepts = np.array([w for w, _ in lines]), np.array([b for _, b in lines])
    rows = np.concatenate([test for _, test in cuts])
    fold = np.repeat(np.arange(len(cuts)), [len(test) for _, test in cuts])
    residuals = np.abs(y[rows] - np.einsum("ij,ij->i", x[rows], weights[fold]) - intercepts[fold])
    _, unit, sizes = np.unique(units[rows], return_inverse=True, return_counts=True)
    return Conformal(weights, intercepts, residuals, fold, 1 / ((len(sizes) + spare) * sizes[unit]))


def guaranteed(n_units: int, level: float) -> bool:
    """Whether finite intervals of so many units can have a guarantee at this level."""
    return n_units / (n_units + 1) >= level - 1e-12


def interval(found: Conformal, x: Matrix, level: float) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """CV+: the weighted quantiles of every fold's prediction less, and plus, the residuals of its held-out rows; the outermost of
    them where the quantile is at infinity."""
    low, high = [], []
    for some in np.array_split(x, 1 + len(x) // 512):
        centres = (some @ found.weights.T + found.intercepts)[:, found.fold]
        low.append(-_quantile(found.residuals - centres, found.masses, level))
        high.append(_quantile(centres + found.residuals, found.masses, level))
    return np.concatenate(low), np.concatenate(high)


def half_width(found: Conformal, level: float) -> float:
    """The weighted quantile of the residuals: the interval's half where all folds predict the same."""
    return float(_quantile(found.residuals[None], found.masses, level)[0])


def _quantile(values: Float[np.ndarray, "row prompt"], masses: Float[np.ndarray, " prompt"], level: float) -> Float[np.ndarray, " row"]:
    order = np.argsort(values, axis=1)
    at = (np.cumsum(masses[order], axis=1) < level - 1e-12).sum(axis=1).clip(max=values.shape[1] - 1)
    return np.take_along_axis(values, np.take_along_axis(order, at[:, None], axis=1), axis=1)[:, 0]


def seen(x: Matrix, train: Int[np.ndarray, " train"], penalty: float, scaling: str = "each") -> Seen:
    """What `distance` needs to know of the training rows."""
    z, mean, slope = _scaled(x, train, scaling)
    eigenvalues, basis, _ = spectrum(x, train, train[:0], scaling)
    kept = eigenvalues > _SHRUNK * penalty
    axes = z.T @ (basis[:, kept] / np.sqrt(eigenvalues[kept]))
    return Seen(mean, slope, axes, eigenvalues[kept])


def distance(known: Seen, x: Matrix, penalty: float) -> Float[np.ndarray, " prompt"]:
    """sqrt(z' (Z'Z + penalty I)^-1 z) with scaled rows z and training rows Z: the Mahalanobis distance as the ridge shrinks
    it, in which directions that no training row has count by 1 / penalty; over the farthest held-out row."""
    z = (x - known.mean) * known.slope
    along = (z @ known.axes) ** 2
    rest = np.clip((z * z).sum(axis=1) - along.sum(axis=1), 0, None)
    return np.sqrt((along / (known.eigenvalues + penalty)).sum(axis=1) + rest / penalty) / known.farthest
