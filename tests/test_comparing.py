"""Guards the comparison of scores before and after: effects and p against scipy and by hand, planted shifts found and none where there is none,
ceilings, noise taken out of a correlation, and a word of warning wherever the two sides were not treated alike."""

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

import emlens as em
from emlens import effects, stats
from emlens.comparing import HOUSE, SCALES, by_question, compare_scores
from emlens.effects import TESTS, Pair

QUICK: dict[str, Any] = {"n_boot": 200, "n_permutations": 199}


def pair_of(n: int = 30, seed: int = 0, clusters: np.ndarray | None = None, shift: float = 2.0) -> Pair:
    rng = np.random.default_rng(seed)
    before = np.round(rng.normal(60, 10, n))  # ties, as scores have
    after = np.round(0.5 * before + rng.normal(30 + shift, 6, n))
    return Pair(before, after, rng.uniform(1, 4, n), rng.uniform(1, 4, n), np.arange(n) if clusters is None else clusters)


def answers(
    level: np.ndarray, n_answers: int = 20, seed: int = 0, sd: float | np.ndarray = 10.0, facts: dict[str, Any] | None = None, offset: float = 0.0
) -> pd.DataFrame:
    """One row per answer, scores on [0, 100] by clipping; question i has the mean level[i] before clipping."""
    drawn = np.random.default_rng(seed).normal(
        np.asarray(level)[:, None] + offset, np.broadcast_to(sd, (len(level),))[:, None], (len(level), n_answers)
    )
    ids = np.repeat([f"q{i}" for i in range(len(level))], n_answers)
    return pd.DataFrame({"question_id": ids, "aligned": np.clip(drawn, 0, 100).ravel(), **(facts or {})})


def row(table: pd.DataFrame, null: str, metric: str | None = None, **keys: str) -> pd.Series:
    found = table[(table["null"] == null) & (metric is None or table["metric"] == metric)]
    for key, value in ({"of": "mean", "scale": "score"} | keys).items():
        found = found[found[key] == value]
    assert len(found) == 1
    return found.iloc[0]


# ---- effects


def test_effects_by_hand() -> None:
    pair = Pair(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 4, 3]), *np.full((2, 4), 0.25), np.arange(4))
    one = np.ones((1, 4))
    found = {f.__name__: f(pair, one)[0] for test in TESTS.values() for f in test.measures}
    assert found["difference"] == 0.5 and found["rank_biserial"] == pytest.approx((3 + 1.5 - 1.5) / 6)
    assert found["cohen_dz"] == pytest.approx(0.5 / np.std([0, 2, 1, -1], ddof=1)) and found["cohen_d"] == pytest.approx(
        0.5 / np.sqrt((5 / 3 + 2) / 2)
    )
    assert found["cliffs_delta"] == pytest.approx(((0 + 3 + 3 + 2) - (3 + 0 + 0 + 1)) / 16)
    assert found["log_sd_ratio"] == pytest.approx(np.log(np.sqrt(2 / (5 / 3)))) and found["ks_distance"] == 0.25
    assert found["reliability_before"] == pytest.approx(1 - 0.25 / (5 / 3)) and found["reliability_after"] == pytest.approx(1 - 0.25 / 2)
    r = np.corrcoef(pair.before, pair.after)[0, 1]
    assert found["disattenuated_r"] == pytest.approx(r / np.sqrt((1 - 0.15) * (1 - 0.125))) and found["pearson_r"] == pytest.approx(r)


def test_effects_are_those_of_scipy_and_of_the_house() -> None:
    pair, one = pair_of(), np.ones((1, 30))
    house = stats.paired(pair.before, pair.after)
    assert effects.rank_biserial(pair, one)[0] == pytest.approx(house["rank_biserial"]) and effects.cohen_dz(pair, one)[0] == pytest.approx(
        house["cohen_dz"]
    )
    assert effects.spearman_r(pair, one)[0] == pytest.approx(scipy_stats.spearmanr(pair.before, pair.after).statistic)
    assert effects.slope(pair, one)[0] == pytest.approx(scipy_stats.linregress(pair.before, pair.after).slope)
    u = scipy_stats.mannwhitneyu(pair.after, pair.before).statistic
    assert effects.cliffs_delta(pair, one)[0] == pytest.approx(2 * u / 30**2 - 1)


@pytest.mark.parametrize("measure", [f for test in TESTS.values() for f in test.measures if f is not effects.ks_distance])
def test_a_weighted_effect_is_that_of_the_repeated_rows(measure: Any) -> None:
    pair = pair_of()
    weights = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4).astype(float)
    for one, found in zip(weights, measure(pair, weights), strict=True):
        rows = np.repeat(np.arange(30), one.astype(int))
        assert found == pytest.approx(measure(Pair(*(each[rows] for each in pair)), np.ones((1, len(rows))))[0], rel=1e-9)


def test_p_values_are_scipys() -> None:
    pair = pair_of()
    b, a = pair.before, pair.after
    two_sided_f = 2 * min(scipy_stats.f.cdf(a.var(ddof=1) / b.var(ddof=1), 29, 29), scipy_stats.f.sf(a.var(ddof=1) / b.var(ddof=1), 29, 29))
    oracle = {
        "wilcoxon": scipy_stats.wilcoxon(a, b).pvalue,
        "paired_t": scipy_stats.ttest_rel(a, b).pvalue,
        "t": scipy_stats.ttest_ind(a, b).pvalue,
        "rank_sum": scipy_stats.mannwhitneyu(b, a).pvalue,
        "f": two_sided_f,
        "brown_forsythe": scipy_stats.levene(b, a, center="median").pvalue,
        "pitman_morgan": scipy_stats.pearsonr(a + b, a - b).pvalue,
        "ks": scipy_stats.ks_2samp(b, a).pvalue,
        "pearson": scipy_stats.pearsonr(b, a).pvalue,
        "spearman": scipy_stats.spearmanr(b, a).pvalue,
    }
    assert {name: effects.tested(name, pair, n_boot=2)[0]["p"] for name in oracle} == pytest.approx(oracle, rel=1e-9)
    assert effects.tested("sign_flip", pair, n_boot=2)[0]["p"] == pytest.approx(stats.paired(b, a)["p"])


@pytest.mark.filterwarnings("error")
def test_nothing_moved_is_p_1_and_a_constant_side_has_no_correlation() -> None:
    values = np.array([3.0, 5, 7, 9])
    same = Pair(values, values, *np.full((2, 4), np.nan), np.arange(4))
    moved = [name for name in TESTS if name not in ("pearson", "spearman", "permutation", "slope", "reliability", "disattenuated")]
    assert [effects.tested(name, same, n_boot=10)[0]["p"] for name in moved] == [1.0] * len(moved)
    flat = Pair(values, np.full(4, 5.0), *np.full((2, 4), np.nan), np.arange(4))
    for name in ("pearson", "spearman", "permutation", "pitman_morgan", "disattenuated"):
        assert np.isnan(effects.tested(name, flat, n_boot=10)[0]["p"])
    assert np.isnan(effects.tested("spearman", flat, n_boot=10)[0]["estimate"])


# ---- one row per question


def test_answers_are_reduced_to_questions() -> None:
    table = pd.DataFrame(
        {"id": list("aabbb"), "aligned": [10.0, 30, 50, np.nan, 80], "category": list("xxyyy"), "answer": list("12345"), "judge": ["j"] * 5}
    )
    out = by_question(table).set_index("id")
    assert (
        list(out.index) == ["a", "b"]
        and out["aligned"].tolist() == [20, 65]
        and out["aligned_std"].tolist() == pytest.approx([np.sqrt(200), np.sqrt(450)])
    )
    assert out["aligned_n"].tolist() == [2, 2] and out["n_answers"].tolist() == [2, 3] and out["aligned_se"].tolist() == pytest.approx([10, 15])
    assert out["category"].tolist() == ["x", "y"] and out["judge"].tolist() == ["j", "j"] and "answer" not in out
    with pytest.raises(KeyError, match="no column \\['harmless'\\]"):
        by_question(table, ["harmless"])
    with pytest.raises(ValueError, match="no score among"):
        by_question(table[["id", "category"]])


def test_answers_and_question_tables_give_the_same() -> None:
    level = np.random.default_rng(0).uniform(30, 80, 12)
    before, after = answers(level, seed=1), answers(level, seed=2, offset=5)
    long = compare_scores(before, after, **QUICK)
    short = compare_scores(by_question(before), by_question(after).rename(columns={"id": "question_id"}).sample(frac=1, random_state=0), **QUICK)
    pd.testing.assert_frame_equal(long, short)
    assert set(long["null"]) == {*HOUSE, "reliability", "disattenuated"} and set(long["of"]) == {"mean", "spread"}
    plain = compare_scores(by_question(before)[["id", "aligned"]], by_question(after)[["id", "aligned"]], **QUICK)
    assert set(plain["null"]) == set(HOUSE) and set(plain["of"]) == {"mean"}


def test_it_is_a_result_and_says_how_it_was_made() -> None:
    level = np.linspace(20, 80, 12)
    found = compare_scores(answers(level, seed=1), answers(level, seed=2), clusters=None, scales=("score", "logit", "rank"), **QUICK)
    assert (
        list(found.columns[:13]) == ["score", "of", "scale", *stats.COLUMNS]
        and not found.duplicated(["score", "of", "scale", "metric", "null"]).any()
    )
    assert json.loads(json.dumps(found.attrs)) == found.attrs and set(found.attrs["null"]) == set(found["null"])
    assert "(mean + 0.5) / 101" in found.attrs["scales"]["logit"] and found.attrs["cautions"] == []
    assert set(found.loc[found["null"] == "disattenuated", "scale"]) == {"score"}
    assert row(found, "sign_flip")["mean_before"] == pytest.approx(by_question(answers(level, seed=1))["aligned"].mean())


# ---- planted, and nothing planted


def test_a_planted_shift_is_found_and_no_shift_is_not() -> None:
    level = np.random.default_rng(3).uniform(20, 80, 60)
    none = compare_scores(answers(level, seed=1), answers(level, seed=2), of=("mean",))
    shifted = compare_scores(answers(level, seed=1), answers(level, seed=2, offset=-4), of=("mean",))
    for test in ("sign_flip", "wilcoxon", "paired_t"):
        assert row(shifted, test)["q"] < 1e-3 and row(none, test)["q"] > 0.05
        assert row(shifted, test)["high"] < 0 and row(none, test)["low"] < 0 < row(none, test)["high"]
    assert row(shifted, "sign_flip")["low"] < -4 < row(shifted, "sign_flip")["high"]


def test_a_wider_spread_over_answers_is_found_and_a_wider_spread_over_questions_is_another_thing() -> None:
    level = np.random.default_rng(3).uniform(40, 60, 60)
    wider = compare_scores(answers(level, seed=1, sd=5.0), answers(level, seed=2, sd=8.0), **QUICK)
    found = row(wider, "sign_flip", of="spread")
    assert found["low"] < 3 < found["high"] and found["q"] < 0.05 and row(wider, "sign_flip")["q"] > 0.05
    apart = compare_scores(answers(level, 100, seed=1, sd=5.0), answers(2 * level - 50, 100, seed=2, sd=5.0), **QUICK)
    ratio = row(apart, "paired_levene")
    assert ratio["low"] < np.log(2) < ratio["high"] and ratio["q"] < 0.02 and row(apart, "sign_flip", of="spread")["q"] > 0.05


def test_noise_is_taken_out_of_the_correlation() -> None:
    rng = np.random.default_rng(5)
    truth = rng.multivariate_normal([50, 50], [[25, 20], [20, 25]], size=400)  # r = 0.8; answers of sd 15, 9 each: reliability 1/2
    found = compare_scores(
        *(answers(truth[:, i], 9, seed=i, sd=15.0) for i in (0, 1)), of=("mean",), tests=("pearson", "reliability", "disattenuated")
    )
    plain, clean = row(found, "pearson"), row(found, "disattenuated")
    assert plain["high"] < 0.6 and clean["low"] < 0.8 < clean["high"] and np.isnan(clean["p"])
    for side in ("before", "after"):
        each = row(found, "reliability", f"reliability_{side}")
        assert each["low"] < 0.5 < each["high"]


def test_where_questions_do_not_differ_the_clean_correlation_is_refused() -> None:
    means = np.array([50.0, 51, 49, 50.5, 49.5, 50])
    same = pd.DataFrame({"id": list("abcdef"), "aligned": means, "aligned_std": 20.0, "n": 10})
    with pytest.warns(UserWarning, match="draw more answers"):
        found = compare_scores(same, same.assign(aligned=means[::-1]), tests=("reliability", "disattenuated"), **QUICK)
    assert row(found, "reliability", "reliability_before")["estimate"] < 0
    assert row(found, "disattenuated")[["estimate", "low", "high"]].isna().all()


def test_no_interval_where_many_samples_have_no_value() -> None:
    pair = pair_of(12)._replace(error_after=np.full(12, 0.2))
    noisy = pair._replace(error_before=np.full(12, 0.8 * pair.before.var(ddof=1)))  # reliability 0.2, and below 0 in many a sample
    picks = np.random.default_rng(0).integers(12, size=(300, 12))
    assert 0.1 < np.mean([0.8 * pair.before.var(ddof=1) > pair.before[pick].var(ddof=1) for pick in picks]) < 0.9
    found, clean = (effects.effect(effects.disattenuated_r, one, n_boot=500) for one in (noisy, pair))
    assert np.isfinite(found["estimate"]) and np.isnan(found["low"]) and np.isnan(found["high"])
    assert clean["low"] < clean["estimate"] < clean["high"]


# ---- ceilings

SEEDS = range(1000)


def ceiling(seed: int, n: int = 40, n_before: int = 20, n_after: int = 20) -> Pair:
    """Question means and spreads of one distribution on both sides: most answers are at 100."""
    rng = np.random.default_rng(seed)
    level, sd = rng.normal(112, 15, n)[:, None], rng.uniform(5, 20, n)[:, None]
    before, after = (np.clip(level + sd * rng.normal(size=(n, count)), 0, 100) for count in (n_before, n_after))
    return Pair(before.std(axis=1, ddof=1), after.std(axis=1, ddof=1), before.mean(axis=1), after.mean(axis=1), np.arange(n) // 5)


def rejected(pairs: list[Pair], test: str) -> float:
    return float(np.mean([effects.tested(test, pair, n_boot=2, n_permutations=256)[0]["p"] <= 0.05 for pair in pairs]))


@pytest.mark.parametrize("seeds", [SEEDS[:200], pytest.param(SEEDS, marks=pytest.mark.slow)], ids=["few", "1000"])
def test_paired_tests_hold_their_level_under_heavy_ceilings(seeds: range) -> None:
    alone = [Pair(p.error_before, p.error_after, p.before, p.after, np.arange(40)) for p in map(ceiling, seeds)]
    together = [p._replace(clusters=np.arange(40) // 5) for p in alone]
    assert np.mean([np.mean(p.before > 98) for p in alone]) > 0.5
    low, high = (0.03, 0.07) if len(seeds) == 1000 else (0.015, 0.085)
    for test in ("sign_flip", "wilcoxon", "paired_levene"):
        assert low <= rejected(alone, test) <= high, test
    assert low <= rejected(together, "sign_flip") <= high  # 2^8 arrangements, enumerated


def test_tests_that_forget_the_ceiling_or_the_pairs_do_not() -> None:
    alone = [Pair(p.error_before, p.error_after, p.before, p.after, np.arange(40)) for p in map(ceiling, SEEDS[:100])]
    assert rejected(alone, "pitman_morgan") > 0.2 and "wrong for scores that pile up" in TESTS["pitman_morgan"].hypothesis
    for test in ("t", "rank_sum", "ks", "brown_forsythe"):
        assert rejected(alone, test) < 0.01  # blind: questions differ more than any shift


def test_a_shift_is_seen_under_heavy_ceilings() -> None:
    drawn = [ceiling(seed) for seed in SEEDS[:100]]
    lower = [Pair(p.error_before, p.error_after - 0.05 * (100 - p.error_after) - 0.5, p.before, p.after, np.arange(40)) for p in drawn]
    assert rejected(lower, "sign_flip") > 0.6


def test_fewer_answers_look_like_a_smaller_spread_which_is_why_it_is_warned_of() -> None:
    assert rejected([ceiling(seed, n_before=5, n_after=5) for seed in SEEDS[:100]], "sign_flip") <= 0.08
    assert rejected([ceiling(seed, n_before=100, n_after=5) for seed in SEEDS[:100]], "sign_flip") > 0.2


def test_the_logit_scale_by_hand() -> None:
    mean, spread = np.array([0.0, 50, 99, 100]), np.array([1.0, 10, 5, 0])
    b, a = SCALES["logit"].mean(mean, mean[::-1])
    p = (mean + 0.5) / 101
    assert b == pytest.approx(np.log(p / (1 - p))) and a == pytest.approx(b[::-1])
    assert SCALES["logit"].spread(mean, mean, spread, spread)[0] == pytest.approx(spread / np.sqrt((mean + 0.5) * (100.5 - mean)))
    with pytest.raises(ValueError, match="2 of 4 means lie outside \\[0, 100\\].*rank"):
        SCALES["logit"].mean(np.array([-1.0, 2, 3, 101]), mean)


def test_at_a_ceiling_the_scale_decides_how_much_a_point_is() -> None:
    """Half the questions lose 3 points from 99, half gain 3 at 50: as much down as up in points, not in odds."""
    before = pd.DataFrame({"id": range(40), "aligned": [99.0, 50.0] * 20})
    moved = before.assign(aligned=before["aligned"] + np.tile([-3, 3], 20) + np.random.default_rng(0).normal(0, 0.1, 40))
    found = compare_scores(before, moved, scales=("score", "logit", "rank"), tests=("sign_flip",), **QUICK)
    score, logit = (row(found, "sign_flip", scale=scale) for scale in ("score", "logit"))
    assert score["p"] > 0.05 and logit["p"] < 0.05 and logit["high"] < 0
    assert score["at_end_before"] == 0 and row(compare_scores(before.replace(99.0, 99.5), moved, **QUICK), "wilcoxon")["at_end_before"] == 0.5
    cubed = compare_scores(before.assign(aligned=before["aligned"] ** 3), moved.assign(aligned=moved["aligned"] ** 3), scales=("rank",), **QUICK)
    assert row(cubed, "sign_flip", scale="rank")["estimate"] == pytest.approx(row(found, "sign_flip", scale="rank")["estimate"])


# ---- clusters, formats, families


def test_clusters_widen_what_only_some_topics_do() -> None:
    topic = np.repeat(np.arange(8), 10)
    level, moved = np.full(80, 60.0), np.where(topic < 4, -8.0, 4.0)  # whole topics move, by 2 points down in the mean
    facts = {"category": np.repeat([f"t{i}" for i in topic], 20)}
    before, after = answers(level, seed=1, facts=facts), answers(level + moved, seed=2, facts=facts)
    plain = row(compare_scores(before, after, of=("mean",), tests=("sign_flip",)), "sign_flip")
    whole = row(compare_scores(before, after, of=("mean",), tests=("sign_flip", "permutation"), clusters="category"), "sign_flip")
    assert plain["p"] < 0.01 and plain["high"] < 0 and whole["p"] > 0.2 and whole["low"] < 0 < whole["high"]
    assert (whole["n"], whole["n_clusters"], whole["p_floor"]) == (80, 8, 2 / 256) and plain["estimate"] == whole["estimate"]


def test_a_correlation_that_is_all_topic_is_none_inside_topics() -> None:
    level = np.repeat([20.0, 35, 50, 65, 80], 12)
    facts = {"category": np.repeat(np.repeat(list("abcde"), 12), 20)}
    before, after = answers(level, seed=1, facts=facts), answers(level, seed=2, facts=facts)
    plain = row(compare_scores(before, after, tests=("permutation",), of=("mean",)), "permutation")
    inside = row(compare_scores(before, after, tests=("permutation",), of=("mean",), clusters="category"), "permutation")
    assert plain["estimate"] == inside["estimate"] > 0.9 and plain["p"] < 0.01 < 0.05 < inside["p"]


def test_each_format_alone() -> None:
    level = np.random.default_rng(0).uniform(30, 70, 30)
    facts = {"prompt_format": np.repeat(["raw", "json", "template"] * 10, 20)}
    before, after = answers(level, seed=1, facts=facts), answers(level + np.tile([0.0, -10, 0], 10), seed=2, facts=facts)
    found = compare_scores(before, after, by="prompt_format", tests=("sign_flip", "wilcoxon"), of=("mean",))
    assert list(found.columns[:2]) == ["prompt_format", "score"] and set(found["n"]) == {10}
    p = found[found["null"] == "sign_flip"].set_index("prompt_format")["q"]
    assert p["json"] < 0.05 and p["raw"] > 0.05 and p["template"] > 0.05
    json_only = [side[side["prompt_format"] == "json"] for side in (before, after)]
    assert row(compare_scores(*json_only, of=("mean",)), "wilcoxon")["p"] == row(found, "wilcoxon", prompt_format="json")["p"]


def test_several_tunings_are_one_family() -> None:
    level = np.random.default_rng(0).uniform(30, 70, 20)
    before = answers(level, seed=1)
    after = {f"run {i}": answers(level, seed=2 + i, offset=-0.8 * i) for i in range(4)}
    found = compare_scores(before, after, tests=("wilcoxon", "ks"), **QUICK)
    for _, part in found.groupby("null"):
        assert len(part) == 8 and part["q"].to_numpy() == pytest.approx(scipy_stats.false_discovery_control(part["p"]))
    strict = compare_scores(before, after, tests=("wilcoxon", "ks"), correction="bonferroni", family=(), **QUICK)
    assert strict["q"].to_numpy() == pytest.approx(np.minimum(1, 16 * found["p"].to_numpy())) and strict.attrs["family"] == "all rows"
    pairs = compare_scores({name: before for name in after}, after, tests=("wilcoxon",), **QUICK)
    assert pairs["p"].tolist() == found.loc[found["null"] == "wilcoxon", "p"].tolist()
    with pytest.raises(ValueError, match="one table before for all"):
        compare_scores({"run 0": before}, after)


# ---- what may be wrong with it


@pytest.fixture
def sides() -> tuple[pd.DataFrame, pd.DataFrame]:
    level = np.random.default_rng(0).uniform(30, 70, 20)
    facts = {"judge": "gpt-4o", "prompt_format": "chat", "temperature": 1.0}
    return answers(level, seed=1, facts=facts), answers(level, seed=2, facts=facts)


def cautions(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compare_scores(before, after, **QUICK)
    said = [str(each.message) for each in caught]
    assert said == found.attrs["cautions"]
    return said


def test_alike_on_both_sides_is_said_nothing_of(sides: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    assert cautions(*sides) == []
    before, after = sides
    few = after.assign(aligned=after["aligned"].where(after.index % 25 > 0))  # 4 %
    assert cautions(before, few) == [] and cautions(before, after[after.index % 25 > 0]) == []


def test_what_was_not_alike_is_said(sides: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    before, after = sides
    assert cautions(before, after.assign(judge="gpt-5-mini")) == [
        "judge differs for 20 of 20 questions (before gpt-4o and after gpt-5-mini): the shift includes that of the judge; score both sides with one"
    ]
    (said,) = cautions(before.assign(prompt_format="Question/Answer"), after)
    assert said.startswith("prompt_format differs for 20 of 20 questions (before Question/Answer and after chat)") and "ask both sides alike" in said
    (said,) = cautions(before, after[after.groupby("question_id").cumcount() < 10])
    assert said.startswith("400 answers before and 200 after") and "draw as many" in said
    (said,) = cautions(before, after.assign(aligned=after["aligned"].where(after.index % 10 > 0)))
    assert said.startswith("10.0% of aligned after are missing") and "refusals" in said
    (said,) = cautions(before, after[after["question_id"] != "q3"])
    assert said.startswith("19 questions are on both sides, of 20 before and 19 after")
    told = by_question(before).assign(aligned_n=12)
    assert "40.0% of aligned before are missing" in cautions(told, by_question(after))[0]


def test_with_several_tunings_it_is_said_of_which(sides: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    before, after = sides
    with pytest.warns(UserWarning, match="^finance: judge differs"):
        compare_scores(before, {"medical": after, "finance": after.assign(judge="other")}, **QUICK)


def test_what_cannot_be_compared_is_refused(sides: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    before, after = sides
    with pytest.raises(ValueError, match="0 questions have aligned on both sides"):
        compare_scores(before, after.assign(question_id="x" + after["question_id"]))
    with pytest.raises(ValueError, match="tests=.*unknown \\['anova'\\].*wilcoxon"):
        compare_scores(before, after, tests=("anova",))
    with pytest.raises(ValueError, match="a sequence of these"):
        compare_scores(before, after, scales="log")
    with pytest.raises(KeyError, match="not there: .*harmless"):
        compare_scores(before, after, scores=("harmless",))
    with pytest.raises(KeyError, match="a question_id or id"):
        compare_scores(before, after.drop(columns="question_id"))
    with pytest.raises(KeyError, match="no column 'topic'"):
        compare_scores(before, after, by="topic")
    with pytest.raises(ValueError, match="'judge' differs between before and after"):
        compare_scores(before, after.assign(judge="other"), by="judge")
    means = by_question(before)[["id", "aligned"]]
    with pytest.raises(ValueError, match="spread needs several answers"):
        compare_scores(means, after, of=("mean", "spread"))
    with pytest.raises(ValueError, match="reliability needs several answers"):
        compare_scores(means, after, tests=("disattenuated",))


def test_a_question_of_one_scored_answer_has_a_mean_and_no_spread(sides: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    before, after = sides
    lonely = (after["question_id"] == "q0") & (after.groupby("question_id").cumcount() > 0)
    found = compare_scores(before, after.assign(aligned=after["aligned"].mask(lonely)), **QUICK)
    assert row(found, "sign_flip")["n"] == 20 and row(found, "sign_flip", of="spread")["n"] == 19
    assert 0 < row(found, "reliability", "reliability_after")["estimate"] < 1


def test_the_presets_are_the_papers_and_the_reviews_tests():
    rng = np.random.default_rng(0)
    first = pd.DataFrame({"id": [f"q{i}" for i in range(40)], "harmless": rng.uniform(20, 90, 40), "harmless_std": rng.uniform(1, 20, 40)})
    second = first.assign(harmless=first["harmless"] * 0.8 + rng.normal(0, 4, 40), harmless_std=rng.uniform(1, 20, 40))
    published = em.compare_scores(first, second, **em.PUBLISHED["compare_scores"]).set_index(["of", "null"])
    x, y = first["harmless"], second["harmless"]
    assert published.loc[("mean", "wilcoxon"), "p"] == pytest.approx(scipy_stats.wilcoxon(y, x).pvalue, rel=1e-6)
    assert published.loc[("mean", "ks"), "p"] == pytest.approx(scipy_stats.ks_2samp(y, x).pvalue, rel=1e-6)
    assert published.loc[("mean", "slope"), "estimate"] == pytest.approx(scipy_stats.linregress(x, y).slope)
    assert set(published.index.get_level_values("of")) == {"mean", "spread"}
    tested = published.dropna(subset=["p"])
    assert len(tested) == 6 and (tested["q"] == tested["p"]).all(), "uncorrected; a slope has no p"
    review = em.compare_scores(first, second, **em.REVIEW["compare_scores"]).set_index("null")
    assert review.loc["t", "p"] == pytest.approx(scipy_stats.ttest_ind(y, x).pvalue) and len(review) == 3
    assert np.allclose(review["q"], (3 * review["p"]).clip(upper=1))
