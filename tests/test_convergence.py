"""Guards convergence of tunings: cosines against their exact null, and what the ablation of one direction does in another tuning."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from scipy import stats as scipy_stats

import emlens as em
from emlens.convergence import ablation_transfer, direction_cosines


def test_cosines_of_random_directions_are_as_their_null_says() -> None:
    many = {f"d{i}": em.Direction.from_array(np.random.default_rng(i).normal(size=(10, 24))) for i in range(12)}
    table = direction_cosines(many)
    assert len(table) == 66 * 10 and scipy_stats.kstest(table["p"], "uniform").pvalue > 0.01
    inside = table["estimate"].between(table["null_low"], table["null_high"])
    assert 0.93 < inside.mean() < 0.97 and np.array_equal(inside, table["p"] > 0.05)
    drawn = np.random.default_rng(0).normal(size=(20000, 24))
    drawn = drawn[:, 0] / np.linalg.norm(drawn, axis=1)
    assert np.isclose(table["null_high"].iloc[0], np.quantile(drawn, 0.975), atol=0.01)


def test_a_shared_direction_is_seen_where_it_is_shared() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(4, 64))
    shared[2:] = 0
    several = {name: em.Direction.from_array(rng.normal(size=(4, 64)) + 2 * shared) for name in "abc"}
    table = direction_cosines(several).set_index("layer")
    assert (table.loc[[0, 1], "q"] < 1e-6).all() and (table.loc[[2, 3], "q"] > 0.01).all()
    one, two = several["a"], several["b"]
    assert np.isclose(table[table["a"].eq("a") & table["b"].eq("b")].loc[1, "estimate"], one.layer(1) @ two.layer(1), atol=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        direction_cosines({"a": one})
    with pytest.raises(ValueError, match="width 64.*width 8"):
        direction_cosines({"a": one, "b": em.Direction.from_array(np.ones((4, 8)))})


def test_transfer_is_the_change_of_the_margin_in_the_other_tuning(tmp_path: Path) -> None:
    model, questions = tiny.tiny_model(), tiny.contrast(4)
    for seed, name in enumerate(("one", "two"), start=1):
        model.add_adapter(name, tiny.save_adapter(tmp_path / name, seed=seed))
    directions = {name: em.mean_difference(*(model.record(questions, adapter=a) for a in (name, None))) for name in ("one", "two")}
    table = ablation_transfer(model, directions, questions, controls=4, reference=model.record(questions)).set_index(["tuning", "direction_of"])
    assert len(table) == 4
    before = model.margin(questions, "two")["margin"]
    with model.ablate(directions["one"]):
        by_hand = (model.margin(questions, "two")["margin"] - before).mean()
    row = table.loc[("two", "one")]
    assert row["estimate"] == pytest.approx(by_hand) and abs(by_hand) > 1e-5 and row["margin_before"] == pytest.approx(before.mean())
    assert table.loc["two", "null_low"].nunique() == 1 and table["null_low"].nunique() == 2, "random directions are ablated in each tuning"
    with pytest.raises(KeyError, match="no adapter 'three'"):
        ablation_transfer(model, {"three": directions["one"]}, questions)
