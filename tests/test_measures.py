"""Guards the overlap measures: identities of each, scipy's angles, their chance levels, and linear CKA against its definition."""

from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
from planted import D

from emlens import measures, nulls, subspaces
from emlens.measures import MEASURES, measure_named
from emlens.subspaces import Sample

SUBSPACES = {
    "mean_cos2": measures.mean_cos2,
    "mean_cos": measures.mean_cos,
    "largest_cos": measures.largest_cos,
    "grassmann": measures.grassmann,
    "chordal": measures.chordal,
    "procrustes": measures.procrustes,
}
DISTANCES = {"grassmann", "chordal", "procrustes"}


def bases(k=5, m=5, d=D, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(np.linalg.qr(rng.standard_normal((d, size)))[0] for size in (k, m))


def test_the_table_holds_every_measure_under_its_own_name():
    assert {name for name, one in MEASURES.items() if one.kind == "subspaces"} == set(SUBSPACES)
    assert set(MEASURES) - set(SUBSPACES) == {"explained_energy", "norm_fraction", "linear_cka"}
    assert all(name == one.name for name, one in MEASURES.items())
    assert {name for name, one in MEASURES.items() if one.closer == "less"} == DISTANCES
    with pytest.raises(ValueError, match="unknown measure 'cosine'; choose one of mean_cos2, "):
        measure_named("cosine")


@pytest.mark.parametrize(
    ("name", "of_angles"),
    [
        ("mean_cos2", lambda t: (np.cos(t) ** 2).mean()),
        ("mean_cos", lambda t: np.cos(t).mean()),
        ("largest_cos", lambda t: np.cos(t.min())),
        ("grassmann", lambda t: np.linalg.norm(t)),
        ("chordal", lambda t: np.linalg.norm(np.sin(t))),
        ("procrustes", lambda t: np.sqrt(2 * (1 - np.cos(t)).sum())),
    ],
)
@pytest.mark.parametrize("sizes", [(5, 5), (3, 6)])
def test_measures_are_what_they_say_of_scipys_angles(name, of_angles, sizes):
    u, v = bases(*sizes)
    expected = of_angles(scipy.linalg.subspace_angles(u, v))
    assert SUBSPACES[name](u, v) == pytest.approx(expected, abs=1e-10)
    a, b = (Sample(np.eye(len(basis)), basis.shape[1]) for basis in (u, v))
    a.basis, b.basis = u, v
    assert MEASURES[name].of(a, b) == pytest.approx(expected, abs=1e-10)
    stack = np.stack([u.T @ v, u.T @ v])  # as the null draws have it
    assert np.allclose(MEASURES[name].of_inner(stack), expected, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SUBSPACES))
def test_identities(name):
    of, k = SUBSPACES[name], 5
    low, high = MEASURES[name].bounds(k)
    same, orthogonal = (low, high) if name in DISTANCES else (high, low)
    u, v = bases(k, k)
    turn, spin = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0], np.linalg.qr(np.random.default_rng(2).standard_normal((k, k)))[0]
    assert of(u, u) == pytest.approx(same, abs=1e-12) and of(u, u @ spin) == pytest.approx(same, abs=1e-7)
    assert of(np.eye(D)[:, :k], np.eye(D)[:, k : 2 * k]) == pytest.approx(orthogonal, abs=1e-12)
    assert of(np.eye(D), turn) == pytest.approx(0 if name in DISTANCES else 1, abs=1e-6)  # k = d: both are everything
    assert of(u, v) == pytest.approx(of(v, u), abs=1e-12)
    assert of(turn @ u, turn @ v) == pytest.approx(of(u, v), abs=1e-12) == pytest.approx(of(u @ spin, v), abs=1e-12)
    assert low < of(u, v) < high and abs(of(u, v) - same) > 0.1  # and two random ones are neither
    assert MEASURES[name].share(MEASURES[name].unshare(0.3, k), k) == pytest.approx(0.3)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_distances_keep_small_angles_and_the_triangle(name):
    tiny = np.array([1e-9, 2e-9, 0])
    u, v = np.eye(D)[:, :3], np.eye(D)[:, :3] * np.cos(tiny) + np.eye(D)[:, 3:6] * np.sin(tiny)
    assert SUBSPACES[name](u, v) == pytest.approx(np.linalg.norm(tiny), rel=1e-6)  # the cosines alone are all 1
    x, y = bases(seed=3)
    z, _ = bases(seed=4)
    assert SUBSPACES[name](x, z) <= SUBSPACES[name](x, y) + SUBSPACES[name](y, z)


def test_chordal_and_procrustes_have_their_matrix_forms():
    u, v = bases()
    assert measures.chordal(u, v) == pytest.approx(np.linalg.norm(u @ u.T - v @ v.T) / np.sqrt(2))
    best = scipy.linalg.orthogonal_procrustes(u, v)[0]
    assert measures.procrustes(u, v) == pytest.approx(np.linalg.norm(u @ best - v))


def test_chance_levels_are_those_of_random_subspaces():
    k, d, root = 8, 400, np.sqrt(8 / 400)
    mean = {name: nulls.isotropic_overlaps([bases(k, k, d)[0]], 1500, 1, name).mean() for name in SUBSPACES}
    quarter = 8 / (3 * np.pi) * root
    assert mean["mean_cos2"] == pytest.approx(MEASURES["mean_cos2"].chance(k, k, d), rel=0.02) == pytest.approx(k / d)
    assert mean["mean_cos"] == pytest.approx(quarter, rel=0.03) and mean["mean_cos"] > 5 * mean["mean_cos2"]
    assert 0.75 * 2 * root < mean["largest_cos"] < 2 * root
    assert mean["grassmann"] == pytest.approx(np.sqrt(k) * (np.pi / 2 - quarter), rel=0.01)
    assert mean["chordal"] == pytest.approx(np.sqrt(k * (1 - k / d)), rel=0.003)
    assert mean["procrustes"] == pytest.approx(np.sqrt(2 * k * (1 - quarter)), rel=0.01)
    unequal = nulls.isotropic_overlaps([bases(4, 4, d)[0]], 1500, 1, dimensions=[10])
    assert unequal.mean() == pytest.approx(MEASURES["mean_cos2"].chance(4, 10, d), rel=0.05) == pytest.approx(10 / d)


def test_energy_and_its_root_have_their_chance_exactly():
    rng, k, d = np.random.default_rng(0), 3, 20
    sample = Sample(rng.standard_normal((30, d)), k)
    rows = rng.standard_normal((25, d)) * np.arange(1, d + 1)  # whatever the prompts are
    for name in ("explained_energy", "norm_fraction"):
        draws = nulls.isotropic_fractions([sample], [rows], 3000, 2, root=name == "norm_fraction")
        assert draws.mean() == pytest.approx(MEASURES[name].chance(k, k, d), abs=4 * draws.std() / np.sqrt(3000))
        slow = []
        for basis in nulls.random_subspaces(d, k, 5, 2):
            alone = Sample(sample.x, k)
            alone.basis = basis
            slow.append(MEASURES[name].of(alone, Sample(rows, k)))
        assert np.allclose(draws[:5, 0], slow, atol=1e-12)
    assert MEASURES["norm_fraction"].chance(3, 3, 20) < np.sqrt(3 / 20)  # the root of the mean is not the mean of the root
    assert MEASURES["norm_fraction"].chance(20, 20, 20) == 1


def test_norm_fraction_is_the_root_of_the_energy_by_prompt():
    x, basis, centre = np.random.default_rng(0).standard_normal((6, D)), bases()[0], np.full(D, 0.1)
    by_hand = [np.linalg.norm(basis.T @ (row - centre)) / np.linalg.norm(row - centre) for row in x]
    assert np.allclose(measures.norm_fraction(x, basis, centre), by_hand)
    assert np.allclose(measures.norm_fraction(x, basis, centre) ** 2, subspaces.explained_energy(x, basis, centre))


# ---- linear CKA


def hsic_by_quadruples(k, other):
    """HSIC_1 by its definition: the mean over all ordered quadruples of different rows (Song et al. 2012, equation 4)."""
    quadruples = np.array(list(permutations(range(len(k)), 4)))
    i, j, q, r = quadruples.T
    return (k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])).mean()


def test_linear_cka_is_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)) + 3, rng.standard_normal((7, 4)) - 1
    grams = x @ x.T, y @ y.T
    by_hand = hsic_by_quadruples(*grams) / np.sqrt(hsic_by_quadruples(grams[0], grams[0]) * hsic_by_quadruples(grams[1], grams[1]))
    assert measures.linear_cka(x, y) == pytest.approx(by_hand, abs=1e-10)


def plain_cka(x, y):
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def test_linear_cka_of_unrelated_rows_is_zero_on_average_where_the_plain_form_is_not():
    rng = np.random.default_rng(1)
    pairs = [(rng.standard_normal((20, 40)), rng.standard_normal((20, 30))) for _ in range(300)]
    found = np.array([measures.linear_cka(x, y) for x, y in pairs])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(300) and np.mean([plain_cka(x, y) for x, y in pairs]) > 0.5
    x = pairs[0][0]
    turn = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    assert measures.linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert measures.linear_cka(x, x + rng.standard_normal(x.shape)) > 0.2
    assert measures.linear_cka(x, x[::-1].copy()) < 0.1  # it is the pairing that counts


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.eye(5), np.eye(6), "x has 5 rows, y 6"),
        (np.eye(3), np.eye(3), "at least four prompts"),
        (np.ones((6, 2)), np.eye(6), "the same for every prompt"),
    ],
)
def test_linear_cka_refuses(x, y, says):
    with pytest.raises(ValueError, match=says):
        measures.linear_cka(x, y)
