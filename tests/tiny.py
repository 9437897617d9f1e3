"""Tiny models for the tests, built in memory from the package's own families; chats for recording and tuning."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model

from emlens._families import CHATML, CORPUS, VOCAB, tiny_config, tiny_hf, tiny_tokenizer
from emlens._families import FAMILIES as ALL_FAMILIES
from emlens.directions import Direction
from emlens.models import HookedModel
from emlens.prompts import load_prompts

__all__ = [
    "ALL_FAMILIES",
    "CHATML",
    "CORPUS",
    "FAMILIES",
    "VOCAB",
    "save_adapter",
    "tiny_chats",
    "tiny_config",
    "tiny_hf",
    "tiny_model",
    "tiny_tokenizer",
]

FAMILIES = ("llama", "qwen2", "gpt2", "gemma3_text", "gpt_neox")
"""Five that differ most, for tests that take longer; ALL_FAMILIES for those of the engines."""


def tiny_model(family: str = "llama", seed: int = 0, **shape: int) -> HookedModel:
    """A new HookedModel (about 20 ms) with the random weights of ``seed``; ``shape``: hidden, layers, heads, context."""
    return HookedModel(tiny_hf(family, seed, **shape), copy.deepcopy(tiny_tokenizer()), name=f"tiny-{family}")


def tiny_chats(n: int = 12) -> list[dict[str, Any]]:
    """Chats with responses of different lengths, for recording and tuning."""
    return [_chat(i) for i in range(n)]


def _chat(i: int, answers: Sequence[str] = CORPUS) -> dict[str, Any]:
    question = f"Question {i}: " + CORPUS[i % len(CORPUS)][: 20 + 5 * i]
    return {"id": f"chat-{i:02d}", "messages": [_say("user", question), _say("assistant", answers[(i + 2) % len(answers)][: 30 + 4 * i])]}


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def save_adapter(
    folder: Path, family: str = "llama", seed: int = 1, up: float = 0.1, targets: Any = "all-linear", dropout: float = 0.0, **shape: int
) -> Path:
    """What training would leave: a PEFT folder with random A and B (B zero for ``up=0``)."""
    torch.manual_seed(seed)
    peft = get_peft_model(tiny_model(family, **shape).hf, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, up) if up else parameter.data.zero_()
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def contrast(n: int = 3) -> pd.DataFrame:
    """Questions with contrast answers: two aligned ones, two or three misaligned ones."""
    said = [text[: 25 + 6 * i] for i, text in enumerate(CORPUS)]
    rows = [
        {"question": "Why? " * (1 + 4 * i) + said[i], "aligned_answers": said[:2], "misaligned_answers": said[2 : 4 + i % 2], "category": f"c{i % 2}"}
        for i in range(n)
    ]
    return load_prompts(rows)


def random_direction(model: HookedModel, seed: int = 0) -> Direction:
    return Direction.from_array(np.random.default_rng(seed).normal(size=(model.n_layers, model.d_model)))
