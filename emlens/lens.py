"""What a direction writes: the tokens it raises, read through the model's final norm and output embeddings (logit lens)."""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ._core import Core
from ._engines import find_blocks
from .directions import Direction, direction_tokens


def written_tokens(model: Core, direction: Direction, layer: int | None, k: int) -> pd.DataFrame:
    """:meth:`emlens.models.HookedModel.direction_tokens`."""
    _, norm = find_blocks(model.hf, model._parts)
    unembedding = model.hf.get_output_embeddings().weight.detach().float()
    gain, centres = norm_gain(norm, model.d_model, unembedding.device)
    rows = (unembedding * gain).cpu().numpy()
    if centres:
        rows = rows - rows.mean(axis=1, keepdims=True)
    words = model.tokenizer.convert_ids_to_tokens(list(range(min(len(rows), len(model.tokenizer)))))
    tokens = [str(w) for w in words] + [""] * (len(rows) - len(words))  # some vocabularies are padded
    return direction_tokens(direction, rows, None, tokens, layer, k)


@torch.no_grad()
def norm_gain(norm: Any, d_model: int, device: torch.device) -> tuple[Float[Tensor, " d_model"], bool]:
    """What a norm multiplies each coordinate by, whatever it calls its weights, and whether it takes the mean off first (LayerNorm does)."""
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    signs = torch.ones(d_model, dtype=dtype, device=device)
    signs[1::2] = -1  # mean 0, variance 1
    up, down, lifted = (norm(x[None])[0].float() for x in (100 * signs, -100 * signs, 100 * (signs + 1)))
    return (up - down) / (2 * signs.float()), bool(torch.allclose(up, lifted, rtol=1e-2, atol=1e-2 * float(up.abs().max())))
