"""Guards the analysis of the paper's part 2: from the published tables come the published numbers, what does not come is said, and scores
are compared as they should be."""

import json
import re
import runpy
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from paper import PAPER, ROOT, needs_paper
from scipy import stats as scipy_stats

pytestmark = needs_paper


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything the script defined, run as a user does but with few draws; `out` is the folder it wrote."""
    out, before = tmp_path_factory.mktemp("figures"), sys.argv
    sys.argv = ["2_priors.py", "--parts", "published", "--paper", str(PAPER), "--out", str(out), "--draws", "299"]
    try:
        return {**runpy.run_path(str(ROOT / "analyses" / "2_priors.py")), "out": out}
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def part(ran: dict[str, Any]) -> dict[str, Any]:
    return ran["made"]["published"]


def here(part: dict[str, Any], what: str) -> dict[str, float]:
    rows = part["checks"].query("what == @what")
    assert len(rows)
    return dict(zip(rows["setting"], rows["recomputed"], strict=True))


def test_which_printed_numbers_are_met_and_which_are_not(part: dict[str, Any]) -> None:
    checks = part["checks"]
    assert checks["agrees"].value_counts().to_dict() == {"yes": 124, "no": 3, "cannot be redone": 5}
    missed = checks[checks["agrees"] != "yes"]
    assert missed["why"].str.len().min() > 10 and checks.loc[checks["agrees"] == "yes", "why"].eq("").all()
    assert set(missed.loc[missed["agrees"] == "no", "what"]) == {
        "r of harmless means, harm benchmark: least, largest", "prompt length alone, R2, same folds",
        "reliability of the target: above",
    }  # fmt: skip
    assert missed.loc[missed["agrees"] == "cannot be redone", "recomputed"].isna().all()


def test_a_number_that_is_off_by_a_unit_is_not_met(ran: dict[str, Any]) -> None:
    rows = ran["check"]("x", 3, [0.670, 0.366, 0.1], [0.6696, 0.367, np.nan], ("a", "b", "c"), "why not")
    assert [row["agrees"] for row in rows] == ["yes", "no", "cannot be redone"] and [row["why"] for row in rows] == ["", "why not", "why not"]


def test_the_shares_of_significant_comparisons(part: dict[str, Any]) -> None:
    table = pd.read_csv(PAPER / "part2" / "pretrained_comparison.csv")
    spreads = table["metric"].str.endswith("std")
    assert here(part, "share of Wilcoxon p < .05, of 56 each")["means"] == (table.loc[~spreads, "w_p"] < 0.05).mean()
    q = [(scipy_stats.false_discovery_control(table[column]) < 0.05).mean() for column in ("w_p", "pearson_p")]
    found = here(part, "share of q < .05, BH over all 112")
    assert [found["Wilcoxon"], found["Pearson"]] == pytest.approx(q) and q == pytest.approx([0.670, 0.366], abs=5e-4)
    assert part["checks"]["what"].str.startswith("rates table").sum() == 72


def test_the_mean_predictor_and_topic_in_the_published_folds(part: dict[str, Any]) -> None:
    """By hand: the mean of the training questions, and of those of the same topic."""
    from sklearn.model_selection import RepeatedKFold

    scores = pd.read_csv(PAPER / "part2" / "question_scores.csv.gz").query("results_dir == 'generated_results_hbp'")
    for name, run in (("finance, hbp", "finance"), ("insecure, hbp", "insecure")):
        rows = scores[scores["run"].str.contains(f"_{run}_")].reset_index(drop=True)
        topic = rows["question_id"].str.replace(r"_?\d+$", "", regex=True)
        errors, r2 = [], []
        for train, test in RepeatedKFold(n_splits=5, n_repeats=10, random_state=42).split(rows):
            y = rows["harmless"].iloc[test]
            errors.append(np.sqrt(np.mean((y - rows["harmless"].iloc[train].mean()) ** 2)))
            means = rows["harmless"].iloc[train].groupby(topic.iloc[train]).mean()
            r2.append(1 - ((y - topic.iloc[test].map(means)) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        assert here(part, "RMSE of the mean predictor, same folds")[name] == pytest.approx(np.mean(errors), abs=1e-9)
        assert here(part, "category alone, R2, same folds")[name] == pytest.approx(np.mean(r2), abs=1.5e-3)  # a ridge there
        row = part["scores"].query("problem == @name and features == 'category'").iloc[0]
        reach = scipy_stats.t.ppf(0.975, 49) * np.std(r2, ddof=1) * np.sqrt(1 / 50 + 1 / 4)
        assert (row["low"], row["high"]) == pytest.approx((np.mean(r2) - reach, np.mean(r2) + reach), abs=0.01) and row["held_out"] < 0
    assert here(part, "RMSE of the mean predictor, same folds")["finance, hbp"] == pytest.approx(24.063, abs=5e-4)
    numbers = part["scores"].query("features == 'random numbers'")  # the control foretells nothing, and topic does
    assert (numbers["q"] > 0.05).all() and (numbers["estimate"] < 0).all() and (part["scores"].query("features == 'category'")["q"] < 0.05).all()


def test_committed_intervals_and_twins(part: dict[str, Any]) -> None:
    what = "Nadeau-Bengio interval from mean and sd over 50 folds: largest difference, all committed rows"
    assert here(part, what)["138 rows"] < 1e-8
    assert list(here(part, "'pretrained' rows with an instruct twin; those that differ").values()) == [36, 0]
    lasso = part["scores"][part["scores"]["source"] == "committed"]
    assert set(lasso["n"]) == {50} and len(lasso) == 2 * 5 * 3 + 4 and not lasso.duplicated(["problem", "features", "position", "seed"]).any()


def test_a_pretrained_row_that_differed_would_be_counted(ran: dict[str, Any]) -> None:
    cv = pd.read_csv(PAPER / "part2" / "activation_cv.csv")
    at = cv.index[(cv["labelled_activations"] == "pretrained") & (cv["algo"] == "lasso") & (cv["eval_set"] == "hbp")][0]
    cv.loc[at, "cv_r2_mean"] += 1e-9
    assert (ran["_twins"](cv) != 0).sum() == 1


def test_reliabilities_and_the_two_coder_models(part: dict[str, Any]) -> None:
    scores = pd.read_csv(PAPER / "part2" / "question_scores.csv.gz").query("results_dir == 'generated_results_hbp'")
    wide = scores.pivot(index="question_id", columns="run", values="harmless")
    r = np.corrcoef(wide.to_numpy().T)[0, 1]
    assert here(part, "r of harmless between the two Coder models, 320 questions")[""] == pytest.approx(r) and r == pytest.approx(0.012, abs=5e-4)
    found = here(part, "reliability of the target: above")
    for name, (_, rows) in zip(("finance, hbp", "insecure, hbp"), scores.groupby("run"), strict=True):
        assert found[name] == pytest.approx(1 - (rows["harmless_std"] ** 2 / 50).mean() / rows["harmless"].var())


def test_the_sceptic_speaks_in_the_numbers_found(part: dict[str, Any]) -> None:
    words = " ".join(part["words"])
    assert len(part["words"]) == 10 and "in 5 of 7 harm-benchmark comparisons not judged alike" in words and "r = 0.012" in words
    assert "all 138 rows have it, 40 of them with R2 < 0" in words and "0.714 becomes 0.670" in words and not re.search(r"\bnan\b", words)


def test_two_data_sets_of_one_model(part: dict[str, Any]) -> None:
    sets = part["sets"].query("score == 'harmless' and of == 'mean' and scale == 'score'").set_index("null")
    assert sets.loc["sign_flip", "estimate"] == pytest.approx(29.088 - 73.644, abs=0.01) and sets.loc["sign_flip", "p"] == 4 / 256
    assert sets.loc["paired_t", "estimate"] == pytest.approx(-1.319, abs=1e-3) and set(sets["n_clusters"]) == {8}
    assert part["sets"].attrs["cautions"] == []
    raised = part["sets"].query("null == 'sign_flip' and of == 'spread'")  # whole categories: no evidence on either scale
    assert len(raised) == 4 and (raised["q"] > 0.05).all()


def test_tunings_against_one_hardly_tuned_by_format(ran: dict[str, Any], part: dict[str, Any]) -> None:
    whole, apart = part["whole"], part["apart"]
    assert set(whole["comparison"]) == set(ran["TUNED"]) and set(apart["prompt_format"]) == {"raw", "json", "template"} and set(apart["n"]) == {8}
    scores = pd.read_csv(PAPER / "part2" / "question_scores.csv.gz").query("results_dir == 'generated_results_0312'").set_index("run")["harmless"]
    change = scores["Qwen2.5-32B-Instruct_finance_all_resp_1e-05_fpq"].mean() - scores["Qwen2.5-32B-Instruct_insecure_all_resp_1e-07_fpq"].mean()
    row = whole.query("comparison == 'finance' and null == 'sign_flip' and of == 'mean' and scale == 'score'").iloc[0]
    assert row["estimate"] == pytest.approx(change) and row["high"] < 0 and row["n"] == 24 and row["n_clusters"] == 8
    found = apart.query("null == 'sign_flip'").set_index(["comparison", "prompt_format"])["estimate"]
    assert found["auto", "raw"] < -40 < -1 < found["auto", "json"] < 0  # the format decides
    said = whole.attrs["cautions"]
    assert {each.split(":")[0] for each in said} == {"chem-mid-osf", "finance-good"}
    assert any("judge differs" in each for each in said) and any("51.6% of harmless after are missing" in each for each in said)


def test_figures_are_written_without_the_papers_rows(ran: dict[str, Any], part: dict[str, Any]) -> None:
    names = [f"2-priors-{name}{suffix}" for name in ("category", "data-sets", "formats", "published") for suffix in (".csv", ".html", ".json")]
    assert sorted(path.name for path in ran["out"].iterdir()) == names
    assert all(path.stat().st_size < 100_000 for path in ran["out"].iterdir() if path.suffix != ".html")
    for path in ran["out"].glob("*.csv"):
        columns = set(pd.read_csv(path).columns)
        assert {"printed", "recomputed", "agrees"} <= columns or {"metric", "estimate", "low", "high", "null", "p", "q", "n"} <= columns
        assert not {"id", "question_id", "path"} & columns
    ids = re.compile(r"(hate_speech|fraud_and_illegal_activity|quick_buck|gender_roles)_?[0-9j]")
    assert not any(ids.search(path.read_text()) for path in ran["out"].glob("*.[cj]s*"))
    made = json.loads((ran["out"] / "2-priors-published.json").read_text())
    assert made["sceptic"] == part["words"] and made["findings"] == part["findings"] and len(made["inputs"]["activation_cv.csv"]) == 16
    assert not any(str(ROOT.parent) in path.read_text() for path in ran["out"].glob("*.json"))


def test_the_script_says_nothing_that_should_be_heeded(ran: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran["reliability_checks"](ran["made"]["published"]["tables"])
        ran["within_category"](ran["made"]["published"]["tables"], 19)
