"""The look of every figure: colours, panels, lines, bands, legends. Draws the rows that come and computes nothing."""

import html
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.summaries import telling_keys

REDS = ("#b2182b", "#e8704f", "#7f0f1f", "#f4a582")
BLUES = ("#2166ac", "#56a0d3", "#0b3c6f", "#92c5de")
OTHERS = ("#5e3c99", "#c77400", "#1b7837", "#8c510a", "#01665e", "#b35c9e")
GREY = "#767676"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
LEGEND_HEIGHT = 50
CONFIG: dict[str, Any] = {"responsive": True, "displaylogo": False, "displayModeBar": False}
_AXIS = {"gridcolor": "#e8e8e8", "zerolinecolor": "#bdbdbd", "linecolor": "#bdbdbd", "automargin": True}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": "#222222"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(OTHERS),
        "xaxis": {**_AXIS, "zeroline": False, "title": {"standoff": 8}},
        "yaxis": {**_AXIS, "title": {"standoff": 6}},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "margin": {"l": 56, "r": 14, "t": 34, "b": 56},
        "hoverlabel": {"align": "left", "font": {"size": 13}},
        "hovermode": "closest",
    }
)


def palette(labels: Iterable[object]) -> dict[str, str]:
    """A colour per label: `bad` red, `sound` blue, `before`, `null` and `random` grey, any other by its order.

    A label that names both contents ("bad minus sound") is neither, and takes its turn among the others.
    """
    turns = {"red": iter(REDS * 20), "blue": iter(BLUES * 20), "other": iter(OTHERS * 20)}
    colours: dict[str, str] = {}
    for label in dict.fromkeys(str(each) for each in labels):
        bad, sound = "bad" in label, "sound" in label
        if bad != sound:
            colours[label] = next(turns["red" if bad else "blue"])
        elif not bad and any(word in label for word in ("before", "null", "random")):
            colours[label] = GREY
        else:
            colours[label] = next(turns["other"])
    return colours


@dataclass
class Panel:
    """One panel of a figure, to draw on; `listed` holds the names the legend already has."""

    fig: go.Figure
    row: int
    listed: set[str]

    def new(self, name: str) -> bool:
        """Whether the legend still lacks this name; from now on it has it."""
        there = name in self.listed
        self.listed.add(name)
        return bool(name) and not there

    def add(self, trace: Any) -> None:
        self.fig.add_trace(trace, row=self.row, col=1)

    def level(self, y: float) -> None:
        """A thin level line across the panel."""
        self.fig.add_hline(y=y, line={"color": "#9a9a9a", "width": 1}, row=self.row, col=1)

    def line(self, x: Any, y: Any, name: str, colour: str, dash: str = "solid", mode: str = "lines", faint: bool = False) -> None:
        """A plain line; a faint one is thin and stands in the legend only with its full twin."""
        self.add(
            go.Scatter(
                x=x,
                y=y,
                mode=mode,
                name=safe(name),
                legendgroup=name,
                showlegend=not faint and self.new(name),
                line={"color": colour, "dash": dash, "width": 0.8 if faint else 2},
                opacity=0.35 if faint else 1,
            )
        )

    def band(self, x: Any, low: Any, high: Any, fill: str, group: str, name: str = "", edge: str | None = None) -> None:
        """A filled band from low to high where both are there; with a name it stands in the legend."""
        table = pd.DataFrame({"x": list(x), "low": list(low), "high": list(high)}).dropna()
        if table.empty:
            return
        self.add(
            go.Scatter(
                x=[*table["x"], *table["x"][::-1]],
                y=[*table["high"], *table["low"][::-1]],
                fill="toself",
                fillcolor=fill,
                line={"width": 0.8 if edge else 0, "color": edge or fill},
                mode="lines",
                hoverinfo="skip",
                name=safe(name),
                legendgroup=group,
                showlegend=bool(name),
            )
        )

    def nulls(self, series: Sequence[tuple[tuple[str, str], pd.DataFrame]], x: str) -> None:
        """The grey band of every null that the rows of each series name; many bands share one depth of grey."""
        for _, rows in series:
            if not {"null", "null_low", "null_high"} <= set(rows):
                continue
            for null, one in rows.dropna(subset=["null_low", "null_high"]).groupby("null", sort=False):
                one = one.drop_duplicates(x).sort_values(x)
                name = f"null: {null}"
                shown = name if self.new(name) else ""
                self.band(
                    one[x],
                    one["null_low"],
                    one["null_high"],
                    rgba(GREY, 0.45 / (len(series) + 0.4)),
                    name,
                    shown,
                    rgba(GREY, 0.5),
                )

    def bundle(self, rows: pd.DataFrame, each: Sequence[str], x: str, y: str, name: str) -> None:
        """Many thin grey lines as one trace, one line for each value of the `each` columns."""
        xs: list[float | None] = []
        ys: list[float | None] = []
        for _, one in rows.groupby(list(each), sort=False):
            xs += [*one[x], None]
            ys += [*one[y], None]
        line = {"color": rgba(GREY, 0.35), "width": 0.8}
        shown = self.new(name)
        self.add(go.Scatter(x=xs, y=ys, mode="lines", line=line, name=safe(name), showlegend=shown, hoverinfo="skip"))

    def estimate(self, rows: pd.DataFrame, x: str, name: str, colour: str, dash: str, alpha: float) -> None:
        """The estimate as a line with points (filled where q < alpha) and its interval as a band."""
        rows = rows.drop_duplicates(x).sort_values(x)
        if {"low", "high"} <= set(rows):
            self.band(rows[x], rows["low"], rows["high"], rgba(colour, 0.16), name)
        self.add(
            go.Scatter(
                x=rows[x],
                y=rows["estimate"],
                mode="lines+markers",
                name=safe(name),
                legendgroup=name,
                showlegend=self.new(name),
                line={"color": colour, "dash": dash, "width": 2},
                marker={"symbol": symbols(rows, alpha), "size": 6, "line": {"width": 1.3, "color": colour}},
                text=hovers(rows),
                hovertemplate=f"{safe(name)}<br>{x} %{{x}}<br>%{{text}}<extra></extra>",
            )
        )

    def points(self, rows: pd.DataFrame, lines: Sequence[str], name: str, colour: str, alpha: float, lowest: float | None = None) -> None:
        """One estimate a line with its interval; below `lowest` an arrow at the edge."""
        cut = rows["estimate"] < (-float("inf") if lowest is None else lowest)
        x = rows["estimate"].mask(cut, lowest)
        low = rows["low"] if lowest is None else rows["low"].clip(lower=lowest)
        self.add(
            go.Scatter(
                x=x,
                y=lines,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["high"] - x).clip(lower=0),
                    "arrayminus": (x - low).clip(lower=0),
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                name=safe(name),
                legendgroup=name,
                showlegend=self.new(name),
                marker={
                    "color": colour,
                    "size": 10,
                    "symbol": ["triangle-left" if out else symbol for out, symbol in zip(cut, symbols(rows, alpha), strict=True)],
                    "line": {"width": 2, "color": colour},
                },
                text=hovers(rows),
                hovertemplate="%{y}<br>%{text}<extra></extra>",
            )
        )

    def bars(self, rows: pd.DataFrame, lines: Sequence[str], lowest: float | None = None) -> None:
        """The null band of every line as a grey bar."""
        if not {"null_low", "null_high"} <= set(rows):
            return
        ends: list[tuple[float | None, str | None]] = []
        for line, low, high in zip(lines, rows["null_low"], rows["null_high"], strict=True):
            if low <= high and not (lowest is not None and high < lowest):
                ends += [(low if lowest is None else max(low, lowest), line), (high, line), (None, None)]
        x, y = [end for end, _ in ends], [line for _, line in ends]
        bar = {"color": rgba(GREY, 0.35), "width": 13}
        shown = bool(ends) and self.new("null")
        self.add(go.Scatter(x=x, y=y, mode="lines", line=bar, name="null", legendgroup="null", showlegend=shown, hoverinfo="skip"))

    def strokes(self, rows: pd.DataFrame, lines: Sequence[str]) -> None:
        """The ceiling of every line that has one as an upright stroke."""
        known = rows["ceiling"].notna() if "ceiling" in rows else pd.Series(False, rows.index)
        if known.any():
            marker = {"symbol": "line-ns", "size": 20, "color": "#111111", "line": {"width": 2, "color": "#111111"}}
            y = [line for line, there in zip(lines, known, strict=True) if there]
            hover = "%{y}<br>ceiling %{x:.3f}<extra></extra>"
            ends = {"x": rows.loc[known, "ceiling"], "y": y, "mode": "markers", "marker": marker, "hovertemplate": hover}
            self.add(go.Scatter(**ends, name="ceiling", legendgroup="ceiling", showlegend=self.new("ceiling")))


def stack(titles: Sequence[str], x_title: str, y_titles: Sequence[str], height: int | Sequence[int] = 230) -> tuple[go.Figure, list[Panel]]:
    """An empty figure of panels one under another with one x axis (so they stay readable on a phone); `height` of each, or of all."""
    n = len(titles)
    top, bottom = (34 if any(titles) else 10), 56 + LEGEND_HEIGHT
    heights = [height] * n if isinstance(height, int) else list(height)
    tall = top + sum(heights) + (n - 1) * 45 + bottom
    fig = make_subplots(
        rows=n,
        cols=1,
        shared_xaxes=True,
        subplot_titles=[safe(title) for title in titles] if any(titles) else None,
        row_heights=heights,
        vertical_spacing=45 / (tall - top - bottom) if n > 1 else 0,
    )
    fig.update_layout(template=TEMPLATE, autosize=True, height=tall, margin={"t": top, "b": bottom})
    fig.update_annotations(x=0, xanchor="left", font={"size": 14})
    for row, title in enumerate(y_titles, start=1):
        fig.update_yaxes(title_text=safe(title), row=row, col=1)
    fig.update_xaxes(title_text=safe(x_title), row=n, col=1)
    listed: set[str] = set()
    return fig, [Panel(fig, row, listed) for row in range(1, n + 1)]


def facets(rows: pd.DataFrame, facet: str | None) -> dict[str, pd.DataFrame]:
    """The rows of each panel by its title, in the order they come."""
    if facet is None:
        return {"": rows}
    word = f"{facet} " if pd.api.types.is_numeric_dtype(rows[facet]) else ""
    return {f"{word}{value}": rows[rows[facet] == value] for value in dict.fromkeys(rows[facet])}


def series(rows: pd.DataFrame, color: str | None, dash: str | None) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    keys = [key for key in (color, dash) if key]
    if not keys:
        return [(("", ""), rows)] if len(rows) else []
    split = rows.groupby(keys, sort=False)
    return [((str(at[0]) if color else "", str(at[-1]) if dash else ""), one) for at, one in split]


def colours(rows: pd.DataFrame, color: str | None) -> dict[str, str]:
    return palette(rows[color]) if color else {"": OTHERS[0]}


def dashes(rows: pd.DataFrame, dash: str | None) -> dict[str, str]:
    return dict(zip(dict.fromkeys(rows[dash].astype(str)), DASHES * 20, strict=False)) if dash else {"": "solid"}


def series_name(shade: str, line: str) -> str:
    return ", ".join(part for part in (shade, line) if part) or "estimate"


def symbols(rows: pd.DataFrame, alpha: float) -> list[str]:
    """A filled point where the corrected p is below alpha, an open one elsewhere."""
    if "q" not in rows:
        return ["circle"] * len(rows)
    return ["circle" if q < alpha else "circle-open" for q in rows["q"]]


def hovers(rows: pd.DataFrame) -> list[str]:
    parts = [f"{value:.4g}" for value in rows["estimate"]]
    if {"low", "high"} <= set(rows):
        parts = [f"{text} [{a:.4g}, {b:.4g}]" for text, a, b in zip(parts, rows["low"], rows["high"], strict=True)]
    for column in ("q", "n"):
        if column in rows:
            parts = [f"{text}<br>{column} = {value:.3g}" for text, value in zip(parts, rows[column], strict=True)]
    return parts


def explain_marks(fig: go.Figure, rows: pd.DataFrame, alpha: float) -> None:
    """A line of the legend that says what a filled point means, where points are filled by q."""
    if "q" in rows and rows["q"].notna().any():
        marker = {"symbol": "circle", "size": 7, "color": "#444444"}
        name = f"filled: q < {alpha:g}".replace("0.", ".")
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=safe(name), marker=marker, hoverinfo="skip"))


def labels(rows: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """One label a row: its columns, one a line, empty ones left out."""
    return ["<br>".join(safe(row[column]) for column in columns if row[column] != "") for row in rows.to_dict("records")]


def label_of(result: pd.DataFrame, facet: str | None) -> list[str]:
    """What tells one row of a Result from another, and is not its panel."""
    require(result, ["metric"])
    return [key for key in telling_keys(result) if key != facet] or ["metric"]


def metric_of(result: pd.DataFrame) -> str:
    """The metric, where there is one."""
    names = list(dict.fromkeys(result["metric"])) if "metric" in result else []
    return str(names[0]) if len(names) == 1 else "estimate"


def one_metric(result: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    require(result, ["metric", "estimate", "layer"])
    if result.empty:
        raise ValueError("by_layer got a result without rows: there is nothing to draw")
    metrics = list(dict.fromkeys(result["metric"]))
    if metric is not None and metric not in metrics:
        raise KeyError(f"no metric {metric!r} in this result; it has {metrics}")
    if metric is None and len(metrics) > 1:
        warnings.warn(f"drawn is {metrics[0]!r} of the metrics {metrics}: metric= draws another", stacklevel=3)
    return result[result["metric"] == (metric or metrics[0])]


def require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise KeyError(f"columns {missing} are needed to draw this; the table has {list(frame.columns)}")


def safe(text: object) -> str:
    """Text for plotly, which reads a little HTML: what users or models wrote is shown, not interpreted."""
    return html.escape(str(text), quote=False)


def wrapped(text: object, width: int = 60) -> str:
    return "<br>".join(safe(line) for line in textwrap.wrap(str(text), width)[:6])


def two_lines(text: str, width: int = 16) -> str:
    return "<br>".join(safe(line) for line in textwrap.wrap(text, width, break_on_hyphens=False))


def rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
