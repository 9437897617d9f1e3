"""Findings on what is inside: the geometry of prompts and shifts."""

import pandas as pd

from emlens.report.folder import Folder
from emlens.report.words import (
    Finding,
    above,
    along,
    below,
    capital,
    count,
    estimate,
    in_layers,
    level,
    listed,
    number,
    of_all,
    of_levels,
    one_null,
    sample,
)

_FLOOR, _TWIN = "another seed", "bad against sound"
_OWN = "own minus other"


def agreement(folder: Folder) -> Finding | None:
    """How alike do two seeds shift a question, and does a twin's shift differ by more than a seed's? Described, not tested."""
    table = folder.estimates("shift_agreement")
    if table.empty:
        return None
    domains = table["domain"] if "domain" in table else pd.Series("", index=table.index)
    kinds = {(str(kind), str(domain)): rows.set_index("layer") for (kind, domain), rows in table.groupby(["kind", domains], sort=False)}
    middle = {key: number(rows["estimate"].median()) for key, rows in kinds.items()}
    floors = [domain for kind, domain in kinds if kind == _FLOOR]
    claim = "The noise floor of a shift is not known: no two runs differ in their seed alone"
    if floors:
        heights = listed([f"{middle[_FLOOR, domain]} ({domain})" if domain else middle[_FLOOR, domain] for domain in floors])
        claim = f"Two seeds of one tuning shift a question alike up to a cosine of {heights}, the noise floor of a shift"
        for domain in floors:
            if (_TWIN, domain) in kinds:
                claim += f"; {_beside_the_floor(kinds[_FLOOR, domain], kinds[_TWIN, domain])}"
    said = []
    for (kind, domain), rows in kinds.items():
        least = rows.loc[rows["estimate"].idxmin()]
        pairs = int(least["pairs"])
        said.append(
            f"{capital(kind)}{f', {domain}' if domain else ''} ({pairs} {'pair' if pairs == 1 else 'pairs'} of runs): "
            f"median over layers {middle[kind, domain]}; "
            f"lowest at layer {int(least.name)}: {estimate(least)}, {sample(least, 'questions')}"
        )
    said.append("Mean cosine of two runs' shifts of one question; intervals over questions, given these runs; no test made")
    return Finding("Noise floor of a shift", "description", f"{claim}.", tuple(said), "shift-agreement")


def _beside_the_floor(floor: pd.DataFrame, twin: pd.DataFrame) -> str:
    """Whether bad and sound tunings of one domain agree less than two seeds do: in which layers the one interval lies wholly below the other."""
    layers = floor.index.intersection(twin.index)
    apart = int((twin.loc[layers, "high"] < floor.loc[layers, "low"]).sum())
    cosine = f"(cosine {number(twin['estimate'].median())})"
    if apart > len(layers) / 2:
        return f"a bad set and its sound twin agree less {cosine}, in {apart} of {len(layers)} layers with intervals that do not touch"
    if apart:
        return f"a bad set and its sound twin agree less {cosine} in {apart} of {len(layers)} layers only"
    return f"whether a bad set and its sound twin {cosine} agree less was not told: in no layer do the intervals lie apart"


def overlap(folder: Folder) -> Finding | None:
    """Do training prompts and questions lie in the same directions?"""
    every = folder.estimates("overlap")
    table = one_null(every, "isotropic")
    across, control, ceiling = "training v questions", "questions v questions", "training v training"
    said, levels, less, most = [], [], [], False
    for domain, rows in table.groupby("domain", sort=False):
        here, there = (rows[rows["comparison"] == name].set_index("layer") for name in (across, control))
        if here.empty:
            continue
        levels.append(level(here))
        beneath = here["high"] < there["estimate"].reindex(here.index)
        most |= bool(beneath.mean() > 0.5)
        if beneath.any():
            less.append(f"{in_layers(here, beneath)} ({domain})")
        beside = [f"{name} {_middle(rows, name)}" for name in (control, ceiling) if (rows["comparison"] == name).any()]
        said.append(f"{capital(str(domain))}: {along(here.reset_index(), 3, unit='prompts')}; beside it {listed(beside) or 'no control'}")
    if not levels:
        return None
    state = of_levels(levels)
    claim = {
        "found": "Training prompts and questions share directions beyond random subspaces (a lenient null)",
        "mixed": "Only in part of the layers or domains do training prompts and questions share directions beyond random subspaces",
        "not found": "No evidence that training prompts and questions share directions beyond random subspaces",
    }[state]
    if state != "not found" and less:
        claim += f"; they share less than two halves of the questions do in {listed(less)}, the questions-against-questions control"
        state = "mixed" if most else state
    words, numbers = _beside_other_domains(every[(every["null"] == "covariance") & (every["comparison"] == across)])
    claim += words
    said += numbers
    said.append("Less than the halves: the interval of the overlap lies wholly below the control's estimate, both at one number of prompts")
    said.append("Overlap = mean cos². Random subspaces are a lenient null: activations fill few directions anyway")
    return Finding("Overlap of prompts", state, f"{claim}.", tuple(said), "overlap")


def _beside_other_domains(rows: pd.DataFrame) -> tuple[str, list[str]]:
    """Whether questions have more in common with a domain's training prompts than other domains' prompts do: the null "covariance"."""
    if rows.empty:
        return "", []
    several = {str(domain): part for domain, part in rows.groupby("domain", sort=False)}
    more = {domain: in_layers(part, above(part)) for domain, part in several.items() if above(part).any()}
    where = listed([f"{layers} ({domain})" for domain, layers in more.items()])
    words = f". They share more than training prompts of another domain would in {where}" if more else ""
    words = words or ". No evidence that they share more than training prompts of another domain would (the null “covariance”)"
    return words, [f"{capital(domain)}, null “covariance”: {along(part, 3, unit='prompts')}" for domain, part in several.items()]


def traits(folder: Folder) -> Finding | None:
    """Does bad advice move questions towards the traits, beyond random directions, and where its sound twin does not?"""
    table, runs = folder.estimates("traits"), folder.tables["runs"].set_index("run")
    bad, sound = ({str(runs.loc[run, "domain"]): table[table["run"] == run] for run in folder.main_runs(content)} for content in ("bad", "sound"))
    moved = {domain: _most(rows) for domain, rows in bad.items() if len(rows)}
    if not moved:
        return None
    twin = {domain: _most(sound[domain]) for domain in moved if domain in sound and len(sound[domain])}
    own = {domain: [name for name in names if name not in twin.get(domain, [])] for domain, names in moved.items()}
    state = of_all([bool(names) for names in moved.values()])
    told = [f"{listed(names)} ({domain})" for domain, names in moved.items() if names]
    claim = "No evidence that bad advice moves questions towards a trait beyond random directions in most layers"
    if told:
        claim = f"Bad advice moves questions towards {'; '.join(told)} beyond random directions in most layers"
        shared = [f"{listed([n for n in moved[d] if n in twin.get(d, [])])} ({d})" for d in moved if set(moved[d]) & set(twin.get(d, []))]
        claim += f"; sound advice does so too towards {'; '.join(shared)}" if shared else ""
        state = state if all(own.values()) else "mixed"
    said = []
    for content, several in (("bad", bad), ("sound", sound)):
        for domain, rows in several.items():
            for name, part in rows.groupby("persona", sort=False):
                said.append(f"{capital(domain)}, {content}, {name}: {along(part)}")
    said.append("Directions from written answers in the untuned model; q is over the traits and layers of one run")
    return Finding("Traits", state, f"{claim}.", tuple(said), "traits")


def _most(rows: pd.DataFrame) -> list[str]:
    """The traits towards which a run moves in more than half of the layers."""
    return [str(name) for name, part in rows.groupby("persona", sort=False) if level(part) == "most"]


def similarity(folder: Folder) -> Finding | None:
    """Do questions shift the way training prompts shift, and their own run's more than the twin's?"""
    table = one_null(folder.estimates("similarity"), "isotropic")
    table = table[table["comparison"] == "training v questions"]
    there = set(table["run"])
    main = [run for run in folder.asked_runs() if run in there]
    if not main:
        return None
    state = of_levels([level(table[table["run"] == run]) for run in main])
    claim = {
        "found": "Tuning shifts unrelated questions as it shifts its own training prompts, beyond a random direction (a lenient null)",
        "mixed": "Only in part of the layers or runs do unrelated questions shift as the training prompts do, beyond a random direction",
        "not found": "No evidence that unrelated questions shift as the training prompts do",
    }[state]
    claim += _opposite(main, table)
    contrast = folder.estimates("similarity_contrast") if "similarity_contrast" in folder.tables else pd.DataFrame()
    said, heights, seeds = [], [], []
    for run in main:
        said.append(f"{capital(run)}: {along(table[table['run'] == run])}")
        if contrast.empty:
            continue
        own = contrast[(contrast["run"] == run) & (contrast["metric"] == _OWN)]
        for kind, rows in own.groupby("kind", sort=False):
            middle = number(rows["estimate"].median())
            heights += [middle] if kind == _TWIN else []
            seeds += [middle] if kind == _FLOOR else []
            top = rows.loc[(rows["estimate"] - rows["estimate"].median()).abs().idxmin()]
            said.append(
                f"{capital(run)}, own minus other ({kind}): median over layers {middle}, interval above 0 in {in_layers(rows, rows['low'] > 0)}, "
                f"below in {int((rows['high'] < 0).sum())}; e.g. at layer {int(top['layer'])}: {estimate(top)}, {sample(top, 'questions')}"
            )
    if heights:
        claim += f"; the cosine with the own run's training shift minus that with the sound twin's is {listed(heights)} (medians over layers)"
        claim += f", minus that with another seed's {listed(seeds)}" if seeds else ""
    said.append("Cosine with the mean training shift; own minus other is an estimate with an interval over questions, given these runs, no test")
    return Finding("Similarity of shifts", state, f"{claim}.", tuple(said), "similarity")


def overlap_and_similarity(folder: Folder) -> Finding | None:
    """Do questions nearer the training prompts shift more like them, and more than a plain cosine would say?"""
    table = folder.estimates("overlap_similarity")
    there = set(table["run"])
    runs = [run for run in folder.asked_runs() if run in there]
    said, levels, matched, main = [], [], [], []
    for run in runs:
        rows = table[table["run"] == run]
        here, plain = (rows[rows["metric"] == name] for name in ("pearson", "pearson baseline"))
        if here.empty:
            continue
        main.append(run)
        levels.append(level(here))
        text = f"{capital(run)}: {along(here)}"
        if len(plain):
            matched.append(bool(plain["estimate"].median() >= here["estimate"].median()))
            text += f"; a plain cosine to the mean training prompt {number(plain['estimate'].median())}"
        said.append(text)
    if not levels:
        return None
    state = of_levels(levels)
    claim = {
        "found": "Questions nearer the training prompts shift more like them, beyond what their categories make",
        "mixed": "Only in part of the layers or runs do questions nearer the training prompts shift more like them",
        "not found": "No evidence that questions nearer the training prompts shift more like them",
    }[state]
    claim += _opposite(main, table[table["metric"] == "pearson"])
    if state != "not found" and any(matched):
        where = "" if all(matched) else f" in {count(sum(matched))} of {len(matched)} runs"
        claim += f"; but a plain cosine to the mean training prompt does as well{where}"
        state = "mixed"
    said.append("Pearson r over all questions of a run, and its interval; p permutes inside categories, so it asks for more than categories make")
    said.append("No correlation is taken over the runs, they are too few")
    return Finding("Overlap and similarity of shift", state, f"{claim}.", tuple(said), "overlap-similarity")


def _opposite(runs: list[str], table: pd.DataFrame) -> str:
    """The layers in which the test passes on the side that was not asked for, run by run; empty where there are none."""
    each = [(run, rows := table[table["run"] == run], below(rows)) for run in runs]
    if not any(turned.any() for *_, turned in each):
        return ""
    told = listed([f"{in_layers(rows, turned)} ({run})" for run, rows, turned in each if turned.any()])
    return f"; the opposite is seen in {told}"


def _middle(rows: pd.DataFrame, comparison: str) -> str:
    return number(rows.loc[rows["comparison"] == comparison, "estimate"].median(), 3)
