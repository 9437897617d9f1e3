"""Keys, checksums, and files that are there whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError

FORMAT = 1
"""Version of the layout on disk; a folder written with another one is refused, never guessed at."""


class StoreError(RuntimeError):
    """Something kept on disk is missing, damaged, or of another version; the message names the file and the way out."""


def plain(value: Any) -> Any:
    """``value`` as JSON types only (numpy scalars, paths, tuples and sets converted), for keys and manifests."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"cannot make a key or manifest of {type(value).__name__}: {value!r}. Use numbers, strings, lists or dicts.")


def canonical(value: Any) -> str:
    """One JSON text per value: sorted keys, no spaces."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_text(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def digest_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def key(what: str, **parts: Any) -> str:
    """A readable name plus a digest of everything that determined the thing: ``margins-3f2a…`` (16 hex digits)."""
    return f"{what}-{digest_text(canonical({'what': what, 'format': FORMAT, **parts}))[:16]}"


def refuse_file(folder: Path) -> None:
    for path in [folder, *folder.parents]:
        if path.exists():
            if not path.is_dir():
                raise StoreError(f"{path} is a file; a folder is needed there. Choose another output path or move the file away.")
            return


def _is_no_space(error: OSError | SafetensorError) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {number})" in str(error) for number in full)  # safetensors writes in Rust and keeps the number in its text


@contextmanager
def no_space(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn 'no space left' into an error that says how much is free and where."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_no_space(error):
            raise
        free = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free
        asked = f", {needed / 2**20:.0f} MiB are written in all" if needed else ""
        raise StoreError(
            f"the disk is full while writing {path} ({free / 2**20:.0f} MiB free{asked}). Nothing half-written was left behind; "
            "free some space or choose another output folder, and run the same command again: finished pieces are kept."
        ) from error


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    path = Path(path)
    refuse_file(path.parent)
    if path.is_dir():
        raise StoreError(f"{path} is a folder; a file is to be written there. Choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with no_space(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8; the file is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` (see :func:`plain`) as JSON; the file is there whole or not at all."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; one that is missing or damaged is a :class:`StoreError` that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing. Was the run interrupted, or the folder moved in part? Run the study again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it and run the study again.") from error


def write_table(frame: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write ``frame`` (with its ``attrs``) as parquet, and ``<path>.sha256`` beside it."""
    path = Path(path)
    kept = frame.copy(deep=False)
    kept.attrs = {k: plain(v) for k, v in frame.attrs.items()}
    with replacing(path) as temporary:
        kept.to_parquet(temporary, engine="pyarrow")
        digest = digest_file(temporary)
    write_text(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n")


def read_table(path: str | os.PathLike) -> pd.DataFrame:
    """Read a table of :func:`write_table`; a flipped byte is a :class:`StoreError` that names the file."""
    path = Path(path)
    seal = path.with_name(path.name + ".sha256")
    if not path.exists() or not seal.exists():
        raise StoreError(f"{path if not path.exists() else seal} is missing. Run the study again to write it anew.")
    if seal.read_bytes().split()[:1] != [digest_file(path).encode()]:
        raise StoreError(f"{path} is damaged: its SHA-256 is not the one in {seal.name}. Delete it and run the study again.")
    return pd.read_parquet(path, engine="pyarrow")


def sweep(root: str | os.PathLike) -> list[Path]:
    """Remove the temporary files and folders that a kill left under ``root``; returns what was removed."""
    root = Path(root)
    left = sorted(root.rglob(".*.tmp")) if root.is_dir() else []
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left
