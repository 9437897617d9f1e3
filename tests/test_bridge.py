"""Guards the transformer-lens bridge: bare transformers' numbers at every place, adapters and edits included, and the model as it was."""

import copy
import importlib
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference
import torch
import twins
from tiny import VOCAB, tiny_hf, tiny_tokenizer
from transformers import AutoModelForCausalLM, HeliumConfig
from transformers import logging as transformers_logging
from twins import ADAPTERS, GREEDY, SITES, adapted, batch, everywhere, grow, left, logits, moved, real, relative, state

from emlens._engines import HooksEngine, bridge, find_blocks
from emlens._engines.bridge import BridgeEngine, open_bridge
from emlens.activations import Place
from emlens.adapters import switched

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_neox", "granite", "phi3")
"""Plain; one fused projection stored turned; norms after the parts; side by side with heads interleaved in it; multipliers; two fused ones."""

EACH = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 3e-5
"""Relative, of any one vector, in float32: TransformerLens computes attention step by step, transformers in one kernel (measured: up to 1.1e-5)."""


@cache
def opened(family: str) -> tuple[BridgeEngine, HooksEngine]:
    """The bridge and the hooks on one model with two adapters; every test leaves both as they were."""
    hf, _ = adapted(family)
    return BridgeEngine(hf, tiny_tokenizer()), HooksEngine(hf)


# ---- the same numbers


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in reference.HALVES])
def test_places_are_bare_transformers_places(family: str) -> None:
    made, inputs = opened(family)[0], batch()
    rows = [ids[kept.bool()].tolist() for ids, kept in zip(*inputs.values(), strict=True)]
    with switched(made.original, None):
        bare = [reference.block_streams(made.original, row) for row in rows]
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        read = made.read(everywhere(site), real(inputs), **inputs)
        for layer in range(4):
            assert relative(read[layer], torch.cat([one[layer][site] for one in bare])) < TOLERANCE, (site, layer)


@EACH
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_adapters_do_on_the_twin_what_they_do_on_the_model(family: str, adapter: Any) -> None:
    made, hooks = opened(family)
    inputs = batch()
    with switched(made.hf, adapter), switched(made.original, adapter):
        assert relative(logits(made.hf, inputs), logits(made.original, inputs)) < TOLERANCE
        for site in made.sites:
            ours, theirs = (one.read(everywhere(site), real(inputs), **inputs) for one in (made, hooks))
            assert max(relative(ours[layer], theirs[layer]) for layer in theirs) < TOLERANCE, site
    if adapter is not None:
        with switched(made.hf, adapter):
            changed = logits(made.hf, inputs)
        assert relative(changed, logits(made.hf, inputs)) > 0.05


def test_a_family_with_parallel_halves_has_no_resid_mid() -> None:
    made = opened("gpt_neox")[0]
    assert set(made.sites) == set(SITES) - {"resid_mid"} and set(opened("llama")[0].sites) == set(SITES)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has no resid_mid.*side by side"):
        made.read(everywhere("resid_mid"), real(batch()), **batch())
    with pytest.raises(ValueError, match="no resid_mid"), made.editing({("resid_mid", 1): moved}):
        pass


def test_a_hook_point_that_shows_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bridge.POINTS, "attn_out", "hook_mlp_out")
    made = BridgeEngine(tiny_hf("llama"), tiny_tokenizer())
    assert not {"attn_out", "mlp_out", "resid_mid"} & set(made.sites) and "resid_post" in made.sites
    with pytest.raises(ValueError, match=r"resid_pre \+ attn_out.* away from"):
        made.read(everywhere("attn_out"), real(batch()), **batch())


def test_a_shared_prefix_is_no_prefix() -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        twins.a_shared_prefix_is_no_prefix(opened(family)[0], TOLERANCE)


# ---- edits


@EACH
def test_edits_are_those_of_the_hooks(family: str) -> None:
    twins.edits_are_those_of_the_hooks(*opened(family), TOLERANCE)


def test_what_attention_added_is_read_without_an_edit_of_the_stream_after_it() -> None:
    made, inputs = opened("llama")[0], batch()
    place = everywhere("attn_out")
    before = made.read(place, real(inputs), **inputs)
    with made.editing({("resid_mid", 2): moved}):
        assert torch.equal(made.read(place, real(inputs), **inputs)[2], before[2])
    with made.editing({("resid_mid", 2): moved, ("attn_out", 2): lambda a: 2 * a}):
        assert torch.equal(made.read(place, real(inputs), **inputs)[2], 2 * before[2])
    assert torch.equal(made.read(place, real(inputs), **inputs)[2], before[2])


def test_edits_compose_in_the_order_of_opening_and_leave_nothing() -> None:
    made, inputs = opened("llama")[0], batch()
    plain = logits(made.hf, inputs)
    first, then = {("resid_post", 1): lambda h: h + 1.0}, {("resid_post", 1): lambda h: 3.0 * h}
    with made.editing({("resid_post", 1): lambda h: 3.0 * (h + 1.0)}):
        together = logits(made.hf, inputs)
    with made.editing(first), made.editing(then):
        assert torch.equal(logits(made.hf, inputs), together)
        with (
            pytest.raises(ValueError, match=r"made \(2, 24, 31\) of a stream of \(2, 24, 32\)"),
            made.editing({("resid_pre", 2): lambda h: h[..., 1:]}),
        ):
            logits(made.hf, inputs)
        assert torch.equal(logits(made.hf, inputs), together)
    assert torch.equal(logits(made.hf, inputs), plain)
    assert not any(point.fwd_hooks for point in made.bridge.hook_dict.values())
    for place in (("resid_past", 0), ("resid_post", 4), ("embed", 1)):
        with pytest.raises(ValueError, match="unknown site|has the layers"), made.editing({place: moved}):
            pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_generation_is_edited_with_and_without_a_cache(family: str) -> None:
    twins.generation_is_edited_with_and_without_a_cache(*opened(family))


# ---- heads, patterns, lens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_patterns_and_heads(family: str) -> None:
    hf, tokenizer = tiny_hf(family), tiny_tokenizer()
    made = open_bridge(hf, tokenizer)
    ids = batch()["input_ids"][:1]
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    found, kept = made.run_with_cache(ids)
    assert relative(found.detach(), logits(hf, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[None]) < TOLERANCE
    patterns = eager(input_ids=ids, output_attentions=True).attentions
    for layer in range(4):
        assert torch.allclose(kept[f"blocks.{layer}.attn.hook_pattern"], patterns[layer], atol=1e-6)
        z = kept[f"blocks.{layer}.attn.hook_z"]
        assert z.shape == (1, 24, 4, 8)
        added = made.blocks[layer].attn.o(z.flatten(2))
        assert relative(added, kept[f"blocks.{layer}.hook_attn_out"]) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_the_lens_at_the_last_block_is_the_logits(family: str) -> None:
    made = open_bridge(tiny_hf(family), tiny_tokenizer())
    ids = batch()["input_ids"][:1]
    found, kept = made.run_with_cache(ids)
    lens = made.adapter.apply_output_logits_transform(made.unembed(made.ln_final(kept["blocks.3.hook_resid_post"])))
    assert torch.equal(lens, found) and made.W_U.shape == (32, VOCAB)


@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_text_is_tokenised_as_the_tokenizer_does_it(bos: str | None) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = bos
    made = open_bridge(tiny_hf("llama"), tokenizer)
    assert made.to_tokens("hello there")[0].tolist() == tokenizer("hello there")["input_ids"]
    assert tokenizer.bos_token == bos and made.cfg.device == "cpu" and not made.compatibility_mode


# ---- the model as it was


@EACH
def test_opening_and_using_it_changes_nothing_of_the_model(family: str) -> None:
    (hf, _), tokenizer, inputs = adapted(family), copy.deepcopy(tiny_tokenizer()), batch()
    HooksEngine(hf).read(everywhere("resid_post"), real(inputs), **inputs)
    before, plain = state(hf, tokenizer), logits(hf, inputs)
    made = BridgeEngine(hf, tokenizer)
    with switched(made.hf, "two"), made.editing({("attn_out", 1): moved}):
        made.read(everywhere("resid_post"), real(inputs), **inputs)
        made.hf.generate(**left(inputs), generation_config=GREEDY)
        made.bridge.run_with_cache(inputs["input_ids"])
        assert state(hf, tokenizer) == before and torch.equal(logits(hf, inputs), plain)
    del made
    assert state(hf, tokenizer) == before and torch.equal(logits(hf, inputs), plain)
    assert hf.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_importing_transformer_lens_leaves_warnings_as_they_were() -> None:
    code = """
import warnings
from transformers import logging
from emlens._engines.bridge import _transformer_bridge
before = logging.get_verbosity(), list(warnings.filters)
assert _transformer_bridge().__name__ == "TransformerBridge"
assert (logging.get_verbosity(), list(warnings.filters)) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_a_library_that_meddles_with_warnings_leaves_them_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test above, with a stand-in in place of TransformerLens that does what it does when it is imported first."""
    (tmp_path / "transformer_lens").mkdir()
    (tmp_path / "transformer_lens" / "__init__.py").touch()
    meddle = "import warnings\nfrom transformers import logging\nlogging.set_verbosity(49)\nwarnings.filterwarnings('ignore', 'of the stand-in')\n"
    (tmp_path / "transformer_lens" / "model_bridge.py").write_text(f"{meddle}class TransformerBridge: stand_in = True\n")
    before = transformers_logging.get_verbosity(), list(warnings.filters)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_lens"]:
            del sys.modules[name]
        monkeypatch.syspath_prepend(tmp_path)
        assert bridge._transformer_bridge().stand_in and (transformers_logging.get_verbosity(), list(warnings.filters)) == before
        del sys.modules["transformer_lens.model_bridge"]
        with warnings.catch_warnings():
            importlib.import_module("transformer_lens.model_bridge")
            assert transformers_logging.get_verbosity() == 49 and len(warnings.filters) == len(before[1]) + 1
        transformers_logging.set_verbosity(before[0])


def test_no_weight_is_copied() -> None:
    hf, _ = adapted("llama")
    made = open_bridge(hf, tiny_tokenizer())
    ours = {p.untyped_storage().data_ptr() for p in (*hf.parameters(), *hf.buffers())}
    theirs = {p.untyped_storage().data_ptr(): p.numel() for p in (*made.parameters(), *made.original_model.parameters())}
    assert set(theirs) <= ours
    hf.get_output_embeddings().weight.data.mul_(2.0)
    inputs = batch()
    with switched(hf, None):
        assert relative(logits(made.original_model, inputs), logits(hf, inputs)) < TOLERANCE


def test_it_opens_on_the_loaded_weights_and_is_switched_apart_from_the_model() -> None:
    made, inputs = opened("llama")[0], batch()
    hf = made.original
    with switched(hf, None):
        base = logits(hf, inputs)
    assert relative(logits(made.hf, inputs), base) < TOLERANCE
    with switched(made.hf, "one"), switched(hf, None):
        assert torch.equal(logits(hf, inputs), base) and relative(logits(made.hf, inputs), base) > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_come_and_go_after_opening(family: str, tmp_path: Any) -> None:
    hf, adapters = adapted(family, names=("one",))
    made, inputs, edits = BridgeEngine(hf, tiny_tokenizer()), batch(), {("resid_post", 1): moved}
    grow(hf, adapters, "late", 4, dora=family == "llama")
    with made.editing(edits):
        made.refresh()
        with switched(made.hf, "late"), switched(hf, "late"):
            edited = logits(made.hf, inputs)
            assert relative(edited, logits(hf, inputs)) > 0.05
            with HooksEngine(hf).editing(edits):
                assert relative(edited, logits(hf, inputs)) < TOLERANCE
    adapters.save("late", tmp_path / "late", "tiny")
    fresh, others = adapted(family, names=())
    others.add("late", tmp_path / "late")
    with switched(fresh, "late"), switched(made.hf, "late"):
        assert relative(logits(made.hf, inputs), logits(fresh, inputs)) < TOLERANCE
    adapters.drop("late")
    adapters.drop("one")
    made.refresh()
    assert relative(logits(made.hf, inputs), logits(tiny_hf(family), inputs)) < TOLERANCE
    hf.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), inputs), logits(hf, inputs))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_an_adapter_that_would_be_passed_over_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_rejoin", lambda component: None)
    hf, _ = adapted(family, names=("one",))
    with pytest.raises(ValueError, match=r"does not run \d+ of \d+ layers with an adapter"):
        open_bridge(hf, tiny_tokenizer())


def test_an_architecture_it_does_not_know_is_refused() -> None:
    config = HeliumConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="TransformerLens cannot open HeliumForCausalLM.*engine='hooks'"):
        open_bridge(AutoModelForCausalLM.from_config(config), tiny_tokenizer())


def test_the_blocks_of_the_twin_are_found_as_those_of_any_model() -> None:
    made = opened("gpt2")[0]
    blocks, norm = find_blocks(made.hf)
    assert len(blocks) == 4 and norm is made.bridge.ln_final
    assert Place("resid_post", (0,), "last").site in made.sites
