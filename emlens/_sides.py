"""Two sets of prompts side by side: what they must have in common, and the rows, layer by layer, that an estimate becomes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from . import nulls, stats
from .activations import Activations


def check_same_layers(a: Activations, b: Activations) -> None:
    """ValueError unless both were read at the same layers and are of one width."""
    if a.layers != b.layers:
        raise ValueError(f"the two sides hold different layers, {a.layers} and {b.layers}: select(layers=...) the common ones on both")
    if a.d_model != b.d_model:
        raise ValueError(f"the two sides have d_model {a.d_model} and {b.d_model}: activations of one architecture are needed")


def check_same_place(a: Activations, b: Activations) -> None:
    """ValueError unless both were read at one place of one width, and neither is empty."""
    if a.place != b.place:
        raise ValueError(f"the sides were read at different places, {a.place} and {b.place}: record both at one place")
    if a.d_model != b.d_model:
        raise ValueError(f"the sides have d_model {a.d_model} and {b.d_model}: activations of one model are needed")
    empty = [side for side, acts in (("a", a), ("b", b)) if acts.n_prompts == 0]
    if empty:
        raise ValueError(f"side {' and '.join(empty)} holds no prompt (a: {a.n_prompts}, b: {b.n_prompts}): loosen the condition that chose them")


def check_shifts(**sides: Activations) -> None:
    """ValueError for a side that is known to be a recording, where a shift is needed."""
    wrong = [f"{name} is a recording ({acts!r})" for name, acts in sides.items() if acts.is_shift is False]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: a shift is needed, after - before: what the same prompts gave with the tuning less what without")


def both_places(a: Activations, b: Activations) -> str:
    """The place of both sides, once when it is the same."""
    return str(a.place) if a.place == b.place else f"{a.place} and {b.place}"


def facts_column(acts: Activations, name: str | None) -> np.ndarray | None:
    """A column of the facts."""
    if name is None:
        return None
    if name not in acts.facts.columns:
        raise KeyError(f"no column {name!r} in the facts; there are {list(acts.facts.columns)}: join it with with_facts(...)")
    return acts.facts[name].to_numpy()


def layer_rows(layers: Sequence[int], metric: str, values: Sequence[Float[np.ndarray, " layer"]], n: int) -> list[dict[str, Any]]:
    """Result rows, one per layer, of an estimate and both ends of its interval."""
    table = zip(layers, *values, strict=True)
    return [{"layer": i, "metric": metric, "estimate": e, "low": x, "high": y, "n": n} for i, e, x, y in table]


def split_half_result(
    acts: Activations,
    metric: str,
    values: Float[np.ndarray, "split layer"],
    half: int,
    draws: Float[np.ndarray, "draws layer"],
    tail: str,
    level: float,
    **attrs: Any,
) -> stats.Result:
    """Median and spread over splits, per layer, beside the isotropic null."""
    rows = layer_rows(acts.layers, metric, (np.median(values, axis=0), *stats.null_band(values, level)), half)
    return stats.result(
        nulls.beside(rows, {"isotropic": draws}, tail, level),
        ["layer"],
        family=["metric", "null"],
        n_draws=len(draws),
        n_splits=len(values),
        interval=f"central {level:.0%} of {len(values)} random splits: a spread over splits, not a confidence interval",
        **attrs,
    )
