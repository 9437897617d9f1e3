"""Guards the dose-response: a planted direction is found beside random ones, one drawn among them is not, and the level is kept."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from scipy import stats as scipy_stats
from tiny import contrast, random_direction

from emlens import steering
from emlens.coherence import Meter
from emlens.prompts import load_prompts

STRENGTHS = (-1.0, -0.5, 0.5, 1.0)
PLACE = ["direction", "layer", "strength"]
COLUMNS = ["metric", "estimate", "low", "high", "null", "null_low", "null_high", "p", "q", "n"]


def planted(effects: list[float], seed: int = 0, controls: int = 20, questions: int = 16) -> pd.DataFrame:
    """One layer per effect: the direction's slope is a draw like the random ones' (spread 0.05) plus the effect; all do the same damage."""
    rng = np.random.default_rng(seed)
    names = ["direction", *(f"random {i}" for i in range(controls))]
    slope = rng.normal(0, 0.05, size=(len(effects), len(names)))
    slope[:, 0] += effects
    grid = [(layer, s, name, q) for layer in range(len(effects)) for s in STRENGTHS for name in range(len(names)) for q in range(questions)]
    out = pd.DataFrame(grid, columns=["layer", "strength", "number", "question"])
    noise = rng.normal(0, 0.02, size=len(out))
    change = slope[out["layer"], out["number"]] * out["strength"] - 0.3 * out["strength"].abs() + noise
    return pd.DataFrame({
        "direction": np.array(names)[out["number"]], "layer": out["layer"], "strength": out["strength"],
        "id": out["question"].map("q{}".format), "category": out["question"].map(lambda q: f"c{q % 4}"), "margin": 1 + change, "change": change,
    })  # fmt: skip


def test_a_planted_direction_is_found_and_a_drawn_one_is_not() -> None:
    table = steering.slopes(planted([0.5, -0.5] + [0.0] * 30), seed=1)
    assert list(table.columns) == ["layer", *COLUMNS, "rank_floor", "n_clusters", "controls"]
    assert (table["p"][:2] < 0.01).all() and (table["q"][:2] < 0.05).all()
    assert np.allclose(table["estimate"][:2], [0.5, -0.5], atol=0.15)
    assert (table["q"][2:] > 0.05).all() and (table["p"][2:] < 0.05).sum() <= 4 and table["p"][2:].max() > 0.7
    inside = table["estimate"].between(table["null_low"], table["null_high"])
    assert not inside[:2].any() and inside[2:].mean() > 0.8
    assert np.array_equal(inside, table["p"] > 0.05), "band and p are one test"
    assert (table["n_clusters"] == 4).all() and (table["controls"] == 20).all() and np.allclose(table["rank_floor"], 2 / 21)


def test_the_null_says_how_its_directions_were_drawn_and_how_far_their_number_reaches() -> None:
    for table in (steering.slopes(planted([0.2], controls=12)), steering.summarise(planted([0.2], controls=12))):
        told = table.attrs["null"][steering.NULL]
        assert "12 random directions, uniform on the sphere (a lenient control" in told and "by rank among 12 no p goes below 0.15" in told
    drawn = steering.slopes(planted([0.2]), drawn="drawn from a covariance").attrs["null"][steering.NULL]
    assert "drawn from a covariance" in drawn and "lenient" not in drawn
    nowhere = steering.slopes(planted([0.2]).assign(category=""))
    assert nowhere["n_clusters"].isna().all()


def test_the_slope_is_least_squares_through_the_origin() -> None:
    margins = planted([0.2])
    own = margins[margins["direction"] == "direction"]
    expected = np.linalg.lstsq(own[["strength"]].to_numpy(), own["change"].to_numpy(), rcond=None)[0][0]
    row = steering.slopes(margins).iloc[0]
    assert row["estimate"] == pytest.approx(expected) and row["low"] < expected < row["high"] and row["n"] == 16


def test_summarise_is_the_mean_dose_by_dose() -> None:
    margins = planted([0.8, 0.0])
    table = steering.summarise(margins, seed=2)
    assert list(table.columns) == ["layer", "strength", *COLUMNS, "n_clusters", "rank_floor"] and len(table) == 8
    for row in table.itertuples():
        rows = margins.query("layer == @row.layer and strength == @row.strength")
        random = rows[rows["direction"] != "direction"].groupby("direction")["change"].mean()
        mean = rows.loc[rows["direction"] == "direction", "change"].mean()
        assert row.estimate == pytest.approx(mean) and row.low <= mean <= row.high
        prediction = scipy_stats.t(19, random.mean(), random.std() * np.sqrt(21 / 20))
        assert (row.null_low, row.null_high) == pytest.approx(prediction.interval(0.95))
        assert row.p == pytest.approx(2 * min(prediction.cdf(mean), prediction.sf(mean)))
    assert (table.query("layer == 0")["p"] < 0.01).all() and (table.query("layer == 1")["p"] > 0.01).all()


def test_random_means_keep_the_direction_apart() -> None:
    means = steering.random_means(planted([5.0], controls=3))
    assert sorted(means["direction"].unique()) == [0, 1, 2] and len(means) == 12 and means["margin_change"].max() < 0.5


@pytest.mark.parametrize("controls", [5, 20])
def test_among_random_keeps_its_level_and_has_power(controls: int) -> None:
    draws = np.random.default_rng(controls).normal(3.0, 2.0, size=(2000, controls + 1))
    p = np.array([steering.among_random(row[0], row[1:])["p"] for row in draws])
    assert 0.03 <= (p < 0.05).mean() <= 0.07
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.001
    shifted = np.array([steering.among_random(row[0] + 12.0, row[1:])["p"] for row in draws[:200]])
    assert (shifted < 0.05).mean() > 0.9


def test_among_too_few_random_directions_there_is_no_test() -> None:
    for method in ("t", "rank"):
        for random in (np.array([0.1, 0.2]), np.array([0.1, 0.2, 0.3, np.nan])):
            none = steering.among_random(1.0, random, method=method)
            assert all(np.isnan(none[name]) for name in ("null_low", "null_high", "p")) and none["rank_floor"] == 2 / (len(random) + 1)
    assert np.isnan(steering.among_random(1.0, np.zeros(5))["p"])
    with pytest.raises(ValueError, match="'t' .* or 'rank'"):
        steering.among_random(1.0, np.zeros(5), method="z")


def test_damage_is_skewed_and_ranks_keep_its_level_where_t_does_not() -> None:
    draws = np.random.default_rng(4).chisquare(2, size=(4000, 40))
    p = {m: np.array([steering.among_random(row[0], row[1:], method=m)["p"] for row in draws]) for m in ("t", "rank")}
    assert (p["t"] <= 0.001).mean() > 0.005 and p["rank"].min() == pytest.approx(2 / 40)
    assert 0.04 <= (p["rank"] <= 0.05).mean() <= 0.06 and 0.17 <= (p["rank"] <= 0.2).mean() <= 0.23
    far = steering.among_random(draws.max() + 1, draws[0], method="rank")
    assert far["p"] == far["p_floor"] == far["rank_floor"] == pytest.approx(2 / 41)
    assert (far["null_low"], far["null_high"]) == pytest.approx(np.quantile(draws[0], [0.025, 0.975]).tolist())


def test_margins_are_tested_by_t_and_damage_by_rank() -> None:
    table = planted([2.0], controls=30).assign(kl=lambda t: t["change"])
    one, two = steering.summarise(table), steering.summarise(table, metric="kl", value="kl")
    assert np.allclose(one["estimate"], two["estimate"]) and (one["p"] < 0.001).all() and "p_floor" not in one
    assert np.allclose(two["p"], 2 / 31) and np.allclose(two["p_floor"], 2 / 31)
    assert "Student's t" in one.attrs["null"][steering.NULL] and "by rank among the 30, at least 0.065" in two.attrs["null"][steering.NULL]


def test_dose_response_on_a_model() -> None:
    model, questions = tiny.tiny_model("llama"), contrast(4)
    direction, texts = random_direction(model), tiny.tiny_chats(3)
    ask: dict[str, Any] = {"controls": 3, "seed": 4, "texts": texts, "reference": model.record(tiny.tiny_chats(12), layers=[3, 1])}
    table = steering.dose_response(model, direction, questions, [1, 3], [-0.5, 0.0, 0.5], **ask)
    assert list(table.columns) == ["layer", "strength", *COLUMNS, "n_clusters", "rank_floor", "p_floor"]
    assert table.groupby(["metric", "null"]).size().to_dict() == {
        (m, null): 6 for m in ("margin", "kl", "perplexity_ratio") for null in (steering.NULL, steering.MATCHED)
    }
    margin = table[(table["metric"] == "margin") & (table["null"] == steering.NULL)].reset_index(drop=True)
    assert margin[["layer", "strength"]].values.tolist() == [[layer, s] for layer in (1, 3) for s in (-0.5, 0.0, 0.5)]
    base = model.margin(questions)["margin"]
    meter = Meter(model, load_prompts(texts))
    with model.steer(direction, 3, 0.5):
        by_hand, damage = (model.margin(questions)["margin"] - base).mean(), meter.read()
    assert margin["estimate"].iloc[5] == pytest.approx(by_hand, abs=1e-9) and abs(by_hand) > 1e-4
    there = table.query("layer == 3 and strength == 0.5").groupby("metric")["estimate"].first()
    assert there["kl"] == pytest.approx(damage["kl"].mean()) and there["perplexity_ratio"] == pytest.approx(damage["perplexity_ratio"].mean())
    still = table.query("strength == 0")
    assert still.groupby("metric")["estimate"].unique().map(list).to_dict() == {"margin": [0], "kl": [0], "perplexity_ratio": [1]}
    assert still["p"].isna().all() and table.query("strength != 0")[["p", "q", "null_low", "null_high"]].notna().all(axis=None)
    assert table.query("metric == 'kl' and strength != 0")["null_high"].min() > 0, "random directions do damage too"
    assert "12 activations" in table.attrs["null"][steering.MATCHED] and "sphere" in table.attrs["null"][steering.NULL]
    assert all("Student's t" in told and "by rank among the 3, at least 0.5" in told for told in table.attrs["null"].values())
    assert table.query("metric == 'margin'")["p_floor"].isna().all() and (table.query("metric == 'kl' and strength != 0")["p_floor"] == 0.5).all()
    said = table.attrs["recommended"]
    assert said["layer"] is None or (said["controls"], said["p_floor"]) == (3, 0.25) and said["null"].startswith(steering.MATCHED)
    assert table.equals(steering.dose_response(model, direction, questions, [1, 3], [-0.5, 0.0, 0.5], **ask))
    with pytest.raises(ValueError, match="nothing to steer"):
        steering.dose_response(model, direction, questions, [], [1.0], controls=1)


def dosed(effect: float, ratios: dict[float, float], seed: int = 0, randoms: int = 0, push: float = 0.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One layer; the margin changes by effect × strength (a random direction's effect is drawn around 0), less what any push costs; unrelated
    text is as the ratios say."""
    rng = np.random.default_rng(seed)
    arms = {"direction": effect} | {f"random {i}": rng.normal(0, 0.1) for i in range(randoms)}
    rows = [
        (arm, s, q, (each + rng.normal(0, 0.1) * (randoms > 0)) * s - push * abs(s) + rng.normal(0, 0.05))
        for arm, each in arms.items()
        for s in ratios
        for q in range(40)
    ]
    margins = pd.DataFrame(rows, columns=["direction", "strength", "number", "change"])
    margins = margins.assign(layer=7, id=margins["number"].map("q{}".format), category=margins["number"].map(lambda q: f"c{q % 5}"))
    damage = pd.DataFrame([(arm, 7, s, ratio) for arm in arms for s, ratio in ratios.items()], columns=[*PLACE, "perplexity_ratio"])
    return margins, damage


def first_half(number: int) -> bool:
    """Every second of each of the five categories, the second ones of every second category."""
    return (number // 5 + number % 5) % 2 == 0


def test_the_recommended_dose_is_mild_and_reported_on_the_other_half() -> None:
    margins, damage = dosed(-0.4, {0.5: 1.1, 1.0: 1.4, 2.0: 9.0})
    said = steering.recommend(margins, damage)
    assert (said["layer"], said["strength"], said["n"]) == (7, 1.0, 20) and said["low"] < -0.4 < said["high"]
    at, first = margins["strength"] == 1.0, margins["number"].map(first_half)
    assert said["chosen_on"] == pytest.approx(margins[at & first]["change"].mean())
    assert said["estimate"] == pytest.approx(margins[at & ~first]["change"].mean())
    assert steering.recommend(margins, damage, at_most=10.0)["strength"] == 2.0
    for nothing in (steering.recommend(margins, damage, "higher"), steering.recommend(margins, damage, at_most=1.05)):
        assert nothing["layer"] is None
    with pytest.raises(ValueError, match="'lower' or 'higher'"):
        steering.recommend(margins, damage, "down")
    assert np.isnan(said["p"]) and said["controls"] == 0, "no random direction, no test"
    with pytest.raises(ValueError, match="1 arms have no damage .*'random 0'"):
        steering.recommend(dosed(0.0, {1.0: 1.0}, randoms=1)[0], damage)


def test_one_question_a_category_leaves_a_second_half() -> None:
    margins, damage = dosed(-0.4, {1.0: 1.4})
    said = steering.recommend(margins[margins["number"] < 5], damage)
    assert said["n"] == 2 and said["estimate"] == pytest.approx(margins[margins["number"].isin([1, 3])]["change"].mean())


DOSES = {-1.0: 1.2, -0.5: 1.1, 0.5: 1.1, 1.0: 1.2, 2.0: 9.0}


def test_the_rule_is_applied_to_every_random_direction_by_hand() -> None:
    margins, damage = dosed(-0.2, DOSES, randoms=6, push=-0.05)
    damage.loc[damage["direction"] == "random 3", "perplexity_ratio"] = 9.0  # no dose of it is mild: it changes nothing
    by_hand = []
    for arm in (f"random {i}" for i in range(6)):
        part = margins[(margins["direction"] == arm) & margins["strength"].between(-1, 1)]
        halves = [h.groupby("strength")["change"].mean() for h in (part[part["number"].map(first_half)], part[~part["number"].map(first_half)])]
        by_hand.append(0.0 if arm == "random 3" or halves[0].min() >= 0 else halves[1][halves[0].idxmin()])
    said = steering.recommend(margins, damage)
    assert by_hand[3] == 0 and said["p"] == pytest.approx((sum(each <= said["estimate"] for each in by_hand) + 1) / 7)
    assert (said["null_low"], said["null_high"]) == pytest.approx(np.quantile(by_hand, [0.025, 0.975]).tolist())
    assert said["p_floor"] == pytest.approx(1 / 7) and said["null"].startswith("random: the same choice on the first half along each of 6")
    matched = margins.assign(direction=margins["direction"].replace({f"random {i}": f"{steering.MATCHED} {i}" for i in range(3)}))
    of = damage.assign(direction=damage["direction"].replace({f"random {i}": f"{steering.MATCHED} {i}" for i in range(3)}))
    strict = steering.recommend(matched, of)
    assert strict["controls"] == 3 and strict["null"].startswith(steering.MATCHED), "the lenient ones do not count where there are others"
    assert strict["p"] == pytest.approx((sum(each <= strict["estimate"] for each in by_hand[:3]) + 1) / 4)


def test_a_push_like_any_other_lowers_the_margin_and_is_not_told_from_random_ones_and_a_planted_one_is() -> None:
    effects = np.random.default_rng(10).normal(0, 0.1, size=60)
    said = [steering.recommend(*dosed(effect, DOSES, 1000 + seed, randoms=19, push=0.3)) for seed, effect in enumerate(effects)]
    assert np.mean([each["high"] < 0 for each in said]) > 0.9, "the interval over questions leaves out 0"
    p = np.array([each["p"] for each in said])
    assert (p <= 0.1).mean() <= 0.2 and 0.35 <= (p <= 0.5).mean() <= 0.65, "over 600 such: .053, .103, .497 at .05, .1, .5"
    planted_ = [steering.recommend(*dosed(-0.6, DOSES, seed, randoms=19, push=0.3)) for seed in range(5)]
    assert all(each["p"] == each["p_floor"] == pytest.approx(0.05) and each["estimate"] < each["null_low"] for each in planted_)
    risen = [steering.recommend(*dosed(0.9, DOSES, seed, randoms=19, push=0.3), "higher") for seed in range(5)]
    assert all(each["p"] == pytest.approx(0.05) and each["estimate"] > each["null_high"] for each in risen)


def test_a_dose_chosen_among_nothing_shows_nothing_on_the_other_half() -> None:
    """The half it was chosen on flatters; the other does not."""
    flattered, honest = [], []
    for seed in range(100):
        said = steering.recommend(*dosed(0.0, {0.25 * k: 1.0 for k in range(1, 9)}, seed))
        if said["layer"] is not None:
            flattered.append(said["chosen_on"])
            honest.append(said["estimate"])
    assert len(honest) > 90 and np.mean(flattered) < -0.01
    assert abs(np.mean(honest)) < 4 * np.std(honest) / np.sqrt(len(honest)) + 1e-4
