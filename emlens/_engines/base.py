"""What every engine can do, and the edits of a residual stream. The one abstract class of the house."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..activations import Place

Select = Callable[[Float[Tensor, "prompt position d_model"]], Tensor]
"""Chooses, inside the pass, the rows to keep of a batch of residual streams."""

Edit = Callable[[Float[Tensor, "prompt position d_model"]], Float[Tensor, "prompt position d_model"]]
"""Changes a batch of residual streams at one site of one block."""


def adding(vector: Float[Tensor, " d_model"], size: float) -> Edit:
    """x + size · v̂ at every token."""
    return lambda h: h + (size * vector).to(h)


def removing(vector: Float[Tensor, " d_model"]) -> Edit:
    """x − v̂v̂ᵀx at every token."""

    def edit(h: Tensor) -> Tensor:
        along = einsum(h.float(), vector, "prompt position d_model, d_model -> prompt position")
        return h - einsum(along, vector, "prompt position, d_model -> prompt position d_model").to(h.dtype)

    return edit


class Engine(ABC):
    """One way of reading and editing the residual stream of one model.

    Attributes:
        name: ``"hooks"``, ``"bridge"`` or ``"nnsight"``.
        n_layers: blocks of the model.
        hf: what scoring and generation call, with transformers' signature; the edits of :meth:`editing` are live in it.
        shares_prefix: whether :meth:`read` may be given ``past_key_values``.
    """

    name: str
    n_layers: int
    hf: Any
    shares_prefix: bool
    caches: bool = True
    """Whether ``hf`` takes a key-value cache."""

    def refresh(self) -> None:
        """Called after adapters were put on or taken off, for engines that keep modules of their own."""
        return

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """What can be read and edited on this model (``resid_mid`` only where the family has one)."""

    @abstractmethod
    def read(self, place: Place, select: Select, **inputs: Any) -> dict[int, Tensor]:
        """One pass of the decoder without its output head and without gradients; ``{layer: select(stream)}``.

        Args:
            place: site and layers (the position is the caller's, in ``select``).
            select: sees the stream as the block made it, edits of :meth:`editing` included.
            inputs: ``input_ids``, ``attention_mask`` and, where :attr:`shares_prefix`, ``position_ids, past_key_values, use_cache``. Without
                ``use_cache=True``, or with a cache that has ``frozen = True``, nothing need be kept in a cache, and the pass may end after the
                last block asked for.
        """

    @abstractmethod
    def editing(self, edits: Mapping[tuple[str, int], Edit]) -> AbstractContextManager[None]:
        """While it is open, ``edits[site, layer]`` changes that site in every forward pass; afterwards the model is as it was.

        Contexts nest: at one site the edits compose in the order of opening.
        """
