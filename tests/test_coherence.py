"""Guards what is said of an edit's damage: divergence and perplexity by bare transformers, and zero where nothing is edited."""

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch

from emlens.coherence import Meter, neutral_texts
from emlens.models import HookedModel

COLUMNS = ["id", "kl", "perplexity_ratio"]


def by_hand(model: HookedModel, texts: pd.DataFrame) -> list[torch.Tensor]:
    """``[token, vocab]`` log-probabilities of each response's places, one unpadded text at a time."""
    out = []
    for chat in texts["messages"]:
        prompt = reference.prompt_ids(model.tokenizer, chat)
        answer = model.tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"]
        out.append(reference.logits(model.hf, [*prompt, *answer])[len(prompt) - 1 : -1].double().log_softmax(-1))
    return out


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3_text"))
def test_divergence_and_perplexity_are_those_of_bare_passes(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    meter = Meter(model, chats)
    with model.steer(tiny.random_direction(model), 1, 1.5):
        found, after = meter.read(), by_hand(model, chats)
    assert list(found.columns) == COLUMNS
    for row, old, new, chat in zip(found.itertuples(), by_hand(model, chats), after, chats["messages"], strict=True):
        assert row.kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-3) and row.kl > 1e-4
        ids = torch.tensor(model.tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"])[:, None]
        ratio = float((old.gather(1, ids) - new.gather(1, ids)).mean().exp())
        assert row.perplexity_ratio == pytest.approx(ratio, rel=1e-4) and abs(ratio - 1) > 1e-4


def test_nothing_edited_is_no_damage(llama: HookedModel, chats: pd.DataFrame) -> None:
    found = Meter(llama, chats, new_tokens=5).read()
    assert (found["kl"] == 0).all() and (found["perplexity_ratio"] == 1).all()
    meter = Meter(llama, chats)
    with llama.steer(tiny.random_direction(llama), 2, 0.0):
        assert np.allclose(meter.read()["kl"], 0, atol=1e-6)
    answers = llama.generate(pd.DataFrame({"id": chats["id"], "messages": [m[:-1] for m in chats["messages"]]}), max_new_tokens=5)["answer"]
    own = llama.log_likelihood(pd.DataFrame({"id": chats["id"], "messages": [m[:-1] for m in chats["messages"]]}), answers.tolist())["per_token"]
    assert np.allclose(found["fluency"], own, rtol=1e-5)


def test_fluency_is_the_untouched_models_view_of_the_edited_answers(llama: HookedModel, chats: pd.DataFrame) -> None:
    meter = Meter(llama, chats, new_tokens=6)
    asked = pd.DataFrame({"id": chats["id"], "messages": [m[:-1] for m in chats["messages"]]})
    with llama.steer(tiny.random_direction(llama), "all", 3.0):
        found, answers = meter.read()["fluency"], llama.generate(asked, max_new_tokens=6)["answer"].tolist()
    expected = llama.log_likelihood(asked, answers)["per_token"]
    assert np.allclose(found, expected, rtol=1e-4) and found.mean() < meter.read()["fluency"].mean()


def test_our_neutral_texts_have_responses_and_others_are_refused(llama: HookedModel, chats: pd.DataFrame) -> None:
    texts = neutral_texts()
    assert len(texts) >= 12 and all(m[-1]["role"] == "assistant" for m in texts["messages"]) and set(texts["category"]) == {"neutral"}
    with pytest.raises(ValueError, match="have no response to measure"):
        Meter(llama, pd.DataFrame({"id": ["a"], "messages": [[{"role": "user", "content": "Why?"}]]}))
    with llama.ablate(tiny.random_direction(llama)), pytest.raises(ValueError, match="make the meter before the edit is opened"):
        Meter(llama, chats)
