"""Guards what is scored and said, against bare transformers: one whole forward pass at a time."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from transformers import AutoModelForCausalLM

from emlens import _passes
from emlens.models import HookedModel
from emlens.positions import Tokens
from emlens.prompts import load_prompts

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


# ---- batches


def test_scoring_batches_keep_a_prompt_whole() -> None:
    rng = np.random.default_rng(0)
    tokens = []
    for p in range(20):
        n = int(rng.integers(4, 12))
        tokens += [Tokens((p,) * n + (99,) * int(rng.integers(1, 9)), n, (), "", (-1, -1)) for _ in range(3)]
    rng.shuffle(tokens)
    loose, exact = _passes.shared_prompt_batches(tokens, None, budget=90), _passes.shared_prompt_batches(tokens, 16, budget=90)
    for batches in (loose, exact):
        assert sorted(i for b in batches for i in b) == list(range(60))
        homes = {p: {k for k, b in enumerate(batches) for i in b if tokens[i].ids[0] == p} for p in range(20)}
        assert all(len(home) == 1 for home in homes.values())
    assert all(len({tokens[i].n_prompt for i in b}) == 1 for b in exact)
    assert any(len({tokens[i].n_prompt for i in b}) > 1 for b in loose)


# ---- log_likelihood, margin


def answered(n_responses: int = 3) -> tuple[pd.DataFrame, list[str]]:
    """Prompts of mixed length, several responses each, shuffled together."""
    chats = load_prompts([{"id": c["id"], "messages": c["messages"][:1]} for c in tiny.tiny_chats(6)])
    pairs = [(i, tiny.CORPUS[(i + k) % 6][: 1 + 17 * k + 3 * i]) for k in range(n_responses) for i in (4, 0, 5, 2, 1, 3)]
    return chats.iloc[[i for i, _ in pairs]], [text for _, text in pairs]


@FAMILIES
def test_log_likelihood_is_the_full_forward_pass(family: str, family_models: dict[str, HookedModel]) -> None:
    model = family_models[family]
    table, responses = answered()
    scored = model.log_likelihood(table, responses)
    for row, (messages, text) in enumerate(zip(table["messages"], responses, strict=True)):
        response = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = reference.prompt_ids(model.tokenizer, messages)
        assert len(prompt) > 16, "longer than the sliding window of gemma3"
        expected = reference.log_likelihood(model.hf, prompt, response)
        assert scored["log_likelihood"].iloc[row] == pytest.approx(expected, rel=1e-4)
        assert scored["n_tokens"].iloc[row] == len(response)
        assert scored["per_token"].iloc[row] == pytest.approx(expected / len(response), rel=1e-4)
    assert scored["id"].tolist() == table["id"].tolist()


@pytest.mark.parametrize("window", [24, 40, 64, 90, 128])
def test_a_sliding_window_does_not_count_padding(window: int) -> None:
    """Windows below, between and above the lengths: a prompt and its answer may fit where its padded batch does not."""
    config = tiny.tiny_config("gemma3_text")
    config.sliding_window = window
    torch.manual_seed(0)
    model = HookedModel(AutoModelForCausalLM.from_config(config), tiny.tiny_tokenizer())
    table = load_prompts([{"question": "Hi"}, {"question": tiny.CORPUS[3][:60]}, {"question": "Why so?"}])
    answers = [tiny.CORPUS[4], "No.", tiny.CORPUS[2][:40]]
    scored = model.log_likelihood(table, answers)["log_likelihood"]
    for row, (messages, text) in enumerate(zip(table["messages"], answers, strict=True)):
        expected = reference.log_likelihood(model.hf, reference.prompt_ids(model.tokenizer, messages), model.tokenizer(text)["input_ids"])
        assert scored.iloc[row] == pytest.approx(expected, rel=1e-4)


def test_log_likelihood_of_one_is_that_of_many(llama: HookedModel) -> None:
    table, responses = answered()
    many = llama.log_likelihood(table, responses)["log_likelihood"].to_numpy()
    one = [llama.log_likelihood(table.iloc[[i]], [responses[i]])["log_likelihood"].iloc[0] for i in range(len(table))]
    assert np.allclose(many, one, rtol=1e-4) and np.ptp(many) > 10
    own = load_prompts(
        [{"messages": [*m, {"role": "assistant", "content": r}]} for m, r in zip(table["messages"], responses, strict=True)]
    )  # the response in the chat instead of beside it
    assert np.array_equal(llama.log_likelihood(own)["log_likelihood"], many)
    half = llama.log_likelihood(table, responses, precision="bfloat16")["log_likelihood"].to_numpy()
    assert 1e-6 < np.abs(half / many - 1).max() < 0.05


def test_log_likelihood_refuses(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        llama.log_likelihood(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="has no response"):
        llama.log_likelihood(["a"])
    with pytest.raises(ValueError, match="precision 'half'"):
        llama.log_likelihood(["a"], ["b"], precision="half")


def test_margin_is_the_average_by_hand(llama: HookedModel) -> None:
    table = tiny.contrast(4)
    found = llama.margin(table)
    assert found["category"].tolist() == ["c0", "c1", "c0", "c1"] and found["id"].tolist() == table["id"].tolist()
    for row in range(4):
        prompt, side = reference.prompt_ids(llama.tokenizer, table["messages"].iloc[row]), {}
        for column in ("aligned_answers", "misaligned_answers"):
            coded = [llama.tokenizer(text)["input_ids"] for text in table[column].iloc[row]]
            side[column] = np.mean([reference.log_likelihood(llama.hf, prompt, c) / len(c) for c in coded])
        assert found["aligned_ll"].iloc[row] == pytest.approx(side["aligned_answers"], rel=1e-4)
        assert found["margin"].iloc[row] == pytest.approx(side["aligned_answers"] - side["misaligned_answers"], abs=2e-4)
        assert found["margin"].iloc[row] == pytest.approx(llama.margin(table.iloc[[row]])["margin"].iloc[0], abs=1e-5)
    with pytest.raises(ValueError, match="misaligned_answers"):
        llama.margin(table.drop(columns="misaligned_answers"))


# ---- generate


@FAMILIES
def test_greedy_is_the_argmax_loop(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    """A mixed batch (left-padded, cached) says what each prompt says alone without a cache."""
    model = family_models[family]
    answers = model.generate(chats, max_new_tokens=12)
    assert answers["id"].tolist() == chats["id"].tolist() and set(answers["variant"]) == {"before"}
    for row, messages in enumerate(chats["messages"]):
        tokens = reference.greedy(model.hf, reference.prompt_ids(model.tokenizer, messages), 12, ends=[1])
        assert answers["answer"].iloc[row] == model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answers["n_tokens"].iloc[row] == len(tokens) and answers["finished"].iloc[row] == (len(tokens) < 12)
    assert answers["answer"].nunique() > 1


def test_an_answer_ends_where_the_model_says_so(chats: pd.DataFrame) -> None:
    model = tiny.tiny_model("llama")
    prompt = reference.prompt_ids(model.tokenizer, chats["messages"].iloc[0])
    tokens = reference.greedy(model.hf, prompt, 12)
    stop = next(k for k, token in enumerate(tokens) if k > 2 and token not in tokens[:k])
    model.hf.generation_config.eos_token_id = [1, tokens[stop]]
    answer = model.generate(chats.iloc[:1], max_new_tokens=12).iloc[0]
    assert answer["finished"] and answer["n_tokens"] == stop
    assert answer["answer"] == model.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "habit",
    [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(3, 200))}, {"min_new_tokens": 12}],
    ids=lambda h: next(iter(h)),
)
def test_greedy_is_argmax_whatever_the_models_own_habits(habit: dict[str, Any], chats: pd.DataFrame) -> None:
    """Some models ship a repetition penalty in generation_config.json; variants must be compared without it."""
    model = tiny.tiny_model("llama")
    ends = [reference.greedy(model.hf, reference.prompt_ids(model.tokenizer, chats["messages"].iloc[0]), 12)[-1]]
    model.hf.generation_config.eos_token_id = ends
    before = model.generate(chats, max_new_tokens=12)
    for name, value in habit.items():
        setattr(model.hf.generation_config, name, value)
    assert model.generate(chats, max_new_tokens=12).equals(before)


def test_seeds_reproduce(llama: HookedModel, chats: pd.DataFrame) -> None:
    draw = partial(llama.generate, chats, n=3, temperature=1.0, max_new_tokens=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state is its own"
    assert first.equals(again) and not first["answer"].equals(other["answer"])
    assert first[["id", "sample"]].values.tolist() == [[i, s] for i in chats["id"] for s in range(3)]
    assert first.groupby("id")["answer"].nunique().min() > 1


def test_two_greedy_answers_are_refused(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="2 greedy answers"):
        llama.generate(["Why?"], n=2)
