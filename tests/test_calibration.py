"""Guards the nulls of an overlap: each is uniform under its own hypothesis, and what it does under the others' is as the table says."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from emlens import calibration

OWN = {"isotropic": "random subspace", "covariance": "reference", "reference": "reference", "labels": "same population"}


def allowed(n, level=0.05, beyond=0.005):
    """Numbers of rejections that n copies give at a rate of `level` but for `beyond` of the cases on either side."""
    law = scipy_stats.binom(n, level)
    return law.ppf(beyond), law.ppf(1 - beyond)


@pytest.mark.parametrize("null", sorted(OWN))
def test_p_is_uniform_under_the_nulls_own_hypothesis(null):
    """Anisotropic populations, half of their variance in common axes; 120 copies, fixed seeds."""
    p = calibration.p_values(OWN[null], 120, [null], n_draws=39)[null]
    low, high = allowed(120)
    assert low <= (p <= 0.05).sum() <= high
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_each_null_rejects_what_it_should_and_is_blind_to_what_it_does_not_ask():
    rates = calibration.rejection_rates(("random subspace", "reference", "shared 0.4", "same population"), 30, n_draws=29)
    assert rates.columns.tolist() == list(calibration.NULLS) and rates.index.name == "world"
    assert (rates.loc[["reference", "shared 0.4", "same population"], "isotropic"] > 0.9).all()  # common axes are enough for it
    assert (rates.loc["random subspace", ["covariance", "reference"]] < 0.02).all() and rates.loc["random subspace", "labels"] > 0.9
    assert (rates.loc["shared 0.4", ["covariance", "reference", "labels"]] > 0.5).all()
    assert (rates.loc["same population", ["covariance", "reference"]] > 0.85).all()


def test_a_reference_smaller_than_the_space_is_calibrated_too():
    p = calibration.p_values("reference", 100, ["covariance"], n_b=24, n_reference=60, d_model=100, n_draws=39)["covariance"]
    low, high = allowed(100)
    assert low <= (p <= 0.05).sum() <= high and scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_copies_are_drawn_anew_and_seeds_are_kept():
    a, b, reference = calibration.simulated("reference", 3, 8, 6, 9, 5, 2.0, seed=1)
    assert [len(x) for x in (a, b, reference)] == [8, 6, 9] and a.layers == (0, 1, 2) and a.d_model == 5
    assert not np.allclose(a.values[:, 0], a.values[:, 1]) and not set(a.ids) & set(b.ids)
    assert np.array_equal(a.values, calibration.simulated("reference", 3, 8, 6, 9, 5, 2.0, seed=1)[0].values)
    with pytest.raises(ValueError, match="unknown world 'null'; choose one of random subspace"):
        calibration.simulated("null", 1, 8, 6, 9, 5, 2.0, 0)


POWER = {"shared 0.1": (0.10, 0.22), "shared 0.2": (0.30, 0.50), "shared 0.4": (0.75, 0.97)}
"""Planted share of a's variance -> power that is stated for 'covariance' and an Activations (60, 40 and 160 prompts, 30 dimensions, k 3)."""


@pytest.mark.slow
def test_the_table_over_500_seeds():
    rates = calibration.rejection_rates(n_seeds=500)
    print("\n", rates.round(3).to_string())
    for null, world in OWN.items():
        assert 0.03 <= rates.loc[world, null] <= 0.07, (null, rates.loc[world, null])
    for world, (low, high) in POWER.items():
        assert rates.loc[world, ["covariance", "reference"]].between(low, high).all(), world
    assert (rates.loc[list(POWER), "isotropic"] > 0.99).all() and rates.loc["reference", "isotropic"] > 0.99
    assert (rates.loc[["random subspace", "reference"], "labels"] > 0.95).all()
    assert (rates.loc["random subspace", ["covariance", "reference"]] < 0.01).all()
