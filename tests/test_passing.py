"""Guards edits at some positions: which tokens are changed, padded on either side, with a cache or without, in scoring, generation and tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch

import emlens as em
from emlens._passing import Where
from emlens.models import HookedModel

FAMILIES = pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3_text"))
WHERE: tuple[Where, ...] = ("prompt", "response", 0, 3, -1, -4)
LAYER, STRENGTH = 1, 2.0


def touched(where: Where, n_prompt: int, total: int) -> list[bool]:
    """Which tokens of one unpadded sequence: said in words in the docstring of ``steer``."""
    begin = {"prompt": 0, "response": n_prompt}.get(str(where))
    if begin is None:
        assert isinstance(where, int)
        begin = where if where >= 0 else n_prompt + where
    end = n_prompt if where == "prompt" else total
    return [begin <= k < end for k in range(total)]


@contextmanager
def pushed(model: HookedModel, where: Where, n_prompt: int) -> Iterator[None]:
    """Bare PyTorch: the direction added after block LAYER, at these tokens of one unpadded sequence in one pass."""
    vector = torch.from_numpy(tiny.random_direction(model).layer(LAYER)) * STRENGTH * float(model.residual_norms()[LAYER])

    def hook(_: Any, __: Any, out: Any) -> Any:
        stream = out[0] if isinstance(out, tuple) else out
        new = stream + torch.tensor(touched(where, n_prompt, stream.shape[1]))[None, :, None] * vector
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = reference.blocks(model.hf)[LAYER].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ids_of(model: HookedModel, chat: Any) -> tuple[list[int], list[int]]:
    response = model.tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"]
    return reference.prompt_ids(model.tokenizer, chat), response


@pytest.mark.parametrize("where", WHERE)
@FAMILIES
def test_scores_and_answers_are_those_of_bare_hooks(family: str, where: Where, family_models: dict[str, HookedModel], chats: pd.DataFrame) -> None:
    """Prompts of mixed length: scored over a shared cache, generated padded on the left; the oracle knows neither."""
    model = family_models[family]
    scores, answers = [], []
    for chat in chats["messages"]:
        prompt, response = ids_of(model, chat)
        with pushed(model, where, len(prompt)):
            scores.append(reference.log_likelihood(model.hf, prompt, response))
            answers.append(reference.greedy(model.hf, prompt, 6, ends=[1]))
    plain = model.log_likelihood(chats)["log_likelihood"]
    with model.steer(tiny.random_direction(model), LAYER, STRENGTH, positions=where):
        steered = model.log_likelihood(chats)["log_likelihood"]
        said = model.generate(chats, max_new_tokens=6)["answer"].tolist()
    assert np.allclose(steered, scores, rtol=1e-4) and not np.allclose(steered, plain, rtol=1e-4)
    assert said == [model.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]


@pytest.mark.parametrize("where", WHERE)
def test_a_recording_is_changed_there_alone(where: Where, llama: HookedModel, chats: pd.DataFrame) -> None:
    """Prompts that share a prefix: it is not computed apart while positions count."""
    before, norm = llama.record(chats, position="all"), llama.residual_norms()[LAYER]
    direction = tiny.random_direction(llama)
    with llama.steer(direction, LAYER, STRENGTH, positions=where):
        after = llama.record(chats, position="all")
    assert after.meta["plan"]["prefix"] == 0 < before.meta["plan"]["prefix"]
    push = (after.values - before.values)[:, LAYER]
    numbers = after.facts.groupby("prompt_id", sort=False).size()
    expected = np.concatenate([touched(where, n, n) for n in numbers])
    assert np.allclose(push[expected], STRENGTH * norm * direction.layer(LAYER), atol=1e-4 * norm)
    assert np.abs(push[~expected]).max(initial=0) < 1e-5 * norm


def test_prompt_and_response_together_are_all(llama: HookedModel, chats: pd.DataFrame) -> None:
    direction = tiny.random_direction(llama)
    with llama.steer(direction, LAYER, STRENGTH):
        everywhere = llama.log_likelihood(chats)["log_likelihood"]
    with llama.steer(direction, LAYER, STRENGTH, "prompt"), llama.steer(direction, LAYER, STRENGTH, "response"):
        both = llama.log_likelihood(chats)["log_likelihood"]
    with llama.steer(direction, LAYER, STRENGTH, "prompt"):
        half = llama.log_likelihood(chats)["log_likelihood"]
    assert np.allclose(both, everywhere, rtol=1e-5) and not np.allclose(half, everywhere, rtol=1e-3)


@pytest.mark.parametrize("engine", ["bridge", "nnsight"])
def test_other_engines_find_the_same_tokens(engine: str, llama: HookedModel, chats: pd.DataFrame) -> None:
    other = HookedModel(llama.hf, llama.tokenizer, identity=llama.identity, engine=engine)
    direction, found = tiny.random_direction(llama), []
    for model in (llama, other):
        with model.steer(direction, LAYER, STRENGTH, "response"), model.clamp(direction, 2, 0.5, -1):
            found.append((model.log_likelihood(chats)["log_likelihood"].to_numpy(), model.generate(chats, max_new_tokens=5)["answer"].tolist()))
    assert np.allclose(found[0][0], found[1][0], rtol=1e-4) and found[0][1] == found[1][1]


# ---- clamp, and a span


def test_clamp_sets_the_projection(llama: HookedModel, chats: pd.DataFrame) -> None:
    direction, norms = tiny.random_direction(llama), llama.residual_norms()
    for strength in (0.8, -0.3, 0.0):
        with llama.clamp(direction, [1, 3], strength):
            values = llama.record(chats, position="all").values
        along = np.einsum("pld,ld->pl", values, direction.vectors)
        assert np.allclose(along[:, [1, 3]], strength * norms[[1, 3]], atol=1e-4 * norms.max())
        assert np.abs(along[:, 0]).max() > 1e-3 * norms[0]
    with llama.ablate(direction, [1, 3]):
        assert np.allclose(llama.record(chats, position="all").values, values, atol=1e-5 * norms.max())


def test_a_span_is_ablated_whatever_its_basis(llama: HookedModel, chats: pd.DataFrame) -> None:
    one, two = tiny.random_direction(llama, 1), tiny.random_direction(llama, 2)
    skew = em.Direction.from_array(one.vectors + 0.1 * two.vectors)
    plain = llama.record(chats).values
    with llama.ablate([one, two]):
        gone = llama.record(chats).values
    with llama.ablate([two, skew, one]):
        again = llama.record(chats).values
    for direction in (one, two):
        assert np.abs(np.einsum("pld,ld->pl", gone, direction.vectors)).max() < 1e-4
        assert np.abs(np.einsum("pld,ld->pl", plain, direction.vectors)).max() > 1e-2
    assert np.allclose(gone, again, atol=1e-4)
    with llama.ablate(one), llama.ablate(two):
        assert not np.allclose(llama.record(chats).values, gone, atol=1e-3), "one after the other is not the span: they are not orthogonal"


# ---- while tuning


def test_a_tuning_feels_the_edit_and_its_positions(tmp_path: Path) -> None:
    rows = tiny.tiny_chats(12)
    shared: dict[str, Any] = {"steps": 2, "batch_size": 4, "held_out": 0.0, "learning_rate": 1e-2, "seed": 0}
    losses = {}
    for name, where in {"plain": None, "prompt": "prompt", "response": "response", "again": "response"}.items():
        model = tiny.tiny_model()
        bare = reference.logits(model.hf, list(range(20, 40)))
        direction = tiny.random_direction(model)
        if where is None:
            run = em.finetune(model, rows, tmp_path / name, **shared)
        else:
            with model.steer(direction, LAYER, STRENGTH, where):
                run = em.finetune(model, rows, tmp_path / name, **shared)
        losses[name] = run.losses["loss"].tolist()
        assert torch.equal(reference.logits(model.hf, list(range(20, 40))), bare)
    assert losses["response"] == losses["again"]
    assert len({tuple(losses[name]) for name in ("plain", "prompt", "response")}) == 3


# ---- what is refused


def test_what_names_no_tokens_is_refused(llama: HookedModel, chats: pd.DataFrame) -> None:
    direction, hooks = tiny.random_direction(llama), reference.n_hooks(llama.hf)
    for wrong in ("answer", True, 1.5, None):
        with pytest.raises(ValueError, match=r"positions=.*'all', 'prompt', 'response'"), llama.steer(direction, LAYER, 1.0, wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match=r"model.tokenize\(prompts\), inside the block"), llama.steer(direction, LAYER, 1.0, "response"):
        reference.logits(llama.hf, [5, 6, 7])
    with pytest.raises(ValueError, match="input_ids and an attention_mask"), llama.steer(direction, LAYER, 1.0, 2):
        llama.hf(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="no direction to ablate"), llama.ablate([]):
        pass
    with llama.steer(direction, LAYER, 1.0, "response"):
        ids = llama.tokenize(chats)
        llama.hf(**ids)
    assert reference.n_hooks(llama.hf) == hooks and llama.sharing and not llama.edits


def test_what_is_made_meanwhile_says_so(llama: HookedModel, chats: pd.DataFrame) -> None:
    with llama.steer(tiny.random_direction(llama), LAYER, 1.0, "prompt"):
        said = llama.record(chats).meta["edits"]
    with llama.steer(tiny.random_direction(llama), LAYER, 1.0):
        everywhere = llama.record(chats).meta["edits"]
    assert said[0]["positions"] == "prompt" and "positions" not in everywhere[0]
