"""Which tokens a forward pass holds: where each stands in its sequence and where its prompt ends, padded on either side, with a cache or without."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .positions import Tokens

Where = str | int
"""Which tokens an edit changes: ``"all"``, ``"prompt"``, ``"response"`` (what is generated, too), or an index to begin at: 0 is the first token of
the sequence, −1 the last of the prompt."""

NAMED = ("all", "prompt", "response")


def check_where(where: Where) -> None:
    """ValueError for what names no tokens."""
    if isinstance(where, bool) or not (isinstance(where, int) or where in NAMED):
        raise ValueError(f"positions={where!r}; {', '.join(map(repr, NAMED))}, or the index of the first token to change (-1: the prompt's last)")


@contextmanager
def beside(decoder: nn.Module, begin: Callable[[dict[str, Any]], None], end: Callable[[], None], forward: Any = None) -> Iterator[None]:
    """``begin`` is called with what the decoder is given, by name, before every pass; ``end`` after it, also when it fails.

    Args:
        forward: the function whose signature names what is given by position; default the decoder's own.
    """
    names = list(inspect.signature(forward or type(decoder).forward).parameters)[1:]
    handles = [
        decoder.register_forward_pre_hook(lambda _, args, kwargs: begin({**dict(zip(names, args, strict=False)), **kwargs}), with_kwargs=True),
        decoder.register_forward_hook(lambda *_: end(), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Known:
    """The prompts that were made known, by which a sequence of tokens finds its own."""

    def __init__(self) -> None:
        self._prompts: dict[tuple[int, ...], Tokens] = {}

    def meet(self, tokens: Tokens) -> None:
        """A prompt that will be run: its tokens are found again in the passes, whatever is padded or appended."""
        self._prompts.setdefault(tokens.ids[: tokens.n_prompt], tokens)

    def prompt(self, ids: Sequence[int]) -> Tokens:
        """The longest prompt met that the sequence begins with.

        Raises:
            ValueError: there is none.
        """
        for n in sorted({len(prompt) for prompt in self._prompts}, reverse=True):
            found = self._prompts.get(tuple(ids[:n])) if n <= len(ids) else None
            if found is not None:
                return found
        raise ValueError(
            f"{len(ids)} tokens begin with no prompt that was made known, so where their prompt ends cannot be told. The model's own verbs make "
            "their prompts known; for a bare forward pass take its tokens from model.tokenize(prompts), inside the block"
        )


def tokens_of(given: Mapping[str, Any]) -> tuple[Int[Tensor, "row position"], Bool[Tensor, "row column"]]:
    """``input_ids`` of a pass, and which columns of the sequence so far (a cache's included) are no padding.

    Raises:
        ValueError: no ids, or a mask that is not two-dimensional.
    """
    ids, mask, past = given.get("input_ids"), given.get("attention_mask"), given.get("past_key_values")
    before = int(past.get_seq_length()) if past is not None else 0
    if ids is None or (mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(ids), before + ids.shape[1]))):
        raise ValueError(
            "tokens are found by input_ids and an attention_mask [row, position] over all of the sequence; this pass was given "
            f"{', '.join(k for k, v in given.items() if v is not None)}"
        )
    seen = torch.ones(len(ids), before + ids.shape[1], device=ids.device) if mask is None else mask
    return ids, seen.bool()


class Whereabouts:
    """The tokens that an edit changes in the pass that is running.

    A pass without a cache (or with an empty one) holds whole sequences, whose prompts are known; one that goes on from such a pass holds
    responses, and the prompt is what that pass held: so the model's own verbs run.
    """

    def __init__(self, where: Where) -> None:
        check_where(where)
        self.where, self.known = where, Known()
        self._prompt_columns = 0
        self.chosen: Bool[Tensor, "row position"] | None = None

    def begin(self, given: Mapping[str, Any]) -> None:
        """Find the tokens of a pass."""
        ids, seen = tokens_of(given)
        width = ids.shape[1]
        at = torch.where(seen, seen.long().cumsum(dim=1) - 1, -1)[:, -width:]
        if isinstance(self.where, int) and self.where >= 0:
            self.chosen = at >= self.where
            return
        if seen.shape[1] > width:
            ends = seen[:, : self._prompt_columns].sum(dim=1)
        else:
            real = [row[there].tolist() for row, there in zip(ids, seen, strict=True)]
            ends = torch.tensor([self.known.prompt(row).n_prompt for row in real], device=ids.device)
            self._prompt_columns = width
        end = ends[:, None]
        if isinstance(self.where, int):
            self.chosen = (at >= 0) & (at >= end + self.where)
        else:
            self.chosen = (at >= 0) & ((at < end) if self.where == "prompt" else (at >= end))

    def end(self) -> None:
        """Forget the pass."""
        self.chosen = None

    def limited(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The edit, at the chosen tokens alone; the others are left as they are, to the bit."""

        def at_chosen(h: Tensor) -> Tensor:
            if self.chosen is None:
                raise RuntimeError("an edit at some positions is open and the blocks ran without their decoder: which tokens they held is not known")
            return torch.where(self.chosen.to(h.device)[..., None], edit(h), h)

        return at_chosen
