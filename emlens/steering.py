"""Dose-response along a direction, beside norm-matched random directions at the same places and strengths."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as scipy_stats

from . import stats
from .activations import Activations
from .coherence import Meter, neutral_texts
from .directions import Direction, random_directions
from .models import HookedModel
from .prompts import load_prompts

NULL = "norm-matched random directions"
MATCHED = "covariance-matched random directions"
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
    reference: Activations | None = None,
    texts: Any = None,
    new_tokens: int = 0,
    toward: str = "lower",
    adapter: str | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How the margin answers to a direction, dose by dose, what the same doses do to unrelated text, and how much of both any direction would do.

    Args:
        model: the model to steer.
        direction: unit vector per layer.
        questions: with contrast answers (see :meth:`HookedModel.margin`); not those the direction was fitted on.
        layers: one layer is steered at a time.
        strengths: in units of the median residual norm at the layer; negative goes the other way.
        controls: random directions, uniform on the sphere, each steered at every layer and strength.
        judge: only None so far: the margin is read.
        reference: Activations of the untouched model at these layers; as many directions again are drawn from their covariance (a second null).
        texts: rows with responses on which damage is read (:class:`emlens.coherence.Meter`); default our neutral questions.
        new_tokens: length of greedy answers to them whose fluency is read too; 0: none.
        toward: ``"lower"`` or ``"higher"``: what is asked of the margin, for :func:`recommend`.
        adapter, precision: as in :meth:`HookedModel.margin`.

    Returns:
        Result with keys ``layer, strength``; metric ``margin``: mean change of the margin (nats/token) against the unsteered model, bootstrap
        interval over questions (whole categories where there are any); metrics ``kl``, ``perplexity_ratio`` (and ``fluency``): means over the
        texts. Nulls: the random directions' means (:func:`among_random`: t for margins, ranks for damage); q by Benjamini–Hochberg over all
        layers and strengths of a metric and null. ``attrs["recommended"]``: :func:`recommend`, the dose chosen by rule, beside the doses that
        the rule chooses along the random directions. :func:`slopes` makes one test a layer of :func:`steered_margins`.
    """
    if judge is not None:
        raise ValueError("dose_response reads the margin; pass judge=None and questions with contrast answers")
    doses, places = list(strengths), list(layers)
    drawn = {NULL: (UNIFORM, random_directions(direction, controls, seed))}
    if reference is not None and places:
        here = Direction(np.stack([direction.layer(i) for i in places]), tuple(places), direction.site, direction.name, direction.meta)
        drawn[MATCHED] = (f"drawn from the covariance of {reference.n_prompts} activations", random_directions(here, controls, seed, reference))
    arms = {"direction": direction} | {f"{null} {i}": d for null, (_, several) in drawn.items() for i, d in enumerate(several)}
    margins = steered_margins(model, arms, questions, places, doses, adapter=adapter, precision=precision)
    meter = Meter(model, neutral_texts() if texts is None else load_prompts(texts), adapter, new_tokens)
    damage = along(model, arms, places, doses, meter.read).assign(category="")
    parts = []
    for null, (how, _) in drawn.items():
        of = [frame[frame["direction"].isin(["direction", *[a for a in arms if a.startswith(null)]])] for frame in (margins, damage)]
        renamed = [frame.assign(direction=frame["direction"].str.replace(null, "random", regex=False)) for frame in of]
        parts.append(summarise(renamed[0], seed=seed, drawn=how, null=null))
        parts += [summarise(renamed[1], seed=seed, drawn=how, null=null, metric=m, value=m) for m in damage.columns if m in METRICS]
    told = {null: _hypothesis(margins[margins["direction"].str.startswith(null)], how, ("t", "rank")) for null, (how, _) in drawn.items()}
    out = stats.result(
        pd.concat(parts, ignore_index=True), ["layer", "strength"], what="steering: change of the margin (nats/token), and damage", correction="bh",
        family=["metric", "null"], seed=seed, null=told, interval=parts[0].attrs["interval"],
    )  # fmt: skip
    out.attrs["recommended"] = recommend(margins, damage, toward, seed=seed)
    return out


METRICS = ("kl", "perplexity_ratio", "fluency")
"""What :class:`emlens.coherence.Meter` reads."""


def recommend(
    margins: pd.DataFrame, damage: pd.DataFrame, toward: str = "lower", at_most: float = 1.5, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """A layer and strength chosen on one half of the questions, what it does on the other half, and what the same rule gives along random directions.

    The rule, fixed before looking: of the doses whose perplexity on unrelated text is at most ``at_most`` times the untouched model's, the one
    that moves the margin of the first half of the questions (every second of each category, by turns from its first and its second) furthest
    ``toward`` where it is wanted.

    Almost any push moves the margin, and the best of several doses more so: that ``low`` to ``high`` (over questions, given this direction)
    leave out 0 is what a random direction gives too. The same rule is therefore applied to every random direction, and ``p`` is the rank of the
    direction's estimate among theirs; a random direction for which the rule finds no dose counts as a change of 0.

    Args:
        margins: of :func:`steered_margins`: the arm ``direction``, and random ones by any other names; where some are called
            ``covariance-matched random directions …``, only they are the null (the others are lenient).
        damage: of the same arms and doses (``direction, layer, strength, perplexity_ratio``).

    Returns:
        ``layer, strength, chosen_on`` (mean change on the first half), ``estimate, low, high, n`` (on the second: bootstrap, whole categories),
        ``null_low, null_high`` (central ``level`` of the random directions' second halves), ``p`` (one-sided, by rank), ``p_floor``,
        ``controls``, ``null`` (in words), ``perplexity_ratio``, ``toward``, ``at_most``; ``layer`` None where no dose is mild enough, or none
        moves the margin that way. No random arms: NaN for band and p.

    Raises:
        ValueError: another ``toward``, or arms without damage.
    """
    if toward not in ("lower", "higher"):
        raise ValueError(f"toward={toward!r}; 'lower' or 'higher'")
    undamaged = sorted(set(margins["direction"]) - set(damage["direction"]))
    if undamaged:
        raise ValueError(f"{len(undamaged)} arms have no damage (e.g. {undamaged[0]!r}): read it for the same directions, layers and strengths")
    sign = -1.0 if toward == "lower" else 1.0
    arm, place = "direction", ["direction", "layer", "strength"]
    asked = margins[margins["strength"] != 0]
    questions = asked[asked[arm] == "direction"].drop_duplicates("id")
    turn = questions.groupby("category").cumcount() + pd.factorize(questions["category"])[0]
    first = asked["id"].isin(questions["id"][turn % 2 == 0])
    wanted = asked[first].groupby(place)["change"].mean() * sign
    ratio = damage.groupby(place)["perplexity_ratio"].mean().reindex(wanted.index)
    best = wanted[(ratio <= at_most) & (wanted > 0)].groupby(arm).idxmax()  # arm -> (arm, layer, strength)
    said: dict[str, Any] = {"toward": toward, "at_most": at_most, "layer": None}
    if "direction" not in best:
        return said
    _, layer, strength = dose = best["direction"]
    rest = asked[~first]
    each = rest.groupby(place)["change"].mean()
    own = rest[(rest[arm] == "direction") & (rest["layer"] == layer) & (rest["strength"] == strength)]
    low, high = stats.bootstrap_interval(own["change"].to_numpy(), clusters=_categories(own), level=level, seed=seed)
    others = [name for name in dict.fromkeys(asked[arm]) if name != "direction"]
    others = [name for name in others if name.startswith(MATCHED)] or others
    random = np.array([each[best[name]] if name in best else 0.0 for name in others])
    beside: dict[str, Any] = {"null_low": np.nan, "null_high": np.nan, "p": np.nan, "p_floor": np.nan}
    if others:
        ends = stats.null_band(random, level)
        beside = {
            "null_low": ends[0],
            "null_high": ends[1],
            "p": stats.permutation_p(sign * each[dose], sign * random),
            "p_floor": 1 / (len(others) + 1),
        }
    called = others[0].rpartition(" ")[0] if others else "none"
    return said | {
        "layer": int(layer), "strength": float(strength), "chosen_on": float(wanted[dose] * sign), "estimate": float(each[dose]),
        "low": float(low), "high": float(high), "n": len(own), **beside, "controls": len(others),
        "null": f"{called}: the same choice on the first half along each of {len(others)}; one-sided p by rank of the second half's change",
        "perplexity_ratio": float(ratio[dose]),
    }  # fmt: skip


def along(
    model: HookedModel, directions: Mapping[str, Direction], layers: Iterable[int], strengths: Iterable[float], measure: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """``measure()`` under every direction, layer and strength: its columns and ``direction`` (its name), ``layer, strength``."""
    rows = []
    for layer in layers:
        for strength in strengths:
            for name, direction in directions.items():
                with model.steer(direction, layer, strength) if strength else nullcontext():
                    rows.append(measure().assign(direction=name, layer=layer, strength=float(strength)))
    if not rows:
        raise ValueError("nothing to steer: give at least one layer, one strength and one direction")
    return pd.concat(rows, ignore_index=True)


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

    def measure() -> pd.DataFrame:
        now = model.margin(table, adapter=adapter, precision=precision) if model.edits else base
        return pd.DataFrame({"id": now["id"], "category": now.get("category", ""), "margin": now["margin"], "change": now["margin"] - base["margin"]})

    found = along(model, directions, layers, strengths, measure)
    return found[["direction", "layer", "strength", "id", "category", "margin", "change"]]


def random_means(margins: pd.DataFrame, value: str = "change") -> pd.DataFrame:
    """Mean change of each random direction: ``layer, strength, direction`` (its number), ``margin_change`` (for another ``value``, its name)."""
    drawn = margins[margins["direction"].str.startswith("random ")]
    means = drawn.groupby(["layer", "strength", "direction"], as_index=False)[value].mean()
    return means.assign(direction=means["direction"].str.removeprefix("random ").astype(int)).rename(columns={"change": "margin_change"})


def among_random(observed: float, random: Float[np.ndarray, " draws"], level: float = 0.95, method: str = "t") -> dict[str, float]:
    """Where a new random direction's value would fall, and how far out the observed one is: ``null_low, null_high, p`` (two-sided), ``rank_floor``.

    method:

    - ``"t"``, for changes of a margin: to first order the mean change under a direction is linear in it, so over directions uniform on the
      sphere of a few hundred dimensions it is Gaussian: t = (x − m) / (s √(1 + 1/N)) on N − 1 degrees of freedom. A rank among N directions
      could not go below ``rank_floor`` = 2 / (N + 1); p beyond it is an extrapolation.
    - ``"rank"``, for damage (KL, perplexity): of second order in the direction, hence skewed: beside twenty random directions, t gives one
      more of them p ≤ .001 in up to 2% of cases. The band is their central ``level``; the least p is in ``p_floor`` too.

    NaN for fewer than three directions, or values that are not finite.
    """
    if method not in ("t", "rank"):
        raise ValueError(f"method={method!r}; 't' (changes of a margin) or 'rank' (damage)")
    n = len(random)
    floor = 2 / (n + 1)
    out = {"null_low": np.nan, "null_high": np.nan, "p": np.nan, "rank_floor": floor} | ({"p_floor": floor} if method == "rank" else {})
    if n < 3 or not np.isfinite([observed, *random]).all():
        return out
    if method == "rank":
        low, high = stats.null_band(random, level)
        return out | {"null_low": low, "null_high": high, "p": stats.permutation_p(observed, random, "two-sided")}
    centre, spread = float(random.mean()), float(random.std(ddof=1)) * float(np.sqrt(1 + 1 / n))
    reach = float(scipy_stats.t.ppf((1 + level) / 2, n - 1)) * spread
    p = 2 * float(scipy_stats.t.sf(abs(observed - centre) / spread, n - 1)) if spread > 0 else np.nan
    return out | {"null_low": centre - reach, "null_high": centre + reach, "p": p}


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


def summarise(
    margins: pd.DataFrame, seed: int = 0, level: float = 0.95, drawn: str = UNIFORM, null: str = NULL, metric: str = "margin", value: str = "change"
) -> pd.DataFrame:
    """The table of :func:`steered_margins` as a Result, dose by dose: the direction's mean change beside the random directions'.

    ``drawn`` says where the random directions come from, for the words beside the numbers; ``metric`` what the column ``value`` is called: a
    margin is tested by t, damage (``METRICS``) by rank (:func:`among_random`).
    """
    method = "rank" if metric in METRICS else "t"
    means = random_means(margins, value).rename(columns={"margin_change": "change", value: "change"})
    rows: list[dict[str, Any]] = []
    for (layer, strength), own in margins[margins["direction"] == "direction"].groupby(["layer", "strength"]):
        others = means[(means["layer"] == layer) & (means["strength"] == strength)]["change"].to_numpy()
        each = own[value].dropna()
        low, high = stats.bootstrap_interval(each.to_numpy(), clusters=_categories(own), level=level, seed=seed) if len(each) else (np.nan, np.nan)
        row = {"layer": layer, "strength": strength, "metric": metric, "estimate": each.mean(), "low": low, "high": high, "n": len(each)}
        row["n_clusters"] = _n_categories(own)
        rows.append(row | ({"null": null, **among_random(row["estimate"], others, level, method)} if strength else {"null": null}))
    return stats.result(
        rows, ["layer", "strength"], what="change of the margin under steering, nats/token", correction="bh", seed=seed,
        null={null: _hypothesis(margins, drawn, (method,))}, interval=f"{level:.0%} bootstrap over questions, whole categories",
    )  # fmt: skip


def _categories(rows: pd.DataFrame) -> np.ndarray | None:
    return rows["category"].to_numpy() if rows["category"].astype(bool).all() else None


def _n_categories(rows: pd.DataFrame) -> float:
    return float(rows["category"].nunique()) if rows["category"].astype(bool).all() else np.nan


def _hypothesis(margins: pd.DataFrame, drawn: str, methods: tuple[str, ...] = ("t",)) -> str:
    n = int(margins.loc[margins["direction"] != "direction", "direction"].nunique())
    how = {
        "t": "of margins: band and two-sided p by Student's t for one more such direction: an extrapolation, for by rank among "
        f"{n} no p goes below {2 / (n + 1):.2g}",
        "rank": f"of damage, which is skewed: two-sided p by rank among the {n}, at least {2 / (n + 1):.2g}; the band is their central 95%",
    }
    said = f"the direction does what any direction of equal norm does: {n} random directions, {drawn}, at the same layers, strengths and questions; "
    return said + "; ".join(how[method] for method in methods)
