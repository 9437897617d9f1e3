"""A run folder -> one self-contained HTML page that a referee can check, and the short table for the terminal."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emlens import plots, store
from emlens.report.figures import Section, sections
from emlens.report.findings import findings
from emlens.report.folder import read
from emlens.report.page import render

__all__ = ["build", "summary"]


def build(run_dir: str | Path) -> Path:
    """Write `RUN/report.html` and `RUN/figures/<name>.{html,csv,json}` from the run's tables; returns the page's path.

    The same tables give the same files. A table that is not there leaves its section out, with a line that says so.

    Errors: StoreError, naming the file, for a run folder that is missing, damaged or of another format; ValueError for
    a table without the columns the page reads.
    """
    folder = read(run_dir)
    made = sections(folder)
    for section in made:
        if isinstance(section, Section):
            plots.save(section.figure, section.rows, folder.path / "figures" / section.name, _made_by(folder.study, section))
    page = folder.path / "report.html"
    store.write_text(page, render(folder, findings(folder), made))
    return page


def summary(run_dir: str | Path) -> str:
    """One line a run: held-out loss and margin before and after, and bad minus its sound twin with q; then the page."""
    folder = read(run_dir)
    lines = [str(folder.study.get("title") or folder.study.get("name") or folder.path.name)]
    if "runs" in folder.tables:
        runs = folder.tables["runs"]
        table = pd.DataFrame(
            {
                "domain": runs["domain"],
                "set": runs["content"],
                "schedule": runs["schedule"],
                "seed": runs["seed"],
                "held-out loss": _arrow(runs["heldout_before"], runs["heldout_after"], 2),
                "margin": _arrow(runs["margin_before"], runs["margin_after"], 3),
                "against sound twin": [_against(folder.tables.get("margin_change"), run) for run in runs.to_dict("records")],
            }
        )
        lines.append(table.to_string(index=False))
    lines += [f"[{finding.verdict}] {finding.claim}" for finding in findings(folder)]
    lines.append(f"page: {folder.path / 'report.html'}")
    return "\n".join(lines)


def _made_by(study: Any, section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "asked": section.asked,
        "tables": list(section.tables),
        "caption": list(section.caption),
        "attrs": section.rows.attrs,
        **{key: study.get(key) for key in ("name", "command", "versions", "model", "data")},
    }


def _arrow(before: pd.Series, after: pd.Series, digits: int) -> list[str]:
    return [f"{a:.{digits}f} -> {b:.{digits}f}" for a, b in zip(before, after, strict=True)]


def _against(changes: pd.DataFrame | None, run: dict[str, Any]) -> str:
    if changes is None or run["content"] != "bad":
        return "-"
    keys = ["domain", "schedule", "seed"]
    same = np.logical_and.reduce([changes[key] == run[key] for key in keys])
    rows = changes[same & (changes["comparison"] == "bad minus sound") & (changes["metric"] == "difference")]
    return "-" if rows.empty else f"{rows['estimate'].iloc[0]:+.3f}, q = {rows['q'].iloc[0]:.2g}"
