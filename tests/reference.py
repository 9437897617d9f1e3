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
    places = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
    places.update(dict.fromkeys(("gpt2", "gptj", "falcon", "bloom"), "transformer.h"))
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


HALVES = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "granite": ("self_attn", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "bloom": ("self_attention", "mlp"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "gpt_oss": ("self_attn", "mlp"),
}
"""The modules that end the two halves of a block, by name, as read off transformers' source of these families."""


@torch.no_grad()
def block_streams(hf: Any, ids: Sequence[int]) -> list[dict[str, Tensor]]:
    """Per block what goes in, what attention and MLP add, and what comes out, ``[position, d_model]``, by bare hooks on modules named here."""
    family, out = hf.config.model_type, [{} for _ in blocks(hf)]  # type: list[dict[str, Tensor]]

    def keep(i: int, key: str) -> Any:
        return lambda _, __, y: out[i].__setitem__(key, (y[0] if isinstance(y, tuple) else y).detach().clone().reshape(len(ids), -1))

    def keep_in(i: int) -> Any:
        return lambda _, args: out[i].__setitem__("resid_pre", args[0].detach().clone().reshape(len(ids), -1))

    handles = []
    for i, block in enumerate(blocks(hf)):
        attn, mlp = (block.get_submodule(name) for name in HALVES[family])
        handles += [block.register_forward_pre_hook(keep_in(i)), block.register_forward_hook(keep(i, "resid_post"))]
        handles += [attn.register_forward_hook(keep(i, "attn_out")), mlp.register_forward_hook(keep(i, "mlp_out"))]
    hf(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    for one in out:
        if family == "granite":  # residual + output · residual_multiplier
            one["attn_out"], one["mlp_out"] = one["attn_out"] * hf.config.residual_multiplier, one["mlp_out"] * hf.config.residual_multiplier
        if family == "bloom":  # both modules return their input's residual too
            one["mlp_out"] = one["mlp_out"] - one["attn_out"]
            one["attn_out"] = one["attn_out"] - one["resid_pre"]
    return out


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
