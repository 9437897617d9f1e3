"""The transformer-lens bridge: attention patterns, heads and every TransformerLens hook, on a twin that shares the weights.

``TransformerBridge.boot_transformers`` rewrites the model it is given, forces eager attention on it, and changes its tokenizer. It gets twins
of both. Nothing that changes numbers is on: no folding of norms, no centring, no compatibility mode, no token that the tokenizer would not put.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

from ..activations import SITES, Place
from .base import Select, apply_edits, keeping
from .hooks import INSIDE, Visit
from .structure import decoder_of
from .twin import TwinEngine, twin

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POINTS = {
    "embed": "hook_in",
    "resid_pre": "hook_in",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_out",
}
"""Sites and TransformerLens' hook points on a block."""

FUSED = {"JointQKVAttentionBridge": ("split_qkv_matrix", ("q", "k", "v")), "JointGateUpMLPBridge": ("split_gate_up_matrix", ("gate", "in"))}
"""Components of TransformerLens that cut a fused projection into several, once, at opening: how, and into which."""

N_PROBE = 8


# ---- opening


def open_bridge(hf: PreTrainedModel, tokenizer: Any) -> "TransformerBridge":
    """A ``TransformerBridge`` over the weights of ``hf``, which stays bitwise as it was: modules, hooks, config, tokenizer, random state.

    ``bridge.run_with_cache(ids)``, ``blocks.3.attn.hook_pattern`` ``[prompt, head, query, key]``, ``blocks.3.attn.hook_z``
    ``[prompt, position, head, d_head]``, ``run_with_hooks``. Logit lens of a stream ``h``: ``bridge.unembed(bridge.ln_final(h))``, and then
    ``bridge.adapter.apply_output_logits_transform(…)`` for the soft cap or scale that some families put on their logits. Text is tokenised
    as the tokenizer does it by itself (a BOS only if it puts one). Adapters are off; ``bridge.original_model`` is the transformers model
    inside, on which they are switched. With an adapter on, TransformerLens' ``set_use_attn_result`` and ``set_use_split_qkv_input`` work on
    the loaded weights alone: leave them off.

    Raises:
        ValueError: TransformerLens has no adapter for the architecture, or its forward would pass over layers of a PEFT adapter.
    """
    bridge_class = _transformer_bridge()
    inside = twin(hf)
    inside.config.architectures = inside.config.architectures or [type(hf).__name__]
    with torch.random.fork_rng():  # cutting a fused projection draws random numbers
        try:
            bridge = bridge_class.boot_transformers(
                hf.config._name_or_path or type(hf).__name__,
                hf_model=inside,
                tokenizer=_tokenizer_twin(tokenizer),
                device=str(hf.device),
                dtype=hf.dtype,
            )
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            raise ValueError(
                f"TransformerLens cannot open {type(hf).__name__} ({type(error).__name__}: {reason}). engine='hooks' needs no table of architectures."
            ) from error
        for component in bridge.modules():
            _rejoin(component)
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    inside.eval()
    bridge.eval()
    _every_adapter_layer_runs(bridge)
    return bridge


def _transformer_bridge() -> "type[TransformerBridge]":
    """The class; importing it would leave transformers' warnings turned off and a filter on Python's."""
    level = transformers_logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            from transformer_lens.model_bridge import TransformerBridge
    finally:
        transformers_logging.set_verbosity(level)
    return TransformerBridge


def _tokenizer_twin(tokenizer: Any) -> Any:
    """A copy that says where it came from and that it is to stay as it is; else TransformerLens would load another from the hub."""
    made = copy.deepcopy(tokenizer)
    made.init_kwargs = {**made.init_kwargs, "name_or_path": made.name_or_path, "add_bos_token": True}
    return made


# ---- adapters on fused projections


class _Whole:
    """A fused projection with its adapter, run once for all that read slices of it."""

    def __init__(self, module: nn.Module, readers: int) -> None:
        self.module, self.readers = module, readers
        self.seen: tuple[Tensor, int] | None = None
        self.out, self.left = torch.empty(0), 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.seen is None or self.seen[0] is not x or self.seen[1] != x._version:
            self.seen, self.out, self.left = (x, x._version), self.module(x), self.readers
        out, self.left = self.out, self.left - 1
        if not self.left:
            self.seen, self.out = None, torch.empty(0)
        return out


class _Slice(nn.Linear):
    """TransformerLens' part of a fused projection, which also has its part of the adapter when one is on."""

    def adapt(self, whole: _Whole, rows: Int[Tensor, " out"]) -> None:
        self.whole, self.rows = whole, rows

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.whole.module
        return super().forward(x) if layer.disable_adapters or layer.merged else self.whole(x)[..., self.rows]


def _rejoin(component: nn.Module) -> None:
    """TransformerLens cuts fused projections by their loaded weights and leaves the adapter on them out: give each piece its rows of it."""
    how = next((FUSED[kind.__name__] for kind in type(component).__mro__ if kind.__name__ in FUSED), None)
    if how is None:
        return
    split, names = how
    pieces: list[Any] = [getattr(component, name).original_component for name in names]
    size = pieces[0].in_features, sum(piece.out_features for piece in pieces)
    original: Any = component.original_component
    for name, child in original.named_children():
        fused: Any = getattr(child, "original_component", child)
        if _tuned(fused) and (fused.in_features, fused.out_features) == size:
            whole = _Whole(fused, len(pieces))
            for piece, numbered in zip(pieces, getattr(component, split)(_with_numbered_rows(original, name, fused)), strict=True):
                piece.__class__ = _Slice
                piece.adapt(whole, numbered.weight[:, 0].detach().round().long().to(piece.weight.device))


def _tuned(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)


def _with_numbered_rows(module: nn.Module, name: str, fused: Any) -> nn.Module:
    """``module`` whose fused projection has, for each weight, the number of the output it makes: cut up, it tells which piece gets which."""
    turned = fused.weight.shape != (fused.out_features, fused.in_features)  # GPT-2's Conv1D has [in, out]
    numbers = torch.arange(fused.out_features, dtype=torch.float32)[:, None].expand(-1, fused.in_features)
    stub, numbered = copy.copy(module), nn.Module()
    numbered.weight = nn.Parameter((numbers.T if turned else numbers).contiguous())
    numbered.bias = None if fused.base_layer.bias is None else nn.Parameter(numbers[:, 0].clone())  # type: ignore[assignment]
    stub._modules = {**module._modules, name: numbered}
    return stub


def _every_adapter_layer_runs(bridge: "TransformerBridge") -> None:
    """ValueError if the bridge's forward passes over a layer of an adapter: it would do nothing there, and all numbers be plausible."""
    inside: Any = bridge.original_model
    layers: dict[str, Any] = {path: module for path, module in inside.named_modules() if _tuned(module)}
    if not layers:
        return
    ran: set[nn.Module] = set()
    handles = [module.register_forward_hook(lambda module, _, __: ran.add(module)) for module in layers.values()]
    switched = {module: module._disable_adapters for module in layers.values()}
    try:
        for module in layers.values():
            module._disable_adapters = False
        with torch.no_grad():
            decoder_of(inside)(input_ids=_few_tokens(inside), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, off in switched.items():
            module._disable_adapters = off
    idle = [path.replace("._original_component", "") for path, module in layers.items() if module not in ran]
    if idle:
        raise ValueError(
            f"TransformerLens' forward of {type(inside).__name__} does not run {len(idle)} of {len(layers)} layers with an adapter (e.g. {idle[0]}), "
            "which would then do nothing there. Use engine='hooks', or merge the adapter into the weights (load_model(…, merge=True))."
        )


def _few_tokens(hf: PreTrainedModel) -> Int[Tensor, "1 position"]:
    """A few tokens spread over the vocabulary."""
    embedding: Any = hf.get_input_embeddings()
    return (torch.arange(1, N_PROBE + 1, device=embedding.weight.device) * hf.config.get_text_config().vocab_size // (N_PROBE + 2))[None]


# ---- the engine


class BridgeEngine(TwinEngine):
    """TransformerLens' hook points.

    Attributes:
        bridge: the ``TransformerBridge``; it is another one after :meth:`refresh`.
    """

    name = "bridge"

    def __init__(self, hf: PreTrainedModel, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        super().__init__(hf)

    def _make(self) -> None:
        self.__dict__.pop("_refusals", None)
        self.bridge = open_bridge(self.original, self.tokenizer)
        self.hf = self.bridge.original_model
        self.decoder = decoder_of(self.hf)
        self.n_layers = len(self.bridge.blocks)
        self._handles: list[tuple[Any, Any]] = []
        self._before: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in SITES if site not in self._refusals)

    def read(self, place: Place, select: Select, **inputs: Any) -> dict[int, Tensor]:
        for layer in place.layers:
            self._check(place.site, layer)
        kept: dict[int, Tensor] = {}
        with self._attached([(place.site, layer, keeping(kept, layer, select)) for layer in place.layers]), torch.no_grad():
            self.decoder(**{"use_cache": False, **inputs})
        return kept

    def _check(self, site: str, layer: int) -> None:
        super()._check(site, layer)
        if site in INSIDE and site in self._refusals:
            raise ValueError(self._refusals[site])

    def _hang(self) -> None:
        _take_off(self._handles)
        self._handles = []
        self._before.clear()
        self._added.clear()
        for site, layer, edits in self._edits():
            visit: Visit = partial(apply_edits, edits)
            if site == "resid_mid":  # the stream between exists in no one module: what attention adds is changed by as much
                self._handles += self._put_on("resid_pre", layer, partial(self._before.__setitem__, layer))
                self._handles += self._put_on("attn_out", layer, partial(self._at_mid, layer, visit))
            else:
                self._handles += self._put_on(site, layer, visit)

    def _at_mid(self, layer: int, visit: Visit, added: Tensor) -> Tensor:
        self._added[layer] = added
        middle = self._before.pop(layer) + added
        new = visit(middle)
        assert new is not None
        return added + (new - middle)

    @contextmanager
    def _attached(self, visits: list[tuple[str, int, Visit]]) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for site, layer, visit in visits:
                handles += self._put_on(site, layer, self._as_added(layer, visit) if site == "attn_out" else visit)
            yield
        finally:
            _take_off(handles)

    def _as_added(self, layer: int, visit: Visit) -> Visit:
        """What attention added, without what an edit of ``resid_mid`` put on top."""
        return lambda added: visit(self._added.pop(layer, added))

    def _put_on(self, site: str, layer: int, visit: Visit) -> list[tuple[Any, Any]]:
        point: Any = self.bridge.ln_final.hook_out if site == "final_norm" else getattr(self.bridge.blocks[layer], POINTS[site])
        return [
            (point, point.add_hook(lambda stream, hook: visit(stream), is_permanent=True))
        ]  # permanent: not for the user's reset_hooks to take off

    @cached_property
    def _refusals(self) -> dict[str, str]:
        """``{site: why it cannot be had}``, from one pass of a few tokens: what a hook point shows is measured, not taken on trust."""
        kind, blocks = type(self.original).__name__, self.bridge.blocks
        lacking = {site for site in INSIDE if not all(hasattr(block, POINTS[site]) for block in blocks)}
        beside = (
            " (attention and MLP run side by side on resid_pre: parallel residual)" if getattr(self.bridge.cfg, "parallel_attn_mlp", False) else ""
        )
        refused = {site: f"{kind} has no {site} on TransformerLens' blocks{beside}. Ask for another site." for site in sorted(lacking)}
        seen: dict[tuple[str, int], Tensor] = {}
        visits: list[tuple[str, int, Visit]] = [
            (site, layer, partial(_note, seen, (site, layer)))
            for site in POINTS
            if site not in refused and site != "embed"
            for layer in range(len(blocks))
        ]
        held, self._open = self._open, []
        self._hang()
        with self._attached(visits), torch.no_grad():
            self.decoder(input_ids=_few_tokens(self.hf), use_cache=False)
        self._open = held
        self._hang()
        for site, parts, whole in (
            ("mlp_out", ("resid_pre", "attn_out", "mlp_out"), "resid_post"),
            ("resid_mid", ("resid_pre", "attn_out"), "resid_mid"),
        ):
            if {site, *parts} & lacking:
                continue
            gap = max(_relative(sum(seen[part, i] for part in parts), seen[whole, i]) for i in range(len(blocks)))
            if gap > max(1e-5, torch.finfo(self.original.dtype).eps):
                told = f"on TransformerLens' blocks of {kind}, {' + '.join(parts)} is {gap:.1g} away from {whole}"
                refused |= dict.fromkeys(("attn_out", site), f"{told}: not what is added to the stream. engine='hooks' finds the parts by itself.")
        return refused


def _note(seen: dict[tuple[str, int], Tensor], place: tuple[str, int], stream: Tensor) -> None:
    seen[place] = stream.clone()


def _relative(got: Tensor | int, want: Tensor) -> float:
    return float((got - want).float().norm() / want.float().norm())


def _take_off(handles: list[tuple[Any, Any]]) -> None:
    for point, handle in handles:
        handle.hook.remove()
        point.fwd_hooks = [one for one in point.fwd_hooks if one is not handle]
