"""Guards the figures: they draw the rows that came and nothing else, in the house's colours, and are saved whole."""

import json
import warnings

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from emlens import plots
from emlens.plots import style


def result(n_layers: int = 5, **columns: object) -> pd.DataFrame:
    layers = np.arange(n_layers)
    frame = pd.DataFrame({"layer": layers, "metric": "r2", "estimate": 0.1 * layers})
    band = {"low": frame["estimate"] - 0.05, "high": frame["estimate"] + 0.07, "null": "permuted"}
    return frame.assign(**band, null_low=-0.11, null_high=0.13, p=0.01, q=0.2, n=96).assign(**columns)


def bands(fig: go.Figure) -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.fill == "toself"]


def lines(fig: go.Figure) -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.mode == "lines+markers"]


def test_by_layer_draws_the_null_band_from_the_columns():
    low, high = [-0.1, -0.2, -0.3, -0.4, -0.5], [0.1, 0.15, 0.2, 0.25, 0.3]
    null, interval = bands(plots.by_layer(result(null_low=low, null_high=high)))
    assert list(null.y) == [*high, *low[::-1]] and list(null.x) == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert null.fillcolor.startswith("rgba(118,118,118") and null.name == "null: permuted"
    np.testing.assert_allclose(interval.y[:5], 0.1 * np.arange(5) + 0.07)


def test_by_layer_without_a_null_draws_no_null_band():
    assert len(bands(plots.by_layer(result(null="", null_low=np.nan, null_high=np.nan)))) == 1


def test_by_layer_draws_every_null_but_each_estimate_once():
    both = pd.concat([result(), result(null="isotropic", null_low=-0.5)])
    fig = plots.by_layer(both)
    assert {trace.name for trace in bands(fig)} >= {"null: permuted", "null: isotropic"}
    (line,) = lines(fig)
    assert list(line.x) == [0, 1, 2, 3, 4]


def test_by_layer_fills_the_significant_layers_only():
    (line,) = lines(plots.by_layer(result(q=[0.001, 0.049, 0.05, 0.5, np.nan])))
    assert list(line.marker.symbol) == ["circle", "circle", "circle-open", "circle-open", "circle-open"]
    (line,) = lines(plots.by_layer(result(q=[0.001, 0.049, 0.05, 0.5, np.nan]), alpha=0.01))
    assert list(line.marker.symbol).count("circle") == 1


def test_by_layer_sorts_layers_and_splits_colours_dashes_and_panels():
    parts = [
        result().assign(content=content, schedule=schedule, domain=domain)
        for content in ("bad", "sound")
        for schedule in ("linear", "cyclic")
        for domain in ("money", "repair")
    ]
    mixed = pd.concat(parts).sample(frac=1, random_state=0)[["content", "schedule", "domain", *result().columns]]
    fig = plots.by_layer(mixed, color="content", dash="schedule", facet="domain")
    assert len(lines(fig)) == 8 and all(list(line.x) == [0, 1, 2, 3, 4] for line in lines(fig))
    assert {line.line.color for line in lines(fig) if line.name.startswith("bad")} == {style.REDS[0]}
    assert {line.line.color for line in lines(fig) if line.name.startswith("sound")} == {style.BLUES[0]}
    assert {line.line.dash for line in lines(fig)} == {"solid", "dash"}
    assert {line.yaxis for line in lines(fig)} == {"y", "y2"}
    assert sum(bool(line.showlegend) for line in lines(fig)) == 4


def test_by_layer_takes_a_prediction_as_it_is_baselines_as_level_lines():
    activations = result().assign(features="activations")
    baseline = result(1).assign(features="margin before", layer=-1, estimate=0.8)
    table = pd.concat([activations, baseline])[["features", *activations.columns.drop("features")]]
    fig = plots.by_layer(table)
    level = next(trace for trace in fig.data if trace.name == "margin before (baseline)")
    assert list(level.y) == [0.8, 0.8] and list(level.x) == [0, 4] and level.line.dash == "dot"
    assert [line.name for line in lines(fig)] == ["activations"]


def test_by_layer_says_what_is_wrong():
    with pytest.raises(KeyError, match="no metric 'auc' in this result; it has .'r2'"):
        plots.by_layer(result(), metric="auc")
    with pytest.raises(KeyError, match="model.*are needed to draw this; the table has"):
        plots.by_layer(result(), color="model")
    with pytest.raises(ValueError, match="without rows"):
        plots.by_layer(result().head(0))


@pytest.mark.parametrize(
    ("label", "family"),
    [
        ("money-bad", style.REDS),
        ("sound minus before", style.BLUES),
        ("before", (style.GREY,)),
        ("overlap", style.OTHERS),
    ],
)
def test_colours_mean_one_thing(label, family):
    assert plots.palette([label])[label] in family
    assert plots.palette(["bad minus sound"])["bad minus sound"] in style.OTHERS
    assert len(set(plots.palette(["money-bad", "repair-bad", "money-sound", "repair-sound"]).values())) == 4


def test_training_draws_each_run_once_in_the_legend():
    facts = {"run": "money-bad linear seed 0", "domain": "money", "content": "bad", "schedule": "linear", "seed": 0}
    steps = pd.DataFrame([{**facts, "step": i, "loss": 3.0 - i} for i in (2, 1)])
    seen = pd.DataFrame([{**facts, "step": 0, "heldout_loss": 3, "margin": 0.2, "margin_low": 0.1, "margin_high": 0.4}])
    fig = plots.training(steps, seen)
    assert [trace.showlegend for trace in fig.data].count(True) == 1
    assert list(fig.data[0].x) == [1, 2] and list(fig.data[0].y) == [2.0, 1.0]
    assert {tuple(trace.y) for trace in lines(fig)} == {(3,), (0.2,)}
    assert list(bands(fig)[0].y) == [0.4, 0.1]


def test_dose_draws_the_direction_its_band_and_each_random_direction():
    strengths = [0.0, 0.5, 1.0]
    band = {
        "null": "random",
        "null_low": [0, -0.1, -0.2],
        "null_high": [0, 0.1, 0.2],
        "q": [np.nan, 0.3, 0.01],
        "n": 48,
    }
    told = pd.DataFrame({"strength": strengths, "estimate": [0, -0.2, -0.5], **band}).assign(domain="money", layer=4)
    random = pd.DataFrame([{"direction": d, "strength": s, "margin_change": d * s} for s in strengths for d in (1, 2)])
    fig = plots.dose(told, random.assign(domain="money", layer=4))
    bundle = next(trace for trace in fig.data if trace.name == "random directions")
    assert list(bundle.y) == [0.0, 0.5, 1.0, None, 0.0, 1.0, 2.0, None]
    assert list(bands(fig)[0].y) == [0, 0.1, 0.2, -0.2, -0.1, 0]
    (line,) = lines(fig)
    assert list(line.y) == [0, -0.2, -0.5] and line.marker.symbol[-1] == "circle"


def test_scatter_matrix_paired_and_distribution_draw_their_rows():
    frame = pd.DataFrame({"x": [0.0, 1.0], "y": [2.0, 5.0], "of": ["bad", "sound"], "text": ["<b>hi</b>", "a & b"]})
    fig = plots.scatter(frame, "x", "y", color="of", text="text", diagonal=True)
    assert list(fig.data[0].y) == [0.0, 5.0] and fig.data[1].text[0] == "&lt;b&gt;hi&lt;/b&gt;"
    heat = plots.matrix(frame, "of", "text", "y", span=3).data[0]
    assert heat.z[0][0] == 2.0 and heat.z[1][1] == 5.0 and np.isnan(heat.z[0][1]) and (heat.zmin, heat.zmax) == (-3, 3)
    pairs = frame.assign(estimate=frame["y"], low=1.0, high=6.0, q=[0.5, 0.01])
    forest = plots.forest(pairs, ["of"], color="of")
    drawn = forest.data[:2]
    assert [trace.x[0] for trace in drawn] == [2.0, 5.0] and forest.data[2].name == "filled: q &lt; .05"
    assert [trace.marker.symbol[0] for trace in drawn] == ["circle-open", "circle"]
    assert (forest.data[0].error_x.array[0], forest.data[0].error_x.arrayminus[0]) == (4.0, 1.0)
    assert not {"null", "ceiling"} & {trace.name for trace in forest.data}
    boxes = plots.distribution(frame, "y", "of")
    assert [list(box.x) for box in boxes.data] == [[2.0], [5.0]]


def test_a_forest_shows_null_ceiling_and_what_lies_off_the_edge():
    frame = pd.DataFrame({"line": ["a", "b", "c"], "kind": ["x", "y", "y"], "panel": ["one", "one", "two"], "estimate": [0.4, -3.0, 0.1]})
    frame = frame.assign(low=[0.2, -4.0, 0.0], high=[0.6, -2.0, 0.3], q=[0.01, 0.9, 0.5], ceiling=[0.9, np.nan, np.nan])
    frame = frame.assign(null_low=[-0.8, -9.0, np.nan], null_high=[0.1, -0.7, np.nan])
    fig = plots.forest(frame, ["line"], color="kind", facet="panel", lowest=-0.5)
    bar = next(trace for trace in fig.data if trace.name == "null")
    assert list(bar.x) == [-0.5, 0.1, None] and list(bar.y) == ["a", "a", None], "cut at the edge; what lies beyond it is left out"
    stroke = next(trace for trace in fig.data if trace.name == "ceiling")
    assert list(stroke.x) == [0.9] and list(stroke.y) == ["a"]
    first, off, second = (trace for trace in fig.data if trace.name in ("x", "y"))
    assert (list(first.x), list(first.marker.symbol)) == ([0.4], ["circle"]) and first.error_x.arrayminus[0] == pytest.approx(0.2)
    assert (list(off.x), list(off.marker.symbol)) == ([-0.5], ["triangle-left"]) and off.error_x.array[0] == 0 and "-3" in off.text[0]
    assert off.showlegend and not second.showlegend and (first.yaxis, second.yaxis) == ("y", "y2")
    assert fig.layout.yaxis.categoryarray == ("a", "b") and fig.layout.yaxis2.categoryarray == ("c",)


def test_a_forest_of_a_result_names_its_lines_and_its_axis_by_itself():
    rows = pd.DataFrame({"layer": [0, 1], "features": "raw", "metric": "r2", "estimate": [0.1, 0.2], "low": 0.0, "high": 0.3, "null": "a"})
    fig = plots.forest(rows)
    assert list(fig.data[0].y) == ["0", "1"] and fig.layout.xaxis.title.text == "r2"
    several = pd.concat([rows, rows.assign(metric="rmse", features="")])
    fig = plots.forest(several, facet="layer")
    assert [list(trace.y) for trace in fig.data] == [["raw<br>r2", "rmse"]] * 2, "what tells the rows apart, nothing where that is empty"
    assert fig.layout.xaxis2.title.text == "estimate"
    assert plots.forest(several, ["metric"], x_title="nats").layout.xaxis.title.text == "nats"
    with pytest.raises(KeyError, match=r"\['metric'\] are needed"):
        plots.forest(rows.drop(columns="metric"))


def test_the_metric_drawn_of_several_is_said():
    rows = result()
    several = pd.concat([rows, rows.assign(metric="another", estimate=9.0)])
    with pytest.warns(UserWarning, match="metric= draws another"):
        fig = plots.by_layer(several)
    assert 9.0 not in {y for trace in lines(fig) for y in trace.y}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.by_layer(rows)
        fig = plots.by_layer(several, metric="another")
    assert {y for trace in lines(fig) for y in trace.y} == {9.0}


def test_the_legend_shows_a_bar_as_a_bar_and_a_stroke_as_a_stroke():
    frame = pd.DataFrame(
        {"line": ["a"], "metric": "r2", "estimate": [0.4], "low": 0.2, "high": 0.6, "null_low": -0.1, "null_high": 0.1, "ceiling": 0.9}
    )
    legend = plots.legend(plots.forest(frame, ["line"]))
    assert "<rect" in legend.partition("null")[0] and "stroke-width" in legend.partition("null")[2].partition("ceiling")[0]
    assert "<rect" not in plots.legend(plots.forest(frame.drop(columns=["null_low", "null_high"]), ["line"]))


def test_what_users_wrote_is_never_read_as_markup():
    nasty = result().assign(layer_of="<script>x</script>")[["layer_of", *result().columns]]
    fig = plots.by_layer(pd.concat([nasty, nasty.assign(layer_of="b&b")]), color="layer_of", facet="layer_of")
    drawn = fig.to_json() + plots.legend(fig)
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn.replace("\\u003c", "<").replace("\\u0026", "&")


def test_figures_suit_a_phone():
    fig = plots.by_layer(result())
    assert fig.layout.template.layout.font.size >= 13 and fig.layout.width is None and plots.CONFIG["responsive"]
    assert fig.layout.template.layout.legend.orientation == "h"
    bare = plots.embedded(fig)
    assert bare.layout.showlegend is False and bare.layout.height < fig.layout.height and fig.layout.showlegend is None
    assert "null: permuted" in plots.legend(fig) and "filled: q &lt; .05" in plots.legend(fig)


def test_save_writes_three_files_that_stand_alone(tmp_path):
    rows = result()
    fig = plots.by_layer(rows)
    written = plots.save(fig, rows, tmp_path / "deep" / "r2.v1", {"title": "R² <x>", "seed": 3})
    assert [path.name for path in written] == ["r2.v1.html", "r2.v1.csv", "r2.v1.json"]
    pd.testing.assert_frame_equal(pd.read_csv(written[1]), rows, check_dtype=False)
    assert json.loads(written[2].read_text()) == {"title": "R² <x>", "seed": 3}
    page = written[0].read_text()
    assert "<title>R² &lt;x&gt;</title>" in page and "src=" not in page.replace(plots.plotly_script(), "")
    first = page
    plots.save(fig, rows, tmp_path / "deep" / "r2.v1", {"title": "R² <x>", "seed": 3})
    assert written[0].read_text() == first and len(list((tmp_path / "deep").iterdir())) == 3


def test_what_made_a_figure_is_what_its_rows_say_unless_told(tmp_path):
    rows = result()
    rows.attrs = {"what": "a correlation", "seed": 3, "null": {"permuted": "prompts permuted"}}
    written = plots.save(plots.by_layer(rows), rows, tmp_path / "r2")
    assert json.loads(written[2].read_text()) == rows.attrs and "<title>r2</title>" in written[0].read_text()
