"""A Result as a reader wants it: what varies, the estimate with its interval, its null and q, narrow enough for a terminal."""

import math

import pandas as pd


def telling_keys(result: pd.DataFrame) -> list[str]:
    """The keys (the columns before `metric`) and the metric that have several values, and the null where these do not tell rows apart."""
    keys = [*result.columns[: result.columns.get_loc("metric")], "metric"]
    varying = [key for key in keys if result[key].nunique() > 1]
    return [*varying, *(["null"] if "null" in result and result.duplicated(keys).any() else [])]


def summary(result: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """A Result to be read: one line a row, in few columns; for numbers to go on with, take the Result itself.

    result   as `em.predict`, `em.compare_scores`, `em.overlap` and the other analyses give it, or some rows of one.
    digits   significant ones of the largest estimate of each metric; the others have as many decimals.

    Returns a frame of text, indexed by the keys with several values and the metric: `estimate` as "0.31 [0.12, 0.44]",
    `of nothing` as "-0.05 to 0.11" (what the null gives; of `em.predict` what its best row does), `q`, and `n` where it
    varies. `.attrs` are those of the Result, with the values of what does not vary in "same".

    Errors: KeyError for a table that is no Result.
    """
    missing = [name for name in ("metric", "estimate") if name not in result]
    if missing:
        raise KeyError(f"a Result has the columns metric and estimate; not there: {missing}; the table has {list(result.columns)}")
    keys = telling_keys(result)
    known = result.reindex(columns=["estimate", "low", "high", "null_low", "null_high", "best_null_low", "best_null_high", "q", "n"])
    null = known[["best_null_low", "best_null_high"]] if "best_null_low" in result else known[["null_low", "null_high"]]
    decimals = known["estimate"].abs().groupby(result["metric"]).transform("max").map(lambda largest: _decimals(largest, digits))
    shown = result[keys].copy()
    intervals = [_span(low, high, ", ", d) for low, high, d in zip(known["low"], known["high"], decimals, strict=True)]
    estimates = [_number(value, d) for value, d in zip(known["estimate"], decimals, strict=True)]
    shown["estimate"] = [f"{estimate} [{interval}]" if interval else estimate for estimate, interval in zip(estimates, intervals, strict=True)]
    if null.notna().any(axis=None):
        shown["of nothing"] = [_span(low, high, " to ", d) for (low, high), d in zip(null.itertuples(index=False), decimals, strict=True)]
    if known["q"].notna().any():
        shown["q"] = ["" if math.isnan(q) else f"{q:.2g}" for q in known["q"]]
    if known["n"].nunique() > 1:
        shown["n"] = result["n"]
    same = [name for name in (*result.columns[: result.columns.get_loc("metric")], "metric", "n") if name in result and result[name].nunique() == 1]
    shown = shown.set_index(keys) if keys else shown.reset_index(drop=True)
    shown.attrs = {**result.attrs, "same": {name: result[name].iloc[:1].tolist()[0] for name in same}}
    return shown


def _decimals(largest: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(largest))) if math.isfinite(largest) and largest > 0 else digits


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}"


def _span(low: float, high: float, between: str, decimals: int) -> str:
    """Both ends, nothing where there is none."""
    return f"{_number(low, decimals)}{between}{_number(high, decimals)}" if math.isfinite(low) and math.isfinite(high) else ""
