"""Guards the analysis of the paper's part 3: from the published tables come the published numbers, and what does not come is said."""

import json
import re
import runpy
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from paper import PAPER, ROOT, needs_paper

pytestmark = needs_paper

PLACES = [("last", 32), ("last", 64), ("mean_all", 32), ("mean_all", 64)]
TUNINGS = ["Qwen finance", "Coder finance", "Coder insecure"]

# as printed in the paper's figures: Qwen finance, Coder finance, Coder insecure, each at layer 32 and 64
LAST = [0.849, 0.285, 0.887, 0.257, 0.607, 0.172]
MEAN_ALL = [-0.353, -0.248, -0.176, -0.364, -0.561, -0.204]
RANDOM_LAST = [0.424, 0.069, -0.105, 0.137, 0.225, 0.116]
RECONSTRUCTION_LAST = [0.905, 0.648, 0.943, 0.525, 0.845, 0.369]
BASELINE_LAST = [0.938, 0.775, 0.953, 0.716, 0.832, 0.552]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything the script defined, run as a user does but with few draws; `out` is the folder it wrote."""
    out, before = tmp_path_factory.mktemp("figures"), sys.argv
    sys.argv = ["3_data.py", "--paper", str(PAPER), "--out", str(out), "--draws", "79"]
    try:
        return {**runpy.run_path(str(ROOT / "analyses" / "3_data.py")), "out": out}
    finally:
        sys.argv = before


def estimates(table: pd.DataFrame, metric: str, position: str, null: str = "prompts permuted") -> list[float]:
    chosen = table[(table["metric"] == metric) & (table["position"] == position) & (table["null"] == null)].set_index(["tuning", "published_layer"])
    return [chosen.loc[(tuning, layer), "estimate"] for tuning in TUNINGS for layer in (32, 64)]


def test_288_of_the_960_printed_correlations_are_recomputed_and_are_the_printed_ones(ran: dict[str, Any]) -> None:
    everything = ran["everything"]
    redone = everything["estimate"].notna()
    assert (redone.sum(), (~redone).sum()) == (288, 672)
    assert np.abs(everything["estimate"] - everything["linear_r"])[redone].max() < 0.0006
    assert everything.loc[redone, "met"].all() and everything.loc[redone, "rounds"].sum() == 286
    assert set(everything.loc[~redone, "pca_k"]) == {1, 2, 4, 8, 16, 32, 64, 128}  # overlap with k components is in no table


def test_a_printed_correlation_that_is_wrong_would_be_listed(ran: dict[str, Any]) -> None:
    wrong = ran["printed"].copy()
    at = wrong.index[wrong["pca_k"] == 0.9][5]
    wrong.loc[at, "linear_r"] += 0.002
    found = ran["beside_printed"](ran["recomputed"], wrong)
    missed = found[found["estimate"].notna() & ~found["met"]]
    assert len(missed) == 1 and missed.index[0] == found.index[wrong.index.get_loc(at)]


def test_recomputed_correlations_are_numpys(ran: dict[str, Any]) -> None:
    prompts = pd.read_csv(PAPER / "part3" / "per_prompt.csv.gz").query("train == 'insecure' and layer == 'layer_64' and pos == 'mean_prompt'")
    ours = ran["recomputed"].query("tuning == 'Coder insecure' and published_layer == 64 and position == 'mean_all' and y == 'mean_delta_cosine'")
    for x, part in ours.groupby("x"):
        assert part["estimate"].to_numpy() == pytest.approx(np.full(3, np.corrcoef(prompts[x], prompts["mean_delta_cosine"])[0, 1]), abs=1e-12)
    assert set(ours["n"]) == {320} and len(ours) == 6


@pytest.mark.parametrize(
    ("metric", "position", "published"),
    [
        ("overlap", "last", LAST),
        ("overlap", "mean_all", MEAN_ALL),
        ("random subspace", "last", RANDOM_LAST),
        ("overlap with reconstruction", "last", RECONSTRUCTION_LAST),
        ("baseline", "last", BASELINE_LAST),
    ],
)
def test_correlations_of_the_six_settings(metric: str, position: str, published: list[float], ran: dict[str, Any]) -> None:
    assert estimates(ran["controls"], metric, position) == pytest.approx(published, abs=0.0006)


def test_every_other_number_of_part_3_is_met(ran: dict[str, Any]) -> None:
    assert len(ran["checks"]) == 24 and [each["what"] for each in ran["checks"] if not each["met"]] == []
    here = {each["what"]: each["recomputed"] for each in ran["checks"]}
    assert here["mean overlap: last, mean_all"] == pytest.approx([0.740, 0.949], abs=0.0006)
    assert here["reconstruction cosine, last, k = 1, 8, 128"] == pytest.approx([0.661, 0.717, 0.831], abs=0.0006)
    assert here["change of RMSE by adding the mean shift, last, %"] == pytest.approx([-35, -21, -28, 5, -28, -4], abs=0.51)
    assert here["Spearman(shift cosine, harmless), layer 32, last, Coder only"] == pytest.approx([-0.42, 0.02], abs=0.006)


def test_a_number_that_is_off_by_a_unit_of_its_last_decimal_is_not_met(ran: dict[str, Any]) -> None:
    met = ran["met"]
    assert met(0.8494, 0.849, 3) and met(0.84956, 0.849, 3) and not met(0.850, 0.849, 3) and not met(-0.849, 0.849, 3)
    assert met([-34.94], [-35], 0).all() and not met([-33.9], [-35], 0).any()


def test_where_the_papers_reading_holds_and_where_not(ran: dict[str, Any]) -> None:
    told = {place: next(line for line in ran["findings"] if line.startswith(f"{place[0]}, layer {place[1]}:")) for place in PLACES}
    assert "holds in 3 of 3" in told["last", 32] and "negative" not in told["last", 32]
    for layer in (32, 64):
        assert "holds in 0 of 3" in told["mean_all", layer] and "negative in 3" in told["mean_all", layer]
    assert max(estimates(ran["controls"], "overlap", "mean_all")) < 0 < min(estimates(ran["controls"], "overlap", "last"))


def test_prompt_length_is_what_turns_mean_pooling_negative(ran: dict[str, Any]) -> None:
    """Against least squares by hand, for one setting."""
    left = estimates(ran["controls"], "overlap given length", "mean_all", "residuals permuted")
    assert min(left) > 0
    part = ran["per_prompt"].query("tuning == 'Coder insecure' and published_layer == 32 and position == 'mean_all'")
    z = np.column_stack([np.ones(len(part)), part["prompt_len"], 1 / part["prompt_len"]])
    x, y = (v - z @ np.linalg.lstsq(z, v, rcond=None)[0] for v in (part[ran["OVERLAP"]].to_numpy(), part[ran["SIMILARITY"]].to_numpy()))
    assert left[4] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_the_one_line_baseline_does_better_everywhere(ran: dict[str, Any]) -> None:
    table = ran["controls"].query("metric == 'overlap minus baseline'")
    assert len(table) == 12 and (table["estimate"] < 0).all() and (table["high"] < 0).sum() >= 10
    assert table["p"].between(0.02, 0.5).all() and set(table["n_clusters"]) == {8, 43}  # of whole categories: Williams' would be 1e-5 and less
    random = estimates(ran["controls"], "overlap minus random subspace", "last", "equal correlations")
    assert random == pytest.approx(np.subtract(LAST, RANDOM_LAST), abs=0.0012)


def test_settings_are_summarised_and_left_out_one_by_one_and_not_pooled(ran: dict[str, Any]) -> None:
    together = ran["together"].query("metric == 'overlap over settings'").set_index(["left_out", "position", "published_layer"])
    assert len(together) == 4 * 4 and together["n"].tolist() == [3] * 4 + [2] * 12
    means = together.loc[("", "last", 32)]
    alone = np.array(LAST)[[0, 2, 4]]
    assert alone.min() < means["estimate"] < alone.max() and means["low"] < means["estimate"] < means["high"]
    without_insecure = together.loc[("Coder insecure", "last", 32), "estimate"]
    assert 0.849 < without_insecure < 0.887 and without_insecure > means["estimate"]
    assert set(ran["controls"]["n"]) == {320, 1414}


def test_words_follow_the_numbers(ran: dict[str, Any]) -> None:
    rows = pd.DataFrame(
        {"estimate": [0.3, -0.3, 0.3, 0.3], "low": [0.1, -0.4, -0.1, 0.1], "high": [0.5, -0.1, 0.5, 0.5], "q": [0.01, 0.01, 0.01, 0.2]}
    )
    rows = rows.assign(null="prompts permuted", null_low=-0.1, null_high=0.1)
    assert ran["tally"](rows) == "0.300 -0.300 0.300 0.300 (above 0 1 of 4, below 0 1 of 4, no evidence 2 of 4)"
    assert ran["reading"](rows) == "holds in 1 of 4 tunings, negative in 1" and ran["reading"](rows[2:]) == "holds in 0 of 2 tunings"
    inside = rows.assign(null=ran["INSIDE"], low=-0.1)  # prompts of one category are no independent witnesses: its interval counts too
    assert ran["tally"](inside) == "0.300 -0.300 0.300 0.300 (below 0 1 of 4, no evidence 3 of 4)"


def test_what_is_left_inside_categories_is_of_values_less_their_categorys_mean(ran: dict[str, Any]) -> None:
    part = ran["per_prompt"].query("tuning == 'Coder finance' and published_layer == 32 and position == 'last'")
    row = ran["controls"].query("metric == 'overlap given category' and tuning == 'Coder finance' and published_layer == 32 and position == 'last'")
    x, y = (part[name] - part.groupby("category")[name].transform("mean") for name in (ran["OVERLAP"], ran["SIMILARITY"]))
    assert row["estimate"].item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9) and row["null"].item() == ran["INSIDE"]
    assert row["n_clusters"].item() == 8 and row["null_low"].item() < 0 < row["null_high"].item()
    inside = ran["links"].query("metric == 'shift cosine with harmless inside categories' and tuning == 'Coder finance'")
    scored = ran["scored"].query("tuning == 'Coder finance' and published_layer == 64 and position == 'mean_all'")
    ranks = scored.groupby("category")[[ran["SIMILARITY"], "harmless"]].rank(pct=True)
    ranks = ranks - ranks.groupby(scored["category"]).transform("mean")
    here = inside.query("published_layer == 64 and position == 'mean_all'")["estimate"].item()
    assert here == pytest.approx(np.corrcoef(ranks.T)[0, 1], abs=1e-9) and set(inside["null"]) == {ran["INSIDE"]}


def test_three_figures_are_written_without_the_papers_rows(ran: dict[str, Any]) -> None:
    names = [f"3-data-{name}{suffix}" for name in ("controls", "correlations", "overlap") for suffix in (".csv", ".html", ".json")]
    assert sorted(path.name for path in ran["out"].iterdir()) == names
    assert all(path.stat().st_size < 100_000 for path in ran["out"].iterdir() if path.suffix != ".html")
    tables = {path.stem: pd.read_csv(path) for path in ran["out"].glob("*.csv")}
    assert len(tables["3-data-correlations"]) == 288 and len(tables["3-data-controls"]) == 12 * 14 + 8 * 4
    for table in tables.values():
        assert {"metric", "estimate", "low", "high", "null", "p", "q", "n"} <= set(table.columns) and not {"id", "linear_r"} & set(table.columns)
    prompts = re.compile("|".join(f"{category}_?[0-9]" for category in set(ran["per_prompt"]["category"])))
    assert prompts.search(ran["per_prompt"]["id"].iloc[0]) and not any(prompts.search(path.read_text()) for path in ran["out"].glob("*.[cj]s*"))
    made = json.loads((ran["out"] / "3-data-overlap.json").read_text())
    assert made["findings"] == ran["findings"] and len(made["inputs"]["per_prompt.csv.gz"]) == 16
    assert not any(str(ROOT.parent) in path.read_text() for path in ran["out"].glob("*.json"))
