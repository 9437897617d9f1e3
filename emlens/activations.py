"""Place and Activations: where in a model, and what was read there, one row per prompt."""

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from . import _identity, store
from ._exchange import Exchange

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "final_norm")
"""TransformerLens' names. ``embed`` is what enters block 0, ``final_norm`` what leaves the final norm; both are one layer."""

SINGLE_LAYER_SITES = ("embed", "final_norm")

ROW_ID, INVENTED = "row-{:05d}", r"row-\d{5,}"
"""The id of a prompt that came without one, and how such ids are known."""

FACTS = "facts.parquet"


@dataclass(frozen=True)
class Place:
    """A spot in a model: ``site``, block indices ``layers`` counted from 0, and a named ``position``.

    Sites are TransformerLens' names: the stream ``resid_pre``, ``resid_mid``, ``resid_post`` (of the last block: before the final norm), what is
    added to it ``attn_out``, ``mlp_out`` (``resid_pre + attn_out + mlp_out = resid_post`` in every family), and the single layers ``embed``,
    ``final_norm``. Positions are ``last, mean, mean_all``, …: ``help(em.positions)`` says what each is.
    """

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
class Activations(Exchange):
    """``values[prompt, layer, d_model]`` (float32) and a table ``facts`` with one row per prompt.

    Any fact about a prompt (text, set, category, a score after tuning) is a column of ``facts``; ``id`` names the prompt. ``meta`` carries the
    identity: model, adapter, template, dtype, versions. ``after - before`` pairs rows by ``id``. What was kept is opened memory-mapped
    (:meth:`load`): prompts and layers are then read from the disk when they are used, and slices of them stay on it.

    Where the weights had 16 bits, ``meta["noise_floor"]`` holds ``{layer: rms over prompts and d_model of their rounding noise}``, in the units
    of the values; a shift carries both sides' noise.

    Args:
        checked: the values are known to hold no NaN or Inf, and are not read to see.

    Raises:
        ValueError: shapes that do not fit, duplicate ids, or NaN/Inf in the values.
    """

    values: Float[np.ndarray, "prompt layer d_model"]
    facts: pd.DataFrame
    place: Place
    meta: dict[str, Any] = field(default_factory=dict)
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
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
        if not checked:
            self._refuse_nan()

    def _refuse_nan(self) -> None:
        finite = [np.isfinite(rows).all(axis=(1, 2)) for _, rows in store.pieces(self.values)]
        bad = np.flatnonzero(~np.concatenate(finite)) if finite else np.zeros(0, dtype=int)
        if len(bad):
            layer = self.place.layers[int(np.flatnonzero(~np.isfinite(self.values[bad[0]]).all(axis=-1))[0])]
            raise ValueError(
                f"activations hold NaN or Inf: {len(bad)} of {len(self.values)} prompts, first {self.facts['id'].iloc[bad[0]]!r} at layer {layer}. "
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
        """Wrap an array ``[prompt, layer, d_model]`` (or ``[prompt, d_model]``: one layer); no model is needed.

        Args:
            facts: a row per prompt, in the order of the rows. ``id`` names the prompt: recordings are paired by it, and without it rows are
                named by their number. ``messages``, ``text``, ``question`` or ``prompt`` hold the text (for baselines of text, and to find
                copies), any column may be a target, a baseline, or groups (``category``).
            layers: block indices; 0, 1, … if not given.
            site: one of the names of TransformerLens; ``position``: what was read, say ``"last"``.
            meta: of which model they are; recordings of two models are told apart by it.
        """
        values = np.asarray(values, dtype=np.float32)
        if values.ndim == 2:
            values = values[:, None, :]
        if values.ndim != 3:
            raise ValueError(f"values have shape {values.shape}; needed are [prompt, layer, d_model] or [prompt, d_model]")
        table = pd.DataFrame(facts).reset_index(drop=True) if facts is not None else pd.DataFrame(index=range(len(values)))
        if "id" not in table.columns:
            table.insert(0, "id", [ROW_ID.format(i) for i in range(len(table))])
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

    @property
    def is_shift(self) -> bool | None:
        """True of what was subtracted, False of what a model recorded, None where nobody said (arrays)."""
        return _identity.is_shift(self.meta)

    def __len__(self) -> int:
        return self.n_prompts

    def __iter__(self) -> Iterator["Activations"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        shown = [f"Activations {self.n_prompts} prompts × {len(self.layers)} layers × {self.d_model}", str(self.place)]
        return " · ".join([*shown, *filter(None, [_identity.shown(self.meta)]), *self._noise()])

    def _noise(self) -> list[str]:
        """The noise floor beside the rms of the values, both the median over layers; of a large array, of rows spread over it."""
        floor = [v for layer, v in self.meta.get("noise_floor", {}).items() if layer in self.layers]
        if not floor or not self.values.size:
            return []
        some = self.values[:: -(-self.n_prompts // 256)]
        rms = np.sqrt(np.square(some, dtype=np.float64).mean(axis=(0, 2)))
        return [f"rms {'≈ ' if len(some) < self.n_prompts else ''}{np.median(rms):.3g}, noise floor {np.median(floor):.2g}"]

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        size = f"{self.values.nbytes / 2**20:,.1f} MiB {'on the disk' if _mapped(self.values) else 'in memory'}"
        rows = {
            "prompts": f"{self.n_prompts:,}",
            "place": str(self.place),
            "values": f"{self.n_prompts:,} × {len(self.layers)} × {self.d_model} float32, {size}",
            **{k: self.meta[k] for k in ("architecture", "dtype") if self.meta.get(k)},
            "shift" if self.is_shift else "variant": _identity.shown(self.meta),
            "noise": "; ".join(self._noise()),
            "facts": ", ".join(str(c) for c in self.facts.columns),
        }
        cells = [f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items() if v]
        return f"<table><caption>Activations</caption>{''.join(cells)}</table>"

    # ---- choosing

    def layer(self, index: int) -> Float[np.ndarray, "prompt d_model"]:
        """The rows at block ``index`` (the block's own number, not the place in the array)."""
        if index not in self.layers:
            raise KeyError(f"layer {index} was not recorded; recorded are {_span(self.layers)}")
        return self.values[:, self.layers.index(index), :]

    def __getitem__(self, rows: Any) -> "Activations":
        """Prompts by a slice, a row number, a list of row numbers or a boolean mask; slices are views (mapped values stay on the disk)."""
        if isinstance(rows, slice):
            return self._rows(rows)
        chosen = np.asarray(rows)
        if isinstance(rows, tuple) or chosen.ndim > 1 or not (chosen.size == 0 or chosen.dtype == bool or np.issubdtype(chosen.dtype, np.integer)):
            raise TypeError(
                f"{rows!r} does not choose prompts; give a slice, row numbers or a mask of booleans. Layers: select(layers=…); ids: select(ids=…)"
            )
        if chosen.dtype == bool:
            return self.where(chosen)
        numbers = chosen.astype(np.int64).reshape(-1)
        outside = numbers[(numbers < -self.n_prompts) | (numbers >= self.n_prompts)]
        if len(outside):
            raise IndexError(f"row {outside[0]} is outside: there are {self.n_prompts} prompts")
        return self._rows(_sliced(numbers % max(1, self.n_prompts)))

    def select(self, layers: Iterable[int] | None = None, ids: Iterable[str] | None = None) -> "Activations":
        """The given layers and prompts, in the given order. Evenly spaced ones are views, as in :meth:`__getitem__`."""
        out = self
        if layers is not None:
            wanted = tuple(int(i) for i in layers)
            missing = [i for i in wanted if i not in self.layers]
            if missing:
                raise KeyError(f"layers {missing} were not recorded; recorded are {_span(self.layers)}")
            columns = _sliced(np.array([self.layers.index(i) for i in wanted], dtype=np.int64))
            meta = _identity.of_layers(out.meta, wanted)
            out = replace(out, values=out.values[:, columns, :], place=replace(out.place, layers=wanted), meta=meta, checked=True)
        if ids is not None:
            rows = pd.Index(out.ids).get_indexer(pd.Index(list(ids)))
            if (rows < 0).any():
                raise KeyError(f"{int((rows < 0).sum())} of the ids asked for are not among the {out.n_prompts} prompts")
            out = out._rows(_sliced(rows))
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
        return self._rows(_sliced(np.flatnonzero(mask)))

    def _rows(self, rows: slice | np.ndarray) -> "Activations":
        return replace(self, values=self.values[rows], facts=self.facts.iloc[rows].reset_index(drop=True), checked=True)

    @classmethod
    def concat(cls, parts: Iterable["Activations"]) -> "Activations":
        """The prompts of several recordings at one place of one architecture, after each other, in memory.

        What ``meta`` says alike of all parts is kept; where they differ, ``meta["parts"]`` lists what each says. Noise floors are pooled.

        Raises:
            ValueError: no part, an id in two parts, shifts with recordings, or different places, widths, architectures or chat templates.
        """
        given = list(parts)
        if not given:
            raise ValueError("there is nothing to put together: give at least one Activations")
        first = given[0]
        for part in given[1:]:
            _refuse_unlike(first, part, "put together")
            if {first.is_shift, part.is_shift} == {True, False}:
                raise ValueError("cannot put together shifts and recordings: subtract `before` from all of them, or from none")
        meta = _identity.merged([part.meta for part in given], [len(part) for part in given])
        facts = pd.concat([part.facts for part in given], ignore_index=True)
        facts.attrs = {k: v for k, v in first.facts.attrs.items() if all(store.plain(p.facts.attrs.get(k)) == store.plain(v) for p in given)}
        if facts["id"].duplicated().any():
            twice = facts["id"][facts["id"].duplicated()].iloc[0]
            raise ValueError(f"prompt id {twice!r} is in two parts; ids must be unique. Leave it out of one: part.where(~part.ids.isin(other.ids))")
        return replace(first, values=np.concatenate([part.values for part in given]), facts=facts, meta=meta, checked=True)

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
        return replace(self, facts=kept.merge(joined, on="id", how="left", validate="one_to_one"), checked=True)

    def __sub__(self, other: "Activations") -> "Activations":
        """The shift (the field also says *activation delta*): same prompts paired by id, same place, else refused."""
        return self.minus(other) if isinstance(other, Activations) else NotImplemented

    def minus(self, other: "Activations", templates_differ: bool = False) -> "Activations":
        """``after.minus(before)`` is ``after - before``; the two may come from two loads of one architecture (a full fine-tune, another revision).

        Args:
            other: the same prompts at the same place.
            templates_differ: allow that the two were given different chat templates; the difference then is partly one of the texts read.

        Raises:
            ValueError: different places, widths, architectures, prompts (ids, texts, numbers of tokens) or, unless told, chat templates.
        """
        _refuse_unlike(self, other, "subtract", templates_differ)
        if set(self.ids) != set(other.ids):
            only = sorted(set(self.ids) ^ set(other.ids))
            raise ValueError(
                f"cannot subtract different prompts: {len(only)} ids are on one side only, e.g. {only[0]!r}. "
                "Record the same prompts before and after, or select(ids=…) the common ones."
            )
        paired = other.select(ids=self.ids)
        said = {"prompt_sha": "a text", **({} if templates_differ else {"n_tokens": "a number of tokens (two tokenizers?)"})}
        for column, what in said.items():
            if column in self.facts and column in paired.facts:
                mine, theirs = self.facts[column], paired.facts[column]
                differ = (mine.to_numpy() != theirs.to_numpy()) & (mine.notna() & theirs.notna()).to_numpy()
                if differ.any():
                    raise ValueError(
                        f"cannot subtract different prompts: {int(differ.sum())} prompts share an id but not {what}, first "
                        f"{self.ids[differ].iloc[0]!r}. Record one set of prompts before and after."
                    )
        return replace(self, values=self.values - paired.values, meta=_identity.difference(self.meta, other.meta, self.layers))

    # ---- keeping (to numpy, pandas, datasets and back: see Exchange)

    def save(self, folder: str | os.PathLike, replace: bool = False) -> Path:
        """Keep as a folder: ``values.safetensors``, ``facts.parquet`` and a manifest with checksums; whole or not at all.

        Args:
            folder: a new one; what is there already may be these very activations.
            replace: put them in the place of another recording.

        Raises:
            StoreError: something else is there, and ``replace`` is not said; or files that emlens did not write, which are never removed.
        """
        made_by = {"kind": "activations", "site": self.site, "layers": self.layers, "position": self.position, "meta": self.meta}
        with store.writing(folder, made_by, replace) as temporary:
            store.write_values(temporary / store.VALUES, self.values)
            write_facts(self.facts, temporary)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike, verify: bool = True) -> "Activations":
        """Open what :meth:`save` or a recording into a store kept: memory-mapped and read-only, so that it may be larger than memory.

        Args:
            folder: of the entry.
            verify: read every byte once, piece by piece, and compare it with the manifest; False sees only that the files are there and of their
                size.

        Raises:
            StoreError: something is missing or damaged (:class:`emlens.store.StoreError`; it names the file); the folder of a store or a run, which
                holds several (they are named; :func:`emlens.store.kept` lists them all).
        """
        store.refuse_store(folder, "activations")
        made_by = store.verify(folder) if verify else store.described(folder)
        if made_by.get("kind") != "activations":
            raise store.StoreError(f"{folder} holds {made_by.get('kind', made_by.get('what', 'something else'))!r}, not activations")
        values = store.mapped(Path(folder) / store.VALUES)
        place = Place(made_by["site"], tuple(made_by["layers"]), made_by["position"])
        facts = pd.read_parquet(Path(folder) / FACTS, engine="pyarrow")
        return cls(values, facts, place, _identity.read(made_by["meta"]), checked=True)  # no NaN was ever kept


def write_facts(facts: pd.DataFrame, folder: Path) -> None:
    """The table of facts as :meth:`Activations.load` reads it; its ``attrs`` are kept as JSON (numpy arrays as lists).

    Raises:
        TypeError: ``attrs`` that JSON cannot hold.
    """
    kept = facts.copy(deep=False)
    kept.attrs = store.plain(facts.attrs)
    with store.replacing(folder / FACTS) as temporary:
        kept.to_parquet(temporary, engine="pyarrow")


def _refuse_unlike(a: Activations, b: Activations, verb: str, templates_differ: bool = False) -> None:
    if a.place != b.place:
        raise ValueError(f"cannot {verb} two different places: {a.place} and {b.place}. Record both at one place.")
    if a.d_model != b.d_model:
        raise ValueError(f"cannot {verb}: d_model is {a.d_model} and {b.d_model}; two different architectures")
    _identity.refuse_unlike(a.meta, b.meta, verb, templates_differ)


def _sliced(numbers: Int[np.ndarray, " row"]) -> slice | Int[np.ndarray, " row"]:
    """Evenly spaced ascending numbers as the slice that gives a view, others as they are."""
    if len(numbers) == 0:
        return slice(0, 0)
    step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    if step > 0 and (np.diff(numbers) == step).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
    return numbers


def _mapped(values: Any) -> bool:
    """Whether an array's values are on the disk."""
    return values is not None and (isinstance(values, np.memmap) or _mapped(getattr(values, "base", None)))
