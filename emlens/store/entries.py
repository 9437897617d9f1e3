"""Entries: folders that appear whole or not at all, with a manifest of what is in them and what made it."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import shards
from .files import FORMAT, StoreError, canonical, digest_file, digest_text, no_space, plain, read_json, refuse_file, sync

MANIFEST = "manifest.json"

VALUES = "values.safetensors"
JOURNAL = "shards.jsonl"
PARTIAL = ".partial"
"""How the folder of an entry that grows ends."""


@contextmanager
def writing(folder: str | os.PathLike, made_by: Mapping[str, Any], replace: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``folder``, with its manifest, when the block ends well.

    An entry that is there gives way; without ``replace`` only to the same one again. Files that emlens did not write never do.
    """
    folder = Path(folder)
    refuse_file(folder)
    there = _refuse_strange(folder, replace)
    if there and there["made_by"] != plain(made_by):
        raise StoreError(_other(folder, there["made_by"], "something else"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    with no_space(folder):
        try:
            temporary.mkdir()
            yield temporary
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            new = listed(temporary, files)
            if there and any(there["files"].get(name, {}).get("sha256") != facts["sha256"] for name, facts in new.items()):
                raise StoreError(_other(folder, there["made_by"], "other values or facts of the same description"))
            (temporary / MANIFEST).write_text(manifest_text(made_by, new), encoding="utf-8")
            for p in [*files, temporary / MANIFEST]:
                sync(p)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_strange(folder: Path, replace: bool) -> dict[str, Any] | None:
    """The manifest of the entry that is there and must not be replaced; StoreError for a folder of other people's files."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / MANIFEST).exists():
        found = sorted(p.name for p in folder.iterdir())
        raise StoreError(
            f"{folder} holds files that are no entry of emlens ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}); writing there would remove "
            f"them. Choose another path: {folder / 'acts'}, say."
        )
    return None if replace else read_manifest(folder)


def _other(folder: Path, made_by: Mapping[str, Any], what: str) -> str:
    words = " · ".join(part for part in told(made_by, folder.name).values() if part)
    return f"{folder} holds {what} already: {words}. Choose another path, or put this in its place with replace=True."


def told(made_by: Mapping[str, Any], name: str = "") -> dict[str, str]:
    """``kind, piece, adapter, model, place`` of an entry from what made it; ``name`` is its folder's (a key begins with the kind)."""
    meta = made_by.get("meta") or made_by.get("model")
    about = meta if isinstance(meta, Mapping) and ("adapter" in meta or "model" in meta) else made_by
    kind = made_by.get("kind") or made_by.get("what") or name.rpartition("-")[0] or "entry"
    adapter = about.get("adapter", "") if kind != "finetune" else ""
    if "variants" in about:
        adapter = " − ".join(map(str, about["variants"]))
    model = about.get("model", "")
    return {
        "kind": str(kind),
        "piece": str(made_by.get("piece", "")),
        "adapter": "before" if adapter is None else str(adapter),
        "model": model if isinstance(model, str) else "",
        "place": f"{made_by['site']} · {len(made_by.get('layers', []))} layers · {made_by.get('position', '')}" if "site" in made_by else "",
    }


def listed(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": digest_file(p)} for p in files}


def manifest_text(made_by: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The text of a manifest, sealed with a SHA-256 of itself."""
    made = plain(made_by)
    told = {"format": FORMAT, "made_by": made, "made_by_sha256": digest_text(canonical(made)), "files": dict(files)}
    return _text({**told, "sha256": digest_text(canonical(told))})


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise StoreError(
            f"{path} was written in format {found!r}; this emlens reads format {FORMAT}. Use the emlens that wrote it, or choose a new output folder."
        )
    files, seal = manifest.get("files"), manifest.pop("sha256", None)
    whole = set(manifest) == {"format", "made_by", "made_by_sha256", "files"} and isinstance(manifest["made_by"], dict) and isinstance(files, dict)
    whole = whole and all(isinstance(f, dict) and "bytes" in f for f in manifest["files"].values())
    whole = whole and digest_text(canonical(manifest["made_by"])) == manifest["made_by_sha256"]
    if whole and seal is not None:  # manifests of the first release have no seal
        sealed = {**manifest, "sha256": digest_text(canonical(manifest))}
        whole = path.read_bytes() == _text(sealed).encode("utf-8")
    if not whole:
        raise StoreError(f"{path} is damaged. Delete the folder {folder} and run again: only this piece is made anew.")
    return manifest


def _entry(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder written by emlens: {'it is a file' if folder.exists() else 'nothing is there'}.")
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise StoreError(f"{path} is missing. Delete the folder {folder} and run again: only this piece is made anew.")
        if path.stat().st_size != facts["bytes"]:
            raise StoreError(
                f"{path} is damaged: it has {path.stat().st_size} bytes, the manifest says {facts['bytes']}. Delete the folder {folder} "
                "and run again: only this piece is made anew."
            )
    return manifest


def described(folder: str | os.PathLike) -> dict[str, Any]:
    """What made an entry. The manifest is checked, and that every file is there and of its size; the contents are not read."""
    return _entry(Path(folder))["made_by"]


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """Check every file of an entry against its manifest, reading them piece by piece; returns what made it.

    Raises:
        StoreError: the folder has no manifest, another format version, a missing or a damaged file (named, with the rows where a journal tells).
    """
    folder = Path(folder)
    manifest = _entry(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if digest_file(path) != facts.get("sha256"):
            raise StoreError(
                f"{path} is damaged: its content is not what the manifest says{_where(folder, name, manifest['files'])}. Delete the folder {folder} "
                f"and run again: only this piece is made anew.{_mend(folder) if name == VALUES and JOURNAL in manifest['files'] else ''}"
            )
    return manifest["made_by"]


def _where(folder: Path, name: str, files: Mapping[str, Any]) -> str:
    """Which rows of the values are damaged, where the journal can tell."""
    journal = folder / JOURNAL
    if name != VALUES or JOURNAL not in files or digest_file(journal) != files[JOURNAL]["sha256"]:
        return ""
    made = shards.read_journal(journal)
    row_bytes = next((s.n_bytes // shards.count(s.rows) for s in made if s.rows), 0)
    offset = files[VALUES]["bytes"] - sum(s.n_bytes for s in made)
    bad = [r for s in shards.damaged(folder / name, offset, row_bytes, made) for r in s.rows]
    return f" ({shards.spoken(sorted(bad))})" if bad else " (in its header)"


def _mend(folder: Path) -> str:
    return f" Or rename the folder to {partial_of(folder).name} and run again: only the damaged rows are."


def partial_of(folder: Path) -> Path:
    """Where an entry grows until all of it is there; :func:`sweep` leaves it alone."""
    return folder.parent / f".{folder.name}{PARTIAL}"
