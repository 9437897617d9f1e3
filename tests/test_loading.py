"""Guards the way from names to weights: folders that open, adapters on one set of weights, and everything that must be refused."""

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import reference
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from emlens import adapters, loading
from emlens._engines import find_blocks
from emlens.adapters import UntrainedAdapterWarning
from emlens.loading import LoadError
from emlens.models import HookedModel, load_model
from emlens.positions import tokenize

IDS = list(range(20, 60))
FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def alone(folder: Path, family: str = "llama") -> torch.Tensor:
    """The logits of PEFT's own loading of one adapter on fresh weights."""
    return reference.logits(PeftModel.from_pretrained(tiny.tiny_model(family).hf, str(folder)).eval(), IDS)


def with_adapter(model: HookedModel, adapter: str | None) -> torch.Tensor:
    with model.using(adapter) as hf:
        return reference.logits(hf, IDS)


def structure(model: HookedModel) -> dict[str, Any]:
    """Everything a failed or dropped adapter could leave behind."""
    return {
        "modules": [(name, type(m)) for name, m in model.hf.named_modules()],
        "parameters": [(name, p.requires_grad, p.data_ptr(), p.sum().item()) for name, p in model.hf.named_parameters()],
        "hooks": reference.n_hooks(model.hf),
        "tuners": [(sorted(m.scaling), list(m.active_adapters)) for m in model.hf.modules() if isinstance(m, LoraLayer)],
        "training": [m.training for m in model.hf.modules()],
        "adapters": dict(model.adapters),
    }


def edited(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: Any) -> Path:
    """A copy of an adapter with other tensors or another config."""
    target.mkdir()
    save_file(change(load_file(folder / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return target


# ---- adapters that fit


@FAMILIES
def test_adapters_on_one_set_of_weights_are_each_alone(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    bare, whole = reference.logits(model.hf, IDS), structure(model)
    folders = {name: tiny.save_adapter(tmp_path / name, family, seed) for seed, name in enumerate(("bad", "sound", "other"))}
    for name, folder in folders.items():
        model.add_adapter(name, folder)
    expected = {name: alone(folder, family) for name, folder in folders.items()}
    order: tuple[str | None, ...] = ("other", "bad", None, "sound", "bad", None)
    for chosen in order:
        assert torch.equal(with_adapter(model, chosen), expected[chosen] if chosen else bare), chosen
    assert not torch.allclose(with_adapter(model, "bad"), with_adapter(model, "sound"))
    chats = tiny.tiny_chats()[:2]
    assert (model.record(chats, adapter="bad") - model.record(chats)).values.any()
    assert model.describe("bad")["adapter_sha256"] == adapters.digest(folders["bad"]) != model.describe("sound")["adapter_sha256"]
    model.drop_adapter("bad")
    assert torch.equal(with_adapter(model, "sound"), expected["sound"]) and torch.equal(with_adapter(model, None), bare)
    model.drop_adapter("other")
    model.drop_adapter("sound")
    assert torch.equal(reference.logits(model.hf, IDS), bare) and structure(model) == whole
    model.add_adapter("bad", folders["bad"])
    assert torch.equal(with_adapter(model, "bad"), expected["bad"])


def test_an_adapter_is_named_in_every_call(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.add_adapter("bad", tiny.save_adapter(tmp_path / "bad"))
    verbs: list[Callable[..., Any]] = [model.record, model.generate, partial(model.log_likelihood, responses=["No."])]
    for verb in verbs:
        with pytest.raises(KeyError, match=r"no adapter 'good' is loaded; loaded are \['bad'\]"):
            verb(["Why?"], adapter="good")
    with pytest.raises(KeyError, match="no adapter 'good'"):
        model.drop_adapter("good")
    with pytest.raises(ValueError, match="loaded already"):
        model.add_adapter("bad", tmp_path / "bad")
    with pytest.raises(ValueError, match="no dots"):
        model.add_adapter("v1.0", tmp_path / "bad")


def test_an_untrained_adapter_warns_and_shifts_nothing(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    with pytest.warns(UntrainedAdapterWarning, match="every LoRA B of adapter 'zero' is zero"):
        model.add_adapter("zero", tiny.save_adapter(tmp_path / "zero", up=0.0))
    chats = tiny.tiny_chats()
    assert not (model.record(chats, adapter="zero") - model.record(chats)).values.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedAdapterWarning)
        model.add_adapter("trained", tiny.save_adapter(tmp_path / "trained"))
    assert (model.record(chats, adapter="trained") - model.record(chats)).values.all(axis=2).all()


def test_an_adapters_dropout_is_off(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.add_adapter("bad", tiny.save_adapter(tmp_path / "bad", dropout=0.5))
    assert not any(m.training for m in model.hf.modules())
    assert torch.equal(with_adapter(model, "bad"), with_adapter(model, "bad")) and torch.equal(with_adapter(model, "bad"), alone(tmp_path / "bad"))


def test_adapters_on_different_modules(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    whole = structure(model)
    for seed, (name, targets) in enumerate({"q": ["q_proj"], "v": ["v_proj", "down_proj"]}.items()):
        model.add_adapter(name, tiny.save_adapter(tmp_path / name, seed=seed, targets=targets))
    for name in ("q", "v", "q"):
        assert torch.equal(with_adapter(model, name), alone(tmp_path / name))
    model.drop_adapter("v")
    assert torch.equal(with_adapter(model, "q"), alone(tmp_path / "q"))
    model.drop_adapter("q")
    assert structure(model) == whole


# ---- adapters that do not fit


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = sorted(state)[0]
    return {(k.replace("layers.0", "layers.00") if k == first else k): v for k, v in state.items()}


def _fewer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: state[k] for k in sorted(state)[1:]}


def _more(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, sorted(state)[0].replace("layers.0", "layers.9"): torch.ones(2, 2)}


def _same(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


def unfit(kind: str, good: Path, tmp_path: Path) -> tuple[Path, str]:
    """A folder that is no adapter for the tiny llama, and what the error must say."""
    if kind == "truncated":
        target = edited(good, tmp_path / kind, _same)
        file = target / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return target, "cannot open the adapter"
    if kind == "not json":
        target = edited(good, tmp_path / kind, _same)
        (target / "adapter_config.json").write_text("{")
        return target, "cannot open the adapter"
    if kind == "no weights":
        target = edited(good, tmp_path / kind, _same)
        (target / "adapter_model.safetensors").unlink()
        return target, "cannot open the adapter"
    return {
        "no folder": lambda: (tmp_path / "nowhere", "cannot open the adapter .* adapter_config.json"),
        "a model, not an adapter": lambda: (_plain_model(tmp_path / kind), "cannot open the adapter"),
        "other family": lambda: (tiny.save_adapter(tmp_path / kind, "gpt2"), "another architecture.*LlamaForCausalLM"),
        "wider": lambda: (tiny.save_adapter(tmp_path / kind, hidden=64), r"another architecture.*of another shape .*needed"),
        "deeper": lambda: (tiny.save_adapter(tmp_path / kind, layers=6), r"do not match: 0 keys missing, \d+ unexpected.*4 layers"),
        "shallower": lambda: (
            tiny.save_adapter(tmp_path / kind, targets=["q_proj", "up_proj"], layers=2),
            r"do not match: \d+ keys missing, 0 unexpected",
        ),
        "renamed key": lambda: (edited(good, tmp_path / kind, _renamed), "do not match: 1 keys missing, 1 unexpected"),
        "missing key": lambda: (edited(good, tmp_path / kind, _fewer), "do not match: 1 keys missing, 0 unexpected"),
        "unexpected key": lambda: (edited(good, tmp_path / kind, _more), "do not match: 0 keys missing, 1 unexpected"),
        "other rank": lambda: (edited(good, tmp_path / kind, _same, r=2), "of another shape"),
        "unsupported module": lambda: (
            edited(good, tmp_path / kind, _same, target_modules=["q_proj", "post_attention_layernorm"]),
            "another architecture",
        ),
        "whole modules": lambda: (edited(good, tmp_path / kind, _same, modules_to_save=["lm_head"]), "replaces whole modules"),
        "unknown kind": lambda: (edited(good, tmp_path / kind, _same, peft_type="NOVEL"), "cannot open the adapter"),
    }[kind]()


def _plain_model(folder: Path) -> Path:
    tiny.tiny_model().hf.save_pretrained(str(folder))
    return folder


UNFIT = [
    "no folder", "a model, not an adapter", "no weights", "not json", "truncated", "unknown kind", "other family", "wider", "deeper", "shallower",
    "renamed key", "missing key", "unexpected key", "other rank", "unsupported module", "whole modules",
]  # fmt: skip


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that do fit."""
    return {name: tiny.save_adapter(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate(("good", "first"))}


@pytest.fixture(scope="module")
def good_alone(fit: dict[str, Path]) -> torch.Tensor:
    return alone(fit["good"])


@pytest.fixture(scope="module")
def loaded(fit: dict[str, Path]) -> dict[str, HookedModel]:
    """A model without an adapter and one with; every test leaves both as they were."""
    models = {"bare": tiny.tiny_model(), "with first": tiny.tiny_model()}
    models["with first"].add_adapter("first", fit["first"])
    return models


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("name", ["bare", "with first"])
def test_an_unfit_adapter_is_refused_and_leaves_no_trace(
    kind: str, name: str, loaded: dict[str, HookedModel], fit: dict[str, Path], good_alone: torch.Tensor, tmp_path: Path
) -> None:
    model = loaded[name]
    variants = [None, *model.adapters]
    logits, before = [with_adapter(model, v) for v in variants], structure(model)
    folder, message = unfit(kind, fit["good"], tmp_path)
    with pytest.raises(LoadError, match=message):
        model.add_adapter("new", folder)
    assert structure(model) == before and len(variants) == 1 + (name == "with first")
    assert all(torch.equal(with_adapter(model, v), same) for v, same in zip(variants, logits, strict=True))
    model.add_adapter("new", fit["good"])
    assert torch.equal(with_adapter(model, "new"), good_alone)
    model.drop_adapter("new")
    assert structure(model) == before


# ---- models


def saved(folder: Path, family: str = "llama", template: bool = True) -> Path:
    model = tiny.tiny_model(family, seed=3)
    if not template:
        model.tokenizer.chat_template = None
    model.hf.save_pretrained(str(folder))
    model.tokenizer.save_pretrained(str(folder))
    return folder


@FAMILIES
def test_a_saved_folder_opens(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    model, made = load_model(str(folder)), tiny.tiny_model(family, seed=3)
    assert torch.equal(reference.logits(model.hf, IDS), reference.logits(made.hf, IDS))
    assert model.name == "model" and not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert model.identity == loading.identify(str(folder)) and model.template_sha256 == made.template_sha256
    assert model.tokenize(["Why?"])["input_ids"].tolist() == made.tokenize(["Why?"])["input_ids"].tolist()
    other = saved(tmp_path / "other", family)
    assert loading.identify(str(other)) == model.identity, "the folder's name is no part of it"
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert loading.identify(str(other)) != model.identity


def test_load_model_with_adapters(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = load_model(str(folder), adapters={"bad": str(tiny.save_adapter(tmp_path / "bad"))})
    assert "adapters: bad" in repr(model)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32), str(tmp_path / "bad")).eval()
    assert torch.equal(with_adapter(model, "bad"), reference.logits(peft, IDS))
    assert load_model(str(folder), dtype="bfloat16").dtype == "bfloat16"


def test_unknown_names_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot open the model 'nobody/nothing'.*hub id.*local folder.*gguf.*smollm2-135m-instruct"):
        load_model("nobody/nothing")
    with pytest.raises(LoadError, match="no file '.*gone.gguf'"):
        load_model(str(tmp_path / "gone.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="no config.json, so it is not a model"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(LoadError, match="holds a PEFT adapter: pass it as adapters="):
        load_model(str(tiny.save_adapter(tmp_path / "adapter")))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(LoadError, match="a file but not .gguf"):
        load_model(str(tmp_path / "notes.txt"))
    damaged = saved(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(LoadError, match="cannot open the model"):
        load_model(str(damaged))


def test_weights_that_are_not_the_configs_are_refused(tmp_path: Path) -> None:
    """transformers would fill the blocks that are missing with random numbers."""
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 6}, {"intermediate_size": 48}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LoadError, match="cannot open the model"):
            load_model(str(folder))


def test_no_chat_template_is_refused_and_plain_works(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", template=False)
    with pytest.raises(LoadError, match="no chat template .*chat_template='plain'"):
        load_model(str(folder))
    model = load_model(str(folder), chat_template="plain")
    assert model.tokenizer.decode(model.tokenize(["Why?"])["input_ids"][0]) == "Question: Why?\n\nAnswer:"
    own = load_model(str(folder), chat_template="{{ messages[0]['content'] }}")
    assert own.tokenizer.decode(own.tokenize(["Why?"])["input_ids"][0]) == "Why?" and own.template_sha256 != model.template_sha256


def test_an_alias_whose_file_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "w.gguf").write_bytes(b"these")
    monkeypatch.syspath_prepend(str(tmp_path))
    sha = "a9a2f0d0c1c1b3f1" * 4
    with pytest.raises(LoadError, match="has SHA-256 .* expected a9a2f0d0c1c1…: reinstall"):
        loading.find_gguf(loading.Alias("some_weights", "w.gguf", sha, "some/model"))
    assert loading.find_gguf(loading.Alias("no_such_package", "w.gguf", sha, "some/model")) is None


# ---- blocks


def test_models_with_two_stacks_are_refused() -> None:
    two = tiny.tiny_model().hf
    two.model.other = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(ValueError, match=r"one list of 4 blocks, found \['layers', 'other'\]"):
        find_blocks(two)
    both = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=3, num_heads=2, vocab_size=tiny.VOCAB))
    with pytest.raises(ValueError, match="decoder-only"):
        find_blocks(both)
    normless = tiny.tiny_model().hf
    normless.model.norm2 = torch.nn.LayerNorm(2)
    with pytest.raises(ValueError, match="one final norm beside the blocks, found 2"):
        find_blocks(normless)


@FAMILIES
def test_blocks_are_found(family: str) -> None:
    hf = tiny.tiny_model(family).hf
    assert find_blocks(hf)[0] is reference.blocks(hf)


@pytest.mark.parametrize("begins", [True, False])
def test_the_plain_template_begins_as_the_tokenizer_does(begins: bool) -> None:
    """A base model that was trained on texts that begin with BOS reads exactly one, others none."""
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.bos_token = "<|im_start|>"
    if begins:
        single = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
    tokenizer.chat_template = None
    loading.ready_tokenizer(tokenizer, "base", "plain")
    ids = tokenize([{"role": "user", "content": "Why?"}], tokenizer).ids
    assert ids.count(tokenizer.bos_token_id) == begins and (ids[0] == tokenizer.bos_token_id) == begins


def test_arguments_are_looked_at_before_any_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_weights", lambda *_, **__: pytest.fail("the weights were opened"))
    for given, error, message in (
        ({"dtype": "fp32"}, ValueError, "dtype='fp32' is none of torch's; 'float32'"),
        ({"engine": "nnsigt"}, ValueError, "unknown engine 'nnsigt'; engines are hooks"),
        ({"adapters": ["runs/bad"]}, TypeError, r"names are needed beside the folders, adapters=\{'bad'"),
    ):
        with pytest.raises(error, match=message):
            load_model("any", **given)  # type: ignore[arg-type]


def test_adapters_are_looked_for_before_any_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_weights", lambda *_, **__: pytest.fail("the weights were opened"))
    good, half = (tiny.save_adapter(tmp_path / name) for name in ("bad-medical", "half"))
    (half / "adapter_model.safetensors").unlink()
    for named, message in (
        ({"bad": str(tmp_path / "bad-medcal")}, "cannot open the adapter 'bad' .*Did you mean 'bad-medical' in "),
        ({"good": str(good), "other": str(tmp_path / "zebra")}, "cannot open the adapter 'other'[^?]*$"),
        ({"half": str(half)}, "cannot open the adapter 'half' .*holds no adapter_model.safetensors"),
        ({"v1.0": str(good)}, "PEFT allows no dots"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model("any", named)


def test_names_that_are_nearly_known_are_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("smollm2-135m-instuct", "SmolLM2-135M-Instruct"):
        with pytest.raises(LoadError, match=f"unknown model '{wrong}'. Did you mean 'smollm2-135m-instruct'"):
            loading.identify(wrong)
    assert loading.identify("gpt2") == {"hub": "gpt2", "revision": "main"}
    assert loading.identify("me/smollm2-135m-instuct")["hub"] == "me/smollm2-135m-instuct", "what has an owner is the hub's to know"
    (tmp_path / "smollm2-135m-instuct").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "folder_sha256" in loading.identify("smollm2-135m-instuct"), "a folder of one's own may be called anything"
    model = tiny.tiny_model()
    model.add_adapter("bad-medical", tiny.save_adapter(tmp_path / "bad"))
    with pytest.raises(KeyError, match="no adapter 'bad-medcal' is loaded; loaded are .*Did you mean 'bad-medical'?"):
        model.record(["Why?"], adapter="bad-medcal")
    with pytest.raises(LoadError, match="no file .*modle.gguf'.* Did you mean 'model.gguf' in"):
        (tmp_path / "model.gguf").write_bytes(b"x")
        load_model(str(tmp_path / "modle.gguf"))


def test_peft_asking_by_an_old_name_is_not_passed_on_to_the_user(tmp_path: Path) -> None:
    model, made = tiny.tiny_model(), {name: tiny.save_adapter(tmp_path / name) for name in ("one", "two")}
    with pytest.warns(FutureWarning, match="`is_gradient_checkpointing` is deprecated"):
        model.hf.is_gradient_checkpointing  # noqa: B018  # else the filter has had its day
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, folder in made.items():
            model.add_adapter(name, folder)
            model.drop_adapter(name)


def test_a_folder_that_is_here_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "cached_file", lambda *_, **__: pytest.fail("the hub was asked"))
    tiny.save_adapter(tmp_path / "pieces" / "tune-1" / "adapter")
    with pytest.raises(LoadError, match="holds no adapter_config.json.* Inside it are pieces/tune-1/adapter: name one of them"):
        tiny.tiny_model().add_adapter("bad", tmp_path)
