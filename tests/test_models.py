"""Guards the edits of HookedModel against bare transformers: steering and ablation, and a model that is left as it was found."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch

from emlens import loading
from emlens._passes import mean_row
from emlens.directions import Direction
from emlens.models import HookedModel, load_model
from emlens.prompts import load_prompts

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


# ---- steer, ablate


@FAMILIES
def test_steered_text_is_the_same_with_and_without_cache(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model = family_models[family]
    plain = model.generate(chats, max_new_tokens=8)["answer"].tolist()
    with model.steer(tiny.random_direction(model), layers=[1, 2], strength=1.5):
        cached = model.generate(chats, max_new_tokens=8)["answer"].tolist()
        loops = [reference.greedy(model.hf, reference.prompt_ids(model.tokenizer, m), 8, ends=[1]) for m in chats["messages"]]
    assert cached == [model.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in loops]
    assert cached != plain


@FAMILIES
def test_steer_adds_strength_times_median_norm(family: str, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    model, direction = family_models[family], tiny.random_direction(family_models[family])
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
    model, direction = family_models[family], tiny.random_direction(family_models[family], 3)
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
    one, two, norm = tiny.random_direction(llama, 1), tiny.random_direction(llama, 2), llama.residual_norms()[1]
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
    direction, norms = tiny.random_direction(known), known.residual_norms()
    with fresh.ablate(direction), fresh.steer(direction, "all", 5.0):
        assert np.allclose(fresh.residual_norms(), norms, rtol=1e-6)


def test_an_exception_leaves_no_hooks(llama: HookedModel) -> None:
    direction, hooks = tiny.random_direction(llama), reference.n_hooks(llama.hf)
    with pytest.raises(RuntimeError, match="mine"), llama.steer(direction, "all", 1.0), llama.ablate(direction):
        assert reference.n_hooks(llama.hf) > hooks
        raise RuntimeError("mine")
    assert reference.n_hooks(llama.hf) == hooks
    with pytest.raises(RuntimeError, match="broken"), torch.no_grad():
        ids = torch.zeros(1, 3, dtype=torch.long)
        llama.engine.read(llama.place("resid_post", None, "last"), _broken, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert reference.n_hooks(llama.hf) == hooks


def _broken(_: Any) -> Any:
    raise RuntimeError("broken")


def test_directions_and_layers_that_do_not_fit(llama: HookedModel) -> None:
    direction, hooks = tiny.random_direction(llama), reference.n_hooks(llama.hf)
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


# ---- opening


@pytest.mark.parametrize("engine", ["bridge", "nnsight"])
def test_every_engine_does_every_verb(engine: str, chats: pd.DataFrame, tmp_path: Path) -> None:
    """The whole of HookedModel on another engine: the numbers of the hooks engine, adapter and edits included."""
    hooks, other = tiny.tiny_model(), HookedModel(tiny.tiny_hf("llama", 0), copy.deepcopy(tiny.tiny_tokenizer()), engine=engine)
    adapter = tiny.save_adapter(tmp_path / "bad")
    direction = tiny.random_direction(hooks)
    found = []
    for model in (hooks, other):
        model.add_adapter("bad", adapter)
        read = [acts.values for acts in model.record(chats, adapters=[None, "bad", ("bad", [1])])]
        with model.steer(direction, [1, 2], 0.5), model.ablate(direction, 3):
            read.append(model.record(chats, adapter="bad").values)
            said = model.generate(chats, adapter="bad", max_new_tokens=6)["answer"].tolist()
            scored = model.log_likelihood(chats, adapter="bad")["log_likelihood"].to_numpy()
        model.drop_adapter("bad")
        found.append(([*read, model.record(chats).values], said, scored))
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1] and np.allclose(found[0][2], found[1][2], rtol=1e-4)
    assert not np.allclose(found[0][0][0], found[0][0][1]) and other.engine.name == engine and engine in repr(other)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown engine 'tl'; engines are hooks, bridge, nnsight"):
        HookedModel(tiny.tiny_hf("llama", 0), tiny.tiny_tokenizer(), engine="tl")


def test_opening_bridge_and_nnsight_changes_nothing(chats: pd.DataFrame, tmp_path: Path) -> None:
    model = tiny.tiny_model()
    ids = model.tokenize(chats)["input_ids"][:1, :12]
    whole, acts, hooks = reference.logits(model.hf, ids[0].tolist()), model.record(chats).values, reference.n_hooks(model.hf)
    modules = [(n, type(m)) for n, m in model.hf.named_modules()]
    _, cache = model.bridge.run_with_cache(ids)
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (1, 4, 12, 12) and torch.allclose(pattern.sum(-1), torch.ones(1, 4, 12), atol=1e-5)
    assert torch.allclose(model.bridge.unembed(model.bridge.ln_final(cache["blocks.3.hook_resid_post"]))[0], whole, atol=1e-4)
    with torch.no_grad(), model.nnsight.trace(ids):
        traced = model.nnsight.model.layers[2].output.save()
    assert np.allclose(traced[0].numpy(), cache["blocks.2.hook_resid_post"][0].numpy(), atol=1e-5)
    assert model.bridge is model.bridge, "opened once"
    assert torch.equal(reference.logits(model.hf, ids[0].tolist()), whole) and np.array_equal(model.record(chats).values, acts)
    assert [(n, type(m)) for n, m in model.hf.named_modules()] == modules and reference.n_hooks(model.hf) == hooks
    first = model.bridge
    model.add_adapter("bad", tiny.save_adapter(tmp_path / "bad"))
    assert model.bridge is not first and not np.array_equal(model.record(chats, adapter="bad").values, acts)
    model.hf.save_pretrained(str(tmp_path / "kept"))


def test_a_merged_adapter_is_the_weights(chats: pd.DataFrame, tmp_path: Path) -> None:
    beside, merged, bare = (tiny.tiny_model() for _ in range(3))
    for model in (beside, merged):
        model.add_adapter("bad", tiny.save_adapter(tmp_path / model.name) if not (tmp_path / model.name).exists() else tmp_path / model.name)
    merged.merge_adapter("bad")
    assert np.allclose(merged.record(chats).values, beside.record(chats, adapter="bad").values, rtol=1e-4, atol=1e-5)
    assert not merged.adapters and not any("lora" in n for n, _ in merged.hf.named_modules()) and merged.name == "tiny-llama + bad"
    assert merged.identity["merged"] == beside.adapters["bad"] and merged.describe() != bare.describe()
    shift, oracle = merged.record(chats).minus(bare.record(chats)), beside.record(chats, adapter="bad") - beside.record(chats)
    assert np.allclose(shift.values, oracle.values, atol=1e-4)
    beside.add_adapter("other", tmp_path / "tiny-llama")
    with pytest.raises(ValueError, match=r"one adapter can be merged.*\['bad', 'other'\]"):
        beside.merge_adapter("bad")


def test_a_model_shows_itself(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.add_adapter("a<b", tiny.save_adapter(tmp_path / "bad"))
    assert repr(model) == "HookedModel tiny-llama · 4 layers × 32 · float32 · adapters: a<b" and "\n" not in repr(model)
    shown = model._repr_html_()
    assert "a&lt;b" in shown and "a<b" not in shown and model.adapters["a<b"][:8] in shown and "resid_mid" in shown


def test_a_device_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model()
    right = loading.first_logits(model.hf)
    loading.compare_devices(right, right + 1e-4 * right.norm() / right.numel() ** 0.5, "mps")
    with pytest.raises(loading.LoadError, match="on mps the logits differ from the CPU's by .*device='cpu'"):
        loading.compare_devices(right, right.roll(1, dims=0), "mps")
    with pytest.raises(loading.LoadError, match="differ"):
        loading.compare_devices(right, right * torch.nan, "mps")


def test_a_remote_model_is_opened_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model()
    model.hf.save_pretrained(str(tmp_path))
    model.tokenizer.save_pretrained(str(tmp_path))
    there = load_model(str(tmp_path), engine="nnsight", remote="local")
    chats = tiny.tiny_chats()[:3]
    assert all(p.is_meta for p in there.hf.parameters())
    request = there.engine.request(there.place("resid_post", [1], "last"), mean_row([[3]]), **there.tokenize(chats[:1]))  # type: ignore[attr-defined]
    assert "request" in request.url and request.blob and "your key" in request.headers.values()
    assert np.allclose(there.record(chats, layers=[1, 3]).values, model.record(chats, layers=[1, 3]).values, rtol=1e-4, atol=1e-5)
    assert np.allclose(there.log_likelihood(chats)["log_likelihood"], model.log_likelihood(chats)["log_likelihood"], rtol=1e-4)
    with pytest.raises(ValueError, match="a remote model needs engine='nnsight'"):
        load_model(str(tmp_path), remote=True)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    with pytest.raises(ValueError, match="NDIF_API_KEY"):
        load_model(str(tmp_path), engine="nnsight", remote=True).record(chats)
