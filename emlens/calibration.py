"""How often does each null of an overlap reject, and where should it? Simulated worlds, one hypothesis each.

Every population is normal with a power-law spectrum in axes of its own, and half of its variance lies in axes that all text has in
common: subspaces overlap long before one set has anything to do with another. `rejection_rates` makes the table that shows why the
"isotropic" null is weak, at sizes of your choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .activations import Activations
from .geometry import overlap

WORLDS: dict[str, tuple[str, float | None]] = {
    "random subspace": ("b fills axes drawn at random: the hypothesis of 'isotropic'", None),
    "reference": ("b is of the reference population, which shares common axes with a: the hypothesis of 'covariance' and of an Activations", 0.0),
    "shared 0.1": ("a tenth of b's variance is as a's, the rest as the reference's", 0.1),
    "shared 0.2": ("a fifth of b's variance is as a's, the rest as the reference's", 0.2),
    "shared 0.4": ("two fifths of b's variance are as a's, the rest as the reference's", 0.4),
    "same population": ("b is of a's population: the hypothesis of 'labels'", 1.0),
}
"""World -> what holds there, and the share of b's variance that is as a's (None: b has axes of its own)."""

NULLS = ("isotropic", "covariance", "reference", "labels")
_AT_ONCE = 20  # worlds simulated as the layers of one Activations; they share the random numbers of the draws


def simulated(
    world: str, n: int, n_a: int, n_b: int, n_reference: int, d_model: int, power: float, seed: int
) -> tuple[Activations, Activations, Activations]:
    """a, b and a separate reference set in `n` independent copies of a world, as layers; copy i is of seed + i."""
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; choose one of {', '.join(WORLDS)}")
    share, spread = WORLDS[world][1], np.arange(1, d_model + 1) ** -(power / 2)

    def copy(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        common, of_a, of_reference, of_b = np.linalg.qr(rng.standard_normal((4, d_model, d_model)))[0]

        def rows(count: int, axes: np.ndarray) -> np.ndarray:
            return (rng.standard_normal((count, d_model)) * spread) @ axes

        def text(count: int, axes: np.ndarray) -> np.ndarray:
            return (rows(count, common) + rows(count, axes)) / np.sqrt(2)

        b = rows(n_b, of_b) if share is None else np.sqrt(1 - share) * text(n_b, of_reference) + np.sqrt(share) * text(n_b, of_a)
        return text(n_a, of_a), b, text(n_reference, of_reference)

    stacked = zip(("a", "b", "reference"), zip(*(copy(seed + i) for i in range(n)), strict=True), strict=True)
    a, b, reference = (Activations.from_array(np.stack(each, axis=1), {"id": [f"{name}{i}" for i in range(len(each[0]))]}) for name, each in stacked)
    return a, b, reference


def p_values(
    world: str,
    n_seeds: int = 500,
    nulls: Sequence[str] = NULLS,
    n_a: int = 60,
    n_b: int = 40,
    n_reference: int = 160,
    d_model: int = 30,
    k: int = 3,
    power: float = 2.0,
    n_draws: int = 199,
    measure: str = "mean_cos2",
    seed: int = 0,
) -> pd.DataFrame:
    """p of every null in `n_seeds` copies of a world, of the seeds from `seed` on: a column each ("reference" is the reference set
    given as an Activations)."""
    parts = []
    for start in range(0, n_seeds, _AT_ONCE):
        n = min(_AT_ONCE, n_seeds - start)
        a, b, reference = simulated(world, n, n_a, n_b, n_reference, d_model, power, seed + start)
        asked: list[Any] = [reference if name == "reference" else name for name in nulls]
        separate = reference if "covariance" in nulls else None
        table = overlap(a, b, k, asked, n_draws, n_splits=0, seed=seed + start, measure=measure, reference=separate)
        parts.append(table.pivot(index="layer", columns="null", values="p")[list(nulls)])
    return pd.concat(parts, ignore_index=True)


def rejection_rates(worlds: Sequence[str] = tuple(WORLDS), n_seeds: int = 500, level: float = 0.05, **settings: Any) -> pd.DataFrame:
    """The share of copies of each world in which each null rejects at `level`: a row a world, a column a null.

    settings: of `p_values` (the sizes of the sets, d_model, k, the power of the spectrum, draws). At a null's own hypothesis the
    rate is `level`; elsewhere it is power, or what the null does not ask.

    At the default sizes, seeds 0 to 499: own hypotheses 0.050 (isotropic), 0.056 (covariance), 0.054 (reference), 0.036 (labels). Power
    where a tenth, a fifth and two fifths of the variance are a's: covariance 0.18, 0.44, 0.82, an Activations 0.19, 0.49, 0.91;
    "isotropic" rejects all of it, and the reference population itself, every time.
    """
    rates = {world: (p_values(world, n_seeds, **settings) <= level).mean() for world in worlds}
    return pd.DataFrame(rates).T.rename_axis(index="world", columns="null")
