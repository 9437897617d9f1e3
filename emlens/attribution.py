"""Attribution of a shift: how much of it each block's attention and MLP write, summing to it. Needs no model once the parts are recorded."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from einops import einsum
from jaxtyping import Float

from . import stats
from ._sides import facts_column
from .activations import Activations

PARTS = ("embed", "attn_out", "mlp_out")
"""The sites that add up to ``resid_post``: what enters block 0, and what each block adds."""

LARGEST_REST = 0.1
"""Share of a shift that the parts may leave over (rounding of 16-bit weights) before they are taken for other parts."""


def contributions(parts: Float[np.ndarray, "prompt part d_model"], shift: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt part"]:
    """c[p, i] = ⟨parts[p, i], shift[p]⟩ / ‖shift[p]‖: the component of each part along its prompt's own shift.

    The residual stream is a sum (Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*), so where the parts sum to the shift,
    their components sum to its length. In units of the stream; a prompt without any shift has zeros.
    """
    length = np.linalg.norm(shift.astype(np.float64), axis=-1)
    unit = np.divide(shift, length[:, None], out=np.zeros(shift.shape), where=length[:, None] > 0)
    return einsum(parts.astype(np.float64), unit, "prompt part d_model, prompt d_model -> prompt part")


def attribute(
    shift: Activations,
    parts: Sequence[Activations],
    layer: int | None = None,
    *,
    by: str = "part",
    clusters: str | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of a shift at ``resid_post`` the embedding and each block's ``attn_out`` and ``mlp_out`` contribute (:func:`contributions`).

    A description of where a shift is written into the stream, so it has no null. It is not a cause: a block that has no adapter at all
    contributes when what it reads has moved. Contributions may be negative, and cancel; by prompt they sum to ‖shift‖.

    Args:
        shift: after − before at ``resid_post``.
        parts: after − before at ``embed``, at ``attn_out`` and at ``mlp_out``, of the same prompts at the same position; all blocks up to the
            layer.
        layer: of the shift; default its last.
        by: ``"part"``: one row per part, over the prompts; ``"prompt"``: one row per prompt and part.
        clusters: a column of the shift's facts, drawn whole in the bootstrap (tokens of ``position="all"`` are drawn by prompt anyway).

    Returns:
        DataFrame ``layer, site, contribution, share, low, high, n``: the mean over prompts (in units of the stream), what it is of the mean
        ‖shift‖, and the bootstrap interval of the mean. ``embed`` has layer −1: it is there before block 0. By prompt: ``id, layer, site,
        contribution, share, norm``.

    Raises:
        ValueError: other places or prompts, blocks that are missing, parts that do not sum to the shift.
    """
    if by not in ("part", "prompt"):
        raise ValueError(f"by={by!r}: 'part' (means over prompts) or 'prompt' (each prompt's own)")
    if shift.site != "resid_post":
        raise ValueError(f"the shift is of {shift.site}; what blocks contribute is added up in resid_post")
    layer = shift.layers[-1] if layer is None else layer
    whole = shift.layer(layer)
    keys, values = _by_part(shift, parts, layer)
    found = contributions(values, whole)
    norm = np.linalg.norm(whole.astype(np.float64), axis=-1)
    rest = float(np.abs(norm - found.sum(axis=1)).sum() / norm.sum()) if norm.any() else 0.0
    if rest > LARGEST_REST:
        raise ValueError(
            f"the parts leave {rest:.0%} of the shift at layer {layer} over; embed, attn_out and mlp_out of one and the same pair of variants are "
            "needed (weights of 16 bit round what they add: dtype='float32')"
        )
    told = {"what": f"contributions to the shift at resid_post, layer {layer}, {shift.position}; a description, no null", "rest": rest}
    if by == "prompt":
        share = np.divide(found, norm[:, None], out=np.full(found.shape, np.nan), where=norm[:, None] > 0)
        out = pd.concat(
            [_frame(keys, c, s).assign(id=i, norm=n) for i, c, s, n in zip(shift.ids, found, share, norm, strict=True)], ignore_index=True
        )
        out = out[["id", "layer", "site", "contribution", "share", "norm"]]
        out.attrs = told
        return out
    groups = facts_column(shift, clusters or ("prompt_id" if "prompt_id" in shift.facts else None))
    low, high = stats.bootstrap_interval(found, clusters=groups, level=level, n_boot=n_boot, seed=seed)
    mean = found.mean(axis=0)
    out = _frame(keys, mean, mean / norm.mean() if norm.any() else np.full(len(mean), np.nan)).assign(low=low, high=high, n=len(found))
    out.attrs = {**told, "norm": float(norm.mean()), "interval": f"{level:.0%}, bootstrap over {clusters or 'prompts'}", "seed": seed}
    return out


def _frame(keys: Sequence[tuple[int, str]], contribution: np.ndarray, share: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"layer": [i for i, _ in keys], "site": [s for _, s in keys], "contribution": contribution, "share": share})


def _by_part(shift: Activations, parts: Sequence[Activations], layer: int) -> tuple[list[tuple[int, str]], Float[np.ndarray, "prompt part d_model"]]:
    """``(layer, site)`` of each part in the order of a forward pass, and its values in the order of the shift's prompts."""
    sites = {one.site: one for one in parts}
    if sorted(sites) != sorted(PARTS) or len(parts) != len(PARTS):
        raise ValueError(f"parts are of {[one.site for one in parts]}; needed is one each of {', '.join(PARTS)}")
    paired = {}
    for site, one in sites.items():
        lacking = [i for i in range(layer + 1) if site != "embed" and i not in one.layers]
        if one.position != shift.position or one.d_model != shift.d_model or set(one.ids) != set(shift.ids) or lacking:
            blocks = f", without blocks {lacking}" if lacking else ""
            raise ValueError(
                f"{site} is at {one.position!r} for {one.n_prompts} prompts, width {one.d_model}{blocks}; needed are the shift's: "
                f"{shift.position!r}, the same {shift.n_prompts} prompts, width {shift.d_model}, blocks 0 … {layer}"
            )
        paired[site] = one.select(ids=shift.ids)
    keys = [(-1, "embed"), *((i, site) for i in range(layer + 1) for site in PARTS[1:])]
    return keys, np.stack([paired[site].layer(max(i, 0)) for i, site in keys], axis=1)
