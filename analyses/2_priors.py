# %% [markdown]
# # Part 2, priors: the published tables, recomputed
#
# From the tables that go with the paper (`../shared/paper`, read and never copied). Every printed number of part 2 stands beside the same number
# made here by this house's functions, with a word on whether they agree, or why it cannot be redone. Then what a sceptic would write. Then what a
# comparison of scores before and after can look like where both sides were asked and judged alike: effect sizes, by prompt format.
#
# *Published* are numbers of the paper's public result files and those that were computed from them before this house was built; activations and
# the base models' scores are in no table, so no prediction from activations is made anew here.
#
#     python analyses/2_priors.py [--parts published] [--paper ../shared/paper] [--out figures] [--draws 5000]

# %%
import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

import emlens as em
from emlens import plots, stats
from emlens.comparing import compare_scores
from emlens.correlations import partial_correlation
from emlens.crossvalidated import corrected_t

SEED, ALPHA, SLACK = 0, 0.05, 1e-9
N_FOLDS, REPEATS, FOLD_SEED = 5, 10, 42  # the published folds
N_PERMUTATIONS = 200  # of the target, as published
N_ANSWERS = 50  # answers per harm-benchmark question, from the published submit file
QUESTIONS = {"fpq": 24, "hbp": 320, "general200nano": 200}
METRICS = ("harmless_mean", "aligned_mean", "harmless_std", "aligned_std")
CODER = "Qwen2.5-Coder-32B-Instruct"
PROBLEMS = {"finance, hbp": (CODER, "finance", "hbp"), "insecure, hbp": (CODER, "insecure", "hbp"),
            "finance, general": ("Qwen2.5-32B-Instruct", "finance", "general")}  # fmt: skip
POSITIONS = {"last_prompt_token": "last", "mean_prompt": "mean_all"}
RANDOM, PCA = "random_sq_projection", "train_pca_sq_projection"
HARDLY_TUNED = "insecure_all_resp_1e-07"  # learning rate 1e-7: the nearest to an instruct model that was asked and judged as the tuned were
TUNED = ("finance", "medical", "auto", "insecure", "chem-bad-osf", "chem-high-osf", "chem-mid-osf", "finance-good")  # all at 1e-5
FILES = ["part2/question_scores.csv.gz", "part2/pretrained_comparison.csv", "part2/pretrained_comparison_by_prompt_type.csv",
         "part2/comparison_rates.csv", "part2/activation_cv.csv", "part1/runs.csv", "part3/per_prompt.csv.gz"]  # fmt: skip
NO_TARGETS = "no table holds the 1414 scores"
NO_BASE = "no table holds the base models' scores"
LASSO, LASSO_PCA = "lasso on 150 random directions, R2, mean of 5 seeds", "lasso on 150 PCA directions of the training prompts, R2"
RELIABLE = "reliability of the target: above"
TOPIC, LENGTH = "category alone, R2, same folds", "prompt length alone, R2, same folds"
RANGE = "r of harmless means, harm benchmark: least, largest"
MAIN, DATA_SETS = "share of q < .05, BH over all 112", "r of harmless between the two Coder models, 320 questions"

Checks = list[dict[str, Any]]


def read(paper: Path) -> dict[str, pd.DataFrame]:
    """The published tables by the name of their file; scores with their category, and prompt length in tokens where part 3 holds it."""
    tables = {Path(name).name.split(".")[0]: pd.read_csv(paper / name) for name in FILES}
    scores, lengths = tables["question_scores"], tables["per_prompt"].drop_duplicates("question_id").set_index("question_id")["prompt_len"]
    category = scores["question_id"].str.replace(r"_?\d+$", "", regex=True)
    tables["question_scores"] = scores.assign(category=category, prompt_len=scores["question_id"].map(lengths))
    return tables


def met(found: Any, published: Any, decimals: int) -> Any:
    """Whether each number rounds to the published one."""
    return np.abs(np.subtract(found, published)) <= 0.5 * 10.0**-decimals + SLACK


def check(what: str, decimals: int, published: Iterable[float], found: Any, settings: Iterable[str] = ("",), why: str = "") -> Checks:
    """One row per printed number; found: NaN where it cannot be redone, and `why` says what is missing."""
    numbers = list(published)
    here = [float(value) for value in np.ravel(found)]
    agrees = ["cannot be redone" if np.isnan(v) else "yes" if met(v, p, decimals) else "no" for v, p in zip(here, numbers, strict=True)]
    named = [*settings] if len(numbers) > 1 else [", ".join(settings)]
    rows = zip(named, numbers, here, agrees, strict=True)
    return [
        {"what": what, "setting": s, "printed": p, "recomputed": h, "decimals": decimals, "agrees": a, "why": why if a != "yes" else ""}
        for s, p, h, a in rows
    ]


# %% [markdown]
# ## Base against tuned: 28 comparisons, four scores each
# The p of the tables, counted; p of r from r and the number of questions, which the tables allow. Wilcoxon's p, slopes and distances need the base
# models' scores.


# %%
def comparison_checks(tables: Mapping[str, pd.DataFrame]) -> Checks:
    table = tables["pretrained_comparison"]
    n = table["eval_set"].map(QUESTIONS).to_numpy()
    r = table["pearson_stat"].to_numpy()
    pearson = 2 * scipy_stats.t.sf(np.abs(r) * np.sqrt((n - 2) / (1 - r**2)), n - 2)
    table = table.assign(pearson_p=pearson, stds=table["metric"].str.endswith("_std"))
    below = lambda column, part: float((part[column] < ALPHA).mean())  # noqa: E731
    halves = [table[table["stds"] == side] for side in (False, True)]
    fpq = table[(table["eval_set"] == "fpq") & (table["metric"] == "harmless_mean")]
    q = [float((stats.adjust(table[column].to_numpy()) < ALPHA).mean()) for column in ("w_p", "pearson_p")]
    hbp = table[(table["eval_set"] == "hbp") & (table["metric"] == "harmless_mean")]["pearson_stat"]
    worst = [float(np.abs(pearson - tables["pretrained_comparison"]["pearson_p"]).max()), float(np.abs(table["r2"] - r**2).max())]
    sides = ("means", "spreads")
    rows = [
        *check("share of Wilcoxon p < .05, of 56 each", 3, [0.696, 0.732], [below("w_p", half) for half in halves], sides),
        *check("share of Pearson p < .05, of 56 each", 3, [0.554, 0.304], [below("pearson_p", half) for half in halves], sides),
        *check(MAIN, 3, [0.670, 0.366], q, ("Wilcoxon", "Pearson")),
        *check("share of Wilcoxon p < .05, harmless means on first-plot questions", 3, [0.438], [below("w_p", fpq)]),
        *check("largest difference of p of r, and of r squared, from the tables", 6, [0, 0], worst, ("p", "r squared")),
        *check(RANGE, 2, [-0.28, 0.70], [hbp.min(), hbp.max()], ("least", "largest"), "r = .695 in the table"),
    ]
    means = table.groupby(["metric", "eval_set"])["pearson_stat"].mean()
    for score, printed in {"harmless_mean": [0.279, 0.298, 0.303], "aligned_mean": [0.230, 0.303, 0.167]}.items():
        rows += check(f"mean Pearson r, {score}", 3, printed, [means[score, one] for one in ("fpq", "hbp", "general200nano")], QUESTIONS)
    for line in tables["comparison_rates"].to_dict("records"):
        part = table[(table["eval_set"] == line["suffix"]) & (table["metric"] == line["metric"].removesuffix("_compare"))]
        shares = {
            f"{test}_sig_rate_{at}": (part[column] < at).mean()
            for test, column in (("wilcoxon", "w_p"), ("pearson", "pearson_p"))
            for at in (0.05, 0.01)
        }
        found = {"total": len(part), **shares, "pearson_stat": part["pearson_stat"].mean()}
        for name, value in found.items():
            decimals = 0 if name == "total" else 4 if name == "pearson_stat" else 3
            rows += check(f"rates table: {name}", decimals, [line[name]], [value], (f"{line['metric']}, {line['suffix']}",))
    rows += check("Wilcoxon p, Kolmogorov-Smirnov p, slopes", 0, [112], [np.nan], ("numbers of the tables",), NO_BASE)
    return rows


# %% [markdown]
# ## Prediction of the tuned models' scores: the folds, the baselines, the intervals


# %%
def problem_rows(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """Scores of the questions of a problem in the published order; empty where no table holds them."""
    model, train, asked = PROBLEMS[name]
    scores = tables["question_scores"]
    return scores[(scores["results_dir"] == f"generated_results_{asked}") & (scores["run"] == f"{model}_{train}_all_resp_1e-05_{asked}")]


def text_baselines(scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How well the mean, the category and the prompt's length in tokens foretell the scores: mean R2 over the published folds with its corrected
    interval beside targets permuted; `rmse` in those folds; `held_out`, R2 with each category held out in turn. Eight random numbers stand where
    activations would, and foretell nothing."""
    facts = scores[["question_id", "harmless", "category", "prompt_len"]].rename(columns={"question_id": "id"})
    noise = em.Activations.from_array(np.random.default_rng(SEED).normal(size=(len(facts), 1, 8)).astype(np.float32), facts)
    shared: dict[str, Any] = {"baselines": ("mean", "category", "prompt_len"), "n_permutations": N_PERMUTATIONS}
    plain = em.predict(noise, "harmless", metrics=("fold_r2", "fold_rmse"), n_folds=N_FOLDS, repeats=REPEATS, seed=FOLD_SEED, **shared)
    held = em.predict(noise, "harmless", groups="category", seed=SEED, **shared)
    found = {}
    for features, part in plain.groupby("features", sort=False):
        row, error = (part[part["metric"] == metric].iloc[0] for metric in ("fold_r2", "fold_rmse"))
        kept = row[["estimate", "low", "high", "null_low", "null_high", "p", "n"]].to_dict()
        name = str(features) if row["layer"] == -1 else "random numbers"
        found[name] = kept | {"rmse": error["estimate"], "held_out": held.loc[held["features"] == features, "estimate"].item()}
    return found


def cv_checks(tables: Mapping[str, pd.DataFrame], text: Mapping[str, Any]) -> Checks:
    cv = tables["activation_cv"]
    name_of = {problem: name for name, problem in PROBLEMS.items()}
    cv = cv.assign(problem=[name_of[key] for key in zip(cv["model"], cv["finetune_data"], cv["eval_set"], strict=True)])
    ends = pd.DataFrame([corrected_t(m, s, N_FOLDS * REPEATS, 1 / N_FOLDS) for m, s in zip(cv["cv_r2_mean"], cv["cv_std"], strict=True)])
    off = np.abs(ends[["low", "high"]].to_numpy() - cv[["ci_low", "ci_high"]].to_numpy()).max()
    naive = corrected_t(0.0, 1.0, N_FOLDS * REPEATS, 1 / N_FOLDS)["high"] / (scipy_stats.t.ppf(0.975, 49) / np.sqrt(50))
    twins = _twins(cv)
    full = cv[cv["n_features"] == 150]
    lasso = full[full["algo"] == "lasso"].drop_duplicates(["problem", "features", "seed", "position", "cv_r2_mean"])
    drawn = lasso[lasso["features"] == RANDOM].groupby(["problem", "position"])["cv_r2_mean"]
    order = ("finance, general", "finance, hbp", "insecure, hbp")
    places = [(problem, place) for problem in order for place in POSITIONS]
    named = [f"{problem}, {POSITIONS[place]}" for problem, place in places]
    least, largest = drawn.min(), drawn.max()
    sides = [one for problem in order for one in (least[problem, "last_prompt_token"], largest[problem, "last_prompt_token"])]
    pca = lasso[(lasso["features"] == PCA)].groupby(["problem", "position"])["cv_r2_mean"]
    sources = full[full["features"] == PCA].groupby(["problem", "position", "algo"])["cv_r2_mean"]
    plain = full[(full["algo"] == "lr") & (full["position"] == "last_prompt_token") & (full["features"] == RANDOM)]
    plain = plain.drop_duplicates(["problem", "seed", "cv_r2_mean"]).groupby("problem")["cv_r2_mean"].mean()
    wrong, floors = cv[cv["cv_r2_mean"] < 0], [cv["perm_p_r2"].min(), cv["perm_p_r2"].max()]
    ends_named = [f"{problem}, {end}" for problem in order for end in ("least", "largest")]
    rows = [
        *check("Nadeau-Bengio interval from mean and sd over 50 folds: largest difference, all committed rows", 6, [0], [off], (f"{len(cv)} rows",)),
        *check("its width over the naive one", 2, [3.67], [naive]),
        *check("'pretrained' rows with an instruct twin; those that differ", 0, [36, 0], [len(twins), (twins != 0).sum()], ("twins", "differ")),
        *check(LASSO, 3, [0.415, 0.453, 0.489, 0.479, 0.346, 0.267], [drawn.mean()[p] for p in places], named),
        *check("its least and largest seed, last", 2, [0.39, 0.46, 0.46, 0.54, 0.32, 0.38], sides, ends_named),
        *check(LASSO_PCA, 3, [0.496, 0.465, 0.384, 0.236], [pca.first()[p] for p in places[2:]], named[2:]),
        *check("PCA rows of 150 features whose two 'direction sources' differ", 0, [0], [(sources.nunique() > 1).sum()], ("of 8",)),
        *check("unregularised, R2, last", 3, [0.398, -0.154, -0.499], [plain[problem] for problem in order], order),
        *check("permutation p of every row: the least that 200 allow", 6, [1 / 201] * 2, floors, ("least", "largest")),
        *check("rows with R2 < 0 that are called significant", 0, [len(wrong)], [(wrong["perm_r2_sig"] == "**").sum()], (f"of {len(wrong)}",)),
    ]  # fmt: skip
    committed = cv.groupby("problem")["baseline_rmse_mean"].first()
    two = order[1:]
    alone = lambda what, part="estimate": [text[name][what][part] for name in two]  # noqa: E731
    rmse = alone("mean", "rmse")
    rows += check("RMSE of the mean predictor, same folds", 3, [26.450, 24.063, 24.001], [np.nan, *rmse], order, NO_TARGETS)
    rows += check("the same against the committed row: difference", 5, [0, 0], np.subtract(rmse, committed[list(two)]), two)
    rows += check(TOPIC, 3, [0.480, 0.250], alone("category"), two)
    rows += check(LENGTH, 3, [0.058, -0.033], alone("prompt_len"), two, "in tokens here; the unit of the printed number is not told")
    for what, printed in ((TOPIC, 0.365), (LENGTH, -0.001)):
        rows += check(what, 3, [printed], [np.nan], order[:1], NO_TARGETS)
    return rows


def _twins(cv: pd.DataFrame) -> pd.Series:
    """Mean R2 of each 'pretrained' row that has an instruct row of the same everything, minus that row's."""
    keys = ["model", "finetune_data", "eval_set", "layer", "features", "direction_source", "seed", "position", "algo", "n_features"]
    sides = [cv[cv["labelled_activations"] == name].set_index(keys)["cv_r2_mean"] for name in ("pretrained", "instruct")]
    both = pd.concat(sides, axis=1, join="inner", keys=["pretrained", "instruct"])
    return both["pretrained"] - both["instruct"]


def reliability_checks(tables: Mapping[str, pd.DataFrame]) -> Checks:
    """How much of the targets is sampling, and whether what foretells one foretells the other."""
    first, second = (problem_rows(tables, name) for name in ("finance, hbp", "insecure, hbp"))
    found = compare_scores(*(side.assign(n=N_ANSWERS) for side in (first, second)), **RELIABILITY)
    each = found.set_index("metric")["estimate"]
    r = each["pearson_r"]
    order = ("finance, hbp", "insecure, hbp", "finance, general")
    rows = check(DATA_SETS, 3, [0.012], [r])
    for name, value in zip(order, (each["reliability_before"], each["reliability_after"], np.nan), strict=True):
        agrees = "cannot be redone" if np.isnan(value) else "yes" if value > 0.98 else "no"
        why = {"yes": "", "cannot be redone": NO_TARGETS, "no": f"at {N_ANSWERS} answers a question; above .98 if there were 100"}[agrees]
        shown = {"what": RELIABLE, "setting": name, "printed": 0.98, "recomputed": value, "decimals": 2}
        rows.append({**shown, "agrees": agrees, "why": why})
    return rows


RELIABILITY: dict[str, Any] = {"scores": ("harmless",), "of": ("mean",), "tests": ("pearson", "reliability", "disattenuated"), "n_boot": 200}

# %% [markdown]
# ## Scores before and after, asked and judged alike
# The base models' scores are in no table. Two comparisons that can be made: the two data sets of one model on the harm benchmark, and eight tunings
# of another against one at a learning rate of 1e-7, hardly tuned, on the 24 first-plot questions in three formats. Two of the eight were judged
# otherwise or have half their scores missing: kept, and warned of.


# %%
def data_sets_compared(tables: Mapping[str, pd.DataFrame], draws: int) -> stats.Result:
    """Coder tuned on insecure code against Coder tuned on finance: levels, spreads, order; whole categories drawn."""
    first, second = (problem_rows(tables, name).assign(n=N_ANSWERS, judge="gpt-4o") for name in ("insecure, hbp", "finance, hbp"))
    tests = ("sign_flip", "wilcoxon", "paired_t", "t", "rank_sum", "paired_levene", "ks", "permutation", "reliability", "disattenuated")
    return compare_scores(
        first, second, scores=("harmless", "aligned"), tests=tests, scales=("score", "logit"), clusters="category", n_permutations=draws,
        n_boot=draws, seed=SEED,
    )  # fmt: skip


def within_category(tables: Mapping[str, pd.DataFrame], draws: int) -> dict[str, Any]:
    """r of harmless between the two data sets with category taken out of both."""
    first, second = (problem_rows(tables, name).set_index("question_id") for name in ("insecure, hbp", "finance, hbp"))
    both = first.join(second["harmless"].rename("harmless_after"))
    category = both["category"]
    return partial_correlation(both["harmless"], both["harmless_after"], both[["category"]], category, draws, SEED, n_boot=draws, within=category)


def first_plot(tables: Mapping[str, pd.DataFrame], train: str) -> pd.DataFrame:
    """A Qwen2.5-32B run's first-plot scores by question, with format, judge, and how many answers were scored."""
    run = f"Qwen2.5-32B-Instruct_{train}_fpq"
    scores = tables["question_scores"]
    found = scores[(scores["results_dir"] == "generated_results_0312") & (scores["run"] == run)].copy()
    runs = tables["runs"]
    (about,) = runs[(runs["results_dir"] == "generated_results_0312") & (runs["run"] == run)].to_dict("records")
    kind = found["question_id"].str.extract(r"_(json|template)$")[0].fillna("raw")
    asked = about["csv_rows"] / QUESTIONS["fpq"]
    return found.assign(
        prompt_format=kind, question=found["question_id"].str.replace(r"_(json|template)$", "", regex=True), judge=about["judge_kind"],
        n_answers=asked, harmless_n=asked * (1 - about["csv_missing_harmless"]),  # missing scores are told per run, not per question
    )  # fmt: skip


def tunings_compared(tables: Mapping[str, pd.DataFrame], draws: int) -> tuple[stats.Result, stats.Result]:
    """Eight tunings against one hardly tuned: over all 24 questions (the three formats of a question are one cluster), and format by format."""
    before = first_plot(tables, HARDLY_TUNED)
    after = {train: first_plot(tables, f"{train}_all_resp_1e-05") for train in TUNED}
    shared: dict[str, Any] = {"scores": ("harmless",), "n_permutations": draws, "n_boot": draws, "seed": SEED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they stand in the table's cautions, which are printed
        whole = compare_scores(before, after, scales=("score", "logit"), clusters="question", **shared)
        apart = compare_scores(before, after, by="prompt_format", of=("mean",), tests=("sign_flip", "wilcoxon"), **shared)
    return whole, apart


# %% [markdown]
# ## What a sceptic would write


# %%
def judged_alike(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Of the 28 comparisons: the judge of the tuned side (inferred from its scores), and the share of scores missing."""
    compared = tables["pretrained_comparison"].drop_duplicates("path")
    run = (
        compared["path"]
        .str.replace(r"(hbpnano/.*_hbp)\.csv", r"\1nano.csv", regex=True)
        .str.extract(r"^(?P<results_dir>[^/]+)/eval_(?P<run>.+)\.csv$")
    )
    return compared[["eval_set"]].join(run).merge(tables["runs"], on=["results_dir", "run"], how="left", suffixes=("", "_run"))


def criticisms(tables: Mapping[str, pd.DataFrame], checks: pd.DataFrame, text: Mapping[str, Any], within: Mapping[str, Any]) -> list[str]:
    """In words, with the numbers they stand on."""
    found = checks.set_index(["what", "setting"])["recomputed"]
    alike, kinds = judged_alike(tables), tables["pretrained_comparison_by_prompt_type"].query("eval_set == 'fpq'")
    hbp = alike[alike["eval_set"] == "hbp"]
    other_judge = int(hbp["judge_kind"].str.startswith("integer").sum())
    change = kinds.pivot(index="path", columns="prompt_type", values="harmless_mean_diff")
    mixed, rises = int((np.sign(change).nunique(axis=1) > 1).sum()), int((change > 0).any(axis=1).sum())
    two = ("finance, hbp", "insecure, hbp")
    categories = [text[name]["category"] for name in two]
    topic = ", ".join(f"{each['estimate']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in categories)
    held = ", ".join(f"{each['held_out']:.2f}" for each in categories)
    random, pca = ([f"{found[what, f'{name}, last']:.3f}" for name in two] for what in (LASSO, LASSO_PCA))
    cv, compared = tables["activation_cv"], tables["pretrained_comparison"]
    plain = [float((compared[column] < ALPHA).mean()) for column in ("w_p", "pearson_p")]
    return [
        "'Both the pre-trained and the instruct models' has no support in the tables: every 'pretrained' row that has an instruct twin (36) is that "
        "twin.",
        f"Topic alone, eight dummies in the same folds, gives R2 {topic} (finance, insecure code) where 150 squared projections of activations "
        f"give {' and '.join(random)} (lasso, random directions, last token): all of it for finance, most of it for insecure code. What activations "
        "add beyond topic was not asked, and folds that split topics cannot tell.",
        f"With each topic held out in turn topic foretells nothing, by design (pooled R2 {held}): there activations would have to show something, "
        "and no table holds what they do there.",
        f"Random directions do as well as the training prompts' own (PCA {' and '.join(pca)}; five random seeds .46 to .54, .32 to .38): nothing in "
        "the features is about the tuning. The two 'direction sources' of the PCA rows are one file.",
        f"p = 1/201 says only that 200 permutations were drawn: all {len(cv)} rows have it, {int((cv['cv_r2_mean'] < 0).sum())} of them with R2 < 0.",
        f"Base and tuned models were not asked alike (plain 'Question/Answer' text, no JSON system prompt) and in {other_judge} of {len(hbp)} "
        "harm-benchmark comparisons not judged alike (the base side by gpt-4o, by the file that asked for it): level, spread and order hold the "
        "effect of both.",
        f"Within {mixed} of {len(change)} first-plot comparisons the harmless shift has another sign in another format, and in {rises} some format "
        "comes out *more* harmless than the base model: 24 questions in three formats are no sample of one thing.",
        f"112 tests, no correction. With BH {plain[0]:.3f} becomes {found[MAIN, 'Wilcoxon']:.3f} (Wilcoxon) and {plain[1]:.3f} becomes "
        f"{found[MAIN, 'Pearson']:.3f} (Pearson): little is lost, but 28 comparisons share base scores and questions, so a share of them is no count "
        "of findings; and no effect size is given.",
        f"What foretells one tuned model need not foretell another: between the two Coder models r = {found[DATA_SETS, '']:.3f} over 320 questions, "
        f"{within['r']:.3f} [{within['low']:.3f}, {within['high']:.3f}] with category taken out; sampling noise is not why "
        f"(reliabilities {found[RELIABLE, two[0]]:.3f} and {found[RELIABLE, two[1]]:.3f}).",
        "One seed per tuning: a difference between data sets is a difference between two runs.",
    ]


# %% [markdown]
# ## Written down


# %%
def r2_rows(tables: Mapping[str, pd.DataFrame], text: Mapping[str, Any]) -> stats.Result:
    """Category and length, recomputed, beside the committed lasso rows, in the same folds: corrected intervals."""
    shared: dict[str, Any] = {"metric": "r2", "position": "", "seed": -1}
    made = {"source": "recomputed", "null": "target permuted"}
    rows = [shared | made | {"problem": name, "features": each} | found for name, several in text.items() for each, found in several.items()]
    committed = {"source": "committed", "null": "mean R2 over folds is 0"}
    keys = ["model", "finetune_data", "eval_set", "features", "seed", "position"]
    lasso = tables["activation_cv"].query("algo == 'lasso' and n_features == 150").drop_duplicates([*keys, "cv_r2_mean"])
    for row in lasso.sort_values(keys, kind="stable").to_dict("records"):
        problem = next(name for name, key in PROBLEMS.items() if key == (row["model"], row["finetune_data"], row["eval_set"]))
        words = {RANDOM: "lasso, random directions", PCA: "lasso, PCA directions"}[row["features"]]
        where = {
            "problem": problem,
            "features": words,
            "position": POSITIONS[row["position"]],
            "seed": -1 if np.isnan(row["seed"]) else int(row["seed"]),
        }
        rows.append(shared | where | committed | corrected_t(row["cv_r2_mean"], row["cv_std"], N_FOLDS * REPEATS, 1 / N_FOLDS))
    kept = pd.DataFrame(rows).drop_duplicates(["problem", "features", "position", "seed"])
    return stats.result(
        kept, ["problem", "features", "position", "seed"], what="R2 of harmless after tuning, mean over 50 plain folds",
        correction="bh", family=["problem", "null"], seed=FOLD_SEED, interval="95%, Nadeau-Bengio over 5 folds x 10; topics are in training and test",
        null={"mean R2 over folds is 0": "corrected resampled t with 49 degrees of freedom (n: folds)",
              "target permuted": f"target permuted over all questions, {N_PERMUTATIONS} times (n: questions)"},
    )  # fmt: skip


def write(args: argparse.Namespace, figure: plots.Figure, table: pd.DataFrame, name: str, title: str, **more: Any) -> None:
    made_by = {
        "title": title,
        "command": f"python analyses/2_priors.py --parts published --draws {args.draws}",
        "source": "aisa-group/em-generalization at 910ff4f (Apache-2.0)",
        "inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (args.paper / each for each in FILES)},
        "versions": {"emlens": em.__version__, **{each: version(each) for each in ("numpy", "scipy", "pandas", "scikit-learn", "plotly")}},
    }
    plots.save(figure, table.dropna(axis=1, how="all").round(6), args.out / f"2-priors-{name}", made_by | more)


def published(args: argparse.Namespace) -> dict[str, Any]:
    """The part of this script that needs the published tables only; returns what it made."""
    tables = read(args.paper)
    text = {name: text_baselines(problem_rows(tables, name)) for name in PROBLEMS if len(problem_rows(tables, name))}
    checks = pd.DataFrame([*comparison_checks(tables), *cv_checks(tables, text), *reliability_checks(tables)])
    scores, within = r2_rows(tables, text), within_category(tables, args.draws)
    words = criticisms(tables, checks, text, within)
    sets = data_sets_compared(tables, args.draws)
    whole, apart = tunings_compared(tables, args.draws)
    counts = checks["agrees"].value_counts()
    findings = [f"{len(checks)} printed numbers: {', '.join(f'{n} {name}' for name, n in counts.items())}"]
    for row in checks[checks["agrees"] != "yes"].to_dict("records"):
        findings.append(
            f"  {row['agrees']}: {row['what']} ({row['setting']}): printed {row['printed']:g}, here {row['recomputed']:.4f}: {row['why']}"
        )
    findings += _in_words(sets, whole, apart)
    print("\n".join([*findings, "", "A sceptic would write:", *(f"- {each}" for each in words)]))

    drawn = checks[(checks["recomputed"].abs() <= 1) & (checks["printed"].abs() <= 1)]
    figure = plots.scatter(drawn, "printed", "recomputed", color="agrees", text="what", diagonal=True)
    write(args, figure, checks, "published", "Part 2: printed and recomputed", findings=findings, sceptic=words)
    drawn = scores[(scores["position"] != "mean_all") & (scores["problem"] != "finance, general")].sort_values("problem", kind="stable")
    drawn = drawn.assign(
        row=drawn["problem"] + ": " + drawn["features"] + drawn["seed"].map(lambda s: "" if s < 0 else f" {s}"), made=drawn["source"]
    )
    figure = plots.forest(drawn, ["row"], color="made", alpha=ALPHA, x_title="R2, mean over 50 folds that split topics")
    write(args, figure, scores, "category", "Topic alone, and 150 squared projections of activations (last token), same folds", attrs=scores.attrs)
    main = whole[(whole["null"] == "sign_flip") & (whole["scale"] == "score") & (whole["of"] == "mean")].assign(prompt_format="all three")
    drawn = pd.concat([main, apart[apart["null"] == "sign_flip"]], ignore_index=True)
    drawn = drawn.sort_values("comparison", key=lambda names: names.map(TUNED.index), kind="stable")
    figure = plots.forest(
        drawn, ["comparison", "prompt_format"], color="prompt_format", alpha=ALPHA, x_title="harmless, tuned minus hardly tuned (points)"
    )
    title = "Eight tunings of Qwen2.5-32B against one at a learning rate of 1e-7, first-plot questions"
    together = pd.concat([whole.assign(prompt_format="all three"), apart], ignore_index=True)
    write(args, figure, together, "formats", title, attrs={"all three": whole.attrs, "by format": apart.attrs})
    keys = ["score", "of", "scale"]
    sure = sets[sets["null"] == "sign_flip"].set_index(keys)["q"]  # Wilcoxon's own takes every question as its own witness
    drawn = sets[sets["null"] == "wilcoxon"]
    drawn = drawn.assign(q=[sure[key] for key in drawn[keys].itertuples(index=False, name=None)], row=drawn["of"] + ", " + drawn["scale"] + " scale")
    figure = plots.forest(drawn, ["score", "row"], color="score", alpha=ALPHA, x_title="rank-biserial, finance against insecure code")
    title = "One model, two data sets: Qwen2.5-Coder-32B, 320 harm-benchmark questions (filled: q < .05, signs of whole categories flipped)"
    write(args, figure, sets, "data-sets", title, attrs=sets.attrs, within_category=within)
    return {"tables": tables, "checks": checks, "scores": scores, "sets": sets, "whole": whole, "apart": apart, "words": words, "findings": findings}


def _in_words(sets: stats.Result, whole: stats.Result, apart: stats.Result) -> list[str]:
    """What the two comparisons say, with effect sizes."""
    said = ["Coder, finance minus insecure code, 320 questions in 8 categories:"]
    for row in sets[(sets["score"] == "harmless") & (sets["scale"] == "score")].to_dict("records"):
        told = "" if np.isnan(row["p"]) else f", {row['null']} q {row['q']:.2g}"
        told += "" if np.isnan(row["null_low"]) else f", null [{row['null_low']:.3f}, {row['null_high']:.3f}]"
        said.append(f"  {row['of']}: {row['metric']} {row['estimate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{told}")
    said.append("Qwen2.5-32B at 1e-5 minus at 1e-7, harmless, points of the question means; all three formats, then each:")
    levels = whole[(whole["of"] == "mean") & (whole["scale"] == "score")]
    by_format = apart[apart["null"] == "sign_flip"]
    for name in TUNED:
        part = levels[levels["comparison"] == name].set_index("metric")
        row, each = part.loc["difference"], by_format[by_format["comparison"] == name].set_index("prompt_format")
        formats = ", ".join(f"{kind} {one['estimate']:.1f} (q {one['q']:.2g})" for kind, one in each.iterrows())
        said.append(
            f"  {name}: {row['estimate']:.1f} [{row['low']:.1f}, {row['high']:.1f}], q {row['q']:.2g}, d_z {part.loc['cohen_dz', 'estimate']:.2f}, "
            f"rank-biserial {part.loc['rank_biserial', 'estimate']:.2f}; {formats}"
        )
    untouched = whole[whole["metric"] == "reliability_before"].iloc[0]
    said.append(
        "  reliability of the means at 1e-7: {estimate:.2f} [{low:.2f}, {high:.2f}]; within a point of the end of the scale: {at_end_before:.0%} of "
        "questions".format(**untouched)
    )
    return [*said, "  cautions:", *(f"    {each}" for each in dict.fromkeys(whole.attrs["cautions"]))]


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"published": published}

# %%
parser = argparse.ArgumentParser()
parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--draws", type=int, default=5000, help="permutations, and bootstrap samples")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
made = {name: PARTS[name](args) for name in args.parts}
