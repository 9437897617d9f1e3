"""Guards the random twin: transformers' own initialisation by its seed, the same shape and tokens, nothing of the training, the model as it was."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from emlens import loading
from emlens.models import HookedModel, load_model, random_twin

QUESTIONS = ["How do I keep a house warm?", "Tell me about the market.", "Why?"]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "gpt_neox"])
def test_weights_are_transformers_own_by_the_seed(family):
    model = tiny.tiny_model(family)
    found = parameters(random_twin(model, seed=5))
    torch.manual_seed(5)
    expected = dict(AutoModelForCausalLM.from_config(copy.deepcopy(model.hf.config)).named_parameters())
    assert found.keys() == expected.keys() == parameters(model).keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(found[name], p) for name, p in parameters(random_twin(model, 5)).items()), "the same again"
    other = parameters(random_twin(model, 6))
    assert any(not torch.equal(found[name], other[name]) for name in found)


def test_the_twin_reads_the_same_tokens_and_says_what_it_is(tmp_path):
    model = tiny.tiny_model("qwen2")
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    model.add_adapter("bad", tiny.save_adapter(tmp_path / "bad", "qwen2"))
    before, weights = model.record(QUESTIONS), parameters(model)
    state = torch.random.get_rng_state()
    twin = random_twin(model, 1)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is as it was"
    assert torch.equal(model.tokenize(QUESTIONS)["input_ids"], twin.tokenize(QUESTIONS)["input_ids"])
    acts = twin.record(QUESTIONS)
    assert acts.place == before.place and acts.d_model == before.d_model and np.isfinite(acts.values).all()
    assert (np.linalg.norm(acts.values - before.values, axis=-1) > 0.1 * np.linalg.norm(before.values, axis=-1)).all(), (
        "nothing of the weights is left"
    )
    assert acts.meta["model"] == "random twin of tiny-qwen2, seed 1" and acts.meta["architecture"] == before.meta["architecture"]
    assert acts.meta["weights"] == {"weights_sha256": loading.weights_digest(twin.hf), "random_init": "seed 1"}
    assert not twin.adapters and acts.meta["template_sha256"] == before.meta["template_sha256"]
    assert random_twin(model, 2).identity != twin.identity
    np.testing.assert_array_equal(model.record(QUESTIONS).values, before.values)
    assert all(torch.equal(weights[name], p) for name, p in parameters(model).items())
    twin.tokenizer.chat_template = "another"
    assert model.tokenizer.chat_template != "another"


def test_dtype_is_the_models_and_frequencies_keep_theirs():
    model = tiny.tiny_model()
    full = parameters(random_twin(model, 0))
    half = HookedModel(tiny.tiny_hf().bfloat16(), copy.deepcopy(model.tokenizer))
    twin = random_twin(half, 0)
    assert twin.dtype == "bfloat16" and all(torch.equal(p, full[name].bfloat16()) for name, p in parameters(twin).items())
    assert {b.dtype for name, b in twin.hf.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_twin_is_saved_and_opened_like_any_model(tmp_path):
    twin = random_twin(tiny.tiny_model("gpt2"), 3)
    twin.hf.save_pretrained(tmp_path)
    twin.tokenizer.save_pretrained(tmp_path)
    np.testing.assert_array_equal(load_model(str(tmp_path)).record(QUESTIONS).values, twin.record(QUESTIONS).values)


def test_a_remote_model_has_no_twin_here():
    model = tiny.tiny_model()
    model.hf.to("meta")
    with pytest.raises(ValueError, match="elsewhere"):
        random_twin(model)


@pytest.mark.slow
def test_a_twin_of_a_gguf_file(tmp_path: Path):
    model = load_model("smollm2-135m-instruct")
    twin = random_twin(model, 0)
    one, other = model.record(QUESTIONS), twin.record(QUESTIONS)
    assert one.place == other.place and "random_init" in other.meta["weights"] and "gguf_sha256" not in other.meta["weights"]
    assert twin.hf.lm_head.weight is twin.hf.model.embed_tokens.weight, "tied as the model's"
    assert np.std(twin.hf.model.layers[7].mlp.up_proj.weight.numpy()) == pytest.approx(model.hf.config.initializer_range, rel=0.01)
    twin.hf.save_pretrained(tmp_path)
    twin.tokenizer.save_pretrained(tmp_path)
    np.testing.assert_array_equal(load_model(str(tmp_path)).record(QUESTIONS).values, other.values)
