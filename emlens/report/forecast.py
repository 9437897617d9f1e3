"""Prediction, drawn: first everything that the best layer is to be set beside, in one figure; then layer by layer."""

import pandas as pd

from emlens import plots
from emlens.report.captions import Drawn, only_main, tested
from emlens.report.folder import Folder
from emlens.report.words import ACTIVATIONS, AFTER, BEYOND_BOTH, BEYOND_TEXT, RANDOM_TWIN

_TARGETS = ("margin before", "margin after")
_LOWEST = -0.5
_MINE, _KNOWN, _AFTERWARDS = "activations", "known without them", "known only after another tuning"
_KINDS = (_MINE, _KNOWN, _AFTERWARDS)
_IN_WORDS = {
    ACTIVATIONS: "activations",
    RANDOM_TWIN: "untrained twin",
    "category": "category",
    "length": "length",
    "tfidf": "TF-IDF",
    "tfidf_chars": "TF-IDF of letters",
    "embedding": "embedding",
    "margin before": "margin before",
    BEYOND_TEXT: "ΔR² over text",
    BEYOND_BOTH: "ΔR² over text, margin",
}
"""The lines of a panel in their order; what is not named here stands between the margin before and what activations add."""
_BEST_TEXT = "best text baseline"
_OF_NULL = {"within_groups": "R²", "activation_rows": "ΔR² over text and margin before", "activation_rows, text": "ΔR² over text"}


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
    layers = rows[rows["layer"] >= 0].groupby(["run", "target", "line"], sort=False)["layer"].nunique()
    of = [layers.get((run, target, line), 0) for run, target, line in best[["run", "target", "line"]].itertuples(index=False)]
    kind = pd.Series(_KNOWN, best.index).mask((best["line"] == ACTIVATIONS) | best["added"], _MINE)
    control = best["target"] == _TARGETS[0]
    drawn = best.assign(
        panel=("margin after " + best["trained on"].astype(str)).mask(control, "control: margin before"),
        kind=kind.mask(best["line"].str.startswith(AFTER), _AFTERWARDS),
        at=[f"layer {layer}, best of {n}" if n else "" for layer, n in zip(best["layer"], of, strict=True)],
    )
    for end in ("low", "high"):  # what the best of several layers is to be set beside; of one layer it is the null itself
        if f"best_null_{end}" in drawn:
            drawn[f"null_{end}"] = drawn[f"best_null_{end}"]
    if "ceiling" in drawn:  # above 1 for a gain over a text that does worse than the mean: no mark to aim at
        drawn["ceiling"] = drawn["ceiling"].mask(drawn["added"])
    drawn = drawn.sort_values(["run", "line"], kind="stable", key=lambda names: names.map(_order(["before", *runs]) | _order(_lines(drawn["line"]))))
    drawn["line"] = [_IN_WORDS.get(line, f"{line.removeprefix(AFTER)}, after" if line.startswith(AFTER) else line) for line in drawn["line"]]
    drawn = drawn.drop(columns="added")
    figure = plots.forest(drawn, ["line", "at"], color="kind", facet="panel", x_title="R² or ΔR², out of fold", lowest=_LOWEST)
    drawn.attrs = told
    known = drawn["ceiling"].notna().any() if "ceiling" in drawn else False
    unknown = "The ceiling (noise between seeds) is not known: no two of these runs differ in their seed alone."
    read = (
        "R² of the best layer of activations before tuning and of what is known without them, on questions held out by category; 0 is the mean of "
        "all questions. Control: the positive control, the same asked for what activations before tuning must know.",
        "ΔR²: text (and margin before) with activations, less without them.",
        "Grey: where nothing is to be found, of a best layer that of the best of as many. Untrained twin: the same model with random weights.",
        "Effect sizes: R² and ΔR² themselves; the interval of a best layer is that of a layer named beforehand (q is corrected for the choice).",
    )
    ceiling = f"Upright stroke: the ceiling of R², {told.get('ceiling')}." if known else unknown
    return figure, drawn, [" ".join(read), ceiling, *tested(drawn, "questions", _OF_NULL), only_main(folder, "bad")]


def _lines(there: pd.Series) -> list[str]:
    """The lines of a panel from above: activations and what is known before tuning, what other tunings tell, what activations add."""
    last = (BEYOND_TEXT, BEYOND_BOTH)
    return [*(line for line in _IN_WORDS if line not in last), *sorted(set(there) - set(_IN_WORDS)), *last]


def _order(names: list[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def by_layer(folder: Folder) -> Drawn:
    """R² of both targets along the layers, beside its null, an untrained twin, the best baseline of text and the margin before."""
    rows = folder.with_runs("prediction")
    main = [*folder.asked_runs(), "before"]
    rows = rows[rows["run"].isin(main) & (rows["metric"] == "r2")]
    guess = rows.loc[rows["features"] == "mean", "estimate"].dropna()
    text = rows[(rows["layer"] < 0) & ~rows["features"].isin(["mean", _TARGETS[0]]) & ~rows["features"].str.startswith(AFTER)]
    best = text.loc[text.groupby(["run", "target"], sort=False)["estimate"].idxmax()]
    kept = rows[rows["features"].isin([ACTIVATIONS, RANDOM_TWIN, "margin before"])]
    shown = pd.concat([kept, best.assign(features=_BEST_TEXT)])
    control = shown["target"] == _TARGETS[0]
    shown = shown.assign(
        features=shown["features"].replace(_IN_WORDS), panel=shown["target"] + ", " + shown["trained on"].mask(control, "positive control")
    )
    order = {panel: place for place, panel in enumerate(dict.fromkeys([*shown.loc[control, "panel"], *shown["panel"]]))}
    shown = shown.sort_values("panel", kind="stable", key=lambda panels: panels.map(order))
    figure = plots.by_layer(shown, metric="r2", color="features", facet="panel", reference=0, y_title="R², out of fold")
    shown.attrs = dict(rows.attrs)
    scored = f" (the mean of the other categories scores {guess.min():.3f} to {guess.max():.3f})" if len(guess) else ""
    effect = f"Effect size: R² on questions held out by category. 0 is the mean of all questions, which no fit can know{scored}. "
    effect += f"Level lines are baselines: the margin before, and the best of {', '.join(dict.fromkeys(best['features']))} in that panel."
    return figure, shown, [*tested(shown, "questions", _OF_NULL), effect, only_main(folder, "bad")]
