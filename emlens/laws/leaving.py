"""Laws of leaving: after any verb the model is bitwise as it was before."""

from typing import Any

import torch
from torch import nn

from .._passes import mean_row
from ..activations import Place
from .law import BITWISE, LOGITS, apart, law
from .patient import Patient


@law(
    "recording leaves the model as it was",
    unit=LOGITS,
    tolerance=BITWISE,
    remedy="A hook of the engine stays behind: load the model anew, and record with engine='hooks'.",
)
def after_record(patient: Patient) -> float:
    """Bare transformers' logits before and after every site was read."""
    before = patient.logits()
    for site in patient.model.engine.sites:
        patient.together(site)
    return apart(patient.logits(), before)


@law(
    "steering and ablating leave the model as it was",
    unit=LOGITS,
    tolerance=BITWISE,
    remedy="An edit outlives its block: load the model anew after steering, and steer with engine='hooks'.",
)
def after_edits(patient: Patient) -> float:
    """The same around ``model.steer`` and ``model.ablate``, one within the other, with a pass inside."""
    patient.model.residual_norms()
    before = patient.logits()
    with patient.model.steer(patient.direction, layers="all", strength=0.5), patient.model.ablate(patient.direction):
        patient.logits()
    return apart(patient.logits(), before)


REOPENED = "Load the model anew after using this engine, and save or add adapters before."


@law(
    "opening the bridge leaves the model as it was",
    unit=LOGITS + ", or modules exchanged",
    tolerance=BITWISE,
    remedy=f"transformer-lens changed the model itself. {REOPENED}",
    of="once",
)
def after_bridge(patient: Patient) -> float:
    """Logits bitwise, and every module the one that was there with its own forward, after the bridge was opened and read.

    Booting a TransformerBridge on the model itself rewrites its modules, forces eager attention and breaks later ``load_adapter`` and
    ``save_pretrained``; ours gets a twin that shares the parameters.
    """
    return _after_opening(patient, "bridge")


@law(
    "opening nnsight leaves the model as it was",
    unit=LOGITS + ", or modules exchanged",
    tolerance=BITWISE,
    remedy=f"nnsight changed the model itself. {REOPENED}",
    of="once",
)
def after_nnsight(patient: Patient) -> float:
    """The same for nnsight, which puts a forward of its own on every module it wraps, for good; ours wraps those of a twin."""
    return _after_opening(patient, "nnsight")


def _after_opening(patient: Patient, name: str) -> float:
    before, modules = patient.logits(), _modules(patient.model.hf)
    engine = patient.engines[name]
    ids = patient.few_tokens[0].ids
    with torch.no_grad():
        engine.read(Place("resid_post", (0,), "last"), mean_row([[len(ids) - 1]]), **patient.batch([ids]))
    now = _modules(patient.model.hf)
    exchanged = sum(now.get(path) != found for path, found in modules.items()) + len(now.keys() - modules.keys())
    return apart(patient.logits(), before) + exchanged


def _modules(hf: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """Every module by its path, with the forward that was put on it, if any."""
    return {path: (module, vars(module).get("forward")) for path, module in hf.named_modules()}
