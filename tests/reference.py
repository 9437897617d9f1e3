"""The oracle of the model tests: bare transformers on one unpadded prompt at a time, no cache, no hooks but PyTorch's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """transformers' own rendering and tokenisation of a chat, up to where the answer begins."""
    chat = list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))


def blocks(hf: Any) -> nn.ModuleList:
    """Where each family keeps its blocks, by name."""
    places = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
    found = hf.get_submodule(places.get(hf.config.model_type, "model.layers"))
    assert isinstance(found, nn.ModuleList)
    return found


@torch.no_grad()
def hidden_states(hf: Any, ids: Sequence[int]) -> list[Tensor]:
    """``[embed, block 0, …, block L−2, final norm]``, each ``[position, d_model]``."""
    return [h[0] for h in hf(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False).hidden_states]


@contextmanager
def outputs(hf: Any) -> Iterator[dict[int, Tensor]]:
    """Every block's raw output (first row of the batch) in the forward passes of the block, by bare hooks; the last block too."""
    kept: dict[int, Tensor] = {}

    def keep(i: int) -> Any:
        return lambda _, __, out: kept.__setitem__(i, (out[0] if isinstance(out, tuple) else out)[0].detach())

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks(hf))]
    yield kept
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(hf: Any, ids: Sequence[int]) -> Tensor:
    return hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def log_likelihood(hf: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Sum of log p(token | everything before it) over the response."""
    logp = logits(hf, [*prompt, *response]).double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + k, token]) for k, token in enumerate(response))


def greedy(hf: Any, prompt: Sequence[int], steps: int, ends: Sequence[int] = ()) -> list[int]:
    """Argmax, one whole forward pass a token, up to (and without) the first of ``ends``."""
    answer: list[int] = []
    for _ in range(steps):
        token = int(logits(hf, [*prompt, *answer])[-1].argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def n_hooks(hf: nn.Module) -> int:
    """Hooks on all modules (transformers keeps some of its own there once hidden states were asked for)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())
