"""How a place is read and edited. The only room that knows hooks, the transformer-lens bridge and nnsight.

The default engine is transformers' own forward with plain PyTorch hooks on the blocks, which are found by structure.
"""

from collections.abc import Mapping
from typing import Any

from .base import Edit, Engine, Select, adding, clamping, removing
from .hooks import HooksEngine
from .structure import decoder_of, find_blocks

ENGINES = ("hooks", "bridge", "nnsight")

__all__ = [
    "ENGINES", "Edit", "Engine", "HooksEngine", "Select", "adding", "clamping", "decoder_of", "find_blocks", "open_bridge", "open_engine",
    "open_nnsight", "open_remote", "removing",
]  # fmt: skip


def open_engine(name: str, hf: Any, tokenizer: Any, parts: Mapping[str, str] | None = None) -> Engine:
    """The engine of this name on a loaded model; transformer-lens and nnsight are imported when they are asked for."""
    if name == "hooks":
        return HooksEngine(hf, parts)
    if name == "bridge":
        from .bridge import BridgeEngine

        return BridgeEngine(hf, tokenizer)
    if name == "nnsight":
        from .traces import NnsightEngine

        return NnsightEngine(hf, tokenizer, parts)
    raise ValueError(f"unknown engine {name!r}; engines are {', '.join(ENGINES)}")


def open_bridge(hf: Any, tokenizer: Any) -> Any:
    """:func:`emlens._engines.bridge.open_bridge`."""
    from .bridge import open_bridge

    return open_bridge(hf, tokenizer)


def open_nnsight(hf: Any, tokenizer: Any) -> Any:
    """:func:`emlens._engines.traces.open_nnsight`."""
    from .traces import open_nnsight

    return open_nnsight(hf, tokenizer)


def open_remote(name: str, tokenizer: Any, **options: Any) -> Any:
    """A :class:`emlens._engines.remote.RemoteEngine`."""
    from .remote import RemoteEngine

    return RemoteEngine(name, tokenizer, **options)
