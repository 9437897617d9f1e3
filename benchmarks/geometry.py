"""emlens' overlap nulls beside what a user would write instead, interleaved in one process on made-up activations.

    python benchmarks/geometry.py [--rounds 3] [--only isotropic,resampling,wide] [--json FILE]

isotropic   31 layers, 320 prompts, d 576, k 8, 1000 random subspaces: `nulls.isotropic_overlaps`, the whole `overlap` with it, and a loop over
            layers and draws of scipy.linalg.subspace_angles (all on one BLAS thread, as overlap runs: the fastest for either)
resampling  the same sizes, 200 draws of each null that refits a PCA a draw (a reference of 640 prompts), and the half-sample interval
wide        64 layers, d 5120, k 32, 320 prompts a side, reference of 640: every null once, in a process of its own, with its peak memory

Spectra fall as a power law, as those of residual streams do. Prints JSON: medians in seconds and ratios.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import subspace_angles
from threadpoolctl import threadpool_info

import emlens as em
from emlens import nulls
from emlens.geometry import overlap
from emlens.subspaces import principal_subspace
from emlens.threads import one_thread

PARTS = ("isotropic", "resampling", "wide")


def text(n: int, layers: int, d: int, name: str, seed: int, power: float = 0.7) -> em.Activations:
    """Prompts with a power-law spectrum around a common mean; every set along the same axes, as text is."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, d + 1) ** -power
    values = rng.standard_normal((n, layers, d), dtype=np.float32) * spread.astype(np.float32) + np.float32(0.3)
    return em.Activations.from_array(values, {"id": [f"{name}{i}" for i in range(n)]})


def interleaved(contest: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of every contestant, round by round, in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(rounds):
        for name in np.random.default_rng(turn).permutation(list(contest)):
            gc.collect()
            started = time.perf_counter()
            contest[name]()
            times[name].append(time.perf_counter() - started)
        print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in times.items()), file=sys.stderr, flush=True)
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def against_scipy(rounds: int, layers: int = 31, n: int = 320, d: int = 576, k: int = 8, n_draws: int = 1000) -> dict[str, Any]:
    a, b = text(n, layers, d, "a", 0), text(n, layers, d, "b", 1)
    bases = [principal_subspace(b.layer(i), k) for i in b.layers]

    @one_thread
    def ours() -> np.ndarray:
        return nulls.isotropic_overlaps(bases, n_draws, seed=0)

    @one_thread
    def scipy_loop() -> np.ndarray:
        rng = np.random.default_rng(0)
        drawn = (rng.standard_normal((d, k)) for _ in range(n_draws))
        return np.array([[(np.cos(subspace_angles(basis, random)) ** 2).mean() for basis in bases] for random in drawn])

    means = {name: float(f"{contestant().mean():.4g}") for name, contestant in (("ours", ours), ("scipy_loop", scipy_loop))}
    took = interleaved({"ours": ours, "scipy_loop": scipy_loop, "whole_overlap": partial(overlap, a, b, k, "isotropic", n_draws)}, rounds)
    ratio = round(took["scipy_loop"] / took["ours"], 1)
    return {"median_seconds": took, "scipy_loop_over_ours": ratio, "mean_overlap": {**means, "chance": round(k / d, 5)}}


def resampling(rounds: int, layers: int = 31, n: int = 320, d: int = 576, k: int = 8, n_draws: int = 200) -> dict[str, Any]:
    a, b, reference = (text(rows, layers, d, name, seed) for seed, (name, rows) in enumerate({"a": n, "b": n, "r": 2 * n}.items()))
    alone: dict[str, Callable[[], Any]] = {
        "reference": partial(overlap, a, b, k, reference, n_draws, n_splits=0),
        "covariance": partial(overlap, a, b, k, "covariance", n_draws, n_splits=0, reference=reference),
        "labels": partial(overlap, a, b, k, "labels", n_draws, n_splits=0),
        "interval": partial(overlap, a, b, k, ()),
    }
    took = interleaved(alone, rounds)
    return {"median_seconds": took, "all_together": round(sum(took.values()), 1)}


def wide(layers: int, d: int, k: int, n: int, null: str) -> dict[str, float]:
    """Seconds of one null, GiB at the peak of the process, and GiB of the activations themselves."""
    a, b, reference = (text(rows, layers, d, name, seed) for seed, (name, rows) in enumerate({"a": n, "b": n, "r": 2 * n}.items()))
    held = sum(side.values.nbytes for side in (a, b, reference)) / 2**30
    started = time.perf_counter()
    if null == "isotropic":
        overlap(a, b, k, null, 1000, n_splits=0)
    elif null == "interval":
        overlap(a, b, k, ())
    else:
        overlap(a, b, k, reference if null == "reference" else null, 200, n_splits=0, reference=reference if null == "covariance" else None)
    took, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(took, 1), "peak_gib": round(peak / 2**20, 2), "activations_gib": round(held, 2)}


def wide_nulls(layers: int = 64, d: int = 5120, k: int = 32, n: int = 320) -> dict[str, Any]:
    found = {}
    for null in ("isotropic", "reference", "covariance", "labels", "interval"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[null] = pool.submit(wide, layers, d, k, n, null).result()
        print(f"{null}: {found[null]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.only.split(",")
    blas = [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]
    said: dict[str, Any] = {"blas_threads_allowed": max(blas, default=1)}
    if "isotropic" in wanted:
        said["isotropic"] = against_scipy(args.rounds)
    if "resampling" in wanted:
        said["resampling"] = resampling(args.rounds)
    if "wide" in wanted:
        said["wide"] = wide_nulls()
    print(json.dumps(said, indent=1))
    if args.json:
        args.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
