# %% [markdown]
# # Part 2, priors: does a trained network foretell more than random networks of its shape do?
#
# Written down before any number of these twins was seen; what came out stands at the end and in `figures/2-transfer-twins.*`.
#
# **Why.** `2_transfer.py` sets two small networks beside three randomly initialised twins each, question by question. Three twins are no
# distribution: what another draw of the weights would give is not known from them. Here are twenty.
#
# **Design.** As there: mean `harmless` of each of the 320 harm-benchmark questions after Qwen2.5-Coder-32B-Instruct was tuned on finance and on
# insecure code; SmolLM2-135M-Instruct and the pre-trained Gemma-3-270m; last prompt token and mean of the question's tokens; all layers joined, so
# that no layer is chosen; whole categories held out, penalties chosen by holding out the others. Statistic: pooled out-of-fold R².
# *Pre-stated:* the trained network's R² against where one more twin would fall, Student's t on 19 degrees of freedom, two-sided, Holm over the 8
# cells (2 targets x 2 networks x 2 positions). By rank alone no p goes below 2/21 = .095, so ranks are shown beside it.
# **What it cannot say.** Questions and categories are the same in every cell and every twin: this is about networks, given these questions.
# `2_transfer.py` resamples the categories, given three twins. A difference that holds should hold in both.
#
#     python analyses/2_twins.py [--paper ../shared/paper] [--kept runs/transfer] [--out figures] [--quick]
#
# After `2_transfer.py`, which puts Gemma's weights together in `--kept`; without them SmolLM2 alone is ranked, with a word.

# %%
import argparse
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

import emlens as em
from emlens import features, plots, stats
from emlens.folds import make_folds
from emlens.gains import left_by, out_of_fold
from emlens.ridge import r2
from emlens.steering import among_random
from emlens.threads import one_thread

SEED, TWINS, ALPHA = 0, 20, 0.05
POSITIONS = ("last", "mean")
TARGETS = {name: f"Qwen2.5-Coder-32B-Instruct_{name}_all_resp_1e-05_hbp" for name in ("finance", "insecure")}

parser = argparse.ArgumentParser()
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--kept", type=Path, default=Path("runs/transfer"), help="folder of recordings, and of Gemma's weights")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--quick", action="store_true", help="the same code on fewer questions and twins")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.quick:
    TWINS = 4

# %%
scores_at, asked_at = args.paper / "part2" / "question_scores.csv.gz", args.paper / "questions" / "harmfulness_benchmark_prompts.jsonl"
if not scores_at.is_file():
    sys.exit(f"there is nothing to foretell: the paper's scores are not at {scores_at} (--paper)")
asked = em.load_prompts(str(asked_at))
asked = asked.assign(category=asked["id"].str.replace(r"_?\d+$", "", regex=True))
if args.quick:
    asked = asked[asked.groupby("category").cumcount() % 4 == 0].reset_index(drop=True)
scores = pd.read_csv(scores_at).query("results_dir == 'generated_results_hbp'").set_index(["run", "question_id"])["harmless"]
y = np.column_stack([scores[run].reindex(asked["id"]).to_numpy() for run in TARGETS.values()])
folds = make_folds(len(asked), pd.factorize(asked["category"])[0], seed=SEED).rounds[0]

NETWORKS = {"SmolLM2-135M-Instruct": ("smollm2-135m-instruct", None)}
gemma = next(args.kept.glob("gemma*.gguf"), None)
if gemma is None:
    print(f"Gemma is left out: its weights are not in {args.kept} (--kept; `python analyses/2_transfer.py` puts them there)")
else:
    NETWORKS["Gemma-3-270m (base)"] = (str(gemma), "plain")


# %%
@one_thread
def foretold(acts: em.Activations) -> list[float]:
    """R² of each target from all layers joined, whole categories held out."""
    block = features.joined().blocks(acts)[0][1]
    left = [out_of_fold(left_by([block], column, folds).residuals, folds) for column in y.T]
    return r2(y, y - np.column_stack(left)).tolist()


found = []
for network, (source, template) in NETWORKS.items():
    model = em.load_model(source, **({} if template is None else {"chat_template": template}))
    for seed in range(-1, TWINS):
        one = model if seed < 0 else em.random_twin(model, seed)
        for position in POSITIONS:
            values = foretold(one.record(asked, position=position, store=args.kept))
            found += [{"target": t, "network": network, "position": position, "seed": seed, "r2": v} for t, v in zip(TARGETS, values, strict=True)]
        print(f"{network}, {'as trained' if seed < 0 else f'random twin {seed}'}: R² {', '.join(f'{v:.3f}' for v in values)}", flush=True)
del model, one
found = pd.DataFrame(found)

# %%
NULL = f"{TWINS} random twins"
rows = []
for (target, network, position), cell in found.groupby(["target", "network", "position"], sort=False):
    mine, random = cell.loc[cell["seed"] < 0, "r2"].item(), cell.loc[cell["seed"] >= 0, "r2"].to_numpy()
    row = {"target": target, "network": network, "position": position, "metric": "r2", "null": NULL, "estimate": mine, "n": TWINS}
    rows.append(row | among_random(mine, random) | {"above": int((random < mine).sum()), "least": random.min(), "most": random.max()})
among = stats.result(
    rows, ["target", "network", "position"], what="R² of all layers joined, among randomly initialised twins", correction="holm", seed=SEED,
    null={NULL: "one more network of this shape with random weights; Student's t, two-sided, an extrapolation beyond ranks"},
    interval="none over questions here: see 2-transfer-published-compared",
)  # fmt: skip

# %%
words = "{target}, {network}, {position}: R² {estimate:.3f}, above {above} of {n} random twins ({least:.3f} to {most:.3f}), Holm p {q:.3f}"
findings = [words.format(**row) for row in among.to_dict("records")]
apart, middle = among["q"] < ALPHA, (among["null_low"] + among["null_high"]) / 2
more, less = among[apart & (among["estimate"] > middle)], among[apart & (among["estimate"] < middle)]
sceptic = (
    f"Trained networks foretell these scores better than random networks of their shape in {len(more)} of {len(among)} cells "
    f"({(more['estimate'] <= 0).sum()} of them with an R² not above 0: they only fail less), worse in {len(less)}. That is what training adds to a "
    f"reader of {len(asked)} fixed questions in eight topics, and says nothing of the tuned model: two tunings, one judge, and text alone is not in "
    "this comparison."
)
print("\n".join(findings), f"a sceptic would write: {sceptic}", sep="\n")

# %%
figure = plots.forest(among, ["target", "network", "position"], color="network", x_title="R² out of fold; grey: where one more twin falls")
made_by = {
    "title": "Trained networks among random twins of their shape",
    "a sceptic would write": sceptic,
    "findings": findings,
    "command": f"python analyses/2_twins.py{' --quick' if args.quick else ''}",
    "source": "aisa-group/em-generalization at 910ff4f (Apache-2.0): scores; our own recordings",
    "inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (scores_at, asked_at)},
    "twins": found.round(6).to_dict("records"),
    "versions": {"emlens": em.__version__, **{each: version(each) for each in ("numpy", "scipy", "pandas", "scikit-learn", "torch")}},
    "attrs": among.attrs,
}
plots.save(figure, among.round(6), args.out / "2-transfer-twins", made_by)
