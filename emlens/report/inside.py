"""Findings on what is inside: the geometry of prompts and shifts, prediction from activations, a direction."""

from collections.abc import Sequence

import pandas as pd

from emlens.report.folder import Folder
from emlens.report.words import (
    ALPHA,
    NATS,
    Finding,
    Verdict,
    capital,
    corrected,
    count,
    estimate,
    listed,
    number,
    of_all,
    sample,
)

_TARGETS = {"margin after": "the margin after tuning", "change of margin": "its change"}


_FLOOR, _TWIN = "another seed", "bad against sound"


def agreement(folder: Folder) -> Finding | None:
    """How alike do two seeds shift a question, and does a twin's shift differ by more than a seed's? Described, not tested."""
    table = folder.estimates("shift_agreement")
    kinds = {str(kind): rows.set_index("layer") for kind, rows in table.groupby("kind", sort=False)}
    if not kinds:
        return None
    middle = {kind: number(rows["estimate"].median()) for kind, rows in kinds.items()}
    if _FLOOR not in kinds:
        claim = "The noise floor of a shift is not known: no two runs differ in their seed alone"
    else:
        claim = f"Two seeds of one tuning shift a question alike up to a cosine of {middle[_FLOOR]}, the noise floor of a shift"
        if _TWIN in kinds:
            claim += f"; {_beside_the_floor(kinds[_FLOOR], kinds[_TWIN])}"
    said = []
    for kind, rows in kinds.items():
        least = rows.loc[rows["estimate"].idxmin()]
        pairs = int(least["pairs"])
        said.append(
            f"{capital(kind)} ({pairs} {'pair' if pairs == 1 else 'pairs'} of runs): median over layers {middle[kind]}; "
            f"lowest at layer {int(least.name)}: {estimate(least)}, {sample(least, 'questions')}"
        )
    said.append("Mean cosine of two runs' shifts of one question; intervals over questions, given these runs; no test made")
    return Finding("Noise floor of a shift", "description", f"{claim}.", tuple(said), "shift-agreement")


def _beside_the_floor(floor: pd.DataFrame, twin: pd.DataFrame) -> str:
    """Whether bad and sound tunings agree less than two seeds do: in which layers the one interval lies wholly below the other."""
    layers = floor.index.intersection(twin.index)
    below = int((twin.loc[layers, "high"] < floor.loc[layers, "low"]).sum())
    cosine = f"(cosine {number(twin['estimate'].median())})"
    if below > len(layers) / 2:
        return f"a bad set and its sound twin agree less {cosine}, in {below} of {len(layers)} layers with intervals that do not touch"
    if below:
        return f"a bad set and its sound twin agree less {cosine} in {below} of {len(layers)} layers only"
    return f"a bad set and its sound twin agree no less {cosine} that could be told: in no layer do the intervals lie apart"


def overlap(folder: Folder) -> Finding | None:
    """Do training prompts and questions lie in the same directions?"""
    table = _one_null(folder.estimates("overlap"), "isotropic")
    across, control, ceiling = "training v questions", "questions v questions", "training v training"
    said, levels, reach = [], [], []
    for domain, rows in table.groupby("domain", sort=False):
        here, there = (rows[rows["comparison"] == name].set_index("layer") for name in (across, control))
        if here.empty:
            continue
        levels.append(_level(here))
        floor = there["low"].reindex(here.index)
        reach.append(bool((here["estimate"] >= floor).mean() > 0.5))
        beside = [f"{name} {_middle(rows, name)}" for name in (control, ceiling) if (rows["comparison"] == name).any()]
        along = _along(here.reset_index(), 3, unit="prompts")
        said.append(f"{capital(domain)}: {along}; beside it {listed(beside) or 'no control'}")
    if not levels:
        return None
    state = _of_levels(levels)
    claim = {
        "found": "Training prompts and questions share directions beyond chance, as two halves of the questions do",
        "mixed": "Only in part of the layers or domains do training prompts and questions share directions",
        "not found": "No evidence that training prompts and questions share directions beyond random subspaces",
    }[state]
    if state == "found" and not all(reach):
        state = "mixed"
        claim = "Training prompts and questions overlap beyond random subspaces, but less than two halves of questions"
    said.append("Overlap = mean cos². Random subspaces are a lenient null: activations fill few directions anyway")
    return Finding("Overlap of prompts", state, f"{claim}.", tuple(said), "overlap")


def similarity(folder: Folder) -> Finding | None:
    """Do questions shift the way training prompts shift?"""
    table = _one_null(folder.estimates("similarity"), "isotropic")
    table = table[table["comparison"] == "training v questions"]
    there = set(table["run"])
    bad, sound = ([run for run in folder.main_runs(content) if run in there] for content in ("bad", "sound"))
    main, twins = (bad, sound) if bad else (sound, [])
    if not main:
        return None
    levels = {run: _level(table[table["run"] == run]) for run in [*main, *twins]}
    state = _of_levels([levels[run] for run in main])
    claim = {
        "found": "Tuning shifts unrelated questions the same way as its own training prompts",
        "mixed": "Only in part of the layers or runs do unrelated questions shift the same way as the training prompts",
        "not found": "No evidence that unrelated questions shift the same way as the training prompts",
    }[state]
    if twins and state != "not found":
        claim += {
            "found": "; the sound twins do so too, so this marks tuning rather than bad advice",
            "mixed": "; the sound twins do so in part",
            "not found": "; the sound twins show no sign of it",
        }[_of_levels([levels[run] for run in twins])]
    said = [f"{capital(run)}: {_along(table[table['run'] == run])}" for run in main]
    beside = [f"{run}: {number(table.loc[table['run'] == run, 'estimate'].median())}" for run in twins]
    said.append("Cosine with the mean training shift" + (f"; twins, median over layers: {'; '.join(beside)}" if beside else ""))
    return Finding("Similarity of shifts", state, f"{claim}.", tuple(said), "similarity")


def overlap_and_similarity(folder: Folder) -> Finding | None:
    """Do questions nearer the training prompts shift more like them, and more than a plain cosine would say?"""
    table = folder.estimates("overlap_similarity")
    there = set(table["run"])
    main = [run for run in folder.main_runs("bad") or folder.main_runs() if run in there]
    said, levels, matched = [], [], []
    for run in main:
        rows = table[table["run"] == run]
        here, plain = (rows[rows["metric"] == name] for name in ("pearson", "pearson baseline"))
        if here.empty:
            continue
        levels.append(_level(here, either_side=True))
        text = f"{capital(run)}: {_along(here, either_side=True)}"
        if len(plain):
            matched.append(bool(plain["estimate"].abs().median() >= here["estimate"].abs().median()))
            text += f"; a plain cosine to the mean training prompt {number(plain['estimate'].median())}"
        said.append(text)
    if not levels:
        return None
    state = _of_levels(levels)
    claim = {
        "found": "Overlap with the training prompts and similarity of shift go together, question by question",
        "mixed": "Only in part of the layers or runs do overlap and similarity of shift go together",
        "not found": "No evidence that overlap with the training prompts and similarity of shift go together",
    }[state]
    if state != "not found" and any(matched):
        where = "" if all(matched) else f" in {count(sum(matched))} of {len(matched)} runs"
        claim += f"; but a plain cosine to the mean training prompt does as well{where}"
        state = "mixed"
    said.append("Pearson r over questions within a run; no correlation is taken over the runs, they are too few")
    return Finding("Overlap and similarity of shift", state, f"{claim}.", tuple(said), "overlap-similarity")


def prediction(folder: Folder) -> Finding | None:
    """Do activations before tuning foretell the margin after it (and its change) better than simple baselines do?"""
    table = folder.estimates("prediction")
    table = table[table["metric"] == "r2"]
    main = [run for run in folder.main_runs("bad") or folder.main_runs() if run in set(table["run"])]
    states: dict[str, list[str]] = {}
    said = []
    for target in _TARGETS:
        for run in main:
            rows = table[(table["run"] == run) & (table["target"] == target)]
            layers, plain = rows[(rows["features"] == "activations") & (rows["layer"] >= 0)], rows[rows["layer"] < 0]
            if layers.empty:
                continue
            top = layers.loc[layers["estimate"].idxmax()]
            text = f"{capital(target)}, {run}: R² = {estimate(top)} at layer {int(top['layer'])} (best of {len(layers)}), "
            text += f"{corrected(top['q'])}, {sample(top, 'questions')}"
            state = "foretold" if top["q"] < ALPHA else "none"
            if len(plain):
                best = plain.loc[plain["estimate"].idxmax()]
                text += f"; best baseline {best['features']} R² = {estimate(best)}"
                if state == "foretold":
                    ahead = top["estimate"] > best["estimate"]
                    state = "beyond" if top["low"] > best["estimate"] else "matched" if ahead else "beaten"
            said.append(text)
            states.setdefault(target, []).append(state)
    if not states:
        return None
    everything = [state for each in states.values() for state in each]
    if len({tuple(sorted(each)) for each in states.values()}) == 1:
        joint = " or " if set(everything) == {"none"} else " and "
        claim = _foretold(joint.join(_TARGETS[target] for target in states), everything)
    else:
        claim = "; ".join(_foretold(_TARGETS[target], each) for target, each in states.items())
    overall: Verdict = of_all([state in ("beyond", "foretold") for state in everything])
    if overall == "not found" and {"matched", "beaten"} & set(everything):
        overall = "mixed"
    said.append("“Beyond” asks that the interval of the best layer lies above the best baseline's R²")
    return Finding("Prediction from activations", overall, f"{capital(claim)}.", tuple(said), "prediction")


def _foretold(what: str, states: Sequence[str]) -> str:
    if set(states) == {"none"}:
        return f"no evidence that activations before tuning foretell {what}"
    if set(states) == {"beyond"}:
        return f"activations before tuning foretell {what} beyond every baseline"
    if set(states) == {"foretold"}:
        return f"activations before tuning foretell {what} (no baseline was tried)"
    if set(states) == {"beaten"}:
        return f"activations before tuning foretell {what}, but the best baseline does so as well or better"
    if "none" not in states and "beyond" not in states:
        return f"activations before tuning foretell {what}, but not clearly beyond the best baseline"
    shown, beyond = (sum(state in which for state in states) for which in (("beyond", "matched", "beaten", "foretold"), ("beyond",)))
    return f"activations foretell {what} in {shown} of {len(states)} cases, beyond the best baseline in {beyond}"


def direction(folder: Folder) -> Finding | None:
    """Does a direction tell bad from sound tuning on held-out questions, and does adding it move the margin?"""
    table = folder.estimates("direction")
    domains = [rows for _, rows in table[table["metric"] == "auc"].groupby("domain", sort=False)]
    if not domains:
        return None
    read = of_all([bool(_beyond(rows).any()) for rows in domains])
    claim = {
        "found": "a direction fitted on half of the questions tells bad from sound tuning on the other half",
        "mixed": "in part of the domains a direction tells bad from sound tuning on held-out questions",
        "not found": "no evidence of a direction that tells bad from sound tuning on held-out questions",
    }[read]
    tops = [rows.loc[rows["estimate"].idxmax()] for rows in domains]
    said = [
        f"{capital(top['domain'])}: best held-out AUC {estimate(top)} at layer {int(top['layer'])}, {corrected(top['q'])}, {sample(top, 'questions')}"
        for top in tops
    ]
    state: Verdict = read
    if "dose_slope" in folder.tables:
        moves, words, numbers = _dosed(folder)
        joint = "and" if moves != "description" and (read == "not found") == (moves == "not found") else "but"
        claim += f", {joint} {words}"
        said += numbers
        state = read if read == moves else "not found" if (read, moves) == ("not found", "description") else "mixed"
    said.append("Any two tunings can be told apart by their marks: a high AUC alone is no direction of misalignment")
    return Finding("A direction", state, f"{capital(claim)}.", tuple(said), "direction")


def _dosed(folder: Folder) -> tuple[Verdict, str, list[str]]:
    """Whether adding the direction lowers the margin past what random directions do, one slope a domain: verdict, words, numbers."""
    table = folder.estimates("dose_slope")
    domains = {str(domain): rows for domain, rows in table.groupby("domain", sort=False)}
    tested = table["p"].notna().all()
    moves: Verdict = of_all([bool(_steers(rows).any()) for rows in domains.values()]) if tested else "description"
    words = {
        "found": "adding it to the untuned model lowers the margin more than random directions of equal norm do",
        "mixed": "adding it lowers the margin more than random directions do in part of the domains only",
        "not found": "no evidence that adding it lowers the margin more than random directions of equal norm do",
        "description": "adding it was set beside too few random directions for a test",
    }[moves]
    said = []
    for domain, rows in domains.items():
        top = rows.sort_values("q").iloc[0]
        said.append(
            f"{capital(domain)}, adding it at layer {int(top['layer'])}: slope {estimate(top, 3, NATS)} per unit of strength"
            + (f", random {number(top['null_low'], 3)} to {number(top['null_high'], 3)}, {corrected(top['q'])}" if tested else "")
            + f", {sample(top, 'questions')}"
        )
    return moves, words, said


def _steers(rows: pd.DataFrame) -> pd.Series:
    """Layers that pass: q < alpha and the margin falls along the direction."""
    return (rows["q"] < ALPHA) & (rows["estimate"] < 0)


def _one_null(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of this null; of the first null there is, where it is not among them."""
    nulls = list(dict.fromkeys(table["null"]))
    return table[table["null"] == (name if name in nulls else nulls[0])]


def _middle(rows: pd.DataFrame, comparison: str) -> str:
    return number(rows.loc[rows["comparison"] == comparison, "estimate"].median(), 3)


def _beyond(rows: pd.DataFrame, either_side: bool = False) -> pd.Series:
    """Where q < alpha; unless on either side, also above the middle of the null."""
    middle = ((rows["null_low"] + rows["null_high"]) / 2).fillna(0)
    return (rows["q"] < ALPHA) & (either_side | (rows["estimate"] > middle))


def _level(rows: pd.DataFrame, either_side: bool = False) -> str:
    share = _beyond(rows, either_side).mean()
    return "most" if share > 0.5 else "some" if share > 0 else "none"


def _of_levels(levels: Sequence[str]) -> Verdict:
    if set(levels) == {"most"}:
        return "found"
    return "not found" if set(levels) == {"none"} else "mixed"


def _along(rows: pd.DataFrame, digits: int = 2, either_side: bool = False, unit: str = "questions") -> str:
    """A profile over layers in words: its middle, its null, how many layers pass, the strongest."""
    top = rows.loc[(rows["estimate"].abs() if either_side else rows["estimate"]).idxmax()]
    null = ""
    if rows["null_low"].notna().any():
        null = f" (null {number(rows['null_low'].median(), digits)} to {number(rows['null_high'].median(), digits)})"
    return (
        f"median over layers {number(rows['estimate'].median(), digits)}{null}, "
        f"q < .05 in {int(_beyond(rows, either_side).sum())} of {len(rows)}; strongest at layer {int(top['layer'])}: "
        f"{estimate(top, digits)}, {corrected(top['q'])}, {sample(top, unit)}"
    )
