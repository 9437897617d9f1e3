"""Prediction, drawn: first everything that the best layer is to be set beside, in one figure; then layer by layer."""

import pandas as pd

from emlens import plots
from emlens.report.captions import Drawn, only_main, tested
from emlens.report.folder import Folder
from emlens.report.words import ACTIVATIONS, AFTER, BEYOND_BOTH, BEYOND_TEXT, RANDOM_TWIN

_TARGETS = ("margin before", "margin after")
_LOWEST = -0.5
_MINE, _RIVAL, _AFTERWARDS, _ADDED = "R² of activations", "R² of rivals", "R² of what only another tuning tells", "ΔR² of activations"
_IN_WORDS = {
    ACTIVATIONS: "activations before",
    "tfidf": "text (TF-IDF)",
    "tfidf_chars": "text (letters)",
    "embedding": "text (embedding)",
    RANDOM_TWIN: "random twin's activations",
    BEYOND_TEXT: "added to text",
    BEYOND_BOTH: "added to text and margin before",
}


def forecast(folder: Folder) -> Drawn:
    """The best layer of every row of interest, one a line: estimate, baselines, what activations add, null of the best layer, ceiling."""
    rows = folder.with_runs("prediction")
    runs = folder.asked_runs()
    rows = rows[rows["run"].isin([*runs, "before"]) & rows["target"].isin(_TARGETS)]
    told = dict(rows.attrs)
    added = rows["metric"].isin([BEYOND_TEXT, BEYOND_BOTH])
    rows = rows[added | (rows["metric"] == "r2")].assign(added=added)
    rows["line"] = rows["features"].mask(rows["added"], rows["metric"])
    rows = rows[rows["line"] != "mean"]
    best = rows.loc[rows.groupby(["run", "target", "line"], sort=False)["estimate"].idxmax()]
    control = best["target"] == _TARGETS[0]
    kind = pd.Series(_RIVAL, best.index).mask(best["line"] == ACTIVATIONS, _MINE)
    kind = kind.mask(best["line"].str.startswith(AFTER), _AFTERWARDS).mask(best["added"], _ADDED)
    layers = rows[rows["layer"] >= 0].groupby(["run", "target", "line"], sort=False)["layer"].nunique()
    of = [layers.get((run, target, line), 0) for run, target, line in best[["run", "target", "line"]].itertuples(index=False)]
    drawn = best.assign(
        panel=("margin after, " + best["trained on"].astype(str)).mask(control, "positive control: margin before"),
        kind=kind,
        line=[_IN_WORDS.get(line, f"{line.removeprefix(AFTER)}, after" if line.startswith(AFTER) else line) for line in best["line"]],
        at=[f"best of {n}: layer {layer}" if n else "" for layer, n in zip(best["layer"], of, strict=True)],
    ).drop(columns="added")
    for end in ("low", "high"):  # what the best of several layers is to be set beside
        if f"best_null_{end}" in drawn:
            drawn[f"null_{end}"] = drawn[f"best_null_{end}"]
    order = {name: place for place, name in enumerate((_MINE, _RIVAL, _AFTERWARDS, _ADDED))}
    runs_in_order = {run: place for place, run in enumerate(["before", *runs])}
    drawn = drawn.sort_values(["run", "kind"], kind="stable", key=lambda names: names.map(order | runs_in_order))
    figure = plots.forest(drawn, ["line", "at"], color="kind", facet="panel", x_title="out-of-fold R², and ΔR²", lowest=_LOWEST)
    drawn.attrs = told
    known = drawn["ceiling"].notna().any() if "ceiling" in drawn else False
    unknown = "The ceiling (noise between seeds) is not known: no two of these runs differ in their seed alone."
    read = (
        "R² on questions held out by category; 0 is the mean of all questions.",
        "ΔR²: of text (and the margin before) and activations together, less that without activations.",
        "Grey: what the best of as many layers gives where there is nothing. Effect sizes: R² and ΔR² themselves; "
        "the interval of a best layer is that of a layer named beforehand (q is corrected for the choice).",
    )
    ceiling = f"Ceiling, {told.get('ceiling')}." if known else unknown
    return figure, drawn, [" ".join(read), ceiling, *tested(drawn, "questions"), only_main(folder, "bad")]


def by_layer(folder: Folder) -> Drawn:
    """R² of both targets along the layers, beside its null and the baselines."""
    rows = folder.with_runs("prediction")
    main = [*folder.asked_runs(), "before"]
    rows = rows[rows["run"].isin(main) & (rows["metric"] == "r2")]
    rows = rows[~rows["features"].str.startswith(AFTER)]
    control = rows["target"] == _TARGETS[0]
    rows = rows.assign(panel=rows["target"] + ", " + rows["trained on"].mask(control, "positive control"))
    figure = plots.by_layer(rows, metric="r2", color="features", facet="panel", reference=0, y_title="out-of-fold R²")
    guess = rows.loc[rows["features"] == "mean", "estimate"].dropna()
    scored = f" (the mean of the other categories scores {guess.min():.3f} to {guess.max():.3f})" if len(guess) else ""
    effect = f"Effect size: R² on questions held out by category. 0 is the mean of all questions, which no fit can know{scored}. "
    effect += "Level lines are baselines."
    return figure, rows, [*tested(rows, "questions"), effect, only_main(folder, "bad")]
