"""Numbers as words: how an estimate, its interval and its corrected p are written, and what a finding is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

ALPHA = 0.05
Verdict = Literal["found", "not found", "mixed", "description", "no answer"]
NATS = "nats/token"
ACTIVATIONS, RANDOM_TWIN, AFTER = "activations", "random twin", "after: "
"""Names in the table of prediction: the rows in question, the control, and what the name of a rival begins with that is known only once another
tuning was made."""
BEYOND_TEXT, BEYOND_BOTH = "delta_r2 beyond text", "delta_r2 beyond text and the margin before"
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Finding:
    """What the page says first: a verdict, one sentence, the numbers it comes from line by line, and where to look."""

    topic: str
    verdict: Verdict
    claim: str
    evidence: tuple[str, ...]
    section: str


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign; never "−0.00"; "–" where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def estimate(row: pd.Series, digits: int = 2, unit: str = "") -> str:
    """`0.01 [−0.02, 0.04] nats/token`; without an interval when the row has none."""
    text = number(row["estimate"], digits)
    if math.isfinite(row["low"]) and math.isfinite(row["high"]):
        text += f" [{number(row['low'], digits)}, {number(row['high'], digits)}]"
    return f"{text} {unit}".strip()


def corrected(q: float) -> str:
    """`q = .041`, `q < .001`; says so where there is none."""
    if q is None or not math.isfinite(q):
        return "q not given"
    if q < 0.001:
        return "q < .001"
    rounded = f"{q:.{2 if q >= 0.1 else 3}f}"
    if q < ALPHA <= float(rounded):
        return f"q just under {ALPHA:g}".replace("0.", ".")
    return f"q = {rounded.lstrip('0')}"


def q_said(row: pd.Series) -> str:
    """`q = .041`; where p is as small as its draws allow, `q ≤ .013 (p at its floor, .002)`."""
    text, floor = corrected(row["q"]), row.get("p_floor", math.nan)
    if floor is None or not math.isfinite(floor) or not row["p"] <= floor * (1 + 1e-9):
        return text
    return f"{text.replace('q = ', 'q ≤ ')} (p at its floor, {least(floor)})"


def least(p: float) -> str:
    """`.0078`."""
    return f"{p:.2g}".removeprefix("0")


def sample(row: pd.Series, unit: str) -> str:
    """`n = 96 questions in 8 categories` (the clusters only where the row has them)."""
    text = f"n = {int(row['n'])} {unit}" if math.isfinite(row["n"]) else "n not given"
    clusters = row.get("n_clusters", math.nan)
    return f"{text} in {int(clusters)} categories" if clusters is not None and math.isfinite(clusters) else text


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def count(n: int) -> str:
    return _COUNTS[n] if 0 <= n < len(_COUNTS) else str(n)


def plural(word: str, n: int) -> str:
    return word if n == 1 else f"{word}s"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def of_all(states: Sequence[bool]) -> Verdict:
    """All true: found. All false: not found. Anything between: mixed."""
    return "found" if all(states) and states else "mixed" if any(states) else "not found"


def above(rows: pd.DataFrame) -> pd.Series:
    """Where q < alpha and the estimate lies above the middle of its null."""
    return (rows["q"] < ALPHA) & (rows["estimate"] > middle_of_null(rows))


def below(rows: pd.DataFrame) -> pd.Series:
    """Where q < alpha and the estimate lies below the middle of its null: the opposite of what was asked."""
    return (rows["q"] < ALPHA) & (rows["estimate"] < middle_of_null(rows))


def middle_of_null(rows: pd.DataFrame) -> pd.Series:
    return ((rows["null_low"] + rows["null_high"]) / 2).fillna(0)


def level(rows: pd.DataFrame) -> str:
    """In how many layers the estimate is above its null: "most" (more than half), "some", "none"."""
    share = above(rows).mean()
    return "most" if share > 0.5 else "some" if share > 0 else "none"


def of_levels(levels: Sequence[str]) -> Verdict:
    if set(levels) == {"most"}:
        return "found"
    return "not found" if set(levels) == {"none"} else "mixed"


def one_null(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of this null; of the first null there is, where it is not among them."""
    nulls = list(dict.fromkeys(table["null"]))
    return table[table["null"] == (name if name in nulls else nulls[0])]


def along(rows: pd.DataFrame, digits: int = 2, unit: str = "questions") -> str:
    """A profile over layers in words: its middle, its null, how many layers pass on which side, the strongest."""
    opposite = below(rows)
    turned = opposite.sum() > above(rows).sum()
    top = rows.loc[rows["estimate"].idxmin() if turned else rows["estimate"].idxmax()]
    null = ""
    if rows["null_low"].notna().any():
        null = f" (null {number(rows['null_low'].median(), digits)} to {number(rows['null_high'].median(), digits)})"
    against = f", on the opposite side in {int(opposite.sum())}" if opposite.any() else ""
    return (
        f"median over layers {number(rows['estimate'].median(), digits)}{null}, "
        f"q < .05 in {int(above(rows).sum())} of {len(rows)}{against}; {'lowest' if turned else 'highest'} at layer {int(top['layer'])}: "
        f"{estimate(top, digits)}, {q_said(top)}, {sample(top, unit)}"
    )


def in_layers(rows: pd.DataFrame, passed: pd.Series) -> str:
    """`3 of 30 layers`."""
    return f"{int(passed.sum())} of {len(rows)} layers"


def null_of(table: pd.DataFrame, name: str) -> str:
    """What the attrs of a Result say of a null, in one line."""
    told: Any = table.attrs.get("null", {})
    told = told.get(name, "") if isinstance(told, dict) else told
    if isinstance(told, dict):
        return "; ".join(f"{key} {value}" for key, value in told.items())
    return str(told)
