"""How much two sets of prompts have in common at a layer: overlap measures under exact names, each with its chance level.

Measures of two subspaces are functions of their principal angles theta_i (cosines sigma_i, the singular values of U^T V), i up to
m = min(k_u, k_v); measures by prompt ask how much of each prompt a subspace holds; linear CKA compares two recordings of the same
prompts. `MEASURES` holds them by name, as `emlens.geometry.overlap` takes them. Chance: two uniformly random subspaces of k of d
dimensions, k much smaller than d where it says "about".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy import special

from .subspaces import Sample, angles, explained_energy, mean_cos2

__all__ = [
    "MEASURES",
    "Measure",
    "Basis",
    "chordal",
    "explained_energy",
    "grassmann",
    "largest_cos",
    "linear_cka",
    "mean_cos",
    "mean_cos2",
    "measure_named",
    "norm_fraction",
    "procrustes",
]

Basis: TypeAlias = Float[np.ndarray, "d_model _"]
_QUARTER_CIRCLE = 8 / (3 * np.pi)  # mean of the quarter-circle law: the mean singular value of a k x k normal matrix, over sqrt(k)


def mean_cos(u: Basis, v: Basis) -> float:
    """Mean cosine of the principal angles of two orthonormal bases, 0 to 1; chance about 8/(3 pi) sqrt(k/d).

    The average canonical correlation that a review of the paper describes. Its chance is far from 0: 0.10 for 8 of 576
    dimensions, where mean cos^2 has 0.014."""
    return float(_mean_cos(angles(u, v)))


def largest_cos(u: Basis, v: Basis) -> float:
    """Largest cosine (of the smallest principal angle) of two orthonormal bases, 0 to 1; chance about 2 sqrt(k/d) at most,
    not 0: one shared direction is enough for 1."""
    return float(_largest_cos(angles(u, v)))


def grassmann(u: Basis, v: Basis) -> float:
    """Geodesic distance on the Grassmann manifold, (sum theta_i^2)^1/2, 0 to sqrt(m) pi/2; chance about
    sqrt(k) (pi/2 - 8/(3 pi) sqrt(k/d)) (Edelman, Arias and Smith 1998)."""
    return float(_grassmann(angles(u, v)))


def chordal(u: Basis, v: Basis) -> float:
    """Chordal (projection) distance, (sum sin^2 theta_i)^1/2, 0 to sqrt(m); for equal k it is ||U U^T - V V^T||_F / sqrt(2).
    The chance of its square is exactly m (1 - max(k)/d)."""
    return float(_chordal(angles(u, v)))


def procrustes(u: Basis, v: Basis) -> float:
    """Procrustes distance, (2 sum (1 - sigma_i))^1/2, 0 to sqrt(2 m): the least ||U Q - V||_F over rotations Q of the basis;
    chance about (2 k (1 - 8/(3 pi) sqrt(k/d)))^1/2."""
    return float(_procrustes(angles(u, v)))


def norm_fraction(x: Float[np.ndarray, "prompt d_model"], basis: Basis, centre: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " prompt"]:
    """||P(x - centre)|| / ||x - centre|| per row: the paper's projection fraction, the root of `explained_energy`; chance about
    sqrt(k/d)."""
    return np.sqrt(explained_energy(x, basis, centre))


def linear_cka(x: Float[np.ndarray, "prompt d_model"], y: Float[np.ndarray, "prompt other"]) -> float:
    """Debiased linear centred kernel alignment of two recordings of the same prompts, row by row; chance exactly 0 on average,
    at most 1, and it may be negative. Blind to rotations and to one overall scale of either side.

    HSIC_1 (Song et al. 2012) of x x^T and y y^T over the root of the product of both with themselves (Kornblith et al. 2019;
    Nguyen et al. 2021). The plain form is biased upwards by about d/n. Errors: ValueError for different numbers of rows or
    fewer than four, or a side that does not vary.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"x has {len(x)} rows, y {len(y)}: linear CKA pairs rows and needs at least four prompts, the same on both sides")
    one, other = (_u_centred(np.asarray(side, dtype=np.float64)) for side in (x, y))
    own = (one**2).sum() * (other**2).sum()
    if own <= 0:
        raise ValueError("one side is the same for every prompt: there is nothing to align")
    return float((one * other).sum() / np.sqrt(own))


# ---- by name


@dataclass(frozen=True)
class Measure:
    """A measure under its name.

    kind       "subspaces" (of two bases), "prompts" (how much of b's prompts a's subspace holds, the mean over prompts) or "pairs"
               (the same prompts on both sides).
    of         of two samples of prompts; `of_inner` of the product U^T V of two bases [..., k, m] (kind "subspaces").
    closer     the tail on which sets that have more in common lie: "greater", or "less" for a distance.
    bounds     smallest and largest value for m principal angles.
    chance     expected for uniformly random subspaces of k and m of d dimensions, where that is known exactly; else None.
    """

    name: str
    kind: Literal["subspaces", "prompts", "pairs"]
    of: Callable[[Sample, Sample], float]
    closer: Literal["greater", "less"] = "greater"
    bounds: Callable[[int], tuple[float, float]] = lambda m: (0.0, 1.0)
    chance: Callable[[int, int, int], float | None] = lambda k, m, d: None
    of_inner: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def apart(self) -> str:
        """The tail on which sets that have less in common lie."""
        return "less" if self.closer == "greater" else "greater"

    def share(self, value: Any, m: int) -> Any:
        """Values as a share of their range, from 0 to 1."""
        low, high = self.bounds(m)
        return (np.asarray(value) - low) / (high - low)

    def unshare(self, share: Any, m: int) -> Any:
        """Shares of the range as values again."""
        low, high = self.bounds(m)
        return low + np.asarray(share) * (high - low)


def measure_named(name: str) -> Measure:
    """The measure of a name; ValueError names those there are."""
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; choose one of {', '.join(MEASURES)}")
    return MEASURES[name]


def _mean_cos(theta: Float[np.ndarray, "*draws angle"]) -> Float[np.ndarray, "*draws"]:
    return np.cos(theta).mean(axis=-1)


def _largest_cos(theta: Float[np.ndarray, "*draws angle"]) -> Float[np.ndarray, "*draws"]:
    return np.cos(theta).max(axis=-1)


def _grassmann(theta: Float[np.ndarray, "*draws angle"]) -> Float[np.ndarray, "*draws"]:
    return np.sqrt((theta**2).sum(axis=-1))


def _chordal(theta: Float[np.ndarray, "*draws angle"]) -> Float[np.ndarray, "*draws"]:
    return np.sqrt((np.sin(theta) ** 2).sum(axis=-1))


def _procrustes(theta: Float[np.ndarray, "*draws angle"]) -> Float[np.ndarray, "*draws"]:
    return 2 * np.sqrt((np.sin(theta / 2) ** 2).sum(axis=-1))  # 2 (1 - cos) = 4 sin^2 of the half: no digits lost near 0


def _mean_cos2_of_inner(inner: Float[np.ndarray, "*draws k m"]) -> Float[np.ndarray, "*draws"]:
    return (inner**2).sum(axis=(-2, -1)) / min(inner.shape[-2:])


def _of_angles(
    name: str,
    function: Callable[[Basis, Basis], float],
    of_angles: Callable[[np.ndarray], np.ndarray],
    closer: Literal["greater", "less"] = "greater",
    top: Callable[[int], float] = lambda m: 1.0,
) -> Measure:
    def of_inner(inner: Float[np.ndarray, "*draws k m"]) -> Float[np.ndarray, "*draws"]:
        return of_angles(np.arccos(np.clip(np.linalg.svd(inner, compute_uv=False), 0, 1)))

    return Measure(name, "subspaces", lambda a, b: function(a.basis, b.basis), closer, lambda m: (0.0, top(m)), of_inner=of_inner)


def _u_centred(x: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt prompt"]:
    """The Gram matrix of the rows, U-centred (Szekely and Rizzo 2014): the sum of the products of two of them is n (n - 3) HSIC_1."""
    n, rows = len(x), x - x.mean(axis=0)  # a shift of all rows falls out; taken first, it costs no digits
    gram = rows @ rows.T
    np.fill_diagonal(gram, 0)
    sums = gram.sum(axis=0)
    gram = gram - (sums + sums[:, None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram


def _chance_of_root(k: int, m: int, d: int) -> float:
    """The mean of the root of a Beta(k/2, (d - k)/2) number, the energy of a vector in a random subspace."""
    return float(np.exp(special.betaln((k + 1) / 2, (d - k) / 2) - special.betaln(k / 2, (d - k) / 2))) if k < d else 1.0


MEASURES: Mapping[str, Measure] = {
    each.name: each
    for each in (
        Measure(
            "mean_cos2",
            "subspaces",
            lambda a, b: mean_cos2(a.basis, b.basis),
            chance=lambda k, m, d: max(k, m) / d,
            of_inner=_mean_cos2_of_inner,
        ),
        _of_angles("mean_cos", mean_cos, _mean_cos),
        _of_angles("largest_cos", largest_cos, _largest_cos),
        _of_angles("grassmann", grassmann, _grassmann, "less", lambda m: float(np.sqrt(m) * np.pi / 2)),
        _of_angles("chordal", chordal, _chordal, "less", lambda m: float(np.sqrt(m))),
        _of_angles("procrustes", procrustes, _procrustes, "less", lambda m: float(np.sqrt(2 * m))),
        Measure(
            "explained_energy",
            "prompts",
            lambda a, b: float(explained_energy(b.x, a.basis, a.centre).mean()),
            chance=lambda k, m, d: k / d,
        ),
        Measure("norm_fraction", "prompts", lambda a, b: float(norm_fraction(b.x, a.basis, a.centre).mean()), chance=_chance_of_root),
        Measure("linear_cka", "pairs", lambda a, b: linear_cka(a.x, b.x), bounds=lambda m: (-1.0, 1.0), chance=lambda k, m, d: 0.0),
    )
}
"""Measures by name: "mean_cos2", "mean_cos", "largest_cos", "grassmann", "chordal", "procrustes", "explained_energy", "norm_fraction",
"linear_cka"."""
