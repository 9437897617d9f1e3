"""Screening of training data before any tuning: which responses lie along a direction, beside other answers to the same prompts.

The projection difference of Persona Vectors (Chen et al. 2025, arXiv 2507.21509), with a null for every row.
"""

import os
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import stats, store
from .directions import Direction, project
from .models import HookedModel
from .positions import Position
from .prompts import load_prompts, split_response, user_text

NUMBERS = 2**22
"""How many numbers of the null are held at a time."""


def screen(
    data: Any,
    model: HookedModel,
    direction: Direction,
    against: Any = None,
    *,
    layer: int,
    position: Position = "mean_response",
    adapter: str | None = None,
    controls: int = 20_000,
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
        controls: random directions of the covariance of the responses and the other answers together, each about their own mean (as
            :func:`emlens.random_directions` draws them), the null of a row: its ΔP is like that along any direction the two vary in. They cost
            no pass of the model. One-sided p by rank, on the side of the ranking, at least 1 / (controls + 1); q by Benjamini–Hochberg over the
            rows: of k rows that all are at that floor n / (k (controls + 1)), so that one bad row alone can be told only where ``controls`` are
            20 times the n rows. Bad rows are part of that covariance: many of them, far along, widen their own null, which costs power and not
            level; of the other answers alone it would be free of them, but call rows bad that only vary elsewhere.

    Returns:
        Frame, highest first: ``rank, id, projection, reference, difference, null_low, null_high`` (the controls' central 95%), ``p, q, prompt,
        response, other``; ``attrs["null"]`` says what the null is, ``attrs["p_floor"]`` and ``attrs["q_floor"]`` (of one row alone) the least
        there can be. :func:`screen_page` makes an HTML table of it.

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
    p, low, high = beside_random(own - reference, ours.layer(layer), theirs.layer(layer), controls, seed)
    responses = [split_response(m)[1] for m in table["messages"]]
    told = [split_response(m)[1] for m in others.set_index("id").loc[table["id"], "messages"]]
    numbers = {"projection": own, "reference": reference, "difference": own - reference, "null_low": low, "null_high": high}
    tests = {"p": p, "q": stats.adjust(p, "bh")}
    texts = {"prompt": [user_text(m) for m in table["messages"]], "response": responses, "other": told}
    out = pd.DataFrame({"id": table["id"].to_numpy(), **numbers, **tests, **texts})
    out = out.sort_values("difference", ascending=False, kind="stable", ignore_index=True)
    out.insert(0, "rank", np.arange(1, len(out) + 1))
    floor = 1 / (controls + 1)
    alone = min(1.0, len(out) * floor)
    out.attrs = {
        "what": f"projection difference along {direction.name!r} at layer {layer}, {position}",
        "null": f"{controls} random directions from the covariance of the responses and the other answers; one-sided rank p (higher than along "
        f"them), at least {floor:.2g}; q by Benjamini–Hochberg over {len(out)} rows, at least {alone:.2g} for one row alone, a k-th of it for k at "
        "the floor",
        "p_floor": floor,
        "q_floor": alone,
        "seed": seed,
    }
    return out


def beside_random(
    observed: Float[np.ndarray, " prompt"],
    ours: Float[np.ndarray, "prompt d_model"],
    theirs: Float[np.ndarray, "prompt d_model"],
    controls: int,
    seed: int,
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """p of every row's ``observed`` difference among those of ``ours − theirs`` along random directions, one-sided by rank, and the ends of their
    central 95%.

    The directions are the unit vectors along X'g, X the rows of both sides, each about its mean, and g standard normal; drawn and projected on
    in parts.

    Raises:
        ValueError: fewer than one control, or rows that do not vary.
    """
    if controls < 1:
        raise ValueError(f"controls={controls} random directions were asked for; at least 1 is needed")
    centred = np.concatenate([side - side.mean(axis=0, dtype=np.float64) for side in (ours, theirs)])
    moved = ours - theirs
    rng, step = np.random.default_rng(seed), max(1, NUMBERS // max(centred.shape))
    drawn = np.empty((controls, centred.shape[1]), dtype=np.float32)
    for start in range(0, controls, step):
        rows = rng.standard_normal((min(step, controls - start), len(centred))) @ centred
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (length > 0).all():
            raise ValueError("the rows do not vary at this layer, so no direction can be drawn from them: give more rows")
        drawn[start : start + step] = rows / length
    parts, step = [], max(1, NUMBERS // controls)
    for start in range(0, len(moved), step):
        null = drawn @ moved[start : start + step].T.astype(np.float32)  # [draw, row]
        parts.append((stats.permutation_p(observed[start : start + step], null), *stats.null_band(null)))
    p, low, high = (np.concatenate(each) for each in zip(*parts, strict=True))
    return p, low, high


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
