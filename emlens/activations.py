"""Place and Activations: where in a model, and what was read there, one row per prompt."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import store

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "final_norm")
"""TransformerLens' names. ``embed`` is what enters block 0, ``final_norm`` what leaves the final norm; both are one layer."""

SINGLE_LAYER_SITES = ("embed", "final_norm")


@dataclass(frozen=True)
class Place:
    """A spot in a model: ``site``, block indices ``layers`` counted from 0, and a named ``position`` (house.md, Places)."""

    site: str
    layers: tuple[int, ...]
    position: str

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"unknown site {self.site!r}; sites are {', '.join(SITES)}")
        if not self.layers:
            raise ValueError("a place needs at least one layer")

    def __str__(self) -> str:
        return f"{self.site} · layers {_span(self.layers)} · {self.position}"


def _span(layers: Sequence[int]) -> str:
    if len(layers) > 2 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}…{layers[-1]}"
    return ",".join(str(i) for i in layers)


@dataclass(frozen=True, eq=False)
class Activations:
    """``values[prompt, layer, d_model]`` (float32) and a table ``facts`` with one row per prompt.

    Any fact about a prompt (text, set, category, a score after tuning) is a column of ``facts``; ``id`` names the prompt. ``meta`` carries the
    identity: model, adapter, template, dtype, versions. ``after - before`` pairs rows by ``id``.

    Raises:
        ValueError: shapes that do not fit, duplicate ids, or NaN/Inf in the values.
    """

    values: Float[np.ndarray, "prompt layer d_model"]
    facts: pd.DataFrame
    place: Place
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.values
        if values.ndim != 3:
            raise ValueError(f"values have shape {values.shape}; needed are three axes [prompt, layer, d_model]")
        if len(self.facts) != len(values):
            raise ValueError(f"{len(values)} rows of values but {len(self.facts)} rows of facts; one row per prompt is needed")
        if len(self.place.layers) != values.shape[1]:
            raise ValueError(f"{values.shape[1]} layers of values but {len(self.place.layers)} layer indices {self.place.layers}")
        if "id" not in self.facts.columns:
            raise ValueError("facts need a column 'id' that names each prompt")
        if self.facts["id"].duplicated().any():
            twice = self.facts["id"][self.facts["id"].duplicated()].iloc[0]
            raise ValueError(f"duplicate prompt id {twice!r} in facts; ids must be unique")
        bad = ~np.isfinite(values).all(axis=(1, 2))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            layer = self.place.layers[int(np.flatnonzero(~np.isfinite(values[row]).all(axis=-1))[0])]
            raise ValueError(
                f"activations hold NaN or Inf: {int(bad.sum())} of {len(values)} prompts, first {self.facts['id'].iloc[row]!r} at layer {layer}. "
                "float16 overflows on massive activations: load the model with dtype='float32' or 'bfloat16'."
            )

    @classmethod
    def from_array(
        cls,
        values: np.ndarray,
        facts: pd.DataFrame | Mapping[str, Sequence[Any]] | None = None,
        layers: Iterable[int] | None = None,
        site: str = "resid_post",
        position: str = "last",
        meta: Mapping[str, Any] | None = None,
    ) -> "Activations":
        """Wrap an array ``[prompt, layer, d_model]`` (or ``[prompt, d_model]``: one layer); no model is needed."""
        values = np.asarray(values, dtype=np.float32)
        if values.ndim == 2:
            values = values[:, None, :]
        if values.ndim != 3:
            raise ValueError(f"values have shape {values.shape}; needed are [prompt, layer, d_model] or [prompt, d_model]")
        table = pd.DataFrame(facts).reset_index(drop=True) if facts is not None else pd.DataFrame(index=range(len(values)))
        if "id" not in table.columns:
            table.insert(0, "id", [f"row-{i:05d}" for i in range(len(table))])
        places = Place(site, tuple(range(values.shape[1])) if layers is None else tuple(int(i) for i in layers), position)
        return cls(values, table, places, dict(meta or {}))

    # ---- what it is

    @property
    def layers(self) -> tuple[int, ...]:
        return self.place.layers

    @property
    def site(self) -> str:
        return self.place.site

    @property
    def position(self) -> str:
        return self.place.position

    @property
    def n_prompts(self) -> int:
        return self.values.shape[0]

    @property
    def d_model(self) -> int:
        return self.values.shape[2]

    @property
    def ids(self) -> pd.Series:
        return self.facts["id"]

    def __len__(self) -> int:
        return self.n_prompts

    def __repr__(self) -> str:
        named = " − ".join(str(v) for v in self.meta.get("variants", [])) or str(self.meta.get("model", ""))
        tail = f" · {named}" if named else ""
        return f"Activations {self.n_prompts} prompts × {len(self.layers)} layers × {self.d_model} · {self.place}{tail}"

    # ---- choosing

    def layer(self, index: int) -> Float[np.ndarray, "prompt d_model"]:
        """The rows at block ``index`` (the block's own number, not the place in the array)."""
        if index not in self.layers:
            raise KeyError(f"layer {index} was not recorded; recorded are {_span(self.layers)}")
        return self.values[:, self.layers.index(index), :]

    def select(self, layers: Iterable[int] | None = None, ids: Iterable[str] | None = None) -> "Activations":
        """The given layers and prompts, in the given order."""
        out = self
        if layers is not None:
            wanted = tuple(int(i) for i in layers)
            missing = [i for i in wanted if i not in self.layers]
            if missing:
                raise KeyError(f"layers {missing} were not recorded; recorded are {_span(self.layers)}")
            columns = [self.layers.index(i) for i in wanted]
            out = replace(out, values=out.values[:, columns, :], place=replace(out.place, layers=wanted))
        if ids is not None:
            rows = pd.Index(out.ids).get_indexer(pd.Index(list(ids)))
            if (rows < 0).any():
                raise KeyError(f"{int((rows < 0).sum())} of the ids asked for are not among the {out.n_prompts} prompts")
            out = out._rows(rows)
        return out

    def where(self, condition: str | Sequence[bool] | np.ndarray | pd.Series) -> "Activations":
        """The prompts for which a pandas query on the facts (``"aligned < 30"``) or a boolean mask holds; may be empty."""
        if isinstance(condition, str):
            mask = np.zeros(self.n_prompts, dtype=bool)
            mask[self.facts.reset_index(drop=True).query(condition).index.to_numpy()] = True
        else:
            mask = np.asarray(condition)
            if mask.dtype != bool or mask.shape != (self.n_prompts,):
                raise ValueError(f"a mask of {self.n_prompts} booleans is needed; got {mask.dtype} of shape {mask.shape}")
        return self._rows(np.flatnonzero(mask))

    def _rows(self, rows: np.ndarray) -> "Activations":
        return replace(self, values=self.values[rows], facts=self.facts.iloc[rows].reset_index(drop=True))

    # ---- facts and differences

    def with_facts(self, table: pd.DataFrame) -> "Activations":
        """Join columns of ``table`` by prompt ``id`` (a column or the index); a column that exists is replaced.

        Raises:
            ValueError: duplicate ids in ``table``, or prompts it knows nothing about.
        """
        joined = table if "id" in table.columns else table.rename_axis("id").reset_index()
        if joined["id"].duplicated().any():
            raise ValueError("the table of facts has duplicate ids; average it to one row per prompt first (em.by_question does)")
        missing = set(self.ids) - set(joined["id"])
        if missing:
            raise ValueError(f"the table of facts lacks {len(missing)} of {self.n_prompts} prompts, e.g. {sorted(missing)[0]!r}")
        kept = self.facts.drop(columns=[c for c in joined.columns if c in self.facts.columns and c != "id"])
        return replace(self, facts=kept.merge(joined, on="id", how="left", validate="one_to_one"))

    def __sub__(self, other: "Activations") -> "Activations":
        """The shift (the field also says *activation delta*): same prompts paired by id, same place, else refused."""
        if not isinstance(other, Activations):
            return NotImplemented
        if self.place != other.place:
            raise ValueError(f"cannot subtract two different places: {self.place} and {other.place}. Record both at one place.")
        if self.d_model != other.d_model:
            raise ValueError(f"cannot subtract: d_model is {self.d_model} and {other.d_model}; two different architectures")
        if set(self.ids) != set(other.ids):
            only = sorted(set(self.ids) ^ set(other.ids))
            raise ValueError(
                f"cannot subtract different prompts: {len(only)} ids are on one side only, e.g. {only[0]!r}. "
                "Record the same prompts before and after, or select(ids=…) the common ones."
            )
        paired = other.select(ids=self.ids)
        if "prompt_sha" in self.facts and "prompt_sha" in paired.facts:
            differ = self.facts["prompt_sha"].to_numpy() != paired.facts["prompt_sha"].to_numpy()
            if differ.any():
                raise ValueError(
                    f"cannot subtract different prompts: {int(differ.sum())} prompts share an id but not a text, first "
                    f"{self.ids[differ].iloc[0]!r}. Record one set of prompts before and after."
                )
        mine, theirs = self.meta.get("template_sha256"), other.meta.get("template_sha256")
        if mine and theirs and mine != theirs:
            raise ValueError(f"cannot subtract: the chat templates differ ({mine[:8]} and {theirs[:8]}). Give both models one chat_template.")
        variants = [self.meta.get("adapter") or "before", other.meta.get("adapter") or "before"]
        return replace(self, values=self.values - paired.values, meta={**self.meta, "variants": variants})

    # ---- keeping

    def save(self, folder: str | os.PathLike) -> Path:
        """Keep as a folder: ``values.safetensors``, ``facts.parquet`` and a manifest with checksums; whole or not at all."""
        from safetensors.numpy import save_file

        made_by = {"kind": "activations", "site": self.site, "layers": self.layers, "position": self.position, "meta": self.meta}
        with store.writing(folder, made_by) as temporary:
            save_file({"values": np.ascontiguousarray(self.values)}, temporary / "values.safetensors")
            self.facts.to_parquet(temporary / "facts.parquet")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Activations":
        """Read what :meth:`save` kept, after checking every byte; raises :class:`emlens.store.StoreError` otherwise."""
        from safetensors.numpy import load_file

        made_by = store.verify(folder)
        if made_by.get("kind") != "activations":
            raise store.StoreError(f"{folder} holds {made_by.get('kind')!r}, not activations")
        values = load_file(Path(folder) / "values.safetensors")["values"]
        place = Place(made_by["site"], tuple(made_by["layers"]), made_by["position"])
        return cls(values, pd.read_parquet(Path(folder) / "facts.parquet"), place, made_by["meta"])
