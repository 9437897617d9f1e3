"""What chance gives, and what a set has in common with itself: the draws behind every null, ceiling and control.

A null is a hypothesis and a way of drawing from it. `DESCRIPTIONS` says both for each name that a Result may carry,
with the tail that is tested; Results copy the text into their `.attrs["null"]`. Draws are shared by all layers, so that
a maximum over layers can be taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import einsum, rearrange
from jaxtyping import Float, Int

from . import stats
from .subspaces import mean_cos2, principal_subspace

DESCRIPTIONS: dict[str, dict[str, str]] = {
    "isotropic subspace": {
        "hypothesis": "one of the two subspaces is uniformly random; almost any shared structure rejects it",
        "generator": "QR of d_model x k standard normal numbers for one side, the other side as it is",
        "tail": "greater",
    },
    "isotropic direction": {
        "hypothesis": "the mean shift compared with points in a uniformly random direction, at its own length",
        "generator": "a standard normal vector, normalised, in its place: the same one for all prompts",
        "tail": "two-sided",
    },
    "reference": {
        "hypothesis": "the second set overlaps the first no more than reference prompts do (they are exchangeable)",
        "generator": "as many rows as the second set has, without replacement, from it and the reference together",
        "tail": "greater",
    },
    "prompts permuted": {
        "hypothesis": "over prompts, the two measures are unrelated: which prompt has which value is exchangeable",
        "generator": "one measure permuted over prompts against the other",
        "tail": "two-sided",
    },
    "labels permuted": {
        "hypothesis": "it does not matter which variant a prompt's activation came from",
        "generator": "labels swapped within prompts (over prompts where the sides share none), everything refitted",
        "tail": "greater",
    },
}


def describe(name: str) -> str:
    """The hypothesis, generator and tail of a null as one sentence, for `.attrs["null"]`."""
    told = DESCRIPTIONS[name]
    return f"hypothesis: {told['hypothesis']}; drawn: {told['generator']}; tail: {told['tail']}"


def beside(
    rows: Sequence[Mapping[str, Any]],
    draws: Mapping[str, Float[np.ndarray, "draws row"]],
    tail: str,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """Result rows beside their nulls: one per row and null, with null, null_low, null_high and p.

    rows   dicts with an `estimate`; draws: null name -> draws of every row's statistic, in the order of the rows.
    No null at all gives the rows as they are.
    """
    estimates = np.array([row["estimate"] for row in rows], dtype=np.float64)
    out = [] if draws else [dict(row) for row in rows]
    for name, null in draws.items():
        low, high = stats.null_band(null, level)
        p = stats.permutation_p(estimates, null, tail)
        tested = zip(rows, low, high, p, strict=True)
        out += [{**row, "null": name, "null_low": i, "null_high": j, "p": one} for row, i, j, one in tested]
    return out


def random_subspaces(d_model: int, k: int, n_draws: int, seed: int | np.random.Generator) -> Float[np.ndarray, "draws d_model k"]:
    """`n_draws` orthonormal bases of uniformly (Haar) random k-dimensional subspaces.

    Hypothesis   the subspace has no preferred orientation.
    Generator    the Q of a QR decomposition of a standard normal d_model x k matrix; its span is Haar distributed
                 (Muirhead 1982, theorem 2.1.13).
    Expected     ||U^T V||_F^2 / k = k / d_model for any fixed U of k columns.
    Tail         greater, where a large overlap is the claim.
    """
    if not 1 <= k <= d_model:
        raise ValueError(f"a subspace of {k} dimensions does not fit {d_model}: choose k from 1 to {d_model}")
    normal = np.random.default_rng(seed).standard_normal((n_draws, d_model, k))
    return np.linalg.qr(normal)[0]


def random_vectors(d_model: int, n_draws: int, seed: int | np.random.Generator, norm: float = 1.0) -> Float[np.ndarray, "draws d_model"]:
    """`n_draws` uniformly random directions of length `norm`.

    Hypothesis   the direction is any direction: only its length is kept.
    Generator    a standard normal vector, normalised.
    Expected     cosine with a fixed vector: mean 0, standard deviation 1 / sqrt(d_model).
    Tail         two-sided, unless only one sign was claimed beforehand.
    """
    normal = np.random.default_rng(seed).standard_normal((n_draws, d_model))
    return norm * normal / np.linalg.norm(normal, axis=1, keepdims=True)


def isotropic_overlaps(
    bases: Float[np.ndarray, "layer d_model k"], n_draws: int, seed: int | np.random.Generator
) -> Float[np.ndarray, "draws layer"]:
    """Mean cos^2 between each layer's subspace and random ones: null "isotropic subspace", one random subspace per draw
    for all layers.

    Only one side need be random: for a Haar random V the overlap has the same distribution whatever U is.
    """
    n_layers, d_model, k = bases.shape
    joined = rearrange(bases, "layer d_model k -> d_model (layer k)")
    rng = np.random.default_rng(seed)
    draws = []
    step = max(1, 4_000_000 // (d_model * k))
    for start in range(0, n_draws, step):
        subspaces = random_subspaces(d_model, k, min(step, n_draws - start), rng)
        products = rearrange(subspaces, "draws d_model j -> (draws j) d_model") @ joined
        squares = rearrange(products**2, "(draws j) (layer k) -> draws layer (j k)", j=k, layer=n_layers)
        draws.append(squares.sum(axis=-1) / k)
    return np.concatenate(draws)


def isotropic_similarities(
    mean_unit: Float[np.ndarray, "layer d_model"], n_draws: int, seed: int | np.random.Generator
) -> Float[np.ndarray, "draws layer"]:
    """Mean over prompts of the cosine with a random direction: null "isotropic direction".

    A direction is drawn first and averaged over prompts after: shifts of one tuning resemble one another, so their
    cosines with one direction rise and fall together and the band does not shrink with the number of prompts. mean_unit
    is the mean over prompts of the unit shifts; the mean cosine with r is r . mean_unit.
    """
    vectors = random_vectors(mean_unit.shape[1], n_draws, seed)
    return einsum(vectors, mean_unit, "draws d_model, layer d_model -> draws layer")


def subsamples(n_rows: int, size: int, n_draws: int, seed: int | np.random.Generator) -> Iterator[Int[np.ndarray, " prompt"]]:
    """`n_draws` times `size` of `n_rows` rows without replacement (repeated rows would bias a PCA towards themselves):
    null "reference"."""
    if not 1 <= size <= n_rows:
        raise ValueError(f"cannot draw {size} of {n_rows} rows without replacement")
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        yield rng.permutation(n_rows)[:size]


def reference_overlaps(
    basis: Float[np.ndarray, "d_model k"],
    pool: Float[np.ndarray, "prompt d_model"],
    rows: Sequence[Int[np.ndarray, " subsample"]],
) -> Float[np.ndarray, " draws"]:
    """Overlap of a subspace with the principal subspaces of row subsamples of a pool: null "reference".

    Hypothesis   the second set and the reference prompts are exchangeable in what they share with the first set.
    Generator    `subsamples` of the second set and the reference *together*, of the second set's size; same centring
                 and PCA. With the second set among the rows the test is exact at any size of the reference; with a
                 reference several times larger the band shows what reference prompts alone overlap.
    Tail         greater.
    """
    values, k = np.asarray(pool, dtype=np.float64), basis.shape[1]
    return np.array([mean_cos2(basis, principal_subspace(values[chosen], k)) for chosen in rows])


def halves(
    n_rows: int, n_splits: int, seed: int | np.random.Generator, n: int | None = None
) -> list[tuple[Int[np.ndarray, " half"], Int[np.ndarray, " half"]]]:
    """`n_splits` random splits of the rows into two disjoint halves of n_rows // 2 (an odd row is left out), or of `n`
    rows each.

    Control, not a null: what a set has in common with itself at that size.
    """
    size = n_rows // 2 if n is None else n
    if not 1 <= size <= n_rows // 2:
        raise ValueError(f"two disjoint halves of {size} rows do not fit {n_rows} rows: choose n from 1 to {n_rows // 2}")
    return [(rows[:size], rows[size:]) for rows in subsamples(n_rows, 2 * size, n_splits, seed)]
