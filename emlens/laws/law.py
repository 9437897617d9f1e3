"""What a law is: something that must hold of any model, how far from it this one is, how far is still rounding, and what to do otherwise."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from .patient import DoesNotApply, Patient

ROUNDING = {"float64": 1e-8, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative differences that arithmetic in another order makes, by the dtype of the weights. Real faults are ten times larger and more."""

NATS = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The same for log-likelihoods, in nats per token."""

BITWISE = 0.0

RAISED = (Exception,)
"""A law that raises does not hold, whatever it raises: libraries and broken models have exceptions of their own, and a certificate that ends at
the first of them says nothing of the rest."""

VECTOR = "of the vector's norm"
"""Of the prompt and layer (and site) where it is worst, as everywhere."""
LOGITS = "of a logit"
ACTIVATION = "of an activation"

COLUMNS = ("law", "adapter", "holds", "measured", "relation", "tolerance", "unit", "remedy")


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        key: its short name, for ``laws=``.
        name: what must hold, as the table says it.
        measure: one number of a :class:`Patient`; raises :class:`DoesNotApply` where the law says nothing.
        tolerance: one number, or one by dtype of the weights.
        unit: what the number is.
        remedy: what to do when the law is broken.
        relation: ``"≤"``: the number must be at most the tolerance; ``">"``: it must be above it.
        of: ``"model"`` (asked of every variant), ``"adapter"`` (of every variant but the loaded weights), ``"once"`` (the same for all).
    """

    key: str
    name: str
    measure: Callable[[Patient], float]
    tolerance: float | Mapping[str, float]
    unit: str
    remedy: str
    relation: str = "≤"
    of: str = "model"

    def __repr__(self) -> str:
        return f"Law {self.key}: {self.name}"

    def row(self, patient: Patient) -> dict[str, Any]:
        """The law's row of a certificate; what it raises is said there."""
        tolerance = self.tolerance if isinstance(self.tolerance, float) else self.tolerance.get(patient.model.dtype, ROUNDING["bfloat16"])
        measured, holds, remedy = math.nan, pd.NA, ""
        try:
            measured = float(self.measure(patient))
            holds = measured <= tolerance if self.relation == "≤" else measured > tolerance
            remedy = "" if holds else self.remedy
        except DoesNotApply as reason:
            remedy = f"does not apply: {reason}"
        except RAISED as error:
            said = str(error).strip().splitlines() or [""]
            holds, remedy = False, f"it raised {type(error).__name__}: {said[0][:400]}. {self.remedy}"
        return dict(zip(COLUMNS, (self.name, patient.label, holds, measured, self.relation, tolerance, self.unit, remedy), strict=True))


def law(name: str, *, unit: str, remedy: str, tolerance: float | Mapping[str, float], relation: str = "≤", of: str = "model") -> Callable[..., Law]:
    """Make a law of the function that measures it; its key is the function's name."""

    def made(measure: Callable[[Patient], float]) -> Law:
        out = Law(measure.__name__, name, measure, tolerance, unit, remedy, relation, of)
        object.__setattr__(out, "__doc__", measure.__doc__)
        return out

    return made


def worst(found: Any, expected: Any) -> float:
    """The largest of ‖found − expected‖ / ‖expected‖ over all vectors along the last axis; 0 for two zeros, NaN where there is a NaN."""
    a, b = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    off, size = np.linalg.norm(a - b, axis=-1), np.linalg.norm(b, axis=-1)
    return float(np.where(off == 0, 0.0, off / np.where(size == 0, np.finfo(float).tiny, size)).max(initial=0.0))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """0 for two tensors that are the same to the bit, else their largest difference."""
    return 0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().max())


def differing(a: np.ndarray, b: np.ndarray) -> float:
    """The same for arrays."""
    return 0.0 if np.array_equal(a, b) else float(np.abs(np.asarray(a, dtype=np.float64) - b).max())
