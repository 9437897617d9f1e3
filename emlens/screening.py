"""Screening of training data before any tuning: which responses lie along a direction, beside other answers to the same prompts.

The projection difference of Persona Vectors (Chen et al. 2025, arXiv 2507.21509), with a null for every row.
"""

import os
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import stats, store
from .directions import Direction, project, random_directions
from .models import HookedModel
from .positions import Position
from .prompts import load_prompts, split_response, user_text


def screen(
    data: Any,
    model: HookedModel,
    direction: Direction,
    against: Any = None,
    *,
    layer: int,
    position: Position = "mean_response",
    adapter: str | None = None,
    controls: int = 200,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank training examples, before any tuning, by how much more their responses lie along a direction than other answers to the same prompts.

    ΔP = (h(response) − h(other answer))·v̂ (the projection difference of Chen et al. 2025).

    Args:
        data: rows that end with a response, as for :func:`emlens.finetune`.
        direction: of a persona, say.
        against: other answers to the same prompts, matched by id (a twin set: anything :func:`load_prompts` reads); default the model's own,
            greedy, of at most ``max_new_tokens``.
        layer: where.
        controls: random directions of the covariance of the responses, the null of a row: its ΔP along the direction is like that along any
            direction the responses vary in. Two-sided p by rank (at least 1 / (controls + 1)), q by Benjamini–Hochberg over the rows.

    Returns:
        Frame, highest first: ``rank, id, projection, reference, difference, null_low, null_high, p, q, prompt, response, other``;
        ``attrs["null"]`` says what the null is. :func:`screen_page` makes an HTML table of it.

    Raises:
        ValueError: a row without a response, or ids that the other answers lack.
    """
    table = load_prompts(data)
    silent = [i for i, m in zip(table["id"], table["messages"], strict=True) if split_response(m)[1] is None]
    if silent:
        raise ValueError(f"{len(silent)} rows have no response to screen (e.g. {silent[0]!r}); end their messages with one of role 'assistant'")
    others = _others(table, model, against, adapter, max_new_tokens)
    pair = []
    for rows in (table, others):
        pair.append(model.record(rows, position=position, layers=[layer], adapter=adapter))
    ours, theirs = pair[0], pair[1].select(ids=pair[0].ids)
    own = project(ours, direction)[layer].to_numpy()
    reference = project(theirs, direction)[layer].to_numpy()
    drawn = random_directions(Direction(direction.layer(layer)[None], (layer,), direction.site, direction.name), controls, seed, ours)
    moved = ours.layer(layer).astype(np.float64) - theirs.layer(layer)
    null = np.stack([d.layer(layer) for d in drawn]).astype(np.float64) @ moved.T  # [draw, row]
    low, high = stats.null_band(null)
    p = stats.permutation_p(own - reference, null, "two-sided")
    responses = [split_response(m)[1] for m in table["messages"]]
    told = [split_response(m)[1] for m in others.set_index("id").loc[table["id"], "messages"]]
    numbers = {"projection": own, "reference": reference, "difference": own - reference, "null_low": low, "null_high": high}
    tests = {"p": p, "q": stats.adjust(p, "bh")}
    texts = {"prompt": [user_text(m) for m in table["messages"]], "response": responses, "other": told}
    out = pd.DataFrame({"id": table["id"].to_numpy(), **numbers, **tests, **texts})
    out = out.sort_values("difference", ascending=False, kind="stable", ignore_index=True)
    out.insert(0, "rank", np.arange(1, len(out) + 1))
    out.attrs = {
        "what": f"projection difference along {direction.name!r} at layer {layer}, {position}",
        "null": f"{controls} random directions from the covariance of the responses; two-sided rank p, at least {1 / (controls + 1):.2g}",
        "seed": seed,
    }
    return out


def _others(table: pd.DataFrame, model: HookedModel, against: Any, adapter: str | None, max_new_tokens: int) -> pd.DataFrame:
    asked = [split_response(m)[0] for m in table["messages"]]
    if against is None:
        answers = model.generate(pd.DataFrame({"id": table["id"], "messages": asked}), adapter, max_new_tokens=max_new_tokens)["answer"]
        empty = int((answers == "").sum())
        if empty:
            raise ValueError(f"the model has no answer to {empty} of {len(table)} prompts; give other answers to set them against (against=)")
        told = dict(zip(table["id"], answers, strict=True))
    else:
        given = load_prompts(against)
        told = {i: split_response(m)[1] for i, m in zip(given["id"], given["messages"], strict=True)}
        lacking = [i for i in table["id"] if told.get(i) is None]
        if lacking:
            raise ValueError(f"{len(lacking)} rows have no other answer in against= (e.g. {lacking[0]!r}); rows are matched by id")
    chats = [[*a, {"role": "assistant", "content": told[i]}] for i, a in zip(table["id"], asked, strict=True)]
    return pd.DataFrame({"id": table["id"], "messages": chats})


def screen_page(screened: pd.DataFrame, path: str | os.PathLike, n: int = 200) -> Path:
    """Write the first ``n`` rows of :func:`screen` as one self-contained HTML table (model text escaped); returns the path."""
    shown = screened.head(n)
    span = float(np.abs(screened["difference"]).max()) or 1.0
    body = []
    for row in shown.to_dict("records"):
        share = row["difference"] / span
        colour = f"rgba(178,24,43,{share:.2f})" if share > 0 else f"rgba(33,102,172,{-share:.2f})"
        texts = "".join(f"<td>{escape(str(row[c]))}</td>" for c in ("id", "prompt", "response", "other"))
        body.append(f"<tr><td>{row['rank']}</td><td style='background:{colour}'>{row['difference']:.3g}</td><td>{row['q']:.2g}</td>{texts}</tr>")
    head = "".join(f"<th>{c}</th>" for c in ("rank", "difference", "q", "id", "prompt", "response", "other answer"))
    said = f"{escape(screened.attrs['what'])}; {len(shown)} of {len(screened)} rows. Null: {escape(screened.attrs['null'])}."
    page = (
        "<!doctype html><meta charset='utf-8'><title>Screened training data</title><style>body{font:14px/1.4 system-ui;margin:1.5rem}"
        "table{border-collapse:collapse}td,th{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}</style>"
        f"<h1>Screened training data</h1><p>{said}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )
    target = Path(path)
    with store.replacing(target) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")
    return target
