"""Guards what is kept: whole or not at all under errors, kills and a full disk; damage is noticed and named; keys tell things apart."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emlens import store
from emlens.activations import Activations
from emlens.store import MANIFEST, StoreError, key, read_json, read_table, sweep, verify, write_json, write_table, write_text, writing


def entry(folder: Path, text: str = "some text", **made_by: Any) -> Path:
    with writing(folder, made_by or {"kind": "test", "seed": 0}) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.txt").write_text(text)
        (temporary / "sub" / "b.bin").write_bytes(bytes(range(50)))
    return folder


def flipped(path: Path, at: int, bit: int = 1) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    return whole


# ---- whole or not at all


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

    acts = Activations.from_array(np.ones((2, 1, 3)))
    monkeypatch.setattr(numpy, "save_file", failing(said))
    with pytest.raises(StoreError, match="the disk is full"):
        acts.save(tmp_path / "acts")
    monkeypatch.setattr(numpy, "save_file", failing("something else"))
    with pytest.raises(SafetensorError, match="something else"):
        acts.save(tmp_path / "acts")
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


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path: Path) -> None:
    folder = entry(tmp_path / "entry")
    for name in ("a.txt", "sub/b.bin", MANIFEST):
        path = folder / name
        for at in range(path.stat().st_size):
            whole = flipped(path, at)
            with pytest.raises(StoreError) as caught:
                verify(folder)
            assert str(folder) in str(caught.value)
            if name != MANIFEST:
                assert str(path) in str(caught.value) and "damaged" in str(caught.value)
            path.write_bytes(whole)
    assert verify(folder) == {"kind": "test", "seed": 0}


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
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": found}))
    with pytest.raises(StoreError, match=rf"written in format {found!r}; this emlens reads format {store.FORMAT}"):
        verify(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
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
                whole = flipped(file, at, bit)
                with pytest.raises(StoreError, match="table.parquet is damaged"):
                    read_table(path)
                file.write_bytes(whole)
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
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    keys.append(key("shift", **PARTS))
    assert len(set(keys)) == len(others) + 3


def test_a_key_of_something_without_a_value_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot make a key or manifest of object"):
        key("shift", thing=object())
