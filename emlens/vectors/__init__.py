"""Files of directions, ours and other houses': which row belongs to which block, and what a file has no place for.

| suffix | holds | row of the block with index ``i`` (0 … L − 1) |
|---|---|---|
| ``.safetensors`` | unit vectors, lengths, and everything else that is known, with a checksum | any, named in the header |
| ``.npz`` | arrays ``vectors`` (× lengths) and ``layers``, the rest as JSON | any, named in ``layers`` |
| ``.npy`` | float32 ``[L, d_model]`` | ``i`` |
| ``.pt`` | persona vectors (Chen et al. 2025, arXiv 2507.21509): float32 ``[L + 1, d_model]`` | ``i + 1``; not the last block |
| ``.gguf`` | control vector of llama.cpp and repeng: a float32 tensor ``direction.<il>`` a layer | ``il = i``; not block 0 |

All but the first hold vectors × lengths. Where nothing is known ``.npy`` and ``.pt`` hold zeros, and rows of zeros are left out on reading.

``.pt``: row l is transformers' ``hidden_states[l]``, what block l − 1 puts out. Row 0 is the embeddings and row L is after the final norm: both are
written as zeros and left out on reading (``meta["left_out"]``). The stream after the last block, before the norm, has no row.

``.gguf``: llama.cpp adds ``direction.<il>`` to what block il puts out, blocks counted from 0, for il = 1 … L − 1 (``build_cvec(cur, il)`` after the
last sum of a block in ``src/models/*.cpp``; ``llama_adapter_cvec::apply`` in ``src/llama-adapter.cpp``: "buffer doesn't have data for layer 0"), and
``common_control_vector_load_one`` (``common/common.cpp``) refuses ``direction.0``, tensors of other names, and all but one-dimensional float32.
repeng numbers alike: its layer il is ``hidden_states[il + 1]`` (``extract.py``), added after block il (``control.py``). So il is our block index.
llama.cpp's own ``cvector-generator`` calls ``direction.<il + 1>`` what it measured after block il (``mean.hpp``, ``pca.hpp``), one block earlier than
where it is added; such a file is read here as llama.cpp applies it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .others import read_control, read_persona, write_control, write_persona
from .ours import FORMAT, read_npy, read_npz, read_ours, write_npy, write_npz, write_ours
from .rows import UNKNOWN, LeftOutWarning, Rows, Shape, Shaped, blocks_said

__all__ = ["FORMAT", "UNKNOWN", "LeftOutWarning", "Rows", "Shape", "Shaped", "read", "write"]


def write(path: str | os.PathLike, rows: Rows, n_layers: int | None = None) -> Path:
    """Write a direction in the format of the path's suffix, whole or not at all.

    Args:
        n_layers: number of blocks of the model, for ``.pt`` and ``.npy``; default: what ``meta`` says (``n_layers``, or the end of
            ``architecture``).

    Warns:
        LeftOutWarning: a layer that the format has no place for.

    Raises:
        ValueError: another suffix, another site than ``resid_post`` in a format that has no word for it, an unknown or too small number of
            blocks, or nothing left to write.
    """
    target, to = _format(path)
    to.write(target, rows, n_layers)
    return target


def read(path: str | os.PathLike, like: Shaped | None = None) -> Rows:
    """Read what :func:`write` or another house wrote, and refuse what cannot be a direction of the model ``like``.

    Args:
        like: a model, or ``Shape(d_model, n_layers)``: width, number of blocks and orientation are then checked against it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file or one of another kind, NaN or Inf, a transposed array, or one that does not fit ``like``.
    """
    target, how = _format(path)
    if not target.is_file():
        raise FileNotFoundError(f"there is no file {target}: save a direction there first, or give the path of one")
    rows = how.read(target, like)
    bad = [i for i, row in zip(rows.layers, rows.vectors, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise ValueError(f"{target} holds NaN or Inf at layers {bad}: make it again, in float32 or bfloat16")
    if not rows.layers:
        raise ValueError(f"{target} holds no direction of any block: all of its rows are zero, or are of no block")
    if like is not None:
        _check(rows, like, target)
    return rows


def _check(rows: Rows, like: Shaped, target: Path) -> None:
    if rows.vectors.shape[1] != like.d_model:
        raise ValueError(f"{target} is {rows.vectors.shape[1]} wide, the model has d_model {like.d_model}: it is of another model")
    said = blocks_said(rows.meta)
    outside = [i for i in rows.layers if not 0 <= i < like.n_layers]
    if outside or said not in (None, like.n_layers):
        told = f"layers {outside}" if outside else f"{said} blocks"
        raise ValueError(f"{target} has {told}, the model has {like.n_layers} blocks (0 … {like.n_layers - 1}): it is of another model")


class _Format(NamedTuple):
    write: Callable[[Path, Rows, int | None], None]
    read: Callable[[Path, Shaped | None], Rows]


_FORMATS = {
    ".safetensors": _Format(write_ours, read_ours),
    ".pt": _Format(write_persona, read_persona),
    ".gguf": _Format(write_control, read_control),
    ".npy": _Format(write_npy, read_npy),
    ".npz": _Format(write_npz, read_npz),
}


def _format(path: str | os.PathLike) -> tuple[Path, _Format]:
    target = Path(path)
    if target.suffix not in _FORMATS:
        raise ValueError(f"a direction is kept as {', '.join(_FORMATS)}; got {target.name!r}: use a path that ends in one of them")
    return target, _FORMATS[target.suffix]
