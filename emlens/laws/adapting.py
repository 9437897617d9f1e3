"""Laws of adapters: the adapter is on where it should be and nowhere else, and off is off."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..adapters import _block, parts_of
from .law import ACTIVATION, BITWISE, LOGITS, apart, differing, law
from .patient import ONE_EACH, DoesNotApply, Patient, is_wrapper, without_wrappers

OF_SHIFT = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
SEEN = {"float64": 1e-9, "float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-4}


def _lora(patient: Patient) -> dict[str, nn.Module]:
    """``{path: wrapper}`` of the modules that the variant's LoRA is on."""
    name, layers = patient.adapter_name, parts_of(patient.adapter)[1]
    wrappers: dict[str, Any] = {path: module for path, module in patient.model.hf.named_modules() if is_wrapper(module)}
    mine = {p: m for p, m in wrappers.items() if any(name in getattr(m, part, ()) for part in ("lora_B", "lora_embedding_B"))}
    mine = {p: m for p, m in mine.items() if layers is None or _block(p) in layers}
    if not mine:
        raise DoesNotApply(f"adapter {name!r} is no LoRA")
    return mine


def _ups(patient: Patient) -> list[nn.Parameter]:
    """The B of every module; B = 0 is what LoRA begins with (of embeddings: A = 0)."""
    name = patient.adapter_name
    modules: list[Any] = list(_lora(patient).values())
    return [m.lora_B[name].weight if name in m.lora_B else m.lora_embedding_A[name] for m in modules]


@law(
    "every LoRA B of the adapter is trained (B ≠ 0)",
    unit="share of modules whose B is zero",
    tolerance=0.0,
    remedy="Where B is zero the adapter does nothing: it was not trained there, or its file was written under other names. Check the losses of its "
    "training (gradient checkpointing without input gradients trains nothing), or take the folder it was saved to at first.",
    of="adapter",
)
def trained(patient: Patient) -> float:
    """A LoRA whose B is zero is the loaded weights, and every number about it is plausible (peft#515, #1142, #1389).

    That the file's keys match the model's one to one is checked when it is loaded.
    """
    ups = _ups(patient)
    return sum(not bool(b.any()) for b in ups) / len(ups)


@law(
    "the adapter changes the logits",
    unit="of the logits' norm",
    tolerance=SEEN,
    relation=">",
    remedy="Before and after are the same model: the adapter was not trained, or is for other weights. Nothing should be concluded from its shifts.",
    of="adapter",
)
def changes(patient: Patient) -> float:
    """‖logits with − logits without‖ / ‖logits without‖, in one batch of the same shape."""
    before = patient.logits(None).double()
    return float((patient.logits().double() - before).norm() / before.norm())


@law(
    "adapter on = W + scale · B A by hand",
    unit="of the adapter's change of the logits",
    tolerance=OF_SHIFT,
    remedy="Some part of the adapter is not on, another one is, or its scale is not what its config says: load it alone, and compare its "
    "adapter_config.json (lora_alpha, r, use_rslora, target_modules) with how it was trained.",
    of="adapter",
)
def by_hand(patient: Patient) -> float:
    """Bare transformers on the model's own modules, with scale · B A x added by hooks at each linear one that the adapter is on, and no PEFT
    there. The scale is taken from the config: α/r, or α/√r with rsLoRA."""
    name, parts = patient.adapter_name, _lora(patient)
    config = patient.model.hf.peft_config[name]
    plain = {path: module for path, module in parts.items() if _is_plain(module, name)}
    if not plain:
        raise DoesNotApply("it has no plain LoRA on linear modules (DoRA, embeddings and experts are not done by hand)")
    others = {path: m for path, m in patient.model.hf.named_modules() if is_wrapper(m) and path not in parts or path in plain}
    with without_wrappers(patient.model.hf, others) as swapped:
        handles = [swapped[path][0].register_forward_hook(_adding(module, name, config)) for path, module in plain.items()]
        try:
            expected = patient.logits().double()
        finally:
            for handle in handles:
                handle.remove()
    shift = (expected - patient.logits(None).double()).norm()
    off = (patient.logits().double() - expected).norm()
    return 0.0 if off == 0 else float(off / shift)


def _is_plain(module: Any, name: str) -> bool:
    own = module.get_base_layer()
    linear = isinstance(own, nn.Linear) or type(own).__name__ == "Conv1D"
    return linear and name in module.lora_B and name not in getattr(module, "lora_magnitude_vector", ())


def _adding(module: Any, name: str, config: Any) -> Any:
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    patterns = config.rank_pattern or config.alpha_pattern
    r = down.shape[0]
    scale = module.scaling[name] if patterns else config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return (out + (args[0].to(down.dtype) @ down.T @ up.T) * scale).to(out.dtype)

    return hook


@law(
    "adapters off = the loaded weights",
    unit=LOGITS,
    tolerance=BITWISE,
    remedy="An adapter is not wholly off, so that every shift is too small: load the model anew without it for the 'before', or drop_adapter first.",
    of="adapter",
)
def off(patient: Patient) -> float:
    """With all adapters off, bitwise the logits of the model's own modules put back in the place of PEFT's."""
    with without_wrappers(patient.model.hf):
        bare = patient.logits(None)
    return apart(patient.logits(None), bare)


@law(
    "a zero adapter shifts nothing",
    unit=ACTIVATION,
    tolerance=BITWISE,
    remedy="The path through an adapter changes numbers by itself (a cast, a dropout): what is below this is no shift. Load the model in float32.",
    of="adapter",
)
def zero(patient: Patient) -> float:
    """The adapter with B = 0 for the time being: after − before is exactly 0 at every layer."""
    if any(patient.adapter_name in getattr(m, "lora_magnitude_vector", ()) for m in _lora(patient).values()):
        raise DoesNotApply("a DoRA adapter scales the weights even with B = 0")
    with _zeroed(_ups(patient)):
        with_it = patient.record().values
    return differing(with_it, patient.before.values)


@contextmanager
def _zeroed(parameters: list[nn.Parameter]) -> Iterator[None]:
    kept = [p.data.clone() for p in parameters]
    try:
        for p in parameters:
            p.data.zero_()
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data.copy_(data)


@law(
    "adapter=(name, layers): on there, off elsewhere",
    unit=ACTIVATION,
    tolerance=BITWISE,
    remedy="Do not use adapter=(name, layers) on this family: the blocks that its modules stand in are counted wrongly.",
    of="adapter",
)
def limited(patient: Patient) -> float:
    """``(name, all)`` is the adapter; ``(name, first half)`` is it up to there; ``(name, second half)`` is the loaded weights up to there."""
    name, layers = parts_of(patient.adapter)
    n = patient.model.n_layers
    if layers is not None or n < 2:
        raise DoesNotApply("the variant is limited to layers already" if layers is not None else "there is one block")
    outside = [path for path in _modules_of(patient, str(name)) if _block(path) is None]
    if outside:
        raise DoesNotApply(f"the adapter is also outside of the blocks ({outside[0]}), where no layer names it")
    half = n // 2
    whole, before = patient.together("resid_post").values, patient.before.values
    names: Any = ((name, range(n)), (name, range(half)), (name, range(half, n)))
    all_layers, first, second = (patient.record(adapter=on).values for on in names)
    return max(differing(all_layers, whole), differing(first[:, :half], whole[:, :half]), differing(second[:, :half], before[:, :half]))


def _modules_of(patient: Patient, name: str) -> list[str]:
    parameters = [path for path, _ in patient.model.hf.named_parameters() if f".{name}." in path or path.endswith(f".{name}")]
    return sorted({path.rpartition(f".{name}")[0] for path in parameters})


@law(
    "the shift is above the rounding noise",
    unit="noise / shift, rms",
    tolerance=1.0,
    remedy="What rounding makes is as large as the shift: load the model with dtype='float32' to record this adapter.",
    of="adapter",
)
def noise(patient: Patient) -> float:
    """The dtype's noise floor beside the rms of after − before.

    16-bit weights: the floor of both recordings, each measured against float32 arithmetic on the same weights. At |shift|/|h| ≈ 3 % a bf16
    shift has cosine of only 0.92 with the exact one. Wider weights: what another composition of the batch makes of the shift.
    """
    before, after = patient.before, patient.together("resid_post")
    shift = after.values - before.values
    size = np.sqrt(np.square(shift).mean(axis=(0, 2)))
    if not size.any():
        raise DoesNotApply("there is no shift; see whether the adapter changes the logits")
    if patient.model.dtype in ("bfloat16", "float16"):
        if "noise_floor" not in after.meta:
            raise DoesNotApply(f"the noise floor is not measured for this model ({patient.model.engine.name} engine, or quantised)")
        floor = np.array([math.hypot(before.meta["noise_floor"][i], after.meta["noise_floor"][i]) for i in after.layers])
    else:
        alone = patient.alone("resid_post") - patient.record(adapter=None, budget=ONE_EACH).values
        floor = np.sqrt(np.square(shift - alone).mean(axis=(0, 2)))
    return float(np.median(floor[size > 0] / size[size > 0]))
