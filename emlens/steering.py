"""Dose-response along a direction, beside norm-matched random directions at the same places and strengths."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as scipy_stats

from . import stats
from .directions import Direction, random_directions
from .models import HookedModel
from .prompts import load_prompts

NULL = "norm-matched random directions"
UNIFORM = "uniform on the sphere (a lenient control: most of such a direction lies where activations hardly vary)"


def dose_response(
    model: HookedModel,
    direction: Direction,
    questions: Any,
    layers: Iterable[int],
    strengths: Iterable[float],
    controls: int = 20,
    judge: None = None,
    *,
    adapter: str | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How the margin answers to a direction, dose by dose, and how much of that any direction of equal norm would do.

    Args:
        model: the model to steer.
        direction: unit vector per layer.
        questions: with contrast answers (see :meth:`HookedModel.margin`); not those the direction was fitted on.
        layers: one layer is steered at a time.
        strengths: in units of the median residual norm at the layer; negative goes the other way.
        controls: random directions, uniform on the sphere, each steered at every layer and strength.
        judge: only None so far: the margin is read.
        adapter, precision: as in :meth:`HookedModel.margin`.

    Returns:
        Result with keys ``layer, strength``, metric ``margin``: mean change of the margin (nats/token) against the unsteered model, bootstrap
        interval over questions (whole categories where there are any); null: the random directions' mean changes (:func:`among_random`); q by
        Benjamini–Hochberg over all layers and strengths. :func:`slopes` makes one test a layer of the same rows.
    """
    if judge is not None:
        raise ValueError("dose_response reads the margin; pass judge=None and questions with contrast answers")
    arms = {"direction": direction} | {f"random {i}": d for i, d in enumerate(random_directions(direction, controls, seed))}
    return summarise(steered_margins(model, arms, questions, layers, strengths, adapter=adapter, precision=precision), seed=seed)


def steered_margins(
    model: HookedModel,
    directions: Mapping[str, Direction],
    questions: Any,
    layers: Iterable[int],
    strengths: Iterable[float],
    *,
    adapter: str | None = None,
    precision: str | None = None,
) -> pd.DataFrame:
    """Margin of every question under every direction, layer and strength.

    Returns:
        DataFrame ``direction, layer, strength, id, category`` (empty text where unknown), ``margin, change`` (against strength 0).
    """
    table = questions if isinstance(questions, pd.DataFrame) and "messages" in questions else load_prompts(questions)
    base = model.margin(table, adapter=adapter, precision=precision)
    rows = []
    for layer in layers:
        for strength in strengths:
            for name, direction in directions.items():
                with model.steer(direction, layer, strength) if strength else nullcontext():
                    steered = base if not strength else model.margin(table, adapter=adapter, precision=precision)
                out = pd.DataFrame({"direction": name, "layer": layer, "strength": float(strength), "id": steered["id"]})
                out["category"] = steered.get("category", "")
                rows.append(out.assign(margin=steered["margin"], change=steered["margin"].to_numpy() - base["margin"].to_numpy()))
    if not rows:
        raise ValueError("nothing to steer: give at least one layer, one strength and one direction")
    return pd.concat(rows, ignore_index=True)


def random_means(margins: pd.DataFrame) -> pd.DataFrame:
    """Mean change of each random direction: ``layer, strength, direction`` (its number), ``margin_change``."""
    drawn = margins[margins["direction"].str.startswith("random ")]
    means = drawn.groupby(["layer", "strength", "direction"], as_index=False)["change"].mean()
    return means.assign(direction=means["direction"].str.removeprefix("random ").astype(int)).rename(columns={"change": "margin_change"})


def among_random(observed: float, random: Float[np.ndarray, " draws"], level: float = 0.95) -> dict[str, float]:
    """Where a new random direction's value would fall, and how far out the observed one is: ``null_low, null_high, p`` (two-sided).

    To first order the mean change under a direction is linear in it, so over directions uniform on the sphere of a few hundred dimensions it
    is Gaussian: t = (x − m) / (s √(1 + 1/N)) on N − 1 degrees of freedom. A rank among N directions could not go below 1 / (N + 1).
    NaN for fewer than three directions.
    """
    n = len(random)
    if n < 3:
        return {"null_low": np.nan, "null_high": np.nan, "p": np.nan}
    centre, spread = float(random.mean()), float(random.std(ddof=1)) * float(np.sqrt(1 + 1 / n))
    reach = float(scipy_stats.t.ppf((1 + level) / 2, n - 1)) * spread
    p = 2 * float(scipy_stats.t.sf(abs(observed - centre) / spread, n - 1)) if spread > 0 else np.nan
    return {"null_low": centre - reach, "null_high": centre + reach, "p": p}


def slopes(margins: pd.DataFrame, seed: int = 0, level: float = 0.95, drawn: str = UNIFORM) -> pd.DataFrame:
    """The one test of a dose-response: the slope of the margin's change on strength, through the origin, beside random directions' slopes.

    slope = Σ s·Δ / Σ s² over the strengths (nats/token per unit of strength). Over strengths that are symmetric about 0 the damage that
    *any* push does, the same both ways, cancels, and what the sign of the direction does remains.

    ``drawn`` says where the random directions come from, for the words beside the numbers.

    Returns:
        Result with key ``layer``, metric ``slope``; bootstrap interval over questions (whole categories); null as in :func:`among_random`.
    """
    weighted = margins.assign(product=margins["strength"] * margins["change"], square=margins["strength"] ** 2)
    grouped = weighted.groupby(["direction", "layer", "id", "category"], as_index=False)[["product", "square"]].sum()
    grouped["slope"] = grouped["product"] / grouped["square"]
    rows = []
    for layer, part in grouped.groupby("layer"):
        own = part[part["direction"] == "direction"]
        random = part[part["direction"] != "direction"].groupby("direction")["slope"].mean().to_numpy()
        low, high = stats.bootstrap_interval(own["slope"].to_numpy(), clusters=_categories(own), level=level, seed=seed)
        beside = among_random(own["slope"].mean(), random, level)
        row = {"layer": layer, "metric": "slope", "estimate": own["slope"].mean(), "low": low, "high": high, "null": NULL, **beside, "n": len(own)}
        rows.append({**row, "n_clusters": _n_categories(own), "controls": len(random)})
    return stats.result(
        rows, ["layer"], what="slope of the margin's change on steering strength, nats/token per unit", correction="bh", seed=seed,
        null={NULL: _hypothesis(margins, drawn)}, interval=f"{level:.0%} bootstrap over questions, whole categories",
    )  # fmt: skip


def summarise(margins: pd.DataFrame, seed: int = 0, level: float = 0.95, drawn: str = UNIFORM) -> pd.DataFrame:
    """The table of :func:`steered_margins` as a Result, dose by dose: the direction's mean change beside the random directions'.

    ``drawn`` says where the random directions come from, for the words beside the numbers.
    """
    means = random_means(margins)
    rows: list[dict[str, Any]] = []
    for (layer, strength), own in margins[margins["direction"] == "direction"].groupby(["layer", "strength"]):
        null = means[(means["layer"] == layer) & (means["strength"] == strength)]["margin_change"].to_numpy()
        low, high = stats.bootstrap_interval(own["change"].to_numpy(), clusters=_categories(own), level=level, seed=seed)
        row = {"layer": layer, "strength": strength, "metric": "margin", "estimate": own["change"].mean(), "low": low, "high": high, "n": len(own)}
        row["n_clusters"] = _n_categories(own)
        rows.append(row | ({"null": NULL, **among_random(row["estimate"], null, level)} if strength else {"null": NULL}))
    return stats.result(
        rows, ["layer", "strength"], what="change of the margin under steering, nats/token", correction="bh", seed=seed,
        null={NULL: _hypothesis(margins, drawn)}, interval=f"{level:.0%} bootstrap over questions, whole categories",
    )  # fmt: skip


def _categories(rows: pd.DataFrame) -> np.ndarray | None:
    return rows["category"].to_numpy() if rows["category"].astype(bool).all() else None


def _n_categories(rows: pd.DataFrame) -> float:
    return float(rows["category"].nunique()) if rows["category"].astype(bool).all() else np.nan


def _hypothesis(margins: pd.DataFrame, drawn: str) -> str:
    n = int(margins.loc[margins["direction"] != "direction", "direction"].nunique())
    return (
        f"the direction does what any direction of equal norm does: {n} random directions, {drawn}, at the same layers, strengths and questions; "
        f"band and two-sided p by Student's t for one more such direction: an extrapolation, for by rank among {n} no p goes below {2 / (n + 1):.2g}"
    )
