"""emlens' nested ridge and its permutation test beside what a user would write instead, interleaved in one process on made-up activations.

    python benchmarks/prediction.py [--rounds 3] [--permutations 2] [--only sklearn,himalaya,wide] [--json FILE]

sklearn   31 layers, 320 prompts in 8 groups, d 576, 15 penalties, whole groups held out in outer and inner folds, 1000 permutations: the whole
          `em.predict`, beside GridSearchCV over Pipeline(StandardScaler, Ridge) on the same folds, one layer and `--permutations` targets a
          round, extrapolated to all (and divided by the cores, as if it ran in parallel without loss); the largest difference of predictions
himalaya  one layer, the same folds and 1001 targets, float64, one thread: `ridge.nested_ridge` beside himalaya's KernelRidgeCV (its quickest where
          features outnumber prompts), which scales features once an outer fold, inner test rows included; predictions are compared where both
          choose one penalty
wide      64 layers, d 5120, 1414 prompts in 56 groups, 5 grouped folds (25 inner training sets), 200 permutations: `em.predict` once, in a process
          of its own, with its peak memory

Rows have a power-law spectrum along axes turned against the features (a cosine transform), as residual streams have; the target is one of
these axes, a level of the group and noise. Prints JSON: medians in seconds and ratios.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from geometry import interleaved
from scipy.fft import dct
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import emlens as em
from emlens import stats
from emlens.ridge import PENALTIES, Fold, fixed, nested_ridge

PARTS = ("sklearn", "himalaya", "wide")


def scored(n: int, layers: int, d: int, n_groups: int, seed: int = 0, power: float = 0.7) -> em.Activations:
    """Activations with the facts "group" and "score"."""
    rng = np.random.default_rng(seed)
    spread = (rng.choice([-1, 1], d) * np.arange(1, d + 1) ** -power).astype(np.float32)
    values = np.empty((n, layers, d), dtype=np.float32)
    known = rng.standard_normal(n)
    for i in range(layers):
        own = rng.standard_normal((n, d), dtype=np.float32)
        own[:, 5] = known
        values[:, i] = dct(own * spread, norm="ortho")
    group = rng.permutation(np.arange(n) % n_groups)
    score = known + rng.standard_normal(n_groups)[group] / 2 + 2 * rng.standard_normal(n)
    return em.Activations.from_array(values, {"group": group, "score": score})


def whole_groups(groups: np.ndarray) -> list[Fold]:
    """Leave one group out, in outer and inner folds."""
    folds = []
    for train, test in LeaveOneGroupOut().split(groups, groups=groups):
        inner = LeaveOneGroupOut().split(train, groups=groups[train])
        folds.append(Fold(train, test, tuple((train[a], train[b]) for a, b in inner)))
    return folds


def by_scikit_learn(x: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions of every column of the targets."""
    found = np.empty_like(targets)
    grid = {"ridge__alpha": list(PENALTIES)}
    with threadpool_limits(limits=1):
        for column, y in enumerate(targets.T):
            for train, test in LeaveOneGroupOut().split(x, groups=groups):
                search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), grid, scoring="neg_mean_squared_error", cv=LeaveOneGroupOut())
                found[test, column] = search.fit(x[train], y[train], groups=groups[train]).predict(x[test])
    return found


def by_himalaya(x: np.ndarray, targets: np.ndarray, folds: list[Fold]) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold predictions and the penalty chosen [fold, target]."""
    try:
        from himalaya.kernel_ridge import KernelRidgeCV
    except ImportError:
        raise SystemExit("himalaya is not installed: pip install --no-deps himalaya==0.4.11, or leave it out with --only sklearn,wide") from None
    found, chosen = np.empty_like(targets), np.empty((len(folds), targets.shape[1]))
    with threadpool_limits(limits=1):
        for f, (train, test, inner) in enumerate(folds):
            scaler = StandardScaler().fit(x[train])
            place = np.full(len(x), -1)
            place[train] = np.arange(len(train))
            model = KernelRidgeCV(alphas=np.array(PENALTIES), fit_intercept=True, cv=[(place[a], place[b]) for a, b in inner])
            found[test] = model.fit(scaler.transform(x[train]), targets[train]).predict(scaler.transform(x[test]))
            chosen[f] = model.best_alphas_
    return found, chosen


def against_scikit_learn(rounds: int, share: int, layers: int = 31, n: int = 320, d: int = 576, n_permutations: int = 1000) -> dict[str, Any]:
    acts = scored(n, layers, d, 8)
    y, groups = acts.facts["score"].to_numpy(), acts.facts["group"].to_numpy()
    targets = y[np.concatenate([np.arange(n)[None], stats.permutations(n, share - 1, 0, within=groups)])].T
    x = acts.layer(layers // 2).astype(np.float64)
    ask = {"groups": "group", "baselines": (), "metrics": ("r2",), "n_permutations": n_permutations, "seed": 0}
    ours, theirs = partial(em.predict, acts, "score", **ask), partial(by_scikit_learn, x, targets, groups)
    took = interleaved({"predict": ours, "scikit_learn_share": theirs}, rounds)
    whole = took["scikit_learn_share"] / share * (n_permutations + 1) * layers
    cores = os.cpu_count() or 1
    columns = np.column_stack([targets, y[stats.permutations(n, 100, 1, within=groups)].T])  # as many as choose in float32
    predictions = nested_ridge(fixed(x), columns, whole_groups(groups)).predictions[:, :share]
    return {
        "median_seconds": took,
        "scikit_learn_extrapolated_hours": round(whole / 3600, 1),
        "scikit_learn_over_predict": round(whole / took["predict"]),
        "scikit_learn_over_predict_if_parallel": round(whole / cores / took["predict"]),
        "largest_difference_of_predictions": float(f"{np.abs(predictions - theirs()).max():.2g}"),
        "r2_of_layers": [round(float(r), 3) for r in ours()["estimate"].iloc[[0, layers // 2, -1]]],
    }


def against_himalaya(rounds: int, n: int = 320, d: int = 576, n_permutations: int = 1000) -> dict[str, Any]:
    acts = scored(n, 1, d, 8)
    y, groups = acts.facts["score"].to_numpy(), acts.facts["group"].to_numpy()
    targets = y[np.concatenate([np.arange(n)[None], stats.permutations(n, n_permutations, 0, within=groups)])].T
    x, folds = acts.layer(0).astype(np.float64), whole_groups(groups)

    def ours() -> Any:
        with threadpool_limits(limits=1):
            return nested_ridge(fixed(x), targets, folds)

    theirs = partial(by_himalaya, x, targets, folds)
    took = interleaved({"nested_ridge": ours, "himalaya": theirs}, rounds)
    (found, penalties), (predictions, chosen) = ours(), theirs()
    same = np.isclose(chosen, penalties)
    apart = max(np.abs(found - predictions)[fold.test][:, alike].max() for fold, alike in zip(folds, same, strict=True))
    return {
        "median_seconds": took,
        "himalaya_over_ours": round(took["himalaya"] / took["nested_ridge"], 1),
        "same_penalty": round(float(same.mean()), 3),
        "largest_difference_where_the_same": float(f"{apart:.2g}"),
    }


def wide(layers: int = 64, d: int = 5120, n: int = 1414, n_groups: int = 56, n_permutations: int = 200) -> dict[str, Any]:
    """Seconds of one `em.predict`, GiB at the peak of the process, and GiB of the activations themselves."""
    acts = scored(n, layers, d, n_groups)
    started, begun = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    found = em.predict(acts, "score", groups="group", baselines=(), metrics=("r2",), n_permutations=n_permutations, seed=0)
    took, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "layers": layers,
        "seconds": round(took, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "activations_gib": round(acts.values.nbytes / 2**30, 2),
        "folds": f"{found.attrs['folds']}; inner {found.attrs['inner_folds'].split(';')[0]}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--permutations", type=int, default=2, help="targets of scikit-learn a round, the observed one among them")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, default=64, help="of the wide part")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.only.split(",")
    said: dict[str, Any] = {"cores": os.cpu_count()}
    if "himalaya" in wanted:
        said["himalaya"] = against_himalaya(args.rounds)
        print(f"himalaya: {said['himalaya']}", file=sys.stderr, flush=True)
    if "sklearn" in wanted:
        said["sklearn"] = against_scikit_learn(args.rounds, args.permutations)
        print(f"sklearn: {said['sklearn']}", file=sys.stderr, flush=True)
    if "wide" in wanted:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            said["wide"] = pool.submit(wide, args.layers).result()
    print(json.dumps(said, indent=1))
    if args.json:
        args.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
