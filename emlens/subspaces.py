"""Subspaces and directions as plain arrays: the linear algebra under `geometry`, one equation a function, float64."""

from functools import cached_property

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float, Int
from scipy import stats as scipy_stats

_DENSE = 256  # symmetric matrices up to this size are decomposed whole, larger ones by Lanczos
_POOL = 2000  # sets of up to this many rows keep the Gram matrix of all of them for their parts
_ROUNDING = 1e-6  # components that spread less than this share of the rows' length are float32 rounding


def leading_eigenvectors(matrix: Float[np.ndarray, "n n"], k: int) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]]:
    """The k largest eigenvalues of a symmetric matrix, descending, and their unit vectors."""
    size = len(matrix)
    if size <= _DENSE or k >= size // 16 or not matrix.any():
        values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[size - k, size - 1], check_finite=False)
    else:
        start = np.random.default_rng(0).standard_normal(size)  # fixed: the same rows give the same basis
        values, vectors = scipy.sparse.linalg.eigsh(matrix, k=k, which="LA", v0=start)
    return values[::-1], vectors[:, ::-1]


def principal_components(
    x: Float[np.ndarray, "prompt d_model"], k: int, gram: Float[np.ndarray, "prompt prompt"] | None = None
) -> tuple[Float[np.ndarray, "d_model k"], Float[np.ndarray, " k"]]:
    """Orthonormal basis of the first k principal components of the rows, centred on their mean, and their variances
    (divisor n - 1), descending.

    By the eigenvectors of the smaller Gram matrix in float64; its squared condition number costs less than the float32
    of the rows already did. gram: x @ x.T, where it is known and there are fewer rows than dimensions. Errors: ValueError
    when the rows span fewer than k directions (beyond float32 rounding).
    """
    n, d_model = x.shape
    if not 1 <= k <= min(n - 1, d_model):
        raise ValueError(
            f"{n} prompts of d_model {d_model} span at most {max(min(n - 1, d_model), 0)} directions; k={k} was asked: "
            "choose a smaller k or more prompts"
        )
    rows = np.asarray(x, dtype=np.float64)
    total = np.linalg.norm(rows)
    rows = rows - rows.mean(axis=0)
    if n > d_model:
        gram = rows.T @ rows
    elif gram is None:
        gram = rows @ rows.T
    else:
        means = gram.mean(axis=0)
        gram = gram - means - means[:, None] + means.mean()
    values, vectors = leading_eigenvectors(gram, k)
    strong = np.sqrt(np.clip(values, 0, None)) > _ROUNDING * total
    if not strong.all():
        raise ValueError(
            f"the {n} prompts span only {int(strong.sum())} of the k={k} directions asked for, beyond float32 rounding "
            "(are their activations equal here?): choose a smaller k or another place"
        )
    basis = rows.T @ vectors if n <= d_model else vectors
    return np.linalg.qr(basis)[0], values / (n - 1)


def principal_subspace(x: Float[np.ndarray, "prompt d_model"], k: int) -> Float[np.ndarray, "d_model k"]:
    """Orthonormal basis of the first k principal components of the rows (see `principal_components`)."""
    return principal_components(x, k)[0]


def n_components(x: Float[np.ndarray, "prompt d_model"], variance: float) -> int:
    """The smallest number of principal components of the rows that explain a share of their variance, from 0 to 1.

    Errors: ValueError for a share outside (0, 1), or rows that are all the same.
    """
    if not 0 < variance < 1:
        raise ValueError(f"a share of the variance lies between 0 and 1, both excluded; got variance={variance}")
    rows = np.asarray(x, dtype=np.float64)
    total = np.linalg.norm(rows)
    rows = rows - rows.mean(axis=0)
    spectrum = np.clip(scipy.linalg.eigvalsh(rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows)[::-1], 0, None)
    if np.sqrt(spectrum.sum()) <= _ROUNDING * total:
        raise ValueError(f"the {len(rows)} prompts are equal here, beyond float32 rounding: there is no variance to explain; choose another place")
    return int(np.searchsorted(np.cumsum(spectrum) / spectrum.sum(), variance - 1e-12)) + 1


class Sample:
    """Rows of one layer (prompts) with what an overlap needs of them: their `centre` and the `basis` of their first `k`
    principal components, both found when asked for, in float64."""

    def __init__(self, x: np.ndarray, k: int, gram: np.ndarray | None = None):
        self.x: Float[np.ndarray, "prompt d_model"] = np.asarray(x, dtype=np.float64)
        self.k = k
        self._gram = gram

    @cached_property
    def centre(self) -> Float[np.ndarray, " d_model"]:
        return self.x.mean(axis=0)

    @cached_property
    def basis(self) -> Float[np.ndarray, "d_model k"]:
        return principal_components(self.x, self.k, self._gram)[0]

    @cached_property
    def _products(self) -> Float[np.ndarray, "prompt prompt"]:
        return self.x @ self.x.T

    def part(self, rows: Int[np.ndarray, " part"], k: int | None = None) -> "Sample":
        """Some of the rows, as a sample of their own. What all parts need is computed once (the Gram matrix): a part then
        costs one decomposition of its own size, whatever d_model is."""
        shared = len(rows) <= self.x.shape[1] and len(self.x) <= _POOL
        return Sample(self.x[rows], self.k if k is None else k, self._products[np.ix_(rows, rows)] if shared else None)


def common_coordinates(*sets: Float[np.ndarray, "_ d_model"]) -> list[Float[np.ndarray, "_ coordinate"]]:
    """The rows of several sets in an orthonormal basis of what all of them span: the same lengths, angles and overlaps in
    fewer numbers. Sets of as many rows as dimensions, or more, are given back as they are (in float64)."""
    rows = [np.asarray(each, dtype=np.float64) for each in sets]
    if sum(map(len, rows)) >= rows[0].shape[1]:
        return rows
    axes = np.linalg.qr(np.concatenate(rows).T)[0]
    return [each @ axes for each in rows]


def angles(u: Float[np.ndarray, "d_model k"], v: Float[np.ndarray, "d_model m"]) -> Float[np.ndarray, " angle"]:
    """Principal angles between the spans of two orthonormal bases, min(k, m) of them, ascending, in radians.

    Cosines are the singular values of U^T V; angles below 45 degrees are taken from their sines, the singular values of
    V - U U^T V, because the cosine of a small angle has lost it (Bjorck and Golub 1973; Knyazev and Argentati 2002).
    """
    if u.shape[1] < v.shape[1]:
        u, v = v, u
    inner = u.T @ v
    cosine = np.clip(scipy.linalg.svdvals(inner), 0, 1)
    sine = np.clip(scipy.linalg.svdvals(v - u @ inner)[::-1], 0, 1)
    return np.where(cosine**2 >= 0.5, np.arcsin(sine), np.arccos(cosine))


def mean_cos2(u: Float[np.ndarray, "d_model k"], v: Float[np.ndarray, "d_model m"]) -> float:
    """||U^T V||_F^2 / min(k, m): the mean squared cosine of the principal angles of two orthonormal bases; chance
    max(k, m) / d_model."""
    return float(((u.T @ v) ** 2).sum() / min(u.shape[1], v.shape[1]))


def cosines(x: Float[np.ndarray, "prompt d_model"], direction: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " prompt"]:
    """Cosine of every row with a direction; a row or direction of length 0 has cosine 0."""
    rows, vector = np.asarray(x, dtype=np.float64), np.asarray(direction, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return np.divide(rows @ vector, lengths, out=np.zeros(len(rows)), where=lengths > 0)


def row_cosines(x: Float[np.ndarray, "prompt d_model"], y: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, " prompt"]:
    """Cosine of every row of x with the same row of y; 0 where either has length 0."""
    one, other = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide((one * other).sum(axis=1), lengths, out=np.zeros(len(one)), where=lengths > 0)


def explained_energy(
    x: Float[np.ndarray, "prompt d_model"], basis: Float[np.ndarray, "d_model k"], centre: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " prompt"]:
    """||P(x - centre)||^2 / ||x - centre||^2 per row: the share of a row's energy that a subspace holds; chance exactly
    k / d_model. 0 for a row at the centre."""
    rows = np.asarray(x, dtype=np.float64) - centre
    total = (rows**2).sum(axis=1)
    return np.divide(((rows @ basis) ** 2).sum(axis=1), total, out=np.zeros(len(rows)), where=total > 0)


def unit_rows(x: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt d_model"]:
    """Rows at length 1; rows of length 0 stay 0."""
    rows = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def half_sample_interval(
    estimate: float, halves: Float[np.ndarray, "split two"], level: float = 0.95, degrees: int | None = None
) -> tuple[float, float]:
    """Interval of a share in [0, 1] from its values on complementary random halves of the prompts (McCarthy 1969).

    Two disjoint halves are independent samples of half the size, so on the variance-stabilising scale f = arcsin sqrt
    the mean over splits of (f_1 - f_2)^2 / 2 is unbiased for the variance at *half* the number of prompts, whatever the
    statistic: a cautious stand-in for all of them (half as large where the statistic is near linear in the sample, but
    a PCA is not). Around the estimate, Student's t with as many degrees of freedom as there are splits (or fewer: `degrees`);
    a nominal 95 % covered 91 to 98 % in simulations (k from 3 to 8 of 20 to 100 dimensions, 24 to 480 independent prompts).
    """
    scaled = arcsine(halves)
    width = scipy_stats.t.ppf((1 + level) / 2, degrees or len(halves)) * np.sqrt(((scaled[:, 0] - scaled[:, 1]) ** 2).mean() / 2)
    low, high = from_arcsine(arcsine(np.array(estimate)) + np.array([-width, width]))
    return float(low), float(high)


def arcsine(share: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """arcsin sqrt of shares, on which their spread depends little on where they lie; outside [0, 1] they are at its end."""
    return np.arcsin(np.sqrt(np.clip(share, 0, 1)))


def from_arcsine(scaled: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Shares of values of `arcsine`; what lies beyond its ends is at the end."""
    return np.sin(np.clip(scaled, 0, np.pi / 2)) ** 2
