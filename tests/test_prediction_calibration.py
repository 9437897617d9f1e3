"""Guards the nulls of em.predict: each rejects at its level under its own hypothesis, shortcuts do not, what is planted is found and covered."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from threadpoolctl import threadpool_limits

from emlens import calibration, ridge, scores, stats
from emlens.activations import Activations
from emlens.folds import make_folds
from emlens.prediction import predict

OWN = {
    "within_groups": "groups",
    "group_blocks": "groups",
    "group_means": "groups",
    "all_rows": "nothing",
    "activation_rows": "topic",
}
PENALTIES = (1.0, 100.0, 1e4)
OF_TARGET = ["within_groups", "group_blocks", "group_means"]


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def allowed(n, level=0.05, beyond=0.005):
    """Numbers of rejections that n copies give at a rate of `level` but for `beyond` of the cases on either side."""
    law = scipy_stats.binom(n, level)
    return law.ppf(beyond), law.ppf(1 - beyond)


def as_activations(copy):
    return Activations.from_array(copy.activations.astype(np.float32), {"y": copy.target, "group": copy.codes})


def rates(worlds, schemes, n_seeds, **settings):
    return calibration.prediction_rejection_rates(worlds, schemes, n_seeds, **settings)


def test_the_p_examined_here_is_the_one_that_predict_gives():
    copy = calibration.simulated_prompts("planted", (6, 9, 9, 8), n_layers=3, d_model=5, seed=3)
    acts = as_activations(copy)
    copy = copy._replace(activations=acts.values)  # float32, as predict has them
    nulls = ["within_groups", "group_blocks", "group_means", "all_rows"]
    ask = {"metrics": ("r2", "delta_r2"), "beyond": lambda facts: copy.text, "baselines": (), "penalties": PENALTIES, "n_permutations": 39}
    table = predict(acts, "y", groups="group", nulls=nulls, seed=3, **ask)
    told = table.groupby("null")["q"].min()
    found = calibration.prediction_p(copy, [*nulls, "activation_rows"], 39, PENALTIES, seed=3)
    assert found == pytest.approx(told.to_dict()) and len(set(found.values())) > 2
    plain = predict(acts, "y", seed=3, **(ask | {"metrics": ("r2",)}))
    assert calibration.prediction_p(copy, ["all_rows, plain folds"], 39, PENALTIES, seed=3) == {"all_rows, plain folds": plain["q"].min()}


def test_the_shortcut_of_permuting_the_target_fits_every_model_anew():
    copy = calibration.simulated_prompts("topic", (5, 6, 7, 6), d_model=4, seed=1)
    folds = make_folds(24, copy.codes).rounds[0]
    orders = np.concatenate([np.arange(24)[None], stats.permutations(24, 19, 1, within=copy.codes)])
    values = []
    for order in orders:
        y = copy.target[order]
        left = ridge.residuals(ridge.fixed(copy.text), y, folds, PENALTIES)
        second = ridge.nested_ridge(ridge.fixed(copy.activations[:, 0]), left[:, :, None], folds, PENALTIES).predictions[:, 0]
        before = np.array([left[f, i] for i in range(24) for f, fold in enumerate(folds) if i in fold.test])
        values.append((before**2 - (before - second) ** 2).sum())
    p = calibration.prediction_p(copy, ["target permuted for delta_r2"], 19, PENALTIES, seed=1)
    assert p["target permuted for delta_r2"] == stats.permutation_p(values[0], np.array(values[1:]))


def test_each_null_holds_its_level_under_its_own_hypothesis():
    """120 copies each: as often as the binomial law allows."""
    small = {"sizes": (8,) * 6, "n_draws": 19, "d_model": 6}
    found = rates(["groups"], OF_TARGET, 120, **small).loc["groups"]
    found["all_rows"] = rates(["nothing"], ["all_rows"], 120, **small).iloc[0, 0]
    low, high = allowed(120)
    assert (found * 120).between(low, high).all(), found


def test_shortcuts_reject_where_nothing_is_and_the_gain_over_text_does_not():
    level = rates(["same level"], ["within_groups", "all_rows", "all_rows, plain folds"], 60, sizes=(8,) * 6, n_draws=19, d_model=6).iloc[0]
    assert level["within_groups"] * 60 <= allowed(60)[1], "the level of a group is not beyond the group"
    assert level["all_rows"] > 0.4 and level["all_rows, plain folds"] > 0.8
    table = rates(["topic", "planted"], ["activation_rows", "activation_rows, text left in"], 40, sizes=(12,) * 6, n_draws=19, gain=1.5)
    assert table.loc["topic", "activation_rows, text left in"] > 0.2  # rows permuted with the text still in them
    assert table.loc["topic", "activation_rows"] * 60 <= allowed(60)[1]
    assert table.loc["planted", "activation_rows"] > 0.5  # the twin: something is there


def test_worlds_are_drawn_anew_by_seed_and_refuse_other_names():
    one, two, other = (calibration.simulated_prompts("topic", (3, 5), 2, 4, seed=s) for s in (0, 0, 1))
    assert one.activations.shape == (8, 2, 4) and one.codes.tolist() == [0] * 3 + [1] * 5
    assert np.array_equal(one.target, two.target) and not np.allclose(one.target, other.target)
    with pytest.raises(ValueError, match="unknown world 'text'; choose one of nothing"):
        calibration.simulated_prompts("text")
    with pytest.raises(ValueError, match=r"unknown schemes \['rows'\]; choose among within_groups"):
        calibration.prediction_p(one, ["rows"])


# ---- intervals


def planted(n_groups, size, seed):
    """Two features of six carry a signal of variance 1 beside noise of 1 and group levels of 1/4: R2 of the signal is 4/9."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(n_groups), size)
    x = rng.standard_normal((len(codes), 6)) * np.arange(1, 7) ** -0.5
    y = x[:, :2].sum(axis=1) / np.sqrt(1.5) + 0.5 * rng.standard_normal(n_groups)[codes] + rng.standard_normal(len(codes))
    return x, y, codes


def test_a_planted_signal_of_known_r2_lies_in_its_interval():
    x, y, codes = planted(40, 15, seed=0)
    acts = Activations.from_array(x[:, None].astype(np.float32), {"y": y, "group": codes})
    row = predict(acts, "y", groups="group", baselines=(), n_permutations=99, penalties=PENALTIES).iloc[0]
    assert row["low"] < 4 / 9 < row["high"] and row["p"] == 0.01 and row["low"] > row["null_high"]


def covered(n_groups, n_seeds):
    """How often the 95 % interval holds the R2 of the signal itself, and the mean estimate (what a fit on so many rows reaches)."""
    rows = []
    for seed in range(n_seeds):
        x, y, codes = planted(n_groups, 15, seed)
        folds = make_folds(len(y), codes)
        asked = scores.Asked(y, codes, folds.rounds, 0.95, seed)
        found = ridge.nested_ridge(ridge.fixed(x), y[:, None], folds.rounds[0], PENALTIES).predictions
        low, high = scores.METRICS["r2"].interval(asked, found[None])
        rows.append((ridge.r2(y[:, None], found)[0], low[0], high[0]))
    estimate, low, high = np.array(rows).T
    return [((low <= truth) & (truth <= high)).mean() for truth in (4 / 9, estimate.mean())]


@pytest.mark.slow
def test_coverage_grows_with_the_number_of_groups():
    few, many = covered(8, 200), covered(40, 200)
    print("\n8 groups", few, "40 groups", many)
    assert 0.75 <= few[0] <= 0.90 and 0.85 <= few[1] <= 0.96
    assert 0.80 <= many[0] <= 0.97 and 0.90 <= many[1] <= 0.98


@pytest.mark.slow
def test_the_table_over_1000_seeds():
    """Seeds 0 to 999, 120 prompts in 8 groups."""
    found = {
        "groups": rates(["groups"], [*OF_TARGET, "all_rows, plain folds"], 1000).iloc[0],
        "nothing": rates(["nothing"], ["all_rows"], 1000).iloc[0],
        "topic": rates(["topic"], ["activation_rows", "activation_rows, text left in", "target permuted for delta_r2"], 1000).iloc[0],
    }
    print("\n", {world: row.round(3).to_dict() for world, row in found.items()})
    for scheme, world in OWN.items():
        assert 0.03 <= found[world][scheme] <= 0.07, (scheme, found[world][scheme])
    assert found["groups"]["all_rows, plain folds"] > 0.3
    assert found["topic"]["activation_rows, text left in"] > 0.2 and found["topic"]["target permuted for delta_r2"] > 0.08
