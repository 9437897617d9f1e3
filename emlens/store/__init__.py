"""What is kept: keys, atomic writes, checksums, reading without loading. The only room that writes what is read back later.

Two shapes are kept. A *table* is a parquet file with its SHA-256 beside it (``sha256sum -c`` reads the same line). An *entry* is a folder with
a ``manifest.json`` that names every file, its size and its SHA-256, and what made it; a folder appears under its final name only when all of
it is on the disk, so a kill at any moment leaves either a whole entry or none. An entry larger than memory *grows* shard by shard in
``.<name>.partial/`` (:func:`growing`); a kill loses at most the unfinished shard. :func:`kept` says which entry of a folder is which.
"""

from .entries import JOURNAL, MANIFEST, VALUES, described, verify, writing
from .files import (
    FORMAT,
    StoreError,
    canonical,
    digest_file,
    digest_text,
    key,
    plain,
    read_json,
    read_table,
    replacing,
    sweep,
    write_json,
    write_table,
    write_text,
)
from .listing import kept, refuse_store
from .partial import Growing, growing
from .tensors import mapped, pieces, whole, write_values

__all__ = [
    "FORMAT",
    "JOURNAL",
    "MANIFEST",
    "VALUES",
    "Growing",
    "StoreError",
    "canonical",
    "described",
    "digest_file",
    "digest_text",
    "growing",
    "kept",
    "key",
    "mapped",
    "pieces",
    "plain",
    "read_json",
    "read_table",
    "refuse_store",
    "replacing",
    "sweep",
    "verify",
    "whole",
    "write_json",
    "write_table",
    "write_text",
    "write_values",
    "writing",
]
