"""Guards what is kept: whole or not at all under errors, kills and a full disk; entries that grow end bitwise as undisturbed ones; damage is
noticed and named, with its rows; reading needs no memory; keys tell things apart."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from emlens import store
from emlens.directions import Direction
from emlens.store import (
    JOURNAL,
    MANIFEST,
    VALUES,
    StoreError,
    described,
    growing,
    key,
    mapped,
    read_json,
    read_table,
    sweep,
    verify,
    write_json,
    write_table,
    write_text,
    write_values,
    writing,
)
from emlens.store.shards import count, runs


def entry(folder: Path, text: str = "some text", **made_by: Any) -> Path:
    with writing(folder, made_by or {"kind": "test", "seed": 0}) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.txt").write_text(text)
        (temporary / "sub" / "b.bin").write_bytes(bytes(range(50)))
    return folder


def flipped(path: Path, at: int, bit: int = 1) -> None:
    """Flip one bit in place; the same call again flips it back."""
    with open(path, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ bit]))


def test_what_a_folder_keeps_is_listed_with_what_it_is(tmp_path: Path) -> None:
    entry(tmp_path / "pieces" / "margins-01", piece="margins money-bad", adapter="tune-07", model={"gguf": "x"})
    entry(tmp_path / "pieces" / "margins-02", piece="margins before", adapter=None)
    entry(tmp_path / "pieces" / "tune-07", what="finetune", model={"model": "tiny", "adapter": None})
    write_json(tmp_path / "pieces" / "tune-07.json", {"piece": "tune money-bad", "seconds": 2})
    place = {"kind": "activations", "site": "resid_post", "layers": [0, 1], "position": "last"}
    entry(tmp_path / "pieces" / "activations-03", **place, meta={"model": "tiny", "adapter": "money-bad"})
    (tmp_path / "tables").mkdir()
    pd.DataFrame({"key": ["activations-03"], "piece": ["questions money-bad"]}).to_parquet(tmp_path / "tables" / "pieces.parquet")
    entry(tmp_path / "shift", **place, meta={"model": "tiny", "variants": ["bad", "before"]})
    entry(tmp_path / ".activations-09.partial", **place, meta={"model": "tiny", "adapter": None})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text("{}")
    table = store.kept(tmp_path)
    assert len(table) == 7 and table["when"].is_monotonic_increasing
    found = table.set_index("entry")
    assert found.loc["pieces/margins-01", ["kind", "piece", "adapter"]].tolist() == ["margins", "margins money-bad", "money-bad"]
    assert found.loc["pieces/margins-02", "adapter"] == "before" and found.loc["pieces/tune-07", "kind"] == "finetune"
    assert found.loc["pieces/activations-03", ["adapter", "model", "place"]].tolist() == ["money-bad", "tiny", "resid_post · 2 layers · last"]
    assert found.loc["pieces/activations-03", "piece"] == "questions money-bad"
    assert "questions money-bad" in set(store.kept(tmp_path / "pieces")["piece"])
    assert found.loc["shift", "adapter"] == "bad − before" and found.loc["other", "kind"] == "damaged, or not ours"
    sizes = sum(p.stat().st_size for p in (tmp_path / "shift").rglob("*") if p.is_file() and p.name != MANIFEST)
    assert found.loc["shift", "megabytes"] == pytest.approx(sizes / 1e6, abs=1e-3)
    assert set(found.index[~found["whole"]]) == {".activations-09.partial", "other"}
    with pytest.raises(StoreError, match="nowhere is not a folder: nothing is there"):
        store.kept(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert store.kept(tmp_path / "empty").empty and list(store.kept(tmp_path / "empty").columns) == list(table.columns)


# ---- whole or not at all


def test_without_replace_an_entry_gives_way_only_to_itself(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    for text, made_by, said in (
        ("some text", {"kind": "other"}, "something else already: test"),
        ("new", {"kind": "test", "seed": 0}, "other values"),
    ):
        with pytest.raises(StoreError, match=f"entry holds {said}"), writing(folder, made_by, replace=False) as temporary:
            (temporary / "a.txt").write_text(text)
        assert (folder / "a.txt").read_text() == "some text" and [p.name for p in tmp_path.iterdir()] == ["entry"]
    flipped(folder / "a.txt", 0)
    with writing(folder, {"kind": "test", "seed": 0}, replace=False) as temporary:
        (temporary / "a.txt").write_text("some text")
    verify(folder)  # the same, written again, mends it


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"files that are no entry of emlens \(a.txt\)"), writing(tmp_path / "mine", {}):
        pass
    assert (tmp_path / "mine" / "a.txt").read_text() == "years of work"


def test_an_entry_appears_only_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "entry"
    with writing(folder, {"kind": "test"}) as temporary:
        (temporary / "a.txt").write_text("some text")
        assert not folder.exists() and temporary.parent == folder.parent
    assert verify(folder) == {"kind": "test"}
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", MANIFEST]
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "entry", {}) as temporary:
        (temporary / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_leaves_the_entry_that_was_there(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry", "the first")
    with pytest.raises(KeyboardInterrupt), writing(folder, {}) as temporary:
        (temporary / "a.txt").write_text("the second")
        raise KeyboardInterrupt
    verify(folder)
    assert (folder / "a.txt").read_text() == "the first" and list(tmp_path.iterdir()) == [folder]
    entry(folder, "the third", kind="other")
    assert (folder / "a.txt").read_text() == "the third" and verify(folder) == {"kind": "other"}


@pytest.mark.parametrize("writer", [lambda p: write_text(p, "new"), lambda p: write_json(p, object()), lambda p: write_text(p, "\ud800")])
def test_a_file_is_replaced_whole_or_left(writer: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    try:
        writer(path)
    except (TypeError, UnicodeEncodeError):
        assert path.read_text() == "old"
    else:
        assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_the_middle_leaves_no_entry_and_sweep_removes_the_rest(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from emlens.store import replacing, writing

        root = Path(sys.argv[1])
        with replacing(root / "table.parquet") as file, writing(root / "entry", {"kind": "test"}) as folder:
            file.write_text("half")
            (folder / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 2 and all(p.name.startswith(".") and p.name.endswith(".tmp") for p in left)
    kept = entry(tmp_path / "kept")
    assert sorted(sweep(tmp_path)) == sorted(left)
    assert list(tmp_path.iterdir()) == [kept] and sweep(tmp_path) == [] and sweep(tmp_path / "absent") == []
    verify(kept)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("what", ["entry", "text", "json", "table"])
def test_a_full_disk_is_told_and_leaves_nothing(what: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    writers: dict[str, Callable[[Path], Any]] = {
        "entry": entry,
        "text": lambda path: write_text(path, "text"),
        "json": lambda path: write_json(path, {"a": 1}),
        "table": lambda path: write_table(pd.DataFrame({"a": [1]}), path),
    }
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"the disk is full while writing .*kept.*MiB free.*run the same command again"):
        writers[what](tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    writers[what](tmp_path / "kept")
    assert (tmp_path / "kept").exists()


def test_a_disk_that_fills_up_while_writing_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="the disk is full"),
        writing(tmp_path / "entry", {}) as temporary,
        open("/dev/full", "w") as device,
    ):
        (temporary / "a.txt").write_text("half")
        device.write("the system itself says that nothing fits here")
        device.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_safetensors_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError, numpy

    said = "Error while serializing: I/O error: No space left on device (os error 28)"

    def failing(text: str) -> Callable[..., None]:
        def save(*_: Any, **__: Any) -> None:
            raise SafetensorError(text)

        return save

    direction = Direction.from_array(np.eye(2, 3))
    monkeypatch.setattr(numpy, "save_file", failing(said))
    with pytest.raises(StoreError, match="the disk is full"):
        direction.save(tmp_path / "d.safetensors")
    monkeypatch.setattr(numpy, "save_file", failing("something else"))
    with pytest.raises(SafetensorError, match="something else"):
        direction.save(tmp_path / "d.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_system_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError):
        entry(tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_a_file_or_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for inside in (file, file / "deeper"):
        with pytest.raises(StoreError, match=r"file is a file; a folder is needed"), writing(inside, {}):
            pass
    with pytest.raises(StoreError, match=r"file is a file; a folder is needed"):
        write_text(file / "a.txt", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder is a folder; a file"):
        write_text(tmp_path / "folder", "text")
    assert file.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# ---- damage


@pytest.mark.parametrize("bit", [1, 4, 32, 128])
def test_every_flipped_byte_of_every_file_is_noticed_and_the_file_is_named(bit: int, tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry", kind="test", seed=0, rate=1e-05, name="für")
    for name in ("a.txt", "sub/b.bin", MANIFEST):
        path = folder / name
        for at in range(path.stat().st_size):
            flipped(path, at, bit)
            with pytest.raises(StoreError) as caught:
                verify(folder)
            assert str(path) in str(caught.value), (at, str(caught.value))
            flipped(path, at, bit)
    assert verify(folder) == described(folder) == {"kind": "test", "seed": 0, "rate": 1e-05, "name": "für"}


def test_described_reads_no_contents_but_sees_what_is_missing_or_cut(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    flipped(folder / "a.txt", 0)
    assert described(folder) == {"kind": "test", "seed": 0}
    (folder / "a.txt").write_text("some tex")
    with pytest.raises(StoreError, match=r"a.txt is damaged: it has 8 bytes, the manifest says 9"):
        described(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(StoreError, match="a.txt is missing"):
        described(folder)


def test_a_manifest_of_the_first_release_which_had_no_seal_is_read(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify(folder) == {"kind": "test", "seed": 0}
    for change in ({"seed": 1}, {"kind": "test"}):
        (folder / MANIFEST).write_text(json.dumps({**manifest, "made_by": change}))
        with pytest.raises(StoreError, match="manifest.json is damaged"):
            verify(folder)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    (folder / "a.txt").unlink()
    with pytest.raises(StoreError, match="a.txt is missing"):
        verify(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(StoreError, match="manifest.json is missing"):
        verify(folder)
    with pytest.raises(StoreError, match="nothing is there"):
        verify(tmp_path / "absent")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="it is a file"):
        verify(tmp_path / "file")


@pytest.mark.parametrize("found", [store.FORMAT + 1, 0, None, "1"])
def test_another_format_version_is_refused(found: Any, tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    manifest = json.loads((folder / MANIFEST).read_text())
    whole = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": found}))
    with pytest.raises(StoreError, match=rf"manifest.json was written in format {found!r}; this emlens reads format {store.FORMAT}"):
        verify(folder)
    (folder / MANIFEST).write_text(whole)
    verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 1, "files": [], "made_by": {}}', "\x00"])
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match="entry"):
        verify(folder)


def test_json_comes_back_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": np.float32(0.5), "b": (1, 2), "c": Path("x"), "d": np.arange(2), "e": {3, 1}, "f": None, "g": "ü"})
    assert read_json(path) == {"a": 0.5, "b": [1, 2], "c": "x", "d": [0, 1], "e": [1, 3], "f": None, "g": "ü"}
    with pytest.raises(StoreError, match="absent.json is missing"):
        read_json(tmp_path / "absent.json")
    for damage in (b"{", b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match="a.json is damaged"):
            read_json(path)


def test_a_table_comes_back_with_its_attrs_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    frame = pd.DataFrame({"layer": [0, 1], "estimate": [0.5, np.nan], "null": ["", "isotropic"]})
    frame.attrs = {"what": "test", "seed": np.int64(3), "null": {"isotropic": "200 draws"}}
    path = tmp_path / "table.parquet"
    write_table(frame, path)
    again = read_table(path)
    pd.testing.assert_frame_equal(again, frame)
    assert again.attrs == {"what": "test", "seed": 3, "null": {"isotropic": "200 draws"}} and isinstance(frame.attrs["seed"], np.int64)
    seal = tmp_path / "table.parquet.sha256"
    for file, places in ((path, range(0, path.stat().st_size, 53)), (seal, range(64))):
        for at in places:
            for bit in (1, 128):
                flipped(file, at, bit)
                with pytest.raises(StoreError, match="table.parquet is damaged"):
                    read_table(path)
                flipped(file, at, bit)
    read_table(path)
    seal.write_text("")
    with pytest.raises(StoreError, match="table.parquet is damaged"):
        read_table(path)
    seal.unlink()
    with pytest.raises(StoreError, match="table.parquet.sha256 is missing"):
        read_table(path)


def test_sha256sum_reads_the_seal(tmp_path: Path) -> None:
    write_table(pd.DataFrame({"a": [1]}), tmp_path / "t.parquet")
    assert subprocess.run(["sha256sum", "-c", "t.parquet.sha256"], cwd=tmp_path, capture_output=True).returncode == 0
    flipped(tmp_path / "t.parquet", 5)
    assert subprocess.run(["sha256sum", "-c", "t.parquet.sha256"], cwd=tmp_path, capture_output=True).returncode == 1


# ---- keys

PARTS: dict[str, Any] = {"model": "tiny", "layers": (0, 1), "recipe": {"rank": 32, "seed": 0, "rates": [1e-4, 1e-5]}, "adapter": None}


def test_a_key_does_not_depend_on_the_order_of_dicts_or_on_containers() -> None:
    turned: dict[str, Any] = dict(reversed(PARTS.items()))
    turned["recipe"] = dict(reversed(PARTS["recipe"].items()))
    turned["layers"] = np.array([0, 1])
    assert key("shift", **turned) == key("shift", **PARTS)
    assert key("shift", **PARTS).startswith("shift-") and len(key("shift", **PARTS)) == len("shift-") + 16


def test_a_key_depends_on_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = PARTS["recipe"]
    others = [
        {**PARTS, "model": "tiny2"},
        {**PARTS, "layers": (1, 0)},
        {**PARTS, "layers": (0,)},
        {**PARTS, "recipe": {**recipe, "seed": 1}},
        {**PARTS, "recipe": {**recipe, "rates": [1e-4, 2e-5]}},
        {**PARTS, "recipe": {**recipe, "new": None}},
        {**PARTS, "adapter": "ext"},
        {**PARTS, "adapter": "None"},
        {k: v for k, v in PARTS.items() if k != "adapter"},
    ]
    keys = [key("shift", **parts) for parts in [PARTS, *others]]
    keys.append("shift-" + key("margins", **PARTS).split("-")[1])
    monkeypatch.setattr("emlens.store.files.FORMAT", store.FORMAT + 1)
    keys.append(key("shift", **PARTS))
    assert len(set(keys)) == len(others) + 3


def test_a_key_of_something_without_a_value_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot make a key or manifest of object"):
        key("shift", thing=object())


# ---- entries that grow

N_ROWS, N_SHARDS = 60, 20
SHAPE = (N_ROWS, 2, 5)
MADE_BY = {"kind": "test", "model": "tiny", "plan": {"budget": 512, "rate": 1e-05}}
ALL = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
PLAN = [np.random.default_rng(2).permutation(N_ROWS)[s::N_SHARDS].tolist() for s in range(N_SHARDS)]


def grow_to_the_end(folder: Path, shards: Iterable[int] = range(N_SHARDS), made_by: dict[str, Any] = MADE_BY) -> list[int]:
    """Put what is not done yet; returns which shards that was."""
    put = []
    with growing(folder, made_by, SHAPE) as grow:
        write_text(grow.folder / "facts.txt", "facts of the prompts\n")
        for s in shards:
            if not grow.done(s):
                grow.put(s, PLAN[s], ALL[PLAN[s]])
                put.append(s)
    return put


def stopped(folder: Path, after: int, made_by: dict[str, Any] = MADE_BY) -> Path:
    """A recording that an error ended after so many shards; returns its partial folder."""
    with pytest.raises(StoreError, match="is not finished"):
        grow_to_the_end(folder, range(after), made_by)
    return folder.parent / f".{folder.name}.partial"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "entry"
    grow_to_the_end(folder)
    return contents(folder)


def test_a_grown_entry_is_an_entry_and_its_values_are_a_plain_safetensors_file(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    assert sorted(undisturbed) == ["facts.txt", MANIFEST, JOURNAL, VALUES]
    save_file({"values": ALL}, tmp_path / "theirs.safetensors")
    write_values(tmp_path / "ours.safetensors", ALL)
    assert undisturbed[VALUES] == (tmp_path / "theirs.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    folder = tmp_path / "entry"
    with growing(folder, MADE_BY, SHAPE) as grow:
        assert grow.folder == tmp_path / ".entry.partial" and not folder.exists() and sweep(tmp_path) == []
        assert not load_file(grow.folder / VALUES)["values"].any() and not grow.done(0) and grow.n_rows == 0
        for s, rows in enumerate(PLAN):
            grow.put(s, rows, ALL[rows].astype(np.float64))
            assert grow.done(s)
        assert grow.n_rows == N_ROWS and "60 of 60 rows" in repr(grow)
    assert list(tmp_path.glob(".*")) == [] and verify(folder) == MADE_BY
    assert {k: v for k, v in contents(folder).items() if k in (VALUES, JOURNAL)} == {k: undisturbed[k] for k in (VALUES, JOURNAL)}


def test_row_numbers_are_told_as_the_longest_runs_there_are() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 5, 9, 12):
        for _ in range(30):
            rows = np.sort(rng.permutation(12)[:size])
            told = runs(rows)
            assert [i for start, stop in told for i in range(start, stop)] == rows.tolist() and count(told) == size
            assert all(start < stop for start, stop in told) and all(a[1] < b[0] for a, b in pairwise(told))


@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (3, 1, 1)])
def test_small_and_empty_entries_grow_too(shape: tuple[int, int, int], tmp_path: Path) -> None:
    with growing(tmp_path / "entry", {}, tuple(np.array(shape))) as grow:  # type: ignore[arg-type]
        grow.put(0, range(shape[0]), np.ones(shape))
        grow.put(1, [], np.ones((0, *shape[1:])))
    verify(tmp_path / "entry")
    np.testing.assert_array_equal(mapped(tmp_path / "entry" / VALUES), np.ones(shape, dtype=np.float32))
    np.testing.assert_array_equal(load_file(tmp_path / "entry" / VALUES)["values"], np.ones(shape, dtype=np.float32))


def test_a_line_of_the_journal_is_written_after_its_rows_are_safe_and_the_name_is_given_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def watched(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any) -> Any:
            seen.append((call, os.path.basename(args[0] if isinstance(args[0], (str, Path)) else os.readlink(f"/proc/self/fd/{args[0]}"))))
            return real(*args)

        return watch

    for call in ("pwrite", "write", "fsync", "replace"):
        monkeypatch.setattr(os, call, watched(call, getattr(os, call)))
    with growing(tmp_path / "entry", MADE_BY, (3, 2, 5)) as grow:
        seen.clear()
        grow.put(0, [0, 2, 1], ALL[:3])
        assert seen == [("pwrite", VALUES), ("fsync", VALUES), ("write", JOURNAL), ("fsync", JOURNAL)]
        seen.clear()
    assert seen[-3][0] == "replace" and "manifest" in seen[-3][1] and seen[-2:] == [("replace", ".entry.partial"), ("fsync", tmp_path.name)]
    assert seen.index(("fsync", VALUES)) < len(seen) - 3


def test_an_error_keeps_the_finished_shards_and_only_the_others_are_made(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), growing(tmp_path / "entry", MADE_BY, SHAPE) as grow:
        for s in (3, 7):
            grow.put(s, PLAN[s], ALL[PLAN[s]])
        raise ZeroDivisionError
    assert not (tmp_path / "entry").exists()
    assert grow_to_the_end(tmp_path / "entry") == [s for s in range(N_SHARDS) if s not in (3, 7)]
    assert contents(tmp_path / "entry") == undisturbed and [p.name for p in tmp_path.iterdir()] == ["entry"]


KILLED = """
import os, signal, sys, time
from pathlib import Path

import numpy as np
from emlens.store import growing, write_text

root, mode, rng = Path(sys.argv[1]), sys.argv[2], np.random.default_rng(0)
N_ROWS, N_SHARDS = (120, 40) if mode == "chained" else (12, 4)
SHAPE = (N_ROWS, 2, 5)
MADE_BY = {"kind": "test", "model": "tiny", "plan": {"budget": 512, "rate": 1e-05}}
ALL = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
PLAN = [np.random.default_rng(2).permutation(N_ROWS)[s::N_SHARDS].tolist() for s in range(N_SHARDS)]
CALLS = ("open", "write", "pwrite", "fsync", "replace", "unlink", "mkdir", "posix_fallocate", "ftruncate")
calls, last = 0, 10**9


def counted(name):
    real = getattr(os, name)

    def call(*args, **kwargs):
        global calls
        if calls == last:
            if name in ("write", "pwrite"):
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return None if name == "fsync" else real(*args, **kwargs)

    setattr(os, name, call)


def record(folder, pause=0):
    with growing(folder, MADE_BY, SHAPE) as grow:
        write_text(grow.folder / "facts.txt", "facts of the prompts\\n")
        for s, rows in enumerate(PLAN):
            if not grow.done(s):
                time.sleep(pause)
                grow.put(s, rows, ALL[rows])
                os.write(log, b"x")


def child(kill_at, *arguments):
    # a process that records, with every call of the system counted, and killed in the middle of one of them
    global last
    pid = os.fork()
    if pid:
        return pid
    if kill_at is not None:
        last = kill_at
        for name in CALLS:
            counted(name)
    record(*arguments)
    (root / "calls").write_text(str(calls))
    os._exit(0)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
assert ended(child(10**9 if mode == "everywhere" else None, root / "undisturbed")) == 0
good = contents(root / "undisturbed")
if mode == "chained":
    os.ftruncate(log, 0)
    for kill in range(10):
        wanted = os.fstat(log).st_size + rng.integers(2)
        pid = child(None, root / "entry", 0.01)
        while os.fstat(log).st_size < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.015))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL, "it was at its end before it was killed"
    at_the_end = os.fstat(log).st_size
    assert ended(child(None, root / "entry")) == 0
    print(at_the_end, os.fstat(log).st_size)
    assert contents(root / "entry") == good
else:
    n = int((root / "calls").read_text())
    for at in range(n):
        folder = root / f"entry-{at}"
        assert ended(child(at, folder)) == -signal.SIGKILL, at
        if not folder.exists():
            assert ended(child(10**9, folder)) == 0, at
        assert contents(folder) == good, at
    print(n)
"""


def killed(root: Path, mode: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), mode], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_ten_kills_in_a_row_end_bitwise_as_an_undisturbed_recording(tmp_path: Path) -> None:
    before_the_last, in_all = killed(tmp_path, "chained")
    assert contents(tmp_path / "entry") == contents(tmp_path / "undisturbed") and verify(tmp_path / "entry") == MADE_BY
    assert 0 < before_the_last < 40, "the kills fell before the first or after the last shard"
    assert 40 - 10 <= in_all <= 40, "a shard that was finished was made again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls", "entry", "log", "undisturbed"]


def test_a_kill_at_every_single_call_of_the_system_loses_nothing(tmp_path: Path) -> None:
    (n,) = killed(tmp_path, "everywhere")
    assert n > 40 and verify(tmp_path / f"entry-{n // 2}") == MADE_BY and not list(tmp_path.glob(".*"))


def test_a_torn_journal_loses_only_the_shards_it_no_longer_holds(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    journal = stopped(tmp_path / "entry", 4) / JOURNAL
    whole = journal.read_bytes()
    sizes = range(whole.index(b"\n") + 1, len(whole))
    for torn in [whole + b'{"shard":4,"rows":[[1,2]]', whole + whole[:-9], *(whole[:size] for size in sizes[::-3])]:
        journal.unlink()
        journal.write_bytes(torn)
        with pytest.raises(ZeroDivisionError), growing(tmp_path / "entry", MADE_BY, SHAPE) as grow:
            assert [grow.done(s) for s in range(6)] == [whole[: len(torn)].count(b"\n") > s for s in range(6)]
            raise ZeroDivisionError
    assert grow_to_the_end(tmp_path / "entry") == list(range(1, N_SHARDS))
    assert contents(tmp_path / "entry") == undisturbed


def test_flipped_bytes_of_a_partial_folder_are_told_and_made_again(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    folder, first = tmp_path / "entry", len(undisturbed[VALUES]) - ALL.nbytes
    partial = stopped(folder, 6)
    row = PLAN[2][1]
    flipped(partial / VALUES, first + row * ALL[0].nbytes + 11)
    with pytest.warns(UserWarning, match=rf"{VALUES} is damaged \(rows .*\b{row}\b.*\); these rows are recorded again"):
        assert grow_to_the_end(folder) == [2, *range(6, N_SHARDS)]
    assert contents(folder) == undisturbed

    folder = tmp_path / "header"
    flipped(stopped(folder, 6) / VALUES, 20)
    assert grow_to_the_end(folder) == list(range(6, N_SHARDS)) and contents(folder) == undisturbed

    folder = tmp_path / "cut"
    partial = stopped(folder, 6)
    os.truncate(partial / VALUES, first + 3)
    with pytest.warns(UserWarning, match="is damaged"):
        assert grow_to_the_end(folder) == list(range(N_SHARDS))
    assert contents(folder) == undisturbed

    folder = tmp_path / "manifest"
    flipped(stopped(folder, 6) / MANIFEST, 90)
    with pytest.raises(StoreError, match=r"manifest.partial/manifest.json is damaged"):
        grow_to_the_end(folder)


def test_a_flipped_byte_of_a_partial_journal_costs_at_most_two_shards(tmp_path: Path) -> None:
    partial = stopped(tmp_path / "entry", 5)
    whole = (partial / JOURNAL).read_bytes()
    for at in {*range(0, len(whole), 7), *(i for i, byte in enumerate(whole) if byte == ord("\n"))}:
        flipped(partial / JOURNAL, at, 1 << at % 8)
        with pytest.raises(ZeroDivisionError), growing(tmp_path / "entry", MADE_BY, SHAPE) as grow:
            done = [s for s in range(N_SHARDS) if grow.done(s)]
            raise ZeroDivisionError
        assert set(done) < set(range(5)) and len(done) >= 3
        (partial / JOURNAL).unlink()
        (partial / JOURNAL).write_bytes(whole)


def test_damage_between_writing_and_the_end_is_seen_before_the_manifest_blesses_it(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=rf"was damaged since it was written \(rows .*\b{PLAN[1][0]}\b"),
        growing(tmp_path / "a", MADE_BY, SHAPE) as grow,
    ):
        write_text(grow.folder / "facts.txt", "facts of the prompts\n")
        for s, rows in enumerate(PLAN):
            grow.put(s, rows, ALL[rows])
        flipped(grow.folder / VALUES, len(undisturbed[VALUES]) - ALL.nbytes + PLAN[1][0] * ALL[0].nbytes)
    with pytest.warns(UserWarning, match="is damaged"):
        assert grow_to_the_end(tmp_path / "a") == [1]
    assert contents(tmp_path / "a") == undisturbed


def test_every_flipped_byte_of_a_grown_entry_is_named_with_its_rows_and_mended_by_a_new_name(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    grow_to_the_end(folder)
    first = len(undisturbed[VALUES]) - ALL.nbytes
    for name in undisturbed:
        for at in range(0, len(undisturbed[name]), 11 if name == VALUES else 1):
            flipped(folder / name, at, 16)
            with pytest.raises(StoreError) as caught:
                verify(folder)
            assert str(folder / name) in str(caught.value)
            if name == VALUES:
                row = (at - first) // ALL[0].nbytes
                assert (
                    "(in its header)" in str(caught.value)
                    if at < first
                    else f" {row}" in str(caught.value).split("(rows")[1].split(")")[0].replace("–", " ")
                )
            flipped(folder / name, at, 16)
    flipped(folder / VALUES, first + 5)
    with pytest.raises(StoreError, match=r"rename the folder to \.entry\.partial and run again"):
        verify(folder)
    folder.rename(tmp_path / ".entry.partial")
    with pytest.warns(UserWarning, match="is damaged"):
        assert grow_to_the_end(folder) == [s for s in range(N_SHARDS) if 0 in PLAN[s]]
    assert contents(folder) == undisturbed


def test_another_recording_is_refused_where_one_has_begun(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    partial = stopped(folder, 3)
    kept = contents(partial)
    other = {**MADE_BY, "plan": {"budget": 1024, "rate": 1e-05}}
    with pytest.raises(StoreError, match=r"entry.partial was begun by another recording \(budget: 512 there, 1024 asked for\)"):
        grow_to_the_end(folder, made_by=other)
    with pytest.raises(StoreError, match="another size"), growing(folder, MADE_BY, (N_ROWS + 1, 2, 5)):
        pass
    assert contents(partial) == kept
    grow_to_the_end(folder)
    with pytest.raises(StoreError, match=r"entry holds another recording \(budget"):
        grow_to_the_end(folder, made_by=other)
    with pytest.raises(StoreError, match="entry is there already, whole"):
        grow_to_the_end(folder)
    verify(folder)


def test_a_partial_folder_in_which_nothing_is_finished_is_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    (stopped(folder, 0) / "old.txt").write_text("of the other")
    other = {**MADE_BY, "model": "tiny2"}
    assert grow_to_the_end(folder, made_by=other) == list(range(N_SHARDS))
    assert verify(folder) == other and "old.txt" not in contents(folder)


def test_what_determines_nothing_is_not_compared_and_the_first_is_kept(tmp_path: Path) -> None:
    folder, renamed = tmp_path / "entry", {**MADE_BY, "model": "another name"}
    stopped(folder, 3)
    with pytest.raises(StoreError, match="model: 'tiny' there, 'another name' asked for"):
        grow_to_the_end(folder, made_by=renamed)
    with growing(folder, renamed, SHAPE, aside=("model",)) as grow:
        for s in range(3, N_SHARDS):
            grow.put(s, PLAN[s], ALL[PLAN[s]])
    assert verify(folder) == MADE_BY


@pytest.mark.parametrize(
    ("shard", "rows", "values", "words"),
    [
        (0, PLAN[0], ALL[:3], "shard 0 is on the disk already"),
        (1, [1, 2], ALL[:3], r"shape \(3, 2, 5\); needed is \(2, 2, 5\)"),
        (1, [1, 2, 3], ALL[:3, :1], r"shape \(3, 1, 5\); needed is \(3, 2, 5\)"),
        (1, [N_ROWS], ALL[:1], "do not lie in the entry's 60"),
        (1, [-1], ALL[:1], "do not lie in the entry's 60"),
        (1, [5, 5], ALL[:2], "twice"),
        (1, PLAN[0][:1], ALL[:1], "twice, or belong to a shard that is done"),
        (1, PLAN[1][:2], np.stack([ALL[0], np.where(ALL[1] > 0, np.nan, ALL[1])]), f"row {PLAN[1][1]} holds NaN or Inf .1 of 2"),
        (1, PLAN[1][:1], np.full((1, 2, 5), 1e300), "NaN or Inf"),
    ],
)
def test_what_does_not_fit_in_a_shard_is_refused_and_changes_nothing(shard: int, rows: list[int], values: Any, words: str, tmp_path: Path) -> None:
    with growing(tmp_path / "entry", MADE_BY, SHAPE) as grow:
        grow.put(0, PLAN[0], ALL[PLAN[0]])
        before = contents(grow.folder)
        with np.errstate(over="ignore"), pytest.raises(ValueError, match=words):
            grow.put(shard, rows, values)
        assert contents(grow.folder) == before
        for s in range(1, N_SHARDS):
            grow.put(s, PLAN[s], ALL[PLAN[s]])
    verify(tmp_path / "entry")


# ---- two at a time, and too little room


def test_two_recordings_into_one_folder_are_refused(tmp_path: Path) -> None:
    code = "import sys; from emlens.store import growing\nwith growing(sys.argv[1], {}, (1, 1, 1)): pass"
    with growing(tmp_path / "entry", {}, (1, 1, 1)) as grow:
        with pytest.raises(StoreError, match="another process is recording into .*entry.partial"), growing(tmp_path / "entry", {}, (1, 1, 1)):
            pass
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "entry")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "StoreError: another process is recording into" in done.stderr
        with growing(tmp_path / "other", {}, (1, 1, 1)) as second:
            second.put(0, [0], np.ones((1, 1, 1)))
        grow.put(0, [0], np.ones((1, 1, 1)))
    verify(tmp_path / "entry")


RACING = """
import os, sys
from pathlib import Path

import numpy as np
from emlens.store import StoreError, growing, verify

root = Path(sys.argv[1])
for race in range(6):
    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                with growing(root / f"entry-{race}", {"race": race}, (4, 2, 3)) as grow:
                    for s in range(4):
                        if not grow.done(s):
                            grow.put(s, [s], np.full((1, 2, 3), s, dtype=np.float32))
            except StoreError as error:
                os._exit(1 if "another process" in str(error) else 2 if "there already" in str(error) else 3)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes.count(0) == 1 and set(codes) <= {0, 1, 2}, codes
    verify(root / f"entry-{race}")
assert not list(root.glob(".*")), list(root.glob(".*"))
"""


def test_of_many_that_start_together_one_records_and_the_others_are_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RACING, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def failing_after(n: int, number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    left = [n]

    def call(*args: Any) -> Any:
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        left[0] -= 1
        return real(*args)

    return call


def test_a_disk_too_small_is_told_before_the_first_row_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing_after(0, errno.ENOSPC, os.posix_fallocate))
    said = r"the disk is full while writing .*entry.*MiB free, 5722 MiB are written in all"
    with pytest.raises(StoreError, match=said), growing(tmp_path / "entry", MADE_BY, (10**4, 30, 5000)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("without", ["call", "file system"])
def test_without_reservation_the_free_space_is_looked_at(
    without: str, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "call":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", failing_after(0, errno.EOPNOTSUPP, os.posix_fallocate))
    with pytest.raises(StoreError, match="the disk is full"), growing(tmp_path / "big", {}, (2**31, 2**10, 2**10)):
        pass
    assert list(tmp_path.iterdir()) == []
    grow_to_the_end(tmp_path / "entry")
    assert contents(tmp_path / "entry") == undisturbed


@pytest.mark.parametrize(("call", "after"), [("pwrite", 10), ("write", 3), ("fsync", 9), ("replace", 3), ("replace", 4), ("replace", 5)])
def test_a_disk_that_fills_up_later_keeps_what_is_finished(
    call: str, after: int, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, failing_after(after, errno.ENOSPC, getattr(os, call)))
    with pytest.raises(StoreError, match=r"the disk is full while writing .*run the same command again: finished pieces are kept"):
        grow_to_the_end(tmp_path / "entry")
    monkeypatch.undo()
    again = grow_to_the_end(tmp_path / "entry")
    assert len(again) < N_SHARDS and contents(tmp_path / "entry") == undisturbed


def test_a_half_written_line_of_the_journal_is_taken_back(undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with growing(tmp_path / "entry", MADE_BY, SHAPE) as grow:
        write_text(grow.folder / "facts.txt", "facts of the prompts\n")
        monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: len(data) // 2]))
        with pytest.raises(OSError, match="No space"):
            grow.put(0, PLAN[0], ALL[PLAN[0]])
        monkeypatch.undo()
        assert not grow.done(0) and (grow.folder / JOURNAL).read_bytes() == b""
        for s, rows in enumerate(PLAN):
            grow.put(s, rows, ALL[rows])
    assert contents(tmp_path / "entry") == undisturbed


# ---- reading without loading


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"])
def test_mapped_reads_what_safetensors_wrote(dtype: str, tmp_path: Path) -> None:
    values = (np.random.default_rng(0).normal(size=(5, 3, 2)) * 9).astype(dtype)
    path = tmp_path / "a.safetensors"
    save_file({"first": np.arange(7.0), "values": values, "last": np.zeros((0, 2), dtype=np.float32)}, path, metadata={"a": "ü"})
    found = mapped(path)
    assert isinstance(found, np.memmap) and found.dtype == values.dtype and not found.flags.writeable
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(mapped(path, "first"), np.arange(7.0))
    assert mapped(path, "last").shape == (0, 2)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(StoreError, match="a.safetensors is missing"):
        mapped(path)
    write_values(path, ALL)
    whole = path.read_bytes()
    with pytest.raises(StoreError, match=r"holds no tensor 'other', only \['values'\]"):
        mapped(path, "other")
    for damage in (
        b"",
        whole[:5],
        whole[:20],
        whole[:-1],
        b"\xff" * 200,
        whole[:8] + b"[" + whole[9:],
        whole.replace(b"F32", b"F33"),
        b"\x02" + b"\0" * 7 + b"[]",
    ):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match=r"a.safetensors is damaged or not a safetensors file"):
            mapped(path)


READING = """
import sys
from pathlib import Path

import numpy as np
from emlens.store import growing, mapped, verify

root, mode = Path(sys.argv[1]), sys.argv[2]
SHAPE = (128, 32, 4096)


def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024


before = peak()
if mode == "write":
    with growing(root / "entry", {"kind": "test"}, SHAPE) as grow:
        for s in range(32):
            rows = list(range(s, 128, 32))
            grow.put(s, rows, np.full((4, *SHAPE[1:]), s, dtype=np.float32))
else:
    verify(root / "entry")
    values = mapped(root / "entry" / "values.safetensors")
    assert values.shape == SHAPE and [float(values[r, 5, 7]) for r in (0, 70, 127)] == [0, 6, 31]
    if mode == "load":
        values = np.array(values)
print(peak() - before)
"""


def test_an_entry_is_written_verified_and_read_by_another_process_in_little_memory(tmp_path: Path) -> None:
    def grown(mode: str) -> float:
        done = subprocess.run([sys.executable, "-c", READING, str(tmp_path), mode], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert grown("write") < 24 and (tmp_path / "entry" / VALUES).stat().st_size > 64 * 2**20
    assert grown("read") < 24
    assert grown("load") > 54, "memory that is used would not be seen"
