"""Whom the doctor looks at: a model with one variant on, a handful of chats, and what bare transformers says of them."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._engines import Engine, open_engine
from .._passes import padded
from ..activations import Activations
from ..adapters import On, label, parts_of, switched
from ..directions import Direction
from ..models import HookedModel
from ..positions import Tokens, tokenize
from ..prompts import load_prompts

N_PROMPTS = 8
FEW = 3
"""Prompts where each costs several passes, or a row of logits a token."""

ROOM = 16
"""Tokens left for answers in the shortest context that is looked at."""

ONE_BATCH = 1 << 20
ONE_EACH = 1


class DoesNotApply(Exception):
    """A law says nothing of this model; the text is the reason."""


class Engines:
    """The engines of one model, each opened when it is first asked for."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._open: dict[str, Engine] = {model.engine.name: model.engine}
        self._refused: dict[str, str] = {}

    def __getitem__(self, name: str) -> Engine:
        """Raises DoesNotApply, with the engine's own reason, where it cannot open the family."""
        if name not in self._open and name not in self._refused:
            try:
                self._open[name] = open_engine(name, self.model.hf, self.model.tokenizer, self.model._parts)
            except (ValueError, ImportError) as error:
                self._refused[name] = str(error).strip() or type(error).__name__
        if name in self._refused:
            raise DoesNotApply(self._refused[name])
        return self._open[name]


class Patient:
    """A model with one variant on.

    Args:
        model: left as it was found.
        adapter: the variant that is on in everything measured.
        engines: shared by the variants of a model.
    """

    def __init__(self, model: HookedModel, adapter: On, engines: Engines) -> None:
        self.model, self.adapter, self.engines = model, adapter, engines
        self._together: dict[str, Activations] = {}

    @property
    def label(self) -> str | None:
        return None if self.adapter is None else label(self.adapter)

    @property
    def adapter_name(self) -> str:
        return str(parts_of(self.adapter)[0])

    # ---- prompts

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """Eight of our questions, of mixed length and not sorted by it; the longest asks two things at once."""
        table = probe_prompts()
        lengths = [len(tokenize(messages, self.model.tokenizer, "").ids) for messages in table["messages"]]
        fits = [n + ROOM <= self.model.max_tokens for n in lengths]
        if sum(fits) < FEW:
            raise ValueError(
                f"{self.model.name} reads at most {self.model.max_tokens} tokens; the doctor's chats have {min(lengths)} to {max(lengths)}"
            )
        return table[fits].reset_index(drop=True)

    @cached_property
    def tokens(self) -> list[Tokens]:
        return self.model._tokens(self.prompts, response=False)

    @cached_property
    def few(self) -> pd.DataFrame:
        """Three of them: the shortest, the longest of the short ones, and one between."""
        return self.prompts.iloc[self.few_rows].reset_index(drop=True)

    @cached_property
    def few_rows(self) -> list[int]:
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.tokens[i].ids))[: 2 * FEW]
        return [order[0], order[-1], order[len(order) // 2]]

    @cached_property
    def few_tokens(self) -> list[Tokens]:
        return self.model._tokens(self.few, response=False)

    @cached_property
    def direction(self) -> Direction:
        """A random direction a layer."""
        return Direction.from_array(np.random.default_rng(0).normal(size=(self.model.n_layers, self.model.d_model)))

    @property
    def middle(self) -> int:
        return self.model.n_layers // 2

    # ---- what emlens reads

    def record(self, **how: Any) -> Activations:
        """All layers at the last token of the few in one batch, no prefix shared, unless told otherwise."""
        return self.model.record(how.pop("prompts", self.few), **{"adapter": self.adapter, "prefix": False, "budget": ONE_BATCH, **how})

    def together(self, site: str) -> Activations:
        """A site of the few in one batch; read once."""
        if site not in self._together:
            self._together[site] = self.record(site=site)
        return self._together[site]

    @cached_property
    def before(self) -> Activations:
        """``resid_post`` of the few in one batch with all adapters off."""
        return self.record(adapter=None)

    @cached_property
    def one_by_one(self) -> Float[np.ndarray, "prompt layer d_model"]:
        """``resid_post`` of the eight, a prompt a pass."""
        return self.record(prompts=self.prompts, budget=ONE_EACH).values

    def alone(self, site: str) -> Float[np.ndarray, "prompt layer d_model"]:
        """A site of the few, a prompt a pass."""
        return self.one_by_one[self.few_rows] if site == "resid_post" else self.record(site=site, budget=ONE_EACH).values

    # ---- what bare transformers says

    @contextmanager
    def bare(self, adapter: On | object = ...) -> Iterator[Any]:
        """transformers' own model with the variant on, by no engine."""
        on: Any = self.adapter if adapter is ... else adapter
        with switched(self.model.hf, on), torch.no_grad():
            yield self.model.hf

    @cached_property
    def states(self) -> Float[np.ndarray, "prompt state d_model"]:
        """transformers' hidden_states at the last token of the few, each in a pass of its own: embed, blocks but the last, final norm."""
        with self.bare() as hf:
            return np.stack([self._states(hf, t.ids) for t in self.few_tokens])

    def _states(self, hf: Any, ids: Sequence[int]) -> Float[np.ndarray, "state d_model"]:
        out = hf(**self.batch([ids]), output_hidden_states=True, use_cache=False)
        return np.stack([h[0, -1].float().cpu().numpy() for h in out.hidden_states])

    def batch(self, rows: Sequence[Sequence[int]], side: str = "right") -> dict[str, Tensor]:
        ids, mask = padded(rows, self.model.pad, self.model.device, side)
        return {"input_ids": ids, "attention_mask": mask}

    def logits(self, adapter: On | object = ...) -> Float[Tensor, "prompt vocabulary"]:
        """transformers' logits at the last token of a few prompts in one right-padded batch."""
        rows = [t.ids for t in self.few_tokens]
        with self.bare(adapter) as hf:
            out = hf(**self.batch(rows), use_cache=False).logits
        return out[range(len(rows)), [len(r) - 1 for r in rows]].float().cpu()

    def next_logits(self, hf: Any, ids: Sequence[int]) -> Float[Tensor, " vocabulary"]:
        return hf(**self.batch([ids]), use_cache=False).logits[0, -1].float()


def probe_prompts() -> pd.DataFrame:
    """Eight of ``emlens:questions``, short and long by turns."""
    ours = load_prompts("emlens:questions")
    ordered = ours.iloc[ours["question"].str.len().argsort(kind="stable")].reset_index(drop=True)
    evenly = np.linspace(0, len(ordered) - 1, N_PROMPTS).round().astype(int)
    turns = [evenly[i] for i in (3, 7, 0, 5, 1, 6, 2, 4)]
    out = ordered.iloc[turns].reset_index(drop=True)
    joined = " ".join(out["question"].iloc[[1, 3]])
    messages = [joined if i == 1 else text for i, text in enumerate(out["question"])]
    return out.assign(messages=[[{"role": "user", "content": text}] for text in messages])


@contextmanager
def without_wrappers(hf: nn.Module, paths: Collection[str] | None = None) -> Iterator[dict[str, tuple[nn.Module, nn.Module]]]:
    """The model's own modules in the place of PEFT's (of these, or all): ``{path: (own module, wrapper)}``; afterwards the wrappers are back."""
    swapped: dict[str, tuple[nn.Module, nn.Module]] = {}
    parents = [(path, parent) for path, parent in hf.named_modules() if not is_wrapper(parent)]
    try:
        for path, parent in parents:
            for child, module in list(parent._modules.items()):
                at = f"{path}.{child}" if path else child
                if module is not None and is_wrapper(module) and (paths is None or at in paths):
                    own: Any = module.get_submodule("base_layer")
                    while is_wrapper(own):
                        own = own.get_submodule("base_layer")
                    swapped[at] = (own, module)
                    parent._modules[child] = own
        yield swapped
    finally:
        for path, (_, wrapper) in swapped.items():
            above, _, child = path.rpartition(".")
            hf.get_submodule(above)._modules[child] = wrapper


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT put it around one of the model's own modules."""
    return "base_layer" in module._modules
