"""Entries that grow shard by shard: larger than memory, killed at any moment, resumed."""

import errno
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float

from . import shards, tensors
from .entries import JOURNAL, MANIFEST, VALUES, described, listed, manifest_text, partial_of, read_manifest
from .files import StoreError, canonical, no_space, plain, refuse_file, sweep, sync, write_text
from .shards import Shard

LOCK = "lock"
"""In a partial folder: who holds it is at work there."""


@contextmanager
def growing(folder: str | os.PathLike, made_by: Mapping[str, Any], shape: tuple[int, int, int], aside: Collection[str] = ()) -> Iterator["Growing"]:
    """An entry whose ``values`` ``[row, layer, d_model]`` (float32) arrive shard by shard; killed at any moment it goes on where it stopped.

    It grows in ``.<name>.partial/``: ``values.safetensors`` at its final size (a disk too small is told before the first row), and
    ``shards.jsonl``, a line per finished shard with its rows and their SHA-256, appended once they are on the disk. On resuming the finished
    shards are checked; one that is damaged is told in a warning and is simply not done: its rows can be made again, the rest is kept. When the
    block ends well and every row is there, the folder gets its manifest and its name. Files put into :attr:`Growing.folder` are kept with it.

    Args:
        folder: of the entry.
        made_by: everything that determined the values; a partial folder is resumed only if it was begun with the same.
        shape: rows, layers, d_model.
        aside: keys of ``made_by``, at any depth, that determine nothing (a name, something measured): not compared, the first ones are kept.

    Raises:
        StoreError: the entry is there already; another one is, or has been begun; another process is at work on it; the disk is full; the block
            ended before all rows were there (they are kept).
    """
    folder = Path(folder)
    refuse_file(folder)
    made, partial = plain(made_by), partial_of(folder)
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    first = tensors.header("values", shape)
    size = len(first) + 4 * math.prod(shape)
    _refuse_there(folder, made, aside)
    with no_space(partial, size), _locked(partial):
        _begin(folder, partial, made, size, aside)
        descriptor = os.open(partial / VALUES, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                _reserve(descriptor, size, partial)
            except OSError:
                if not (partial / JOURNAL).exists():
                    shutil.rmtree(partial)
                raise
            if os.pread(descriptor, len(first), 0) != first:
                os.pwrite(descriptor, first, 0)
            grow = Growing(partial, shape, descriptor, len(first))
            yield grow
            grow._finish()
        finally:
            os.close(descriptor)
        os.replace(partial, folder)
        (folder / LOCK).unlink(missing_ok=True)
        sync(folder.parent)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # held by another, or just renamed by it
        raise StoreError(f"another process is recording into {partial}. Wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()


def _refuse_there(folder: Path, made: Mapping[str, Any], aside: Collection[str]) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    there = described(folder)
    if differ := _differences(there, made, aside):
        raise StoreError(f"{folder} holds another recording ({differ}). Choose another folder, or delete this one.")
    raise StoreError(f"{folder} is there already, whole. Read it, or choose another folder.")


def _begin(folder: Path, partial: Path, made: Mapping[str, Any], size: int, aside: Collection[str]) -> None:
    """See whose partial folder this is; one in which nothing is finished yet is begun anew."""
    if folder.exists() and any(folder.iterdir()):  # another process finished it while we came
        shutil.rmtree(partial, ignore_errors=True)
        _refuse_there(folder, made, aside)
    if (partial / MANIFEST).exists() and shards.read_journal(partial / JOURNAL):
        manifest = read_manifest(partial)
        differ = _differences(manifest["made_by"], made, aside)
        if not differ and manifest["files"].get(VALUES, {}).get("bytes") != size:
            differ = "another size"
        if differ:
            raise StoreError(f"{partial} was begun by another recording ({differ}). Run that one to its end, or delete the folder.")
        sweep(partial)
        return
    for left in [p for p in partial.iterdir() if p.name != LOCK]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_text(partial / MANIFEST, manifest_text(made, {VALUES: {"bytes": size}}))


def _differences(there: Any, asked: Any, aside: Collection[str], name: str = "") -> str:
    """What differs between two plain values, in words; empty when nothing does."""
    if isinstance(there, dict) and isinstance(asked, dict):
        keys = [k for k in [*there, *(k for k in asked if k not in there)] if k not in aside]
        told = [_differences(there.get(k, "nothing"), asked.get(k, "nothing"), aside, k) for k in keys]
        return "; ".join([t for t in told if t][:4])
    return "" if canonical(there) == canonical(asked) else f"{name}: {there!r} there, {asked!r} asked for"


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Give the file its final size now, so that a full disk is told now."""
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # no such call on macOS, not on every file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if shutil.disk_usage(folder).free < size - 512 * os.fstat(descriptor).st_blocks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        os.ftruncate(descriptor, size)


class Growing:
    """What :func:`growing` hands out: ask :meth:`done`, then :meth:`put`. ``folder`` takes the other files of the entry."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], descriptor: int, offset: int) -> None:
        self.folder, self.shape = folder, shape
        self._descriptor, self._offset, self._row_bytes = descriptor, offset, 4 * math.prod(shape[1:])
        told = shards.read_journal(folder / JOURNAL)
        bad = shards.damaged(folder / VALUES, offset, self._row_bytes, told)
        if bad:
            rows = shards.spoken(sorted(r for s in bad for r in s.rows))
            warnings.warn(f"{folder / VALUES} is damaged ({rows}); these rows are recorded again. Is the disk failing?", stacklevel=4)
        self._shards = {s.number: s for s in told if s not in bad}
        self._taken = np.zeros(shape[0], dtype=bool)
        for start, stop in (r for s in self._shards.values() for r in s.rows):
            self._taken[start:stop] = True
        journal, lines = folder / JOURNAL, "".join(s.line() for s in self._shards.values())
        if not journal.exists() or journal.read_bytes() != lines.encode("utf-8"):
            write_text(journal, lines)

    def __repr__(self) -> str:
        return f"Growing {self.folder.name} · {self.n_rows} of {self.shape[0]} rows · {len(self._shards)} shards"

    @property
    def n_rows(self) -> int:
        """Rows that are on the disk."""
        return int(self._taken.sum())

    def done(self, shard: int) -> bool:
        """Whether this shard is on the disk, whole."""
        return shard in self._shards

    def put(self, shard: int, rows: Sequence[int], values: Float[np.ndarray, "prompt layer d_model"]) -> None:
        """Write the rows of one shard; when this returns, they are kept.

        Args:
            shard: number of the shard in the plan.
            rows: row number in the entry of each row of ``values``, in any order.
            values: float32 ``[row, layer, d_model]``.

        Raises:
            ValueError: a shape that does not fit, rows outside or written by another shard, a shard that is done, NaN or Inf.
        """
        numbers = np.asarray(rows, dtype=np.int64).reshape(-1)
        if self.done(shard):
            raise ValueError(f"shard {shard} is on the disk already; ask done({shard}) first")
        if values.shape != (len(numbers), *self.shape[1:]):
            raise ValueError(f"shard {shard}: values have shape {values.shape}; needed is {(len(numbers), *self.shape[1:])}, a row for each number")
        order = np.argsort(numbers)
        numbers, data = numbers[order], np.ascontiguousarray(values[order], dtype="<f4")
        spans = shards.runs(numbers)
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < self.shape[0]:
            raise ValueError(f"shard {shard}: rows {numbers[0]} … {numbers[-1]} do not lie in the entry's {self.shape[0]}")
        if (numbers[1:] == numbers[:-1]).any() or self._taken[numbers].any():
            raise ValueError(f"shard {shard}: some of its {shards.spoken(spans)} are there twice, or belong to a shard that is done")
        finite = np.isfinite(data).all(axis=(1, 2))
        if not finite.all():
            raise ValueError(f"shard {shard}: row {numbers[~finite][0]} holds NaN or Inf ({int((~finite).sum())} of {len(numbers)} rows do)")
        at = 0
        for start, stop in spans:
            tensors.write_at(self._descriptor, data[at : at + stop - start], self._offset + start * self._row_bytes)
            at += stop - start
        os.fsync(self._descriptor)
        made = Shard(int(shard), spans, data.nbytes, hashlib.sha256(data.data).hexdigest())
        self._append(made.line().encode("utf-8"))
        self._shards[made.number] = made
        self._taken[numbers] = True

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / JOURNAL))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _finish(self) -> None:
        """Everything but the final name."""
        if not self._taken.all():
            left = shards.runs(np.flatnonzero(~self._taken))
            raise StoreError(
                f"{self.folder} is not finished: {int((~self._taken).sum())} of {self.shape[0]} rows are missing ({shards.spoken(left)}). "
                "Run it again: the others are kept."
            )
        made = [self._shards[number] for number in sorted(self._shards)]
        if bad := shards.damaged(self.folder / VALUES, self._offset, self._row_bytes, made):
            rows = shards.spoken(sorted(r for s in bad for r in s.rows))
            raise StoreError(f"{self.folder / VALUES} was damaged since it was written ({rows}). Run again: only these rows are recorded anew.")
        write_text(self.folder / JOURNAL, "".join(s.line() for s in made))
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p not in (self.folder / LOCK, self.folder / MANIFEST))
        for path in files:
            sync(path)
        made_by = read_manifest(self.folder)["made_by"]
        write_text(self.folder / MANIFEST, manifest_text(made_by, listed(self.folder, files)))
