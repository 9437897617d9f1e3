"""Do activations before tuning foretell a score after it? One table: layers, baselines, nulls, in the same folds.

A model's state at a prompt is a function of the prompt, and half of what can be foretold of a score is often the topic.
So whole groups are held out, baselines stand in the same table, the target is permuted *within* groups ("nothing beyond
the group"), and all rows of activations are corrected as one family. Features are standardised by the training rows, the
model's settings are chosen in inner folds only, and the same choice is made again for every permuted target.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from . import gains, learners, refusals, shuffles, stats
from .activations import Activations
from .baselines import DEFAULT, TEXT, Baseline, Block, block, refuse_copies, rivals
from .features import FeatureSet, feature_set
from .folds import Folds, make_folds
from .learners import Learner
from .ridge import PENALTIES, SAME
from .scores import METRICS, OF_FOLDS, Asked, Band, error_interval, gain_in_groups, in_groups, noise_variance, numbers, reliability
from .threads import side_by_side

FEW_CLUSTERS = 40
COVERED = "R2: .79 to .93 with 8 groups, .90 with 20, most where groups differ little, and misses lie above it"
"""What a 95 % interval over so many groups covered, in simulation."""
BEST_TEXT = "best_text"
_MEMORY = 2**31  # bytes that blocks worked on side by side may take
_CAUTIONS = {
    "spearman": "with whole groups held out, guessing the mean of the others ranks groups backwards: chance lies below 0, see the null",
    "within_r2": "the level of a held-out group counts as error: far below 0 when groups differ; within_spearman asks for order only",
    "within_groups": "prompts inside a group are taken as exchangeable: where some are near-copies of one another (sub-topics of 2 to 4 prompts "
    "with a third to half of the variance) up to .10 of tests pass at .05; so of delta_r2",
    "delta_r2": "beyond these representations of the text: what a text model misses (many features, few prompts) activations may still know",
}


def predict(
    acts: Activations,
    target: str,
    *,
    groups: str | None = None,
    features: str | FeatureSet | Sequence[str | FeatureSet] = "raw",
    model: str | Learner = "ridge",
    baselines: Baseline | Sequence[Baseline] | Mapping[str, Baseline] = DEFAULT,
    metrics: str | Sequence[str] = ("r2",),
    nulls: str | Sequence[str] | None = None,
    n_permutations: int = 1000,
    n_folds: int | None = None,
    repeats: int = 1,
    penalties: Sequence[float] | None = None,
    beyond: Baseline | Sequence[Baseline] = BEST_TEXT,
    noise: str | None = None,
    trials: str | None = None,
    copies: str = "refuse",
    level: float = 0.95,
    seed: int = 0,
) -> stats.Result:
    """Predict a fact of the prompts from their activations, layer by layer, out of fold.

    acts       activations [prompt, layer, d_model]; `target` and `groups` are columns of its facts.
    groups     whole groups are held out: leave-one-group-out up to 10 groups or GroupKFold(5) beyond (`n_folds` given:
               GroupKFold of that many); inner folds hold whole groups out too. None: shuffled 5-fold. `repeats`: rounds of
               folds, each shuffled anew (see `emlens.folds`); scores are averaged over them.
    features   what of the activations is seen: "raw", "squared_projections", "joined", a FeatureSet, or several of them
               (`emlens.features`); rows of several layers joined have layer -2.
    model      "ridge", "lasso", "ols", "pls", "logistic" (a rate between 0 and 1), or a Learner (`emlens.learners`);
               `penalties` of the named ones, chosen in inner folds. Ridge takes all permutations at once; logistic fits them one by
               one (96 prompts, 8 groups, 19 permutations: 20 s a layer). Baselines of layer -1 are ridges whatever the model.
    baselines  rows with layer -1, or at each layer for random features and other models' Activations: see
               `emlens.baselines`; a mapping names them; () for none.
    metrics    "r2" 1 - sum (y - yhat)^2 / sum (y - mean y)^2, pooled over all out-of-fold rows; "spearman", "rmse"
               pooled likewise; "within_r2", "within_spearman" inside each group (about the group's own mean; 0 where
               the prediction orders nothing), averaged over the groups whose target varies: within_r2 charges for a
               group's missed level, within_spearman does not; "delta_r2" r2 of text + activations minus r2 of text
               (`beyond`), stacked in the folds, the text taken out of the activations first (`emlens.gains`);
               "fold_r2", "fold_rmse" means over the folds of repeated K-fold only.
    nulls      "within_groups" (the default with groups), "group_blocks" (whole groups' targets change places among
               groups of equal size), "group_means" (means of groups of any size do; both are enumerated when few),
               "all_rows" (the default, and the only one, without groups). delta_r2 has a null of its own, "activation_rows".
    beyond     the text that delta_r2 adds to, a ridge: "best_text", the best in each fold's inner folds of the baselines
               that know text or category alone (of the default ones where none is given); or a baseline, or several.
    noise      column with the standard error of the target (None: "<target>_se", when there); `trials`: column with the
               number of answers behind a rate. `reliability`: 1 - mean(se^2) / var(y); `ceiling`: what each metric could
               reach at best (NaN where that is not known).
    copies     of a prompt in different groups: "refuse"; "allow" where prompts come again by design, as when each group is a model that
               is asked the same questions. Then a held-out group is new, its prompts are not: `.attrs["cautions"]` says so.

    Returns a Result with keys layer, features: one row per block (and baseline) x metric x null. low, high: bootstrap
    over whole groups of the out-of-fold errors (fold_r2, fold_rmse: Nadeau and Bengio 2003). null_low, null_high: the
    central `level` of the null draws; best_null_low, best_null_high: of the best row of a family in each draw, which is what
    the best of many layers is to be set beside. q: family-wise over all rows of activations shown by the maximum statistic,
    for each metric and null; a baseline is a family of its own. `.attrs` says all of it in words, and every group's own value.

    Errors: KeyError for a column that is not there, TypeError for a target that is not numeric, ValueError for one that
    is constant or has NaN, fewer groups than folds, groups equal to rows, copies of a prompt in different groups (a
    warning without groups), a baseline that is the target.
    """
    refusals.refuse_other_than_activations(acts)
    y = refusals.target_of(acts.facts, target)
    codes = refusals.group_codes(acts.facts, groups)
    nulls = nulls if nulls is not None else "all_rows" if groups is None else "within_groups"
    learner = learners.learner(model, penalties)
    plain = learners.learner("ridge", penalties if model == "ridge" else None)
    metrics, named = refusals.check_request(metrics, nulls, codes, y, n_permutations, repeats, learner)
    again = refuse_copies(acts, codes, groups, copies)
    variance = noise_variance(acts.facts, target, y, noise, trials)
    folds = make_folds(len(y), codes, n_folds, seed, repeats)
    asked = Asked(y, codes, folds.rounds, level, seed)
    entries = _entries(acts, target, groups, features, baselines, seed)
    single = [m for m in metrics if m != "delta_r2"]

    drawn = {name: shuffles.NULLS[name].draw(y, codes, n_permutations, seed) for name in named} if single else {}
    told = {name: shuffles.told(shuffles.NULLS[name].hypothesis, draws.targets.shape[1], groups) for name, draws in drawn.items()}
    counts = numbers(acts.facts, trials, "trials") if trials is not None and learner.rates else None
    added = None
    if "delta_r2" in metrics:
        ridges = PENALTIES if penalties is None or model != "ridge" else tuple(penalties)
        with threadpool_limits(limits=1):
            added = gains.Added.beyond(_texts(beyond, entries, acts, groups, target), asked, ridges, n_permutations)
        told["activation_rows"] = shuffles.told(gains.NULL.format(added.name), n_permutations, groups)
    task = _Task(asked, single, drawn, _weights(counts, drawn), added)
    keys, families = [(e.layer, e.block.name) for e in entries], np.array([e.family for e in entries])
    notes = _notes(entries)
    if groups is not None and "category" in notes["baselines"]:
        notes["baselines"]["category"] += "; a held-out group was never seen in training, so it knows nothing, by design"
    with threadpool_limits(limits=1):  # many small matrices: threads inside BLAS cost up to 20 x on a busy machine
        runs = [(e.block, learner if e.family == 0 or e.layer >= 0 else plain, e.family == 0) for e in entries]
        entries.clear()  # a block is let go when it was worked on: what it keeps may be large
        found = _each(lambda run: _examined(task, *run), runs, acts)
    rows, per_group = _table(task, found, families, variance, keys)
    table = pd.DataFrame(rows)
    table[["layer", "features"]] = [keys[at] for at in table.pop("at")]
    table["n_clusters"] = n_clusters = len(y) if codes is None else int(codes.max()) + 1
    table["reliability"] = np.nan if variance is None else reliability(y, variance)
    for name in ("ceiling", "best_null_low", "best_null_high"):
        table[name] = table.pop(name)
    out = stats.result(
        table,
        ["layer", "features"],
        what=f"out-of-fold prediction of {target!r} by {learner.name} from {acts.site} at {acts.position}",
        correction="max-statistic",
        seed=seed,
        interval=_intervals_in_words(metrics, folds, level, n_clusters, groups),
        null=told,
        n_clusters=n_clusters,
        folds=folds.outer,
        inner_folds=f"{folds.inner}; {learner.note}",
        model=learner.name,
        features=notes["features"],
        baselines=notes["baselines"],
        ceiling=_ceiling_in_words(target, variance, noise, trials),
        cautions=[*again, *(_CAUTIONS[each] for each in (*metrics, *told) if each in _CAUTIONS and groups is not None)],
    )
    out.attrs["family"] = "all rows of activations shown, for each metric and null; each baseline is a family of its own (over its layers)"
    if added is not None:
        out.attrs["beyond"] = {"name": added.name, "r2": added.r2, "chosen in outer folds": added.chosen}
    if groups is not None:
        out.attrs["per_group"] = {"groups": [str(g) for g in pd.unique(acts.facts[groups])], **per_group}
    return out


# ---- the blocks: activations, and their rivals


class _Entry(NamedTuple):
    """A block at its layer; family 0 is the activations', each baseline has one of its own."""

    layer: int
    block: Block
    family: int
    note: str


def _entries(
    acts: Activations,
    target: str,
    groups: str | None,
    features: str | FeatureSet | Sequence[str | FeatureSet],
    baselines: Baseline | Sequence[Baseline] | Mapping[str, Baseline],
    seed: int,
) -> list[_Entry]:
    sets = [feature_set(one) for one in ([features] if isinstance(features, str | FeatureSet) else features)]
    if not sets:
        raise ValueError(f"features are {features!r}: needed are one or more feature sets")
    out = [_Entry(layer, block, 0, one.note) for one in sets for layer, block in one.blocks(acts)]
    shown = [i for i in acts.layers if i in {e.layer for e in out}]
    beside = acts.select(layers=shown) if shown and len(shown) < len(acts.layers) else acts
    named = list(baselines.items()) if isinstance(baselines, Mapping) else [(None, baseline) for baseline in _sequence(baselines)]
    for at, (name, baseline) in enumerate(named, start=1):
        out += [_Entry(layer, block, at, block.note) for layer, block in rivals(baseline, beside, groups, target, name, seed)]
    twice = [key for key, times in Counter((e.layer, e.block.name) for e in out).items() if times > 1]
    if twice:
        layer, name = twice[0]
        rival = any(e.family and e.block.name == name for e in out)
        way_out = "baselines={'name': baseline, ...} names them apart" if rival else "features.named('another') tells them apart"
        raise ValueError(f"two {'baselines' if rival else 'feature sets'} share a name, {name!r} (layer {layer}): {way_out}")
    return out


def _sequence(baselines: Baseline | Sequence[Baseline]) -> Sequence[Baseline]:
    """One baseline, or several, as several."""
    return baselines if isinstance(baselines, Sequence) and not isinstance(baselines, str) else [baselines]


def _notes(entries: Sequence[_Entry]) -> dict[str, dict[str, str]]:
    """What to know of the feature sets and of the baselines, by name; of a rival at many layers, the first and the last."""
    said: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for entry in entries:
        said[entry.family == 0].setdefault(entry.block.name, []).append(entry.note)
    short = {mine: {name: " ... ".join(dict.fromkeys([notes[0], notes[-1]])) for name, notes in by.items()} for mine, by in said.items()}
    return {"features": short[True], "baselines": short[False]}


def _texts(
    beyond: Baseline | Sequence[Baseline], entries: Sequence[_Entry], acts: Activations, groups: str | None, target: str
) -> tuple[str, list[Block]]:
    """The text models that delta_r2 is beyond, and a name for them all."""
    if isinstance(beyond, str) and beyond == BEST_TEXT:
        given = [e.block for e in entries if e.family and e.block.text]
        return BEST_TEXT, given or [block(b, acts.facts, groups, target) for b in DEFAULT if b in TEXT]
    every = [block(b, acts.facts, groups, target) for b in _sequence(beyond)]
    if not every:
        raise ValueError("beyond=() names no text: give 'best_text', a baseline, or several")
    return (every[0].name if len(every) == 1 else f"best of {', '.join(b.name for b in every)}"), every


# ---- what is asked of every block


class _Task(NamedTuple):
    asked: Asked
    metrics: list[str]
    drawn: dict[str, shuffles.Shuffled]
    weights: learners.Weights
    added: gains.Added | None


class _Found(NamedTuple):
    """Of one block: observed predictions of each round, each metric's value for the target and all draws; the same of
    delta_r2 with the fall of each prompt's squared error."""

    predictions: Float[np.ndarray, "round prompt"]
    values: list[Float[np.ndarray, " target"]]
    gains: Float[np.ndarray, " draws"] | None
    fall: Float[np.ndarray, " prompt"] | None


def _examined(task: _Task, block: Block, learner: Learner, of_activations: bool) -> _Found:
    """Observed target and all permuted ones go through the model together, a round of folds at a time."""
    asked, rounds = task.asked, task.asked.rounds
    targets = np.column_stack([asked.y, *(draws.targets for draws in task.drawn.values())])
    values = [np.zeros(targets.shape[1]) for _ in task.metrics]
    predictions = []
    if task.metrics:
        for folds in rounds:
            found = learner.nested(block.features, targets, folds, block.scaling, task.weights if learner.rates else None).predictions
            predictions.append(found[:, 0].copy())
            for total, metric in zip(values, task.metrics, strict=True):
                total += METRICS[metric].score(targets, found, asked.codes, folds) / len(rounds)
    if task.added is None or not of_activations:
        return _Found(np.array(predictions), values, None, None)
    gained, fall = task.added.gains(block, learner, asked)
    return _Found(np.array(predictions), values, gained, fall)


def _table(
    task: _Task, found: Sequence[_Found], families: np.ndarray, variance: np.ndarray | None, keys: Sequence[tuple[int, str]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[float | None]]]]:
    """Rows of all metrics and nulls, and each group's own values, by metric and block."""
    asked, rows, inside = task.asked, [], {}
    for at, metric in enumerate(task.metrics):
        kind = METRICS[metric]
        predictions = np.stack([one.predictions for one in found], axis=-1)
        values = np.stack([one.values[at] for one in found], axis=1)
        band = kind.interval(asked, predictions)
        tie = SAME * (asked.y.std() if metric.endswith("rmse") else 1.0)
        best = np.nan if variance is None else kind.ceiling(asked.y, variance, asked.codes)
        stop = 1
        for null, draws in task.drawn.items():
            start, stop = stop, stop + draws.targets.shape[1]
            rows += _rows(metric, null, values[[0, *range(start, stop)]], band, families, kind.tail, asked, tie, best)
        if asked.codes is not None:
            inside[metric] = _by_block(in_groups(kind, asked, predictions), keys)
    if task.added is not None:
        mine = families == 0
        fall = np.stack([one.fall for one in found if one.fall is not None], axis=1)
        values = np.stack([one.gains for one in found if one.gains is not None], axis=1)
        band = error_interval(lambda sums, n, spread: sums / spread, asked, fall)
        best = np.nan if variance is None else reliability(asked.y, variance) - task.added.r2
        rows += _rows("delta_r2", "activation_rows", values, band, families[mine], "greater", asked, SAME, best)
        inside["delta_r2"] = _by_block(gain_in_groups(asked, fall), [key for key, one in zip(keys, mine, strict=True) if one])
    return rows, inside


def _by_block(values: Float[np.ndarray, "group block"], keys: Sequence[tuple[int, str]]) -> dict[str, list[float | None]]:
    return {
        name if layer == -1 else f"{name} at {layer}": [None if np.isnan(v) else round(float(v), 6) for v in column]
        for (layer, name), column in zip(keys, values.T, strict=True)
    }


def _rows(
    metric: str,
    null: str,
    values: Float[np.ndarray, "draws block"],
    band: Band,
    families: np.ndarray,
    tail: str,
    asked: Asked,
    tie: float,
    ceiling: float,
) -> list[dict[str, Any]]:
    """One row per block: values[0] is observed, the rest its null; blocks of one family are corrected together."""
    observed, draws = np.round(values[0] / tie) * tie, np.round(values[1:] / tie) * tie
    null_low, null_high = stats.null_band(values[1:], asked.level)
    p, q, best = stats.permutation_p(observed, draws, tail), np.empty(len(observed)), np.empty((2, len(observed)))
    for family in np.unique(families):
        mine = families == family
        q[mine] = stats.max_statistic_p(observed[mine], draws[:, mine], tail)
        largest = values[1:, mine].min(axis=1) if tail == "less" else values[1:, mine].max(axis=1)
        best[:, mine] = np.array(stats.null_band(largest, asked.level))[:, None]
    table = pd.DataFrame({"estimate": values[0], "low": band[0], "high": band[1], "null_low": null_low, "null_high": null_high, "p": p, "q": q})
    table = table.assign(best_null_low=best[0], best_null_high=best[1])
    return table.assign(metric=metric, null=null, n=len(asked.y), ceiling=ceiling, at=range(len(p))).to_dict("records")


def _weights(trials: np.ndarray | None, drawn: Mapping[str, shuffles.Shuffled]) -> learners.Weights:
    """The trials behind every target: they go where their rates go."""
    if trials is None:
        return None
    return np.column_stack([trials, *(trials[draws.orders].T for draws in drawn.values())])


def _each(run: Callable[[Any], Any], runs: list[Any], acts: Activations) -> list[Any]:
    """Blocks side by side, each with the one BLAS thread that `predict` allows, no more than memory holds; `runs` is emptied."""

    def taken() -> Iterator[Any]:
        runs.reverse()
        while runs:
            yield runs.pop()

    room = _MEMORY // (6 * 8 * len(acts) * acts.d_model)  # a block's rows in float64, some six times over
    return list(side_by_side(run, taken(), max(1, min(len(runs), room))))


# ---- in words


def _intervals_in_words(metrics: Sequence[str], folds: Folds, level: float, n_clusters: int, groups: str | None) -> str:
    units = "prompts" if groups is None else f"whole groups of {groups!r}"
    few = "" if n_clusters >= FEW_CLUSTERS else f"; fewer than {FEW_CLUSTERS} clusters: it under-covers ({COVERED})"
    resampled = f"{level:.0%} bootstrap over {n_clusters} {units} of the out-of-fold errors, folds and fits as they are{few}"
    j, k = len(folds.every), len(folds.rounds[0])
    corrected = f"{level:.0%} of Student's t over {j} folds, variance times 1/{j} + 1/{k - 1} (n_test / n_train) as Nadeau and Bengio 2003"
    of_folds = [m in OF_FOLDS for m in metrics]
    return corrected if all(of_folds) else f"{', '.join(OF_FOLDS)}: {corrected}; others: {resampled}" if any(of_folds) else resampled


def _ceiling_in_words(target: str, variance: np.ndarray | None, noise: str | None, trials: str | None) -> str:
    if variance is None:
        return f"not known: give noise= (standard error of {target!r}), trials= (answers behind a rate, two or more each), or a fact '{target}_se'"
    source = f"{trials!r} answers behind each rate" if noise is None and trials is not None else f"the standard error {noise or f'{target}_se'!r}"
    return f"from {source}: reliability 1 - mean(se^2) / var(y) is the best R2; for delta_r2 that less the text's R2; for rmse the noise itself"
