"""The coloured view of tokens: which of them a position names, or how far each lies along a direction; HTML in notebooks, ANSI in terminals."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ._core import as_table
from ._recording import Recording
from .activations import SINGLE_LAYER_SITES
from .adapters import On, label
from .directions import Direction
from .positions import Position, needs_response, pieces, position_name, token_rows

SHOWN = 20
"""Prompts that are shown unless more are asked for."""

INSIDE = 0.95
"""Share of tokens whose projection lies within the colour scale; the few largest (often the first token) are as red or blue as it gets."""

RED, BLUE, AMBER = (178, 24, 43), (33, 102, 172), ("#ffd24d", "#ffe394")
ANSI_RED, ANSI_BLUE, ANSI_AMBER = (231, 224, 217, 210, 203, 160), (231, 189, 153, 111, 68, 25), (221, 228)
"""Steps of the 256-colour palette, from none to full; the two ambers take turns, so that tokens that touch can be told apart."""


@dataclass(frozen=True)
class ShownPrompt:
    """The tokens of one prompt, as text, and which are chosen."""

    id: str
    tokens: tuple[str, ...]
    chosen: frozenset[int]
    content: frozenset[int]
    """Tokens of the user's text and of the response; the others are the template's."""
    values: Float[np.ndarray, " position"] | None = None
    """Projection of each token; NaN where there is none (the response)."""


@dataclass(frozen=True)
class TokenView:
    """Prompts with the tokens of a position in colour; with a direction all tokens are coloured by their projection on it.

    ``print(view)`` and the prompt of a terminal show ANSI colours, or brackets where ``NO_COLOR`` is set; a notebook shows HTML.
    """

    prompts: tuple[ShownPrompt, ...]
    position: str
    """The name as kept in every artifact."""
    model: str = ""
    direction: str = ""
    left_out: int = 0

    @property
    def scale(self) -> float:
        """The projection at which a colour is full: :data:`INSIDE` of all tokens lie within ± this."""
        values = np.concatenate([np.zeros(0), *(np.asarray(p.values) for p in self.prompts if p.values is not None)])
        values = np.abs(values[np.isfinite(values)])
        return float(np.quantile(values, INSIDE)) or 1.0 if values.size else 1.0

    def heading(self) -> str:
        """What is shown, in one line."""
        n = len(self.prompts)
        count = f"{n} prompt{'s' if n != 1 else ''}" if not self.left_out else f"{n} of {n + self.left_out} prompts (most= shows more)"
        told = [f"position {self.position!r}", count, self.model]
        if self.direction:
            told.append(f"projection on {self.direction}: blue −{self.scale:.3g} … red +{self.scale:.3g} ({INSIDE:.0%} of tokens lie within)")
        return " · ".join(part for part in told if part)

    def __str__(self) -> str:
        return self.text(colour=not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")

    def __repr__(self) -> str:
        return str(self)

    def text(self, colour: bool = True) -> str:
        """For a terminal; without colour the chosen tokens stand in ⟦ ⟧, and with a direction the five furthest tokens each way are listed."""
        lines = [visible(self.heading())]
        for prompt in self.prompts:
            lines += ["", f"{visible(prompt.id)} · {_counted(prompt)}"]
            lines.append("".join(self._in_ansi(prompt, i) if colour else _in_brackets(prompt, i) for i in range(len(prompt.tokens))))
            if prompt.values is not None:
                lines += _furthest(prompt)
        return "\n".join(lines)

    def _in_ansi(self, prompt: ShownPrompt, i: int) -> str:
        codes: list[str] = []
        chosen, along = i in prompt.chosen, self._along(prompt, i)
        if along is not None:
            step = round(abs(along) * (len(ANSI_RED) - 1))
            codes += [f"48;5;{(ANSI_RED if along > 0 else ANSI_BLUE)[step]}", f"38;5;{231 if step > 3 else 16}"]
            codes += ["1", "4"] if chosen else []
        elif chosen:
            codes += [f"48;5;{ANSI_AMBER[i % 2]}", "38;5;16"]
        elif i not in prompt.content:
            codes.append("2")
        begin = f"\x1b[{';'.join(codes)}m" if codes else ""
        return "\n".join(f"{begin}{part}\x1b[0m" if begin and part else part for part in _drawn(prompt.tokens[i]).split("\n"))

    def _repr_html_(self) -> str:
        body = "".join(
            f"<div style='margin:0.6em 0'><div style='opacity:0.7'>{escape(visible(p.id))} · {_counted(p)}</div>"
            f"<div style='white-space:pre-wrap;line-height:1.7;font-family:ui-monospace,monospace'>{''.join(self._in_html(p))}</div></div>"
            for p in self.prompts
        )
        return f"<div><div>{escape(visible(self.heading()))}</div>{body}</div>"

    def _in_html(self, prompt: ShownPrompt) -> Iterator[str]:
        for i, token in enumerate(prompt.tokens):
            along, style, told = self._along(prompt, i), "border-radius:3px", f"{i} · {token!r}"
            if along is not None and prompt.values is not None:
                colour, dark = _mixed(RED if along > 0 else BLUE, abs(along)), abs(along) > 0.55
                style += f";background:{colour};color:{'#fff' if dark else '#222'}" + (";outline:2px solid #c77400" if i in prompt.chosen else "")
                told += f" · {prompt.values[i]:.4g}"
            elif i in prompt.chosen:
                style += f";background:{AMBER[i % 2]};color:#222"
            elif i not in prompt.content:
                style += ";opacity:0.55"
            yield f"<span style='{style}' title='{escape(told, quote=True)}'>{escape(_drawn(token))}</span>"

    def _along(self, prompt: ShownPrompt, i: int) -> float | None:
        """The projection in units of the scale, at most ±1; None where there is none."""
        if prompt.values is None or not np.isfinite(prompt.values[i]):
            return None
        return float(np.clip(prompt.values[i] / self.scale, -1, 1))


def visible(text: str) -> str:
    """Text in which nothing is hidden and nothing commands a terminal: ``\\n`` as ↵, tabs as ⇥, control and zero-width characters by name."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵", "\t": "⇥"}[character]
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return character if character.isprintable() else f"‹U+{ord(character):04X}›"


def _drawn(token: str) -> str:
    """As :func:`visible`, with the lines of the text kept; a token that only continues a character of the one before is a ⋯."""
    return "\n".join(visible(part) + "↵" * (k < token.count("\n")) for k, part in enumerate(token.split("\n"))) if token else "⋯"


def _in_brackets(prompt: ShownPrompt, i: int) -> str:
    drawn = _drawn(prompt.tokens[i])
    if i not in prompt.chosen:
        return drawn
    inner = drawn.rstrip("\n")
    return f"⟦{inner}⟧{drawn[len(inner) :]}"


def _counted(prompt: ShownPrompt) -> str:
    return f"{len(prompt.chosen)} of {len(prompt.tokens)} tokens"


def _furthest(prompt: ShownPrompt, n: int = 5) -> list[str]:
    assert prompt.values is not None
    order = [int(i) for i in np.argsort(prompt.values) if np.isfinite(prompt.values[i])]
    ends = {"+": [i for i in reversed(order) if prompt.values[i] > 0][:n], "−": [i for i in order if prompt.values[i] < 0][:n]}
    told = {sign: ", ".join(f"{visible(prompt.tokens[i])!r} {prompt.values[i]:.3g}" for i in chosen) for sign, chosen in ends.items()}
    return [f"  {sign} {line}" for sign, line in told.items() if line]


def _mixed(colour: Sequence[int], share: float) -> str:
    """White with a share of a colour."""
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in colour)


def token_view(
    model: Recording,
    prompts: Any,
    position: Position = "last",
    direction: Direction | None = None,
    layer: int | None = None,
    adapter: On = None,
    most: int = SHOWN,
) -> TokenView:
    """:meth:`emlens.models.HookedModel.show_positions`."""
    position = "mean_response" if isinstance(position, str) and position == "response" else position
    table = as_table(prompts)
    few = table.head(most)
    name, coded = position_name(position), model._tokens(few, response=needs_response(position))
    values, said = [None] * len(few) if direction is None else _projections(model, few, direction, layer, adapter), ""
    if direction is not None:
        said = f"{direction.name!r} at {direction.site}, layer {_layer(direction, layer)}, {label(adapter)}"
    shown = []
    for identity, tokens, along in zip(few["id"].astype(str), coded, values, strict=True):
        n, total, (start, end) = tokens.n_prompt, len(tokens.ids), tokens.user_span
        content = {i for i, (a, b) in enumerate(tokens.offsets) if b > start and a < end} | set(range(n, total))
        every = None if along is None else np.concatenate([along, np.full(total - n, np.nan)])
        chosen = frozenset(token_rows(tokens, position, identity))
        shown.append(ShownPrompt(identity, tuple(pieces(tokens, model.tokenizer)), chosen, frozenset(content), every))
    return TokenView(tuple(shown), name, model.name, said, len(table) - len(few))


def _layer(direction: Direction, layer: int | None) -> int:
    if layer is None and len(direction.layers) > 1:
        raise ValueError(f"direction {direction.name!r} has the layers {list(direction.layers)}; say at which to project: layer=")
    return direction.layers[0] if layer is None else layer


def _projections(model: Recording, table: pd.DataFrame, direction: Direction, layer: int | None, adapter: On) -> list[Float[np.ndarray, " position"]]:
    """⟨h, v⟩ of every prompt token, prompt by prompt."""
    at = _layer(direction, layer)
    vector = direction.layer(at)
    if vector.shape != (model.d_model,):
        raise ValueError(f"direction {direction.name!r} has {len(vector)} entries; {model.name} has d_model {model.d_model}")
    layers = None if direction.site in SINGLE_LAYER_SITES else [at]
    acts = model.record(table, site=direction.site, position="all", layers=layers, adapter=adapter)
    along = acts.values[:, 0].astype(np.float64) @ vector
    lengths = acts.facts.groupby("prompt_id", sort=False).size().reindex(table["id"])
    return np.split(along, np.cumsum(lengths.to_numpy())[:-1])
