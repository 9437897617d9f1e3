"""Forward passes: how prompts are batched and padded, which rows of a batch are kept, how responses are scored."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from .positions import Tokens

TOKEN_BUDGET = 2048
"""Padded tokens in one forward pass; with the prompts it determines the batches, so that a repeated run is the same to the bit."""


def plan(lengths: Sequence[int], budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Batches of row indices, sorted by length, each at most ``budget`` padded tokens (always at least one row).

    A pure function of the lengths and the budget, so that a resumed run has the batches of the undisturbed one.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda j: (lengths[j], j)):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, side: str = "right") -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[prompt, position]``, padded on one side."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)


def shared_prompt_batches(tokens: Sequence[Tokens], window: int | None = None, budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Rows to score together: every response of a prompt in one batch, prompts of like length side by side.

    Args:
        tokens: prompts with responses.
        window: the model's sliding attention window, if it has one. Padding between a prompt and its response is masked, but a window
            counts it; so where the longest prompt and the longest response together reach it (the two may meet in one padded batch), only
            prompts of exactly one length share a batch.
        budget: tokens in a batch.
    """
    exact = window is not None and max(t.n_prompt for t in tokens) + max(len(t.ids) - t.n_prompt for t in tokens) >= window
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, t in enumerate(tokens):
        by_prompt[t.ids[: t.n_prompt]].append(i)
    batches: list[list[int]] = []
    last, used = -1, 0
    for prompt in sorted(by_prompt, key=lambda p: (len(p), by_prompt[p][0])):
        rows = by_prompt[prompt]
        cost = len(prompt) + sum(len(tokens[i].ids) - len(prompt) for i in rows)
        if not batches or used + cost > budget or (exact and len(prompt) != last):
            batches.append([])
            used = 0
        batches[-1].extend(rows)
        last, used = len(prompt), used + cost
    return batches


def score_responses(hf: Any, tokens: Sequence[Tokens], pad: int, device: torch.device) -> Float[np.ndarray, " prompt"]:
    """Summed log-probability (nats) of each response after its prompt.

    Every prompt passes once; its keys and values serve all its responses. Log-probabilities are taken in float32, at the responses'
    tokens alone.
    """
    prompts = list(dict.fromkeys(t.ids[: t.n_prompt] for t in tokens))
    ids, seen = padded(prompts, pad, device)
    ends = torch.tensor([len(p) for p in prompts], device=device)
    start = int(ends.min()) - 1
    keep = torch.arange(start, ids.shape[1], device=device)
    first = hf(input_ids=ids, attention_mask=seen, use_cache=True, past_key_values=DynamicCache(config=hf.config), logits_to_keep=keep)
    which = torch.tensor([prompts.index(t.ids[: t.n_prompt]) for t in tokens], device=device)
    cache = first.past_key_values
    cache.batch_select_indices(which)
    logits = first.logits[which, ends[which] - 1 - start][:, None]
    answers, mask = padded([t.ids[t.n_prompt :] for t in tokens], pad, device)
    width = answers.shape[1]
    if width > 1:
        positions = ends[which][:, None] + torch.arange(width - 1, device=device)
        whole = torch.cat([seen[which], mask[:, :-1]], dim=1)
        rest = hf(input_ids=answers[:, :-1], attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, rest.logits], dim=1)
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), answers.flatten(), reduction="none").view(len(tokens), width)
    return -(losses.double() * mask).sum(dim=1).cpu().numpy()


def score_whole(hf: Any, tokens: Sequence[Tokens], pad: int, device: torch.device) -> Float[np.ndarray, " prompt"]:
    """As :func:`score_responses`, each prompt with its response in one pass and no cache."""
    ids, mask = padded([t.ids for t in tokens], pad, device)
    starts = torch.tensor([t.n_prompt for t in tokens], device=device)
    at = torch.arange(int(starts.min()), ids.shape[1], device=device)  # the tokens whose probability is wanted in some row
    logits = hf(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=at - 1).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at].flatten(), reduction="none").view(len(tokens), -1)
    return -(losses.double() * (mask[:, at] * (at >= starts[:, None]))).sum(dim=1).cpu().numpy()


def response_log_probs(hf: Any, tokens: Sequence[Tokens], pad: int, device: torch.device) -> list[Float[Tensor, "token vocab"]]:
    """Log-probabilities (float32) of every next token at the places that predict each response's tokens; no cache."""
    ids, mask = padded([t.ids for t in tokens], pad, device)
    start = min(t.n_prompt for t in tokens) - 1
    at = torch.arange(start, ids.shape[1] - 1, device=device)
    logits = hf(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=at).logits.float()
    return [one[t.n_prompt - 1 - start : len(t.ids) - 1 - start].log_softmax(dim=-1) for one, t in zip(logits, tokens, strict=True)]


def autocast(device: torch.device, precision: str | None) -> Any:
    """None: the dtype of the weights. ``"bfloat16"``: matrix products in bfloat16, sums and norms in float32."""
    if precision in (None, "float32"):
        return nullcontext()
    if precision != "bfloat16":
        raise ValueError(f"precision {precision!r}: None (the weights' own) or 'bfloat16'")
    return torch.autocast(device.type, dtype=torch.bfloat16)


def mean_row(rows: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """Mean over each prompt's chosen tokens, summed in float32; a single token is taken as it is.

    Args:
        rows: token indices of each prompt, possibly none.
        counts: what to divide by, where other tokens of the same mean are read elsewhere (the shared prefix); default the number chosen.
    """
    n = [len(r) for r in rows] if counts is None else list(counts)
    if all(len(r) == 1 for r in rows) and set(n) == {1}:
        at = [r[0] for r in rows]
        return lambda h: h[range(len(at)), at].float()

    def select(h: Tensor) -> Tensor:
        weights = torch.zeros(h.shape[:2], device=h.device)
        for i, chosen in enumerate(rows):
            weights[i, list(chosen)] = 1.0 / n[i]
        return einsum(h.float(), weights, "prompt position d_model, prompt position -> prompt d_model")

    return select


def every_row(rows: Sequence[Sequence[int]]) -> Callable[[Tensor], Tensor]:
    """Each prompt's chosen tokens as rows of their own, prompt after prompt."""
    prompt = [i for i, chosen in enumerate(rows) for _ in chosen]
    token = [t for chosen in rows for t in chosen]
    return lambda h: h[prompt, token].float()


def progress(batches: list[list[int]], what: str) -> Iterable[list[int]]:
    """The batches, with a :func:`bar` beside them."""
    return bar(what, "batch", batches)


def bar(what: str, unit: str, over: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """A bar with ETA for anything that takes longer than a few seconds; silent where ``EMLENS_QUIET`` is set or no terminal listens."""
    return tqdm(over, total=total, desc=what, unit=unit, delay=3, leave=False, disable=True if os.environ.get("EMLENS_QUIET") else None)
