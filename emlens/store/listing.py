"""What a store or a run folder keeps: which entry is which, without reading any of them."""

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from .entries import MANIFEST, PARTIAL, read_manifest, told
from .files import StoreError, read_json

PIECES = "pieces.parquet"
COLUMNS = ("entry", "kind", "piece", "adapter", "model", "place", "megabytes", "when", "whole")


def kept(folder: str | os.PathLike) -> pd.DataFrame:
    """Every entry below a folder (of recordings, of a study's run, or one that holds such): one row each, the latest last.

    Columns: ``entry`` (its path in the folder), ``kind`` (activations, finetune, margins, …), ``piece`` (what a study calls it), ``adapter``
    (the run or adapter that was on, ``before`` for none), ``model``, ``place``, ``megabytes``, ``when`` (it was finished), ``whole`` (False of one
    that is being written, or was left). ``em.Activations.load(folder / entry)`` opens one of kind activations.

    Raises:
        StoreError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder: {'it is a file' if root.exists() else 'nothing is there'}.")
    called = _labels(root)
    rows = [_row(path.parent, root, called) for path in sorted(root.rglob(MANIFEST), key=lambda path: (path.stat().st_mtime_ns, path))]
    runs = {Path(row["entry"]).name: str(row["piece"]).removeprefix("tune ") for row in rows if row["kind"] == "finetune" and row["piece"]}
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["adapter"] = table["adapter"].map(lambda name: runs.get(name, name))  # a study's tables name a tuning by its key
    return table


def _labels(root: Path) -> dict[str, str]:
    """``{key: piece}`` of the studies below a folder (or whose pieces it is): a manifest of the maker's own does not say."""
    lists = [*root.rglob(f"tables/{PIECES}"), root.parent / "tables" / PIECES]
    tables = [pd.read_parquet(path, columns=["key", "piece"]) for path in lists if path.is_file()]
    return {key: piece for table in tables for key, piece in zip(table["key"], table["piece"], strict=True)}


def _row(entry: Path, root: Path, called: Mapping[str, str]) -> dict[str, Any]:
    inside = entry.relative_to(root).as_posix()
    when = datetime.fromtimestamp((entry / MANIFEST).stat().st_mtime).replace(microsecond=0)
    row: dict[str, Any] = {"entry": inside, "kind": "damaged, or not ours", "when": when, "whole": not entry.name.endswith(PARTIAL)}
    try:
        manifest = read_manifest(entry)
    except StoreError:
        return row | {"piece": "", "adapter": "", "model": "", "place": "", "megabytes": float("nan"), "whole": False}
    clock = entry.with_name(f"{entry.name}.json")  # beside a piece of a study that has not come to its end
    label = called.get(entry.name) or (read_json(clock).get("piece") if clock.is_file() else None)
    made_by = {**({"piece": label} if label else {}), **manifest["made_by"]}
    return row | told(made_by, entry.name) | {"megabytes": round(sum(f["bytes"] for f in manifest["files"].values()) / 1e6, 3)}


def refuse_store(folder: str | os.PathLike, kind: str) -> None:
    """StoreError for a folder that is no entry itself but holds some; those of the kind asked for are named."""
    root = Path(folder)
    if not root.is_dir() or (root / MANIFEST).exists():
        return
    found = kept(root)
    if found.empty:
        return
    ours = found[(found["kind"] == kind) & found["whole"]]
    named = [f"{root / row['entry']} ({_which(row)})" for row in ours.head(4).to_dict("records")]
    more = f"; and {len(ours) - 4} more" if len(ours) > 4 else ""
    which = f"Name one of its {len(ours)} {kind}: {'; '.join(named)}{more}." if named else f"None of them is {kind}."
    raise StoreError(f"{root} is a folder of {len(found)} entries, not one itself. {which} em.store.kept({str(root)!r}) lists all of them.")


def _which(row: Mapping[str, Any]) -> str:
    return " · ".join(part for part in (row["piece"] or row["adapter"], row["place"]) if part)
