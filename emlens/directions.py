"""Directions: one unit vector per layer; found as a mean difference, projected on, read as tokens and prompts, saved."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from einops import repeat
from jaxtyping import Float

from . import nulls
from . import vectors as files
from ._sides import check_same_place, facts_column
from .activations import Activations, Place


@dataclass(frozen=True, eq=False)
class Direction:
    """One unit vector per layer, `vectors[layer, d_model]` (float32), at a site; `norms[layer]` are the lengths before
    they were normalised (1 when not given).

    `meta` says where it came from. Steering strengths are measured in residual norms of the model, never in `norms`.
    Errors: ValueError for shapes that do not fit, rows that are not of unit length (use `Direction.from_array`), NaN or
    Inf.
    """

    vectors: Float[np.ndarray, "layer d_model"]
    layers: tuple[int, ...]
    site: str = "resid_post"
    name: str = "direction"
    meta: dict[str, Any] = field(default_factory=dict)
    norms: Float[np.ndarray, " _"] = field(default_factory=lambda: np.ones(0, dtype=np.float32))

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.layers):
            raise ValueError(f"vectors have shape {self.vectors.shape} for {len(self.layers)} layers: [layer, d_model] is needed, a row per layer")
        if self.norms.size == 0:
            object.__setattr__(self, "norms", np.ones(len(self.layers), dtype=np.float32))
        if self.norms.shape != (len(self.layers),):
            raise ValueError(f"norms have shape {self.norms.shape}; a length for each of {len(self.layers)} layers is needed")
        Place(self.site, self.layers, "last")
        lengths = np.linalg.norm(self.vectors, axis=1)
        if not np.allclose(lengths, 1, atol=1e-3):
            worst = int(np.argmax(np.abs(np.nan_to_num(lengths, nan=np.inf) - 1)))
            raise ValueError(
                f"the vector at layer {self.layers[worst]} has length {lengths[worst]:.4g}, not 1: "
                "Direction.from_array normalises and keeps the lengths"
            )

    @classmethod
    def from_array(
        cls,
        vectors: Float[np.ndarray, "layer d_model"],
        layers: tuple[int, ...] | None = None,
        site: str = "resid_post",
        name: str = "direction",
        meta: dict[str, Any] | None = None,
    ) -> "Direction":
        """Normalise rows [layer, d_model] of any length; the lengths are kept in `norms`. Layers default to 0, 1, 2, ...

        The last bit of a float32 is chosen such that a file that holds vectors x norms gives the same vectors back.
        """
        rows = np.asarray(vectors, dtype=np.float64)
        if rows.ndim != 2:
            raise ValueError(f"vectors have shape {rows.shape}: [layer, d_model] is needed, a row per layer")
        numbers = tuple(range(len(rows))) if layers is None else tuple(int(i) for i in layers)
        lengths = np.linalg.norm(rows, axis=1)
        if len(numbers) == len(rows) and not (np.isfinite(lengths) & (lengths > 0)).all():
            bad = [i for i, length in zip(numbers, lengths, strict=True) if not (np.isfinite(length) and length > 0)]
            raise ValueError(f"no direction at layers {bad}: the vector there is zero, NaN or infinite (two equal sides?); leave those layers out")
        unit, norms = _settled(rows)
        return cls(unit, numbers, site, name, dict(meta or {}), norms)

    @property
    def d_model(self) -> int:
        return self.vectors.shape[1]

    def layer(self, index: int) -> Float[np.ndarray, " d_model"]:
        """The unit vector at block `index` (the block's own number)."""
        if index not in self.layers:
            raise KeyError(f"direction {self.name!r} has no layer {index}; it has {list(self.layers)}")
        return self.vectors[self.layers.index(index)]

    def __repr__(self) -> str:
        place = Place(self.site, self.layers, str(self.meta.get("position", "any position")))
        return " · ".join([f"Direction {self.name!r}", f"{len(self.layers)} layers × {self.d_model}", str(place), *self._provenance()])

    def _provenance(self) -> list[str]:
        """How it was found, and in what: the sides, if it is a difference of two."""
        sides = {name: self.meta[name] for name in ("a", "b") if isinstance(self.meta.get(name), Mapping) and "n" in self.meta[name]}
        found = [f"{name} = {_side_in_words(side)}" for name, side in sides.items()]
        method = str(self.meta.get("method", ""))
        return [f"{method}{': ' if method and found else ''}{'; '.join(found)}"] if method or found else []

    def save(self, path: str | os.PathLike[str], n_layers: int | None = None) -> Path:
        """Write it in the format of the path's suffix, whole or not at all: `.safetensors` (ours, everything kept), `.pt`
        (persona vectors), `.gguf` (control vector of llama.cpp and repeng), `.npz`, `.npy`. What belongs where in each, and
        what it has no place for, says `emlens.vectors`.

        n_layers: number of blocks of the model, which `.pt` and `.npy` have rows for; default: what `meta` says. A
        direction made by `from_array` or loaded comes back the same to the last bit. Warns where a format has no place for
        a layer. Errors: ValueError for another suffix, or a site or number of blocks that the format cannot hold.
        """
        return files.write(path, files.Rows(self.vectors, self.layers, self.site, self.name, self.meta, self.norms), n_layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: files.Shaped | None = None) -> "Direction":
        """Read what `save` or another house wrote.

        like: a model, or `vectors.Shape(d_model, n_layers)`: a file of another width, of other blocks, or transposed is
        refused. Errors: FileNotFoundError; ValueError for another suffix, a damaged file, or one that is no direction.
        """
        found = files.read(path, like)
        if found.norms is not None:
            return cls(found.vectors, found.layers, found.site, found.name, found.meta, found.norms)
        return cls.from_array(found.vectors, found.layers, found.site, found.name, found.meta)


def _settled(rows: Float[np.ndarray, "layer d_model"]) -> tuple[Float[np.ndarray, "layer d_model"], Float[np.ndarray, " layer"]]:
    """Unit vectors and lengths, float32, whose products, rounded to float32, have these very unit vectors and lengths.

    Normalising and multiplying again moves last bits for a round or two and then no more, except that the length of about
    one row in a hundred goes to and fro between two numbers: such rows are made longer by a millionth.
    """
    products = rows.astype(np.float32)
    for attempt in range(100):
        norms = np.linalg.norm(products.astype(np.float64), axis=1).astype(np.float32)
        unit = (products / norms[:, None].astype(np.float64)).astype(np.float32)
        again = (unit * norms[:, None].astype(np.float64)).astype(np.float32)
        moved = (again != products).any(axis=1)
        if not moved.any():
            break
        products = again
        if attempt % 4 == 3:
            products[moved] *= np.float32(1 + 2.0**-20)
    return unit, norms


# ---- finding and using


def mean_difference(a: Activations, b: Activations, name: str = "mean difference", weights: str | None = None) -> Direction:
    """The direction mean(a) - mean(b) at every layer, unit length (norms keep the lengths). Means over prompts, each
    counted once unless weighted.

    weights: a column of the facts of both sides, non-negative. With activations that are means over the tokens of an
    answer and their number as weights, both means are over all tokens pooled: what Soligo et al. 2025 (arXiv 2506.11618)
    take of a = misaligned and b = aligned answers.

    Whether it separates prompts it has not seen is `held_out_separation`'s question (`emlens.separation`), not this
    function's. Errors: ValueError for different places or widths, an empty side, two equal means, or weights that are
    negative, not finite or all 0; KeyError for a column that a side lacks.
    """
    check_same_place(a, b)
    difference = _mean(a, weights) - _mean(b, weights)
    told = {} if weights is None else {"weights": weights}
    return Direction.from_array(difference, a.layers, a.site, name, {**found_in("mean(a) - mean(b)", a=a, b=b), **told})


def _mean(acts: Activations, column: str | None) -> Float[np.ndarray, "layer d_model"]:
    """Mean over prompts, weighted by a column of the facts."""
    if column is None:
        return acts.values.mean(axis=0, dtype=np.float64)
    weights = np.asarray(facts_column(acts, column), dtype=np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"the weights {column!r} are to be finite, non-negative and not all 0; they go from {weights.min()} to {weights.max()}")
    return np.average(acts.values, axis=0, weights=weights)


def found_in(method: str, **sides: Activations) -> dict[str, Any]:
    """What a direction says of how and in which sets of prompts it was found."""
    meta: dict[str, Any] = {"method": method, "position": next(iter(sides.values())).position}
    architectures = {acts.meta.get("architecture") for acts in sides.values()} - {None}
    if len(architectures) == 1:
        meta["architecture"] = architectures.pop()
    for side, acts in sides.items():
        meta[side] = {"n": acts.n_prompts, **{key: acts.meta[key] for key in ("model", "adapter", "variants") if key in acts.meta}}
    return meta


def _side_in_words(side: Mapping[str, Any]) -> str:
    """A set of prompts that a direction was found in: model, adapter or variants subtracted, and how many."""
    what = " − ".join(side["variants"]) if "variants" in side else f"adapter {side['adapter']}" if side.get("adapter") else ""
    loaded = "loaded weights" if not what and "adapter" in side else ""
    return ", ".join(filter(None, [str(side.get("model") or ""), what or loaded, f"{side['n']} prompts"]))


def random_directions(like: Direction, n: int, seed: int, acts: Activations | None = None) -> list[Direction]:
    """n random directions with the layers, site and norms of `like`: the control of every steering and ablation.

    acts  None: uniform on the sphere, the same vector at every layer; a lenient control: most of such a direction lies where
          activations hardly vary. Activations at the same site: the same random mixture of the prompts' centred rows at
          every layer, to unit length: Gaussian of their covariance there, and turning from layer to layer no faster than
          the stream does. Directions drawn anew at each layer would, ablated at all of them, take far more away than one
          that persists through the depth.

    The first of them are the same for a larger n. Errors: ValueError when n < 1, for another site or width, layers that
    `acts` lacks, or activations that do not vary.
    """
    if n < 1:
        raise ValueError(f"n={n} random directions were asked for; at least 1 is needed")
    meta = {"method": "random", "seed": seed, "like": like.name, "position": like.meta.get("position", "any position")}
    if acts is None:
        rows = repeat(nulls.random_vectors(like.d_model, n, seed), "draws d_model -> draws layer d_model", layer=len(like.layers))
    else:
        rows, meta["method"] = _of_covariance(like, n, seed, acts), "random, from the covariance of activations"
    return [
        Direction(vectors.astype(np.float32), like.layers, like.site, f"random {i}", {**meta, "number": i}, like.norms)
        for i, vectors in enumerate(rows)
    ]


def _of_covariance(like: Direction, n: int, seed: int, acts: Activations) -> Float[np.ndarray, "draws layer d_model"]:
    """Unit vectors along X'g with X the centred rows of a layer and g standard normal, one g at all layers: Gaussian of the covariance X'X /
    prompts."""
    missing = [layer for layer in like.layers if layer not in acts.layers]
    if missing or (acts.site, acts.d_model) != (like.site, like.d_model):
        raise ValueError(
            f"the direction is for {like.site} of width {like.d_model} at layers {list(like.layers)}, the activations are {acts.site} of width "
            f"{acts.d_model} and lack layers {missing}: record them at the direction's place"
        )
    weights = np.random.default_rng(seed).standard_normal((n, acts.n_prompts))
    rows = np.empty((n, *like.vectors.shape))
    for place, layer in enumerate(like.layers):
        x = acts.layer(layer).astype(np.float64)
        rows[:, place] = weights @ (x - x.mean(axis=0))
    length = np.linalg.norm(rows, axis=2, keepdims=True)
    if not (length > 0).all():
        raise ValueError("the activations do not vary at some layer, so no direction can be drawn from them: give more prompts")
    return rows / length


def project(acts: Activations, direction: Direction) -> pd.DataFrame:
    """Scalar projection of every prompt on the direction at every layer of `acts`: a frame with index `id` and one
    column per layer.

    In units of the residual stream. `.stack()` gives the long form (id, layer). Errors: ValueError for another site,
    width, or layers the direction lacks.
    """
    missing = [layer for layer in acts.layers if layer not in direction.layers]
    if missing:
        raise ValueError(
            f"direction {direction.name!r} has no layers {missing}; it has {list(direction.layers)}: acts.select(layers=...) the common ones"
        )
    if (acts.site, acts.d_model) != (direction.site, direction.d_model):
        raise ValueError(
            f"the activations are {acts.site} of width {acts.d_model}, direction {direction.name!r} is for "
            f"{direction.site} of width {direction.d_model}: use both at one place of one model"
        )
    columns = [acts.layer(layer).astype(np.float64) @ direction.layer(layer).astype(np.float64) for layer in acts.layers]
    index = pd.Index(acts.facts["id"].to_numpy(), name="id")
    return pd.DataFrame(np.stack(columns, axis=1), index=index, columns=pd.Index(acts.layers, name="layer"))


def top_prompts(acts: Activations, direction: Direction, n: int = 10) -> pd.DataFrame:
    """The n prompts that score highest on the direction, at every layer of `acts`: a frame layer, rank, projection, and
    the facts of the prompt (id first). Lowest: give the direction turned round.

    A description of these prompts: the direction may have been fitted on them. Errors: as for `project`.
    """
    table = project(acts, direction)
    parts = []
    for layer in acts.layers:
        rows = np.argsort(-table[layer].to_numpy(), kind="stable")[:n]
        place = {"layer": layer, "rank": np.arange(1, len(rows) + 1), "projection": table[layer].to_numpy()[rows]}
        facts = acts.facts.iloc[rows].reset_index(drop=True)
        parts.append(pd.concat([pd.DataFrame(place), facts[["id", *(c for c in facts.columns if c not in ("id", *place))]]], axis=1))
    return pd.concat(parts, ignore_index=True)


def direction_tokens(
    direction: Direction,
    unembedding: Float[np.ndarray, "vocab d_model"],
    norm: Float[np.ndarray, " d_model"] | None = None,
    tokens: Sequence[str] | None = None,
    layer: int | None = None,
    k: int = 10,
) -> pd.DataFrame:
    """What a direction writes, by the logit lens (nostalgebraist 2020): the k tokens whose logits it raises and lowers most.

    score = U (g * v) less its mean over the vocabulary, which no softmax sees: how the final logits change per unit of
    the *normalised* stream along the unit vector v, with nothing else read of it on the way. z is score over the standard
    deviation of all tokens' scores: a direction that writes nothing in particular still has tokens at the ends, at
    |z| of 4 or so for 50,000 tokens.

    unembedding  U, a row per token. norm: g, what the final norm multiplies by (for Gemma 1 + its weight; for a LayerNorm,
                 which also subtracts the mean over d_model, centre the rows of U * g yourself); None: 1.
    tokens       their texts; None: numbers only. layer: which of the direction's layers; may be left out where it has one.

    Returns a frame layer, side ("raised" or "lowered"), rank, token_id, token, score, z. Errors: ValueError for other
    widths or lengths, NaN, or a layer left out of several.
    """
    if layer is None and len(direction.layers) > 1:
        raise ValueError(f"the direction has layers {list(direction.layers)}: say which one, layer=")
    vector = direction.layer(direction.layers[0] if layer is None else layer).astype(np.float64)
    shapes = {"unembedding": (np.shape(unembedding)[1:], vector.shape), "norm": (np.shape(norm if norm is not None else vector), vector.shape)}
    shapes["tokens"] = ((len(tokens) if tokens is not None else len(unembedding),), (len(unembedding),))
    wrong = [f"{what} {got} where {needed} is needed" for what, (got, needed) in shapes.items() if got != needed]
    if wrong:
        raise ValueError(f"the direction has d_model {direction.d_model} and the vocabulary {len(unembedding)} tokens: {'; '.join(wrong)}")
    score = np.asarray(unembedding, dtype=np.float32) @ (vector if norm is None else vector * norm).astype(np.float32)
    if not np.isfinite(score).all():
        raise ValueError("the scores of some tokens are NaN or infinite: give the unembedding and the norm's weights in float32")
    score = score.astype(np.float64) - score.mean(dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    ids = np.concatenate([order[:k], order[::-1][:k]])
    n = len(order[:k])
    out = pd.DataFrame({"layer": layer if layer is not None else direction.layers[0], "side": ["raised"] * n + ["lowered"] * n})
    texts = [""] * len(ids) if tokens is None else [tokens[i] for i in ids]
    return out.assign(rank=[*range(1, n + 1)] * 2, token_id=ids, token=texts, score=score[ids], z=score[ids] / (score.std() or 1.0))
