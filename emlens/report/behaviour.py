"""Findings on behaviour: what tuning did to the loss and to the margin."""

import numpy as np
import pandas as pd

from emlens.report.folder import Folder
from emlens.report.words import (
    ALPHA,
    NATS,
    Finding,
    capital,
    corrected,
    count,
    estimate,
    listed,
    number,
    of_all,
    plural,
    sample,
)


def tuned(folder: Folder) -> Finding:
    """Did the runs learn what they were trained on?"""
    runs = folder.tables["runs"].dropna(subset=["heldout_drop"])
    unknown = len(folder.tables["runs"]) - len(runs)
    if runs.empty:
        claim = "Whether the runs learned their set is not known: no answers were held out."
        return Finding("Did the tuning train?", "description", claim, (), "training")
    learned = list(runs["heldout_drop_low"] > 0)
    state = of_all(learned)
    claim = {
        "found": f"All {count(len(runs))} runs learned their set: the loss on held-out answers fell.",
        "mixed": f"Only {count(sum(learned))} of {len(runs)} runs clearly lowered the loss on held-out answers.",
        "not found": "No run clearly lowered the loss on held-out answers: nothing below can be put down to learning.",
    }[state]
    said = []
    for content, group in runs.groupby("content", sort=False):
        before, after = number(group["heldout_before"].mean()), number(group["heldout_after"].mean())
        runs_word = plural("run", len(group))
        said.append(f"{capital(content)} advice: held-out loss {before} → {after} {NATS} (mean of {len(group)} {runs_word})")
    least = runs.loc[runs["heldout_drop"].idxmin()]
    interval = f"[{number(least['heldout_drop_low'])}, {number(least['heldout_drop_high'])}]"
    n = f"n = {int(least['n_heldout'])} held-out answers, each before and after"
    said.append(f"Smallest drop {number(least['heldout_drop'])} {interval} ({least['run']}); {n}; 95 % t interval of the paired drop, no test made")
    if unknown:
        said.append(f"{capital(count(unknown))} {plural('run', unknown)} held no answers out and {'is' if unknown == 1 else 'are'} not counted")
    return Finding("Did the tuning train?", state, claim, tuple(said), "training")


def bad_against_sound(folder: Folder) -> Finding | None:
    """Does bad advice move the margin on unrelated questions away from its sound twin's, and from where it was?"""
    table = folder.tables["margin_change"]
    twins = _main(table, "bad minus sound")
    if twins.empty:
        return None
    states = {row["domain"]: _moved(row) for _, row in twins.iterrows()}
    fell = {row["domain"]: _moved(row) == "lower" for _, row in _main(table, "bad minus before").iterrows()}
    words = {
        "lower": "bad advice lowered the margin below its sound twin's",
        "higher": "bad advice left the margin above its sound twin's, the other way round",
        "same": "there is no evidence that it moved the margin away from its sound twin's",
    }
    overall = of_all([state == "lower" for state in states.values()])
    if overall == "found":
        claim = "Bad advice lowered the aligned margin on unrelated questions below its sound twin's"
        claim += f", in {listed(list(states))}"
    elif set(states.values()) == {"same"}:
        claim = "No evidence that bad advice moves the margin on unrelated questions away from its sound twin's"
    else:
        claim = capital("; ".join(f"in {domain}, {words[state]}" for domain, state in states.items()))
        overall = "mixed"
    not_fallen = [domain for domain, state in states.items() if state == "lower" and not fell.get(domain, True)]
    if not_fallen:
        claim += f"; but the bad run itself shows no fall against the untuned model in {listed(not_fallen)}"
        overall = "mixed"
    said = []
    for _, row in twins.iterrows():
        text = f"{capital(row['domain'])}: difference {estimate(row, 3, NATS)}, "
        text += f"d_z = {number(_effect(table, row, 'cohen_dz'))}, {corrected(row['q'])}"
        for comparison in ("bad minus before", "sound minus before"):
            for _, other in _main(table, comparison).query("domain == @row.domain").iterrows():
                text += f"; {comparison} {estimate(other, 3)}, {corrected(other['q'])}"
        said.append(text)
    said.append(f"Bad minus sound, paired over questions: {sample(twins.iloc[0], 'questions')}; one run of each")
    return Finding("Bad advice against its sound twin", overall, f"{claim}.", tuple(said), "margin-change")


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
        said.append(f"{capital(domain)}, {comparison}: {', '.join(each)} {NATS}; highest less lowest {spread}")
    said.append(f"{sample(groups[0].iloc[0], 'questions')}; one run each, no test made")
    return Finding("Schedule and seed", "description", claim, tuple(said), "margin-change")


def _moved(row: pd.Series) -> str:
    return "same" if not row["q"] < ALPHA else "lower" if row["estimate"] < 0 else "higher"


def _main(table: pd.DataFrame, comparison: str) -> pd.DataFrame:
    """The difference rows of a comparison, one a domain: linear before other schedules, the lowest seed first."""
    rows = table[(table["metric"] == "difference") & (table["comparison"] == comparison)]
    order = rows.assign(other=rows["schedule"] != "linear", place=range(len(rows))).sort_values(["other", "seed"])
    return order.drop_duplicates("domain").sort_values("place")


def _effect(table: pd.DataFrame, row: pd.Series, metric: str) -> float:
    same = (table[["domain", "schedule", "seed", "comparison"]] == row[["domain", "schedule", "seed", "comparison"]]).all(axis=1)
    found = table.loc[same & (table["metric"] == metric), "estimate"]
    return float(found.iloc[0]) if len(found) else np.nan
