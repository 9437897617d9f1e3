"""The cheap half of a study: from margins and activations to tables, every number with its null, its baseline and its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from .. import stats
from ..activations import Activations
from ..directions import mean_difference
from ..dynamics import HELD_OUT
from ..geometry import overlap, split_half_overlap
from ..separation import held_out_separation, transferred_separation
from ..shifts import overlap_similarity, shift_agreement, shift_norms, similarity, similarity_contrast, split_half_similarity
from ..tuning import Run
from .grid import PAIR_KINDS, Cell, pair_kind, same_content, twins

BEFORE = "before"
COVARIANCE_DRAWS = 200
"""Of the null "covariance", which refits a PCA a draw."""
Shifts = Mapping[str, Activations]


# ---- behaviour: losses and margins


def runs_table(grid: Sequence[Cell], runs: Mapping[str, Run], margins: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per tuning: did it train, and where did the margin go (mean over questions; bootstrap interval over categories)."""
    rows = []
    for cell in grid:
        run = runs[cell.label]
        first, last = run.checkpoints.iloc[0], run.checkpoints.iloc[-1]
        before, after = of_variant(margins, BEFORE), of_variant(margins, cell.label)
        low, high = stats.bootstrap_interval(after["margin"].to_numpy(), clusters=after["category"].to_numpy(), seed=seed)
        drop, reach = last["heldout_drop"], drop_reach(last["heldout_drop_se"], run.config["n_heldout"])
        rows.append(
            {
                **cell.facts,
                "steps": len(run.losses),
                "learning_rate": run.config["learning_rate"],
                "batch": run.config["batch_size"] * run.config["gradient_accumulation"],
                "n_train": run.config["n_train"],
                "n_heldout": run.config["n_heldout"],
                "train_loss_first": run.losses["loss"].iloc[0],
                "train_loss_last10": run.losses["loss"].tail(10).mean(),
                "heldout_before": first["heldout_loss"],
                "heldout_after": last["heldout_loss"],
                "heldout_se": last["heldout_se"],
                "heldout_drop": drop,
                "heldout_drop_se": last["heldout_drop_se"],
                "heldout_drop_low": drop - reach,
                "heldout_drop_high": drop + reach,
                "margin_before": before["margin"].mean(),
                "margin_after": after["margin"].mean(),
                "margin_low": low,
                "margin_high": high,
                "share_below_zero_before": (before["margin"] < 0).mean(),
                "share_below_zero_after": (after["margin"] < 0).mean(),
                "logit_change": run.logit_change,
                "tokens": run.config["tokens_seen"],
                "seconds": run.seconds,
            }
        )
    return pd.DataFrame(rows)


def drop_reach(se: float, n: int, level: float = 0.95) -> float:
    """Half the width of Student's t interval around a mean of n paired drops with this standard error; NaN for fewer than two."""
    return float(scipy_stats.t.ppf((1 + level) / 2, n - 1)) * se if n > 1 else float("nan")


def training_table(grid: Sequence[Cell], runs: Mapping[str, Run]) -> pd.DataFrame:
    return pd.concat([runs[c.label].losses.assign(**c.facts) for c in grid], ignore_index=True)


def checkpoints_table(points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Held-out loss and mean margin (subset of the questions) at every kept step of every run."""
    keys = ["run", "domain", "content", "schedule", "seed", "step"]
    rows = []
    for key, part in points.groupby(keys, sort=False):
        low, high = stats.bootstrap_interval(part["margin"].to_numpy(), clusters=part["category"].to_numpy(), seed=seed)
        ends = {"margin": part["margin"].mean(), "margin_low": low, "margin_high": high, "n": len(part)}
        rows.append({**dict(zip(keys, key, strict=True)), **part[HELD_OUT].iloc[0].to_dict(), **ends})
    return pd.DataFrame(rows)


def margin_summary(margins: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of the margin over questions, per variant: a description."""
    grouped = margins.groupby("variant", sort=False)["margin"]
    out = grouped.agg(mean="mean", sd="std", median="median", q10=lambda x: x.quantile(0.1), q90=lambda x: x.quantile(0.9), n="count")
    return out.assign(share_below_zero=grouped.apply(lambda x: (x < 0).mean())).reset_index()


def margin_change(grid: Sequence[Cell], margins: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The pre-stated test of a study: the bad set against its sound twin, paired over questions, whole categories flipped.

    Also every run against the weights before, and as controls every pair of runs on the same rows that differ in their seed
    or schedule alone: what one more run of the same content does. Column ``role``: "main" (one run a domain and content),
    "rerun", "control". Corrected (Holm) within each comparison and role: what one verdict reads.
    """
    main = _first_of_each(grid)
    pairs = [(bad, "bad minus sound", sound.label, bad.label) for bad, sound in twins(list(grid))]
    pairs += [(cell, f"{cell.content} minus before", BEFORE, cell.label) for cell in grid]
    roles = ["main" if cell.label in main else "rerun" for cell, *_ in pairs]
    for one, two, kind in same_content(list(grid)):
        pairs.append((two, f"{kind}: {two.variation} minus {one.variation}, {two.content}", one.label, two.label))
        roles.append("control")
    rows = []
    for (cell, comparison, first, second), role in zip(pairs, roles, strict=True):
        x, y = of_variant(margins, first), of_variant(margins, second)
        if x["id"].tolist() != y["id"].tolist():
            raise ValueError(f"{first} and {second} were scored on different questions")
        found = stats.paired(x["margin"].to_numpy(), y["margin"].to_numpy(), clusters=x["category"].to_numpy(), seed=seed)
        keys = {"domain": cell.domain, "schedule": cell.schedule, "seed": cell.seed, "comparison": comparison}
        shared = {"n": found["n"], "n_clusters": found["n_clusters"], "role": role, "family": role if role == "control" else comparison}
        tests = {k: found[k] for k in ("low", "high", "null_low", "null_high", "p", "p_floor")} | {"null": "sign flips"}
        rows.append({**keys, "metric": "difference", "estimate": found["difference"], **tests, **shared})
        rows += [{**keys, "metric": m, "estimate": found[m], **shared} for m in ("cohen_dz", "rank_biserial")]
    hypothesis = "changes are symmetric about 0: signs flipped for whole categories together, all flips enumerated where few; two-sided"
    out = stats.result(
        rows, ["domain", "schedule", "seed", "comparison"], what="change of the margin, nats/token, paired over questions, given these runs",
        correction="holm", family=["family", "role", "metric"], seed=seed, null={"sign flips": hypothesis},
        interval="95%, bootstrap over whole categories, given these runs",
    )  # fmt: skip
    out.attrs["family"] = "the domains of one comparison; runs with another seed or schedule, and the controls, are families of their own"
    return out


def _first_of_each(grid: Sequence[Cell]) -> set[str]:
    """The label of one run per domain and content: linear before other schedules, the lowest seed first (as the page chooses)."""
    order = sorted(grid, key=lambda cell: (cell.schedule != "linear", cell.seed))
    return set({(cell.domain, cell.content): cell.label for cell in reversed(order)}.values())


# ---- inside: geometry of the shifts


def norms_table(
    questions: Shifts, training: Shifts, before: Activations, before_training: Mapping[str, Activations], grid: Sequence[Cell]
) -> pd.DataFrame:
    parts = []
    for cell in grid:
        parts.append(shift_norms(questions[cell.label], before).assign(run=cell.label, set="questions"))
        parts.append(shift_norms(training[cell.label], before_training[cell.domain]).assign(run=cell.label, set="training"))
    return pd.concat(parts, ignore_index=True)[["run", "set", "layer", "norm", "relative"]]


def overlap_table(before: Activations, before_training: Mapping[str, Activations], k: int, n_draws: int, seed: int) -> pd.DataFrame:
    """Training against questions, and each against itself in random halves (control and ceiling), all at one n: overlap depends on n strongly.

    n is half of the smaller set; the estimate takes every second prompt of each, its interval halves of whole categories of the questions (and of
    the training prompts that have any). Where there are several domains the null "covariance" asks
    whether questions have more in common with a domain's training prompts than the training prompts of the others do.
    """
    parts = []
    for domain, training in before_training.items():
        n = min(before.n_prompts, training.n_prompts) // 2
        sides = _every_second(training, n), _every_second(before, n)
        clusters = _category(sides[0]), _category(sides[1])
        main = overlap(*sides, k, n_draws=n_draws, seed=seed, clusters=clusters)
        told = main.attrs["null"]
        parts.append(main.assign(comparison="training v questions", domain=domain))
        others = [acts for name, acts in before_training.items() if name != domain]
        if others:
            values = np.concatenate([acts.values for acts in others])
            reference = Activations.from_array(values, layers=before.layers, site=before.site, position=before.position)
            beside = overlap(*sides, k, ["covariance"], min(n_draws, COVARIANCE_DRAWS), seed=seed, reference=reference, clusters=clusters)
            told = {**told, "covariance": f"{beside.attrs['null']['covariance']}; reference: the training prompts of the other domains"}
            parts.append(beside.assign(comparison="training v questions", domain=domain))
        for name, acts in (("questions v questions", before), ("training v training", training)):
            halves = split_half_overlap(acts, k, seed=seed, n=n, n_draws=n_draws)
            parts.append(halves.assign(comparison=name, domain=domain))
    what = f"overlap (mean cos²) of the first {k} principal components"
    out = stacked(parts, ["domain", "layer", "comparison"], ["comparison", "null"], like=main, what=what)
    out.attrs["null"] = told
    return out.assign(p_floor=1 / (np.where(out["null"] == "covariance", min(n_draws, COVARIANCE_DRAWS), n_draws) + 1))


def similarity_table(questions: Shifts, training: Shifts, n_draws: int, seed: int) -> pd.DataFrame:
    parts = []
    for run, shift in questions.items():
        main = similarity(training[run], shift, n_draws=n_draws, seed=seed, clusters="category")
        parts.append(main.assign(run=run, comparison="training v questions"))
        for name, acts in (("questions v questions", shift), ("training v training", training[run])):
            parts.append(split_half_similarity(acts, n_draws=n_draws, seed=seed).assign(run=run, comparison=name))
    what = "mean cosine of shifts with the mean training shift"
    return stacked(parts, ["run", "layer", "comparison"], ["comparison"], like=main, what=what).assign(p_floor=2 / (n_draws + 1))


def similarity_contrast_table(questions: Shifts, training: Shifts, grid: Sequence[Cell], seed: int) -> pd.DataFrame:
    """Of every two runs that differ in one thing only: how much more a question shifts as its own run's training prompts do."""
    parts = []
    for cell in grid:
        for other in grid:
            kind = pair_kind(cell, other) if cell is not other else ""
            if kind:
                own, one = training[cell.label], training[other.label]
                found = similarity_contrast(own, one, questions[cell.label], clusters="category", seed=seed)
                parts.append(found.assign(run=cell.label, other=other.label, kind=kind))
    if not parts:
        return pd.DataFrame(columns=["run", "other", "kind", "layer", "metric", "estimate", "low", "high", "n", "n_clusters"])
    what = "mean cosine of shifts with the mean training shift of their own and of another tuning"
    return stacked(parts, ["run", "other", "kind", "layer"], ["metric"], like=found, what=what)


def overlap_similarity_table(
    before: Activations,
    before_training: Mapping[str, Activations],
    questions: Shifts,
    training: Shifts,
    grid: Sequence[Cell],
    k: int,
    n: int,
    seed: int,
) -> pd.DataFrame:
    parts = []
    for cell in grid:
        found = overlap_similarity(
            before_training[cell.domain], before, training[cell.label], questions[cell.label], k, clusters="category", within="category",
            n_permutations=n, seed=seed,
        )  # fmt: skip
        parts.append(found.assign(run=cell.label))
    what = "correlation over all questions of overlap with shift similarity, within a run; its p permutes prompts inside their category"
    return stacked(parts, ["run", "layer"], ["metric"], like=found, what=what).assign(p_floor=2 / (n + 1))


def agreement_tables(questions: Shifts, grid: Sequence[Cell], seed: int) -> dict[str, pd.DataFrame]:
    """Do two tunings shift a question the same way? Every pair of runs, and the pairs that differ in one thing only, by what that is
    and in which domain.

    Two seeds of one tuning give the noise floor of a shift. Descriptions; intervals over whole categories of questions, given the runs.
    """
    kinds: dict[tuple[str, str], list[tuple[Activations, Activations]]] = {}
    pairs, by_kind = [], []
    for i, a in enumerate(grid):
        for b in grid[i + 1 :]:
            kind, shifts = pair_kind(a, b), (questions[a.label], questions[b.label])
            if kind:
                kinds.setdefault((kind, " and ".join(dict.fromkeys([a.domain, b.domain]))), []).append(shifts)
            found = shift_agreement([shifts], clusters="category", seed=seed)
            pairs.append(found.assign(run_a=a.label, run_b=b.label, kind=kind or "several things differ"))
    order = list(PAIR_KINDS.values())
    for kind, domain in sorted(kinds, key=lambda named: order.index(named[0]) if named[0] in order else len(order)):
        by_kind.append(shift_agreement(kinds[kind, domain], clusters="category", seed=seed).assign(kind=kind, domain=domain))
    ends = ["layer", "metric", "estimate", "low", "high", "n", "n_clusters"]
    columns = {"shift_agreement": (by_kind, ["kind", "domain", *ends, "pairs"]), "shift_pairs": (pairs, ["run_a", "run_b", "kind", *ends])}
    return {name: pd.concat(parts, ignore_index=True)[keep] if parts else pd.DataFrame(columns=keep) for name, (parts, keep) in columns.items()}


# ---- directions


def direction_table(
    after: Mapping[str, Activations], grid: Sequence[Cell], pairs: Sequence[tuple[Cell, Cell]], n_permutations: int, seed: int
) -> pd.DataFrame:
    """Held-out separation by mean-difference directions, halves of whole categories. ``comparison`` says of what:

    "bad v sound" in each domain; "across": the direction of one domain on the two runs of the other, and the cosine of both
    directions; "another seed", "another schedule": controls, two runs on the same rows; "across, control": the direction of one domain on
    two runs on the same rows of another (chance may fall on either side of 0.5). Each of these is corrected by itself.
    """
    shared: dict[str, Any] = {"groups": "category", "n_permutations": n_permutations, "seed": seed}
    parts, kinds = [], []
    for bad, sound in pairs:
        found = held_out_separation(after[bad.label], after[sound.label], **shared)
        parts.append(found.assign(domain=bad.domain, comparison="bad v sound"))
        kinds.append("main")
    cosines = []
    for bad, sound in pairs:
        for other, other_sound in pairs:
            if other is not bad:
                across = _across(after, (bad, sound, other, other_sound), shared)
                named = {"domain": f"{bad.domain} → {other.domain}", "comparison": "across"}
                parts.append(across.assign(**named))
                kinds.append("across")
                one, two = (mean_difference(after[a.label], after[b.label]) for a, b in ((bad, sound), (other, other_sound)))
                alike = (one.vectors.astype(float) * two.vectors).sum(axis=1)
                cosines.append(
                    pd.DataFrame({**named, "layer": one.layers, "metric": "cosine of directions", "estimate": alike, "n": len(after[bad.label])})
                )
    for first, second, kind in same_content(list(grid)):
        control = held_out_separation(after[second.label], after[first.label], **shared)
        runs = f"{second.label} v {first.label}"
        parts.append(control.assign(domain=runs, comparison=kind))
        kinds.append("control")
        for bad, sound in pairs:
            if bad.domain != first.domain:
                across = _across(after, (bad, sound, second, first), shared)
                parts.append(across.assign(domain=f"{bad.domain} → {runs}", comparison="across, control"))
                kinds.append("across, control")
    for part in parts:
        ways = 1 if part["comparison"].iloc[0].startswith("across") else 2  # refitted on swapped labels, all swapped score as none
        part["p_floor"] = max(1 / (n_permutations + 1), ways / 2 ** int(part["n_clusters"].max()))
    what = "held-out separation of two tunings by a mean-difference direction, given these runs"
    settings = [kinds.count(kind) for kind in kinds]
    settings += [1] * len(cosines)
    out = stacked([*parts, *cosines], ["domain", "comparison", "layer"], None, like=found, what=what, settings=settings)
    out.attrs["null"] = {name: f"{told}; across: the direction stays as it is" for name, told in out.attrs["null"].items()}
    return out


def _across(after: Mapping[str, Activations], four: tuple[Cell, Cell, Cell, Cell], settings: Mapping[str, Any]) -> pd.DataFrame:
    fit_a, fit_b, a, b = (after[cell.label] for cell in four)
    return transferred_separation(fit_a, fit_b, a, b, **settings)


def _category(acts: Activations) -> str | None:
    """The column of categories, where the prompts have several."""
    return "category" if "category" in acts.facts.columns and acts.facts["category"].nunique(dropna=False) > 1 else None


def _every_second(acts: Activations, n: int) -> Activations:
    return acts.select(ids=acts.ids.iloc[::2].head(n))


def of_variant(margins: pd.DataFrame, variant: str) -> pd.DataFrame:
    return margins[margins["variant"] == variant].reset_index(drop=True)


def stacked(
    parts: Sequence[pd.DataFrame],
    keys: list[str],
    family: list[str] | None,
    *,
    like: pd.DataFrame,
    what: str | None = None,
    settings: Sequence[int] = (),
) -> pd.DataFrame:
    """Results of several settings as one; corrected anew within ``family`` over all of them, or (None) as each was corrected by itself and
    then for the number of ``settings`` that one verdict reads (Bonferroni)."""
    plain = [p.copy() for p in parts]
    for p in plain:
        p.attrs = {}
    if family is None:
        for p, n in zip(plain, settings, strict=True):
            if "q" in p:
                p["q"] = (p["q"] * n).clip(upper=1.0)
    kept = {k: v for k, v in like.attrs.items() if k not in ("what", "correction", "family")}
    correction = "bh" if family else str(like.attrs["correction"])
    out = stats.result(pd.concat(plain, ignore_index=True), keys, what=what or like.attrs["what"], correction=correction, family=family, **kept)
    if family is None:
        out.attrs["family"] = "the layers of one setting and metric, times the number of settings that one verdict reads"
    else:
        out.attrs["family"] = f"all rows with the same {' and '.join(family)}"
    return out
