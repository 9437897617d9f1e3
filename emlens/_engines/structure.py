"""Where the blocks of a transformer are, by structure, and which modules of a block add what to the stream, by one small probing pass.

Nothing here knows a family by name. What a block adds is measured: of all its modules, the two are found whose outputs, times 1 or a
multiplier of the config, make ``resid_pre + attn_out + mlp_out = resid_post``; the stream between is what the next module reads.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

Stream = Float[Tensor, "prompt position d_model"]

KEYS = ("blocks", "final_norm", "attn_out", "mlp_out", "resid_mid")
"""What ``parts=`` may name by hand: two paths from the whole model, three from a block."""

N_PROBE = 8
"""Tokens of the probing pass."""

TWINS = (1, 7)
"""Two of them that are the same token."""


@dataclass(frozen=True)
class Part:
    """What one half of a block adds to the stream: ``scale`` times the sum of the outputs of its modules, named in the order they run."""

    names: tuple[str, ...]
    scale: float = 1.0

    def __str__(self) -> str:
        return " + ".join(self.names) + (f" × {self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block, by the names of its modules (an adapter may wrap the modules later).

    ``resid_mid`` names the modules that read ``resid_pre + attn_out``; none do where attention and MLP run side by side.
    ``gap`` is how far the parts are from adding up: mean over tokens of ‖x + a + m − y‖ / ‖y‖.
    """

    attn_out: Part
    mlp_out: Part
    resid_mid: tuple[str, ...]
    gap: float


def by_hand(parts: Mapping[str, str] | None) -> dict[str, str]:
    """``parts=`` as given, checked.

    Raises:
        ValueError: a key that names no part.
    """
    unknown = sorted(set(parts or {}) - set(KEYS))
    if unknown:
        raise ValueError(f"parts= has the keys {unknown}; the parts that can be named are {', '.join(KEYS)}")
    return dict(parts or {})


# ---- blocks


def decoder_of(hf: PreTrainedModel) -> nn.Module:
    """The model without its output head."""
    decoder = hf.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not hf else hf.base_model


def find_blocks(hf: PreTrainedModel, parts: Mapping[str, str] | None = None) -> tuple[nn.ModuleList, nn.Module]:
    """The list of blocks and the final norm: the one list of ``num_hidden_layers`` members and the norm beside it, or as named by hand.

    Raises:
        ValueError: an encoder stands before the decoder; no list, or more than one, has ``num_hidden_layers`` members; no single norm
            stands beside it; or a name given by hand is not there.
    """
    named, kind = by_hand(parts), type(hf).__name__
    if hf.config.is_encoder_decoder:
        raise ValueError(f"{kind} has an encoder and a decoder; emlens reads decoder-only transformers with one stack of blocks.")
    n: int = hf.config.get_text_config().num_hidden_layers
    inner = decoder_of(hf)
    lists = {name: m for name, m in inner.named_modules() if isinstance(m, nn.ModuleList) and _outermost(name)}
    found = [name for name, m in lists.items() if len(m) == n]
    if "blocks" in named:
        blocks = _module(hf, named["blocks"], "blocks")
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{kind}: {named['blocks']!r} is a {type(blocks).__name__}; the blocks are a ModuleList, one of {_paths(hf, lists)}")
    elif len(found) == 1:
        blocks = lists[found[0]]
    else:
        raise ValueError(
            f"{kind}: expected one list of {n} blocks, found {found} (all lists: {_paths(hf, lists)}). emlens reads decoder-only transformers with "
            "one stack of blocks; name it by hand: load_model(…, parts={'blocks': 'model.layers', 'final_norm': 'model.norm'})."
        )
    if "final_norm" in named:
        return blocks, _module(hf, named["final_norm"], "final_norm")
    path = next(name for name, m in hf.named_modules() if m is blocks)
    parent = hf.get_submodule(path.rpartition(".")[0])
    norms = {child: m for child, m in parent.named_children() if re.search(r"norm|^ln", child.lower()) and "emb" not in child.lower()}
    if len(norms) != 1:
        beside = [child for child, _ in parent.named_children()]
        raise ValueError(
            f"{kind}: expected one final norm beside the blocks, found {len(norms)} among {beside}; name it by hand: "
            "load_model(…, parts={'final_norm': 'model.norm'})"
        )
    return blocks, next(iter(norms.values()))


def _outermost(name: str) -> bool:
    """Lists inside a block (experts, say) are named ``layers.3.…``."""
    return not any(part.isdigit() for part in name.split("."))


def _paths(hf: PreTrainedModel, lists: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, m in hf.named_modules() if any(m is one for one in lists.values())]


def _module(root: nn.Module, path: str, key: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        there = [name for name, _ in root.named_children()]
        raise ValueError(f"parts= says {key!r} is {path!r}, but {type(root).__name__} has no such module; its children are {there}") from error


# ---- what passes through a module


def stream_of(out: Any) -> Tensor:
    """The stream in a module's output: a Tensor, or a tuple that begins with it."""
    return out[0] if isinstance(out, tuple) else out


def stream_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The stream in a module's input: the first tensor it is given."""
    key = stream_key(kwargs)
    return args[0] if args and isinstance(args[0], Tensor) else kwargs[key] if key else None


def stream_key(kwargs: Mapping[str, Any]) -> str | None:
    """The keyword under which a module is given the stream."""
    return "hidden_states" if "hidden_states" in kwargs else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)


# ---- the probing pass


@dataclass
class _Seen:
    """One block in the probing pass. Tensors are copies, since some blocks add in place; flat ones are given the shape of the stream."""

    x: Stream | None = None
    y: Stream | None = None
    outputs: dict[str, Stream] = field(default_factory=dict)
    inputs: dict[str, Stream] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)

    def came_in(self, name: str, now: int, stream: Tensor | None) -> None:
        if name in self.began:  # a hook could not tell its first run from its second
            self.twice.add(name)
            self.inputs.pop(name, None)
            self.outputs.pop(name, None)
        self.began[name] = now
        if self._is_stream(stream) and name not in self.twice:
            self.inputs[name] = self._copy(stream)

    def went_out(self, name: str, now: int, stream: Any) -> None:
        self.ended[name] = now
        if self._is_stream(stream) and name not in self.twice:
            self.outputs[name] = self._copy(stream)

    def modules(self, deep: bool) -> list[str]:
        """Modules that ran once and gave something of the stream's shape, children before grandchildren, then as they ran."""
        names = [n for n in self.outputs if deep or "." not in n]
        return sorted(names, key=lambda n: (n.count("."), self.began[n]))

    def _is_stream(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.x is not None and value.numel() == self.x.numel() and value.shape[-1] == self.x.shape[-1]

    def _copy(self, value: Any) -> Stream:
        assert self.x is not None
        return value.detach().clone().reshape(self.x.shape)


def _probe(hf: PreTrainedModel, blocks: nn.ModuleList) -> list[_Seen]:
    """Everything of the stream's shape that goes in and out of the modules of every block, for a few tokens spread over the vocabulary.

    Edits that are open stay consistent: the block's input is seen after them, its output and the inputs of its modules before them.
    """
    clock, handles, seen = count(), [], [_Seen() for _ in blocks]

    def block_in(one: _Seen) -> Any:
        return lambda _, args, kwargs: setattr(one, "x", stream_in(args, kwargs).detach().clone())  # type: ignore[union-attr]

    def block_out(one: _Seen) -> Any:
        return lambda _, __, out: setattr(one, "y", stream_of(out).detach().clone())

    def module_in(one: _Seen, name: str) -> Any:
        return lambda _, args, kwargs: one.came_in(name, next(clock), stream_in(args, kwargs))

    def module_out(one: _Seen, name: str) -> Any:
        return lambda _, __, out: one.went_out(name, next(clock), stream_of(out))

    embedding: Any = hf.get_input_embeddings()
    ids = (torch.arange(1, N_PROBE + 1, device=embedding.weight.device) * embedding.num_embeddings // (N_PROBE + 2))[None]
    ids[:, TWINS[1]] = ids[:, TWINS[0]]
    try:
        for block, one in zip(blocks, seen, strict=True):
            handles.append(block.register_forward_pre_hook(block_in(one), with_kwargs=True))
            handles.append(block.register_forward_hook(block_out(one), prepend=True))
            for name, module in block.named_modules():
                if name and not isinstance(module, (nn.Dropout, nn.Identity)):
                    handles.append(module.register_forward_pre_hook(module_in(one, name), prepend=True, with_kwargs=True))
                    handles.append(module.register_forward_hook(module_out(one, name)))
        with torch.no_grad():
            decoder_of(hf)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- parts


def find_parts(hf: PreTrainedModel, blocks: nn.ModuleList, parts: Mapping[str, str] | None = None) -> tuple[BlockParts, ...]:
    """For every block the modules that make ``attn_out``, ``mlp_out`` and read ``resid_mid``, from one forward pass of a few tokens.

    Of two parts that run one after the other, the first is the attention's (or whatever mixes tokens there). Of two side by side it is the one
    that gives two different things for the same token in two places; the next blocks follow the first.

    Raises:
        ValueError: no two modules of a block (or those named by hand) add up to what it adds to the stream.
    """
    named = by_hand(parts)
    found: list[BlockParts] = []
    silent: list[int] = []
    for layer, (block, one) in enumerate(zip(blocks, _probe(hf, blocks), strict=True)):
        for key in ("attn_out", "mlp_out", "resid_mid"):
            for name in _names(named, key):
                _module(block, name, key)
        scales = _scales(hf, block)
        guess = [(found[-1].attn_out, found[-1].mlp_out)] if found else []
        best = _search(one, guess, named, scales)
        if best is None or not _adds_up(one, best[0]):
            raise ValueError(_no_parts(hf, layer, one, best, named))
        gap, first, second = best
        mid = _readers(one, first, named)
        if not mid and not guess and _mixes_more(one, second, first) and not {"attn_out", "mlp_out"} & set(named):
            first, second = second, first
        found.append(BlockParts(first, second, mid, gap))
        if not _contribution(one, first).any():
            silent.append(layer)
    # where attention adds nothing, what reads x and what reads x + a look the same: go by the other blocks
    known = {block.attn_out.names: block.resid_mid for layer, block in enumerate(found) if layer not in silent}
    return tuple(replace(block, resid_mid=known.get(block.attn_out.names, block.resid_mid)) for block in found)


def _names(named: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in named[key].split("+")) if key in named else ()


def _mixes_more(one: _Seen, part: Part, other: Part) -> bool:
    """Whether ``part`` rather than ``other`` sees beyond a token: the stream is the same at two positions, and what it adds is not."""
    assert one.x is not None
    i, j = TWINS

    def differs(stream: Tensor) -> float:
        return _relative(stream[:, i], stream[:, j])

    return differs(one.x) == 0 and differs(_contribution(one, part)) > differs(_contribution(one, other))


def _scales(hf: PreTrainedModel, block: nn.Module) -> list[float]:
    """1, and the multipliers that the block or the config holds."""
    config = {k: v for k, v in vars(hf.config.get_text_config()).items() if re.search("multiplier|scal", k)}
    known = [v for v in (*vars(block).values(), *config.values()) if isinstance(v, float) and v not in (0.0, 1.0)]
    return [1.0, *dict.fromkeys(known)]


def _search(one: _Seen, guess: list[tuple[Part, Part]], named: Mapping[str, str], scales: Sequence[float]) -> tuple[float, Part, Part] | None:
    """The pair that comes nearest to adding up; children are preferred to what is inside them."""
    best: tuple[float, Part, Part] | None = None
    for stage in (guess, _pairs(one, named, scales, deep=False), _pairs(one, named, scales, deep=True)):
        for first, second in stage:
            if not {*first.names, *second.names} <= set(one.outputs):
                continue
            gap = _gap(one, _contribution(one, first), _contribution(one, second))
            if best is None or gap < best[0]:
                best = gap, first, second
            if gap == 0:
                break
        if best is not None and _adds_up(one, best[0]):
            return best
    return best


def _pairs(one: _Seen, named: Mapping[str, str], scales: Sequence[float], deep: bool) -> Iterator[tuple[Part, Part]]:
    alone = [(name,) for name in one.modules(deep)]
    firsts = [_in_order(one, _names(named, "attn_out"))] if "attn_out" in named else alone
    seconds = [_in_order(one, _names(named, "mlp_out"))] if "mlp_out" in named else alone
    for (a, m), (s, t) in product(product(firsts, seconds), product(scales, repeat=2)):
        both = {*a, *m} <= set(one.ended) and not set(a) & set(m)
        if both and ("mlp_out" in named or "attn_out" in named or one.ended[a[-1]] < one.ended[m[-1]]):
            yield Part(a, s), Part(m, t)


def _in_order(one: _Seen, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: one.ended.get(name, 0)))


def _contribution(one: _Seen, part: Part) -> Stream:
    total = sum(one.outputs[name] for name in part.names[1:]) + one.outputs[part.names[0]]
    return total * part.scale if part.scale != 1 else total


def _gap(one: _Seen, a: Stream, m: Stream) -> float:
    """Distance of x + a + m from y, in the order of adding that is nearest: in the model's own order it is exactly 0, in any dtype."""
    assert one.x is not None and one.y is not None
    return min(_relative(total, one.y) for total in ((one.x + a) + m, (a + m) + one.x, (one.x + m) + a))


def _relative(got: Tensor, want: Tensor) -> float:
    size = want.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((got.float() - want.float()).norm(dim=-1) / size).mean())


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-5, torch.finfo(dtype).eps / 2)


def _adds_up(one: _Seen, gap: float) -> bool:
    """Within rounding, and small beside what the block adds."""
    assert one.x is not None and one.y is not None
    return gap <= _tolerance(one.y.dtype) and gap <= 0.05 * _relative(one.x, one.y)


def _readers(one: _Seen, first: Part, named: Mapping[str, str]) -> tuple[str, ...]:
    """The children that read x + a, once a is there."""
    assert one.x is not None
    middle = one.x + _contribution(one, first)
    ready = max(one.ended[name] for name in first.names)

    def reads(name: str) -> bool:
        return name in one.inputs and one.began[name] > ready and _relative(one.inputs[name], middle) <= _tolerance(middle.dtype)

    by_name = _names(named, "resid_mid")
    wrong = [name for name in by_name if not reads(name)]
    if wrong:
        raise ValueError(f"parts= says 'resid_mid' is what {wrong[0]!r} reads, but that module does not read resid_pre + attn_out ({first})")
    return by_name or tuple(name for name in one.inputs if "." not in name and reads(name))


def _no_parts(hf: PreTrainedModel, layer: int, one: _Seen, best: tuple[float, Part, Part] | None, named: Mapping[str, str]) -> str:
    what = "the modules named in parts= do not" if {"attn_out", "mlp_out"} & set(named) else "no two modules"
    nearest = f"nearest: {best[1]} and {best[2]}, off by {best[0]:.2g} of ‖resid_post‖" if best else "none gave a tensor of the stream's shape"
    dtype = one.y.dtype if one.y is not None else torch.float32
    return (
        f"{type(hf).__name__}, block {layer}: {what} add up to what the block adds (resid_pre + attn_out + mlp_out = resid_post). Children with "
        f"the stream's shape, as they ran: {', '.join(one.modules(deep=False)) or 'none'}; {nearest} (needed {_tolerance(dtype):.0e}). resid_pre "
        "and resid_post can be read all the same. Name the parts by hand, several joined by '+': load_model(…, parts={'attn_out': 'self_attn', "
        "'mlp_out': 'experts + shared_mlp', 'resid_mid': 'post_attention_layernorm'})."
    )
