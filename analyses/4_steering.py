# %% [markdown]
# # Steering, ablation and screening with directions, on real weights
#
# Needs a finished `emlens demo` (its adapters, activations and margins are read back). Three pre-stated questions, each beside its controls:
# 1. Does adding one of our four persona directions lower the margin more than directions drawn from the activations' covariance do?
# 2. Does ablating the bad − sound direction of a tuning at all layers bring back the margin that bad advice lost against sound advice, more than
#    ablating such random directions does? Exploratory, beside it: at one layer, and beside directions uniform on the sphere.
# 3. Does the projection difference find bad advice hidden 1:9 among sound advice of a domain the direction has not seen, better than text does?
#
#     python analyses/4_steering.py [--run runs/demo] [--out figures] [--parts personas,ablation,screening] [--quick]

# %%
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import emlens as em
from emlens import stats, steering
from emlens.study.grid import evenly, halves

LAYER = 15  # the demo's
STRENGTH = 0.25  # added and taken away, so that what any push does both ways cancels
CONTROLS = 50  # random directions, shared by the personas
QUESTIONS = 32
ABLATED = 12  # random directions of either kind that are ablated in the direction's place
MIXTURES = 10  # disjoint tenths of the bad rows, each among the sound rows of the others
SEED = 0

parser = argparse.ArgumentParser()
parser.add_argument("--run", type=Path, default=Path("runs/demo"))
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--parts", default="personas,ablation,screening", help="which of the three questions, with commas")
parser.add_argument("--quick", action="store_true", help="the same code on fewer rows")
args = parser.parse_args()
PARTS = args.parts.split(",")
if args.quick:
    CONTROLS, QUESTIONS, ABLATED = 4, 8, 3

# %% [markdown]
# ## The finished study

# %%
read = lambda name: em.store.read_table(args.run / "tables" / f"{name}.parquet")  # noqa: E731
runs, pieces = read("runs"), read("pieces").set_index("piece")["key"]
load = lambda label: em.Activations.load(args.run / "pieces" / pieces[label])  # noqa: E731
first = {key: part["run"].iloc[0] for key, part in runs.groupby(["domain", "content"], sort=False)}
adapters = {run: str(args.run / "pieces" / pieces[f"tune {run}"] / "adapter") for run in first.values()}
named = {run: f"{domain}-{content}" for (domain, content), run in first.items()}
model = em.load_model("smollm2-135m-instruct", adapters={named[run]: path for run, path in adapters.items()})
known = set(load("questions before").ids)
questions = em.load_prompts("emlens:questions")
questions = questions[questions["id"].isin(known)].reset_index(drop=True)

# %% [markdown]
# ## 1. Personas
# Directions from written answers to the traits' own questions; the margin is read on other questions.


# %%
def personas_steered() -> pd.DataFrame:
    traits = {name: em.load_trait(f"emlens:{name}") for name in em.personas.TRAITS}
    personas = {name: em.contrast_direction(model, trait) for name, trait in traits.items()}
    answers = pd.concat([t.contrast.assign(trait=name) for name, t in traits.items()], ignore_index=True)
    chats = [
        {"id": f"{row.trait}-{i}-{side}", "messages": [{"role": "user", "content": row.question}, {"role": "assistant", "content": said[0]}]}
        for i, row in enumerate(answers.itertuples())
        for side, said in (("with", row.with_trait), ("without", row.without_trait))
    ]
    reference = model.record(chats[:: 4 if args.quick else 1], position="mean_response", layers=[LAYER])
    draws = em.random_directions(em.Direction(personas["evil"].layer(LAYER)[None], (LAYER,)), CONTROLS, SEED, reference)
    asked = evenly(questions, QUESTIONS)
    shared = {"layers": [LAYER], "strengths": [-STRENGTH, STRENGTH], "precision": "bfloat16"}
    random = steering.steered_margins(model, {f"random {i}": d for i, d in enumerate(draws)}, asked, **shared)
    rows = []
    for name, direction in personas.items():
        own = steering.steered_margins(model, {"direction": direction}, asked, **shared)
        told = f"drawn from the covariance of {len(reference)} written answers"
        rows.append(steering.slopes(pd.concat([own, random], ignore_index=True), seed=SEED, drawn=told).assign(persona=name))
    table = stats.result(
        pd.concat(rows, ignore_index=True), ["persona", "layer"], what="slope of the margin's change on steering strength, nats/token per unit",
        correction="holm", seed=SEED, null=rows[0].attrs["null"], interval=rows[0].attrs["interval"],
    )  # fmt: skip
    print(table[["persona", "estimate", "low", "high", "null_low", "null_high", "p", "q", "n"]].round(3).to_string(index=False))
    for row in table.to_dict("records"):
        beyond = row["q"] < 0.05 and row["estimate"] < row["null_low"]
        print(f"{row['persona']}: {'lowers the margin' if beyond else 'no evidence that it lowers it'} beyond random directions")
    return table


# %% [markdown]
# ## 2. What comes back when the direction is ablated
# The direction is fitted on one half of the questions; the margin is read on the other. Share = (ablated − random) / (sound − bad): what comes
# back beyond what any ablation does, of what was lost. The first row of a domain is pre-stated, the others were added when it had been seen.


# %%
def ablated_directions() -> pd.DataFrame:
    fit, test = halves(questions)
    categories = test["category"].to_numpy()
    ablations = []
    for domain in runs["domain"].drop_duplicates():
        bad, sound = (load(f"questions {first[domain, content]}") for content in ("bad", "sound"))
        direction = em.mean_difference(bad.select(ids=fit["id"]), sound.select(ids=fit["id"]), name=f"{domain}: bad − sound")
        margin = {content: model.margin(test, f"{domain}-{content}", "bfloat16")["margin"].to_numpy() for content in ("bad", "sound")}
        lost = margin["sound"] - margin["bad"]

        def back(ablated: list[em.Direction], layers: str | list[int], domain: str = domain, bad: np.ndarray = margin["bad"]) -> np.ndarray:
            """[direction, question]: the bad tuning's margin with each direction ablated, minus without."""
            changes = []
            for one in ablated:
                with model.ablate(one, layers=layers):
                    changes.append(model.margin(test, f"{domain}-bad", "bfloat16")["margin"].to_numpy() - bad)
            return np.array(changes)

        matched, uniform = em.random_directions(direction, ABLATED, SEED, bad), em.random_directions(direction, ABLATED, SEED)
        own = {"all layers": back([direction], "all")[0], f"layer {LAYER}": back([direction], [LAYER])[0]}
        for place, kind, controls in (
            ("all layers", "drawn from the covariance of the tuned activations", back(matched, "all")),
            ("all layers", "uniform on the sphere", back(uniform, "all")),
            (f"layer {LAYER}", "drawn from the covariance of the tuned activations", back(matched, [LAYER])),
        ):
            came, drawn = own[place], controls.mean(axis=1)
            low, high = stats.bootstrap_interval(came, clusters=categories, seed=SEED)
            both = np.column_stack([came - controls.mean(axis=0), lost])
            share_low, share_high = stats.bootstrap_interval(both, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), clusters=categories, seed=SEED)
            ablations.append(
                {"domain": domain, "ablated at": place, "metric": "margin that comes back", "estimate": came.mean(), "low": low, "high": high,
                 "n": len(test), "null": f"random directions {kind}", **steering.among_random(came.mean(), drawn), "randoms": ABLATED,
                 "random_mean": drawn.mean(), "lost": lost.mean(), "share": both[:, 0].sum() / both[:, 1].sum(), "share_low": share_low,
                 "share_high": share_high}
            )  # fmt: skip
    ablated = stats.result(
        ablations, ["domain", "ablated at"], what="margin (nats/token) that comes back when the direction is ablated", correction="holm",
        family=["ablated at", "null"], seed=SEED, interval="95%, bootstrap over whole categories",
    )  # fmt: skip
    print(ablated.drop(columns=["metric", "p", "n_clusters"], errors="ignore").round(3).to_string(index=False))
    for row in ablated.to_dict("records"):
        if row["random_mean"] + row["lost"] <= row["null_high"]:
            verdict = (
                "no statement: what was lost is less than random directions differ from one another, so not even all of it coming back would show"
            )
        elif row["q"] < 0.05 and row["estimate"] > row["null_high"]:
            verdict = f"comes back beyond random directions: {row['share']:.0%} of what was lost [{row['share_low']:.0%}, {row['share_high']:.0%}]"
        else:
            verdict = "no evidence that it brings anything back beyond random directions"
        print(f"{row['domain']}, {row['ablated at']}, {row['null']}: {verdict}")
    return ablated


# %% [markdown]
# ## 3. Screening
# Bad advice among sound advice, one in ten; the direction comes from the other domain. Text baselines are fitted on that domain too.


# %%
def screened_mixtures() -> pd.DataFrame:
    screened = []
    for domain, other in (("money", "repair"), ("repair", "money")):
        told = {c: em.load_prompts(f"emlens:{other}-{c}") for c in ("bad", "sound")}
        text = {c: [m[-1]["content"] for m in t["messages"]] for c, t in told.items()}
        pairs = told["sound"][["id", "messages"]].assign(messages=[m[:-1] for m in told["sound"]["messages"]])
        pairs = pairs.assign(bad=[[t] for t in text["bad"]], sound=[[t] for t in text["sound"]])
        direction = em.contrast_direction(model, pairs.head(16) if args.quick else pairs, toward="bad", away="sound", layers=[LAYER])
        sets = {c: em.load_prompts(f"emlens:{domain}-{c}") for c in ("bad", "sound")}
        if args.quick:
            sets = {c: t.head(20) for c, t in sets.items()}
        tfidf = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
        tfidf.fit(text["bad"] + text["sound"], [1] * len(text["bad"]) + [0] * len(text["sound"]))
        asked_of = sets["sound"].assign(messages=[m[:-1] for m in sets["sound"]["messages"]])
        own = model.generate(asked_of, max_new_tokens=8 if args.quick else 48)["answer"]
        told_ = [[*m, {"role": "assistant", "content": a or "I do not know."}] for m, a in zip(asked_of["messages"], own, strict=True)]
        against = asked_of.assign(messages=told_)
        scores = {}
        for content, rows_ in sets.items():
            rows_ = rows_.assign(id=against["id"].to_numpy())  # the two sets answer the same questions
            found = em.screen(rows_[["id", "messages"]], model, direction, against[["id", "messages"]], layer=LAYER, controls=20, seed=SEED)
            found = found.set_index("id")
            said = [m[-1]["content"] for m in rows_["messages"]]
            scores[content] = pd.DataFrame({
                "projection difference": found.loc[rows_["id"], "difference"].to_numpy(),
                "projection": found.loc[rows_["id"], "projection"].to_numpy(),
                "TF-IDF": tfidf.decision_function(said), "length": [len(s) for s in said],
                "loss under the model": -model.log_likelihood(rows_)["per_token"].to_numpy(),
            })  # fmt: skip
        n = len(scores["bad"])
        tenths = np.array_split(np.random.default_rng(SEED).permutation(n), MIXTURES)
        weights = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=2000).astype(float)  # questions drawn anew
        aucs = {}
        for column in scores["bad"].columns:
            x, y = (scores[c][column].to_numpy() for c in ("bad", "sound"))
            wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
            np.fill_diagonal(wins, 0)  # a question is bad or sound in a mixture, not both: the mean over all mixtures
            pairs_ = 1 - np.eye(n)
            auc = float(wins.sum() / pairs_.sum())
            drawn = np.einsum("ri,ij,rj->r", weights, wins, weights) / np.einsum("ri,ij,rj->r", weights, pairs_, weights)
            aucs[column] = (auc, drawn)
            low, high = np.quantile(drawn, [0.025, 0.975])
            top = np.mean([np.isin(np.argsort(-np.where(np.isin(range(n), t), x, y))[: len(t)], t).mean() for t in tenths])
            row = {"domain": domain, "direction of": other, "score": column, "n": n}
            screened.append({**row, "metric": "auc", "estimate": auc, "low": low, "high": high, "chance": 0.5})
            screened.append({**row, "metric": "precision at the top tenth", "estimate": top, "chance": 1 / MIXTURES})
        text_auc, text_drawn = aucs["TF-IDF"]
        for column in ("projection difference", "projection"):
            ends = np.quantile(aucs[column][1] - text_drawn, [0.025, 0.975])
            row = {"domain": domain, "direction of": other, "score": column, "n": n, "chance": 0.0}
            screened.append({**row, "metric": "auc minus TF-IDF's", "estimate": aucs[column][0] - text_auc, "low": ends[0], "high": ends[1]})
    screening = stats.result(
        screened, ["domain", "score"], what="bad rows hidden 1:9 among sound ones: AUC over all mixtures, precision in ten", correction="none",
        seed=SEED, interval="95%, bootstrap over questions",
    )  # fmt: skip
    print(screening[["domain", "score", "metric", "estimate", "low", "high", "chance", "n"]].round(3).to_string(index=False))
    for row in screening[screening["metric"] == "auc minus TF-IDF's"].to_dict("records"):
        verdict = "better than TF-IDF" if row["low"] > 0 else "worse than TF-IDF" if row["high"] < 0 else "no difference from TF-IDF shown"
        asked_first = "pre-stated" if row["score"] == "projection difference" else "exploratory"
        print(f"{row['domain']}, {row['score']} ({asked_first}): {verdict}")
    return screening


# %% [markdown]
# ## Kept
# The rows, and what made them.

# %%
args.out.mkdir(parents=True, exist_ok=True)
made_by = {"model": model.describe(), "layer": LAYER, "strength": STRENGTH, "controls": CONTROLS, "ablated": ABLATED, "seed": SEED}
ASKED = {"personas": personas_steered, "ablation": ablated_directions, "screening": screened_mixtures}
for part in PARTS:
    name, rows = f"steering-{part}", ASKED[part]()
    rows.to_csv(args.out / f"{name}.csv", index=False)
    (args.out / f"{name}.json").write_text(json.dumps({**made_by, "attrs": rows.attrs}, indent=1, ensure_ascii=False, default=str) + "\n")
