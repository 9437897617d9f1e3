"""What every engine can do, and the edits of a residual stream. The one abstract class of the house."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..activations import SINGLE_LAYER_SITES, SITES, Place

Select = Callable[[Float[Tensor, "prompt position d_model"]], Tensor]
"""Chooses, inside the pass, the rows to keep of a batch of residual streams."""

Edit = Callable[[Float[Tensor, "prompt position d_model"]], Float[Tensor, "prompt position d_model"]]
"""Changes a batch of residual streams at one site of one block."""


Visit = Callable[[Tensor], Tensor | None]
"""Sees a stream as it passes; what it returns, if anything, takes its place."""

FLOW = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm")
"""The order in which a forward pass comes by."""


def adding(vector: Float[Tensor, " d_model"], size: float) -> Edit:
    """x + size · v̂ at every token."""
    push = size * vector
    return lambda h: h + push.to(h)


def removing(basis: Float[Tensor, "k d_model"]) -> Edit:
    """x − BᵀBx at every token; the rows of B are orthonormal."""
    # plain products: at one token a step, einsum's own time is most of an edit's
    return lambda h: h - ((h.float() @ basis.T) @ basis).to(h.dtype)


def clamping(vector: Float[Tensor, " d_model"], value: float) -> Edit:
    """x + (value − v̂ᵀx) v̂ at every token: its projection is ``value``."""
    return lambda h: h + ((value - h.float() @ vector)[..., None] * vector).to(h.dtype)


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

    def __init__(self) -> None:
        self._open: list[Mapping[tuple[str, int], Edit]] = []

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

    @contextmanager
    def editing(self, edits: Mapping[tuple[str, int], Edit]) -> Iterator[None]:
        """While it is open, ``edits[site, layer]`` changes that site in every forward pass; afterwards the model is as it was.

        Contexts nest: at one site the edits compose in the order of opening.
        """
        mine = dict(edits)
        for site, layer in mine:
            self._check(site, layer)
        self._open.append(mine)
        try:
            self._hang()
            yield
        finally:
            self._open = [one for one in self._open if one is not mine]
            self._hang()

    def _edits(self) -> list[tuple[str, int, list[Edit]]]:
        """Everything open: ``(site, layer, edits in the order of opening)``, in the order in which a forward pass comes by."""
        places = {place for edits in self._open for place in edits}
        return [(site, layer, [one[site, layer] for one in self._open if (site, layer) in one]) for site, layer in sorted(places, key=self._when)]

    def _when(self, place: tuple[str, int]) -> tuple[int, int]:
        site, layer = place
        return (self.n_layers if site == "final_norm" else layer), FLOW.index(site)

    def _check(self, site: str, layer: int) -> None:
        """ValueError for a place this model does not have."""
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; sites are {', '.join(SITES)}")
        n = 1 if site in SINGLE_LAYER_SITES else self.n_layers
        if not 0 <= layer < n:
            raise ValueError(f"{site!r} has the layers 0 … {n - 1}; {layer} is not among them")

    @abstractmethod
    def _hang(self) -> None:
        """Take all edits off and put on those that are open."""


def apply_edits(edits: list[Edit], stream: Tensor) -> Tensor:
    """The edits one after the other; ValueError if one changes the shape."""
    new = stream
    for edit in edits:
        new = edit(new)
        if new.shape != stream.shape:
            raise ValueError(f"an edit made {tuple(new.shape)} of a stream of {tuple(stream.shape)}; an edit keeps the shape")
    return new.to(stream.dtype, copy=True)  # a copy, since what comes next may add to it in place


def keeping(kept: dict[int, Tensor], layer: int, select: Select) -> Visit:
    """A visit that keeps ``select``'s rows of the stream; copies, since what comes next may add to it in place."""

    def keep(stream: Tensor) -> None:
        rows = select(stream)
        kept[layer] = rows.clone() if rows.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr() else rows

    return keep
