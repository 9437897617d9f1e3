"""Guards the analyses of the paper's part 2 on real weights: the numbers in the tables are those of an independent recomputation, and the pieces
that compare find what was planted and nothing where nothing was."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from paper import PAPER, ROOT, needs_paper
from scipy.stats import spearmanr, ttest_ind
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emlens.baselines import Block
from emlens.folds import make_folds
from emlens.gains import left_by
from emlens.ridge import PENALTIES, fixed

pytestmark = [pytest.mark.slow, needs_paper]


def run(script: str, out: Path, kept: Path, paper: Path = PAPER) -> dict[str, Any]:
    """Everything a script defined, run as a user does, in its quick way and without a finished demo."""
    before = sys.argv
    sys.argv = [script, "--quick", "--paper", str(paper), "--kept", str(kept), "--out", str(out)]
    sys.argv += [] if script == "2_twins.py" else ["--run", str(out / "none")]
    try:
        return {**runpy.run_path(str(ROOT / "analyses" / script)), "out": out}
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def transfer(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> dict[str, Any]:
    return run("2_transfer.py", tmp_path_factory.mktemp("transfer"), kept)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> dict[str, Any]:
    return run("2_ladder.py", tmp_path_factory.mktemp("ladder"), kept)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, transfer: dict[str, Any], kept: Path) -> dict[str, Any]:
    """After `transfer`, which puts the weights together."""
    return run("2_twins.py", tmp_path_factory.mktemp("twins"), kept)


def foretold_by_sklearn(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each group in turn foretold by a ridge whose penalty is chosen by holding out the other groups in turn."""
    found = np.empty(len(y))
    for train, test in LeaveOneGroupOut().split(x, y, groups):
        grid = {"ridge__alpha": list(PENALTIES)}
        search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), grid, scoring="neg_mean_squared_error", cv=LeaveOneGroupOut())
        found[test] = search.fit(x[train], y[train], groups=groups[train]).predict(x[test])
    return found


def test_a_row_is_what_sklearn_gives_in_the_same_folds(transfer: dict[str, Any]) -> None:
    asked, found = transfer["asked_of"]["published"], transfer["found"]
    acts = transfer["recorded"]["published", transfer["BASE"], "mean"]
    groups, y = asked.facts["category"].to_numpy(), asked.facts["insecure"].to_numpy()
    layer = acts.layers[7]
    expected = foretold_by_sklearn(acts.layer(layer).astype(np.float64), y, groups)
    rows = found[(found["target"] == "insecure") & (found["network"] == transfer["BASE"]) & (found["position"] == "mean")]
    rows = rows[(rows["features"] == "one layer") & (rows["layer"] == layer)].set_index("metric")["estimate"]
    assert rows["r2"] == pytest.approx(1 - np.square(y - expected).sum() / np.square(y - y.mean()).sum(), abs=1e-6)
    inside = [spearmanr(y[groups == each], expected[groups == each]).statistic for each in pd.unique(groups)]
    assert rows["within_spearman"] == pytest.approx(np.mean(inside), abs=1e-6)


def test_targets_are_the_published_scores(transfer: dict[str, Any]) -> None:
    scores = pd.read_csv(PAPER / "part2" / "question_scores.csv.gz")
    one = scores[scores["run"] == "Qwen2.5-Coder-32B-Instruct_insecure_all_resp_1e-05_hbp"].set_index("question_id")
    facts = transfer["asked_of"]["published"].facts.set_index("id")
    assert len(facts) == 80 and (facts["category"].value_counts() == 10).all()
    assert facts["insecure"].to_dict() == one.loc[facts.index, "harmless"].to_dict()
    assert facts["insecure_se"].to_numpy() == pytest.approx(one.loc[facts.index, "harmless_std"].to_numpy() / 50**0.5)


def test_a_difference_is_that_of_mean_squared_errors(transfer: dict[str, Any]) -> None:
    y = transfer["asked_of"]["published"].facts["finance"].to_numpy()
    errors = [transfer["errors"]["published", "categories held out", "finance", "last", transfer[name]] for name in ("INSTRUCT", "BASE")]
    r2 = [1 - np.square(error).sum() / np.square(y - y.mean()).sum() for error in errors]
    row = transfer["differences"].set_index(["split", "target", "position", "comparison", "metric"])
    row = row.loc[("categories held out", "finance", "last", "instruct minus base", "difference in R²")]
    assert row["estimate"] == pytest.approx(r2[0] - r2[1], abs=1e-9) and row["low"] < row["estimate"] < row["high"]
    assert row["p"] >= 2 / 256


def test_a_trained_network_stands_among_its_twins_where_their_errors_put_it(transfer: dict[str, Any], twins: dict[str, Any]) -> None:
    among, found = twins["among"].set_index(["target", "network", "position"]), twins["found"]
    y = transfer["asked_of"]["published"].facts["finance"].to_numpy()
    cell = found[(found["target"] == "finance") & (found["network"] == transfer["BASE"]) & (found["position"] == "mean")].set_index("seed")["r2"]
    for seed, name in ((-1, transfer["BASE"]), (0, f"random twin 0 of {transfer['BASE']}")):  # the same folds, by the other analysis
        error = transfer["errors"]["published", "categories held out", "finance", "mean", name]
        assert cell[seed] == pytest.approx(1 - np.square(error).mean() / y.var(), abs=1e-9)
    row, random = among.loc[("finance", transfer["BASE"], "mean")], cell.drop(-1)
    assert len(among) == 8 and random.nunique() == twins["TWINS"] == row["n"] and row["above"] == (random < cell[-1]).sum()
    assert ttest_ind([cell[-1]], random).pvalue == pytest.approx(row["p"]), "one against several is the two-sample t of one value"
    assert json.loads((twins["out"] / "2-transfer-twins.json").read_text())["a sceptic would write"]


def test_no_number_without_interval_and_null(transfer: dict[str, Any]) -> None:
    for table in (transfer["found"], transfer["differences"], transfer["prestated"]):
        assert table[["estimate", "low", "high", "null_low", "null_high", "p", "q"]].notna().all().all() and (table["null"] != "").all()
    assert len(transfer["prestated"]) == 16 and set(transfer["prestated"]["network"]) == {transfer["INSTRUCT"], transfer["BASE"]}


def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A target, features that hold it and features that do not."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=96)
    y = signal + 0.3 * rng.normal(size=96)
    return y, np.column_stack([signal, rng.normal(size=(96, 5))]), rng.normal(size=(96, 6))


def test_a_gain_is_found_where_it_was_planted_and_not_elsewhere(transfer: dict[str, Any]) -> None:
    y, good, bad = planted(0)
    codes = np.repeat(np.arange(8), 12)
    folds = make_folds(96, codes).rounds[0]
    blocks = [Block(name, fixed(x), "each", "") for name, x in (("good", good), ("bad", bad))]
    rows = transfer["added"](blocks, blocks[1], left_by(blocks[1:], y, folds).residuals, y, folds, codes, 99)
    assert rows["estimate"].iloc[0] > 0.7 and rows["q"].iloc[0] == 0.01 and rows["low"].iloc[0] > 0
    assert abs(rows["estimate"].iloc[1]) < 0.1 and rows["q"].iloc[1] > 0.1


def test_the_ladder_has_every_rung_and_its_primary_is_a_stack(ladder: dict[str, Any]) -> None:
    table = ladder["ladder"]
    assert set(table["target"]) == {"finance", "insecure"} and table["rung"].nunique() == 12
    primary = table[(table["rung"] == ladder["PRIMARY"]) & (table["network"] == ladder["NETWORK"]) & (table["target"] == "finance")]
    primary, base = primary.set_index("metric"), table[(table["rung"] == ladder["BASELINE"]) & (table["target"] == "finance")].set_index("metric")
    gain = primary.loc["r2", "estimate"] - base["estimate"].loc["r2"].iloc[0]
    assert primary.loc["gain in R²", "estimate"] == pytest.approx(gain, abs=1e-9)
    gain = primary.loc["within_spearman", "estimate"] - base["estimate"].loc["within_spearman"].iloc[0]
    assert primary.loc["gain in rank correlation inside categories", "estimate"] == pytest.approx(gain, abs=1e-9)


def test_differences_from_the_baseline_are_found_where_planted(ladder: dict[str, Any]) -> None:
    rng, codes = np.random.default_rng(2), np.repeat(np.arange(8), 12)
    y = rng.normal(size=96)
    errors = {"good": 0.3 * rng.normal(size=96), "same": y - y.mean() + 0.01 * rng.normal(size=96)}
    rows = pd.DataFrame(ladder["over_baseline"](errors, y - y.mean(), y, codes)).set_index(["metric", "rung"])
    good, same = (rows.loc[("difference in R²", name)] for name in ("good", "same"))
    assert good["estimate"] > 0.8 and good["q"] == 1 / 256 and abs(same["estimate"]) < 0.01 and same["q"] > 0.05


def test_every_table_is_kept_with_what_made_it(transfer: dict[str, Any], ladder: dict[str, Any]) -> None:
    for ran, names in ((transfer, ["transfer-published", "transfer-published-layers", "transfer-published-compared"]), (ladder, ["ladder-rungs"])):
        for name in names:
            kept = json.loads((ran["out"] / f"2-{name}.json").read_text())
            assert kept["a sceptic would write"] and kept["inputs"]["question_scores.csv.gz"] and len(pd.read_csv(ran["out"] / f"2-{name}.csv"))
            assert all(word not in (ran["out"] / f"2-{name}.csv").read_text() for word in ("Explain", "Why "))  # the paper's questions stay there


@pytest.mark.parametrize("script", ["2_transfer.py", "2_ladder.py"])
def test_without_tables_and_without_a_demo_it_says_what_is_missing(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="nothing to foretell"):
        run(script, tmp_path, tmp_path, paper=tmp_path)
    said = capsys.readouterr().out
    assert "--paper" in said and "--run" in said
