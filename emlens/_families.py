"""Tiny random models of many families, and a tokenizer for them: built in memory, no network. What ``emlens doctor --families`` is run on.

Each config keeps what is peculiar to its family, small: grouped queries, sliding windows, soft caps, multipliers, parallel residuals,
post-norms, partial rotary embeddings, experts, tied embeddings.
"""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4", "granite", "stablelm", "gpt2", "opt", "bloom",
    "gpt_neox", "gptj", "falcon", "phi", "cohere", "mixtral", "qwen3_moe", "gpt_oss",
)  # fmt: skip
"""transformers' ``model_type`` of each."""

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
"""What the tokenizer learns its merges from."""


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (so every text has tokens and offsets) with ChatML's special tokens. Made once a process: copy it to change it."""
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
    """A transformers config of ``family`` that fits :func:`tiny_tokenizer`.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"no tiny {family!r}; families are {', '.join(FAMILIES)}")
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(family, **ids, initializer_range=0.15, **_shape(family, hidden, layers, heads, context))


def _shape(family: str, hidden: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    """What a family calls its sizes, and what only it has."""
    head, window = hidden // heads, 16
    plain = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": context}
    wide = {**plain, "intermediate_size": 2 * hidden}
    grouped = {**wide, "num_key_value_heads": heads // 2}
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    gemma = {**grouped, "head_dim": head, "query_pre_attn_scalar": head, "sliding_window": window, "layer_types": kinds}
    half_rotary = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    old = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": context, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    families: dict[str, dict[str, Any]] = {
        "llama": grouped,
        "mistral": {**grouped, "sliding_window": window},
        "qwen2": {**grouped, "tie_word_embeddings": True},
        "qwen3": {**grouped, "head_dim": 2 * head},
        "gemma2": {**gemma, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
        "gemma3_text": gemma,
        "phi3": {**grouped, "rope_parameters": half_rotary},
        "olmo2": grouped,
        "glm4": {**grouped, "head_dim": head, "attention_bias": True, "rope_parameters": half_rotary},
        "granite": {
            **grouped, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.3, "logits_scaling": 8.0
        },
        "stablelm": {**grouped, "use_qkv_bias": True, "rope_parameters": half_rotary},
        "gpt2": old,
        "opt": {**plain, "ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden, "dropout": 0.0},
        "bloom": {"hidden_size": hidden, "n_layer": layers, "n_head": heads},
        "gpt_neox": wide,
        "gptj": {**old, "rotary_dim": head // 2},
        "falcon": {**plain, "ffn_hidden_size": 2 * hidden, "multi_query": True, "parallel_attn": True, "bias": True},
        "phi": {**wide, "rope_parameters": half_rotary},
        "cohere": {**grouped, "logit_scale": 0.25},
        "mixtral": {**grouped, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {
            **grouped, "head_dim": head, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "mlp_only_layers": [0]
        },
        "gpt_oss": {
            **grouped, "head_dim": head, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": window, "layer_types": kinds,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": context // 4
            },
        },
    }  # fmt: skip
    return families[family]


def tiny_hf(family: str = "llama", seed: int = 0, **shape: int) -> PreTrainedModel:
    """A new transformers model (about 20 ms) with the random weights of ``seed``; ``shape``: hidden, layers, heads, context.

    Gains and biases, which transformers sets to ones and zeros, are random too, so that a law cannot hold for want of them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(tiny_config(family, **shape))
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return hf.eval()
