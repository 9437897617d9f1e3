"""Named positions: which tokens of a prompt are read, found from character offsets, never by counting from the end of a padded row.

``last``            the last token of the prompt, from which an answer begins
``mean``            mean over the content tokens of the last user turn
``mean_all``        mean over the whole prompt, its template included (called mean_prompt in the emergent-misalignment paper's code)
``first_response``, ``mean_response``, ``last_response``   first, mean and last token of the response
``all``             one row per token of the prompt
an integer          one token of the prompt, from its end if negative
``(start, end)``    mean over the tokens of these characters of the user's text
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .prompts import split_response, user_text

POSITIONS = ("last", "mean", "mean_all", "first_response", "mean_response", "last_response", "all")
"""Their names; the head of this module says what each is."""

Position = str | int | tuple[int, int]


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a (fast) tokenizer."""

    chat_template: Any

    def __call__(self, text: str, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Tokens:
    """One rendered and tokenised prompt. ``ids[:n_prompt]`` is the prompt, the rest the response (content only, no end-of-turn token)."""

    ids: tuple[int, ...]
    n_prompt: int
    offsets: tuple[tuple[int, int], ...]
    """Character offsets of the prompt's tokens in ``text``."""
    text: str
    """The rendered prompt (template and all) without the response."""
    user_span: tuple[int, int]
    """Where the last user message's text stands in ``text``; (-1, -1) when the template changed it."""


def tokenize(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, response: str | None = None) -> Tokens:
    """Render a chat once and tokenise it once; the response is tokenised by itself and appended.

    The prompt's tokens are thereby exactly those a model sees before it answers. With a chat template the template alone writes special
    tokens (``add_special_tokens=False``), so there is no second BOS.

    Args:
        messages: the chat; a last assistant message is taken as the response unless ``response`` is given.
        tokenizer: a fast tokenizer with a chat template.
        response: text to append after the generation prompt; ``""`` for none.
    """
    prompt, own = split_response(messages)
    answer = own if response is None else response
    text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = [int(i) for i in coded["input_ids"]], [(int(a), int(b)) for a, b in coded["offset_mapping"]]
    start, content = _find_user(prompt, text, tokenizer)
    tail = [int(i) for i in tokenizer(answer, add_special_tokens=False)["input_ids"]] if answer else []
    span = (start, start + len(content)) if start >= 0 else (-1, -1)
    return Tokens(tuple(ids + tail), len(ids), tuple(offsets), text, span)


MARK = "\ue000user\ue001"
"""Stands in for the user's text to find where a template puts it: the text itself may occur elsewhere (in the system prompt, in a role's name)."""


def _find_user(prompt: Sequence[Mapping[str, str]], text: str, tokenizer: Tokenizer) -> tuple[int, str]:
    """Where the last user message stands in the rendered ``text`` (-1: the template changed it), and its text without outer blanks."""
    content = user_text(prompt).strip()
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=-1)
    if not content:
        return -1, content
    marked = [{**m, "content": MARK} if i == last else m for i, m in enumerate(prompt)]
    before, found, _ = str(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)).partition(MARK)
    if found and text.startswith(before) and text[len(before) :].lstrip().startswith(content):
        return text.index(content, len(before)), content
    return text.rfind(content), content


def needs_response(position: Position) -> bool:
    """Whether the response has to be fed to read this position."""
    return isinstance(position, str) and position.endswith("_response")


def position_name(position: Position) -> str:
    """The name kept in a Place: ``last``, ``index -2``, ``span 3:10``."""
    if isinstance(position, str):
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}; positions are {', '.join(POSITIONS)}, an integer, or a span (start, end)")
        return position
    if isinstance(position, (int, np.integer)) and not isinstance(position, bool):
        return f"index {int(position)}"
    if isinstance(position, tuple) and len(position) == 2:
        return f"span {int(position[0])}:{int(position[1])}"
    raise ValueError(f"unknown position {position!r}; positions are {', '.join(POSITIONS)}, an integer, or a span (start, end)")


def token_rows(tokens: Tokens, position: Position, prompt_id: str = "this prompt") -> list[int]:
    """Indices into ``tokens.ids`` that ``position`` names; they are averaged, except for ``all``.

    Raises:
        ValueError: the position names no token of this prompt (no response, an index or span outside).
    """
    name, n, total = position_name(position), tokens.n_prompt, len(tokens.ids)
    if name == "last":
        return [n - 1]
    if name in ("mean_all", "all"):
        return list(range(n))
    if name.endswith("_response"):
        if total == n:
            raise ValueError(f"{prompt_id} has no response; position {name!r} needs a last message of role 'assistant'")
        return {"first_response": [n], "last_response": [total - 1], "mean_response": list(range(n, total))}[name]
    if isinstance(position, (int, np.integer)):
        index = int(position) if position >= 0 else n + int(position)
        if not 0 <= index < n:
            raise ValueError(f"{prompt_id} has {n} prompt tokens; index {int(position)} is outside")
        return [index]
    start, end = tokens.user_span
    if start < 0:
        raise ValueError(f"{prompt_id}: the chat template does not hold the user's text as it is, so {name!r} cannot be found; use 'mean_all'")
    if isinstance(position, tuple):
        if not 0 <= position[0] < position[1]:
            raise ValueError(f"{prompt_id}: a span (start, end) needs 0 <= start < end, in characters of the user's text; got {position}")
        start, end = start + int(position[0]), min(start + int(position[1]), end)
    rows = [i for i, (a, b) in enumerate(tokens.offsets) if b > start and a < end and b > a]
    if not rows:
        raise ValueError(f"{prompt_id}: position {name!r} holds no token")
    return rows


def token_set(tokens: Tokens, position: Position, ids: Sequence[int], prompt_id: str = "this prompt") -> list[int]:
    """The tokens ``position`` stands for, as a set of which nothing is averaged, in a sequence ``ids`` that begins with this prompt.

    As :func:`token_rows`, but ``all`` is every token there is, the response's among them, and a response that is not there yet has none.
    """
    if len(ids) <= tokens.n_prompt and needs_response(position):
        return []
    return list(range(len(ids))) if position == "all" else token_rows(replace(tokens, ids=tuple(ids)), position, prompt_id)


def pieces(tokens: Tokens, tokenizer: Any) -> list[str]:
    """The text of each token; together they are the rendered prompt and the response.

    A character of several tokens stands with one of them, and the others are ``""``; blanks that no token covers stand with the token after.
    """
    ends = list(accumulate((b for _, b in tokens.offsets), max, initial=0))
    tail = tokens.ids[tokens.n_prompt :]
    said = [str(tokenizer.decode(list(tail[:k]), clean_up_tokenization_spaces=False)) for k in range(len(tail) + 1)]
    whole = list(accumulate((len(text.rstrip("\ufffd")) for text in said), max))  # without a character that is not complete yet
    return [tokens.text[a:b] for a, b in pairwise(ends)] + [said[-1][a:b] for a, b in pairwise([*whole[:-1], len(said[-1])])]
