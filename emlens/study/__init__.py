"""A declared grid (models × data × schedules × seeds) made into a run folder: tables, and a page that can be checked."""

import importlib.metadata
import os
import platform
import re
import resource
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from .. import __version__, store
from .grid import Cell, StudyError, cells, read_config, twins
from .keys import template

FORMAT = 1

RUN_FACTS = ("command", "started", "finished", "seconds", "peak_memory_gib", "pieces", "cached_pieces")
"""What ``study.json`` says of the last run, and its ``history`` of every run that ended."""

__all__ = ["Cell", "Study", "StudyError", "cells", "template", "twins"]


@dataclass(frozen=True)
class Study:
    """A study that can be run: ``Study.load("demo").run(out="runs/demo")``."""

    config: Mapping[str, Any]

    @classmethod
    def load(cls, source: str | os.PathLike, quick: bool = False) -> "Study":
        """Read and check a study file, or a shipped one by name. Every key and every file it names is looked at, before any weights are.

        ``emlens study new FILE.yaml`` (or :func:`template`) writes a file with every key and a word on each.

        Raises:
            StudyError: names all keys that are missing, unknown or will not do, and what is needed.
        """
        return cls(read_config(source, quick))

    def __repr__(self) -> str:
        return f"Study {self.config['name']} · {self.config['model']} · {len(cells(self.config))} tunings"

    def run(self, out: str | os.PathLike | None = None, command: str | None = None) -> Path:
        """Run every piece that is missing in ``out`` (default ``runs/<name>``), then tables and report; returns the folder.

        A killed run goes on from its last finished piece and ends in the same numbers. Pieces are checked against their SHA-256 when read.
        ``study.json`` tells of the last run; its ``history`` keeps a record of every run that ended, so that reading back hides no cost.

        Raises:
            StoreError: ``out`` is a file, was written by another version, is damaged (the file is named), is in use, or the disk is full.
        """
        from .pieces import alone

        folder = Path(out) if out is not None else Path("runs") / str(self.config["name"])
        with alone(folder):
            earlier = _history(folder)
            store.sweep(folder)
            started, clock = datetime.now().astimezone(), time.monotonic()
            tables, facts = self._tables(folder)
            for name, table in tables.items():
                store.write_table(table, folder / "tables" / f"{name}.parquet")
            record = {
                "format": FORMAT,
                "name": self.config["name"],
                "title": self.config.get("title", self.config["name"]),
                "config": self.config,
                "command": command or f"emlens.Study.load(…).run(out={str(out)!r})",
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 1),
                "peak_memory_gib": round(peak_memory(), 2),
                "versions": versions(),
                "machine": machine(),
                **facts,
            }
            record["history"] = [*earlier, {fact: record[fact] for fact in RUN_FACTS}]
            store.write_json(folder / "study.json", record)
            from ..report import build

            build(folder)
        return folder

    def _tables(self, folder: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        from . import analyse, foretelling, moves
        from .grid import halves
        from .measure import BEFORE, DRAWN, Bench

        config, seed = self.config, int(self.config.get("seed", 0))
        bench = Bench(config, folder / "pieces", versions())
        bench.tune()
        certificate = bench.certificate()
        margins, answers = bench.margins(), bench.answers()
        points = bench.checkpoints(margins)
        first, after, training_before, training_after = bench.record()
        before = first[BEFORE]
        twin = bench.random_twin()
        arms = bench.arms(after, before)
        steered = bench.steer(arms)

        shift = {run: acts - before for run, acts in after.items()}
        domain = {c.label: c.domain for c in bench.grid}
        training_shift = {run: acts - training_before[domain[run]] for run, acts in training_after.items()}
        inputs = sorted(row["key"] for row in bench.pieces.made)
        ask = config["geometry"]
        k, draws, n_perm, pairs, layers = ask["k"], ask["n_draws"], ask["n_permutations"], bench.steered_pairs, config["steer"]["layers"]

        traits = moves.trait_directions(bench)
        damage = moves.damage(bench, arms, DRAWN)

        def analysis(name: str, settings: Mapping[str, Any], make: Any) -> pd.DataFrame:
            return bench.pieces.table("analysis", name, {"inputs": inputs, "name": name, "settings": dict(settings), "seed": seed}, make)

        geometry = {"k": k, "n_draws": draws, "n_permutations": n_perm}
        tables = {
            "runs": analyse.runs_table(bench.grid, bench.runs, margins, seed),
            "training": analyse.training_table(bench.grid, bench.runs),
            "checkpoints": analyse.checkpoints_table(points, seed),
            "margins": margins,
            "margin_summary": analyse.margin_summary(margins),
            "margin_change": analyse.margin_change(bench.grid, margins, seed),
            "answers": answers,
            "shift_norms": analyse.norms_table(shift, training_shift, before, training_before, bench.grid),
            **analyse.agreement_tables(shift, bench.grid, seed),
            "overlap": analysis("overlap", geometry, lambda: analyse.overlap_table(before, training_before, k, draws, seed)),
            "similarity": analysis("similarity", geometry, lambda: analyse.similarity_table(shift, training_shift, draws, seed)),
            "similarity_contrast": analyse.similarity_contrast_table(shift, training_shift, bench.grid, seed),
            "overlap_similarity": analysis(
                "overlap against similarity", geometry,
                lambda: analyse.overlap_similarity_table(before, training_before, shift, training_shift, bench.grid, k, n_perm, seed),
            ),
            "prediction": analysis(
                "prediction", config["predict"],
                lambda: foretelling.prediction_table(before, margins, bench.grid, pairs, **config["predict"], seed=seed, twin=twin),
            ),
            "direction": analysis(
                "direction", config["steer"], lambda: analyse.direction_table(after, bench.grid, pairs, config["steer"]["n_permutations"], seed)
            ),
            "projections": moves.projections_table(before, after, pairs, arms.domains, layers, halves(bench.questions)[1]["id"]),
            **moves.dose_tables(steered, seed, DRAWN),
            "dose_damage": damage,
            "traits": moves.traits_table(shift, traits, before, seed),
            "certificate": certificate,
            "pieces": pd.DataFrame(bench.pieces.made),
        }  # fmt: skip
        facts = {
            "pieces": len(bench.pieces.made),
            "cached_pieces": bench.pieces.read_back,
            "model": {"name": config["model"], "layers": len(before.layers), "d_model": before.d_model, **before.meta},
            "data": {
                "questions": {"sha256": bench.questions_digest, "n": len(bench.questions)},
                **{c.data: {"sha256": bench.runs[c.label].config["data"]["fingerprint"], "n": bench.runs[c.label].config["n_train"],
                            "n_heldout": bench.runs[c.label].config["n_heldout"]} for c in bench.grid},
            },
            "notes": list(config.get("notes", [])),
        }  # fmt: skip
        return tables, facts


def _history(folder: Path) -> list[dict[str, Any]]:
    """The runs recorded in the ``study.json`` of a folder, none where there is no such file; another format is refused.

    A ``study.json`` from before every run was recorded holds one: its last.
    """
    path = folder / "study.json"
    if not path.exists():
        return []
    study = store.read_json(path)
    found = study.get("format")
    if found != FORMAT:
        raise store.StoreError(
            f"{folder} was written in run format {found!r}; this emlens writes format {FORMAT}. "
            "Use the emlens that wrote it, or choose another --out."
        )
    runs = study.get("history", [{fact: study[fact] for fact in RUN_FACTS}] if set(RUN_FACTS) <= set(study) else [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise store.StoreError(f"{path} is damaged (its 'history' is no list of runs). Delete it and run the study again: the pieces are kept.")
    return runs


def peak_memory() -> float:
    """GiB that this process has held at most: on Linux VmHWM, since ``ru_maxrss`` begins with what the parent held when it started this one."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def versions() -> dict[str, str]:
    """Of emlens and of everything a number depends on."""
    names = ("torch", "transformers", "peft", "numpy", "scipy", "pandas", "scikit-learn", "tokenizers", "safetensors")
    return {"emlens": __version__, "python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def machine() -> dict[str, Any]:
    import torch

    return {"system": platform.system(), "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def command_line() -> str:
    """How this process was called, without the folders in front of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
