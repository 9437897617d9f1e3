"""What Activations say about where they come from: how two recordings' ``meta`` combine, and what a variant is called."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOISE = "noise_floor"
"""``{layer: rms}`` of rounding noise; absent where the weights had 32 bits."""


def label(meta: Mapping[str, Any]) -> str:
    """What was recorded, in a few words: the variants subtracted, or the model."""
    if "variants" in meta:
        other = meta.get("before", {}).get("template_sha256")
        differ = " (templates differ)" if other and meta.get("template_sha256") else ""
        return " − ".join(str(v) for v in meta["variants"]) + differ
    if "model" in meta:
        return str(meta["model"])
    return ", ".join(dict.fromkeys(_variant(part) for part in meta.get("parts", [])))


def shown(meta: Mapping[str, Any]) -> str:
    """What a table of activations says of itself: the model, and the variant recorded or the variants subtracted."""
    said = label(meta)
    if "variants" in meta:
        model = meta.get("model")
        return f"{model} · {said}" if model and "model" not in meta.get("before", {}) and str(model) not in said else said
    parts = [{**meta, **part} for part in meta.get("parts", [{}])]
    variants = list(dict.fromkeys(_recorded(part) for part in parts if "adapter" in part and "variants" not in part))
    return " · ".join([*([said] if "model" in meta or not variants else []), *([", ".join(variants)] if variants else [])])


def _recorded(meta: Mapping[str, Any]) -> str:
    """``loaded weights``, or ``adapter bad``."""
    said = _variant(meta)
    return f"adapter {said}" if meta["adapter"] else said.replace("before", "loaded weights", 1)


def is_shift(meta: Mapping[str, Any]) -> bool | None:
    """True of a difference, False of what a model recorded, None of what nobody said anything of (and of both together)."""
    parts = [{**meta, **part} for part in meta.get("parts", [{}])]
    told = {True if "variants" in part else False if "prompts_sha256" in part else None for part in parts}
    return told.pop() if len(told) == 1 else None


def _variant(meta: Mapping[str, Any], model: bool = False, weights: bool = False) -> str:
    """``before``, an adapter's name and layers, or a difference of such; with the model's name, and its weights, where those tell two apart."""
    if "variants" in meta:
        return f"({label(meta)})"
    adapter = meta.get("adapter") or "before"
    if meta.get("adapter_layers"):
        adapter += f" in layers {','.join(map(str, meta['adapter_layers']))}"
    if meta.get("edits"):
        adapter += " edited"
    if not model:
        return adapter
    name = str(meta.get("model") or "model")
    if weights:
        name += f" {str(next(iter(dict(meta.get('weights') or {}).values()), ''))[:8]}".rstrip()
    return name if adapter == "before" else f"{name} {adapter}"


def refuse_unlike(mine: Mapping[str, Any], theirs: Mapping[str, Any], verb: str, templates_differ: bool) -> None:
    """Recordings of two architectures or (unless told) two chat templates are not to be ``verb``-ed."""
    a, b = mine.get("architecture"), theirs.get("architecture")
    if a and b and a != b:
        raise ValueError(f"cannot {verb}: two different architectures, {a} and {b}; their coordinates have nothing in common")
    a, b = mine.get("template_sha256"), theirs.get("template_sha256")
    if a and b and a != b and not templates_differ:
        away = "; after.minus(before, templates_differ=True) subtracts them all the same" if verb == "subtract" else ""
        raise ValueError(f"cannot {verb}: the chat templates differ ({a[:8]} and {b[:8]}). Give both models one chat_template{away}.")


def difference(after: Mapping[str, Any], before: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The meta of ``after - before``: after's, what before says differently, what the two are called, and both sides' noise.

    Rounding noise of two passes is taken as independent: sqrt(after² + before²) per layer.
    """
    models = bool(after.get("weights") and before.get("weights") and after["weights"] != before["weights"])
    same_name = after.get("model") == before.get("model")
    out = {k: v for k, v in after.items() if k not in (NOISE, "variants", "before")}
    apart = (NOISE, "variants", "before", "prompts_sha256", "plan")
    other = {k: before.get(k) for k in {**after, **before} if k not in apart and before.get(k) != after.get(k)}
    named = any(key in side for side in (after, before) for key in ("model", "adapter", "edits", "variants", "parts"))
    out["variants"] = [_variant(side, models, models and same_name) for side in (after, before)] if named else ["after", "before"]
    if other:
        out["before"] = other
    floors = [side.get(NOISE, {}) for side in (after, before)]
    noise = {i: float(np.sqrt(sum(f.get(i, 0.0) ** 2 for f in floors))) for i in layers if any(i in f for f in floors)}
    return {**out, NOISE: noise} if noise else out


def of_layers(meta: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The meta of some of the layers."""
    if NOISE not in meta:
        return dict(meta)
    return {**meta, NOISE: {i: meta[NOISE][i] for i in layers if i in meta[NOISE]}}


def merged(metas: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The meta of prompts put together: what all say; what they say differently under ``parts``; the rms of the noise over all prompts."""
    said = [{**meta, **part} for meta in metas for part in meta.get("parts", [{}])]
    said = [{k: v for k, v in meta.items() if k not in (NOISE, "parts")} for meta in said]
    common = {k: v for k, v in said[0].items() if all(k in meta and meta[k] == v for meta in said)}
    parts = [{k: v for k, v in meta.items() if k not in common} for meta in said]
    parts = [part for i, part in enumerate(parts) if part not in parts[:i]]
    floors = [meta.get(NOISE, {}) for meta in metas]
    total = sum(sizes)
    pooled = {i: sum(n * f.get(i, 0.0) ** 2 for n, f in zip(sizes, floors, strict=True)) for f in floors for i in f}
    noise = {i: float(np.sqrt(square / total)) for i, square in pooled.items()} if total else {}
    return {**common, **({"parts": parts} if len(parts) > 1 else {}), **({NOISE: noise} if noise else {})}


def read(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Meta as it comes back from JSON, whose keys are text: the layers of the noise floor are numbers again."""
    return {**meta, NOISE: {int(i): float(v) for i, v in meta[NOISE].items()}} if NOISE in meta else dict(meta)


def told(description: str) -> dict[str, Any]:
    """Site, position and meta from the JSON that a dataset carries; the usual place where it carries none of ours."""
    try:
        found = json.loads(description or "{}")
    except json.JSONDecodeError:
        found = {}
    if not isinstance(found, dict):
        found = {}
    return {"site": found.get("site", "resid_post"), "position": found.get("position", "last"), "meta": read(found.get("meta", {}))}
