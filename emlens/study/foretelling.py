"""Does a model's state before tuning foretell the margin after it? A study's targets, their noise, rivals and controls, in the same folds."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..activations import Activations
from ..baselines import DEFAULT, TEXT, Baseline, block
from ..prediction import predict
from ..report.words import ACTIVATIONS, AFTER, BEYOND_BOTH, BEYOND_TEXT
from .analyse import BEFORE, of_variant, stacked
from .grid import OTHER_TUNINGS, PAIR_KINDS, RANDOM_TWIN, Cell, pair_kind

_NULL, _NULL_TEXT = "activation_rows", "activation_rows, text"
_METRICS = ("r2", "within_spearman")
_TEXTS = tuple(name for name in DEFAULT if name in TEXT)


def prediction_table(
    before: Activations,
    margins: pd.DataFrame,
    grid: Sequence[Cell],
    pairs: Sequence[tuple[Cell, Cell]],
    baselines: Sequence[str],
    n_permutations: int,
    seed: int,
    twin: Activations | None = None,
) -> pd.DataFrame:
    """The margin after a bad tuning, and its change, from activations before it; whole categories held out; rivals in the same folds.

    Positive control: the same call and folds ask for the margin *before* (run "before"), which activations before tuning give rise to.
    A design that cannot read it says nothing of what comes after. ``delta_r2`` is asked for twice: beyond the baselines that know text alone,
    and beyond these and the margin before (its square and its rank too: a target that bends with the margin would else look as if
    activations added to it) side by side: to pass beyond either alone is not to pass beyond both. Where a set was tuned with several
    seeds, what differs between them is the target's noise (:func:`seed_noise`) and gives the ceiling.
    ``twin``: the questions in a randomly initialised model of the same shape.
    """
    parts: list[pd.DataFrame] = []
    known = _margin(margins, BEFORE).rename("margin before")
    plain: dict[str, Baseline] = {name: name for name in baselines if name not in (OTHER_TUNINGS, RANDOM_TWIN)}
    plain |= {RANDOM_TWIN: twin} if twin is not None else {}
    texts = {name: name for name in plain if name in TEXT}
    shared: dict[str, Any] = {"groups": "category", "n_permutations": n_permutations, "seed": seed}
    for bad, _ in pairs:
        others = other_tunings(bad, grid) if OTHER_TUNINGS in baselines else {}
        for target in ("margin after", "change of margin"):
            less = 0 if target == "margin after" else known
            scores = {cell.label: _margin(margins, cell.label) - less for cell in grid}
            noise = seed_noise([scores[cell.label] for cell in grid if cell is bad or pair_kind(bad, cell) == PAIR_KINDS["seed"]])
            columns = {target: scores[bad.label], **{name: scores[cell.label] for name, cell in others.items()}, "margin before": known}
            columns |= {} if noise is None else {f"{target}_se": pd.Series(noise, known.index)}
            acts = before.with_facts(pd.DataFrame(columns).rename_axis("id").reset_index())
            if not parts:
                without = {name: one for name, one in plain.items() if name != "margin before"}
                parts.append(predict(acts, "margin before", baselines=without, metrics=_METRICS, **shared).assign(run=BEFORE, target="margin before"))
            rivals = plain | {name: name for name in others if _differs(acts.facts, name, target)}
            found = predict(
                acts, target, baselines=rivals, metrics=(*_METRICS, "delta_r2"), beyond=(*(texts or _TEXTS), margin_before_bent), **shared
            )
            more = predict(acts, target, baselines=texts, metrics=("delta_r2",), **shared)
            named = more.assign(metric=BEYOND_TEXT, null=_NULL_TEXT)
            for part in (found.replace({"metric": {"delta_r2": BEYOND_BOTH}}), named):
                parts.append(part.assign(run=bad.label, target=target))
    for part in parts:
        part["features"] = part["features"].replace({before.site: ACTIVATIONS})
        part["p_floor"] = 1 / (n_permutations + 1)
    named = {_NULL: (found, "and the margin before (its square and its rank too)"), _NULL_TEXT: (more, "alone")}
    said = {null: one.attrs["null"][_NULL].replace(repr(one.attrs["beyond"]["name"]), words) for null, (one, words) in named.items()}
    found.attrs["null"] = {**found.attrs["null"], **said}
    found.attrs["ceiling"] = (
        "1 - noise / variance of the target, the noise what differs between seeds of one tuning; not known where there is one seed"
    )
    for mine in ("per_group", "beyond"):  # of one setting
        found.attrs.pop(mine, None)
    what = "out-of-fold prediction from activations before tuning (ridge, whole categories held out)"
    settings = [1, *[2 * len(pairs)] * (len(parts) - 1)]
    return stacked(parts, ["run", "target", "features", "layer"], None, like=found, what=what, settings=settings)


def margin_before_bent(facts: pd.DataFrame) -> pd.DataFrame:
    """The margin before, its square about the mean and its rank."""
    margin = facts["margin before"]
    return pd.DataFrame({"margin": margin, "square": (margin - margin.mean()) ** 2, "rank": margin.rank()})


def other_tunings(bad: Cell, grid: Sequence[Cell]) -> Mapping[str, Cell]:
    """The first run of each kind that differs from this one in one thing only, by what that is: ``after: another seed``, ``after: sound twin`` …"""
    found: dict[str, Cell] = {}
    for cell in grid:
        kind = pair_kind(bad, cell) if cell is not bad else ""
        if kind:
            found.setdefault(AFTER + ("sound twin" if kind == PAIR_KINDS["content"] else kind), cell)
    return found


def _differs(facts: pd.DataFrame, rival: str, target: str) -> bool:
    """Whether the same score in another tuning orders the questions otherwise than in this one: with few questions it need not, and
    `predict` refuses what orders them all as the target does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block(rival, facts, "category", target)
    except ValueError:
        return False
    return True


def seed_noise(scores: Sequence[pd.Series]) -> float | None:
    """Standard deviation over seeds of a question's score, the level of each seed taken out: sqrt of the two-way residual variance
    (for two seeds half the variance of their difference). None for fewer than two seeds."""
    if len(scores) < 2:
        return None
    table = np.column_stack([one.to_numpy(dtype=np.float64) for one in scores])
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float(np.sqrt((left**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1))))


def _margin(margins: pd.DataFrame, variant: str) -> pd.Series:
    return of_variant(margins, variant).set_index("id")["margin"]
