"""Other houses' files of directions: persona vectors, and control vectors of llama.cpp and repeng."""

import json
import re
from pathlib import Path

import numpy as np

from .. import formats, store
from ..activations import Activations
from .rows import UNKNOWN, Rows, Shaped, blocks_said, every_block, known, named, placed, refuse_turned, told_of

# ---- persona vectors


def write_persona(target: Path, rows: Rows, n_layers: int | None) -> None:
    last = (n_layers or blocks_said(rows.meta) or 0) - 1
    rows = placed(target, rows, last, "the last row of a persona file is after the final norm, not what the last block puts out")
    stack = every_block(target, rows, n_layers)
    position = str(rows.meta.get("position", _persona_name(target)[1] or UNKNOWN))
    nothing = np.zeros((1, 1, stack.shape[1]), dtype=np.float32)
    parts = {
        site: Activations.from_array(values, {"id": [rows.name]}, site=site, position=position)
        for site, values in (("embed", nothing), ("resid_post", stack[None]), ("final_norm", nothing))
    }
    formats.write_persona(target, parts, len(stack))


def read_persona(target: Path, like: Shaped | None) -> Rows:
    name, position = _persona_name(target)
    parts = formats.read_persona(target, None if position else UNKNOWN)
    given = next(iter(parts.values()))
    if len(given) != 1:
        raise ValueError(
            f"{target} holds {len(given)} vectors a layer, a direction is one: em.formats.read_persona(path) reads them, a row per prompt"
        )
    blocks = int(given.meta["n_layers"])
    refuse_turned((blocks + 1, given.d_model), None if like is None else like.n_layers + 1, like, target, "[L + 1, d_model]")
    stream = parts["resid_post"].values[0] if "resid_post" in parts else np.zeros((0, given.d_model), dtype=np.float32)
    left_out = [site for site in ("embed", "final_norm") if parts[site].values.any()]
    return known(stream, target, name, {"n_layers": blocks, "position": given.position, "left_out": left_out})


def _persona_name(target: Path) -> tuple[str, str | None]:
    """The trait and our position of ``{trait}_{position}_diff.pt``; the whole stem and None for another name."""
    for theirs, ours in formats.PERSONA_POSITIONS.items():
        if theirs in target.stem:
            return target.stem.split(f"_{theirs}")[0], ours
    return target.stem, None


# ---- control vectors


def write_control(target: Path, rows: Rows, n_layers: int | None) -> None:
    from gguf import GGUFWriter

    rows = placed(target, rows, 0, "llama.cpp has no direction for block 0")
    kind = re.sub(r"(For|LMHead|Model).*", "", str(rows.meta.get("architecture", "")).split(" ")[0]).lower()
    with store.replacing(target) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", kind or "unknown")
        writer.add_uint32("controlvector.layer_count", len(rows.layers))
        writer.add_string("emlens.direction", told_of(rows))
        for layer, row in zip(rows.layers, rows.vectors, strict=True):
            writer.add_tensor(f"direction.{layer}", row)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control(target: Path, like: Shaped | None) -> Rows:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(target)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{target} is damaged or not a GGUF file ({str(error)[:120]}): write it again") from error
    said = {
        key: reader.fields[key].contents() for key in ("general.architecture", "controlvector.model_hint", "emlens.direction") if key in reader.fields
    }
    if said.get("general.architecture") != "controlvector":
        raise ValueError(
            f"{target} is a GGUF file of architecture {said.get('general.architecture')!r}, not 'controlvector': "
            "it holds no directions (a model? em.load_model opens it)"
        )
    found: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        number = tensor.name.removeprefix("direction.")
        if not number.isdecimal() or int(number) == 0 or tensor.data.ndim != 1 or tensor.data.dtype not in (np.float32, np.float16):
            raise ValueError(
                f"{target} holds {tensor.name!r}, {tensor.tensor_type.name} of shape {tensor.data.shape}: a control vector has one-dimensional float "
                "tensors direction.1, direction.2, … and no layer 0 (llama.cpp refuses such a file too)"
            )
        found[int(number)] = np.array(tensor.data, dtype=np.float32)
    layers = sorted(i for i, row in found.items() if row.any())
    widths = {len(row) for row in found.values()}
    if len(widths) > 1:
        raise ValueError(f"{target} holds tensors of {sorted(widths)} entries: directions of one width are needed")
    ours = said.get("emlens.direction", '{"layers": []}')
    if layers and layers == sorted(json.loads(ours)["layers"]):
        return named(ours, np.stack([found[i] for i in json.loads(ours)["layers"]]))
    stack = np.stack([found[i] for i in layers]) if layers else np.zeros((0, 1), dtype=np.float32)
    meta = {"source": target.name, "model_hint": said.get("controlvector.model_hint", "")}
    return Rows(stack, tuple(layers), name=target.stem, meta=meta)
