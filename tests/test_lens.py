"""Guards what a direction is said to write: gains of every kind of norm, and a planted token comes out on top."""

import numpy as np
import pytest
import tiny
import torch

import emlens as em
from emlens._engines import find_blocks
from emlens.lens import norm_gain
from emlens.models import HookedModel


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gain_is_the_norms_own_weight(family: str) -> None:
    hf = tiny.tiny_hf(family)
    _, norm = find_blocks(hf)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, hf.config.hidden_size))
    gain, centres = norm_gain(norm, hf.config.hidden_size, torch.device("cpu"))
    weight = norm.weight.detach() + (1 if family == "gemma3_text" else 0)
    assert torch.allclose(gain, weight, rtol=1e-4) and centres == (family in ("gpt2", "gpt_neox"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_planted_is_written(family: str, family_models: dict[str, HookedModel]) -> None:
    """The direction of one token's own row in the output embeddings raises that token most, and turned round lowers it most."""
    model = family_models[family]
    token = 77
    row = model.hf.get_output_embeddings().weight[token].detach().numpy()
    row = row - row.mean() if family in ("gpt2", "gpt_neox") else row
    found = model.direction_tokens(em.Direction.from_array(np.stack([row] * 4)), layer=2, k=3)
    assert found["token_id"].iloc[0] == token and found["side"].tolist() == ["raised"] * 3 + ["lowered"] * 3
    assert found["token"].iloc[0] == model.tokenizer.convert_ids_to_tokens(token)
    turned = model.direction_tokens(em.Direction.from_array(-np.stack([row] * 4)), layer=2, k=3)
    assert turned["token_id"].iloc[3] == token
    nothing = model.direction_tokens(tiny.random_direction(model), layer=2, k=3)
    assert found["z"].iloc[0] > 1.3 * nothing["z"].iloc[0]


def test_scores_are_how_the_logits_answer(llama: HookedModel) -> None:
    """A step along the direction from a stream of unit rms, through the model's own norm and head, to first order."""
    direction = tiny.random_direction(llama)
    v = torch.from_numpy(direction.layer(1))
    stream = torch.randn(32, generator=torch.Generator().manual_seed(0))
    stream = stream - (stream @ v) * v
    stream = stream / stream.pow(2).mean().sqrt()
    _, norm = find_blocks(llama.hf)
    head = llama.hf.get_output_embeddings()
    with torch.no_grad():
        change = (head(norm(stream + 1e-3 * v)) - head(norm(stream - 1e-3 * v))) / 2e-3
    change = (change - change.mean()).numpy()
    found = llama.direction_tokens(direction, layer=1, k=len(change)).query("side == 'raised'").set_index("token_id")["score"]
    assert np.allclose(found[range(len(change))], change, atol=2e-3 * np.abs(change).max())
