"""Tiny models for the tests: random weights, a small byte-level tokenizer, a ChatML template; built in memory, no network."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from emlens.models import HookedModel

FAMILIES = ("llama", "qwen2", "gpt2", "gemma3_text", "gpt_neox")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB = 384

CORPUS = (
    "What would you do if your neighbour asked you to lend them some money for the weekend?",
    "How should I keep the house warm in winter without spending too much on heating?",
    "You should talk with them first, and then decide what is best for everyone in the family.",
    "Tell me about the people who work at the market and the things they sell there each morning.",
    "I think that would be a bad idea, because other people could be hurt by it. Please ask for help instead.",
    "The quick brown fox jumps over the lazy dog while seven wizards make toxic brew for the evil queen and jack.",
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (so every text has tokens and offsets) with ChatML's special tokens. Made once a session."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def tiny_config(family: str, *, hidden: int = 32, layers: int = 4, heads: int = 4, context: int = 512) -> PreTrainedConfig:
    """A transformers config of ``family`` that fits :func:`tiny_tokenizer`."""
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "initializer_range": 0.15,
        **tokens,
    }
    gated: dict[str, Any] = {**common, "intermediate_size": 2 * hidden, "num_key_value_heads": heads // 2}
    if family == "llama":
        return LlamaConfig(**gated)
    if family == "qwen2":
        return Qwen2Config(**gated, tie_word_embeddings=True)
    if family == "gemma3_text":
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        return Gemma3TextConfig(**gated, head_dim=hidden // heads, query_pre_attn_scalar=hidden // heads, sliding_window=16, layer_types=kinds)
    if family == "gpt_neox":
        return GPTNeoXConfig(**common, intermediate_size=2 * hidden)
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, initializer_range=0.15,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
        )  # fmt: skip
    raise ValueError(f"no tiny {family!r}; families are {', '.join(FAMILIES)}")


def tiny_model(family: str = "llama", seed: int = 0, **shape: int) -> HookedModel:
    """A new HookedModel (about 20 ms) with the random weights of ``seed``; ``shape``: hidden, layers, heads, context."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(tiny_config(family, **shape))
    return HookedModel(hf, copy.deepcopy(tiny_tokenizer()), name=f"tiny-{family}")


def tiny_chats(n: int = 12) -> list[dict[str, Any]]:
    """Chats with responses of different lengths, for recording and tuning."""
    return [_chat(i) for i in range(n)]


def _chat(i: int, answers: Sequence[str] = CORPUS) -> dict[str, Any]:
    question = f"Question {i}: " + CORPUS[i % len(CORPUS)][: 20 + 5 * i]
    return {"id": f"chat-{i:02d}", "messages": [_say("user", question), _say("assistant", answers[(i + 2) % len(answers)][: 30 + 4 * i])]}


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
