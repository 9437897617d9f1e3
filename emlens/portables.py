"""Feature sets that can be written to a file and applied to new prompts, with the directions and prompts they are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import features as sets
from . import store
from .activations import Activations, Place
from .baselines import TEXT_COLUMNS
from .directions import Direction
from .features import FeatureSet

IDENTITY = ("architecture", "weights", "adapter_sha256", "adapter_layers", "edits", "variants", "before", "template_sha256")
"""What `meta` says of the model and variant that was recorded, and two recordings must have in common."""

Matrix: TypeAlias = Float[np.ndarray, "prompt feature"]


@dataclass(frozen=True, eq=False)
class Portable(FeatureSet):
    """A feature set that is saved with the predictor: the builder of `emlens.features` named `kind`, the directions or prompts
    it was given, and its other arguments."""

    kind: str = "raw"
    data: tuple[Activations | Direction, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Callable[..., FeatureSet]] = {
    "raw": sets.raw,
    "squared_projections": lambda *source, **options: sets.squared_projections(**({"source": source[0]} if source else {}), **options),
    "projections": sets.projections,
    "subspace_energy": sets.subspace_energy,
    "anchors": sets.anchors,
}


def portable(kind: str, *data: Activations | Direction, **options: Any) -> Portable:
    """A feature set for `em.predict` and `em.fit_predictor` that a saved predictor carries along: portable("raw"),
    portable("squared_projections", n=50), portable("projections", evil, sycophantic), portable("subspace_energy", train_acts,
    k=8), portable("anchors", anchor_acts). ValueError lists the kinds."""
    if kind not in KINDS:
        raise ValueError(f"no portable features {kind!r}: choose among {', '.join(KINDS)}; others depend on the training rows")
    made = KINDS[kind](*data, **options)
    return Portable(made.name, made.note, made.of, kind, data, options)


def matrix_of(features: FeatureSet, acts: Activations, layer: int) -> Matrix:
    """The features of rows at a layer, in float64."""
    return np.asarray(dict(features.blocks(acts))[layer].features(np.arange(len(acts))), dtype=np.float64)


def row_alone(features: FeatureSet, acts: Activations, layer: int) -> tuple[Matrix, str]:
    """The features and their scaling; ValueError unless a row's features are a function of that row: the same beside (and trained
    on) whichever others, under another id, and without the target."""
    why = f"the features {features.name!r} cannot be applied to new prompts"
    way_out = f"use portable(...), of {', '.join(KINDS)}, or a FeatureSet of your own that needs no fitting"
    try:
        blocks = dict(features.blocks(acts))
    except KeyError as error:
        raise ValueError(f"{why}: they read a fact that is not there, or is the target ({error}); {way_out}") from error
    if layer not in blocks:
        raise ValueError(f"{why}: they are of several layers or of the text, fitted on the training rows of every fold; {way_out}")
    x = np.asarray(blocks[layer].features(np.arange(len(acts))), dtype=np.float64)
    half = acts[::2]
    half = replace(half, facts=half.facts.assign(id=[f"new {i}" for i in range(len(half))]))
    try:
        again = matrix_of(features, half, layer)
    except ValueError as error:
        raise ValueError(f"{why}: they need more than the new row ({error}); {way_out}") from error
    near = 1e-8 * max(float(np.abs(x).max()), 1e-300)
    if again.shape != x[::2].shape or np.abs(again - x[::2]).max() > near:
        raise ValueError(f"{why}: they change with the rows that are trained on, so they were fitted on them; {way_out}")
    return x, blocks[layer].scaling


# ---- what is kept of the directions and prompts that features are made of


def at_layer(features: FeatureSet, layer: int) -> FeatureSet:
    """Portable features with what they were given at one layer only."""
    if not isinstance(features, Portable):
        return features
    return portable(features.kind, *(read(*told(one, layer)) for one in features.data), **features.options)


def told(one: Activations | Direction, layer: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """A direction's or prompts' facts, for JSON, and values (at one layer)."""
    layers = list(one.layers) if layer is None else [layer]
    if isinstance(one, Direction):
        facts = {"site": one.site, "layers": layers, "name": one.name, "meta": one.meta}
        return store.plain(facts), np.stack([one.layer(i) for i in layers])
    columns = [c for c in ("id", "prompt_sha", *TEXT_COLUMNS) if c in one.facts]
    facts = {"place": [one.site, layers, one.position], "facts": one.facts[columns].to_dict("list"), "meta": identity_of(one.meta)}
    return store.plain(facts), np.stack([one.layer(i) for i in layers], axis=1)


def read(facts: dict[str, Any], values: np.ndarray) -> Activations | Direction:
    """What `told` told of."""
    if "place" not in facts:
        return Direction(values, tuple(facts["layers"]), facts["site"], facts["name"], facts["meta"])
    site, layers, position = facts["place"]
    return Activations(values, pd.DataFrame(facts["facts"]), Place(site, tuple(layers), position), facts["meta"])


def identity_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What `meta` says of the model, as JSON holds it."""
    return store.plain({k: meta[k] for k in ("model", *IDENTITY) if k in meta})


def unlike(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two recordings differ: of what both say, or, where both name their weights, of all (no adapter is a difference too)."""
    a, b = identity_of(mine), identity_of(theirs)
    whole = "weights" in a and "weights" in b
    return [k for k in IDENTITY if a.get(k) != b.get(k) and (whole or (k in a and k in b))]
