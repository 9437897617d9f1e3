"""Tensors in safetensors files: read without loading them, written without holding them.

A file of one tensor is a valid safetensors file from the moment its header is there; rows can come to their places in any order, later, and
nothing has to be copied at the end.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from .files import StoreError, replacing

PIECE = 2**22
"""Bytes read or written at a time."""

DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_},
    **{f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}").type for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
"""safetensors' names of the types that numpy has."""


def header(name: str, shape: Sequence[int]) -> bytes:
    """The bytes that safetensors writes before one float32 tensor."""
    told = {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}}
    text = json.dumps(told, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def find(path: str | os.PathLike, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """``(dtype, shape, offset in the file)`` of one tensor of a safetensors file.

    Raises:
        ValueError: not a safetensors file, shorter than its header says, no such tensor, or a type that numpy lacks.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"its first 8 bytes tell of a header of {length} bytes, the file has {size}")
        told = json.loads(handle.read(length))
    if not isinstance(told, dict) or not isinstance(told.get(name), dict):
        held = sorted(k for k in told if k != "__metadata__") if isinstance(told, dict) else told
        raise ValueError(f"it holds no tensor {name!r}, only {held}")
    facts = told[name]
    if facts.get("dtype") not in DTYPES:
        raise ValueError(f"tensor {name!r} is of type {facts.get('dtype')!r}; read are {', '.join(DTYPES)}")
    dtype, shape = np.dtype(DTYPES[facts["dtype"]]).newbyteorder("<"), tuple(int(n) for n in facts["shape"])
    start, stop = (int(n) for n in facts["data_offsets"])
    if stop - start != dtype.itemsize * math.prod(shape) or 8 + length + stop > size:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fit in the file of {size} bytes")
    return dtype, shape, 8 + length + start


def mapped(path: str | os.PathLike, name: str = "values") -> np.ndarray:
    """One tensor of a safetensors file as a read-only ``np.memmap``: nothing is read before it is used.

    One that is empty, and so cannot be mapped, comes as an empty array.

    Raises:
        StoreError: the file is missing, is no safetensors file, or holds no such tensor.
    """
    try:
        dtype, shape, offset = find(path, name)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing. Record it again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged or not a safetensors file: {error}. Record it again.") from error
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def whole(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """What a safetensors file says of itself, and all its tensors.

    Raises:
        ValueError: damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in list(opened.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): write it again") from error


def pieces(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """``(first row, rows)`` after each other, a few MiB each, so that what is done to an array on the disk needs little memory."""
    rows = max(1, PIECE // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]


def write_values(path: str | os.PathLike, values: Float[np.ndarray, "prompt layer d_model"], name: str = "values") -> None:
    """A safetensors file of one float32 tensor, written piece by piece (the array may itself be mapped); it is there whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        handle.write(header(name, values.shape))
        for _, rows in pieces(values):
            handle.write(np.ascontiguousarray(rows, dtype="<f4").data)


def write_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    """All bytes of a contiguous array to a place in a file."""
    left = data.data.cast("B")
    while left:
        written = os.pwrite(descriptor, left[:PIECE], offset)
        left, offset = left[written:], offset + written
