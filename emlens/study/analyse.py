"""The cheap half of a study: from margins and activations to tables, every number with its null, its baseline and its interval."""

from collections.abc import Mapping, Sequence

import pandas as pd
from scipy import stats as scipy_stats

from .. import stats
from ..activations import Activations
from ..directions import Direction, project
from ..dynamics import HELD_OUT
from ..geometry import overlap, split_half_overlap
from ..prediction import predict
from ..separation import held_out_separation
from ..shifts import overlap_similarity, shift_agreement, shift_norms, similarity, split_half_similarity
from ..steering import random_means, slopes, summarise
from ..tuning import Run
from .grid import PAIR_KINDS, Cell, pair_kind, twins

BEFORE = "before"
Shifts = Mapping[str, Activations]


# ---- behaviour: losses and margins


def runs_table(grid: Sequence[Cell], runs: Mapping[str, Run], margins: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per tuning: did it train, and where did the margin go (mean over questions; bootstrap interval over categories)."""
    rows = []
    for cell in grid:
        run = runs[cell.label]
        first, last = run.checkpoints.iloc[0], run.checkpoints.iloc[-1]
        before, after = _of(margins, BEFORE), _of(margins, cell.label)
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

    Also every run against the weights before. Corrected (BH) within each comparison.
    """
    pairs = [(bad, "bad minus sound", sound.label, bad.label) for bad, sound in twins(list(grid))]
    pairs += [(cell, f"{cell.content} minus before", BEFORE, cell.label) for cell in grid]
    rows = []
    for cell, comparison, first, second in pairs:
        x, y = _of(margins, first), _of(margins, second)
        if x["id"].tolist() != y["id"].tolist():
            raise ValueError(f"{first} and {second} were scored on different questions")
        found = stats.paired(x["margin"].to_numpy(), y["margin"].to_numpy(), clusters=x["category"].to_numpy(), seed=seed)
        keys = {"domain": cell.domain, "schedule": cell.schedule, "seed": cell.seed, "comparison": comparison}
        shared = {"n": found["n"], "n_clusters": found["n_clusters"]}
        main = {k: found[k] for k in ("low", "high", "null_low", "null_high", "p")}
        rows.append({**keys, "metric": "difference", "estimate": found["difference"], **main, "null": "sign flips", **shared})
        rows += [{**keys, "metric": m, "estimate": found[m], **shared} for m in ("cohen_dz", "rank_biserial")]
    hypothesis = "changes are symmetric about 0: signs flipped for whole categories together, all flips enumerated where few; two-sided"
    return stats.result(
        rows, ["domain", "schedule", "seed", "comparison"], what="change of the margin, nats/token, paired over questions", correction="bh",
        family=["comparison", "metric"], seed=seed, null={"sign flips": hypothesis}, interval="95%, bootstrap over whole categories",
    )  # fmt: skip


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

    n is half of the smaller set; the estimate takes every second prompt of each.
    """
    parts = []
    for domain, training in before_training.items():
        n = min(before.n_prompts, training.n_prompts) // 2
        main = overlap(_every_second(training, n), _every_second(before, n), k, n_draws=n_draws, seed=seed)
        parts.append(main.assign(comparison="training v questions", domain=domain))
        for name, acts in (("questions v questions", before), ("training v training", training)):
            halves = split_half_overlap(acts, k, seed=seed, n=n, n_draws=n_draws)
            parts.append(halves.assign(comparison=name, domain=domain))
    return _stack(
        parts, ["domain", "layer", "comparison"], ["comparison"], like=main, what=f"overlap (mean cos²) of the first {k} principal components"
    )


def similarity_table(questions: Shifts, training: Shifts, n_draws: int, seed: int) -> pd.DataFrame:
    parts = []
    for run, shift in questions.items():
        main = similarity(training[run], shift, n_draws=n_draws, seed=seed, clusters="category")
        parts.append(main.assign(run=run, comparison="training v questions"))
        for name, acts in (("questions v questions", shift), ("training v training", training[run])):
            parts.append(split_half_similarity(acts, n_draws=n_draws, seed=seed).assign(run=run, comparison=name))
    return _stack(parts, ["run", "layer", "comparison"], ["comparison"], like=main, what="mean cosine of shifts with the mean training shift")


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
    what = "correlation over questions of overlap with shift similarity, within a run; prompts permuted inside their category"
    return _stack(parts, ["run", "layer"], ["metric"], like=found, what=what)


def agreement_tables(questions: Shifts, grid: Sequence[Cell], seed: int) -> dict[str, pd.DataFrame]:
    """Do two tunings shift a question the same way? Every pair of runs, and the pairs that differ in one thing only, by what that is.

    Two seeds of one tuning give the noise floor of a shift. Descriptions; intervals over whole categories of questions, given the runs.
    """
    kinds: dict[str, list[tuple[Activations, Activations]]] = {kind: [] for kind in PAIR_KINDS.values()}
    pairs, by_kind = [], []
    for i, a in enumerate(grid):
        for b in grid[i + 1 :]:
            kind, shifts = pair_kind(a, b), (questions[a.label], questions[b.label])
            if kind:
                kinds.setdefault(kind, []).append(shifts)
            found = shift_agreement([shifts], clusters="category", seed=seed)
            pairs.append(found.assign(run_a=a.label, run_b=b.label, kind=kind or "several things differ"))
    for kind, together in kinds.items():
        if together:
            by_kind.append(shift_agreement(together, clusters="category", seed=seed).assign(kind=kind))
    ends = ["layer", "metric", "estimate", "low", "high", "n"]
    columns = {"shift_agreement": (by_kind, ["kind", *ends, "pairs"]), "shift_pairs": (pairs, ["run_a", "run_b", "kind", *ends])}
    return {name: pd.concat(parts, ignore_index=True)[keep] if parts else pd.DataFrame(columns=keep) for name, (parts, keep) in columns.items()}


# ---- prediction and directions


def prediction_table(
    before: Activations, margins: pd.DataFrame, pairs: Sequence[tuple[Cell, Cell]], baselines: Sequence[str], n_permutations: int, seed: int
) -> pd.DataFrame:
    """The margin after a bad tuning, and its change, from activations before it; whole categories held out; rivals in the same folds."""
    parts = []
    known = _of(margins, BEFORE).set_index("id")["margin"].rename("margin before")
    for bad, _ in pairs:
        after = _of(margins, bad.label).set_index("id")["margin"].rename("margin after")
        facts = pd.concat([known, after, (after - known).rename("change of margin")], axis=1).reset_index()
        acts = before.with_facts(facts)
        for target in ("margin after", "change of margin"):
            found = predict(
                acts, target, groups="category", baselines=tuple(baselines), metrics=("r2", "within_spearman", "delta_r2"), beyond="margin before",
                n_permutations=n_permutations, seed=seed,
            )  # fmt: skip
            found["features"] = found["features"].where(found["layer"] < 0, "activations")
            parts.append(found.assign(run=bad.label, target=target))
    what = "out-of-fold prediction from activations before tuning (ridge, whole categories held out)"
    return _stack(parts, ["run", "target", "features", "layer"], None, like=found, what=what)


def direction_table(after: Mapping[str, Activations], pairs: Sequence[tuple[Cell, Cell]], n_permutations: int, seed: int) -> pd.DataFrame:
    parts = []
    for bad, sound in pairs:
        found = held_out_separation(after[bad.label], after[sound.label], n_permutations=n_permutations, seed=seed)
        parts.append(found.assign(domain=bad.domain))
    return _stack(parts, ["domain", "layer"], None, like=found, what="held-out separation of bad and sound tuning by the mean-difference direction")


def projections_table(
    before: Activations,
    after: Mapping[str, Activations],
    pairs: Sequence[tuple[Cell, Cell]],
    directions: Mapping[str, Direction],
    layers: Sequence[int],
) -> pd.DataFrame:
    """Projection of the held-out questions onto each domain's direction, before and after: a description."""
    parts = []
    for bad, sound in pairs:
        for variant, acts in ((BEFORE, before), (bad.label, after[bad.label]), (sound.label, after[sound.label])):
            long = project(acts.select(layers=layers), directions[bad.domain]).rename_axis(index="id", columns="layer").stack().rename("projection")
            table = long.reset_index().merge(acts.facts[["id", "category"]], on="id")
            parts.append(table.assign(domain=bad.domain, variant=variant))
    return pd.concat(parts, ignore_index=True)[["domain", "variant", "layer", "id", "category", "projection"]]


def dose_tables(steered: Mapping[str, pd.DataFrame], seed: int) -> dict[str, pd.DataFrame]:
    """Dose by dose, one slope a domain and layer (the pre-stated test), and the random directions one by one."""
    doses = {domain: summarise(table, seed=seed) for domain, table in steered.items()}
    tests = {domain: slopes(table, seed=seed) for domain, table in steered.items()}
    first = next(iter(steered))
    return {
        "dose": _stack([t.assign(domain=d) for d, t in doses.items()], ["domain", "layer", "strength"], ["metric"], like=doses[first]),
        "dose_slope": _stack([t.assign(domain=d) for d, t in tests.items()], ["domain", "layer"], ["metric"], like=tests[first]),
        "dose_random": random_means(steered[first]),
    }


def _every_second(acts: Activations, n: int) -> Activations:
    return acts.select(ids=acts.ids.iloc[::2].head(n))


def _of(margins: pd.DataFrame, variant: str) -> pd.DataFrame:
    return margins[margins["variant"] == variant].reset_index(drop=True)


def _stack(parts: Sequence[pd.DataFrame], keys: list[str], family: list[str] | None, *, like: pd.DataFrame, what: str | None = None) -> pd.DataFrame:
    """Results of several settings as one; corrected anew within ``family`` over all of them, or (None) as each was corrected by itself."""
    plain = [p.copy() for p in parts]
    for p in plain:
        p.attrs = {}
    kept = {k: v for k, v in like.attrs.items() if k not in ("what", "correction", "family")}
    correction = "bh" if family else str(like.attrs["correction"])
    out = stats.result(pd.concat(plain, ignore_index=True), keys, what=what or like.attrs["what"], correction=correction, family=family, **kept)
    if family is None:
        out.attrs["family"] = f"each setting by itself: {like.attrs['family']}"
    return out
