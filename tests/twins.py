"""For the tests of the engines that work on a twin: models with adapters, prompts, what must stay as it was, and the laws both engines keep."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from tiny import VOCAB, tiny_hf
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers import logging as transformers_logging

from emlens.activations import Place
from emlens.adapters import Adapters, switched

GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
SITES = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm")
ADAPTERS = (None, "one", "two", ("one", (1, 2)))


def adapted(family: str = "llama", names: tuple[str, ...] = ("one", "two"), seed: int = 0) -> tuple[PreTrainedModel, Adapters]:
    """A tiny model with adapters on all its linear layers that change a lot."""
    hf = tiny_hf(family, seed).requires_grad_(False)
    adapters = Adapters(hf)
    for rank, name in enumerate(names, start=2):
        grow(hf, adapters, name, rank)
    return hf, adapters


def grow(hf: PreTrainedModel, adapters: Adapters, name: str, rank: int = 2, dora: bool = False) -> None:
    """One more adapter, as if it had been trained."""
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        turned = hf.config.model_type == "gpt2"
        adapters.new(name, LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", use_dora=dora, fan_in_fan_out=turned))
        for path, parameter in hf.named_parameters():
            if "lora_B" in path and path.endswith(f"{name}.weight"):
                parameter.data.normal_(std=0.3)
    hf.requires_grad_(False)


def batch() -> dict[str, Tensor]:
    """Two prompts of 24 and 17 tokens (longer than the tiny sliding windows), padded on the right."""
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    return {"input_ids": ids * mask + 2 * (1 - mask), "attention_mask": mask}


def left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts, padded on the left."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(7), mask[1].roll(7)
    return {"input_ids": ids, "attention_mask": mask}


def real(inputs: dict[str, Tensor]) -> Any:
    """Selects the tokens that are not padding: ``[token, d_model]``."""
    mask = inputs["attention_mask"].bool()
    return lambda stream: stream[mask]


def everywhere(site: str, n_layers: int = 4) -> Place:
    return Place(site, (0,) if site in ("embed", "final_norm") else tuple(range(n_layers)), "all")


@torch.no_grad()
def logits(hf: Any, inputs: dict[str, Tensor]) -> Tensor:
    """At the tokens that are not padding: ``[token, vocabulary]``."""
    return hf(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of any vector along the last axis."""
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().detach())


def moved(stream: Tensor) -> Tensor:
    """An edit that changes every token, in size and in direction."""
    return 1.1 * stream + torch.linspace(-1, 1, stream.shape[-1], dtype=stream.dtype)


def bits(tensor: Tensor) -> int:
    return hash(tensor.detach().numpy().tobytes())


def state(hf: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Everything of a model that opening something on it could change, and what it could change of the process."""
    modules = {
        path: (id(m), type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for path, m in hf.named_modules()
    }
    return {
        "modules": modules,
        "weights": {path: (id(p), p.data_ptr(), bits(p), p.requires_grad) for path, p in hf.named_parameters()},
        "buffers": {path: (id(b), b.data_ptr(), bits(b)) for path, b in hf.named_buffers()},
        "config": (hf.config.to_json_string(), hf.config._attn_implementation, hf.generation_config.to_json_string()),
        "tokenizer": (repr(tokenizer), repr(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.bos_token, sorted(vars(tokenizer))),
        "random": torch.get_rng_state().tolist(),
        "process": (transformers_logging.get_verbosity(), torch.is_grad_enabled(), torch.get_default_dtype()),
    }


# ---- laws of every engine on a twin


def edits_are_those_of_the_hooks(made: Any, hooks: Any, tolerance: float) -> None:
    """At every site an edit changes logits and streams as the hooks engine's does, and nothing is left of it."""
    inputs, plain = batch(), logits(made.hf, batch())
    with switched(made.original, None):
        for site in made.sites:
            edits = {(site, 0 if site in ("embed", "final_norm") else 2): moved}
            with made.editing(edits), hooks.editing(edits):
                assert relative(logits(made.hf, inputs), found := logits(made.original, inputs)) < tolerance, site
                assert relative(found, plain) > 0.01, site
                ours, theirs = (one.read(everywhere(site), real(inputs), **inputs) for one in (made, hooks))
                assert max(relative(ours[layer], theirs[layer]) for layer in theirs) < tolerance, site
            assert torch.equal(logits(made.hf, inputs), plain)


def generation_is_edited_with_and_without_a_cache(made: Any, hooks: Any) -> None:
    """Greedy text of an edited, adapted, left-padded batch is the hooks engine's, cached or not, and not the plain one."""
    inputs, edits = left(batch()), {("resid_post", 1): moved}
    bare = copy.deepcopy(GREEDY)
    bare.use_cache = False
    with switched(made.hf, "one"), switched(made.original, "one"):
        assert torch.equal(made.hf.generate(**inputs, generation_config=GREEDY), plain := made.original.generate(**inputs, generation_config=GREEDY))
        with made.editing(edits), hooks.editing(edits):
            ours = made.hf.generate(**inputs, generation_config=GREEDY)
            assert torch.equal(ours, made.original.generate(**inputs, generation_config=GREEDY))
            assert torch.equal(ours, made.hf.generate(**inputs, generation_config=bare))
    assert not torch.equal(ours, plain)


def a_shared_prefix_is_no_prefix(made: Any, tolerance: float) -> None:
    """The stream after a prefix whose keys and values are given is that of the whole sequence."""
    ids = batch()["input_ids"][:1]
    kept, ones, place = DynamicCache(config=made.hf.config), torch.ones_like(ids), everywhere("resid_post")
    made.read(place, lambda h: h[:, -1], input_ids=ids[:, :20], attention_mask=ones[:, :20], past_key_values=kept, use_cache=True)
    rest = made.read(place, lambda h: h[:, -1], input_ids=ids[:, 20:], attention_mask=ones, past_key_values=kept, use_cache=True)
    whole = made.read(place, lambda h: h[:, -1], input_ids=ids, attention_mask=ones)
    assert max(relative(rest[layer], whole[layer]) for layer in whole) < tolerance
