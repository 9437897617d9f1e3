"""Guards the verbs of HookedModel against bare transformers: what is read, scored, generated and edited, in five families."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from transformers import AutoModelForCausalLM

from emlens import _passes, models
from emlens.directions import Direction
from emlens.models import HookedModel
from emlens.positions import Tokens
from emlens.prompts import load_prompts

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(scope="module")
def family_models() -> dict[str, HookedModel]:
    """One model a family, for the tests that leave it as it is."""
    return {family: tiny.tiny_model(family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def llama(family_models: dict[str, HookedModel]) -> HookedModel:
    return family_models["llama"]


@pytest.fixture(scope="module")
def chats() -> pd.DataFrame:
    """Prompts of mixed length, not sorted by it."""
    return load_prompts([tiny.tiny_chats()[i] for i in (7, 0, 11, 3, 5)])


def relative(found: Any, expected: Any) -> float:
    """Largest relative error of any vector along the last axis."""
    a, b = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert a.shape == b.shape
    return float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max())


def pieces(model: HookedModel, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    return reference.prompt_ids(model.tokenizer, messages), model.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]


def random_direction(model: HookedModel, seed: int = 0) -> Direction:
    return Direction.from_array(np.random.default_rng(seed).normal(size=(model.n_layers, model.d_model)))


def contrast(n: int = 3) -> pd.DataFrame:
    said = [text[: 25 + 6 * i] for i, text in enumerate(tiny.CORPUS)]
    rows = [
        {"question": "Why? " * (1 + 4 * i) + said[i], "aligned_answers": said[:2], "misaligned_answers": said[2 : 4 + i % 2], "category": f"c{i % 2}"}
        for i in range(n)
    ]
    return load_prompts(rows)


# ---- record


@FAMILIES
def test_record_is_transformers_hidden_states(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    acts = model.record(chats)
    normed, embedded, entering = (model.record(chats, site=site) for site in ("final_norm", "embed", "resid_pre"))
    assert acts.facts["id"].tolist() == chats["id"].tolist() and acts.layers == tuple(range(4)) and acts.values.dtype == np.float32
    for row, messages in enumerate(chats["messages"]):
        ids = reference.prompt_ids(model.tokenizer, messages)
        with reference.outputs(model.hf) as raw:
            states = reference.hidden_states(model.hf, ids)
        assert acts.facts["n_tokens"].iloc[row] == len(ids)
        assert relative(acts.values[row, :-1], [h[-1] for h in states[1:-1]]) < 1e-4
        assert relative(acts.values[row, -1], raw[3][-1]) < 1e-4
        assert relative(normed.values[row, 0], states[-1][-1]) < 1e-4
        assert relative(embedded.values[row, 0], states[0][-1]) < 1e-4
        assert relative(entering.values[row], [h[-1] for h in states[:-1]]) < 1e-4
        assert relative(acts.values[row, -1], states[-1][-1]) > 1e-3, "the last block is read before the final norm"


@FAMILIES
def test_positions(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    every = model.record(chats, position="all")
    named = {p: model.record(chats, position=p, layers=[1]) for p in ("mean", "mean_all", "first_response", "mean_response", "last_response")}
    named |= {"index": model.record(chats, position=-3, layers=[1]), "span": model.record(chats, position=(0, 8), layers=[1])}
    for row, (name, messages) in enumerate(zip(chats["id"], chats["messages"], strict=True)):
        prompt, response = pieces(model, messages)
        n, before = len(prompt), len(model.tokenizer("<|im_start|>user\n")["input_ids"])
        content = before + len(model.tokenizer(messages[0]["content"].strip())["input_ids"])
        first_word = before + len(model.tokenizer("Question")["input_ids"])
        h = reference.hidden_states(model.hf, prompt + response)[2]
        expected = {
            "mean": h[before:content].mean(0), "mean_all": h[:n].mean(0), "first_response": h[n], "mean_response": h[n:].mean(0),
            "last_response": h[-1], "index": h[n - 3], "span": h[before:first_word].mean(0),
        }  # fmt: skip
        for position, vector in expected.items():
            assert relative(named[position].values[row, 0], vector) < 1e-4, position
        mine = every.facts["prompt_id"] == name
        assert relative(every.values[mine.to_numpy(), 1], h[:n]) < 1e-4
        assert every.facts.loc[mine, "token_index"].tolist() == list(range(n))


def test_rows_are_in_the_order_of_the_prompts_over_several_batches(llama: HookedModel, chats: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tokens = llama.record(chats), llama.record(chats, position="all")
    assert chats["messages"].map(lambda m: len(m[0]["content"])).tolist() != sorted(chats["messages"].map(lambda m: len(m[0]["content"])))
    monkeypatch.setattr(models, "plan", partial(_passes.plan, budget=130))
    assert len(models.plan(whole.facts["n_tokens"].tolist())) > 2
    split = llama.record(chats)
    assert split.facts.equals(whole.facts) and relative(split.values, whole.values) < 1e-4
    split_tokens = llama.record(chats, position="all")
    assert split_tokens.facts.equals(tokens.facts) and relative(split_tokens.values, tokens.values) < 1e-4
    for row in range(len(chats)):
        assert relative(llama.record(chats.iloc[[row]]).values[0], whole.values[row]) < 1e-4


def test_layers_are_those_asked_for(llama: HookedModel, chats: pd.DataFrame) -> None:
    assert np.array_equal(llama.record(chats, layers=[3, 1]).values, llama.record(chats).values[:, [3, 1]])


def test_tokenize_is_transformers_own(llama: HookedModel, chats: pd.DataFrame) -> None:
    fed = llama.tokenize(chats)
    for row, messages in enumerate(chats["messages"]):
        ids = reference.prompt_ids(llama.tokenizer, messages)
        assert fed["input_ids"][row][fed["attention_mask"][row].bool()].tolist() == ids
        assert fed["attention_mask"][row, : len(ids)].all(), "right-padded"


def test_places_that_do_not_exist(llama: HookedModel, chats: pd.DataFrame) -> None:
    hooks = reference.n_hooks(llama.hf)
    with pytest.raises(ValueError, match="unknown site 'resid'; sites are resid_pre"):
        llama.record(chats, site="resid")
    with pytest.raises(ValueError, match=r"hooks engine reads .*'attn_out'"):
        llama.record(chats, site="attn_out")
    with pytest.raises(ValueError, match=r"unknown layers \[4, -1\]: tiny-llama has blocks 0 … 3"):
        llama.record(chats, layers=[0, 4, -1])
    with pytest.raises(ValueError, match="single place"):
        llama.record(chats, site="embed", layers=[0])
    with pytest.raises(ValueError, match="unknown position 'end'"):
        llama.record(chats, position="end")
    with pytest.raises(ValueError, match="has no response"):
        llama.record(["Who are you?"], position="mean_response")
    with pytest.raises(ValueError, match="no prompts"):
        llama.record(chats.iloc[:0])
    assert reference.n_hooks(llama.hf) == hooks


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    model = tiny.tiny_model("gpt2", context=64)
    long = [{"id": "long", "question": "Why? " * 60}]
    for verb in (model.record, model.generate, partial(model.log_likelihood, responses=["No."])):
        with pytest.raises(ValueError, match=r"prompt 'long' has \d+ tokens.*at most 64"):
            verb(long)
    with pytest.raises(ValueError, match="100 are to be generated"):
        model.generate(["Why?"], max_new_tokens=100)
    assert len(model.generate(["Why?"], max_new_tokens=2)) == 1


# ---- plan


@pytest.mark.parametrize("seed", range(5))
def test_plan_is_a_partition_within_the_budget(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 300, size=80).tolist() + [5000]
    batches = _passes.plan(lengths, budget=1000)
    assert sorted(i for b in batches for i in b) == list(range(81))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 1000 for b in batches)
    assert len(batches) < 40 and any(len(b) > 5 for b in batches)
    assert _passes.plan(list(lengths), budget=1000) == batches and _passes.plan([], 10) == []
    flat = [lengths[i] for b in batches for i in b]
    assert flat == sorted(flat)


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
    table = contrast(4)
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


# ---- steer, ablate


@FAMILIES
def test_steered_text_is_the_same_with_and_without_cache(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    plain = model.generate(chats, max_new_tokens=8)["answer"].tolist()
    with model.steer(random_direction(model), layers=[1, 2], strength=1.5):
        cached = model.generate(chats, max_new_tokens=8)["answer"].tolist()
        loops = [reference.greedy(model.hf, reference.prompt_ids(model.tokenizer, m), 8, ends=[1]) for m in chats["messages"]]
    assert cached == [model.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in loops]
    assert cached != plain


@FAMILIES
def test_steer_adds_strength_times_median_norm(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model, direction = family_models[family], random_direction(family_models[family])
    hooks = reference.n_hooks(model.hf)
    neutral = load_prompts("emlens:questions").query("category == 'neutral'")["messages"]
    tokens: list[list[np.ndarray]] = [[] for _ in range(4)]
    for messages in neutral:
        with reference.outputs(model.hf) as raw:
            reference.logits(model.hf, reference.prompt_ids(model.tokenizer, messages))
        for layer in range(4):
            tokens[layer].append(raw[layer].norm(dim=-1).numpy())
    medians = np.array([np.median(np.concatenate(t)) for t in tokens])
    assert np.allclose(model.residual_norms(), medians, rtol=1e-4) and len(neutral) >= 12

    ids = reference.prompt_ids(model.tokenizer, chats["messages"].iloc[0])
    logits, before = reference.logits(model.hf, ids), model.record(chats, position="all").values
    with model.steer(direction, layers=2, strength=-0.7) as steered:
        assert steered is model
        after, inside = model.record(chats, position="all").values, reference.logits(model.hf, ids)
    pushed = after[:, 2] - before[:, 2]
    assert np.allclose(pushed, -0.7 * medians[2] * direction.layer(2), atol=1e-4 * medians[2])
    assert np.array_equal(after[:, :2], before[:, :2]) and not np.allclose(after[:, 3], before[:, 3])
    assert not torch.allclose(inside, logits)
    assert torch.equal(reference.logits(model.hf, ids), logits) and reference.n_hooks(model.hf) == hooks


@FAMILIES
def test_ablate_leaves_no_projection(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model, direction = family_models[family], random_direction(family_models[family], 3)
    hooks = reference.n_hooks(model.hf)
    ids = reference.prompt_ids(model.tokenizer, chats["messages"].iloc[0])
    logits = reference.logits(model.hf, ids)

    def shares() -> np.ndarray:
        values = model.record(chats, position="all").values
        return np.abs(np.einsum("pld,ld->pl", values, direction.vectors)) / np.linalg.norm(values, axis=-1)

    assert shares().mean(axis=0).min() > 0.02
    with model.ablate(direction):
        assert shares().max() < 1e-5
    with model.ablate(direction, layers=[1]):
        assert shares()[:, 1].max() < 1e-5 < 0.02 < shares()[:, [0, 2, 3]].mean(axis=0).min()
    assert torch.equal(reference.logits(model.hf, ids), logits) and reference.n_hooks(model.hf) == hooks


def test_edits_nest_and_compose(llama: HookedModel, chats: pd.DataFrame) -> None:
    one, two, norm = random_direction(llama, 1), random_direction(llama, 2), llama.residual_norms()[1]
    before = llama.record(chats, layers=[1]).values[:, 0]
    with llama.steer(one, 1, 0.5):
        with llama.steer(two, 1, 2.0):
            both = llama.record(chats, layers=[1]).values[:, 0]
        with llama.ablate(one, 1):
            gone = llama.record(chats, layers=[1]).values[:, 0]
        outer = llama.record(chats, layers=[1]).values[:, 0]
    with llama.ablate(one, 1), llama.steer(one, 1, 0.5):
        put = llama.record(chats, layers=[1]).values[:, 0]
    assert np.allclose(outer - before, 0.5 * norm * one.layer(1), atol=1e-4 * norm)
    assert np.allclose(both - before, norm * (0.5 * one.layer(1) + 2 * two.layer(1)), atol=1e-4 * norm)
    assert np.allclose(gone @ one.layer(1), 0, atol=1e-4 * norm)
    assert np.allclose(put @ one.layer(1), 0.5 * norm, atol=1e-4 * norm)
    assert np.array_equal(llama.record(chats, layers=[1]).values[:, 0], before)


def test_the_unit_of_strength_is_the_models_own_even_inside_an_edit(chats: pd.DataFrame) -> None:
    fresh, known = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    direction, norms = random_direction(known), known.residual_norms()
    with fresh.ablate(direction), fresh.steer(direction, "all", 5.0):
        assert np.allclose(fresh.residual_norms(), norms, rtol=1e-6)


def test_an_exception_leaves_no_hooks(llama: HookedModel) -> None:
    direction, hooks = random_direction(llama), reference.n_hooks(llama.hf)
    with pytest.raises(RuntimeError, match="mine"), llama.steer(direction, "all", 1.0), llama.ablate(direction):
        assert reference.n_hooks(llama.hf) == hooks + 8
        raise RuntimeError("mine")
    assert reference.n_hooks(llama.hf) == hooks
    with pytest.raises(RuntimeError, match="broken"), torch.no_grad():
        llama.engine.read(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), llama._place("resid_post", None, "last"), _broken)
    assert reference.n_hooks(llama.hf) == hooks


def _broken(_: Any) -> Any:
    raise RuntimeError("broken")


def test_directions_and_layers_that_do_not_fit(llama: HookedModel) -> None:
    direction, hooks = random_direction(llama), reference.n_hooks(llama.hf)
    narrow = Direction.from_array(np.ones((4, 16)))
    partly = Direction.from_array(np.ones((1, 32)), layers=(2,))
    for verb in (llama.steer, llama.ablate):
        with pytest.raises(ValueError, match=r"unknown layers \[4\]"), verb(direction, 4):
            pass
        with pytest.raises(ValueError, match="16.* d_model 32"), verb(narrow, 1):
            pass
        with pytest.raises(KeyError, match="has no layer 1"), verb(partly, [2, 1]):
            pass
        with pytest.raises(ValueError, match="layers='some'"), verb(direction, "some"):
            pass
    assert reference.n_hooks(llama.hf) == hooks
