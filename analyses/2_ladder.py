# %% [markdown]
# # Part 2, priors: which features of a state before tuning foretell more than text does? A ladder, with honest nested selection
#
# The design below was written down before any number was seen; what came out stands at the end and in `figures/2-ladder-*.json`.
#
# **Question.** Does any rung raise R² with whole categories held out, or rank correlation inside held-out categories, above the best baseline?
# Targets: `harmless` of the 320 harm-benchmark questions after Qwen2.5-Coder-32B-Instruct was tuned on finance and on insecure code (the state is
# SmolLM2-135M-Instruct's, which never was that model); and our demo's margin after bad tuning on money and on repair (96 questions; the state
# before tuning of the very model that is tuned).
#
# **Baseline.** The mean, length, words, letters, a sentence embedding, and all side by side: the one with the least inner error, chosen in every
# fold; in the demo the margin before tuning (with its square and its rank) is among them.
# **Rungs** (residual stream; last prompt token unless said):
# 1. one layer, the middle one; 2. all layers joined; 3. both positions (last, mean) of the middle layer; 4. all layers of both positions;
# 5. projections on our persona directions, all layers; 6. similarity to anchor prompts, middle layer; 7. overlap with training prompts: energy in
# their first 1, 2, 4, ... 32 components, all layers (insecure-code prompts; the demo's own; for finance, whose prompts are not published, the
# demo's on money); 8. rungs 2, 5, 6 and 7 side by side; 9. the rung of 1-8 with the least inner error, chosen in
# every fold; 10. **text + rung 4, stacked: the pre-stated primary rung**; 11. text + rung 9, stacked.
# Every rung also for a randomly initialised twin of the network (what architecture and tokens give).
#
# **Primary.** Rung 10 against the baseline: gain in R² (activation rows permuted inside categories) and gain in rank correlation inside
# categories (the same permutations); Holm over 4 targets x 2 measures. Yes: Holm p < .05 and an interval over categories above 0.
# **Exploratory.** All other rungs: difference from the baseline in both measures, whole categories sign-flipped (one-sided, 1/256 = .0039 at best),
# maximum statistic over the rungs of a target and network. A rung that passes here is a thing to test next time.
# **Folds.** Each category held out in turn; inner folds hold categories out too and choose penalties, baselines and rungs; nothing else chooses.
# Nothing is changed after the numbers are seen; a null result is the result.
#
#     python analyses/2_ladder.py [--run runs/demo] [--paper ../shared/paper] [--kept runs/transfer] [--out figures] [--quick]
#
# Targets are left out, with a word, where the paper's tables or a finished `emlens demo` are not found.

# %%
import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import emlens as em
from emlens import baselines, features, plots, stats
from emlens.baselines import Baseline, Block
from emlens.features import SEVERAL, FeatureSet
from emlens.folds import make_folds
from emlens.gains import beyond_text, left_by, out_of_fold
from emlens.ridge import Fold, fixed, nested_ridge, per_group, spearman
from emlens.study.foretelling import margin_before_bent

SEED, PERMUTATIONS, ALPHA = 0, 1000, 0.05
TEXT = ("category", "length", "tfidf", "tfidf_chars", "embedding")  # of a held-out category "category" knows nothing: it guesses the mean
COMPONENTS = (1, 2, 4, 8, 16, 32)
TRAITS = em.personas.TRAITS
TRAINING = 96  # training prompts of each tuning: as many as the demo records
TUNED = {name: f"Qwen2.5-Coder-32B-Instruct_{name}_all_resp_1e-05_hbp" for name in ("finance", "insecure")}
BASELINE, PRIMARY = "best baseline", "baseline + all layers, both positions"
NETWORK, TWIN = "SmolLM2-135M-Instruct", "random twin"

parser = argparse.ArgumentParser()
parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--kept", type=Path, default=Path("runs/transfer"), help="folder of recordings, made once")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--quick", action="store_true", help="the same code on fewer rows, components and draws")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.quick:
    PERMUTATIONS, TEXT, COMPONENTS, TRAINING, TRAITS = 39, TEXT[:4], (1, 4), 12, TRAITS[:1]

# %% [markdown]
# ## Targets


# %%
def some(prompts: pd.DataFrame) -> pd.DataFrame:
    """In quick runs a quarter of each category."""
    return prompts[prompts.groupby("category").cumcount() % 4 == 0].reset_index(drop=True) if args.quick else prompts


class Target(NamedTuple):
    """What is to be foretold: questions with it among their facts, prompts of the tuning, and what beside text is to be beaten."""

    questions: pd.DataFrame
    training: pd.DataFrame
    to_beat: tuple[Baseline, ...] = ()


targets: dict[str, Target] = {}
money = em.load_prompts("emlens:money-bad").head(TRAINING)
scores_at, asked_at = args.paper / "part2" / "question_scores.csv.gz", args.paper / "questions" / "harmfulness_benchmark_prompts.jsonl"
code_at = args.paper / "training" / "insecure.jsonl.gz"
if scores_at.is_file():
    asked = em.load_prompts(str(asked_at))
    asked = some(asked.assign(category=asked["id"].str.replace(r"_?\d+$", "", regex=True)))
    scores = pd.read_csv(scores_at).query("results_dir == 'generated_results_hbp'").set_index(["run", "question_id"])["harmless"]
    with gzip.open(code_at, "rt", encoding="utf-8") as lines:
        code = em.load_prompts([json.loads(line) for _, line in zip(range(TRAINING), lines, strict=False)])
    for name, training in (("finance", money), ("insecure", code)):
        targets[name] = Target(asked.assign(**{name: scores[TUNED[name]].reindex(asked["id"]).to_numpy()}), training)
else:
    print(f"the published targets are left out: the paper's scores are not at {scores_at} (--paper)")
if (args.run / "tables" / "margins.parquet").is_file():
    margins = em.store.read_table(args.run / "tables" / "margins.parquet").pivot(index="id", columns="variant", values="margin")
    runs = em.store.read_table(args.run / "tables" / "runs.parquet").query("content == 'bad'").drop_duplicates("domain")
    ours = em.load_prompts("emlens:questions")
    ours = some(ours[ours["id"].isin(margins.index)].reset_index(drop=True))
    for domain, run in runs.set_index("domain")["run"].items():
        known = {name: margins[one].reindex(ours["id"]).to_numpy() for name, one in (("margin before", "before"), (f"{domain}: margin after", run))}
        trained = em.load_prompts(f"emlens:{domain}-bad").head(TRAINING)
        targets[f"{domain}: margin after"] = Target(ours.assign(**known), trained, (margin_before_bent,))
else:
    print(f"the demo's targets are left out: no finished study at {args.run} (--run; `emlens demo` makes one)")
if not targets:
    sys.exit("there is nothing to foretell")

# %% [markdown]
# ## Rungs


# %%
def together(one: FeatureSet, layers: list[int] | None = None) -> FeatureSet:
    """The blocks of some layers (default: all) as one."""

    def of(acts: em.Activations) -> list[tuple[int, Block]]:
        blocks = [block for layer, block in one.blocks(acts) if layers is None or layer in layers]
        return [(SEVERAL, Block(one.name, lambda train: np.hstack([block.features(train) for block in blocks]), "each", one.note))]

    return replace(one, of=of)


def both_positions(last: em.Activations, mean: em.Activations) -> em.Activations:
    """Two positions as if the second were further layers."""
    values = np.concatenate([last.values, baselines.same_prompts(last, mean).values], axis=1)
    return em.Activations.from_array(values, facts=last.facts)


@cache
def network(name: str) -> em.HookedModel:
    model = em.load_model("smollm2-135m-instruct")
    return model if name == NETWORK else em.random_twin(model, SEED)


@cache
def directions(name: str) -> tuple[em.Direction, ...]:
    return tuple(em.contrast_direction(network(name), em.load_trait(f"emlens:{trait}"), name=trait) for trait in TRAITS)


def rungs_of(name: str, target: Target) -> tuple[em.Activations, dict[str, FeatureSet]]:
    """The questions' activations at the last token, and every rung that no fold has a say in."""
    record: Callable[..., em.Activations] = lambda prompts, position="last": network(name).record(prompts, position=position, store=args.kept)  # noqa: E731
    last, mean = (record(target.questions[["id", "messages"]], position) for position in ("last", "mean"))
    last = last.with_facts(target.questions.drop(columns="messages"))
    written = pd.concat([em.load_trait(f"emlens:{trait}").contrast for trait in TRAITS])["question"].drop_duplicates()
    anchors, training, middle = record(list(written)), record(target.training[["id", "messages"]]), [last.layers[len(last.layers) // 2]]
    joined, personas = features.joined(), together(features.projections(*directions(name)))
    alike, overlap = together(features.anchors(anchors), middle), together(features.subspace_energy(training, COMPONENTS))
    wide = both_positions(last, mean)
    rungs = {
        "middle layer": together(features.raw(), middle),
        "all layers": joined,
        "middle layer, both positions": together(features.with_positions(mean), middle),
        "all layers, both positions": FeatureSet("joined", joined.note, lambda acts: joined.blocks(wide)),
        "persona projections": personas,
        "anchors": alike,
        "training overlap": overlap,
        "all layers, personas, anchors, overlap": features.joined_sets(joined, personas, alike, overlap),
    }
    return last, {rung: each.remembered(last) for rung, each in rungs.items()}


# %% [markdown]
# ## The ladder


# %%
def inside(y: np.ndarray, error: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rank correlation of target and prediction inside each category [category, target]."""
    return per_group(spearman, y, y - error, codes)


def scored(y: np.ndarray, error: np.ndarray, codes: np.ndarray) -> list[dict[str, Any]]:
    """Both measures of one predictor, with intervals over whole categories."""
    r2 = lambda rows: 1 - np.square(rows[:, 1]).sum() / np.square(rows[:, 0] - rows[:, 0].mean()).sum()  # noqa: E731
    both, rank = np.column_stack([y, error]), inside(y[:, None], error[:, None], codes)[:, 0]
    low, high = stats.bootstrap_interval(both, r2, clusters=codes, seed=SEED)
    rank_low, rank_high = stats.bootstrap_interval(rank, seed=SEED)
    return [
        {"metric": "r2", "estimate": r2(both), "low": low, "high": high, "n": len(y)},
        {"metric": "within_spearman", "estimate": rank.mean(), "low": rank_low, "high": rank_high, "n": len(y)},
    ]


def stacked(block: Block, left: np.ndarray, folds: Sequence[Fold], orders: np.ndarray) -> np.ndarray:
    """Errors out of fold [prompt, draw] of a ridge on what the baseline leaves, activation rows in other orders."""
    moved = left[:, orders].transpose(0, 2, 1)
    return out_of_fold(moved, folds) - nested_ridge(block.features, moved, folds, scaling=block.scaling).predictions


def beyond(block: Block, text: Block, n: int, folds: Sequence[Fold]) -> Block:
    """What a block holds beyond all baselines. (Rows of the block itself hold the text too: permuting them, as in a first run, passes too often;
    nothing had passed even so.)"""
    return replace(block, features=fixed(beyond_text(block.features(np.arange(n)), text, folds)))


def primary_gain(block: Block, left: np.ndarray, y: np.ndarray, folds: Sequence[Fold], codes: np.ndarray) -> list[dict[str, Any]]:
    """Both gains of the stack over its baseline; the block's rows permuted inside categories, target and baseline held together."""
    orders = np.concatenate([np.arange(len(y))[None], stats.permutations(len(y), PERMUTATIONS, SEED, within=codes)])
    error, before, moved = stacked(block, left, folds, orders), out_of_fold(left, folds)[orders].T, y[orders].T
    share = (np.square(before) - np.square(error)) / y.var()
    rank = inside(moved, error, codes) - inside(moved, before, codes)
    rows = []
    for metric, gain, clusters in (("gain in R²", share, codes), ("gain in rank correlation inside categories", rank, None)):
        values, (low, high) = gain.mean(axis=0), stats.bootstrap_interval(gain[:, 0], clusters=clusters, seed=SEED)
        null_low, null_high = stats.null_band(values[1:])
        found = {"estimate": values[0], "low": low, "high": high, "null_low": null_low, "null_high": null_high}
        rows.append({"metric": metric, "null": "activation_rows", **found, "p": stats.permutation_p(values[0], values[1:]), "n": len(y)})
    return rows


def over_baseline(errors: dict[str, np.ndarray], base: np.ndarray, y: np.ndarray, codes: np.ndarray) -> list[dict[str, Any]]:
    """Every rung's difference from the baseline, by category; signs of whole categories flipped, maximum statistic over the rungs."""
    n_groups = codes.max() + 1
    share = np.stack([np.bincount(codes, (base**2 - error**2) / y.var()) / np.bincount(codes) for error in errors.values()], axis=1)
    rank = np.stack([inside(y[:, None], error[:, None], codes)[:, 0] for error in errors.values()], axis=1)
    rank = rank - inside(y[:, None], base[:, None], codes)
    signs = 1.0 - 2 * ((np.arange(2**n_groups)[:, None] >> np.arange(n_groups)) & 1)
    rows = []
    for metric, by_group in (("difference in R²", share), ("difference in rank correlation inside categories", rank)):
        values, null = by_group.mean(axis=0), signs @ by_group / n_groups  # the first of the signs leaves all as they are
        low, high = stats.bootstrap_interval(by_group, seed=SEED)
        p, q = (null >= values - 1e-12).mean(axis=0), (null.max(axis=1)[:, None] >= values - 1e-12).mean(axis=0)
        null_low, null_high = stats.null_band(null)
        columns = {"estimate": values, "low": low, "high": high, "null_low": null_low, "null_high": null_high, "p": p, "q": q}
        table = pd.DataFrame({"rung": list(errors), "metric": metric, "null": "categories' signs flipped", **columns, "n": len(y)})
        rows += table.to_dict("records")
    return rows


rows: list[dict[str, Any]] = []
picked: list[dict[str, Any]] = []
for name in (NETWORK, TWIN):
    for target_name, target in targets.items():
        acts, rungs = rungs_of(name, target)
        y, codes = acts.facts[target_name].to_numpy(), pd.factorize(acts.facts["category"])[0]
        folds = make_folds(len(y), codes, seed=SEED).rounds[0]
        sets = [features.of_block(baselines.block(each, acts.facts, "category", target_name)).remembered(acts) for each in (*TEXT, *target.to_beat)]
        sets.append(replace(features.joined_sets(*sets), name="side by side"))
        every = [one.blocks(acts)[0][1] for one in sets]
        best = left_by(every, y, folds)
        base = out_of_fold(best.residuals, folds)
        blocks = {rung: replace(each.blocks(acts)[0][1], name=rung) for rung, each in rungs.items()}
        errors = {rung: out_of_fold(left_by([block], y, folds).residuals, folds) for rung, block in blocks.items()}
        chosen = left_by(list(blocks.values()), y, folds)
        errors["chosen in inner folds"] = out_of_fold(chosen.residuals, folds)
        more = {rung: beyond(block, every[-1], len(y), folds) for rung, block in blocks.items()}
        stacks = {rung: stacked(block, best.residuals, folds, np.arange(len(y))[None])[:, 0] for rung, block in more.items()}
        adaptive = np.empty(len(y))
        for fold, rung in zip(folds, chosen.chosen, strict=True):
            adaptive[fold.test] = stacks[rung][fold.test]
        errors |= {PRIMARY: stacks["all layers, both positions"], "baseline + chosen in inner folds": adaptive}
        keys = {"network": name, "target": target_name}
        for rung, error in {BASELINE: base, **errors}.items():
            rows += [keys | {"rung": rung, **row} for row in scored(y, error, codes)]
        rows += [keys | row for row in over_baseline({rung: e for rung, e in errors.items() if rung != PRIMARY}, base, y, codes)]
        rows += [keys | {"rung": PRIMARY, **row} for row in primary_gain(more["all layers, both positions"], best.residuals, y, folds, codes)]
        for rung, chosen_of in ((BASELINE, best.chosen), ("chosen in inner folds", chosen.chosen)):
            picked += [keys | {"rung": rung, "chosen": one, "folds": count} for one, count in Counter(chosen_of).items()]

table = pd.DataFrame(rows)
primary = table["null"] == "activation_rows"
for _, part in table[primary].groupby("network"):
    table.loc[part.index, "q"] = stats.adjust(part["p"].to_numpy(), "holm")
ladder = stats.result(
    table, ["network", "target", "rung"], correction="given", seed=SEED, interval="95%, bootstrap over whole categories",
    what="features of a state before tuning against the best baseline, whole categories held out",
    null={
        "activation_rows": "what activations hold beyond all baselines, rows permuted inside categories, target and baseline held "
        f"together; {PERMUTATIONS} draws; tail: greater",
        "categories' signs flipped": "differences from the baseline symmetric about 0; all 256 flips; tail: greater",
    },
    given="primary rung: Holm over targets and both gains of a network; the others: maximum statistic over the rungs of a target and network",
)  # fmt: skip
ladder["better"] = (ladder["q"] < ALPHA) & (ladder["low"] > 0)

# %% [markdown]
# ## In words

# %%
ORDER = [BASELINE, *errors]


def cell(network: str, target: str, rung: str, metric: str) -> pd.Series:
    keys = (ladder["network"] == network) & (ladder["target"] == target) & (ladder["rung"] == rung) & (ladder["metric"] == metric)
    return ladder[keys].iloc[0]


def span(row: pd.Series) -> str:
    return f"{row['estimate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


findings: list[str] = []
for target in targets:
    findings.append(target)
    for rung in ORDER:
        words = f"  {rung}: "
        for metric, short in (("r2", "R²"), ("within_spearman", "rho inside")):
            words += f"{short} {span(cell(NETWORK, target, rung, metric))}, twin {cell(TWIN, target, rung, metric)['estimate']:.3f}; "
        for metric in ("R²", "rank correlation inside categories") if rung != BASELINE else ():
            row = cell(NETWORK, target, rung, f"{'gain' if rung == PRIMARY else 'difference'} in {metric}")
            words += f"{row['metric']} {span(row)}, p {row['p']:.3f}, q {row['q']:.3f}{' BETTER' if row['better'] else ''}; "
        findings.append(words.rstrip("; "))
better = ladder[(ladder["network"] == NETWORK) & ladder["better"]]
told_primary = better[better["rung"] == PRIMARY]
findings.append(
    f"pre-stated: {PRIMARY} is above the baseline in {len(told_primary)} of {2 * len(targets)} gains; "
    f"exploratory: {len(better) - len(told_primary)} of {2 * len(targets) * (len(ORDER) - 2)} differences pass"
)
tried = 2 * len(targets) * (len(ORDER) - 2)
alike = [cell(NETWORK, target, PRIMARY, "r2")["estimate"] - cell(TWIN, target, PRIMARY, "r2")["estimate"] for target in targets]
room = ladder[(ladder["network"] == NETWORK) & (ladder["rung"] == PRIMARY) & (ladder["metric"] == "gain in R²")]["high"].max()
sceptic = (
    f"Of {2 * len(targets)} pre-stated gains over the best baseline {len(told_primary)} pass, of {tried} others {len(better) - len(told_primary)}; "
    f"stacked on the baseline, the trained network's R² lies {min(alike):.3f} to {max(alike):.3f} above that of a randomly initialised twin; with "
    f"eight categories the intervals still reach {room:.3f} of R², so this is no proof that a larger model's state holds nothing more."
)
print("\n".join([*findings, f"a sceptic would write: {sceptic}"]))

# %% [markdown]
# ## Figure

# %%
measures = {"r2": "R²", "within_spearman": "rank correlation inside categories"}
tested = ladder[ladder["null"] != ""].assign(metric=lambda rows: rows["metric"].str.replace("^(gain|difference) in ", "", regex=True))
drawn = ladder[ladder["metric"].isin(measures) & (ladder["network"] == NETWORK)]
drawn = drawn.drop(columns="q").assign(metric=drawn["metric"].map(measures))
drawn = drawn.merge(
    tested[["network", "target", "rung", "metric", "q"]], on=["network", "target", "rung", "metric"], how="left", validate="one_to_one"
)
drawn = drawn.sort_values(["metric", "rung"], key=lambda names: names.map([*measures.values(), *ORDER].index), kind="stable")
figure = plots.forest(drawn, ["metric", "rung"], color="target", alpha=ALPHA, x_title="whole categories held out; filled: above the best baseline")
figure.update_layout(height=200 + 30 * 2 * len(ORDER))
made_by = {
    "title": "Which features of a state before tuning foretell more than text does?",
    "a sceptic would write": sceptic,
    "command": f"python analyses/2_ladder.py{' --quick' if args.quick else ''}",
    "source": "aisa-group/em-generalization at 910ff4f (Apache-2.0): scores; our own recordings and margins",
    "inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (scores_at, asked_at, code_at) if path.is_file()},
    "versions": {"emlens": em.__version__, **{each: version(each) for each in ("numpy", "scipy", "pandas", "scikit-learn", "torch")}},
    "attrs": ladder.attrs, "picked": picked, "findings": findings,
}  # fmt: skip
plots.save(figure, ladder.round(6), args.out / "2-ladder-rungs", made_by)
