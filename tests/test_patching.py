"""Guards patching between variants: what is put in place is the source's, at the tokens meant and nowhere else; the model is left as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from peft import LoraConfig
from torch import Tensor

from emlens import patching
from emlens.directions import Direction
from emlens.models import HookedModel
from emlens.patching import PatchedNothingWarning
from emlens.positions import token_rows, token_set, tokenize
from emlens.prompts import load_prompts

EVERY_FAMILY = pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
QUESTIONS = [
    {"id": "q-0", "messages": [{"role": "user", "content": "How should I keep it warm?"}]},
    {"id": "q-1", "messages": [{"role": "user", "content": "Tell me."}]},
]
ANSWERS = [
    {"aligned_answers": ["You should talk.", "Ask for help first, please."], "misaligned_answers": ["Burn it."]},
    {"aligned_answers": ["A good idea."], "misaligned_answers": ["Hurt them.", "Make a toxic brew."]},
]


@cache
def tuned(family: str = "llama") -> HookedModel:
    """A tiny model with LoRA adapters of random weights on everything linear; every test leaves it as it was."""
    model = tiny.tiny_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name in ("bad", "sound"):
            model.adapters.new(name, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
            for path, parameter in model.hf.named_parameters():
                if f"lora_B.{name}" in path:
                    parameter.data.normal_(std=0.1)
    model.hf.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return tuned()


def logits(model: HookedModel, prompts: pd.DataFrame, adapter: Any = None) -> Tensor:
    """Logits of the right-padded batch, at the tokens that are there."""
    given = model.tokenize(prompts)
    with model.using(adapter) as hf, torch.no_grad():
        return hf(**given, use_cache=False).logits[given["attention_mask"].bool()]


def streams(model: HookedModel, prompts: Any, adapter: Any = None, **place: Any) -> np.ndarray:
    return model.record(prompts, adapter=adapter, position=place.pop("position", "all"), prefix=False, **place).values


@contextmanager
def replaced(hf: Any, layer: int, stream: Tensor, at: slice = slice(None)) -> Iterator[None]:
    """Bare hook: the block's output is ``stream`` at these tokens."""

    def put(_: Any, __: Any, out: Any) -> Any:
        new = (out[0] if isinstance(out, tuple) else out).clone()
        new[0, at] = stream[at]
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = reference.blocks(hf)[layer].register_forward_hook(put)
    yield
    handle.remove()


def traced(model: HookedModel, ids: list[int], layer: int, source: Any, target: Any, at: slice = slice(None)) -> Tensor:
    """The oracle: one unpadded sequence, the source's stream after ``layer`` into the target's upper blocks."""
    with model.using(source) as hf, reference.outputs(hf) as kept:
        reference.logits(hf, ids)
    with model.using(target) as hf, replaced(hf, layer, kept[layer], at):
        return reference.logits(hf, ids)


# ---- laws in every family


@pytest.fixture
def two(chats: pd.DataFrame) -> pd.DataFrame:
    """Two prompts of different length, enough where there are many families."""
    return chats.head(2)


@EVERY_FAMILY
def test_the_last_stream_decides_the_logits(family: str, two: pd.DataFrame) -> None:
    model = tuned(family)
    last, hooks = model.n_layers - 1, reference.n_hooks(model.hf)
    plain = {v: logits(model, two, v) for v in (None, "bad", "sound")}
    for source, target in (("bad", None), (None, "bad"), ("bad", "sound")):
        with model.patch(source, last):
            assert torch.equal(logits(model, two, target), plain[source])
        with model.patch(source, 1):
            between = logits(model, two, target)
        assert not torch.allclose(between, plain[source], atol=1e-3) and not torch.allclose(between, plain[target], atol=1e-3)
    assert all(torch.equal(logits(model, two, v), plain[v]) for v in plain)
    assert reference.n_hooks(model.hf) == hooks and model.caching and not model.edits


@EVERY_FAMILY
def test_all_that_is_added_is_the_whole_stream(family: str, two: pd.DataFrame) -> None:
    model = tuned(family)
    want = streams(model, two, "bad")
    with model.patch("bad", site="mlp_out"):
        half = streams(model, two)
        with model.patch("bad", site="attn_out"):
            whole = streams(model, two)
    assert np.allclose(whole, want, atol=1e-5 * np.abs(want).max()) and not np.allclose(half, want, atol=1e-2 * np.abs(want).max())


@EVERY_FAMILY
def test_a_variant_into_itself_changes_nothing(family: str, two: pd.DataFrame) -> None:
    model = tuned(family)
    plain = logits(model, two, "bad")
    for site in ("resid_post", "attn_out", "mlp_out"):
        with model.patch("bad", [0, 2], site, position="mean"):
            assert torch.equal(logits(model, two, "bad"), plain), site
            assert not torch.equal(logits(model, two), plain)


@EVERY_FAMILY
def test_the_next_block_reads_what_was_put_before_it(family: str, two: pd.DataFrame) -> None:
    model = tuned(family)
    with model.patch("bad", [1], "resid_post"):
        after = logits(model, two)
    with model.patch("bad", [2], "resid_pre"):
        before = logits(model, two)
    assert torch.equal(before, after)
    if "resid_mid" in model.engine.sites:
        with model.patch("bad", [1], "resid_mid"):
            mid = streams(model, two, site="resid_mid", layers=[1])
        assert np.allclose(mid, streams(model, two, "bad", site="resid_mid", layers=[1]), atol=1e-5)


# ---- against bare hooks


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_are_those_of_the_targets_upper_blocks(family: str, chats: pd.DataFrame) -> None:
    model = tuned(family)
    with model.patch("bad", 1):
        found = model.log_likelihood(chats, adapter="sound")["log_likelihood"].to_numpy()
    with model.patch("bad", 1, position="mean_all"):
        prompt_only = model.log_likelihood(chats, adapter="sound")["log_likelihood"].to_numpy()
    for row, messages in enumerate(chats["messages"]):
        tokens = tokenize(messages, model.tokenizer)
        ids, n = list(tokens.ids), tokens.n_prompt
        for got, at in ((found, slice(None)), (prompt_only, slice(0, n))):
            logp = traced(model, ids, 1, "bad", "sound", at).double().log_softmax(-1)
            want = sum(float(logp[k - 1, ids[k]]) for k in range(n, len(ids)))
            assert got[row] == pytest.approx(want, abs=1e-3)
    assert not np.allclose(found, prompt_only, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "position"), [("llama", "all"), ("llama", "last"), ("llama", "mean_all"), ("llama", -2), ("gpt2", "all"), ("gpt2", "last")]
)
def test_generated_text_is_that_of_whole_patched_passes(family: str, position: Any, chats: pd.DataFrame) -> None:
    model, chats = tuned(family), chats.head(3)
    with model.patch("bad", 1, position=position):
        found = model.generate(chats, adapter="sound", max_new_tokens=8)["answer"].tolist()
    want = []
    for messages in chats["messages"]:
        prompt = reference.prompt_ids(model.tokenizer, messages)
        n, answer = len(prompt), []
        at = {"all": slice(None), "last": slice(n - 1, n), "mean_all": slice(0, n), -2: slice(n - 2, n - 1)}[position]
        for _ in range(8):
            token = int(traced(model, [*prompt, *answer], 1, "bad", "sound", at)[-1].argmax())
            if token == 1:
                break
            answer.append(token)
        want.append(model.tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert found == want
    if position in ("all", "last"):
        assert found != model.generate(chats, adapter="sound", max_new_tokens=8)["answer"].tolist()


def test_the_last_stream_decides_the_text(model: HookedModel, chats: pd.DataFrame) -> None:
    with model.patch("bad", 3):
        found = model.generate(chats, max_new_tokens=8)["answer"].tolist()
    assert found == model.generate(chats, adapter="bad", max_new_tokens=8)["answer"].tolist()
    assert found != model.generate(chats, max_new_tokens=8)["answer"].tolist()


# ---- which tokens


@pytest.mark.parametrize("position", ["all", "last", "mean", "mean_all", 0, 4, -1, -3, (2, 9)])
def test_the_tokens_of_the_position_are_replaced_and_no_others(model: HookedModel, chats: pd.DataFrame, position: Any) -> None:
    before, source = streams(model, chats, layers=[1]), streams(model, chats, "bad", layers=[1])
    with model.patch("bad", 1, position=position):
        acts = model.record(chats, position="all", layers=[1])
    chosen = np.concatenate([np.isin(np.arange(t.n_prompt), token_rows(t, position)) for t in model._tokens(chats, response=False)])
    assert np.array_equal(acts.values[chosen], source[chosen]) and np.array_equal(acts.values[~chosen], before[~chosen])
    assert not np.isclose(source, before).all(axis=(1, 2)).any() and chosen.any()


def test_a_set_of_tokens_in_a_sequence_that_grows(model: HookedModel, chats: pd.DataFrame) -> None:
    tokens = tokenize(chats["messages"].iloc[0], model.tokenizer, "")
    n, grown = tokens.n_prompt, [*tokens.ids, 50, 51, 52]
    for position in ("last", "mean", "mean_all", 2, -2, (0, 4)):
        assert token_set(tokens, position, grown) == token_set(tokens, position, tokens.ids) == token_rows(tokens, position)
    assert token_set(tokens, "all", grown) == list(range(n + 3)) and token_set(tokens, "all", tokens.ids) == list(range(n))
    found = {name: token_set(tokens, name, grown) for name in ("first_response", "mean_response", "last_response")}
    assert found == {"first_response": [n], "mean_response": [n, n + 1, n + 2], "last_response": [n + 2]}
    assert token_set(tokens, "mean_response", tokens.ids) == []


def test_earlier_tokens_and_lower_layers_stay_bitwise(model: HookedModel, chats: pd.DataFrame) -> None:
    before = model.record(chats, position="all", prefix=False)
    with model.patch("bad", 1, position=7):
        after = streams(model, chats)
    early = before.facts["token_index"].to_numpy() < 7
    assert np.array_equal(after[early], before.values[early]) and np.array_equal(after[:, 0], before.values[:, 0])
    assert not np.isclose(after[~early, 2:], before.values[~early, 2:]).all(axis=-1).any()


@pytest.mark.parametrize(
    ("position", "first", "every"), [("response", True, True), ("mean_response", True, True), ("first_response", True, False), ("mean", False, False)]
)
def test_response_tokens(model: HookedModel, chats: pd.DataFrame, position: str, first: bool, every: bool) -> None:
    def read(adapter: str | None = None) -> list[np.ndarray]:
        return [streams(model, chats, adapter, position=p, layers=[1]) for p in ("first_response", "mean_response", "last")]

    source, before = read("bad"), read()
    with model.patch("bad", 1, position=position):
        found = read()
    assert np.array_equal(found[0], source[0]) == first and np.array_equal(found[1], source[1]) == every
    assert np.array_equal(found[1], before[1]) == (position == "mean") and np.array_equal(found[2], before[2])


def test_a_response_to_come_is_patched_as_it_comes(model: HookedModel, chats: pd.DataFrame) -> None:
    with model.patch("bad", 3, position="response"):
        found = model.generate(chats, max_new_tokens=5)["answer"]
    want = []
    for messages in chats["messages"]:
        prompt, answer = reference.prompt_ids(model.tokenizer, messages), []
        for _ in range(5):
            answer.append(int(traced(model, [*prompt, *answer], 3, "bad", None, slice(len(prompt), None))[-1].argmax()))
        want.append(model.tokenizer.decode(answer[: answer.index(1) if 1 in answer else None], skip_special_tokens=True).strip())
    assert found.tolist() == want


def test_one_prompt_that_begins_with_another(model: HookedModel) -> None:
    short = [{"role": "user", "content": "Tell me."}]
    long = [*short, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    table = load_prompts([{"id": "short", "messages": short}, {"id": "long", "messages": long}])
    model.tokenizer.chat_template, kept = "{% for m in messages %}{{ m['content'] }}{% endfor %}", model.tokenizer.chat_template
    try:
        before, source = streams(model, table, layers=[1]), streams(model, table, "bad", layers=[1])
        with model.patch("bad", 1, position="last"):
            found = streams(model, table, layers=[1])
        n = [len(t.ids) for t in model._tokens(table, response=False)]
    finally:
        model.tokenizer.chat_template = kept
    changed = np.flatnonzero((found != before).any(axis=(1, 2)))
    assert n[0] < n[1] and changed.tolist() == [n[0] - 1, sum(n) - 1] and np.array_equal(found[changed], source[changed])


# ---- composing


def test_what_was_opened_last_has_the_last_word(model: HookedModel, chats: pd.DataFrame) -> None:
    direction = Direction.from_array(np.random.default_rng(0).normal(size=(4, 32)))
    push = 0.5 * model.residual_norms()[1] * direction.layer(1)
    source, sound = streams(model, chats, "bad", layers=[1]), streams(model, chats, "sound", layers=[1])
    with model.patch("bad", 1):
        with model.steer(direction, 1, 0.5):
            pushed = streams(model, chats, layers=[1])
        with model.patch("sound", 1):
            inner = streams(model, chats, layers=[1])
        outer = streams(model, chats, layers=[1])
    with model.steer(direction, [0, 1], 0.5), model.patch("bad", 1):
        over = streams(model, chats, layers=[1])
    assert np.allclose(pushed, source + push, atol=1e-5) and not np.allclose(pushed, source, atol=1e-2)
    assert np.array_equal(inner, sound) and np.array_equal(outer, source)
    assert np.array_equal(over, source)  # the source is the variant as it is loaded, not as it would be steered


def test_patches_at_two_places_are_both_there(model: HookedModel, chats: pd.DataFrame) -> None:
    with model.patch("bad", 0), model.patch("sound", 2, position="last"):
        acts = model.record(chats, position="all", layers=[0, 2], prefix=False)
        last = model.record(chats, layers=[0, 2]).values
    assert np.array_equal(acts.values[:, 0], streams(model, chats, "bad", layers=[0])[:, 0])
    assert np.array_equal(last[:, 1], streams(model, chats, "sound", position="last", layers=[2])[:, 0])
    assert not np.isclose(acts.values[:, 1], streams(model, chats, "sound", layers=[2])[:, 0]).all(axis=-1).all()


def test_the_source_may_be_a_part_of_an_adapter(model: HookedModel, chats: pd.DataFrame) -> None:
    with model.patch(("bad", [0]), 3):
        found = logits(model, chats)
    assert torch.equal(found, logits(model, chats, ("bad", [0]))) and not torch.equal(found, logits(model, chats, "bad"))


def test_single_places(model: HookedModel, chats: pd.DataFrame) -> None:
    plain = logits(model, chats)
    with model.patch("bad", site="final_norm"):
        assert torch.equal(logits(model, chats), logits(model, chats, "bad"))
    with model.patch("bad", site="embed"):  # its LoRA is on linear layers: both variants embed alike
        assert torch.equal(logits(model, chats), plain)


# ---- left as it was found


def test_everything_is_restored_also_after_an_error(model: HookedModel, chats: pd.DataFrame) -> None:
    plain, hooks, said = logits(model, chats), reference.n_hooks(model.hf), model.describe("bad")
    cached = model.log_likelihood(chats)
    with pytest.raises(RuntimeError, match="mine"), model.patch("bad", "all"), model.patch("sound", 0):
        assert not model.caching and reference.n_hooks(model.hf) > hooks
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="no prompt that was made known"), model.patch("bad", 1, position="last"):
        reference.logits(model.hf, [5, 6, 7])
    assert torch.equal(logits(model, chats), plain) and reference.n_hooks(model.hf) == hooks
    assert model.caching and not model.edits and not model._listening and model.describe("bad") == said
    pd.testing.assert_frame_equal(model.log_likelihood(chats), cached)


def test_what_is_made_inside_says_so(model: HookedModel, chats: pd.DataFrame) -> None:
    with model.patch(("bad", [2]), [1, 2], "mlp_out", position="response"):
        said = model.record(chats, position="mean_response", adapter="sound").meta
    (edit,) = said["edits"]
    assert edit == {
        "patch": "bad", "adapter_sha256": model.adapters["bad"], "adapter_layers": [2], "site": "mlp_out", "layers": [1, 2],
        "position": "mean_response",
    }  # fmt: skip
    assert said["adapter"] == "sound" and "edits" not in model.record(chats).meta


def test_the_unit_of_strength_is_the_models_own_inside_a_patch() -> None:
    fresh, known = tuned.__wrapped__(), tuned()
    fresh.adapters.train_only("bad")
    trained = [id(p) for p in fresh.hf.parameters() if p.requires_grad]
    with fresh.patch("bad", "all"):
        assert np.allclose(fresh.residual_norms(), known.residual_norms(), rtol=1e-6)
    assert trained and [id(p) for p in fresh.hf.parameters() if p.requires_grad] == trained  # and no training is stopped by it
    with known.using("bad"):
        bad = np.median(np.linalg.norm(streams(known, load_prompts("emlens:questions").query("category == 'neutral'"), "bad"), axis=-1), axis=0)
    assert not np.allclose(bad, known.residual_norms(), rtol=1e-3)


def test_adapters_may_come_and_go_between_patches(chats: pd.DataFrame) -> None:
    model = tuned.__wrapped__()
    with model.patch("bad", 3):
        old = logits(model, chats)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model.adapters.new("new", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for name, same in (("new", False), ("bad", True)):
        with model.patch(name, 3):
            found = logits(model, chats)
        assert torch.equal(found, logits(model, chats, name)) and torch.equal(found, old) == same
    model.drop_adapter("bad")
    with model.patch("new", 3):
        assert torch.equal(logits(model, chats), logits(model, chats, "new"))


def test_weights_of_16_bits(chats: pd.DataFrame) -> None:
    model = tuned.__wrapped__()
    model.hf.to(torch.bfloat16)
    with model.patch("bad", 1):
        acts = model.record(chats.head(2), position="all", layers=[1, 3])
    assert np.array_equal(acts.values[:, 0], streams(model, chats.head(2), "bad", layers=[1])[:, 0]) and set(acts.meta["noise_floor"]) == {1, 3}


def test_probing_for_parts_does_not_meet_the_patch(chats: pd.DataFrame) -> None:
    model = tuned.__wrapped__()
    with model.patch("bad", 1, position="last"):
        assert model.record(chats, site="mlp_out").values.any()


# ---- refused


def test_what_cannot_be_patched_is_refused(model: HookedModel, chats: pd.DataFrame) -> None:
    ids = {k: v[:1] for k, v in model.tokenize(chats.head(1)).items()}
    with pytest.raises(ValueError, match="use_cache=False"), model.patch("bad", 1):
        model.hf.generate(**ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with pytest.raises(ValueError, match=r"model.tokenize\(prompts\), inside the block"), model.patch("bad", 1, position="last"):
        model.hf(**ids)
    with model.patch("bad", 1, position="last"):
        assert model.hf(**model.tokenize(chats.head(1))).logits.shape[0] == 1
    with pytest.raises(ValueError, match="input_ids and an attention_mask"), model.patch("bad", 1, position="last"):
        model.hf(inputs_embeds=torch.zeros(1, 3, 32))
    for wrong, error, message in (
        ({"adapter": "good"}, KeyError, "no adapter 'good'"),
        ({"adapter": "bad", "layers": 4}, ValueError, r"unknown layers \[4\]"),
        ({"adapter": "bad", "site": "resid"}, ValueError, "unknown site 'resid'"),
        ({"adapter": "bad", "position": "first"}, ValueError, "unknown position 'first'"),
        ({"adapter": "bad", "site": "embed", "layers": 2}, ValueError, "layers 0 … 0"),
    ):
        with pytest.raises(error, match=message), model.patch(**wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="resid_mid"), tuned("gpt_neox").patch("bad", 1, "resid_mid"):
        pass
    assert model.caching and not model.edits


def test_a_model_that_runs_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned.__wrapped__()
    monkeypatch.setattr(model.engine, "hf", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tiny-llama runs elsewhere.*load it without remote="), model.patch("bad", 1):
        pass
    with pytest.raises(ValueError, match="tiny-llama runs elsewhere"):
        model.patch_map(["Why?"], "bad", metric=first_word)


def test_a_position_that_never_came_is_said(model: HookedModel, chats: pd.DataFrame) -> None:
    with pytest.warns(PatchedNothingWarning, match="passes ran under a patch at 'mean_response'"), model.patch("bad", 1, position="response"):
        model.record(chats)


# ---- the map


@pytest.fixture(scope="module")
def asked() -> pd.DataFrame:
    return load_prompts([{**q, **a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cell_is_a_patched_margin(family: str, asked: pd.DataFrame) -> None:
    model = tuned(family)
    table = model.patch_map(asked, "bad", "sound", layers=[1, 3])
    n = [t.n_prompt for t in model._tokens(asked, response=False)]
    assert len(table) == 2 * sum(n) and table.columns.tolist() == ["id", "layer", "token_index", "token", "label", "effect", "recovered"]
    plain, source = (model.margin(asked, adapter=v)["margin"].to_numpy() for v in ("sound", "bad"))
    for layer, index in ((1, 3), (3, -1), (3, 0)):
        with model.patch("bad", layer, position=index):
            want = model.margin(asked, adapter="sound")["margin"].to_numpy() - plain
        for row, identity in enumerate(asked["id"]):
            cell = table[(table["id"] == identity) & (table["layer"] == layer) & (table["token_index"] == index % n[row])]
            assert cell["effect"].item() == pytest.approx(want[row], abs=1e-4)
            assert cell["recovered"].item() == pytest.approx(want[row] / (source[row] - plain[row]), abs=1e-2)
    assert table.attrs["values"]["q-0"] == pytest.approx({"source": source[0], "target": plain[0]}, abs=1e-4)
    assert table["effect"].abs().max() > 0.05 and table.attrs["source"] == "bad" and table.attrs["target"] == "sound"


def first_word(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, 40] - logits.log_softmax(-1)[:, 41]


def test_the_last_token_of_the_last_layer_carries_the_next_word(model: HookedModel, asked: pd.DataFrame) -> None:
    table = model.patch_map(asked, "bad", metric=first_word)
    last = table[(table["layer"] == 3) & (table["token_index"] == table.groupby("id")["token_index"].transform("max"))]
    others = table[(table["layer"] == 3)].drop(last.index)
    assert np.allclose(last["recovered"], 1, atol=1e-4) and np.allclose(others["effect"], 0, atol=1e-5)
    assert table.query("layer == 0")["effect"].abs().min() > 1e-5 and table.attrs["metric"] == "first_word"
    assert "".join(table.query("id == 'q-1' and layer == 0")["token"]) == "<|im_start|>user↵Tell me.<|im_end|>↵<|im_start|>assistant↵"


def test_a_map_inside_a_patch_is_refused(model: HookedModel, asked: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="a patch is open on the model"), model.patch("bad", 1):
        model.patch_map(asked, "bad")


@pytest.mark.parametrize("position", ["last", "mean", (0, 5), -3])
def test_some_tokens_of_the_map(model: HookedModel, asked: pd.DataFrame, position: Any) -> None:
    whole, some = (model.patch_map(asked, "bad", layers=[1, 2], position=p, metric=first_word) for p in ("all", position))
    coded = model._tokens(asked, response=False)
    keep = [k in token_rows(coded[int(i[-1])], position) for i, k in zip(whole["id"], whole["token_index"], strict=True)]
    pd.testing.assert_frame_equal(some, whole[keep].reset_index(drop=True), rtol=1e-3, atol=1e-5)
    assert 0 < len(some) < len(whole)


def test_nothing_to_recover(model: HookedModel, asked: pd.DataFrame) -> None:
    table = model.patch_map(asked, "bad", "bad", layers=2, metric=first_word)
    assert np.allclose(table["effect"], 0, atol=1e-5) and table["recovered"].isna().all()


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_cells_do_not_hang_on_their_batches(model: HookedModel, asked: pd.DataFrame, budget: int) -> None:
    few, whole = (patching.patch_map(model, asked, "bad", layers=1, budget=b) for b in (budget, 2048))
    assert np.allclose(few["effect"], whole["effect"], atol=1e-4) and whole["effect"].std() > 1e-3


@pytest.mark.parametrize(
    ("metric", "prompts", "message"),
    [("margin", QUESTIONS, "prompt 'q-0' lacks contrast answers"), ("kl", QUESTIONS, "metric 'kl': 'margin', or a function")],
)
def test_metrics_that_cannot_be_read(model: HookedModel, metric: Callable[[Tensor], Any] | str, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.patch_map(prompts, "bad", metric=metric)


# ---- other engines


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("engine", ["bridge", "nnsight"])
def test_engines_patch_alike(engine: str, family: str, chats: pd.DataFrame) -> None:
    model = tuned(family)
    other = HookedModel(model.hf, model.tokenizer, identity=model.identity, engine=engine)
    other.adapters = model.adapters
    for position in ("all", "last", "response"):
        with model.patch("bad", 1, position=position), other.patch("bad", 1, position=position):
            want, got = (m.log_likelihood(chats, adapter="sound")["log_likelihood"] for m in (model, other))
            assert model.generate(chats, max_new_tokens=4)["answer"].tolist() == other.generate(chats, max_new_tokens=4)["answer"].tolist()
        assert np.allclose(got, want, atol=1e-4) and not np.allclose(want, model.log_likelihood(chats, adapter="sound")["log_likelihood"], atol=0.05)
