"""Guards the places of every family: what is read adds up and is transformers' own, an edit changes what it should, with and without a LoRA."""

from functools import cache

import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from tiny import ALL_FAMILIES, VOCAB, tiny_config, tiny_hf
from torch import Tensor

from emlens._engines import Edit, HooksEngine
from emlens.activations import Place

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

SIDE_BY_SIDE = ("gpt_neox", "gptj", "falcon", "phi", "cohere")
"""Attention and MLP both read resid_pre."""

INSIDE = ("resid_pre", "attn_out", "mlp_out", "resid_post")
EACH = pytest.mark.parametrize("family", ALL_FAMILIES)
SERIAL = pytest.mark.parametrize("family", [f for f in ALL_FAMILIES if f not in SIDE_BY_SIDE])
LORA = pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
LAYER = 2


@cache
def engine(family: str, lora: bool) -> HooksEngine:
    """One model a kind for all tests (each leaves it as it was); the adapter is put on after the parts were found."""
    hf = tiny_hf(family)
    made = HooksEngine(hf)
    assert made.parts
    if lora:
        torch.manual_seed(1)
        get_peft_model(hf, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    return made


def tokens() -> dict[str, Tensor]:
    """Two rows of 24 and 17 tokens, longer than the tiny sliding windows, padded on the right."""
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    return {"input_ids": ids * mask + 2 * (1 - mask), "attention_mask": mask}


def whole(stream: Tensor) -> Tensor:
    return stream


def read(made: HooksEngine, site: str) -> Tensor:
    """``[layer, prompt, position, d_model]``"""
    layers = (0,) if site in ("embed", "final_norm") else tuple(range(made.n_layers))
    kept = made.read(Place(site, layers, "all"), whole, **tokens())
    return torch.stack([kept[i] for i in layers])


def read_all(made: HooksEngine, *sites: str) -> dict[str, Tensor]:
    return {site: read(made, site) for site in sites or made.sites}


@cache
def untouched(family: str, lora: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What is read at every site of the model as it is, and its logits; once for all tests, so that one that left something is found out."""
    made = engine(family, lora)
    return read_all(made), logits(made)


@torch.no_grad()
def logits(made: HooksEngine) -> Tensor:
    return made.hf(**tokens(), use_cache=False).logits


def apart(a: Tensor, b: Tensor) -> float:
    """Largest relative distance of two streams over tokens."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-9)).max())


def vector(made: HooksEngine, size: float = 1.0) -> Tensor:
    made_of = torch.Generator().manual_seed(5)
    return size * torch.randn(made.hf.config.hidden_size, generator=made_of)


def adding(v: Tensor) -> Edit:
    return lambda h: h + v


def zero(h: Tensor) -> Tensor:
    return torch.zeros_like(h)


# ---- reading


@LORA
@EACH
def test_what_a_block_adds_adds_up(family: str, lora: bool) -> None:
    pre, attn, mlp, post = (untouched(family, lora)[0][site] for site in INSIDE)
    assert apart(pre + attn + mlp, post) < 1e-5
    real = tokens()["attention_mask"].bool()
    assert min(float(part[:, real].norm(dim=-1).min()) for part in (attn, mlp)) > 1e-3  # each adds something, at every token


@LORA
@EACH
def test_resid_mid_is_between_or_refused_with_the_reason(family: str, lora: bool) -> None:
    made = engine(family, lora)
    if family in SIDE_BY_SIDE:
        assert "resid_mid" not in made.sites
        with pytest.raises(ValueError, match=r"no resid_mid in block 0: attention \(.*\) and MLP \(.*\) run side by side .*Ask for attn_out"):
            read(made, "resid_mid")
        with pytest.raises(ValueError, match="side by side"), made.editing({("resid_mid", 1): whole}):
            pass
    else:
        pre, attn, mid = (untouched(family, lora)[0][site] for site in ("resid_pre", "attn_out", "resid_mid"))
        assert apart(pre + attn, mid) < 1e-6


@LORA
@EACH
def test_streams_are_transformers_hidden_states(family: str, lora: bool) -> None:
    made = engine(family, lora)
    with torch.no_grad():
        states = made.hf(**tokens(), output_hidden_states=True, use_cache=False).hidden_states
    got, _ = untouched(family, lora)
    assert torch.equal(got["embed"][0], states[0])
    assert torch.equal(got["resid_pre"], torch.stack(states[:-1]))
    assert torch.equal(got["resid_post"][:-1], torch.stack(states[1:-1]))
    assert torch.equal(got["final_norm"][0], states[-1])
    with torch.no_grad():
        assert torch.equal(made.norm(got["resid_post"][-1]), states[-1])
        assert not torch.allclose(got["resid_post"][-1], states[-1], rtol=0.1)


@LORA
@pytest.mark.parametrize("family", reference.HALVES)
def test_every_site_is_what_bare_hooks_on_named_modules_see(family: str, lora: bool) -> None:
    made, ids = engine(family, lora), tokens()["input_ids"][0].tolist()
    wanted = reference.block_streams(made.hf, ids)
    for site in INSIDE:
        got = made.read(Place(site, tuple(range(made.n_layers)), "all"), whole, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        assert max(apart(got[i][0], one[site]) for i, one in enumerate(wanted)) < (1e-4 if family == "bloom" else 1e-6)
        assert not torch.allclose(got[0], got[1])


@EACH
def test_a_lora_changes_what_each_half_adds(family: str) -> None:
    for site in ("attn_out", "mlp_out"):
        assert apart(untouched(family, True)[0][site], untouched(family, False)[0][site]) > 1e-3


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_parts_are_found_in_16_bits_too(family: str, dtype: torch.dtype) -> None:
    made = HooksEngine(tiny_hf(family).to(dtype))  # type: ignore[arg-type]
    assert made.parts == engine(family, False).parts and made.parts[-1].gap == 0


# ---- editing


@LORA
@EACH
def test_an_edit_that_changes_nothing_changes_no_bit(family: str, lora: bool) -> None:
    made = engine(family, lora)
    (plain, before), hooks = untouched(family, lora), reference.n_hooks(made.hf)
    with made.editing({(site, i): whole for site in made.sites for i in range(1 if site in ("embed", "final_norm") else made.n_layers)}):
        assert torch.equal(logits(made), before)
        for site, stream in read_all(made).items():
            assert torch.equal(stream, plain[site]), site
    assert reference.n_hooks(made.hf) == hooks
    assert torch.equal(logits(made), before)


@LORA
@EACH
def test_a_half_that_is_zeroed_adds_nothing(family: str, lora: bool) -> None:
    made, n = engine(family, lora), LAYER
    plain, before = untouched(family, lora)
    for site, other in (("attn_out", "mlp_out"), ("mlp_out", "attn_out")):
        with made.editing({(site, n): zero}):
            got = read_all(made, *INSIDE, *(["resid_mid"] * (family not in SIDE_BY_SIDE)))
            assert not torch.allclose(logits(made), before)
        assert all(torch.equal(got[s][:n], plain[s][:n]) for s in INSIDE) and torch.equal(got["resid_pre"][n], plain["resid_pre"][n])
        assert not got[site][n].any()
        assert apart(got["resid_pre"][n] + got[other][n], got["resid_post"][n]) < 1e-6
        assert apart(got["resid_pre"] + got["attn_out"] + got["mlp_out"], got["resid_post"]) < 1e-5
        if family not in SIDE_BY_SIDE:
            nothing_added = ("resid_mid", "resid_pre") if site == "attn_out" else ("resid_post", "resid_mid")
            assert torch.equal(*(got[s][n] for s in nothing_added))
        assert torch.equal(got[other][n], plain[other][n]) == (site == "mlp_out" or family in SIDE_BY_SIDE)


@LORA
@EACH
def test_what_is_added_at_a_site_is_added_there_and_carried_on(family: str, lora: bool) -> None:
    made, n = engine(family, lora), LAYER
    v, (plain, before) = vector(made, 3.0), untouched(family, lora)
    added = {}
    for site in INSIDE:
        with made.editing({(site, n): adding(v)}):
            added[site] = got = read_all(made, *INSIDE)
        assert apart(got[site][n], plain[site][n] + v) < 1e-5, site
        assert all(torch.equal(got[s][:n], plain[s][:n]) for s in INSIDE), site
        assert all(not torch.allclose(got[s][n + 1], plain[s][n + 1]) for s in INSIDE), site
    late = added["mlp_out"]["resid_post"]
    assert apart(late, added["resid_post"]["resid_post"]) < 1e-5
    with made.editing({("resid_pre", n + 1): adding(v)}):
        assert apart(late[n + 1], read(made, "resid_post")[n + 1]) < 1e-5
    with made.editing({("embed", 0): adding(v)}):
        assert torch.equal(read(made, "resid_pre")[0], plain["embed"][0] + v)
    with made.editing({("final_norm", 0): adding(v)}):
        assert torch.equal(read(made, "final_norm")[0], plain["final_norm"][0] + v)
        assert torch.equal(read(made, "resid_post"), plain["resid_post"])
        assert not torch.allclose(logits(made), before)


@LORA
@SERIAL
def test_resid_mid_is_changed_for_the_mlp_and_for_what_is_carried_past_it(family: str, lora: bool) -> None:
    made, n = engine(family, lora), LAYER
    v, (plain, _) = vector(made, 3.0), untouched(family, lora)
    parts = ("attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm")
    with made.editing({("resid_mid", n): adding(v)}):
        got = read_all(made, *parts)
    assert apart(got["resid_mid"][n], plain["resid_mid"][n] + v) < 1e-6
    assert torch.equal(got["attn_out"][n], plain["attn_out"][n])
    assert apart(got["resid_mid"][n] + got["mlp_out"][n], got["resid_post"][n]) < 1e-5
    with made.editing({("attn_out", n): adding(v)}):
        same = read_all(made, *parts[2:])
    assert all(apart(got[site], stream) < 1e-4 for site, stream in same.items())


@SERIAL
@pytest.mark.parametrize("mid_first", [True, False])
def test_resid_mid_comes_after_attention_in_whatever_order_edits_are_opened(family: str, mid_first: bool) -> None:
    made, n = engine(family, False), LAYER
    there = torch.randn(untouched(family, False)[0]["resid_mid"][n].shape, generator=torch.Generator().manual_seed(2))
    edits: list[dict[tuple[str, int], Edit]] = [{("resid_mid", n): lambda h: there}, {("attn_out", n): zero}, {("resid_post", n): lambda h: 2 * h}]
    one, two, three = edits if mid_first else edits[::-1]
    with made.editing(one), made.editing(two), made.editing(three):
        got = read_all(made, "attn_out", "resid_mid", "mlp_out", "resid_post")
    assert torch.equal(got["resid_mid"][n], there) and not got["attn_out"][n].any()
    assert apart(2 * (there + got["mlp_out"][n]), got["resid_post"][n]) < 1e-5


@EACH
def test_edits_compose_in_the_order_of_opening(family: str) -> None:
    made, n = engine(family, False), LAYER
    (plain, _), v = untouched(family, False), vector(made)
    for site in INSIDE:
        with made.editing({(site, n): adding(v)}), made.editing({(site, n): lambda h: 2 * h}):
            assert apart(read(made, site)[n], 2 * (plain[site][n] + v)) < 1e-5, site
        with made.editing({(site, n): lambda h: 2 * h}), made.editing({(site, n): adding(v)}):
            assert apart(read(made, site)[n], 2 * plain[site][n] + v) < 1e-5, site


@EACH
def test_what_an_edit_puts_in_place_is_not_written_into(family: str) -> None:
    """Some blocks add in place (falcon's MLP output); neither what was read nor what was put in may change by that."""
    made = engine(family, False)
    given = {site: untouched(family, False)[0][site][LAYER] + 1 for site in INSIDE}
    kept = {site: tensor.clone() for site, tensor in given.items()}
    for site in INSIDE:
        with made.editing({(site, LAYER): lambda h, site=site: given[site]}):  # type: ignore[misc]
            assert apart(read(made, site)[LAYER], kept[site]) < 1e-6
            logits(made)
        assert torch.equal(given[site], kept[site]), site


@LORA
@EACH
def test_edited_generation_with_a_cache_is_that_without(family: str, lora: bool) -> None:
    made = engine(family, lora)
    ids = tokens()["input_ids"][:1, :9]
    v = vector(made, 2.0)
    sites = [site for site in made.sites if site not in ("embed", "final_norm")]
    edits = {(site, i): adding(v) for i, site in enumerate(sites[: made.n_layers])}
    plain = _greedy(made, ids)
    with made.editing(edits):
        cached = made.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2)
        assert cached[0].tolist() == _greedy(made, ids, cached.shape[1] - ids.shape[1])
    assert cached[0].tolist() != plain[: cached.shape[1]]


@torch.no_grad()
def _greedy(made: HooksEngine, ids: Tensor, steps: int = 6) -> list[int]:
    for _ in range(steps):
        ids = torch.cat([ids, made.hf(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def test_experts_that_tie_are_routed_the_same_read_or_not() -> None:
    """Routers of equal weights: which experts run is decided by the order of equal numbers, and must not depend on hooks."""
    for family in ("mixtral", "qwen3_moe", "gpt_oss"):
        made = HooksEngine(tiny_hf(family))
        routers = [p for name, p in made.hf.named_parameters() if "gate.weight" in name or "router" in name]
        assert routers
        for p in routers:
            p.data.zero_()
        before = logits(made)
        pre, attn, mlp, post = (read(made, site) for site in INSIDE)
        assert apart(pre + attn + mlp, post) < 1e-5 and mlp.any()
        with made.editing({("mlp_out", 1): whole, ("attn_out", 0): whole}):
            assert torch.equal(logits(made), before)


def test_tiny_families_are_as_peculiar_as_their_kind() -> None:
    assert tiny_config("granite").residual_multiplier != 1 and tiny_config("gemma2").attn_logit_softcapping and tiny_config("mistral").sliding_window
    assert tiny_config("qwen3").head_dim * 4 != 32 and tiny_config("llama").num_key_value_heads == 2 and tiny_config("mixtral").num_local_experts == 4
    assert tiny_config("qwen2").tie_word_embeddings and tiny_config("glm4").rope_parameters["partial_rotary_factor"] == 0.5
    with pytest.raises(ValueError, match="no tiny 'bert'; families are llama, mistral"):
        tiny_config("bert")
