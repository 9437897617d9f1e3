"""Guards nnsight's traces, here and as they would be sent: the hooks' numbers to the bit, and the model as it was."""

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import twins
from nnsight import CONFIG, NNsight
from tiny import tiny_hf, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from twins import ADAPTERS, GREEDY, SITES, adapted, batch, everywhere, grow, left, logits, moved, real, relative, state

from emlens import laws
from emlens._engines import HooksEngine, adding, removing, traces
from emlens._engines.base import apply_edits, keeping
from emlens._engines.remote import RemoteEngine
from emlens._engines.traces import NnsightEngine, open_nnsight, pass_by
from emlens._passes import every_row, mean_row
from emlens.activations import Place
from emlens.adapters import switched
from emlens.models import load_model

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_neox", "granite", "qwen3_moe")
EACH = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 3e-6
"""Relative, of any one vector, in float32: where an edit is added to what a part adds, the order of summation is another than the hooks'."""


@cache
def opened(family: str) -> tuple[NnsightEngine, HooksEngine]:
    """nnsight and the hooks on one model with two adapters; every test leaves both as they were."""
    hf, _ = adapted(family)
    return NnsightEngine(hf), HooksEngine(hf)


# ---- the same numbers


@EACH
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_what_is_read_is_what_the_hooks_read_to_the_bit(family: str, adapter: Any) -> None:
    made, hooks = opened(family)
    inputs = batch()
    with switched(made.hf, adapter), switched(made.original, adapter):
        assert torch.equal(logits(made.hf, inputs), logits(made.original, inputs))
        for site in made.sites:
            ours, theirs = (one.read(everywhere(site), real(inputs), **inputs) for one in (made, hooks))
            assert list(ours) == list(theirs) and all(torch.equal(ours[layer], theirs[layer]) for layer in theirs), site


def test_places_are_bare_transformers_places() -> None:
    for family in ("llama", "gemma3_text", "granite"):
        made, ids = opened(family)[0], batch()["input_ids"][:1]
        with switched(made.original, None):
            bare = reference.block_streams(made.original, ids[0].tolist())
        for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
            read = made.read(everywhere(site), lambda h: h[0], input_ids=ids, attention_mask=torch.ones_like(ids))
            assert max(relative(read[layer], bare[layer][site]) for layer in range(4)) < TOLERANCE


def test_sites_are_those_of_the_family() -> None:
    made = opened("gpt_neox")[0]
    assert set(made.sites) == set(SITES) - {"resid_mid"} and set(opened("llama")[0].sites) == set(SITES)
    with pytest.raises(ValueError, match="no resid_mid in block 0.*side by side"):
        made.read(everywhere("resid_mid"), real(batch()), **batch())
    for place in (("resid_past", 0), ("resid_post", 4), ("embed", 1)):
        with pytest.raises(ValueError, match="unknown site|has the layers"), made.editing({place: moved}):
            pass


def test_a_shared_prefix_is_no_prefix() -> None:
    twins.a_shared_prefix_is_no_prefix(opened("llama")[0], TOLERANCE)


# ---- edits


@EACH
def test_edits_are_those_of_the_hooks(family: str) -> None:
    twins.edits_are_those_of_the_hooks(*opened(family), TOLERANCE)


def test_edits_compose_in_the_order_of_opening_and_leave_nothing() -> None:
    made, inputs = opened("llama")[0], batch()
    plain, place = logits(made.hf, inputs), everywhere("attn_out")
    before = made.read(place, real(inputs), **inputs)
    with made.editing({("resid_post", 1): lambda h: 3.0 * (h + 1.0)}):
        together = logits(made.hf, inputs)
    with made.editing({("resid_post", 1): lambda h: h + 1.0}), made.editing({("resid_post", 1): lambda h: 3.0 * h}):
        assert torch.equal(logits(made.hf, inputs), together)
        with (
            pytest.raises(ValueError, match=r"made \(2, 24, 31\) of a stream of \(2, 24, 32\)"),
            made.editing({("resid_pre", 2): lambda h: h[..., 1:]}),
        ):
            logits(made.hf, inputs)
        assert torch.equal(logits(made.hf, inputs), together)
    with made.editing({("resid_mid", 2): moved}), made.editing({("attn_out", 2): lambda a: 2 * a}):
        assert torch.equal(made.read(place, real(inputs), **inputs)[2], 2 * before[2])
    assert torch.equal(logits(made.hf, inputs), plain) and not made._hung


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_generation_is_edited_with_and_without_a_cache(family: str) -> None:
    twins.generation_is_edited_with_and_without_a_cache(*opened(family))


# ---- nnsight's own model


@EACH
def test_traces_over_the_same_weights(family: str) -> None:
    hf, _ = adapted(family)
    made, inputs = open_nnsight(hf, tiny_tokenizer()), batch()
    with switched(hf, None):
        expected = hf(**inputs).logits
        with reference.outputs(hf) as raw:
            hf(**inputs)
    path = next(path for path, module in hf.named_modules() if module is reference.blocks(hf))
    with made.trace(**inputs):
        third = made.get(path)[2].output.save()
        found = made.output.logits.save()
    assert torch.equal(found, expected)
    assert torch.equal((third[0] if isinstance(third, tuple) else third)[0], raw[2])
    assert {p.data_ptr() for p in made._module.parameters()} == {p.data_ptr() for p in hf.parameters()}
    with made.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False) as tracer:
        ids = tracer.result.save()
    with switched(hf, None):
        assert torch.equal(ids, hf.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False))


# ---- the model as it was


def test_nnsight_leaves_a_forward_on_every_module_it_wraps() -> None:
    hf = tiny_hf("llama")
    NNsight(hf)
    assert all("forward" in vars(module) for module in hf.modules())  # on the twin, therefore, and not on the model


def test_a_twin_takes_no_hooks_along_but_transformers_can_hang_its_own() -> None:
    hf, inputs = tiny_hf("llama"), batch()
    plain, states = logits(hf, inputs), hf(**inputs, output_hidden_states=True).hidden_states
    with HooksEngine(hf).editing({("resid_post", 1): moved}):
        made = NnsightEngine(hf)
        assert not torch.equal(logits(hf, inputs), plain) and torch.equal(logits(made.hf, inputs), plain)
    again = made.hf(**inputs, output_hidden_states=True).hidden_states
    assert len(again) == len(states) == 5 and all(torch.equal(a, b) for a, b in zip(again, states, strict=True))


@EACH
def test_opening_and_using_it_changes_nothing_of_the_model(family: str) -> None:
    (hf, _), tokenizer, inputs = adapted(family), copy.deepcopy(tiny_tokenizer()), batch()
    HooksEngine(hf).read(everywhere("resid_post"), real(inputs), **inputs)
    before, plain = state(hf, tokenizer), logits(hf, inputs)
    made, own = NnsightEngine(hf), open_nnsight(hf, tokenizer)
    with switched(made.hf, "two"), made.editing({("attn_out", 1): moved}):
        made.read(everywhere("resid_post"), real(inputs), **inputs)
        made.hf.generate(**left(inputs), generation_config=GREEDY)
        with own.trace("a text of its own"):
            own.output.logits.save()
        assert state(hf, tokenizer) == before and torch.equal(logits(hf, inputs), plain)
    del made, own
    assert state(hf, tokenizer) == before and torch.equal(logits(hf, inputs), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_come_and_go_after_opening(family: str, tmp_path: Path) -> None:
    hf, adapters = adapted(family, names=("one",))
    made, inputs, edits = NnsightEngine(hf), batch(), {("resid_post", 1): moved}
    grow(hf, adapters, "late", 4)
    with made.editing(edits):
        made.refresh()
        with switched(made.hf, "late"), switched(hf, "late"), HooksEngine(hf).editing(edits):
            assert torch.equal(logits(made.hf, inputs), logits(hf, inputs))
    adapters.save("late", tmp_path / "late", "tiny")
    fresh, others = adapted(family, names=())
    others.add("late", tmp_path / "late")
    with switched(fresh, "late"), switched(made.hf, "late"):
        assert torch.equal(logits(made.hf, inputs), logits(fresh, inputs))
    adapters.drop("late")
    adapters.drop("one")
    made.refresh()
    assert torch.equal(logits(made.hf, inputs), logits(tiny_hf(family), inputs))
    hf.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), inputs), logits(hf, inputs))


# ---- the laws of it, broken on purpose

OTHER = {"resid_pre": "resid_post"}
BREAKS: dict[str, tuple[str | None, str, Any]] = {
    "nothing": (None, "twin", traces.twin),
    "reads a little off": ("nnsight", "keeping", lambda kept, layer, select: keeping(kept, layer, lambda h: 1.001 * select(h))),
    "reads one token for all": ("nnsight", "keeping", lambda kept, layer, select: keeping(kept, layer, lambda h: select(h[:, :1].expand_as(h)))),
    "edits nothing": ("nnsight", "apply_edits", lambda edits, stream: stream.clone()),
    "edits twice": ("nnsight", "apply_edits", lambda edits, stream: apply_edits([*edits, *edits], stream)),
    "reads what a block gives for what it is given": (
        "nnsight",
        "pass_by",
        lambda site, *rest: pass_by("resid_post" if site == "resid_pre" else site, *rest),
    ),
    "wraps the model itself": ("after_nnsight", "twin", lambda hf: hf),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_engine_breaks_its_law_and_no_other(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, name, instead = BREAKS[fault]
    monkeypatch.setattr(traces, name, instead)
    report = laws.doctor(tiny_model(layers=2, hidden=16), laws=["after_nnsight", "nnsight", "hidden"])
    named = {law.name: law.key for law in laws.LAWS}
    assert {named[law] for law in report.loc[~report["holds"], "law"]} == {key} - {None}, laws.as_text(report)
    assert "it raised" not in " ".join(report["remedy"])


# ---- a model that runs elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server has: the model's files."""
    made = tmp_path_factory.mktemp("served")
    tiny_hf("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteEngine:
    """A remote model whose requests are run here, after they were serialised and read back with this package hidden; no network."""

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a request went to the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    return RemoteEngine(str(folder), tiny_tokenizer(), where="local")


def near() -> HooksEngine:
    return HooksEngine(tiny_hf("llama"))


def along() -> Tensor:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return direction / direction.norm()


def test_a_remote_model_reads_the_selected_rows(far: RemoteEngine) -> None:
    inputs = batch()
    assert {p.device.type for p in far.nn._module.parameters()} == {"meta"} and far.n_layers == 4
    for site in far.sites:
        place = Place(site, (0,) if site in ("embed", "final_norm") else (2, 0), "last")
        for select in (mean_row([[23], [16]]), mean_row([[3, 4, 5], [9]]), every_row([[0, 7], [2]])):
            ours, theirs = far.read(place, select, **inputs), near().read(place, select, **inputs)
            assert set(ours) == set(theirs) and all(torch.equal(ours[layer], theirs[layer]) for layer in theirs), site
    for site in ("attn_out", "resid_mid"):
        with pytest.raises(ValueError, match=f"{site} of a remote model.*not here"):
            far.read(Place(site, (0,), "last"), mean_row([[23], [16]]), **inputs)


def test_a_remote_model_is_edited(far: RemoteEngine) -> None:
    inputs, hooks, last = batch(), near(), mean_row([[23], [16]])
    plain = logits(hooks.hf, inputs)
    edits = {("resid_post", 1): adding(along(), 5.0), ("resid_post", 3): removing(along()[None]), ("resid_pre", 2): lambda h: 1.5 * h}
    with far.editing(edits), hooks.editing(edits):
        for site in ("resid_pre", "resid_post"):
            ours, theirs = far.read(everywhere(site), last, **inputs), hooks.read(everywhere(site), last, **inputs)
            assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
        assert torch.equal(logits(far.hf, inputs), found := logits(hooks.hf, inputs))
        assert torch.equal(far.hf(**inputs, logits_to_keep=2).logits, hooks.hf(**inputs, logits_to_keep=2).logits)
        answer = far.hf.generate(**left(inputs), generation_config=GREEDY)
        assert torch.equal(answer, hooks.hf.generate(**left(inputs), generation_config=GREEDY))
    assert relative(found, plain) > 0.05 and torch.equal(logits(far.hf, inputs), plain)
    with pytest.raises(ValueError, match="cache cannot be sent"):
        far.hf(**inputs, past_key_values=DynamicCache())


SERVER = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("emlens", "jaxtyping", "tiny", "twins"):
            raise ModuleNotFoundError("not on the server: " + name, name=name)

sys.meta_path.insert(0, NotInstalled())
import json, torch, nnsight
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing
from transformers import AutoTokenizer

folder, where = sys.argv[1:]
envelope = json.load(open(where + "/envelope"))
kind, key = envelope["model_key"].split(":", 1)
assert kind == "nnsight.modeling.transformers.TransformersModel" and json.loads(key)["repo_id"] == folder
model = nnsight.TransformersModel(folder, tokenizer=AutoTokenizer.from_pretrained(folder), task=json.loads(key)["task"], dispatch=True)
model._remoteable_set_env(envelope["env"])
trace = RequestModel.deserialize(open(where + "/blob", "rb").read(), model._remoteable_persistent_objects(), envelope["compress"])
tracing.inc()
trace.execute(trace.info.code)
torch.save(trace.info.frame.f_locals["kept"], where + "/kept.pt")
"""
"""A server as NDIF is one: another process that has nnsight and the model's files, and nothing of this package."""


def test_what_would_be_sent_runs_where_this_package_is_not(far: RemoteEngine, folder: Path, tmp_path: Path) -> None:
    far.where = True
    inputs, hooks, select = batch(), near(), mean_row([[3, 4, 5], [9]])
    edits = {("resid_post", 1): adding(along(), 5.0), ("resid_post", 3): removing(along()[None])}
    with far.editing(edits), hooks.editing(edits):
        request = far.request(everywhere("resid_post"), select, **inputs)
        expected = hooks.read(everywhere("resid_post"), select, **inputs)
    assert request.url == "https://api.ndif.us/request" and request.headers["nnsight-version"] and "llama" not in repr(request.blob)
    assert len(request.blob) < 10_000 and json.loads(request.envelope)["env"] == {"attn_implementation": "sdpa"}
    (tmp_path / "blob").write_bytes(request.blob)
    (tmp_path / "envelope").write_text(request.envelope)
    done = subprocess.run([sys.executable, "-c", SERVER, str(folder), str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = torch.load(tmp_path / "kept.pt")
    assert set(kept) == {0, 1, 2, 3} and all(torch.equal(kept[layer], expected[layer]) for layer in expected)


def test_the_doctor_sees_no_patient_that_is_elsewhere(folder: Path) -> None:
    for remote in (True, "local"):
        there = load_model(str(folder), engine="nnsight", remote=remote)
        with pytest.raises(ValueError, match=rf"remote model \(remote={remote!r}\).*weights, which are not on this machine.*engine='nnsight'"):
            laws.doctor(there, laws=["hidden"])
    here = load_model(str(folder), engine="nnsight")
    assert laws.doctor(here, laws=["hidden"])["holds"].tolist() == [True]


def test_nothing_is_sent_without_a_key(far: RemoteEngine) -> None:
    far.where = True
    for ask in (lambda: far.read(everywhere("resid_post"), mean_row([[23], [16]]), **batch()), lambda: far.hf(**batch())):
        with pytest.raises(ValueError, match=r"NDIF_API_KEY.*login\.ndif\.us"):
            ask()
