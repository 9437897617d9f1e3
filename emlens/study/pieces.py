"""Record once: every expensive piece of a study is written once, under a key made of everything that determined it."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from .. import store


class Pieces:
    """The pieces of one run folder: made when missing, read back (and checked) when there.

    ``made`` lists every piece asked for with the seconds that making it took, in this run or in an earlier one; NaN where nobody wrote them down.

    Args:
        root: folder of the pieces.
        weights: ``{label: rough seconds}`` of every piece that will be asked for; the ETA is made from these.
        say: where progress lines go.
    """

    def __init__(self, root: Path, weights: Mapping[str, float], say: Callable[[str], None] | None = None) -> None:
        self.root, self.weights = root, dict(weights)
        self.say = say or _to_stderr
        self.made: list[dict[str, Any]] = []
        self.read_back = 0
        self._started, self._spent_weight, self._done_weight = time.monotonic(), 0.0, 0.0

    def table(self, what: str, label: str, determined_by: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A piece that is one table."""

        def write(folder: Path) -> None:
            store.write_table(make(), folder / "table.parquet")

        return store.read_table(self.folder(what, label, determined_by, write) / "table.parquet")

    def folder(self, what: str, label: str, determined_by: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """A piece that is a folder of files; ``make`` fills it."""

        def write(final: Path) -> None:
            started = time.monotonic()
            made_by: dict[str, Any] = {"piece": label, **determined_by}
            with store.writing(final, made_by) as temporary:
                make(temporary)
                made_by["seconds"] = round(time.monotonic() - started, 2)

        return self.own_folder(what, label, determined_by, write)

    def own_folder(self, what: str, label: str, determined_by: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """A piece whose maker writes the folder itself, whole or not at all (:func:`store.writing`).

        Its manifest is the maker's: where that does not say how long it took, ``<key>.json`` beside the folder does.
        """
        folder = self.root / store.key(what, **determined_by)
        there = folder.exists()
        started = time.monotonic()
        if not there:
            self.say(f"{self._head()} {label} …")
            write(folder)
        seconds = time.monotonic() - started
        made_by = store.verify(folder)
        clock = folder.with_name(f"{folder.name}.json")
        if not there and "seconds" not in made_by:
            store.write_json(clock, {"piece": label, "seconds": round(seconds, 2)})
        weight = self.weights.get(label, 1.0)
        self._done_weight += weight
        if there:
            self.read_back += 1
        else:
            self._spent_weight += weight
            self.say(f"{self._head()} {label}: {seconds:.1f} s · {self._eta()}")
        told = made_by if "seconds" in made_by or not clock.exists() else store.read_json(clock)
        self.made.append({"piece": label, "key": folder.name, "seconds": float(told.get("seconds", math.nan))})
        return folder

    def _head(self) -> str:
        return f"[{len(self.made) + 1:>3}/{max(len(self.weights), len(self.made) + 1)}]"

    def _eta(self) -> str:
        """From the pieces made in this process: those read back cost nothing."""
        left = max(sum(self.weights.values()) - self._done_weight, 0.0)
        if not self._spent_weight:
            return ""
        pace = (time.monotonic() - self._started) / self._spent_weight
        seconds = left * pace
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One process a run folder: a second one is told so instead of writing beside the first."""
    if out.exists() and not out.is_dir():
        raise store.StoreError(f"{out} is a file; the run needs a folder. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise store.StoreError(f"another emlens process is at work in {out}. Wait for it, or choose another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
