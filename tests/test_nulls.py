"""Guards the draws behind every null: random things are distributed as claimed, halves are disjoint, no row repeats."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from emlens import nulls


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


def test_isotropic_overlaps_equal_a_plain_loop_over_the_same_subspaces():
    bases = nulls.random_subspaces(15, 2, 3, seed=3)  # three "layers"
    fast = nulls.isotropic_overlaps(bases, 7, seed=4)
    subspaces = nulls.random_subspaces(15, 2, 7, seed=4)
    slow = [[((u.T @ v) ** 2).sum() / 2 for u in bases] for v in subspaces]
    assert np.allclose(fast, slow, atol=1e-12)
    assert np.allclose(nulls.isotropic_overlaps(bases, 4000, seed=5).mean(axis=0), 2 / 15, atol=0.005)


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
