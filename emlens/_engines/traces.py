"""nnsight: interventions written as code beside the forward pass, on a twin that shares the weights.

nnsight puts a ``forward`` of its own on every module it wraps, for good; on a twin the model itself keeps its own. What importing nnsight
does to the whole process stays: every object has a method ``save``, and ``Tensor.backward`` can be opened as a block.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..activations import SITES, Place
from .base import Select, apply_edits, keeping
from .hooks import INSIDE, Visit
from .structure import BlockParts, Part, by_hand, decoder_of, find_blocks, find_parts, stream_in, stream_key, stream_of
from .twin import TwinEngine, path_of, twin

if TYPE_CHECKING:
    from nnsight import TransformersModel


def open_nnsight(hf: PreTrainedModel, tokenizer: Any) -> "TransformersModel":
    """nnsight's ``TransformersModel`` over the weights of ``hf``, which stays as it was: modules, hooks, tokenizer.

    ``with nn.trace(ids): h = nn.model.layers[3].output.save()``. Logits are bitwise those of ``hf``. Text is tokenised by a copy of the
    tokenizer that pads on the left, as nnsight sets it. Adapters are off; they are switched on ``nn._module``, the transformers model inside.
    """
    from nnsight import TransformersModel

    placed = {} if getattr(hf, "hf_device_map", None) else {"device": hf.device}  # else transformers' pipeline moves the weights to the first GPU
    return TransformersModel(twin(hf), tokenizer=copy.deepcopy(tokenizer), task="text-generation", **placed)


class NnsightEngine(TwinEngine):
    """nnsight's traces: what is read and edited is an intervention that runs beside each forward pass.

    Attributes:
        hf: the twin; whenever its decoder runs, in ``generate`` too, the open interventions run with it.
    """

    name = "nnsight"

    def __init__(self, hf: PreTrainedModel, tokenizer: Any = None, parts: Mapping[str, str] | None = None) -> None:
        self.named = by_hand(parts)
        super().__init__(hf)

    def _make(self) -> None:
        from nnsight import NNsight

        self.hf = twin(self.original)
        self.decoder = decoder_of(self.hf)
        self.modules, norm = find_blocks(self.hf, self.named)
        self.n_layers = len(self.modules)
        self.root: Any = NNsight(self.decoder)
        blocks = self.root.get(path_of(self.decoder, self.modules))
        self.blocks, self.norm = [blocks[i] for i in range(self.n_layers)], self.root.get(path_of(self.decoder, norm))
        self.decoder.forward = self._live(self.decoder.forward)

    def _live(self, forward: Any) -> Any:
        """A forward of the decoder beside which the open interventions run."""

        @functools.wraps(forward)
        def live(*args: Any, **kwargs: Any) -> Any:
            alone = not self._hung or self.root.interleaver.interleaving
            return forward(*args, **kwargs) if alone else self.root.interleave(forward, *args, **kwargs)

        return live

    @cached_property
    def parts(self) -> tuple[BlockParts, ...]:
        """What adds what to the stream, block by block, measured once."""
        blocks, _ = find_blocks(self.original, self.named)
        return find_parts(self.original, blocks, self.named)

    @property
    def sites(self) -> tuple[str, ...]:
        inside: tuple[str, ...] = ()
        with suppress(ValueError):
            inside = INSIDE if all(block.resid_mid for block in self.parts) else INSIDE[:2]
        return tuple(site for site in SITES if site in inside or site not in INSIDE)

    def read(self, place: Place, select: Select, **inputs: Any) -> dict[int, Tensor]:
        for layer in place.layers:
            self._check(place.site, layer)
        kept: dict[int, Tensor] = {}
        self._hang([(place.site, layer, keeping(kept, layer, select)) for layer in place.layers])
        try:
            with torch.no_grad():
                self.decoder(**{"use_cache": False, **inputs})
        finally:
            self._hang()
        return kept

    def _check(self, site: str, layer: int) -> None:
        super()._check(site, layer)
        parts = self.parts[layer] if site in INSIDE else None
        if site == "resid_mid" and parts and not parts.resid_mid:
            raise ValueError(
                f"{type(self.original).__name__} has no resid_mid in block {layer}: attention ({parts.attn_out}) and MLP ({parts.mlp_out}) run side "
                "by side on resid_pre (parallel residual). Ask for attn_out, mlp_out or resid_post."
            )

    def _hang(self, reading: Sequence[tuple[str, int, Visit]] = ()) -> None:
        """Open edits, and behind them what is read: an intervention each, in the order in which a forward pass comes by."""
        self.root.clear_edits()
        editing: list[tuple[str, int, Visit]] = [(site, layer, partial(apply_edits, edits)) for site, layer, edits in self._edits()]
        visits = sorted([*editing, *reading], key=lambda one: self._when((one[0], one[1])))  # stable: at one place edits come first
        for site, layer, visit in visits:
            block, module, part = self.blocks[layer], self.blocks[layer], None
            if site in INSIDE:
                part = self.parts[layer].mlp_out if site == "mlp_out" else self.parts[layer].attn_out
            if site == "final_norm":
                module = self.norm
            with self.root.edit(inplace=True):
                pass_by(site, block, module, part, visit)
        self._hung = bool(visits)


def pass_by(site: str, block: Any, module: Any, part: Part | None, visit: Visit) -> None:
    """Runs beside a forward pass: waits for the place, shows it to ``visit``, and puts what that returns, if anything, in its place.

    Args:
        site: which place of the block.
        block: nnsight's envoy of the block, from which the parts are found by name.
        module: the envoy of the module that makes ``resid_post`` or ``final_norm``.
        part: of a block, for sites inside it: for ``resid_mid`` what attention adds, which is changed by as much as the stream between.
    """
    if part is None and site in ("embed", "resid_pre"):
        args, kwargs = block.inputs
        stream = stream_in(args, kwargs)
        assert stream is not None
        new = visit(stream)
        if new is not None:
            block.inputs = ((new, *args[1:]), kwargs) if args else (args, {**kwargs, stream_key(kwargs): new})
    elif part is None:
        out = module.output
        new = visit(stream_of(out))
        if new is not None:
            module.output = _with_stream(out, new)
    else:
        stream = stream_in(*block.inputs)
        assert stream is not None
        stream = stream.clone()  # a block may add to it in place
        *before, last = [block.get(name) for name in part.names]
        rest = [stream_of(one.output).clone() for one in before]
        own = stream_of(out := last.output)
        plain = site != "resid_mid" and part.scale == 1 and not rest
        added = (sum(rest, own) * part.scale if part.scale != 1 else sum(rest, own)).reshape(stream.shape)
        seen = stream + added if site == "resid_mid" else added
        new = visit(seen)
        if new is not None:
            last.output = _with_stream(out, new.reshape(own.shape) if plain else own + ((new - seen) / part.scale).reshape(own.shape))


def _with_stream(out: Any, stream: Tensor) -> Any:
    """A module's output with another stream in it."""
    return (stream, *out[1:]) if isinstance(out, tuple) else stream
