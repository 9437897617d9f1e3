"""What files of directions say, and the checks they share."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from .. import store

UNKNOWN = "any position"
"""Where a direction was read, when nothing says so."""


class LeftOutWarning(UserWarning):
    """A file has no place for one of a direction's layers."""


class Shape(NamedTuple):
    """Of a model, where no model is at hand."""

    d_model: int
    n_layers: int


class Shaped(Protocol):
    """A model, or a :class:`Shape`."""

    @property
    def d_model(self) -> int: ...

    @property
    def n_layers(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Rows:
    """What a file of directions says: ``vectors[layer, d_model]`` of any length, times ``norms[layer]`` where those are kept apart."""

    vectors: Float[np.ndarray, "layer d_model"]
    layers: tuple[int, ...]
    site: str = "resid_post"
    name: str = "direction"
    meta: dict[str, Any] = field(default_factory=dict)
    norms: Float[np.ndarray, " layer"] | None = None

    @property
    def scaled(self) -> Float[np.ndarray, "layer d_model"]:
        """The vectors at their lengths, float32: what other houses' files hold."""
        return np.asarray(self.vectors * (1.0 if self.norms is None else self.norms.astype(np.float64)[:, None]), dtype=np.float32)


def blocks_said(meta: Mapping[str, Any]) -> int | None:
    """Number of blocks as recorded activations say it: ``{"architecture": "LlamaForCausalLM 30×576"}``, or ``n_layers`` itself."""
    if meta.get("n_layers"):
        return int(meta["n_layers"])
    found = re.search(r"(\d+)×\d+$", str(meta.get("architecture", "")))
    return int(found[1]) if found else None


def placed(target: Path, rows: Rows, without: int | None = None, why: str = "") -> Rows:
    """The rows that a format of ``resid_post`` alone has a place for, at their lengths; a warning names the layer it is without."""
    if rows.site != "resid_post":
        raise ValueError(f"{target.suffix} files hold directions of resid_post; this one is of {rows.site}: save it as .safetensors or .npz")
    kept = [n for n, i in enumerate(rows.layers) if i != without]
    if not kept:
        raise ValueError(f"{target.name} would be empty: {target.suffix} files have no place for layer {without} ({why}); save it as .safetensors")
    if len(kept) < len(rows.layers):
        warnings.warn(f"{target.name} leaves layer {without} out ({why}); .safetensors keeps all", LeftOutWarning, stacklevel=5)
    return replace(rows, vectors=rows.scaled[kept], layers=tuple(rows.layers[n] for n in kept), norms=None)


def every_block(target: Path, rows: Rows, n_layers: int | None) -> Float[np.ndarray, "block d_model"]:
    """A row for each block of the model, zeros where nothing is known."""
    blocks = n_layers or blocks_said(rows.meta)
    if blocks is None:
        raise ValueError(f"{target.suffix} files have a row for every block of the model; how many has it? save(path, n_layers=model.n_layers)")
    if max(rows.layers) >= blocks or min(rows.layers) < 0:
        raise ValueError(f"the direction has layers {list(rows.layers)}, a model of {blocks} blocks 0 … {blocks - 1}: give its own n_layers")
    out = np.zeros((blocks, rows.vectors.shape[1]), dtype=np.float32)
    out[list(rows.layers)] = rows.vectors
    return out


def known(stack: Float[np.ndarray, "block d_model"], target: Path, name: str, meta: dict[str, Any]) -> Rows:
    """The rows that are not zero."""
    layers = tuple(int(i) for i in np.flatnonzero((stack != 0).any(axis=1)))
    return Rows(stack[list(layers)], layers, name=name, meta={"source": target.name, **meta})


def refuse_turned(shape: Sequence[int], needed: int | None, like: Shaped | None, target: Path, what: str) -> None:
    """Refuse an array that is transposed, or has another number of rows than the format has for the model's blocks."""
    n, width = shape
    turned = n > width if like is None else n == like.d_model != width
    if turned:
        raise ValueError(f"{target} holds [{n}, {width}], which looks transposed; needed is {what}: write the array's transpose")
    if like is not None and width == like.d_model and n != needed:
        other = {like.n_layers: " (.npy files have those)", like.n_layers + 1: " (.pt files of persona vectors have those)"}.get(n, "")
        raise ValueError(
            f"{target} has {n} rows{other}; {what} of a model of {like.n_layers} blocks has {needed}: a row read one off steers elsewhere"
        )


def told_of(rows: Rows) -> str:
    """All that is not numbers, as JSON."""
    facts = {"layers": rows.layers, "site": rows.site, "name": rows.name, "meta": rows.meta}
    return json.dumps(store.plain(facts), ensure_ascii=False)


def named(told: str, vectors: np.ndarray, norms: np.ndarray | None = None) -> Rows:
    """The rows, and what JSON says of them."""
    facts = json.loads(told)
    return Rows(vectors, tuple(facts["layers"]), facts["site"], facts["name"], facts["meta"], norms)
