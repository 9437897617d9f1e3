"""The words under a figure: n, the test, its null and its correction, from the rows drawn and what their attrs say of them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from emlens import plots
from emlens.report.folder import Folder
from emlens.report.words import least, null_of

Drawn: TypeAlias = tuple[plots.Figure, pd.DataFrame, Sequence[str]]
"""A figure, the rows it draws, and the lines of its caption."""

_CORRECTIONS = {
    "bh": "Benjamini–Hochberg",
    "holm": "Holm",
    "bonferroni": "Bonferroni",
    "max-statistic": "the largest over the layers (max-statistic)",
}


def trained_on(folder: Folder, variants: pd.Series) -> pd.Series:
    """ "before", or what the run was trained on ("money-bad"), so that a run has one colour on the whole page."""
    if "runs" not in folder.tables:
        return variants
    runs = folder.tables["runs"].set_index("run")
    return variants.map(runs["domain"].astype(str) + "-" + runs["content"].astype(str)).fillna(variants)


def tested(rows: pd.DataFrame, unit: str, of_null: Mapping[str, str] | None = None) -> list[str]:
    """n, the test, its null and its correction, from the rows and what their attrs say of them; `of_null`: what each null is that of, in words."""
    attrs: dict[Any, Any] = rows.attrs
    method = str(attrs.get("correction", "an unnamed method"))
    nulls = [null for null in dict.fromkeys(rows["null"]) if null]
    within = f" in {span_of(rows['n_clusters'])} categories" if "n_clusters" in rows and rows["n_clusters"].notna().any() else ""
    lines = [f"n = {span_of(rows['n'])} {unit}{within}; {attrs.get('what', 'estimate')}; intervals: {attrs.get('interval') or 'not described'}."]
    named = {null: f"Null of {of_null[null]}" if of_null and null in of_null else f"Null, {null}" for null in nulls}
    lines += [f"{named[null]}: {null_of(rows, null) or 'not described'}." for null in nulls]
    told = attrs.get("family") or "all rows"
    family = ", ".join(told) if isinstance(told, list) else told
    lines.append(f"q is p corrected by {_CORRECTIONS.get(method, method)}; family: {family}; seed {attrs.get('seed', '–')}.")
    floors = sorted(set(rows["p_floor"].dropna())) if "p_floor" in rows else []
    if floors:
        lines.append(f"Least p that the draws allow: {' or '.join(least(floor) for floor in floors)}.")
    return lines


def span_of(values: pd.Series) -> str:
    """`96`, or `90 to 96`."""
    known = values.dropna()
    if known.empty:
        return "not given"
    low, high = int(known.min()), int(known.max())
    return str(low) if low == high else f"{low} to {high}"


def only_main(folder: Folder, content: str | None = None) -> str:
    shown, runs = len(folder.asked_runs(content)), len(folder.tables["runs"])
    return f"Drawn: {shown} of {runs} runs (linear, first seed); the others are in the tables." if shown < runs else ""
