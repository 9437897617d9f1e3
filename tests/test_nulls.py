"""Guards the draws behind every null: random things are distributed as claimed, halves are disjoint, no row repeats."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.covariance import ledoit_wolf

from emlens import covariance, nulls
from emlens.measures import MEASURES
from emlens.subspaces import Sample, principal_subspace


def test_random_subspaces_are_orthonormal_and_have_no_preferred_orientation():
    bases = nulls.random_subspaces(20, 3, 2000, seed=0)
    assert np.allclose(np.swapaxes(bases, 1, 2) @ bases, np.eye(3), atol=1e-12)
    projector = (bases @ np.swapaxes(bases, 1, 2)).mean(axis=0)  # its expectation is k / d times the identity
    assert np.allclose(projector, np.eye(20) * 3 / 20, atol=0.025)


def test_a_random_subspace_holds_a_beta_share_of_a_fixed_vector():
    shares = (nulls.random_subspaces(12, 4, 1000, seed=1)[:, 0, :] ** 2).sum(axis=1)  # of the first axis
    assert scipy_stats.kstest(shares, scipy_stats.beta(4 / 2, 8 / 2).cdf).pvalue > 0.01
    assert scipy_stats.kstest(shares, scipy_stats.beta(5 / 2, 7 / 2).cdf).pvalue < 0.01  # it would tell k = 5


def test_random_vectors_have_their_length_and_the_cosines_of_a_sphere():
    vectors = nulls.random_vectors(16, 2000, seed=2, norm=3.0)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 3.0)
    squares = (vectors[:, 0] / 3) ** 2
    assert scipy_stats.kstest(squares, scipy_stats.beta(1 / 2, 15 / 2).cdf).pvalue > 0.01


def plain_loop(bases, subspaces, dimensions):
    """Mean cosines, draw by draw and layer by layer."""
    return np.array([[np.linalg.svd(u.T @ v[:, :m], compute_uv=False).mean() for u, m in zip(bases, dimensions, strict=True)] for v in subspaces])


def test_isotropic_overlaps_equal_a_plain_loop_over_the_same_subspaces():
    """Layers that fill the space: their overlaps with `random_subspaces` of that seed."""
    bases = nulls.random_subspaces(15, 2, 8, seed=3)  # eight "layers"
    subspaces = nulls.random_subspaces(15, 2, 7, seed=4)
    slow = [[((u.T @ v) ** 2).sum() / 2 for u in bases] for v in subspaces]
    assert np.allclose(nulls.isotropic_overlaps(bases, 7, seed=4), slow, atol=1e-12)
    sizes = [3, 1] * 4
    ours = nulls.isotropic_overlaps(list(bases), 6, 4, "mean_cos", dimensions=sizes)
    assert np.allclose(ours, plain_loop(bases, nulls.random_subspaces(15, 3, 6, seed=4), sizes), atol=1e-12)
    assert np.allclose(nulls.isotropic_overlaps(bases, 4000, seed=5).mean(axis=0), 2 / 15, atol=0.005)
    with pytest.raises(ValueError, match="linear_cka does not compare two subspaces"):
        nulls.isotropic_overlaps(bases, 2, 0, "linear_cka")


@pytest.mark.parametrize("d", [9, 30])
def test_isotropic_overlaps_drawn_in_the_span_of_the_layers_are_distributed_as_those_of_whole_subspaces(d):
    """Few layers: neither each layer alone nor two together (one random subspace for all) can be told from a plain loop; 9 dimensions
    leave fewer outside the span than a subspace has."""
    one, other = nulls.random_subspaces(d, 2, 2, seed=1)
    bases, sizes = [one, np.linalg.qr(one + 0.3 * other)[0], nulls.random_subspaces(d, 4, 1, seed=2)[0]], [2, 2, 3]
    fast = nulls.isotropic_overlaps(bases, 1500, 3, "mean_cos", sizes)
    slow = plain_loop(bases, nulls.random_subspaces(d, 3, 1500, seed=4), sizes)
    for i in range(3):
        assert scipy_stats.ks_2samp(fast[:, i], slow[:, i]).pvalue > 0.01
    assert np.allclose(np.corrcoef(fast.T), np.corrcoef(slow.T), atol=0.1) and np.corrcoef(fast.T)[0, 1] > 0.5
    assert scipy_stats.ks_2samp(fast[:, 2], plain_loop(bases, nulls.random_subspaces(d + 2, 3, 1500, 4)[:, :d], sizes)[:, 2]).pvalue < 0.01
    with pytest.raises(ValueError, match="11 dimensions does not fit 9|31 dimensions does not fit 30"):
        nulls.isotropic_overlaps(bases, 2, 0, dimensions=[11 if d == 9 else 31] * 3)


def test_isotropic_similarities_draw_a_direction_before_they_average_over_prompts():
    rng = np.random.default_rng(6)
    alike = np.tile(rng.standard_normal(50), (400, 1)) + 0.1 * rng.standard_normal((400, 50))  # 400 shifts, all alike
    unit = alike / np.linalg.norm(alike, axis=1, keepdims=True)
    draws = nulls.isotropic_similarities(unit.mean(axis=0)[None], 2000, seed=7)
    slow = nulls.random_vectors(50, 2000, seed=7) @ unit.T  # draws x prompts
    assert np.allclose(draws[:, 0], slow.mean(axis=1), atol=1e-12)
    assert draws.std() == pytest.approx(1 / np.sqrt(50), rel=0.1)  # 400 alike prompts count as one


def test_halves_are_disjoint_of_equal_size_and_differ_between_splits():
    splits = nulls.halves(11, 6, seed=8)
    assert all(len(i) == len(j) == 5 and not set(i) & set(j) for i, j in splits)
    assert len({tuple(i) for i, _ in splits}) == 6
    assert all(len(i) == len(j) == 3 for i, j in nulls.halves(11, 6, seed=8, n=3))


def test_rows_dealt_out_are_all_rows_once_and_pairs_stay_apart():
    drawn = list(nulls.dealt_out(6, 4, 300, seed=2))
    assert all(len(i) == 6 and len(j) == 4 and set(i) | set(j) == set(range(10)) for i, j in drawn)
    assert np.allclose(np.bincount(np.concatenate([i for i, _ in drawn])) / 300, 0.6, atol=0.12)
    pairs = list(nulls.dealt_out(5, 5, 300, seed=2, paired=True))
    assert all((i % 5 == np.arange(5)).all() and (j % 5 == np.arange(5)).all() and set(i) | set(j) == set(range(10)) for i, j in pairs)
    assert np.mean([i < 5 for i, _ in pairs]) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="6 and 4 rows cannot be pairs"):
        list(nulls.dealt_out(6, 4, 1, 0, paired=True))


def test_whole_groups_are_dealt_out_and_split_and_none_is_torn():
    groups = np.repeat(np.arange(6), 4)[np.random.default_rng(0).permutation(24)]
    drawn = list(nulls.dealt_out(8, 16, 300, seed=2, groups=np.concatenate([np.repeat([0, 1], 4), np.repeat([2, 3, 4, 5], 4)])))
    assert all(len(i) == 8 and len(j) == 16 and set(i) | set(j) == set(range(24)) and len(set(i // 4)) == 2 for i, j in drawn)
    assert len({tuple(sorted(set(i // 4))) for i, _ in drawn}) == nulls.arrangements(8, np.repeat(np.arange(6), 4), False) == 15
    splits = nulls.halves(24, 300, 3, groups=groups)
    assert all(len(i) == len(j) == 12 and not set(groups[i]) & set(groups[j]) for i, j in splits)
    assert len({tuple(sorted(set(groups[i]))) for i, _ in splits}) == 20
    uneven = np.repeat([0, 1, 2], [10, 3, 2])
    assert {len(half) for pair in nulls.halves(15, 30, 0, groups=uneven) for half in pair} == {3}
    assert [len(half) for half in nulls.halves(24, 1, 3, 7, groups)[0]] == [7, 7]
    dealt = {len(one) for one, _ in nulls.dealt_out(5, 10, 50, 0, groups=np.repeat([0, 1, 2], [3, 2, 10]))}
    assert 5 in dealt and dealt <= {2, 3, 5, 10}, "the sizes that were, too"
    assert {len(one) for one, _ in nulls.dealt_out(2, 13, 50, 0, groups=np.repeat([0, 1, 2], [2, 3, 10]))} == {2, 3}, "never nothing"
    with pytest.raises(ValueError, match="all rows are of one group"):
        nulls.halves(5, 2, 0, groups=np.zeros(5, dtype=int))


def test_groups_on_both_sides_are_dealt_out_inside_and_pairs_of_a_group_change_sides_together():
    groups = np.array([0, 0, 1, 1, 2, 2] * 2)
    inside = list(nulls.dealt_out(6, 6, 200, seed=2, groups=groups))
    assert all(sorted(groups[i]) == sorted(groups[j]) == sorted(groups[:6]) for i, j in inside) and nulls.arrangements(6, groups, False) is None
    assert np.mean([i[0] < 6 for i, _ in inside]) == pytest.approx(0.5, abs=0.12)
    pairs = list(nulls.dealt_out(6, 6, 200, seed=2, paired=True, groups=groups))
    assert all(((i < 6).reshape(3, 2).sum(axis=1) % 2 == 0).all() and set(i) | set(j) == set(range(12)) for i, j in pairs)
    assert len({tuple(i) for i, _ in pairs}) == nulls.arrangements(6, groups, True) == 8


# ---- the covariance null


@pytest.mark.parametrize("shape", [(30, 12), (15, 40)])
def test_shrinkage_is_that_of_sklearn_in_any_coordinates(shape):
    x = np.random.default_rng(0).standard_normal(shape) * np.arange(1, shape[1] + 1) ** -0.5
    x -= x.mean(axis=0)
    shrunk, shrinkage = ledoit_wolf(x, assume_centered=True)
    ours, variance = covariance.ledoit_wolf(x)
    assert ours == pytest.approx(shrinkage) and variance == pytest.approx(np.trace(shrunk) / shape[1])
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((60, shape[1])))[0].T  # the same rows among 60 dimensions
    assert covariance.ledoit_wolf(x, 60) == pytest.approx(covariance.ledoit_wolf(x @ axes))
    assert covariance.ledoit_wolf(np.zeros((5, 3))) == (0.0, 0.0)


@pytest.mark.parametrize("degrees", [3, 8, 30])
def test_wishart_matrices_have_the_moments_of_scipys(degrees):
    rng, size = np.random.default_rng(0), 5
    draws = nulls.wishart(degrees, size, 4000, rng)
    assert np.allclose(draws.mean(axis=0), degrees * np.eye(size), atol=0.35 * np.sqrt(degrees / 8))
    variances = draws.var(axis=0)
    assert np.allclose(variances[np.eye(size) == 1], 2 * degrees, rtol=0.15) and np.allclose(variances[np.eye(size) == 0], degrees, rtol=0.15)
    assert (np.linalg.matrix_rank(draws[:50]) == min(degrees, size)).all()
    if degrees >= size:
        theirs = scipy_stats.wishart(degrees, np.eye(size)).rvs(4000, random_state=1)
        assert scipy_stats.ks_2samp(np.linalg.det(draws), np.linalg.det(theirs)).pvalue > 0.01


@pytest.mark.parametrize(("n_reference", "d", "power"), [(60, 20, 1.0), (30, 80, 1.0), (30, 80, 0.2)])
def test_sampled_overlaps_are_distributed_as_those_of_rows_drawn_and_centred_one_by_one(n_reference, d, power):
    """Both ways of drawing (the scatter where the reference fills the space, the Gram matrix where it does not) against rows."""
    rng, k, n = np.random.default_rng(0), 3, 16
    reference = rng.standard_normal((n_reference, d)) * np.arange(1, d + 1) ** -power + 4
    basis = principal_subspace(rng.standard_normal((40, d)) * np.arange(1, d + 1) ** -0.5, 4)
    seen = covariance.population(reference, basis, d, width=6)
    assert seen.others == (0 if n_reference > d else d - n_reference - 6)
    shrunk = ledoit_wolf(reference)[0]
    assert np.allclose((seen.spread**2).sum() + seen.rest * seen.others, np.trace(shrunk))
    assert np.allclose((seen.inside.T * seen.spread**2) @ seen.inside, basis.T @ shrunk @ basis, atol=1e-10)
    ours = covariance.sampled_overlaps([seen, seen], n, [k, 2], MEASURES["mean_cos2"], 400, rng)
    root = np.linalg.cholesky(shrunk)
    rows = [rng.standard_normal((n, d)) @ root.T + 7 for _ in range(400)]
    for i, size in enumerate((k, 2)):
        theirs = [MEASURES["mean_cos2"].of(Sample(one, size), fixed(basis)) for one in rows]
        assert scipy_stats.ks_2samp(ours[:, i], theirs).pvalue > 0.01
    if power < 1:
        return  # nearly all is noise, at any number of rows
    more = covariance.sampled_overlaps([seen], 3 * n if n_reference > d else n_reference, [k], MEASURES["mean_cos2"], 400, rng)
    assert scipy_stats.ks_2samp(ours[:, 0], more[:, 0]).pvalue < 0.01  # it would tell another number of rows


def fixed(basis):
    sample = Sample(np.eye(len(basis)), basis.shape[1])
    sample.basis = basis
    return sample


def test_subsamples_never_repeat_a_row():
    drawn = list(nulls.subsamples(10, 6, 200, seed=9))
    assert all(len(set(rows)) == 6 for rows in drawn)
    assert np.allclose(np.bincount(np.concatenate(drawn)) / 200, 0.6, atol=0.12)


def test_beside_gives_a_row_for_every_null_and_leaves_rows_without_null_alone():
    rows = [{"layer": 0, "estimate": 0.5}, {"layer": 1, "estimate": 5.0}]
    null = np.tile(np.linspace(0, 1, 99)[:, None], (1, 2))
    both = nulls.beside(rows, {"one": null, "two": null + 10}, "greater")
    assert [(row["layer"], row["null"]) for row in both] == [(0, "one"), (1, "one"), (0, "two"), (1, "two")]
    assert both[0]["p"] == pytest.approx(0.51) and both[1]["p"] == 0.01 and both[3]["p"] == 1.0
    assert nulls.beside(rows, {}, "greater") == rows


def test_every_null_says_hypothesis_generator_and_tail():
    for name in nulls.DESCRIPTIONS:
        told = nulls.describe(name)
        assert all(word in told for word in ("hypothesis: ", "drawn: ", "tail: ")), name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nulls.random_subspaces(4, 5, 1, 0), "does not fit 4"),
        (lambda: list(nulls.subsamples(4, 5, 1, 0)), "without replacement"),
        (lambda: nulls.halves(10, 2, 0, n=6), "two disjoint halves"),
        (lambda: nulls.halves(1, 2, 0), "two disjoint halves"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_same_seed_gives_the_same_draws():
    assert np.array_equal(nulls.random_subspaces(6, 2, 3, 1), nulls.random_subspaces(6, 2, 3, 1))
    assert not np.array_equal(nulls.random_subspaces(6, 2, 3, 1), nulls.random_subspaces(6, 2, 3, 2))
