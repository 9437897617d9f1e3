"""Do activations before tuning foretell a score after it? One table: layers, baselines, nulls, in the same folds.

A model's state at a prompt is a function of the prompt, and half of what can be foretold of a score is often the topic.
So whole groups are held out, baselines stand in the same table, the target is permuted *within* groups ("nothing beyond
the group"), and layers are corrected as one family. Features are the raw rows at each layer, standardised, in a ridge
whose penalty is chosen in inner folds only; the same choice is made again for every permuted target.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut
from threadpoolctl import threadpool_limits

from . import stats
from .activations import Activations
from .baselines import DEFAULT, Baseline, Block, block, refuse_copies
from .ridge import PENALTIES, SAME, Fold, fixed, group_blocks, nested_ridge, per_group, r2, residuals, rmse, spearman, stacked_gain

LEAVE_OUT_UP_TO = 10  # groups; with more, GroupKFold
FEW_CLUSTERS = 20
_GAIN_NULL = (
    "given the group, activations know nothing of the text and of what the model {!r} leaves: activation rows permuted within "
    "groups, text and target held together"
)
_CAUTIONS = {
    "spearman": "with whole groups held out, guessing the mean of the others ranks groups backwards: chance lies below 0, see the null",
    "within_r2": "the level of a held-out group counts as error: far below 0 when groups differ; within_spearman asks for order only",
}

Codes = Int[np.ndarray, " prompt"]
Band = tuple[np.ndarray, np.ndarray]


def predict(
    acts: Activations,
    target: str,
    *,
    groups: str | None = None,
    baselines: Sequence[Baseline] = DEFAULT,
    metrics: Sequence[str] = ("r2",),
    nulls: Sequence[str] | None = None,
    n_permutations: int = 200,
    n_folds: int | None = None,
    penalties: Sequence[float] = PENALTIES,
    beyond: Baseline = "tfidf",
    level: float = 0.95,
    seed: int = 0,
) -> stats.Result:
    """Predict a fact of the prompts from their activations, layer by layer, out of fold.

    acts       activations [prompt, layer, d_model]; `target` and `groups` are columns of its facts.
    groups     whole groups are held out: leave-one-group-out up to 10 groups or GroupKFold(5) beyond (`n_folds` given:
               GroupKFold of that many); inner folds hold whole groups out too. None: shuffled 5-fold.
    baselines  rows with layer -1: see `emlens.baselines`; () for none.
    metrics    "r2" 1 - sum (y - yhat)^2 / sum (y - mean y)^2, pooled over all out-of-fold rows; "spearman", "rmse"
               pooled likewise; "within_r2", "within_spearman" inside each group (about the group's own mean; 0 where
               the prediction orders nothing), averaged over the groups whose target varies: within_r2 charges for a
               group's missed level, within_spearman does not; "delta_r2" r2 of text + activations minus r2 of text:
               the baseline `beyond`, and a ridge on what it leaves, stacked in the folds.
    nulls      "within_groups" (the default with groups), "group_blocks" (whole groups' targets change places among
               groups of equal size; enumerated when few), "all_rows" (the default, and the only one, without groups).
               delta_r2 has a null of its own, "activation_rows".

    Returns a Result with keys layer, features: one row per layer (and baseline) x metric x null. low, high: bootstrap
    over whole groups of the out-of-fold errors. null_low, null_high: the central `level` of the null draws. q: family-
    wise over the layers by the maximum statistic; a baseline is a family of its own. `.attrs` says all of it in words.

    Errors: KeyError for a column that is not there, TypeError for a target that is not numeric, ValueError for one that
    is constant or has NaN, fewer groups than folds, groups equal to rows, copies of a prompt in different groups (a
    warning without groups), a baseline that is the target.
    """
    y = _target(acts.facts, target)
    codes = _group_codes(acts.facts, groups)
    named = tuple(nulls) if nulls is not None else ("all_rows" if groups is None else "within_groups",)
    _check_request(metrics, named, codes, y, n_permutations)
    refuse_copies(acts, codes, groups)
    folds, outer, inner = make_folds(len(y), codes, n_folds, seed)
    task = _Task(y, codes, folds, tuple(penalties), level, seed)
    layers = [Block(acts.site, fixed(acts.layer(i)), "each", "") for i in acts.layers]
    rivals = [block(b, acts.facts, groups, target) for b in baselines]
    if len({b.name for b in rivals}) < len(rivals):
        raise ValueError(f"two baselines share a name: {[b.name for b in rivals]}; name your functions apart")

    rows: list[dict[str, Any]] = []
    told: dict[str, str] = {}
    plain = [m for m in metrics if m != "delta_r2"]
    with threadpool_limits(limits=1):  # many small matrices: threads inside BLAS cost up to 20 x on a busy machine
        if plain:
            orders = {name: NULLS[name].draw(codes, len(y), n_permutations, seed) for name in named}
            rows += _scored(task, layers, rivals, plain, orders)
            told |= {name: _told(NULLS[name].hypothesis, len(draws), groups) for name, draws in orders.items()}
        if "delta_r2" in metrics:
            text = block(beyond, acts.facts, groups, target)
            rows += _gained(task, layers, text, stats.permutations(len(y), n_permutations, seed, within=codes))
            told["activation_rows"] = _told(_GAIN_NULL.format(text.name), n_permutations, groups)
    keys = [(i, acts.site) for i in acts.layers] + [(-1, b.name) for b in rivals]
    table = pd.DataFrame(rows)
    table[["layer", "features"]] = [keys[at] for at in table.pop("at")]
    table["n_clusters"] = len(y) if codes is None else int(codes.max()) + 1
    notes = {b.name: b.note for b in rivals}
    if groups is not None and "category" in notes:
        notes["category"] += "; a held-out group was never seen in training, so it knows nothing, by design"
    n_clusters = len(y) if codes is None else int(codes.max()) + 1
    out = stats.result(
        table,
        ["layer", "features"],
        what=f"out-of-fold prediction of {target!r} by ridge from {acts.site} at {acts.position}",
        correction="max-statistic",
        seed=seed,
        interval=_interval_in_words(level, n_clusters, groups),
        null=told,
        n_clusters=n_clusters,
        folds=outer,
        inner_folds=f"{inner}; least mean squared error among the penalties {', '.join(f'{a:.3g}' for a in penalties)}",
        baselines=notes,
        cautions=[_CAUTIONS[m] for m in metrics if m in _CAUTIONS and groups is not None],
    )
    out.attrs["family"] = "the layers shown, for each metric and null; each baseline is a family of its own (q = p)"
    return out


class _Task(NamedTuple):
    """What every feature block is asked: the target, who belongs together, and how to cut, shrink and resample."""

    y: Float[np.ndarray, " prompt"]
    codes: Codes | None
    folds: list[Fold]
    penalties: tuple[float, ...]
    level: float
    seed: int


def _scored(task: _Task, layers: list[Block], rivals: list[Block], metrics: list[str], orders: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of all metrics but delta_r2: observed target and all permuted ones go through the ridge together."""
    y = task.y
    targets = y[np.concatenate([np.arange(len(y))[None], *orders.values()])].T

    def score(one: Block) -> tuple[Float[np.ndarray, " prompt"], list[Float[np.ndarray, " target"]]]:
        found = nested_ridge(one.features, targets, task.folds, task.penalties, one.scaling).predictions
        return found[:, 0], [METRICS[m].score(targets, found, task.codes) for m in metrics]

    scored = _each(score, [*layers, *rivals])
    predictions = np.stack([found for found, _ in scored], axis=1)
    rows = []
    for at, metric in enumerate(metrics):
        values = np.stack([scores[at] for _, scores in scored], axis=1)
        band = METRICS[metric].interval(y, predictions, task.codes, task.level, task.seed)
        tie = SAME * (y.std() if metric == "rmse" else 1.0)
        stop = 1
        for null, draws in orders.items():
            start, stop = stop, stop + len(draws)
            tested = values[[0, *range(start, stop)]]
            rows += _rows(metric, null, tested, band, len(layers), METRICS[metric].tail, task, tie)
    return rows


def _gained(task: _Task, layers: list[Block], text: Block, orders: np.ndarray) -> list[dict[str, Any]]:
    """Rows of delta_r2."""
    y, folds = task.y, task.folds
    if task.codes is not None and any(len(np.unique(task.codes[fold.train])) < 2 for fold in folds):
        raise ValueError("delta_r2 needs folds that train on two groups or more (its null must leave inner folds whole): use 3 groups")
    left = residuals(text.features, y, folds, task.penalties, text.scaling)
    orders = np.concatenate([np.arange(len(y))[None], orders])
    gains = _each(lambda one: stacked_gain(one.features, left, orders, y, folds, task.penalties), layers)
    fall = np.stack([of_prompt for _, of_prompt in gains], axis=1)
    band = _error_interval(lambda sums, n, sst: sums / sst, y, fall, task.codes, task.level, task.seed)
    values = np.stack([gain for gain, _ in gains], axis=1)
    return _rows("delta_r2", "activation_rows", values, band, len(layers), "greater", task, SAME)


def _rows(
    metric: str,
    null: str,
    values: Float[np.ndarray, "draws block"],
    band: tuple[np.ndarray, np.ndarray],
    n_layers: int,
    tail: str,
    task: _Task,
    tie: float,
) -> list[dict[str, Any]]:
    """One row per block: values[0] is observed, the rest its null; the first `n_layers` blocks are one family."""
    observed, draws = np.round(values[0] / tie) * tie, np.round(values[1:] / tie) * tie
    null_low, null_high = stats.null_band(values[1:], task.level)
    p = stats.permutation_p(observed, draws, tail)
    q = np.concatenate([stats.max_statistic_p(observed[:n_layers], draws[:, :n_layers], tail), p[n_layers:]])
    table = pd.DataFrame({"estimate": values[0], "low": band[0], "high": band[1], "null_low": null_low, "null_high": null_high, "p": p, "q": q})
    return table.assign(metric=metric, null=null, n=len(task.y), at=range(len(p))).to_dict("records")


def _each(run: Callable[[Block], Any], blocks: Sequence[Block]) -> list[Any]:
    """Blocks side by side, each with the one BLAS thread that `predict` allows."""
    with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1)) as pool:
        return list(pool.map(run, blocks))


# ---- folds


def make_folds(n: int, codes: Codes | None, n_folds: int | None, seed: int) -> tuple[list[Fold], str, str]:
    """Outer folds with their inner folds, and what both are in words. Groups, when there are any, are never cut; only
    where a fold trains on a single group are its inner folds plain."""
    outer, said = _splits(np.arange(n), codes, n_folds, seed)
    folds, inner_said = [], set()
    for train, test in outer:
        whole = codes is not None and len(np.unique(codes[train])) > 1
        inner, words = _splits(train, codes if whole else None, None, seed)
        inner_said.add(words)
        folds.append(Fold(train, test, tuple(inner)))
    return folds, said, " or ".join(sorted(inner_said))


def _splits(rows: Int[np.ndarray, " row"], codes: Codes | None, n_folds: int | None, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    mine = None if codes is None else codes[rows]
    units, name = (len(rows), "prompts") if mine is None else (len(np.unique(mine)), "groups")
    if n_folds is not None and not 2 <= n_folds <= units:
        raise ValueError(f"{n_folds} folds of {units} {name}: choose n_folds between 2 and {units}, or n_folds=None")
    if units < 2:
        raise ValueError(f"a fold trains on {units} {name}: too few to choose a penalty inside it; more rows are needed")
    if mine is None:
        count = n_folds or min(5, units)
        splitter, said = KFold(count, shuffle=True, random_state=seed), f"shuffled {count}-fold over prompts"
    elif n_folds is None and units <= LEAVE_OUT_UP_TO:
        splitter, said = LeaveOneGroupOut(), "leave one group out"
    else:
        splitter, said = GroupKFold(n_folds or 5), f"{n_folds or 5}-fold over whole groups"
    return [(rows[train], rows[test]) for train, test in splitter.split(rows, groups=mine)], said


# ---- nulls: row orders [draws, prompt] of the target


class Null(NamedTuple):
    """A way to draw row orders from (codes, n, n_draws, seed), and the hypothesis under which they are all alike."""

    draw: Callable[[Any, int, int, int], Int[np.ndarray, "draws prompt"]]
    hypothesis: str


NULLS = {
    "within_groups": Null(
        lambda codes, n, n_draws, seed: stats.permutations(n, n_draws, seed, within=codes),
        "nothing beyond the group: target permuted within groups",
    ),
    "group_blocks": Null(
        group_blocks,
        "nothing at all, whole groups exchangeable: groups' targets, each kept whole, permuted among groups of equal size",
    ),
    "all_rows": Null(
        lambda codes, n, n_draws, seed: stats.permutations(n, n_draws, seed),
        "nothing at all, prompts exchangeable: target permuted over all rows",
    ),
}


def _told(hypothesis: str, n_draws: int, groups: str | None) -> str:
    inside = "" if groups is None else f" (groups: {groups!r})"
    return f"{hypothesis}{inside}; {n_draws} draws, p >= {1 / (n_draws + 1):.2g}; tail: greater (rmse: less)"


# ---- metrics, each with its interval: errors out of fold resampled by whole groups, folds and fits as they are


def _error_interval(
    statistic: Callable[[np.ndarray, float, float], np.ndarray],
    y: Float[np.ndarray, " prompt"],
    errors: Float[np.ndarray, "prompt block"],
    codes: Codes | None,
    level: float,
    seed: int,
) -> Band:
    """Bootstrap over groups of statistic(summed errors [block], number of prompts, sum of squares about the mean)."""
    centred = (y - y.mean())[:, None]
    parts = np.hstack([np.ones_like(centred), centred, centred**2, errors])
    units = np.arange(len(y)) if codes is None else codes
    sums = np.zeros((int(units.max()) + 1, parts.shape[1]))
    np.add.at(sums, units, parts)

    def resampled(rows: np.ndarray) -> np.ndarray:
        n, first, second, *_ = total = rows.sum(axis=0)
        spread = second - first**2 / n
        return statistic(total[3:], n, spread if spread > 1e-12 * second else np.nan)

    return stats.bootstrap_interval(sums, resampled, level=level, seed=seed)


def _spearman_interval(y: np.ndarray, found: np.ndarray, codes: Codes | None, level: float, seed: int) -> Band:
    each = [stats.correlation(y, one, clusters=codes, n_permutations=1, seed=seed, method="spearman", level=level) for one in found.T]
    return np.array([one["low"] for one in each]), np.array([one["high"] for one in each])


class Metric(NamedTuple):
    """How out-of-fold predictions are scored (column by column), which tail is better than chance, and the interval."""

    score: Callable[[np.ndarray, np.ndarray, Codes | None], np.ndarray]
    tail: str
    interval: Callable[[np.ndarray, np.ndarray, Codes | None, float, int], Band]


def _within(measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Metric:
    """The measure inside each group, averaged over the groups whose target varies; groups resampled for the interval."""

    def interval(y: np.ndarray, found: np.ndarray, codes: Codes | None, level: float, seed: int) -> Band:
        of_group = per_group(measure, np.tile(y[:, None], found.shape[1]), found, codes)
        return stats.bootstrap_interval(of_group[~np.isnan(of_group[:, 0])], level=level, seed=seed)

    return Metric(lambda y, found, codes: np.nanmean(per_group(measure, y, found, codes), axis=0), "greater", interval)


def _of_errors(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], tail: str, statistic: Callable[[np.ndarray, float, float], np.ndarray]
) -> Metric:
    """A measure that depends on the squared errors by their sum, and can so be resampled group by group."""
    return Metric(
        lambda y, found, codes: measure(y, found),
        tail,
        lambda y, found, *how: _error_interval(statistic, y, (y[:, None] - found) ** 2, *how),
    )


METRICS = {
    "r2": _of_errors(r2, "greater", lambda errors, n, spread: 1 - errors / spread),
    "spearman": Metric(lambda y, found, codes: spearman(y, found), "greater", _spearman_interval),
    "rmse": _of_errors(rmse, "less", lambda errors, n, spread: np.sqrt(errors / n)),
    "within_r2": _within(r2),
    "within_spearman": _within(spearman),
}


# ---- what cannot be predicted, said at once


def _target(facts: pd.DataFrame, target: str) -> Float[np.ndarray, " prompt"]:
    if target not in facts.columns:
        raise KeyError(f"no column {target!r} among the facts {list(facts.columns)}: join scores with acts.with_facts(table)")
    column = facts[target]
    if not pd.api.types.is_numeric_dtype(column):
        raise TypeError(f"the target {target!r} is of type {column.dtype}; a number per prompt is needed")
    y = column.to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(y).all():
        raise ValueError(
            f"the target {target!r} is NaN or infinite for {int((~np.isfinite(y)).sum())} of {len(y)} prompts: drop them, "
            f"acts.where(np.isfinite(acts.facts[{target!r}]))"
        )
    if len(y) < 2 or np.ptp(y) <= 1e-12 * np.abs(y).max():
        raise ValueError(f"the target {target!r} is constant ({len(y)} prompts): there is nothing to predict")
    return y


def _group_codes(facts: pd.DataFrame, groups: str | None) -> Codes | None:
    if groups is None:
        return None
    if groups not in facts.columns:
        raise KeyError(f"no column {groups!r} among the facts {list(facts.columns)}: groups= names one of them, or None")
    codes, labels = pd.factorize(facts[groups])
    if (codes < 0).any():
        raise ValueError(f"{int((codes < 0).sum())} of {len(codes)} prompts have no {groups!r}: fill or drop them")
    if len(labels) < 2:
        raise ValueError(f"{groups!r} has {len(labels)} group: at least 2 are needed to hold one out; groups=None for plain folds")
    if len(labels) == len(codes):
        raise ValueError(
            f"every prompt is a group of its own in {groups!r} ({len(codes)} groups): nothing is held together and nothing "
            "can be permuted inside a group. Name a column that gathers prompts (category), or groups=None for plain folds"
        )
    return codes.astype(np.int64)


def _check_request(metrics: Sequence[str], nulls: Sequence[str], codes: Codes | None, y: np.ndarray, n_permutations: int) -> None:
    known = [*METRICS, "delta_r2"]
    if not metrics or isinstance(metrics, str) or any(m not in known for m in metrics):
        raise ValueError(f"metrics are {metrics!r}; needed is a tuple of names among {known}")
    if not nulls or isinstance(nulls, str) or any(name not in NULLS for name in nulls):
        raise ValueError(f"nulls are {nulls!r}; needed is a tuple of names among {list(NULLS)}")
    if n_permutations < 1:
        raise ValueError(f"n_permutations is {n_permutations}: no estimate is given without its null; at least 1, 200 is usual")
    if codes is None:
        needy = [name for name in (*metrics, *nulls) if name.startswith(("within", "delta", "group"))]
        if needy:
            raise ValueError(f"{needy} need groups: name the column, groups='category'")
    elif "within_groups" in nulls and not any(np.ptp(y[codes == g]) > 0 for g in range(int(codes.max()) + 1)):
        raise ValueError("the target is constant inside every group, so permuting it there changes nothing: use nulls=('group_blocks',)")


def _interval_in_words(level: float, n_clusters: int, groups: str | None) -> str:
    units = "prompts" if groups is None else f"whole groups of {groups!r}"
    few = f"; fewer than {FEW_CLUSTERS} clusters: it under-covers" if n_clusters < FEW_CLUSTERS else ""
    return f"{level:.0%} bootstrap over {n_clusters} {units} of the out-of-fold errors, folds and fits as they are{few}"
