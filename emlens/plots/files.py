"""A figure in a page: its legend as HTML that wraps on a phone, its three files, and plotly.js once."""

import copy
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from emlens.plots.style import CONFIG, FONT, LEGEND_HEIGHT

_BAR = 8
"""Width from which on a line is a bar."""
_DASHES = {
    "solid": "",
    "dash": "6 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}


def save(fig: go.Figure, rows: pd.DataFrame, stem: str | Path, made_by: Mapping[str, Any] | None = None) -> list[Path]:
    """Write `<stem>.html` (opens alone, offline), `<stem>.csv` (the rows drawn) and `<stem>.json` (what made it).

    `made_by` is JSON-serialisable; its `title`, if any, heads the page. None: what the rows themselves say (the `attrs` of a
    Result: method, seeds, nulls). Each file is complete or not there at all, and the same figure and rows give the same bytes.
    """
    made_by = dict(rows.attrs) if made_by is None else made_by
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    title = html.escape(str(made_by.get("title", stem.name)))
    body = embedded(fig).to_html(full_html=False, include_plotlyjs=False, config=CONFIG, div_id="figure")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>body{{font:14px/1.5 {FONT};margin:12px auto;padding:0 10px;max-width:1000px}}</style>"
        f"<script>{plotly_script()}</script></head><body><h1>{title}</h1>{body}{legend(fig)}</body></html>\n"
    )
    told = json.dumps(made_by, indent=1, ensure_ascii=False, default=str) + "\n"
    written = []
    for suffix, content in ((".html", page), (".csv", rows.to_csv(index=False)), (".json", told)):
        target = stem.with_name(stem.name + suffix)
        partial = target.with_name(f".{target.name}.tmp")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, target)
        written.append(target)
    return written


def embedded(fig: go.Figure) -> go.Figure:
    """The figure for a page that shows `legend(fig)` under it: without plotly's own legend, and as much lower."""
    bare = copy.deepcopy(fig)
    bare.update_layout(showlegend=False, height=fig.layout.height - LEGEND_HEIGHT, margin_b=46)
    return bare


def legend(fig: go.Figure) -> str:
    """The legend as HTML: one swatch and name for each trace that plotly's own legend would list."""
    items = []
    for trace in fig.data:
        if trace.type != "scatter" or not trace.name or trace.showlegend is False:
            continue
        items.append(
            '<span style="display:inline-block;max-width:100%;margin-right:1.1em"><svg width="30" height="12" aria-hidden="true" '
            f'style="vertical-align:-1px;margin-right:.35em">{_swatch(trace)}</svg>{trace.name}</span>'
        )
    inner = " ".join(items)
    return f'<div class="legend" style="font-size:13px;line-height:1.7;margin:0 0 .4em">{inner}</div>' if items else ""


def plotly_script() -> str:
    """plotly.js as text, to stand once in a page; nothing in it ends the script it is put in."""
    return get_plotlyjs().replace("</script", "<\\/script")


def _swatch(trace: go.Scatter) -> str:
    if trace.fill == "toself":
        return f'<rect x="1" y="1" width="28" height="10" fill="{trace.fillcolor}" stroke="{trace.line.color}"/>'
    drawn = ""
    colour = trace.line.color or trace.marker.color
    if "lines" in trace.mode and (trace.line.width or 0) > _BAR:
        return f'<rect x="1" y="1" width="28" height="10" fill="{colour}"/>'
    if trace.marker.symbol == "line-ns":
        return f'<path d="M15 0V12" stroke="{colour}" stroke-width="2"/>'
    if "lines" in trace.mode:
        dashes = _DASHES[trace.line.dash or "solid"]
        drawn += f'<path d="M1 6H29" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}" fill="none"/>'
    if "markers" in trace.mode:
        drawn += f'<circle cx="15" cy="6" r="3.5" fill="{trace.marker.color or colour}"/>'
    return drawn
