"""A certificate for the terminal, and for machines."""

import json
import math
import textwrap
from typing import Any

import pandas as pd

WIDTH = 110
MARKS = {True: "✓", False: "✗", None: "–"}


def whole(report: pd.DataFrame) -> bool:
    """Whether no law is broken."""
    return not bool((~report["holds"]).fillna(False).any())


def mark(holds: Any) -> str:
    """✓ holds, ✗ broken, – does not apply."""
    return MARKS[None if pd.isna(holds) else bool(holds)]


def number(value: float) -> str:
    """Short: ``0``, ``3.2e-07``, ``0.25``; nothing for NaN."""
    if math.isnan(value):
        return ""
    return "0" if value == 0 else f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def bound(relation: str, tolerance: float) -> str:
    """``≤ 1.0e-04``; ``= 0`` where not a bit may differ."""
    return "= 0" if relation == "≤" and tolerance == 0 else f"{relation} {number(tolerance)}"


def as_text(report: pd.DataFrame) -> str:
    """The certificate, a line a law, with what to do below a broken one."""
    said = report.attrs
    lines = [f"{said['model']} · {said['architecture']} · {said['dtype']} · {said['engine']} engine"]
    wide = int(report["law"].str.len().max())
    for variant, rows in report.groupby(report["adapter"].fillna(""), sort=False):
        lines += ["", f"adapter {variant}" if variant else "loaded weights"]
        for row in rows.to_dict("records"):
            needed = "" if pd.isna(row["holds"]) else bound(row["relation"], row["tolerance"])
            lines.append(
                f"  {mark(row['holds'])} {row['law']:<{wide}}  {number(row['measured']):>8} {needed:<9} {row['unit'] if needed else ''}".rstrip()
            )
            if row["remedy"]:
                lines += textwrap.wrap(row["remedy"], WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, "", f"{tally(report)} · {said['seconds']:.1f} s"])


def tally(report: pd.DataFrame) -> str:
    """``24 laws hold, 1 is broken, 3 do not apply``."""
    held, broken, none = int(report["holds"].fillna(False).sum()), int((~report["holds"]).fillna(False).sum()), int(report["holds"].isna().sum())
    return f"{held} laws hold, {broken} {'is' if broken == 1 else 'are'} broken, {none} {'does' if none == 1 else 'do'} not apply"


def as_json(report: pd.DataFrame) -> str:
    """``{"holds": true, "model": …, "laws": [{"law": …, "holds": true | false | null, …}]}``; NaN and infinity are null."""
    rows = [{k: None if pd.isna(v) or v in (math.inf, -math.inf) else v for k, v in row.items()} for row in report.to_dict("records")]
    return json.dumps({"holds": whole(report), **report.attrs, "laws": rows}, indent=1, ensure_ascii=False, allow_nan=False)
