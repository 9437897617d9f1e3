# %% [markdown]
# # Part 3, data: do prompts nearer the training prompts shift more like them?
#
# From the paper's published tables: one row per prompt of three narrow tunings at two layers and two positions (12 settings). Recomputes
# every correlation the tables allow (288 of the 960 printed in the figures) and the other numbers of part 3, says which are met, and puts the
# controls beside the paper's reading: prompts permuted, what is left inside categories, prompt length, category, the one-line baseline,
# a random subspace, and what the tunings say together. Settings are never pooled, except to check one number that was.
#
#     python analyses/3_data.py [--paper ../shared/paper] [--out figures] [--draws 2000]
#
# Layers are named as there: "layer 32" is block 31 of 64, "layer 64" the stream after the final norm; `last` is the last prompt token, `mean_all`
# the mean over the whole prompt, template and first token included. Overlap is the paper's: the root of the energy in the subspace of 95 % of the
# training prompts' variance. All prompts of a setting share that subspace and the mean training shift: what is found is about these tunings.

# %%
import argparse
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import emlens as em
from emlens import plots, stats
from emlens.by_prompt import over_settings
from emlens.correlations import correlation_contrast, partial_correlation
from emlens.subspaces import explained_energy

SEED, ALPHA = 0, 0.05
SETTING = ["tuning", "published_layer", "position"]
TUNINGS = {
    ("Qwen2.5-32B-Instruct", "finance", "general"): "Qwen finance",
    ("Qwen2.5-Coder-32B-Instruct", "finance", "hbp"): "Coder finance",
    ("Qwen2.5-Coder-32B-Instruct", "insecure", "hbp"): "Coder insecure",
}  # tuned model, narrow training set, evaluation prompts (1414 or 320)
POSITIONS = {"last_prompt_token": "last", "mean_prompt": "mean_all"}
OVERLAP, SIMILARITY = "prompt_pca_projection_fraction", "mean_delta_cosine"
BASELINE, RANDOM = "prompt_train_mean_cosine_similarity", "random_projection_fraction"
RECONSTRUCTION, BEYOND_MEAN = "pca_cosine_reconstructed_eval_delta", "pca_explained_l2_fraction_centered"
WORDS = {
    OVERLAP: "overlap",
    RANDOM: "overlap with a random subspace",
    "prompt_pca_mahalanobis_distance": "Mahalanobis distance of the prompt",
    SIMILARITY: "shift cosine",
    "mean_delta_scalar_projection": "shift along the mean shift",
    RECONSTRUCTION: "reconstruction cosine",
    "pca_explained_l2_fraction_raw": "explained energy of the shift",
    "pca_mahalanobis_distance": "that of its shift",
}  # the measures of the printed figures
LENGTH = ["prompt_len", "inverse_length"]  # 1 / length too: a mean over tokens divides what the first token holds by it
PARTIALS = {
    "given category": ["category"],
    "given length": LENGTH,
    "given length, category": [*LENGTH, "category"],
    "given length, category, baseline": [*LENGTH, "category", BASELINE],
}  # covariates taken out of overlap and similarity both
ROUNDING = 1e-4  # the tables keep five or six digits: enough to move a correlation of shift cosines (which hardly differ) by about as much
FILES = ["per_prompt.csv.gz", "per_prompt_by_k.csv.gz", "figure_correlations.csv", "prompt_overlap_by_fixed_k.csv", "steered_eval.csv"]
INSIDE = "residuals permuted inside category"

parser = argparse.ArgumentParser()
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--draws", type=int, default=2000, help="permutations, and bootstrap samples")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## The tables


# %%
def read(path: Path) -> pd.DataFrame:
    """A published table with the columns of SETTING in place of the paper's names."""
    table = pd.read_csv(path).rename(columns={"question_id": "id"})
    tuning = pd.MultiIndex.from_frame(table[["model", "train", "eval_set"]]).map(TUNINGS)
    place = {"published_layer": table["layer"].str.removeprefix("layer_").astype(int), "position": table["pos"].map(POSITIONS)}
    rest = table.drop(columns=["model", "train", "eval_set", "layer", "pos"])
    return pd.concat([pd.DataFrame({"tuning": tuning, **place}), rest], axis=1)


per_prompt, by_k, printed, overlap_by_k, steered = (read(args.paper / "part3" / name) for name in FILES)
per_prompt["category"] = per_prompt["id"].str.replace(r"_?\d+$", "", regex=True)
per_prompt["inverse_length"] = 1 / per_prompt["prompt_len"]
at = {
    k: per_prompt.merge(part, on=[*SETTING, "id"], validate="one_to_one")
    for k, part in by_k[by_k["family"] == "variance_k"].groupby("k")
}  # fmt: skip
assert all(len(table) == len(per_prompt) for table in at.values()), "every prompt is in both tables"

# the published overlap is the root of the energy of an orthogonal split: both from its two lengths
lengths = per_prompt[["prompt_pca_projection_norm", "prompt_pca_residual_norm"]].to_numpy()
energy = explained_energy(lengths, np.array([[1.0], [0.0]]), np.zeros(2))
worst = float(np.abs(np.sqrt(energy) - per_prompt[OVERLAP]).max())
print(f"{len(per_prompt)} rows; the published overlap is the root of the energy in the subspace, to {worst:.0e}")

# %% [markdown]
# ## The 960 printed correlations: 288 recomputed, 672 as printed
# The tables hold each prompt's overlap for the subspace of 95 % of the variance only, so figures with a fixed number of components cannot be redone.


# %%
def correlate(part: pd.DataFrame, x: str, y: str, metric: str, method: str = "pearson") -> dict[str, Any]:
    """A Result row: the correlation over one setting's prompts; whole categories drawn for the interval."""
    columns = part[x].to_numpy(), part[y].to_numpy()
    row = stats.correlation(*columns, part["category"].to_numpy(), args.draws, SEED, method, n_boot=args.draws)
    return {"metric": metric, "null": "prompts permuted", "estimate": row.pop("r"), **row}


def partial(part: pd.DataFrame, x: pd.Series, y: pd.Series, metric: str, covariates: list[str]) -> dict[str, Any]:
    """A Result row: the correlation with covariates taken out of both. With the category among them it is of what lies inside categories, and
    residuals are permuted there only; whole categories drawn for the interval."""
    groups, inside = part["category"].to_numpy(), "category" in covariates
    row = partial_correlation(
        x.to_numpy(), y.to_numpy(), part[covariates], groups, args.draws, SEED, n_boot=args.draws, within=groups if inside else None
    )
    return {"metric": metric, "null": INSIDE if inside else "residuals permuted", "estimate": row.pop("r"), **row}


def by_setting(table: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The prompts of each setting, with what names it."""
    return [(dict(zip(SETTING, setting, strict=True)), part) for setting, part in table.groupby(SETTING, sort=False)]


def met(found: Any, published: Any, decimals: int, rounding: float = ROUNDING) -> Any:
    """Whether each number is the published one, up to half a unit of its last decimal and the rounding of the tables."""
    return np.abs(np.subtract(found, published)) <= 0.5 * 10.0**-decimals + rounding


def beside_printed(recomputed: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """All printed correlations beside the recomputed ones (NaN where the tables do not allow it); whether each rounds to the printed one, and
    whether it is met within the rounding of the tables."""
    keys = ["pca_k", "x", "y", *SETTING]
    both = printed.merge(recomputed[[*keys, "estimate"]], on=keys, how="left", validate="one_to_one")
    return both.assign(rounds=met(both["estimate"], both["linear_r"], 3, 0.0), met=met(both["estimate"], both["linear_r"], 3))


told: dict[str, Any] = {"seed": SEED, "n_permutations": args.draws, "interval": "95%, bootstrap over whole categories"}
nulls = {name: em.nulls.describe(name) for name in ("prompts permuted", "residuals permuted")}
nulls |= {INSIDE: nulls["residuals permuted"] + ", inside their category", "equal correlations": em.nulls.describe("equal correlations, clusters")}
recomputed = stats.result(
    [
        {"pca_k": k, "x": x, "y": y, **keys, **correlate(part, x, y, "pearson")}
        for k, table in at.items()
        for x, y in printed.loc[printed["pca_k"] == k, ["x", "y"]].drop_duplicates().itertuples(index=False)
        for keys, part in by_setting(table)
    ],
    ["pca_k", "x", "y", *SETTING], family=["pca_k", "x", "y"], null={"prompts permuted": nulls["prompts permuted"]}, **told,
    what="correlation over prompts of what the paper's scatter figures show, each setting alone",
)  # fmt: skip
everything = beside_printed(recomputed, printed)
redone = everything[everything["estimate"].notna()]

# %% [markdown]
# ## Controls, each setting alone

# %%
rows = []
for keys, part in by_setting(at[0.95]):
    x, y, groups = (part[name].to_numpy() for name in (OVERLAP, SIMILARITY, "category"))
    rows += [
        keys | correlate(part, OVERLAP, SIMILARITY, "overlap"),
        keys | correlate(part, OVERLAP, SIMILARITY, "overlap, ranks", "spearman"),
        keys | correlate(part, BASELINE, SIMILARITY, "baseline"),
        keys | correlate(part, RANDOM, SIMILARITY, "random subspace"),
        keys | correlate(part, "prompt_len", SIMILARITY, "length"),
        keys | correlate(part, "prompt_len", OVERLAP, "length with overlap"),
        keys | correlate(part, OVERLAP, RECONSTRUCTION, "overlap with reconstruction"),
        keys | correlate(part, OVERLAP, BEYOND_MEAN, "overlap with energy beyond the mean"),
    ]
    for rival, column in (("baseline", BASELINE), ("random subspace", RANDOM)):
        row = correlation_contrast(x, part[column].to_numpy(), y, groups, n_boot=args.draws, seed=SEED)
        rows.append(keys | {"metric": f"overlap minus {rival}", "null": "equal correlations", "estimate": row.pop("difference"), **row})
    rows += [keys | partial(part, part[OVERLAP], part[SIMILARITY], f"overlap {name}", covariates) for name, covariates in PARTIALS.items()]
controls = stats.result(
    rows, SETTING, family=["metric", "null"], null=nulls, covariates=PARTIALS, **told,
    what="correlation over prompts with shift similarity, each setting alone, beside its controls",
)  # fmt: skip

# %% [markdown]
# ## What the three tunings say together, at each place; and without one of them
# The tunings share a model or questions, so the intervals of the mean are too narrow, Hartung and Knapp's too; and three are few to foretell a
# fourth.

# %%
together = pd.concat(
    [
        over_settings(controls[controls["tuning"] != left_out], metric, ["published_layer", "position"], "interval").assign(left_out=left_out)
        for left_out in ("", *TUNINGS.values())
        for metric in ("overlap", "baseline", *(f"overlap {name}" for name in PARTIALS))
    ],
    ignore_index=True,
)
together = stats.result(
    together, ["left_out", "published_layer", "position"], family=["left_out", "metric"], variance="interval",
    null={"mean correlation 0": em.nulls.describe("mean correlation 0")},
    interval="95%, Hartung and Knapp, of the mean tuning; predicted_*: of a new one",
    what="random-effects mean over tunings of their correlations, at each place; left_out: without that tuning",
)  # fmt: skip

# %% [markdown]
# ## Does it reach the answers?
# Scores of single questions are in the tables for two of the three tunings. Inside categories: ranks taken inside each, as shares of it.

# %%
scores = pd.read_csv(args.paper / "part2" / "question_scores.csv.gz").query("results_dir == 'generated_results_hbp'")
runs = {f"{model}_{train}_all_resp_1e-05_{asked}": tuning for (model, train, asked), tuning in TUNINGS.items()}
scores = scores.assign(tuning=scores["run"].map(runs)).rename(columns={"question_id": "id"})[["tuning", "id", "harmless"]]
scored = per_prompt.merge(scores.dropna(), on=["tuning", "id"], validate="many_to_one")
links = stats.result(
    [
        keys | row
        for keys, part in by_setting(scored)
        for ranks in [part.groupby("category")[[SIMILARITY, OVERLAP, "harmless"]].rank(pct=True)]
        for name, column in (("shift cosine", SIMILARITY), ("overlap", OVERLAP))
        for row in (
            correlate(part, column, "harmless", f"{name} with harmless", "spearman"),
            partial(part, ranks[column], ranks["harmless"], f"{name} with harmless inside categories", ["category"]),
        )
    ],
    SETTING, family=["metric", "null"], null={name: nulls[name] for name in ("prompts permuted", INSIDE)}, **told,
    what="Spearman correlation over prompts (inside categories: of ranks there) with the tuned model's harmless score, each setting alone",
)  # fmt: skip

# %% [markdown]
# ## The published numbers
# Six numbers are Qwen finance, Coder finance, Coder insecure, each at layer 32 and 64. Not in the tables: scores of Qwen finance's 1414 questions.


# %%
def rows_of(metric: str, position: str, layer: int | None = None, table: pd.DataFrame = controls) -> pd.DataFrame:
    """Rows of one metric at one position (and layer), in the order of the settings."""
    chosen = table[(table["metric"] == metric) & (table["position"] == position)]
    return chosen if layer is None else chosen[chosen["published_layer"] == layer]


def r(metric: str, position: str, layer: int | None = None, table: pd.DataFrame = controls) -> np.ndarray:
    return rows_of(metric, position, layer, table=table)["estimate"].to_numpy()


def means(column: str, position: str) -> np.ndarray:
    """Mean over prompts in each of the six settings of a position."""
    return per_prompt[per_prompt["position"] == position].groupby(SETTING, sort=False)[column].mean().to_numpy()


def over_k(table: pd.DataFrame, column: str, *ks: int) -> list[float]:
    """Mean over the six settings at the last token, for each number of components."""
    chosen = table[(table["position"] == "last") & (table["k"] >= 1)].groupby(["k", *SETTING])[column].mean()
    return [chosen[k].mean() for k in ks]


def ends(values: np.ndarray) -> list[float]:
    return [values.min(), values.max()]


last = per_prompt[per_prompt["position"] == "last"]
pooled = stats.correlation(last[OVERLAP], last[SIMILARITY], n_permutations=1, n_boot=2)["r"]
spectra = pd.read_csv(args.paper / "part3" / "pca_spectra.csv").query("site == 'mlp_post_resid' and layer == 'layer_32' and pos == 'mean_prompt'")
first = [spectra.set_index(["model", "train"]).loc[(model, train), "pc1"] for model, train, _ in TUNINGS]
rmse = -steered.query("alpha == 1 and position == 'last'")["rmse_impr%"].to_numpy()
both = POSITIONS.values()
PUBLISHED: list[tuple[str, int, list[float], Any]] = [
    # what, decimals, published, recomputed
    ("mean overlap: last, mean_all", 3, [0.740, 0.949], [means(OVERLAP, each).mean() for each in both]),
    ("mean overlap with a random subspace: last, mean_all", 3, [0.184, 0.195], [means(RANDOM, each).mean() for each in both]),
    ("mean overlap, last: least, largest", 2, [0.53, 0.89], ends(means(OVERLAP, "last"))),
    ("mean overlap, last, k = 1, 8, 32, 128", 3, [0.168, 0.415, 0.598, 0.742], over_k(overlap_by_k, f"{OVERLAP}_mean", 1, 8, 32, 128)),
    ("the same with a random subspace", 3, [0.011, 0.038, 0.074, 0.158], over_k(overlap_by_k, f"{RANDOM}_mean", 1, 8, 32, 128)),
    ("mean shift cosine: last (k = 0 of the reconstruction), mean_all", 3, [0.656, 0.897], [means(SIMILARITY, each).mean() for each in both]),
    ("mean shift cosine, last: least, largest", 2, [0.41, 0.82], ends(means(SIMILARITY, "last"))),
    ("reconstruction cosine, last, k = 1, 8, 128", 3, [0.661, 0.717, 0.831], over_k(by_k, RECONSTRUCTION, 1, 8, 128)),
    ("energy explained beyond the mean, last, k = 1, 8, 128", 3, [0.064, 0.252, 0.585], over_k(by_k, BEYOND_MEAN, 1, 8, 128)),
    ("r(overlap, shift cosine), last", 3, [0.849, 0.285, 0.887, 0.257, 0.607, 0.172], r("overlap", "last")),
    ("its mean", 3, [0.510], r("overlap", "last").mean()),
    ("its mean, category taken out", 3, [0.461], r("overlap given category", "last").mean()),
    ("r(overlap, shift cosine), last, all settings pooled", 3, [0.488], pooled),
    ("r(overlap, shift cosine), mean_all", 3, [-0.353, -0.248, -0.176, -0.364, -0.561, -0.204], r("overlap", "mean_all")),
    ("r(overlap, reconstruction cosine), last", 3, [0.905, 0.648, 0.943, 0.525, 0.845, 0.369], r("overlap with reconstruction", "last")),
    ("r(overlap, reconstruction cosine), mean_all", 3, [0.446, 0.749, 0.497, 0.231, 0.538, 0.178], r("overlap with reconstruction", "mean_all")),
    ("r(length, shift cosine), mean_all: least, largest", 2, [0.39, 0.83], ends(r("length", "mean_all"))),
    ("r(random overlap, shift cosine), last", 3, [0.424, 0.069, -0.105, 0.137, 0.225, 0.116], r("random subspace", "last")),
    ("r(cosine to the mean training prompt, shift cosine), last", 3, [0.938, 0.775, 0.953, 0.716, 0.832, 0.552], r("baseline", "last")),
    ("its mean (baseline)", 3, [0.794], r("baseline", "last").mean()),
    ("variance of training prompts on one component, layer 32, mean_all", 2, [0.72, 0.38, 0.81], first),
    ("r(overlap, length), layer 32, mean_all", 2, [-0.65, -0.90, -0.92], r("length with overlap", "mean_all", 32)),
    ("change of RMSE by adding the mean shift, last, %", 0, [-35, -21, -28, 5, -28, -4], rmse),
    ("Spearman(shift cosine, harmless), layer 32, last, Coder only", 2, [-0.42, 0.02], r("shift cosine with harmless", "last", 32, links)),
]  # fmt: skip
checks = []
for what, decimals, numbers, found in PUBLISHED:
    here = np.ravel(found).round(decimals + 2).tolist()
    checks.append({"what": what, "published": numbers, "recomputed": here, "met": bool(met(found, numbers, decimals).all())})

# %% [markdown]
# ## What was found
# Told apart from 0: q < .05, and an interval over categories without 0 (prompts of one category are no independent witnesses).


# %%
def sure(rows: pd.DataFrame) -> pd.Series:
    """Whether q is small and the interval over categories leaves out 0 too."""
    return (rows["q"] < ALPHA) & ((rows["low"] > 0) | (rows["high"] < 0))


def tally(rows: pd.DataFrame) -> str:
    """The estimates, and in how many of the settings they are told apart from 0, above it or below it."""
    up = rows["estimate"] > 0
    counts = {"above 0": (sure(rows) & up).sum(), "below 0": (sure(rows) & ~up).sum(), "no evidence": (~sure(rows)).sum()}
    return f"{' '.join(f'{x:.3f}' for x in rows['estimate'])} ({', '.join(f'{c} {n} of {len(rows)}' for c, n in counts.items() if n)})"


def reading(rows: pd.DataFrame) -> str:
    """Whether a larger overlap goes with a more similar shift."""
    holds, negative = (sure(rows) & (rows["estimate"] > 0)).sum(), (rows["estimate"] < 0).sum()
    return f"holds in {holds} of {len(rows)} tunings" + (f", negative in {negative}" if negative else "")


distinct = redone.assign(k=redone["pca_k"].where(redone["y"].str.startswith("pca_"))).drop_duplicates(["k", "x", "y", *SETTING])
findings = [
    f"{len(redone)} of {len(everything)} printed correlations recomputed ({len(distinct)} different ones: those without components of the shift are "
    f"printed three times): {redone['rounds'].sum()} round to the printed number, {redone['met'].sum()} are met within the rounding of the tables, "
    f"{(~redone['met']).sum()} are not; {everything['estimate'].isna().sum()} shown as printed"
]
for row in redone[~redone["rounds"]].to_dict("records"):
    findings.append(
        "  printed {linear_r:.3f}, here {estimate:.5f}: {tuning} {published_layer} {position}, {what} at {pca_k:.0%}".format(
            **row, what=WORDS[row["y"]]
        )
    )
findings.append(f"{sum(check['met'] for check in checks)} of {len(checks)} other numbers of part 3 are met")
findings += [f"  not met: {each['what']}: published {each['published']}, here {each['recomputed']}" for each in checks if not each["met"]]
for position in both:
    for layer in (32, 64):
        chosen = rows_of("overlap", position, layer)
        findings.append(f"{position}, layer {layer}: the paper's reading {reading(chosen)}: r = {tally(chosen)}")
        for metric in ("overlap", "overlap given length, category"):
            mean = rows_of(f"{metric} over settings", position, layer, table=together)
            low, high = ends(mean.loc[mean["left_out"] != "", "estimate"].to_numpy())
            findings.append(
                f"  {metric}: mean tuning {{estimate:.3f}} [{{low:.3f}}, {{high:.3f}}], without one of the three {low:.3f} to {high:.3f}; "
                "a new one {predicted_low:.2f} to {predicted_high:.2f}".format(**mean[mean["left_out"] == ""].iloc[0])
            )
    findings.append(f"{position}, layers 32 and 64 of each tuning:")
    for metric in (*(f"overlap {name}" for name in PARTIALS), "baseline", "overlap minus baseline", "overlap minus random subspace", "length"):
        findings.append(f"  {metric}: {tally(rows_of(metric, position))}")
    for name in ("shift cosine with harmless", "overlap with harmless"):
        for metric in (name, f"{name} inside categories"):
            findings.append(f"  {metric}, ranks, Coder only: {tally(rows_of(metric, position, table=links))}")
print("\n".join(findings))

# %% [markdown]
# ## Figures
# What is written are correlations recomputed here. The tables' own rows stay where they are; printed correlations are drawn, and not copied.


# %%
def write(figure: plots.Figure, table: pd.DataFrame, name: str, title: str, **more: Any) -> None:
    inputs = [*(args.paper / "part3" / each for each in (*FILES, "pca_spectra.csv")), args.paper / "part2" / "question_scores.csv.gz"]
    made_by = {
        "title": title,
        "command": f"python analyses/3_data.py --draws {args.draws}",
        "source": "aisa-group/em-generalization at 910ff4f (Apache-2.0)",
        "inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in inputs},
        "versions": {"emlens": em.__version__, **{each: version(each) for each in ("numpy", "scipy", "pandas", "plotly")}},
    }
    plots.save(figure, table.dropna(axis=1, how="all").round(6), args.out / f"3-data-{name}", made_by | more)


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the places, each with the name of its setting."""
    setting = table["tuning"] + " " + table["published_layer"].astype(str) + " " + table["position"]
    return table.assign(setting=setting).sort_values(["position", "published_layer"], kind="stable")


three = together[(together["metric"] == "overlap over settings") & (together["left_out"] == "")].assign(tuning="mean of three,")
drawn = labelled(pd.concat([controls[controls["metric"] == "overlap"], three], ignore_index=True))
figure = plots.forest(drawn, ["setting"], color="position", alpha=ALPHA, x_title="r over prompts: overlap with shift similarity")
write(figure, together, "overlap", "Does a prompt nearer the training prompts shift more like them?", attrs=together.attrs, findings=findings)

several = ["overlap", *(f"overlap {name}" for name in PARTIALS), "baseline", "random subspace", "length", "overlap with energy beyond the mean"]
drawn = labelled(controls[controls["metric"].isin(several)])
drawn = drawn.sort_values("metric", key=lambda names: names.map(several.index), kind="stable")
figure = plots.matrix(drawn, "metric", "setting", "estimate", span=1, unit="r over prompts with shift similarity (last column: as named)")
attrs = {"controls": controls.attrs, "harmless": links.attrs}
write(figure, pd.concat([controls, links], ignore_index=True), "controls", "Overlap and its controls", attrs=attrs)

place = everything["position"] + ", layer " + everything["published_layer"].astype(str)
components = [f"{k:.0%}" if k < 1 else f"k = {k:.0f}" for k in everything["pca_k"]]
drawn = everything.assign(r=everything["estimate"].fillna(everything["linear_r"]), components=components, place=place)
drawn = labelled(drawn.assign(pair=drawn["x"].map(WORDS) + " with " + drawn["y"].map(WORDS))).sort_values(["x", "y", "pca_k"], kind="stable")
axis = "components of the shift: share of variance (recomputed), number (as printed)"
figure = plots.scatter(drawn, "components", "r", color="place", facet="pair", text="setting", x_title=axis)
figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(dict.fromkeys(drawn.sort_values("pca_k")["components"])))
title = f"{len(everything)} correlations of the scatter figures: {len(redone)} recomputed, {len(everything) - len(redone)} as printed"
write(figure, recomputed, "correlations", title, attrs=recomputed.attrs, checks=checks)
