"""Reading activations: the batch plan, the shared prefix, several variants from the same batches, in memory or into a store."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import store
from ._core import Core, as_table
from ._engines import Engine
from ._passes import bar, every_row, mean_row, padded, plan
from .activations import Activations, Place, write_facts
from .adapters import On, label
from .positions import Position, Tokens, needs_response, token_rows
from .prompts import chat_digest, user_text

BUDGET = {"cpu": 512, "cuda": 16384}
"""Padded tokens in one forward pass of a recording: small enough for a processor's cache (512 took 0.87 of the time of 2048 on two cores)."""

NOISE_PROMPTS = 8
"""Prompts on which the noise floor of a 16-bit model is measured."""

SHORTEST_PREFIX = 4
"""Shared tokens below which a pass of their own is not worth its while."""

NAMES_ONLY = ("model", "noise_floor")
"""What a recording carries but is not determined by: a name, and what was measured on it."""


class Recording(Core):
    """The verb that reads."""

    _prefix_is_exact: bool | None = None
    """Whether this model may share a prefix: measured once, the first time there is one."""

    def record(
        self,
        prompts: Any,
        site: str = "resid_post",
        position: Position = "last",
        layers: int | Iterable[int] | None = None,
        adapter: On = None,
        adapters: Sequence[On] | None = None,
        store: str | Path | None = None,
        *,
        prefix: bool = True,
        budget: int | None = None,
    ) -> Any:
        """Read the residual stream at one place, one row per prompt (``position="all"``: one row per prompt token).

        Args:
            prompts: a table of :func:`load_prompts`, or anything it reads.
            site: ``resid_pre``, ``resid_mid``, ``resid_post`` (of the last block: before the final norm), ``attn_out``, ``mlp_out`` (what they
                add to the stream), ``embed``, ``final_norm``.
            position: a named position, a token index, or a character span of the user's text (:data:`emlens.positions.POSITIONS`).
            layers: block indices from 0, or one; default all. The pass stops after the highest.
            adapter: which adapter is on: a name, ``(name, layers)``, or None for the loaded weights.
            adapters: several of these instead: one Activations each, in this order, from the same batches.
            store: a folder of recordings. Each is kept there under a key of everything that determined it, written as it is made (memory stays
                flat, a killed run goes on where it stopped, to the same bits), and read back memory-mapped when asked for again.
            prefix: compute the tokens that all prompts begin with (the template's) once.
            budget: padded tokens in one forward pass (default: by device, :data:`BUDGET`); with the prompts it determines the batches.

        Returns:
            Activations, float32 ``[prompt, layer, d_model]``, in the order of the prompts; a list of them with ``adapters=``. Weights of 16 bit
            carry their measured rounding noise per layer in ``meta["noise_floor"]``.
        """
        if adapters is not None and adapter is not None:
            raise ValueError(f"adapter={adapter!r} and adapters={list(adapters)!r} were both given; give one of them")
        variants = [adapter] if adapters is None else list(adapters)
        if not variants:
            raise ValueError("adapters=[] names no variant; None stands for the loaded weights")
        for variant in variants:
            self.adapters.check(variant, self.n_layers)
        table, place = as_table(prompts), self.place(site, layers, position)
        tokens = self._tokens(table, response=needs_response(position))
        rows = [token_rows(t, position, str(i)) for t, i in zip(tokens, table["id"], strict=True)]
        reader = Reader(
            self.engine,
            tokens,
            rows,
            place,
            self.pad,
            self.device,
            budget or BUDGET.get(self.device.type, BUDGET["cuda"]),
            self._shared_prefix(tokens) if prefix else (),
        )
        facts = self._facts(table, tokens, place)
        said = self._said(reader, table)
        with ExitStack() as stack:
            sinks = [self._sink(stack, store, reader, facts, {**self.describe(v), **said}, v) for v in variants]
            self._fill(reader, variants, sinks)
        found = [sink.finished() for sink in sinks]
        return found if adapters is not None else found[0]

    def _shared_prefix(self, tokens: Sequence[Tokens]) -> tuple[int, ...]:
        """What all prompts begin with, if this model gives the same with it computed once; else nothing."""
        shared = common_prefix(tokens) if self.caching and self.sharing and self.engine.shares_prefix else ()
        if shared and self._prefix_is_exact is None:
            self._prefix_is_exact = sharing_is_exact(self.engine, tokens[0].ids, self.device)
        return shared if self._prefix_is_exact else ()

    def _fill(self, reader: "Reader", variants: Sequence[On], sinks: Sequence["Memory | Kept"]) -> None:
        todo = [b for b in range(len(reader.batches)) if not all(sink.has(b) for sink in sinks)]
        tokens = sum(reader.cost(b) for b in todo)
        size = sum(sink.n_bytes for sink in sinks)
        what = f"record {' '.join(label(v) for v in variants)} ({size / 2**20:.0f} MiB)"
        with bar(what, "token", total=tokens) as shown:
            for b in todo:
                for variant, sink in zip(variants, sinks, strict=True):
                    if not sink.has(b):
                        with self.using(variant):
                            sink.put(b, reader.numbers(b), reader.read(b, label(variant)))
                shown.update(reader.cost(b))

    def _said(self, reader: "Reader", table: pd.DataFrame) -> dict[str, Any]:
        coded = [[list(t.ids), list(r)] for t, r in zip(reader.tokens, reader.rows, strict=True)]
        return {
            "engine": self.engine.name,
            "prompts_sha256": store.digest_text(store.canonical([table["id"].astype(str).tolist(), coded])),
            "plan": {"budget": reader.budget, "prefix": len(reader.prefix), "sha256": store.digest_text(store.canonical(reader.batches))},
        }

    def _sink(self, stack: ExitStack, folder: Any, reader: "Reader", facts: pd.DataFrame, meta: dict[str, Any], variant: On) -> "Memory | Kept":
        measure = partial(self._noise, reader, variant)
        return Memory(reader, facts, meta, measure) if folder is None else Kept(stack, Path(folder), reader, facts, meta, measure)

    def _noise(self, reader: "Reader", variant: On) -> dict[str, dict[int, float]]:
        """``noise_floor`` of 16-bit weights: per layer, the rms difference of what 16 bits and what float32 arithmetic make of the same weights,
        on the first prompts. Nothing for other weights."""
        if self.dtype not in ("bfloat16", "float16") or self.engine.name != "hooks" or "quantization" in self.identity:
            return {}
        few = reader.only(range(min(NOISE_PROMPTS, len(reader.tokens))))
        with self.using(variant):
            rounded = few.read_all()
            with in_float32(self.engine):
                exact = few.read_all()
        rms = np.sqrt(np.square(rounded - exact).mean(axis=(0, 2))).tolist()
        return {"noise_floor": dict(zip(reader.place.layers, rms, strict=True))}

    def _facts(self, table: pd.DataFrame, tokens: Sequence[Tokens], place: Place) -> pd.DataFrame:
        facts = table[[c for c in table.columns if c != "messages" and not table[c].map(_is_nested).any()]].reset_index(drop=True)
        facts = facts.assign(text=[user_text(m) for m in table["messages"]], prompt_sha=[chat_digest(m) for m in table["messages"]])
        facts = facts.assign(n_tokens=[t.n_prompt for t in tokens])
        return _per_token(facts, tokens, self.tokenizer) if place.position == "all" else facts


# ---- one pass


class Reader:
    """A plan and how a batch of it is read: a pure function of the prompts, the model and the budget."""

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[Tokens],
        rows: Sequence[Sequence[int]],
        place: Place,
        pad: int,
        device: torch.device,
        budget: int,
        prefix: tuple[int, ...] = (),
    ) -> None:
        self.engine, self.tokens, self.rows, self.place, self.pad, self.device, self.budget = engine, tokens, rows, place, pad, device, budget
        self.per_token = place.position == "all"
        self.d_model = int(engine.hf.config.get_text_config().hidden_size)
        self.prefix = prefix
        self.batches = plan([len(t.ids) - len(self.prefix) for t in tokens], budget)
        counts = [len(r) for r in rows] if self.per_token else [1] * len(rows)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._begun: dict[str, Begun] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, layers)`` of the whole recording."""
        return int(self.starts[-1]), len(self.place.layers)

    def only(self, rows: Iterable[int]) -> "Reader":
        """The same place read for a few of the prompts, without sharing a prefix."""
        chosen = list(rows)
        tokens, at = [self.tokens[i] for i in chosen], [self.rows[i] for i in chosen]
        return Reader(self.engine, tokens, at, self.place, self.pad, self.device, self.budget)

    def numbers(self, batch: int) -> list[int]:
        """Row numbers of the recording that a batch fills, in the order it reads them."""
        return [n for i in self.batches[batch] for n in range(self.starts[i], self.starts[i + 1])]

    def cost(self, batch: int) -> int:
        return sum(len(self.tokens[i].ids) - len(self.prefix) for i in self.batches[batch])

    def read(self, batch: int, variant: str = "") -> Float[np.ndarray, "row layer d_model"]:
        """One forward pass with whatever adapter is on; ``variant`` names it, so that its shared prefix is read once."""
        chosen = [self.tokens[i].ids for i in self.batches[batch]]
        rows = [self.rows[i] for i in self.batches[batch]]
        n = len(self.prefix)
        ids, mask = padded([c[n:] for c in chosen], self.pad, self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if n:
            whole = torch.cat([mask.new_ones(len(chosen), n), mask], dim=1)
            inputs = {"input_ids": ids, "attention_mask": whole, "past_key_values": self._begin(variant).cache(len(chosen)), "use_cache": True}
        late = [[r - n for r in wanted if r >= n] for wanted in rows]
        early = [[r for r in wanted if r < n] for wanted in rows]
        kept = self.engine.read(self.place, every_row(late) if self.per_token else mean_row(late, [len(wanted) for wanted in rows]), **inputs)
        values = _stacked(kept, self.place)
        if not any(early):
            return values
        first = self._begin(variant).rows
        if self.per_token:
            pieces = np.split(values, np.cumsum([len(r) for r in late])[:-1])
            return np.concatenate([part for e, piece in zip(early, pieces, strict=True) for part in (first[e], piece)])
        return values + np.stack([first[e].sum(axis=0) / len(wanted) for e, wanted in zip(early, rows, strict=True)])

    def read_all(self) -> Float[np.ndarray, "row layer d_model"]:
        """Every batch, in the order of the rows."""
        out = np.empty((*self.shape, self.d_model), dtype=np.float32)
        for b in range(len(self.batches)):
            out[self.numbers(b)] = self.read(b)
        return out

    def _begin(self, variant: str) -> "Begun":
        if variant not in self._begun:
            ids = torch.tensor([list(self.prefix)], device=self.device)
            cache = DynamicCache(config=self.engine.hf.config)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache, "use_cache": True}
            kept = self.engine.read(self.place, every_row([list(range(len(self.prefix)))]), **inputs)
            self._begun[variant] = Begun(cache, _stacked(kept, self.place))
        return self._begun[variant]


def _stacked(kept: dict[int, Tensor], place: Place) -> Float[np.ndarray, "row layer d_model"]:
    return torch.stack([kept[layer].to(kept[place.layers[0]].device) for layer in place.layers], dim=1).float().cpu().numpy()


def common_prefix(tokens: Sequence[Tokens]) -> tuple[int, ...]:
    """The tokens that all prompts begin with; at least one token of each is left over. Empty where there is little to gain."""
    shortest = min((t.ids for t in tokens), key=len)
    n = next((k for k in range(len(shortest) - 1) if any(t.ids[k] != shortest[k] for t in tokens)), len(shortest) - 1)
    return shortest[:n] if n >= SHORTEST_PREFIX and len(tokens) > 1 else ()


@dataclass(frozen=True)
class Begun:
    """A prefix that was computed once: its keys and values, and its rows at the place."""

    past: DynamicCache
    rows: Float[np.ndarray, "position layer d_model"]

    def cache(self, n: int) -> DynamicCache:
        """The same past for ``n`` prompts; what a pass adds to it is not kept."""
        out: Any = copy.copy(self.past)
        out.frozen = True
        out.layers = [_frozen(layer, n) for layer in self.past.layers]
        return out


def _frozen(layer: Any, n: int) -> Any:
    mine = copy.copy(layer)
    mine.keys, mine.values = (x.expand(n, *x.shape[1:]) for x in (layer.keys, layer.values))

    def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return type(layer).update(copy.copy(mine), keys, values, *args, **kwargs)

    mine.update = update
    return mine


def sharing_is_exact(engine: Engine, ids: Sequence[int], device: torch.device) -> bool:
    """Whether this model gives the same stream with a prefix computed before as in one pass (state spaces and odd masks do not)."""
    half, place = len(ids) // 2, Place("resid_post", (engine.n_layers - 1,), "last")
    everything = torch.tensor([list(ids)], device=device)
    cache = DynamicCache(config=engine.hf.config)
    mask = torch.ones_like(everything)
    whole = engine.read(place, mean_row([[len(ids) - 1]]), input_ids=everything, attention_mask=mask)
    engine.read(place, mean_row([[half - 1]]), input_ids=everything[:, :half], attention_mask=mask[:, :half], past_key_values=cache, use_cache=True)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    past = Begun(cache, np.zeros((0, 0, 0), dtype=np.float32)).cache(1)
    inputs = {"input_ids": everything[:, half:], "attention_mask": mask, "past_key_values": past, "use_cache": True}
    shared = engine.read(place, mean_row([[len(ids) - 1 - half]]), **inputs)
    (a,), (b,) = whole.values(), shared.values()
    return bool((a - b).norm() <= (1e-3 if engine.hf.dtype == torch.float32 else 5e-2) * a.norm())


@contextmanager
def in_float32(engine: Any) -> Iterator[None]:
    """The same weights in float32 arithmetic: each block's parameters are widened while it runs, then they are the old tensors again."""
    handles: list[Any] = []
    narrow: dict[torch.nn.Parameter, Tensor] = {}

    def widen(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        for parameter in module.parameters():
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()
        return tuple(map(_float, args)), {k: _float(v) for k, v in kwargs.items()}

    def narrowed(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.data = narrow.pop(parameter)

    try:
        handles.append(engine.hf.get_input_embeddings().register_forward_hook(lambda _, __, out: out.float()))
        for module in [*engine.blocks, engine.norm]:
            handles += [module.register_forward_pre_hook(widen, with_kwargs=True), module.register_forward_hook(narrowed)]
        yield
    finally:
        for parameter, data in narrow.items():
            parameter.data = data
        for handle in handles:
            handle.remove()


def _float(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_float, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# ---- where a recording goes


class Memory:
    """An array in memory; ``measure`` adds what is measured on it to its meta."""

    def __init__(self, reader: Reader, facts: pd.DataFrame, meta: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        self.place, self.facts, self.meta = reader.place, facts, {**meta, **measure()}
        self.values = np.empty((*reader.shape, reader.d_model), dtype=np.float32)
        self.n_bytes = self.values.nbytes

    def has(self, batch: int) -> bool:
        return False

    def put(self, batch: int, rows: Sequence[int], values: np.ndarray) -> None:
        self.values[rows] = values

    def finished(self) -> Activations:
        return Activations(self.values, self.facts, self.place, self.meta)


class Kept:
    """An entry of a store that grows batch by batch; one that is whole is only read back, and nothing is measured anew."""

    def __init__(
        self, stack: ExitStack, folder: Path, reader: Reader, facts: pd.DataFrame, meta: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> None:
        place = {"site": reader.place.site, "layers": reader.place.layers, "position": reader.place.position}
        self.entry = folder / store.key("activations", **place, **{k: v for k, v in meta.items() if k not in NAMES_ONLY})
        self.whole = (self.entry / store.MANIFEST).exists()
        shape = (*reader.shape, reader.d_model)
        self.n_bytes = 0 if self.whole else 4 * int(np.prod(shape))
        if not self.whole:
            made_by: dict[str, Any] = {"kind": "activations", **place, "meta": {**meta, **measure()}}
            self.growing = stack.enter_context(store.growing(self.entry, made_by, shape, aside=NAMES_ONLY))
            write_facts(facts, self.growing.folder)

    def has(self, batch: int) -> bool:
        return self.whole or self.growing.done(batch)

    def put(self, batch: int, rows: Sequence[int], values: np.ndarray) -> None:
        self.growing.put(batch, rows, values)

    def finished(self) -> Activations:
        return Activations.load(self.entry)


# ---- facts


def _per_token(facts: pd.DataFrame, tokens: Sequence[Tokens], tokenizer: Any) -> pd.DataFrame:
    out = facts.loc[facts.index.repeat([t.n_prompt for t in tokens])].reset_index(drop=True)
    index = np.concatenate([np.arange(t.n_prompt) for t in tokens])
    words = [tokenizer.decode([token]) for t in tokens for token in t.ids[: t.n_prompt]]
    return out.assign(prompt_id=out["id"], id=[f"{p}:{k}" for p, k in zip(out["id"], index, strict=True)], token_index=index, token=words)


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, np.ndarray))
