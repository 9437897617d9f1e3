"""Laws of leaving: after any verb the model is bitwise as it was before."""

import torch

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
    """Logits bitwise, and every module the one that was there, after the bridge was opened and read.

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
    """The same for nnsight, which wraps every module."""
    return _after_opening(patient, "nnsight")


def _after_opening(patient: Patient, name: str) -> float:
    before, modules = patient.logits(), dict(patient.model.hf.named_modules())
    engine = patient.engines[name]
    ids = patient.few_tokens[0].ids
    with torch.no_grad():
        engine.read(Place("resid_post", (0,), "last"), mean_row([[len(ids) - 1]]), **patient.batch([ids]))
    now = dict(patient.model.hf.named_modules())
    exchanged = sum(now.get(path) is not module for path, module in modules.items()) + len(now.keys() - modules.keys())
    return apart(patient.logits(), before) + exchanged
