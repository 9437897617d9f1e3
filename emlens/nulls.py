"""What chance gives, and what a set has in common with itself: the draws behind every null, ceiling and control.

A null is a hypothesis and a way of drawing from it. `DESCRIPTIONS` says both for each name that a Result may carry,
with the tail that is tested; Results copy the text into their `.attrs["null"]`. Draws are shared by all layers, so that
a maximum over layers can be taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from einops import einsum, rearrange
from jaxtyping import Float, Int

from . import stats
from .measures import measure_named
from .resampling import chunks
from .subspaces import Sample, unit_rows

DESCRIPTIONS: dict[str, dict[str, str]] = {
    "isotropic subspace": {
        "hypothesis": "one of the two subspaces is uniformly random; almost any shared structure rejects it",
        "generator": "the span of d_model x k standard normal numbers for one side, the same for all layers; the other side as it is",
        "tail": "greater",
    },
    "covariance": {
        "hypothesis": "the second set is a fresh sample of the reference population, taken as normal, its prompts as independent",
        "generator": "as many rows as the second set has from N(0, S), S the shrunk covariance of a separate reference set (of more than 1000 "
        "prompts, and four times the second set's, a random part of that size), then the same "
        "centring and PCA; shifted (on the arcsine scale) by how the reference set's own overlap lies to that of as many rows drawn from S "
        "as it has: what S gets wrong falls out",
        "tail": "greater",
    },
    "labels": {
        "hypothesis": "the two sets are exchangeable: which set a prompt is of does not matter (a test of difference)",
        "generator": "the rows of both sets dealt out anew, as many to each as before; where both hold the same prompts, each prompt's two "
        "rows change sides or not; same centring and PCA. Prompts are taken as independent: sets of different topics alone reject, unless "
        "clusters= names them (whole groups are then dealt out)",
        "tail": "less",
    },
    "pairs": {
        "hypothesis": "over prompts, the two sides are unrelated: which prompt of one goes with which of the other does not matter",
        "generator": "the prompts of one side permuted against the other's",
        "tail": "greater",
    },
    "questions": {
        "hypothesis": "none, a control: what the second set (the questions) has in common with other questions, at the same number of prompts",
        "generator": "the second set's two disjoint random halves against each other",
        "tail": "none: the band of the splits is shown, without p",
    },
    "ceiling": {
        "hypothesis": "none, a control: what two samples of one population have in common at this number of prompts",
        "generator": "two disjoint random halves of one set against each other, the median over splits; of both sets, the geometric mean",
        "tail": "none",
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
    "residuals permuted": {
        "hypothesis": "over prompts, the two measures are unrelated once the covariates are taken out of both",
        "generator": "what the covariates leave of one measure permuted over prompts, the covariates taken out anew (Freedman and Lane)",
        "tail": "two-sided",
    },
    "equal correlations": {
        "hypothesis": "the overlap and the baseline correlate equally with the similarity, over independent normal prompts",
        "generator": "none: Williams' t with n - 3 degrees of freedom (Steiger 1980)",
        "tail": "two-sided",
    },
    "equal correlations, clusters": {
        "hypothesis": "the overlap and the baseline correlate equally with the similarity, over whole clusters of prompts",
        "generator": "none: 1 less the largest level at which the bootstrap interval over clusters leaves out 0",
        "tail": "two-sided",
    },
    "mean correlation 0": {
        "hypothesis": "the mean over settings of Fisher's z is 0; settings may differ and are independent of one another",
        "generator": "none: t, one degree fewer than settings, of the random-effects mean (DerSimonian and Laird 1986; Hartung and Knapp 2001)",
        "tail": "two-sided",
    },
    "labels permuted": {
        "hypothesis": "it does not matter which variant a prompt's activation came from",
        "generator": "labels swapped within prompts (over prompts where the sides share none), everything refitted",
        "tail": "greater",
    },
}


def describe(name: str, tail: str | None = None) -> str:
    """The hypothesis, generator and tail of a null as one sentence, for `.attrs["null"]`; tail: where it is another one (of a
    distance, say)."""
    told = DESCRIPTIONS[name]
    return f"hypothesis: {told['hypothesis']}; drawn: {told['generator']}; tail: {tail or told['tail']}"


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
    bases: Sequence[Float[np.ndarray, "d_model _"]] | Float[np.ndarray, "layer d_model k"],
    n_draws: int,
    seed: int | np.random.Generator,
    measure: str = "mean_cos2",
    dimensions: Sequence[int] | None = None,
) -> Float[np.ndarray, "draws layer"]:
    """Overlap (mean cos^2, or another `measure` of two subspaces) between each layer's subspace and random ones: null "isotropic
    subspace", one random subspace per draw for all layers.

    Only one side need be random: for a Haar random V the overlap has the same distribution whatever U is. dimensions: of the
    random subspace at each layer, when they are not those of the layer's own.
    """
    of_inner = measure_named(measure).of_inner
    if of_inner is None:
        raise ValueError(f"{measure} does not compare two subspaces: it has no draws of this kind")
    ends = np.cumsum([0, *(basis.shape[1] for basis in bases)])
    sizes = np.diff(ends) if dimensions is None else np.asarray(dimensions)
    draws = []
    for inner in _random_products(np.concatenate(list(bases), axis=1), int(sizes.max()), n_draws, seed):
        parts = zip(sizes, ends[:-1], ends[1:], strict=True)
        draws.append(np.stack([of_inner(inner[:, :size, start:end]) for size, start, end in parts], axis=1))
    return np.concatenate(draws)


def _random_products(
    joined: Float[np.ndarray, "d_model column"], k: int, n_draws: int, seed: int | np.random.Generator
) -> Iterator[Float[np.ndarray, "draws k column"]]:
    """V^T times fixed columns, V the bases of random k-dimensional subspaces, some draws at a time.

    V = G C^-T with G standard normal and C the Cholesky factor of G^T G. Of G only the part N in the r-dimensional span of the columns
    is drawn: G^T G = N^T N + a Wishart matrix of d_model - r degrees of freedom. Columns that fill the space: `random_subspaces`.
    """
    d_model, n_columns = joined.shape
    if n_columns >= d_model:
        for subspaces in _random_subspaces_in_parts(d_model, k, n_draws, seed):
            rows = rearrange(subspaces, "draws d_model j -> (draws j) d_model") @ joined
            yield rearrange(rows, "(draws j) columns -> draws j columns", j=k)
        return
    if k > d_model:
        raise ValueError(f"a subspace of {k} dimensions does not fit {d_model}: choose k from 1 to {d_model}")
    rng, along = np.random.default_rng(seed), np.linalg.qr(joined, mode="r")
    for count in chunks(n_draws, n_columns * k):
        inside = rng.standard_normal((count, k, n_columns))
        gram = inside @ rearrange(inside, "draws j columns -> draws columns j") + wishart(d_model - n_columns, k, count, rng)
        yield np.linalg.inv(np.linalg.cholesky(gram)) @ (inside @ along)


def wishart(degrees: int, size: int, n_draws: int, seed: int | np.random.Generator) -> Float[np.ndarray, "draws size size"]:
    """Z^T Z of `n_draws` degrees x size matrices Z of standard normal numbers; of their Bartlett factors where those have fewer
    (Muirhead 1982, theorem 3.2.14)."""
    rng = np.random.default_rng(seed)
    if degrees < size:
        root = rng.standard_normal((n_draws, size, degrees))
    else:
        root = np.tril(rng.standard_normal((n_draws, size, size)), -1)
        root[:, np.arange(size), np.arange(size)] = np.sqrt(rng.chisquare(degrees - np.arange(size), (n_draws, size)))
    return root @ rearrange(root, "draws size degrees -> draws degrees size")


def isotropic_fractions(
    samples: Sequence[Sample], others: Sequence[Float[np.ndarray, "prompt d_model"]], n_draws: int, seed: int | np.random.Generator, root: bool
) -> Float[np.ndarray, "draws layer"]:
    """Mean over the prompts `others` of their energy in a random subspace (of its root, the norm fraction, with `root`), centred
    as each layer's sample is and of as many dimensions: null "isotropic subspace" for measures by prompt, one random subspace per
    draw for all layers."""
    units = [unit_rows(rows - sample.centre) for sample, rows in zip(samples, others, strict=True)]
    draws = []
    for subspaces in _random_subspaces_in_parts(units[0].shape[1], max(sample.k for sample in samples), n_draws, seed):
        columns = rearrange(subspaces, "draws d_model j -> d_model (draws j)")
        found = []
        for sample, rows in zip(samples, units, strict=True):
            inside = rearrange((rows @ columns) ** 2, "prompt (draws j) -> draws prompt j", draws=len(subspaces))[..., : sample.k].sum(axis=-1)
            found.append((np.sqrt(inside) if root else inside).mean(axis=-1))
        draws.append(np.stack(found, axis=1))
    return np.concatenate(draws)


def _random_subspaces_in_parts(d_model: int, k: int, n_draws: int, seed: int | np.random.Generator) -> Iterator[Float[np.ndarray, "draws d_model k"]]:
    """`random_subspaces`, some draws at a time: the same ones, in little memory."""
    rng = np.random.default_rng(seed)
    for count in chunks(n_draws, d_model * k):
        yield random_subspaces(d_model, k, count, rng)


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
    """`n_draws` times `size` of `n_rows` rows without replacement (repeated rows would bias a PCA towards themselves).

    Null "reference": of the second set and the reference *together*, as many as the second set has. With the second set among
    the rows the test is exact at any size of the reference; with a reference several times larger the band shows what
    reference prompts alone overlap.
    """
    if not 1 <= size <= n_rows:
        raise ValueError(f"cannot draw {size} of {n_rows} rows without replacement")
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        yield rng.permutation(n_rows)[:size]


def dealt_out(
    n_a: int,
    n_b: int,
    n_draws: int,
    seed: int | np.random.Generator,
    paired: bool = False,
    groups: Int[np.ndarray, " row"] | None = None,
) -> Iterator[tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]]:
    """The rows of two sets (a's first) dealt out anew, n_a and n_b of them: null "labels". paired: row i of both is one prompt,
    whose two rows change sides or not.

    groups   integers from 0, of a's rows and then b's. Groups that lie on one side are dealt out whole, so that a gets as near to n_a rows
             as it can; rows of groups that lie on both are dealt out inside them; paired, the pairs of a group change sides together.
    """
    if paired and n_a != n_b:
        raise ValueError(f"{n_a} and {n_b} rows cannot be pairs: give as many on both sides")
    rng = np.random.default_rng(seed)
    crossed = groups is not None and bool(np.isin(groups[n_a:], groups[:n_a]).any())
    for _ in range(n_draws):
        if paired:
            of = np.arange(n_a) if groups is None else groups[:n_a]
            first = np.arange(n_a) + n_a * rng.integers(2, size=of.max() + 1)[of]
            yield first, (first + n_a) % (2 * n_a)
        elif groups is None:
            order = rng.permutation(n_a + n_b)
            yield order[:n_a], order[n_a:]
        elif crossed:
            order = stats.permutations(n_a + n_b, 1, rng, groups)[0]
            yield order[:n_a], order[n_a:]
        else:
            yield _whole_groups(groups, n_a, rng)


def arrangements(n_a: int, groups: Int[np.ndarray, " row"], paired: bool) -> int | None:
    """How many ways there are to deal out whole groups (of equal size) as `dealt_out` does; None where rows are dealt out inside groups."""
    here, there = set(groups[:n_a].tolist()), set(groups[n_a:].tolist())
    if paired:
        return int(2 ** len(here))
    return None if here & there else comb(len(here | there), len(here))


def _whole_groups(groups: Int[np.ndarray, " row"], size: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, " one"], Int[np.ndarray, " other"]]:
    """The rows in two parts of whole groups, the first of about `size` rows, neither empty: groups in random order, each put where more room
    is left. Every division whose first part has exactly `size` rows can come."""
    rows = np.bincount(groups)
    first = np.zeros(len(rows), dtype=bool)
    while first.all() or not first.any():
        room, first = [size, len(groups) - size], np.zeros(len(rows), dtype=bool)
        for group in rng.permutation(len(rows)):
            first[group] = room[0] >= room[1]
            room[0 if first[group] else 1] -= rows[group]
    chosen = first[groups]
    return rng.permutation(np.flatnonzero(chosen)), rng.permutation(np.flatnonzero(~chosen))


def halves(
    n_rows: int,
    n_splits: int,
    seed: int | np.random.Generator,
    n: int | None = None,
    groups: Int[np.ndarray, " row"] | None = None,
) -> list[tuple[Int[np.ndarray, " half"], Int[np.ndarray, " half"]]]:
    """`n_splits` random splits of the rows into two disjoint halves of n_rows // 2 (an odd row is left out), or of `n`
    rows each.

    groups   integers from 0, one per row: no group is in both halves. Halves are then of as many rows as the smallest of them (or of `n`, if
             that is less).
    Control, not a null: what a set has in common with itself at that size.
    """
    if groups is not None:
        if groups.max() == 0:
            raise ValueError("all rows are of one group: two halves of whole groups need two groups at least")
        rng = np.random.default_rng(seed)
        split = [_whole_groups(groups, n_rows // 2, rng) for _ in range(n_splits)]
        least = min(len(half) for pair in split for half in pair)
        return [(one[: min(least, n or least)], other[: min(least, n or least)]) for one, other in split]
    size = n_rows // 2 if n is None else n
    if not 1 <= size <= n_rows // 2:
        raise ValueError(f"two disjoint halves of {size} rows do not fit {n_rows} rows: choose n from 1 to {n_rows // 2}")
    return [(rows[:size], rows[size:]) for rows in subsamples(n_rows, 2 * size, n_splits, seed)]
