"""The laws in their order, and the examination."""

import importlib.metadata
import platform
import time
from collections.abc import Iterable
from types import EllipsisType

import pandas as pd

from .. import __version__
from .._engines.remote import RemoteEngine
from .._passes import bar
from ..adapters import On, label
from ..models import HookedModel
from .adapting import by_hand, changes, limited, noise, off, trained, zero
from .law import COLUMNS, Law
from .leaving import after_bridge, after_edits, after_nnsight, after_record
from .patient import Engines, Patient
from .reading import adds_up, batch, bridge, hidden, mid, nnsight, norm, padding, prefix, twice
from .saying import bos, greedy, round_trip, score, steer, steered, template

LAWS: tuple[Law, ...] = (
    after_record, after_edits, after_bridge, after_nnsight,
    batch, padding, prefix, hidden, norm, adds_up, mid, twice,
    score, greedy, steer, steered, bos, round_trip,
    template, trained, changes, by_hand, off, zero, limited, noise,
    bridge, nnsight,
)  # fmt: skip
"""All of them, in the order they are asked: those of leaving the model as it was come first."""

ENGINE_LAWS: tuple[Law, ...] = (after_bridge, after_nnsight, bridge, nnsight)
"""Those that open the other engines, for which transformer-lens and nnsight have to be imported."""

LIBRARIES = ("torch", "transformers", "peft", "transformer-lens", "nnsight")


def doctor(model: HookedModel, adapter: On | EllipsisType = ..., laws: Iterable[Law | str] | None = None) -> pd.DataFrame:
    """A certificate: one row per law, measured on this model with a handful of chats.

    Args:
        model: an open model; it is left bitwise as it was, and there are laws that say so.
        adapter: the variant to look at: a name, ``(name, layers)``, or None for the loaded weights. By default the loaded weights and then
            every adapter on them.
        laws: which (their keys, or :class:`Law` values of your own); by default :data:`LAWS`.

    Returns:
        DataFrame ``law, adapter, holds, measured, relation, tolerance, unit, remedy``. ``holds`` is True, False, or NA where a law says nothing
        of this model (``remedy`` then says why); a law that raises does not hold, and its error is in ``remedy``. ``attrs``: the model's
        identity, ``versions``, ``seconds``. :func:`as_text` renders it.

    Raises:
        KeyError: no such adapter, or no such law.
        ValueError: the model is being steered, ablated or patched, or its weights are elsewhere (``remote=``).
    """
    if isinstance(model.engine, RemoteEngine):
        raise ValueError(
            f"{model.name} is a remote model (remote={model.engine.where!r}): the laws compare what is read with passes of bare transformers over "
            "the weights, which are not on this machine. Ask the doctor where they are, or of a smaller model of the family that fits here: "
            "em.doctor(em.load_model(…, engine='nnsight')) reads it through the same library."
        )
    if model.edits:
        raise ValueError(f"the model is being edited ({', '.join(next(iter(edit)) for edit in model.edits)}); leave that block, then ask the doctor")
    variants: list[On] = [None, *model.adapters] if isinstance(adapter, EllipsisType) else [adapter]
    for variant in variants:
        model.adapters.check(variant, model.n_layers)
    asked = [
        (v, law) for i, v in enumerate(variants) for law in _chosen(laws) if not (law.of == "once" and i) and not (law.of == "adapter" and v is None)
    ]
    started, engines = time.monotonic(), Engines(model)
    patients = {label(v): Patient(model, v, engines) for v in variants}
    rows, shown = [], bar(f"doctor {model.name}", "law", asked)
    shown.delay = 0  # one law alone (an engine is imported) may take longer than a bar waits
    for variant, law in shown:
        shown.set_postfix_str(f"{label(variant)}: {law.key}")
        rows.append(law.row(patients[label(variant)]))
    report = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"holds": "boolean", "measured": float, "tolerance": float})
    report.attrs = {**model.describe(), "engine": model.engine.name, "versions": _versions(), "seconds": round(time.monotonic() - started, 2)}
    return report


def _chosen(laws: Iterable[Law | str] | None) -> list[Law]:
    known = {law.key: law for law in LAWS}
    chosen = list(LAWS if laws is None else laws)
    unknown = [law for law in chosen if isinstance(law, str) and law not in known]
    if unknown:
        raise KeyError(f"no law {unknown[0]!r}; laws are {', '.join(known)}")
    return [known[law] if isinstance(law, str) else law for law in chosen]


def _versions() -> dict[str, str]:
    return {"emlens": __version__, "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
