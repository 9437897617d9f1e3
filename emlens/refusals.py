"""What cannot be predicted, said at once: targets, groups and requests that would give a number without a meaning."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from .activations import Activations
from .folds import Codes
from .learners import Learner
from .names import column_of, several
from .scores import METRICS, OF_FOLDS, WITHIN
from .shuffles import NULLS, OF_GROUPS


def refuse_other_than_activations(acts: Any) -> None:
    """TypeError that says how to get them."""
    if not isinstance(acts, Activations):
        raise TypeError(
            f"acts is of type {type(acts).__name__}; Activations are needed: model.record(prompts), or em.Activations.from_array(values, facts) of "
            "an array [prompt, layer, d_model] and a table with one row a prompt"
        )


def target_of(facts: pd.DataFrame, target: str) -> Float[np.ndarray, " prompt"]:
    """The fact to be predicted, in float64; KeyError, TypeError or ValueError where it is missing, no number, not finite or constant."""
    column = column_of(facts, target, "target", "join scores with acts.with_facts(table)")
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


def group_codes(facts: pd.DataFrame, groups: str | None) -> Codes | None:
    """Groups as 0..G-1, None without; KeyError or ValueError where they are missing, a single one, or one a prompt."""
    if groups is None:
        return None
    codes, labels = pd.factorize(
        column_of(facts, groups, "groups", "groups= names one of them, or None for plain folds; acts.with_facts(table) adds more")
    )
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


def check_request(
    metrics: str | Sequence[str],
    nulls: str | Sequence[str],
    codes: Codes | None,
    y: Float[np.ndarray, " prompt"],
    n_permutations: int,
    repeats: int,
    learner: Learner,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Metrics and nulls as tuples; ValueError for those that are unknown, or mean nothing with these groups, folds, target or learner."""
    metrics, nulls = several("metrics", metrics, [*METRICS, "delta_r2"]), several("nulls", nulls, NULLS)
    if n_permutations < 1:
        raise ValueError(f"n_permutations is {n_permutations}: no estimate is given without its null; at least 1, 1000 is usual")
    if codes is None:
        needy = [name for name in (*metrics, *nulls) if name in (*WITHIN, "delta_r2", *OF_GROUPS)]
        if needy:
            raise ValueError(f"{needy} need groups: name the column, groups='category'")
    elif "within_groups" in nulls and not any(np.ptp(y[codes == g]) > 0 for g in range(int(codes.max()) + 1)):
        raise ValueError("the target is constant inside every group, so permuting it there changes nothing: use nulls=('group_blocks',)")
    over_folds = [m for m in metrics if m in OF_FOLDS]
    if over_folds and (repeats == 1 or codes is not None):
        raise ValueError(
            f"{over_folds} are means over the folds of repeated K-fold, which holds no group out: give repeats=10 and no groups, or ask for the "
            "pooled 'r2' and 'rmse'. (They come with em.PUBLISHED['predict'], whose folds split topics: with groups=, take its features and model "
            "alone.)"
        )
    if learner.rates and (y.min() < 0 or y.max() > 1):
        raise ValueError(f"the model {learner.name!r} foretells rates between 0 and 1; the target goes from {y.min():.3g} to {y.max():.3g}")
    if learner.rates and ("delta_r2" in metrics or "group_means" in nulls):
        raise ValueError(
            f"the model {learner.name!r} takes rates; 'delta_r2' learns from residuals and 'group_means' makes targets anew: use model='ridge'"
        )
    return metrics, nulls
