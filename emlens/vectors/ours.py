"""Our own format of directions, and numpy's."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from .rows import Rows, Shaped, every_block, known, named, placed, refuse_turned, told_of

FORMAT = "emlens direction 1"


def write_ours(target: Path, rows: Rows, n_layers: int | None) -> None:
    from safetensors.numpy import save_file

    norms = np.ones(len(rows.layers), dtype=np.float32) if rows.norms is None else rows.norms
    tensors = {"vectors": np.ascontiguousarray(rows.vectors), "norms": np.asarray(norms)}
    told = told_of(rows)
    with store.replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "direction": told, "sha256": _digest(tensors, told)})


def read_ours(target: Path, like: Shaped | None) -> Rows:
    header, tensors = store.whole(target)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{target} is no direction of ours (format {header.get('format')!r}, needed {FORMAT!r}): "
            "read the file yourself and build one with Direction.from_array(vectors, layers)"
        )
    if set(tensors) != {"vectors", "norms"} or _digest(tensors, header["direction"]) != header.get("sha256"):
        raise ValueError(f"{target} is damaged: its content is not what its header says: write it again")
    return named(header["direction"], tensors["vectors"], tensors["norms"])


def _digest(tensors: Mapping[str, np.ndarray], told: str) -> str:
    """SHA-256 of everything a saved direction says."""
    joined = hashlib.sha256(told.encode("utf-8"))
    for name in ("vectors", "norms"):
        joined.update(np.ascontiguousarray(tensors[name], dtype="<f4").tobytes())
    return joined.hexdigest()


# ---- numpy


def write_npy(target: Path, rows: Rows, n_layers: int | None) -> None:
    stack = every_block(target, placed(target, rows), n_layers)
    with store.replacing(target) as temporary, open(temporary, "wb") as handle:
        np.save(handle, stack)


def read_npy(target: Path, like: Shaped | None) -> Rows:
    stack = _numpy(target)
    if stack.ndim != 2 or not np.issubdtype(stack.dtype, np.floating):
        raise ValueError(f"{target} holds {stack.dtype} of shape {stack.shape}; needed are floats [L, d_model], a row for every block")
    refuse_turned(stack.shape, None if like is None else like.n_layers, like, target, "[L, d_model], a row for every block,")
    return known(stack.astype(np.float32), target, target.stem, {"n_layers": len(stack)})


def write_npz(target: Path, rows: Rows, n_layers: int | None) -> None:
    with store.replacing(target) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, vectors=rows.scaled, layers=np.array(rows.layers), direction=np.array(told_of(rows)))


def read_npz(target: Path, like: Shaped | None) -> Rows:
    found = _numpy(target)
    if not isinstance(found, dict) or not {"vectors", "layers"} <= set(found):
        raise ValueError(
            f"{target} holds {sorted(found) if isinstance(found, dict) else 'one array'}; needed are 'vectors' [layer, d_model] and 'layers'"
        )
    vectors, layers = found["vectors"], found["layers"]
    if vectors.ndim != 2 or len(vectors) != len(layers) or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(
            f"{target} holds vectors {vectors.dtype} of shape {vectors.shape} for {len(layers)} layers; needed are floats [layer, d_model]"
        )
    if "direction" in found:
        return named(str(found["direction"]), vectors)
    return Rows(vectors.astype(np.float32), tuple(int(i) for i in layers), name=target.stem, meta={"source": target.name})


def _numpy(target: Path) -> Any:
    try:
        found = np.load(target, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{target} is damaged or holds more than numbers and text ({str(error)[:120]}): write it again") from error
