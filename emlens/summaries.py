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
    digits   significant ones.

    Returns a frame of text, index as in `result`: the keys with several values and the metric, then `estimate` as
    "0.31 [0.12, 0.44]", `of nothing` as "-0.05 to 0.11" (what the null gives; of `em.predict` what its best row does), `q`,
    and `n` and `ceiling` where they vary. `.attrs` are those of the Result, with the values of what does not vary in "same".

    Errors: KeyError for a table that is no Result.
    """
    missing = [name for name in ("metric", "estimate") if name not in result]
    if missing:
        raise KeyError(f"a Result has the columns metric and estimate; not there: {missing}; the table has {list(result.columns)}")
    keys = telling_keys(result)
    known = result.reindex(columns=["estimate", "low", "high", "null_low", "null_high", "best_null_low", "best_null_high", "q", "n", "ceiling"])
    null = known[["best_null_low", "best_null_high"]] if "best_null_low" in result else known[["null_low", "null_high"]]
    shown = result[keys].copy()
    spans = [_span(low, high, ", ", digits) for low, high in zip(known["low"], known["high"], strict=True)]
    shown["estimate"] = [_number(value, digits) + (f" [{span}]" if span else "") for value, span in zip(known["estimate"], spans, strict=True)]
    if null.notna().any(axis=None):
        shown["of nothing"] = [_span(low, high, " to ", digits) for low, high in null.itertuples(index=False)]
    if known["q"].notna().any():
        shown["q"] = ["" if math.isnan(q) else f"{q:.2g}" for q in known["q"]]
    for name in ("n", "ceiling"):
        if known[name].nunique() > 1:
            shown[name] = result[name]
    same = [*result.columns[: result.columns.get_loc("metric")], "metric", "n", "ceiling"]
    told = {name: result[name].iloc[:1].tolist()[0] for name in same if name in result and result[name].nunique() == 1}
    shown.attrs = {**result.attrs, "same": told}
    return shown


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}g}"


def _span(low: float, high: float, between: str, digits: int) -> str:
    """Both ends, nothing where there is none."""
    return f"{_number(low, digits)}{between}{_number(high, digits)}" if math.isfinite(low) and math.isfinite(high) else ""
