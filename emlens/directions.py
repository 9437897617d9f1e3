"""Directions: one unit vector per layer; found as a mean difference, projected on, saved."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import nulls, store
from ._sides import check_same_place
from .activations import Activations, Place

FORMAT = "emlens direction 1"


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
        """Normalise rows [layer, d_model] of any length; the lengths are kept in `norms`. Layers default to 0, 1, 2,
        ..."""
        rows = np.asarray(vectors, dtype=np.float64)
        if rows.ndim != 2:
            raise ValueError(f"vectors have shape {rows.shape}: [layer, d_model] is needed, a row per layer")
        numbers = tuple(range(len(rows))) if layers is None else tuple(int(i) for i in layers)
        lengths = np.linalg.norm(rows, axis=1)
        if len(numbers) == len(rows) and not (np.isfinite(lengths) & (lengths > 0)).all():
            bad = [i for i, length in zip(numbers, lengths, strict=True) if not (np.isfinite(length) and length > 0)]
            raise ValueError(f"no direction at layers {bad}: the vector there is zero, NaN or infinite (two equal sides?); leave those layers out")
        unit = (rows / lengths[:, None]).astype(np.float32)
        return cls(unit, numbers, site, name, dict(meta or {}), lengths.astype(np.float32))

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
        return f"Direction {self.name!r} · {len(self.layers)} layers × {self.d_model} · {place}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `<name>.safetensors`: tensors `vectors`, `norms`; layers, site, name and meta in the header. Whole or
        not at all."""
        from safetensors.numpy import save_file

        target = _safetensors(path)
        tensors = {"vectors": np.ascontiguousarray(self.vectors), "norms": np.asarray(self.norms)}
        facts = {"layers": self.layers, "site": self.site, "name": self.name, "meta": self.meta}
        told = json.dumps(store.plain(facts), ensure_ascii=False)
        header = {"format": FORMAT, "direction": told, "sha256": _digest(tensors, told)}
        with store.replacing(target) as temporary:
            save_file(tensors, temporary, metadata=header)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Direction":
        """Read what `save` wrote. Errors: FileNotFoundError; ValueError for another suffix or a safetensors file that
        is not a direction."""
        from safetensors import SafetensorError, safe_open

        target = _safetensors(path)
        if not target.is_file():
            raise FileNotFoundError(f"there is no file {target}: save a direction there first, or give the path of one")
        try:
            with safe_open(target, framework="numpy") as opened:
                header = opened.metadata() or {}
                names: list[str] = list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{target} is damaged or not a safetensors file ({error}): write it again") from error
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{target} is no direction of ours (format {header.get('format')!r}, needed {FORMAT!r}): "
                "read the file yourself and build one with Direction.from_array(vectors, layers)"
            )
        if set(tensors) != {"vectors", "norms"} or _digest(tensors, header["direction"]) != header.get("sha256"):
            raise ValueError(f"{target} is damaged: its content is not what its header says: write it again")
        facts = json.loads(header["direction"])
        return cls(tensors["vectors"], tuple(facts["layers"]), facts["site"], facts["name"], facts["meta"], tensors["norms"])


def _safetensors(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"a direction is kept as .safetensors; got {target.name!r}: use a path that ends in .safetensors")
    return target


def _digest(tensors: dict[str, np.ndarray], told: str) -> str:
    """SHA-256 of everything a saved direction says."""
    joined = hashlib.sha256(told.encode("utf-8"))
    for name in ("vectors", "norms"):
        joined.update(np.ascontiguousarray(tensors[name], dtype="<f4").tobytes())
    return joined.hexdigest()


# ---- finding and using


def mean_difference(a: Activations, b: Activations, name: str = "mean difference") -> Direction:
    """The direction mean(a) - mean(b) at every layer, unit length (norms keep the lengths). Means over prompts, each
    counted once.

    Soligo et al. 2025 (arXiv 2506.11618) take a = misaligned and b = aligned answers. Whether it separates prompts it
    has not seen is `held_out_separation`'s question (`emlens.separation`), not this function's. Errors: ValueError for different places or
    widths, an empty side, or two equal means.
    """
    check_same_place(a, b)
    difference = a.values.mean(axis=0, dtype=np.float64) - b.values.mean(axis=0, dtype=np.float64)
    meta: dict[str, Any] = {"method": "mean(a) - mean(b)", "position": a.position}
    for side, acts in (("a", a), ("b", b)):
        meta[side] = {"n": acts.n_prompts, **{key: acts.meta[key] for key in ("model", "adapter") if key in acts.meta}}
    return Direction.from_array(difference, a.layers, a.site, name, meta)


def random_directions(like: Direction, n: int, seed: int, acts: Activations | None = None) -> list[Direction]:
    """n random directions with the layers, site and norms of `like`, independent over layers: the control of every
    steering.

    acts  None: uniform on the sphere, a lenient control: most of such a direction lies where activations hardly vary.
          Activations at the same site: drawn from their covariance at each layer (Gaussian, then unit length), so that
          controls point where the model's own states differ.

    The first of them are the same for a larger n. Errors: ValueError when n < 1, for another site or width, layers that
    `acts` lacks, or activations that do not vary.
    """
    if n < 1:
        raise ValueError(f"n={n} random directions were asked for; at least 1 is needed")
    meta = {"method": "random", "seed": seed, "like": like.name, "position": like.meta.get("position", "any position")}
    if acts is None:
        rows = nulls.random_vectors(like.d_model, n * len(like.layers), seed).reshape(n, *like.vectors.shape)
    else:
        rows, meta["method"] = _of_covariance(like, n, seed, acts), "random, from the covariance of activations"
    return [
        Direction(vectors.astype(np.float32), like.layers, like.site, f"random {i}", {**meta, "number": i}, like.norms)
        for i, vectors in enumerate(rows)
    ]


def _of_covariance(like: Direction, n: int, seed: int, acts: Activations) -> Float[np.ndarray, "draws layer d_model"]:
    """Unit vectors along X'g with X the centred rows of a layer and g standard normal: Gaussian of the covariance X'X / prompts."""
    missing = [layer for layer in like.layers if layer not in acts.layers]
    if missing or (acts.site, acts.d_model) != (like.site, like.d_model):
        raise ValueError(
            f"the direction is for {like.site} of width {like.d_model} at layers {list(like.layers)}, the activations are {acts.site} of width "
            f"{acts.d_model} and lack layers {missing}: record them at the direction's place"
        )
    weights = np.random.default_rng(seed).standard_normal((n, len(like.layers), acts.n_prompts))
    rows = np.empty((n, *like.vectors.shape))
    for place, layer in enumerate(like.layers):
        x = acts.layer(layer).astype(np.float64)
        rows[:, place] = weights[:, place] @ (x - x.mean(axis=0))
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
