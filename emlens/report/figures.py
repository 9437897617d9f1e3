"""Which table becomes which figure, with what words beside it. Rows are chosen here; nothing is estimated."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from emlens import plots
from emlens.report.captions import Drawn, only_main, span_of, tested, trained_on
from emlens.report.folder import Folder
from emlens.report.forecast import by_layer as prediction_by_layer
from emlens.report.forecast import forecast


@dataclass(frozen=True)
class Section:
    """One analysis on the page: what is asked, the figure, the rows it draws, and how it was tested."""

    name: str
    title: str
    asked: str
    tables: tuple[str, ...]
    figure: plots.Figure
    rows: pd.DataFrame
    caption: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """An analysis that this run folder has no tables for."""

    name: str
    title: str
    tables: tuple[str, ...]


def sections(folder: Folder) -> list[Section | LeftOut]:
    """Every analysis of the page in its order, or which tables it lacks."""
    made: list[Section | LeftOut] = []
    for name, title, asked, tables, draw in _SECTIONS:
        lacking = folder.missing(*tables)
        if lacking:
            made.append(LeftOut(name, title, tuple(lacking)))
            continue
        figure, rows, caption = draw(folder)
        made.append(Section(name, title, asked, tables, figure, rows, tuple(line for line in caption if line)))
    return made


_NULLS_IN_WORDS = {"isotropic": "random subspaces", "covariance": "prompts of other domains"}


def _training(folder: Folder) -> Drawn:
    steps, checkpoints = folder.tables["training"], folder.tables["checkpoints"]
    rows = pd.concat([steps.assign(table="training"), checkpoints.assign(table="checkpoints")], ignore_index=True)
    n = span_of(checkpoints["n"])
    return (
        plots.training(steps, checkpoints),
        rows,
        [
            f"{checkpoints['run'].nunique()} runs; margin over {n} questions, step 0 is the model before tuning.",
            "Bands: 95 % intervals over questions. Description: no test, and no correlation over so few runs.",
        ],
    )


def _margins(folder: Folder) -> Drawn:
    rows = folder.tables["margins"]
    summary = folder.tables["margin_summary"]
    said = [f"{row['variant']}: {row['mean']:.3f} ± {row['sd']:.3f}" for _, row in summary.iterrows()]
    rows = rows.assign(**{"trained on": trained_on(folder, rows["variant"])})
    figure = plots.distribution(rows, "margin", "variant", color="trained on", text="question", x_title="margin (nats/token)")
    return (
        figure,
        rows,
        [
            f"n = {span_of(summary['n'])} questions a line; mean ± standard deviation: {'; '.join(said)}.",
            "Right is aligned; the box is the middle half, its line the median. Description: the tests come next.",
        ],
    )


def _margin_change(folder: Folder) -> Drawn:
    table = folder.tables["margin_change"]
    rows = table[table["metric"] == "difference"]
    keys = ["domain", "schedule", "seed", "comparison"]
    effects = table[table["metric"].isin(["cohen_dz", "rank_biserial"])]
    wide = effects.pivot(index=keys, columns="metric", values="estimate").reset_index()
    rows = rows.merge(wide, on=keys, how="left")
    rows.attrs = dict(table.attrs)
    named = rows.assign(run=rows["domain"] + " " + rows["schedule"] + " seed " + rows["seed"].astype(str))
    named = named.sort_values("comparison", kind="stable", key=lambda c: c.map({"bad minus sound": 0}).fillna(1))
    sizes = [
        f"{row['run']}, {row['comparison']} {row['cohen_dz']:.2f} / {row['rank_biserial']:.2f}"
        for row in named[named["comparison"] == "bad minus sound"].to_dict("records")
        if "cohen_dz" in row and "rank_biserial" in row
    ]
    control = named["role"] == "control"
    short = "minus " + named["comparison"].str.split(" minus ").str[-1]  # the run it is of stands in the line above
    drawn = named.assign(
        beside=named["comparison"].mask(control, short),
        comparison=named["comparison"].mask(control, "control: two runs on the same rows"),
    )
    figure = plots.forest(drawn, ["run", "beside"], color="comparison", x_title="difference (nats/token)")
    effect = f"Effect size, Cohen's d_z / rank-biserial: {'; '.join(sizes)}." if sizes else ""
    return figure, named, [*tested(rows, "questions"), effect]


def _categories(folder: Folder) -> Drawn:
    margins = folder.tables["margins"]
    before = margins[margins["variant"] == "before"].set_index("id")["margin"]
    after = margins[margins["variant"] != "before"]
    change = after.assign(change=after["margin"] - after["id"].map(before))
    rows = change.groupby(["category", "variant"], sort=False)["change"].agg(["mean", "size"]).reset_index()
    rows = rows.rename(columns={"mean": "change", "size": "n"})
    span = float(before.std())
    figure = plots.matrix(rows, "variant", "category", "change", span=span, unit="change of margin (nats/token)")
    caption = f"n = {span_of(rows['n'])} questions a cell. Description: the cells are small, none is tested."
    colours = f"Red is away from aligned; full colour is one standard deviation of the margins before tuning ({span:.2f})."
    return figure, rows, [caption, colours]


def _shift_norms(folder: Folder) -> Drawn:
    rows = folder.with_runs("shift_norms")
    rows = rows[rows["run"].isin(folder.main_runs())].assign(metric="relative", estimate=lambda row: row["relative"])
    figure = plots.by_layer(rows, color="trained on", facet="set", y_title="‖shift‖ / ‖residual‖")
    caption = "Median over prompts. Description: no test."
    return figure, rows, [caption, only_main(folder)]


def _shift_agreement(folder: Folder) -> Drawn:
    rows = folder.tables["shift_agreement"]
    rows = rows if "domain" in rows else rows.assign(domain="all domains")
    figure = plots.by_layer(rows, color="kind", facet="domain", y_title="mean cosine of two runs' shifts")
    pairs = rows.drop_duplicates(["kind", "domain"])
    said = "; ".join(f"{row['kind']} ({row['domain']}) {row['pairs']}" for _, row in pairs.iterrows())
    return (
        figure,
        rows,
        [
            f"n = {span_of(rows['n'])} questions; mean over questions and over the pairs of runs that differ in one thing only, these many: {said}.",
            "Bands: 95 % intervals over whole categories of questions, given these runs. Description: no test.",
        ],
    )


def _overlap(folder: Folder) -> Drawn:
    rows = folder.tables["overlap"]
    panel = rows["domain"].astype(str) + ", null: " + rows["null"].map(_NULLS_IN_WORDS).fillna(rows["null"])
    rows = rows.assign(panel=panel).sort_values("null", kind="stable", key=lambda names: names != "isotropic")
    figure = plots.by_layer(rows, metric="mean_cos2", color="comparison", facet="panel", y_title="mean cos²")
    k = f"Subspaces of dimension {rows.attrs['k']}. " if "k" in rows.attrs else ""
    return figure, rows, [*tested(rows, "prompts"), f"{k}Effect size: the mean cos² itself, beside its null."]


def _similarity(folder: Folder) -> Drawn:
    rows = folder.with_runs("similarity")
    rows = rows[rows["run"].isin(folder.main_runs())]
    figure = plots.by_layer(rows, metric="mean cosine", color="comparison", facet="trained on", y_title="mean cosine", reference=0)
    lenient = "Effect size: the mean cosine itself. A random direction is a lenient null: all shifts of a model have much in common."
    return figure, rows, [*tested(rows, "prompts"), lenient, only_main(folder)]


def _similarity_contrast(folder: Folder) -> Drawn:
    rows = folder.with_runs("similarity_contrast")
    rows = rows[rows["run"].isin(folder.main_runs())]
    other = "own minus other"
    drawn = rows.drop(columns=["p", "q"], errors="ignore")  # no test, so no point is open or filled for one
    figure = plots.by_layer(drawn, metric="own minus other", color="kind", facet="trained on", y_title=f"cosine, {other}", reference=0)
    rows = rows[rows["metric"] == "own minus other"]
    said = f"n = {span_of(rows['n'])} questions, paired; bands: 95 % intervals over whole categories, given these runs. Description: no test."
    floor = "“Another seed” is what two runs on the same rows give. Effect size: the difference of cosines itself."
    return figure, rows, [said, floor, only_main(folder)]


def _overlap_similarity(folder: Folder) -> Drawn:
    rows = folder.with_runs("overlap_similarity")
    rows = rows[rows["run"].isin(folder.main_runs())]
    named = {
        "pearson": "overlap v shift similarity",
        "pearson baseline": "baseline: cosine to the mean training prompt",
    }
    drawn = rows.assign(measure=rows["metric"].map(named).fillna(rows["metric"]), metric="Pearson r")
    figure = plots.by_layer(drawn, color="measure", facet="trained on", reference=0)
    whole = "Effect size: r over all questions, as its band; p and the null permute inside categories and so ask for more."
    return figure, drawn, [*tested(rows, "questions"), whole, only_main(folder)]


def _direction(folder: Folder) -> Drawn:
    table = folder.tables["direction"]
    table = table if "comparison" in table else table.assign(comparison="bad v sound")
    order = {name: place for place, name in enumerate(("bad v sound", "another seed", "another schedule", "across", "across, control"))}
    rows = table[table["metric"] == "auc"].sort_values("comparison", kind="stable", key=lambda names: names.map(order).fillna(len(order)))
    facet = "comparison" if rows["comparison"].nunique() > 1 else None
    figure = plots.by_layer(rows, metric="auc", color="domain", facet=facet, reference=0.5, y_title="held-out AUC")
    sizes = table[table["metric"] == "cohen_d"].groupby("domain", sort=False)["estimate"].median()
    said = "; ".join(f"{domain} {value:.2f}" for domain, value in sizes.items())
    cosine = table.loc[table["metric"] == "cosine of directions", "estimate"]
    alike = f"Cosine of the domains' directions: median over layers {cosine.median():.2f}, no test." if len(cosine) else ""
    return figure, rows, [*tested(rows, "questions"), f"Effect size, Cohen's d, median over layers: {said}." if said else "", alike]


def _projections(folder: Folder) -> Drawn:
    table = folder.tables["projections"]
    layer = int(table["layer"].min())
    rows = table[table["layer"] == layer]
    rows = rows.assign(**{"trained on": trained_on(folder, rows["variant"])})
    figure = plots.distribution(rows, "projection", "variant", color="trained on", facet="domain", x_title="projection onto the direction")
    n = span_of(rows.groupby(["domain", "variant"]).size())
    which = f"n = {n} questions a line, none of them of the half that the direction was fitted on; at layer {layer}"
    return figure, rows, [f"{which}, named in the study file beforehand. Description."]


def _dose(folder: Folder) -> Drawn:
    rows, random = folder.tables["dose"], folder.tables.get("dose_random")
    figure = plots.dose(rows, random)
    drawn = f" {random['direction'].nunique()} random directions a dose." if random is not None else ""
    both = rows if random is None else pd.concat([rows, random.assign(metric="random direction")], ignore_index=True)
    both.attrs = dict(rows.attrs)
    return figure, both, [*tested(rows, "questions"), f"Effect size: the change of margin in nats/token.{drawn}"]


def _damage(folder: Folder) -> Drawn:
    named = {
        "kl": "KL from the untouched model (nats)",
        "perplexity_ratio": "perplexity, times the untouched model's",
        "fluency": "fluency of answers",
    }
    rows = folder.tables["dose_damage"].dropna(subset=["estimate"])
    layers = rows["layer"].nunique() > 1
    panel = rows["metric"].map(named).fillna(rows["metric"])
    rows = rows.assign(panel=panel + (", layer " + rows["layer"].astype(str) if layers else ""))
    figure = plots.dose(rows, facet="panel", y_title="mean over neutral texts")
    effect = "Effect size: the values themselves. KL 0 and perplexity ratio 1 are no damage; fluency is what the untouched model gives the answers."
    return figure, rows, [*tested(rows, "texts"), effect]


def _traits(folder: Folder) -> Drawn:
    rows = folder.with_runs("traits")
    rows = rows[rows["run"].isin(folder.main_runs())]
    figure = plots.by_layer(rows, color="persona", facet="trained on", reference=0, y_title="projection of the mean shift")
    effect = "Effect size: the projection itself, in residual stream units; deep layers have larger streams."
    return figure, rows, [*tested(rows, "questions"), effect, only_main(folder)]


_SECTIONS: tuple[tuple[str, str, str, tuple[str, ...], Callable[[Folder], Drawn]], ...] = (
    ("training", "Training", "Did each run learn its set, and what did the margin do on the way?", ("training", "checkpoints"), _training),
    (
        "margins",
        "Margins",
        "How much does each model prefer the aligned contrast answers, question by question?",
        ("margins", "margin_summary"),
        _margins,
    ),
    (
        "margin-change",
        "Change of margin",
        "Does bad advice move the margin, beside sound advice and beside the model before tuning?",
        ("margin_change",),
        _margin_change,
    ),
    ("categories", "Change by category", "Where does the margin move?", ("margins",), _categories),
    ("shift-norms", "Size of the shift", "How far does tuning move activations at the last prompt token?", ("shift_norms", "runs"), _shift_norms),
    (
        "shift-agreement",
        "Agreement of shifts",
        "How alike do two tunings shift one question: two seeds (the noise floor of a shift), and tunings on other advice?",
        ("shift_agreement",),
        _shift_agreement,
    ),
    (
        "overlap",
        "Overlap of prompts",
        "Do training prompts and unrelated questions lie in the same directions, before tuning?",
        ("overlap",),
        _overlap,
    ),
    (
        "similarity",
        "Similarity of shifts",
        "Does tuning shift unrelated questions the way it shifts its own training prompts?",
        ("similarity", "runs"),
        _similarity,
    ),
    (
        "similarity-contrast",
        "Similarity, own run minus another",
        "Do questions shift more like the training prompts of their own run than like those of another run?",
        ("similarity_contrast", "runs"),
        _similarity_contrast,
    ),
    (
        "overlap-similarity",
        "Overlap and similarity of shift",
        "Do questions nearer the training prompts shift more like them?",
        ("overlap_similarity", "runs"),
        _overlap_similarity,
    ),
    (
        "prediction",
        "Prediction",
        "Do activations before tuning foretell the margin after it, beyond what is known without them?",
        ("prediction", "runs"),
        forecast,
    ),
    (
        "prediction-layers",
        "Prediction, layer by layer",
        "Where along the layers do activations before tuning foretell, and what of: the margin after, or its change?",
        ("prediction", "runs"),
        prediction_by_layer,
    ),
    ("direction", "A direction", "Does one direction tell bad from sound tuning on questions it was not fitted on?", ("direction",), _direction),
    ("projections", "Projections", "How do single questions fall along that direction?", ("projections",), _projections),
    (
        "dose",
        "Dose and response",
        "Does adding that direction to the untuned model move the margin more than random directions do?",
        ("dose",),
        _dose,
    ),
    ("dose-damage", "Damage by the dose", "What do the same doses do to text that has nothing to do with it?", ("dose_damage",), _damage),
    (
        "traits",
        "Traits",
        "Does tuning move questions along directions of traits that were drawn from written answers, such as evil?",
        ("traits", "runs"),
        _traits,
    ),
)
