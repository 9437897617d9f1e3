"""The default engine: transformers' own forward pass with plain PyTorch hooks on the blocks and on the parts of a block."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..activations import SITES, Place
from .base import Engine, Select, Visit, apply_edits, keeping
from .structure import BlockParts, Part, by_hand, decoder_of, find_blocks, find_parts, stream_in, stream_key, stream_of

INSIDE = ("attn_out", "mlp_out", "resid_mid")
"""Sites inside a block: their modules are found by a probing pass, the first time one of them is asked for."""


class HooksEngine(Engine):
    """PyTorch hooks on transformers' blocks.

    Args:
        hf: the model; adapters may be put on it and taken off at any time.
        parts: names of what is not found by structure (:func:`emlens._engines.structure.find_blocks`, ``find_parts``).
    """

    name = "hooks"
    shares_prefix = True

    def __init__(self, hf: PreTrainedModel, parts: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.hf = hf
        self.named = by_hand(parts)
        self.blocks, self.norm = find_blocks(hf, self.named)
        self.n_layers = len(self.blocks)
        self.decoder = decoder_of(hf)
        self._handles: list[RemovableHandle] = []

    @cached_property
    def parts(self) -> tuple[BlockParts, ...]:
        """What adds what to the stream, block by block; measured once."""
        return find_parts(self.hf, self.blocks, self.named)

    @property
    def sites(self) -> tuple[str, ...]:
        try:
            lacking: tuple[str, ...] = () if all(block.resid_mid for block in self.parts) else ("resid_mid",)
        except ValueError:  # said in full to who reads or edits one of them
            lacking = INSIDE
        return tuple(site for site in SITES if site not in lacking)

    def read(self, place: Place, select: Select, **inputs: Any) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        handles: list[RemovableHandle] = []
        try:
            for layer in place.layers:
                handles += self._attach(place.site, layer, keeping(kept, layer, select))
            if self._may_stop(place, inputs):
                handles.append(self.blocks[max(place.layers)].register_forward_hook(_stop))
            with torch.no_grad(), suppress(_Enough):
                self.decoder(**{"use_cache": False, **inputs})
        finally:
            _remove(handles)
        return kept

    def _may_stop(self, place: Place, inputs: Mapping[str, Any]) -> bool:
        """After the last block asked for; but a cache is filled to the end, and weights that accelerate moves about are put back."""
        fills = inputs.get("use_cache") and not getattr(inputs.get("past_key_values"), "frozen", False)
        return place.site != "final_norm" and not fills and not hasattr(self.hf, "hf_device_map")

    def _hang(self) -> None:
        """One hook a place for all edits that are open, before any hook of others (transformers' own for hidden states, say)."""
        _remove(self._handles)
        self._handles = []
        for site, layer, edits in reversed(self._edits()):  # each is hung before those already there
            self._handles += self._attach(site, layer, partial(apply_edits, edits), first=True)

    def _check(self, site: str, layer: int) -> None:
        super()._check(site, layer)
        parts = self.parts[layer] if site in INSIDE else None
        if site == "resid_mid" and parts and not parts.resid_mid:
            raise ValueError(
                f"{type(self.hf).__name__} has no resid_mid in block {layer}: attention ({parts.attn_out}) and MLP ({parts.mlp_out}) run side "
                "by side on resid_pre (parallel residual), and no module reads resid_pre + attn_out. Ask for attn_out, mlp_out or resid_post."
            )

    def _attach(self, site: str, layer: int, visit: Visit, first: bool = False) -> list[RemovableHandle]:
        """Hooks that show ``visit`` the stream at a place, ahead of other hooks if ``first``."""
        self._check(site, layer)
        if site == "final_norm":
            return [_after(self.norm, visit, first)]
        block = self.blocks[layer]
        if site in ("embed", "resid_pre"):
            return [_before(block, visit, first)]
        if site == "resid_post":
            return [_after(block, visit, first)]
        parts, shape = self.parts[layer], _Shape()
        handles = [_before(block, shape.note, first)]
        if site == "resid_mid":
            return handles + _at_mid(block, parts.resid_mid if first else parts.resid_mid[:1], shape, visit, first)
        return handles + _at_part(block, parts.attn_out if site == "attn_out" else parts.mlp_out, shape, visit, first)


class _Enough(Exception):
    """The last block that was asked for has run."""


def _stop(*_: Any) -> None:
    raise _Enough


class _Shape:
    """The shape of the stream in this pass, for the few modules that see it flattened."""

    def note(self, stream: Tensor) -> None:
        self.shape = stream.shape

    def whole(self, visit: Visit) -> Visit:
        """``visit`` shown the stream in its own shape."""

        def seen(stream: Tensor) -> Tensor | None:
            new = visit(stream.reshape(self.shape))
            return None if new is None else new.reshape(stream.shape)

        return seen


def _at_mid(block: nn.Module, names: tuple[str, ...], shape: _Shape, visit: Visit, first: bool) -> list[RemovableHandle]:
    """The stream between attention and MLP. A change reaches what reads it, and what carries it on past the MLP to the end of the block."""
    change: list[Tensor] = []

    def at(stream: Tensor) -> Tensor | None:
        new = visit(stream)
        if new is not None:
            change[:] = [new - stream]
        return new

    handles = [_before(block.get_submodule(name), shape.whole(at), first) for name in names]
    return [*handles, _after(block, lambda y: y + change.pop(), first)] if first else handles


def _at_part(block: nn.Module, part: Part, shape: _Shape, visit: Visit, first: bool) -> list[RemovableHandle]:
    """What a part adds to the stream: seen, and changed, at the last of its modules."""
    others: dict[str, Tensor] = {}

    def noting(name: str) -> Visit:
        def note(out: Tensor) -> None:
            others[name] = out.clone()

        return note

    def at_last(out: Tensor) -> Tensor | None:
        rest = sum(others.values())
        total = (out + rest if others else out) * part.scale if part.scale != 1 or others else out
        new = visit(total)
        if new is None or total is out:
            return new
        if new.requires_grad:
            return out + (new - total) / part.scale
        return torch.where(new == total, out, new / part.scale - rest)  # where nothing was changed, bitwise nothing is

    *before, last = part.names
    handles = [_after(block.get_submodule(name), shape.whole(noting(name)), first) for name in before]
    return [*handles, _after(block.get_submodule(last), shape.whole(at_last), first)]


def _before(module: nn.Module, visit: Visit, first: bool) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = stream_in(args, kwargs)
        assert stream is not None
        new = visit(stream)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if stream is (args[0] if args else None) else (args, {**kwargs, str(stream_key(kwargs)): new})

    return module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)


def _after(module: nn.Module, visit: Visit, first: bool) -> RemovableHandle:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        new = visit(stream_of(out))
        return (new, *out[1:]) if new is not None and isinstance(out, tuple) else new

    return module.register_forward_hook(hook, prepend=first)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
