"""Guards how blocks and parts are found (an unseen family, parts named by hand, what is refused and why) and the hooks of the default engine."""

from typing import Any

import pytest
import reference
import torch
from tiny import VOCAB, tiny_hf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from emlens._engines import HooksEngine, adding, find_blocks, removing
from emlens._engines.structure import Part, find_parts
from emlens.activations import Place

IDS = torch.arange(3, 15)[None]
INSIDE = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def whole(stream: Tensor) -> Tensor:
    return stream


def read(made: HooksEngine, site: str, ids: Tensor = IDS, **more: Any) -> Tensor:
    layers = (0,) if site in ("embed", "final_norm") else tuple(range(made.n_layers))
    kept = made.read(Place(site, layers, "all"), whole, input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return torch.stack([kept[i] for i in layers])


def gap(made: HooksEngine) -> float:
    pre, attn, mlp, post = (read(made, site) for site in INSIDE)
    return float((pre + attn + mlp - post).norm() / post.norm())


def of(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny model whose config is changed, or of a family that has no tiny one."""
    plain = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB, "pad_token_id": 2, "initializer_range": 0.15}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**plain, **config})).eval()


# ---- a family never seen


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, side_by_side: bool = False, scale: float = 1.0, one_norm: bool = False, **kwargs: Any) -> None:
        self.hidden_size, self.num_hidden_layers = 16, 3
        self.side_by_side, self.branch_scale, self.one_norm = side_by_side, scale, one_norm
        super().__init__(**kwargs)


class Mixing(nn.Module):
    """Running mean over the tokens, then a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, stream: Tensor) -> tuple[Tensor, None]:
        return self.out(stream.cumsum(1) / torch.arange(1, stream.shape[1] + 1)[:, None]), None


class Stage(nn.Module):
    """Names its stream ``z``, its halves as nobody does, runs the MLP first where they are side by side, and returns a tuple."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.config, self.scale = config, config.branch_scale
        self.calm, self.mixing = nn.LayerNorm(16), Mixing()
        self.calmer = self.calm if config.one_norm else nn.LayerNorm(16)
        self.thinking = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, *, z: Tensor) -> tuple[Tensor, None]:
        if self.config.side_by_side:
            thought = self.thinking(self.calmer(z))
            return z + thought * self.scale + self.mixing(self.calm(z))[0] * self.scale, None
        z = z + self.mixing(self.calm(z))[0] * self.scale
        return z + self.thinking(self.calmer(z)) * self.scale, None


class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(VOCAB, 16)
        self.stages = nn.ModuleList(Stage(config) for _ in range(3))
        self.last_norm = nn.LayerNorm(16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> BaseModelOutput:
        stream = self.words(input_ids)
        for stage in self.stages:
            stream = stage(z=stream)[0]
        return BaseModelOutput(last_hidden_state=self.last_norm(stream))

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class OddForCausalLM(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "inner"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.inner = OddModel(config)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.inner(input_ids).last_hidden_state))

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.words


@pytest.mark.parametrize("scale", [1.0, 0.35])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_family_never_seen_is_read_and_edited_by_structure(side_by_side: bool, scale: float) -> None:
    torch.manual_seed(0)
    made = HooksEngine(OddForCausalLM(OddConfig(side_by_side, scale)).eval())
    assert made.blocks is made.hf.inner.stages and made.norm is made.hf.inner.last_norm
    assert [str(b.attn_out) for b in made.parts] == [f"mixing{'' if scale == 1 else ' × 0.35'}"] * 3
    assert made.parts[0].mlp_out == Part(("thinking",), scale) and made.parts[0].resid_mid == (() if side_by_side else ("calmer",))
    assert gap(made) < 1e-6
    assert ("resid_mid" in made.sites) is not side_by_side
    plain, v = read(made, "resid_post"), torch.randn(16)
    with made.editing({("resid_pre", 1): lambda h: h + v}):
        assert torch.equal(read(made, "resid_pre")[1], plain[0] + v)
    for site in ("attn_out", "mlp_out"):
        with made.editing({(site, 1): lambda h: 0 * h}):
            assert gap(made) < 1e-6 and not read(made, site)[1].any()
            changed = read(made, "resid_post")
            assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1])


def test_a_module_that_runs_twice_in_a_block_is_not_taken_for_a_part() -> None:
    """One norm for both halves: a hook on it could not tell resid_pre from resid_mid, so resid_mid is not offered."""
    torch.manual_seed(0)
    made = HooksEngine(OddForCausalLM(OddConfig(one_norm=True)).eval())
    assert gap(made) < 1e-6 and "resid_mid" not in made.sites and "attn_out" in made.sites


# ---- parts that are not found, and parts named by hand


def three_parts() -> PreTrainedModel:
    """Attention, experts, and a shared MLP beside them: three modules add to the stream."""
    wide = {"intermediate_size": 48, "shared_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return of("granitemoeshared", **wide, residual_multiplier=0.22)


def test_a_block_of_three_parts_is_refused_and_mended_by_hand() -> None:
    hf = three_parts()
    with pytest.raises(ValueError) as error:
        read(HooksEngine(hf), "mlp_out")
    for said in (
        "GraniteMoeSharedForCausalLM, block 0: no two modules add up",
        "resid_pre + attn_out + mlp_out = resid_post",
        "input_layernorm, self_attn, post_attention_layernorm, block_sparse_moe, shared_mlp",
        "off by 0.",
        "needed 1e-05",
        "load_model(…, parts={'attn_out'",
    ):
        assert said in str(error.value)
    assert HooksEngine(hf).sites == ("resid_pre", "resid_post", "embed", "final_norm")
    assert read(HooksEngine(hf), "resid_post").shape == (3, 1, 12, 32)

    made = HooksEngine(hf, {"mlp_out": "shared_mlp + block_sparse_moe"})
    assert made.parts[0].mlp_out == Part(("block_sparse_moe", "shared_mlp"), 0.22) and made.parts[0].attn_out == Part(("self_attn",), 0.22)
    assert gap(made) < 1e-6 and "resid_mid" in made.sites
    plain, v = read(made, "mlp_out"), torch.randn(32)
    with made.editing({("mlp_out", 1): lambda h: h + v}):
        assert torch.allclose(read(made, "mlp_out")[1], plain[1] + v, atol=1e-5) and gap(made) < 1e-6
        with made.editing({("mlp_out", 1): lambda h: 0 * h}):
            assert read(made, "mlp_out")[1].norm() < 1e-5
            assert torch.allclose(read(made, "resid_post")[1], read(made, "resid_mid")[1], atol=1e-5)
    before = reference.logits(hf, IDS[0].tolist())
    with made.editing({("mlp_out", i): whole for i in range(3)}):
        assert torch.equal(reference.logits(hf, IDS[0].tolist()), before)


def test_a_law_that_is_false_is_not_mended_by_names() -> None:
    """OPT-350m normalises after adding: nothing is what a half adds."""
    hf = of("opt", do_layer_norm_before=False, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    with pytest.raises(ValueError, match="block 0: no two modules add up"):
        find_parts(hf, hf.model.decoder.layers)
    with pytest.raises(ValueError, match="the modules named in parts= do not add up .* nearest: self_attn and fc2, off by 0"):
        find_parts(hf, hf.model.decoder.layers, {"attn_out": "self_attn", "mlp_out": "fc2"})


def test_names_by_hand_are_checked() -> None:
    hf = tiny_hf("llama")
    assert HooksEngine(hf, {"attn_out": "self_attn", "mlp_out": "mlp", "resid_mid": "post_attention_layernorm"}).parts == HooksEngine(hf).parts
    assert HooksEngine(hf, {"attn_out": "self_attn.o_proj"}).parts[0].attn_out == Part(("self_attn.o_proj",))
    with pytest.raises(ValueError, match=r"parts= has the keys \['attention'\]; the parts that can be named are blocks, final_norm, attn_out"):
        HooksEngine(hf, {"attention": "self_attn"})
    with pytest.raises(ValueError, match=r"'attn_out' is 'attn', but LlamaDecoderLayer has no such module; its children are \['self_attn', 'mlp'"):
        read(HooksEngine(hf, {"attn_out": "attn"}), "attn_out")
    with pytest.raises(ValueError, match="the modules named in parts= do not add up"):
        read(HooksEngine(hf, {"attn_out": "input_layernorm"}), "attn_out")
    with pytest.raises(ValueError, match="'input_layernorm' reads, but that module does not read resid_pre"):
        read(HooksEngine(hf, {"resid_mid": "input_layernorm"}), "resid_mid")


def test_blocks_and_norm_by_hand_mend_a_model_with_two_stacks() -> None:
    hf = tiny_hf("llama")
    hf.model.other = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    hf.model.other_norm = nn.LayerNorm(2)
    with pytest.raises(ValueError, match=r"one list of 4 blocks, found \['layers', 'other'\].*model.layers.*parts={'blocks': 'model.layers'"):
        find_blocks(hf)
    with pytest.raises(ValueError, match=r"one final norm beside the blocks, found 2 among .*parts={'final_norm'"):
        find_blocks(hf, {"blocks": "model.layers"})
    blocks, norm = find_blocks(hf, {"blocks": "model.layers", "final_norm": "model.norm"})
    assert blocks is hf.model.layers and norm is hf.model.norm
    with pytest.raises(ValueError, match=r"'model.norm' is a LlamaRMSNorm; the blocks are a ModuleList, one of \['model.layers', 'model.other'\]"):
        find_blocks(hf, {"blocks": "model.norm", "final_norm": "model.norm"})
    with pytest.raises(ValueError, match="'blocks' is 'model.stages', but LlamaForCausalLM has no such module"):
        find_blocks(hf, {"blocks": "model.stages"})


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm"])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_config_not_the_name_decides_whether_halves_run_side_by_side(family: str, parallel: bool) -> None:
    made = HooksEngine(of(family, intermediate_size=64, use_parallel_residual=parallel, num_key_value_heads=2))
    assert ("resid_mid" in made.sites) is not parallel and gap(made) < 1e-6


def test_blocks_of_one_model_may_differ() -> None:
    """Qwen3-Next has linear attention in some blocks; the parts are found block by block."""
    linear = {f"linear_{k}": n for k, n in {"num_value_heads": 4, "num_key_heads": 4, "key_head_dim": 8, "value_head_dim": 8}.items()}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    made = HooksEngine(of("qwen3_next", layer_types=kinds, head_dim=8, num_key_value_heads=2, intermediate_size=64, **linear, **experts))
    assert [b.attn_out.names[0] for b in made.parts] == ["linear_attn", "self_attn", "linear_attn"]
    assert gap(made) < 1e-6


def test_halves_that_add_nothing_are_still_told_apart() -> None:
    hf = tiny_hf("llama")
    for block in hf.model.layers[:2]:
        block.mlp.down_proj.weight.data.zero_()
    hf.model.layers[1].self_attn.o_proj.weight.data.zero_()
    made = HooksEngine(hf)
    assert [(b.attn_out.names, b.mlp_out.names) for b in made.parts] == [(("self_attn",), ("mlp",))] * 4
    assert not read(made, "mlp_out")[:2].any() and read(made, "mlp_out")[2:].any()


def test_an_attention_that_adds_nothing_does_not_make_a_resid_mid() -> None:
    hf = tiny_hf("gpt_neox")
    for p in hf.gpt_neox.layers[1].attention.dense.parameters():
        p.data.zero_()
    assert HooksEngine(hf).parts[1].resid_mid == () and "resid_mid" not in HooksEngine(hf).sites
    serial = tiny_hf("llama")
    for block in serial.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    assert {part.resid_mid for part in HooksEngine(serial).parts} == {("post_attention_layernorm",)}


# ---- the probing pass


def test_probing_waits_until_it_is_needed_and_leaves_nothing_behind() -> None:
    made = HooksEngine(tiny_hf("gpt2"))
    read(made, "resid_post")
    with made.editing({("resid_pre", 1): whole}):
        assert "parts" not in vars(made)
    read(made, "attn_out")
    assert "parts" in vars(made) and reference.n_hooks(made.hf) == 0


@pytest.mark.parametrize("family", ["llama", "granite", "falcon", "gemma2"])
def test_probing_under_open_edits_finds_the_same(family: str) -> None:
    made, known = HooksEngine(tiny_hf(family)), HooksEngine(tiny_hf(family))
    sites = known.sites
    with known.editing({(site, i): lambda h: 2 * h + 1 for site in sites[:-2] for i in range(4)}):
        assert find_parts(known.hf, known.blocks) == known.parts
    with made.editing({("resid_post", 0): lambda h: h + 1, ("resid_pre", 2): lambda h: 3 * h}):
        assert made.parts == known.parts


# ---- hooks


def test_a_pass_ends_after_the_last_block_asked_for_unless_a_cache_is_filled() -> None:
    hf = tiny_hf("llama")
    made, ran = HooksEngine(hf), []
    for i, block in enumerate(hf.model.layers):
        block.register_forward_hook(lambda _, __, ___, i=i: ran.append(i))  # type: ignore[misc]
    all_of_it = read(made, "attn_out")
    ran.clear()
    few = made.read(Place("attn_out", (1, 0), "all"), whole, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert ran == [0, 1] and list(few) == [0, 1] and torch.equal(few[1], all_of_it[1])
    ran.clear()
    made.read(Place("resid_post", (0,), "all"), whole, input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=True)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    cache = DynamicCache(config=hf.config)
    made.read(Place("embed", (0,), "all"), whole, input_ids=IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, use_cache=True)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    cache.frozen = True  # type: ignore[attr-defined]
    more = {"input_ids": IDS, "attention_mask": torch.ones(1, 24), "past_key_values": cache, "use_cache": True}
    made.read(Place("embed", (0,), "all"), whole, **more)
    assert ran == [0]
    ran.clear()
    read(made, "final_norm")
    assert ran == [0, 1, 2, 3]
    hf.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    ran.clear()
    made.read(Place("embed", (0,), "all"), whole, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert ran == [0, 1, 2, 3]


def test_what_is_read_is_a_copy_of_its_own() -> None:
    """Falcon adds attention to the MLP's output in place; a select that returns the stream itself must not see that."""
    made = HooksEngine(tiny_hf("falcon"))
    assert torch.equal(read(made, "mlp_out"), torch.stack([one["mlp_out"][None] for one in reference.block_streams(made.hf, IDS[0].tolist())]))


def test_an_error_inside_leaves_no_hook() -> None:
    made = HooksEngine(tiny_hf("llama"))

    def broken(stream: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        made.read(Place("resid_mid", (0, 1), "all"), broken, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    with pytest.raises(RuntimeError, match="no"), made.editing({("mlp_out", 2): broken}):
        read(made, "resid_post")
    with (
        pytest.raises(ValueError, match=r"an edit made \(1, 11, 32\) of a stream of \(1, 12, 32\)"),
        made.editing({("mlp_out", 2): lambda h: h[:, 1:]}),
    ):
        read(made, "resid_post")
    assert reference.n_hooks(made.hf) == 0


def test_places_that_are_not_there_are_refused() -> None:
    made = HooksEngine(tiny_hf("llama"))
    with pytest.raises(ValueError, match="unknown site 'hidden'; sites are resid_pre"), made.editing({("hidden", 0): whole}):
        pass
    with pytest.raises(ValueError, match="'resid_post' has the layers 0 … 3; 4 is not among them"), made.editing({("resid_post", 4): whole}):
        pass
    with (
        pytest.raises(ValueError, match="'final_norm' has the layers 0 … 0; 1 is not"),
        made.editing({("resid_pre", 0): whole, ("final_norm", 1): whole}),
    ):
        pass
    assert reference.n_hooks(made.hf) == 0


def test_edits_come_before_hooks_of_others() -> None:
    """transformers keeps hooks of its own for hidden states once they were asked for; they see what was edited."""
    made = HooksEngine(tiny_hf("llama"))
    made.hf(input_ids=IDS, output_hidden_states=True)
    with made.editing({("resid_post", 1): lambda h: 0 * h, ("embed", 0): lambda h: 2 * h}), torch.no_grad():
        states = made.hf(input_ids=IDS, output_hidden_states=True).hidden_states
        assert not states[2].any() and torch.equal(states[0], 2 * made.hf.model.embed_tokens(IDS))


def test_contexts_may_be_closed_in_any_order() -> None:
    made = HooksEngine(tiny_hf("llama"))
    one, two = made.editing({("resid_post", 0): lambda h: h + 1}), made.editing({("resid_post", 0): lambda h: 2 * h})
    plain = read(made, "resid_post")[0]
    one.__enter__()
    two.__enter__()
    assert torch.equal(read(made, "resid_post")[0], 2 * (plain + 1))
    one.__exit__(None, None, None)
    assert torch.equal(read(made, "resid_post")[0], 2 * plain)
    two.__exit__(None, None, None)
    assert torch.equal(read(made, "resid_post")[0], plain) and reference.n_hooks(made.hf) == 0


def test_gradients_pass_through_edits() -> None:
    """Steering while tuning: the loss reaches a vector that is added at any site."""
    for family in ("llama", "granite", "falcon", "opt"):
        made = HooksEngine(tiny_hf(family))
        for site in made.sites:
            v = torch.zeros(32, requires_grad=True)
            with made.editing({(site, 0): adding(v, 1.0)}):
                made.hf(input_ids=IDS, use_cache=False).logits.square().sum().backward()
            assert v.grad is not None and bool(v.grad.any()), (family, site)


def test_the_two_edits() -> None:
    torch.manual_seed(0)
    h, v = torch.randn(2, 5, 8, dtype=torch.bfloat16), torch.nn.functional.normalize(torch.randn(8), dim=0)
    assert torch.equal(adding(v, 3.0)(h), h + (3 * v).bfloat16())
    left = removing(v[None])(h)
    assert left.dtype == h.dtype and (left.float() @ v).abs().max() < 0.02 < (h.float() @ v).abs().max()
    assert torch.allclose(removing(v[None])(h.float()), h.float() @ (torch.eye(8) - torch.outer(v, v)), atol=1e-6)
