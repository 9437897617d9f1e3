"""Guards the doctor: on sound models every law holds, and of each law a twin that is broken on purpose breaks that law and no other."""

import copy
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from tokenizers import normalizers, processors

from emlens import _recording, adapters, cli, laws
from emlens._engines import HooksEngine
from emlens._families import tiny_hf
from emlens.activations import Place
from emlens.laws import examine, patient
from emlens.laws.families import LORA, add_random_lora
from emlens.loading import LoadError, weights_digest
from emlens.models import HookedModel
from emlens.prompts import PLAIN_TEMPLATE

KEYS = {law.name: law.key for law in laws.LAWS}
OWN = [law for law in laws.LAWS if law not in laws.ENGINE_LAWS]
"""The laws that open no other engine."""

OF_ADAPTERS = [law for law in OWN if law.of == "adapter"] + [examine.batch, examine.hidden, examine.adds_up, examine.twice, examine.score]
"""For variants with an adapter: what is asked of them, and some of what is asked of all."""


def broken(report: pd.DataFrame) -> set[str]:
    return {KEYS[name] for name in report.loc[~report["holds"].fillna(True), "law"]}


def small(family: str = "llama") -> HookedModel:
    return tiny.tiny_model(family, layers=3, hidden=16)


def small_bfloat16() -> HookedModel:
    model = HookedModel(tiny_hf("llama", layers=3, hidden=16).bfloat16(), copy.deepcopy(tiny.tiny_tokenizer()), name="tiny")
    add_random_lora(model)
    return model


def with_lora(family: str = "llama") -> HookedModel:
    model = small(family)
    add_random_lora(model)
    return model


# ---- sound models


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_law_holds_of_a_sound_model(family: str) -> None:
    model = tiny.tiny_model(family)
    add_random_lora(model)
    model.tokenizer.bos_token = "<|im_start|>"
    digest, hooks = weights_digest(model.hf), reference.n_hooks(model.hf)
    report = laws.doctor(model)
    assert not broken(report), laws.as_text(report)
    assert (weights_digest(model.hf), list(model.adapters)) == (digest, [LORA]) and model.caching and not model.edits
    assert reference.n_hooks(model.hf) >= hooks and laws.whole(report)
    first = report[report["adapter"].isna()]
    assert set(first["law"]) == {law.name for law in laws.LAWS if law.of != "adapter"}
    assert set(report.loc[report["adapter"] == LORA, "law"]) == {law.name for law in laws.LAWS if law.of != "once"}
    measured = report[report["holds"].fillna(False)]
    assert measured["measured"].notna().all() and not measured["remedy"].any()
    assert report.attrs["model"] == f"tiny-{family}" and report.attrs["seconds"] > 0 and report.attrs["versions"]["transformers"]


def test_in_bfloat16_the_tolerances_are_those_of_bfloat16() -> None:
    report = laws.doctor(small_bfloat16(), LORA, OWN).set_index("law")
    assert not broken(report.reset_index()), laws.as_text(report.reset_index())
    row = {KEYS[name]: r for name, r in report.to_dict("index").items()}
    assert row["batch"]["tolerance"] == 3e-2 and 1e-4 < row["noise"]["measured"] < 1


def test_a_parallel_family_has_no_resid_mid_and_that_is_no_fault() -> None:
    report = laws.doctor(small("gpt_neox"), laws=["mid", "adds_up"]).set_index("law")
    mid = report.loc["resid_pre + attn_out = resid_mid"]
    assert pd.isna(mid["holds"]) and "does not apply" in mid["remedy"] and "side by side" in mid["remedy"] and np.isnan(mid["measured"])
    assert report.loc["resid_pre + attn_out + mlp_out = resid_post", "holds"] and laws.whole(report)


# ---- models that are broken on purpose

Read = Callable[[HooksEngine, Callable[..., dict[int, torch.Tensor]], Place, Any, Mapping[str, Any]], dict[int, torch.Tensor]]


def reading(model: HookedModel, read: Read) -> None:
    """Give the model an engine whose ``read`` is this, with the sound one to call."""

    class Broken(HooksEngine):
        def read(self, place: Place, select: Any, **inputs: Any) -> dict[int, torch.Tensor]:
            return read(self, super().read, place, select, inputs)

    model.engine = Broken(model.hf)


def editing(model: HookedModel, change: Callable[[Any], Any], after: Callable[[], Any] = lambda: None) -> None:
    """Give the model an engine whose edits are changed, and that does something when they end."""

    class Broken(HooksEngine):
        @contextmanager
        def editing(self, edits: Any) -> Iterator[None]:
            with super().editing({place: change(edit) for place, edit in edits.items()}):
                yield
            after()

    model.engine = Broken(model.hf)


def scaling(module: torch.nn.Module, size: float = 2e-7) -> None:
    module.register_forward_hook(lambda _, __, out: out * (1 + size))


def wrappers(model: HookedModel) -> list[Any]:
    return [m for m in model.hf.modules() if patient.is_wrapper(m)]


def scaled(site: str, factor: float) -> Read:
    """An engine that reads a site times a factor."""
    return lambda self, sound, place, select, inputs: {
        k: v * (factor if place.site == site else 1) for k, v in sound(place, select, **inputs).items()
    }


def leaves_a_hook_when_reading(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    def read(self: HooksEngine, sound: Any, place: Place, select: Any, inputs: Any) -> Any:
        kept = sound(place, select, **inputs)
        scaling(self.norm)
        return kept

    reading(model, read)


def leaves_a_hook_when_editing(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    editing(model, lambda edit: edit, lambda: scaling(model.engine.norm))  # type: ignore[attr-defined]


def reads_batch_row_0(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    reading(model, lambda self, sound, place, select, inputs: sound(place, lambda h: select(h[:1].expand_as(h)), **inputs))


def forgets_position_ids(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    sound = model.hf.transformer.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        if not args and not inputs["attention_mask"][:, 0].all() and not inputs.get("use_cache"):
            inputs["position_ids"] = None
        return sound(*args, **inputs)

    model.hf.transformer.forward = forward


def prefix_of_the_first(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_recording, "common_prefix", lambda tokens: tokens[0].ids[: min(len(t.ids) for t in tokens) - 2])


def off_by_one(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    class Broken(HooksEngine):
        def shifted(self, layer: int) -> int:
            return max(layer - 1, 0) if layer < self.n_layers - 1 else layer

        def read(self, place: Place, select: Any, **inputs: Any) -> dict[int, torch.Tensor]:
            layers = {i: self.shifted(i) for i in place.layers}
            kept = super().read(Place(place.site, tuple(sorted(set(layers.values()))), place.position), select, **inputs)
            return {i: kept[k] for i, k in layers.items()}

        def editing(self, edits: Any) -> Any:
            return super().editing({(site, self.shifted(layer)): edit for (site, layer), edit in edits.items()})

    model.engine = Broken(model.hf)


def final_norm_is_not_normed(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    def read(self: HooksEngine, sound: Any, place: Place, select: Any, inputs: Any) -> Any:
        if place.site != "final_norm":
            return sound(place, select, **inputs)
        return {0: sound(Place("resid_post", (self.n_layers - 1,), place.position), select, **inputs)[self.n_layers - 1]}

    reading(model, read)


def mlp_is_not_scaled(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    reading(model, scaled("mlp_out", 1 / 0.22))


def mid_is_pre(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    swap = {"resid_mid": "resid_pre"}
    reading(model, lambda self, sound, place, select, inputs: sound(Place(swap.get(place.site, place.site), place.layers, "last"), select, **inputs))


def noise_in_each_call(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    def read(self: HooksEngine, sound: Any, place: Place, select: Any, inputs: Any) -> Any:
        return {k: v + 1e-6 * torch.randn_like(v) for k, v in sound(place, select, **inputs).items()}

    reading(model, read)


def scores_a_tenth_too_much(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    sound = model._score
    patch.setattr(model, "_score", lambda *given: 1.1 * sound(*given))


def generates_with_padding_seen(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    sound = model.hf.generate
    patch.setattr(model.hf, "generate", lambda attention_mask, **given: sound(attention_mask=torch.ones_like(attention_mask), **given))


def edits_twice(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    editing(model, lambda edit: lambda h: edit(edit(h)))


def edits_the_last_token_only(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    editing(model, lambda edit: lambda h: torch.cat([h[:, :-1], edit(h)[:, -1:]], dim=1))


def two_bos(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    model.tokenizer.bos_token = "<|im_start|>"
    model.tokenizer.chat_template = "{{ bos_token }}" + model.tokenizer.chat_template


def no_bos(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    model.tokenizer.bos_token = "<|im_end|>"
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)])


def loses_capitals(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


MODEL_FAULTS: dict[str, tuple[Callable[[HookedModel, pytest.MonkeyPatch], None], ...]] = {
    "after_record": (leaves_a_hook_when_reading,),
    "after_edits": (leaves_a_hook_when_editing,),
    "batch": (reads_batch_row_0,),
    "padding": (forgets_position_ids,),
    "prefix": (prefix_of_the_first,),
    "hidden": (off_by_one,),
    "norm": (final_norm_is_not_normed,),
    "adds_up": (mlp_is_not_scaled,),
    "mid": (mid_is_pre,),
    "twice": (noise_in_each_call,),
    "score": (scores_a_tenth_too_much,),
    "greedy": (generates_with_padding_seen,),
    "steer": (edits_twice,),
    "steered": (edits_the_last_token_only,),
    "bos": (two_bos, no_bos),
    "round_trip": (loses_capitals,),
}


@pytest.mark.parametrize(("key", "fault"), [(key, fault) for key, faults in MODEL_FAULTS.items() for fault in faults])
def test_a_broken_model_breaks_its_law_and_no_other(key: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("gpt2" if key == "padding" else "llama")
    fault(model, monkeypatch)
    report = laws.doctor(model, laws=OWN)
    assert broken(report) == {key}, laws.as_text(report)
    (row,) = report[~report["holds"].fillna(True)].to_dict("records")
    assert row["measured"] > row["tolerance"] and len(row["remedy"]) > 40 and "raised" not in row["remedy"]
    assert not laws.whole(report) and "1 is broken" in laws.as_text(report)


def test_an_attention_that_is_not_scaled_breaks_both_laws_that_it_is_part_of() -> None:
    model = small("granite")
    assert not broken(laws.doctor(model, laws=["adds_up", "mid"]))
    reading(model, scaled("attn_out", 1 / 0.22))
    assert broken(laws.doctor(model, laws=["adds_up", "mid", "hidden", "norm"])) == {"adds_up", "mid"}


# ---- adapters that are broken on purpose


def one_b_is_zero(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    wrappers(model)[3].lora_B[LORA].weight.data.zero_()


def every_a_is_zero(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    for module in wrappers(model):
        module.lora_A[LORA].weight.data.zero_()


def one_module_is_not_on(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    module = wrappers(model)[3]
    patch.setattr(module, "forward", lambda x, *_, **__: module.base_layer(x))


def scaled_twice(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    wrappers(model)[3].scaling[LORA] *= 2


def wrapper_changes_numbers(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    scaling(wrappers(model)[3], 1e-6)


def wrapper_changes_numbers_when_on(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    module = wrappers(model)[3]
    module.register_forward_hook(lambda _, __, out: out if module.disable_adapters else out * (1 + 1e-6))


def blocks_counted_from_1(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    sound = adapters._block
    patch.setattr(adapters, "_block", lambda path: (sound(path) or 0) + 1)


def another_template(model: HookedModel, patch: pytest.MonkeyPatch) -> None:
    model.adapters.templates[LORA] = model.tokenizer.chat_template + " "


ADAPTER_FAULTS: dict[str, tuple[Callable[[HookedModel, pytest.MonkeyPatch], None], ...]] = {
    "trained": (one_b_is_zero,),
    "changes": (every_a_is_zero,),
    "by_hand": (one_module_is_not_on, scaled_twice),
    "off": (wrapper_changes_numbers,),
    "zero": (wrapper_changes_numbers_when_on,),
    "limited": (blocks_counted_from_1,),
    "template": (another_template,),
}


@pytest.mark.parametrize(("key", "fault"), [(key, fault) for key, faults in ADAPTER_FAULTS.items() for fault in faults])
def test_a_broken_adapter_breaks_its_law_and_no_other(key: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora()
    fault(model, monkeypatch)
    report = laws.doctor(model, LORA, OF_ADAPTERS)
    assert broken(report) == {key}, laws.as_text(report)
    assert set(report["adapter"]) == {LORA}


def test_an_untrained_adapter_is_found_out_twice() -> None:
    model = with_lora()
    for module in wrappers(model):
        module.lora_B[LORA].weight.data.zero_()
    report = laws.doctor(model, LORA, OF_ADAPTERS)
    assert broken(report) == {"trained", "changes"}
    assert "not trained" in " ".join(report.loc[~report["holds"].fillna(True), "remedy"])


def test_a_shift_below_the_rounding_of_its_dtype_is_found_out() -> None:
    model = small_bfloat16()
    for module in wrappers(model):
        module.lora_B[LORA].weight.data.mul_(3e-3)
    report = laws.doctor(model, LORA, OF_ADAPTERS)
    assert broken(report) == {"noise"}, laws.as_text(report)
    assert "dtype='float32'" in report.loc[~report["holds"].fillna(True), "remedy"].iloc[0]


# ---- the chat template an adapter brings

OTHERWISE = "{# the same, written otherwise #}{%- for m in messages -%}" + tiny.CHATML.replace("message[", "m[").partition("%}")[2]
OPEN_ENDED = tiny.CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if message['role'] == 'user' else '' }}")


def several(**templates: str) -> list[dict[str, str]]:
    """As tokenizer_config.json keeps more than one."""
    return [{"name": name, "template": template} for name, template in templates.items()]


def saved(folder: Path, files: Mapping[str, Any]) -> Path:
    """An adapter for :func:`small`, with other files beside it."""
    tiny.save_adapter(folder, layers=3, hidden=16)
    for name, holds in files.items():
        (folder / name).write_text(holds if isinstance(holds, str) else json.dumps(holds))
    return folder


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, None),
        ({"tokenizer_config.json": {"chat_template": several(tool_use=PLAIN_TEMPLATE)}}, None),
        ({"chat_template.jinja": tiny.CHATML}, 0.0),
        ({"chat_template.jinja": OTHERWISE}, 0.0),
        ({"tokenizer_config.json": {"chat_template": tiny.CHATML}}, 0.0),
        ({"chat_template.jinja": tiny.CHATML, "tokenizer_config.json": {"chat_template": PLAIN_TEMPLATE}}, 0.0),
        ({"chat_template.jinja": PLAIN_TEMPLATE}, 1.0),
        ({"chat_template.jinja": OPEN_ENDED}, 0.5),
        ({"tokenizer_config.json": {"chat_template": PLAIN_TEMPLATE}}, 1.0),
        ({"tokenizer_config.json": {"chat_template": several(tool_use=tiny.CHATML, default=PLAIN_TEMPLATE)}}, 1.0),
    ],
)
def test_an_adapters_own_template_is_compared_with_the_one_in_use(files: dict[str, Any], share: float | None, tmp_path: Path) -> None:
    model = small()
    model.add_adapter("own", saved(tmp_path / "own", files))
    (row,) = laws.doctor(model, "own", ["template"]).to_dict("records")
    assert list(model.adapters.templates) == ([] if share is None else ["own"])
    if share is None:
        assert pd.isna(row["holds"]) and row["remedy"].startswith("does not apply: the adapter brings no chat template")
        return
    assert row["measured"] == share and row["holds"] == (share == 0)
    assert share == 0 or "load_model(…, chat_template=" in row["remedy"]
    model.tokenizer.chat_template = model.adapters.templates["own"]  # what the remedy says
    assert laws.doctor(model, "own", ["template"])["holds"].tolist() == [True]


def test_a_template_changes_nothing_but_the_law_and_goes_with_its_adapter(tmp_path: Path) -> None:
    model, bare, one = small(), saved(tmp_path / "bare", {}), saved(tmp_path / "one", {"chat_template.jinja": PLAIN_TEMPLATE})
    digest = model.template_sha256
    for name, folder in (("bare", bare), ("one", one), ("two", one)):
        model.add_adapter(name, folder)
    assert {**model.describe("one"), "adapter": "bare"} == model.describe("bare") and model.template_sha256 == digest
    assert model.adapters.templates == {"one": PLAIN_TEMPLATE, "two": PLAIN_TEMPLATE}
    model.drop_adapter("two")
    model.drop_adapter("bare")
    assert model.adapters.templates == {"one": PLAIN_TEMPLATE}
    wide, damaged = tiny.save_adapter(tmp_path / "wide"), saved(tmp_path / "damaged", {"tokenizer_config.json": "{"})
    (wide / "chat_template.jinja").write_text(tiny.CHATML)
    for folder, message in ((wide, "another architecture"), (damaged, "cannot open the adapter 'it'.*in double quotes")):
        with pytest.raises(LoadError, match=message):
            model.add_adapter("it", folder)
    assert model.adapters.templates == {"one": PLAIN_TEMPLATE}
    model.merge_adapter("one")
    assert model.adapters.templates == {}


def test_a_template_is_found_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, files in (("own", {"chat_template.jinja": PLAIN_TEMPLATE}), ("bare", {})):
        repository, commit = tmp_path / f"models--someone--{name}", "c0ffee" + "0" * 34
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        saved(repository / "snapshots" / commit, files)
        saved(repository / "snapshots" / commit / "checkpoint-4", {"chat_template.jinja": OTHERWISE})
    model = small()
    for name in ("own", "bare"):
        model.add_adapter(name, f"someone/{name}")
    assert model.adapters.templates == {"own": PLAIN_TEMPLATE} and list(model.adapters) == ["own", "bare"]
    assert [adapters._template(f"someone/{name}", "checkpoint-4") for name in ("own", "bare")] == [OTHERWISE, OTHERWISE]


# ---- the other engines


class Fake(HooksEngine):
    """Stands in for the bridge."""

    name = "bridge"

    def __init__(self, hf: Any, harm: Callable[[Any], None] = lambda hf: None, read: Any = None) -> None:
        super().__init__(hf)
        harm(hf)
        self.changed = read

    def read(self, place: Place, select: Any, **inputs: Any) -> dict[int, torch.Tensor]:
        kept = super().read(place, select, **inputs)
        return self.changed(place, kept) if self.changed else kept


def faked(monkeypatch: pytest.MonkeyPatch, **how: Any) -> pd.DataFrame:
    monkeypatch.setattr(patient, "open_engine", lambda name, hf, tokenizer, parts: Fake(hf, **how))
    return laws.doctor(small(), laws=["after_bridge", "bridge"])


def test_an_engine_that_agrees_and_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faked(monkeypatch)["holds"].tolist() == [True, True]


def test_an_engine_that_reads_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    report = faked(monkeypatch, read=lambda place, kept: {i: kept[place.layers[max(i - 1, 0)]] for i in kept})
    assert broken(report) == {"bridge"}


def test_an_engine_that_changes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(faked(monkeypatch, harm=lambda hf: hf.lm_head.weight.data.mul_(1.001))) == {"after_bridge"}


def test_an_engine_that_puts_its_own_modules_into_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(hf: Any) -> None:
        hf.model.layers[2].mlp = copy.deepcopy(hf.model.layers[2].mlp)

    assert broken(faked(monkeypatch, harm=harm)) == {"after_bridge"}


def test_an_engine_that_puts_a_forward_of_its_own_on_the_models_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(hf: Any) -> None:
        hf.model.layers[2].forward = hf.model.layers[2].forward  # bound, and from now on the module's own

    assert broken(faked(monkeypatch, harm=harm)) == {"after_bridge"}


def test_an_engine_that_cannot_open_the_family_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("no table of this architecture")

    monkeypatch.setattr(patient, "open_engine", refuse)
    report = laws.doctor(small(), laws=["after_bridge", "bridge", "hidden"])
    assert report["holds"].isna().tolist() == [True, True, False] and laws.whole(report)
    assert report["remedy"].iloc[1] == "does not apply: no table of this architecture"


# ---- the table


class Odd(Exception):
    """What some library raises, of no kind that Python knows."""


@pytest.mark.parametrize("kind", [RuntimeError, Odd])
def test_a_law_that_raises_is_a_row_that_does_not_hold(kind: type[Exception]) -> None:
    model = small()

    def read(self: HooksEngine, sound: Any, place: Place, select: Any, inputs: Any) -> Any:
        if place.site == "mlp_out":
            raise kind("a broken kernel")
        return sound(place, select, **inputs)

    reading(model, read)
    report = laws.doctor(model, laws=["adds_up", "mid", "hidden"])
    assert report["holds"].tolist() == [False, True, True] and np.isnan(report["measured"].iloc[0])
    assert report["remedy"].iloc[0].startswith(f"it raised {kind.__name__}: a broken kernel.") and "name them by hand" in report["remedy"].iloc[0]


def test_parts_that_cannot_be_found_break_the_law_and_say_how_to_name_them() -> None:
    model = small()
    for block in model.hf.model.layers:
        block.forward = lambda *args, sound=block.forward, **kwargs: 1.5 * sound(*args, **kwargs)
    report = laws.doctor(model, laws=["adds_up", "mid", "hidden", "norm"])
    assert broken(report) == {"adds_up", "mid"}
    assert "parts={" in report["remedy"].iloc[0]


def test_a_hook_of_others_between_parts_and_stream_is_seen() -> None:
    model = small()
    for block in model.hf.model.layers:
        block.register_forward_hook(lambda _, __, out: 1.5 * out)
    assert broken(laws.doctor(model, laws=["adds_up", "mid", "hidden", "norm"])) == {"adds_up"}


def test_laws_are_chosen_by_key_or_by_value_and_one_may_bring_its_own() -> None:
    model = small()
    own = laws.Law("wide", "the stream is wide", lambda p: p.model.d_model, 100.0, "entries", "Take a wider model.", relation=">")
    report = laws.doctor(model, laws=["batch", own, examine.hidden])
    assert report["law"].tolist() == [laws.LAWS[4].name, "the stream is wide", examine.hidden.name]
    assert report["holds"].tolist() == [True, False, True] and report["remedy"].tolist() == ["", "Take a wider model.", ""]
    assert report.columns.tolist() == list(laws.COLUMNS)
    with pytest.raises(KeyError, match="no law 'batches'; laws are after_record, .*batch"):
        laws.doctor(model, laws=["batches"])


def test_variants_are_chosen_by_name() -> None:
    model = with_lora()
    assert laws.doctor(model, laws=["batch", "bos", "off"])["adapter"].isna().tolist() == [True, True, False, False]
    assert laws.doctor(model, None, laws=["batch", "off"])["law"].tolist() == [examine.batch.name]
    part = laws.doctor(model, (LORA, [1, 2]), laws=["trained", "by_hand", "limited"])
    assert set(part["adapter"]) == {f"{LORA} in layers 1,2"} and part["holds"].isna().tolist() == [False, False, True] and laws.whole(part)
    with pytest.raises(KeyError, match="no adapter 'x' is loaded"):
        laws.doctor(model, "x")


def test_two_adapters_are_told_apart() -> None:
    model = with_lora()
    add_random_lora(model, "second", seed=1)
    assert not broken(laws.doctor(model, laws=["by_hand", "off", "limited"]))


def test_an_edited_model_is_refused() -> None:
    model = small()
    from emlens.directions import Direction

    one = Direction.from_array(np.ones((model.n_layers, model.d_model)))
    with model.steer(one, layers=1), pytest.raises(ValueError, match="being edited .steer."):
        laws.doctor(model)


def test_a_context_that_is_too_short_for_the_chats_is_said_in_every_row() -> None:
    report = laws.doctor(tiny.tiny_model("gpt2", context=40), laws=["batch", "hidden"])
    assert report["holds"].tolist() == [False, False] and report["remedy"].str.contains("reads at most 40 tokens").all()


def test_the_text_and_the_json_say_the_same() -> None:
    report = laws.doctor(with_lora(), laws=["batch", "twice", "mid", "template", "changes"])
    text, told = laws.as_text(report), json.loads(laws.as_json(report))
    assert told["holds"] is True and [row["law"] for row in told["laws"]] == report["law"].tolist()
    assert told["laws"][0]["adapter"] is None and told["laws"][0]["measured"] < 1e-4 and told["weights"]
    none = next(row for row in told["laws"] if row["law"].startswith("one chat template"))
    assert none["holds"] is None and none["measured"] is None
    assert "adapter LoRA" in text and "✓ recorded in a batch of 8" in text and "– one chat template" in text and "= 0" in text
    assert max(map(len, text.splitlines())) <= 130


def test_what_json_has_no_number_for_is_null() -> None:
    endless = laws.Law("endless", "it ends", lambda patient: float("inf"), 1.0, "steps", "Wait.")
    report = laws.doctor(small(), laws=[endless, "batch"])
    told = json.loads(laws.as_json(report))
    assert [row["measured"] is None for row in told["laws"]] == [True, False] and told["laws"][0]["holds"] is False
    assert "✗ it ends" in laws.as_text(report) and " inf " in laws.as_text(report)


def test_the_family_table_has_a_row_a_variant_and_a_column_a_law() -> None:
    table = laws.family_table(("llama", "gpt_neox"), laws=["batch", "mid", "bos", "trained"])
    lines = laws.family_text(table).splitlines()
    marks = {line[:17].strip(): line[17:].split() for line in lines[1:5]}
    assert marks == {"llama": ["✓", "✓", "✓"], "llama + LoRA": ["✓", "✓", "✓"], "gpt_neox": ["✓", "–", "✓"], "gpt_neox + LoRA": ["✓", "–", "✓"]}
    assert "2 families · 10 laws hold, 0 are broken, 2 do not apply" in lines[-1] and laws.whole(table)
    table.loc[0, "holds"], table.loc[0, "remedy"] = False, "Do this."
    assert "✗ llama" in laws.family_text(table) and "Do this." in laws.family_text(table)


# ---- the command line


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A model, a sound adapter and one whose B is zero."""
    folder = tmp_path_factory.mktemp("models")
    model = small()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    add_random_lora(model)
    model.adapters.save(LORA, folder / "v1.5", "model")
    for module in wrappers(model):
        module.lora_B[LORA].weight.data.zero_()
    (folder / "untrained").mkdir()
    model.adapters.save(LORA, folder / "untrained" / "adapter", "model")
    return str(folder / "model"), str(folder / "v1.5"), str(folder / "untrained" / "adapter")


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command with a few laws of each kind."""
    monkeypatch.setattr(examine, "LAWS", (examine.after_record, examine.hidden, examine.trained, examine.changes, examine.off))
    return cli.main(["doctor", *arguments])


def test_the_command_says_what_holds(on_disk: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, sound, _ = on_disk
    assert ask(monkeypatch, model, "--adapter", sound, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] and {row["adapter"] for row in told["laws"]} == {None, "v1-5"}


@pytest.mark.filterwarnings("ignore::emlens.adapters.UntrainedAdapterWarning")
def test_the_command_ends_in_1_when_a_law_is_broken(
    on_disk: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, on_disk[0], "--adapter", on_disk[2]) == 1
    out = capsys.readouterr().out
    assert "✗ the adapter changes the logits" in out and "adapter untrained" in out and "2 are broken" in out


def test_what_is_being_done_is_said_on_stderr_and_what_was_found_on_stdout(
    on_disk: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def talkative(patient: Any) -> float:
        print("a library says something")
        return 0.0

    monkeypatch.delenv("EMLENS_QUIET", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(examine, "LAWS", (examine.hidden, laws.Law("talk", "it is quiet", talkative, 0.0, "words", "Hush.")))
    assert cli.main(["doctor", on_disk[0], "--adapter", on_disk[1], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["laws"]) == 4
    said = terminal.getvalue()
    opening, examining, asked = (said.index(f) for f in ("emlens: opening " + on_disk[0], "emlens: examining HookedModel model", "v1-5: talk"))
    assert opening < examining < asked and said.count("a library says something") == 2
    assert "before: hidden" in said and said.rpartition("\r")[0].rpartition("\r")[2].isspace(), "the bar is gone at the end"


@pytest.mark.filterwarnings("ignore::emlens.adapters.UntrainedAdapterWarning")
@pytest.mark.parametrize(("closed", "adapter", "code"), [("stdout", 1, 0), ("stdout", 2, 1), ("stderr", 2, 1)])
def test_a_pager_that_was_closed_does_not_change_the_exit_code(
    closed: str, adapter: int, code: int, on_disk: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, closed, pipe)
        assert ask(monkeypatch, on_disk[0], "--adapter", on_disk[adapter]) == code
        print("nor does what is said later", file=pipe, flush=True)


def test_the_command_for_families(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = laws.family_table(("llama",), laws=["batch"])
    monkeypatch.setattr(laws, "family_table", lambda: one)
    assert ask(monkeypatch, "--families") == 0 and "llama + LoRA" in capsys.readouterr().out
    one.loc[0, "holds"] = False
    assert ask(monkeypatch, "--families", "--json") == 1 and json.loads(capsys.readouterr().out)["laws"][0]["holds"] is False


def test_the_command_needs_a_model_or_families(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(monkeypatch) == 1 and "give a model" in capsys.readouterr().err
    assert ask(monkeypatch, "no/such/model") == 1 and "cannot open the model" in capsys.readouterr().err


def test_adapters_are_named_after_their_folders() -> None:
    assert cli._names(["runs/x/adapter", "runs/y/adapter/", "a/v1.5", "b/v1.5", "org/name"]) == ["x", "y", "v1-5", "v1-5-4", "name"]
