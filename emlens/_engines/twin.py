"""A second set of modules over one set of weights: what a library may rewrite, hook and keep, while the model itself stays as it was."""

import copy
from abc import abstractmethod

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .base import Engine

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


class TwinEngine(Engine):
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
