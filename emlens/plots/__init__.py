"""Result -> plotly figure, returned and never shown. Nothing is computed here: what is drawn are the rows that came.

Colours mean the same thing in every figure: reds are bad or misaligned, blues sound or aligned, grey is a null or the
model before tuning. Schedules and seeds differ by the dash of the line, never by colour alone. Panels stand one under
another and legends below, so that a figure reads at 390 px as it does at 1000.
"""

from collections.abc import Sequence
from typing import TypeAlias

import pandas as pd
import plotly.graph_objects as go

from emlens.plots import style
from emlens.plots.files import embedded, legend, plotly_script, save
from emlens.plots.style import CONFIG, FONT, palette

__all__ = [
    "CONFIG",
    "FONT",
    "Figure",
    "by_layer",
    "distribution",
    "dose",
    "embedded",
    "forest",
    "legend",
    "matrix",
    "palette",
    "plotly_script",
    "save",
    "scatter",
    "training",
]

Figure: TypeAlias = go.Figure
"""What every drawing function returns; other rooms name the type by this and leave plotly to this one."""


def by_layer(
    result: pd.DataFrame,
    *,
    metric: str | None = None,
    color: str | None = None,
    dash: str | None = None,
    facet: str | None = None,
    alpha: float = 0.05,
    reference: float | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """An estimate along the layers: line and interval band, its null in grey, significant layers as filled points.

    `metric` is one of the result's (its first, if not given, and a warning where there are others); `color`, `dash` and `facet` name key
    columns (colour: the first key with several values, if not given). Rows with a layer below 0 are baselines and become level lines.
    `reference` draws a thin level line (0, or 0.5 for an AUC).

    Errors: KeyError for a column or a metric that is not there, ValueError for a result without rows.
    """
    rows = style.one_metric(result, metric)
    if color is None:
        before_metric = rows.columns[: rows.columns.get_loc("metric")]
        keys = [key for key in before_metric if key not in ("layer", dash, facet)]
        color = next((key for key in keys if rows[key].nunique() > 1), None)
    style.require(rows, [*(name for name in (color, dash, facet) if name)])
    colours, dashes = style.colours(rows, color), style.dashes(rows, dash)
    frames = style.facets(rows, facet)
    fig, panels = style.stack(list(frames), "layer", [y_title or str(rows["metric"].iloc[0])] * len(frames))
    for panel, frame in zip(panels, frames.values(), strict=True):
        layered, level = frame[frame["layer"] >= 0], frame[frame["layer"] < 0]
        panel.nulls(style.series(layered, color, dash), "layer")
        span = [layered["layer"].min(), layered["layer"].max()] if len(layered) else [0, 1]
        for (shade, _), one in style.series(level, color, None):
            panel.line(span, [one["estimate"].iloc[0]] * 2, f"{shade} (baseline)", colours[shade], "dot")
        for (shade, dashed), one in style.series(layered, color, dash):
            panel.estimate(one, "layer", style.series_name(shade, dashed), colours[shade], dashes[dashed], alpha)
        if reference is not None:
            panel.level(reference)
    fig.update_yaxes(matches="y")  # one metric: panels are to be compared
    style.explain_marks(fig, rows, alpha)
    return fig


def dose(
    result: pd.DataFrame,
    random: pd.DataFrame | None = None,
    *,
    color: str | None = "domain",
    facet: str | None = "layer",
    alpha: float = 0.05,
    y_title: str = "change of margin",
) -> go.Figure:
    """A dose-response: the change at each strength with its interval, beside norm-matched random directions.

    `result` has strength, estimate and the columns of a Result; its null band is grey. `random` (rows: strength,
    direction, margin_change, and those keys it has) adds each random direction as a thin grey line.
    """
    style.require(result, ["strength", "estimate", *(name for name in (color, facet) if name)])
    colours = style.colours(result, color)
    frames = style.facets(result, facet)
    fig, panels = style.stack(list(frames), "strength (1 = median residual norm)", [y_title] * len(frames))
    for panel, frame in zip(panels, frames.values(), strict=True):
        panel.nulls(style.series(frame, color, None), "strength")
        if random is not None:
            same = random if facet is None else random[random[facet] == frame[facet].iloc[0]]
            each = [key for key in (color, "direction") if key and key in random.columns]
            panel.bundle(same.sort_values([*each, "strength"]), each, "strength", "margin_change", "random directions")
        for (shade, _), one in style.series(frame, color, None):
            panel.estimate(one, "strength", shade or "the direction", colours[shade], "solid", alpha)
        panel.level(0)
    style.explain_marks(fig, result, alpha)
    return fig


def training(steps: pd.DataFrame, checkpoints: pd.DataFrame | None = None) -> go.Figure:
    """Loss along the steps (thin: each step's batch; thick: held-out, at the checkpoints), the margin under it.

    One line a run. `steps` has run, domain, content, schedule, seed, step and loss; `checkpoints` has heldout_loss,
    margin, margin_low and margin_high in place of the loss. Domain and content choose the colour, schedule and seed
    the dash.
    """
    facts = ["run", "domain", "content", "schedule", "seed", "step"]
    style.require(steps, [*facts, "loss"])
    titles = ["loss (nats/token)"]
    if checkpoints is not None:
        style.require(checkpoints, [*facts, "heldout_loss", "margin", "margin_low", "margin_high"])
        titles.append("margin (nats/token)")
    fig, panels = style.stack([""] * len(titles), "step", titles, height=270)
    runs = steps.drop_duplicates("run").assign(
        content_set=lambda run: run["domain"].astype(str) + "-" + run["content"].astype(str),
        variation=lambda run: run["schedule"].astype(str) + " seed " + run["seed"].astype(str),
    )
    colours, dashes = palette(runs["content_set"]), style.dashes(runs, "variation")
    for run in runs.to_dict("records"):
        name, colour, dash = str(run["run"]), colours[run["content_set"]], dashes[run["variation"]]
        loss = steps[steps["run"] == run["run"]].sort_values("step")
        panels[0].line(loss["step"], loss["loss"], name, colour, dash, faint=checkpoints is not None)
        if checkpoints is not None:
            seen = checkpoints[checkpoints["run"] == run["run"]].sort_values("step")
            fill = style.rgba(colour, 0.10)
            panels[0].line(seen["step"], seen["heldout_loss"], name, colour, dash, "lines+markers")
            panels[1].band(seen["step"], seen["margin_low"], seen["margin_high"], fill, name)
            panels[1].line(seen["step"], seen["margin"], name, colour, dash, "lines+markers")
    return fig


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    color: str | None = None,
    facet: str | None = None,
    text: str | None = None,
    diagonal: bool = False,
    x_title: str | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """One point a row; `text` is a column shown on hover (escaped), `diagonal` draws the line y = x."""
    style.require(frame, [x, y, *(name for name in (color, facet, text) if name)])
    colours = style.colours(frame, color)
    frames = style.facets(frame, facet)
    fig, panels = style.stack(list(frames), x_title or x, [y_title or y] * len(frames), height=330)
    for panel, part in zip(panels, frames.values(), strict=True):
        if diagonal:
            ends = [min(part[x].min(), part[y].min()), max(part[x].max(), part[y].max())]
            panel.line(ends, ends, "no change", "#9a9a9a")
        for (shade, _), one in style.series(part, color, None):
            panel.add(
                go.Scatter(
                    x=one[x],
                    y=one[y],
                    mode="markers",
                    name=style.safe(shade),
                    legendgroup=shade,
                    showlegend=panel.new(shade),
                    marker={"color": colours[shade], "size": 7, "opacity": 0.7},
                    text=[style.wrapped(each) for each in one[text]] if text else None,
                    hovertemplate=("%{text}<br>" if text else "") + "%{x:.3f}, %{y:.3f}<extra></extra>",
                )
            )
    return fig


def matrix(
    frame: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    centre: float | None = 0.0,
    span: float | None = None,
    unit: str = "",
) -> go.Figure:
    """A heat map of `value`, one cell a row; red below `centre`, blue above it (None: one hue from low to high).

    `span` is how far from `centre` the colour is full (the largest cell, if not given): give it where small differences
    shall look small. `unit` stands under the x axis.
    """
    style.require(frame, [x, y, value])
    table = frame.pivot(index=y, columns=x, values=value)
    table = table.loc[list(dict.fromkeys(frame[y])), list(dict.fromkeys(frame[x]))]
    fig, (panel,) = style.stack([""], unit, [""], height=38 * len(table) + 40)
    ends = {"zmid": centre} if centre is None or span is None else {"zmin": centre - span, "zmax": centre + span}
    panel.add(
        go.Heatmap(
            z=table.to_numpy(),
            x=[style.two_lines(str(each)) for each in table.columns],
            y=[style.two_lines(str(each)) for each in table.index],
            colorscale="RdBu" if centre is not None else "Blues",
            showscale=False,
            texttemplate="%{z:.2f}",
            textfont={"size": 12},
            xgap=2,
            ygap=2,
            hovertemplate="%{y}<br>%{x}<br>%{z:.3f}<extra></extra>",
            **ends,
        )
    )
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="outside", tickcolor="white", type="category")
    fig.update_xaxes(showgrid=False, type="category")
    return fig


def forest(
    result: pd.DataFrame,
    label: Sequence[str] | None = None,
    *,
    color: str | None = None,
    facet: str | None = None,
    alpha: float = 0.05,
    x_title: str | None = None,
    lowest: float | None = None,
) -> go.Figure:
    """Estimates one a line with their intervals, filled where q < alpha; 0 is marked.

    `label` columns name the lines (the keys, the metric and the null that have several values, if not given), `x_title` the axis (the
    metric). A null band (null_low, null_high) is a grey bar behind its estimate, a `ceiling` an upright stroke. What lies below `lowest` is drawn
    as an arrow at the edge (its number shows on hover).
    """
    label = style.label_of(result, facet) if label is None else label
    style.require(result, [*label, "estimate", "low", "high", *(name for name in (color, facet) if name)])
    colours, frames = style.colours(result, color), style.facets(result, facet)
    fig, panels = style.stack(
        list(frames), x_title or style.metric_of(result), [""] * len(frames), height=[max(46 * len(frame), 60) for frame in frames.values()]
    )
    for panel, frame in zip(panels, frames.values(), strict=True):
        lines = style.labels(frame, label)
        panel.bars(frame, lines, lowest)
        for (shade, _), one in style.series(frame, color, None):
            panel.points(one, style.labels(one, label), shade, colours[shade], alpha, lowest)
        panel.strokes(frame, lines)
        fig.update_yaxes(categoryorder="array", categoryarray=lines, autorange="reversed", row=panel.row, col=1)
    fig.add_vline(x=0, line={"color": "#9a9a9a", "width": 1})
    style.explain_marks(fig, result, alpha)
    return fig


def distribution(
    frame: pd.DataFrame,
    value: str,
    by: str,
    *,
    color: str | None = None,
    facet: str | None = None,
    text: str | None = None,
    x_title: str | None = None,
) -> go.Figure:
    """Every value as a point over its box, one line for each `by`; `text` is a column shown on hover (escaped).

    `color` is a column that is constant within each `by` (`by` itself, if not given).
    """
    color = color or by
    style.require(frame, [value, by, color, *(name for name in (facet, text) if name)])
    colours = style.colours(frame, color)
    frames = style.facets(frame, facet)
    tall = max(part[by].nunique() for part in frames.values())
    fig, panels = style.stack(list(frames), x_title or value, [""] * len(frames), height=62 * tall)
    for panel, part in zip(panels, frames.values(), strict=True):
        for (line, _), one in style.series(part, by, None):
            colour = colours[str(one[color].iloc[0])]
            panel.add(
                go.Box(
                    x=one[value],
                    y=[style.two_lines(line)] * len(one),
                    orientation="h",
                    boxpoints="all",
                    jitter=0.6,
                    pointpos=0,
                    showlegend=False,
                    name=style.safe(line),
                    line={"color": colour, "width": 1.5},
                    fillcolor=style.rgba(colour, 0.12),
                    marker={"size": 4, "opacity": 0.5},
                    text=[style.wrapped(each) for each in one[text]] if text else None,
                    hovertemplate=("%{text}<br>" if text else "") + "%{x:.3f}<extra></extra>",
                    hoveron="points",
                )
            )
    fig.update_yaxes(autorange="reversed", type="category")
    return fig
