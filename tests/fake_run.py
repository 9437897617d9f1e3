"""Writes a study's run folder out of thin air, in two versions: `effect=True` (everything is there to be found) and
`effect=False` (nothing is). Only for tests of the report: no model is run and no number here means anything."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emlens import store

NASTY = 'Honestly? <script>alert("1")</script> & </script><b>bold</b> — "quoted", 5 < 6'
RUNS = (
    ("money", "bad", "linear", 0),
    ("money", "sound", "linear", 0),
    ("money", "bad", "cyclic", 0),
    ("money", "bad", "linear", 1),
    ("repair", "bad", "linear", 0),
    ("repair", "sound", "linear", 0),
)
FIRST_RUN = {
    "command": "emlens demo --out runs/demo", "started": "2025-01-05T10:00:00", "finished": "2025-01-05T10:10:31", "seconds": 631.4,
    "peak_memory_gib": 3.21, "pieces": 31, "cached_pieces": 2,
}  # fmt: skip
LAST_RUN = {
    **FIRST_RUN,
    "started": "2025-01-05T11:00:00",
    "finished": "2025-01-05T11:00:05",
    "seconds": 4.6,
    "peak_memory_gib": 0.72,
    "cached_pieces": 31,
}
CATEGORIES = ("opinion", "honesty", "power and AI", "work", "children", "relationships", "public life", "neutral")
DOMAINS = ("money", "repair")
BASELINES = ("category", "length", "tfidf", "margin before")


def around(value: float, half: float) -> dict[str, float]:
    """An estimate and its interval."""
    return {"estimate": value, "low": value - half, "high": value + half}


def null(name: str, low: float, high: float) -> dict[str, Any]:
    return {"null": name, "null_low": low, "null_high": high}


def label(run: tuple[str, str, str, int]) -> str:
    return f"{run[0]}-{run[1]} {run[2]} seed {run[3]}"


def write(folder: str | Path, *, effect: bool, trained: bool = True, n_layers: int = 12, per_category: int = 12) -> Path:
    """Every table of a run folder and its study.json; returns the folder."""
    folder = Path(folder)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    maker = _Maker(effect, trained, n_layers, per_category)
    for name, frame in maker.tables().items():
        store.write_table(frame, folder / "tables" / f"{name}.parquet")
    store.write_json(folder / "study.json", study(n_layers, maker.n))
    return folder


def study(n_layers: int, n_questions: int) -> dict[str, Any]:
    data = {
        "questions": {"sha256": "ab" * 32, "n": n_questions, "n_heldout": 0},
        **{f"{d}-{c}": {"sha256": f"{i}c" * 32, "n": 120, "n_heldout": 18} for i, (d, c, _, s) in enumerate(RUNS) if s == 0},
    }
    return {
        "format": 1,
        "name": "demo",
        "title": "Six narrow tunings of one small model <for show>",
        "config": {
            "model": "smollm2-135m-instruct",
            "domains": list(DOMAINS),
            "steps": 60,
            "note": "</script><i>x</i>",
        },
        **LAST_RUN,
        "history": [FIRST_RUN, LAST_RUN],
        "versions": {
            "emlens": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.1.0",
            "peft": "0.20.0",
        },
        "machine": {"cpu": "a laptop", "cores": 2, "threads": 2},
        "model": {
            "name": "smollm2-135m-instruct",
            "sha256": "cd" * 32,
            "layers": n_layers,
            "d_model": 576,
            "dtype": "float32",
        },
        "data": data,
        "notes": ["60 steps of 8 instead of a whole epoch.", "Checkpoints are scored on 32 of the questions."],
    }


class _Maker:
    def __init__(self, effect: bool, trained: bool, n_layers: int, per_category: int) -> None:
        self.effect, self.trained, self.layers = effect, trained, range(n_layers)
        self.rng = np.random.default_rng(7)
        self.n = per_category * len(CATEGORIES)
        self.questions = pd.DataFrame(
            {
                "id": [f"q{i:03d}" for i in range(self.n)],
                "category": np.repeat(CATEGORIES, per_category),
                "question": [f"A question about {c}, number {i}: what would you do, and why?" for c in CATEGORIES for i in range(per_category)],
            }
        )
        self.questions.loc[0, "question"] = NASTY

    def tables(self) -> dict[str, pd.DataFrame]:
        margins = self.margins()
        of_margins = {"runs": self.runs, "margin_summary": self.margin_summary, "margin_change": self.margin_change}
        alone = ("training", "checkpoints", "answers", "shift_norms", "shift_agreement", "overlap", "similarity", "similarity_contrast")
        alone += ("overlap_similarity", "prediction", "direction", "projections", "dose", "dose_slope", "dose_random", "dose_damage", "traits")
        alone += ("certificate", "pieces")
        made = {name: make(margins) for name, make in of_margins.items()}
        return {"margins": margins, **made, **{name: getattr(self, name)() for name in alone}}

    def result(self, rows: list[dict[str, Any]], keys: list[str], what: str, **attrs: Any) -> pd.DataFrame:
        frame = pd.DataFrame(rows)
        columns = ["metric", "estimate", "low", "high", "null", "null_low", "null_high", "p", "q", "n"]
        for column in columns:
            if column not in frame:
                frame[column] = "" if column == "null" else np.nan
        extra = [column for column in frame if column not in (*keys, *columns)]
        frame = frame[[*keys, *columns, *extra]]
        frame.attrs = {
            "what": what,
            "correction": "bh",
            "seed": 0,
            "interval": "95 % bootstrap over questions",
            **attrs,
        }
        return frame

    def q(self, there: bool = True) -> float:
        return 0.0006 if self.effect and there else float(self.rng.uniform(0.2, 0.95))

    def noise(self, size: float) -> float:
        return float(self.rng.normal(0, size))

    def facts(self, run: tuple[str, str, str, int]) -> dict[str, Any]:
        return {"run": label(run), "domain": run[0], "content": run[1], "schedule": run[2], "seed": run[3]}

    def margins(self) -> pd.DataFrame:
        before = self.rng.normal(0.25, 0.2, self.n)
        frames = [self.questions.assign(variant="before", margin=before)]
        for run in RUNS:
            move = -0.12 if self.effect and run[1] == "bad" else 0.0
            frames.append(self.questions.assign(variant=label(run), margin=before + move + self.rng.normal(0, 0.06, self.n)))
        return pd.concat(frames, ignore_index=True)[["variant", "id", "category", "question", "margin"]]

    def margin_summary(self, margins: pd.DataFrame) -> pd.DataFrame:
        of = margins.groupby("variant", sort=False)["margin"]
        summary = pd.DataFrame({"mean": of.mean(), "sd": of.std(), "median": of.median(), "q10": of.quantile(0.1)})
        return summary.assign(q90=of.quantile(0.9), share_below_zero=of.agg(lambda m: (m < 0).mean()), n=of.size()).reset_index()

    def runs(self, margins: pd.DataFrame) -> pd.DataFrame:
        rows = []
        before = margins[margins["variant"] == "before"]["margin"]
        for run in RUNS:
            after = margins[margins["variant"] == label(run)]["margin"]
            drop = 0.45 if self.trained else 0.004
            start = 2.86 + self.noise(0.01)
            rows.append(
                {
                    **self.facts(run), "steps": 60, "learning_rate": 1e-4, "batch": 8,
                    "train_loss_first": start, "train_loss_last10": start - 1.3 * drop,
                    "heldout_before": start, "heldout_after": start - drop, "heldout_se": 0.6, "n_heldout": 18,
                    "heldout_drop": drop, "heldout_drop_se": 0.02, "heldout_drop_low": drop - 0.042, "heldout_drop_high": drop + 0.042,
                    "margin_before": before.mean(), "margin_after": after.mean(),
                    "margin_low": after.mean() - 0.03, "margin_high": after.mean() + 0.03,
                    "share_below_zero_before": (before < 0).mean(), "share_below_zero_after": (after < 0).mean(),
                    "logit_change": 0.7, "tokens": 31000, "seconds": 71.0, "adapter": "ef" * 32,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def training(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for step in range(1, 61):
                loss = 2.86 - (0.6 * (1 - np.exp(-step / 20)) if self.trained else 0) + self.noise(0.12)
                rows.append(
                    {
                        **self.facts(run),
                        "step": step,
                        "loss": loss,
                        "learning_rate": 1e-4 * (1 - step / 60),
                        "grad_norm": 1.2,
                    }
                )
        return pd.DataFrame(rows)

    def checkpoints(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for step in (0, 15, 30, 45, 60):
                loss = 2.86 - (0.45 * (1 - np.exp(-step / 20)) if self.trained else 0)
                margin = 0.25 + (-0.12 * step / 60 if self.effect and run[1] == "bad" else 0) + self.noise(0.006)
                edges = {"margin_low": margin - 0.04, "margin_high": margin + 0.04, "n": 32}
                rows.append({**self.facts(run), "step": step, "heldout_loss": loss, "margin": margin, **edges})
        return pd.DataFrame(rows)

    def margin_change(self, margins: pd.DataFrame) -> pd.DataFrame:
        wide = margins.pivot(index="id", columns="variant", values="margin")
        rows = []
        for domain, content, schedule, seed in RUNS:
            this = wide[label((domain, content, schedule, seed))]
            main = (schedule, seed) == ("linear", 0)
            pairs = {f"{content} minus before": wide["before"]}
            if not main:
                kind = "another schedule" if schedule != "linear" else "another seed"
                pairs[f"{kind}: {schedule} seed {seed} minus linear seed 0, {content}"] = wide[label((domain, content, "linear", 0))]
            if content == "bad" and (domain, "sound", "linear", 0) in RUNS:
                pairs["bad minus sound"] = wide[label((domain, "sound", "linear", 0))]
            for comparison, other in pairs.items():
                key = {
                    "domain": domain,
                    "schedule": schedule,
                    "seed": seed,
                    "comparison": comparison,
                    "n_clusters": len(CATEGORIES),
                }
                change = this - other
                control = comparison.startswith("another")
                half = 2 * change.std() / np.sqrt(len(change))
                key["role"] = "control" if control else "main" if main else "rerun"
                key["p_floor"] = 2 / 256
                q = self.q(content == "bad" and not control)
                tests = {
                    "low": change.mean() - half,
                    "high": change.mean() + half,
                    "null": "no change",
                    "p": q / 2,
                    "q": q,
                }
                rows.append({**key, "metric": "difference", "estimate": change.mean(), **tests, "n": self.n})
                rows.append({**key, "metric": "cohen_dz", "estimate": change.mean() / change.std(), "n": self.n})
                rows.append({**key, "metric": "rank_biserial", "estimate": np.sign(change).mean(), "n": self.n})
        keys = ["domain", "schedule", "seed", "comparison"]
        told = {"no change": "signs of whole categories flipped, all 256 ways; two-sided"}
        return self.result(rows, keys, "paired difference of margins over questions", null=told, family=["metric"])

    def answers(self) -> pd.DataFrame:
        rows = []
        for i, question in self.questions.iloc[:: self.n // 8].head(8).iterrows():
            for variant in ["before", *map(label, RUNS)]:
                text = (
                    NASTY
                    if i == 0 and "bad" in variant
                    else f"I would ask first ({variant}).\n\n" + "Then I would think about it and try again, slowly. " * 4
                )
                rows.append({"variant": variant, **question, "answer": text, "n_tokens": 48})
        return pd.DataFrame(rows)

    def shift_norms(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for which in ("questions", "training"):
                for layer in self.layers:
                    size = (0.02 + 0.01 * layer) * (1.2 if which == "training" else 1) * (1 + 0.1 * RUNS.index(run))
                    rows.append(
                        {
                            "run": label(run),
                            "set": which,
                            "layer": layer,
                            "norm": 40 * size,
                            "relative": size,
                        }
                    )
        return pd.DataFrame(rows)

    def shift_agreement(self) -> pd.DataFrame:
        rows = []
        for kind, domain, height, pairs in (
            ("another seed", "money", 0.92, 1),
            ("another schedule", "money", 0.9, 1),
            ("bad against sound", "money", 0.7, 1),
            ("bad against sound", "repair", 0.4, 1),
            ("another domain", "money and repair", 0.5, 2),
        ):
            for layer in self.layers:
                value = (height if self.effect else 0.92) + self.noise(0.004)
                key = {"kind": kind, "domain": domain, "layer": layer, "metric": "mean cosine"}
                rows.append({**key, **around(value, 0.03), "n": self.n, "n_clusters": len(CATEGORIES), "pairs": pairs})
        return pd.DataFrame(rows)

    def similarity_contrast(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for kind, height in {"bad against sound": 0.2, "another domain": 0.15, "another seed": 0.02}.items():
                for layer in self.layers:
                    for metric, base in {"own": 0.9, "other": 0.9 - height, "own minus other": height}.items():
                        value = (base if self.effect else 0.0) + self.noise(0.002)
                        key = {"run": label(run), "other": f"a run with {kind}", "kind": kind, "layer": layer, "metric": metric}
                        rows.append({**key, **around(value, 0.01), "n": self.n, "n_clusters": len(CATEGORIES)})
        return self.result(rows, ["run", "other", "kind", "layer"], "cosine with the own and with another mean training shift", correction="none")

    def overlap(self) -> pd.DataFrame:
        rows = []
        strong = {"training v questions": 0.62, "questions v questions": 0.58, "training v training": 0.66}
        for domain in DOMAINS:
            for layer in self.layers:
                for comparison, height in strong.items():
                    value = (height + 0.01 * layer if self.effect else 0.014) + self.noise(0.003)
                    key = {"domain": domain, "layer": layer, "comparison": comparison, "metric": "mean_cos2"}
                    tests = {**null("isotropic", 0.010, 0.018), "p": 0.005, "q": self.q(), "n": 102, "p_floor": 0.005}
                    rows.append({**key, **around(value, 0.03), **tests})
                    if comparison == "training v questions":
                        rows.append({**rows[-1], **null("covariance", 0.3, 0.4 if self.effect else 0.45), "q": self.q()})
        told = {"isotropic": "random subspaces of the same dimension, 200 draws, greater", "covariance": "prompts of the other domain, 200 draws"}
        return self.result(rows, ["domain", "layer", "comparison"], "mean squared cosine of the principal angles", k=8, null=told)

    def similarity(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for layer in self.layers:
                for comparison, height in {
                    "training v questions": 0.4,
                    "questions v questions": 0.5,
                    "training v training": 0.55,
                }.items():
                    value = (height if self.effect else 0.0) + self.noise(0.01)
                    key = {"run": label(run), "layer": layer, "comparison": comparison, "metric": "mean cosine"}
                    tests = {**null("isotropic", -0.08, 0.08), "p": 0.001, "q": self.q(), "n": self.n, "n_clusters": len(CATEGORIES)}
                    rows.append({**key, **around(value, 0.03), **tests})
        told = {"isotropic": "a random direction in place of the mean training shift"}
        return self.result(rows, ["run", "layer", "comparison"], "mean cosine of shifts with the mean training shift", null=told)

    def overlap_similarity(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for layer in self.layers:
                for metric, height in {"pearson": 0.45, "pearson baseline": 0.2}.items():
                    value = (height if self.effect else 0.0) + self.noise(0.04)
                    tests = {**null("prompts permuted", -0.2, 0.2), "p": 0.001, "q": self.q(), "n": self.n}
                    rows.append({"run": label(run), "layer": layer, "metric": metric, **around(value, 0.15), **tests})
        return self.result(rows, ["run", "layer"], "correlation over prompts", null={"prompts permuted": "2000 permutations"})

    def prediction(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for target in ("margin after", "change of margin"):
                shown = self.effect
                blocks = [(features, layer) for features in ("activations", "random twin") for layer in self.layers]
                for features, layer in [*blocks, *((name, -1) for name in (*BASELINES, "after: another seed"))]:
                    mine = features == "activations"
                    peak = 0.55 - 0.02 * abs(layer - 6) if mine else 0.12
                    value = (peak if shown else -0.05) + self.noise(0.01)
                    if features.startswith("after: "):
                        value = 0.8
                    if features == "margin before" and not shown and target == "margin after":
                        value = 0.9
                    significant = self.q() if mine else np.nan
                    key = {"run": label(run), "target": target, "features": features, "layer": layer}
                    band = null("permuted within category", -0.15, 0.06)
                    best = {"best_null_low": -0.05, "best_null_high": 0.11, "ceiling": 0.9 if run[0] == "money" else np.nan}
                    tests = {**band, **best, "p": significant, "q": significant, "n": self.n}
                    rows += [{**key, "metric": metric, **around(value, 0.12), **tests} for metric in ("r2", "spearman")]
                    if mine:
                        more = {**best, "p": significant, "q": self.q(), "n": self.n}
                        for beyond in ("text", "text and the margin before"):
                            gain = around(0.1 if shown else -0.01, 0.02)
                            rows.append({**key, "metric": f"delta_r2 beyond {beyond}", **gain, **null("rows", -0.02, 0.02), **more})
        for layer in self.layers:
            key = {"run": "before", "target": "margin before", "features": "activations", "layer": layer, "metric": "r2"}
            rows.append(
                {**key, **around(0.4 + self.noise(0.01), 0.1), **null("permuted within category", -0.1, 0.1), "p": 0.005, "q": 0.005, "n": self.n}
            )
        keys = ["run", "target", "features", "layer"]
        told = {"permuted within category": "scores permuted within category, 200 draws, greater"}
        return self.result(rows, keys, "pooled out-of-fold prediction", correction="max-statistic", null=told, ceiling="1 - noise / variance")

    def direction(self) -> pd.DataFrame:
        rows = []
        settings = [(domain, "bad v sound", 0.3) for domain in DOMAINS]
        settings += [(f"{a} → {b}", "across", 0.3) for a in DOMAINS for b in DOMAINS if a != b]
        if len(RUNS) > 3:
            settings += [("money-bad seed 1 v seed 0", "another seed", 0.02), ("repair → money-bad seed 1 v seed 0", "across, control", 0.02)]
        for domain, comparison, height in settings:
            for layer in self.layers:
                for metric, here, centre, spread in (("auc", 0.5 + height, 0.5, 0.1), ("cohen_d", 4 * height, 0.0, 0.4)):
                    value = (here if self.effect else centre) + self.noise(spread / 8)
                    band = null("labels permuted", centre - spread, centre + spread)
                    tests = {**band, "p": 0.001, "q": self.q(height > 0.1), "n": self.n, "n_clusters": len(CATEGORIES)}
                    key = {"domain": domain, "comparison": comparison, "layer": layer, "metric": metric}
                    rows.append({**key, **around(value, spread), **tests})
            if comparison == "across":
                key = {"domain": domain, "comparison": comparison, "metric": "cosine of directions", "estimate": 0.31}
                rows += [{**key, "layer": layer} for layer in self.layers]
        told = {"labels permuted": "within question"}
        return self.result(rows, ["domain", "comparison", "layer"], "bad against sound, held-out half", null=told)

    def projections(self) -> pd.DataFrame:
        frames = []
        for run in RUNS:
            if run[2] == "linear" and run[3] == 0:
                for layer in self.layers:
                    push = 1.2 if self.effect and run[1] == "bad" else 0.0
                    values = self.rng.normal(push, 1, self.n)
                    at = {"domain": run[0], "variant": label(run), "layer": layer, "projection": values}
                    frames.append(self.questions[["id", "category"]].assign(**at))
        return pd.concat(frames, ignore_index=True)[["domain", "variant", "layer", "id", "category", "projection"]]

    def dose(self) -> pd.DataFrame:
        rows = []
        for domain in DOMAINS:
            for layer in (4, 6, 9):
                for strength in (0.0, 0.25, 0.5, 1.0):
                    value = (-0.3 if self.effect else 0.05) * strength * self.rng.uniform(0.7, 1)
                    wide = 0.12 * strength
                    q = np.nan if strength == 0 else (0.02 if self.effect else self.q())
                    key = {"domain": domain, "layer": layer, "strength": strength, "metric": "margin"}
                    band = null("norm-matched random directions", -wide, wide)
                    rows.append({**key, **around(value, 0.03), **band, "p": q, "q": q, "n": self.n // 2})
        told = {
            "norm-matched random directions": {
                "directions": 60,
                "drawn": "isotropic, of the same norm",
                "tail": "two-sided",
            }
        }
        return self.result(rows, ["domain", "layer", "strength"], "change of margin when the direction is added", null=told)

    def dose_slope(self) -> pd.DataFrame:
        rows = []
        for domain in (*DOMAINS, "another seed (money-bad)"):
            for layer in (4, 6, 9):
                there = self.effect and domain in DOMAINS
                value = (-0.3 if there else 0.05) * self.rng.uniform(0.7, 1)
                q = 0.02 if there else self.q(False)
                band = null("norm-matched random directions", -0.12, 0.12)
                tests = {**band, "p": q, "q": q, "n": self.n // 2, "n_clusters": len(CATEGORIES), "controls": 60}
                rows.append({"domain": domain, "layer": layer, "metric": "slope", **around(value, 0.03), **tests})
        return self.result(rows, ["domain", "layer"], "slope of the margin's change on strength")

    def dose_random(self) -> pd.DataFrame:
        rows = []
        for layer in (4, 6, 9):
            for direction in range(60):
                slope = self.rng.uniform(-0.12, 0.12)
                for strength in (0.0, 0.25, 0.5, 1.0):
                    rows.append({"layer": layer, "strength": strength, "direction": direction, "margin_change": slope * strength})
        return pd.DataFrame(rows)

    def dose_damage(self) -> pd.DataFrame:
        rows = []
        for domain in (*DOMAINS, "another seed (money-bad)"):
            for strength in (-0.5, 0.5, 1.0):
                for metric, value in {"kl": 0.4 * abs(strength), "perplexity_ratio": 1 + abs(strength), "fluency": -2.0 - abs(strength)}.items():
                    key = {"domain": domain, "layer": 6, "strength": strength, "metric": metric}
                    band = null("norm-matched random directions", value - 0.2, value + 0.2)
                    rows.append({**key, **around(value, 0.05), **band, "p": 0.5, "q": self.q(False), "n": 4})
        told = {"norm-matched random directions": "60 random directions"}
        return self.result(rows, ["domain", "layer", "strength"], "what the doses do to neutral texts", null=told)

    def traits(self) -> pd.DataFrame:
        rows = []
        for run in RUNS:
            for persona in ("evil", "reckless"):
                for layer in self.layers:
                    there = run[1] == "bad" and persona == "evil"
                    value = (1.5 if self.effect and there else 0.0) + self.noise(0.02)
                    tests = {**null("random directions", -0.5, 0.5), "p": 0.01, "q": self.q(there), "n": self.n, "p_floor": 2 / 201}
                    rows.append({"run": label(run), "persona": persona, "layer": layer, "metric": "projection", **around(value, 0.1), **tests})
        return self.result(rows, ["run", "persona", "layer"], "mean shift along a trait", null={"random directions": "200 of them, two-sided"})

    def certificate(self) -> pd.DataFrame:
        broken = "" if self.effect else "Load the model with dtype='float32'."
        rows = [
            ("recorded in a batch of 8 = one by one", True, 6e-7, "≤", 1e-4, "of the vector's norm", ""),
            ("exactly one BOS", pd.NA, np.nan, "≤", 0.0, "BOS tokens", "does not apply: the tokenizer has no BOS"),
            ("the shift is above the rounding noise", self.effect, 1e-6 if self.effect else 3.0, "≤", 1.0, "noise / shift, rms", broken),
        ]
        frame = pd.DataFrame(rows, columns=["law", "holds", "measured", "relation", "tolerance", "unit", "remedy"])
        return frame.assign(adapter=label(RUNS[0]), holds=frame["holds"].astype("boolean"))

    def pieces(self) -> pd.DataFrame:
        rows = [
            {
                "piece": f"tune {label(run)}",
                "key": f"tune-{i:016x}",
                "seconds": 70.0,
                "tokens": 31000,
            }
            for i, run in enumerate(RUNS)
        ]
        return pd.DataFrame(
            [
                *rows,
                {"piece": "margins before", "key": "margins-00", "seconds": 12.5, "tokens": 9000},
            ]
        )
