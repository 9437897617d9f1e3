"""The covariance null of an overlap: fresh samples of a normal population whose covariance a reference set gives.

A sample of n rows, centred, is n - 1 normal rows without a mean, seen along the population's axes; only its scatter matters to a PCA.
So nothing as long as d_model is drawn: a Wishart matrix by its Bartlett factor where the reference fills the space, and where it
does not (d_model larger than the reference set), rows along the reference's axes and the first set's subspace, the Gram matrix of all
else in one Wishart matrix more. The random numbers are shared by all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .measures import Measure
from .nulls import wishart
from .subspaces import arcsine, common_coordinates, from_arcsine, leading_eigenvectors


def ledoit_wolf(x: Float[np.ndarray, "prompt coordinate"], d_model: int | None = None) -> tuple[float, float]:
    """(shrinkage, variance): the covariance estimate (1 - shrinkage) S + shrinkage variance I of least expected squared error
    (Ledoit and Wolf 2004), S the covariance of the centred rows with divisor n, variance its mean over all dimensions.

    d_model: the number of dimensions, when the rows are given in fewer coordinates that hold all they span.
    """
    n, d = len(x), x.shape[1] if d_model is None else d_model
    lengths = (x**2).sum(axis=1)
    variance = lengths.sum() / n / d
    gram = x @ x.T if n <= x.shape[1] else x.T @ x
    squares = (gram**2).sum() / n**2
    wrong = squares / d - variance**2  # mean squared distance of S to its target
    noise = ((lengths**2).sum() / n - squares) / (n * d)
    return float(min(noise, wrong) / wrong) if wrong > 0 and noise > 0 else 0.0, float(variance)


@dataclass(frozen=True)
class Population:
    """A normal population as a fixed subspace sees it.

    spread   standard deviation along each of its axes; rest: variance along each of the `others` directions outside of them.
    inside   the fixed subspace along the axes.
    """

    spread: Float[np.ndarray, " axis"]
    inside: Float[np.ndarray, "axis k"]
    rest: float
    others: int


def population(reference: Float[np.ndarray, "prompt coordinate"], basis: Float[np.ndarray, "coordinate k"], d_model: int, width: int) -> Population:
    """The population of a reference set's shrunk covariance (`ledoit_wolf`), seen from a subspace.

    width: columns of `basis` to make room for, so that populations of several layers have as many axes.
    """
    filler = np.random.default_rng(0).standard_normal((width - basis.shape[1], len(basis)))
    rows, columns = common_coordinates(reference - reference.mean(axis=0), np.concatenate([basis.T, filler]))
    shrinkage, variance = ledoit_wolf(rows, d_model)
    values, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    spread = np.sqrt((1 - shrinkage) * np.clip(values, 0, None) + shrinkage * variance)
    return Population(spread, axes.T @ columns[: basis.shape[1]].T, shrinkage * variance, d_model - len(spread))


def sampled_overlaps(
    populations: Sequence[Population], n: int, sizes: Sequence[int], measure: Measure, n_draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws layer"]:
    """Overlap of each layer's fixed subspace with the principal subspaces (of `sizes` dimensions) of fresh samples of n rows."""
    if measure.of_inner is None:
        raise ValueError(f"{measure.name} does not compare two subspaces: it has no draws of this kind")
    n_axes, others = len(populations[0].spread), populations[0].others
    out = np.empty((n_draws, len(populations)))
    for draw in out:
        if others:
            rows, beyond = rng.standard_normal((n - 1, n_axes)), wishart(others, n - 1, 1, rng)[0]
        else:
            scatter = wishart(n - 1, n_axes, 1, rng)[0]
        for i, (one, k) in enumerate(zip(populations, sizes, strict=True)):
            if others:
                inside = rows * one.spread
                values, vectors = leading_eigenvectors(inside @ inside.T + one.rest * beyond, k)
                basis = inside.T @ (vectors / np.sqrt(values))
            else:
                basis = leading_eigenvectors(scatter * one.spread * one.spread[:, None], k)[1]
            draw[i] = measure.of_inner(one.inside.T @ basis)
    return out


def covariance_overlaps(
    populations: Sequence[Population],
    own: Float[np.ndarray, " layer"],
    sizes: Sequence[int],
    n: int,
    n_reference: int,
    measure: Measure,
    n_draws: int,
    seed: int,
) -> Float[np.ndarray, "draws layer"]:
    """Overlap of each layer's fixed subspace with fresh samples of n rows of its population: null "covariance".

    own: the overlap with the reference set itself, n_reference rows. The axes of an estimated covariance lie askew by the noise of
    the reference; samples of it lie askew twice, so plain draws overlap too little and reject in up to a third of null cases
    (reference twice as large as n). So a draw is own + fresh - again on the arcsine scale, `again` being n_reference rows from the same
    population: the difference between a sample and a reference hardly depends on what the covariance gets wrong. False positives at
    .05 were 2 to 8 % in simulations of normal, independent prompts with a reference two to four times n. Outside of that it rejects
    too often: 0.11 with a reference of n rows, 0.09 to 0.13 with heavy tails (t of 4 degrees of freedom), 0.13 where the reference comes
    in 8 topics with two fifths of the variance between them, against 0.04 to 0.07 of the reference itself as a null. Prefer an
    Activations for clustered or heavy-tailed prompts.
    """
    rng = np.random.default_rng(seed)
    fresh, again = (sampled_overlaps(populations, rows, sizes, measure, n_draws, rng) for rows in (n, n_reference))
    angles = np.array([min(size, one.inside.shape[1]) for size, one in zip(sizes, populations, strict=True)])
    out = np.empty_like(fresh)
    for i, m in enumerate(angles):
        at, here, there = (arcsine(measure.share(values, m)) for values in (own[i], fresh[:, i], again[:, i]))
        out[:, i] = measure.unshare(from_arcsine(at + here - there), m)
    return out
