"""Do different tunings make one direction? Cosines of their directions, and whether the direction of one, ablated, undoes another.

After Soligo et al. 2025, "Convergent Linear Representations of Emergent Misalignment" (arXiv 2506.11618).
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from . import stats
from .activations import Activations
from .directions import Direction, random_directions
from .models import HookedModel
from .prompts import load_prompts
from .steering import among_random

ISOTROPIC = "isotropic direction"
ABLATED = "random directions ablated in its place"


def direction_cosines(directions: Mapping[str, Direction], level: float = 0.95) -> pd.DataFrame:
    """Cosine of every two directions at every layer that both have.

    Null ``isotropic direction``: one of the two is uniform on the sphere; (1 + cos) / 2 is then Beta((d−1)/2, (d−1)/2), exactly. A lenient null:
    whatever all tunings of a model share makes cosines large. Set them beside two seeds of one tuning, and beside tunings on sound advice.

    Returns:
        Result with keys ``a, b, layer``, metric ``cosine``; two-sided p, q by Benjamini–Hochberg over all rows.
    """
    if len(directions) < 2:
        raise ValueError(f"{len(directions)} directions were given; at least two are needed for a cosine")
    rows = []
    for (a, one), (b, two) in combinations(directions.items(), 2):
        if (one.site, one.d_model) != (two.site, two.d_model):
            raise ValueError(
                f"{a!r} is for {one.site} of width {one.d_model}, {b!r} for {two.site} of width {two.d_model}: give directions of one place"
            )
        half = (one.d_model - 1) / 2
        beta = scipy_stats.beta(half, half)
        reach = 2 * float(beta.ppf((1 + level) / 2)) - 1
        for layer in [i for i in one.layers if i in two.layers]:
            cosine = float(one.layer(layer).astype(np.float64) @ two.layer(layer).astype(np.float64))
            p = min(1.0, 2 * float(beta.sf((1 + abs(cosine)) / 2)))
            row = {"a": a, "b": b, "layer": layer, "metric": "cosine", "estimate": cosine, "null": ISOTROPIC}
            rows.append({**row, "null_low": -reach, "null_high": reach, "p": p, "n": one.d_model})
    if not rows:
        raise ValueError("no two of the directions have a layer in common")
    told = "one of the two directions is uniform on the sphere (lenient: what all tunings share makes cosines large); exact; two-sided"
    return stats.result(rows, ["a", "b", "layer"], what="cosine of two directions", correction="bh", null={ISOTROPIC: told}, interval="none")


def ablation_transfer(
    model: HookedModel,
    directions: Mapping[str, Direction],
    questions: Any,
    layers: int | Iterable[int] | str = "all",
    controls: int = 20,
    *,
    reference: Activations | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The margin that comes back in one tuning when the direction of another is ablated, for every two of them.

    Args:
        model: with an adapter on it for each name in ``directions``.
        directions: ``{adapter: the direction of that tuning}``.
        questions: with contrast answers; not those the directions were fitted on.
        layers: where it is ablated; each layer its own vector.
        controls: random directions ablated in the first direction's place (shared by all directions), drawn from the covariance of ``reference``
            where it is given (Activations at these layers), else uniform on the sphere: a lenient control.

    Returns:
        Result with keys ``tuning, direction_of``, metric ``margin``: mean change of the margin (nats/token) in the tuning, bootstrap interval
        over questions (whole categories); null: the random directions' changes in that tuning (:func:`emlens.steering.among_random`), Holm
        over all rows. The untouched tuning's mean is in ``margin_before``.
    """
    if not directions:
        raise ValueError("no direction was given; give {adapter: direction}")
    table = questions if isinstance(questions, pd.DataFrame) and "messages" in questions else load_prompts(questions)
    groups = table["category"].to_numpy() if "category" in table else None
    drawn = random_directions(next(iter(directions.values())), controls, seed, reference)
    rows = []
    for tuning in directions:
        before = model.margin(table, tuning, precision)["margin"].to_numpy()

        def change(direction: Direction, tuning: str = tuning, before: np.ndarray = before) -> np.ndarray:
            with model.ablate(direction, layers):
                return model.margin(table, tuning, precision)["margin"].to_numpy() - before

        random = np.array([change(each).mean() for each in drawn])
        for name, direction in directions.items():
            found = change(direction)
            low, high = stats.bootstrap_interval(found, clusters=groups, seed=seed)
            row = {"tuning": tuning, "direction_of": name, "metric": "margin", "estimate": found.mean(), "low": low, "high": high, "null": ABLATED}
            rows.append({**row, **among_random(float(found.mean()), random), "n": len(table), "margin_before": before.mean()})
    how = f"covariance of {reference.n_prompts} activations" if reference is not None else "sphere (a lenient control)"
    told = f"ablating the direction does what ablating any does: {controls} random directions from the {how}; Student's t for one more; two-sided"
    return stats.result(
        rows, ["tuning", "direction_of"], what="change of the margin when a direction is ablated, nats/token", correction="holm", seed=seed,
        null={ABLATED: told}, interval="95% bootstrap over questions, whole categories",
    )  # fmt: skip
