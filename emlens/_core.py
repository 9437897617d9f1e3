"""What every verb of a model stands on: weights, tokenizer, adapters, an engine, and prompts made into tokens."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import loading, store
from ._engines import Edit, Engine, open_engine
from ._passes import padded
from .activations import SINGLE_LAYER_SITES, SITES, Place
from .adapters import Adapters, On, parts_of, switched
from .positions import Position, Tokens, position_name, tokenize
from .prompts import load_prompts


class Core:
    """One set of weights, the adapters on it, and the engine that reads and edits it.

    Verbs take ``adapter=``: a name, ``(name, layers)`` for its part in those blocks alone, or None for the loaded weights. There is no hidden
    current adapter.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str = "model",
        identity: Mapping[str, str] | None = None,
        engine: str | Engine = "hooks",
        parts: Mapping[str, str] | None = None,
    ) -> None:
        loading.prepare(hf, tokenizer, name, None)
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.identity = dict(identity) if identity else {"weights_sha256": loading.weights_digest(hf)}
        self.adapters = Adapters(hf)
        self._parts = parts
        self.engine: Engine = open_engine(engine, hf, tokenizer, parts) if isinstance(engine, str) else engine
        self.caching = self.engine.caches
        """False while something is open that needs whole sequences in one pass (a patch): no KV cache, no shared prefix."""
        self.sharing = True
        """False while something is open that finds its tokens by the prompt they begin with: no shared prefix."""
        self._listening: tuple[Callable[[Tokens], None], ...] = ()
        """Told of every prompt before it is run (a patch that is open, by which it finds the tokens again)."""
        self.edits: list[Mapping[str, Any]] = []
        """What is open (steering, ablation, a patch): part of the identity of everything made meanwhile."""

    # ---- what it is

    @property
    def n_layers(self) -> int:
        return self.engine.n_layers

    @property
    def d_model(self) -> int:
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.engine.hf.device

    @property
    def dtype(self) -> str:
        return str(self.hf.dtype).removeprefix("torch.")

    @property
    def template_sha256(self) -> str:
        return store.digest_text(str(self.tokenizer.chat_template))

    @property
    def max_tokens(self) -> int:
        """The longest context, in tokens, that the model's config allows."""
        config = self.hf.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def describe(self, adapter: On = None) -> dict[str, Any]:
        """The identity that travels with everything made from this model: weights, adapter, template, dtype."""
        name, layers = parts_of(adapter)
        return {
            "model": self.name,
            "architecture": f"{type(self.hf).__name__} {self.n_layers}×{self.d_model}",
            "weights": self.identity,
            "adapter": name,
            "adapter_sha256": self.adapters[name] if name else None,
            **({"adapter_layers": list(layers)} if layers is not None else {}),
            "template_sha256": self.template_sha256,
            "dtype": self.dtype,
            **({"edits": [dict(e) for e in self.edits]} if self.edits else {}),
        }

    # ---- adapters

    def add_adapter(self, name: str, source: str | os.PathLike) -> None:
        """Put a PEFT adapter on the loaded weights; its keys must match one to one, else nothing is changed (:class:`loading.LoadError`)."""
        if name in self.adapters:
            raise ValueError(f"an adapter {name!r} is loaded already; drop_adapter({name!r}) first, or choose another name")
        self.adapters.add(name, source)
        self._modules_changed()

    def drop_adapter(self, name: str) -> None:
        """Take an adapter off; after the last one the model has its own modules again."""
        self.adapters.check(name, self.n_layers)
        self.adapters.drop(name)
        self._modules_changed()

    def _modules_changed(self) -> None:
        """Adapters came or went: engines that hold modules of their own look again."""
        self.engine.refresh()

    @contextmanager
    def using(self, adapter: On) -> Iterator[Any]:
        """The transformers model with this adapter on (None: bitwise the loaded weights), for the length of the block."""
        self.adapters.check(adapter, self.n_layers)
        with switched(self.engine.hf, adapter):
            yield self.engine.hf

    # ---- places

    def place(self, site: str, layers: int | Iterable[int] | None, position: Position) -> Place:
        """The :class:`Place` these names stand for on this model; ValueError for unknown ones."""
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; sites are {', '.join(SITES)}")
        if site in SINGLE_LAYER_SITES:
            if layers is not None:
                raise ValueError(f"{site!r} is a single place; do not give layers")
            return Place(site, (0,), position_name(position))
        named = [layers] if isinstance(layers, (int, np.integer)) else layers
        wanted = tuple(range(self.n_layers)) if named is None else tuple(int(i) for i in named)
        outside = [i for i in wanted if not 0 <= i < self.n_layers]
        if outside:
            raise ValueError(f"unknown layers {outside}: {self.name} has blocks 0 … {self.n_layers - 1}")
        return Place(site, wanted, position_name(position))

    def layer_list(self, layers: int | Iterable[int] | str) -> list[int]:
        """Block indices from an index, several, or ``"all"``."""
        if isinstance(layers, str):
            if layers != "all":
                raise ValueError(f"layers={layers!r}: an index, a list of indices, or 'all'")
            return list(range(self.n_layers))
        return list(self.place("resid_post", layers, "last").layers)

    @contextmanager
    def _editing(self, edits: Mapping[tuple[str, int], Edit], said: Mapping[str, Any]) -> Iterator[None]:
        """The edits are live in every pass of the block, and written into what is made there."""
        with self.engine.editing(edits):
            self.edits.append(said)
            try:
                yield
            finally:
                self.edits.remove(said)

    @contextmanager
    def _hearing(self, hear: Callable[[Tokens], None], **without: bool) -> Iterator[None]:
        """``hear`` is told of every prompt that will be run in the block; ``caching=False``, ``sharing=False``: without that meanwhile."""
        before = {name: getattr(self, name) for name in ("_listening", *without)}
        self._listening = (*self._listening, hear)
        vars(self).update(without)
        try:
            yield
        finally:
            vars(self).update(before)

    # ---- tokens

    def tokenize(self, prompts: Any) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[prompt, position]``, right-padded, as record feeds them (there: sorted by length)."""
        ids, mask = padded([t.ids for t in self._tokens(as_table(prompts), response=False)], self.pad, self.device)
        return {"input_ids": ids, "attention_mask": mask}

    def _tokens(self, prompts: pd.DataFrame, response: bool) -> list[Tokens]:
        out = []
        for identity, messages in zip(prompts["id"], prompts["messages"], strict=True):
            tokens = tokenize(messages, self.tokenizer, None if response else "")
            self._meet(tokens, str(identity))
            out.append(tokens)
        return out

    def _meet(self, tokens: Tokens, identity: str, extra: int = 0) -> None:
        """A prompt that will be run, with ``extra`` tokens to be generated: refused if it is too long, else made known to whoever listens."""
        if len(tokens.ids) + extra > self.max_tokens:
            raise ValueError(
                f"prompt {identity!r} has {len(tokens.ids)} tokens{f' and {extra} are to be generated' if extra else ''}; "
                f"{self.name} reads at most {self.max_tokens}. Shorten it or choose a model with a longer context."
            )
        self._hear(tokens)

    def _hear(self, tokens: Tokens) -> None:
        """Make a prompt that will be run known to whoever listens."""
        for hear in self._listening:
            hear(tokens)


def as_table(prompts: Any) -> pd.DataFrame:
    """A table of :func:`load_prompts` as it is; anything else is read by it."""
    ready = isinstance(prompts, pd.DataFrame) and {"id", "messages"} <= set(prompts.columns)
    table = prompts if ready else load_prompts(prompts)
    if len(table) == 0:
        raise ValueError("no prompts were given (0 rows)")
    return table
