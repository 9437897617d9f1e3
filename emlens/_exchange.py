"""Activations to numpy, pandas and datasets, and back."""

from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import _identity, prompts, store

Made = TypeVar("Made", bound="Exchange")


class Exchange:
    """What :class:`Activations` can become, and what it can be made from again. (``from_array`` is the way back from numpy.)"""

    values: Any
    facts: pd.DataFrame
    meta: dict[str, Any]
    ids: Any
    layers: Any
    site: Any
    position: Any
    d_model: Any
    from_array: Any
    with_facts: Any

    def to_numpy(self) -> Float[np.ndarray, "prompt layer d_model"]:
        """The values as an array in memory, the caller's own (``from_array`` is the way back)."""
        return np.array(self.values, dtype=np.float32, order="C")

    def to_pandas(self) -> pd.DataFrame:
        """A row per prompt × layer (index ``id``, ``layer``), a column per coordinate 0 … d_model − 1; place and meta in ``attrs``.

        The facts stay in :attr:`facts`: ``acts.to_pandas().join(acts.facts.set_index("id"))`` repeats them per layer.
        """
        index = pd.MultiIndex.from_product([self.ids, self.layers], names=["id", "layer"])
        frame = pd.DataFrame(self.to_numpy().reshape(len(index), self.d_model), index=index)
        frame.attrs = {"site": self.site, "position": self.position, "meta": store.plain(self.meta)}
        return frame

    @classmethod
    def from_pandas(cls: type[Made], frame: pd.DataFrame, facts: pd.DataFrame | None = None) -> Made:
        """Read a frame as :meth:`to_pandas` makes it (rows in any order), and join ``facts`` by id.

        Raises:
            ValueError: another index, or a prompt that lacks a layer.
        """
        if list(frame.index.names) != ["id", "layer"]:
            raise ValueError(f"the rows need an index of 'id' and 'layer'; found {list(frame.index.names)}: frame.set_index(['id', 'layer'])")
        ids, layers = (frame.index.get_level_values(level).unique() for level in ("id", "layer"))
        full = pd.MultiIndex.from_product([ids, layers], names=["id", "layer"])
        if frame.index.has_duplicates or len(full) != len(frame):
            raise ValueError(f"{len(ids)} prompts × {len(layers)} layers need {len(full)} rows, each once; found {len(frame)}")
        values = frame.reindex(full).to_numpy(dtype=np.float32).reshape(len(ids), len(layers), frame.shape[1])
        site, position = frame.attrs.get("site", "resid_post"), frame.attrs.get("position", "last")
        out = cls.from_array(values, {"id": list(ids)}, layers, site, position, _identity.read(frame.attrs.get("meta", {})))
        return out if facts is None else out.with_facts(facts)

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset``: a row per prompt, the facts, and a column ``layer_<i>`` of d_model floats per layer.

        Site, position and meta are JSON in ``dataset.info.description``, which the hub and ``save_to_disk`` keep.
        """
        columns = {f"layer_{i}": list(np.array(self.values[:, c])) for c, i in enumerate(self.layers)}
        made = prompts.to_dataset(self.facts.assign(**columns))
        made.info.description = store.canonical({"site": self.site, "position": self.position, "meta": self.meta})
        return made

    @classmethod
    def from_dataset(cls: type[Made], dataset: Any) -> Made:
        """Read a ``datasets.Dataset`` as :meth:`to_dataset` makes it.

        Raises:
            ValueError: no column ``layer_<i>``.
        """
        layers = [int(c.removeprefix("layer_")) for c in dataset.column_names if c.removeprefix("layer_").isdecimal() and c.startswith("layer_")]
        if not layers:
            raise ValueError(f"the dataset has no columns layer_0, layer_1, …; its columns are {dataset.column_names}")
        told = _identity.told(dataset.info.description)
        values = np.stack([np.asarray(dataset.with_format("numpy")[f"layer_{i}"][:], dtype=np.float32) for i in layers], axis=1)
        facts = dataset.remove_columns([f"layer_{i}" for i in layers]).with_format(None).to_pandas()
        return cls.from_array(values, facts, layers, told["site"], told["position"], told["meta"])
