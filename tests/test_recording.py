"""Guards what is read: every row is bare transformers' own, in the order of the prompts, whatever the batches, prefix, variants or store."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch

from emlens._core import as_table
from emlens._passes import plan
from emlens._recording import Reader, common_prefix
from emlens.directions import Direction
from emlens.models import HookedModel

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


def relative(found: Any, expected: Any) -> float:
    """Largest relative error of any vector along the last axis."""
    a, b = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert a.shape == b.shape
    return float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max())


def pieces(model: HookedModel, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    return reference.prompt_ids(model.tokenizer, messages), model.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]


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


def test_rows_are_in_the_order_of_the_prompts_over_several_batches(llama: HookedModel, chats: pd.DataFrame) -> None:
    whole, tokens = llama.record(chats), llama.record(chats, position="all")
    assert chats["messages"].map(lambda m: len(m[0]["content"])).tolist() != sorted(chats["messages"].map(lambda m: len(m[0]["content"])))
    assert len(plan(whole.facts["n_tokens"].tolist(), 130)) > 2
    split = llama.record(chats, budget=130)
    assert split.facts.equals(whole.facts) and relative(split.values, whole.values) < 1e-4
    split_tokens = llama.record(chats, position="all", budget=130)
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
    batches = plan(lengths, budget=1000)
    assert sorted(i for b in batches for i in b) == list(range(81))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 1000 for b in batches)
    assert len(batches) < 40 and any(len(b) > 5 for b in batches)
    assert plan(list(lengths), budget=1000) == batches and plan([], 10) == []
    flat = [lengths[i] for b in batches for i in b]
    assert flat == sorted(flat)


# ---- prefix, variants, store, noise


@FAMILIES
@pytest.mark.parametrize("position", ["last", "mean", "mean_all", "all", "mean_response", 0, -3])
def test_a_shared_prefix_changes_nothing(family: str, position: Any, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    shared, apart = (model.record(chats, position=position, prefix=prefix, budget=200) for prefix in (True, False))
    assert shared.meta["plan"]["prefix"] > 4 and apart.meta["plan"]["prefix"] == 0
    assert shared.facts.equals(apart.facts) and relative(shared.values, apart.values) < 1e-4


def test_what_a_pass_adds_to_a_shared_prefix_is_not_kept(llama: HookedModel, chats: pd.DataFrame) -> None:
    first, again = llama.record(chats, budget=200), llama.record(chats, budget=200)
    assert np.array_equal(first.values, again.values)
    assert relative(llama.record(chats.iloc[::-1], budget=200).values[::-1], first.values) < 1e-5


def test_prompts_that_begin_apart_share_nothing(llama: HookedModel) -> None:
    apart = [{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}, {"id": "b", "messages": [{"role": "system", "content": "Hi"}]}]
    assert len(common_prefix(llama._tokens(as_table(apart), response=False))) == 0


def test_several_variants_come_from_the_same_batches(chats: pd.DataFrame, tmp_path: Path) -> None:
    model = tiny.tiny_model()
    for seed, name in enumerate(("bad", "sound")):
        model.add_adapter(name, tiny.save_adapter(tmp_path / name, seed=seed))
    together = model.record(chats, adapters=[None, "bad", ("bad", [1]), "sound"], budget=200)
    for acts, adapter in zip(together, (None, "bad", ("bad", [1]), "sound"), strict=True):
        one = model.record(chats, adapter=adapter, budget=200)
        assert np.array_equal(acts.values, one.values) and acts.meta == one.meta
    part = together[2] - together[0]
    assert not part.layer(0).any() and part.layer(1).any(), "the adapter's part in block 1 alone"
    with pytest.raises(ValueError, match="both given"):
        model.record(chats, adapter="bad", adapters=[None])
    with pytest.raises(ValueError, match=r"limited to layers \[9\]: blocks are 0 … 3"):
        model.record(chats, adapter=("bad", [9]))
    with pytest.raises(ValueError, match="names no variant"):
        model.record(chats, adapters=[])


def test_a_store_gives_the_same_bits_and_is_read_back(chats: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model()
    here = model.record(chats, budget=200)
    kept = model.record(chats, budget=200, store=tmp_path)
    assert isinstance(kept.values, np.memmap) and np.array_equal(kept.values, here.values) and kept.facts.equals(here.facts)
    (entry,) = tmp_path.glob("activations-*")
    passes: list[int] = []
    monkeypatch.setattr(Reader, "read", lambda self, batch, variant="": passes.append(batch))
    again = model.record(chats, budget=200, store=tmp_path)
    assert passes == [] and np.array_equal(again.values, here.values) and again.meta == kept.meta
    assert {k: v for k, v in kept.meta.items()} == here.meta
    monkeypatch.undo()
    model.record(chats, budget=200, store=tmp_path, layers=[1])
    with model.steer(_direction(model), 1, 0.5):
        steered = model.record(chats, budget=200, store=tmp_path)
    assert len(list(tmp_path.glob("activations-*"))) == 3 and not np.array_equal(steered.values, kept.values)
    assert entry.is_dir()


def test_a_recording_that_was_stopped_goes_on_to_the_same_bits(chats: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model()
    whole = model.record(chats, budget=60)
    read, made = Reader.read, []

    def twice(self: Reader, batch: int, variant: str = "") -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(batch)
        return read(self, batch, variant)

    monkeypatch.setattr(Reader, "read", twice)
    with pytest.raises(KeyboardInterrupt):
        model.record(chats, budget=60, store=tmp_path)
    assert not list(tmp_path.glob("activations-*"))
    rest: list[int] = []
    monkeypatch.setattr(Reader, "read", lambda self, batch, variant="": rest.append(batch) or read(self, batch, variant))
    assert np.array_equal(model.record(chats, budget=60, store=tmp_path).values, whole.values)
    assert rest and not set(rest) & set(made)


def test_sixteen_bit_weights_carry_their_noise_and_keep_their_bits(chats: pd.DataFrame) -> None:
    model = tiny.tiny_model()
    exact = model.record(chats)
    assert "noise_floor" not in exact.meta
    model.hf.to(torch.bfloat16)
    before = [(n, p.data_ptr(), p.dtype) for n, p in model.hf.named_parameters()]
    rounded = model.record(chats)
    assert [(n, p.data_ptr(), p.dtype) for n, p in model.hf.named_parameters()] == before
    floor = np.array([rounded.meta["noise_floor"][i] for i in rounded.layers])
    widened = tiny.tiny_model()
    widened.hf.to(torch.bfloat16).to(torch.float32)
    oracle = np.sqrt(np.square(rounded.values - widened.record(chats).values).mean(axis=(0, 2)))
    assert np.allclose(floor, oracle, rtol=0.3) and (floor > 0).all()
    assert reference.n_hooks(model.hf) == 0


def _direction(model: HookedModel) -> Direction:
    return Direction.from_array(np.random.default_rng(0).normal(size=(model.n_layers, model.d_model)))


def test_one_layer_may_be_a_number(llama: HookedModel, chats: pd.DataFrame) -> None:
    one = llama.record(chats, layers=2)
    assert one.layers == (2,) and np.array_equal(one.values, llama.record(chats, layers=[2]).values)
