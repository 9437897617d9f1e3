"""Findings on prediction from activations, and on a direction: each beside the control that shows what its design can see."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from emlens.report.folder import Folder
from emlens.report.words import (
    ACTIVATIONS,
    AFTER,
    ALPHA,
    BEYOND_BOTH,
    BEYOND_TEXT,
    NATS,
    RANDOM_TWIN,
    Finding,
    Verdict,
    above,
    capital,
    count,
    estimate,
    in_layers,
    least,
    listed,
    middle_of_null,
    number,
    of_all,
    q_said,
    sample,
)

_TARGETS = {"margin after": "the margin after tuning", "change of margin": "its change"}
_CONTROL = "margin before"
_GAINS = {"text": BEYOND_TEXT, "text and the margin before": BEYOND_BOTH}
_MAIN, _ACROSS, _ACROSS_CONTROL = "bad v sound", "across", "across, control"


# ---- prediction


def prediction(folder: Folder) -> Finding | None:
    """Do activations before tuning foretell the margin after it (and its change), and more than the margin before does?"""
    table = folder.estimates("prediction")
    r2 = table[table["metric"] == "r2"]
    main = [run for run in folder.asked_runs() if run in set(r2["run"])]
    states: dict[str, list[str]] = {}
    said = []
    for target in _TARGETS:
        for run in main:
            rows = table[(table["run"] == run) & (table["target"] == target)]
            mine = rows["features"] == ACTIVATIONS
            layers, plain = rows[(rows["metric"] == "r2") & mine], rows[(rows["metric"] == "r2") & ~mine]
            if layers.empty:
                continue
            state, text = _foretold(layers, {name: rows[rows["metric"] == metric] for name, metric in _GAINS.items()}, plain)
            said.append(f"{capital(target)}, {run}: {text}")
            states.setdefault(target, []).append(state)
    if not states:
        return None
    read, words = _positive_control(r2[(r2["target"] == _CONTROL) & (r2["features"] == ACTIVATIONS)])
    said.insert(0, words)
    everything = [state for each in states.values() for state in each]
    none = set(everything) == {"none"}
    floor = 2 * len(main) * table["p_floor"].max() if "p_floor" in table else 0.0
    if none and floor >= ALPHA:
        claim = f"Too few permutations: corrected for two targets and {count(len(main))} runs no q can be below {least(floor)}"
        return Finding(
            "Prediction from activations", "no answer", f"{claim}; no statement about {_joined(states, ' or ')}.", tuple(said), "prediction"
        )
    if none and read != "passed":
        claim = "The design could not read even the margin before tuning from the activations before tuning (the positive control)"
        if read == "missing":
            claim = "No positive control was made that shows what the design can read"
        claim += f": no statement about {_joined(states, ' or ')}"
        return Finding("Prediction from activations", "no answer", f"{claim}.", tuple(said), "prediction")
    if len({tuple(sorted(each)) for each in states.values()}) == 1:
        claim = _claimed(_joined(states, " or " if none else " and "), everything)
    else:
        claim = "; ".join(_claimed(_TARGETS[target], each) for target, each in states.items())
    overall: Verdict = of_all([state == "beyond" for state in everything])
    if overall == "not found" and not none:
        overall = "mixed"
    said.append("q of R² is against targets permuted inside categories: beyond the category. “Beyond” asks for ΔR² over text and the margin, q < .05")
    said.append("The margin before stands with its square and its rank; a target that bends with it in another way can pass without more")
    return Finding("Prediction from activations", overall, f"{capital(claim)}.", tuple(said), "prediction")


def _foretold(layers: pd.DataFrame, gains: Mapping[str, pd.DataFrame], plain: pd.DataFrame) -> tuple[str, str]:
    """What the best layer comes to, and the numbers: R² beyond the category, ΔR² beyond text and beyond text and the margin, rivals, ceiling.

    "foretold" asks for R² above 0 as well; "beyond" for the gain over text and the margin before together, whatever these reach alone, but not where
    a random twin's activations do as well. A rival that is known only once another tuning was made takes nothing away.
    """
    top = layers.loc[layers["estimate"].idxmax()]
    text = f"R² = {estimate(top)} at layer {int(top['layer'])} (best of {len(layers)}), {q_said(top)}, {sample(top, 'questions')}"
    state = "foretold" if top["q"] < ALPHA and top["estimate"] > 0 else "none"
    both = gains["text and the margin before"]
    beyond = len(both) > 0 and both.loc[both["estimate"].idxmax(), "q"] < ALPHA
    for name, gain in gains.items():
        if len(gain):
            more = gain.loc[gain["estimate"].idxmax()]
            text += f"; beyond {name}, ΔR² = {estimate(more, 3)} at layer {int(more['layer'])}, {q_said(more)}"
    later = plain["features"].str.startswith(AFTER)
    if (~later).any():
        best = plain.loc[plain.loc[~later, "estimate"].idxmax()]
        text += f"; best baseline {best['features']} R² = {estimate(best)}"
        state = "beaten" if state != "none" and best["estimate"] >= top["estimate"] else state
    if later.any():
        each = [f"{row['features'].removeprefix(AFTER)} {number(row['estimate'])}" for _, row in plain[later].iterrows()]
        text += f"; the same score after other tunings, R²: {listed(each)}"
    twins = plain.loc[plain["features"] == RANDOM_TWIN, "estimate"]
    state = "beyond" if state != "none" and beyond and not (twins >= top["estimate"]).any() else state
    ceiling = top.get("ceiling", np.nan)
    text += f"; ceiling {number(ceiling)} (noise between seeds)" if np.isfinite(ceiling) else ""
    return state, text


def _positive_control(rows: pd.DataFrame) -> tuple[str, str]:
    """Whether the design reads what it should be able to: "passed", "failed" or "missing", and the numbers."""
    if rows.empty:
        return "missing", "Positive control: none in this run folder (the margin before, from activations before)"
    top = rows.loc[rows["estimate"].idxmax()]
    text = (
        f"Positive control, the margin before from activations before, same folds: R² = {estimate(top)} at layer {int(top['layer'])}, {q_said(top)}"
    )
    return "passed" if top["q"] < ALPHA else "failed", text


def _joined(states: Mapping[str, Sequence[str]], joint: str) -> str:
    return joint.join(_TARGETS[target] for target in states)


def _claimed(what: str, states: Sequence[str]) -> str:
    if set(states) == {"none"}:
        return f"no evidence that activations before tuning foretell {what} beyond the category"
    if set(states) == {"beyond"}:
        return f"activations before tuning foretell {what}, beyond the category, text and the margin before"
    if set(states) == {"beaten"}:
        return f"activations before tuning foretell {what} beyond the category, but the best baseline does so as well or better"
    if set(states) == {"foretold"}:
        return f"activations before tuning foretell {what} beyond the category; no evidence that they do beyond text and the margin before"
    shown, beyond = sum(state != "none" for state in states), sum(state == "beyond" for state in states)
    return f"activations foretell {what} beyond the category in {shown} of {len(states)} cases, beyond text and the margin before in {beyond}"


# ---- a direction


def direction(folder: Folder) -> Finding | None:
    """Does a direction tell bad from sound tuning on held-out questions, more than two runs on the same rows are told apart, and steer?"""
    table = folder.estimates("direction")
    kind = table["comparison"] if "comparison" in table else pd.Series(_MAIN, index=table.index)
    cosine = table[table["metric"] == "cosine of directions"]
    auc = {str(name): rows for name, rows in table[table["metric"] == "auc"].groupby(kind[table["metric"] == "auc"], sort=False)}
    if _MAIN not in auc:
        return None
    domains = _parts(auc[_MAIN])
    read = of_all([bool(above(rows).any()) for rows in domains])
    claim = {
        "found": "a direction fitted on half of the questions tells bad from sound tuning on the other half",
        "mixed": "in part of the domains a direction tells bad from sound tuning on held-out questions",
        "not found": "no evidence of a direction that tells bad from sound tuning on held-out questions",
    }[read]
    said = [f"{capital(str(rows['domain'].iloc[0]))}: {_best(rows)}" for rows in domains]
    state: Verdict = read
    if read != "not found":
        more, words, across = _beside_controls(auc)
        claim += words
        said += across
        state = "mixed" if not more else read
    for name, rows in auc.items():
        if name != _MAIN:
            said += [f"{capital(name)}, {part['domain'].iloc[0]}: {_best(part)}" for part in _parts(rows)]
    if len(cosine):
        middle = number(cosine["estimate"].median())
        said.append(f"Cosine of the domains' directions: median over layers {middle}, no interval, no test")
    if "dose_slope" in folder.tables:
        moves, words, numbers = _dosed(folder)
        claim += f". {capital(words)}"
        said += numbers
        state = state if state == moves else "not found" if (state, moves) == ("not found", "description") else "mixed"
    said.append("q is about questions, given these runs: any two tunings can be told apart by their marks, so the controls count, not the AUC alone")
    return Finding("A direction", state, f"{capital(claim)}.", tuple(said), "direction")


def _parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [part for _, part in rows.groupby("domain", sort=False)]


def _best(rows: pd.DataFrame) -> str:
    top = rows.loc[rows["estimate"].idxmax()]
    return (
        f"median AUC {number(rows['estimate'].median())}; best {estimate(top)} at layer {int(top['layer'])}, {q_said(top)}, "
        f"{sample(top, 'questions')}; q < .05 in {in_layers(rows, above(rows))}"
    )


def _beside_controls(auc: Mapping[str, pd.DataFrame]) -> tuple[bool, str, list[str]]:
    """Whether bad and sound are told apart more than two runs on the same rows are, or by the other domain's direction; the words, and what
    the other domain's direction gives."""
    plain = [rows for name, rows in auc.items() if name not in (_MAIN, _ACROSS, _ACROSS_CONTROL)]
    if not plain:
        return False, "; how well it tells two runs on the same rows apart is not known", []
    control = pd.concat(plain)
    beyond = all(_higher(rows, control).mean() > 0.5 for rows in _parts(auc[_MAIN]))
    height = number(_folded(control).median())
    words = f"; two runs on the same rows are told apart {'less well' if beyond else 'as well'} (median AUC {height})"
    if _ACROSS not in auc:
        return beyond, words, []
    across = _parts(auc[_ACROSS])
    told = f"The direction of one domain gives the other an AUC of {listed([number(rows['estimate'].median()) for rows in across])}"
    if _ACROSS_CONTROL not in auc:
        return beyond, words, [f"{told}, with no control for it"]
    passed = [_higher(rows, auc[_ACROSS_CONTROL]) & above(rows).to_numpy() for rows in across]
    told += f" (medians over layers), two runs on the same rows {number(_folded(auc[_ACROSS_CONTROL]).median())}: "
    told += f"{'beyond' if any(each.any() for each in passed) else 'no evidence of more than'} that control"
    layers = listed([f"{int(each.sum())} of {len(each)}" for each in passed])
    told += f" in {layers} layers" if any(each.any() for each in passed) else ""
    return beyond or all(each.mean() > 0.5 for each in passed), words, [told]


def _folded(rows: pd.DataFrame) -> pd.Series:
    """AUC on whichever side of 0.5: which of two runs on the same rows is called the first means nothing."""
    return 0.5 + (rows["estimate"] - 0.5).abs()


def _higher(rows: pd.DataFrame, control: pd.DataFrame) -> np.ndarray:
    """The layers in which the interval lies wholly above what the highest control gives there."""
    highest = _folded(control).groupby(control["layer"]).max()
    return (rows["low"] > rows["layer"].map(highest)).to_numpy()


def _dosed(folder: Folder) -> tuple[Verdict, str, list[str]]:
    """Whether adding the direction lowers the margin past what random directions do, one slope a domain: verdict, words, numbers."""
    table = folder.estimates("dose_slope")
    control = table["domain"].astype(str).str.startswith("another seed")
    domains = {str(domain): rows for domain, rows in table[~control].groupby("domain", sort=False)}
    several = table["p"].notna().all()
    moves: Verdict = of_all([bool(steers(rows).any()) for rows in domains.values()]) if several else "description"
    lenient = " (a lenient null)" if "uniform on the sphere" in str(table.attrs.get("null", "")) else ""
    words = {
        "found": f"adding it to the untuned model lowers the margin more than random directions of equal norm do{lenient}",
        "mixed": f"adding it lowers the margin more than random directions do in part of the domains only{lenient}",
        "not found": "no evidence that adding it lowers the margin more than random directions of equal norm do",
        "description": "adding it was set beside too few random directions for a test",
    }[moves]
    if moves in ("found", "mixed") and bool(steers(table[control]).any()):
        words += ", as the direction between two seeds does too"
        moves = "mixed"
    said = []
    for domain, rows in {**domains, **{str(name): rows for name, rows in table[control].groupby("domain", sort=False)}}.items():
        top = rows.sort_values("q").iloc[0]
        said.append(
            f"{capital(domain)}, adding it at layer {int(top['layer'])}: slope {estimate(top, 3, NATS)} per unit of strength"
            + (f", random {number(top['null_low'], 3)} to {number(top['null_high'], 3)}, {q_said(top)}" if several else "")
            + f", {sample(top, 'questions')}"
        )
    if "dose_damage" in folder.tables:
        said += _damage(folder.estimates("dose_damage"))
    drawn = table["controls"].max() if "controls" in table else np.nan
    if several and np.isfinite(drawn):
        rank = least(2 / (drawn + 1))
        said.append(f"Its p extrapolates beyond {int(drawn)} random directions by Student's t; by rank among them no p goes below {rank}")
    return moves, words, said


def _damage(table: pd.DataFrame) -> list[str]:
    """What the furthest doses do to unrelated text, a line a domain."""
    names = {"kl": "KL", "perplexity_ratio": "perplexity ratio", "fluency": "fluency"}
    said = []
    for (domain, layer), rows in table.groupby(["domain", "layer"], sort=False):
        for strength in sorted({rows["strength"].min(), rows["strength"].max()}):
            at = rows[(rows["strength"] == strength) & rows["metric"].isin(list(names))]
            each = [
                f"{names[row['metric']]} {estimate(row)} (random {number(row['null_low'])} to {number(row['null_high'])})" for _, row in at.iterrows()
            ]
            if each:
                where = f"{capital(str(domain))}, damage to neutral texts at layer {layer}, strength {number(strength)}"
                said.append(f"{where}: {', '.join(each)}, n = {int(at['n'].max())} texts")
    return said


def steers(rows: pd.DataFrame) -> pd.Series:
    """Layers that pass: q < alpha, and the margin falls along the direction, and by more than along the middle of the random ones."""
    return (rows["q"] < ALPHA) & (rows["estimate"] < 0) & (rows["estimate"] < middle_of_null(rows))
