"""What cannot be predicted, said at once: targets, groups and requests that would give a number without a meaning."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from .folds import Codes
from .learners import Learner
from .scores import METRICS, OF_FOLDS, WITHIN
from .shuffles import NULLS, OF_GROUPS


def target_of(facts: pd.DataFrame, target: str) -> Float[np.ndarray, " prompt"]:
    """The fact to be predicted, in float64; KeyError, TypeError or ValueError where it is missing, no number, not finite or constant."""
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


def group_codes(facts: pd.DataFrame, groups: str | None) -> Codes | None:
    """Groups as 0..G-1, None without; KeyError or ValueError where they are missing, a single one, or one a prompt."""
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


def check_request(
    metrics: Sequence[str],
    nulls: Sequence[str],
    codes: Codes | None,
    y: Float[np.ndarray, " prompt"],
    n_permutations: int,
    repeats: int,
    learner: Learner,
) -> None:
    """ValueError for metrics and nulls that are unknown, or mean nothing with these groups, folds, target or learner."""
    known = [*METRICS, "delta_r2"]
    if not metrics or isinstance(metrics, str) or any(m not in known for m in metrics):
        raise ValueError(f"metrics are {metrics!r}; needed is a tuple of names among {known}")
    if not nulls or isinstance(nulls, str) or any(name not in NULLS for name in nulls):
        raise ValueError(f"nulls are {nulls!r}; needed is a tuple of names among {list(NULLS)}")
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
        raise ValueError(f"{over_folds} are means over the folds of repeated K-fold: give repeats=10 and no groups, or pooled 'r2' and 'rmse'")
    if learner.rates and (y.min() < 0 or y.max() > 1):
        raise ValueError(f"the model {learner.name!r} foretells rates between 0 and 1; the target goes from {y.min():.3g} to {y.max():.3g}")
    if learner.rates and ("delta_r2" in metrics or "group_means" in nulls):
        raise ValueError(
            f"the model {learner.name!r} takes rates; 'delta_r2' learns from residuals and 'group_means' makes targets anew: use model='ridge'"
        )
