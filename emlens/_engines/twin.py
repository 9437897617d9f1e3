"""A second set of modules over one set of weights: what a library may rewrite, hook and keep, while the model itself stays as it was."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..activations import SINGLE_LAYER_SITES, SITES
from .base import Edit, Engine, Select
from .hooks import FLOW, Visit

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps its hooks; the functions in them belong to whoever put them on the original."""


def twin(hf: PreTrainedModel) -> PreTrainedModel:
    """The same model in modules of its own: every parameter and buffer is the original's tensor, adapters as they are loaded; no hooks.

    Configs are copied, so that another attention implementation, say, stays the twin's affair. All adapters are off (the loaded weights are
    on); they are switched on the twin apart from the original. Costs the modules' own memory (kilobytes) and no weights.

    An adapter that is put on or taken off afterwards is not on the twin, and weights moved to another device or dtype may no longer be
    shared: make a new one.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    made = copy.deepcopy(hf, shared)
    for module in made.modules():
        for kept in HOOKS:
            getattr(module, kept).clear()
        vars(module).pop("_output_capturing_hooks_installed", None)  # transformers hangs its own again when hidden states are asked for
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = True
    return made


def path_of(root: nn.Module, module: nn.Module) -> str:
    """The dotted path of ``module`` below ``root``; KeyError if it is not there."""
    for path, found in root.named_modules():
        if found is module:
            return path
    raise KeyError(f"no such {type(module).__name__} below {type(root).__name__}")


class KeepsEdits(Engine):
    """An engine that keeps the open edits itself, in the order of opening, and puts them on whatever it runs."""

    def __init__(self) -> None:
        self._open: list[Mapping[tuple[str, int], Edit]] = []

    @contextmanager
    def editing(self, edits: Mapping[tuple[str, int], Edit]) -> Iterator[None]:
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


class TwinEngine(KeepsEdits):
    """An engine whose library works on a twin: the model itself is never touched by it."""

    shares_prefix = True

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.original = hf
        self.refresh()

    def refresh(self) -> None:
        """A new twin, after adapters were put on or taken off, or the weights were moved; open edits stay open."""
        self._make()
        self._hang()

    @abstractmethod
    def _make(self) -> None:
        """Make the twin and open the library on it."""


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
