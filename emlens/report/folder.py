"""A study's run folder, read: `study.json` and the tables, checked once for what the page needs of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from emlens import store

_RESULT = ("metric", "estimate", "low", "high", "null", "null_low", "null_high", "p", "q", "n")
_RUN = ("run", "domain", "content", "schedule", "seed")
COLUMNS: dict[str, tuple[str, ...]] = {
    "runs": (
        *_RUN, "heldout_before", "heldout_after", "heldout_drop", "heldout_drop_low", "heldout_drop_high", "n_heldout", "margin_before",
        "margin_after",
    ),
    "training": (*_RUN, "step", "loss"),
    "checkpoints": (*_RUN, "step", "heldout_loss", "margin", "margin_low", "margin_high", "n"),
    "margins": ("variant", "id", "category", "question", "margin"),
    "margin_summary": ("variant", "mean", "sd", "share_below_zero", "n"),
    "margin_change": ("domain", "schedule", "seed", "comparison", *_RESULT),
    "answers": ("variant", "id", "question", "answer"),
    "shift_norms": ("run", "set", "layer", "relative"),
    "shift_agreement": ("kind", "layer", "metric", "estimate", "low", "high", "n", "pairs"),
    "overlap": ("domain", "layer", "comparison", *_RESULT),
    "similarity": ("run", "layer", "comparison", *_RESULT),
    "similarity_contrast": ("run", "other", "kind", "layer", "metric", "estimate", "low", "high", "n"),
    "overlap_similarity": ("run", "layer", *_RESULT),
    "prediction": ("run", "target", "features", "layer", *_RESULT),
    "direction": ("domain", "layer", *_RESULT),
    "projections": ("domain", "variant", "layer", "id", "projection"),
    "dose": ("domain", "layer", "strength", *_RESULT),
    "dose_slope": ("domain", "layer", *_RESULT),
    "dose_damage": ("domain", "layer", "strength", *_RESULT),
    "traits": ("run", "persona", "layer", *_RESULT),
    "dose_random": ("layer", "strength", "direction", "margin_change"),
    "certificate": ("law", "adapter", "holds", "measured", "relation", "tolerance", "unit", "remedy"),
    "pieces": ("piece", "seconds"),
}  # fmt: skip
"""The tables the page knows, each with the columns it reads; a table may have more, and any may be missing."""


@dataclass(frozen=True)
class Folder:
    """A run folder: `study` as written, `tables` by name (those that are there and have rows)."""

    path: Path
    study: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]

    @property
    def history(self) -> list[Mapping[str, Any]]:
        """Every run of this folder that ended, the last one last; a `study.json` without a history tells of its last run."""
        return list(self.study.get("history") or [self.study])

    def missing(self, *names: str) -> list[str]:
        """Which of these tables are not there."""
        return [name for name in names if name not in self.tables]

    def estimates(self, name: str) -> pd.DataFrame:
        """The rows of a table of estimates that have one."""
        return self.tables[name].dropna(subset=["estimate"])

    def main_runs(self, content: str | None = None) -> list[str]:
        """One run per domain and content: linear before other schedules, the lowest seed first."""
        runs = self.tables["runs"]
        runs = runs if content is None else runs[runs["content"] == content]
        order = runs.assign(other=runs["schedule"] != "linear", place=range(len(runs))).sort_values(["other", "seed"])
        return list(order.drop_duplicates(["domain", "content"]).sort_values("place")["run"])

    def asked_runs(self, content: str | None = "bad") -> list[str]:
        """The main runs of this content; all main runs where there is none."""
        return self.main_runs(content) or self.main_runs()

    def with_runs(self, table: str) -> pd.DataFrame:
        """A table with facts of its runs beside it: `trained on` ("money-bad"), `variation` ("linear seed 0")."""
        frame = self.tables[table]
        runs = self.tables["runs"].set_index("run")
        trained_on = runs["domain"].astype(str) + "-" + runs["content"].astype(str)
        variation = runs["schedule"].astype(str) + " seed " + runs["seed"].astype(str)
        facts = {
            "trained on": frame["run"].map(trained_on).fillna(frame["run"]),
            "variation": frame["run"].map(variation).fillna(""),
        }
        return frame.assign(**facts)


def read(run_dir: str | Path) -> Folder:
    """Read a run folder.

    Errors: StoreError (naming the file) when study.json is missing, damaged or of another format, or a table is
    damaged; ValueError when a table lacks columns that the page reads.
    """
    path = Path(run_dir)
    study = store.read_json(path / "study.json")
    found = study.get("format") if isinstance(study, dict) else None
    if found != store.FORMAT:
        raise store.StoreError(
            f"{path / 'study.json'} is in format {found!r}; this emlens reads format {store.FORMAT}. "
            "Use the emlens that wrote it, or run the study again into a new folder."
        )
    tables = {}
    for name, columns in COLUMNS.items():
        file = path / "tables" / f"{name}.parquet"
        if not file.exists():
            continue
        frame = store.read_table(file)
        lacking = [column for column in columns if column not in frame]
        if lacking:
            raise ValueError(
                f"{file} lacks the columns {lacking} (it has {list(frame.columns)}): was it written by another version? Run the study again."
            )
        if len(frame):
            tables[name] = frame
    return Folder(path, study, tables)
