"""How a place is read and edited. The only file that knows hooks (and, later, the bridge and nnsight).

The default engine is transformers' own forward with plain PyTorch hooks on the blocks, which are found by structure: the one
``ModuleList`` with ``num_hidden_layers`` members, and the norm that follows it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .activations import Place

Select = Callable[[Float[Tensor, "prompt position d_model"]], Tensor]
"""Chooses, inside the hook, the rows to keep of a batch of residual streams."""

Edit = Callable[[Float[Tensor, "prompt position d_model"]], Float[Tensor, "prompt position d_model"]]
"""Changes a batch of residual streams at one layer."""


def adding(vector: Tensor, size: float) -> Edit:
    """x + size · v̂ at every token."""
    return lambda h: h + (size * vector).to(h.dtype)


def removing(vector: Tensor) -> Edit:
    """x − v̂v̂ᵀx at every token."""

    def edit(h: Tensor) -> Tensor:
        along = einsum(h.float(), vector, "prompt position d_model, d_model -> prompt position")
        return h - einsum(along, vector, "prompt position, d_model -> prompt position d_model").to(h.dtype)

    return edit


class Engine(ABC):
    """One way of reading and editing the residual stream of one model."""

    name: str
    n_layers: int

    @abstractmethod
    def read(
        self, input_ids: Int[Tensor, "prompt position"], mask: Int[Tensor, "prompt position"], place: Place, select: Select
    ) -> dict[int, Tensor]:
        """One forward pass without the output head; returns ``{layer: select(stream)}``."""

    @abstractmethod
    def editing(self, edits: Mapping[int, Edit]) -> Any:
        """Context manager: while it is open, ``edits[layer]`` changes ``resid_post`` of that block in every forward pass."""


class HooksEngine(Engine):
    """PyTorch hooks on transformers' blocks."""

    name = "hooks"
    sites = ("resid_pre", "resid_post", "embed", "final_norm")

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = hf
        self.blocks, self.norm = find_blocks(hf)
        self.n_layers = len(self.blocks)
        self.decoder = decoder_of(hf)

    def read(
        self, input_ids: Int[Tensor, "prompt position"], mask: Int[Tensor, "prompt position"], place: Place, select: Select
    ) -> dict[int, Tensor]:
        if place.site not in self.sites:
            raise ValueError(f"the hooks engine reads {', '.join(self.sites)}; {place.site!r} is not among them yet")
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for layer in place.layers:
                stack.enter_context(self._reading(place.site, layer, partial(_keep, kept, layer, select)))
            self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return kept

    @contextmanager
    def _reading(self, site: str, layer: int, take: Callable[[Tensor], None]) -> Iterator[None]:
        if site in ("resid_pre", "embed"):
            handle = self.blocks[layer].register_forward_pre_hook(lambda _, args, kwargs: take(_stream_in(args, kwargs)), with_kwargs=True)
        else:
            module = self.norm if site == "final_norm" else self.blocks[layer]
            handle = module.register_forward_hook(lambda _, __, out: take(stream_of(out)))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def editing(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        handles = [self.blocks[layer].register_forward_hook(_edited(edit)) for layer, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _keep(kept: dict[int, Tensor], layer: int, select: Select, stream: Tensor) -> None:
    kept[layer] = select(stream)


def _edited(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    return hook


def stream_of(out: Any) -> Tensor:
    """The residual stream in a module's output: a block returns a Tensor or a tuple that begins with it."""
    return out[0] if isinstance(out, tuple) else out


def _stream_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def decoder_of(hf: PreTrainedModel) -> nn.Module:
    """The model without its output head."""
    decoder = hf.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not hf else hf.base_model


def find_blocks(hf: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The list of blocks and the final norm, by structure.

    Raises:
        ValueError: an encoder stands before the decoder; no list, or more than one, has ``num_hidden_layers`` members; or no single norm
            stands beside it.
    """
    if hf.config.is_encoder_decoder:
        raise ValueError(f"{type(hf).__name__} has an encoder and a decoder; emlens reads decoder-only transformers with one stack of blocks.")
    n: int = hf.config.get_text_config().num_hidden_layers
    inner = decoder_of(hf)
    found = [(name, m) for name, m in inner.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n and _outermost(name)]
    if len(found) != 1:
        raise ValueError(
            f"{type(hf).__name__}: expected one list of {n} blocks, found {[name for name, _ in found]}. emlens reads decoder-only "
            "transformers with one stack of blocks."
        )
    name, blocks = found[0]
    parent = inner.get_submodule(name.rpartition(".")[0])
    norms = [m for child, m in parent.named_children() if ("norm" in child.lower() or child.lower().startswith("ln")) and "emb" not in child.lower()]
    if len(norms) != 1:
        beside = list(dict(parent.named_children()))
        raise ValueError(f"{type(hf).__name__}: expected one final norm beside the blocks, found {len(norms)} among {beside}")
    return blocks, norms[0]


def _outermost(name: str) -> bool:
    """Lists inside a block (experts, say) are named ``layers.3.…``."""
    return not any(part.isdigit() for part in name.split("."))
