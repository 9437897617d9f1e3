"""Names that callers give: one or several of those that are known, a column of a table, and which was meant."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import pandas as pd


def meant(name: Any, known: Iterable[Any], nearness: float = 0.6) -> str:
    """`` Did you mean 'this'?`` where a name comes as near to one of those that are known (difflib's ratio), else nothing."""
    names = {str(k).lower(): str(k) for k in known}
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=nearness)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def several(option: str, given: str | Sequence[str], known: Iterable[str] | None = None) -> tuple[str, ...]:
    """One name, or a sequence of them, as a tuple; ValueError for none, and for names that are not among the known ones."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if known is None:
        return names
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{option}={given!r}: unknown {unknown}; a name or a sequence of these is needed: {', '.join(known)}.{meant(unknown[0], known)}"
        )
    if not names:
        raise ValueError(f"{option}={given!r} names nothing; one or more of these are needed: {', '.join(known)}")
    return names


def column_of(table: pd.DataFrame, name: Any, option: str, way_out: str) -> pd.Series:
    """A column by its name; KeyError where it is not there (the nearest is named), TypeError for values in place of a name."""
    if not isinstance(name, str | int | tuple):
        raise TypeError(f"{option} is of type {type(name).__name__}; the name of a column of the facts is needed: {way_out}")
    if name not in table.columns:
        raise KeyError(f"no column {name!r} among the facts {list(table.columns)}: {way_out}.{meant(name, table.columns)}")
    return table[name]
