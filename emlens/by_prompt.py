"""Prompt by prompt: where a prompt lay before tuning and how it shifted, and whether the one says anything about the other.

`prompt_geometry` is the paper's table, one row a prompt and layer. `overlap_correlations` asks over the prompts of one setting (one
model, tuning, set of questions, layer) whether a larger overlap goes with a more similar shift; `over_settings` says what several
settings have to say together, with room for them to differ. Prompts of several settings are never pooled.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as scipy_stats

from . import nulls as null_draws
from . import stats
from ._sides import check_same_layers, check_shifts
from .activations import Activations
from .correlations import correlation_contrast, fisher_variance, partial_correlation, random_effects
from .subspaces import cosines, explained_energy, n_components, principal_components, row_cosines, unit_rows
from .threads import one_thread

_CONTRAST = "overlap minus baseline"


@one_thread
def prompt_geometry(
    train: Activations,
    acts: Activations,
    train_shift: Activations,
    shift: Activations,
    k: int = 8,
    shift_k: int = 8,
    variance: float | None = None,
    shift_variance: float | None = None,
) -> pd.DataFrame:
    """Every prompt before tuning against the training prompts, and its shift against theirs: one row per prompt and layer.

    train, acts        training prompts and prompts before tuning; train_shift, shift: what tuning did to them. `shift` is of the
                       same prompts as `acts` (matched by id), `train_shift` of any training prompts.
    k, variance        components of the training prompts, or the smallest number that explains that share of their variance (0.95 in
                       the paper); shift_k, shift_variance: of the training shifts.

    Columns: id, layer, then with P, mu, lambda_i the projector, mean and variances of the PCA of the training prompts
        k                     components taken
        explained_energy      ||P(x - mu)||^2 / ||x - mu||^2, chance k / d_model; norm_fraction: its root (the paper's prompt overlap)
        cosine_to_mean        cos(x, mu), uncentred: the one-line baseline of the overlap
        mahalanobis           (sum_i c_i^2 / lambda_i)^1/2 inside the subspace, c_i the components of x - mu
    and with W, nu the same of the training shifts, d the prompt's shift, d' = nu + W(d - nu)
        shift_k, shift_norm   components taken; ||d||
        shift_cosine          cos(d, nu): how alike the prompt shifts; scalar_projection: d on the unit vector of nu
        orthogonal_remainder  length of what is left of d without that
        mean_explained        1 - ||d - nu||^2 / ||d||^2: nu alone, the k = 0 baseline of the next (below 0 where 0 would do better)
        explained_raw         1 - ||d - d'||^2 / ||d||^2; explained_centred: 1 - ||d - d'||^2 / ||d - nu||^2
        reconstruction_cosine cos(d, d'), whose k = 0 baseline is shift_cosine
        shift_mahalanobis     as mahalanobis
    and every other column of the facts of `acts`. A description: `overlap_correlations` tests. Errors: ValueError for a recording
    in the place of a shift, different layers, widths or prompts, or too few training rows.
    """
    check_shifts(train_shift=train_shift, shift=shift)
    for other in (acts, train_shift, shift):
        check_same_layers(train, other)
    strange = set(acts.ids) ^ set(shift.ids)
    if strange:
        raise ValueError(f"{len(strange)} prompts are in acts or in shift only, e.g. {min(strange)!r}: record the same prompts on both")
    shift = shift.select(ids=acts.ids)
    parts = []
    for layer in train.layers:
        try:
            x = _against(train.layer(layer), acts.layer(layer), k, variance)
            d = _against(train_shift.layer(layer), shift.layer(layer), shift_k, shift_variance)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
        moved, mean = shift.layer(layer).astype(np.float64), d["centre"]
        norm, left = np.linalg.norm(moved, axis=1), np.linalg.norm(d["residual"], axis=1)
        along = moved @ unit_rows(mean[None])[0]
        columns = {
            "k": x["k"],
            "explained_energy": x["energy"],
            "norm_fraction": np.sqrt(x["energy"]),
            "cosine_to_mean": cosines(acts.layer(layer), x["centre"]),
            "mahalanobis": x["mahalanobis"],
            "shift_k": d["k"],
            "shift_norm": norm,
            "shift_cosine": cosines(moved, mean),
            "scalar_projection": along,
            "orthogonal_remainder": np.sqrt(np.clip(norm**2 - along**2, 0, None)),
            "mean_explained": _share_explained(np.linalg.norm(moved - mean, axis=1), norm),
            "explained_raw": _share_explained(left, norm),
            "explained_centred": d["energy"],
            "reconstruction_cosine": row_cosines(moved - d["residual"], moved),
            "shift_mahalanobis": d["mahalanobis"],
        }
        parts.append(pd.DataFrame({"id": acts.ids.to_numpy(), "layer": layer, **columns}))
    table = pd.concat(parts, ignore_index=True)
    facts = acts.facts[["id", *(name for name in acts.facts.columns if name not in table.columns)]]
    return table.merge(facts, on="id", how="left", validate="many_to_one")


def overlap_correlations(
    table: pd.DataFrame,
    overlap: str = "explained_energy",
    similarity: str = "shift_cosine",
    baseline: str | None = "cosine_to_mean",
    covariates: Sequence[str] = (),
    by: Sequence[str] = ("layer",),
    clusters: str | None = None,
    within: str | None = None,
    n_permutations: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    n_boot: int = 2000,
) -> stats.Result:
    """Over the prompts of each setting: does a larger overlap go with a more similar shift, and more so than the baseline's one line?

    table       one row per prompt and setting (`prompt_geometry`, or published tables); `by` names the columns that make a setting, and
                each holds a prompt once: settings are not pooled (for several at once: `over_settings`).
    overlap, similarity, baseline   columns; any others will do (with a score's change: `change_correlations`).
    covariates  columns taken out for "partial": prompt length and category, say.

    Metrics by setting: "pearson", "spearman" of overlap and similarity, "pearson baseline" of the baseline in its place (null
    "prompts permuted", two-sided; inside the groups of the column `within`, when given); "overlap minus baseline", the difference of
    both (null "equal correlations": Williams' test over independent prompts; with `clusters`, from the bootstrap over them; with `within`
    alone, no p); "partial" (null "residuals permuted", inside `within` too).
    low/high    bootstrap over prompts, or over the groups of the column `clusters`.

    Prompts that come in categories need both: without, p of all of these is of independent prompts. With `within`, p asks whether anything
    goes together inside any group (slopes of either sign reject too); whether it does so over groups, the interval says.
    All prompts of a setting share the training subspace and mean: what is found is about these prompts and this tuning. Errors:
    KeyError for columns that are not there; ValueError for a prompt that is twice in a setting.
    """
    named = [overlap, similarity, *([baseline] if baseline else []), *covariates, *by, *(name for name in (clusters, within) if name)]
    missing = [name for name in named if name not in table.columns]
    if missing:
        raise KeyError(f"no columns {missing} in the table; there are {list(table.columns)}")
    if "id" in table.columns and table.duplicated([*by, "id"]).any():
        twice = table.loc[table.duplicated([*by, "id"]), "id"].iloc[0]
        raise ValueError(f"prompt {twice!r} is twice in one setting: several settings would be pooled; name the columns that tell them apart in by=")
    rows: list[dict[str, Any]] = []
    for setting, part in table.groupby(list(by), sort=False) if by else [((), table)]:
        keys = dict(zip(by, setting, strict=True))
        groups, strata = (part[name].to_numpy() if name else None for name in (clusters, within))
        x, y = part[overlap].to_numpy(), part[similarity].to_numpy()
        found = correlation_rows(part, overlap, similarity, baseline, groups, strata, n_permutations, seed, level, n_boot)
        if baseline:
            contrast = correlation_contrast(x, part[baseline].to_numpy(), y, groups, level, n_boot, seed)
            if within and not clusters:
                contrast |= {"t": np.nan, "p": np.nan}
            found.append({"metric": _CONTRAST, "null": "equal correlations", "estimate": contrast.pop("difference"), **contrast})
        if covariates:
            partial = partial_correlation(x, y, part[list(covariates)], groups, n_permutations, seed, level, n_boot, strata)
            found.append({"metric": "partial", "null": "residuals permuted", "estimate": partial.pop("r"), **partial})
        rows += [{**keys, **row} for row in found]
    tested = {row["null"]: null_draws.describe(row["null"]) for row in rows}
    if within:
        tested |= {name: f"{told}, inside {within}" for name, told in tested.items() if name != "equal correlations"}
    if clusters and baseline:
        tested["equal correlations"] = null_draws.describe("equal correlations, clusters")
    return stats.result(
        rows,
        list(by),
        what=f"correlation over prompts of {overlap} with {similarity}, in each setting alone",
        family=["metric", "null"],
        seed=seed,
        n_permutations=n_permutations,
        interval=f"{level:.0%}, bootstrap over {clusters or 'prompts'}, of the correlation over all prompts",
        null=tested,
        covariates=list(covariates),
        baseline=baseline,
    )


MEASURES = ("explained_energy", "shift_norm", "shift_cosine")
"""Of `prompt_geometry`: where a prompt lay, how far it shifted, and how alike the training prompts."""


def change_correlations(
    table: pd.DataFrame,
    change: str,
    measures: Sequence[str] = MEASURES,
    baseline: str = "cosine_to_mean",
    covariates: Sequence[str] = (),
    by: Sequence[str] = ("layer",),
    clusters: str | None = "category",
    within: str | None = "category",
    n_permutations: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    n_boot: int = 2000,
) -> stats.Result:
    """Does where a prompt lay, or how it shifted, foretell how much its score changed? Over the prompts of each setting alone.

    table       of `prompt_geometry`, with the column `change` (the score after tuning less the one before) joined by prompt.
    measures    columns, each correlated with the change; `baseline`, the one-line rival (cosine to the mean training prompt), too.
    covariates, by, clusters, within   as in `overlap_correlations`: length and category taken out for "partial", what makes a setting,
                groups that the bootstrap draws whole, groups inside which prompts are permuted. Prompts come in categories that differ
                in level on both sides: hence the defaults.

    Keys measure and `by`; metrics "pearson", "spearman", "overlap minus baseline" (measure less baseline), "partial"; q over all
    measures and settings shown, within each metric and null. Shift size and score change come from one tuning: "shift_norm" and
    "shift_cosine" describe, only what was there before tuning foretells. Several settings: `over_settings` with by=["measure", "layer"].
    Errors: as `overlap_correlations`.
    """
    parts: list[pd.DataFrame] = []
    told: dict[str, str] = {}
    for measure in dict.fromkeys([*measures, baseline]):
        rival = None if measure == baseline else baseline
        found = overlap_correlations(table, measure, change, rival, covariates, by, clusters, within, n_permutations, seed, level, n_boot)
        told |= found.attrs["null"]
        kept = found[found["metric"] != "pearson baseline"].assign(measure=measure)
        kept.attrs = {}
        parts.append(kept)
    shared = {key: found.attrs[key] for key in ("seed", "n_permutations", "interval", "covariates")}
    what = f"correlation over prompts of {', '.join(measures)} and the baseline {baseline} with {change}, in each setting alone"
    return stats.result(
        pd.concat(parts, ignore_index=True), ["measure", *by], what=what, family=["metric", "null"], null=told, baseline=baseline, **shared
    )


def correlation_rows(
    part: pd.DataFrame,
    overlap: str,
    similarity: str,
    baseline: str | None,
    clusters: np.ndarray | None,
    within: np.ndarray | None,
    n_permutations: int,
    seed: int,
    level: float,
    n_boot: int = 2000,
) -> list[dict[str, Any]]:
    """Result rows "pearson", "spearman" and "pearson baseline" of one setting's prompts, null "prompts permuted"."""
    pairs = {"pearson": (overlap, "pearson"), "spearman": (overlap, "spearman"), **({"pearson baseline": (baseline, "pearson")} if baseline else {})}
    rows, y = [], part[similarity].to_numpy()
    for metric, (column, method) in pairs.items():
        found = stats.correlation(part[column].to_numpy(), y, clusters, n_permutations, seed, method, within, level, n_boot)
        rows.append({"metric": metric, "estimate": found.pop("r"), "null": "prompts permuted", **found})
    return rows


def over_settings(
    correlations: stats.Result,
    metric: str = "pearson",
    by: Sequence[str] = (),
    variance: str = "fisher",
    level: float = 0.95,
) -> stats.Result:
    """What the correlations of several settings say together: the random-effects mean, per value of the columns `by` (layer, say).

    correlations   of `overlap_correlations`; metric: "pearson", "spearman", "pearson baseline" or "partial".
    variance       of each setting's arctanh(r): "fisher", 1 / (n - 3) as of independent prompts, or "interval", from the width of the
                   setting's own interval (`level` as there), which knows of categories.

    Columns beside a Result's: tau2, cochran_q, cochran_p, i2, predicted_low, predicted_high (`emlens.correlations.random_effects`); n
    counts settings. Settings that share a model or questions are not independent: then the interval is too narrow. Errors: ValueError
    for fewer than two settings, an unknown metric or variance.
    """
    chosen = correlations[(correlations["metric"] == metric) & correlations["estimate"].notna()]
    if metric == _CONTRAST or chosen.empty:
        raise ValueError(f"no correlations {metric!r} to summarise; there are {sorted(set(correlations['metric']) - {_CONTRAST})}")
    if variance not in ("fisher", "interval"):
        raise ValueError(f"unknown variance {variance!r}; choose 'fisher' or 'interval'")
    rows = []
    for key, part in chosen.groupby(list(by), sort=False) if by else [((), chosen)]:
        if variance == "fisher":
            spread = fisher_variance(part["n"].to_numpy(), part["n_covariates"].fillna(0).to_numpy() if metric == "partial" else 0)
        else:
            reach = (np.arctanh(part["high"]) - np.arctanh(part["low"])) / 2 / scipy_stats.norm.ppf((1 + level) / 2)
            spread = reach.to_numpy() ** 2
        found = random_effects(part["estimate"].to_numpy(), spread, level)
        row = {"metric": f"{metric} over settings", "estimate": found.pop("r"), "null": "mean correlation 0"}
        rows.append({**dict(zip(by, key, strict=True)), **row, **found})
    return stats.result(
        rows,
        list(by),
        what=f"random-effects mean over settings of: {correlations.attrs.get('what', 'correlations')}, {metric}",
        family=["metric", "null"],
        interval=f"{level:.0%}, Hartung and Knapp, of the mean setting; predicted_low and predicted_high are for a new setting's correlation",
        null={"mean correlation 0": null_draws.describe("mean correlation 0")},
        variance=variance,
    )


# ---- inside


def _against(train: Float[np.ndarray, "row d_model"], x: Float[np.ndarray, "prompt d_model"], k: int, variance: float | None) -> dict[str, Any]:
    """Rows against the PCA of others: k, centre, energy in the subspace, the residual outside it, Mahalanobis distance inside."""
    k = k if variance is None else n_components(train, variance)
    basis, spread = principal_components(train, k)
    centre = train.mean(axis=0, dtype=np.float64)
    moved = x.astype(np.float64) - centre
    inside = moved @ basis
    return {
        "k": k,
        "centre": centre,
        "energy": explained_energy(x, basis, centre),
        "residual": moved - inside @ basis.T,
        "mahalanobis": np.sqrt((inside**2 / spread).sum(axis=1)),
    }


def _share_explained(residual: Float[np.ndarray, " prompt"], norm: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " prompt"]:
    """1 - residual^2 / norm^2; 0 where there is nothing to explain."""
    return 1 - np.divide(residual**2, norm**2, out=np.ones(len(norm)), where=norm > 0)
