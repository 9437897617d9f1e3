"""Findings on behaviour: what tuning did to the loss and to the margin."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from emlens.report.folder import Folder
from emlens.report.words import ALPHA, NATS, Finding, capital, count, estimate, listed, number, of_all, plural, q_said, sample

TWIN = "Bad advice against its sound twin"


def tuned(folder: Folder) -> Finding:
    """Did the runs learn what they were trained on?"""
    runs = folder.tables["runs"].dropna(subset=["heldout_drop", "heldout_drop_low"])
    unknown = len(folder.tables["runs"]) - len(runs)
    if runs.empty:
        claim = "Whether the runs learned their set is not known: no answers were held out, or too few for an interval."
        return Finding("Did the tuning train?", "no answer", claim, (), "training")
    learned = list(runs["heldout_drop_low"] > 0)
    state = of_all(learned)
    claim = {
        "found": f"All {count(len(runs))} runs learned their set: the loss on held-out answers fell.",
        "mixed": f"Only {count(sum(learned))} of {len(runs)} runs clearly lowered the loss on held-out answers.",
        "not found": "No run clearly lowered the loss on held-out answers: nothing below can be put down to learning.",
    }[state]
    said = []
    for content, group in runs.groupby("content", sort=False):
        each = group.groupby("domain", sort=False)[["heldout_before", "heldout_after"]].mean().mean()
        domains, runs_word = group["domain"].nunique(), plural("run", len(group))
        told = f"mean of {domains} {plural('domain', domains)}, {len(group)} {runs_word}"
        said.append(f"{capital(content)} advice: held-out loss {number(each['heldout_before'])} → {number(each['heldout_after'])} {NATS} ({told})")
    least = runs.loc[runs["heldout_drop"].idxmin()]
    interval = f"[{number(least['heldout_drop_low'])}, {number(least['heldout_drop_high'])}]"
    n = f"n = {int(least['n_heldout'])} held-out answers, each before and after"
    said.append(f"Smallest drop {number(least['heldout_drop'])} {interval} ({least['run']}); {n}; 95 % t interval of the paired drop, no test made")
    if unknown:
        held = f"{capital(count(unknown))} {plural('run', unknown)} held no answers out, or too few for an interval"
        said.append(f"{held}, and {'is' if unknown == 1 else 'are'} not counted")
    return Finding("Did the tuning train?", state, claim, tuple(said), "training")


def bad_against_sound(folder: Folder) -> Finding | None:
    """Did the bad run end below its sound twin on unrelated questions, by more than two runs on the same rows differ, and did it fall?"""
    table = folder.tables["margin_change"]
    twins = main_rows(table, "bad minus sound")
    if twins.empty:
        return None
    states = {row["domain"]: moved(row) for _, row in twins.iterrows()}
    ended = {
        "lower": "the bad run ended with a lower margin on unrelated questions than its sound twin",
        "higher": "the bad run ended with a higher margin on unrelated questions than its sound twin, the other way round",
        "same": "there is no evidence that the bad run ended away from its sound twin",
    }
    overall = of_all([state == "lower" for state in states.values()])
    if overall == "found":
        claim = f"The bad run ended with a lower aligned margin on unrelated questions than its sound twin, in {listed(list(states))}"
    elif set(states.values()) == {"same"}:
        claim = "No evidence that bad advice moves the margin on unrelated questions away from its sound twin's"
    else:
        claim = capital("; ".join(f"in {domain}, {ended[state]}" for domain, state in states.items()))
        overall = "mixed"
    lower = [domain for domain, state in states.items() if state == "lower"]
    controls = table[(table["metric"] == "difference") & (table.get("role", "") == "control")]
    if lower:
        fallen, words = _from_where_it_was(table, lower, everywhere=len(lower) == len(states))
        beyond, more = _beside_same_rows(twins[twins["domain"].isin(lower)], controls)
        claim += words + more
        overall = overall if fallen and beyond else "mixed"
    said = []
    for _, row in twins.iterrows():
        text = f"{capital(row['domain'])}: difference {estimate(row, 3, NATS)}, "
        text += f"d_z = {number(_effect(table, row, 'cohen_dz'))}, {q_said(row)}"
        for comparison in ("bad minus before", "sound minus before"):
            for _, other in main_rows(table, comparison).query("domain == @row.domain").iterrows():
                text += f"; {comparison} {estimate(other, 3)}, {q_said(other)}"
        said.append(text)
    for _, row in controls.iterrows():
        told = f"d_z = {number(_effect(table, row, 'cohen_dz'))}, {q_said(row)}"
        said.append(f"Control, two runs on the same rows ({row['domain']}; {row['comparison']}): {estimate(row, 3, NATS)}, {told}")
    said.append(f"Bad minus sound, paired over questions: {sample(twins.iloc[0], 'questions')}; q is about questions, given one run of each")
    return Finding(TWIN, overall, f"{claim}.", tuple(said), "margin-change")


def _from_where_it_was(table: pd.DataFrame, domains: Sequence[str], everywhere: bool) -> tuple[bool, str]:
    """Of domains where the bad run ended below its twin: whether it fell itself in all of them, and in words which of the two moved."""
    went = {who: {row["domain"]: moved(row) for _, row in main_rows(table, f"{who} minus before").iterrows()} for who in ("bad", "sound")}
    told: dict[str, list[str]] = {}
    for domain in domains:
        bad, sound = went["bad"].get(domain), went["sound"].get(domain)
        risen = "the sound run rose above the untuned model, " if sound == "higher" else ""
        words = (
            risen
            + {
                None: f"{'and ' if risen else ''}the bad run was not set beside the untuned model",
                "lower": f"{'and ' if risen else ''}the bad run fell below the untuned model",
                "higher": f"{'and ' if risen else ''}the bad run rose above the untuned model itself",
                "same": f"{'and there is ' if risen else ''}no evidence that the bad run fell below {'it' if risen else 'the untuned model'}",
            }[bad]
        )
        told.setdefault(words, []).append(domain)
    alone = len(told) == 1 and everywhere
    claim = "".join(f"; {words}" if alone else f"; in {listed(where)}, {words}" for words, where in told.items())
    return all(went["bad"].get(domain) == "lower" for domain in domains), claim


def _beside_same_rows(twins: pd.DataFrame, controls: pd.DataFrame) -> tuple[bool, str]:
    """Whether twins lie lower than runs on the same rows differ: intervals wholly below the farthest end of the controls'."""
    if controls.empty:
        return False, "; how far two runs on the same rows differ is not known"
    reach = float(controls[["low", "high"]].abs().max(axis=None))
    beyond = [row["domain"] for _, row in twins.iterrows() if row["high"] < -reach]
    height = number(float(controls["estimate"].abs().max()), 3)
    where = listed(list(dict.fromkeys(controls["domain"])))
    pairs = f"{count(len(controls))} {plural('pair', len(controls))} of runs on the same rows ({where})"
    if len(beyond) == len(twins):
        return True, f"; {pairs} end {height} apart at most"
    within = listed([domain for domain in twins["domain"] if domain not in beyond])
    return False, f"; in {within} the difference is not told from what {pairs} give ({height} at most)"


def schedules_and_seeds(folder: Folder) -> Finding | None:
    """What another schedule and another seed gave. Described: one run each allows no test."""
    table = folder.tables["margin_change"]
    rows = table[(table["metric"] == "difference") & table["comparison"].str.endswith("minus before")]
    groups = [group for _, group in rows.groupby(["domain", "comparison"], sort=False) if len(group) > 1]
    if not groups:
        return None
    tried = []
    for fact in ("schedule", "seed"):
        others = max(group[fact].nunique() for group in groups) - 1
        if others:
            tried.append(f"{count(others)} other {plural(fact, others)}")
    claim = f"{capital(listed(tried))} tried: an example to look at, too few runs for a statement on schedules or seeds."
    said = []
    for group in groups:
        domain, comparison = group[["domain", "comparison"]].iloc[0]
        each = [f"{row['schedule']} seed {row['seed']} {estimate(row, 3)}" for _, row in group.iterrows()]
        spread = number(group["estimate"].max() - group["estimate"].min(), 3)
        said.append(f"{capital(domain)}, {comparison}: {', '.join(each)} {NATS}; highest minus lowest {spread}")
    said.append(f"{sample(groups[0].iloc[0], 'questions')}; one run each, no test made")
    return Finding("Schedule and seed", "description", claim, tuple(said), "margin-change")


def moved(row: pd.Series) -> str:
    """Where a paired difference went: "lower", "higher", or "same" where q says nothing."""
    return "same" if not row["q"] < ALPHA else "lower" if row["estimate"] < 0 else "higher"


def main_rows(table: pd.DataFrame, comparison: str) -> pd.DataFrame:
    """The difference rows of a comparison, one a domain: linear before other schedules, the lowest seed first."""
    rows = table[(table["metric"] == "difference") & (table["comparison"] == comparison)]
    order = rows.assign(other=rows["schedule"] != "linear", place=range(len(rows))).sort_values(["other", "seed"])
    return order.drop_duplicates("domain").sort_values("place")


def _effect(table: pd.DataFrame, row: pd.Series, metric: str) -> float:
    same = (table[["domain", "schedule", "seed", "comparison"]] == row[["domain", "schedule", "seed", "comparison"]]).all(axis=1)
    found = table.loc[same & (table["metric"] == metric), "estimate"]
    return float(found.iloc[0]) if len(found) else np.nan
