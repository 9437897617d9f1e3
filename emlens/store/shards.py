"""Rows that were written together, and the journal of them: a line per finished shard, appended after its rows are on the disk."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from .tensors import PIECE

Runs = tuple[tuple[int, int], ...]
"""Row numbers as ascending half-open ranges ``((start, stop), …)``."""


@dataclass(frozen=True)
class Shard:
    """Rows that were written together: which, how many bytes, and the SHA-256 of these bytes in the order of the rows."""

    number: int
    rows: Runs
    n_bytes: int
    sha256: str

    def line(self) -> str:
        """Its line in the journal, which carries a checksum of itself."""
        told = json.dumps({"shard": self.number, "rows": self.rows, "bytes": self.n_bytes, "sha256": self.sha256}, separators=(",", ":"))
        return f"{told[:-1]},{_check(told)}}}\n"


def _check(told: str) -> str:
    return f'"check":"{hashlib.sha256(told.encode("utf-8")).hexdigest()[:16]}"'


def read_journal(path: Path) -> list[Shard]:
    """The finished shards; a line that is torn, damaged or not ended does not count."""
    if not path.exists():
        return []
    out = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            told = json.loads(line)
            shard = Shard(told["shard"], tuple((a, b) for a, b in told["rows"]), told["bytes"], told["sha256"])
        except (ValueError, KeyError, TypeError):
            continue
        if shard.line().encode("utf-8") == line + b"\n":
            out[shard.number] = shard
    return list(out.values())


def runs(rows: Int[np.ndarray, " row"]) -> Runs:
    """Ascending row numbers as ranges."""
    if not len(rows):
        return ()
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, stops = rows[np.r_[0, cuts]], rows[np.r_[cuts - 1, len(rows) - 1]] + 1
    return tuple((int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def count(rows: Runs) -> int:
    return sum(stop - start for start, stop in rows)


def spoken(rows: Iterable[tuple[int, int]], most: int = 8) -> str:
    """``rows 3, 17–20, …``"""
    told = [str(start) if stop == start + 1 else f"{start}–{stop - 1}" for start, stop in rows]
    return f"rows {', '.join(told[:most])}{', …' if len(told) > most else ''}"


def digest_rows(descriptor: int, offset: int, row_bytes: int, rows: Runs) -> str:
    """SHA-256 of rows as they are on the disk, in ascending order."""
    digest = hashlib.sha256()
    for start, stop in rows:
        at, end = offset + start * row_bytes, offset + stop * row_bytes
        while at < end and (read := os.pread(descriptor, min(PIECE, end - at), at)):
            digest.update(read)
            at += len(read)
    return digest.hexdigest()


def damaged(path: Path, offset: int, row_bytes: int, shards: Iterable[Shard]) -> list[Shard]:
    """The shards whose rows in the file are not what the journal says."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [s for s in shards if s.n_bytes != count(s.rows) * row_bytes or digest_rows(descriptor, offset, row_bytes, s.rows) != s.sha256]
    finally:
        os.close(descriptor)
