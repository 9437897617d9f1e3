"""Numbers as words: how an estimate, its interval and its corrected p are written, and what a finding is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

ALPHA = 0.05
Verdict = Literal["found", "not found", "mixed", "description"]
NATS = "nats/token"
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


def null_of(table: pd.DataFrame, name: str) -> str:
    """What the attrs of a Result say of a null, in one line."""
    told: Any = table.attrs.get("null", {})
    told = told.get(name, "") if isinstance(told, dict) else told
    if isinstance(told, dict):
        return "; ".join(f"{key} {value}" for key, value in told.items())
    return str(told)
